"""Writes PASCAL VOC: an XML file for each image, image sets, and with masks the PNG files of its segmentation task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from detres.data.convert.lost import Losses
from detres.data.convert.parts import Images, Part, entries_with_more
from detres.data.convert.to_png import semantic_classes, write_list, write_masks
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.voc import VOC_CLASSES


def write_voc(parts: Sequence[Part], out: Path, images: Images, losses: Losses, masks: str) -> list[int]:
    """Boxes are written as the reader undoes it, 1 added to the left and upper edge; whole numbers without a point.
    Returns how many objects each part has there."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (out / folder).mkdir(parents=True)
    png = masks == "png"
    if blank := [name for name in parts[0].dataset.classes if not name.strip()]:
        raise ValueError(f"names of classes must have letters in VOC, got {blank[0]!r}. Give --rename "
                         f"'{blank[0]}=NEW'.")
    for part in parts:
        ids = [_write_image(part, place, out, images, losses, png) for place in range(len(part.dataset.records))]
        for task in ("Main", "Segmentation") if png else ("Main",):
            write_list(out / "ImageSets" / task / f"{part.name}.txt", ids)
    if png:
        write_list(out / "classes.txt", semantic_classes(parts[0]))
    _tell(parts, losses, png)
    return [sum(not _is_click(item) for _, item in part.objects()) for part in parts]


def _tell(parts: Sequence[Part], losses: Losses, png: bool) -> None:
    items = [item for part in parts for _, item in part.objects()]
    dataset = parts[0].dataset
    losses.lose("VOC's XML has no masks: {} left out (--masks png writes them)",
                0 if png else sum(bool(item.segmentation) for item in items))
    losses.lose("VOC has no keypoints: those of {} objects left out", sum(bool(item.keypoints) for item in items))
    losses.lose("VOC has no areas: {} that are not the box's left out",
                sum(abs(item.area - _box_area(item)) > 1e-6 * item.area for item in items))
    losses.change("VOC has no crowds: {} are difficult objects now, which do not train either",
                  sum(item.crowd for item in items))
    losses.lose("VOC has no further keys (licence, supercategory ...): those of {} entries left out",
                entries_with_more(parts, ("pose", "truncated", "occluded")))
    used = {dataset.classes[item.label] for item in items}
    losses.lose("VOC's names have no blanks at their ends: those of {} classes are left out",
                sum(name != name.strip() for name in used))
    losses.lose("VOC names classes by their objects: {} without any left out",
                0 if used <= set(VOC_CLASSES) <= set(dataset.classes) else len(set(dataset.classes) - used))
    order = VOC_CLASSES if used <= set(VOC_CLASSES) else tuple(sorted(used))
    losses.change("VOC has no order and no ids of classes: {} are numbered anew",
                  len(used) if (order, tuple(range(len(order)))) != (dataset.classes, dataset.category_ids) else 0)


def _box_area(item: Annotation) -> float:
    x1, y1, x2, y2 = item.box
    return (x2 - x1) * (y2 - y1)


def _write_image(part: Part, place: int, out: Path, images: Images, losses: Losses, png: bool) -> str:
    """The image, its XML and its PNG files; returns its id."""
    record, dataset = part.dataset.records[place], part.dataset
    stem = re.sub(r"\s", "_", record.path.stem)
    losses.change("VOC's ids have no spaces: those of {} images have _ now", stem != record.path.stem)
    name = images.place(record, "JPEGImages", stem)
    image_id = Path(name).stem
    kept = [item for item in record.annotations if not _is_click(item)]
    losses.lose("in VOC a box of exactly one pixel is taken for a stray click: {} left out",
                len(record.annotations) - len(kept))
    root = _xml(record, dataset, name, kept, png)
    ElementTree.indent(root, "\t")
    text = ElementTree.tostring(root, encoding="unicode")
    (out / "Annotations" / f"{image_id}.xml").write_text(text + "\n", encoding="utf-8")
    if png:
        write_masks(part, place, kept, out, image_id, losses)
    return image_id


def _is_click(item: Annotation) -> bool:
    x1, y1, x2, y2 = item.box
    return x1 + 1 == x2 or y1 + 1 == y2


def _xml(record: ImageRecord, dataset: Dataset, name: str, items: Sequence[Annotation],
         png: bool) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", name)
    size = _add(root, "size")
    for key, value in (("width", record.width), ("height", record.height), ("depth", 3)):
        _add(size, key, value)
    _add(root, "segmented", int(png))
    for item in items:
        _add_object(root, item, dataset.classes[item.label])
    return root


def _add_object(root: ElementTree.Element, item: Annotation, name: str) -> None:
    node, extra = _add(root, "object"), item.extra or {}
    _add(node, "name", name)
    for key, default in (("pose", "Unspecified"), ("truncated", 0)):
        _add(node, key, extra.get(key, default))
    _add(node, "difficult", int(item.difficult or item.crowd))
    if "occluded" in extra:
        _add(node, "occluded", extra["occluded"])
    box, (x1, y1, x2, y2) = _add(node, "bndbox"), item.box
    for key, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
        _add(box, key, int(value) if float(value).is_integer() else repr(float(value)))


def _add(parent: ElementTree.Element, tag: str, value: object = None) -> ElementTree.Element:
    node = ElementTree.SubElement(parent, tag)
    node.text = None if value is None else str(value)
    return node
