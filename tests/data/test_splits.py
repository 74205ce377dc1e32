"""All splits of a folder, whatever its format."""

from __future__ import annotations

import shutil

import pytest

from detres.data.shapes import ShapesOptions, write_shapes
from detres.data.splits import find_splits, load_readable


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return write_shapes(folder, 3, options=ShapesOptions("easy", size=(64, 96)), val_images=2, progress=False)


def test_both_splits_of_a_coco_folder(shapes):
    splits = find_splits(shapes / "annotations/instances_val.json")
    assert [(split.name, split.role) for split in splits] == [("instances_val", "val")]
    assert len(splits[0].load().records) == 2


def test_image_sets_without_their_union(shapes):
    voc = next(shapes.rglob("ImageSets")).parent
    sets = voc / "ImageSets/Main"
    (sets / "trainval.txt").write_text((sets / "train.txt").read_text() + (sets / "val.txt").read_text())
    assert [(split.name, split.role) for split in find_splits(voc)] == [("train", "train"), ("val", "val")]


def test_yolo_splits(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [a]\nval: images/val\ntrain: images/train\n")
    assert [(split.name, split.role) for split in find_splits(tmp_path)] == [("train", "train"), ("val", "val")]


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be in one of the formats"):
        find_splits(tmp_path)
    with pytest.raises(FileNotFoundError, match="must exist"):
        find_splits(tmp_path / "none")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/panoptic_val.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="got none .*detres data convert"):
        find_splits(tmp_path)


def test_a_folder_of_images_alone_is_told_as_such(tmp_path):
    for name in ("a.jpg", "b.PNG"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match="must have annotations, got .* with 2 images and none that detres"):
        find_splits(tmp_path)


def test_the_panoptic_format_is_no_list_of_objects(tmp_path):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/panoptic_val.json"
    file.write_text('{"images": [], "categories": [], "annotations": [{"image_id": 1, "segments_info": []}]}')
    with pytest.raises(FileNotFoundError, match="got none .*detres data convert"):
        find_splits(tmp_path)
    with pytest.raises(ValueError, match="got the panoptic format.*detres data convert"):
        find_splits(file)[0].load()


def test_a_split_that_cannot_be_read_hides_no_other(shapes, tmp_path, caplog):
    folder = shutil.copytree(shapes, tmp_path / "data")
    (folder / "annotations/instances_val.json").write_text("{")
    assert [name for name, _ in load_readable(find_splits(folder))] == ["instances_train"]
    assert "instances_val is left out: annotation file must be JSON" in caplog.text
    (folder / "annotations/instances_train.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        load_readable(find_splits(folder))
