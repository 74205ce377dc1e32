"""What is wrong with a data set: found one by one, told all at once."""

from __future__ import annotations

import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detres.data.masks import run_lengths

log = logging.getLogger("detres")

OnInvalid = Literal["error", "drop"]

LISTED = 20  # problems that a message tells in full
FARTHEST = 1e6  # pixels from the origin: pycocotools walks along edges pixel by pixel, and crashes on 1e9
ROUNDING = 1.0  # pixels that a box may reach past its image without a warning

EMPTY = "must have a width and a height above zero (redraw the box or delete the annotation)"


@dataclass(frozen=True)
class Problem:
    """One value that cannot be used. `reason` reads on from the field: 'must ...', with the likely fix."""

    file: str
    image: int | str | None
    annotation_id: int | str | None
    field: str
    value: Any
    reason: str
    kind: str = "invalid"  # of `kinds.KINDS`

    def __str__(self) -> str:
        where = [self.file]
        where += [f"image {self.image!r}"] if self.image is not None else []
        where += [f"annotation {self.annotation_id!r}"] if self.annotation_id is not None else []
        return f"{', '.join(where)}: {self.field} {self.reason}; got {_short(self.value)}"


def _short(value: Any, limit: int = 100) -> str:
    text = repr(value.tolist() if isinstance(value, array) else value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


class InvalidDataError(ValueError):
    """A data set with problems. `.problems` has all; the message tells the first in full, and counts the rest."""

    def __init__(self, name: str, problems: Sequence[Problem]):
        super().__init__(name, problems)
        self.name, self.problems = name, list(problems)

    def __str__(self) -> str:
        lines = [f"data set {self.name} must be valid, got {len(self.problems)} problem{'s'[:len(self.problems) > 1]}. "
                 "Correct them, or set data.on_invalid=drop to leave out what they concern."]
        lines += [f"  {problem}" for problem in self.problems[:LISTED]]
        rest = self.problems[LISTED:]
        lines += [f"  and {len(rest)} more: {_counts(rest)}"] if rest else []
        return "\n".join(lines)


def _counts(problems: Sequence[Problem]) -> str:
    kinds = Counter(f"{problem.field} {problem.reason.split(' (')[0]}" for problem in problems)
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


class Problems:
    """Collects problems while a reader leaves out what they concern."""

    def __init__(self, name: str):
        self.name = name
        self.found: list[Problem] = []

    def add(self, file: str | Path, image: Any, annotation_id: Any, field: str, value: Any, reason: str,
            kind: str = "invalid") -> None:
        self.found.append(Problem(str(file), image, annotation_id, field, value, reason, kind))

    def check_boxes(self, boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]],
                    report: Callable[[int, str], None]) -> np.ndarray:
        """Which of boxes (A, 4) xyxy on images of (height, width) can be used, (A,) bool; reports row and reason of
        each other. Boxes that reach past their image by more than rounding does are only counted, in the log."""
        table, limits = np.array(boxes, float).reshape(-1, 4), np.array(sizes, float).reshape(-1, 2)
        kept = np.ones(len(table), bool)
        for row, reason in _box_problems(table, limits):
            kept[row] = False
            report(row, reason)
        past = kept & ((table[:, :2] < -ROUNDING) | (table[:, 2:] > limits[:, ::-1] + ROUNDING)).any(1)
        if past.any():
            log.warning("%s: %d of %d boxes reach past the edge of their image by more than %g px; training clips them",
                        self.name, past.sum(), len(table), ROUNDING)
        return kept

    def close(self, on_invalid: OnInvalid) -> None:
        """Raises InvalidDataError if there was any problem, or, with 'drop', says what was left out."""
        if self.found and on_invalid == "error":
            raise InvalidDataError(self.name, self.found)
        if self.found:
            log.warning("%s: left out what is invalid (%d found): %s", self.name, len(self.found),
                        _counts(self.found))


def numbers(values: Any, count: int) -> list[float] | None:
    """`values` as a list of `count` floats; None if it is anything else. NaN passes."""
    if not isinstance(values, list) or len(values) != count or not all(type(v) in (int, float) for v in values):
        return None
    try:
        return [float(value) for value in values]
    except OverflowError:
        return None


def _box_problems(boxes: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, str]]:
    x1, y1, x2, y2 = boxes.T
    height, width = sizes.T
    finite = np.isfinite(boxes).all(1)
    empty = (x2 <= x1) | (y2 <= y1)
    outside = (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)
    for row in np.flatnonzero(~finite | empty | outside).tolist():
        if not finite[row]:
            yield row, "must be finite (correct the box or delete the annotation)"
        elif empty[row]:
            yield row, EMPTY
        else:
            yield row, (f"must overlap its image ({width[row]:g} px wide, {height[row]:g} px high: correct the box, "
                        "or the size stated for the image)")


def segmentation_problem(segmentation: Any, height: int, width: int) -> tuple[Any, str] | None:
    """What is wrong with a COCO segmentation: the value and the reason. Polygons must be arrays of doubles already."""
    if isinstance(segmentation, list):
        return next(((polygon, reason) for polygon in segmentation if (reason := _polygon_reason(polygon))), None)
    if not isinstance(segmentation, dict):
        return segmentation, "must be polygons or an RLE (a list of lists of x, y; or an object with size and counts)"
    if segmentation.get("size") != [height, width]:
        return segmentation.get("size"), f"must have the size of its image (as [height, width]: [{height}, {width}])"
    counts = segmentation.get("counts")
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return counts, "must have counts (a list of whole numbers, or COCO's compressed string)"
    if sum(runs) != height * width:
        return sum(runs), f"must have counts that cover its image (in all {height * width} pixels)"
    return None


def _polygon_reason(polygon: Any) -> str | None:
    if not isinstance(polygon, array):
        return "must have polygons of numbers (a flat list x1, y1, x2, y2 ...)"
    if len(polygon) % 2:
        return "must have polygons with as many x as y (the list has an odd length: a number is missing)"
    if len(polygon) < 6:
        return "must have polygons of 3 points or more (redraw or delete it)"
    if not math.isfinite(sum(polygon)):
        return "must have polygons of finite numbers (correct or delete it)"
    if max(polygon) > FARTHEST or min(polygon) < -FARTHEST:
        return "must have polygons near their image (correct or delete it)"
    return None
