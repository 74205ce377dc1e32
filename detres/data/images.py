"""Image files to RGB arrays, whatever the file holds.

Plain JPEG, grey or in three colours, is decoded by OpenCV, everything else by Pillow, twice as slow to an array; both
have libjpeg-turbo, and the same bits. Pillow reads all headers.

Colour: grey is repeated; 16 bits are scaled to 8 (by 257, so that 65535 is 255); CMYK and YCCK JPEG go through Pillow,
which undoes Adobe's inversion; palettes are looked up. Alpha is dropped, not blended, as Detectron2 and torchvision do:
hidden pixels show what the file stores for them. Orientation: the EXIF tag is applied, so height and width are those a
viewer shows. Of an animation, the first frame.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_TURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}

# cv2's names for "a share of the size"; grey is undone by the colour asked for beside it.
_REDUCED = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
            8: cv2.IMREAD_REDUCED_GRAYSCALE_8}


class ImageError(ValueError):
    """One image that cannot be used; the message is one line and names the file."""


def read_image(path: str | Path) -> np.ndarray:
    """The image file as (H, W, 3) uint8 RGB, EXIF orientation applied.

    Raises ImageError, with the path, if the file is missing, truncated, corrupt, or of a kind without defined colours.
    """
    return decode_image(read_file(path), str(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """As `read_image`, of the bytes of a file; `name` says in errors which."""
    return open_image(data, name).pixels()


def read_file(path: str | Path) -> bytes:
    """Raises ImageError."""
    if not isinstance(path, (str, Path)):  # in a shard
        return path.read_bytes()
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"image file must exist, got {path}. Check the path.") from None
    except OSError as error:
        raise _unreadable(f"image file {path}", error) from None


@dataclass(frozen=True)
class EncodedImage:
    """An image of which only the header was read; pixels are decoded when they are asked for, at a size that suffices.

    Arrays and this have `shape` in common, and functions of numpy take either.
    """

    data: bytes
    name: str
    shape: tuple[int, int, int]  # H, W, 3, upright
    orientation: int
    plain: bool  # JPEG, grey or in three colours

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.pixels().astype(dtype or np.uint8, copy=False)

    def pixels(self, needed: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 RGB. With `needed` (height, width), a JPEG may come at 1/2, 1/4 or 1/8 of its size, rounded
        up, yet not under that size: the decoder's inverse DCT has fewer points then. Raises ImageError."""
        reduction = 1 if needed is None else _reduction(self.shape, needed)
        # Without an end marker it is truncated, or something follows: for Pillow to tell.
        if self.plain and self.data.endswith(b"\xff\xd9"):
            flags = _REDUCED[reduction] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            try:
                found = cv2.imdecode(np.frombuffer(self.data, np.uint8), flags)
            except cv2.error:
                found = None
            if found is not None:
                return found if self.orientation == 1 else np.array(_upright(Image.fromarray(found), self.orientation))
        return _pixels(_open(io.BytesIO(self.data), self.name, len(self.data)), f"image file {self.name}")


def open_image(data: bytes, name: str) -> EncodedImage:
    """The image in the bytes of a file, not yet decoded; `name` says in errors which. Raises ImageError."""
    with _open(io.BytesIO(data), name, len(data)) as image:
        plain = image.format == "JPEG" and image.mode in ("L", "RGB")
        return EncodedImage(data, name, (*_upright_size(image), 3), _orientation(image), plain)


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the image file, EXIF orientation applied, from its header. Raises ImageError."""
    with _open(path, path) as image:
        return _upright_size(image)


def to_rgb_array(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """An image given as a path, a PIL image or a uint8 array, as (H, W, 3) uint8 RGB.

    Arrays are RGB (H, W, 3), RGBA (H, W, 4), of which the alpha is dropped, or grey (H, W) or (H, W, 1).
    Raises ImageError for a bad file or PIL image, TypeError or ValueError for anything else.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _pixels(image, f"PIL image {getattr(image, 'filename', '') or repr(image)}")
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a path, a PIL image or a numpy array, got {type(image).__name__}. "
                        "Convert it, such as a tensor (3, H, W) with .permute(1, 2, 0).numpy().")
    if image.dtype != np.uint8:
        raise ValueError(f"image array must be uint8 of 0-255, got {image.dtype}. "
                         "Scale it to 0-255 and use .astype('uint8').")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"image array must be (H, W, 3), (H, W, 4), (H, W, 1) or (H, W), got {image.shape}. "
                         "Put channels last, and pass several images as a list.")
    channels = [0, 0, 0] if image.shape[2] == 1 else [0, 1, 2]
    return np.ascontiguousarray(image[..., channels])


def _open(file: str | Path | io.BytesIO, name: str | Path, size: int | None = None) -> Image.Image:
    try:
        return Image.open(file)
    except FileNotFoundError:
        raise ImageError(f"image file must exist, got {name}. Check the path.") from None
    except Image.UnidentifiedImageError:
        size = Path(name).stat().st_size if size is None else size
        raise ImageError(f"image file must be in a known format, got {name} ({size} bytes). Replace or remove it."
                         ) from None
    except Exception as error:
        raise _unreadable(f"image file {name}", error) from None


def _unreadable(name: str, error: Exception) -> ImageError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ImageError(f"{name} must be readable, got {reason}. Replace or remove it.")


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    try:
        image.load()
        orientation = _orientation(image)  # after load: Pillow turns a TIFF there, and takes the tag away
        rgb = _to_rgb(image)
        return np.array(_upright(rgb, orientation))
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError
        raise _unreadable(name, error) from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag does not damage the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURN[orientation]) if orientation in _TURN else image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image that is open and not yet loaded."""
    width, height = image.size
    turned = image.format != "TIFF" and 5 <= _orientation(image) <= 8  # Pillow has turned the size of a TIFF already
    return (width, height) if turned else (height, width)


def _reduction(shape: Sequence[int], needed: Sequence[int]) -> int:
    ratio = min(side / least for side, least in zip(shape, needed))
    return next((factor for factor in (8, 4, 2) if ratio >= factor), 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers of {values.min()} to {values.max()}, where 16 bits hold 0 to 65535")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no defined white")
    return image if image.mode == "RGB" else image.convert("RGB")
