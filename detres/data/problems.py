"""What is wrong with a data set: found one by one, told all at once."""

from __future__ import annotations

import logging
import math
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from detres.data.check.layout import NAMES, REASONS, Layout, wrong_layout
from detres.data.kinds import KINDS, severity
from detres.data.masks import run_lengths

if TYPE_CHECKING:
    from detres.data.dataset import Annotation, Dataset

log = logging.getLogger("detres")


LISTED = 20  # problems that a message tells in full
FARTHEST = 1e6  # pixels from the origin: pycocotools walks along edges pixel by pixel, and crashes on 1e9
ROUNDING = 1.0  # pixels that a box may reach past its image without a warning

# Of all entries, or of what the others are made of: leaving out is no answer.
FATAL = frozenset({"images_nowhere", "bad_category", "duplicate_category", "boxes_xyxy", "boxes_normalised",
                   "boxes_in_pixels", "boxes_xywh"})

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
    split: str = ""  # that `detres data check` found it in
    place: str = ""  # of the entry in the file, such as "annotations[17]"
    better: Any = None  # what the value should be, where that can be computed

    def __str__(self) -> str:
        where = [self.file]
        where += [f"image {self.image!r}"] if self.image is not None else []
        where += [f"annotation {self.annotation_id!r}"] if self.annotation_id is not None else []
        where += [self.place] if self.place and self.image is self.annotation_id is None else []
        return f"{', '.join(where)}: {self.field} {self.reason}; got {shortened(self.value)}"


def shortened(value: Any, limit: int = 100) -> str:
    try:
        text = repr(value.tolist() if isinstance(value, array) else value)
    except (RecursionError, ValueError):  # nested too deep, or a whole number of thousands of digits
        text = f"a {type(value).__name__} that is too long to tell"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def source_words(path: str, images: str | None) -> str:
    """A data set as commands take it: to be told, and copied."""
    return " ".join([shlex.quote(path), *(["--images", shlex.quote(images)] if images else ())])


class InvalidDataError(ValueError):
    """A data set with problems. `.problems` has all; the message tells the first in full, and counts the rest."""

    def __init__(self, name: str, problems: Sequence[Problem], path: str = ""):
        super().__init__(name, problems, path)
        self.name, self.problems, self.path = name, list(problems), path
        self.drop = "set data.on_invalid=drop"  # what leaves out, in the command that the error ends

    def __str__(self) -> str:
        drop = "" if any(problem.kind in FATAL for problem in self.problems) else (
            f", or {self.drop} to leave out what they concern")
        lines = [f"data set {self.name} must be valid, got {len(self.problems)} problem{'s'[:len(self.problems) > 1]}. "
                 f"Correct them{drop}."]
        lines += [f"  {problem}" for problem in self.problems[:LISTED]]
        rest = self.problems[LISTED:]
        lines += [f"  and {len(rest)} more: {_counts(rest)}"] if rest else []
        lines += [f"All of them, what they do, and a clean copy: detres data check {self.path}"] if self.path else []
        return "\n".join(lines)


def raise_all(errors: Sequence[InvalidDataError]) -> None:
    """As one, if there is any: what is wrong with validation data need not wait until training data are mended."""
    if errors:
        paths = dict.fromkeys(error.path for error in errors if error.path)
        raise InvalidDataError(" and ".join(error.name for error in errors),
                               [problem for error in errors for problem in error.problems],
                               "; detres data check ".join(paths))


def _counts(problems: Sequence[Problem]) -> str:
    kinds = Counter(f"{problem.field} {problem.reason.split(' (')[0]}" for problem in problems)
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


class Problems:
    """Collects problems while a reader leaves out what they concern."""

    def __init__(self, name: str, path: str = "", found: Sequence[Problem] = ()):
        self.name, self.path = name, path  # the path is told as that to check
        self.found = list(found)
        # Data sets with, for the checks that follow, file, id and place there of an annotation.
        self.located: list[tuple[Dataset, Locate]] = []

    def add(self, file: str | Path, image: Any, annotation_id: Any, field: str, value: Any, reason: str,
            kind: str = "invalid", place: str = "", better: Any = None) -> None:
        self.found.append(Problem(str(file), image, annotation_id, field, value, reason, kind, "", place, better))

    def images(self, kind: str) -> set[int | str | None]:
        """Ids of the images that have a problem of this kind."""
        return {problem.image for problem in self.found if problem.kind == kind}

    def check_boxes(self, boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[float, float]],
                    report: Callable[[int, str, str], None]) -> np.ndarray:
        """Which of boxes (A, 4) xyxy on images of (height, width) can be used, (A,) bool; reports row, reason and kind
        of each other, and of boxes that reach past their image by more than rounding does. A size may be NaN: not
        known."""
        table, limits = np.array(boxes, float).reshape(-1, 4), np.array(sizes, float).reshape(-1, 2)
        kept = np.ones(len(table), bool)
        for row, reason, kind in _box_problems(table, limits):
            kept[row] = False
            report(row, reason, kind)
        past = kept & ((table[:, :2] < -ROUNDING) | (table[:, 2:] > limits[:, ::-1] + ROUNDING)).any(1)
        for row in np.flatnonzero(past).tolist():
            report(row, f"must end at the edge of its image ({_sides(limits[row])}: training clips it)",
                   "box_past_edge")
        return kept

    def check_layout(self, file: str | Path, field: str, boxes: Sequence[Sequence[float]],
                     sizes: Sequence[tuple[float, float]], stated: Layout) -> str | None:
        """Told, and its kind returned, if all boxes together are evidently in another layout than `stated`."""
        table = np.array(boxes, float).reshape(-1, 4)
        kind = wrong_layout(table, np.array(sizes, float).reshape(-1, 2), stated)
        if kind:
            reason = REASONS[kind].format(layout=NAMES[stated], count=len(table))
            self.add(file, None, None, field, table[-1].tolist(), reason, kind)
        return kind

    def close(self, on_invalid: OnInvalid) -> None:
        """Raises InvalidDataError if there was an error, or, with 'drop', says what was left out; warnings are one line
        for each kind. With `Problems`: adds all to them."""
        if isinstance(on_invalid, Problems):
            on_invalid.found += self.found
            on_invalid.located += self.located
            return
        errors = [problem for problem in self.found if severity(problem.kind) == "error"]
        if errors and (on_invalid == "error" or any(problem.kind in FATAL for problem in errors)):
            raise InvalidDataError(self.name, errors, self.path)
        if errors:
            log.warning("%s: left out what is invalid (%d found): %s", self.name, len(errors), _counts(errors))
        warnings = Counter(problem.kind for problem in self.found if severity(problem.kind) == "warning")
        for kind, count in warnings.items():
            log.warning("%s: %d x %s: %s", self.name, count, KINDS[kind].title, KINDS[kind].effect)


