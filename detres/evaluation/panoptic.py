"""Panoptic quality (Kirillov et al., Panoptic Segmentation, arXiv 1801.00868, section 4), as panopticapi computes it.

A predicted and a true segment of one class match where their IoU, not counting predicted pixels that are truly void, is
above 0.5; at most one can. With TP the matches, FP and FN the segments without one, for each class

    PQ = sum of IoU over TP / (|TP| + |FP| / 2 + |FN| / 2) = SQ * RQ,   SQ = mean IoU of TP

and the mean is over classes that have any TP, FP or FN; one without TP counts with SQ 0. A crowd matches nothing and is
never missed. An unmatched prediction is not wrong if more than half of it is void or a crowd of its class; of several
such crowds in one image panopticapi looks at the last in the list, and so does this.

Where this differs from panopticapi: sums of IoU are exact and rounded once, so that neither the order of images nor the
number of processes shows in the last bit; what panopticapi passes over in silence is refused (see `evaluate_panoptic`);
a class, or a group of them, without any segment is -1.

Legend: H x W pixels; P predicted and G true segments of an image, S either; K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detres.data.masks import read_segment_ids
from detres.evaluation.base import EvalResult

VOID = 0  # the id of pixels that belong to no segment
_GROUPS = ("", "_th", "_st")  # all, things, stuff: as Detectron2 names them


@dataclass(frozen=True)
class Segments:
    """What the ids of a segment map stand for, on the device of the map. Raises ValueError for shapes that differ."""

    ids: Tensor  # (S,) int64, distinct and not VOID
    labels: Tensor  # (S,) int64, 0..K-1
    crowd: Tensor  # (S,) bool; not looked at in predictions
    area: Tensor | None = None  # (S,) int64, pixels as somebody else counted them; None: not compared

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in (self.ids, self.labels, self.crowd, self.area) if x is not None]
        if self.ids.ndim != 1 or len(set(shapes)) > 1:
            raise ValueError(f"ids, labels, crowd and area must each be (S,), got {shapes} (Segments).")


class SegmentMatches(NamedTuple):
    """How the segments of an image came out."""

    iou: Tensor  # (G,) float64, with the prediction that matches; 0 where none does
    missed: Tensor  # (G,) bool: false negatives
    wrong: Tensor  # (P,) bool: false positives


def match_segments(pred_map: Tensor, pred: Segments, gt_map: Tensor, gt: Segments,
                   where: str = "one image") -> SegmentMatches:
    """Match the segments of one image by maps (H, W) of segment ids, any integers, on any device.

    `where` names the image in errors. Raises ValueError if sizes differ, if ids are VOID or not distinct, if a map has
    an id that is neither VOID nor among its segments, or if a segment has no pixel or another number than its area.
    """
    overlap = count_overlaps(pred_map, pred, gt_map, gt, where)
    inside = overlap[1:, 1:]  # (G, P)
    void, pred_area = overlap[0, 1:], overlap[:, 1:].sum(0)  # (P,)
    union = overlap[1:].sum(1, keepdim=True) + pred_area - void - inside
    same = gt.labels[:, None] == pred.labels
    crowd = gt.crowd[:, None]
    match = same & ~crowd & (2 * inside > union)
    # Without void, segments of either map are disjoint: no two can have more than half of a union with the same one.
    iou = torch.where(match, inside.double() / union, 0.0).sum(1)
    crowds_below = (same & crowd).flip(0).cumsum(0).flip(0)
    last_crowd = same & crowd & (crowds_below == 1)
    ignorable = void + (inside * last_crowd).sum(0)
    return SegmentMatches(iou, ~gt.crowd & ~match.any(1), ~match.any(0) & (2 * ignorable <= pred_area))


def count_overlaps(pred_map: Tensor, pred: Segments, gt_map: Tensor, gt: Segments,
                   where: str = "one image") -> Tensor:
    """Pixels (1 + G, 1 + P) int64 that each pair of segments shares; row and column 0 are VOID.

    Raises ValueError as `match_segments`.
    """
    if pred_map.ndim != 2 or pred_map.shape != gt_map.shape or not pred_map.numel():
        raise ValueError(f"predicted and true map must be (H, W) of one size, got {tuple(pred_map.shape)} and "
                         f"{tuple(gt_map.shape)} ({where}). Predict at the size of the original image.")
    maps = torch.stack([gt_map.flatten().long(), pred_map.flatten().long()])
    # Ids change at few pixels only: look up runs of equal pixels, not pixels.
    starts = torch.nn.functional.pad((maps[:, 1:] != maps[:, :-1]).any(0), (1, 0), value=True).nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([maps.shape[1]]))
    (gt_ids, pred_ids), columns = maps[:, starts], len(pred.ids) + 2
    cell = _rows(gt_ids, gt) * columns + _rows(pred_ids, pred)
    counts = lengths.new_zeros((len(gt.ids) + 2) * columns).index_add_(0, cell, lengths).view(-1, columns)
    _check("ground truth", gt, counts.sum(1), gt_ids, where)
    _check("prediction", pred, counts.sum(0), pred_ids, where)
    return counts[:-1, :-1]


def _rows(values: Tensor, segments: Segments) -> Tensor:
    """1 + the row of the segment that each value is the id of; 0 for VOID, 1 + S for a stranger."""
    known, row = torch.cat([segments.ids.new_tensor([VOID]), segments.ids]).sort()
    at = torch.searchsorted(known, values).clamp(max=len(known) - 1)
    return torch.where(known[at] == values, row[at], len(known))


def _check(name: str, segments: Segments, areas: Tensor, values: Tensor, where: str) -> None:
    """`areas` (S + 2,) are pixels of void, segments and strangers; `values` are the ids in the map."""
    known = torch.cat([segments.ids.new_tensor([VOID]), segments.ids]).sort().values
    twice = known[1:][known[1:] == known[:-1]]
    if len(twice):
        raise ValueError(f"segment ids of the {name} must be distinct and not {VOID} (void), got {_few(twice)} again "
                         f"({where}). Renumber the segments.")
    absent = segments.ids[areas[1:-1] == 0]
    if len(absent):
        raise ValueError(f"segments of the {name} must have pixels in the map, got none of id {_few(absent)} "
                         f"({where}). Leave out segments that are hidden.")
    if segments.area is not None and not torch.equal(segments.area, areas[1:-1]):
        row = int((segments.area != areas[1:-1]).nonzero()[0])
        raise ValueError(f"area of a segment of the {name} must be its pixels in the map, got {segments.area[row]} for "
                         f"{areas[1 + row]} of id {segments.ids[row]} ({where}). Correct or leave out the areas.")
    if areas[-1]:
        strangers = values[~torch.isin(values, segments.ids) & (values != VOID)].unique()
        raise ValueError(f"ids in the map of the {name} must be {VOID} (void) or listed as segments, got "
                         f"{_few(strangers)} ({where}). List them, or set their pixels to {VOID}.")


def _few(ids: Tensor) -> str:
    return ", ".join(map(str, ids[:5].tolist())) + (", ..." if len(ids) > 5 else "")


class ClassCounts(NamedTuple):
    """What panoptic quality is made of, for each class."""

    iou_sum: list[float]  # (K,) over true positives
    tp: list[int]  # (K,)
    fp: list[int]
    fn: list[int]


class PanopticEvaluator:
    """Collects the outcome of every segment, image by image: 16 bytes each. An image seen again replaces the first."""

    metric_names = tuple(f"panoptic/{name}{group}" for group in _GROUPS for name in ("PQ", "SQ", "RQ"))

    def __init__(self, classes: Sequence[str], is_thing: Sequence[bool]):
        """`classes[k]` is the name of label k, and `is_thing[k]` whether it is counted as things or as stuff."""
        if not classes or len(set(classes)) != len(classes) or len(classes) != len(is_thing):
            raise ValueError("classes must be one or more distinct names, each a thing or not, got "
                             f"{list(classes)} and {list(is_thing)} (PanopticEvaluator).")
        self.classes = tuple(classes)
        self.is_thing = tuple(map(bool, is_thing))
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._seen: dict[Hashable, Tensor] = {}

    def update(self, image_id: Hashable, pred_map: Tensor, pred: Segments, gt_map: Tensor, gt: Segments,
               where: str | None = None) -> None:
        """Add one image by its maps (H, W) of segment ids, on any device. `where` names it in errors.

        Raises ValueError as `match_segments`, and for labels that are not 0..K-1.
        """
        where = f"image {image_id!r}" if where is None else where
        labels = torch.cat([gt.labels, pred.labels])
        if ((labels < 0) | (labels >= len(self.classes))).any():
            raise ValueError(f"labels of segments must be 0 to {len(self.classes) - 1}, got {labels.min()} to "
                             f"{labels.max()} ({where}). Map category ids to 0..K-1.")
        matches = match_segments(pred_map, pred, gt_map, gt, where)
        # Rows of label and outcome: the IoU of a match, 0 for a missed segment, -1 for a wrong one.
        true = torch.stack([gt.labels.double(), matches.iou], 1)[(matches.iou > 0) | matches.missed]
        wrong = pred.labels[matches.wrong].double()
        self._seen[image_id] = torch.cat([true, torch.stack([wrong, -torch.ones_like(wrong)], 1)]).cpu()

    def state(self) -> dict[Hashable, Tensor]:
        """What was collected so far, on the host, to be sent to other ranks."""
        return dict(self._seen)

    def merge(self, states: Sequence[dict[Hashable, Tensor]]) -> None:
        """Take over what all ranks collected; their order does not matter."""
        self._seen = {image_id: rows for state in states for image_id, rows in state.items()}

    def counts(self) -> ClassCounts:
        """Over all images. The sums are exact until they are rounded, hence the same in any order of images."""
        labels, outcome = torch.cat([torch.zeros(0, 2, dtype=torch.float64), *self._seen.values()]).unbind(1)
        groups = [labels[chosen].long() for chosen in (outcome > 0, outcome < 0, outcome == 0)]
        tp, fp, fn = (torch.bincount(group, minlength=len(self.classes)).tolist() for group in groups)
        sums = [math.fsum(outcome[(labels == k) & (outcome > 0)].tolist()) for k in range(len(self.classes))]
        return ClassCounts(sums, tp, fp, fn)

    def compute(self) -> EvalResult:
        """Metrics "panoptic/PQ", "panoptic/SQ", "panoptic/RQ", of things "panoptic/PQ_th" ..., of stuff
        "panoptic/PQ_st" ..., and per class the first three; -1 where there was nothing."""
        values = [_quality(*numbers) for numbers in zip(*self.counts())]
        chosen = ([True] * len(values), self.is_thing, [not thing for thing in self.is_thing])
        means = [mean for keep in chosen for mean in _means([v for v, kept in zip(values, keep) if kept])]
        per_class = {name: dict(zip(self.metric_names, value)) for name, value in zip(self.classes, values)}
        return EvalResult(dict(zip(self.metric_names, means)), per_class)


def _quality(iou_sum: float, tp: int, fp: int, fn: int) -> tuple[float, float, float]:
    """PQ, SQ and RQ of a class."""
    weight = tp + 0.5 * fp + 0.5 * fn
    return (iou_sum / weight, iou_sum / tp if tp else 0.0, tp / weight) if weight else (-1.0, -1.0, -1.0)


def _means(values: list[tuple[float, float, float]]) -> list[float]:
    """PQ, SQ and RQ over the classes that have any segment."""
    measured = [value for value in values if value[0] >= 0]
    return [fmean(column) for column in zip(*measured)] if measured else [-1.0] * 3


# Files in COCO's panoptic format


def evaluate_panoptic(gt_json: str | Path, gt_folder: str | Path | None, pred_json: str | Path,
                      pred_folder: str | Path | None, device: torch.device | str = "cpu") -> EvalResult:
    """Panoptic quality of predictions in COCO's format: a JSON file, and a folder of PNG files with the segment ids.

    A folder that is None is the JSON file's path without its suffix, as in panopticapi. Categories are those of the
    ground truth, as labels in the order of their ids. Images are read by several threads at once.

    Raises ValueError where panopticapi stops: a ground truth image without prediction; a predicted segment that is in
    only one of PNG and JSON, or of an unknown category. Also for what it passes over: predictions of unknown images, an
    image or id given twice, the same faults in the ground truth, and a ground truth `area` that is not the number of
    pixels (panopticapi's union is then wrong).
    """
    truth, found = _read_json(gt_json, "annotations", "categories"), _read_json(pred_json, "annotations")
    categories = _categories(truth["categories"], gt_json)
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    pairs = _pairs(_by_image(truth, gt_json), _by_image(found, pred_json), gt_json, pred_json)
    evaluator = PanopticEvaluator([category["name"] for category in categories],
                                  [category["isthing"] for category in categories])
    folders = [Path(folder or Path(file).with_suffix("")) for folder, file in
               ((gt_folder, gt_json), (pred_folder, pred_json))]

    def add(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
        gt, pred = pair
        where = f"image {gt['image_id']!r}, {folders[0] / gt['file_name']} and {folders[1] / pred['file_name']}"
        gt_map, gt_segments = _read_segments(gt, folders[0], label_of, device)
        pred_map, pred_segments = _read_segments(pred, folders[1], label_of, device)
        evaluator.update(gt["image_id"], pred_map, replace(pred_segments, area=None), gt_map, gt_segments, where)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(add, pairs):  # raises what a thread raised
            pass
    return evaluator.compute()


def _read_json(file: str | Path, *required: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"panoptic file must be JSON, got {error} ({file}). Is it complete?") from None
    missing = [key for key in required if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"panoptic file must have lists of {' and '.join(required)}, got no {', '.join(missing)} "
                         f"({file}). Is it in COCO's panoptic format?")
    return content


def _categories(categories: list[dict[str, Any]], file: str | Path) -> list[dict[str, Any]]:
    """In the order of ids."""
    _require(categories, ("id", "name", "isthing"), f"categories of {file}")
    ordered = sorted(categories, key=lambda category: category["id"])
    ids = [category["id"] for category in ordered]
    if len(set(ids)) != len(ids):
        raise ValueError(f"category ids must be distinct, got {ids} ({file}).")
    return ordered


def _require(entries: list[dict[str, Any]], keys: tuple[str, ...], where: str) -> None:
    for entry in entries:
        missing = [key for key in keys if key not in entry]
        if missing:
            raise ValueError(f"each entry must have {', '.join(keys)}, got no {', '.join(missing)} in {entry} "
                             f"({where}). Is the file in COCO's panoptic format?")


def _by_image(content: dict[str, Any], file: str | Path) -> dict[int | str, dict[str, Any]]:
    annotations = content["annotations"]
    _require(annotations, ("image_id", "file_name", "segments_info"), f"annotations of {file}")
    entries = {entry["image_id"]: entry for entry in annotations}
    if len(entries) != len(annotations):
        raise ValueError(f"each image must have one annotation, got {len(annotations)} for {len(entries)} images "
                         f"({file}). Remove the repeated ones.")
    return entries


def _pairs(truth: dict[int | str, dict[str, Any]], found: dict[int | str, dict[str, Any]], gt_json: str | Path,
           pred_json: str | Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Annotations of truth and prediction for each image."""
    for what, missing in (("no prediction for", truth.keys() - found.keys()),
                          ("predictions for unknown", found.keys() - truth.keys())):
        if missing:
            raise ValueError(f"predictions must be for the images of {gt_json}, got {what} {len(missing)} of them, "
                             f"such as id {min(missing, key=str)!r} ({pred_json}). Are both of the same split?")
    return [(entry, found[image_id]) for image_id, entry in truth.items()]


def _read_segments(entry: dict[str, Any], folder: Path, label_of: Mapping[int, int],
                   device: torch.device | str) -> tuple[Tensor, Segments]:
    """The map (H, W) of an annotation's PNG file, and its segments, with their areas if all are stated."""
    path = folder / entry["file_name"]
    where, infos = f"image {entry['image_id']!r}, {path}", entry["segments_info"]
    _require(infos, ("id", "category_id"), where)
    unknown = [info for info in infos if info["category_id"] not in label_of]
    if unknown:
        raise ValueError(f"categories must be those of the ground truth, got id {unknown[0]['category_id']} in segment "
                         f"{unknown[0]['id']} ({where}). Give the original category ids.")
    columns = [[info["id"] for info in infos], [label_of[info["category_id"]] for info in infos],
               [info.get("iscrowd", 0) for info in infos], [info.get("area", -1) for info in infos]]
    numbers, labels, crowd, area = torch.tensor(columns, dtype=torch.int64).to(device)
    segments = Segments(numbers, labels, crowd == 1, None if (area == -1).any() else area)
    return torch.from_numpy(read_segment_ids(path)).to(device), segments
