"""`COCO` and `COCOeval` in place of pycocotools' classes of that name: the same methods, numbers and printout, faster.

    from detres.evaluation.cocoapi import COCO, COCOeval

Both are subclasses of pycocotools'. `evaluate` and `accumulate` run on flat tensors (`coco_engine`); `evalImgs`,
`ious`, `_gts` and `_dts` are made when they are first read. Where a caller may change what lies between the two steps
(reads or sets `evalImgs`, overrides `computeIoU`, accumulates with other parameters), pycocotools' code takes over.

Unlike there, annotations are not written to: no `ignore`, no RLE in place of polygons. What pycocotools gets wrong
without a word is refused (duplicate ids, NaN, results for unknown images) or counted right, with a warning (id 0).

Legend: N images, K classes (1 without categories), G truths, D detections, T IoU thresholds, A area ranges,
D' detections that count, P pairs.
"""

from __future__ import annotations

import copy
import datetime
import json
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from pycocotools import coco as reference_coco
from pycocotools import cocoeval as reference

from detres.data.coco import no_garbage_collection
from detres.evaluation.coco_annotations import Annotation, Rows, box_or_keypoint_overlaps, found_of, rows_of, truths_of
from detres.evaluation.coco_engine import Matches, Protocol, accumulate, inside, match, words
from detres.evaluation.coco_masks import code_overlaps
from detres.evaluation.coco_numbers import IouType
from detres.evaluation.mask_overlaps import decode_runs, rle_areas

Params = reference.Params


class COCO(reference_coco.COCO):
    """Index of an annotation file; see pycocotools."""

    def __init__(self, annotation_file: str | Path | None = None):
        """Raises ValueError for a file that is no JSON object, OSError for one that cannot be read."""
        super().__init__()
        if annotation_file is None:
            return
        print("loading annotations into memory...")
        start = time.time()
        with no_garbage_collection():
            self.dataset = _read(annotation_file)
            if not isinstance(self.dataset, dict):
                raise ValueError(f"ground truth must be a JSON object, got a {type(self.dataset).__name__} "
                                 f"({annotation_file}). Is this a results file? It goes into loadRes().")
            print(f"Done (t={time.time() - start:0.2f}s)")
            self.createIndex()

    def loadRes(self, resFile: str | Path | list[Annotation] | np.ndarray) -> COCO:
        """Results as an index of their own: from a file, a list of detections, or an array (D, 7) of
        image id, x, y, width, height, score, category id. As in pycocotools, detections in a list get `id` and `area`.

        Raises ValueError for images that the ground truth lacks; warns if there are no detections.
        """
        result = type(self)()
        with no_garbage_collection():
            found = self._detections(resFile)
            if isinstance(found, list) and not found:
                warnings.warn("results are empty: AP and AR will be 0", stacklevel=2)
                result.dataset = {**self.dataset, "annotations": []}
                result.createIndex()
            else:
                vars(result).update(vars(super().loadRes(found)))
        return result

    def _detections(self, results: str | Path | list[Annotation] | np.ndarray) -> list[Annotation]:
        if isinstance(results, np.ndarray):
            return self.loadNumpyAnnotations(results)
        found = _read(results) if isinstance(results, (str, Path)) else results
        if isinstance(found, list):
            _require_known_images(found, self.imgs)
        return found

    def loadNumpyAnnotations(self, data: np.ndarray) -> list[Annotation]:
        """Rows (D, 7) of image id, x, y, width, height, score, category id as a list of detections."""
        if data.dtype != np.float64 or data.ndim != 2 or data.shape[1] != 7:
            return super().loadNumpyAnnotations(data)  # areas are products in the precision of the array
        found = [{"image_id": int(image), "bbox": box, "score": score, "category_id": int(category)}
                 for image, *box, score, category in data.tolist()]
        _require_known_images(found, self.imgs)
        return found


def _read(path: str | Path) -> Any:
    text = Path(path).read_bytes()
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # json also takes NaN and Infinity, and tells where the fault is
        return json.loads(text)


