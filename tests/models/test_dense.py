"""RetinaNet, FCOS and the RPN alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor

from detres import losses
from detres.build import build_model
from detres.config import Config, ModelConfig
from detres.geometry.boxes import decode, pairwise_iou
from detres.models.backbone import FPN
from detres.models.dense_head import select
from detres.models.matching import match_points
from detres.ops.nms import nms
from detres.structures import Targets

from .conftest import make_batch, overfit, small_config
from .test_faster_rcnn import CountDataDependent

SIZES = [[12, 16, 20], [24, 30, 38], [48, 60, 76], [96, 121, 152], [192, 242, 305]]
TOP = {"retinanet": "c5", "fcos": "p5", "rpn": "pool"}
LOSSES = {"retinanet": {"loss_cls", "loss_box"}, "fcos": {"loss_cls", "loss_box", "loss_centerness"},
          "rpn": {"loss_rpn_cls", "loss_rpn_box"}}
KINDS = pytest.mark.parametrize("name", LOSSES)


def dense(name, **sections) -> ModelConfig:
    head = {"convs": 1, "norm": "gn", "box_loss": "giou" if name == "fcos" else "l1", **sections.pop("dense_head", {})}
    anchors = {"anchors": {"sizes": SIZES}} if name == "retinanet" else {}
    return small_config(name, **{"fpn": {"top": TOP[name]}, **anchors, **sections}, dense_head=head)


def total(values):
    return sum(values.values())


@pytest.mark.parametrize("relu", [True, False])
def test_p7_is_made_of_p6_with_or_without_relu(relu):
    fpn = FPN([8, 16, 32, 64], 8, top="c5", top_relu=relu)
    features = [torch.randn(1, width, 64 // side, 64 // side) for width, side in ((8, 1), (16, 2), (32, 4), (64, 8))]
    *_, p6, p7 = fpn(features)
    assert (p6 < 0).any()
    torch.testing.assert_close(p7, fpn.p7(p6.clamp(min=0) if relu else p6))


@KINDS
@pytest.mark.parametrize("top", ["pool", "c5", "p5"])
def test_losses_detections_and_gradients(name, top, batch):
    model = build_model(dense(name, fpn={"top": top}), 3)
    found = model(*batch)
    assert set(found) == LOSSES[name] == set(model.loss_names)
    total(found).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    found = model.eval()(batch[0])
    assert found.boxes.shape == (2, found.scores.shape[1], 4) and found.masks is None
    assert all(torch.isfinite(value) for value in model(*batch).values())  # losses in evaluation mode too


@KINDS
def test_overfits_four_images(name):
    torch.manual_seed(0)
    images, targets = make_batch(4)
    model = build_model(dense(name, dense_head={"nms_thresh": 0.3}), 2)  # anchors between the thresholds learn nothing
    overfit(model, images, targets, steps=100)
    found = model.train()(images)  # batch statistics: those kept lag behind
    for i in range(4):
        best = found.valid[i] & (found.scores[i] > (0.9 if name == "rpn" else 0.5))
        iou = pairwise_iou(targets.boxes[i], found.boxes[i][best])
        assert iou.max(1).values.min() > 0.75, iou
        if name != "rpn":
            assert best.sum() == 2 and set(found.labels[i][best].tolist()) == {0, 1}


@KINDS
def test_padding_changes_no_loss_and_order_of_rows_no_image(name):
    images, targets = make_batch(2)
    targets = replace(targets, valid=torch.tensor([[True, True], [True, False]]), masks=None)
    model = build_model(dense(name, backbone={"norm": "gn"}), 2)
    expected = model(images, targets)
    padded = Targets(torch.cat([targets.boxes, torch.zeros(2, 20, 4)], 1),
                     torch.cat([targets.labels, torch.zeros(2, 20, dtype=torch.int64)], 1),
                     torch.cat([targets.valid, torch.zeros(2, 20, dtype=torch.bool)], 1), targets.seeds)
    torch.testing.assert_close(model(images, padded), expected, rtol=1e-5, atol=1e-7)
    swapped = Targets(*(getattr(targets, key).flip(0) for key in ("boxes", "labels", "valid", "seeds")))
    images = replace(images, pixels=images.pixels.flip(0), sizes=images.sizes.flip(0))
    torch.testing.assert_close(model(images, swapped), expected, rtol=1e-4, atol=1e-6)


@KINDS
def test_images_without_objects_train_the_background(name):
    images, targets = make_batch(2)
    targets = replace(targets, valid=torch.zeros(2, 2, dtype=torch.bool), masks=None)
    model = build_model(dense(name), 3)
    found = model(images, targets)
    total(found).backward()
    assert [key for key, value in found.items() if value > 0] == [next(key for key in found if key.endswith("cls"))]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
@pytest.mark.parametrize("n", [1, 4])
def test_a_step_waits_for_nothing(name, n):
    """No op of a training step has a shape, or a value on the host, that depends on the data; detection has NMS alone."""
    model = build_model(dense(name), 3)
    images, targets = make_batch(n)
    with CountDataDependent() as mode:
        total(model(images, targets)).backward()
    assert not mode.counts
    with CountDataDependent() as mode:
        model.eval()(images)
    assert mode.counts.total() == n and all("nms" in key for key in mode.counts)


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_under_bf16_what_comes_out_is_fp32(name):
    images, targets = make_batch(2)
    model = build_model(dense(name, dense_head={"score_thresh": 0.0}), 3).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found, values = model(images), model(images, targets)
    for value in (found.boxes[found.valid], found.scores[found.valid], *values.values()):
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.equal(value, value.bfloat16().float())


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_box_losses(name, kind, batch):
    section = {"dense_head" if name == "retinanet" else "box_head": {"box_loss": kind}, "rpn": {"box_loss": kind}}
    model = build_model(dense(name, **section) if name == "retinanet" else small_config(name, **section), 3)
    found = model(*batch)
    total(found).backward()
    assert all(value > 0 for value in found.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind, theirs", [("giou", torchvision.ops.generalized_box_iou_loss),
                                          ("diou", torchvision.ops.distance_box_iou_loss),
                                          ("ciou", torchvision.ops.complete_box_iou_loss)])
def test_iou_losses_are_torchvisions(kind, theirs):
    """Values and gradients, of boxes near, apart and one in another; rows that do not count have neither."""
    generator = torch.Generator().manual_seed(0)
    corner = 20 * torch.rand(2, 200, 2, generator=generator)
    boxes, gt_boxes = torch.cat([corner, corner + 1 + 30 * torch.rand(2, 200, 2, generator=generator)**3], 2).double()
    boxes[0], gt_boxes[0] = torch.tensor([[3, 3, 5, 5], [0, 0, 9, 9]])
    positive = torch.rand(200, generator=generator) > 0.2
    boxes.requires_grad_()
    found = losses.iou_losses(boxes, gt_boxes, positive, kind)
    expected = theirs(boxes, gt_boxes) * positive
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value.sum(), boxes)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][positive].all() and not gradients[0][~positive].any()


@pytest.mark.parametrize("kind", losses.IOU_LOSSES)
def test_iou_losses_of_points_are_finite(kind):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5]], requires_grad=True)
    losses.iou_losses(boxes, torch.tensor([[4.0, 4, 6, 6], [5, 5, 5, 5]]), torch.tensor([True, True]), kind).sum().backward()
    assert boxes.grad.isfinite().all()


def test_losses_are_divided_by_the_positives_of_the_batch_or_of_each_image():
    generator = torch.Generator().manual_seed(0)
    logits, box_losses = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5, generator=generator)
    labels = torch.tensor([[0, 1, 2, 0, 0], [2, 0, 0, 0, 0]])
    match = torch.tensor([[1, 1, 1, 0, -1], [0, 0, 0, 0, -1]])
    box_losses = box_losses * (match == 1)
    truth = torch.nn.functional.one_hot(labels, 3) * (match == 1)[..., None]
    p = torch.where(truth == 1, logits.sigmoid(), 1 - logits.sigmoid())
    focal = torch.where(truth == 1, 0.25, 0.75) * (1 - p)**2 * -p.log() * (match >= 0)[..., None]
    options = {"focal_alpha": 0.25, "focal_gamma": 2.0, "box_weight": 2.0}
    found = losses.dense_losses(logits, labels, match, box_losses, normalize="batch", **options)
    torch.testing.assert_close(found, {"loss_cls": focal.sum() / 3, "loss_box": box_losses.sum() / 3 * 2})
    found = losses.dense_losses(logits, labels, match, box_losses, normalize="image", **options)
    torch.testing.assert_close(found, {"loss_cls": (focal[0].sum() / 3 + focal[1].sum()) / 2,
                                       "loss_box": box_losses.sum() / 3})


def test_points_match_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    model = build_model(dense("fcos"), 3)
    cells = model.points([(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)], (96, 128), torch.device("cpu"))
    assert cells[1][0].tolist() == [0, 0, 16, 16]  # the point is in the middle of its cell
    corner = torch.rand(2, 40, 2, generator=generator) * torch.tensor([100.0, 70])
    boxes = torch.cat([corner, corner + 4 + 90 * torch.rand(2, 40, 2, generator=generator)**2], 2)
    valid = torch.rand(2, 40, generator=generator) > 0.2
    ranges = model.ranges(cells)
    assert [(r[0, 0].item(), r[0, 1].item()) for r in ranges] == [
        (0, 64), (64, 128), (128, 256), (256, 512), (512, torch.inf)]
    ranges[1][:, 0], ranges[0][:, 1] = 24, 24  # of the small boxes here some are for the second level
    cells, ranges = torch.cat(cells), torch.cat(ranges)
    match, index = match_points(cells, ranges, boxes, valid, 1.5)
    assert 40 < match.sum() < match.numel() / 2 and (index > 16).any()
    for i in range(2):
        for j, (x1, y1, x2, y2) in enumerate(cells.tolist()):
            x, y, side = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1
            own = []
            for k, (left, top, right, bottom) in enumerate(boxes[i].tolist()):
                distances = (x - left, y - top, right - x, bottom - y)
                near = max(abs((left + right) / 2 - x), abs((top + bottom) / 2 - y)) < 1.5 * side
                if valid[i, k] and near and min(distances) > 0 and ranges[j, 0] < max(distances) < ranges[j, 1]:
                    own.append(((right - left) * (bottom - top), k))
            assert match[i, j] == bool(own) and (not own or index[i, j] == min(own)[1])


@pytest.mark.parametrize("with_centerness", [False, True])
@pytest.mark.parametrize("clip_before_nms", [False, True])
def test_selection_as_one_by_one(with_centerness, clip_before_nms):
    """Two levels, two images, boxes that reach past them: every pair of box and class compared."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    anchors = [torch.cat([c := 80 * torch.rand(n, 2, generator=generator) - 15, c + 20], 1) for n in (40, 10)]
    logits, deltas = [random(2, n, 3) for n in (40, 10)], [0.3 * random(2, n, 4) for n in (40, 10)]
    centerness = [random(2, n) for n in (40, 10)] if with_centerness else []
    sizes = torch.tensor([[64, 48], [50, 70]])
    found = select(logits, deltas, anchors, centerness, sizes, decode=decode, topk=15, score_thresh=0.55, nms_thresh=0.4,
                   clip_before_nms=clip_before_nms, detections_per_image=9)
    assert found.valid.sum() > 8
    for i, (height, width) in enumerate(sizes.tolist()):
        def clipped(box: Tensor) -> Tensor:
            return box.clamp(min=0).minimum(torch.tensor([width, height, width, height]))

        kept, candidates = [], []
        for level in range(2):
            scores = logits[level][i].sigmoid()
            if with_centerness:
                scores = (scores * centerness[level][i].sigmoid()[:, None]).sqrt()
            pairs = sorted(((score, a, k) for a, row in enumerate(scores.tolist()) for k, score in enumerate(row)),
                           reverse=True)[:15]
            candidates += [(score, k, decode(deltas[level][i, a], anchors[level][a])) for score, a, k in pairs
                           if score > 0.55]
        for score, k, box in sorted(candidates, key=lambda each: -each[0]):
            box = clipped(box) if clip_before_nms else box
            if all(k != other or pairwise_iou(box[None], own[None]) <= 0.4 for _, other, own in kept):
                kept.append((score, k, box))
        kept = [(score, k, clipped(box)) for score, k, box in kept[:9]]
        if not clip_before_nms:
            kept = [each for each in kept if (each[2][2:] > each[2][:2]).all()]
        valid = found.valid[i]
        assert found.labels[i][valid].tolist() == [k for _, k, _ in kept]
        torch.testing.assert_close(found.scores[i][valid], torch.tensor([score for score, _, _ in kept]))
        torch.testing.assert_close(found.boxes[i][valid], torch.stack([box for _, _, box in kept]))


