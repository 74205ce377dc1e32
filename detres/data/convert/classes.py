"""Classes renamed, merged, chosen and put in order; one list of them for several data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from detres.cli_parser import nearest
from detres.data.convert.parts import LVIS_LISTS, Part
from detres.data.dataset import Dataset, ImageRecord


@dataclass(frozen=True)
class ClassChange:
    """`rename`: old name to new, several to one to merge them; `keep`, by old name or new, in this order, unless
    empty."""

    rename: Mapping[str, str] = field(default_factory=dict)
    keep: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.rename or self.keep)


def changed(parts: Sequence[Part], change: ClassChange) -> list[Part]:
    """Raises ValueError for names that are not there, and for data with label maps, whose classes stay."""
    if not change:
        return list(parts)
    if any(part.semantic for part in parts):
        raise ValueError("classes must stay as they are in data with label maps, got --classes, --rename or "
                         "--merge-classes. Convert to another format first.")
    old = parts[0].dataset.classes
    _check(change.rename, old)
    named = [change.rename.get(name, name) for name in old]
    keep = [change.rename.get(name, name) for name in change.keep]
    _check(keep, named)
    new = tuple(dict.fromkeys(keep or named))
    return [replace(part, dataset=relabelled(part.dataset, [new.index(name) if name in new else None for name in named],
                                             new)) for part in parts]


def _check(asked: Any, known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            hint = nearest(name, known) or "."
            raise ValueError(f"class must be one of the {len(set(known))} there are, got '{name}'{hint} There are "
                             f"{', '.join(dict.fromkeys(known)):.300}.")


def relabelled(dataset: Dataset, new: Sequence[int | None], classes: tuple[str, ...],
               category_ids: Sequence[int] | None = None) -> Dataset:
    """With label `new[k]` for k; objects of None are left out. Ids of classes are those of the first old one, or
    `category_ids`."""
    olds: list[list[int]] = [[k for k, label in enumerate(new) if label == number] for number in range(len(classes))]
    ids = category_ids or [dataset.category_ids[own[0]] for own in olds]

    def moved(record: ImageRecord) -> ImageRecord:
        items = tuple(replace(item, label=new[item.label]) for item in record.annotations
                      if new[item.label] is not None)
        return replace(record, annotations=items, extra=_lists(record.extra, olds))

    extra = dataset.extra and dataset.extra | {"categories": [dataset.extra["categories"][own[0]] if own else {}
                                                              for own in olds]}
    posed = tuple(name for name, own in zip(classes, olds) if any(dataset.classes[k] in dataset.keypoint_classes
                                                                  for k in own))
    return replace(dataset, classes=classes, category_ids=tuple(ids), extra=extra, keypoint_classes=posed,
                   records=dataset.records.mapped(moved))


def _lists(extra: dict[str, Any] | None, olds: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """LVIS' lists: a merged class is not in the image if none of them is, and labelled in part if one of them is."""
    if not extra or not any(key in extra for key in LVIS_LISTS):
        return extra
    negative, partial = (set(extra.get(key, ())) for key in LVIS_LISTS)
    return extra | {LVIS_LISTS[0]: [k for k, own in enumerate(olds) if own and negative.issuperset(own)],
                    LVIS_LISTS[1]: [k for k, own in enumerate(olds) if partial.intersection(own)]}


def unified(parts: Sequence[Part]) -> list[Part]:
    """With the union of the classes of all, by name, in the order in which they come. Ids are those of the first data
    set, and above them for further classes.

    Raises ValueError where the names of keypoints differ.
    """
    lists = {(part.dataset.classes, part.dataset.category_ids) for part in parts}
    if len(lists) == 1:
        return list(parts)
    ids: dict[str, int] = {}
    extra: dict[str, Any] = {}
    for part in parts:
        for label, (name, number) in enumerate(zip(part.dataset.classes, part.dataset.category_ids)):
            if name not in ids:
                ids[name] = number if number not in ids.values() else max(ids.values()) + 1
                extra[name] = part.dataset.extra["categories"][label] if part.dataset.extra else {}
    classes = tuple(sorted(ids, key=lambda name: ids[name]))
    return [replace(part, dataset=_with_all(part.dataset, classes, [ids[name] for name in classes],
                                            [extra[name] for name in classes])) for part in parts]


def _with_all(dataset: Dataset, classes: tuple[str, ...], ids: Sequence[int], extra: list[Any]) -> Dataset:
    label_of = {name: k for k, name in enumerate(classes)}
    found = relabelled(dataset, [label_of[name] for name in dataset.classes], classes, ids)
    return replace(found, extra=(dataset.extra or {}) | {"categories": extra} if any(extra) else dataset.extra)
