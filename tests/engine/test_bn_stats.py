"""Statistics of batch norms over a set, against the set as one batch and against plain sums."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detres.build import build_model
from detres.cli import main
from detres.config import Config, ModelConfig
from detres.data.loader import pad_images
from detres.engine.bn_stats import measure, write_statistics
from detres.engine.checkpoint import WeightsMeta, load_weights, save_weights
from detres.structures import Batch, ImageBatch
from detres.weights.backbone import load_backbone

BACKBONE = {"depth": 18, "width": 8, "norm": "bn", "weights": None, "freeze_stages": 0}


def config(name: str = "classifier", **backbone) -> ModelConfig:
    return ModelConfig.model_validate({
        "name": name, "input": {"min_size": 32, "max_size": 32, "crop": 32}, "backbone": {**BACKBONE, **backbone},
        "fpn": {"channels": 8}, "box_head": {"fc_dim": 8}, "mask_head": {"channels": 8},
        "anchors": {"sizes": [[32]] if backbone.get("layout") == "c4" else [[8], [16], [32], [64], [128]]}})


def classifier() -> nn.Module:
    """With statistics as a training leaves them: near, not right."""
    model = build_model(config(), 3)
    for norm in norms(model).values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Coarse patterns, of other brightness each: their batches differ."""
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(40, 60 + 9 * i, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8) for i in range(count)]


def batches(*sizes: int) -> list[Batch]:
    """Always the same images, 21 in all, in batches of these sizes."""
    images, ends = pictures(21), np.cumsum(sizes)
    assert ends[-1] == 21
    parts = [pad_images(images[end - size:end], 32) for size, end in zip(sizes, ends)]
    return [Batch(part, None, (), (), part.sizes) for part in parts]


def of_one_batch(model: nn.Module) -> nn.Module:
    """The oracle: PyTorch's own statistics of the whole set as one batch."""
    model, (whole,) = copy.deepcopy(model), batches(21)
    counts = defaultdict(int)
    for norm in norms(model).values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.register_forward_hook(lambda norm, inputs, _: counts.update({norm: inputs[0][:, 0].numel()}))
    with torch.no_grad():
        model.train().features(whole.images)
    for norm in norms(model).values():
        norm.running_var *= (counts[norm] - 1) / counts[norm]  # PyTorch divides by one less
    return model


def assert_close(model: nn.Module, expected: nn.Module, rtol: float = 1e-4) -> None:
    """In deviations."""
    for norm, right in zip(norms(model).values(), norms(expected).values(), strict=True):
        deviation = right.running_var.sqrt()
        assert ((norm.running_mean - right.running_mean).abs() / deviation).max() < rtol
        torch.testing.assert_close(norm.running_var, right.running_var, rtol=rtol, atol=0)


@pytest.mark.parametrize("sizes, sequential", [((21,), False), ((8, 8, 5), True), ((1, 20), True)])
def test_the_whole_set_as_one_batch(sizes, sequential):
    model = classifier()
    expected = of_one_batch(model)
    measure(model, batches(*sizes), 21, sequential)
    assert_close(model, expected)
    assert all(norm.training and norm.track_running_stats for norm in norms(model).values())  # as before


def test_batches_are_averaged_by_plain_sums():
    """In numpy, float64: what came into each layer while batches were normalised by their own statistics."""
    model, inputs = classifier(), defaultdict(list)
    reference = copy.deepcopy(model).train()
    for name, norm in norms(reference).items():
        norm.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0].double().numpy()))
    with torch.no_grad():
        for batch in batches(8, 8, 5):
            reference.features(batch.images)
    measure(model, batches(8, 8, 5), 21)
    assert len(inputs) == 20
    for name, norm in norms(model).items():
        values = np.concatenate(inputs[name]).transpose(1, 0, 2, 3).reshape(norm.num_features, -1)
        mean, variance = values.mean(1), values.var(1)
        np.testing.assert_allclose(norm.running_mean, mean, atol=1e-5 * variance.max() ** 0.5)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-5)
        of_batches = np.mean([part.transpose(1, 0, 2, 3).reshape(len(mean), -1).var(1) for part in inputs[name]], 0)
        assert np.abs(of_batches / variance - 1).max() > 1e-3  # the mean of variances is another number


def test_a_detector_begins_from_the_statistics(tmp_path, capsys):
    """From a folder of images through the command line; the detector's constants then are the classifier's norms."""
    for i, image in enumerate(pictures(10)):
        (tmp_path / f"data/train/{'abc'[i % 3]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"data/train/{'abc'[i % 3]}/{i}.png")
    model, own = classifier(), Config.model_validate({
        "model": config(), "data": {"train": str(tmp_path / "data"), "workers": 0}, "train": {"batch_size": 4}})
    meta = WeightsMeta(own.model_dump(mode="json"), ("a", "b", "c"), (0, 1, 2), 7, {"cls/top1": 0.5})
    save_weights(tmp_path / "in.safetensors", model.state_dict(), meta)
    out = tmp_path / "out.safetensors"
    assert main(["bn-stats", str(tmp_path / "in.safetensors"), "--out", str(out), "--device", "cpu"]) == 0
    tensors, written = load_weights(out)
    assert written.metrics == {} and written.step == 7 and written.config["model"]["name"] == "classifier"
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, tensors[name])]
    assert len(changed) == 40 and all(name.endswith(("running_mean", "running_var")) for name in changed)

    model.load_state_dict(tensors)
    detector_config = config("faster_rcnn", layout="c4", norm="frozen_bn", weights=str(out))
    detector = build_model(detector_config, 20)
    load_backbone(detector, detector_config)
    x = torch.randn(2, 3, 32, 32)
    found = detector.roi_heads.box_head(detector.backbone(x)[0])
    torch.testing.assert_close(found, model.eval().backbone(x)[0], rtol=1e-4, atol=1e-4)
    assert "measure 10/10 images" in capsys.readouterr().err


def test_a_detectors_backbone_is_measured_and_begins_another(tmp_path, shapes):
    own = Config.model_validate({"model": config("mask_rcnn"), "data": {"train": str(shapes), "workers": 0}})
    model = build_model(own.model, 3)
    save_weights(tmp_path / "in.safetensors", model.state_dict(),
                 WeightsMeta(own.model_dump(mode="json"), ("a", "b", "c"), (1, 2, 3), 7, {}))
    out = tmp_path / "out.safetensors"
    assert main(["bn-stats", str(tmp_path / "in.safetensors"), "--out", str(out), "--batch-size", "5"]) == 0
    frozen = config("faster_rcnn", norm="frozen_bn", weights=str(out))
    detector = build_model(frozen, 2)
    load_backbone(detector, frozen)
    tensors = load_weights(out)[0]
    assert torch.equal(detector.backbone.body.layer4[1].bn2.running_var,
                       tensors["backbone.body.layer4.1.bn2.running_var"])
    assert not torch.equal(detector.backbone.body.bn1.running_mean, torch.zeros(8))


def test_what_cannot_be_measured(tmp_path):
    images = [Batch(ImageBatch(torch.zeros(1, 3, 32, 32), torch.tensor([[32, 32]])), None, (), (), None)]
    with pytest.raises(ValueError, match="must have batch norms to measure, got none"):
        measure(build_model(config(norm="frozen_bn"), 3), images, 1)
    with pytest.raises(ValueError, match=r"got 5 elsewhere, such as roi_heads\.box_head"):
        measure(build_model(config("faster_rcnn", layout="c4"), 3), images, 1)
    with pytest.raises(ValueError, match="must be a .safetensors file, got statistics.pth"):
        write_statistics(tmp_path, "statistics.pth")
