"""labelme: a JSON file for each image, with shapes in pixels.

Polygons, rectangles, circles and masks are objects; points and lines are passed over. Shapes of one label and
`group_id` are parts of one object.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detres.data.dataset import Dataset
from detres.data.loose import Builder, ImageFinder, Item, common_folder, select
from detres.data.masks import run_code
from detres.data.problems import OnInvalid

log = logging.getLogger("detres")

CORNERS_OF_CIRCLE = 64


def find(folder: Path) -> list[Path]:
    """The files, in the folder and those below, if the first is of labelme."""
    if not folder.is_dir() or not (first := next(folder.rglob("*.json"), None)):
        return []
    return sorted(folder.rglob("*.json")) if is_labelme(first) else []


def is_labelme(file: Path) -> bool:
    with open(file, encoding="utf-8", errors="replace") as stream:
        return bool(re.search(r'"imagePath"\s*:|"shapes"\s*:\s*\[', stream.read(4096)))


def read_labelme(files: Sequence[Path], role: str, split: str | None = None, images: str | None = None,
                 on_invalid: OnInvalid = "error") -> Dataset:
    """Classes are the labels in all files, sorted. Images are beside the files, or in `images`. Raises as
    `load_dataset`."""
    root = common_folder(files)
    contents = {file: _parse(file) for file in files}
    classes = sorted({str(shape["label"]) for content in contents.values() if isinstance(content, dict)
                      for shape in content["shapes"] if shape.get("label")})
    builder = Builder(root.name, "labelme", ImageFinder(Path(images).expanduser() if images else root))
    passed = 0
    for file in select(files, root, role, split):
        content = contents[file]
        if isinstance(content, str):
            builder.problems.add(file, None, None, "file", content, "must be a JSON file of labelme (correct it)",
                                 "unreadable")
        elif (row := builder.image(file, str(content.get("imagePath") or ""), _size(content))) is not None:
            items = list(_items(row, file, content["shapes"], builder))
            builder.items += items
            passed += sum(shape.get("shape_type") in ("point", "line", "linestrip", "points") for shape in
                          content["shapes"])
    if passed:
        log.info("%s: passed over %d points and lines", builder.problems.name, passed)
    return builder.dataset(classes, on_invalid)


def _parse(file: Path) -> dict[str, Any] | str:
    """The content, or what is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return str(error)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    return content if isinstance(shapes, list) and all(isinstance(shape, dict) for shape in shapes) else "no shapes"


def _size(content: dict[str, Any]) -> tuple[int, int] | None:
    size = content.get("imageHeight"), content.get("imageWidth")
    return size if all(type(side) is int and side > 0 for side in size) else None


def _items(row: int, file: Path, shapes: list[dict[str, Any]], builder: Builder) -> Iterator[Item]:
    groups: dict[Any, Item] = {}
    record = builder.records[row]
    for number, shape in enumerate(shapes, 1):
        kind, name = shape.get("shape_type", "polygon"), str(shape.get("label") or "")
        group = shape.get("group_id")
        try:
            box, segmentation = _KINDS[kind](shape, record.height, record.width) if kind in _KINDS else (None, None)
        except (ValueError, TypeError, KeyError, OSError):
            builder.problems.add(file, record.id, number, "points", shape.get("points"),
                                 f"must be those of a {kind} (redraw it, or delete it)", "bad_box")
            continue
        if group is not None and kind == "polygon" and (name, group) in groups:
            groups[name, group].segmentation.extend(segmentation)
        elif box or segmentation:
            item = Item(row, file, number, name, box, segmentation)
            if kind == "polygon":
                groups.setdefault((name, group), item)
            yield item


def _polygon(shape: dict[str, Any], height: int, width: int) -> tuple[None, list[array]]:
    return None, [array("d", (value for x, y in shape["points"] for value in (x, y)))]


def _rectangle(shape: dict[str, Any], height: int, width: int) -> tuple[tuple[float, ...], None]:
    (x1, y1), (x2, y2) = shape["points"]
    return (min(x1, x2) * 1.0, min(y1, y2) * 1.0, max(x1, x2) * 1.0, max(y1, y2) * 1.0), None


def _circle(shape: dict[str, Any], height: int, width: int) -> tuple[tuple[float, ...], list[array]]:
    """Its centre and a point on it are given."""
    (x, y), edge = shape["points"]
    radius = math.dist((x, y), edge)
    angles = [2 * math.pi * i / CORNERS_OF_CIRCLE for i in range(CORNERS_OF_CIRCLE)]
    points = array("d", (value for a in angles for value in (x + radius * math.cos(a), y + radius * math.sin(a))))
    return (x - radius, y - radius, x + radius, y + radius), [points]


def _mask(shape: dict[str, Any], height: int, width: int) -> tuple[None, dict[str, Any]]:
    """A PNG of the part of the image between two corners."""
    left, top = (int(value) for value in shape["points"][0])
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
        inside = np.array(image).astype(bool)
    return None, run_code(inside[:height - top, :width - left], top, left, height, width)


_KINDS = {"polygon": _polygon, "rectangle": _rectangle, "circle": _circle, "mask": _mask}
