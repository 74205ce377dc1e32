"""What is converted: the splits of a data set with one list of classes, and the images where they go."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image

from detres.config import SourceConfig
from detres.data import coco, panoptic
from detres.data.convert.lost import Losses
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import IMAGE_SUFFIXES, read_file
from detres.data.kinds import KINDS, severity
from detres.data.label_maps import IGNORED, read_values
from detres.data.masks import run_code
from detres.data.problems import OnInvalid, Problems
from detres.data.semantic import load_semantic
from detres.data.splits import Split, find_splits

# LVIS says of an image which classes it is known not to have, and of which it has objects that are not labelled. In
# memory these are labels, not ids.
LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
_PREFIX = re.compile(r"^(instances|panoptic|person_keypoints|lvis(_v[\d.]+)?)_|^_annotations\.?")


@dataclass(frozen=True)
class Part:
    """A split. `semantic` has label maps of the same images, in the same order."""

    name: str
    dataset: Dataset
    semantic: Dataset | None = None

    def with_records(self, records: Iterable[ImageRecord], keep: Sequence[int] | None = None) -> Part:
        """`keep`: where the records were, if there are fewer."""
        semantic = self.semantic and (self.semantic if keep is None else replace(
            self.semantic, records=tuple(self.semantic.records[i] for i in keep)))
        return replace(self, dataset=replace(self.dataset, records=tuple(records)), semantic=semantic)

    def objects(self) -> Iterable[tuple[ImageRecord, Annotation]]:
        return ((record, item) for record in self.dataset.records for item in record.annotations)


def load_parts(path: str | Path, losses: Losses, images: str | None = None, semantic: str | None = None,
               on_invalid: OnInvalid = "error") -> list[Part]:
    """The splits at a path, of instances or of COCO's panoptic format. `semantic`: a data set with label maps of the
    same images, matched by the names of their files. What is dropped as invalid is counted in `losses`. Raises as
    `load_dataset`, and ValueError for images without a map.
    """
    local = Path(path).expanduser()
    if local.exists() and panoptic.is_source(local, "train", None):
        files = [local] if local.is_file() else coco.json_files(local)
        return [_panoptic(file, images, on_invalid) for file in files]
    splits = find_splits(path, images)
    parts = [Part(_name(split.name, len(splits)), _loaded(split, losses, on_invalid)) for split in splits]
    return [_with_semantic(part, split, semantic, on_invalid) for part, split in zip(parts, splits)]


def _name(name: str, count: int) -> str:
    """Of a split, without what the format puts before it; a single one that says nothing trains."""
    name = re.sub(r"[\s/]+", "_", _PREFIX.sub("", name).strip()) or "train"
    return name if coco.role_of(name) or count > 1 else "train"


def _panoptic(file: Path, images: str | None, on_invalid: OnInvalid) -> Part:
    source = SourceConfig(path=str(file), images=images)
    return Part(_name(file.stem, 1), panoptic.load_panoptic(source, "train", on_invalid),
                load_semantic(source, "train", on_invalid))


def _with_semantic(part: Part, split: Split, path: str | None, on_invalid: OnInvalid) -> Part:
    if path is None:
        return part
    source = SourceConfig(path=path, split=None if Path(path).is_file() else split.source.split)
    found = load_semantic(source, split.role, on_invalid)
    by_stem = {record.path.stem: record for record in found.records}
    if missing := [record for record in part.dataset.records if record.path.stem not in by_stem]:
        raise ValueError(f"each image must have a label map, got none for {len(missing)}, such as {missing[0].path} "
                         f"({path}). Add them, or convert without --semantic.")
    records = tuple(by_stem[record.path.stem] for record in part.dataset.records)
    return replace(part, semantic=replace(found, records=records))


def _loaded(split: Split, losses: Losses, on_invalid: OnInvalid) -> Dataset:
    """With LVIS' lists of ids as labels, and masks from VOC's PNG files."""
    problems = Problems(split.name, split.source.path)
    dataset = split.load(problems, keep_extra=True)
    problems.close(on_invalid)
    for kind, count in Counter(problem.kind for problem in problems.found).items():
        losses.lose(f"invalid, left out: {{}} ({KINDS[kind].title})", count if severity(kind) == "error" else 0)
    if dataset.format == "lvis":
        label_of = {number: label for label, number in enumerate(dataset.category_ids)}
        return replace(dataset, records=dataset.records.mapped(lambda record: _with_labels(record, label_of)))
    folder = Path(split.source.path).expanduser() / "SegmentationObject"
    if dataset.format == "voc" and folder.is_dir():
        return replace(dataset, records=dataset.records.mapped(lambda record: _with_masks(record, folder)))
    return dataset


def _with_labels(record: ImageRecord, label_of: dict[int, int]) -> ImageRecord:
    lists = {key: [label_of[number] for number in record.extra[key] if number in label_of] for key in LVIS_LISTS
             if record.extra and key in record.extra}
    return replace(record, extra=record.extra | lists) if lists else record


def _with_masks(record: ImageRecord, folder: Path) -> ImageRecord:
    """Of SegmentationObject, where there is a PNG: the number of a pixel is the place of its object in the XML file."""
    file = folder / f"{record.id}.png"
    if not file.is_file():
        return record
    values = read_values(file)
    most = values[values < IGNORED].max(initial=0)
    if values.shape != (record.height, record.width) or most > len(record.annotations):
        raise ValueError(f"{file} must have the size of its image and numbers of at most its {len(record.annotations)} "
                         "objects. Correct it, or take the PNG files away.")

    def masked(number: int, item: Annotation) -> Annotation:
        inside = values == number
        if not inside.any():
            return item
        code = run_code(inside, 0, 0, record.height, record.width)
        return replace(item, segmentation=code, area=float(inside.sum()))

    items = tuple(masked(number, item) for number, item in enumerate(record.annotations, 1))
    return replace(record, annotations=items)


def entries_with_more(parts: Sequence[Part], kept: Sequence[str] = ()) -> int:
    """Of a file of COCO or VOC: those with keys that detres does not use, but for the `kept` ones of objects."""
    records = sum(bool(record.extra) for part in parts for record in part.dataset.records)
    items = sum(bool(item.extra and item.extra.keys() - {*kept}) for part in parts for _, item in part.objects())
    extra = parts[0].dataset.extra or {}
    return records + items + len(extra.keys() - {"categories"}) + sum(map(bool, extra.get("categories", ())))


# Images


ImageMode = Literal["reference", "link", "copy"]


@dataclass
class Images:
    """Puts images into a new data set. `reference`: formats that can name a file anywhere do, others get links."""

    out: Path
    mode: ImageMode = "reference"
    used: set[str] = field(default_factory=set)  # places taken, without suffix
    renamed: int = 0

    def place(self, record: ImageRecord, folder: str, stem: str | None = None, named: bool = False) -> str:
        """The name of the image: below `folder`, or, where the format takes any (`named`), the absolute path."""
        on_disk = isinstance(record.path, Path)  # or in a shard, which only copying takes it out of
        if named and self.mode == "reference" and on_disk:
            return str(_absolute(record.path))
        name = self.free(folder, stem or record.path.stem) + _suffix(record)
        target = self.out / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not on_disk:
            target.write_bytes(read_file(record.path))
        elif self.mode == "copy":
            shutil.copyfile(record.path, target)
        else:
            target.symlink_to(_absolute(record.path))
        return name

    def free(self, folder: str, stem: str) -> str:
        """`stem`, or with a number if an image is called so already (in another folder, or of another kind)."""
        name, number = stem, 1
        while f"{folder}/{name}".lower() in self.used:
            number += 1
            name = f"{stem}_{number}"
        self.renamed += name != stem
        self.used.add(f"{folder}/{name}".lower())
        return name


def _suffix(record: ImageRecord) -> str:
    """One by which readers know an image: that of the name, else of the content."""
    if record.path.suffix.lower() in IMAGE_SUFFIXES:
        return record.path.suffix
    with Image.open(BytesIO(read_file(record.path))) as image:
        return ".jpeg" if image.format == "MPO" else f".{image.format.lower()}"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # not what a link points to, whose name may be another
