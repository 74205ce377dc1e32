from __future__ import annotations

import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from detres.geometry import boxes as B

coordinate = st.floats(0, 500, width=32)
side = st.floats(1, 300, width=32)


@st.composite
def box_tensors(draw, count=4):
    rows = [(draw(coordinate), draw(coordinate), draw(side), draw(side)) for _ in range(count)]
    return torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows])


@given(box_tensors(), box_tensors())
@settings(deadline=None, max_examples=50)
def test_decode_inverts_encode(boxes, anchors):
    wh = (boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])
    inside = (wh < 60).all(1)  # beyond it decode clamps
    weights = (10.0, 10.0, 5.0, 5.0)
    decoded = B.decode(B.encode(boxes, anchors, weights), anchors, weights)
    torch.testing.assert_close(decoded[inside], boxes[inside], atol=2e-2, rtol=1e-4)


@given(box_tensors(), box_tensors(6))
@settings(deadline=None, max_examples=50)
def test_iou_is_torchvisions_and_symmetric(a, b):
    iou = B.pairwise_iou(a, b)
    torch.testing.assert_close(iou, torchvision.ops.box_iou(a, b), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(iou, B.pairwise_iou(b, a).T)


def test_iou_of_empty_boxes_is_zero():
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert B.pairwise_iou(point, point).item() == 0


def test_take_chooses_rows_of_each_image():
    boxes = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(B.take(boxes, torch.tensor([[2, 0], [1, 1]])), torch.stack([boxes[0, [2, 0]], boxes[1, [1, 1]]]))


def test_decode_limits_growth():
    anchor = torch.tensor([[0.0, 0, 16, 16]])
    decoded = B.decode(torch.tensor([[0.0, 0, 50, 0]]), anchor)
    assert decoded[0, 2] - decoded[0, 0] == torch.tensor(16.0) * torch.tensor(B.MAX_LOG_SCALE).exp()


def test_clip_uses_each_images_own_size():
    boxes = torch.tensor([[[-5.0, -5, 50, 60]], [[-5.0, -5, 50, 60]]])
    clipped = B.clip(boxes, torch.tensor([[20, 30], [100, 100]]))
    assert clipped.tolist() == [[[0, 0, 30, 20]], [[0, 0, 50, 60]]]
