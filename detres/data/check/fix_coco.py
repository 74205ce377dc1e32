"""Mends COCO JSON, entry by entry."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from detres.data.check.fix import Changes, by_file, link
from detres.data.check.run import SplitSummary
from detres.data.coco import file_names, image_folder, is_id
from detres.data.coco_json import parse, read_json
from detres.data.images import ImageError, read_size
from detres.data.kinds import severity
from detres.data.masks import box_of
from detres.data.problems import Problem, Problems, is_number, numbers, segmentation_problem


def copy(path: Path, splits: Sequence[SplitSummary], images: Path | None, out: Path) -> Path:
    """The files that can be read, and links to their images; returns what stands for `path`."""
    root = path if path.is_dir() else path.parent
    for split in splits:
        if split.format:
            file = Path(os.path.abspath(Path(split.file).expanduser()))  # its folder may be a link
            target = out / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            folder = _folder(file, parse(file)["images"], images)
            if folder is not None:
                link(_place(Path(os.path.abspath(folder)), root, target, out, images is not None), folder)
    return out if path.is_dir() else out / path.name


def _folder(file: Path, entries: Sequence[Any], images: Path | None = None) -> Path | None:
    """Of the images."""
    names = [names for entry in entries if (names := file_names(entry))]
    return image_folder(file, images and str(images), names[:: max(1, len(names) // 2000)], Problems(""))


def _place(folder: Path, root: Path, target: Path, out: Path, given: bool) -> Path:
    """Where the reader finds a folder of images: where it was, unless it had to be `given`, or in images/ beside the
    file."""
    if not given and folder.is_relative_to(root) and not (out / folder.relative_to(root)).is_dir():
        return out / folder.relative_to(root)
    place = target.parent / "images"
    if place.is_symlink() and place.resolve() != folder.resolve():
        place = target.parent / "_".join(part for part in re.split(r"[_.\-]+", target.stem) if part)
    return place


def apply(problems: Sequence[Problem], changes: Changes) -> None:
    """Mends the files in place; adds to `changes` what was done."""
    for file, found in by_file(problems).items():
        if file.is_file() and file.suffix == ".json":
            _Fix(file, *read_json(file), changes).apply(found)


@dataclass
class _Fix:
    file: Path
    content: dict[str, Any]
    encode: Callable[[Any], bytes]
    changes: Changes
    dropped: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in LISTS})

    def apply(self, problems: Sequence[Problem]) -> None:
        self.content.setdefault("annotations", [])  # of image_info files
        made = len(self.changes.made)
        for problem in problems:
            name, place = self._place(problem)
            if problem.kind in WHOLE:
                WHOLE[problem.kind](self, problem)
            elif name and place not in self.dropped[name]:
                mend = MENDS.get(problem.kind)
                if mend is None and severity(problem.kind) == "error":
                    self.drop(problem, name, place)
                elif mend is not None:
                    mend(self, problem, self.content[name][place], name, place)
        if len(self.changes.made) > made:
            for name, places in self.dropped.items():
                self.content[name] = [entry for i, entry in enumerate(self.content[name]) if i not in places]
            self.file.write_bytes(self.encode(self.content))

    def _place(self, problem: Problem) -> tuple[str, int]:
        """List and place of the entry; of problems that know only an image, that one's."""
        if match := re.fullmatch(r"(images|annotations|categories)\[(\d+)\]", problem.place):
            return match[1], int(match[2])
        return ("images", self.image_places[problem.image]) if problem.image in self.image_places else ("", 0)

    @cached_property
    def folder(self) -> Path | None:
        return _folder(self.file, self.content["images"])

    @cached_property
    def image_places(self) -> dict[Any, int]:
        """Of the first image of each id."""
        return _first_places(self.content["images"], "id")

    @cached_property
    def annotation_places(self) -> dict[Any, int]:
        return _first_places(self.content["annotations"], "id")

    @cached_property
    def annotations_of(self) -> dict[Any, list[int]]:
        """Places of the annotations of each image."""
        found: dict[Any, list[int]] = {}
        for place, entry in enumerate(self.content["annotations"]):
            if isinstance(entry, dict) and isinstance(entry.get("image_id"), (int, str)):
                found.setdefault(entry["image_id"], []).append(place)
        return found

    def set(self, problem: Problem, entry: dict[str, Any], key: str, new: Any, **of: Any) -> None:
        """None deletes the key."""
        self.changes.add(problem, key, entry.get(key), new, self.file, **of)
        if new is None:
            entry.pop(key, None)
        else:
            entry[key] = new

    def drop(self, problem: Problem, name: str, place: int) -> None:
        if place in self.dropped[name]:
            return
        self.dropped[name].add(place)
        entry = self.content[name][place]
        self.changes.add(problem, name, entry, None, self.file)
        image_id = entry.get("id") if name == "images" and isinstance(entry, dict) else None
        for i in self.annotations_of.get(image_id, ()) if isinstance(image_id, (int, str)) else ():
            if i not in self.dropped["annotations"]:
                self.dropped["annotations"].add(i)
                own = self.content["annotations"][i]
                self.changes.add(problem, "annotations", own, None, self.file, image=image_id, annotation=own.get("id"))

    @cached_property
    def new_ids(self) -> Iterator[int]:
        ids = (entry.get("id") for entry in self.content["annotations"] if isinstance(entry, dict))
        return itertools.count(max([0, *filter(is_id, ids)]) + 1)


