"""Image files to RGB arrays, whatever the file holds.

Colour: grey is repeated; 16 bits are scaled to 8 (by 257, so that 65535 is 255); CMYK and YCCK JPEG go through Pillow,
which undoes Adobe's inversion; palettes are looked up. Alpha is dropped, not blended, as Detectron2 and torchvision do:
hidden pixels show what the file stores for them. Orientation: the EXIF tag is applied, so height and width are those a
viewer shows. Of an animation, the first frame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_TURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


class ImageError(ValueError):
    """One image that cannot be used; the message is one line and names the file."""


def read_image(path: str | Path) -> np.ndarray:
    """The image file as (H, W, 3) uint8 RGB, EXIF orientation applied.

    Raises ImageError, with the path, if the file is missing, truncated, corrupt, or of a kind without defined colours.
    """
    with _open(path) as image:
        return _pixels(image, f"image file {path}")


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the image file, EXIF orientation applied, from its header. Raises ImageError."""
    with _open(path) as image:
        width, height = image.size
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow has turned the size of a TIFF already
    return (width, height) if turned else (height, width)


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


def _open(path: str | Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise ImageError(f"image file must exist, got {path}. Check the path.") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"image file must be in a known format, got {path} ({Path(path).stat().st_size} bytes). "
                         "Replace or remove it.") from None
    except Exception as error:
        raise _unreadable(f"image file {path}", error) from None


def _unreadable(name: str, error: Exception) -> ImageError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ImageError(f"{name} must be readable, got {reason}. Replace or remove it.")


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    try:
        image.load()
        orientation = _orientation(image)  # after load: Pillow turns a TIFF there, and takes the tag away
        rgb = _to_rgb(image)
        if orientation in _TURN:
            rgb = rgb.transpose(_TURN[orientation])
        return np.array(rgb)
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError
        raise _unreadable(name, error) from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag does not damage the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integers of {values.min()} to {values.max()}, where 16 bits hold 0 to 65535")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no defined white")
    return image if image.mode == "RGB" else image.convert("RGB")
