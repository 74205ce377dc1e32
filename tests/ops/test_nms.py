from __future__ import annotations

import torch
import torchvision

from detres.ops.nms import nms


def random_boxes(rows, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(rows, n, 2, generator=generator) * 60
    wh = torch.rand(rows, n, 2, generator=generator) * 40 + 1
    return torch.cat([xy, xy + wh], -1), torch.rand(rows, n, generator=generator)


def naive(boxes, scores, valid, threshold, groups):
    keep = []
    for i in sorted(valid.nonzero()[:, 0].tolist(), key=lambda i: -scores[i]):
        iou = torchvision.ops.box_iou(boxes[i:i + 1], boxes[keep])[0] if keep else torch.zeros(0)
        if not any(v > threshold and groups[i] == groups[j] for v, j in zip(iou, keep)):
            keep.append(i)
    return set(keep)


def test_equals_the_definition_row_by_row():
    boxes, scores = random_boxes(3, 60)
    valid = torch.rand(3, 60) > 0.2
    groups = torch.randint(0, 3, (3, 60))
    found = nms(boxes, scores, valid, 0.4, groups)
    for row in range(3):
        assert set(found[row].nonzero()[:, 0].tolist()) == naive(boxes[row], scores[row], valid[row], 0.4, groups[row])


def test_without_groups_and_idempotent():
    boxes, scores = random_boxes(2, 80)
    keep = nms(boxes, scores, torch.ones(2, 80, dtype=torch.bool), 0.5)
    assert 0 < keep.sum() < 160
    assert torch.equal(nms(boxes, scores, keep, 0.5), keep)


def test_padding_suppresses_nothing_and_empty_input():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
    keep = nms(boxes, torch.tensor([[0.9, 0.8]]), torch.tensor([[False, True]]), 0.5)
    assert keep.tolist() == [[False, True]]
    assert nms(boxes[:, :0], torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool), 0.5).shape == (1, 0)
