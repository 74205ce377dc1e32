"""Small detectors and batches for the tests of the models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detres.config import ModelConfig
from detres.structures import ImageBatch, SemanticTargets, Targets

ONE_LEVEL = {"sizes": [[16, 32, 64]]}
SMALL = {"rpn": {"pre_nms_topk_train": 200, "pre_nms_topk_test": 200, "post_nms_topk_train": 100,
                 "post_nms_topk_test": 50, "batch_per_image": 64},
         "box_head": {"batch_per_image": 32, "fc_dim": 64}, "mask_head": {"channels": 32, "convs": 1},
         "fpn": {"channels": 32}, "input": {"min_size": 96, "max_size": 128}}


def small_config(name="mask_rcnn", layout="fpn", **sections) -> ModelConfig:
    """R18 of width 16 from scratch; sections override fields."""
    config = {key: dict(value) for key, value in SMALL.items()}
    config["backbone"] = {"depth": 18, "width": 16, "weights": None, "norm": "bn", "freeze_stages": 0, "layout": layout}
    config["anchors"] = {"sizes": [[16], [24], [32], [48], [64]]} if layout == "fpn" else ONE_LEVEL
    if layout == "c4":
        config["box_head"]["resolution"], config["mask_head"] = 8, {"channels": 32, "convs": 0}
    for key, value in sections.items():
        config[key] = {**config.get(key, {}), **value}
    return ModelConfig.model_validate({"name": name, **config})


def make_batch(n=2, height=96, width=128, empty_last=False) -> tuple[ImageBatch, Targets]:
    """Images with two bright rectangles each on noise: class 0 red, class 1 blue."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 120, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    boxes, masks = torch.zeros(n, 2, 4), torch.zeros(n, 2, height, width, dtype=torch.uint8)
    for i in range(n):
        for k, (x, y) in enumerate(((6 + 5 * i, 10), (70 - 4 * i, 40 + 3 * i))):
            w, h = 30 + 4 * k, 24 + 6 * i
            boxes[i, k] = torch.tensor([x, y, x + w, y + h])
            masks[i, k, y:y + h, x:x + w] = 1
            pixels[i, 2 * k, y:y + h, x:x + w] = 240
    valid = torch.ones(n, 2, dtype=torch.bool)
    if empty_last:
        valid[-1] = False
    targets = Targets(boxes=boxes, labels=torch.tensor([[0, 1]] * n), valid=valid, seeds=torch.arange(n),
                      masks=masks[valid])
    return ImageBatch(pixels, torch.tensor([[height, width]] * n)), targets


def semantic_labels(targets: Targets) -> torch.Tensor:
    """(N, H, W) uint8 of the batch of `make_batch`: 0 the noise, 1 red, 2 blue, 255 in the first rows."""
    n, k = targets.labels.shape
    masks = targets.masks.view(n, k, *targets.masks.shape[1:])
    labels = (masks * (targets.labels + 1)[..., None, None]).amax(1).to(torch.uint8)
    labels[:, :4] = 255
    return labels


def overfit(model: torch.nn.Module, images: ImageBatch, targets: Targets | SemanticTargets, steps: int) -> None:
    """Trains on one batch; other regions are drawn each time, as the loader's seeds see to."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        drawn = replace(targets, seeds=targets.seeds + 1000 * step) if isinstance(targets, Targets) else targets
        sum(model(images, drawn).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.fixture
def batch():
    return make_batch()
