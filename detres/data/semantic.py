"""Data sets for semantic segmentation: a label map for each image, whatever the format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from detres.config import SourceConfig
from detres.data import cityscapes, panoptic, voc
from detres.data.dataset import Dataset, ImageRecord, Role, load_dataset
from detres.data.images import ImageError, read_size
from detres.data.index import ImageFiles
from detres.data.label_maps import MAX_CLASSES, InstanceMasks, LabelImage
from detres.data.problems import OnInvalid, Problems

BACKGROUND = "background"


def load_semantic(source: SourceConfig, role: Role, on_invalid: OnInvalid = "error") -> Dataset:
    """Read a data set for semantic segmentation; each record has a `label_map`. The format is recognised from the path.

    - VOC: a folder with `SegmentationClass/` and `ImageSets/Segmentation/`, or a VOCdevkit above it. Classes are
      those of `classes.txt` in the folder, a name a line from label 0 on; else "background" and VOC's 20.
    - COCO's panoptic format: a JSON file with "panoptic" in its name, `source.split` with it ("panoptic_train2017"), or
      a folder that has no other. Classes are all categories, things first.
    - Cityscapes: the 19 classes that are evaluated.
    - Anything else that `load_dataset` reads, with a mask for each object. Classes are "background" and its own.

    Category ids are the labels. Raises as `load_dataset`.
    """
    path = Path(source.path).expanduser()
    if roots := [path] * is_root(path) or voc.find_roots(path, is_root):
        dataset = _read_voc(roots, role, source.split, source.images, on_invalid)
    elif root := cityscapes.find_root(path):
        dataset = cityscapes.read_cityscapes(root, role, source.split, source.images, on_invalid, semantic=True)
    elif panoptic.is_source(path, role, source.split):
        dataset = panoptic.load_panoptic(source, role, on_invalid)
        classes = (*dataset.classes, *dataset.semantic_classes[1:])
        table = tuple(range(len(classes)))
        records = dataset.records.mapped(
            lambda record: replace(record, annotations=(), label_map=replace(record.label_map, table=table)))
        dataset = replace(dataset, classes=classes, records=records, semantic_classes=(), semantic_ids=())
    else:
        dataset = _of_instances(load_dataset(source, role, on_invalid))
    if len(dataset.classes) > MAX_CLASSES:
        raise ValueError(f"classes of semantic segmentation must be at most {MAX_CLASSES}, got {len(dataset.classes)} "
                         f"({dataset.name}).")
    return replace(dataset, category_ids=tuple(range(len(dataset.classes))))


def _of_instances(dataset: Dataset) -> Dataset:
    if bare := dataset.records.without_masks():
        raise ValueError(f"annotations must have a segmentation for semantic segmentation, got {bare} "
                         f"({dataset.name}, {dataset.format}). Give data with polygons, RLE or label maps; "
                         "boxes alone train a detector.")
    if BACKGROUND in dataset.classes:
        raise ValueError(f"classes of objects must not be called {BACKGROUND}, which is the class of pixels of no "
                         f"object, got {', '.join(dataset.classes)} ({dataset.name}). Rename it.")
    label_map = InstanceMasks(tuple(range(len(dataset.classes) + 1)))
    records = dataset.records.mapped(lambda record: replace(record, label_map=label_map))
    return replace(dataset, classes=(BACKGROUND, *dataset.classes), records=records)


# PASCAL VOC


def is_root(folder: Path) -> bool:
    return (folder / "SegmentationClass").is_dir() and (folder / "ImageSets" / "Segmentation").is_dir()


def _read_voc(roots: Sequence[Path], role: str, split: str | None, images: str | None,
              on_invalid: OnInvalid) -> Dataset:
    """The data set of an image set, `ImageSets/Segmentation/<split>.txt`, with years as in `voc.read_voc`.

    Maps of an image set with "aug" in its name, as of the 10,582 images of Hariharan et al. 2011, are in
    `SegmentationClassAug/`.
    """
    parts = voc.image_sets(roots, role, split, "Segmentation")
    names = {root: _classes(root) for root, _ in parts}
    classes = names[parts[0][0]]
    if other := [root for root in names if names[root] != classes]:
        raise ValueError(f"joined image sets must have the same classes, got others in {other[0]} than in "
                         f"{parts[0][0]}. Give both the same classes.txt.")
    problems = Problems("+".join(f"{root.name} {file.stem}" for root, file in parts))
    table, seen = tuple(range(len(classes))), set()
    records = [record for root, file in parts for record in _records(root, file, images, table, seen, problems)]
    problems.close(on_invalid)
    return Dataset(problems.name, "voc", classes, table, tuple(records))


def _classes(root: Path) -> tuple[str, ...]:
    file = root / "classes.txt"
    if not file.is_file():
        return (BACKGROUND, *voc.VOC_CLASSES)
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise ValueError(f"classes.txt must have a distinct name a line, got {json.dumps(names)} ({file}). Correct it.")
    return names


def _records(root: Path, image_set: Path, images: str | None, table: tuple[int, ...], seen: set[str],
             problems: Problems) -> Iterator[ImageRecord]:
    """`seen`: ids of all lists so far."""
    folder = Path(images).expanduser() if images else root / "JPEGImages"
    maps = root / ("SegmentationClassAug" if "aug" in image_set.stem else "SegmentationClass")
    files = {path.stem: path for path in voc.image_files(folder, image_set).values()}
    exists = ImageFiles()
    for image_id in voc.image_ids(image_set):
        label_map = maps / f"{image_id}.png"
        if image_id in seen:
            problems.add(image_set, image_id, None, "image id", image_id, "must be listed once (delete the line)")
        elif image_id not in files:
            problems.add(image_set, image_id, None, "image", image_id,
                         f"must be an image file (in {folder}: add it, or delete the line)")
        elif not exists(label_map):
            problems.add(image_set, image_id, None, "label map", label_map.name,
                         f"must be a PNG file (in {maps}: add it, or delete the line)")
        else:
            try:
                yield ImageRecord(image_id, files[image_id], *read_size(files[image_id]),
                                  label_map=LabelImage(table, label_map))
            except ImageError as error:
                problems.add(files[image_id], image_id, None, "image", str(error), "must be readable (replace it)")
        seen.add(image_id)


def align_semantic(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """The data set with its labels renumbered to the classes of a model, matched by name. Raises ValueError for classes
    that the model does not know."""
    if dataset.classes == tuple(classes):
        return dataset
    label_of = {name: label for label, name in enumerate(classes)}
    if missing := [name for name in dataset.classes if name not in label_of]:
        raise ValueError(f"classes of the data set must be known to the weights, got {', '.join(missing)} in "
                         f"'{dataset.name}'. The weights know {', '.join(classes)}: evaluate on data with these names.")
    labels = [label_of[name] for name in dataset.classes]
    return replace(dataset, classes=tuple(classes), category_ids=tuple(range(len(classes))),
                   records=dataset.records.mapped(
                       lambda record: replace(record, label_map=record.label_map.renumbered(labels))))
