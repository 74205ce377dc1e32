"""Which images of a data set to look at: by split, class, problem or id, in an order."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from detres.cli_parser import nearest
from detres.data.dataset import SPLITS, Dataset, ImageRecord
from detres.data.kinds import KINDS
from detres.data.problems import Problem
from detres.data.splits import Split, find_splits, load_readable

Order = Literal["random", "most", "smallest", "file"]
ANY = "any"  # stands for all kinds of problems


@dataclass(frozen=True)
class Choice:
    """What to look at; empty means all. With classes, only their objects are shown."""

    splits: Sequence[str] = ()
    classes: Sequence[str] = ()
    problems: Sequence[str] = ()  # of `KINDS`, or "any"
    images: Sequence[str] = ()  # ids or file names
    num: int | None = 12  # images; None: all
    seed: int = 0
    order: Order = "random"  # most objects, smallest object, or as in the file


@dataclass(frozen=True)
class Entry:
    """One image to look at. `record` and `number`, its place in the data set, are None where there are only problems:
    the reader left it out."""

    split: str
    dataset: Dataset
    number: int | None
    record: ImageRecord | None
    problems: tuple[Problem, ...] = ()

    @property
    def name(self) -> str:
        return _file_name(self.record) if self.record else f"image {self.problems[0].image}"


@dataclass(frozen=True)
class Selection:
    entries: list[Entry]
    found: int  # images that the choice fits, of which `entries` may be a part
    classes: tuple[str, ...]  # of all splits; their places choose the colours


def select(path: str | Path, images: str | None, choice: Choice, with_problems: bool = False) -> Selection:
    """Raises as `find_splits`, and ValueError for names that are not there, with those that are."""
    splits = choose_splits(find_splits(path, images), choice.splits)
    problems = _problems(path, images, choice.problems) if choice.problems or with_problems else {}
    return select_from(load_readable(splits), choice, problems)


def select_from(datasets: Sequence[tuple[str, Dataset]], choice: Choice,
                problems: Mapping[str, Mapping[str, Sequence[Problem]]] = {}) -> Selection:
    """Of splits by name; `problems` by split and id of the image."""
    classes = tuple(dict.fromkeys(name for _, dataset in datasets for name in dataset.classes))
    _check_known(choice.classes, classes, "--class must be of the data set")
    places = [place for part, (name, dataset) in enumerate(datasets)
              for place in _places(part, dataset, choice, problems.get(name, {}))]
    if choice.images:
        places = _asked_for(choice.images, places, [dataset for _, dataset in datasets])
    order = _ORDERS[choice.order](places, choice.seed)[:choice.num].tolist()
    return Selection([_entry(places[i], *datasets[places[i].part], choice, problems) for i in order], len(places),
                     classes)


def check_suffix(option: str, file: Path, suffix: str) -> None:
    if file.suffix != suffix:
        raise ValueError(f"{option} must end in {suffix}, got {file}. Give a file of that kind.")


def choose_splits(splits: Sequence[Split], names: Sequence[str]) -> list[Split]:
    """Those of these names or roles (train, val, test), training first; all, if no names are given."""
    _check_known(names, [name for split in splits for name in (split.name, split.role)],
                 "--split must be of the data set")
    chosen = [split for split in splits if not names or split.name in names or split.role in names]
    return sorted(chosen, key=lambda split: list(SPLITS).index(split.role))


def _check_known(names: Sequence[str], known: Iterable[str], rule: str) -> None:
    known = list(dict.fromkeys(known))
    for name in names:
        if name not in known:
            listed = ", ".join(known[:20]) + ", ..." * (len(known) > 20)
            raise ValueError(f"{rule} ({listed}), got {name}{nearest(name, known) or '. Correct it.'}")


def _problems(path: str | Path, images: str | None, kinds: Sequence[str]) -> dict[str, dict[str, list[Problem]]]:
    """By split and id of the image. Images are read only where a kind of problem is asked for: it takes long."""
    from detres.data.check.run import check_data

    _check_known(kinds, [ANY, *KINDS], "--problem must be a kind of problem")
    found: dict[str, dict[str, list[Problem]]] = defaultdict(lambda: defaultdict(list))
    for problem in check_data(path, images, read_images=bool(kinds)).problems:
        if problem.image is not None and (not kinds or ANY in kinds or problem.kind in kinds):
            found[problem.split][str(problem.image)].append(problem)
    return found


class _Place(NamedTuple):
    """Of an image among all: cheap, as there may be a million."""

    part: int  # of the splits
    number: int | None  # of the record
    image: str  # its id
    objects: int
    smallest: float  # area of a box, inf without one


def _places(part: int, dataset: Dataset, choice: Choice, problems: Mapping[str, Sequence[Problem]]) -> list[_Place]:
    """The images of a split that have the classes and problems."""
    records, table, image = dataset.records, dataset.records.table(), dataset.records.image_of()
    areas = (table["box"][:, 2:] - table["box"][:, :2]).prod(1)
    if choice.classes:
        kept = np.isin(table["label"], _labels(dataset, choice))
        image, areas = image[kept], areas[kept]
    smallest = np.full(len(records), np.inf)
    np.minimum.at(smallest, image, areas)
    columns = zip(map(str, records.ids()), np.bincount(image, minlength=len(records)).tolist(), smallest.tolist())
    places = [_Place(part, number, *column) for number, column in enumerate(columns)]
    read = {place.image for place in places} if problems else ()
    places += [_Place(part, None, name, 0, np.inf) for name in problems if name not in read]
    return [place for place in places if (not choice.classes or place.objects)
            and (not choice.problems or place.image in problems)]


def _labels(dataset: Dataset, choice: Choice) -> list[int]:
    return [dataset.classes.index(name) for name in choice.classes if name in dataset.classes]


def _entry(place: _Place, split: str, dataset: Dataset, choice: Choice,
           problems: Mapping[str, Mapping[str, Sequence[Problem]]]) -> Entry:
    found = tuple(problems.get(split, {}).get(place.image, ()))
    if place.number is None:
        return Entry(split, dataset, None, None, found)
    record = dataset.records[place.number]
    if choice.classes:
        labels = _labels(dataset, choice)
        record = replace(record, annotations=tuple(item for item in record.annotations if item.label in labels))
    return Entry(split, dataset, place.number, record, found)


def _asked_for(wanted: Sequence[str], places: Sequence[_Place], datasets: Sequence[Dataset]) -> list[_Place]:
    """Those with these ids or file names, with or without suffix."""
    left = set(wanted) - {place.image for place in places}
    names = {place: {place.image} for place in places}
    if left:  # slow: each record is made for its path
        for place in places:
            if place.number is not None:
                file = _file_name(datasets[place.part].records[place.number])
                names[place] |= {file, Path(file).stem}
                left -= names[place]
    if left:
        raise ValueError(f"--image must be ids or file names of images that the other options leave, got "
                         f"{', '.join(sorted(left))}. Correct it.")
    return [place for place in places if names[place] & set(wanted)]


def _file_name(record: ImageRecord) -> str:
    return Path(str(record.path)).name


def _random(places: Sequence[_Place], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(places))


def _most(places: Sequence[_Place], seed: int) -> np.ndarray:
    return np.argsort([-place.objects for place in places], kind="stable")


def _smallest(places: Sequence[_Place], seed: int) -> np.ndarray:
    return np.argsort([place.smallest for place in places], kind="stable")


def _in_file(places: Sequence[_Place], seed: int) -> np.ndarray:
    return np.arange(len(places))


_ORDERS: dict[str, Callable[[Sequence[_Place], int], np.ndarray]] = {
    "random": _random, "most": _most, "smallest": _smallest, "file": _in_file}


# What is wrong


def size_note(record: ImageRecord, size: tuple[int, int]) -> str:
    """What to say of an image file of a size (height, width); "" if it is that of its annotations."""
    if size == (record.height, record.width):
        return ""
    return f"the file has {size[1]} x {size[0]} px, its annotations state {record.width} x {record.height}"


def problem_text(problem: Problem) -> str:
    """For people who see the image: which annotation, and what of it."""
    where = f"annotation {problem.annotation_id}: " if problem.annotation_id is not None else ""
    value = problem.value.tolist() if isinstance(problem.value, array) else problem.value
    value = value if isinstance(value, str) else repr(value).replace("'", "")
    got = value if len(value) <= 60 else f"{value[:60]}..."
    return f"{where}{problem.field} {problem.reason.split(' (')[0]}; got {got}"


def problem_box(problem: Problem, record: ImageRecord | None) -> tuple[float, float, float, float] | None:
    """The box that a problem is about, xyxy in pixels: that of the annotation; where the reader left it out, the value,
    if it is four numbers."""
    in_json = problem.place.startswith("annotations[")  # elsewhere annotations have no ids, and boxes are corners
    items = record.annotations if record and in_json else ()
    if box := next((item.box for item in items if item.id == problem.annotation_id), None):
        return box
    if problem.kind in ("boxes_normalised", "boxes_in_pixels") or not (four := _four(problem.value)):
        return None
    x, y, a, b = four
    return (x, y, x + a, y + b) if in_json and problem.field == "bbox" else (x, y, a, b)


def _four(value: Any) -> list[float] | None:
    """Of numbers, or of texts of numbers; also after the classes of an object that has several."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[-1], (list, tuple)):
        value = value[-1]
    try:
        found = [float(item) for item in value] if isinstance(value, (list, tuple)) else []
    except (TypeError, ValueError, OverflowError):
        return None
    return found if len(found) == 4 and np.isfinite(found).all() else None
