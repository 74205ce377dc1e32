"""COCO JSON: instances with boxes, polygons or RLE, crowds, keypoints; category ids with gaps. And LVIS' variant of it.

Sized for train2017 (860,001 annotations): one pass over plain dicts, checks of boxes by numpy.
"""

from __future__ import annotations

import gc
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detres.data.coco_json import file_names, is_lvis, is_panoptic, parse, rest
from detres.data.dataset import SPLITS, Annotation, Dataset, ImageRecord
from detres.data.index import ImageFiles, Places, cached
from detres.data.kinds import severity
from detres.data.masks import mask_area
from detres.data.problems import (FARTHEST, OnInvalid, Problems, is_number, numbers, segmentation_problem,
                                  unsound_polygons)
from detres.data.records import Records

# Files beside the instances in COCO's annotation folder; `detres data shapes` adds shapes.json.
_OTHER_TASKS = ("captions", "person_keypoints", "panoptic", "stuff", "semantic", "image_info", "image_sources",
                "shapes")

_REPORTS = ("changes.json", "conversion.json")
_KNOWN = ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd", "keypoints", "num_keypoints",
          "difficult")  # keys of annotations


def read_coco(file: Path, images: str | None = None, *, on_invalid: OnInvalid = "error",
              keep_extra: bool = False) -> Dataset:
    """The data set of an annotation file of COCO or LVIS. `images` is its folder of images; None: found beside it.

    Labels 0..K-1 are in the order of the category ids. A key `difficult`, which COCO does not have but conversion from
    VOC writes, is read. Raises as `load_dataset`.
    """
    with no_garbage_collection():
        dataset, problems = _read(file, images, ImageFiles(), True) if keep_extra else cached(
            file, (images,), lambda names: image_folder(file, images, names, Problems("")),
            lambda files: _read(file, images, files))
    problems.close(on_invalid)
    return dataset


def read_folder(folder: Path, role: str, split: str | None = None, images: str | None = None, *,
                on_invalid: OnInvalid = "error", keep_extra: bool = False) -> Dataset:
    """The data set of a split in a folder, or the union of several: 'train2014+valminusminival2014'.

    Raises as `load_dataset`, and ValueError for files that cannot be joined: other categories, or images in common.
    """
    parts = [read_coco(find_annotations(folder, role, name), images, on_invalid=on_invalid, keep_extra=keep_extra)
             for name in (split.split("+") if split else [None])]
    return _union(parts) if len(parts) > 1 else parts[0]


def _union(parts: Sequence[Dataset]) -> Dataset:
    name, first = "+".join(part.name for part in parts), parts[0]
    for part in parts:
        if (part.classes, part.category_ids, part.keypoint_names) != (
                first.classes, first.category_ids, first.keypoint_names):
            raise ValueError(f"joined splits must have the same categories and keypoints, got others in {part.name} "
                             f"than in {first.name}. Give both files the same list of categories.")
    records = Records.joined([part.records for part in parts])
    if twice := [image for image, count in Counter(records.ids()).items() if count > 1]:
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


def _read(file: Path, images: str | None, files: ImageFiles, keep_extra: bool = False) -> tuple[Dataset, Problems]:
    content, problems = parse(file), Problems(file.stem)
    if is_panoptic(content):
        raise ValueError(f"COCO annotation file must be of instances, got the panoptic format ({file}). `detres data "
                         "convert` makes instances of it.")
    categories = parse_categories(content["categories"], file, problems)
    images_by_id = parse_images(content["images"], file, images, problems, files, keep_extra)
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    names, pairs, skeleton = _keypoints(categories, file, problems)
    reader = _Reader(file, problems, images_by_id, label_of, _left_out(content["categories"], label_of), len(names),
                     keep_extra)
    annotations = reader.read(content.get("annotations", []))
    records = tuple(replace(image, annotations=tuple(annotations.get(image.id, ())))
                    for image in images_by_id.values() if image is not None)
    extra = {"categories": [rest(category, ("id", "name", "keypoints", "skeleton")) for category in categories],
             **rest(content, ("images", "annotations", "categories"))} if keep_extra else None
    dataset = Dataset(file.stem, "lvis" if is_lvis(content) else "coco",
                      tuple(category["name"] for category in categories),
                      tuple(category["id"] for category in categories), records, names, pairs, skeleton=skeleton,
                      keypoint_classes=tuple(category["name"] for category in categories if category.get("keypoints")),
                      extra=extra)
    problems.located.append((dataset, Places.of(file, reader.seen)))
    return dataset, problems


# Finding the files


