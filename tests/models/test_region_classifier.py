"""Region classifiers: what they cut out, what they train on, what they make of proposals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from detres.build import build_model
from detres.config import ModelConfig
from detres.models.region_classifier import RegionEnsemble, warp
from detres.structures import ImageBatch, Proposals, Targets

MODEL = {"name": "region_classifier", "input": {"min_size": 64, "max_size": 96, "crop": 32},
         "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "bn", "freeze_stages": 0},
         "box_head": {"batch_per_image": 6, "positive_fraction": 0.5, "context": 4, "box_loss": "smooth_l1"}}


@pytest.fixture
def model():
    model = build_model(ModelConfig.model_validate(MODEL), 3).eval()
    for layer in (model.cls, model.box):
        torch.nn.init.normal_(layer.weight, std=0.1)
        torch.nn.init.normal_(layer.bias, std=0.1)
    return model


@pytest.fixture
def images() -> ImageBatch:
    return ImageBatch(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [64, 80]]))


def boxes_of(*shape: int) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * 30
    return torch.cat([corner, corner + 8 + torch.rand(*shape, 2) * 25], -1)


def test_warped_region_is_what_interpolation_gives():
    """12 x 8 pixels, in the middle 24 x 24 of 32 x 32: two samples each way for a pixel of the region, averaged."""
    pixels = torch.randn(2, 3, 40, 50)
    box = torch.tensor([[10.0, 12.0, 22.0, 20.0]])
    region = warp(pixels, box, torch.tensor([1]), 32, 4)
    margin_x, margin_y = 12 * 4 / 24, 8 * 4 / 24
    rows = (torch.arange(64) + 0.5) / 64 * (8 + 2 * margin_y) + 12 - margin_y
    columns = (torch.arange(64) + 0.5) / 64 * (12 + 2 * margin_x) + 10 - margin_x
    grid = torch.stack(torch.meshgrid(columns / 50 * 2 - 1, rows / 40 * 2 - 1, indexing="xy"), -1)[None]
    sampled = F.grid_sample(pixels[1:], grid, mode="bilinear", padding_mode="border", align_corners=False)
    assert torch.allclose(region, F.avg_pool2d(sampled, 2), atol=1e-5)


def test_outside_the_image_is_mean_colour():
    region = warp(torch.ones(1, 3, 20, 20), torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([0]), 32, 8)
    assert (region[..., 8:24, 8:24] == 1).all() and (region[..., :6, :] == 0).all() and (region[..., 26:] == 0).all()


def test_judges_nothing_at_first():
    model = build_model(ModelConfig.model_validate(MODEL), 3)
    for layer, std in ((model.cls, 0.01), (model.box, 0.001)):  # arXiv 1504.08083, section 2.3
        assert layer.weight.std().item() == pytest.approx(std, rel=0.2) and not layer.bias.any()


def test_judges_and_moves_each_proposal_for_its_class(model, images):
    labels = torch.tensor([[0, 2, 1], [2, 2, 0]])
    proposals = Proposals(boxes_of(2, 3, 5), torch.rand(2, 3, 5), torch.rand(2, 3, 5) > 0.2)
    with torch.no_grad():
        found = model(images, proposals=proposals, labels=labels)
        pixels = model.normalize(images)
        for n, q, p in proposals.valid.nonzero().tolist():
            box = proposals.boxes[n, q, p]
            feature = model.backbone(warp(pixels, box[None], torch.tensor([n]), 32, 4))[-1].mean((2, 3))
            label = int(labels[n, q])
            score = model.cls(feature)[0, label].sigmoid().item()
            assert found.scores[n, q, p].item() == pytest.approx(score, abs=1e-5)
            dx, dy, dw, dh = (model.box(feature).view(3, 4)[label] / torch.tensor([10, 10, 5, 5])).tolist()
            x1, y1, x2, y2 = box.tolist()
            x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            w, h = (x2 - x1) * math.exp(dw) / 2, (y2 - y1) * math.exp(dh) / 2
            height, width = images.sizes[n].tolist()
            wanted = [min(max(v, 0), side) for v, side in zip((x - w, y - h, x + w, y + h), (width, height) * 2)]
            assert found.boxes[n, q, p].tolist() == pytest.approx(wanted, abs=1e-3)
    assert torch.equal(found.valid, proposals.valid)
    none = model(images, proposals=Proposals(proposals.boxes, proposals.scores, proposals.valid & False), labels=labels)
    assert not none.valid.any() and not none.scores.any()


def iou(a, b) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return width * height / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - width * height)


def test_samples_are_proposals_and_truth_by_overlap(model):
    truth = torch.tensor([[[10.0, 10, 40, 40]], [[0.0, 0, 0, 0]]])
    boxes = torch.cat([truth[:1] + shift for shift in (1, 3, 10, 25, 30, 40)], 1).repeat(2, 1, 1)  # IoU 0.29 of 10
    valid = torch.tensor([[True] * 5 + [False]] * 2)
    targets = Targets(truth, torch.tensor([[2], [0]]), torch.tensor([[True], [False]]), torch.arange(2),
                      proposals=Proposals(boxes, torch.rand(2, 6), valid))
    model.batch_per_image = 7
    sampled, match, gt_index = model.sample(targets)
    assert sorted(match[0].tolist()) == [-1, 0, 0, 0, 1, 1, 1], "two proposals and the truth overlap it; one is padding"
    for box, kind in zip(sampled[0, :6].tolist(), match[0, :6].tolist()):
        assert (iou(box, truth[0, 0].tolist()) >= 0.5) == (kind == 1)
    assert (match[1] == -1).all() and (gt_index == 0).all(), "an image without a box trains nothing"


def test_losses_of_the_true_class_against_plain_python(model, images):
    truth = torch.tensor([[[8.0, 8, 40, 44]], [[20.0, 10, 60, 50]]])
    shift = torch.tensor([[2.0, 1, -3, 4], [30, 10, 35, 12], [-1, -2, 3, 2], [40, 0, 36, 0]])
    targets = Targets(truth, torch.tensor([[2], [1]]), torch.ones(2, 1, dtype=torch.bool), torch.arange(2),
                      proposals=Proposals(truth + shift, torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)))
    found, (boxes, match, _) = model(images, targets), model.sample(targets)
    bce = box_loss = 0
    for n, label in ((0, 2), (1, 1)):
        for box, kind in zip(boxes[n], match[n].tolist()):
            if kind == -1:
                continue
            region = warp(model.normalize(images), box[None], torch.tensor([n]), 32, 4)
            feature = model.backbone(region)[-1].mean((2, 3))
            p = model.cls(feature)[0, label].sigmoid().item()
            bce -= math.log(p if kind else 1 - p)
            if kind:
                (x1, y1, x2, y2), (a1, b1, a2, b2) = truth[n, 0].tolist(), box.tolist()
                target = (10 * (x1 + x2 - a1 - a2) / 2 / (a2 - a1), 10 * (y1 + y2 - b1 - b2) / 2 / (b2 - b1),
                          5 * math.log((x2 - x1) / (a2 - a1)), 5 * math.log((y2 - y1) / (b2 - b1)))
                for wanted, got in zip(target, model.box(feature).view(3, 4)[label].tolist()):
                    off = abs(wanted - got)
                    box_loss += 0.5 * off**2 if off < 1 else off - 0.5
    count = int((match >= 0).sum())
    assert count == 8 and int((match == 1).sum()) == 4, "of 5 regions 2 may be positive; there are 2 negative ones"
    assert found["loss_cls"].item() == pytest.approx(bce / count, rel=1e-4)
    assert found["loss_box"].item() == pytest.approx(box_loss / count, rel=1e-4)
    model.box_loss["box_weight"] = 3.0
    weighted = model(images, targets)
    torch.testing.assert_close([weighted["loss_cls"], weighted["loss_box"]], [found["loss_cls"], 3 * found["loss_box"]])
    sum(found.values()).backward()
    assert (model.cls.weight.grad.abs().sum(1) > 0).tolist() == [False, True, True]


def test_ensemble_averages(model, images):
    other = build_model(ModelConfig.model_validate(MODEL), 3).eval()
    labels, proposals = torch.tensor([[0], [2]]), Proposals(boxes_of(2, 1, 4), torch.rand(2, 1, 4),
                                                            torch.ones(2, 1, 4, dtype=torch.bool))
    with torch.no_grad():
        both = RegionEnsemble([model, other])(images, proposals, labels)
        a, b = (each(images, proposals=proposals, labels=labels) for each in (model, other))
    assert torch.allclose(both.scores, (a.scores + b.scores) / 2)
    assert torch.allclose(both.boxes, (a.boxes + b.boxes) / 2)


def test_context_leaves_room_for_the_region():
    with pytest.raises(ValueError, match="context must be under half of input.crop.*context=16, crop=32"):
        ModelConfig.model_validate({"name": "region_classifier", "input": {"crop": 32}, "backbone": {"layout": "c5"},
                                    "anchors": {"sizes": [[32]]}})