class COCOeval(reference.COCOeval):
    """AP and AR of detections; see pycocotools. `cocoGt` and `cocoDt` may be pycocotools' COCO or the one above."""

    def __init__(self, cocoGt: reference_coco.COCO | None = None, cocoDt: reference_coco.COCO | None = None,
                 iouType: IouType = "segm", dilation_ratio: float = 0.02):
        """`dilation_ratio` is the width of boundaries as a share of the image's diagonal, for iouType "boundary"."""
        super().__init__(cocoGt, cocoDt, "segm" if iouType == "boundary" else iouType)
        self.params.iouType = iouType
        self.dilation_ratio = dilation_ratio
        self._evaluated: _Evaluated | None = None

    def evaluate(self) -> None:
        """Match detections with truths.

        Raises ValueError for annotations that lack a field, have one that is not finite, or share an id.
        """
        self._evaluated, self.evalImgs = None, []
        if any(getattr(type(self), name) is not getattr(reference.COCOeval, name) for name in _STEPS):
            return super().evaluate()
        start = time.time()
        print("Running per image evaluation...")
        self._sort_params()
        print(f"Evaluate annotation type *{self.params.iouType}*")
        _require_ids(self.cocoGt, self.cocoDt)
        self._evaluated = _evaluate(self.cocoGt, self.cocoDt, copy.deepcopy(self.params), self.dilation_ratio)
        self._paramsEval, self.eval = self._evaluated.params, {}
        for name in ("evalImgs", "ious", "_gts", "_dts", "_plain"):
            vars(self).pop(name, None)  # of an evaluation before
        print(f"DONE (t={time.time() - start:0.2f}s).")

    def _sort_params(self) -> None:
        p = self.params
        if p.useSegm is not None:
            p.iouType = "segm" if p.useSegm == 1 else "bbox"
            print(f"useSegm (deprecated) is not None. Running {p.iouType} evaluation")
        p.imgIds, p.maxDets = list(np.unique(p.imgIds)), sorted(p.maxDets)
        if p.useCats:
            p.catIds = list(np.unique(p.catIds))

    def accumulate(self, p: Params | None = None) -> None:
        """Average over images to `eval`: precision (T, R, K, A, M), recall (T, K, A, M), scores (T, R, K, A, M)."""
        p = self.params if p is None else p
        if self._evaluated is None or "evalImgs" in vars(self) or not _covers(self._evaluated.params, p):
            return super().accumulate(p)
        print("Accumulating evaluation results...")
        start = time.time()
        p.catIds = p.catIds if p.useCats == 1 else [-1]
        done, protocol = self._evaluated, _protocol(p)
        arrays = accumulate(done.matches, done.classes, protocol)
        sizes = [len(p.iouThrs), len(p.recThrs), done.classes, len(p.areaRng), len(p.maxDets)]
        self.eval = {"params": p, "counts": sizes, "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
                     "precision": arrays.precision.numpy(), "recall": arrays.recall.numpy(),
                     "scores": arrays.scores.numpy()}
        print(f"DONE (t={time.time() - start:0.2f}s).")

    def summarize(self) -> None:
        """Print the numbers and set `stats`: 12 of boxes, masks and boundaries, 10 of keypoints."""
        iou_type = self.params.iouType
        self.params.iouType = "segm" if iou_type == "boundary" else iou_type
        try:
            super().summarize()
        finally:
            self.params.iouType = iou_type

    @cached_property
    def evalImgs(self) -> list[dict[str, Any] | None]:
        """For each class, area range and image, in this order, who matched whom; None if there is nothing."""
        assert self._evaluated is not None
        return _per_image(self._evaluated)

    @cached_property
    def _plain(self) -> reference.COCOeval:
        """As prepared by pycocotools, which writes to the annotations."""
        plain = reference.COCOeval(self.cocoGt, self.cocoDt, "segm")
        plain.params = self._paramsEval
        plain._prepare()
        return plain

    @cached_property
    def _gts(self) -> dict[tuple[Any, Any], list[Annotation]]:
        return self._plain._gts

    @cached_property
    def _dts(self) -> dict[tuple[Any, Any], list[Annotation]]:
        return self._plain._dts

    @cached_property
    def ious(self) -> dict[tuple[Any, Any], np.ndarray | list]:
        """Overlaps (D, G) for each image and class, computed by pycocotools; not for boundaries, which it lacks."""
        p = self._paramsEval
        compute = self._plain.computeOks if p.iouType == "keypoints" else self._plain.computeIoU
        return {(image, category): compute(image, category)
                for image in p.imgIds for category in (p.catIds if p.useCats else [-1])}


