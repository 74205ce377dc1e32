"""CVAT's own XML ("CVAT for images 1.1"): boxes, polygons and masks in pixels; points, lines, tags are passed over."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from detres.data.dataset import Dataset
from detres.data.loose import Builder, ImageFinder, Item
from detres.data.masks import run_code
from detres.data.problems import OnInvalid


def find(path: Path) -> Path | None:
    """The file: the one given, or annotations.xml in a folder."""
    file = path / "annotations.xml" if path.is_dir() else path
    if file.suffix != ".xml" or not file.is_file():
        return None
    with open(file, encoding="utf-8", errors="replace") as stream:
        return file if "<annotations>" in stream.read(1024) else None


def read_cvat(file: Path, role: str, split: str | None = None, images: str | None = None,
              on_invalid: OnInvalid = "error") -> Dataset:
    """Classes are the labels that the task lists, in its order; else those of the objects. Images lie beside the file
    or below, or in `images`. `split` is the subset that images are in. Raises as `load_dataset`."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"annotation file must be XML, got {error} ({file}). Is it complete?") from None
    builder = Builder(file.parent.name, "cvat", ImageFinder(Path(images).expanduser() if images else file.parent))
    for node in root.iterfind("image"):
        if split is not None and node.get("subset") != split:
            continue
        size = tuple(int(side) if (side := node.get(key, "")).isdecimal() else 0 for key in ("height", "width"))
        row = builder.image(file, node.get("name", ""), size if all(size) else None)
        if row is not None:
            builder.items += _items(row, file, node, builder)
    listed = [name for label in root.iterfind("meta//labels/label") if (name := label.findtext("name", "").strip())]
    named = {item.name for item in builder.items if item.name}
    classes = listed if named <= set(listed) and listed else sorted(named)
    return builder.dataset(tuple(dict.fromkeys(classes)), on_invalid)


def _items(row: int, file: Path, image: ElementTree.Element, builder: Builder) -> Iterator[Item]:
    record = builder.records[row]
    for number, node in enumerate(image, 1):
        if node.tag in _KINDS:
            try:
                box, segmentation = _KINDS[node.tag](node, record.height, record.width)
            except (KeyError, ValueError):
                builder.problems.add(file, record.id, number, node.tag, dict(node.attrib),
                                     "must have the numbers that CVAT writes (correct it)", "bad_box")
                continue
            yield Item(row, file, number, node.get("label", ""), box, segmentation)


def _box(node: ElementTree.Element, height: int, width: int) -> tuple[list[float], None]:
    return [float(node.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr")], None


def _polygon(node: ElementTree.Element, height: int, width: int) -> tuple[None, list[array]]:
    return None, [array("d", map(float, node.attrib["points"].replace(";", ",").split(",")))]


def _mask(node: ElementTree.Element, height: int, width: int) -> tuple[None, dict[str, Any]]:
    """Runs of a window, row by row, the first outside."""
    left, top, w, h = (int(node.attrib[key]) for key in ("left", "top", "width", "height"))
    runs = [int(run) for run in node.attrib["rle"].split(",")]
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)
    return None, run_code(inside[:height - top, :width - left], top, left, height, width)


_KINDS = {"box": _box, "polygon": _polygon, "mask": _mask}
