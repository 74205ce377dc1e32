from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from detres.ops import decode_heatmaps as module
from detres.ops.decode_heatmaps import decode_heatmaps

SIZE = (120, 160)
BOXES = torch.tensor([[3.0, 4.0, 60.5, 90.2], [0.0, 0.0, 160.0, 120.0], [10.2, 20.7, 10.9, 21.1],
                      [50.0, 50.0, 80.0, 60.0], [0.5, 1.5, 56.5, 57.5]])  # under a pixel, and as large as a heatmap


@pytest.fixture(params=["inside", "whole"])
def device_path(request, monkeypatch):
    """As on a CPU; as on a GPU, in several chunks."""
    if request.param == "whole":
        monkeypatch.setattr(module, "_peaks_inside", module._peaks_whole)
        monkeypatch.setattr(module, "CELLS_AT_ONCE", 2 * 7 * 120 * 160)


def heatmaps(count=len(BOXES), joints=7, side=56):
    """Smooth, as bilinear upsampling makes them, with some peaks at the border."""
    coarse = torch.randn(count, joints, side // 2, side // 2, generator=torch.Generator().manual_seed(0)) * 3
    coarse[:, 0, 0, 0], coarse[:, 1, -1, 5] = 20, 20
    return F.interpolate(coarse, scale_factor=2.0, mode="bilinear")


def naive(maps, box, score):
    """One box, after the published algorithm of Detectron2's structures/keypoints.py, in float64."""
    x1, y1, x2, y2 = box.tolist()
    width, height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
    columns, rows = math.ceil(width), math.ceil(height)
    points = []
    for logits in maps.double():
        resized = F.interpolate(logits[None, None], size=(rows, columns), mode="bicubic", align_corners=False)[0, 0]
        value, where = resized.flatten().max(0)
        row, column = divmod(int(where), columns)
        total = sum(math.exp(v - value) for v in logits.flatten().tolist())
        points.append([(column + 0.5) * width / columns + x1, (row + 0.5) * height / rows + y1,
                       float(value) if score == "logit" else 1 / total])
    return points


@pytest.mark.parametrize("score", ["probability", "logit"])
def test_is_the_published_algorithm(device_path, score):
    maps = heatmaps()
    expected = torch.tensor([naive(own, box, score) for own, box in zip(maps, BOXES)])
    found = decode_heatmaps(maps, BOXES, SIZE, score)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(found[:, :, 2].unique()) > 20


def test_logits_are_torchvisions(device_path):
    maps = heatmaps(joints=17)
    points, scores = heatmaps_to_keypoints(maps, BOXES)
    found = decode_heatmaps(maps, BOXES, SIZE, "logit")
    torch.testing.assert_close(found[..., :2], points[..., :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[..., 2], scores, atol=1e-4, rtol=1e-5)


def test_no_boxes(device_path):
    assert decode_heatmaps(torch.zeros(0, 7, 56, 56), torch.zeros(0, 4), SIZE).shape == (0, 7, 3)


def test_peaks_stay_where_they_are_under_bf16():
    maps = heatmaps()
    with torch.autocast("cpu", torch.bfloat16):
        found = decode_heatmaps(maps, BOXES, SIZE)
    assert torch.equal(found, decode_heatmaps(maps, BOXES, SIZE))