_STEPS = ("_prepare", "computeIoU", "computeOks", "evaluateImg")  # of pycocotools; a subclass may override them


def _covers(evaluated: Params, p: Params) -> bool:
    """Whether what was evaluated is just what `p` averages over; fewer bounds on detections are."""
    fixed = ("imgIds", "iouThrs", "areaRng", "useCats", *(["catIds"] if p.useCats else []))
    same = all(np.array_equal(getattr(evaluated, name), getattr(p, name)) for name in fixed)
    return same and set(p.maxDets) <= set(evaluated.maxDets)


def _protocol(p: Params) -> Protocol:
    return Protocol(tuple(map(float, p.iouThrs)), tuple(map(float, p.recThrs)),
                    tuple((float(low), float(high)) for low, high in p.areaRng), tuple(p.areaRngLbl), tuple(p.maxDets))


@dataclass(frozen=True)
class _Evaluated:
    params: Params
    classes: int
    protocol: Protocol
    found: Rows
    truths: Rows
    matches: Matches


def _evaluate(gt: reference_coco.COCO, dt: reference_coco.COCO, p: Params, dilation_ratio: float) -> _Evaluated:
    if p.iouType == "keypoints" and not p.useCats:
        raise ValueError("useCats must be 1 for keypoints, got 0: pycocotools then compares none of them and gives 0. "
                         "Put all objects into one category.")
    classes, protocol = len(p.catIds) if p.useCats else 1, _protocol(p)
    rows = rows_of(dt, p), rows_of(gt, p)
    found, truths = found_of(rows[0], p.iouType), truths_of(rows[1], p.iouType)
    if p.iouType in ("segm", "boundary"):
        codes, truth_codes = ([coco.annToRLE(item) for item in side.annotations] for coco, side in zip((dt, gt), rows))
        decode_runs(codes, "detection")  # refuses damaged ones
        decode_runs(truth_codes, "truth")
        overlaps = code_overlaps(p.iouType, codes, torch.from_numpy(rle_areas(codes)), truth_codes, truths, classes,
                                 protocol.lowest(), dilation_ratio)
    else:
        overlaps = box_or_keypoint_overlaps(*rows, found, truths, p)
    return _Evaluated(p, classes, protocol, *rows, match(truths, found, classes, overlaps, protocol))


# Matches, image by image


@dataclass(frozen=True)
class _Grouped:
    """Rows by class, then image; such a pair is a cell, numbered class * N + image."""

    rows: np.ndarray  # (n',) int64
    place: np.ndarray  # (n,) int64, where in `rows` each row is
    starts: np.ndarray  # (K * N + 1,) int64, where each cell begins
    ids: list[Any]  # n'

    @classmethod
    def of(cls, annotations: list[Annotation], cell: np.ndarray, cells: int, rows: np.ndarray,
           within: np.ndarray) -> _Grouped:
        """`rows` (n',) sorted by `cell` (n,), then by `within` (n',)."""
        rows = rows[np.lexsort((within, cell[rows]))]
        place = np.zeros(len(cell), np.int64)
        place[rows] = np.arange(len(rows))
        starts = np.searchsorted(cell[rows], np.arange(cells + 1))
        return cls(rows, place, starts, [annotations[i]["id"] for i in rows])


