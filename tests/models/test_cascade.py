from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from detres.build import build_model
from detres.config import ModelConfig
from detres.geometry.boxes import pairwise_iou
from detres.models.roi_heads import standard
from detres.models.roi_heads.standard import RoIHeads
from detres.ops.paste_masks import paste_masks
from detres.structures import Proposals

from .conftest import make_batch, overfit, small_config

CASCADES = ("cascade_rcnn", "cascade_mask_rcnn")
STAGES = ((0.5, (10, 10, 5, 5)), (0.6, (20, 20, 10, 10)), (0.7, (30, 30, 15, 15)))  # IoU, weights of deltas


def wide_awake(name="cascade_rcnn", layout="fpn", moves=0.15, **sections):
    """A model whose heads have opinions: scores that vary, boxes that move."""
    torch.manual_seed(0)
    model = build_model(small_config(name, layout, backbone={"norm": "gn"}, **sections), 3).eval()
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls.weight, std=0.5)
        torch.nn.init.normal_(predictor.box.weight, std=moves)
    return model


@pytest.mark.parametrize("layout", ["fpn", "dc5"])
@pytest.mark.parametrize("name", CASCADES)
def test_losses_detections_and_gradients(name, layout, batch):
    model = build_model(small_config(name, layout), 3)
    losses = model(*batch)
    assert set(losses) == set(model.loss_names) and len(losses) == 8 + ("mask" in name)
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    found = model.eval()(batch[0])
    assert (found.masks is None) == (name == "cascade_rcnn")


def test_overfits_four_images():
    torch.manual_seed(0)
    images, targets = make_batch(4)
    model = build_model(small_config("cascade_mask_rcnn"), 2)
    overfit(model, images, targets, steps=90)
    found = model.train()(images)  # batch statistics: those kept lag behind
    for i in range(4):
        best = found.valid[i] & (found.scores[i] > 0.5)
        iou = pairwise_iou(targets.boxes[i], found.boxes[i][best])
        assert iou.max(1).values.min() > 0.8, iou
        assert best.sum() == 2 and set(found.labels[i][best].tolist()) == {0, 1}
        bitmaps = paste_masks(found.masks[i][best], found.boxes[i][best], (96, 128))
        wanted = targets.masks[2 * i:2 * i + 2][found.labels[i][best]].bool()
        assert ((bitmaps & wanted).sum((1, 2)) / (bitmaps | wanted).sum((1, 2))).min() > 0.7


# What the paper and Detectron2's CascadeROIHeads do, image by image and box by box.


