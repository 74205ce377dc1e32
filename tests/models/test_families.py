"""What holds for every family of models, on every kind of backbone."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from detres.config import TrainConfig
from detres.engine.step import backward
from detres.models.faster_rcnn import Normalize
from detres.models.norms import FrozenBatchNorm2d
from detres.models.semantic import ConvNormReLU
from detres.structures import Batch, Detections, ImageBatch, SemanticTargets, Targets

from .conftest import make_batch
from .families import BACKBONES, LAYOUTS, family, family_batch, targets_of
from .test_faster_rcnn import CountDataDependent

NAMES = pytest.mark.parametrize("name", LAYOUTS)


def check_step(model, images, targets) -> None:
    """Losses have their names and are finite; every parameter that trains gets a finite gradient, no other one."""
    losses = model(images, targets)
    assert set(losses) == set(model.loss_names) and len(losses) == len(model.loss_names)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}


def check_found(found, images) -> None:
    n, (height, width) = len(images.sizes), images.pixels.shape[-2:]
    semantic = found.semantic if isinstance(found, Detections) else found
    if semantic is not None:
        assert semantic.shape == (n, 3, height, width) and semantic.isfinite().all()
    if isinstance(found, Detections):
        assert found.boxes.shape == (*found.scores.shape, 4) and len(found.boxes) == n
        assert all(x is None or x.isfinite().all() for x in (found.boxes, found.scores, found.masks, found.keypoints))
    elif not isinstance(found, torch.Tensor):  # proposals of an RPN
        assert found.boxes.isfinite().all()


@pytest.mark.parametrize("kind", BACKBONES)
@NAMES
def test_on_every_backbone(name, kind):
    model = family(name, backbone=BACKBONES[kind])
    images, targets = family_batch(name)
    check_step(model, images, targets)
    check_found(model.eval()(images), images)


@pytest.mark.parametrize("name, layout", [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts[1:]])
def test_in_every_layout(name, layout):
    for kind in ("basic", "all at once"):
        model = family(name, layout, backbone=BACKBONES[kind])
        images, targets = family_batch(name)
        check_step(model, images, targets)
        check_found(model.eval()(images), images)


def norm_layers(model) -> set[type]:
    return {type(module) for module in model.modules() if "Norm" in type(module).__name__} \
        - {Normalize, ConvNormReLU}


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn", "sync_bn"])
@NAMES
def test_norms_everywhere(name, norm):
    """In the body, the pyramid and every head that has norms; a frozen body below them."""
    heads = {"box_head": {"convs": 1, "fcs": 1, "norm": norm}, "mask_head": {"convs": 1, "norm": norm},
             "semantic_head": {"norm": norm}, "dense_head": {"norm": "gn"}}
    if name == "point_rend":
        del heads["mask_head"]
    model = family(name, backbone={"norm": norm, "freeze_stages": 2}, fpn={"norm": norm}, **heads)
    kind = {"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "sync_bn": nn.SyncBatchNorm}.get(norm)
    gn = {module for module in norm_layers(model) if issubclass(module, nn.GroupNorm)}
    frozen = {FrozenBatchNorm2d} if norm != "gn" else set()
    dense = name in ("retinanet", "fcos")
    assert norm_layers(model) == ({kind} if kind else gn) | frozen | (gn if dense else set())
    if norm == "sync_bn":
        model.eval()  # on the CPU it has no training mode
    check_step(model, *family_batch(name))
    fixed = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert {"backbone.body.conv1.weight", "backbone.body.layer1.0.conv1.weight"} <= fixed
    assert not any(key.startswith("backbone.body.layer2") or not key.startswith("backbone.body.") for key in fixed)


def awake(name: str, **sections) -> nn.Module:
    """Scores that differ, so that their order is that of the network and not of rounding."""
    model = family(name, **sections).eval()
    for key, p in model.named_parameters():
        if p.dim() > 1 and any(part in key for part in (".cls.", ".box.", "predict.")):
            nn.init.normal_(p, std=0.2 if ".box." not in key else 0.02)
    return model


def fields(found) -> dict[str, torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return {"logits": found}
    return {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}


@NAMES
def test_what_an_image_is_batched_with_changes_nothing(name):
    """Alone, and in both orders: the same detections, to rounding."""
    model = awake(name)
    images, _ = make_batch(3)
    alone = [fields(model(ImageBatch(images.pixels[i:i + 1], images.sizes[i:i + 1]))) for i in range(3)]
    order = [2, 0, 1]
    together = fields(model(images)), fields(model(ImageBatch(images.pixels[order], images.sizes[order])))
    if "valid" in alone[0]:
        assert all(own["valid"].sum() >= 5 for own in alone)
    for i in range(3):
        for key, expected in alone[i].items():
            for batch, row in ((together[0], i), (together[1], order.index(i))):
                torch.testing.assert_close(batch[key][row], expected[0], rtol=1e-3, atol=1e-3, msg=lambda m: f"{key} {m}")


def without_objects(targets: Targets) -> Targets:
    return replace(targets, valid=torch.zeros_like(targets.valid), masks=targets.masks[:0])


def one_pixel(targets: Targets) -> Targets:
    """Each second object of an image is its pixel (50, 40)."""
    boxes, masks = targets.boxes.clone(), targets.masks.clone()
    boxes[:, 1] = torch.tensor([50.0, 40.0, 51.0, 41.0])
    masks[1::2] = 0
    masks[1::2, 40, 50] = 1
    return replace(targets, boxes=boxes, masks=masks)


@pytest.mark.parametrize("norm", ["bn", "gn"])
@NAMES
def test_few_and_small_objects(name, norm):
    images, targets = make_batch(2)
    few = make_batch(2, empty_last=True)[1]
    model = family(name, backbone={"norm": norm})
    for some in (without_objects(targets), few, one_pixel(targets)):
        model.zero_grad()
        check_step(model, images, targets_of(name, some, images))
    ignored = targets_of(name, without_objects(targets), images)
    if isinstance(ignored, SemanticTargets):
        check_step(model, images, SemanticTargets(torch.full_like(ignored.labels, 255)))
    elif ignored.semantic is not None:
        check_step(model, images, replace(ignored, semantic=torch.full_like(ignored.semantic, 255)))


# Selections of rows by a training step on the CPU, whatever the number of images: of regions that heads run on. Each
# image has NMS beside that, one for each level. On a GPU there are none.
SELECTIONS = {"faster_rcnn": 1, "mask_rcnn": 2, "keypoint_rcnn": 2, "cascade_rcnn": 3, "cascade_mask_rcnn": 4,
              "panoptic_fpn": 2, "point_rend": 2}


def with_all_rows(monkeypatch) -> None:
    """Heads run on all rows, as on a GPU."""
    for module in [module for key, module in sys.modules.items() if key.startswith("detres.models.")]:
        if hasattr(module, "rows_of"):
            monkeypatch.setattr(module, "rows_of", lambda valid: torch.arange(valid.numel(), device=valid.device))


@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU", "as on a GPU"])
@NAMES
def test_budget_of_data_dependent_ops(name, on_gpu, monkeypatch):
    if on_gpu:
        with_all_rows(monkeypatch)
    model = family(name)
    for n in (1, 4):
        images, targets = family_batch(name, n)
        with CountDataDependent() as mode:
            sum(model(images, targets).values()).backward()
        nms = sum(count for op, count in mode.counts.items() if "nms" in op)
        assert nms == (5 * n if hasattr(model, "roi_heads") else 0), mode.counts
        assert mode.counts.total() - nms == (0 if on_gpu else SELECTIONS.get(name, 0)), mode.counts


@NAMES
def test_a_batch_in_two_parts(name):
    """Losses and gradients of a step are the means of those of its parts."""
    model = family(name).eval()  # without dropout
    images, targets = make_batch(4)
    batch = Batch(images, targets_of(name, targets, images), (0, 1, 2, 3), ("a", "b", "c", "d"), images.sizes)
    expected, gradients = {}, {}
    for rows in (slice(0, 2), slice(2, 4)):
        own = ImageBatch(images.pixels[rows], images.sizes[rows])
        part = Targets(targets.boxes[rows], targets.labels[rows], targets.valid[rows], targets.seeds[rows],
                       targets.masks[2 * rows.start: 2 * rows.stop])  # two objects an image
        model.zero_grad()
        losses = model(own, targets_of(name, part, own))
        sum(losses.values()).backward()
        for key, loss in losses.items():
            expected[key] = expected.get(key, 0) + loss.detach() / 2
        for key, p in model.named_parameters():
            gradients[key] = gradients.get(key, 0) + p.grad / 2
    model.zero_grad()
    found = backward(model, batch, torch.device("cpu"), TrainConfig(batch_size=4, accumulate=2, precision="fp32"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close({key: p.grad for key, p in model.named_parameters()}, gradients, rtol=1e-3, atol=1e-5)
