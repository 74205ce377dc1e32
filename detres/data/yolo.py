"""YOLO txt: a text file of rows in fractions of the image for each image; which images and classes there are is in
`data.yaml`, or in darknet's `obj.data` and `obj.names`, or `classes.txt`, or shown by the folders alone.

A row is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon. An image without a text file has no objects.
"""

from __future__ import annotations

import itertools
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from detres.data import loose
from detres.data.dataset import SPLITS, Annotation, Dataset, ImageRecord
from detres.data.images import IMAGE_SUFFIXES, ImageError, read_size
from detres.data.masks import box_of, mask_area
from detres.data.problems import OnInvalid, Problems, segmentation_problem

log = logging.getLogger("detres")

NOMINAL = (1000, 1000)  # height and width of an image that cannot be read


def find_yaml(folder: Path) -> Path | None:
    """The description of a YOLO data set in a folder."""
    return next((file for name in ("data.yaml", "data.yml", "dataset.yaml") if (file := folder / name).is_file()), None)


def read_yolo(file: Path, role: str, split: str | None = None, on_invalid: OnInvalid = "error") -> Dataset:
    """The data set of a `data.yaml`: `names`, and `train`, `val`, `test` as folders or lists of images, under `path`.

    Boxes and polygons become pixels of the image; a polygon's box is its extent. Image ids are paths below the root.
    Raises as `load_dataset`.
    """
    content = parse(file)
    classes = _names(content, file)
    root = root_of(content, file)
    name = next((name for name in ([split] if split else SPLITS[role]) if content.get(name)), None)
    if name is None:
        raise FileNotFoundError(f"data set must have the split '{split or role}', got "
                                f"{sorted(map(str, set(content) - {'names', 'nc'}))} ({file}). Add it to the file.")
    listed = [image for entry in as_list(content[name]) for image in images_of(entry, root, file)]
    images = list(dict.fromkeys(listed))  # folders may overlap
    if images and not any(labels_of(image).is_file() for image in images):
        raise FileNotFoundError(f"labels must be beside the images, got none for {len(images)} images, such as "
                                f"{labels_of(images[0])} ({file}). Put them in labels/ where images are in images/.")
    return _dataset(f"{file.parent.name} {name}", classes, root, {image: labels_of(image) for image in images},
                    on_invalid)


def _dataset(name: str, classes: tuple[str, ...], root: Path, labels: Mapping[Path, Path],
             on_invalid: OnInvalid) -> Dataset:
    """`labels`: the text file of each image."""
    problems = Problems(name)
    reader = _Reader(problems, root, len(classes), labels)
    dataset = Dataset(name, "yolo", classes, tuple(range(len(classes))), reader.read(list(labels)))
    problems.located.append((dataset, reader.locate))
    problems.close(on_invalid)
    return dataset


