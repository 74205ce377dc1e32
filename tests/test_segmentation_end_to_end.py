"""Semantic and panoptic models as a user has them, from data to pictures; what docs/segmentation.md says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detres
import detres.config
from detres.cli import main
from detres.config_file import dump_yaml
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.checkpoint import find_weights, load_weights

ROOT = Path(__file__).parents[1]
MODEL = {"input": {"min_size": 64, "max_size": 96},
         "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "gn", "freeze_stages": 0},
         "fpn": {"channels": 16}, "semantic_head": {"channels": 16, "norm": "gn"}, "panoptic": {"stuff_area": 64},
         "anchors": {"sizes": [[12], [24], [48], [96], [160]]},
         "rpn": {"pre_nms_topk_train": 100, "pre_nms_topk_test": 100, "post_nms_topk_train": 50,
                 "post_nms_topk_test": 50},
         "box_head": {"batch_per_image": 16, "fc_dim": 32}, "mask_head": {"channels": 16, "convs": 1}}
TRAIN = {"batch_size": 4, "reference_batch_size": 4, "lr": 0.005, "steps": 4, "milestones": [8], "warmup_steps": 2,
         "precision": "fp32", "log_every": 2, "eval_every": 2, "accumulate": 2}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", 8, val_images=3, formats=("coco",), progress=False,
                        options=ShapesOptions(preset="easy", size=(64, 96)))


def train_small(name: str, folder: Path, **sources) -> Path:
    """Trains through the command line; returns the run."""
    model = {**MODEL, "name": name, "backbone": {**MODEL["backbone"], "layout": "dc5" if name == "fcn" else "fpn"}}
    config = {"output": str(folder / name), "device": "cpu", "model": model, "train": TRAIN, "eval": {"batch_size": 2},
              "data": {"workers": 0, "augment": {"crop_size": 64}, **sources}}
    (folder / f"{name}.yaml").write_text(dump_yaml(detres.config.Config.model_validate(config)))
    assert main(["train", str(folder / f"{name}.yaml"), "--debug"]) == 0
    return folder / name


def source(path: Path, **options) -> dict:
    return {"path": str(path), **options}


@pytest.mark.parametrize("name", ["fcn", "semantic_fpn"])
def test_semantic(name, shapes, tmp_path, capsys):
    run = train_small(name, tmp_path, train=source(shapes), val=source(shapes))
    results = json.loads((run / "results.json").read_text())
    assert {"sem_seg/mIoU", "val/loss_semantic"} <= set(results)
    _, meta = load_weights(find_weights(run))
    assert meta.classes == ("background", "disc", "triangle", "cross")[:len(meta.classes)]

    assert main(["eval", str(run), "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert all(results[metric] == value for metric, value in numbers.items())
    assert "mIoU" in capsys.readouterr().out
    assert main(["eval", str(run), "--save", str(tmp_path / "found.json")]) != 0
    assert "does not have" in capsys.readouterr().err

    assert main(["predict", str(run), str(shapes / "val"), "--out", str(tmp_path / "found")]) == 0
    entries = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [Image.open(tmp_path / "found" / entry["labels"]).size for entry in entries] == [(96, 64)] * 3
    out = detres.load(run).predict(next((shapes / "val").glob("*.jpg")))
    assert isinstance(out, detres.SemanticPrediction) and out.labels.shape == (64, 96)


def test_panoptic(shapes, tmp_path):
    run = train_small("panoptic_fpn", tmp_path, train=source(shapes), val=source(shapes))
    results = json.loads((run / "results.json").read_text())
    assert {"panoptic/PQ", "panoptic/PQ_th", "panoptic/PQ_st", "sem_seg/mIoU", "bbox/AP", "segm/AP",
            "val/loss_semantic", "val/loss_mask"} <= set(results)
    assert results["panoptic/PQ"] == max(row["panoptic/PQ"] for row in map(
        json.loads, (run / "log.jsonl").read_text().splitlines()) if "panoptic/PQ" in row), "keep_best"
    _, meta = load_weights(find_weights(run))
    assert meta.semantic_classes[0] == "things" and len(meta.semantic_classes) == len(meta.semantic_ids) == 8
    files = ["--json", str(tmp_path / "numbers.json"), "--save", str(tmp_path / "boxes.json")]
    assert main(["eval", str(run), *files]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert all(results[metric] == pytest.approx(value, abs=1e-12) for metric, value in numbers.items())

    assert main(["predict", str(run), str(shapes / "val"), "--out", str(tmp_path / "found")]) == 0
    entry = json.loads((tmp_path / "found/predictions.json").read_text())[0]
    ids = np.array(Image.open(tmp_path / "found" / entry["panoptic"])).astype(int) @ [1, 256, 65536]
    assert set(np.unique(ids)) - {0} == {segment["id"] for segment in entry["segments"]}
    out = detres.load(run, overrides=["model.panoptic.stuff_area=100000"]).predict(next((shapes / "val").glob("*.jpg")))
    assert not any(not segment["isthing"] for segment in out.segments), "thresholds can be overridden"


@pytest.mark.parametrize("name", ["panoptic_fpn", "semantic_fpn"])
def test_training_begins_from_trained_weights(name, shapes, tmp_path):
    """Of the same classes: all tensors go on, as a training of no steps shows."""
    run = train_small(name, tmp_path, train=source(shapes), val=source(shapes))
    before, _ = load_weights(find_weights(run))
    again = [str(tmp_path / f"{name}.yaml"), f"model.weights={find_weights(run)}", f"output={tmp_path / 'again'}",
             "train.lr=1e-12", "train.weight_decay=0"]
    assert main(["train", *again]) == 0
    after, _ = load_weights(find_weights(tmp_path / "again"))
    assert all(np.allclose(after[key], before[key], atol=1e-6) for key in before)


def test_no_ensemble_of_them_and_no_other_data(shapes, tmp_path, capsys):
    run = train_small("semantic_fpn", tmp_path, train=source(shapes), val=source(shapes))
    assert main(["predict", str(run), str(run), str(shapes / "val"), "--out", str(tmp_path / "found")]) != 0
    assert "models of an ensemble must be one of" in capsys.readouterr().err
    assert main(["eval", str(run), "--data", str(shapes), "--split", "panoptic_val"]) != 0
    assert "classes of the data set must be known to the weights, got plaster" in capsys.readouterr().err
    assert main(["eval", str(run), "--data", str(shapes), "--split", "val"]) == 0
    assert main(["eval", str(run), "eval.test_scales=[32,64]"]) != 0
    assert "eval.test_scales must be null for" in capsys.readouterr().err


@pytest.mark.data
def test_voc_mini(shared_data, tmp_path):
    """Few images, so that evaluation is quick: its data tests are in tests/data."""
    root = tmp_path / "VOC2012"
    shutil.copytree(shared_data / "voc_mini/VOCdevkit/VOC2012/SegmentationClass", root / "SegmentationClass")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    names = (shared_data / "voc_mini/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").read_text().split()[:6]
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    images = str(shared_data / "voc_mini/VOCdevkit/VOC2012/JPEGImages")
    both = source(root, split="val", images=images)
    run = train_small("semantic_fpn", tmp_path, train=both, val=both)
    assert 0 <= json.loads((run / "results.json").read_text())["sem_seg/mIoU"] <= 1


@pytest.mark.data
def test_coco_panoptic(shared_data, tmp_path):
    folder = shared_data / "coco_mini/panoptic"
    both = source(folder / "panoptic_examples.json", images=str(folder / "input_images"))
    run = train_small("panoptic_fpn", tmp_path, train=both, val=both)
    _, meta = load_weights(find_weights(run))
    assert len(meta.classes) == 80 and len(meta.semantic_classes) == 54
    assert 0 <= json.loads((run / "results.json").read_text())["panoptic/PQ"] <= 1


PAGE = (ROOT / "docs/segmentation.md").read_text(encoding="utf-8")
SHORT = ["train.steps=1", "train.eval_every=1", "train.batch_size=2", "train.reference_batch_size=2",
         "train.warmup_steps=0", "model.backbone.width=8", "model.rpn.post_nms_topk_test=2",
         "data.augment.crop_size=64"]


def test_the_guide_runs_as_written(tmp_path, monkeypatch, capsys):
    """In an empty folder with the configs; fewer images, and training is cut to a step."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(command.replace("--images 200", "--images 4 --val 2"))
        assert words[0] == "detres" and main(words[1:] + (SHORT if words[1] == "train" else [])) == 0, command
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(compile(code, "segmentation.md", "exec"), names)
    for file in ("labels.png", "segments.png", "numbers.json", "labelled/labels", "found/panoptic"):
        assert Path(file).exists(), file


def test_what_the_guide_names_exists():
    for file in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / file).exists(), file
