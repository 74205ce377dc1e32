"""PASCAL VOC XML: VOCdevkit's layout, image sets, difficult objects.

VOC counts pixels from 1 and its box includes the last one, so (xmin, ymin, xmax, ymax) becomes the continuous box
(xmin - 1, ymin - 1, xmax, ymax): exactly undone by adding 1 to the first two.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from detres.data import loose, voc_xml
from detres.data.dataset import SPLITS, Dataset, ImageRecord
from detres.data.images import IMAGE_SUFFIXES
from detres.data.problems import OnInvalid, Problems

log = logging.getLogger("detres")

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


def is_root(folder: Path) -> bool:
    return os.path.isdir(folder / "Annotations") and os.path.isdir(folder / "ImageSets" / "Main")


def find_roots(folder: Path, is_root: Callable[[Path], bool] = is_root) -> list[Path]:
    """Data sets in a folder: in a VOCdevkit, one for each year."""
    return [path for path in sorted([*folder.glob("*/"), *folder.glob("VOCdevkit/*/")]) if is_root(path)]


def read_voc(roots: Sequence[Path], role: str, split: str | None = None, images: str | None = None,
             on_invalid: OnInvalid = "error", keep_extra: bool = False) -> Dataset:
    """The data set of an image set, `ImageSets/Main/<split>.txt`.

    In a VOCdevkit of several years, `split` names them: '2007_trainval', or '2007_trainval+2012_trainval' for the
    union that the literature trains on (07+12; with '+2007_test' it is 07++12). Classes are VOC's 20 in their usual
    order if all names are among them, else the names in all XML files, sorted: the same for every image set. Category
    ids are the labels.
    Difficult objects are kept for evaluation and do not train, as in py-faster-rcnn. Raises as `load_dataset`.
    An image set `test` of which no image has an XML file is VOC 2012's, whose annotations are not public: unless it is
    to be trained on, its images are there, without objects.
    """
    parts = image_sets(roots, role, split)
    problems = Problems("+".join(f"{root.name} {file.stem}" for root, file in parts))
    trees = {root: {file.stem: voc_xml.parse(file) for file in sorted((root / "Annotations").glob("*.xml"))}
             for root in dict.fromkeys(root for root, _ in parts)}
    classes = _classes(tree for root in trees.values() for tree in root.values())
    readable: list[tuple[ImageRecord, voc_xml.Tree]] = []
    seen: set[str] = set()
    for root, file in parts:
        folder = Path(images).expanduser() if images else root / "JPEGImages"
        own, listed = trees[root], list(image_ids(file))
        if role != "train" and file.stem == "test" and own.keys().isdisjoint(listed):
            log.warning("%s test: without annotations, so detections can be saved but not measured", root.name)
            own = {image_id: voc_xml.Tree(root / f"Annotations/{image_id}.xml") for image_id in listed}
        if not folder.is_dir():
            problems.add(file, None, None, "images", str(folder), "must be a folder (give it as data.*.images)",
                         "images_nowhere")
        readable += _readable(file, folder, root / "Annotations", own, seen, problems)
    label_of = {name: label for label, name in enumerate(classes)}
    records, locate = voc_xml.records(readable, label_of, _continuous, problems, keep_extra)
    dataset = Dataset(problems.name, "voc", classes, tuple(range(len(classes))), records)
    problems.located.append((dataset, locate))
    problems.close(on_invalid)
    return dataset


def _classes(trees: Iterable[voc_xml.Tree | str]) -> tuple[str, ...]:
    names = {thing.name for tree in trees if isinstance(tree, voc_xml.Tree) for thing in tree.things if thing.name}
    return VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))


def find_loose(folder: Path) -> list[Path]:
    """The XML files in a folder and those below, if the first is VOC's."""
    first = next(folder.rglob("*.xml"), None) if folder.is_dir() else None
    if first is None or not re.search(rb"<annotation[\s>]", first.read_bytes()[:2048]):
        return []
    return sorted(folder.rglob("*.xml"))


