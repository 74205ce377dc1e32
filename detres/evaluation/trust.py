"""Whether two COCO files can be compared: what pycocotools takes silently is refused, or told with its effect.

`check` refuses faulty entries, or leaves them out; `area_report` compares the areas that a file states with its masks.
What pycocotools does with each fault was tried with version 2.0.11.

Legend: G annotations, D detections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from detres.data.masks import compressed
from detres.evaluation.coco_columns import ResultsFile, Segmentation, TruthFile
from detres.evaluation.coco_numbers import IouType
from detres.evaluation.mask_overlaps import decode_runs, rle_areas

EXAMPLES = 3
MASKS_AT_ONCE = 2000
MAX_COORDINATE = 1e6  # pixels; pycocotools walks along every edge
SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Checked:
    """What can be evaluated, and what was wrong with the rest."""

    truth: TruthFile
    results: ResultsFile
    warnings: list[str]


@dataclass(frozen=True)
class _Fault:
    kind: str  # annotations, detections, images, categories
    rows: np.ndarray  # bool, of all entries
    what: str
    values: Sequence[Any]  # of all entries, to show
    effect: str  # in pycocotools
    done: str = "Left out."  # when lenient

    def __str__(self) -> str:
        rows = np.flatnonzero(self.rows)
        shown = ", ".join(f"entry {i} ({_shown(self.values[i])})" for i in rows[:EXAMPLES])
        more = ", ..." if len(rows) > EXAMPLES else ""
        return f"{len(rows)} of {len(self.rows)} {self.kind} {self.what}: {shown}{more}. {self.effect}"


def _shown(value: Any) -> str:
    return str(value.tolist() if isinstance(value, np.generic | np.ndarray) else value)


def check(truth: TruthFile, results: ResultsFile, iou_type: IouType, lenient: bool = False) -> Checked:
    """Find what makes the numbers of an evaluation wrong or meaningless.

    Masks and keypoints must have been read for the `iou_type`s that need them. Raises ValueError listing all faults,
    each with its count, its first entries (counted from 0) and what pycocotools does with it. With `lenient` entries
    that cannot be evaluated are left out, and the warnings say so.
    """
    faults = [fault for fault in chain(_truth_faults(truth, iou_type), _results_faults(truth, results, iou_type))
              if fault.rows.any()]
    told = [str(fault) for fault in faults]
    empty = [] if len(results.scores) else [f"{results.path} has no detections. pycocotools stops with an IndexError."]
    if (faults or empty) and not lenient:
        listed = "\n".join(f"- {text}" for text in told + empty)
        raise ValueError(f"{truth.path} and {results.path} must be sound to be compared, got:\n{listed}\n"
                         f"Correct them, or evaluate what is left: --lenient, in Python lenient=True.")
    warnings = [f"{text} {fault.done}" for text, fault in zip(told, faults)] + [f"{text} All is missed: AP is 0."
                                                                              for text in empty]
    kept = replace(truth, area=_areas(truth)).select(~_left_out(faults, "annotations", len(truth.ids)))
    return Checked(kept, results.select(~_left_out(faults, "detections", len(results.scores))), warnings)


def _left_out(faults: list[_Fault], kind: str, entries: int) -> np.ndarray:
    rows = np.zeros(entries, bool)
    for fault in faults:
        if fault.kind == kind and fault.done == _Fault.done:
            rows |= fault.rows
    return rows


def _areas(truth: TruthFile) -> np.ndarray:
    """(G,) the box's where the file has none."""
    return np.where(np.isfinite(truth.area), truth.area, truth.boxes_xywh[:, 2] * truth.boxes_xywh[:, 3])


