"""A data set in memory: which images there are and what is annotated in them, whatever format it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detres.config import SourceConfig
from detres.data.label_maps import LabelMap
from detres.data.masks import PNGSegment
from detres.data.problems import InvalidDataError, OnInvalid, Problem, Problems, source_words

if TYPE_CHECKING:
    from detres.data.records import Records

__all__ = ["Annotation", "Dataset", "ImageRecord", "InvalidDataError", "Problem", "Role", "load_dataset"]

Role = Literal["train", "val", "test"]

# Names that splits go by, per role.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object.

    `box` is xyxy in continuous 0-based pixels of the image as a viewer shows it, as annotated: it may reach past the
    image (training clips it). `segmentation` is COCO's: polygons, each a flat sequence x1, y1, x2, y2 ... (the readers
    give `array('d')`: an eighth of the memory, and worker processes do not copy it), an RLE dict, or a segment of a
    PNG. `keypoints` are the file's: x, y, visibility for each of the data set's J names. `crowd` (COCO) and `difficult`
    (VOC) objects do not train; evaluation handles them as its protocol says. `size` is width and height as a file gives
    them, from which x2 - x1 and y2 - y1 may differ in the last bit; None where it gives corners.
    """

    id: int
    label: int
    box: tuple[float, float, float, float]
    segmentation: list[Sequence[float]] | dict[str, Any] | PNGSegment | None = None
    keypoints: tuple[float, ...] | None = None
    area: float = 0.0
    crowd: bool = False
    difficult: bool = False
    size: tuple[float, float] | None = None
    extra: dict[str, Any] | None = None  # what else the file says, only if asked for: for conversion without loss

    @property
    def bbox(self) -> list[float]:
        """x, y, width, height, as COCO has them; the sides with the bits of the file."""
        x1, y1, x2, y2 = self.box
        return [x1, y1, *(self.size or (x2 - x1, y2 - y1))]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image. The size is as annotated, in pixels; the loader checks it against the file."""

    id: int | str
    path: Path
    height: int
    width: int
    annotations: tuple[Annotation, ...] = ()
    label: int | None = None  # class of the image as a whole, in data sets for localization
    label_map: LabelMap | None = None  # class of each pixel, in data sets for segmentation
    extra: dict[str, Any] | None = None  # as of an annotation


@dataclass(frozen=True)
class Dataset:
    """`classes[label]` and `category_ids[label]` are name and original id of a label 0..K-1. Records given as a tuple
    are packed (`data.records`)."""

    name: str
    format: Literal["coco", "lvis", "voc", "yolo", "ilsvrc", "table", "panoptic", "cityscapes", "labelme", "cvat",
                    "openimages"]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Records
    keypoint_names: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()  # keypoints that a mirror swaps: left and right
    blacklist: tuple[tuple[int | str, str], ...] = ()  # image id and class: not counted (evaluation.ilsvrc)
    skeleton: tuple[tuple[int, int], ...] = ()  # keypoints that a line joins in pictures
    keypoint_classes: tuple[str, ...] = ()  # those whose objects have keypoints
    keypoint_offset: float = 0.0  # what was added to the file's
    semantic_classes: tuple[str, ...] = ()  # of panoptic data: "things", then each kind of stuff
    semantic_ids: tuple[int, ...] = ()  # their original ids, 0 for "things"
    extra: dict[str, Any] | None = None  # as of an annotation: sections of the file, and "categories", one for each

    def __post_init__(self) -> None:
        from detres.data.records import Records  # it imports this module

        if not isinstance(self.records, Records):
            object.__setattr__(self, "records", Records.of(self.records))

    def moved_keypoints(self, offset: float) -> Dataset:
        """With `offset` added to x and y of all keypoints that are labelled."""
        def moved(item: Annotation) -> Annotation:
            points = item.keypoints and tuple(value + offset if i % 3 < 2 and item.keypoints[i // 3 * 3 + 2] else value
                                              for i, value in enumerate(item.keypoints))
            return replace(item, keypoints=points)

        def changed(record: ImageRecord) -> ImageRecord:
            return replace(record, annotations=tuple(map(moved, record.annotations)))

        return self if not offset else replace(self, records=self.records.mapped(changed), keypoint_offset=offset)


def one_class(dataset: Dataset) -> Dataset:
    """The data set with all its objects in one class, "object"."""
    def relabelled(record: ImageRecord) -> ImageRecord:
        return replace(record, annotations=tuple(replace(item, label=0) for item in record.annotations))

    return replace(dataset, classes=("object",), category_ids=(1,), records=dataset.records.mapped(relabelled),
                   blacklist=())


def load_dataset(source: SourceConfig, role: Role, on_invalid: OnInvalid = "error", *,
                 keep_extra: bool = False) -> Dataset:
    """Read a data set; the format is recognised from what is at the path: `formats.FORMATS` has them all.

    `source.split` names the image set; without it, the role does. 'a+b' is the union of two in COCO, VOC and ILSVRC.
    `keep_extra` fills the fields `extra` of COCO, LVIS and VOC.

    Raises:
        FileNotFoundError: nothing at the path, or nothing there that is a data set or that split.
        InvalidDataError: entries that cannot be used, all of them listed; with on_invalid='drop' they are left out,
            and the log says how many of what.
        ValueError: an annotation file that is no annotation file.
    """
    problems = Problems(source.path, source_words(source.path, source.images))
    dataset = read_all(source, role, problems, keep_extra)
    problems.name = dataset.name
    problems.close(on_invalid)
    return without_images(dataset, problems.images("image_missing"))


def without_images(dataset: Dataset, ids: set[int | str | None]) -> Dataset:
    if not ids:
        return dataset
    kept = [row for row, image_id in enumerate(dataset.records.ids()) if image_id not in ids]
    return replace(dataset, records=dataset.records.take(kept))


def read_all(source: SourceConfig, role: Role, problems: Problems, keep_extra: bool = False) -> Dataset:
    """What can be used of a data set, and besides it the images without a file, for the checks; what is wrong with it
    is added to `problems`. Raises FileNotFoundError and ValueError as `load_dataset`."""
    from detres.data.formats import recognise  # it imports the readers, which import this module

    format, found = recognise(source.path)
    for field in ("split", "images"):
        if field not in format.uses and (value := getattr(source, field)) is not None:
            raise ValueError(f"{field} must be null for {source.path}, which says it itself, got {value!r}. "
                             "Take it out.")
    return format.read(found, source, role, problems, keep_extra)
