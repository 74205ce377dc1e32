"""Data sets of loose files, as tools for labelling export them: which image belongs to an annotation file, which split
it is in, and objects of any such format made into a `Dataset`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detres.data.dataset import SPLITS, Annotation, Dataset, ImageRecord
from detres.data.images import IMAGE_SUFFIXES, ImageError, read_size
from detres.data.masks import box_of, mask_area
from detres.data.problems import OnInvalid, Problems, segmentation_problem

_NAMES = {name: role for role, names in SPLITS.items() for name in names}


def split_of(file: Path, root: Path) -> str | None:
    """The folder between `root` and the file that is called as a split: train, valid, Test ..."""
    parts = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    return next((part for part in parts if part.lower() in _NAMES), None)


def splits(files: Sequence[Path], root: Path | None = None) -> list[str]:
    """The splits that files are in, training first; none if they are not in folders of splits."""
    found = {split_of(file, root or common_folder(files)) for file in files} - {None}
    return sorted(found, key=lambda name: list(_NAMES).index(name.lower()))


def common_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def select(files: Sequence[Path], root: Path, role: str, split: str | None) -> list[Path]:
    """The files of a split, or of a role; all, whatever the role, where no folder is called as a split.

    Raises FileNotFoundError if there are none.
    """
    own = {file: split_of(file, root) for file in files}
    names = set(own.values()) - {None}
    if not names and split is None:
        return list(files)
    kept = [file for file, name in own.items() if name and (name == split if split else _NAMES[name.lower()] == role)]
    if not kept:
        raise FileNotFoundError(f"folder must hold the split '{split or role}', got {sorted(names)} ({root}). Give "
                                "data.*.split, or name a folder so.")
    return kept


class ImageFinder:
    """Image files of a folder and those below it."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder must exist, got {folder}. Check data.*.images.")
        self.folder = folder
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self._by_name[path.name].append(path)
                self._by_name[path.stem].append(path)

    def all(self) -> list[Path]:
        return sorted({path for paths in self._by_name.values() for path in paths})

    def find(self, file: Path, name: str = "") -> Path | None:
        """The image of an annotation file: called `name`, or as the file is; of several, that in folders called as its
        own."""
        name = name.replace("\\", "/").rpartition("/")[2]
        found = self._by_name.get(name) or self._by_name.get(Path(name).stem) or self._by_name.get(file.stem) or ()
        return max(found, key=lambda path: len({*path.parts} & {*file.parts}), default=None)


@dataclass(frozen=True)
class Item:
    """An object as a file says it, in pixels. Without a box, the box is the segmentation's."""

    image: int  # row of its image
    file: Path
    number: int  # of the object, for messages
    name: str
    box: Sequence[float] | None = None  # xyxy
    segmentation: Any = None
    crowd: bool = False


class Builder:
    """Collects images and objects; `dataset` checks them."""

    def __init__(self, name: str, format: str, images: ImageFinder):
        self.problems, self.format, self.images = Problems(name), format, images
        self.records: list[ImageRecord] = []
        self.items: list[Item] = []

    def image(self, file: Path, name: str, size: tuple[int, int] | None = None) -> int | None:
        """The row of a new image; None, and a problem, if it cannot be used. `size`: height and width. One with a size
        and no file is there, so that its objects are checked, too: `load_dataset` takes it out."""
        path = self.images.find(file, name)
        if path is None:
            self.problems.add(file, name, None, "image", name, f"must be an image file (in {self.images.folder}: add "
                              "it, or give the folder as data.*.images)", "image_missing")
            if size is None:
                return None
            self.records.append(ImageRecord(name, self.images.folder / name, *size))
            return len(self.records) - 1
        try:
            size = size or read_size(path)
        except ImageError as error:
            self.problems.add(file, name, None, "image", str(error), "must be readable (replace it)",
                              "image_missing")
            return None
        self.records.append(ImageRecord(path.relative_to(self.images.folder).as_posix(), path, *size))
        return len(self.records) - 1

    def dataset(self, classes: Sequence[str], on_invalid: OnInvalid) -> Dataset:
        """With all objects that can be used. `classes`: names, of which those of the objects are."""
        label_of = {name: label for label, name in enumerate(classes)}
        usable = [(item, box) for item in self.items if (box := self._box(item)) is not None]
        sizes = [(self.records[item.image].height, self.records[item.image].width) for item, _ in usable]
        kept = self.problems.check_boxes([box for _, box in usable], sizes, lambda i, *problem: self._add(
            usable[i][0], "box", usable[i][1], *problem))
        found: list[list[Annotation]] = [[] for _ in self.records]
        for number, ((item, box), keep, size) in enumerate(zip(usable, kept.tolist(), sizes), 1):
            if keep:
                area = mask_area(item.segmentation, *size) if item.segmentation else (box[2] - box[0]) * (
                    box[3] - box[1])
                found[item.image].append(Annotation(number, label_of[item.name], tuple(box), item.segmentation,
                                                    area=area, crowd=item.crowd))
        records = tuple(replace(record, annotations=tuple(own)) for record, own in zip(self.records, found))
        dataset = Dataset(self.problems.name, self.format, tuple(classes), tuple(range(len(classes))), records)
        self.problems.located.append((dataset, lambda annotation: self._locate(usable[annotation.id - 1][0])))
        self.problems.close(on_invalid)
        return dataset

    def _locate(self, item: Item) -> tuple[str, int, str]:
        """File, number and place there."""
        return str(item.file), item.number, f"object {item.number}"

    def _box(self, item: Item) -> Sequence[float] | None:
        record = self.records[item.image]
        if not item.name:
            return self._add(item, "label", item.name, "must be the name of a class (add it)",
                             "unknown_category")
        if not item.segmentation:
            return item.box
        if problem := segmentation_problem(item.segmentation, record.height, record.width):
            return self._add(item, "polygon", *problem)
        return item.box or box_of(item.segmentation)

    def _add(self, item: Item, field: str, value: Any, reason: str, kind: str) -> None:
        self.problems.add(item.file, self.records[item.image].id, item.number, field, value, reason, kind)