def test_clipping_before_nms_makes_boxes_alike():
    """Two boxes that overlap by a quarter as a whole and are one inside the image; a third is beyond it."""
    anchors = torch.tensor([[-30.0, 0, 10, 20], [0, 0, 10, 20], [50, 50, 60, 60]])
    logits, deltas = torch.tensor([[[3.0], [2.0], [1.0]]]), torch.zeros(1, 3, 4)
    for clip_before_nms, expected in ((False, [True, True, False]), (True, [True, True, False])):
        found = select([logits], [deltas], [anchors], [], torch.tensor([[40, 40]]), decode=decode, topk=3,
                       score_thresh=0.1, nms_thresh=0.5, clip_before_nms=clip_before_nms, detections_per_image=3)
        assert found.valid[0].tolist() == expected
        kept = [[0, 0, 10, 20], [40, 40, 40, 40]] if clip_before_nms else [[0, 0, 10, 20]] * 2
        assert found.boxes[0][found.valid[0]].tolist() == kept


def test_boxes_beyond_the_image_suppress_no_other_class():
    boxes = torch.tensor([[[10.0, 10, 20, 20], [-95, -95, -85, -85], [-1, 10, 20, 20], [10, 10, 20, 20]]])
    keep = nms(boxes, torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.ones(1, 4, dtype=torch.bool), 0.5,
               torch.tensor([[0, 5, 1, 0]]))
    assert keep.tolist() == [[True, True, True, False]]


def test_configs_that_make_no_sense():
    with pytest.raises(ValueError, match="dense_head.box_loss must be giou, diou or ciou for fcos.*got l1"):
        dense("fcos", dense_head={"box_loss": "l1"})
    with pytest.raises(ValueError, match="fpn.top must be pool.*got c5 for name=mask_rcnn"):
        small_config("mask_rcnn", fpn={"top": "c5"})
    with pytest.raises(ValueError, match="eval.test_scales must be null.*got .200. for model.name=retinanet"):
        Config(model=dense("retinanet"), eval={"test_scales": [200]})
    with pytest.raises(ValueError, match="bg_iou must be at most fg_iou"):
        dense("retinanet", dense_head={"bg_iou": 0.6})