def apply_deltas(box, deltas, weights):
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = (value / weight for value, weight in zip(deltas, weights))
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * width, (y1 + y2) / 2 + dy * height
    width, height = (side * math.exp(min(log, math.log(1000 / 16))) for side, log in ((width, dw), (height, dh)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def deltas_of(box, gt, weights):
    width, height = box[2] - box[0], box[3] - box[1]
    gt_width, gt_height = gt[2] - gt[0], gt[3] - gt[1]
    plain = [((gt[0] + gt[2]) - (box[0] + box[2])) / 2 / width, ((gt[1] + gt[3]) - (box[1] + box[3])) / 2 / height,
             math.log(gt_width / width), math.log(gt_height / height)]
    return [value * weight for value, weight in zip(plain, weights)]


def clipped(box, size):
    height, width = size
    return [min(max(v, 0.0), limit) for v, limit in zip(box, (width, height, width, height))]


def iou_of(a, b):
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return overlap / (areas - overlap) if areas > overlap else 0.0


def stage_outputs(model, features, image, boxes, k):
    """Logits (P, K + 1) and deltas (P, 4) of a list of boxes of one image."""
    heads = model.roi_heads
    index = torch.full((len(boxes),), image)
    pooled = model.pool(features, torch.tensor(boxes).view(-1, 4), index, heads.resolution)
    logits, deltas = heads.box_predictor[k](heads.box_head[k](pooled))
    return logits, deltas[:, 0]


@pytest.mark.parametrize("average", ["probs", "logits"])
@torch.no_grad()
def test_scores_and_boxes_are_those_of_the_stages_one_after_another(average):
    model, (images, _) = wide_awake(cascade={"average": average}), make_batch(2)
    images = replace(images, sizes=torch.tensor([[96, 128], [70, 90]]))
    features = model.features(images)
    proposals, regions = model.propose(images)
    probs, deltas = model.roi_heads.score(regions, proposals.boxes, proposals.valid, images.sizes)
    assert deltas.shape[2:] == (1, 4)
    for i, size in enumerate(images.sizes.tolist()):
        boxes = start = proposals.boxes[i][proposals.valid[i]].tolist()
        expected = []
        for k, (_, weights) in enumerate(STAGES):
            logits, moves = stage_outputs(model, features, i, boxes, k)
            expected.append(logits.softmax(-1) if average == "probs" else logits)
            boxes = [clipped(apply_deltas(box, move, weights), size) for box, move in zip(boxes, moves.tolist())]
        mean = sum(expected) / 3 if average == "probs" else (sum(expected) / 3).softmax(-1)
        torch.testing.assert_close(probs[i][proposals.valid[i]], mean[:, :-1], atol=1e-5, rtol=0)
        moves = deltas[i, proposals.valid[i], 0].tolist()
        own = [apply_deltas(box, move, STAGES[0][1]) for box, move in zip(start, moves)]
        torch.testing.assert_close(torch.tensor(own), torch.tensor(boxes), atol=1e-2, rtol=0)


@torch.no_grad()
def test_each_stage_bounds_how_a_box_grows_and_nothing_bounds_them_together():
    model, (images, _) = wide_awake(), make_batch(1)
    heads = model.roi_heads
    for k, (_, weights) in enumerate(STAGES):
        heads.box_predictor[k].box.weight.zero_()
        heads.box_predictor[k].box.bias.copy_(torch.tensor([0.0, 0.0, 2.0, 9.0 if k == 0 else 0.0]) * weights[2])
    proposals = Proposals(torch.tensor([[[63.9, 47.4, 64.1, 48.6]]]), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    _, regions = model.propose(images)
    found = heads.detect(partial(heads.score, regions, sizes=images.sizes), proposals, images.sizes)
    width, height = (found.boxes[0, 0, 2:] - found.boxes[0, 0, :2]).tolist()
    assert width == pytest.approx(0.2 * math.exp(6), rel=1e-3) and height == pytest.approx(1.2 * 1000 / 16, rel=1e-3)


def test_losses_are_those_of_the_stages_one_after_another():
    model, (images, targets) = wide_awake(moves=0.03), make_batch(2)
    targets = replace(targets, valid=torch.tensor([[True, True], [True, False]]))
    features = model.features(images)
    # near the objects, so that some stay foreground at 0.7
    near = targets.boxes.repeat(1, 12, 1) + torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(1)) * 2
    proposals = Proposals(near.clamp(min=0), torch.zeros(2, 24), torch.arange(24).expand(2, 24) < 20)
    heads = model.roi_heads
    rois = heads.sample(proposals, targets)
    found = heads.losses(partial(model.pool, features), proposals, targets, images.sizes)
    per_stage = [{"cls": 0.0, "box": 0.0, "count": 0, "foreground": 0} for _ in STAGES]
    for i, size in enumerate(images.sizes.tolist()):
        boxes = rois.boxes[i][rois.valid[i]].tolist()
        truths = targets.boxes[i][targets.valid[i]].tolist()
        labels = targets.labels[i][targets.valid[i]].tolist()
        for k, ((iou, weights), sums) in enumerate(zip(STAGES, per_stage)):
            logits, moves = stage_outputs(model, features, i, boxes, k)
            for box, logit, move in zip(boxes, logits.tolist(), moves.tolist()):
                best = max(range(len(truths)), key=lambda g: iou_of(truths[g], box))
                foreground = iou_of(truths[best], box) >= iou
                label = labels[best] if foreground else 3
                sums["cls"] += math.log(sum(math.exp(value) for value in logit)) - logit[label]
                wanted = deltas_of(box, truths[best], weights)
                sums["box"] += foreground * sum(abs(a - b) for a, b in zip(move, wanted))
                sums["count"] += 1
                sums["foreground"] += foreground
            boxes = [clipped(apply_deltas(box, move, weights), size) for box, move in zip(boxes, moves.tolist())]
            boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
    assert all(2 <= sums["foreground"] < sums["count"] for sums in per_stage), per_stage
    assert per_stage[0]["count"] == rois.valid.sum()
    for k, sums in enumerate(per_stage):
        for kind in ("cls", "box"):
            torch.testing.assert_close(found[f"loss_{kind}_stage{k}"].item(), sums[kind] / sums["count"], rtol=1e-4,
                                       atol=0)


def test_features_learn_at_the_rate_of_one_head():
    """A third of the gradient of each stage reaches the features, all of it the stage's own parameters."""
    model, (images, targets) = wide_awake(), make_batch(2)
    heads, features = model.roi_heads, [level.detach().requires_grad_() for level in model.features(images)]
    proposals, _ = model.propose(images)
    gradients = {}
    for scaled in (True, False):
        regions = partial(model.pool, features)
        if scaled:
            losses, *_ = heads.box_losses(regions, heads.sample(proposals, targets), targets, images.sizes)
            loss = losses["loss_cls_stage0"]
        else:
            losses, *_ = heads.stage_losses(heads.box_head[0], heads.box_predictor[0], STAGES[0][1], regions,
                                            heads.sample(proposals, targets), targets, images.sizes)
            loss = losses["loss_cls"]
        gradients[scaled] = torch.autograd.grad(loss, [features[0], heads.box_head[0].fcs[0].weight])
    torch.testing.assert_close(gradients[True][0] * 3, gradients[False][0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(gradients[True][1], gradients[False][1])


def test_boxes_that_clipping_leaves_empty_are_trained_no_further():
    model, (images, targets) = wide_awake(), make_batch(2)
    heads = model.roi_heads
    rois = heads.sample(model.propose(images)[0], targets)
    rows = rois.valid.flatten().nonzero()[:, 0]
    away = torch.zeros(len(rows), 1, 4)
    away[0, 0, 0] = 1000.0  # a hundred widths to the right
    moved = heads.relabel(rois, rows, away, STAGES[0][1], targets, images.sizes, 0.6)
    assert moved.valid.sum() == rois.valid.sum() - 1 and not moved.valid.flatten()[rows[0]]
    assert moved.boxes.isfinite().all()


@pytest.mark.parametrize("head", [{"refine": True, "vote_thresh": 0.5}, {"global_context": True}])
def test_refinement_voting_and_context(head, batch):
    model = wide_awake(box_head=head)
    found = model(batch[0])
    assert found.valid.any() and found.boxes.isfinite().all()
    sum(model(*batch).values()).backward()


def test_images_without_objects_or_proposals():
    images, targets = make_batch(2)
    none = replace(targets, valid=torch.zeros(2, 2, dtype=torch.bool), masks=targets.masks[:0])
    model = wide_awake("cascade_mask_rcnn", rpn={"min_size": 500})
    assert not model(images).valid.any()
    for some in (targets, none):
        sum(model(images, some).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_all_rows_give_the_numbers_of_the_valid_ones(monkeypatch):
    """As on a GPU: what is not valid runs along, and is masked."""
    model, (images, targets) = wide_awake("cascade_mask_rcnn", rpn={"min_size": 20, "nms_thresh": 0.3}), make_batch(2)
    images = replace(images, sizes=torch.tensor([[96, 128], [70, 90]]))
    targets = replace(targets, valid=torch.tensor([[True, True], [False, True]]), masks=targets.masks[[0, 1, 3]])
    assert not model.propose(images)[0].valid.all()
    expected = model(images), model(images, targets)
    monkeypatch.setattr(standard, "rows_of", lambda valid: torch.arange(valid.numel()))
    found = model(images), model(images, targets)
    assert expected[0].valid.sum() > 10
    for name in ("boxes", "scores", "labels", "valid", "masks"):
        torch.testing.assert_close(getattr(found[0], name), getattr(expected[0], name), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert all(loss.isfinite() for loss in found[1].values())


def test_one_stage_is_the_ordinary_detector():
    model, (images, _) = wide_awake(cascade={"ious": []}), make_batch(2)
    heads = model.roi_heads
    assert len(heads.box_head) == 1
    plain = RoIHeads(heads.box_head[0], heads.box_predictor[0], num_classes=3)
    proposals, regions = model.propose(images)
    for own, other in zip(heads.score(regions, proposals.boxes, proposals.valid, images.sizes),
                          plain.score(regions, proposals.boxes, proposals.valid, images.sizes)):
        assert own.shape == other.shape
    own, other = (each.detect(partial(each.score, regions, sizes=images.sizes), proposals, images.sizes)
                  for each in (heads, plain))
    torch.testing.assert_close(own.boxes, other.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(own.scores, other.scores)


def test_conv5_of_a_c4_detector_makes_no_cascade():
    with pytest.raises(ValueError, match="layout must not be c4 for a cascade.*cascade_rcnn"):
        ModelConfig.model_validate({"name": "cascade_rcnn", "backbone": {"layout": "c4"}, "anchors": {"sizes": [[32]]}})
