"""Against `grid_sample`, one row of points at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from detres.ops.point_sample import bitmap_sample, point_sample


def naive(map_, points):
    """(C, H, W) and (P, 2) -> (P, C)."""
    size = torch.tensor([map_.shape[2], map_.shape[1]])
    return F.grid_sample(map_[None], (points / size * 2 - 1)[None, None].to(map_), align_corners=False)[0, :, 0].T


def draw(dtype=torch.float64):
    points = torch.rand(6, 40, 2, dtype=dtype) * torch.tensor([26, 19]) - 3  # some outside
    points[0, 0], points[0, 1] = torch.tensor([0.0, 0]), torch.tensor([20.0, 13])  # corners
    return points, torch.tensor([2, 0, 1, 1, 0, 2])


def test_equals_grid_sample():
    maps, (points, index) = torch.randn(3, 5, 13, 20, dtype=torch.float64), draw()
    found = point_sample(maps, points, index)
    expected = torch.stack([naive(maps[i], row) for i, row in zip(index, points)])
    torch.testing.assert_close(found, expected)
    assert (found == 0).all(-1).any() and point_sample(maps, points[:0], index[:0]).shape == (0, 40, 5)


def test_bitmaps_are_read_as_maps_are():
    bitmaps, (points, index) = (torch.rand(3, 13, 20) > 0.5).to(torch.uint8), draw(torch.float32)
    expected = point_sample(bitmaps[:, None].float(), points, index)[..., 0]
    torch.testing.assert_close(bitmap_sample(bitmaps, points, index), expected)
    assert bitmap_sample(bitmaps[:0], points, index * 0).abs().sum() == 0


def test_gradients():
    maps, (points, index) = torch.randn(3, 2, 5, 6, dtype=torch.float64, requires_grad=True), draw()
    assert torch.autograd.gradcheck(lambda m: point_sample(m, points[:, :8], index), maps)


def test_bf16_features_have_exact_gradients():
    """Many points on one spot: a sum in bf16 would lose most of them."""
    map_, points = torch.randn(1, 8, 4, 4), torch.full((1, 2000, 2), 1.7)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = map_.clone().to(dtype).requires_grad_()
        point_sample(leaf, points, torch.tensor([0])).float().sum().backward()
        grads.append(leaf.grad.float())
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 0.01
