"""Cityscapes, in files that are written here as its documentation says: there is no small part of it to test with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from detres.config import SourceConfig
from detres.data.check.run import check_data
from detres.data.cityscapes import LABELS, SEMANTIC, TABLE, THINGS, splits
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.semantic import load_semantic
from detres.data.splits import find_splits

OBJECTS = [
    {"label": "road", "polygon": [[0, 20], [63, 20], [63, 39], [0, 39]]},
    {"label": "car", "polygon": [[5, 10], [30, 10], [30, 30], [5, 30]]},  # partly hidden by the next but one
    {"label": "license plate", "polygon": [[6, 24], [9, 24], [9, 26], [6, 26]]},
    {"label": "person", "polygon": [[20, 5], [26, 5], [26, 35], [20, 35]]},
    {"label": "cargroup", "polygon": [[40, 10], [50, 10], [50, 16], [40, 16]]},
    {"label": "cargroup", "polygon": [[54, 10], [60, 10], [60, 16], [54, 16]]},
    {"label": "car", "polygon": [[45, 20], [70, 20], [70, 30], [45, 30]]},  # past the edge of the image
    {"label": "bicycle", "polygon": [[21, 6], [23, 6], [23, 8]], "deleted": 1},
    {"label": "caravan", "polygon": [[0, 0], [3, 0], [3, 3], [0, 3]]},
    {"label": "rider", "polygon": [[47, 22], [49, 22], [49, 24]]},  # hidden altogether
    {"label": "truck", "polygon": [[46, 21], [51, 21], [51, 25], [46, 25]]},
]
# What the official script does, for these: the value of *_instanceIds.png that each polygon is painted with.
IDS = [7, 26000, None, 24000, 26, 26, 26001, None, 29000, 25000, 27000]


def write(root, split="train", city="aachen", number=0, objects=OBJECTS, images=True):
    stem = f"{city}_{number:06d}_000019"
    folder, pictures = root / "gtFine" / split / city, root / "leftImg8bit" / split / city
    for path in (folder, pictures):
        path.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}_gtFine_polygons.json").write_text(json.dumps({"imgHeight": 40, "imgWidth": 64,
                                                                     "objects": objects}))
    if images:
        Image.new("RGB", (64, 40)).save(pictures / f"{stem}_leftImg8bit.png")
    return folder, stem


def official(objects=OBJECTS, ids=IDS):
    canvas = Image.new("I", (64, 40))
    for entry, number in zip(objects, ids):
        if number is not None:
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in entry["polygon"]], fill=number)
    return np.asarray(canvas)


def test_masks_are_those_of_the_official_images(tmp_path):
    write(tmp_path)
    dataset = load_dataset(SourceConfig(path=str(tmp_path)), "train")
    assert (dataset.format, dataset.classes, dataset.category_ids) == ("cityscapes", THINGS,
                                                                       (24, 25, 26, 27, 28, 31, 32, 33))
    [record], ids = dataset.records, official()
    found = {(dataset.classes[item.label], item.crowd, item.area): item for item in record.annotations}
    expected = {(name, number < 1000, float((ids == number).sum())): number for name, number in
                (("car", 26), ("person", 24000), ("car", 26000), ("car", 26001), ("truck", 27000))}
    assert found.keys() == expected.keys()
    for key, number in expected.items():
        inside = ids == number
        assert (coco_mask.decode(found[key].segmentation) == inside).all()
        rows, columns = np.nonzero(inside)
        assert found[key].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert [item.id for item in record.annotations] == [1, 2, 3, 4, 5]


def test_problems_of_labels_are_told_with_the_json_file(tmp_path):
    write(tmp_path, number=1, objects=[{"label": "car", "polygon": [[9, 9], [10, 10]]}])
    folder, stem = write(tmp_path, number=2, objects=[{"label": "car", "polygon": [[9, 9], [10, 10]]}])
    _, problem = (problem for problem in check_data(tmp_path, read_images=False).problems if problem.kind == "box_speck")
    assert (problem.file, problem.annotation_id) == (str(folder / f"{stem}_gtFine_polygons.json"), None)


def test_semantic_labels(tmp_path):
    folder, stem = write(tmp_path)
    ids = official()
    ids = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
    with pytest.raises(InvalidDataError, match="must be a PNG file beside the polygons"):
        load_semantic(SourceConfig(path=str(tmp_path)), "train")
    Image.fromarray(ids).save(folder / f"{stem}_gtFine_labelIds.png")
    dataset = load_semantic(SourceConfig(path=str(tmp_path)), "train")
    assert dataset.classes == SEMANTIC and len(SEMANTIC) == 19
    [record] = dataset.records
    labels = record.label_map.read(record)
    assert {SEMANTIC[label] for label in np.unique(labels[labels < 255])} == {"road", "car", "person", "truck"}
    assert (labels == np.array(TABLE)[ids]).all()
    assert (labels[0:3, 0:3] == 255).all()  # the caravan


def test_train_ids_are_the_official_ones():
    assert [TABLE[LABELS.index(name)] for name in ("road", "sky", "person", "train", "bicycle", "trailer", "bridge")] == [
        0, 10, 11, 16, 18, 255, 255]


def test_splits(tmp_path):
    write(tmp_path, "train", "aachen")
    write(tmp_path, "val", "lindau", 1)
    write(tmp_path, "val", "munster", 2, [])
    assert splits(tmp_path) == ["train", "val"]
    found = {split.name: split for split in find_splits(tmp_path / "gtFine")}
    assert {name: split.role for name, split in found.items()} == {"train": "train", "val": "val"}
    val = found["val"].load()
    assert [len(record.annotations) for record in val.records] == [5, 0]
    assert val.records[1].id == "munster_000002_000019"
    with pytest.raises(FileNotFoundError, match="must have the split 'test'"):
        load_dataset(SourceConfig(path=str(tmp_path)), "test")


@pytest.mark.parametrize("change, message", (
    ({"label": "zebra"}, "unknown label 'zebra'"), ({"polygon": [[1, float("nan")], [2, 3]]}, "finite"),
    ({"polygon": 5}, "two finite points"), ({"label": None}, "must be JSON of Cityscapes")))
def test_what_is_wrong_is_told(tmp_path, change, message):
    write(tmp_path, objects=[OBJECTS[0] | change])
    write(tmp_path, number=1, images=False)
    with pytest.raises(InvalidDataError, match=message) as error:
        load_dataset(SourceConfig(path=str(tmp_path)), "train")
    assert len(error.value.problems) == 2 and "must be an image file" in str(error.value)


def test_conversion_to_coco_and_panoptic(tmp_path):
    from detres.data.convert.run import Options, convert
    from detres.data.panoptic import load_panoptic

    folder, stem = write(tmp_path / "data")
    ids = official()
    Image.fromarray(np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)).save(folder / f"{stem}_gtFine_labelIds.png")
    data, found = tmp_path / "data", load_dataset(SourceConfig(path=str(tmp_path / "data")), "train").records[0]
    convert([data], tmp_path / "coco", Options("coco", strict=True))
    back = load_dataset(SourceConfig(path=str(tmp_path / "coco")), "train")
    assert back.category_ids == (24, 25, 26, 27, 28, 31, 32, 33)
    assert [(item.label, item.box, item.crowd, item.segmentation) for item in back.records[0].annotations] == [
        (item.label, item.box, item.crowd, item.segmentation) for item in found.annotations]
    convert([data], tmp_path / "panoptic", Options("panoptic", strict=True), semantic=str(data))
    both = load_panoptic(SourceConfig(path=str(tmp_path / "panoptic")), "train")
    assert both.classes == THINGS and set(both.semantic_classes[1:]) == set(SEMANTIC) - set(THINGS)
    assert [item.area for item in both.records[0].annotations] == [item.area for item in found.annotations]
    labels = both.records[0].label_map.read(both.records[0])
    assert (labels == 1 + both.semantic_classes[1:].index("road")).sum() == (ids == 7).sum()
