"""Writes YOLO txt: data.yaml, images/<split>/ and labels/<split>/, as ultralytics reads them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from detres.data.coco import role_of
from detres.data.convert.lost import Losses
from detres.data.convert.masks import joined, to_polygons
from detres.data.convert.parts import Images, Part, entries_with_more
from detres.data.dataset import Annotation, ImageRecord
from detres.data.masks import mask_area

DIGITS = 12  # after the point: 1e-8 pixels of an image 10,000 pixels wide


def write_yolo(parts: Sequence[Part], out: Path, images: Images, losses: Losses, masks: str) -> list[int]:
    """Rows are polygons where there is a mask, else boxes; an image that has both has rectangles for boxes, as readers
    take all rows of a file for the same kind. Returns how many objects each part has there."""
    names = dict(enumerate(parts[0].dataset.classes))
    folders: dict[str, list[str]] = defaultdict(list)  # by the key of data.yaml
    written = [0] * len(parts)
    for place, part in enumerate(parts):
        folders[_key(part.name)].append(f"images/{part.name}")
        (out / "labels" / part.name).mkdir(parents=True)
        (out / "images" / part.name).mkdir(parents=True)
        for record in part.dataset.records:
            name = images.place(record, f"images/{part.name}")
            rows = _rows(record, losses, masks)
            file = (out / "labels" / part.name / name).with_suffix(".txt")
            file.write_text("".join(f"{row}\n" for row in rows))
            written[place] += len(rows)
    content = {"path": "."} | {key: own if len(own) > 1 else own[0] for key, own in folders.items()}
    losses.change("YOLO has one split for each of train, val and test: {} are joined",
                  sum(len(own) for own in folders.values() if len(own) > 1))
    text = yaml.safe_dump(content | {"names": names}, allow_unicode=True, sort_keys=False)
    (out / "data.yaml").write_text(text, encoding="utf-8")
    _tell(parts, losses)
    return written


def _key(name: str) -> str:
    """The key of data.yaml: train, val or test."""
    return role_of(name) or name


def _tell(parts: Sequence[Part], losses: Losses) -> None:
    items = [item for part in parts for _, item in part.objects()]
    losses.lose("YOLO has no crowds: {} left out", sum(item.crowd for item in items))
    losses.lose("YOLO has no difficult objects: {} left out, as in the usual scripts",
                sum(item.difficult and not item.crowd for item in items))
    losses.lose("keypoints of {} objects left out", sum(bool(item.keypoints) for item in items))
    losses.lose("YOLO has no further keys (licence, supercategory ...): those of {} entries left out",
                entries_with_more(parts))
    dataset = parts[0].dataset
    losses.change("YOLO numbers classes from 0: the ids of {} are left out",
                  0 if dataset.category_ids == tuple(range(len(dataset.classes))) else len(dataset.classes))


def _rows(record: ImageRecord, losses: Losses, masks: str) -> list[str]:
    items = [item for item in record.annotations if not (item.crowd or item.difficult)]
    with_masks = masks != "none" and any(item.segmentation for item in items)
    if masks == "none":
        losses.lose("{} masks left out", sum(bool(item.segmentation) for item in items))
    return [row for item in items if (row := (_polygon if with_masks else _box)(record, item, losses))]


def _box(record: ImageRecord, item: Annotation, losses: Losses) -> str:
    (x1, y1, x2, y2), inside = _clipped(record, item, losses)
    losses.lose("YOLO has no areas: {} that are not the box's left out",
                inside and abs(item.area - (x2 - x1) * (y2 - y1)) > 1e-6 * item.area and not item.segmentation)
    return _row(item, ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), record)


def _clipped(record: ImageRecord, item: Annotation, losses: Losses) -> tuple[list[float], bool]:
    """The box within its image, and whether it was: readers refuse an image that has others."""
    limits = (record.width, record.height) * 2
    box = [min(max(value, 0.0), limit) for value, limit in zip(item.box, limits)]
    inside = tuple(box) == tuple(item.box)
    losses.lose("YOLO's boxes end at the edge of the image: {} clipped", not inside)
    return box, inside


def _polygon(record: ImageRecord, item: Annotation, losses: Losses) -> str | None:
    if not item.segmentation:
        (x1, y1, x2, y2), _ = _clipped(record, item, losses)
        losses.change("{} boxes are rectangles now, as other objects of the image are polygons")
        return _row(item, (x1, y1, x2, y1, x2, y2, x1, y2), record)
    losses.change("{} masks are polygons along the edges of pixels now", not isinstance(item.segmentation, list))
    parts = to_polygons(item.segmentation, record.height, record.width)
    if not parts:
        return losses.lose("{} objects with an empty mask left out")
    losses.change("masks of several polygons are one now, joined by lines: {}", len(parts) > 1)
    points = joined([np.array(part).reshape(-1, 2) for part in parts])
    edges = [*points.min(0), *points.max(0)]
    points = np.clip(points, 0, (record.width, record.height))
    losses.lose("YOLO's polygons end at the edge of the image: {} clipped", [*points.min(0), *points.max(0)] != edges)
    losses.lose("YOLO's box of a polygon is its extent: {} boxes that differ left out",
                np.abs(np.subtract(item.box, edges)).max() > 1e-6)
    area = mask_area(parts, record.height, record.width)
    losses.lose("YOLO has no areas: {} that are not the mask's pixels left out", abs(item.area - area) > 1e-6 * area)
    return _row(item, points.ravel().tolist(), record)


def _row(item: Annotation, values: Sequence[float], record: ImageRecord) -> str:
    sides = itertools.cycle((record.width, record.height))
    texts = (f"{value / side:.{DIGITS}f}".rstrip("0").rstrip(".") for value, side in zip(values, sides))
    return " ".join((str(item.label), *texts))