def _truth_faults(truth: TruthFile, iou_type: IouType) -> Iterator[_Fault]:
    yield _Fault("images", _repeated(truth.images.ids), "have the id of another", truth.images.ids,
                 "pycocotools takes the annotations of all of them for those of one image.", "Done here, too.")
    yield _Fault("categories", _repeated(truth.categories.ids), "have the id of another", truth.categories.ids,
                 "pycocotools takes them for one class.", "Done here, too.")
    yield _Fault("annotations", truth.ids == 0, "have the id 0", truth.ids,
                 "pycocotools takes a match with it for none, so that perfect detections score below 1.",
                 "Kept: detres matches without ids, so its numbers are right.")
    yield _Fault("annotations", _repeated(truth.ids), "have the id of another", truth.ids,
                 "pycocotools replaces each of them by the last.",
                 "Kept, each as it is: detres matches without ids, so its numbers are right.")
    yield from _unknown_faults("annotations", truth, truth, "pycocotools leaves them out silently.")
    if iou_type in ("bbox", "keypoints"):
        yield from _box_faults("annotations", truth.boxes_xywh)
    no_area, no_box = ~np.isfinite(truth.area), ~np.isfinite(truth.boxes_xywh).all(1)
    effect = "pycocotools stops with a KeyError, or counts NaN as every size."
    yield _Fault("annotations", no_area & ~no_box, "have no finite area", truth.area, effect,
                 "The area of the box is used.")
    if iou_type in ("segm", "boundary"):
        yield _Fault("annotations", no_area & no_box, "have neither a finite area nor a box", truth.area, effect)
        yield from _mask_faults("annotations", truth, truth, "pycocotools stops with a KeyError.")
    if iou_type == "keypoints":
        yield from _keypoint_faults("annotations", truth.keypoints, len(truth.ids))


