"""Labels that a trained model disagrees with: the check that finds single wrong labels.

After ObjectLab (Tkachenko, Thyagarajan, Mueller, arXiv 2309.00832), by rules in place of scores: an object is doubtful
if the model is sure of another class there and does not see its own; one is missing where the model is sure and nothing
is annotated. Give detections on images that the model was not trained on: it repeats the labels that it was taught.

Legend: D detections, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detres.data.check.labels import paired_overlap
from detres.data.dataset import Dataset
from detres.data.problems import Problem
from detres.data.records import ranges
from detres.evaluation.coco_columns import ResultsFile
from detres.evaluation.coco_files import read_results

SURE = 0.8  # score, from which a model is taken at its word about the class of an object
CERTAIN = 0.9  # and about an object that nobody annotated
SEEN = 0.1  # score, from which it sees an object's own class
SAME = 0.5  # IoU of an annotation and a detection that are of one object
APART = 0.1  # IoU with all annotations, under which a detection is of an object that has none


def check_against(detections: str | Path | ResultsFile, splits: Sequence[tuple[str, Dataset]]) -> list[Problem]:
    """Objects of the splits whose class confident detections contradict, and what these find and labels lack.

    `detections`: a results file in COCO's format, as `detres eval --save FILE.json` writes it. Raises ValueError if it
    has none on images of the splits.
    """
    results = detections if isinstance(detections, ResultsFile) else read_results(detections)
    compared = [_Compared.of(name, dataset, results) for name, dataset in splits]
    if not any(len(found.score) for found in compared):
        raise ValueError(f"detections must be on images and of classes of the data set, got none ({results.path}). "
                         "Give the results of this data set.")
    return [problem for found in compared for problem in (*found.contradicted(), *found.missing())]


@dataclass(frozen=True)
class _Compared:
    """A split, the detections on it, and pairs of an annotation and a detection of the same image."""

    name: str
    dataset: Dataset
    image: np.ndarray  # (D,) place, in ascending order
    label: np.ndarray  # (D,)
    score: np.ndarray  # (D,)
    boxes: np.ndarray  # (D, 4) xyxy
    row: np.ndarray  # (P,) of `table`
    column: np.ndarray  # (P,) of the detections
    overlap: np.ndarray  # (P,) IoU; with a crowd the share of the detection inside

    @classmethod
    def of(cls, name: str, dataset: Dataset, results: ResultsFile) -> _Compared:
        image = _places(dataset.records.ids(), results.image_ids)
        label = _places(dataset.category_ids, results.category_ids)
        keep = np.flatnonzero((image >= 0) & (label >= 0) & (results.scores >= SEEN))
        keep = keep[np.argsort(image[keep], kind="stable")]
        boxes = results.boxes_xywh[keep] + np.pad(results.boxes_xywh[keep, :2], ((0, 0), (2, 0)))
        table = dataset.records.table()
        row, column = _pairs(dataset.records.image_of(), image[keep])
        overlap = paired_overlap(table["box"][row], boxes[column], table["crowd"][row])
        return cls(name, dataset, image[keep], label[keep], results.scores[keep], boxes, row, column, overlap)

    def contradicted(self) -> Iterator[Problem]:
        """Objects where a sure detection is of another class, and none of their own."""
        table = self.dataset.records.table()
        same = (self.overlap >= SAME) & ~table["crowd"][self.row]
        own = self.label[self.column] == table["label"][self.row]
        seen = np.isin(self.row, self.row[same & own])
        doubt = np.flatnonzero(same & ~own & ~seen & (self.score[self.column] >= SURE))
        doubt = doubt[np.lexsort((-self.score[self.column[doubt]], self.row[doubt]))]
        for pair in doubt[np.unique(self.row[doubt], return_index=True)[1]].tolist():
            row, column = self.row[pair], self.column[pair]
            own, found = self.dataset.classes[table["label"][row]], self._found(column)
            yield self._problem(self.dataset.records.image_of()[row], int(table["id"][row]), "class",
                                [own, "found", *found, table["box"][row].tolist()],
                                f"must be {found[0]}, if the model is right (look at it)", "label_doubtful")

    def missing(self) -> Iterator[Problem]:
        """Sure detections where nothing is annotated."""
        nearest = np.zeros(len(self.score))
        np.maximum.at(nearest, self.column, self.overlap)
        for column in np.flatnonzero((self.score >= CERTAIN) & (nearest < APART)).tolist():
            value = ["found", *self._found(column), self.boxes[column].round(1).tolist()]
            yield self._problem(self.image[column], None, "object", value,
                                f"must be annotated as {value[1]}, if the model is right (look at it)", "label_missing")

    def _found(self, column: int) -> tuple[str, float]:
        return self.dataset.classes[self.label[column]], round(float(self.score[column]), 2)

    def _problem(self, image: int, annotation_id: int | None, field: str, value: Any, reason: str,
                 kind: str) -> Problem:
        record = self.dataset.records[int(image)]
        return Problem(str(record.path), record.id, annotation_id, field, value, reason, kind, self.name)


def _places(known: Sequence[int | str], ids: np.ndarray) -> np.ndarray:
    """Where in `known` each of the ids is; -1: nowhere."""
    places = {number: place for place, number in enumerate(known)}
    return np.array([places.get(number, -1) for number in ids.tolist()], int)


def _pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (P,) and (P,) of all pairs of equal numbers; `second` is in ascending order."""
    start, end = np.searchsorted(second, first, "left"), np.searchsorted(second, first, "right")
    count = end - start
    return np.repeat(np.arange(len(first)), count), ranges(start, count)
