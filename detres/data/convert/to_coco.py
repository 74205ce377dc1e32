"""Writes COCO JSON, `annotations/instances_<split>.json`, and LVIS', `annotations/lvis_v1_<split>.json`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from detres.data.coco import pose_of
from detres.data.convert.lost import Losses
from detres.data.convert.masks import to_polygons, to_rle
from detres.data.convert.parts import LVIS_LISTS, Images, Part
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.masks import PNGSegment

FREQUENT = ((10, "r"), (100, "c"))  # training images that a class is in, at most: rare, common; else frequent


def write_coco(parts: Sequence[Part], out: Path, images: Images, losses: Losses, masks: str) -> list[int]:
    """Returns how many objects each part has there."""
    _write(parts, out, images, losses, masks, "instances")
    losses.change("COCO has no difficult objects: {} marked by a key `difficult`, which detres reads and others do not",
                  sum(item.difficult for part in parts for _, item in part.objects()))
    return [len(part.dataset.records.rows()) for part in parts]


def write_lvis(parts: Sequence[Part], out: Path, images: Images, losses: Losses, masks: str) -> list[int]:
    """Without crowds: their class counts as not fully labelled in the image. Where the data do not say which classes an
    image is known not to have, it is labelled in full: all that it has no object of. Returns how many objects each
    part has there."""
    frequency = _frequency(parts)
    bare = [_without_crowds(part, losses) for part in parts]
    _write([_with_lists(part, old) for part, old in zip(bare, parts)], out, images, losses,
           "polygon" if masks == "keep" else masks, "lvis_v1", frequency)
    losses.lose("LVIS has no keypoints: those of {} objects left out",
                sum(bool(item.keypoints) for part in parts for _, item in part.objects()))
    return [len(part.dataset.records.rows()) for part in bare]


def _write(parts: Sequence[Part], out: Path, images: Images, losses: Losses, masks: str, prefix: str,
           frequency: Sequence[dict[str, Any]] = ()) -> None:
    ids = _image_ids(parts, losses)
    (out / "annotations").mkdir(parents=True)
    for part in parts:
        dataset = part.dataset
        category_ids = _category_ids(dataset, losses if part is parts[0] else Losses())
        categories = [_category(dataset, label, number, prefix) for label, number in enumerate(category_ids)]
        for category, more in zip(categories, frequency):
            category |= {key: value for key, value in more.items() if key not in category}
        own = {key: value for key, value in (dataset.extra or {}).items() if key != "categories"}
        content = {**own, "images": [
            {"id": ids[part.name][i], "file_name": images.place(record, part.name, named=True),
             "height": record.height, "width": record.width, **_image_extra(record, category_ids)}
            for i, record in enumerate(dataset.records)],
            "annotations": list(_annotations(part, ids[part.name], category_ids, losses, masks, prefix)),
            "categories": categories}
        file = out / "annotations" / f"{prefix}_{part.name}.json"
        file.write_bytes(msgspec.json.encode(content, enc_hook=_list))


def _list(value: Any) -> Any:
    if isinstance(value, (array, np.ndarray)):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value).__name__)


def _image_ids(parts: Sequence[Part], losses: Losses) -> dict[str, list[int]]:
    """Of each part: as they are if they are whole numbers and differ over all parts, else from 1 on."""
    old = [record.id for part in parts for record in part.dataset.records]
    numbers = all(isinstance(number, int) for number in old)
    keep = numbers and len(set(old)) == len(old)
    new = iter(old if keep else range(1, len(old) + 1))
    losses.change("ids of {} images are counted from 1, as some are there twice" if numbers else
                  "ids of {} images are numbers now; the names are in file_name", 0 if keep else len(old))
    return {part.name: [next(new) for _ in part.dataset.records] for part in parts}


def _category_ids(dataset: Dataset, losses: Losses) -> tuple[int, ...]:
    """As they are, or from 1 on where they do not rise, as their order is that of the classes, or one is below 1: 0
    means background to many tools."""
    ids = dataset.category_ids
    if min(ids, default=1) >= 1 and all(a < b for a, b in zip(ids, ids[1:])):
        return ids
    losses.change("ids of {} classes are counted from 1", len(ids))
    return tuple(range(1, len(ids) + 1))


def _category(dataset: Dataset, label: int, number: int, prefix: str) -> dict[str, Any]:
    category = {"id": number, "name": dataset.classes[label]}
    pose = pose_of(dataset, dataset.classes[label]) if prefix == "instances" else {}
    return category | pose | (dataset.extra["categories"][label] if dataset.extra else {})


def _image_extra(record: ImageRecord, category_ids: Sequence[int]) -> dict[str, Any]:
    extra = record.extra or {}
    return extra | {key: [category_ids[label] for label in extra[key]] for key in LVIS_LISTS if key in extra}


def _annotations(part: Part, image_ids: Sequence[int], category_ids: Sequence[int], losses: Losses, masks: str,
                 prefix: str) -> Iterator[dict[str, Any]]:
    ids = [item.id for _, item in part.objects()]
    keep = len(set(ids)) == len(ids) and min(ids, default=1) > 0
    losses.change("ids of {} objects are counted from 1", 0 if keep else len(ids))
    number = 0
    for image_id, record in zip(image_ids, part.dataset.records):
        for item in record.annotations:
            number += 1
            yield {"id": item.id if keep else number, "image_id": image_id, "category_id": category_ids[item.label],
                   "bbox": item.bbox, "area": item.area,
                   "segmentation": _segmentation(item, record, masks, losses),
                   **({} if prefix == "lvis_v1" else {"iscrowd": int(item.crowd)}),
                   **(_keypoints(item) if prefix == "instances" else {}),
                   **({"difficult": 1, "ignore": 1} if item.difficult else {}), **(item.extra or {})}


def _keypoints(item: Annotation) -> dict[str, Any]:
    points = item.keypoints
    return {"keypoints": list(points), "num_keypoints": sum(flag > 0 for flag in points[2::3])} if points else {}


def _segmentation(item: Annotation, record: ImageRecord, masks: str, losses: Losses) -> Any:
    """Crowds stay run lengths, as they are in COCO."""
    found, size = item.segmentation, (record.height, record.width)
    if not found:
        return []
    if masks == "rle" and isinstance(found, list):
        losses.change("{} masks are pixels now, not polygons")
    if masks == "rle" or isinstance(found, PNGSegment) and masks != "polygon" or item.crowd and masks == "polygon":
        return to_rle(found, *size)
    if masks != "polygon":
        return found
    losses.change("{} masks are polygons along the edges of pixels now", not isinstance(found, list))
    return to_polygons(found, *size)


# LVIS


def _without_crowds(part: Part, losses: Losses) -> Part:
    losses.lose("LVIS has no crowds: {} left out, their classes marked as not fully labelled in the image",
                sum(item.crowd for _, item in part.objects()))
    return part.with_records(record if not any(item.crowd for item in record.annotations) else _filtered(record)
                             for record in part.dataset.records)


def _filtered(record: ImageRecord) -> ImageRecord:
    return replace(record, annotations=tuple(item for item in record.annotations if not item.crowd))


def _with_lists(part: Part, whole: Part) -> Part:
    """With LVIS' lists in all images; `whole` still has the crowds."""
    def listed(record: ImageRecord, full: ImageRecord) -> ImageRecord:
        extra = dict(record.extra or {})
        has = {item.label for item in full.annotations}
        extra.setdefault("neg_category_ids", [k for k in range(len(part.dataset.classes)) if k not in has])
        crowds = {item.label for item in full.annotations if item.crowd}
        extra["not_exhaustive_category_ids"] = sorted({*extra.get("not_exhaustive_category_ids", ()), *crowds})
        return replace(record, extra=extra)

    return part.with_records(map(listed, part.dataset.records, whole.dataset.records))


def _frequency(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What LVIS says of each class, counted in the training images; in all where no part trains."""
    train = [part for part in parts if part.name.startswith("train")] or parts
    count = np.zeros((2, len(parts[0].dataset.classes)), int)  # images, objects
    for part in train:
        for record in part.dataset.records:
            labels = [item.label for item in record.annotations]
            np.add.at(count[1], labels, 1)
            count[0, list(set(labels))] += 1
    return [{"frequency": next((letter for limit, letter in FREQUENT if found <= limit), "f"), "image_count": found,
             "instance_count": number} for found, number in count.T.tolist()]
