"""Masks and label maps as PNG files: VOC's segmentation task, and COCO's panoptic format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from PIL import Image

from detres.data.convert.lost import Losses
from detres.data.convert.parts import Images, Part, entries_with_more
from detres.data.dataset import Annotation, ImageRecord
from detres.data.label_maps import IGNORED
from detres.data.masks import rasterize
from detres.data.panoptic import THINGS
from detres.data.semantic import BACKGROUND

MOST = 254  # values of a pixel: objects of an image, or classes
PALETTE = np.array([[sum((value >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
                    for value in range(256)], np.uint8)  # the devkit's colours


def write_list(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# VOC


def semantic_classes(part: Part) -> tuple[str, ...]:
    return part.semantic.classes if part.semantic else (BACKGROUND, *part.dataset.classes)


def write_masks(part: Part, place: int, items: Sequence[Annotation], out: Path, image_id: str,
                 losses: Losses) -> None:
    """SegmentationObject, numbers of objects from 1 on, and SegmentationClass; crowds are ignored pixels (255)."""
    record = part.dataset.records[place]
    if len(items) > MOST:
        raise ValueError(f"VOC's PNG must have at most {MOST} objects, got {len(items)} ({record.path}). Leave out "
                         "--masks png.")
    objects = paint(record, items, losses)
    labels = np.array([0, *(1 + item.label for item in items)], np.uint8)[np.minimum(objects, len(items))]
    crowds = np.array([False, *(item.crowd for item in items)])[np.minimum(objects, len(items))]
    labels[crowds] = IGNORED
    if part.semantic:
        labels = part.semantic.records[place].label_map.read(part.semantic.records[place])
    for folder, values in (("SegmentationObject", objects), ("SegmentationClass", labels)):
        _save(values.astype(np.uint8), out / folder / f"{image_id}.png")


def _save(values: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    image.putpalette(PALETTE.tobytes())
    image.save(file)


def write_semantic(parts: Sequence[Part], out: Path, images: Images) -> None:
    """Label maps in VOC's layout, beside instances in another format."""
    write_list(out / "semantic" / "classes.txt", semantic_classes(parts[0]))
    for part in parts:
        names = []
        for own, record in zip(part.dataset.records, part.semantic.records):
            names.append(Path(images.place(own, "semantic/JPEGImages")).stem)
            _save(record.label_map.read(record), out / "semantic/SegmentationClass" / f"{names[-1]}.png")
        write_list(out / "semantic/ImageSets/Segmentation" / f"{part.name}.txt", names)


def paint(record: ImageRecord, items: Sequence[Annotation], losses: Losses) -> np.ndarray:
    """(H, W) int32 of the place in `items` + 1 of the object that each pixel is of: of several, the smallest, which
    stands before the others more often than not; a crowd only where nothing else is."""
    found = np.zeros((record.height, record.width), np.int32)
    order = sorted(range(len(items)), key=lambda i: (not items[i].crowd, -items[i].area))
    hidden = 0
    for i in order:
        if items[i].segmentation:
            inside = rasterize(items[i].segmentation, record.height, record.width).view(bool)
            hidden += int((found[inside] > 0).sum())
            found[inside] = i + 1
    losses.lose("a pixel is of one object: {} pixels of objects that others cover left out", hidden)
    seen = set(np.unique(found).tolist())
    losses.lose("{} masks left out that others cover in full", sum(bool(item.segmentation) and i + 1 not in seen for
                                                                   i, item in enumerate(items)))
    return found


# Panoptic


