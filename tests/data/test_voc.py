"""PASCAL VOC XML."""

from __future__ import annotations

import logging

import pytest

from detres.config import SourceConfig
from detres.data.check.run import check_data
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.voc import VOC_CLASSES


def load(path, role="train", split=None, on_invalid="error"):
    return load_dataset(SourceConfig(path=str(path), split=split), role, on_invalid)


def test_boxes_and_flags(tmp_path, files):
    objects = files.object("dog", (11, 6, 20, 30)) + files.object("cat", (1, 1, 40, 30), 1)
    objects += files.object(difficult=None)
    files.voc(tmp_path, {"b": objects, "a": ""}, {"train": "b\na\n"})
    dataset = load(tmp_path)
    assert dataset.classes == VOC_CLASSES and dataset.category_ids == tuple(range(20))
    assert [record.id for record in dataset.records] == ["b", "a"]
    record = dataset.records[0]
    assert (record.height, record.width, record.path.name) == (30, 40, "b.jpg")
    assert [(item.label, item.box, item.difficult, item.area) for item in record.annotations] == [
        (11, (10, 5, 20, 30), False, 250), (7, (0, 0, 40, 30), True, 1200), (11, (10, 5, 20, 30), False, 250)]
    assert dataset.records[1].annotations == ()


def test_classes_are_those_of_all_files_whatever_the_split(tmp_path, files):
    files.voc(tmp_path, {"a": files.object("wbc"), "b": files.object("rbc")}, {"train": "a", "val": "b"})
    for role, label in (("train", 1), ("val", 0)):
        dataset = load(tmp_path, role)
        assert dataset.classes == ("rbc", "wbc") and dataset.records[0].annotations[0].label == label


def test_image_sets(tmp_path, files):
    for year, image in (("2007", "000001"), ("2012", "2008_1")):
        files.voc(tmp_path / "VOCdevkit" / f"VOC{year}", {image: files.object(), f"{year}9": files.object("cat")},
                  {"trainval": image, "dog_trainval": f"{image} -1", "test": f"{year}9"})
    devkit = tmp_path / "VOCdevkit"
    assert [record.id for record in load(devkit, split="2007_trainval+2012_trainval").records] == ["000001", "2008_1"]
    everything = load(devkit, split="2007_trainval+2007_test+2012_trainval")  # 07++12
    assert [(record.id, record.annotations[0].label) for record in everything.records] == [
        ("000001", 11), ("20079", 7), ("2008_1", 11)]
    assert [record.id for record in load(devkit / "VOC2012", split="trainval").records] == ["2008_1"]
    assert load(devkit / "VOC2012", split="dog_trainval").records == ()
    with pytest.raises(InvalidDataError, match="must be listed once"):
        load(devkit, split="2007_trainval+2007_trainval")
    with pytest.raises(FileNotFoundError, match="one year, got .*VOC2007.*VOC2012"):
        load(devkit)
    with pytest.raises(FileNotFoundError, match=r"one of \['test', 'trainval'\], got 'train'"):
        load(devkit / "VOC2007")


def test_a_test_set_without_annotations(tmp_path, files, caplog):
    """VOC 2012's: the XML files beside it are those of other image sets. With one of its own it is an ordinary set."""
    files.voc(tmp_path, {"a": files.object(), "b": "", "c": files.object("person")}, {"test": "b\na\n", "val": "c"})
    for image_id in "ab":
        (tmp_path / "Annotations" / f"{image_id}.xml").unlink()
    dataset = load(tmp_path, "val", "test")
    assert dataset.classes == VOC_CLASSES and "test: without annotations" in caplog.text
    assert [(record.id, record.height, record.width, record.annotations) for record in dataset.records] == [
        ("b", 30, 40, ()), ("a", 30, 40, ())]
    for role, split in (("train", "test"), ("val", "empty")):
        (tmp_path / "ImageSets/Main/empty.txt").write_text("a\nb\n")
        with pytest.raises(InvalidDataError, match="(?s)got 2 problems.*must be an XML file"):
            load(tmp_path, role, split)
    (tmp_path / "ImageSets/Main/test.txt").write_text("a\nc\n")
    with pytest.raises(InvalidDataError, match="got 1 problem[.].*"):
        load(tmp_path, "val", "test")


