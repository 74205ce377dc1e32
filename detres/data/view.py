"""Which images of a data set to look at: by split, class, problem or id, in an order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from detres.cli_parser import nearest
from detres.data.dataset import SPLITS, Annotation, Dataset, ImageRecord
from detres.data.kinds import KINDS
from detres.data.problems import Problem, numbers
from detres.data.splits import Split, find_splits

Order = Literal["random", "most", "smallest", "file"]
ANY = "any"  # stands for all kinds of problems


@dataclass(frozen=True)
class Choice:
    """What to look at; empty means all. Of images with several classes only those chosen are shown."""

    splits: Sequence[str] = ()
    classes: Sequence[str] = ()
    problems: Sequence[str] = ()  # of `KINDS`, or "any"
    images: Sequence[str] = ()  # ids or file names
    num: int | None = 12  # images; None: all
    seed: int = 0
    order: Order = "random"  # most objects, smallest object, or as in the file


@dataclass(frozen=True)
class Entry:
    """One image to look at. `record` is None where there are only problems: the image could not be read."""

    split: str
    dataset: Dataset
    record: ImageRecord | None
    problems: tuple[Problem, ...] = ()

    @property
    def name(self) -> str:
        return self.record.path.name if self.record else f"image {self.problems[0].image}"


@dataclass(frozen=True)
class Selection:
    entries: list[Entry]
    found: int  # images that the choice fits, of which `entries` may be a part
    classes: tuple[str, ...]  # of all splits; their places choose the colours


def select(path: str | Path, images: str | None, choice: Choice, with_problems: bool = False) -> Selection:
    """Raises as `find_splits`, and ValueError for names that are not there, with those that are."""
    splits = choose_splits(find_splits(path, images), choice.splits)
    problems = _problems(path, images, choice.problems) if choice.problems or with_problems else {}
    return select_from([(split.name, split.load("drop")) for split in splits], choice, problems)


def select_from(datasets: Sequence[tuple[str, Dataset]], choice: Choice,
                problems: Mapping[str, Mapping[str, Sequence[Problem]]] = {}) -> Selection:
    """Of splits by name; `problems` by split and id of the image."""
    classes = tuple(dict.fromkeys(name for _, dataset in datasets for name in dataset.classes))
    _check_known(choice.classes, classes, "--class")
    entries = [entry for name, dataset in datasets for entry in _entries(name, dataset, choice, problems.get(name, {}))]
    if choice.images:
        _check_images(choice.images, entries)
    order = _ORDERS[choice.order](entries, choice.seed)
    return Selection([entries[i] for i in order[:choice.num]], len(entries), classes)


def choose_splits(splits: Sequence[Split], names: Sequence[str]) -> list[Split]:
    """Those of these names or roles (train, val, test), training first; all, if no names are given."""
    _check_known(names, [name for split in splits for name in (split.name, split.role)], "--split")
    chosen = [split for split in splits if not names or split.name in names or split.role in names]
    return sorted(chosen, key=lambda split: list(SPLITS).index(split.role))


def _check_known(names: Sequence[str], known: Iterable[str], option: str) -> None:
    known = list(dict.fromkeys(known))
    for name in names:
        if name not in known:
            listed = ", ".join(known[:20]) + ", ..." * (len(known) > 20)
            raise ValueError(f"{option} must be of the data set, which has {listed}; got {name}"
                             f"{nearest(name, known) or '. Correct it.'}")


def _problems(path: str | Path, images: str | None, kinds: Sequence[str]) -> dict[str, dict[str, list[Problem]]]:
    """By split and id of the image. Images are read only where a kind of problem is asked for: it takes long."""
    from detres.data.check.run import check_data

    _check_known(kinds, [ANY, *KINDS], "--problem")
    found: dict[str, dict[str, list[Problem]]] = defaultdict(lambda: defaultdict(list))
    for problem in check_data(path, images, read_images=bool(kinds)).problems:
        if problem.image is not None and (not kinds or ANY in kinds or problem.kind in kinds):
            found[problem.split][str(problem.image)].append(problem)
    return found


def _entries(split: str, dataset: Dataset, choice: Choice, problems: Mapping[str, Sequence[Problem]]) -> list[Entry]:
    labels = {dataset.classes.index(name) for name in choice.classes if name in dataset.classes}
    entries = []
    for record in dataset.records:
        if choice.classes:
            record = replace(record, annotations=tuple(item for item in record.annotations if item.label in labels))
        entries.append(Entry(split, dataset, record, tuple(problems.get(str(record.id), ()))))
    if not choice.classes:
        read = {str(record.id) for record in dataset.records}
        entries += [Entry(split, dataset, None, tuple(found)) for image, found in problems.items() if image not in read]
    return [entry for entry in entries if _fits(entry, choice)]


def _fits(entry: Entry, choice: Choice) -> bool:
    return ((not choice.classes or bool(entry.record.annotations)) and (not choice.problems or bool(entry.problems))
            and (not choice.images or bool(_names(entry) & set(choice.images))))


def _names(entry: Entry) -> set[str]:
    """That an image may be asked for by."""
    if entry.record is None:
        return {str(entry.problems[0].image)}
    return {str(entry.record.id), entry.record.path.name, Path(entry.record.path.name).stem, str(entry.record.path)}


def _check_images(wanted: Sequence[str], entries: Sequence[Entry]) -> None:
    known = set().union(*map(_names, entries)) if entries else set()
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(f"--image must be ids or file names of images that the other options leave, got "
                         f"{', '.join(missing)}. Check it.")


def _random(entries: Sequence[Entry], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(entries))


def _most(entries: Sequence[Entry], seed: int) -> np.ndarray:
    return np.argsort([-len(_annotations(entry)) for entry in entries], kind="stable")


def _smallest(entries: Sequence[Entry], seed: int) -> np.ndarray:
    return np.argsort([min((_area(item) for item in _annotations(entry)), default=np.inf) for entry in entries],
                      kind="stable")


def _in_file(entries: Sequence[Entry], seed: int) -> np.ndarray:
    return np.arange(len(entries))


_ORDERS: dict[str, Callable[[Sequence[Entry], int], np.ndarray]] = {
    "random": _random, "most": _most, "smallest": _smallest, "file": _in_file}


def _annotations(entry: Entry) -> Sequence[Annotation]:
    return entry.record.annotations if entry.record else ()


def _area(item: Annotation) -> float:
    x1, y1, x2, y2 = item.box
    return (x2 - x1) * (y2 - y1)


# Problems


def problem_text(problem: Problem) -> str:
    """For people who see the image: which annotation, and what of it."""
    where = f"annotation {problem.annotation_id}: " if problem.annotation_id is not None else ""
    value = problem.value if isinstance(problem.value, str) else repr(problem.value)
    got = value if len(value) <= 60 else f"{value[:60]}..."
    return f"{where}{problem.field} {problem.reason.split(' (')[0]}; got {got}"


def problem_box(problem: Problem, record: ImageRecord | None) -> tuple[float, float, float, float] | None:
    """The box that a problem is about, xyxy: as the file gives it, where its value is four finite numbers; else that
    of the annotation."""
    four = numbers(list(problem.value), 4) if isinstance(problem.value, (list, tuple)) else None
    if four and np.isfinite(four).all() and problem.field in ("bbox", "bndbox"):
        x, y, a, b = four
        return (x, y, x + a, y + b) if problem.field == "bbox" else (x, y, a, b)
    items = record.annotations if record else ()
    return next((item.box for item in items if item.id == problem.annotation_id), None)
