"""ILSVRC DET: a written tree in the challenge's layout."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from detres.config import SourceConfig
from detres.data.dataset import InvalidDataError, load_dataset
from detres.evaluation.ilsvrc import IlsvrcDetectionEvaluator
from detres.evaluation.run import build_evaluators

DOG, CAT, NOBODY = "n02084071", "n02121808", "n99999999"
TRAIN = "ILSVRC2013_train/n02084071/n02084071_1"
EXTRA = "ILSVRC2013_train_extra0/ILSVRC2013_train_00000001"
VAL = [f"ILSVRC2012_val_0000000{number}" for number in (4, 1, 3, 2)]  # not in alphabetic order, as in val.txt


@pytest.fixture
def tree(tmp_path: Path, files) -> Path:
    """Images of 40 x 30 (width x height)."""
    objects = {TRAIN: [(DOG, 0, 0, 39, 29), (NOBODY, 1, 1, 5, 5)], VAL[0]: [(CAT, 4, 6, 8, 9), (DOG, 3, 3, 3, 9)],
               VAL[1]: [], VAL[2]: [(CAT, 1, 2, 3, 4)]}
    for image_id in [TRAIN, EXTRA, *VAL]:
        part = "train" if "train" in image_id else "val"
        files.image(tmp_path / f"Data/DET/{part}/{image_id}.JPEG", 30, 40)
        if image_id in objects:
            xml = tmp_path / f"Annotations/DET/{part}/{image_id}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            boxes = "".join(
                f"<object><name>{wnid}</name><bndbox><xmin>{x1}</xmin><xmax>{x2}</xmax><ymin>{y1}</ymin>"
                f"<ymax>{y2}</ymax></bndbox></object>" for wnid, x1, y1, x2, y2 in objects[image_id])
            xml.write_text(f"<annotation><size><width>40</width><height>30</height></size>{boxes}</annotation>")
    sets, kit = tmp_path / "ImageSets/DET", tmp_path / "devkit/data"
    sets.mkdir(parents=True)
    kit.mkdir(parents=True)
    (sets / "train.txt").write_text(f"{TRAIN} 1\n{EXTRA} 2\n")
    (sets / "train_1.txt").write_text(f"{TRAIN} -1\n")
    (sets / "val.txt").write_text("".join(f"{image_id} {line}\n" for line, image_id in enumerate(VAL, 1)))
    (kit / "ILSVRC2015_det_validation_blacklist.txt").write_text(f"1 {DOG}\n3 {CAT}\n")
    return tmp_path


def load(root: Path, split: str | None = None, role: str = "val", on_invalid: str = "error"):
    return load_dataset(SourceConfig(path=str(root), split=split), role, on_invalid)


def boxes(dataset) -> dict:
    return {record.id: [(dataset.classes[item.label], item.box) for item in record.annotations]
            for record in dataset.records}


def test_boxes_count_pixels_from_0_and_include_the_last(tree, caplog):
    with caplog.at_level(logging.INFO, "detres"):
        train = load(tree, role="train")
    assert boxes(train) == {TRAIN: [("dog", (0, 0, 40, 30))]}  # the whole image
    assert "passed over 1 objects of other classes; left out 1 training images without" in caplog.text
    assert train.category_ids == tuple(range(1, 201)) and train.category_ids[train.classes.index("dog")] == 58
    found = boxes(load(tree))
    assert list(found) == VAL  # the one without XML too, without objects
    assert found[VAL[0]] == [("domestic cat", (4, 6, 9, 10)), ("dog", (3, 3, 4, 10))]  # one pixel wide: it counts
    assert found[VAL[1]] == found[VAL[3]] == []


def test_halves_of_val_and_unions(tree, caplog):
    assert list(boxes(load(tree, "train+val1"))) == [TRAIN, VAL[0], VAL[2]]
    assert list(boxes(load(tree, "val2"))) == [VAL[1], VAL[3]]
    assert "not R-CNN's split" in caplog.text
    caplog.clear()
    (tree / "ImageSets/DET/val1.txt").write_text(f"{VAL[3]} 1\n")
    assert list(boxes(load(tree, "train+val1"))) == [TRAIN, VAL[3]]
    assert "not R-CNN's split" not in caplog.text
    with pytest.raises(FileNotFoundError, match=r"one of \['train', 'val', 'val1'\], got 'val3'"):
        load(tree, "val3")


def test_what_cannot_be_used_is_told(tree):
    (tree / f"Data/DET/val/{VAL[1]}.JPEG").unlink()
    (tree / f"Annotations/DET/val/{VAL[2]}.xml").write_text("<annotation><obj")
    xml = tree / f"Annotations/DET/val/{VAL[0]}.xml"
    xml.write_text(xml.read_text().replace("<xmax>8<", "<xmax>3<"))
    (tree / "ImageSets/DET/bad.txt").write_text("".join(f"{image_id}\n" for image_id in [*VAL, VAL[3]]))
    with pytest.raises(InvalidDataError) as caught:
        load(tree, "bad")
    assert [(problem.image, problem.field) for problem in caught.value.problems] == [
        (VAL[1], "image id"), (VAL[2], "file"), (VAL[3], "image id"), (VAL[0], "bndbox")]
    dataset = load(tree, "bad", on_invalid="drop")
    assert boxes(dataset) == {VAL[0]: [("dog", (3, 3, 4, 10))], VAL[3]: []}
    (tree / "ImageSets/DET/own.txt").write_text("photo1\n")
    with pytest.raises(ValueError, match="must begin as ILSVRC2012_val does.* got 'photo1'"):
        load(tree, "own")


def test_the_evaluator_has_the_kits_blacklist(tree):
    """Numbers in it are those of val.txt, whichever images the data set has."""
    assert load(tree).blacklist == ((VAL[0], "dog"), (VAL[2], "domestic cat"))
    val1 = load(tree, "val1")
    assert val1.blacklist == ((VAL[0], "dog"), (VAL[2], "domestic cat")) and load(tree, "val2").blacklist == ()
    (evaluator,) = build_evaluators(val1, ("ilsvrc",), with_masks=False)
    assert isinstance(evaluator, IlsvrcDetectionEvaluator)
    assert evaluator._skipped.tolist() == [[1, 57], [0, 58]]  # images in the order of ids
    (tree / "devkit/data/ILSVRC2015_det_validation_blacklist.txt").unlink()
    assert load(tree).blacklist == ()
