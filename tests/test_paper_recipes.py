"""Configs of configs/paper against the sentences of arXiv 1512.03385 that they follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from detres.config import Config
from detres.config_file import load_config

PAPER = Path(__file__).resolve().parents[1] / "configs" / "paper"


def config_of(row: str) -> Config:
    return load_config(PAPER / f"{row}.yaml").config


def rows(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(PAPER).with_suffix("")) for pattern in patterns for path in PAPER.glob(pattern))


@pytest.mark.parametrize("row", rows("table[2345]/*.yaml"))
def test_imagenet(row):
    """Section 3.4."""
    config = config_of(row)
    train, augment, backbone = config.train, config.data.classification, config.model.backbone
    assert augment.scales == (256, 480), "its shorter side randomly sampled in [256, 480] for scale augmentation"
    assert config.model.input.crop == 224 and augment.pad == 0, "a 224x224 crop is randomly sampled"
    assert augment.flip == 0.5, "from an image or its horizontal flip"
    assert augment.pca_colour == 0.1, "the standard color augmentation in [21] is used"
    assert (backbone.norm, backbone.freeze_stages, backbone.weights, backbone.stride_in_1x1) == ("bn", 0, None, True)
    assert (train.optimizer, train.batch_size, train.lr) == ("sgd", 256, 0.1)
    assert train.reference_batch_size == train.batch_size, "as stated, not scaled"
    assert train.schedule == "plateau" and train.keep_best == "cls/top1_error" and train.steps == 60 * 10**4
    assert (train.warmup_steps, train.warmup_until_error) == (0, None)
    assert (train.weight_decay, train.momentum, train.decay_norm_and_bias) == (1e-4, 0.9, True)


@pytest.mark.parametrize("row", rows("table4/*.yaml", "table13/dense*.yaml", "table14/*.yaml"))
def test_fully_convolutional_scales(row):
    """Section 3.4: "images are resized such that the shorter side is in {224, 256, 384, 480, 640}"."""
    tests = config_of(row).eval
    assert (tests.crops, tests.test_scales) == ("dense", (224, 256, 384, 480, 640))


@pytest.mark.parametrize("row", rows("table6/*.yaml", "figure6/*.yaml"))
def test_cifar(row):
    """Section 4.2."""
    config = config_of(row)
    train, augment, backbone = config.train, config.data.classification, config.model.backbone
    assert (augment.pad, augment.flip, augment.scales, augment.pca_colour) == (4, 0.5, None, 0)
    assert (config.model.input.min_size, config.model.input.crop, backbone.width) == (32, 32, 16)
    assert (backbone.stem, backbone.norm, backbone.freeze_stages, backbone.weights) == ("cifar", "bn", 0, None)
    assert backbone.shortcut == ("none" if "plain" in row else "A"), "identity shortcuts in all cases"
    assert (train.batch_size, train.reference_batch_size, train.lr) == (128, 128, 0.1)
    assert (train.schedule, train.milestones, train.steps) == ("multistep", (32_000, 48_000), 64_000)
    assert (train.weight_decay, train.momentum, train.decay_norm_and_bias) == (1e-4, 0.9, True)
    if backbone.depth >= 110:
        assert train.lr * train.warmup_factor == pytest.approx(0.01), "we use 0.01 to warm up the training"
        assert train.warmup_until_error == 0.8, "until the training error is below 80%"
    else:
        assert (train.warmup_steps, train.warmup_until_error) == (0, None)


@pytest.mark.parametrize("row", rows("table13/*.yaml", "table14/*.yaml"))
def test_localization(row):
    """Appendix C."""
    config = config_of(row)
    rpn, train = config.model.rpn, config.train
    assert config.model.backbone.depth == 101 and config.model.input.crop == 224
    assert rpn.post_nms_topk_test == 200, "the highest scored 200 proposals"
    if config.model.name == "localizer":
        assert config.data.augment.crop_size == 224, "we randomly sample 224x224 crops for data augmentation"
        assert (rpn.batch_per_image, rpn.positive_fraction) == (8, 0.5), "8 anchors ..., a ratio of 1:1"
        assert train.batch_size == 256, "a mini-batch size of 256 images"
    else:
        assert train.batch_size * config.model.box_head.batch_per_image == 256, "a mini-batch size of 256"
    assert train.reference_batch_size == train.batch_size
