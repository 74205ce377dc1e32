"""The formats of data sets: how each is recognised by what is at a path, which splits it has, and what reads it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from detres.config import SourceConfig
from detres.data import cityscapes, coco, cvat, ilsvrc_det, labelme, localization, loose, openimages, shards, voc, yolo
from detres.data.dataset import SPLITS, Dataset, Role
from detres.data.images import IMAGE_SUFFIXES
from detres.data.problems import OnInvalid

Place = tuple[str, str | Path, str | None]  # name of a split, and the path and split that mean it to `load_dataset`


class Format(NamedTuple):
    """`find` gives what `read` and `splits` want of a path in this format; nothing for other paths."""

    name: str
    layout: str
    find: Callable[[Path], Any]
    read: Callable[[Any, SourceConfig, Role, OnInvalid, bool], Dataset]
    splits: Callable[[Path, Any], list[Place]]
    uses: tuple[str, ...] = ("split", "images")  # fields of SourceConfig
    mendable: bool = False  # `detres data check --fix` can copy it


def recognise(path: str | Path) -> tuple[Format, Any]:
    """The format of what is at a path, and what its `find` found. Raises FileNotFoundError if there is none."""
    if shards.is_source(str(path)):
        return SHARDS, str(path)
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data set must exist, got {path} (seen from {Path.cwd()}). Check the path.")
    for format in FORMATS:
        if found := format.find(path):
            return format, found
    if path.is_dir() and (images := sum(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())):
        raise FileNotFoundError(f"data set must have annotations, got {path} with {images:,} images and none that "
                                "detres knows. Give the annotation file or folder, with these images as --images (in a "
                                "config data.*.images).")
    layouts = "; ".join(f"{format.layout} ({format.name})" for format in (*FORMATS, SHARDS))
    raise FileNotFoundError(f"data set must be in one of the formats that detres reads, got {path}. Looked for: "
                            f"{layouts}. Give the folder that holds these, or the annotation file itself.")


def _is_file(*suffixes: str) -> Callable[[Path], Path | None]:
    return lambda path: path if path.suffix in suffixes and path.is_file() else None


def _coco_folder(path: Path) -> Path | None:
    files = coco.json_files(path)
    return path if files and not labelme.is_labelme(files[0]) else None


def _roots_in(path: Path) -> list[Path]:
    return [] if voc.is_root(path) else voc.find_roots(path)


def _read_coco(file: Path, source: SourceConfig, role: Role, on_invalid: OnInvalid, keep_extra: bool) -> Dataset:
    dataset = coco.read_coco(file, source.images, on_invalid=on_invalid, keep_extra=keep_extra)
    return dataset.moved_keypoints(source.keypoint_offset)


def _read_coco_folder(folder: Path, source: SourceConfig, role: Role, on_invalid: OnInvalid,
                      keep_extra: bool) -> Dataset:
    dataset = coco.read_folder(folder, role, source.split, source.images, on_invalid=on_invalid, keep_extra=keep_extra)
    return dataset.moved_keypoints(source.keypoint_offset)


def _read(reader: Callable[..., Dataset], found: Any, source: SourceConfig, role: Role, on_invalid: OnInvalid,
          keep_extra: bool) -> Dataset:
    """By a reader that needs its own files only."""
    return reader(found, role, source.split, on_invalid)


def _read_images(reader: Callable[..., Dataset], found: Any, source: SourceConfig, role: Role, on_invalid: OnInvalid,
                 keep_extra: bool) -> Dataset:
    """By a reader that takes a folder of images."""
    return reader(found, role, source.split, source.images, on_invalid)


def _read_shards(path: str, source: SourceConfig, role: Role, on_invalid: OnInvalid, keep_extra: bool) -> Dataset:
    return shards.read_shards(source, role, on_invalid).moved_keypoints(source.keypoint_offset)


def _read_voc(roots: list[Path], source: SourceConfig, role: Role, on_invalid: OnInvalid, keep_extra: bool) -> Dataset:
    return voc.read_voc(roots, role, source.split, source.images, on_invalid, keep_extra)


def _whole(path: Path, found: Any) -> list[Place]:
    return [(path.stem, path, None)]


def _coco_files(path: Path, found: Any) -> list[Place]:
    return [(file.parent.name if file.stem.startswith("_") else file.stem, file, None)
            for file in coco.instance_files(path)]


def _voc_sets(path: Path, roots: list[Path]) -> list[Place]:
    """The image sets of each year, without those that only join others."""
    found: list[Place] = []
    for root in roots:
        names = [file.stem for file in sorted((root / "ImageSets/Main").glob("*.txt")) if "_" not in file.stem]
        joins = {"trainval"} if {"train", "val"} <= set(names) else set()
        found += [(name if len(roots) == 1 else f"{root.name} {name}", root, name)
                  for name in names if name not in joins]
    return found


def _yolo_entries(path: Path, file: Path) -> list[Place]:
    content = yolo.parse(file)
    return [(name, file, name) for names in SPLITS.values() for name in names if content.get(name)]


def _lists(folder: str, path: Path, root: Any) -> list[Place]:
    """The image sets of ILSVRC: each list but those of single classes."""
    names = sorted(file.stem for file in (path / "ImageSets" / folder).glob("*.txt"))
    return [(name, path, name) for name in names if not name.rpartition("_")[2].isdecimal()]


def _named(names: Callable[[Any], list[str]], path: Path, found: Any) -> list[Place]:
    """The splits that a folder has, or the whole of it."""
    return [(name, path, name) for name in names(found)] or _whole(path, found)


# A URL and a pattern are no paths, so these are told apart before all others.
SHARDS = Format("shards", ".tar files", str, _read_shards,
                lambda path, found: [(name, found, name) for name in shards.split_names(found)], ("split",))

# The first that finds something reads it: formats that have marks of their own come before those of loose files.
FORMATS: tuple[Format, ...] = (
    Format("COCO or LVIS", "a .json file", _is_file(".json"), _read_coco, _whole, ("images",), True),
    Format("YOLO", "a .yaml file", _is_file(".yaml", ".yml"), partial(_read, yolo.read_yolo), _yolo_entries,
           ("split",), True),
    Format("ILSVRC DET", "Data/DET/ with ImageSets/DET/", lambda path: path if ilsvrc_det.is_root(path) else None,
           partial(_read, ilsvrc_det.read_ilsvrc_det), partial(_lists, "DET"), ("split",)),
    Format("ILSVRC CLS-LOC", "ImageSets/CLS-LOC/", localization.find_root,
           partial(_read, localization.read_ilsvrc_loc), partial(_lists, "CLS-LOC"), ("split",)),
    Format("a table", "boxes.csv with classes.txt", lambda path: path if localization.is_table(path) else None,
           partial(_read, localization.read_table), partial(_named, localization.table_splits), ("split",)),
    Format("Cityscapes", "gtFine/", cityscapes.find_root, partial(_read_images, cityscapes.read_cityscapes),
           partial(_named, cityscapes.splits)),
    Format("VOC", "Annotations/ with ImageSets/Main/", lambda path: [path] if voc.is_root(path) else [], _read_voc,
           _voc_sets, mendable=True),
    Format("YOLO", "data.yaml", yolo.find_yaml, partial(_read, yolo.read_yolo), _yolo_entries, ("split",), True),
    Format("COCO or LVIS", "annotations/*.json or *.json", _coco_folder, _read_coco_folder, _coco_files, mendable=True),
    Format("VOC", "folders with Annotations/ and ImageSets/Main/", _roots_in, _read_voc, _voc_sets, mendable=True),
    Format("labelme", ".json files with shapes", labelme.find, partial(_read_images, labelme.read_labelme),
           partial(_named, loose.splits)),
    Format("CVAT", "annotations.xml", cvat.find, partial(_read_images, cvat.read_cvat), _whole),
    Format("VOC", ".xml files", voc.find_loose, partial(_read_images, voc.read_loose), partial(_named, loose.splits)),
    Format("YOLO", ".txt files in labels/, or obj.data", yolo.find_loose, partial(_read_images, yolo.read_loose),
           partial(_named, yolo.loose_splits)),
    Format("OpenImages", "a .csv file with ImageID and XMin", openimages.find,
           partial(_read_images, openimages.read_openimages), partial(_named, openimages.splits)),
)