def parse(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data set file must be YAML, got {reason} ({file}). Correct it.") from None
    if not isinstance(content, dict) or not content.get("names"):
        raise ValueError(f"YOLO data set file must have 'names', got {content!r:.200} ({file}). "
                         "Add the names of the classes.")
    if "kpt_shape" in content:
        raise ValueError(f"YOLO labels must be boxes or polygons, got kpt_shape={content['kpt_shape']} ({file}). "
                         "Convert keypoints to COCO JSON.")
    return content


def _names(content: dict[str, Any], file: Path) -> tuple[str, ...]:
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or set(names) != set(range(len(names))):
        raise ValueError(f"names must be a list, or numbered from 0 without gaps, got {names!r:.200} ({file}). "
                         "Correct it.")
    if content.get("nc", len(names)) != len(names):
        raise ValueError(f"nc must be the number of names, got {content['nc']} for {len(names)} names ({file}). "
                         "Delete nc.")
    return tuple(str(names[label]) for label in range(len(names)))


def root_of(content: dict[str, Any], file: Path) -> Path:
    """`path` is seen from the file, else from the working folder."""
    given = Path(str(content.get("path") or ".")).expanduser()
    for root in (file.parent / given, given):
        if os.path.isdir(root):
            return root
    raise FileNotFoundError(f"path must be a folder, got {given} (in {file}, seen from there and from {Path.cwd()}). "
                            "Correct it.")


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def images_of(entry: Any, root: Path, file: Path) -> list[Path]:
    """Image files of a folder, or of a text file that lists them."""
    entry = str(entry)
    # Exporters write ../train/images for what lies beside the file.
    for path in (root / entry, root / entry.removeprefix("../")):
        if os.path.isdir(path):
            return sorted(image for image in path.rglob("*") if image.suffix.lower() in IMAGE_SUFFIXES)
        if os.path.isfile(path):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            return [path.parent / line.strip() for line in lines if line.strip()]
    raise FileNotFoundError(f"images must be in a folder, or listed in a text file, got {entry} ({root / entry} does "
                            f"not exist; {file}). Correct it, or 'path'.")


def labels_of(image: Path) -> Path:
    """The text file of an image: images/ becomes labels/, the last one in the path."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


@dataclass(frozen=True)
class _Row:
    record: ImageRecord
    line: int
    label: int
    box: list[float]  # xyxy in pixels
    values: list[float]  # as written
    polygon: list[array] | None


@dataclass
class _Reader:
    problems: Problems
    root: Path
    classes: int
    labels: Mapping[Path, Path]
    rows: list[_Row] = field(default_factory=list)

    def read(self, images: list[Path]) -> tuple[ImageRecord, ...]:
        records = [self._record(image) for image in images]
        rows = [row for record in records for row in self._rows(record)]
        if self._wrong_layout(rows):
            return tuple(records)  # each box would be a problem of its own
        sizes = [(row.record.height, row.record.width) for row in rows]
        kept = self.problems.check_boxes([row.box for row in rows], sizes, lambda i, *problem: self._add(
            rows[i].record, rows[i].line, "box", rows[i].box, *problem))
        found: dict[int | str, list[Annotation]] = {record.id: [] for record in records}
        for number, (row, keep) in enumerate(zip(rows, kept), 1):
            if keep:
                found[row.record.id].append(_annotation(number, row))
        self.rows = rows
        return tuple(replace(record, annotations=tuple(found[record.id])) for record in records)

    def _wrong_layout(self, rows: list[_Row]) -> bool:
        boxes = [row for row in rows if row.polygon is None]
        values = [row.values for row in boxes] or [row.values[:4] for row in rows]
        return bool(rows and self.problems.check_layout(
            self.labels[rows[0].record.path].parent, "box", values, [(1.0, 1.0)] * len(values), "cxcywh"))

    def locate(self, annotation: Annotation) -> tuple[str, int, str]:
        """File, line and place there."""
        row = self.rows[annotation.id - 1]
        return str(self.labels[row.record.path]), row.line, f"line {row.line}"

    def _record(self, image: Path) -> ImageRecord:
        image_id = image.relative_to(self.root).as_posix() if image.is_relative_to(self.root) else image.as_posix()
        try:
            return ImageRecord(image_id, image, *read_size(image))
        except ImageError as error:
            self.problems.add(image, image_id, None, "image", str(error),
                              "must be readable (replace it, or delete it with its labels)", "image_missing")
            return ImageRecord(image_id, image, *NOMINAL)  # its labels are checked all the same

    def _rows(self, record: ImageRecord) -> Iterator[_Row]:
        """The rows of an image's text file that can be read."""
        labels = self.labels[record.path]
        lines = labels.read_text(encoding="utf-8", errors="replace").splitlines() if labels.is_file() else []
        for line, text in enumerate(lines, 1):
            if text.strip() and (row := self._row(record, line, text)) is not None:
                yield row

    def _row(self, record: ImageRecord, line: int, text: str) -> _Row | None:
        try:
            label, *values = (float(word) for word in text.split())
        except ValueError:
            return self._add(record, line, "row", text, "must be numbers (the class, then fractions of the image)",
                             "bad_row")
        if label not in range(self.classes):
            return self._add(record, line, "class", text.split()[0],
                             f"must be the number of one of the names (0 to {self.classes - 1})", "unknown_category")
        if len(values) == 4:
            x, y, w, h = (value * side for value, side in zip(values, (record.width, record.height) * 2))
            return _Row(record, line, int(label), [x - w / 2, y - h / 2, x + w / 2, y + h / 2], values, None)
        sides = itertools.cycle((record.width, record.height))
        polygon = array("d", (value * side for value, side in zip(values, sides)))
        if problem := segmentation_problem([polygon], record.height, record.width):
            return self._add(record, line, "polygon", text, *problem[1:])
        return _Row(record, line, int(label), list(box_of([polygon])), values, [polygon])

    def _add(self, record: ImageRecord, line: int, field: str, value: Any, reason: str,
             kind: str) -> None:
        self.problems.add(self.labels[record.path], record.id, line, field, value, reason, kind, f"line {line}")


def _annotation(number: int, row: _Row) -> Annotation:
    x1, y1, x2, y2 = row.box
    area = mask_area(row.polygon, row.record.height, row.record.width) if row.polygon else (x2 - x1) * (y2 - y1)
    return Annotation(number, row.label, (x1, y1, x2, y2), row.polygon, area=area)


# Without data.yaml

NAMES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "predefined_classes.txt")


@dataclass(frozen=True)
class Loose:
    """`lists` are darknet's, by the name of their split; none where text files simply lie in folders."""

    root: Path
    names: tuple[str, ...]
    files: tuple[Path, ...]  # text files of rows
    lists: dict[str, Path] = field(default_factory=dict)