def json_files(folder: Path) -> list[Path]:
    """Files that may be COCO annotations: in annotations/, else in the folder, else Roboflow's, one in each split.
    changes.json is what `detres data check --fix` changed, conversion.json what `detres data convert` did."""
    for pattern in ("annotations/*.json", "*.json", "*/_annotations.coco.json"):
        if files := sorted(file for file in folder.glob(pattern) if file.name not in _REPORTS):
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


def role_of(name: str) -> str | None:
    """The first of train, val and test that the name of a split names."""
    return next((role for role in SPLITS if names_split(Path(name), role, None)), None)


def pose_of(dataset: Dataset, name: str) -> dict[str, Any]:
    """Keys of a category whose objects have keypoints: their names, and the skeleton, which counts from 1."""
    if name not in dataset.keypoint_classes or not dataset.keypoint_names:
        return {}
    return {"keypoints": list(dataset.keypoint_names), "skeleton": [[a + 1, b + 1] for a, b in dataset.skeleton]}


def image_folder(file: Path, images: str | None, names: Sequence[Sequence[str]], problems: Problems) -> Path | None:
    """The folder that has the most images, by one of the names of each; the nearest such. None, told to `problems`: no
    folder."""
    folders = _beside(file, names) if images is None else [Path(images).expanduser()]
    count = {folder: sum(any(os.path.isfile(folder / name) for name in own) for own in names)
             for folder in folders if os.path.isdir(folder)}
    best = max(count, key=lambda folder: count[folder], default=None)  # the first of equals
    if best is None or names and not count[best]:
        hint = "check data.*.images" if images else "give the folder as data.*.images"
        problems.add(file, None, None, "images", images or names[0][0], "must be in the folder of images ("
                     f"looked for in {', '.join(map(str, folders))}: {hint})", "images_nowhere")
        return None
    return best


def _beside(file: Path, names: Sequence[Sequence[str]]) -> list[Path]:
    """Where images of an annotation file are by custom."""
    parts = [part for part in re.split(r"[_.\-]+", file.stem) if part]
    subfolders = ["_".join(parts[start:]) for start in range(len(parts))] + parts
    subfolders += [part for own in names[:1] for part in own[0].split("_")[:-1]]  # COCO_val2014_000000000042.jpg
    subfolders = [f"{above}{sub}" for sub in [*subfolders, ""] for above in ("", "images/")]
    folders = [root / sub for root in (file.parent, file.parent.parent) for sub in subfolders]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


# Reading


def parse_categories(entries: list[Any], file: Path, problems: Problems) -> list[dict[str, Any]]:
    """Those that can be used, in the order of their ids. Raises ValueError if there is none."""
    found: dict[str, set[Any]] = {"id": set(), "name": set()}
    usable = []
    for number, entry in enumerate(entries):
        place, own = f"categories[{number}]", entry if isinstance(entry, dict) else {}
        twice = [key for key in found if isinstance(own.get(key), (int, str)) and own[key] in found[key]]
        if not is_id(own.get("id")) or not isinstance(own.get("name"), str):
            problems.add(file, None, None, "category", entry, "must have a whole number as id and a name (correct it)",
                         "bad_category", place)
        elif twice:
            problems.add(file, None, None, f"category {twice[0]}", own[twice[0]],
                         "must differ from other categories' (rename or merge it)", "duplicate_category", place)
        else:
            usable.append(entry)
            for key, values in found.items():
                values.add(entry[key])
    if not usable:
        raise ValueError(f"categories must be one or more, with a whole number as id and a name, got {entries!r:.200} "
                         f"({file}). Add them to the file.")
    ids = sorted(found["id"])
    if ids[-1] - ids[0] >= len(ids):
        problems.add(file, None, None, "categories[].id", ids, "have gaps", "category_gap")
    return sorted(usable, key=lambda entry: entry["id"])


def is_id(value: Any) -> bool:
    """A whole number, of 64 bits as other tools hold it."""
    return type(value) is int and -2**63 <= value < 2**63


def _left_out(entries: list[Any], label_of: dict[int, int]) -> frozenset[int]:
    """Ids of categories that cannot be used: their annotations are told with them."""
    ids = (entry.get("id") for entry in entries if isinstance(entry, dict))
    return frozenset(value for value in ids if type(value) is int and value not in label_of)


