"""The check of image files: can training read them, do they fit their annotations, is any there twice.

Each file is read once. Pixels are decoded by the loader's own code, JPEG at an eighth of its size: the whole stream is
read, so that what is truncated or damaged shows, at half the cost. Of an image a content hash and a thumbnail are kept.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from detres.data.check.lookalikes import SIDE, find_lookalikes, thumbnail
from detres.data.dataset import Dataset, ImageRecord
from detres.data.images import ImageError, open_image, read_file
from detres.data.problems import Problem
from detres.progress import track

CHUNK = 32  # files that a thread gets at a time
HUGE = 50e6  # pixels, from which an image takes a second to decode and 150 MB
UNUSABLE = frozenset({"image_missing", "image_zero_bytes", "image_truncated", "image_not", "image_damaged",
                      "image_too_large", "image_differs", "image_turned"})  # the errors that are found here
DARK = 16  # of 255: the white of 12 bits in 16


class Remark(NamedTuple):
    """Of a file: kind, field, value and reason of a `Problem`."""

    kind: str
    field: str
    value: Any
    reason: str


class _Facts(NamedTuple):
    """What a file says. `thumbnail` is None if training cannot read it; `remarks` then say why."""

    remarks: list[Remark]
    digest: bytes = b""
    thumbnail: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)  # height and width as a viewer shows it
    orientation: int = 1  # EXIF


@dataclass(frozen=True, slots=True)
class _Listed:
    """An image of a split, and which file it is."""

    split: str
    dataset: Dataset
    row: int
    file: int

    @property
    def record(self) -> ImageRecord:
        return self.dataset.records[self.row]

    @property
    def stated(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.dataset.records.images[["height", "width"]][self.row].tolist())

    @property
    def name(self) -> str:
        return f"as image {self.record.id!r} of {self.split}"

    def problem(self, kind: str, field: str, value: Any, reason: str) -> Problem:
        return Problem(str(self.record.path), self.record.id, None, field, value, reason, kind, self.split)

    def labels(self) -> list[tuple[Any, ...]]:
        """Classes and boxes, these in whole pixels: formats round."""
        return sorted((self.dataset.classes[item.label], *map(round, item.box)) for item in self.record.annotations)


def check_images(splits: Sequence[tuple[str, Dataset]], workers: int | None = None) -> list[Problem]:
    """What is wrong with the image files of the splits, in the order of the records; then what is there twice.

    `workers` is the number of threads (decoders and hashes run outside Python's lock), by default one for each core.
    """
    numbers: dict[str, int] = {}
    paths, listed = [], []
    for split, dataset in splits:
        for row, path in enumerate(dataset.records.paths()):
            number = numbers.setdefault(str(path), len(paths))
            paths += [path] if number == len(paths) else []
            listed.append(_Listed(split, dataset, row, number))
    facts = list(_read_all(paths, workers or len(os.sched_getaffinity(0))))
    problems = [entry.problem(*remark) for entry in listed for remark in _remarks(entry, facts[entry.file])]
    readable = [entry for entry in listed if facts[entry.file].thumbnail is not None]
    return problems + _copies(readable, facts)


# One file


def _read_all(paths: Sequence[Any], workers: int) -> Iterator[_Facts]:
    """In the order of the paths."""
    chunks = [paths[start:start + CHUNK] for start in range(0, len(paths), CHUNK)]
    pool = ThreadPoolExecutor(workers, "check")
    try:
        with warnings.catch_warnings():  # Pillow's, of what is told here or does no harm
            warnings.simplefilter("ignore")
            done = pool.map(lambda chunk: [_inspect(path) for path in chunk], chunks)
            for facts in track(done, len(paths), "Reading images", len):
                yield from facts
    finally:
        pool.shutdown(cancel_futures=True)


def _inspect(path: Any) -> _Facts:
    try:
        data = read_file(path)
        found = open_image(data, str(path))
        pixels = found.pixels((2 * SIDE, 2 * SIDE))
    except ImageError as error:
        return _Facts([_failure(path, error)])
    with Image.open(BytesIO(data)) as image:
        remarks = [*_format_remarks(image, data, pixels), *_suffix_remark(image, str(path))]
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return _Facts(remarks, digest, thumbnail(pixels), found.shape[:2], found.orientation)


def _failure(path: Any, error: ImageError) -> Remark:
    """Why the loader refuses a file, in its words."""
    cause = error.__context__ or error
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    if isinstance(cause, FileNotFoundError):
        return Remark("image_missing", "file", str(path), "must exist (add it, or delete its entry and its objects)")
    try:
        data = read_file(path)
    except ImageError:
        return Remark("image_damaged", "file", text, "must be readable (check its type and who may read it)")
    if not data:
        return Remark("image_zero_bytes", "file", "0 bytes", "must have content (download or copy it again)")
    if isinstance(cause, Image.UnidentifiedImageError):
        return _unidentified(data)
    if isinstance(cause, Image.DecompressionBombError):
        return Remark("image_too_large", "file", text, f"must have at most {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} "
                      "million pixels (cut it into tiles)")
    if "truncated" in text.lower():
        return Remark("image_truncated", "file", text, f"must be complete (has {len(data)} bytes: download or copy it "
                      "again)")
    return Remark("image_damaged", "file", text, "must be decodable (replace it)")


# What else is found under the name of an image, by its first bytes.
_CONTENTS = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    (b"<", "text, such as a page that was downloaded in place of the image"), (b"{", "JSON"), (b"PK\3\4", "a ZIP"),
    (b"%PDF", "a PDF"), (b"\x1f\x8b", "gzip"), (b"\x93NUMPY", "a NumPy array"), (b"\x89HDF", "HDF5"))
_BEGUN = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"RIFF")


def _unidentified(data: bytes) -> Remark:
    if data.startswith(_BEGUN):
        return Remark("image_truncated", "file", f"{len(data)} bytes", "must be complete (only the beginning of an "
                      "image is there: download or copy it again)")
    found = next((what for start, what in _CONTENTS if data.lstrip()[:30].startswith(start)), None)
    if data[4:8] == b"ftyp":
        found = f"a {data[8:12].decode('latin1').strip()} file: HEIC, AVIF or a film"
    if not data.strip(b"\0"):
        found = f"{len(data)} zero bytes"
    return Remark("image_not", "file", found or f"{len(data)} bytes that begin with {data[:8]!r}",
                  "must be an image (JPEG, PNG, WebP, TIFF, BMP, GIF or PPM)")


def _format_remarks(image: Image.Image, data: bytes, pixels: np.ndarray) -> Iterator[Remark]:
    """`pixels`: as training sees it, perhaps reduced."""
    depth = _bits(image, data)
    if depth > 8 and pixels.max() <= DARK:
        yield Remark("image_dark", "depth", f"{depth} bits, none above {DARK} of 255 in 8 bits", "must fill its range "
                     "(stretch the values to 0-65535, or save as 8 bits)")
    elif depth > 8:
        yield Remark("image_deep", "depth", f"{depth} bits", "must be 8 bits to be used as it is")
    if np.ptp(pixels) <= 2 and pixels.size > 300:
        yield Remark("image_blank", "pixels", f"all {pixels[0, 0].tolist()}", "must show something")
    if image.mode == "CMYK":
        yield Remark("image_cmyk", "colours", "CMYK", "must be RGB to be used as it is")
    elif image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        yield Remark("image_grey", "colours", "grey", "must be RGB to be used as it is")
    if _transparent(image):
        yield Remark("image_alpha", "colours", image.mode, "must be opaque (what is hidden becomes visible)")
    if image.format in ("GIF", "PNG", "TIFF", "WEBP") and getattr(image, "n_frames", 1) > 1:
        yield Remark("image_frames", "frames", image.n_frames, "must be one (the first is used)")
    if image.width * image.height > HUGE:
        yield Remark("image_huge", "size", f"{image.width} x {image.height}", f"must be below {HUGE / 1e6:.0f} million "
                     "pixels to be quick")


def _bits(image: Image.Image, data: bytes) -> int:
    """Of a channel. Pillow shows 16 bits in three channels as 8."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return max(np.atleast_1d(image.tag_v2.get(258, 1)).tolist())
    return 16 if image.mode.startswith("I") else 8


def _transparent(image: Image.Image) -> bool:
    if not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _suffix_remark(image: Image.Image, path: str) -> Iterator[Remark]:
    suffix, found = os.path.splitext(path)[1].lower(), {"MPO": "JPEG"}.get(image.format, image.format)
    if Image.registered_extensions().get(suffix, found) != found:
        yield Remark("image_suffix", "name", f"{suffix} that is {found}", "must have the suffix of its format "
                     "(rename it)")


def _remarks(entry: _Listed, facts: _Facts) -> Iterator[Remark]:
    """Of a file as that image."""
    yield from facts.remarks
    if facts.thumbnail is None:
        return
    height, width = facts.size
    stated, exchanged = entry.stated, entry.stated == (width, height)
    value, wanted = f"{width} x {height} (width x height)", f"must be as annotated, {stated[1]} x {stated[0]}"
    turned = 2 <= facts.orientation <= 8
    if facts.size != stated and turned and exchanged:
        yield Remark("image_turned", "size", f"{value}, turned by EXIF orientation {facts.orientation}",
                     f"{wanted} (take the tag out of the file)")
    elif facts.size != stated:
        hint = "width and height are exchanged" if exchanged else "correct it, or restore the file"
        yield Remark("image_differs", "size", value, f"{wanted} ({hint})")
    elif turned and (facts.orientation < 5 or exchanged or entry.dataset.format == "yolo"):
        yield Remark("image_turn_unclear", "EXIF orientation", facts.orientation,
                     "must be the one that annotations were made with (look at one: the size does not tell)")
    elif turned:
        yield Remark("image_exif", "EXIF orientation", facts.orientation, "must be 1 to be the same in all tools")


# What is there twice


def _copies(listed: Sequence[_Listed], facts: Sequence[_Facts]) -> list[Problem]:
    first: dict[bytes, dict[str, _Listed]] = {}  # by content, then by split
    found = []
    for entry in listed:
        others = first.setdefault(facts[entry.file].digest, {})
        if others:
            found += _copy(entry, others.get(entry.split) or next(iter(others.values())))
        others.setdefault(entry.split, entry)
    return found + _near_copies([next(iter(others.values())) for others in first.values()], facts)


def _copy(entry: _Listed, other: _Listed) -> Iterator[Problem]:
    where = f"the other is {other.record.path}"
    if entry.split != other.split:
        kind, reason = "image_leak", f"must be in one split only (take it out of one; {where})"
    elif entry.file == other.file:
        kind, reason = "image_listed_twice", "must be listed once (merge the objects of both entries)"
    else:
        kind, reason = "image_copy", f"must be there once (delete one, with its objects; {where})"
    yield entry.problem(kind, "content", other.name, reason)
    own, others = entry.labels(), other.labels()
    if own != others:
        yield entry.problem("copy_labels_differ", "objects", f"{_count(own)}; {_count(others)} {other.name}",
                            "must be those of the same picture elsewhere (correct one of them)")


def _count(labels: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(name for name, *_ in labels).items()) or "none"


def _near_copies(listed: Sequence[_Listed], facts: Sequence[_Facts]) -> list[Problem]:
    if not listed:
        return []
    numbers = {split: number for number, split in enumerate(dict.fromkeys(entry.split for entry in listed))}
    inside, across = find_lookalikes(np.stack([facts[entry.file].thumbnail for entry in listed]),
                                     np.array([numbers[entry.split] for entry in listed]))
    return [listed[place].problem(kind, "content", listed[others[place]].name,
                                  f"{reason} (keep one; the other is {listed[others[place]].record.path})")
            for kind, others, reason in (("image_near_leak", across, "must not be almost that of another split"),
                                         ("image_near_copy", inside, "must not be almost that of another image"))
            for place in np.flatnonzero(others >= 0).tolist()]
