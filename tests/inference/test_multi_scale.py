"""Multi-scale testing from files: the same numbers from `predict` and from an evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import detres
from detres.build import build_model
from detres.config import Config, SourceConfig
from detres.config_file import load_config
from detres.data.dataset import load_dataset
from detres.data.loader import build_loader
from detres.data.shapes import ShapesOptions, write_shapes
from detres.data.transforms import scale_pyramid
from detres.engine.checkpoint import WeightsMeta, save_weights
from detres.evaluation.run import evaluate_weights
from detres.inference.predictor import load_model

SCALES = "eval.test_scales=[40,64,100]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small untrained detector, with data: images of 64 x 96."""
    folder = tmp_path_factory.mktemp("run")
    write_shapes(folder / "shapes", 1, val_images=3, options=ShapesOptions("easy", size=(64, 96)), progress=False)
    config = Config.model_validate({
        "data": {"val": str(folder / "shapes"), "workers": 0}, "train": {"precision": "fp32"},
        "model": {"name": "mask_rcnn", "input": {"min_size": 48, "max_size": 64}, "fpn": {"channels": 16},
                  "pool": {"canonical_side": 30}, "mask_head": {"channels": 16, "convs": 1},
                  "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "gn", "freeze_stages": 0},
                  "box_head": {"fc_dim": 16, "score_thresh": 0.0, "detections_per_image": 20}}})
    dataset = load_dataset(SourceConfig(path=str(folder / "shapes")), "val")
    model = build_model(config.model, len(dataset.classes))
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls.weight, std=0.5)
    meta = WeightsMeta(config.model_dump(mode="json"), dataset.classes, dataset.category_ids, step=1, metrics={})
    save_weights(folder / "checkpoints" / "best.safetensors", model.state_dict(), meta)
    return folder


def test_the_loader_resizes_each_image_from_its_file(run):
    model, _, config = load_model(run, "cpu", [SCALES, "eval.test_max_size=120"])
    assert model.canonical_side == 30
    dataset = load_dataset(config.data.val, "val")
    pyramid = scale_pyramid(config.model.input, config.eval)
    batch, = build_loader(dataset, config.model.input, config.data, batch_size=3, training=False, with_masks=True,
                          pyramid=pyramid)
    assert [images.sizes[0].tolist() for images in (batch.images, *batch.images.pyramid)] == [
        [43, 64], [40, 60], [64, 96], [80, 120]]  # the ordinary scale is bounded by 64, the others by 120
    original = Image.open(batch.paths[1])
    for scaled in batch.images.pyramid:
        height, width = scaled.sizes[1].tolist()
        expected = np.array(original.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert torch.equal(scaled.pixels[1, :, :height, :width], torch.from_numpy(expected))
        assert scaled.pixels.shape[2] % 32 == scaled.pixels.shape[3] % 32 == 0
    moved = batch.to("meta")
    assert all(images.pixels.device.type == images.sizes.device.type == "meta" for images in moved.images.pyramid)


def test_predict_and_evaluate_agree(run, tmp_path):
    """Scores and boxes of a file, of an array, and of an evaluation's results; other ones without the scales."""
    evaluate_weights(run, overrides=[SCALES], device="cpu", save=tmp_path / "found.json", batch_size=1)
    saved = json.loads((tmp_path / "found.json").read_text())
    predictor, plain = detres.load(run, "cpu", [SCALES]), detres.load(run, "cpu")
    dataset = load_dataset(SourceConfig(path=str(run / "shapes")), "val")
    for record in dataset.records:
        found = predictor.predict(record.path, 0.0)
        own = [result for result in saved if result["image_id"] == record.id]
        assert len(own) == len(found) > 0
        np.testing.assert_allclose([result["score"] for result in own], found.scores.numpy(), atol=1e-6)
        boxes = np.array([result["bbox"] for result in own])
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], found.boxes[:, 2:].numpy(), atol=1e-3)
        as_array = predictor.predict(np.array(Image.open(record.path)), 0.0)
        assert torch.equal(as_array.scores, found.scores)
        assert not torch.allclose(plain.predict(record.path, 0.0).scores, found.scores, atol=1e-3)


@pytest.mark.parametrize("value", ["[]", "[64,40]", "[40,40]"])
def test_scales_must_increase(value):
    with pytest.raises(ValueError, match="test_scales must be null or increase, got"):
        load_config(None, [f"eval.test_scales={value}"])
