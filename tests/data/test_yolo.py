"""YOLO txt."""

from __future__ import annotations

import pytest

from detres.config import SourceConfig
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.masks import rasterize


def load(path, role="train", split=None, on_invalid="error"):
    return load_dataset(SourceConfig(path=str(path), split=split), role, on_invalid)


def test_boxes_and_polygons(tmp_path, files):
    files.yolo(tmp_path, {"a": "1 .5 .5 .25 .2\n\n0 .1 .1 .5 .1 .5 .5 .1 .5\n", "b": None, "c": ""})
    dataset = load(tmp_path)
    assert (dataset.format, dataset.classes, dataset.category_ids) == ("yolo", ("cat", "dog"), (0, 1))
    assert [record.id for record in dataset.records] == [f"images/train/{name}.png" for name in "abc"]
    box, polygon = dataset.records[0].annotations
    assert box.label == 1 and box.box == pytest.approx((15, 12, 25, 18)) and box.area == pytest.approx(60)
    assert polygon.label == 0 and polygon.box == pytest.approx((4, 3, 20, 15))
    assert polygon.area == rasterize(polygon.segmentation, 30, 40).sum() == 16 * 12
    assert [len(record.annotations) for record in dataset.records] == [2, 0, 0]


@pytest.mark.parametrize("yaml", [
    "train: ../images/train\nval: 1\nnames: {0: cat, 1: dog}\n",  # as Roboflow writes it
    "train: [images/train]\nnames: [cat, dog]\n",
    "train: list.txt\nnames: [cat, dog]\n",
    "path: {root}\ntrain: images\nnames: [cat, dog]\n"])
def test_ways_to_name_the_images(tmp_path, files, yaml):
    (tmp_path / "list.txt").write_text("./images/train/a.png\n")
    files.yolo(tmp_path, {"a": "0 .5 .5 1 1"}, yaml.replace("{root}", str(tmp_path)))
    (record,) = load(tmp_path).records
    assert record.annotations[0].box == (0, 0, 40, 30)


def test_all_problems_are_told_at_once(tmp_path, files):
    rows = ["0 .5 .5 .1 .1", "2 .5 .5 .1 .1", "0 .5 .5 0 .1", "0 1.5 .5 .1 .1", "0 nan .5 .1 .1", "0 .5 .5 .1",
            "0 x .5 .1 .1", "0 .1 .1 .5 .1 .5", "0 .1 .1 .5 .1 .5 nan", "0.5 .5 .5 .1 .1"]
    files.yolo(tmp_path, {"a": "\n".join(rows), "b": None})
    (tmp_path / "images" / "train" / "b.png").write_bytes(b"no image")
    with pytest.raises(InvalidDataError) as caught:
        load(tmp_path)
    told = {(problem.annotation_id, problem.field) for problem in caught.value.problems}
    assert told == {(2, "class"), (3, "box"), (4, "box"), (5, "box"), (6, "polygon"), (7, "row"), (8, "polygon"),
                    (9, "polygon"), (10, "class"), (None, "image")}
    assert [len(record.annotations) for record in load(tmp_path, on_invalid="drop").records] == [1]


@pytest.mark.parametrize(("yaml", "message"), [
    ("names: [a", "must be YAML"), ("train: images/train\n", "must have 'names'"),
    ("train: images/train\nnames: {1: a}\n", "without gaps"),
    ("train: images/train\nnames: [a]\nnc: 2\n", "got 2 for 1"),
    ("path: nowhere\ntrain: images/train\nnames: [a]\n", "path must be a folder, got nowhere"),
    ("train: nowhere\nnames: [a]\n", "got nowhere"),
    ("val: images/train\nnames: [a]\n", r"split 'train', got \['val'\]"),
    ("train: images/train\nnames: [a]\nkpt_shape: [17, 3]\n", "kpt_shape")])
def test_descriptions_that_cannot_be_used(tmp_path, files, yaml, message):
    files.yolo(tmp_path, {"a": "0 .5 .5 .1 .1"}, yaml)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path)


def test_labels_that_are_nowhere(tmp_path, files):
    files.yolo(tmp_path, {"a": None, "b": None})
    with pytest.raises(FileNotFoundError, match="got none for 2 images, such as .*labels/train/a.txt"):
        load(tmp_path)
