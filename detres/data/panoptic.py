"""COCO's panoptic format: a JSON file, and a folder of PNG files with the segment that each pixel is of.

Things become annotations, whose masks are read from the PNG; so instances do not overlap, unlike those of COCO's
instances files. Stuff is in the label map.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from detres.config import SourceConfig
from detres.data import coco
from detres.data.dataset import Annotation, Dataset, ImageRecord, Role
from detres.data.index import ImageFiles, cached
from detres.data.label_maps import MAX_CLASSES, SegmentImage
from detres.data.masks import PNGSegment
from detres.data.problems import OnInvalid, Problems, numbers

THINGS = "things"  # the semantic class of all pixels of things, as in Detectron2's Panoptic FPN


def is_source(path: Path, role: str, split: str | None) -> bool:
    """Whether a path and a split mean data in COCO's panoptic format, where other formats are possible, too."""
    if path.is_file():
        return path.suffix == ".json" and "panoptic" in path.stem
    if split:
        return split.startswith("panoptic")
    files = coco.json_files(path) if path.is_dir() else []
    return bool(files) and all("panoptic" in file.stem for file in files)


def load_panoptic(source: SourceConfig, role: Role, on_invalid: OnInvalid = "error") -> Dataset:
    """Read a data set in COCO's panoptic format: its JSON file, or a folder with `annotations/panoptic_<split>*.json`.

    The PNG files are in the folder that is called as the JSON file, without its suffix (as for panopticapi). Labels of
    things are in the order of their ids, as are the `semantic_classes` after the first, "things", those of stuff. The
    label map of a record counts things first, then stuff.

    Raises as `load_dataset`.
    """
    path = Path(source.path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data set must exist, got {source.path} (seen from {Path.cwd()}). Check the path.")
    file = path if path.is_file() else _find(path, role, source.split)
    with coco.no_garbage_collection():
        dataset, problems = cached(
            file, (source.images,), lambda names: coco.image_folder(file, source.images, names, Problems("")),
            lambda files: _read(file, source.images, files))
    problems.close(on_invalid)
    return dataset


def _find(folder: Path, role: str, split: str | None) -> Path:
    files = [file for file in coco.json_files(folder) if "panoptic" in file.stem]
    matches = [file for file in files if coco.names_split(file, role, split)]
    if len(matches) != 1 and not (len(matches := files) == 1 and split is None):
        raise FileNotFoundError(f"panoptic data set must have one JSON file for '{split or role}', such as annotations/"
                                f"panoptic_{split or role}.json, got {[str(f.relative_to(folder)) for f in files]} "
                                f"({folder}). Give the file itself as path.")
    return matches[0]


def _read(file: Path, images: str | None, files: ImageFiles) -> tuple[Dataset, Problems]:
    content = coco.parse(file)
    problems = Problems(file.stem)
    categories = coco.parse_categories(content["categories"], file, problems)
    if bad := [category for category in categories if category.get("isthing") not in (0, 1)]:
        raise ValueError(f"category must say isthing, 0 or 1, in COCO's panoptic format, got {bad[0]} ({file}). Is it "
                         "a panoptic file?")
    things, stuff = ([category for category in categories if category["isthing"] == kind] for kind in (1, 0))
    if not things or len(things) + len(stuff) > MAX_CLASSES:
        raise ValueError(f"categories must be at most {MAX_CLASSES}, one or more of them things, got {len(things)} "
                         f"things and {len(stuff)} of stuff ({file}).")
    records = coco.parse_images(content["images"], file, images, problems, files)
    missing = problems.images("image_missing")
    records = {image_id: record if image_id not in missing else None for image_id, record in records.items()}
    table = (0,) * len(things) + tuple(range(1, len(stuff) + 1))
    label_of = {category["id"]: k for k, category in enumerate([*things, *stuff])}
    found = _Reader(file, problems, records, label_of, table).read(content["annotations"], files)
    return Dataset(file.stem, "panoptic", tuple(category["name"] for category in things),
                   tuple(category["id"] for category in things), found,
                   semantic_classes=(THINGS, *(category["name"] for category in stuff)),
                   semantic_ids=(0, *(category["id"] for category in stuff))), problems


@dataclass(frozen=True)
class _Segment:
    image: Any
    id: int
    k: int
    crowd: bool
    bbox: list[float]  # x, y, width, height; of stuff, not looked at
    area: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        x, y, w, h = self.bbox
        return x, y, x + w, y + h


@dataclass
class _Reader:
    """Checks annotations and makes them into records."""

    file: Path
    problems: Problems
    images: dict[Any, ImageRecord | None]
    label_of: dict[int, int]  # things first
    table: tuple[int, ...]

    def read(self, entries: list[Any], exists: ImageFiles) -> tuple[ImageRecord, ...]:
        """The images that can be used."""
        folder = self.file.with_suffix("")
        files: dict[Any, str] = {}
        segments: list[_Segment] = []
        for number, entry in enumerate(entries):
            if problem := self._problem(entry, files):
                self.problems.add(self.file, entry.get("image_id") if isinstance(entry, dict) else None, None,
                                  f"annotations[{number}].{problem[0]}", *problem[1:])
            elif self.images[entry["image_id"]] is None:  # reported with the image
                pass
            elif not exists(folder / entry["file_name"]):
                self.problems.add(self.file, entry["image_id"], None, "file_name", entry["file_name"],
                                  f"must be a PNG file (in {folder}: add it, or delete the annotation)")
            else:
                files[entry["image_id"]] = entry["file_name"]
                segments += self._segments(entry)
        for image_id, record in self.images.items():
            if record is not None and image_id not in files:
                self.problems.add(self.file, image_id, None, "annotations", None,
                                  "must have one for each image (add it, or delete the image)")
        return self._records(folder, files, segments)

    def _problem(self, entry: Any, files: dict[Any, str]) -> tuple[str, Any, str] | None:
        if not isinstance(entry, dict) or type(entry.get("image_id")) not in (int, str) or (
                entry["image_id"] not in self.images):
            return "image_id", entry, "must be the id of an image (in this file: add it, or delete the annotation)"
        if entry["image_id"] in files:
            return "image_id", entry["image_id"], "must differ from other annotations' (delete one of them)"
        if not isinstance(entry.get("file_name"), str):
            return "file_name", entry.get("file_name"), "must be the name of a PNG (add it)"
        if not isinstance(entry.get("segments_info"), list):
            return "segments_info", entry.get("segments_info"), "must be a list (is this a panoptic file?)"
        return None

    def _segments(self, entry: dict[str, Any]) -> Iterator[_Segment]:
        seen: set[int] = set()
        for info in entry["segments_info"]:
            info = info if isinstance(info, dict) else {}
            number, category_id, crowd, area = (info.get(key) for key in ("id", "category_id", "iscrowd", "area"))
            k = self.label_of.get(category_id) if type(category_id) is int else None
            is_stuff = k is not None and self.table[k] > 0
            bbox = [0.0] * 4 if is_stuff else numbers(info.get("bbox"), 4)
            if type(number) is not int or not 0 < number < 2**24 or number in seen:
                self._add(entry, number, "id", number, "must be a whole number from 1 to 2^24 - 1, and not another's "
                                                       "(id = R + 256 G + 65536 B of its pixels)")
            elif k is None:
                self._add(entry, number, "category_id", category_id,
                          "must be the id of a category (in this file: add it, or correct this)")
            elif crowd not in (0, 1, None):
                self._add(entry, number, "iscrowd", crowd, "must be 0 or 1 (correct it)")
            elif not is_stuff and (type(area) not in (int, float) or not 0 <= area < float("inf")):
                self._add(entry, number, "area", area, "must be a number of pixels (add it)")
            elif bbox is None:
                self._add(entry, number, "bbox", info.get("bbox"), "must be four numbers (x, y, width, height)")
            else:
                yield _Segment(entry["image_id"], number, k, bool(crowd), bbox, area)
            seen.add(number)

    def _records(self, folder: Path, files: dict[Any, str], segments: Sequence[_Segment]) -> tuple[ImageRecord, ...]:
        things = [segment for segment in segments if not self.table[segment.k]]
        sizes = [(self.images[thing.image].height, self.images[thing.image].width) for thing in things]
        kept = self.problems.check_boxes([thing.box for thing in things], sizes, lambda i, *problem: self._add(
            {"image_id": things[i].image}, things[i].id, "bbox", things[i].bbox, *problem))
        columns = {image_id: array("q") for image_id in files}
        for segment in segments:
            columns[segment.image].extend((segment.id, segment.k, segment.crowd))
        annotations: dict[Any, list[Annotation]] = {image_id: [] for image_id in files}
        paths = {image_id: folder / name for image_id, name in files.items()}
        for number, (thing, keep) in enumerate(zip(things, kept.tolist()), 1):
            if keep:
                mask = PNGSegment(paths[thing.image], thing.id)
                annotations[thing.image].append(Annotation(number, thing.k, thing.box, mask, area=thing.area,
                                                           crowd=thing.crowd, size=tuple(thing.bbox[2:])))
        return tuple(replace(record, annotations=tuple(annotations[image_id]),
                             label_map=SegmentImage(self.table, paths[image_id], columns[image_id]))
                     for image_id, record in self.images.items() if image_id in files)

    def _add(self, entry: dict[str, Any], number: Any, field: str, value: Any, reason: str,
             kind: str = "invalid") -> None:
        self.problems.add(self.file, entry["image_id"], number, field, value, reason, kind)


def align_panoptic(dataset: Dataset, aligned: Dataset, semantic_classes: Sequence[str]) -> Dataset:
    """`aligned`, which is `dataset` with things renumbered to those of a model, with stuff renumbered likewise, by
    name.

    Raises ValueError for stuff that the model does not know.
    """
    if aligned is dataset and dataset.semantic_classes == tuple(semantic_classes):
        return dataset
    if missing := [name for name in dataset.semantic_classes if name not in semantic_classes]:
        raise ValueError(f"stuff of the data set must be known to the weights, got {', '.join(missing)} in "
                         f"'{dataset.name}'. The weights know {', '.join(semantic_classes)}: evaluate on data with "
                         "these names.")
    things, channel = len(aligned.classes), {name: i for i, name in enumerate(semantic_classes)}
    labels = np.array([*map(aligned.classes.index, dataset.classes),
                       *(things - 1 + channel[name] for name in dataset.semantic_classes[1:])])
    table = (0,) * things + tuple(range(1, len(semantic_classes)))

    def renumbered(label_map: SegmentImage) -> SegmentImage:
        ids, k, crowd = label_map.columns()
        segments = np.stack([ids, labels[k], crowd], 1).ravel().tolist()
        return replace(label_map, table=table, segments=array("q", segments))

    own = dict(zip(dataset.semantic_classes, dataset.semantic_ids))
    return replace(aligned, semantic_classes=tuple(semantic_classes),
                   semantic_ids=tuple(own.get(name, 0) for name in semantic_classes),
                   records=aligned.records.mapped(
                       lambda record: replace(record, label_map=renumbered(record.label_map))))
