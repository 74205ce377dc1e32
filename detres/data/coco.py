"""COCO JSON: instances with boxes, polygons or RLE, crowds, keypoints; category ids with gaps.

Sized for train2017 (860,001 annotations): one pass over plain dicts, checks of boxes by numpy.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detres.data.dataset import SPLITS, Annotation, Dataset, ImageRecord
from detres.data.masks import mask_area
from detres.data.problems import OnInvalid, Problems, numbers, segmentation_problem

# Files beside the instances in COCO's annotation folder; `detres data shapes` adds shapes.json.
_OTHER_TASKS = ("captions", "person_keypoints", "panoptic", "stuff", "semantic", "image_info", "image_sources",
                "shapes")


def read_coco(file: Path, images: str | None = None, *, on_invalid: OnInvalid = "error") -> Dataset:
    """The data set of a COCO annotation file. `images` is its folder of images; None: found beside the file.

    Labels 0..K-1 are in the order of the category ids. Raises as `load_dataset`.
    """
    with no_garbage_collection():
        return _read(file, images, on_invalid)


def read_folder(folder: Path, role: str, split: str | None = None, images: str | None = None, *,
                on_invalid: OnInvalid = "error") -> Dataset:
    """The data set of a split in a folder, or the union of several: 'train2014+valminusminival2014'.

    Raises as `load_dataset`, and ValueError for files that cannot be joined: other categories, or images in common.
    """
    parts = [read_coco(find_annotations(folder, role, name), images, on_invalid=on_invalid)
             for name in (split.split("+") if split else [None])]
    return _union(parts) if len(parts) > 1 else parts[0]


def _union(parts: Sequence[Dataset]) -> Dataset:
    name, first = "+".join(part.name for part in parts), parts[0]
    for part in parts:
        if (part.classes, part.category_ids, part.keypoint_names) != (
                first.classes, first.category_ids, first.keypoint_names):
            raise ValueError(f"joined splits must have the same categories and keypoints, got others in {part.name} "
                             f"than in {first.name}. Give both files the same list of categories.")
    records = tuple(record for part in parts for record in part.records)
    if twice := [image for image, count in Counter(record.id for record in records).items() if count > 1]:
        raise ValueError(f"joined splits must have no image in common, got {len(twice)}, such as id {twice[0]!r} "
                         f"({name}). Join splits that do not overlap.")
    return replace(first, name=name, records=records)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Millions of new objects, none of them garbage: searching them again and again would double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(file: Path, images: str | None, on_invalid: OnInvalid) -> Dataset:
    content = parse(file)
    problems = Problems(file.stem)
    categories = parse_categories(content["categories"], file)
    images_by_id = parse_images(content["images"], file, images, problems)
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    names, pairs, skeleton = _keypoints(categories, file.stem, problems)
    annotations = _Reader(file, problems, images_by_id, label_of, len(names)).read(content.get("annotations", []))
    problems.close(on_invalid)
    records = tuple(ImageRecord(image.id, image.path, image.height, image.width, tuple(annotations.get(image.id, ())))
                    for image in images_by_id.values() if image is not None)
    return Dataset(file.stem, "coco", tuple(category["name"] for category in categories),
                   tuple(category["id"] for category in categories), records, names, pairs, skeleton=skeleton,
                   keypoint_classes=tuple(category["name"] for category in categories if category.get("keypoints")))


# Finding the files


def json_files(folder: Path) -> list[Path]:
    """Files that may be COCO annotations: in annotations/, else in the folder, else Roboflow's, one in each split."""
    for pattern in ("annotations/*.json", "*.json", "*/_annotations.coco.json"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def instance_files(folder: Path) -> list[Path]:
    """Those of `json_files` that are not of other tasks."""
    files = [file for file in json_files(folder) if not file.stem.startswith(_OTHER_TASKS)]
    return [file for file in files if file.stem.startswith("instances")] or files


def find_annotations(folder: Path, role: str, split: str | None) -> Path:
    """The instances file of a split, or of a role, in a folder. Raises FileNotFoundError if it is not clear which."""
    files = json_files(folder)
    matches = [file for file in files if names_split(file, role, split)]
    if not matches and split is None and len(files) == 1 and not any(names_split(files[0], r, None) for r in SPLITS):
        matches = files  # one file for everything
    instances = [file for file in matches if not file.stem.startswith(_OTHER_TASKS)] or matches
    instances = [file for file in instances if file.stem.startswith("instances")] or instances
    if len(instances) != 1:
        wanted = f"split '{split}'" if split else f"role '{role}' ({', '.join(SPLITS[role])})"
        raise FileNotFoundError(
            f"COCO folder must have one annotation file for {wanted}, such as annotations/"
            f"instances_{split or role}.json, got {[str(file.relative_to(folder)) for file in instances or files]} "
            f"({folder}). Give the file itself as path.")
    return instances[0]


def names_split(file: Path, role: str, split: str | None) -> bool:
    words = file.parent.name if file.stem.startswith("_annotations") else file.stem
    if split is not None:
        return words == split or words.endswith(f"_{split}") or words.startswith(f"{split}_")
    tokens = re.split(r"[^a-z0-9]+", words.lower())
    return any(re.fullmatch(rf"{name}\d*", token) for token in tokens for name in SPLITS[role])


def _image_folder(file: Path, images: str | None, names: Sequence[str]) -> Path:
    """The folder that has the most of a sample of the images; the nearest such."""
    if images is not None:
        if not Path(images).expanduser().is_dir():
            raise FileNotFoundError(f"image folder must exist, got {images} (for {file}). Check data.*.images.")
        return Path(images).expanduser()
    parts = [part for part in re.split(r"[_.\-]+", file.stem) if part]
    subfolders = ["_".join(parts[start:]) for start in range(len(parts))] + parts
    subfolders += [part for name in names[:1] for part in name.split("_")[:-1]]  # COCO_val2014_000000000042.jpg
    subfolders = [f"{above}{sub}" for sub in [*subfolders, ""] for above in ("", "images/")]
    folders = [root / sub for root in (file.parent, file.parent.parent) for sub in subfolders]
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    sample = names[:: max(1, len(names) // 20)]
    count = {folder: sum((folder / name).is_file() for name in sample) for folder in folders}
    best = max(folders, key=lambda folder: count[folder])  # the first of equals
    if sample and not count[best]:
        raise FileNotFoundError(f"images of {file} must be in a folder beside it, got none, such as {sample[0]}, in "
                                f"{', '.join(map(str, folders))}. Give the folder as data.*.images.")
    return best


# Reading


def parse(file: Path) -> dict[str, Any]:
    """The JSON, with polygons packed as they come by."""
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream, object_hook=_pack)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"annotation file must be JSON, got {error} ({file}). Is it complete?") from None
    required = ["images", "categories"] + ["annotations"] * (not file.stem.startswith("image_info"))
    missing = [key for key in required if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        found = sorted(content)[:10] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"COCO annotation file must have lists of images, annotations and categories, got no "
                         f"{', '.join(missing)} but {found} ({file}). Is it a file of instances?")
    return content


def _pack(entry: dict[str, Any]) -> dict[str, Any]:
    polygons = entry.get("segmentation")
    if type(polygons) is list:
        try:
            entry["segmentation"] = [array("d", polygon) for polygon in polygons]
        except (TypeError, OverflowError):  # not numbers: kept as it is for the message
            pass
    return entry


def parse_categories(entries: list[Any], file: Path) -> list[dict[str, Any]]:
    """In the order of their ids. What is wrong here leaves nothing to drop, so it stops at once."""
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise ValueError(f"category must have a whole number as id and a name, got {entry!r} ({file}). Correct it.")
    for key in ("id", "name"):
        values = [entry[key] for entry in entries]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"categories must differ in {key}, got {sorted(twice)} more than once ({file}). "
                             "Correct them.")
    if not entries:
        raise ValueError(f"categories must be one or more, got none ({file}). Add them to the file.")
    return sorted(entries, key=lambda entry: entry["id"])


