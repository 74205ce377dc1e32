"""Classification: the model, its training by the one loop, plateau and warm-up by error."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from detres.build import build_model
from detres.config import Config, ModelConfig
from detres.engine.optim import Schedule, plateaus
from detres.engine.step import split
from detres.engine.train import train
from detres.structures import Batch, ClassTargets, ImageBatch
from detres.weights.backbone import load_backbone

MODEL = {"name": "classifier", "input": {"min_size": 16},
         "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "bn", "freeze_stages": 0}}


@pytest.fixture
def images() -> tuple[ImageBatch, ClassTargets]:
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    return ImageBatch(pixels, torch.tensor([[64, 64]] * 4)), ClassTargets(torch.tensor([0, 1, 2, 0]))


def test_loss_and_error_are_those_of_the_logits(images):
    model = build_model(ModelConfig.model_validate(MODEL), 3).eval()
    logits = model(images[0])
    measured = model(*images)
    probabilities = logits.softmax(1)[torch.arange(4), images[1].labels]
    assert torch.allclose(measured["loss_cls"], -probabilities.log().mean(), atol=1e-6)
    wrong = sum(int(row.argmax()) != label for row, label in zip(logits, images[1].labels.tolist()))
    assert measured["error"].item() == wrong / 4 and logits.shape == (4, 3)


def test_parts_of_a_batch(images):
    batch = Batch(*images, (), (), images[0].sizes)
    parts = split(batch, 2)
    assert torch.equal(torch.cat([part.targets.labels for part in parts]), images[1].labels)
    assert torch.equal(torch.cat([part.images.pixels for part in parts]), images[0].pixels)


def test_plateau_divides_after_patience():
    """Evaluations since the best: 2 without a better one divide, 2 more divide again, a better one begins anew."""
    assert [plateaus(stale, 2) for stale in ([], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2])
            ] == [0, 0, 1, 1, 2, 2]
    schedule = Schedule(lr=0.1, steps=100, kind="plateau", plateau_patience=2)
    rows = [{"step": 10, "stale": 0}, {"step": 15, "loss": 1.0}, {"step": 20, "stale": 1}, {"step": 30, "stale": 2}]
    assert schedule.at(25, rows[:3]) == 0.1 and schedule.at(35, rows) == pytest.approx(0.01)


def test_warmup_lasts_until_the_training_error_falls():
    schedule = Schedule(lr=0.1, steps=100, kind="multistep", warmup_factor=0.1, warmup_until_error=0.8)
    rows = [{"step": 10, "error": 0.9}, {"step": 20, "error": 0.79}, {"step": 30, "error": 0.85}]
    assert schedule.at(50, rows[:1]) == pytest.approx(0.01) and schedule.at(50, rows) == 0.1


def write_colours(folder: Path) -> None:
    """Reddish, greenish and bluish noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 10)):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            for channel, label in enumerate(("red", "green", "blue")):
                for i in range(count):
                    pixels = rng.integers(0, 180, (16, 16, 3), np.uint8)
                    pixels[..., channel] += 60
                    picture = io.BytesIO()
                    Image.fromarray(pixels).save(picture, "PNG")
                    file.writestr(f"{label}/{i}.png", picture.getvalue())


def test_trains_to_no_error(tmp_path):
    """Top-1 of 1 on held-out images in 40 steps, with plateau, EMA, accumulation; the run can be resumed."""
    write_colours(tmp_path / "data")
    source = {"path": str(tmp_path / "data")}
    config = Config.model_validate({
        "output": str(tmp_path / "run"), "device": "cpu", "model": {**MODEL, "backbone": {
            "depth": 8, "stem": "cifar", "shortcut": "A", "width": 8, "weights": None, "norm": "bn",
            "freeze_stages": 0}},
        "data": {"train": source, "val": source, "classification": {"pad": 2}}, "eval": {"batch_size": 10},
        "train": {"batch_size": 12, "reference_batch_size": 12, "lr": 0.05, "steps": 40, "schedule": "plateau",
                  "plateau_patience": 2, "warmup_steps": 0, "precision": "fp32", "eval_every": 10, "log_every": 5,
                  "accumulate": 2}})
    metrics = train(config)
    assert metrics["cls/top1"] == 1.0 and metrics["val/loss"] == metrics["val/loss_cls"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["stale"] for row in rows if "cls/top1" in row][0] == 0 and all("error" in row for row in rows
                                                                               if "loss" in row)
    assert train(config, resume=True) == metrics


def test_torchvision_checkpoint_gives_its_logits(tmp_path):
    """ResNet-18 with its fc, from a file of torchvision's keys; the fc stays new for other classes."""
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    config = ModelConfig.model_validate({"name": "classifier", "backbone": {
        "depth": 18, "norm": "bn", "freeze_stages": 0, "weights": str(tmp_path / "resnet18.pth")}})
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([[64, 64]] * 2))
    same, other = build_model(config, 7).eval(), build_model(config, 5).eval()
    load_backbone(same, config)
    load_backbone(other, config)
    with torch.no_grad():
        assert torch.allclose(same(images), theirs(same.normalize(images)), atol=1e-5)
        assert other(images).shape == (2, 5)
    assert torch.equal(other.backbone.body.conv1.weight, theirs.conv1.weight)
