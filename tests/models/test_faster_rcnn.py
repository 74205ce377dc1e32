from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detres.build import build_model
from detres.geometry.boxes import pairwise_iou
from detres.models.roi_heads.standard import RoIHeads
from detres.ops.paste_masks import paste_masks
from detres.structures import ImageBatch, Targets

from .conftest import make_batch, overfit, small_config

FAMILIES = [(name, layout) for name in ("faster_rcnn", "mask_rcnn") for layout in ("fpn", "c4", "dc5")]


def total(losses):
    return sum(losses.values())


@pytest.mark.parametrize("name, layout", FAMILIES)
def test_losses_detections_and_gradients(name, layout, batch):
    model = build_model(small_config(name, layout), 3)
    losses = model(*batch)
    mask = {"loss_mask"} if name == "mask_rcnn" else set()
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"} | mask == set(model.loss_names)
    total(losses).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None]
    assert not without
    found = model.eval()(batch[0])
    assert found.boxes.shape == (2, found.scores.shape[1], 4)
    assert (found.masks is None) == (name == "faster_rcnn")
    again = model(*batch)  # losses in evaluation mode too
    assert all(torch.isfinite(value) for value in again.values())


@pytest.mark.parametrize("name, layout", FAMILIES)
def test_overfits_four_images(name, layout):
    torch.manual_seed(0)
    images, targets = make_batch(4)
    model = build_model(small_config(name, layout), 2)
    overfit(model, images, targets, steps={"fpn": 200, "dc5": 320, "c4": 400}[layout])
    found = model.train()(images)  # batch statistics: those kept lag behind
    for i in range(4):
        best = found.valid[i] & (found.scores[i] > 0.5)
        iou = pairwise_iou(targets.boxes[i], found.boxes[i][best])
        assert iou.max(1).values.min() > 0.75, iou
        assert best.sum() == 2 and set(found.labels[i][best].tolist()) == {0, 1}
        if name == "mask_rcnn":
            bitmaps = paste_masks(found.masks[i][best], found.boxes[i][best], (96, 128))
            wanted = targets.masks[2 * i:2 * i + 2][found.labels[i][best]].bool()
            mask_iou = (bitmaps & wanted).sum((1, 2)) / (bitmaps | wanted).sum((1, 2))
            assert mask_iou.min() > (0.5 if layout == "c4" else 0.7), mask_iou  # masks of 8 x 8 cells in C4 here


@pytest.mark.parametrize("options", [{"box_loss": "giou"}, {"box_loss": "smooth_l1"}, {"class_agnostic": True}])
def test_box_options(options, batch):
    losses = build_model(small_config("faster_rcnn", box_head=options), 3)(*batch)
    assert losses["loss_box"] > 0 and torch.isfinite(total(losses))


@pytest.mark.parametrize("norm", ["frozen_bn", "gn", "sync_bn"])
def test_norms_and_pooling(norm, batch):
    config = small_config("mask_rcnn", backbone={"norm": norm}, pool={"type": "pool"})
    model = build_model(config, 3)
    if norm == "sync_bn":
        model.eval()  # on the CPU it has no training mode
    total(model(*batch)).backward()


def test_images_without_objects_train_the_background():
    images, targets = make_batch(2, empty_last=True)
    none = Targets(boxes=torch.zeros(2, 1, 4), labels=torch.zeros(2, 1, dtype=torch.int64), seeds=torch.arange(2),
                   valid=torch.zeros(2, 1, dtype=torch.bool), masks=torch.zeros(0, 96, 128, dtype=torch.uint8))
    model = build_model(small_config(), 3)
    for some in (targets, none):
        losses = model(images, some)
        total(losses).backward()
        assert all(torch.isfinite(value) for value in losses.values())
    assert losses["loss_box"] == 0 and losses["loss_mask"] == 0 and losses["loss_cls"] > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("layout", ["fpn", "c4"])
def test_no_proposals(layout):
    """Proposals all too small: nothing is found and nothing breaks, with or without ground truth."""
    images, targets = make_batch(2)
    none = Targets(boxes=targets.boxes, labels=targets.labels, valid=torch.zeros(2, 2, dtype=torch.bool),
                   seeds=targets.seeds, masks=torch.zeros(0, 96, 128, dtype=torch.uint8))
    model = build_model(small_config("mask_rcnn", layout, rpn={"min_size": 500}, backbone={"norm": "gn"}), 3).eval()
    assert not model(images).valid.any()
    for some in (targets, none):
        total(model(images, some)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_changes_no_loss_and_order_of_rows_no_image():
    """More padded ground truth, and another order of images: the same losses, the same detections."""
    images, targets = make_batch(2)
    model = build_model(small_config(backbone={"norm": "gn"}), 2)
    padded = Targets(boxes=torch.cat([targets.boxes, torch.zeros(2, 3, 4)], 1),
                     labels=torch.cat([targets.labels, torch.zeros(2, 3, dtype=torch.int64)], 1),
                     valid=torch.cat([targets.valid, torch.zeros(2, 3, dtype=torch.bool)], 1), seeds=targets.seeds,
                     masks=targets.masks)
    swapped = Targets(boxes=targets.boxes.flip(0), labels=targets.labels.flip(0), valid=targets.valid.flip(0),
                      seeds=targets.seeds.flip(0), masks=targets.masks.view(2, 2, 96, 128).flip(0).flatten(0, 1))
    expected = model(images, targets)
    for name, value in model(ImageBatch(images.pixels.flip(0), images.sizes.flip(0)), swapped).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    for name, value in model(images, padded).items():
        if name.startswith("loss_rpn"):  # RoIs are drawn from one list of proposals and ground truth
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


class CountDataDependent(TorchDispatchMode):
    """Counts the ops whose output shape, or a value on the host, depends on the data."""

    NAMES = ("nonzero", "masked_select", "_local_scalar_dense", "item", "unique", "torchvision::nms",
             "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        boolean_index = "aten.index.Tensor" in name and any(
            i is not None and i.dtype == torch.bool for i in (args[1] if len(args) > 1 else ()))
        if boolean_index or any(part.replace("::", ".") in name for part in self.NAMES):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [1, 4])
def test_budget_of_data_dependent_ops(n):
    """A training step on the CPU: NMS of each level of each image, and three selections of rows for the whole batch
    (on a GPU: one NMS, no selection). torchvision's step has 61 at batch 2 and 193 at batch 8."""
    model = build_model(small_config(), 3)
    images, targets = make_batch(n)
    with CountDataDependent() as mode:
        total(model(images, targets)).backward()
    nms = sum(count for name, count in mode.counts.items() if "nms" in name)
    assert nms == 5 * n, mode.counts
    assert mode.counts.total() - nms <= 3, mode.counts


@pytest.mark.parametrize("min_size, expected", [(None, [10.0]), (0.01, [10.0, 20.0])], ids=["detectron2", "torchvision"])
def test_a_box_clipped_to_nothing_is_dropped_last_or_first(min_size, expected):
    heads = RoIHeads(nn.Identity(), nn.Identity(), num_classes=1, detections_per_image=2, min_size=min_size)
    boxes = torch.tensor([[[0, 0, 20, 10], [70, 0, 80, 10], [30, 0, 40, 10]]], dtype=torch.float32)
    probs = torch.tensor([0.7, 0.9, 0.8]).view(1, 3, 1)
    found = heads.select(probs, torch.zeros(1, 3, 1, 4), boxes, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[50, 60]]))
    width = (found.boxes[..., 2] - found.boxes[..., 0])[found.valid]
    assert width.tolist() == expected and found.scores.amin() == (0 if min_size is None else 0.7)
