"""Annotations in PASCAL VOC's XML, which ILSVRC writes too: what a file says, checked and made into records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from detres.data.dataset import Annotation, ImageRecord
from detres.data.images import ImageError, read_size
from detres.data.problems import EMPTY, Locate, Problems

Box = list[float]  # xyxy
_REST = ("pose", "truncated", "occluded")


@dataclass(frozen=True)
class Thing:
    name: str
    difficult: bool
    corners: tuple[str, ...]  # as written: xmin, ymin, xmax, ymax
    rest: tuple[tuple[str, str], ...] = ()  # pose, truncated, occluded, where they are stated


@dataclass(frozen=True)
class Tree:
    """What is used of an XML file."""

    file: Path
    filename: str = ""
    size: tuple[str, str] = ("", "")  # height and width, as written
    things: tuple[Thing, ...] = ()


def parse(file: Path) -> Tree | str:
    """The content, or what is wrong with the file."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        return str(error)
    things = []
    for node in root.iterfind("object"):
        corners = tuple(node.findtext(f"bndbox/{corner}", "").strip() for corner in ("xmin", "ymin", "xmax", "ymax"))
        rest = tuple((child.tag, child.text.strip()) for child in node if child.tag in _REST and child.text)
        things.append(Thing(node.findtext("name", "").strip(), node.findtext("difficult", "").strip() == "1", corners,
                            rest))
    size = root.findtext("size/height", "").strip(), root.findtext("size/width", "").strip()
    return Tree(file, root.findtext("filename", "").strip(), size, tuple(things))


def size_of(tree: Tree, path: Path | None, image_id: str, problems: Problems) -> tuple[int, int] | None:
    """Height and width: as stated, or of the image file where that is absent."""
    height, width = (int(side) if side.isdecimal() and len(side) < 7 else 0 for side in tree.size)
    if height and width:
        return height, width
    why = "it is not there"
    if path is not None:
        try:
            return read_size(path)
        except ImageError as error:
            why = str(error)
    problems.add(tree.file, image_id, None, "size", tree.size, f"must be stated, or the image be readable ({why})",
                 "image_size")
    return None


@dataclass(frozen=True)
class _Row:
    image: int
    tree: Tree
    number: int  # of the object in the file
    thing: Thing
    box: Box


def records(readable: Sequence[tuple[ImageRecord, Tree]], label_of: Mapping[str, int],
            box_of: Callable[[Box], Box | None], problems: Problems,
            keep_extra: bool = False) -> tuple[tuple[ImageRecord, ...], Locate]:
    """The images with their annotations, and what says where these are in the files. `box_of` gives the continuous box
    of the corners in a file; None: empty."""
    rows = [row for i, (record, tree) in enumerate(readable) for row in _rows(i, record, tree, box_of, problems)]

    def locate(item: Annotation) -> tuple[str, int, str]:
        row = rows[item.id - 1]
        return str(row.tree.file), row.number, f"object {row.number}"

    def report(i: int, reason: str, kind: str) -> None:
        row = rows[i]
        problems.add(row.tree.file, readable[row.image][0].id, row.number, "bndbox", row.thing.corners, reason, kind)

    sizes = [(readable[row.image][0].height, readable[row.image][0].width) for row in rows]
    if rows and problems.check_layout(rows[0].tree.file.parent, "bndbox", [_numbers(row.thing.corners) for row in rows],
                                      sizes, "xyxy"):
        return tuple(record for record, _ in readable), locate  # each box would be a problem of its own
    kept = problems.check_boxes([row.box for row in rows], sizes, report)
    found: list[list[Annotation]] = [[] for _ in readable]
    for number, (row, keep) in enumerate(zip(rows, kept), 1):
        if keep:
            x1, y1, x2, y2 = row.box
            found[row.image].append(Annotation(number, label_of[row.thing.name], (x1, y1, x2, y2),
                                               area=(x2 - x1) * (y2 - y1), difficult=row.thing.difficult,
                                               extra=_extra(row.thing) if keep_extra else None))
    return tuple(replace(record, annotations=tuple(annotations))
                 for (record, _), annotations in zip(readable, found)), locate


def _extra(thing: Thing) -> dict[str, str | int] | None:
    return {tag: int(text) if text.isdecimal() else text for tag, text in thing.rest} or None


def _rows(image: int, record: ImageRecord, tree: Tree, box_of: Callable[[Box], Box | None],
          problems: Problems) -> Iterator[_Row]:
    """The objects of a file whose name and numbers can be read."""
    for number, thing in enumerate(tree.things, 1):
        corners = _numbers(thing.corners)
        if not thing.name:
            problems.add(tree.file, record.id, number, "name", thing.name, "must be the name of a class (add it)",
                         "unknown_category")
        elif corners is None:
            problems.add(tree.file, record.id, number, "bndbox", thing.corners,
                         "must be four numbers (xmin, ymin, xmax, ymax)", "bad_box")
        elif (box := box_of(corners)) is None:
            problems.add(tree.file, record.id, number, "bndbox", thing.corners, EMPTY, "box_empty")
        else:
            yield _Row(image, tree, number, thing, box)


def _numbers(texts: Sequence[str]) -> Box | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None