def _per_image(done: _Evaluated) -> list[dict[str, Any] | None]:
    """`evalImgs` of pycocotools."""
    p, matches = done.params, done.matches
    images, areas, cells = len(p.imgIds), len(p.areaRng), done.classes * len(p.imgIds)
    d_cell, g_cell = ((side.label * images + side.image).numpy() for side in (matches.found, matches.truths))
    d = _Grouped.of(done.found.annotations, d_cell, cells, matches.order.numpy(), matches.rank.numpy())
    scores = [done.found.annotations[i]["score"] for i in d.rows]
    hits = _hits(matches, done.protocol)
    result: list[dict[str, Any] | None] = [None] * (areas * cells)
    for a, bounds in enumerate(p.areaRng):
        ignored = (matches.truths.ignore | ~inside(matches.truths.area, done.protocol)[a]).numpy()
        g = _Grouped.of(done.truths.annotations, g_cell, cells, np.arange(len(g_cell)), ignored)
        of_area = [hits[t, a] for t in range(len(p.iouThrs))]
        d_matches, g_matches, d_ignore = _match_arrays(done, d, g, of_area, ignored, a)
        for cell in np.flatnonzero(np.diff(d.starts) | np.diff(g.starts)).tolist():
            k, image = divmod(cell, images)
            of_d, of_g = (slice(*side.starts[cell:cell + 2].tolist()) for side in (d, g))
            result[(k * areas + a) * images + image] = {
                "image_id": p.imgIds[image], "category_id": p.catIds[k] if p.useCats else -1, "aRng": bounds,
                "maxDet": p.maxDets[-1], "dtIds": d.ids[of_d], "gtIds": g.ids[of_g],
                "dtMatches": d_matches[:, of_d], "gtMatches": g_matches[:, of_g], "dtScores": scores[of_d],
                "gtIgnore": ignored[g.rows[of_g]].astype(np.int64), "dtIgnore": d_ignore[:, of_d]}
    return result


def _hits(matches: Matches, protocol: Protocol) -> dict[tuple[int, int], np.ndarray]:
    """The pairs that match, for each IoU threshold and area range."""
    return {setting: ((lanes >> bit) & 1).nonzero()[:, 0].numpy()
            for word, lanes in zip(words(protocol), matches.pair_lanes) for bit, setting in enumerate(word)}


def _match_arrays(done: _Evaluated, d: _Grouped, g: _Grouped, hits: list[np.ndarray], ignored: np.ndarray,
                  a: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of what was matched, 0 for nothing, (T, D') and (T, G); detections that do not count (T, D') bool."""
    pair_found, pair_truth = done.matches.pair_found.numpy(), done.matches.pair_truth.numpy()
    outside = ~inside(done.matches.found.area, done.protocol)[a].numpy()
    d_matches, g_matches = np.zeros((len(hits), len(d.rows))), np.zeros((len(hits), len(g.rows)))
    d_ignore = np.tile(outside[d.rows], (len(hits), 1))
    d_ids, g_ids = np.array(d.ids, np.float64), np.array(g.ids, np.float64)
    for t, pairs in enumerate(hits):
        truth = pair_truth[pairs]
        at, to = d.place[pair_found[pairs]], g.place[truth]
        d_matches[t, at], g_matches[t, to] = g_ids[to], d_ids[at]  # the last of a crowd's stays, the lowest score
        d_ignore[t, at] = ignored[truth]
    return d_matches, g_matches, d_ignore


# What pycocotools gets wrong without a word


def _require_known_images(found: list[Annotation], images: dict[Any, Any]) -> None:
    unknown = {item["image_id"] for item in found} - set(images)
    if unknown:
        first = next(i for i, item in enumerate(found) if item["image_id"] in unknown)
        raise ValueError(f"results must be of images in the ground truth, got {len(unknown)} others, the "
                         f"first {found[first]['image_id']!r} (entry {first}). Evaluate against the set that was "
                         f"predicted on.")


def _require_ids(gt: reference_coco.COCO, dt: reference_coco.COCO) -> None:
    for name, coco in (("ground truth", gt), ("results", dt)):
        annotations = coco.dataset.get("annotations", [])
        if len(coco.anns) != len(annotations):
            (repeated, times), = Counter(item["id"] for item in annotations).most_common(1)
            raise ValueError(f"annotation ids must be distinct, got {repeated!r} {times} times ({name}). Number them "
                             f"anew; pycocotools counts the last as often and drops the others.")
        if 0 in coco.anns:
            warnings.warn(f"annotation ids should not be 0, got one ({name}). It counts here as others do; pycocotools "
                          f"takes a match with it for none. Number them from 1.", stacklevel=3)
