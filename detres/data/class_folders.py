"""Labelled image files: folders of classes, and ILSVRC's classification data in the layout of Kaggle's copy.

Classes are named by their folders (of ImageNet: WordNet ids), sorted; this is the order of torchvision's weights.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from detres.data.class_dataset import ClassDataset
from detres.data.dataset import SPLITS, Role
from detres.data.images import IMAGE_SUFFIXES

# Folders of classes


def find_split(folder: Path, role: Role, split: str | None) -> Path | None:
    """The folder of a split, if `folder` has splits, each of which has folders of classes.

    Raises FileNotFoundError if it has splits, but not that one.
    """
    names = [split] if split else SPLITS[role]
    known = [name for name in [*names, *itertools.chain(*SPLITS.values())] if _subfolders(folder / name)]
    if known and known[0] not in names or split and not known:
        there = ", ".join(dict.fromkeys(known)) or "none"
        raise FileNotFoundError(f"data set must have a folder {' or '.join(names)} of class folders, got {there} "
                                f"({folder}). Say which one is meant, such as data.val.split=test.")
    return folder / known[0] if known else None


def read_folders(folder: Path) -> ClassDataset:
    """Each subfolder is a class, with image files anywhere in it."""
    classes = _subfolders(folder)
    files = [_image_files(folder / name) for name in classes]
    empty = [name for name, found in zip(classes, files) if not found]
    if empty:
        raise ValueError(f"class folders must hold images, got none in {len(empty)} of {len(classes)}, such as "
                         f"{folder / empty[0]}. Add images ({', '.join(sorted(IMAGE_SUFFIXES))}), or remove it.")
    return _dataset(folder, classes, itertools.chain(*files), np.repeat(np.arange(len(files)), [*map(len, files)]))


def is_of_classes(folder: Path) -> bool:
    return bool(_subfolders(folder))


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    return sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder, followlinks=True)
                  for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


def _dataset(folder: Path, classes: Sequence[str], files, labels) -> ClassDataset:
    return ClassDataset(f"{folder.parent.name} {folder.name}", tuple(classes), np.array(labels, np.int64), tuple(files))


# ILSVRC


def find_ilsvrc(folder: Path) -> Path | None:
    """The folder with Data/CLS-LOC: the one given, or ILSVRC in it."""
    return next((root for root in (folder, folder / "ILSVRC") if (root / "Data" / "CLS-LOC").is_dir()), None)


def read_ilsvrc(root: Path, role: Role, split: str | None) -> ClassDataset:
    """The images of Data/CLS-LOC/train, in class folders, or of Data/CLS-LOC/val, whose labels are in
    LOC_val_solution.csv or, without that, in Annotations/CLS-LOC/val/*.xml.

    Classes are those of LOC_synset_mapping.txt, else of the folders in train, else of the labels. Both files lie in
    `root` or beside it. The original development kit, whose labels are numbers that only a MATLAB file explains, is
    not read; nor are test images, whose labels were not published.
    """
    data, split = root / "Data" / "CLS-LOC", split or {"train": "train"}.get(role, "val")
    folder = data / split
    if split not in ("train", "val") or not folder.is_dir():
        raise FileNotFoundError(f"split must be train or val, with images in {data}, got '{split}'.")
    if _subfolders(folder):
        return read_folders(folder)
    files = _image_files(folder)
    label_of = _val_labels(root)
    names = [label_of.get(Path(file).stem) for file in files]
    if not files or None in names:
        raise ValueError(f"images in {folder} must have labels in LOC_val_solution.csv or Annotations/CLS-LOC/val, got "
                         f"{len(files)} images, {names.count(None)} of them without. Unpack the files of Kaggle's "
                         f"ImageNet challenge in or beside {root}.")
    classes = ilsvrc_classes(root) or sorted(set(names))
    number = {name: label for label, name in enumerate(classes)}
    if unknown := set(names) - set(classes):
        raise ValueError(f"labels must be classes of {root}, got {', '.join(sorted(unknown)[:5])}. The class list and "
                         "the labels are of different data sets.")
    return _dataset(folder, classes, files, [number[name] for name in names])


def _val_labels(root: Path) -> dict[str, str]:
    """Stem of an image -> class."""
    solution = _beside(root, "LOC_val_solution.csv")
    if solution is not None:
        with open(solution, newline="", encoding="utf-8") as file:  # ImageId, and a list of: class x1 y1 x2 y2
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    files = sorted((root / "Annotations" / "CLS-LOC" / "val").glob("*.xml"))
    return {file.stem: ElementTree.parse(file).getroot().findtext("object/name", "").strip() for file in files}


def ilsvrc_classes(root: Path) -> list[str]:
    return _synsets(root) or _subfolders(root / "Data" / "CLS-LOC" / "train")


def _synsets(root: Path) -> list[str]:
    """Lines are: n01440764 tench, Tinca tinca."""
    file = _beside(root, "LOC_synset_mapping.txt")
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    return sorted(line.split()[0] for line in lines if line.strip())


def _beside(root: Path, name: str) -> Path | None:
    return next((folder / name for folder in (root, root.parent) if (folder / name).is_file()), None)