def write_panoptic(parts: Sequence[Part], out: Path, images: Images, losses: Losses, masks: str) -> list[int]:
    """annotations/panoptic_<split>.json and the folder of PNG files called so. Things are the objects, stuff the
    classes of the label maps that are no things; pixels of neither are of no segment. Returns how many things each part
    has."""
    written = []
    for part in parts:
        ids = range(1, len(part.dataset.records) + 1)
        old = [record.id for record in part.dataset.records]
        if all(isinstance(number, int) for number in old) and len(set(old)) == len(old):
            ids = old
        folder = out / "annotations" / f"panoptic_{part.name}"
        folder.mkdir(parents=True)
        stuff = _stuff(part)
        things = _category_ids(part, stuff)
        entries, listed = [], []
        for place, (image_id, record) in enumerate(zip(ids, part.dataset.records)):
            name = images.place(record, part.name, named=True)
            png = f"{images.free(folder.name, record.path.stem)}.png"
            listed.append({"id": image_id, "file_name": name, "height": record.height, "width": record.width})
            segments = _write_segments(part, place, things, stuff, folder / png, losses)
            entries.append({"image_id": image_id, "file_name": png, "segments_info": segments})
        categories = [{"id": number, "name": name, "isthing": 1} for name, number in zip(part.dataset.classes, things)]
        categories += [{"id": number, "name": part.semantic.classes[k], "isthing": 0} for k, number in stuff.items()]
        content = {"images": listed, "annotations": entries, "categories": categories}
        (folder.parent / f"{folder.name}.json").write_bytes(msgspec.json.encode(content))
        written.append(sum(segment["category_id"] in things for entry in entries for segment in entry["segments_info"]))
    items = [item for part in parts for _, item in part.objects()]
    losses.lose("{} objects without a mask left out", sum(not item.segmentation for item in items))
    losses.lose("further keys (licence, attributes ...) of {} entries left out", entries_with_more(parts))
    losses.lose("keypoints of {} objects left out", sum(bool(item.keypoints) for item in items))
    return written


def _category_ids(part: Part, stuff: dict[int, int]) -> tuple[int, ...]:
    ids = part.dataset.category_ids
    return tuple(range(1, len(ids) + 1)) if min(ids, default=1) < 1 else ids


def _stuff(part: Part) -> dict[int, int]:
    """Ids of the classes of the label maps that are stuff, by their label."""
    if part.semantic is None:
        return {}
    names = part.semantic.classes
    things = {*part.dataset.classes, BACKGROUND, THINGS}
    own = dict(zip(part.dataset.semantic_classes, part.dataset.semantic_ids))
    first = max(max(_category_ids(part, {}), default=0), max(own.values(), default=0)) + 1
    labels = [k for k, name in enumerate(names) if name not in things]
    return {k: own.get(names[k], first + i) for i, k in enumerate(labels)}


def _write_segments(part: Part, place: int, things: Sequence[int], stuff: dict[int, int], png: Path,
                    losses: Losses) -> list[dict[str, Any]]:
    """The PNG of an image, and its segments_info."""
    record = part.dataset.records[place]
    segments = paint(record, record.annotations, losses)
    rows = [(i + 1, things[item.label], item.crowd) for i, item in enumerate(record.annotations)]
    if part.semantic:
        other = part.semantic.records[place]
        labels = other.label_map.read(other)
        for number, (k, category) in enumerate(stuff.items(), len(rows) + 1):
            segments[(segments == 0) & (labels == k)] = number
            rows.append((number, category, False))
    found = [(row, area, box) for row in rows if (area := int(np.count_nonzero(inside := segments == row[0])))
             and (box := cv2.boundingRect(inside.view(np.uint8)))]
    codes = _colours(np.arange(len(rows) + 1))
    cv2.imwrite(str(png), np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).astype(np.uint8)[segments])  # BGR
    return [{"id": int(codes[number]), "category_id": category, "iscrowd": int(crowd), "area": area, "bbox": list(box)}
            for (number, category, crowd), area, box in found]


def _colours(numbers: np.ndarray) -> np.ndarray:
    """Ids that are colours far apart, R + 256 G + 65536 B; 0 stays 0. Multiplying by an odd number loses none."""
    return numbers * 0x9E3779 & 0xFFFFFF
