"""Labels against the detections of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detres.cli import main
from detres.data.check.detections import check_against
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.kinds import KINDS
from detres.evaluation.coco_files import results_columns

ANT, BEE = 5, 3  # category ids


def dataset(*images, form="coco") -> Dataset:
    """Each image: its id, then (label, box, crowd)."""
    number = iter(range(1, 100))
    records = [ImageRecord(image, Path(f"{image}.jpg"), 100, 100, tuple(
        Annotation(next(number), label, box, crowd=crowd) for label, box, crowd in items)) for image, *items in images]
    return Dataset("set", form, ("bee", "ant"), (BEE, ANT), tuple(records))


def found(data: Dataset, *detections) -> list[tuple]:
    """Each detection: image, category, x, y, w, h, score."""
    rows = [{"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, *box, score in detections]
    problems = check_against(results_columns(rows), [("val", data)])
    for problem in problems:
        assert problem.kind in KINDS and problem.reason.startswith("must ") and problem.split == "val"
    return [(problem.kind, problem.image, problem.annotation_id) for problem in problems]


OBJECT = (1, (10.0, 10.0, 50.0, 50.0), False)  # an ant
DOUBT = ("label_doubtful", 7, 2)


def test_classes_that_a_model_contradicts():
    data = dataset((4, (0, (0.0, 0.0, 9.0, 9.0), False)), (7, OBJECT), (2,))
    sure = (7, BEE, 12, 12, 40, 40, 0.9)
    assert found(data, sure) == [DOUBT]
    assert found(data, sure, (7, BEE, 10, 10, 40, 40, 0.85)) == [DOUBT], "once"
    assert found(data, sure, (7, ANT, 10, 10, 40, 40, 0.11)) == [], "its own class is seen, too"
    assert found(data, sure, (7, ANT, 70, 70, 20, 20, 0.8)) == [DOUBT], "its own class elsewhere"
    assert found(data, (7, BEE, 12, 12, 40, 40, 0.79)) == found(data, (7, BEE, 25, 25, 40, 40, 0.89)) == []
    assert found(data, (7, ANT, 10, 10, 40, 40, 0.99)) == []
    assert found(dataset((7, (1, (10.0, 10.0, 50.0, 50.0), True))), sure) == [], "a crowd"


def test_value_and_reason():
    problem, = check_against(results_columns([
        {"image_id": 7, "category_id": BEE, "bbox": [12, 12, 40, 40], "score": 0.9}]), [("val", dataset((7, OBJECT)))])
    assert problem.value == ["ant", "found", "bee", 0.9, [10, 10, 50, 50]] and "must be bee" in problem.reason


def test_objects_that_nobody_annotated():
    data = dataset((7, OBJECT, (0, (60.0, 60.0, 100.0, 100.0), True)), (8,))
    assert found(data, (8, ANT, 1, 2, 30, 30, 0.95), (7, BEE, 60, 5, 30, 30, 0.95)) == [
        ("label_missing", 7, None), ("label_missing", 8, None)]
    assert found(data, (8, ANT, 1, 2, 30, 30, 0.89)) == []
    assert found(data, (7, ANT, 70, 70, 9, 9, 0.95)) == [], "inside a crowd"
    assert found(data, (7, ANT, 40, 10, 30, 40, 0.95)) == [], "a part of what is annotated"


def test_detections_of_other_data():
    with pytest.raises(ValueError, match="must be on images and of classes of the data set"):
        found(dataset((7, OBJECT)), (99, ANT, 0, 0, 9, 9, 0.9))
    with pytest.raises(ValueError, match="must be on images"):
        found(dataset((7, OBJECT)), (7, 1000, 0, 0, 9, 9, 0.9))


def test_the_command(coco, tmp_path, capsys):
    coco.load()
    file = tmp_path / "found.json"
    file.write_text(json.dumps([{"image_id": 7, "category_id": 4, "bbox": [10, 10, 20, 30], "score": 0.97}]))
    assert main(["data", "check", str(coco.root), "--detections", str(file)]) == 0
    assert "a trained model is sure" in capsys.readouterr().out
    file.write_text("[]")
    assert main(["data", "check", str(coco.root), "--detections", str(file)]) == 1
    assert "must be on images and of classes" in capsys.readouterr().err
