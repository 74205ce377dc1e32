"""The check of labels: objects drawn twice, classes that are missing or seem confused. No image is opened.

Only what can be told from boxes and names alone, with few false alarms; docs/decisions.md says what was tried.

Legend: A objects (annotations but crowds), P pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from detres.data.check.exchanged import exchanged_classes
from detres.data.coco import names_split
from detres.data.dataset import Dataset
from detres.data.problems import Problem

TWICE = 0.9  # IoU of boxes of a class that are of one object
CONFUSED = 0.93  # and of boxes of two classes; a cat that fills its sofa has less
SPECK = 4  # pixels: the stride of the finest level of a feature pyramid
FULL = 0.98  # of an image's area
RARE = 10  # images, as LVIS has it


@dataclass(frozen=True)
class Objects:
    """A split by columns."""

    name: str
    dataset: Dataset

    @cached_property
    def table(self) -> np.ndarray:
        """(A,) of dtype `records.ANNOTATION`."""
        return self.dataset.records.table()[self._kept]

    @cached_property
    def image(self) -> np.ndarray:
        """(A,) places of the images."""
        return self.dataset.records.image_of()[self._kept]

    @cached_property
    def _kept(self) -> np.ndarray:
        return ~self.dataset.records.table()["crowd"]

    @cached_property
    def share(self) -> np.ndarray:
        """(A, 2) width and height as a share of the image's."""
        images = self.dataset.records.images[self.image]
        return self.sides / np.stack([images["width"], images["height"]], 1)

    @property
    def sides(self) -> np.ndarray:
        return self.table["box"][:, 2:] - self.table["box"][:, :2]

    @property
    def trains(self) -> bool:
        """Whether the split's name is not one for validation or tests."""
        return not any(names_split(Path(self.name), role, None) for role in ("val", "test"))

    def images_of_classes(self) -> dict[str, int]:
        """How many images have an object of each class."""
        classes = self.dataset.classes
        pairs = np.unique(self.image * len(classes) + self.table["label"])
        return dict(zip(classes, np.bincount(pairs % max(1, len(classes)), minlength=len(classes)).tolist()))

    def of_object(self, row: int, kind: str, field: str, value: Any, reason: str) -> Problem:
        record, item = self.dataset.records[int(self.image[row])], self.table[row]
        return Problem(str(record.path), record.id, int(item["id"]), field, value, reason, kind, self.name)

    @property
    def in_json(self) -> bool:
        """Whether annotations have ids and boxes are x, y, width, height in the file; else values are corners."""
        return self.dataset.format in ("coco", "lvis")

    @property
    def box_field(self) -> str:
        return "bbox" if self.in_json else "box"

    def box(self, row: int) -> list[float]:
        """As the file has it, in pixels."""
        x1, y1, x2, y2 = self.table["box"][row].tolist()
        return [round(value, 2) for value in ((x1, y1, x2 - x1, y2 - y1) if self.in_json else (x1, y1, x2, y2))]

    def of_class(self, kind: str, name: str, value: Any, reason: str) -> Problem:
        return Problem(self.dataset.name, None, None, f"class {name!r}", value, reason, kind, self.name)

    def class_name(self, row: int) -> str:
        return self.dataset.classes[self.table["label"][row]]


def check_labels(splits: Sequence[tuple[str, Dataset]]) -> list[Problem]:
    """What is wrong with the labels of the splits, or likely so: of each split, then between them. Objects are told by
    the file of their image and the id in memory."""
    found = [Objects(name, dataset) for name, dataset in splits]
    problems = [problem for objects in found for check in (_pairs, _specks, _fillers, _names, _empty_images)
                for problem in check(objects)]
    return problems + [*_coverage(found), *_tables(found), *_exchanges(found)]


# Within a split