def test_a_size_that_is_not_stated_is_read_from_the_file(tmp_path, files):
    files.voc(tmp_path, {"a": files.object()}, {"train": "a"}, size="")
    record = load(tmp_path).records[0]
    assert (record.height, record.width) == (30, 40)
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(InvalidDataError, match="size must be stated"):
        load(tmp_path)


def test_all_problems_are_told_at_once(tmp_path, files, caplog):
    objects = [files.object(), files.object(box=(5, 5, 5, 9)), files.object(box=(41, 1, 50, 9)),
               files.object(box=(1, 1, "nan", 9)), files.object(box=(1, 1, "x", 9)), files.object(name=""),
               "<object><name>dog</name></object>"]
    images = {name: "" for name in ("no_image", "no_xml", "cut")} | {"a": "".join(objects)}
    files.voc(tmp_path, images, {"train": "a\na\nno_image\nno_xml\ncut\n"})
    (tmp_path / "JPEGImages" / "no_image.jpg").unlink()
    (tmp_path / "Annotations" / "no_xml.xml").unlink()
    (tmp_path / "Annotations" / "cut.xml").write_text("<annotation><obj")
    with pytest.raises(InvalidDataError) as caught:
        load(tmp_path)
    told = sorted((str(p.image), str(p.annotation_id), p.field) for p in caught.value.problems)
    assert told == [("a", str(n), "bndbox") for n in (2, 3, 4, 5)] + [("a", "6", "name"), ("a", "7", "bndbox"),
                    ("a", "None", "image id"), ("cut", "None", "file"), ("no_image", "None", "filename"),
                    ("no_xml", "None", "file")]
    with caplog.at_level(logging.WARNING, "detres"):
        dataset = load(tmp_path, on_invalid="drop")
    assert [(record.id, len(record.annotations)) for record in dataset.records] == [("a", 1)]
    assert "(10 found)" in caplog.text


@pytest.mark.data
def test_voc_mini(shared_data):
    train, val = (load(shared_data / "voc_mini", role) for role in ("train", "val"))
    items = [item for dataset in (train, val) for record in dataset.records for item in record.annotations]
    assert (len(train.records), len(val.records), len(items)) == (196, 204, 1156)
    assert train.classes == val.classes == VOC_CLASSES and sum(item.difficult for item in items) == 170


@pytest.mark.data
def test_bccd_has_two_boxes_of_no_size(shared_data, caplog):
    for role, image in (("train", "BloodImage_00343"), ("val", "BloodImage_00338")):
        with pytest.raises(InvalidDataError) as caught:
            load(shared_data / "bccd" / "BCCD", role)
        assert [(p.image, p.field) for p in caught.value.problems] == [(image, "bndbox")]
        dataset = load(shared_data / "bccd", role, on_invalid="drop")
        assert dataset.classes == ("Platelets", "RBC", "WBC")
    test = load(shared_data / "bccd", "test")
    assert (len(test.records), sum(len(record.annotations) for record in test.records)) == (72, 945)
    assert caplog.text.count("left out what is invalid (1 found)") == 2


def test_a_missing_folder_of_images_hides_nothing_of_the_rest(tmp_path, files):
    files.voc(tmp_path, {"a": files.object(box=(5, 5, 5, 9)), "b": files.object()}, {"train": "a\nb\nc\n"})
    (tmp_path / "JPEGImages").rename(tmp_path / "pictures")
    report = check_data(tmp_path, workers=1)
    assert {problem.kind for problem in report.problems} >= {"images_nowhere", "bad_xml", "box_empty"}
    kinds = {problem.kind for problem in check_data(tmp_path, read_images=False, workers=1).problems}
    assert {"bad_xml", "box_empty"} <= kinds and "images_nowhere" not in kinds
    with pytest.raises(InvalidDataError, match="must be a folder"):
        load_dataset(SourceConfig(path=str(tmp_path)), "train", "drop")
    assert check_data(tmp_path, tmp_path / "pictures", workers=1).splits[0].annotations == 1