def _first_places(entries: Sequence[Any], key: str) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for place, entry in enumerate(entries):
        if isinstance(entry, dict) and isinstance(entry.get(key), (int, str)):
            found.setdefault(entry[key], place)
    return found


LISTS = ("images", "annotations", "categories")


# What mends an annotation


def _renumber(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    if not isinstance(entry, dict):
        return fix.drop(problem, name, place)
    first = fix.annotation_places.get(problem.annotation_id, place)
    if problem.kind == "duplicate_annotation" and first < place and entry == fix.content[name][first]:
        return fix.drop(problem, name, place)  # a copy
    fix.set(problem, entry, "id", next(fix.new_ids))


def _better(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    fix.set(problem, entry, problem.field, problem.better)


def _box(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """That of the mask, where there are sound polygons; else one of negative sides is turned."""
    polygons, box = entry.get("segmentation"), None
    if isinstance(polygons, list) and polygons and all(map(_is_sound, polygons)):
        x1, y1, x2, y2 = box_of(polygons)
        box = [x1, y1, x2 - x1, y2 - y1]
    elif problem.kind == "box_negative":
        x, y, w, h = entry["bbox"]
        box = [min(x, x + w), min(y, y + h), abs(w), abs(h)]
    if box is None or box == entry.get("bbox") or not (box[2] > 0 and box[3] > 0):
        return fix.drop(problem, name, place)
    fix.set(problem, entry, "bbox", box)


def _clip(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    image = fix.content["images"][fix.image_places[entry["image_id"]]]
    x, y, w, h = entry["bbox"]
    x1, y1 = max(x, 0), max(y, 0)
    x2, y2 = min(x + w, image["width"]), min(y + h, image["height"])
    fix.set(problem, entry, "bbox", [x1, y1, x2 - x1, y2 - y1])


def _delete(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """A key that may be absent."""
    fix.set(problem, entry, problem.field, None)
    if problem.field == "keypoints" and "num_keypoints" in entry:
        fix.set(problem, entry, "num_keypoints", None)


def _crowd(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """As COCO has it: crowds are run lengths, objects polygons."""
    fix.set(problem, entry, "iscrowd", int(isinstance(entry.get("segmentation"), dict)))


def _polygons(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """The sound ones of several polygons; a flat list is taken for one polygon."""
    given = entry.get("segmentation")
    if not isinstance(given, list):
        return fix.drop(problem, name, place)
    given = [given] if all(map(is_number, given)) else given
    sound = [polygon for polygon in given if _is_sound(polygon)]
    if not sound:
        return fix.drop(problem, name, place)
    fix.set(problem, entry, "segmentation", sound)


def _is_sound(polygon: Any) -> bool:
    return (isinstance(polygon, list) and all(map(is_number, polygon))
            and segmentation_problem([array("d", polygon)], None, None) is None)


# Images and categories


def _size(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """That of the file."""
    try:
        height, width = read_size(fix.folder / entry["file_name"])
    except (ImageError, KeyError, TypeError, ValueError, OSError):
        return fix.drop(problem, name, place)
    for key, value in (("height", height), ("width", width)):
        if entry.get(key) != value:
            fix.set(problem, entry, key, value)


def _exchanged(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """Width and height, if the file has them the other way round; of a file of another size, boxes lie elsewhere."""
    try:
        exchanged = read_size(fix.folder / entry["file_name"]) == (entry["width"], entry["height"])
    except (ImageError, KeyError, TypeError):
        exchanged = False
    if exchanged:
        _size(fix, problem, entry, name, place)
    else:
        fix.drop(problem, name, place)


def _same_image(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """Twice the same file is one too many; of two files, it is not known which one the annotations are of."""
    first = fix.image_places[entry["id"]]
    if entry.get("file_name") in (None, fix.content[name][first].get("file_name")):
        fix.dropped[name].add(place)
        fix.changes.add(problem, name, entry, None, fix.file)
    else:
        fix.drop(problem, name, place)
        fix.drop(problem, name, first)


def _name(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    if not isinstance(entry, dict) or not is_id(entry.get("id")):
        return fix.drop(problem, name, place)
    fix.set(problem, entry, "name", f"category_{entry['id']}")


def _merge(fix: _Fix, problem: Problem, entry: Any, name: str, place: int) -> None:
    """Into the category of the same name; the entries of one id are one."""
    fix.drop(problem, name, place)
    first = next((other for i, other in enumerate(fix.content[name]) if i not in fix.dropped[name]
                  and isinstance(other, dict) and other.get("name") == entry["name"] and is_id(other.get("id"))), None)
    ids = [other.get("id") for i, other in enumerate(fix.content[name])
           if i not in fix.dropped[name] and isinstance(other, dict)]
    if first is None or entry["id"] in ids:
        return
    for annotation in fix.content["annotations"]:
        if isinstance(annotation, dict) and annotation.get("category_id") == entry["id"]:
            fix.set(problem, annotation, "category_id", first["id"], image=annotation.get("image_id"),
                    annotation=annotation.get("id"))


MENDS: dict[str, Callable[[_Fix, Problem, Any, str, int], None]] = {
    "bad_annotation": _renumber, "duplicate_annotation": _renumber, "id_zero": _renumber,
    "bad_box": _box, "box_not_finite": _box, "box_empty": _box, "box_negative": _box, "box_outside": _box,
    "box_past_edge": _clip, "box_mask_differs": _better, "area_differs": _better,
    "bad_area": _delete, "bad_keypoints": _delete, "bad_iscrowd": _crowd,
    "bad_segmentation": _polygons, "polygon_odd": _polygons, "polygon_short": _polygons,
    "polygon_not_finite": _polygons, "image_size": _size, "image_differs": _exchanged, "duplicate_image": _same_image,
    "bad_category": _name,
    "duplicate_category": _merge,
}


# What concerns all entries


def _boxes(fix: _Fix) -> list[tuple[dict[str, Any], list[float]]]:
    return [(entry, box) for entry in fix.content["annotations"]
            if isinstance(entry, dict) and (box := numbers(entry.get("bbox"), 4)) and all(map(math.isfinite, box))]


def _from_corners(fix: _Fix, problem: Problem) -> None:
    for entry, (x1, y1, x2, y2) in _boxes(fix):
        fix.set(problem, entry, "bbox", [x1, y1, x2 - x1, y2 - y1], image=entry.get("image_id"),
                annotation=entry.get("id"))


def _from_fractions(fix: _Fix, problem: Problem) -> None:
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in fix.content["images"]
             if isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))
             and type(entry.get("width")) is int and type(entry.get("height")) is int}
    for entry, (x, y, w, h) in _boxes(fix):
        image_id = entry.get("image_id")
        if isinstance(image_id, (int, str)) and image_id in sizes:
            width, height = sizes[image_id]
            fix.set(problem, entry, "bbox", [x * width, y * height, w * width, h * height], image=image_id,
                    annotation=entry.get("id"))
            _scale_mask(fix, problem, entry, (width, height))


def _scale_mask(fix: _Fix, problem: Problem, entry: dict[str, Any], size: tuple[int, int]) -> None:
    """Polygons and area, where these are fractions, too."""
    given, area = entry.get("segmentation"), entry.get("area")
    if isinstance(given, list) and all(isinstance(polygon, list) and all(is_number(value) and 0 <= value <= 1
                                                                         for value in polygon) for polygon in given):
        scaled = [[value * size[i % 2] for i, value in enumerate(polygon)] for polygon in given]
        fix.set(problem, entry, "segmentation", scaled, image=entry.get("image_id"), annotation=entry.get("id"))
    if is_number(area) and area <= 1:
        fix.set(problem, entry, "area", area * size[0] * size[1], image=entry.get("image_id"),
                annotation=entry.get("id"))


def _one_pose(fix: _Fix, problem: Problem) -> None:
    """Keeps the first list of keypoints that is one, and takes others away."""
    def is_names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    entries = [entry for entry in fix.content["categories"] if isinstance(entry, dict) and entry.get("keypoints")]
    kept = next((entry["keypoints"] for entry in entries if is_names(entry["keypoints"])), None)
    for entry in entries:
        if entry["keypoints"] != kept:
            fix.set(problem, entry, "keypoints", None)


WHOLE: dict[str, Callable[[_Fix, Problem], None]] = {
    "boxes_xyxy": _from_corners, "boxes_normalised": _from_fractions, "category_keypoints": _one_pose}