def read_loose(files: Sequence[Path], role: str, split: str | None = None, images: str | None = None,
               on_invalid: OnInvalid = "error") -> Dataset:
    """XML files without image sets, those of a split in a folder that is called so: train/, valid/ ...; else all.

    Images are anywhere below the folder that has them all, or in `images`; ids are the XML files' names without the
    suffix, seen from that folder. Otherwise as `read_voc`.
    """
    root = loose.common_folder(files)
    trees = {file: voc_xml.parse(file) for file in files}
    classes, problems = _classes(trees.values()), Problems("+".join(filter(None, (root.name, split))))
    # Images may be in a folder beside the XML files.
    above = root.parent if root.name.lower() in ("annotations", "xml", "xmls", "labels") else root
    finder = loose.ImageFinder(Path(images).expanduser() if images else above)
    readable: list[tuple[ImageRecord, voc_xml.Tree]] = []
    for file in loose.select(files, root, role, split):
        tree, image_id = trees[file], file.relative_to(root).with_suffix("").as_posix()
        if isinstance(tree, str):
            problems.add(file, image_id, None, "file", tree, "must be an XML file (correct or delete it)", "bad_xml")
            continue
        if (path := finder.find(file, tree.filename)) is None:  # its objects are checked all the same
            problems.add(file, image_id, None, "filename", tree.filename, f"must be an image file (in {finder.folder}: "
                         "add it, or give the folder as data.*.images)", "image_missing")
        if size := voc_xml.size_of(tree, path, image_id, problems):
            path = path or finder.folder / (tree.filename or image_id)
            readable.append((ImageRecord(image_id, path, *size), tree))
    label_of = {name: label for label, name in enumerate(classes)}
    records, locate = voc_xml.records(readable, label_of, _continuous, problems)
    dataset = Dataset(problems.name, "voc", classes, tuple(range(len(classes))), records)
    problems.located.append((dataset, locate))
    problems.close(on_invalid)
    return dataset


def _continuous(corners: voc_xml.Box) -> voc_xml.Box | None:
    x1, y1, x2, y2 = corners
    if x1 == x2 or y1 == y2:  # a pixel wide by VOC's count, but in practice a stray click
        return None
    return [x1 - 1, y1 - 1, x2, y2]


def image_sets(roots: Sequence[Path], role: str, split: str | None, task: str = "Main") -> list[tuple[Path, Path]]:
    """Root and list file of each part of the split. `task` is the folder of the lists."""
    return [_image_set(roots, [name] if name else SPLITS[role], task)
            for name in (split.split("+") if split else [None])]


def _image_set(roots: Sequence[Path], names: Sequence[str], task: str) -> tuple[Path, Path]:
    year = re.fullmatch(r"(\d{4})_(.+)", names[0])
    if year:
        roots, names = [root for root in roots if root.name.endswith(year[1])], [year[2]]
    if len(roots) != 1:
        raise FileNotFoundError(f"VOC data set must be of one year, got {[str(root) for root in roots]} for "
                                f"'{names[0]}'. Give its folder as path, or the year in the split, as in '2007_train'.")
    folder = roots[0] / "ImageSets" / task
    for name in names:
        if (folder / f"{name}.txt").is_file():
            return roots[0], folder / f"{name}.txt"
    there = sorted(file.stem for file in folder.glob("*.txt") if "_" not in file.stem)
    if len(there) == 1 and len(names) > 1 and not any(there[0] in own for own in SPLITS.values()):
        return roots[0], folder / f"{there[0]}.txt"  # one for everything, such as CVAT's default.txt
    raise FileNotFoundError(f"VOC image set must be one of {there}, got '{names[0]}' ({folder}). Give it as split.")


def _readable(image_set: Path, folder: Path, xml_folder: Path, trees: dict[str, voc_xml.Tree | str],
              seen: set[str], problems: Problems) -> Iterator[tuple[ImageRecord, voc_xml.Tree]]:
    """The images of a list file that can be used, still without annotations. `seen`: ids of all lists so far."""
    there = folder.is_dir()
    images = image_files(folder, image_set) if there else {}
    stems = {path.stem: path for path in images.values()}
    for image_id in image_ids(image_set):
        tree = trees.get(image_id, "no such file")
        if image_id in seen:
            problems.add(image_set, image_id, None, "image id", image_id, "must be listed once (delete the line)",
                         "duplicate_image")
        elif isinstance(tree, str):
            problems.add(xml_folder / f"{image_id}.xml", image_id, None, "file", tree,
                         f"must be an XML file (correct it, or take the image out of {image_set.name})", "bad_xml")
        else:
            path = stems.get(image_id) or images.get(tree.filename)
            if path is None and there:  # its objects are checked all the same; `load_dataset` takes it out
                problems.add(tree.file, image_id, None, "filename", tree.filename,
                             f"must be an image file (in {folder})", "image_missing")
            if size := voc_xml.size_of(tree, path, image_id, problems):
                yield ImageRecord(image_id, path or folder / (tree.filename or image_id), *size), tree
        seen.add(image_id)


def image_files(folder: Path, image_set: Path) -> dict[str, Path]:
    """The images of a folder by file name. Raises FileNotFoundError if there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder must exist, got {folder} (for {image_set}). Give it as data.*.images.")
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}


def image_ids(image_set: Path) -> Iterator[str]:
    """A line is an image id; in lists for one class a flag follows: -1 for images without it."""
    for line in image_set.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if words and words[1:] != ["-1"]:
            yield words[0]