def _results_faults(truth: TruthFile, results: ResultsFile, iou_type: IouType) -> Iterator[_Fault]:
    yield _Fault("detections", ~np.isfinite(results.scores), "have a score that is not finite", results.scores,
                 "pycocotools ranks NaN below all others, infinity above.")
    yield from _unknown_faults("detections", results, truth, "pycocotools stops at unknown images, and leaves out "
                               "unknown categories silently.")
    yield from _box_faults("detections", results.boxes_xywh)
    if iou_type in ("segm", "boundary"):
        yield from _mask_faults("detections", results, truth, "pycocotools evaluates their boxes as masks.")
    if iou_type == "keypoints":
        yield from _keypoint_faults("detections", results.keypoints, len(results.scores))
        yield _other_keypoints(truth, results)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Which are not the first of their value."""
    rows = np.ones(len(ids), bool)
    rows[np.unique(ids, return_index=True)[1]] = False
    return rows


def _unknown_faults(kind: str, columns: TruthFile | ResultsFile, truth: TruthFile, effect: str) -> Iterator[_Fault]:
    for what, ids, known in (("an image", columns.image_ids, truth.images.ids),
                             ("a category", columns.category_ids, truth.categories.ids)):
        alike = (ids.dtype.kind == "U") == (known.dtype.kind == "U")
        unknown = ~np.isin(ids, known) if alike else np.ones(len(ids), bool)
        yield _Fault(kind, unknown, f"are of {what} that the ground truth does not list", ids,
                     f"{effect} {_likely(ids, known, alike)}".rstrip())


def _likely(ids: np.ndarray, known: np.ndarray, alike: bool) -> str:
    """Why ids are unknown."""
    if not alike:
        kinds = ("strings", "numbers") if ids.dtype.kind == "U" else ("numbers", "strings")
        return f"These ids are {kinds[0]}, the listed ones {kinds[1]}."
    if ids.dtype.kind == "U":
        return ""
    fixes = [f"{word} 1 makes all of them known." for word, step in (("Adding", 1), ("Subtracting", -1))
             if np.isin(ids + step, known).all()]
    if not fixes and len(ids) and ids.min() >= 0 and ids.max() < len(known):
        fixes = ["They may be positions in the list, counted from 0."]
    return " ".join(fixes[:1])


def _box_faults(kind: str, boxes: np.ndarray) -> Iterator[_Fault]:
    finite = np.isfinite(boxes).all(1)
    yield _Fault(kind, ~finite, "have no finite box", boxes,
                 "pycocotools takes an overlap that is NaN for a match, whatever the threshold.")
    yield _Fault(kind, finite & (boxes[:, 2:] < 0).any(1), "have a box of negative width or height", boxes,
                 "pycocotools takes their area as negative, so that they are in no range of sizes and never wrong.")


def _mask_faults(kind: str, columns: TruthFile | ResultsFile, truth: TruthFile, effect: str) -> Iterator[_Fault]:
    masks = columns.segmentation
    assert masks is not None, "read the file with masks=True"
    yield _Fault(kind, np.array([mask is None for mask in masks], bool), "have no mask", columns.image_ids, effect)
    images = truth.images
    sizes = {image: size for image, *size in zip(images.ids.tolist(), images.height.tolist(), images.width.tolist())}
    differs = [isinstance(mask, dict) and sizes.get(image, [0])[0] > 0 and sizes[image] != list(mask["size"])
               for mask, image in zip(masks, columns.image_ids.tolist())]
    found = [tuple(mask["size"]) if isinstance(mask, dict) else None for mask in masks]
    yield _Fault(kind, np.array(differs, bool), "have a mask whose size is not the image's", found,
                 "In pycocotools they overlap nothing.")
    yield _Fault(kind, np.array([isinstance(mask, list) and not _are_polygons(mask) for mask in masks], bool),
                 "have polygons that are not each three or more points with finite coordinates",
                 [str(mask)[:40] if isinstance(mask, list) else None for mask in masks],
                 "pycocotools stops with an error, or takes all memory.")
    yield _Fault(kind, _damaged(masks), "have run lengths that do not add up to the pixels of the mask",
                 [mask["counts"][:20] if isinstance(mask, dict) else None for mask in masks],
                 "pycocotools reads beyond its memory, or never returns.")


def _are_polygons(mask: list[list[float]]) -> bool:
    return len(mask) > 0 and all(len(polygon) >= 6 and len(polygon) % 2 == 0 and
                                 max(map(abs, polygon)) < MAX_COORDINATE and not math.isnan(sum(polygon))
                                 for polygon in mask)


def _damaged(masks: Sequence[Segmentation | None]) -> np.ndarray:
    """(n,) bool, of run lengths, compressed or not."""
    damaged = np.array([isinstance(mask, dict) and isinstance(mask["counts"], list) and
                        (min(mask["counts"], default=0) < 0 or sum(mask["counts"]) != mask["size"][0] * mask["size"][1])
                        for mask in masks], bool)
    rows = np.array([i for i, mask in enumerate(masks)
                     if isinstance(mask, dict) and not isinstance(mask["counts"], list)], np.int64)
    for chunk in np.split(rows, range(MASKS_AT_ONCE, len(rows), MASKS_AT_ONCE)):
        if not _is_sound([masks[i] for i in chunk]):
            damaged[chunk] = [not _is_sound([masks[i]]) for i in chunk]
    return damaged


def _is_sound(masks: Sequence[Segmentation]) -> bool:
    try:
        decode_runs(masks)
        return True
    except ValueError:
        return False


def _keypoint_faults(kind: str, keypoints: np.ndarray | None, entries: int) -> Iterator[_Fault]:
    points = np.full((entries, 3), np.nan) if keypoints is None else keypoints
    yield _Fault(kind, ~np.isfinite(points).all(1), "have no keypoints, or some that are not finite", points,
                 "pycocotools stops with a KeyError, or takes a similarity that is NaN for a match.")


def _other_keypoints(truth: TruthFile, results: ResultsFile) -> _Fault:
    both = truth.keypoints is not None and results.keypoints is not None
    numbers = [truth.keypoints.shape[1] // 3, results.keypoints.shape[1] // 3] if both else [0, 0]
    return _Fault("detections", np.full(len(results.scores), numbers[0] != numbers[1]),
                  f"have {numbers[1]} keypoints, annotations {numbers[0]}", results.image_ids,
                  "pycocotools stops with an error.")


# Areas.


@dataclass(frozen=True)
class AreaReport:
    """Areas of masks beside those that the file states."""

    lines: list[str]  # empty if they agree
    area: np.ndarray  # (G,) float64, with those that disagree replaced by the masks': evaluate with it to compare


def area_report(truth: TruthFile) -> AreaReport:
    """Find stated areas that are not those of the masks, and how many objects that puts into another range of sizes.

    They agree if the stated area is within a pixel or 1 % of the polygons' (as COCO's are), or differs from the mask's
    pixels by what a quarter of a pixel along the outline makes. Annotations without a mask, an area or the size of
    their image are passed over. Raises ValueError for damaged run lengths.
    """
    assert truth.segmentation is not None, "read the file with masks=True"
    sizes = _image_sizes(truth)
    checked = np.array([bool(mask) and size[0] > 0 for mask, size in zip(truth.segmentation, sizes)], bool)
    polygons = _polygon_areas(truth.segmentation)
    doubtful = np.flatnonzero(checked & ~(np.abs(truth.area - polygons) <= np.maximum(1, 0.01 * polygons)))  # NaN: yes
    codes = [_NO_MASK] * len(sizes)
    for i in doubtful:
        codes[i] = compressed(truth.segmentation[i], *sizes[i])
    decode_runs(codes, f"{truth.path}, entry")  # raises for damaged ones
    pixels = rle_areas(codes)[doubtful]
    wrong = np.abs(truth.area[doubtful] - pixels) > np.sqrt(pixels)
    area = truth.area.copy()
    area[doubtful[wrong]] = pixels[wrong]
    return AreaReport(_area_lines(truth, doubtful[wrong], area) if wrong.any() else [], area)


_NO_MASK = {"size": (0, 0), "counts": "0"}


def _image_sizes(truth: TruthFile) -> list[tuple[int, int]]:
    """Height and width of each annotation's image, 0 where unknown."""
    images = truth.images
    sizes = dict(zip(images.ids.tolist(), zip(images.height.tolist(), images.width.tolist())))
    return [sizes.get(image, (0, 0)) for image in truth.image_ids.tolist()]