def _keypoints(categories: list[dict[str, Any]], name: str, problems: Problems
               ) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Names of the keypoints, pairs that a mirror swaps, and pairs that the skeleton joins (which the file counts from
    1)."""
    layouts = {tuple(category["keypoints"]) for category in categories if category.get("keypoints")}
    if len(layouts) > 1:
        problems.add(name, None, None, "categories[].keypoints", sorted(layouts),
                     "must be the same for all categories that have some (use a file for each)")
    names = layouts.pop() if len(layouts) == 1 else ()
    swapped = ((name, name.replace("left", "right")) for name in names if "left" in name)
    pairs = tuple((names.index(left), names.index(right)) for left, right in swapped if right in names)
    bones = next((category["skeleton"] for category in categories if names and category.get("skeleton")), ())
    places = range(1, len(names) + 1)
    return names, pairs, tuple((a - 1, b - 1) for a, b in bones if a in places and b in places)


def parse_images(entries: list[Any], file: Path, images: str | None,
                 problems: Problems) -> dict[Any, ImageRecord | None]:
    """Images by id, without annotations; None for an image that cannot be used."""
    found: dict[Any, ImageRecord | None] = {}
    usable = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)]
    folder = _image_folder(file, images, [entry["file_name"] for entry in usable])
    exists = existence()
    for number, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        image_id, name = entry.get("id"), entry.get("file_name")
        if type(image_id) not in (int, str):
            problems.add(file, name, None, f"images[{number}].id", image_id,
                         "must be a whole number or a string (add it)")
            continue
        if image_id in found:
            problems.add(file, image_id, None, "id", image_id,
                         "must differ from other images' (give it another, or delete it)")
            continue
        found[image_id] = None
        side = {key: entry.get(key) for key in ("height", "width")}
        if bad := [key for key, value in side.items() if type(value) is not int or value < 1]:
            problems.add(file, image_id, None, bad[0], side[bad[0]],
                         "must be a whole number above zero (state the file's size)")
        elif not isinstance(name, str) or not exists(folder / name):
            problems.add(file, image_id, None, "file_name", name,
                         f"must be an image file (in {folder}: add it, or delete the entry)")
        else:
            found[image_id] = ImageRecord(image_id, folder / name, side["height"], side["width"])
    return found


def existence() -> Callable[[Path], bool]:
    """Whether a file exists, by listing each folder once: quick for many files on slow disks."""
    listed: dict[Path, set[str]] = {}

    def exists(path: Path) -> bool:
        if path.parent not in listed:
            listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        return path.name in listed[path.parent]

    return exists


@dataclass
class _Reader:
    """Checks annotations and makes them into records."""

    file: Path
    problems: Problems
    images: dict[Any, ImageRecord | None]
    label_of: dict[int, int]
    keypoints: int

    def read(self, entries: list[Any]) -> dict[Any, list[Annotation]]:
        """By image id."""
        entries, boxes = self._linked(entries)
        kept = self.problems.check_boxes(boxes, [self._size(entry) for entry in entries],
                                         lambda i, reason: self._add(entries[i], "bbox", entries[i]["bbox"], reason))
        found: dict[Any, list[Annotation]] = {}
        for entry, box, keep in zip(entries, boxes, kept.tolist()):
            if keep and (annotation := self._annotation(entry, box)) is not None:
                found.setdefault(entry["image_id"], []).append(annotation)
        return found

    def _linked(self, entries: list[Any]) -> tuple[list[dict[str, Any]], list[tuple[float, ...]]]:
        """The entries whose ids and boxes can be read, on images that can be used; and their boxes xyxy."""
        seen: set[int] = set()
        kept, boxes = [], []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or type(entry.get("id")) is not int:
                self.problems.add(self.file, None, None, f"annotations[{number}]", entry,
                                  "must be an object with a whole number as id (add it)")
                continue
            if problem := self._link_problem(entry, seen):
                self._add(entry, *problem)
            elif self.images[entry["image_id"]] is not None:  # else reported with the image
                box = numbers(entry.get("bbox"), 4)
                if box is None:
                    self._add(entry, "bbox", entry.get("bbox"), "must be four numbers (x, y, width, height)")
                else:
                    x, y, w, h = box
                    kept.append(entry)
                    boxes.append((x, y, x + w, y + h))
            seen.add(entry["id"])
        return kept, boxes

    def _link_problem(self, entry: dict[str, Any], seen: set[int]) -> tuple[str, Any, str] | None:
        image_id, category_id = entry.get("image_id"), entry.get("category_id")
        if entry["id"] in seen:
            return "id", entry["id"], "must differ from other annotations' (give it another, or delete it)"
        if type(image_id) not in (int, str) or image_id not in self.images:
            return "image_id", image_id, "must be the id of an image (in this file: add it, or delete the annotation)"
        if type(category_id) is not int or category_id not in self.label_of:
            return "category_id", category_id, "must be the id of a category (in this file: add it, or correct this)"
        return None

    def _annotation(self, entry: dict[str, Any], box: tuple[float, ...]) -> Annotation | None:
        height, width = self._size(entry)
        segmentation = entry.get("segmentation") or None
        problem = segmentation and segmentation_problem(segmentation, height, width)
        if problem:
            return self._add(entry, "segmentation", *problem)
        crowd, area, keypoints = entry.get("iscrowd", 0), entry.get("area"), None
        if crowd not in (0, 1):
            return self._add(entry, "iscrowd", crowd, "must be 0 or 1 (correct it)")
        if area is None:
            area = mask_area(segmentation, height, width) if segmentation else (box[2] - box[0]) * (box[3] - box[1])
        if type(area) not in (int, float) or not math.isfinite(area) or area < 0:
            return self._add(entry, "area", area, "must be a number of pixels (delete it: it is then computed)")
        if self.keypoints and entry.get("keypoints"):
            keypoints = numbers(entry["keypoints"], 3 * self.keypoints)
            if keypoints is None or not all(map(math.isfinite, keypoints)):
                return self._add(entry, "keypoints", entry["keypoints"],
                                 f"must be finite: x, y and visibility for each name ({3 * self.keypoints} numbers)")
        return Annotation(entry["id"], self.label_of[entry["category_id"]], box, segmentation,
                          keypoints and tuple(keypoints), area, bool(crowd), size=tuple(entry["bbox"][2:]))

    def _size(self, entry: dict[str, Any]) -> tuple[int, int]:
        image = self.images[entry["image_id"]]
        return image.height, image.width

    def _add(self, entry: dict[str, Any], field: str, value: Any, reason: str) -> None:
        self.problems.add(self.file, entry.get("image_id"), entry["id"], field, value, reason)