def find_loose(folder: Path) -> Loose | None:
    """Text files of rows in a folder and those below, with the names of their classes if these are there, too.

    Recognised by darknet's `*.data`, by a file of names, or by labels/ beside images/.
    """
    if not folder.is_dir():
        return None
    content = next((_darknet(file) for file in sorted(folder.glob("*.data"))), {})
    names_file = _names_file(folder, content)
    if not names_file and not any(folder.glob("labels/")) and not any(folder.glob("*/labels/")):
        return None
    lists = {name: file for names in SPLITS.values() for name in names
             if name in content and (file := _seen_from(folder, content[name]))}
    reserved = {names_file, *lists.values()}
    files = [file for file in sorted(folder.rglob("*.txt")) if file not in reserved and file.name not in NAMES
             and _is_rows(file)]
    if not any(file.stat().st_size for file in files):
        return None
    names = _lines(names_file) if names_file else _numbered(files)
    return Loose(folder, tuple(names), tuple(files), lists)


def _darknet(file: Path) -> dict[str, str]:
    """Lines of `key = value`."""
    pairs = (line.partition("=") for line in _lines(file))
    return {key.strip(): value.strip() for key, _, value in pairs if value}


def _names_file(folder: Path, content: Mapping[str, str]) -> Path | None:
    if file := _seen_from(folder, content.get("names", "")):
        return file
    places = (place / name for name in NAMES for place in (folder, folder / "labels", *sorted(folder.glob("*/"))))
    return next((file for file in places if file.is_file()), None)


def _seen_from(folder: Path, entry: str) -> Path | None:
    """The file that a path means: darknet's are seen from where it runs, so the end of the path has to do."""
    parts = Path(entry).parts
    return next((file for start in range(len(parts)) if (file := folder.joinpath(*parts[start:])).is_file()), None)


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _is_rows(file: Path) -> bool:
    """Whether the first line may be a row; an image without objects has an empty file."""
    with open(file, encoding="utf-8", errors="replace") as stream:
        words = stream.readline(4096).split()
    try:
        return not words or len([float(word) for word in words]) >= 5
    except ValueError:
        return False


def _numbered(files: Sequence[Path]) -> list[str]:
    """Names for classes of which nothing but the number is known."""
    labels = [int(float(line.split()[0])) for file in files for line in _lines(file)
              if line.split()[0].replace(".", "").isdecimal()]
    log.warning("%s: without a file of class names, such as classes.txt, so classes are called by their numbers",
                loose.common_folder(files))
    return [str(label) for label in range(max(labels, default=0) + 1)]


def loose_splits(found: Loose) -> list[str]:
    return list(found.lists) or loose.splits(found.files, found.root)


def read_loose(found: Loose, role: str, split: str | None = None, images: str | None = None,
               on_invalid: OnInvalid = "error") -> Dataset:
    """The images of a darknet list; else of a folder that is called as a split; else all that are there.

    Images lie anywhere below, or in `images`. One without a text file has no objects; where images are elsewhere, those
    that have a text file are read. Raises as `load_dataset`.
    """
    finder = loose.ImageFinder(Path(images).expanduser() if images else found.root)
    if found.lists:
        name = next((name for name in ([split] if split else SPLITS[role]) if name in found.lists), None)
        if name is None:
            raise FileNotFoundError(f"split must be one of {sorted(found.lists)}, got '{split or role}' "
                                    f"({found.root}). Give it as data.*.split.")
        by_stem = {file.stem: file for file in found.files}
        wanted = [by_stem.get(Path(line).stem, Path(line).with_suffix(".txt")) for line in _lines(found.lists[name])]
    else:
        wanted = loose.select(found.files, found.root, role, split)
    labels = {image: file for file in wanted if (image := finder.find(file, file.name))}
    if not images and not found.lists:
        bare = [image for image in finder.all() if image not in labels and not labels_of(image).is_file()]
        labels |= {image: labels_of(image) for image in _of_split(bare, wanted, found)}
    if missing := [file for file in wanted if finder.find(file, file.name) is None]:
        raise FileNotFoundError(f"labels must have images, got none for {len(missing)}, such as {missing[0].name} (in "
                                f"{finder.folder}). Add them, or give their folder as data.*.images.")
    name = " ".join(filter(None, (found.root.name, split)))
    return _dataset(name, found.names, finder.folder, dict(sorted(labels.items())), on_invalid)


def _of_split(bare: list[Path], wanted: Sequence[Path], found: Loose) -> list[Path]:
    """Of images without a text file, those in the folders of the split."""
    own = {loose.split_of(file, found.root) for file in wanted}
    return [image for image in bare if loose.split_of(image, found.root) in own]
