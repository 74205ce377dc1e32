"""Why AP is near zero: usual causes are tried, and those are named after whose correction detections lie on objects.

Image ids come first, then boxes, then classes, each judged with the corrections before it, on a sample: the best
detections of some hundred images.

Legend: n images of the sample, D its detections, G its objects, P pairs of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from detres.data.records import ranges
from detres.evaluation.coco_columns import ResultsFile, TruthFile

IMAGES = 400
BEST = 10  # detections of an image
SHARE = 0.1  # of the sampled detections must overlap an object after a correction,
GAIN = 2  # and more than so many times those that did before
PENALTY = 0.9  # of a correction of two things at once, which more easily fits by chance
SIDES = (300, 320, 416, 512, 640, 800, 1024)  # of images as models commonly see them


@dataclass(frozen=True)
class _Objects:
    """Of the sampled images."""

    images: np.ndarray  # (n,) ids, ascending
    sizes: np.ndarray  # (n, 2) width, height; 0 where unknown
    image: np.ndarray  # (G,) 0..n-1, ascending
    labels: np.ndarray  # (G,) category ids
    boxes: np.ndarray  # (G, 4) xywh


@dataclass(frozen=True)
class _Guesses:
    """The best detections of the sampled images."""

    image: np.ndarray  # (D,) 0..n-1
    labels: np.ndarray  # (D,) category ids
    boxes: np.ndarray  # (D, 4) xywh


def diagnose(truth: TruthFile, results: ResultsFile) -> list[str]:
    """Name the likely causes of an AP near zero; empty if none of those that are known explains it.

    Tries ids of images and categories off by one or counted by position, boxes as corners, centres or fractions, x and
    y exchanged, and boxes of the resized image. Each cause is told with how many detections overlap an object with an
    IoU of 0.5 or more, as they are and corrected. The same files give the same answer.
    """
    objects = _sampled_objects(truth)
    guesses, image_cause = _image_cause(truth, objects, results)
    guesses, box_cause = _box_cause(objects, guesses)
    causes = image_cause, box_cause, _label_cause(truth, objects, guesses)
    return [cause for cause in causes if cause]


def _sampled_objects(truth: TruthFile) -> _Objects:
    rows = np.flatnonzero(~truth.crowd & np.isfinite(truth.boxes_xywh).all(1))
    images = np.unique(truth.image_ids[rows])
    images = images[np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int)]  # evenly
    rows = rows[np.isin(truth.image_ids[rows], images)]
    rows = rows[np.argsort(truth.image_ids[rows], kind="stable")]
    sizes = np.zeros((len(images), 2))
    listed = np.flatnonzero(np.isin(truth.images.ids, images))
    sizes[np.searchsorted(images, truth.images.ids[listed])] = np.stack(
        [truth.images.width[listed], truth.images.height[listed]], 1)
    return _Objects(images, sizes, np.searchsorted(images, truth.image_ids[rows]), truth.category_ids[rows],
                    truth.boxes_xywh[rows])


def _sampled_guesses(objects: _Objects, image_ids: np.ndarray, results: ResultsFile) -> _Guesses:
    rows = np.flatnonzero(np.isin(image_ids, objects.images))
    image = np.searchsorted(objects.images, image_ids[rows])
    order = np.lexsort((-results.scores[rows], image))
    rows, image = rows[order], image[order]
    best = np.arange(len(image)) - np.searchsorted(image, image) < BEST
    return _Guesses(image[best], results.category_ids[rows[best]], results.boxes_xywh[rows[best]])


def _overlapping(objects: _Objects, guesses: _Guesses) -> tuple[int, int]:
    """How many guesses have an IoU of 0.5 with an object of their image, and with one of their class there."""
    first = np.searchsorted(objects.image, guesses.image)
    count = np.searchsorted(objects.image, guesses.image, side="right") - first
    d = np.repeat(np.arange(len(count)), count)  # (P,)
    g = ranges(first, count)
    near = _iou(guesses.boxes[d], objects.boxes[g]) >= 0.5
    d, g = d[near], g[near]
    return len(np.unique(d)), len(np.unique(d[guesses.labels[d] == objects.labels[g]]))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(P,) of boxes xywh, row by row; NaN or 0 for boxes without an inside."""
    with np.errstate(all="ignore"):
        low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
        shared = (high - low).clip(0).prod(1)
        return shared / (a[:, 2:].clip(0).prod(1) + b[:, 2:].clip(0).prod(1) - shared)


def _explains(after: float, before: int, sample: int) -> bool:
    return after >= SHARE * sample and after > GAIN * before


def _told(cause: str, fix: str, after: int, before: int, sample: int, what: str = "an object") -> str:
    return (f"{cause}: corrected, {after} of {sample} sampled detections overlap {what} with an IoU of 0.5 or more; as "
            f"they are, {before}. {fix}")