def _pairs(objects: Objects) -> Iterator[Problem]:
    """Each object once, with the first before it that it is drawn over."""
    label = objects.table["label"]
    first, second, iou = overlapping(objects.image, objects.table["box"], TWICE)
    same = label[first] == label[second]
    for kind, chosen in (("object_twice", same), ("object_two_classes", ~same & (iou >= CONFUSED))):
        rows, places = np.unique(second[chosen], return_index=True)
        for row, other, value in zip(rows, first[chosen][places], iou[chosen][places]):
            box, twin = objects.box(row), f"{_named(objects, other)} (IoU {value:.2f}"
            if kind == "object_twice":
                yield objects.of_object(row, kind, objects.box_field, box,
                                        f"must be of another object than {twin}: delete one)")
            else:
                names = [objects.class_name(row), objects.class_name(other)]
                yield objects.of_object(row, kind, "classes", [*names, box],
                                        f"must be one: see {twin}: delete the wrong one)")


def _named(objects: Objects, row: int) -> str:
    number = objects.table["id"][row]
    return f"annotation {number}" if objects.in_json else f"that of {objects.box(row)}"


def overlapping(image: np.ndarray, boxes: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of boxes (A, 4) xyxy of the same image (A,) whose IoU is at least that: first, second and IoU, each (P,).

    Boxes are taken by their left side: a box is compared with those that follow within (1 - least) of its width, as the
    IoU with any other is smaller.
    """
    order = np.lexsort((boxes[:, 0], image))
    image, boxes = image[order], boxes[order]
    reach = boxes[:, 0] + (1 - least) * (boxes[:, 2] - boxes[:, 0])
    active, step, found = np.arange(len(boxes)), 0, []
    while len(active):
        step += 1
        active = active[active + step < len(boxes)]
        active = active[(image[active + step] == image[active]) & (boxes[active + step, 0] <= reach[active])]
        iou = paired_overlap(boxes[active], boxes[active + step])
        hit = iou >= least
        found.append((order[active[hit]], order[active[hit] + step], iou[hit]))
    first, second, iou = (np.concatenate(parts) for parts in zip(*found)) if found else (np.zeros(0, int),) * 3
    first, second = np.minimum(first, second), np.maximum(first, second)
    by_row = np.lexsort((first, second))
    return first[by_row], second[by_row], iou[by_row]


def paired_overlap(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | bool = False) -> np.ndarray:
    """IoU of boxes (P, 4) and (P, 4), one by one; where `a` is a crowd the share of `b` inside."""
    sides = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0)
    shared, area = sides.prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    union = np.where(crowd, area, area + (a[:, 2:] - a[:, :2]).prod(1) - shared)
    return shared / np.maximum(union, 1e-12)


def _specks(objects: Objects) -> Iterator[Problem]:
    sides = objects.sides
    thin = sides.min(1, initial=np.inf) < 1
    for row in np.flatnonzero(thin).tolist():
        yield objects.of_object(row, "box_under_pixel", objects.box_field, objects.box(row),
                                "must be a pixel wide and high (redraw or delete it)")
    for row in np.flatnonzero(~thin & (sides.max(1, initial=0) < SPECK)).tolist():
        yield objects.of_object(row, "box_speck", objects.box_field, objects.box(row),
                                f"must have a side of {SPECK} pixels to be found")


def _fillers(objects: Objects) -> Iterator[Problem]:
    """Classes most of whose boxes are the whole image."""
    classes, label = objects.dataset.classes, objects.table["label"]
    count = np.bincount(label, minlength=len(classes))
    full = np.bincount(label[objects.share.prod(1) >= FULL], minlength=len(classes))
    for place in np.flatnonzero((full >= RARE) & (full * 2 > count)).tolist():
        yield objects.of_class("class_fills_images", classes[place], f"{full[place]} of {count[place]}",
                               "must have boxes around its objects, not whole images (draw them)")


def _names(objects: Objects) -> Iterator[Problem]:
    known: dict[str, str] = {}
    for name in objects.dataset.classes:
        if name != name.strip() or not name:
            yield objects.of_class("class_name_blank", name, name, "must have no blanks at its ends, and letters "
                                   "(rename it)")
        key = re.sub(r"[\s_\-]+", "", name.casefold())
        other = next((known[form] for form in _forms(key) if form in known), None)
        if other is not None:
            yield objects.of_class("class_name_variant", name, [other, name], f"must not be {other!r} in another "
                                   "spelling (merge the two classes)")
        known.setdefault(key, name)


def _forms(key: str) -> Iterator[str]:
    """A name in the singular and the plural."""
    yield key
    yield from (key + "s", key + "es") if len(key) > 2 else ()
    yield from (key[:-len(end)] for end in ("s", "es") if key.endswith(end) and len(key) > 3 and key[-2:] != "ss")


def _empty_images(objects: Objects) -> Iterator[Problem]:
    counts = objects.dataset.records.counts()
    for place in np.flatnonzero(counts == 0).tolist() if counts.any() else ():  # none at all is the reader's to tell
        record = objects.dataset.records[place]
        yield Problem(str(record.path), record.id, None, "annotations", 0, "must be there if it shows an object",
                      "image_empty", objects.name)


# Between splits


def _coverage(splits: Sequence[Objects]) -> Iterator[Problem]:
    """Classes without objects, in all splits or some, and with few to train on."""
    counts = {id(objects): objects.images_of_classes() for objects in splits}
    annotated = [objects for objects in splits if len(objects.table)]
    train = [objects for objects in annotated if objects.trains]
    for name in dict.fromkeys(name for objects in annotated for name in objects.dataset.classes):
        has = {id(objects): counts[id(objects)].get(name, 0) for objects in annotated}
        trained = sum(has[id(objects)] for objects in train)
        if not any(has.values()):
            yield annotated[0].of_class("class_unused", name, 0, "must have an object in some split (annotate some, or "
                                        "delete the class)")
            continue
        if train and not trained:
            yield train[0].of_class("class_not_trained", name, 0, "must have objects to train on (other splits have "
                                    f"{sum(has.values())} images with some)")
        elif 0 < trained <= RARE:
            yield train[0].of_class("class_rare", name, f"{trained} image{'s'[:trained != 1]}",
                                    f"must be in more than {RARE} images "
                                    "to be learned well")
        for objects in annotated:
            if trained and not objects.trains and not has[id(objects)]:
                yield objects.of_class("class_not_measured", name, 0, "must have objects here to be measured")


def _tables(splits: Sequence[Objects]) -> Iterator[Problem]:
    """Class lists that differ from that of training, else of the first split."""
    if len(splits) < 2:
        return
    first = next((objects for objects in splits if objects.trains), splits[0])
    ids = dict(zip(first.dataset.classes, first.dataset.category_ids))
    for objects in splits:
        for name, number in zip(objects.dataset.classes, objects.dataset.category_ids):
            if name not in ids:
                yield objects.of_class("class_unknown", name, number, f"must be a class of {first.name} (add it there, "
                                       "or rename it)")
            elif ids[name] != number:
                yield objects.of_class("class_id_differs", name, number, f"must be {ids[name]}, as in {first.name} "
                                       "(use one list of classes)")


def _exchanges(splits: Sequence[Objects]) -> Iterator[Problem]:
    """Pairs of classes whose objects in one split look as the other's do in another split."""
    for first, second in combinations((objects for objects in splits if len(objects.table)), 2):
        names = [name for name in first.dataset.classes if name in second.dataset.classes]
        sides = [{name: _shapes(objects, name) for name in names} for objects in (first, second)]
        for a, b in exchanged_classes(*sides):
            yield second.of_class("class_exchanged", a, [a, b], f"must be that of {first.name}: its boxes are as those "
                                  f"of {b!r} there, and the reverse (are the names in another order?)")


def _shapes(objects: Objects, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Places of the images, and width and height as a share of them, of a class's objects."""
    own = objects.table["label"] == objects.dataset.classes.index(name)
    return objects.image[own], objects.share[own]
