"""Keypoints as a user meets them: data, training, evaluation, prediction; COCO's own file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import detres
from detres.cli import main
from detres.config import SourceConfig
from detres.config_file import load_config
from detres.data.dataset import load_dataset
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.checkpoint import find_weights, load_weights
from detres.engine.train import train
from detres.evaluation.overlaps import COCO_SIGMAS
from detres.evaluation.run import sigmas_of

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
FAST = ["model.name=keypoint_rcnn", "model.keypoint_head.channels=16", "model.keypoint_head.convs=1", "train.steps=2",
        "train.batch_size=2", "train.reference_batch_size=2", "train.eval_every=null", "data.workers=0",
        "train.warmup_steps=1", "model.box_head.score_thresh=0.0", "model.box_head.detections_per_image=20"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 6, val_images=2, formats=("coco",), progress=False,
                        options=ShapesOptions("full", size=(96, 96)))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sources = [f"data.train={data}", f"data.val={data}", f"output={folder}/run", "model.keypoint_head.num_keypoints=11"]
    results = train(load_config(DEMO, [*FAST, *sources]).config)
    assert {"bbox/AP", "keypoints/AP", "keypoints/ARl", "val/loss_keypoint"} <= set(results)
    return folder / "run"


def test_weights_carry_what_their_keypoints_are(run):
    _, meta = load_weights(find_weights(run))
    assert meta.keypoints["names"][0] == "head" and len(meta.keypoints["names"]) == 11
    assert [0, 1] in meta.keypoints["skeleton"] and meta.keypoints["classes"] == ["arrow", "figure"]


def test_eval_and_predict(run, data, tmp_path, capsys):
    assert main(["eval", str(run), "--save", str(tmp_path / "found.json")]) == 0
    assert "\nkeypoints " in capsys.readouterr().out
    assert all(len(item["keypoints"]) == 33 for item in json.loads((tmp_path / "found.json").read_text()))
    assert main(["predict", str(run), str(data / "val"), "--out", str(tmp_path), "--score-thresh", "0"]) == 0
    first, _ = json.loads((tmp_path / "predictions.json").read_text())
    assert len(first["keypoint_names"]) == 11 and all(len(item["keypoints"]) == 33 for item in first["detections"])
    assert all(any(item["keypoints"]) == (item["name"] in ("arrow", "figure")) for item in first["detections"])


def test_prediction(run, data):
    out = detres.load(run).predict(str(next((data / "val").iterdir())), score_thresh=0.0)
    assert out.keypoints.shape == (len(out), 11, 3) and len(out.skeleton) == 10
    assert torch.equal(out[1:3].keypoints, out.keypoints[1:3]) and len(out.to_coco(1)[0]["keypoints"]) == 33
    assert out.numpy()["keypoints"].shape == out.keypoints.shape and out.draw().size == (480, 480)


def test_a_wrong_number_of_keypoints_is_said_before_training(data, tmp_path):
    sources = [f"data.train={data}", f"output={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"got 17, where 'instances_train' has 11 \(head, .*num_keypoints=11"):
        train(load_config(DEMO, [*FAST, *sources]).config)


def test_sigmas_of_data_that_is_not_coco(data, caplog):
    dataset = load_dataset(SourceConfig(path=str(data)), "val")
    with caplog.at_level(logging.WARNING):
        assert sigmas_of(dataset) == (1 / 11,) * 11
    assert "1/11" in caplog.text


def test_people_of_coco(shared_data, tmp_path):
    source = {"path": str(shared_data / "coco_mini/annotations/person_keypoints_val2017.json"), "keypoint_offset": 0.5}
    dataset = load_dataset(SourceConfig(**source), "val")
    assert dataset.keypoint_names[0] == "nose" and len(dataset.skeleton) == 19 and (5, 6) in dataset.skeleton
    assert len(dataset.flip_pairs) == 8 and sigmas_of(dataset) is COCO_SIGMAS
    items = (item for record in dataset.records for item in record.annotations if item.keypoints)
    points = torch.tensor([item.keypoints for item in items]).view(-1, 3)
    labelled = points[points[:, 2] > 0]
    assert (labelled[:, :2] % 1 == 0.5).all()
