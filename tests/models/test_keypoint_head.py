from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.roi_heads import keypoints_to_heatmap

from detres import losses
from detres.build import build_model
from detres.geometry.boxes import pairwise_iou
from detres.models.roi_heads import standard
from detres.models.roi_heads.keypoint_head import keypoint_cells

from .conftest import make_batch, overfit, small_config

HEAD = {"num_keypoints": 4, "channels": 32, "convs": 2}


def with_corners(images, targets):
    """Keypoints: the corners of each box, half a pixel inside; the last of each second object is not labelled."""
    x1, y1, x2, y2 = (targets.boxes + torch.tensor([0.5, 0.5, -0.5, -0.5])).unbind(-1)
    points = torch.stack([torch.stack([x, y, torch.full_like(x, 2.0)], -1)
                          for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2))], 2)  # (N, G, 4, 3)
    points[:, 1, 3] = 0
    return images, replace(targets, keypoints=points * targets.valid[..., None, None], masks=None)


def small(**sections):
    return small_config("keypoint_rcnn", **{"keypoint_head": HEAD, **sections})


@pytest.mark.parametrize("layout", ["fpn", "c4", "dc5"])
def test_losses_detections_and_gradients(layout):
    images, targets = with_corners(*make_batch(2))
    model = build_model(small(layout=layout), 3)
    found = model(images, targets)
    names = {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_keypoint"}
    assert set(found) == names == set(model.loss_names)
    sum(found.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    detections = model.eval()(images)
    assert detections.keypoints.shape == (2, detections.scores.shape[1], 4, 3) and detections.masks is None
    assert detections.valid.any() and not detections.keypoints[~detections.valid].any()


def test_overfits_four_images():
    torch.manual_seed(0)
    images, targets = with_corners(*make_batch(4))
    model = build_model(small(), 2)
    overfit(model, images, targets, steps=120)
    found = model.train()(images)  # batch statistics: those kept lag behind
    for i in range(4):
        best = found.valid[i] & (found.scores[i] > 0.5)
        iou, own = pairwise_iou(targets.boxes[i], found.boxes[i][best]).max(1)
        assert iou.min() > 0.7 and best.sum() == 2
        points, wanted = found.keypoints[i][best][own], targets.keypoints[i]
        distance = (points[..., :2] - wanted[..., :2]).norm(dim=-1)[wanted[..., 2] > 0]
        assert distance.max() < 3 and distance.mean() < 1.5, distance
        assert points[..., 2][wanted[..., 2] > 0].min() > 0.05  # of 56 * 56 cells


def test_cells_are_torchvisions():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[10.0, 20, 66, 48], [0.3, 0.7, 90.2, 80.1]])
    keypoints = torch.rand(2, 50, 3, generator=generator) * torch.tensor([80.0, 60, 3])
    keypoints[..., 2] = keypoints[..., 2].floor()
    keypoints[0, :4, :2] = torch.tensor([[66.0, 30], [20, 48], [10, 20], [66, 48]])  # on the edges
    keypoints[0, :4, 2] = 1
    expected, valid = keypoints_to_heatmap(keypoints, boxes, 56)
    cells, seen = keypoint_cells(keypoints, boxes, 56)
    assert torch.equal(seen, valid.bool()) and seen[0, :4].all() and 20 < seen.sum() < 90
    assert torch.equal(cells[seen], expected[seen])


def test_of_an_empty_box_nothing_is_seen():
    cells, seen = keypoint_cells(torch.tensor([[[5.0, 5.0, 2.0], [9.0, 9.0, 2.0]]]), torch.tensor([[9.0, 9, 9, 9]]), 56)
    assert ((cells >= 0) & (cells < 56 * 56)).all() and not seen[0, 0]


def test_loss_by_hand():
    """Of two of three keypoints, each over four cells."""
    heatmaps = torch.tensor([[[1.0, 2, 3, 4], [0, 0, 0, 0]], [[9.0, 0, 0, 0], [0, 0, 0, 0]]]).view(2, 2, 2, 2)
    cells, seen = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[True, True], [False, False]])
    first = torch.tensor([1.0, 2, 3, 4]).exp()
    expected = (-(first[3] / first.sum()).log() + torch.tensor(4.0).log()) / 2
    torch.testing.assert_close(losses.keypoint_loss(heatmaps, cells, seen)["loss_keypoint"], expected)


def test_regions_without_a_labelled_keypoint_change_nothing():
    """Not labelled anywhere: no loss, finite gradients; of one object alone: the loss is of its keypoints."""
    images, targets = with_corners(*make_batch(2))
    model = build_model(small(backbone={"norm": "gn"}), 3)
    found = model(images, replace(targets, keypoints=torch.zeros_like(targets.keypoints)))
    assert found["loss_keypoint"] == 0
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_all_rows_give_the_numbers_of_the_valid_ones(monkeypatch):
    images, targets = with_corners(*make_batch(2, empty_last=True))
    model = build_model(small(backbone={"norm": "gn"}), 3).eval()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls.weight, std=0.5)
    expected = model(images), model(images, targets)
    monkeypatch.setattr(standard, "rows_of", lambda valid: torch.arange(valid.numel()))
    found = model(images), model(images, targets)
    assert expected[0].valid.any() and expected[1]["loss_keypoint"] > 0
    torch.testing.assert_close(found[0].keypoints, expected[0].keypoints, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


def test_heatmaps_are_fp32_under_bf16():
    images, targets = with_corners(*make_batch(2))
    model = build_model(small(), 3).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found, loss = model(images), model(images, targets)["loss_keypoint"]
        heatmaps = model.roi_heads.keypoint_head(torch.randn(1, 32, 14, 14))
    assert {found.keypoints.dtype, loss.dtype, heatmaps.dtype} == {torch.float32}
    assert not torch.equal(heatmaps, heatmaps.bfloat16().float())
