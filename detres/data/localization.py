"""Classification with localization: images of one class each, with the boxes of its objects.

ILSVRC CLS-LOC, as unpacked (annotations are PASCAL VOC's XML; a class is named by its WordNet id):

    ILSVRC/Annotations/CLS-LOC/train/n01440764/n01440764_10040.xml  Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml
    ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_10040.JPEG        Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG
    ILSVRC/ImageSets/CLS-LOC/{train_loc,val}.txt
    ILSVRC/devkit/data/ILSVRC2015_clsloc_validation_blacklist.txt   optional

A folder with a table, one box a row, of tiny ImageNet or your own:

    boxes.csv    file,wnid,label,split,xmin,ymin,xmax,ymax
    classes.txt  a line for each label: wnid, tab, names
    images/      the files

In both, boxes count pixels from 0 and include the last one: (xmin, ymin, xmax, ymax) becomes the continuous box
(xmin, ymin, xmax + 1, ymax + 1), as wide as the evaluation of the challenge has it (eval_clsloc.m).
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from detres.data import voc_xml
from detres.data.class_dataset import ClassDataset
from detres.data.class_folders import find_ilsvrc, ilsvrc_classes
from detres.data.dataset import SPLITS, Dataset, ImageRecord
from detres.data.images import ImageError, read_size
from detres.data.problems import OnInvalid, Problems

log = logging.getLogger("detres")

CORNERS = ("xmin", "ymin", "xmax", "ymax")
COLUMNS = ("file", "label", "split", *CORNERS)


def as_class_dataset(dataset: Dataset) -> ClassDataset:
    """The images with their classes alone, for classifiers."""
    return ClassDataset(dataset.name, dataset.classes, np.array([record.label for record in dataset.records], np.int64),
                        tuple(str(record.path) for record in dataset.records))


def _continuous(corners: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = corners
    return [x1, y1, x2 + 1, y2 + 1]


def _without_clicks(corners: Sequence[float]) -> list[float] | None:
    """None for a box that is a pixel wide or high by a table's count, in practice a stray click. (An object for the
    challenge, as in `ilsvrc_det`.)"""
    x1, y1, x2, y2 = corners
    return None if x1 == x2 or y1 == y2 else _continuous(corners)


# ILSVRC


def find_root(folder: Path) -> Path | None:
    """The folder with ImageSets/CLS-LOC: the one given or ILSVRC in it; also of its Data/CLS-LOC, which tells
    localization from detection where both are unpacked."""
    if folder.parts[-2:] == ("Data", "CLS-LOC"):
        folder = folder.parents[1]
    root = find_ilsvrc(folder)
    return root if root and (root / "ImageSets" / "CLS-LOC").is_dir() else None


def read_ilsvrc_loc(root: Path, role: str, split: str | None = None, on_invalid: OnInvalid = "error") -> Dataset:
    """The data set of ImageSets/CLS-LOC/<split>.txt; for training train_loc, the images that have boxes.

    Objects that carry the WordNet id of another class are passed over; those of other names are of the image's class (a
    breed of dogs goes by its English name). `blacklist` is the kit's, for images that the data set has. Raises as
    `load_dataset`.
    """
    split = split or {"train": "train_loc"}.get(role, "val")
    problems = Problems(f"ILSVRC CLS-LOC {split}")
    classes = ilsvrc_classes(root)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    readable = list(_readable(root, _ids(root, split), label_of, problems))
    records, _ = voc_xml.records(readable, label_of, _continuous, problems)
    problems.close(on_invalid)
    return Dataset(problems.name, "ilsvrc", tuple(classes), tuple(range(len(classes))), records,
                   blacklist=_blacklist(root, records, classes))


def _ids(root: Path, split: str) -> list[str]:
    """The images of a list: the first word of each line."""
    folder = root / "ImageSets" / "CLS-LOC"
    if not (folder / f"{split}.txt").is_file():
        there = sorted(file.stem for file in folder.glob("*.txt"))
        raise FileNotFoundError(f"ILSVRC CLS-LOC image set must be one of {there}, got '{split}' ({folder}). "
                                "Give it as split.")
    return [words[0] for line in (folder / f"{split}.txt").read_text().splitlines() if (words := line.split())]


def _readable(root: Path, image_ids: Sequence[str], label_of: dict[str, int], problems: Problems
              ) -> Iterator[tuple[ImageRecord, voc_xml.Tree]]:
    """The images that can be used, still without annotations; their objects bear the name of the image's class."""
    others = 0
    for image_id in image_ids:
        folder = "train" if "/" in image_id else "val"
        path = root / f"Data/CLS-LOC/{folder}/{image_id}.JPEG"
        xml = root / f"Annotations/CLS-LOC/{folder}/{image_id}.xml"
        tree = voc_xml.parse(xml)
        if isinstance(tree, str):
            problems.add(xml, image_id, None, "file", tree, "must be an XML file (correct it, or delete the line of "
                         "the list; train_loc lists the training images that have one)")
            continue
        names = [thing.name for thing in tree.things]
        own = image_id.split("/")[0] if folder == "train" else next(iter(names), "")
        things = tuple(replace(thing, name=own) for thing in tree.things
                       if thing.name == own or not re.fullmatch(r"n\d{8}", thing.name))
        others += len(names) - len(things)
        if own not in label_of:
            problems.add(xml, image_id, None, "class", own, "must be a class of the data set (its list is "
                         "LOC_synset_mapping.txt, or the folders of Data/CLS-LOC/train)")
        elif not path.is_file():
            problems.add(xml, image_id, None, "image id", image_id, f"must have an image file ({path})")
        elif size := voc_xml.size_of(tree, path, image_id, problems):
            yield ImageRecord(image_id, path, *size, label=label_of[own]), replace(tree, things=things)
    if others:
        log.info("%s: passed over %d objects of other classes than their image's", problems.name, others)


