"""Mends VOC's XML files and image sets."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from detres.data import voc
from detres.data.check.fix import Changes, by_file, delete_lines, link
from detres.data.check.run import SplitSummary
from detres.data.images import read_size
from detres.data.kinds import severity
from detres.data.problems import Problem

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def copy(path: Path, splits: Sequence[SplitSummary], images: Path | None, out: Path) -> Path:
    """Each root with its XML files, image sets and what lies beside them, and links to all other folders; returns what
    stands for `path`."""
    for root in [path] if voc.is_root(path) else voc.find_roots(path):
        target = out / root.relative_to(path)
        shutil.copytree(root / "Annotations", target / "Annotations", copy_function=shutil.copyfile)
        shutil.copytree(root / "ImageSets", target / "ImageSets", copy_function=shutil.copyfile)
        if images is not None:
            link(target / "JPEGImages", images)
        for other in sorted(root.iterdir()):
            if other.is_file():  # copied: what is written beside it must not end up in the original
                shutil.copyfile(other, target / other.name)
            elif other.name not in ("Annotations", "ImageSets"):
                link(target / other.name, other)
    return out


def apply(problems: Sequence[Problem], changes: Changes) -> None:
    """Mends the files in place; adds to `changes` what was done."""
    for file, found in by_file(problems).items():
        objects = [problem for problem in found if problem.annotation_id is not None]
        if objects and file.suffix == ".xml" and file.is_file():
            _mend_objects(file, objects, changes)
        for problem in found:
            if problem.kind in LAYOUTS:
                _convert(problem, changes)
            elif (problem.annotation_id is None and problem.image is not None and severity(problem.kind) == "error"
                  and not (problem.kind == "image_differs" and _exchange_sides(problem, changes))):
                _take_out(problem, changes)


def _root(problem: Problem) -> Path | None:
    file = Path(problem.file)
    return next((folder for folder in (file, *file.parents) if voc.is_root(folder)), None)


def _exchange_sides(problem: Problem, changes: Changes) -> bool:
    """Of an image whose file has width and height the other way round; whether it has."""
    file = _root(problem) / "Annotations" / f"{problem.image}.xml"
    tree = _parse(file)
    image = _root(problem) / "JPEGImages" / tree.getroot().findtext("filename", "").strip()
    height, width = _size(tree.getroot())
    if not image.is_file() or read_size(image) != (width, height):
        return False
    for side, old, new in (("width", width, height), ("height", height, width)):
        tree.getroot().find(f"size/{side}").text = str(new)
        changes.add(problem, side, old, new, file)
    tree.write(file, encoding="utf-8")
    return True


def _take_out(problem: Problem, changes: Changes) -> None:
    """The image, of all image sets of its root; of one in which it is twice, but for the first line."""
    file, root = Path(problem.file), _root(problem)
    twice = problem.kind == "duplicate_image" and file.suffix == ".txt"
    for image_set in [file] if twice else sorted((root / "ImageSets/Main").glob("*.txt")) if root else []:
        delete_lines(problem, image_set, lambda line: line.split()[:1] == [problem.image], changes, keep=int(twice))


def _parse(file: Path) -> ElementTree.ElementTree:
    return ElementTree.parse(file, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True)))


def _mend_objects(file: Path, problems: Sequence[Problem], changes: Changes) -> None:
    tree = _parse(file)
    objects = tree.getroot().findall("object")
    made, dropped = len(changes.made), set()
    for problem in problems:
        node = objects[problem.annotation_id - 1]
        mend = MENDS.get(problem.kind, _drop if severity(problem.kind) == "error" else None)
        if mend is not None and node not in dropped and not mend(node, problem, tree.getroot(), changes):
            dropped.add(node)
            tree.getroot().remove(node)
            changes.add(problem, "object", ElementTree.tostring(node, "unicode").strip(), None)
    if len(changes.made) > made:
        tree.write(file, encoding="utf-8")


# Each says whether the object is kept


def _drop(node: ElementTree.Element, problem: Problem, root: ElementTree.Element, changes: Changes) -> bool:
    return False


def _swap(node: ElementTree.Element, problem: Problem, root: ElementTree.Element, changes: Changes) -> bool:
    x1, y1, x2, y2 = _corners(node)
    if x1 == x2 or y1 == y2:
        return False
    _set(node, [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)], problem, changes)
    return True


def _clip(node: ElementTree.Element, problem: Problem, root: ElementTree.Element, changes: Changes) -> bool:
    height, width = _size(root)
    if not height or not width:
        return True
    x1, y1, x2, y2 = _corners(node)
    _set(node, [max(x1, 1), max(y1, 1), min(x2, width), min(y2, height)], problem, changes)
    return True


MENDS: dict[str, Callable[..., bool]] = {"box_negative": _swap, "box_past_edge": _clip}


def _corners(node: ElementTree.Element) -> list[float]:
    return [float(node.findtext(f"bndbox/{corner}", "").strip()) for corner in CORNERS]


def _size(root: ElementTree.Element) -> tuple[int, int]:
    height, width = (root.findtext(f"size/{side}", "").strip() for side in ("height", "width"))
    return (int(height), int(width)) if height.isdecimal() and width.isdecimal() else (0, 0)


def _set(node: ElementTree.Element, corners: Sequence[float], problem: Problem, changes: Changes,
         file: Path | None = None, **of: object) -> None:
    for name, value in zip(CORNERS, corners):
        child = node.find(f"bndbox/{name}")
        text = f"{value:.10g}"
        if child.text.strip() != text:
            changes.add(problem, name, child.text.strip(), text, file, **of)
            child.text = text


# What concerns all objects


def _convert(problem: Problem, changes: Changes) -> None:
    for file in sorted(Path(problem.file).glob("*.xml")):
        try:
            tree = _parse(file)
        except ElementTree.ParseError:
            continue
        made, size = len(changes.made), _size(tree.getroot())
        for number, node in enumerate(tree.getroot().findall("object"), 1):
            try:
                corners = LAYOUTS[problem.kind](*_corners(node), *size)
            except ValueError:
                continue
            _set(node, corners, problem, changes, file, image=file.stem, annotation=number)
        if len(changes.made) > made:
            tree.write(file, encoding="utf-8")


def _from_sides(x: float, y: float, w: float, h: float, height: int, width: int) -> list[float]:
    return [x, y, x + w, y + h]


def _from_fractions(x1: float, y1: float, x2: float, y2: float, height: int, width: int) -> list[float]:
    """To pixels, which VOC counts from 1 and of which the last is inside. Without a size: ValueError."""
    if not height or not width:
        raise ValueError
    return [x1 * width + 1, y1 * height + 1, x2 * width, y2 * height]


LAYOUTS = {"boxes_xywh": _from_sides, "boxes_normalised": _from_fractions}