Locate = Callable[["Annotation"], tuple[str, int | None, str]]
OnInvalid = Literal["error", "drop"] | Problems  # what a reader does about problems; Problems take them


def is_number(value: Any) -> bool:
    """A finite number that fits a float."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def numbers(values: Any, count: int) -> list[float] | None:
    """`values` as a list of `count` floats; None if it is anything else. NaN passes."""
    if not isinstance(values, list) or len(values) != count or not {*map(type, values)} <= {int, float}:
        return None
    try:
        return [float(value) for value in values]
    except OverflowError:
        return None


def _box_problems(boxes: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, str, str]]:
    """Row, reason and kind."""
    x1, y1, x2, y2 = boxes.T
    height, width = sizes.T
    finite = np.isfinite(boxes).all(1)
    empty = (x2 <= x1) | (y2 <= y1)
    outside = (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)
    for row in np.flatnonzero(~finite | empty | outside).tolist():
        if not finite[row]:
            yield row, "must be finite (correct the box or delete the annotation)", "box_not_finite"
        elif empty[row]:
            yield row, EMPTY, "box_negative" if x2[row] < x1[row] or y2[row] < y1[row] else "box_empty"
        else:
            yield row, (f"must overlap its image ({_sides(sizes[row])}: correct the box, or the size stated for the "
                        "image)"), "box_outside"


def _sides(size: np.ndarray) -> str:
    return f"{size[1]:g} px wide, {size[0]:g} px high"


def unsound_polygons(polygons: Sequence[array]) -> list[int]:
    """Places of those that `segmentation_problem` would find something in."""
    lengths = np.fromiter(map(len, polygons), int, len(polygons))
    unsound = (lengths < 6) | (lengths % 2 > 0)
    long = np.flatnonzero(lengths)  # reduceat knows no empty rows
    if len(long):
        values = np.abs(np.frombuffer(b"".join(polygons)))
        starts = np.cumsum(lengths[long]) - lengths[long]
        unsound[long] |= ~(np.maximum.reduceat(values, starts) <= FARTHEST)  # NaN passes through maximum
    return np.flatnonzero(unsound).tolist()


def segmentation_problem(segmentation: Any, height: int | None, width: int | None) -> tuple[Any, str, str] | None:
    """What is wrong with a COCO segmentation: value, reason and kind. Polygons must be arrays of doubles already.
    Without a size, what depends on it is not looked at."""
    if isinstance(segmentation, list):
        return next(((polygon, *problem) for polygon in segmentation if (problem := _polygon_problem(polygon))), None)
    if not isinstance(segmentation, dict):
        return (segmentation, "must be polygons or an RLE (a list of lists of x, y; or an object with size and counts)",
                "bad_segmentation")
    if height is None:
        return None
    if segmentation.get("size") != [height, width]:
        return (segmentation.get("size"), f"must have the size of its image (as [height, width]: [{height}, {width}])",
                "rle_size")
    counts = segmentation.get("counts")
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not {*map(type, runs)} <= {int} or min(runs, default=0) < 0:
        return counts, "must have counts (a list of whole numbers, or COCO's compressed string)", "bad_rle"
    if sum(runs) != height * width:
        return sum(runs), f"must have counts that cover its image (in all {height * width} pixels)", "bad_rle"
    return None


def _polygon_problem(polygon: Any) -> tuple[str, str] | None:
    """Reason and kind."""
    if not isinstance(polygon, array):
        return "must have polygons of numbers (a flat list x1, y1, x2, y2 ...)", "bad_segmentation"
    if len(polygon) % 2:
        return ("must have polygons with as many x as y (the list has an odd length: a number is missing)",
                "polygon_odd")
    if len(polygon) < 6:
        return "must have polygons of 3 points or more (redraw or delete it)", "polygon_short"
    if not math.isfinite(sum(polygon)):
        return "must have polygons of finite numbers (correct or delete it)", "polygon_not_finite"
    if max(polygon) > FARTHEST or min(polygon) < -FARTHEST:
        return "must have polygons near their image (correct or delete it)", "polygon_not_finite"
    return None