def _keypoints(categories: list[dict[str, Any]], file: Path, problems: Problems
               ) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Names of the keypoints, pairs that a mirror swaps, and pairs that the skeleton joins (which the file counts from
    1)."""
    given = [category["keypoints"] for category in categories if category.get("keypoints")]
    layouts = {tuple(names) for names in given if isinstance(names, list) and all(isinstance(n, str) for n in names)}
    if len(layouts) != 1 and given:
        problems.add(file, None, None, "categories[].keypoints", given[:3], "must be lists of names, the same for all "
                     "categories that have some (use a file for each)", "category_keypoints")
    names = layouts.pop() if len(layouts) == 1 else ()
    swapped = ((name, name.replace("left", "right")) for name in names if "left" in name)
    pairs = tuple((names.index(left), names.index(right)) for left, right in swapped if right in names)
    bones = next((category["skeleton"] for category in categories if names and category.get("skeleton")), ())
    bones = [bone for bone in bones if isinstance(bone, list) and len(bone) == 2] if isinstance(bones, list) else []
    places = range(1, len(names) + 1)
    return names, pairs, tuple((a - 1, b - 1) for a, b in bones if a in places and b in places)


def parse_images(entries: list[Any], file: Path, images: str | None, problems: Problems, exists: ImageFiles,
                 keep_extra: bool = False) -> dict[Any, ImageRecord | None]:
    """Images by id, without annotations; None for one whose size is not known. Those without a file are there, so that
    their annotations are checked, too: `load_dataset` takes them out."""
    found: dict[Any, ImageRecord | None] = {}
    all_names = [file_names(entry) for entry in entries]
    usable = [names for names in all_names if names]
    for size in (20, 2000):  # more, if just those are missing
        exists.sample = usable[:: max(1, len(usable) // size)]
        exists.folder = folder = image_folder(file, images, exists.sample, missing := Problems(file.stem))
        if folder is not None:
            break
    problems.found += missing.found
    for number, (entry, names) in enumerate(zip(entries, all_names)):
        place = f"images[{number}]"
        entry = entry if isinstance(entry, dict) else {}
        image_id, name = entry.get("id"), next(iter(names), entry.get("file_name"))
        if not (is_id(image_id) or isinstance(image_id, str)):
            problems.add(file, name, None, f"{place}.id", image_id, "must be a whole number or a string (add it)",
                         "bad_image", place)
            continue
        if image_id in found:
            problems.add(file, image_id, None, "id", image_id,
                         "must differ from other images' (give it another, or delete it)", "duplicate_image", place)
            continue
        found[image_id] = None
        side = {key: entry.get(key) for key in ("height", "width")}
        if bad := [key for key, value in side.items() if type(value) is not int or not 1 <= value <= FARTHEST]:
            problems.add(file, image_id, None, bad[0], side[bad[0]],
                         "must be a whole number above zero (state the file's size)", "image_size", place)
            continue
        there = next((own for own in names if folder and exists(folder / own)), None)
        path = (folder or file.parent) / (there or next(iter(names), ""))
        extra = rest(entry, ("id", "file_name", "height", "width")) if keep_extra else None
        found[image_id] = ImageRecord(image_id, path, side["height"], side["width"], extra=extra or None)
        if not names or folder and there is None:
            problems.add(file, image_id, None, "file_name", name,
                         f"must be an image file (in {folder}: add it, or delete the entry)", "image_missing", place)
    return found


_Row = tuple[int, dict[str, Any], ImageRecord | None, list[float] | None]  # place, entry, its image, x y w h


@dataclass
class _Reader:
    """Checks annotations, each to the end so that all is told that is wrong with it, and makes them into records."""

    file: Path
    problems: Problems
    images: dict[Any, ImageRecord | None]
    label_of: dict[int, int]
    left_out: frozenset[int]  # categories
    keypoints: int
    keep_extra: bool = False
    seen: dict[int, int] = field(default_factory=dict)  # places by id
    bad: set[int] = field(default_factory=set)  # places of entries with errors

    def read(self, entries: list[Any]) -> dict[Any, list[Annotation]]:
        """By image id."""
        rows = [row for number, entry in enumerate(entries) if (row := self._row(number, entry)) is not None]
        self._check_boxes([row for row in rows if row[3] is not None])
        self._check_masks(rows)
        found: dict[Any, list[Annotation]] = {}
        for row in rows:
            if (annotation := self._annotation(*row)) is not None:
                found.setdefault(row[1]["image_id"], []).append(annotation)
        return found

    def _row(self, number: int, entry: Any) -> _Row | None:
        if not isinstance(entry, dict):
            self.problems.add(self.file, None, None, f"annotations[{number}]", entry, "must be an object (delete it)",
                              "bad_annotation", f"annotations[{number}]")
            return None
        image_id, category_id = entry.get("image_id"), entry.get("category_id")
        self._check_id(number, entry)
        known = type(image_id) in (int, str) and image_id in self.images
        if not known:
            self._add(number, entry, "image_id", image_id,
                      "must be the id of an image (in this file: add it, or delete the annotation)", "unknown_image")
        if type(category_id) is not int or category_id not in self.label_of and category_id not in self.left_out:
            self._add(number, entry, "category_id", category_id,
                      "must be the id of a category (in this file: add it, or correct this)", "unknown_category")
        box = numbers(entry.get("bbox"), 4)
        if box is None:
            self._add(number, entry, "bbox", entry.get("bbox"), "must be four numbers (x, y, width, height)", "bad_box")
        return number, entry, self.images[image_id] if known else None, box

    def _check_id(self, number: int, entry: dict[str, Any]) -> None:
        value = entry.get("id")
        if not is_id(value):
            self._add(number, entry, "id", value, "must be a whole number (add it)", "bad_annotation")
            return
        if value in self.seen:
            self._add(number, entry, "id", value, "must differ from other annotations' (give it another, or delete it)",
                      "duplicate_annotation")
        elif value == 0:
            self._add(number, entry, "id", value, "must be above zero (number annotations from 1)", "id_zero")
        self.seen.setdefault(value, number)

    def _check_boxes(self, rows: list[_Row]) -> None:
        boxes = [(x, y, x + w, y + h) for _, _, _, (x, y, w, h) in rows]
        sizes = [(image.height, image.width) if image else (math.nan, math.nan) for _, _, image, _ in rows]
        other = self.problems.check_layout(self.file, "annotations[].bbox", [row[3] for row in rows], sizes, "xywh")

        def report(i: int, reason: str, kind: str) -> None:
            if not (other and kind == "box_past_edge"):  # then they do for that reason
                self._add(*rows[i][:2], "bbox", rows[i][1]["bbox"], reason, kind)

        self.problems.check_boxes(boxes, sizes, report)

    def _check_masks(self, rows: list[_Row]) -> None:
        """Most are sound polygons, which is seen of all at once; the others are looked at one by one."""
        polygons, owners, suspects = [], [], []
        for i, (_, entry, _, _) in enumerate(rows):
            segmentation = entry.get("segmentation") or ()
            if type(segmentation) in (list, tuple) and {*map(type, segmentation)} <= {array}:
                polygons += segmentation
                owners += [i] * len(segmentation)
            else:
                suspects.append(i)
        suspects += {owners[polygon] for polygon in unsound_polygons(polygons)}
        for i in sorted(suspects):
            number, entry, image, _ = rows[i]
            size = (image.height, image.width) if image else (None, None)
            if problem := segmentation_problem(entry["segmentation"], *size):
                self._add(number, entry, "segmentation", *problem)

    def _annotation(self, number: int, entry: dict[str, Any], image: ImageRecord | None,
                    box: list[float] | None) -> Annotation | None:
        segmentation, keypoints = entry.get("segmentation") or None, None
        crowd, area = entry.get("iscrowd", 0), entry.get("area")
        if crowd not in (0, 1):
            self._add(number, entry, "iscrowd", crowd, "must be 0 or 1 (correct it)", "bad_iscrowd")
        if area is not None and not (is_number(area) and area >= 0):
            self._add(number, entry, "area", area, "must be a number of pixels (delete it: it is then computed)",
                      "bad_area")
        if self.keypoints and entry.get("keypoints"):
            keypoints = numbers(entry["keypoints"], 3 * self.keypoints)
            if keypoints is None or not all(map(math.isfinite, keypoints)):
                self._add(number, entry, "keypoints", entry["keypoints"],
                          f"must be finite: x, y and visibility for each name ({3 * self.keypoints} numbers)",
                          "bad_keypoints")
        label = self.label_of.get(entry.get("category_id")) if number not in self.bad else None
        if label is None or image is None:
            return None
        x, y, w, h = box
        if area is None:
            area = mask_area(segmentation, image.height, image.width) if segmentation else w * h
        extra = rest(entry, _KNOWN) if self.keep_extra else None
        return Annotation(entry["id"], label, (x, y, x + w, y + h), segmentation, keypoints and tuple(keypoints), area,
                          bool(crowd), entry.get("difficult") in (1, True), tuple(entry["bbox"][2:]), extra or None)

    def _add(self, number: int, entry: dict[str, Any], field: str, value: Any, reason: str, kind: str) -> None:
        if severity(kind) == "error":
            self.bad.add(number)
        image_id, key = entry.get("image_id"), entry.get("id")
        self.problems.add(self.file, image_id if type(image_id) in (int, str) else None, key if is_id(key) else None,
                          field, value, reason, kind, f"annotations[{number}]")