def _blacklist(root: Path, records: Sequence[ImageRecord], classes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The kit numbers validation images from 1, as their names do."""
    files = sorted(root.glob("devkit/data/*_clsloc_validation_blacklist.txt"))
    numbers = files[-1].read_text().split() if files else []
    label_of = {record.id: record.label for record in records}
    image_ids = [f"ILSVRC2012_val_{int(number):08}" for number in numbers]
    return tuple((image_id, classes[label_of[image_id]]) for image_id in image_ids if image_id in label_of)


# A table


def is_table(folder: Path) -> bool:
    return (folder / "boxes.csv").is_file() and (folder / "classes.txt").is_file()


def table_splits(folder: Path) -> list[str]:
    with open(folder / "boxes.csv", newline="", encoding="utf-8") as file:
        return list(dict.fromkeys(row["split"] for row in csv.DictReader(file) if row.get("split")))


def read_table(folder: Path, role: str, split: str | None = None, on_invalid: OnInvalid = "error") -> Dataset:
    """The rows of `boxes.csv` whose `split` is this. Classes are named by the first of their names; several rows of a
    file are several objects of its class. Raises as `load_dataset`."""
    with open(folder / "boxes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if missing := [name for name in COLUMNS if rows and rows[0].get(name) is None]:
        raise ValueError(f"boxes.csv must have the columns {', '.join(COLUMNS)}, got none named {missing[0]} "
                         f"({folder}). Add it to the first line.")
    names = [split] if split else SPLITS[role]
    there = sorted({row["split"] for row in rows})
    split = next((name for name in names if name in there), None)
    if split is None:
        raise FileNotFoundError(f"split must be one of {there}, got '{names[0]}' ({folder / 'boxes.csv'}).")
    problems = Problems(f"{folder.name} {split}")
    classes = _class_names(folder / "classes.txt")
    readable = list(_images(folder, [row for row in rows if row["split"] == split], classes, problems))
    label_of = {name: label for label, name in enumerate(classes)}
    records, _ = voc_xml.records(readable, label_of, _without_clicks, problems)
    problems.close(on_invalid)
    return Dataset(problems.name, "table", classes, tuple(range(len(classes))), records)


def _class_names(file: Path) -> tuple[str, ...]:
    """Lines are: n01644900 <tab> tailed frog, bell toad, ribbed toad."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    return tuple(name if names.count(name) == 1 else line.split("\t")[0] for name, line in zip(names, lines))


def _images(folder: Path, rows: Sequence[dict[str, str]], classes: Sequence[str], problems: Problems
            ) -> Iterator[tuple[ImageRecord, voc_xml.Tree]]:
    """The images that can be used, still without annotations."""
    table, files = folder / "boxes.csv", {}
    for row in rows:
        files.setdefault(row["file"], []).append(row)
    for name, own in files.items():
        labels = {row["label"] for row in own}
        label = int(own[0]["label"]) if own[0]["label"].isdecimal() else len(classes)
        if len(labels) > 1 or label >= len(classes):
            problems.add(table, name, None, "label", ", ".join(sorted(labels)),
                         f"must be one of 0 to {len(classes) - 1}, the same in all lines of a file (correct it)")
            continue
        try:
            size = read_size(folder / "images" / name)
        except ImageError as error:
            problems.add(table, name, None, "file", name, f"must be an image in images/ ({error})")
            continue
        things = tuple(voc_xml.Thing(classes[label], False, tuple(row[key] or "" for key in CORNERS)) for row in own)
        yield ImageRecord(name, folder / "images" / name, *size, label=label), voc_xml.Tree(table, things=things)
