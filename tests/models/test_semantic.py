from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from detres.build import build_model
from detres.models.semantic import SemanticFPNHead, default_rates, mean_inside
from detres.structures import ImageBatch, SemanticTargets

from .conftest import make_batch, overfit, semantic_labels, small_config
from .test_faster_rcnn import CountDataDependent

KINDS = [("fcn", "dc4"), ("deeplabv3", "dc4"), ("deeplabv3_plus", "dc5"), ("semantic_fpn", "fpn")]


def make_semantic_batch(n=2) -> tuple[ImageBatch, SemanticTargets]:
    images, targets = make_batch(n)
    return images, SemanticTargets(semantic_labels(targets))


def mean_iou(logits: torch.Tensor, labels: torch.Tensor) -> float:
    known = labels != 255
    answer, truth = logits.argmax(1)[known], labels[known].long()
    counts = torch.bincount(3 * truth + answer, minlength=9).view(3, 3)
    return float((counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).mean())


@pytest.mark.parametrize("name, layout", KINDS)
def test_losses_logits_and_gradients(name, layout):
    model = build_model(small_config(name, layout), 3)
    images, targets = make_semantic_batch()
    found = model(images, targets)
    aux = {"loss_aux"} if name != "semantic_fpn" else set()
    assert set(found) == set(model.loss_names) == {"loss_semantic"} | aux
    sum(found.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    logits = model.eval()(images)
    assert logits.shape == (2, 3, 96, 128) and logits.dtype == torch.float32
    assert all(torch.isfinite(value) for value in model(images, targets).values())


@pytest.mark.parametrize("name, layout", KINDS)
def test_overfits_four_images(name, layout):
    torch.manual_seed(0)
    images, targets = make_semantic_batch(4)
    head = {"dropout": 0, "channels": 64, "rates": [1, 2, 3]}
    model = build_model(small_config(name, layout, semantic_head=head), 3)
    overfit(model, images, targets, steps=80)
    logits = model(images)  # by the statistics of the batch: those kept lag behind
    assert mean_iou(logits, targets.labels) > 0.9
    known = targets.labels != 255
    assert (logits.argmax(1) == targets.labels)[known].float().mean() > 0.98


@pytest.mark.parametrize("loss", ["dice", "lovasz"])
def test_overfits_with_other_losses(loss):
    torch.manual_seed(0)
    images, targets = make_semantic_batch(4)
    config = small_config("semantic_fpn", semantic_head={"channels": 32, "loss": loss, "norm": "bn"})
    model = build_model(config, 3)
    overfit(model, images, targets, steps=50)
    assert mean_iou(model(images), targets.labels) > 0.85


@pytest.mark.parametrize("norm", ["frozen_bn", "sync_bn", "gn"])
@pytest.mark.parametrize("name, layout", KINDS)
def test_norms_of_heads(name, layout, norm):
    model = build_model(small_config(name, layout, backbone={"norm": "gn"}, semantic_head={"norm": norm}), 3)
    if norm == "sync_bn":
        model.eval()  # on the CPU it has no training mode
    sum(model(*make_semantic_batch(1)).values()).backward()


def test_weights_of_losses():
    batch = make_semantic_batch()
    options = {"loss_weight": 0.25, "aux_weight": 0.125}
    torch.manual_seed(0)
    plain = build_model(small_config("fcn", "dc4", semantic_head={"aux_weight": 1}), 3).eval()
    torch.manual_seed(0)
    weighted = build_model(small_config("fcn", "dc4", semantic_head=options), 3).eval()
    for name, factor in (("loss_semantic", 0.25), ("loss_aux", 0.125)):
        torch.testing.assert_close(weighted(*batch)[name], plain(*batch)[name] * factor)
    assert build_model(small_config("fcn", "dc4", semantic_head={"aux_weight": 0}), 3).aux_head is None


def test_layouts_are_strides():
    image = torch.zeros(1, 3, 64, 64)
    for layout, strides in (("c5", [4, 8, 16, 32]), ("dc5", [4, 8, 16, 16]), ("dc4", [4, 8, 8, 8])):
        backbone = build_model(small_config("fcn", layout), 2).backbone
        assert backbone.strides == strides == [64 // x.shape[-1] for x in backbone(image)]
    assert default_rates(8) == (12, 24, 36) and default_rates(16) == (6, 12, 18)
    model = build_model(small_config("deeplabv3", "dc5"), 2)
    assert [branch.conv.dilation[0] for branch in model.head.aspp.branches] == [1, 6, 12, 18]
    with pytest.raises(ValidationError, match="layout must be fpn for a semantic_fpn, got dc5"):
        small_config("semantic_fpn", "dc5")
    with pytest.raises(ValidationError, match="layout must be c5 or dc5 or dc4 for a fcn, got fpn"):
        small_config("fcn", "fpn")


def test_global_pool_is_of_the_content():
    """DeepLab's image mean does not look at padding: as if the image were alone on its canvas."""
    x = torch.randn(2, 3, 6, 8)
    means = mean_inside(x, torch.tensor([[41, 64], [48, 17]]), 8)
    torch.testing.assert_close(means, torch.stack([x[0].mean((1, 2)), x[1, :, :, :3].mean((1, 2))])[..., None, None])


def test_one_image_has_no_variance():
    images, targets = make_semantic_batch(1)
    model = build_model(small_config("deeplabv3", "dc4"), 3)
    with pytest.raises(ValueError, match="two images or more on each process, got 1"):
        model(images, targets)
    assert model.eval()(images).shape == (1, 3, 96, 128)


def test_semantic_fpn_takes_any_grid():
    """Canvases that are no multiple of 32, whose levels are not halves of one another."""
    head = SemanticFPNHead(8, 3, channels=16)
    features = [torch.randn(1, 8, h, w) for h, w in ((25, 32), (13, 16), (7, 8), (4, 4))]
    assert head(features, torch.tensor([[100, 128]])).shape == (1, 3, 25, 32)


@pytest.mark.parametrize("loss", ["ce+dice", "lovasz"])
@pytest.mark.parametrize("name, layout", KINDS)
def test_no_data_dependent_ops(name, layout, loss):
    model = build_model(small_config(name, layout, semantic_head={"loss": loss}), 3)
    batch = make_semantic_batch()
    with CountDataDependent() as seen:
        sum(model(*batch).values()).backward()
        model.eval()(batch[0])
    assert not seen.counts