def _polygon_areas(masks: list[Segmentation | None]) -> np.ndarray:
    """(G,) areas inside polygons by the shoelace formula, parts added up; NaN for masks that are none."""
    owner = [i for i, mask in enumerate(masks) if isinstance(mask, list) for _ in mask]
    polygons = [polygon for mask in masks if isinstance(mask, list) for polygon in mask]
    areas = np.full(len(masks), np.nan)
    areas[owner] = 0
    if not polygons or min(map(len, polygons)) < 2:
        return np.full(len(masks), np.nan)
    points = np.fromiter(chain.from_iterable(polygon[:len(polygon) // 2 * 2] for polygon in polygons), np.float64)
    x, y = points[::2], points[1::2]
    number = np.array([len(polygon) // 2 for polygon in polygons])
    start = np.cumsum(number) - number
    following = np.arange(1, len(x) + 1)
    following[start + number - 1] = start
    twice = np.add.reduceat(x * y[following] - x[following] * y, start)
    np.add.at(areas, owner, np.abs(twice) / 2)
    return areas


def _area_lines(truth: TruthFile, rows: np.ndarray, area: np.ndarray) -> list[str]:
    shown = "; ".join(f"entry {i} says {truth.area[i]:g}, its mask has {area[i]:g} pixels" for i in rows[:EXAMPLES])
    boxes = np.isclose(truth.area, truth.boxes_xywh[:, 2] * truth.boxes_xywh[:, 3], rtol=1e-3)[rows]
    first = (f"{len(rows)} of {len(area)} annotations of {truth.path} have an area that is not their mask's: {shown}"
             f"{', ...' if len(rows) > EXAMPLES else ''}.{' They are areas of boxes.' if boxes.mean() > 0.9 else ''}")
    before, after = (np.digitize(values, (32**2, 96**2))[~truth.crowd] for values in (truth.area, area))
    if (before == after).all():
        return [first, "None is of another size for it: no number is affected."]
    tally = [", ".join(f"{(size == i).sum()} {name}" for i, name in enumerate(SIZES)) for size in (before, after)]
    return [first, f"By their masks, of another size are {(before != after).sum()}: {tally[1]} instead of {tally[0]}. "
                   f"APs, APm, APl, ARs, ARm and ARl are of other objects than their names say; AP is not affected."]
