"""Image files are checked before a training, once."""

from __future__ import annotations

import json
import shutil

import pytest

from detres.cli import main
from detres.config import SourceConfig
from detres.data.check import training
from detres.data.check.training import check_files
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.shapes import ShapesOptions, write_shapes

SHORT = ["train.steps=1", "train.batch_size=2", "train.reference_batch_size=2", "train.warmup_steps=0",
         "data.workers=0", "train.precision=fp32", "model.input.min_size=64", "model.input.max_size=96",
         "model.backbone.width=8", "model.fpn.channels=8"]


@pytest.fixture
def shapes(tmp_path):
    return write_shapes(tmp_path / "shapes", 4, options=ShapesOptions("easy", size=(64, 96)), val_images=2,
                        formats=("coco",), progress=False)


def truncate(folder, number: int = 0, split: str = "train") -> str:
    image = sorted((folder / split).glob("*.jpg"))[number]
    image.write_bytes(image.read_bytes()[:-300])
    return image.name


def checked(folder, on_invalid="error"):
    sources = [SourceConfig(path=str(folder))] * 2
    datasets = [load_dataset(source, role) for source, role in zip(sources, ("train", "val"))]
    return check_files(datasets, sources, on_invalid)


def test_sound_images_pass(shapes):
    train, val = checked(shapes)
    assert (len(train.records), len(val.records)) == (4, 2)


def test_all_damaged_files_are_told_at_once(shapes):
    names = [truncate(shapes, number) for number in (0, 2)] + [truncate(shapes, split="val")]
    with pytest.raises(InvalidDataError) as refused:
        checked(shapes)
    assert all(name in str(refused.value) for name in names) and "got 3 problems" in str(refused.value)
    assert str(refused.value).endswith(f"detres data check {shapes}")


def test_errors_of_both_splits_are_told_at_once(shapes, tmp_path, capsys):
    for split in ("train", "val"):
        file = shapes / f"annotations/instances_{split}.json"
        content = json.loads(file.read_text())
        content["annotations"][0]["bbox"][2] = 0
        file.write_text(json.dumps(content))
    assert main(["train", "configs/demo.yaml", *SHORT, f"data.train={shapes}", f"data.val={shapes}",
                 f"output={tmp_path / 'run'}"]) == 1
    told = capsys.readouterr().err
    assert "instances_train.json, image" in told and "instances_val.json, image" in told and "got 2 problems" in told
    assert told.rstrip().endswith(f"detres data check {shapes}")


def test_dropped_and_counted(shapes, caplog):
    truncate(shapes)
    train, val = checked(shapes, "drop")
    assert (len(train.records), len(val.records)) == (3, 2)
    assert caplog.text.count("left out what is invalid (1 found)") == 1


def test_images_of_both_splits_are_told(shapes, caplog):
    first, other = (next((shapes / split).glob("*.jpg")) for split in ("train", "val"))
    shutil.copy(first, other)
    checked(shapes)
    assert "1 x images of one split that are in another" in caplog.text


def test_what_was_found_is_kept_until_a_file_changes(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("DETRES_CACHE", str(tmp_path / "cache"))
    calls, check_images = [], training.check_images
    monkeypatch.setattr(training, "check_images", lambda splits: calls.append(1) or check_images(splits))
    assert [len(dataset.records) for dataset in checked(shapes) + checked(shapes)] == [4, 2, 4, 2] and len(calls) == 1
    name = truncate(shapes)
    for _ in range(2):
        with pytest.raises(InvalidDataError, match=name):
            checked(shapes)
    assert len(calls) == 2
    annotations = shapes / "annotations/instances_train.json"
    content = json.loads(annotations.read_text())
    content["images"] = [image for image in content["images"] if image["file_name"] != name]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in ids]
    annotations.write_text(json.dumps(content))
    assert len(checked(shapes)[0].records) == 3 and len(calls) == 3
    content["images"][0]["height"] += 1
    annotations.write_text(json.dumps(content))
    with pytest.raises(InvalidDataError, match="must be as annotated"):
        checked(shapes)


def test_training_refuses_before_it_has_a_folder(shapes, tmp_path, capsys):
    name = truncate(shapes)
    command = ["train", "configs/demo.yaml", *SHORT, f"data.train={shapes}", "data.val=null", "train.eval_every=null",
               f"output={tmp_path / 'run'}"]
    assert main(command) == 1 and name in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*command, "data.on_invalid=drop"]) == 0
