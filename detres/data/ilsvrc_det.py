"""ILSVRC's object detection task (DET, the same images from 2014 on): 200 classes, annotations in VOC's XML.

    ILSVRC/Annotations/DET/val/ILSVRC2012_val_00000001.xml       Annotations/DET/train/ILSVRC2013_train/n02672831/...
    ILSVRC/Data/DET/val/ILSVRC2012_val_00000001.JPEG             Data/DET/train/ILSVRC2014_train_0000/...
    ILSVRC/ImageSets/DET/{train,val,test,val1,val2}.txt          devkit/data/ILSVRC2015_det_validation_blacklist.txt

Boxes count pixels from 0 and include the last one: 0..499 in an image of 500, so (xmin, ymin, xmax, ymax) becomes the
continuous box (xmin, ymin, xmax + 1, ymax + 1), as wide as the kit's own evaluation has it (eval_detection.m).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from detres.data import voc_xml
from detres.data.dataset import SPLITS, Dataset, ImageRecord
from detres.data.ilsvrc_classes import DET_CLASSES
from detres.data.problems import OnInvalid, Problems

log = logging.getLogger("detres")

HALVES = {"val1": 0, "val2": 1}


def is_root(folder: Path) -> bool:
    return (folder / "ImageSets" / "DET").is_dir() and (folder / "Data" / "DET").is_dir()


def read_ilsvrc_det(root: Path, role: str, split: str | None = None, on_invalid: OnInvalid = "error") -> Dataset:
    """The data set of an image set, or of a union: 'train+val1' is what the literature trains on, and val2 tests on.

    val1 and val2 are R-CNN's halves of val if `ImageSets/DET/val1.txt` and `val2.txt` are there (its repository has
    them, in data/splits/ilsvrc13); else every other line of val.txt, which is another split: the log says so.
    Training images without an XML file are known to lack some class only, and are left out; those of val and test have
    no objects. Objects of other names than the 200 are passed over. Category ids are the kit's, 1 to 200.
    `blacklist` is the kit's, for images that the data set has. Raises as `load_dataset`.
    """
    names = split.split("+") if split else [SPLITS[role][0]]
    problems = Problems(f"ILSVRC DET {'+'.join(names)}")
    readable = list(_readable(root, [image_id for name in names for image_id in _ids(root, name)], problems))
    label_of = {wnid: label for label, wnid in enumerate(DET_CLASSES)}
    records, _ = voc_xml.records(readable, label_of, _continuous, problems)
    problems.close(on_invalid)
    return Dataset(problems.name, "ilsvrc", tuple(DET_CLASSES.values()), tuple(range(1, 201)), records,
                   blacklist=_blacklist(root, {record.id for record in records}))


def _continuous(corners: voc_xml.Box) -> voc_xml.Box | None:
    x1, y1, x2, y2 = corners
    return [x1, y1, x2 + 1, y2 + 1]


def _ids(root: Path, name: str) -> list[str]:
    """The images of a list: the first word of each line."""
    folder = root / "ImageSets" / "DET"
    if (folder / f"{name}.txt").is_file():
        return _words(folder / f"{name}.txt", 0)
    if name in HALVES and (folder / "val.txt").is_file():
        log.warning("ILSVRC DET %s: every other image of val.txt, as there is no %s.txt. This is not R-CNN's split, "
                    "which published numbers are of: put its lists into %s to compare with them.", name, name, folder)
        return _words(folder / "val.txt", 0)[HALVES[name]::2]
    there = sorted(file.stem for file in folder.glob("*.txt") if not re.search(r"_\d+$", file.stem))
    raise FileNotFoundError(f"ILSVRC DET image set must be one of {there}, got '{name}' ({folder}). Give it as split.")


def _words(file: Path, column: int) -> list[str]:
    return [words[column] for line in file.read_text(encoding="utf-8").splitlines() if (words := line.split())]


def _readable(root: Path, image_ids: Sequence[str], problems: Problems) -> Iterator[tuple[ImageRecord, voc_xml.Tree]]:
    """The images that can be used, still without annotations."""
    seen: set[str] = set()
    others = left_out = 0
    for image_id in image_ids:
        folder = _folder(image_id)
        path, xml = root / f"Data/DET/{folder}/{image_id}.JPEG", root / f"Annotations/DET/{folder}/{image_id}.xml"
        tree = voc_xml.parse(xml) if xml.is_file() else voc_xml.Tree(xml)
        if image_id in seen:
            problems.add("ImageSets/DET", image_id, None, "image id", image_id, "must be listed once (delete the line)")
        elif folder == "train" and not xml.is_file():
            left_out += 1
        elif isinstance(tree, str):
            problems.add(xml, image_id, None, "file", tree, "must be an XML file (correct it, or delete the line)")
        elif not path.is_file():
            problems.add(xml, image_id, None, "image id", image_id, f"must have an image file ({path})")
        elif size := voc_xml.size_of(tree, path, image_id, problems):
            known = tuple(thing for thing in tree.things if thing.name in DET_CLASSES or not thing.name)
            others += len(tree.things) - len(known)
            yield ImageRecord(image_id, path, *size), replace(tree, things=known)
        seen.add(image_id)
    if others or left_out:
        log.info("%s: passed over %d objects of other classes; left out %d training images without annotations",
                 problems.name, others, left_out)


def _folder(image_id: str) -> str:
    """train, val or test: ids say it, such as ILSVRC2013_train/n02672831/n02672831_11478."""
    match = re.match(r"ILSVRC\d+_(train|val|test)", image_id)
    if match is None:
        raise ValueError(f"an image id of ILSVRC DET must begin as ILSVRC2012_val does, with train, val or test, got "
                         f"'{image_id}'. Write the lists in ImageSets/DET as the kit does.")
    return match[1]


def _blacklist(root: Path, image_ids: set[int | str]) -> tuple[tuple[str, str], ...]:
    """Images and class names that the evaluation leaves out. The kit's file numbers the images as val.txt does."""
    files = sorted(root.glob("devkit/data/*_det_validation_blacklist.txt"))
    val = root / "ImageSets" / "DET" / "val.txt"
    if not files or not val.is_file():
        return ()
    id_of = dict(zip(_words(val, 1), _words(val, 0)))
    pairs = [(id_of.get(number), wnid) for number, wnid in zip(_words(files[-1], 0), _words(files[-1], 1))]
    return tuple((image_id, DET_CLASSES[wnid]) for image_id, wnid in pairs if image_id in image_ids)
