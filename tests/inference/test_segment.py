"""Prediction of semantic and panoptic models: labels, segments, files, pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import detres.inference.run as inference_run
from detres.build import build_merge
from detres.config import InputConfig, PanopticConfig
from detres.inference.draw import FILL, color_of, draw_labels
from detres.inference.predictor import Predictor
from detres.inference.run import predict_files
from detres.inference.segment import PanopticMerger, SemanticPredictor
from detres.structures import Detections, ImageBatch

INPUT = InputConfig(min_size=64, max_size=128)
CLASSES = ("background", "red", "blue")


class ColourClasses(nn.Module):
    """Labels red and blue pixels. As a panoptic model: the box around the red is a thing, blue is stuff."""

    def __init__(self, is_panoptic: bool = False):
        super().__init__()
        self.weight, self.is_panoptic = nn.Parameter(torch.zeros(1)), is_panoptic

    def forward(self, images: ImageBatch) -> torch.Tensor | Detections:
        pixels = images.pixels.float()
        logits = torch.stack([torch.full_like(pixels[:, 0], 100.0), pixels[:, 0], pixels[:, 2]], 1)
        if not self.is_panoptic:
            return logits
        n = len(pixels)
        boxes, valid = torch.zeros(n, 2, 4), torch.zeros(n, 2, dtype=torch.bool)
        for i in range(n):
            y, x = (pixels[i, 0] > 150).nonzero(as_tuple=True)
            if len(x):
                boxes[i, :] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
                valid[i] = True
        semantic = torch.stack([pixels[:, 0], torch.full_like(pixels[:, 0], 100.0), pixels[:, 2]], 1)
        return Detections(boxes, torch.tensor([[0.9, 0.3]]).expand(n, 2), torch.tensor([[1, 0]]).expand(n, 2), valid,
                          torch.ones(n, 2, 28, 28), semantic=semantic)


def picture(height: int = 60, width: int = 80) -> np.ndarray:
    """A quarter red, a quarter blue, the rest grey."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[:height // 2, :width // 2] = 250, 0, 0
    image[height // 2:, width // 2:] = 0, 0, 250
    return image


@pytest.fixture
def semantic() -> SemanticPredictor:
    return SemanticPredictor(ColourClasses(), CLASSES, INPUT)


@pytest.fixture
def panoptic() -> Predictor:
    merger = PanopticMerger(build_merge(PanopticConfig(stuff_area=100)), ("dog", "cat"), (18, 17),
                            ("things", "grass", "sky"), (0, 193, 187))
    return Predictor(ColourClasses(True), merger.classes, merger.category_ids, INPUT, panoptic=merger)


def test_labels_of_the_pixels_of_the_image(semantic):
    one, other = semantic.predict([picture(), picture(100, 70)])
    assert one.labels.dtype == torch.uint8 and one.labels.shape == (60, 80) and other.labels.shape == (100, 70)
    expected = np.zeros((60, 80), int)
    expected[:30, :40], expected[30:, 40:] = 1, 2
    assert (one.labels.numpy() == expected).mean() > 0.97
    shares = one.shares()
    assert list(shares) == ["background", "red", "blue"] or list(shares) == ["background", "blue", "red"]
    assert sum(shares.values()) == pytest.approx(1) and shares["red"] == pytest.approx(0.25, abs=0.02)
    assert "background 49%" in repr(one) and "SemanticPrediction(image" in repr(one)
    assert np.array_equal(np.array(one.label_image()), one.labels.numpy())
    blank = semantic.predict(np.full((30, 30, 3), 60, np.uint8), min_size=32)
    assert blank.shares() == {"background": 1}


def test_a_picture_with_a_legend(semantic):
    out = semantic.predict(picture(600, 800))
    drawn = np.array(out.draw())
    assert drawn.shape[0] == 600 and drawn.shape[1] > 820, "a panel at the right"
    inside = drawn[150, 200].astype(float)
    np.testing.assert_allclose(inside, np.array([250, 0, 0]) * (1 - FILL) + np.array(color_of(1)) * FILL, atol=1)
    assert drawn[450, 200].tolist() == [60, 60, 60], "background stays as it is"
    panel = drawn[:, 800:].reshape(-1, 3).tolist()
    assert list(color_of(1)) in panel and list(color_of(2)) in panel and list(color_of(0)) not in panel
    assert np.array(out.draw(legend=False)).shape == (600, 800, 3)
    many = np.arange(200, dtype=np.uint8).repeat(80 * 60 // 200).reshape(60, 80)
    drawn = draw_labels(picture(), many, [f"class {k}" for k in range(200)])
    assert drawn.height == 60 * 6, "what has no room is left out"
    assert draw_labels(picture(), np.zeros((60, 80), np.uint8), CLASSES).width == 80 * 6


def test_segments_of_things_and_stuff(panoptic):
    one, other = panoptic.predict([picture(), picture(100, 70)])
    assert one.panoptic.shape == (60, 80) and one.panoptic.dtype == torch.int32 and other.panoptic.shape == (100, 70)
    found = {segment["name"]: segment for segment in one.segments}
    assert set(found) == {"cat", "grass", "sky"}
    cat, sky = found["cat"], found["sky"]
    assert (cat["category_id"], cat["isthing"], sky["category_id"], sky["isthing"]) == (17, True, 187, False)
    assert cat["score"] == pytest.approx(0.9) and sky["score"] is None
    for segment in one.segments:
        assert segment["area"] == (one.panoptic == segment["id"]).sum()
    assert cat["area"] == pytest.approx(1200, rel=0.1) and one.panoptic[10, 10] == cat["id"]
    assert one.panoptic[50, 70] == sky["id"] and len(one) == 1 and one.names == ["cat"]
    assert one.semantic.dtype == torch.uint8 and other.semantic.shape == (100, 70)
    assert [one.semantic[at].item() for at in ((10, 10), (10, 70), (50, 70))] == [0, 1, 2], "under things, too"
    assert one[:0].semantic is one.semantic and one.above(0.95).semantic is one.semantic
    drawn = np.array(one.draw())
    colours = [np.array(color_of(label)) for label in (1, 2, 3)]
    for (y, x), colour, own in zip(((60, 60), (60, 400), (340, 460)), colours, ((250, 0, 0), (60,) * 3, (0, 0, 250))):
        np.testing.assert_allclose(drawn[y, x], np.array(own) * (1 - FILL) + colour * FILL, atol=2)


def test_what_is_not_kept_is_not_in_the_map(panoptic):
    assert {s["name"] for s in panoptic.predict(picture(), score_thresh=0.95).segments} == {"grass", "sky"}
    assert len(panoptic.predict(picture(), score_thresh=0)) == 2, "but the map has thresholds of its own"
    assert [s["name"] for s in panoptic.predict(picture(), score_thresh=0).segments].count("dog") == 0
    nothing = panoptic.predict(np.zeros((20, 20, 3), np.uint8), min_size=8)
    assert len(nothing) == 0 and [s["name"] for s in nothing.segments] == ["grass"]
    assert nothing[:0].draw().size == (480, 480)


@pytest.mark.parametrize("kind", ["semantic", "panoptic"])
def test_files(kind, request, tmp_path, monkeypatch):
    monkeypatch.setattr(inference_run, "load_predictor", lambda *_: request.getfixturevalue(kind))
    for name in ("a.png", "b.jpg"):
        Image.fromarray(picture()).save(tmp_path / name, **({"quality": 100} if name == "b.jpg" else {}))
    entries = json.loads(predict_files("weights", [tmp_path], tmp_path / "out").read_text())
    assert [entry["picture"] for entry in entries] == ["a.png", "b.jpg"]
    entry = entries[0]
    if kind == "semantic":
        labels = np.array(Image.open(tmp_path / "out" / entry["labels"]))
        assert labels.shape == (60, 80) and entry["labels"] == "labels/a.png"
        assert {each["name"]: each["label"] for each in entry["classes"]} == {"background": 0, "red": 1, "blue": 2}
        for each in entry["classes"]:
            assert (labels == each["label"]).mean() == pytest.approx(each["share"])
        with pytest.raises(ValueError, match="score_thresh must be left out for a model without detections"):
            predict_files("weights", [tmp_path / "a.png"], tmp_path / "out", score_thresh=0.3)
    else:
        colours = np.array(Image.open(tmp_path / "out" / entry["panoptic"])).astype(int)
        ids = colours @ [1, 256, 65536]
        assert [set(each) for each in entry["segments"]] == [
            {"id", "name", "category_id", "isthing", "score", "area"}] * 3
        assert all((ids == each["id"]).sum() == each["area"] for each in entry["segments"])
        assert [each["name"] for each in entry["detections"]] == ["cat"]
