"""Which format a path is, and how problems are told."""

from __future__ import annotations

import logging
import pickle

import pytest

from detres.config import SourceConfig
from detres.data.dataset import InvalidDataError, Problem, load_dataset


def test_formats_are_recognised_from_the_path(tmp_path, coco, files):
    coco.load()
    files.voc(tmp_path / "devkit" / "VOCdevkit" / "VOC2012", {"a": files.object()}, {"train": "a\n"})
    files.yolo(tmp_path / "yolo", {"a": "0 .5 .5 .5 .5"})
    for path, name in ((".", "coco"), ("annotations/instances_train2017.json", "coco"), ("devkit", "voc"),
                       ("devkit/VOCdevkit", "voc"), ("devkit/VOCdevkit/VOC2012", "voc"), ("yolo", "yolo"),
                       ("yolo/data.yaml", "yolo")):
        assert load_dataset(SourceConfig(path=str(tmp_path / path)), "train").format == name, path


def test_what_is_no_data_set_is_told_once_and_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match="must exist, got .*nowhere"):
        load_dataset(SourceConfig(path=str(tmp_path / "nowhere")), "train")
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileNotFoundError, match=r"Looked for: .*annotations/\*\.json.*COCO.*ImageSets.*VOC"):
            load_dataset(SourceConfig(path=str(path)), "train")


def test_settings_that_would_be_ignored_are_refused(coco, files, tmp_path):
    coco.load()
    with pytest.raises(ValueError, match="split must be null"):
        load_dataset(SourceConfig(path=str(coco.file), split="train"), "train")
    yaml = files.yolo(tmp_path / "yolo", {"a": "0 .5 .5 .5 .5"})
    with pytest.raises(ValueError, match="images must be null"):
        load_dataset(SourceConfig(path=str(yaml), images="x"), "train")


def test_a_long_list_of_problems_is_told_in_part_and_kept_in_full():
    problems = [Problem("a.json", 5, i, "bbox", [0, 0, i, 0], f"must fit (side {i})") for i in range(30)]
    error = InvalidDataError("a", problems)
    assert error.problems == problems
    lines = str(error).splitlines()
    assert len(lines) == 22
    assert lines[1] == "  a.json, image 5, annotation 0: bbox must fit (side 0); got [0, 0, 0, 0]"
    assert lines[-1] == "  and 10 more: 10 x bbox must fit"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_drop_says_how_many_of_what(coco, caplog):
    coco.first["bbox"] = [10, 10, 0, 30]
    coco.content["annotations"][1]["category_id"] = 5
    with caplog.at_level(logging.WARNING, "detres"):
        dataset = coco.load("drop")
    assert [[item.id for item in record.annotations] for record in dataset.records] == [[], [3]]
    assert "(2 found)" in caplog.text and "1 x bbox must have a width" in caplog.text
    assert "1 x category_id must be the id of a category" in caplog.text


def test_the_command_that_is_told_can_be_copied(coco, tmp_path):
    coco.content["annotations"][0]["bbox"] = None
    with pytest.raises(InvalidDataError):
        coco.load()
    source = SourceConfig(path=str(coco.root), images=str((coco.root / "train2017").rename(tmp_path / "my photos")))
    with pytest.raises(InvalidDataError, match=f"detres data check {coco.root} --images '{tmp_path}/my photos'$"):
        load_dataset(source, "train")
