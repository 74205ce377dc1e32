"""The per-class RPN: against the convolutions that define it, and against plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from detres.build import build_model
from detres.config import Config, ModelConfig
from detres.engine.train import train
from detres.models.localizer import PerClassHead, best_boxes
from detres.models.matching import hash_noise
from detres.structures import ImageBatch, Proposals, Targets

MODEL = {"name": "localizer", "input": {"min_size": 64, "max_size": 64},
         "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "bn", "freeze_stages": 0, "layout": "dc5"},
         "anchors": {"sizes": [[16, 32, 48]], "aspect_ratios": [0.5, 1.0, 2.0]},
         "rpn": {"batch_per_image": 8, "fg_iou": 0.6, "bg_iou": 0.4, "box_loss": "smooth_l1"}}


@pytest.fixture
def model():
    return build_model(ModelConfig.model_validate(MODEL), 3).eval()


@pytest.fixture
def batch() -> tuple[ImageBatch, Targets]:
    """Three images: two objects of class 2, one of class 1, and none."""
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    boxes = torch.tensor([[[5.0, 6, 40, 44], [50, 10, 80, 60]], [[20, 20, 60, 50], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 2])
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    labels = torch.tensor([[2, 2], [1, 0], [0, 0]])
    images = ImageBatch(pixels, torch.tensor([[64, 96], [64, 80], [64, 96]]))
    return images, Targets(boxes, labels, valid, torch.arange(3))


def test_head_gives_what_the_convolutions_give():
    head, features = PerClassHead(16, 3, 5), torch.randn(2, 16, 4, 6)
    torch.nn.init.normal_(head.cls.bias)
    torch.nn.init.normal_(head.box.bias)
    labels = torch.tensor([[4, 0, 4], [1, 2, 3]])
    logits, deltas = head(features, labels)
    all_logits = head.cls(features).view(2, 5, 3, 4, 6)  # class, anchor
    all_deltas = head.box(features).view(2, 5, 3, 4, 4, 6)
    for n in range(2):
        for q, label in enumerate(labels[n].tolist()):
            wanted = all_logits[n, label].permute(1, 2, 0).flatten()
            assert torch.allclose(logits[n, q], wanted, atol=1e-6)
            assert torch.allclose(deltas[n, q], all_deltas[n, label].permute(2, 3, 0, 1).reshape(-1, 4), atol=1e-6)


def test_candidates_are_the_best_anchors_decoded_and_clipped(model, batch):
    images, labels = replace(batch[0], sizes=torch.tensor([[64, 96], [64, 80], [64, 40]])), torch.tensor(
        [[0, 2], [1, 1], [2, 0]])
    model.topk = 200
    with torch.no_grad():
        torch.nn.init.normal_(model.head.box.weight, std=0.1)
        found = model(images, labels=labels)
        logits, deltas = model.head(model.backbone(model.normalize(images))[-1], labels)
    grid = (4, 6)
    anchors = [[16 * x - size / r**0.5 / 2, 16 * y - size * r**0.5 / 2, 16 * x + size / r**0.5 / 2,
                16 * y + size * r**0.5 / 2] for y in range(grid[0]) for x in range(grid[1]) for size in (16, 32, 48)
               for r in (0.5, 1.0, 2.0)]
    for n in range(3):
        height, width = images.sizes[n].tolist()
        for q in range(2):
            seen = [i for i in range(len(anchors)) if i // 9 % 6 * 16 < width]  # centred in the image
            order = sorted(seen, key=lambda i: -float(logits[n, q, i]))[:200]
            assert torch.allclose(found.scores[n, q, :len(order)], logits[n, q, order].sigmoid())
            assert not found.valid[n, q, len(order):].any()
            for place, i in enumerate(order):
                x1, y1, x2, y2 = anchors[i]
                dx, dy, dw, dh = deltas[n, q, i].tolist()
                x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
                w, h = (x2 - x1) * math.exp(dw) / 2, (y2 - y1) * math.exp(dh) / 2
                box = [min(max(v, 0), side) for v, side in zip((x - w, y - h, x + w, y + h), (width, height) * 2)]
                assert found.boxes[n, q, place].tolist() == pytest.approx(box, abs=1e-3)
                assert found.valid[n, q, place] == (box[0] < box[2] and box[1] < box[3])
    assert found.valid.any() and not found.valid.all(), "a box beyond its image is none"


def iou(a, b) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - width * height
    return width * height / union


def test_losses_of_the_true_class_against_plain_python(model, batch):
    """Positives: IoU of at least 0.6, and the best of each object; negatives: under 0.4; 4 and 4 of each image with
    boxes, those with the largest noise."""
    images, targets = batch
    found = model(images, targets)
    features = model.backbone(model.normalize(images))[-1]
    anchors = model.anchors([features.shape[-2:]], (64, 96), features.device)[0].tolist()
    noise = hash_noise(targets.seeds, len(anchors), 0)
    bce = box = count = 0
    for n in range(2):
        label = int(targets.labels[n, 0])
        logits, deltas = model.head(features[n:n + 1], torch.tensor([[label]]))
        truths = targets.boxes[n, targets.valid[n]].tolist()
        overlap = [[iou(anchor, truth) for truth in truths] for anchor in anchors]
        best = [max(column) for column in zip(*overlap)]
        positive = [i for i, row in enumerate(overlap)
                    if max(row) >= 0.6 or any(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(row, best))]
        seen = [i for i in range(len(anchors)) if i // 9 % 6 * 16 < images.sizes[n, 1]]  # centred in the image
        negative = [i for i, row in enumerate(overlap) if max(row) < 0.4 and i not in positive and i in seen]
        positive = sorted(positive, key=lambda i: -float(noise[n, i]))[:4]
        negative = sorted(negative, key=lambda i: -float(noise[n, i]))[:8 - len(positive)]
        for i in positive + negative:
            p = logits[0, 0, i].sigmoid().item()
            bce, count = bce - math.log(p if i in positive else 1 - p), count + 1
        for i in positive:
            x1, y1, x2, y2 = truths[overlap[i].index(max(overlap[i]))]
            a1, b1, a2, b2 = anchors[i]
            w, h = a2 - a1, b2 - b1
            target = ((x1 + x2 - a1 - a2) / 2 / w, (y1 + y2 - b1 - b2) / 2 / h, math.log((x2 - x1) / w),
                      math.log((y2 - y1) / h))
            for wanted, got in zip(target, deltas[0, 0, i].tolist()):
                off = abs(wanted - got)
                box += 0.5 * off**2 * 9 if off < 1 / 9 else off - 0.5 / 9
    assert count == 16
    assert found["loss_rpn_cls"].item() == pytest.approx(bce / count, rel=1e-4)
    assert found["loss_rpn_box"].item() == pytest.approx(box / count, rel=1e-4)


def test_an_image_trains_its_class_only_and_none_without_a_box(model, batch):
    images, targets = batch
    sum(model(images, targets).values()).backward()
    for layer in (model.head.cls, model.head.box):
        touched = layer.weight.grad.view(3, -1).abs().sum(1) > 0
        assert touched.tolist() == [False, True, True], "class 0 is the padding of the image without boxes"


def test_best_boxes_are_those_of_greedy_nms():
    corner = torch.rand(2, 3, 30, 2) * 40
    boxes = torch.cat([corner, corner + 10 + torch.rand(2, 3, 30, 2) * 20], -1)
    found = Proposals(boxes, torch.rand(2, 3, 30), torch.rand(2, 3, 30) > 0.2)
    kept = best_boxes(found, 0.3, 12)
    for n in range(2):
        for q in range(3):
            names: list[int] = []
            for i in sorted(range(30), key=lambda i: -float(found.scores[n, q, i])):
                if found.valid[n, q, i] and all(iou(boxes[n, q, i].tolist(), boxes[n, q, j].tolist()) <= 0.3
                                                for j in names):
                    names.append(i)
            names = names[:12]
            assert kept.valid[n, q].tolist() == [True] * len(names) + [False] * (12 - len(names))
            assert torch.equal(kept.boxes[n, q, :len(names)], boxes[n, q, names])
            assert torch.equal(kept.scores[n, q, :len(names)], found.scores[n, q, names])
    one = best_boxes(found, 0.3, 1)
    assert torch.equal(one.boxes, kept.boxes[:, :, :1]) and torch.equal(one.valid, kept.valid[:, :, :1])


def test_learns_to_find_shapes(located_shapes, tmp_path):
    """Three kinds of bright shapes on noise: at most 3 of 30 held-out boxes wrong after 200 steps of 8 images. A region
    classifier, from scratch on boxes of a localizer of 40 steps, is right where this one is not."""
    source, rpn = {"path": str(located_shapes)}, {"batch_per_image": 32, "fg_iou": 0.5, "bg_iou": 0.5}

    def error(output: str, model: dict, steps: int, **data) -> float:
        return train(Config.model_validate({
            "output": str(tmp_path / output), "device": "cpu", "model": {**MODEL, **model},
            "data": {"train": source, "val": source, "workers": 0, **data}, "eval": {"batch_size": 30},
            "train": {"batch_size": 8, "reference_batch_size": 8, "lr": 0.1, "steps": steps, "schedule": "cosine",
                      "warmup_steps": 10, "precision": "fp32", "log_every": 100}}))["loc/gt_class_error"]

    localizer = {"rpn": {**MODEL["rpn"], **rpn, "post_nms_topk_test": 20}}
    assert error("localizer", localizer, 200) <= 0.1
    short = error("short", localizer, 40)
    regions = {"name": "region_classifier", "input": {**MODEL["input"], "crop": 32},
               "box_head": {"batch_per_image": 8, "context": 4}, "rpn": localizer["rpn"]}
    found = error("regions", regions, 150, proposals=str(tmp_path / "short"))
    assert found <= 0.25 < short