def _numbered(ids: np.ndarray, known: np.ndarray, what: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Other readings of ids, with their description and the fix. Ids that are no position become -1."""
    if ids.dtype.kind != "i" or known.dtype.kind != "i":
        return
    yield f"{what} ids are one too high", "Subtract 1.", ids - 1
    yield f"{what} ids are one too low", "Add 1.", ids + 1
    for start in (0, 1):
        place = ids - start
        inside = (place >= 0) & (place < len(known))
        yield (f"{what} ids are positions in the ground truth's list, counted from {start}",
               "Write the ids of the list.", np.where(inside, known[place.clip(0, len(known) - 1)], -1))


def _image_cause(truth: TruthFile, objects: _Objects, results: ResultsFile) -> tuple[_Guesses, str | None]:
    """Judged by where detections lie, or, if few are of images that there are, by that."""
    chosen, cause = _sampled_guesses(objects, results.image_ids, results), None
    before = best = _overlapping(objects, chosen)[0]
    listed = most = _listed(truth, results.image_ids)
    for text, fix, ids in _numbered(results.image_ids, truth.images.ids, "Image"):
        guesses, now = _sampled_guesses(objects, ids, results), _listed(truth, ids)
        after = _overlapping(objects, guesses)[0]
        if now > most and now > GAIN * listed:
            chosen, best, most = guesses, after, now
            cause = (f"{text}: corrected, {now} of {len(ids)} detections are of listed images; as they are, {listed}. "
                     f"{fix}")
        elif most == listed and after > best and _explains(after, before, len(guesses.image)):
            chosen, best, cause = guesses, after, _told(text, fix, after, before, len(guesses.image))
    return chosen, cause


def _listed(truth: TruthFile, image_ids: np.ndarray) -> int:
    return int(np.isin(image_ids, truth.images.ids).sum()) if image_ids.dtype.kind == truth.images.ids.dtype.kind else 0


def _box_cause(objects: _Objects, guesses: _Guesses) -> tuple[_Guesses, str | None]:
    """Sizes of images are given to the readings for each detection."""
    sizes, sample = objects.sizes[guesses.image], len(guesses.image)
    before = _overlapping(objects, guesses)[0]
    chosen, best, cause = guesses, float(before), None
    for text, fix, read, changes in _readings():
        with np.errstate(all="ignore"):
            corrected = replace(guesses, boxes=read(guesses.boxes, sizes))
        after = _overlapping(objects, corrected)[0]
        worth = after * PENALTY ** (changes - 1)
        if worth > best and _explains(worth, before, sample):
            chosen, best, cause = corrected, worth, _told(text, fix, after, before, sample)
    return chosen, cause


Reading = Callable[[np.ndarray, np.ndarray], np.ndarray]  # boxes (D, 4), sizes (D, 2) -> boxes (D, 4) xywh in pixels


def _readings() -> Iterator[tuple[str, str, Reading, int]]:
    """What boxes may be instead of xywh in pixels: description, fix, how to read them, how much that changes."""
    for layout, to_xywh in _LAYOUTS.items():
        if layout:
            yield f"Boxes are {layout}", _FIX, lambda boxes, sizes, f=to_xywh: f(boxes), 1
        for frame, to_pixels in _frames():
            text = f"Boxes are {layout}, {frame}" if layout else f"Boxes are {frame}"
            yield text, _FIX, lambda boxes, sizes, f=to_xywh, p=to_pixels: f(p(boxes, sizes)), 2 if layout else 1


_FIX = "Write [x, y, width, height] in pixels of the original image."
_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda b: b,
    "[x1, y1, x2, y2]": lambda b: np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1),
    "[center x, center y, width, height]": lambda b: np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, 2:]], 1),
    "exchanged in x and y, as of a transposed image": lambda b: b[:, [1, 0, 3, 2]],
}


def _frames() -> Iterator[tuple[str, Reading]]:
    """Coordinates other than pixels of the original image."""
    yield "in fractions of the image's width and height", lambda b, size: b * np.tile(size, 2)
    yield ("in pixels of the image resized to a shorter side of 800, a longer of at most 1333",
           lambda b, size: b / np.minimum(800 / size.min(1), 1333 / size.max(1))[:, None])
    for side in SIDES:
        yield f"in pixels of the image resized to {side} x {side}", lambda b, size, s=side: b * np.tile(size / s, 2)
        yield (f"in pixels of the image resized to a longer side of {side}",
               lambda b, size, s=side: b * (size.max(1) / s)[:, None])
        yield f"in pixels of the image resized into the middle of {side} x {side}", lambda b, size, s=side: _unpadded(
            b, size, s)


def _unpadded(boxes: np.ndarray, size: np.ndarray, side: int) -> np.ndarray:
    scale = size.max(1, keepdims=True) / side
    start = (side - size / scale) / 2
    return np.concatenate([boxes[:, :2] - start, boxes[:, 2:]], 1) * scale


def _label_cause(truth: TruthFile, objects: _Objects, guesses: _Guesses) -> str | None:
    sample, what = len(guesses.image), "an object of their class"
    anything, before = _overlapping(objects, guesses)
    best, cause = before, None
    for text, fix, labels in _numbered(guesses.labels, np.unique(truth.categories.ids), "Category"):
        after = _overlapping(objects, replace(guesses, labels=labels))[1]
        if after > best and _explains(after, before, sample):
            best, cause = after, _told(text, fix, after, before, sample, what)
    if cause is None and _explains(anything, 2 * before, sample):
        return (f"Classes are wrong: {anything} of {sample} sampled detections overlap an object with an IoU of 0.5 or "
                f"more, {before} of them one of their class. Compare the order of classes with the ground truth's.")
    return cause
