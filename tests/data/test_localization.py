"""ILSVRC CLS-LOC and tables of boxes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from detres.config import SourceConfig
from detres.data.class_dataset import load_class_dataset
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.localization import as_class_dataset

CAT, DOG = "n02123394", "n02105855"


def load(path, role="train", split=None, on_invalid="error"):
    return load_dataset(SourceConfig(path=str(path), split=split), role, on_invalid)


@pytest.fixture
def ilsvrc(tmp_path, files) -> Path:
    """Two training images of a dog and one of a cat, of which one has no boxes; two images to validate on."""
    root = tmp_path / "ILSVRC"
    dogs = [(DOG, (3, 4, 20, 25)), ("Shetland sheepdog", (0, 0, 39, 29)), (CAT, (1, 1, 9, 9))]
    things = {f"train/{DOG}/{DOG}_1": dogs,
              f"train/{CAT}/{CAT}_7": [(CAT, (5, 5, 9, 9))], "val/ILSVRC2012_val_00000001": [(CAT, (0, 2, 10, 12))],
              "val/ILSVRC2012_val_00000002": [(DOG, (1, 2, 3, 4)), (DOG, (5, 6, 5, 8))]}
    for name, objects in things.items():
        files.image(root / "Data" / "CLS-LOC" / f"{name}.JPEG", 30, 40)
        xml = root / "Annotations" / "CLS-LOC" / f"{name}.xml"
        xml.parent.mkdir(parents=True, exist_ok=True)
        size = "<size><width>40</width><height>30</height></size>"
        xml.write_text(f"<annotation>{size}{''.join(files.object(*each) for each in objects)}</annotation>")
    files.image(root / "Data" / "CLS-LOC" / "train" / DOG / f"{DOG}_2.JPEG", 30, 40)
    sets = root / "ImageSets" / "CLS-LOC"
    sets.mkdir(parents=True)
    (sets / "train_loc.txt").write_text(f"{DOG}/{DOG}_1 1\n{CAT}/{CAT}_7 2\n")
    (sets / "val.txt").write_text("ILSVRC2012_val_00000001 1\nILSVRC2012_val_00000002 2\n")
    return root


def test_ilsvrc(ilsvrc, caplog):
    caplog.set_level(logging.INFO, "detres")
    dataset = load(ilsvrc)
    assert dataset.classes == (DOG, CAT) and dataset.format == "ilsvrc"
    assert [(record.id, record.label) for record in dataset.records] == [(f"{DOG}/{DOG}_1", 0), (f"{CAT}/{CAT}_7", 1)]
    assert [item.box for item in dataset.records[0].annotations] == [(3, 4, 21, 26), (0, 0, 40, 30)]
    assert "passed over 1 objects of other classes" in caplog.text
    assert load(ilsvrc.parent).records == dataset.records, "Kaggle's folder above"
    assert dataset.classes == load_class_dataset(SourceConfig(path=str(ilsvrc)), "train").classes


def test_ilsvrc_validation_and_blacklist(ilsvrc):
    kit = ilsvrc / "devkit" / "data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2014_clsloc_validation_blacklist.txt").write_text("1\n")
    (kit / "ILSVRC2015_clsloc_validation_blacklist.txt").write_text("2\n36\n")
    dataset = load(ilsvrc, "val")
    assert [record.label for record in dataset.records] == [1, 0] and len(dataset.records[1].annotations) == 2
    assert dataset.records[1].annotations[1].box == (5, 6, 6, 9), "a pixel wide: an object for the kit"
    assert dataset.blacklist == (("ILSVRC2012_val_00000002", DOG),)
    assert load(ilsvrc).blacklist == ()


def test_localization_is_told_from_detection(ilsvrc):
    for folder in ("ImageSets/DET", "Data/DET"):
        (ilsvrc / folder).mkdir()
    (ilsvrc / "ImageSets" / "DET" / "train.txt").write_text("")
    assert len(load(ilsvrc).classes) == 200 and load(ilsvrc / "Data" / "CLS-LOC").classes == (DOG, CAT)


def test_ilsvrc_problems_are_told_at_once(ilsvrc):
    with pytest.raises(FileNotFoundError, match=r"one of \['train_loc', 'val'\], got 'test'"):
        load(ilsvrc, split="test")
    listed = [f"{DOG}/{DOG}_2", f"{CAT}/{CAT}_7", "n00000001/n00000001_1"]
    (ilsvrc / "ImageSets" / "CLS-LOC" / "train_loc.txt").write_text("\n".join(listed))
    (ilsvrc / "Data" / "CLS-LOC" / "train" / CAT / f"{CAT}_7.JPEG").unlink()
    stray = ilsvrc / "Annotations" / "CLS-LOC" / "train" / "n00000001" / "n00000001_1.xml"
    stray.parent.mkdir()
    stray.write_text("<annotation></annotation>")
    with pytest.raises(InvalidDataError) as caught:
        load(ilsvrc)
    told = [(problem.image, problem.field) for problem in caught.value.problems]
    assert told == list(zip(listed, ("file", "image id", "class")))


def table(folder: Path, files, rows: list[str], header: str = "file,wnid,label,split,xmin,ymin,xmax,ymax") -> Path:
    for name in ("a", "b", "c"):
        files.image(folder / "images" / f"{name}.png", 30, 40)
    (folder / "boxes.csv").write_text("\n".join([header, *rows]))
    (folder / "classes.txt").write_text("n1\tcat, kitten\nn2\tcrane, bird\nn3\tcrane\n")
    return folder


def test_table(tmp_path, files):
    rows = ["a.png,n1,0,train,0,1,39,20", "b.png,n3,2,val,3,4,5,6", "a.png,n1,0,train,2,2,4,4"]
    dataset = load(table(tmp_path, files, rows))
    assert dataset.classes == ("cat", "n2", "n3"), "a name that two classes share tells neither"
    (record,) = dataset.records
    assert (record.id, record.label, record.height, record.width) == ("a.png", 0, 30, 40)
    assert [item.box for item in record.annotations] == [(0, 1, 40, 21), (2, 2, 5, 5)]
    classes = load_class_dataset(SourceConfig(path=str(tmp_path)), "val")
    assert classes.labels.tolist() == [2] and classes.paths == (str(tmp_path / "images" / "b.png"),)
    assert np.array_equal(as_class_dataset(load(tmp_path, "val")).labels, classes.labels)


def test_table_problems(tmp_path, files):
    rows = ["a.png,n1,0,train,3,1,3,20", "a.png,n1,0,train,x,1,3,20", "a.png,n1,0,train,50,1,60,20",
            "b.png,n1,7,train,0,0,9,9", "c.png,n1,0,train,0,0,9,9", "c.png,n2,1,train,0,0,9,9",
            "d.png,n1,0,train,0,0,9,9"]
    with pytest.raises(InvalidDataError) as caught:
        load(table(tmp_path, files, rows))
    told = sorted((problem.image, problem.field) for problem in caught.value.problems)
    assert told == [("a.png", "bndbox")] * 3 + [("b.png", "label"), ("c.png", "label"), ("d.png", "file")]
    dropped = load(tmp_path, on_invalid="drop").records
    assert [(record.id, record.label, len(record.annotations)) for record in dropped] == [("a.png", 0, 0)]
    with pytest.raises(FileNotFoundError, match=r"one of \['train'\], got 'val'"):
        load(tmp_path, "val")
    with pytest.raises(ValueError, match="columns .* none named label"):
        load(table(tmp_path, files, rows, header="file,wnid,class,split,xmin,ymin,xmax,ymax"))


@pytest.mark.data
def test_tiny_imagenet(shared_data):
    for role, images, boxes in (("train", 800, 798), ("val", 200, 198)):
        folder = shared_data / "tiny_imagenet_loc20"
        with pytest.raises(InvalidDataError, match="got 2 problems"):
            load(folder, role)
        dataset = load(folder, role, on_invalid="drop")
        assert len(dataset.records) == images and sum(len(record.annotations) for record in dataset.records) == boxes
        assert dataset.classes[0] == "tailed frog" and len(dataset.classes) == 20
