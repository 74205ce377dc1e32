"""What the RPN trains on."""

from __future__ import annotations

import pytest
import torch

from detres.models.anchors import AnchorGenerator
from detres.models.rpn import RPN, RPNHead
from detres.structures import Targets

ALL = {"batch_per_image": 10_000, "positive_fraction": 1.0}  # every anchor is sampled: nothing is left to chance


def make_rpn(**options) -> RPN:
    return RPN(RPNHead(4, 3), AnchorGenerator([[16, 32, 64]], [1.0], [16]), box_loss="smooth_l1", **options)


def test_anchors_that_reach_past_their_image_do_not_train():
    """Two images of one canvas, 64 x 96 and 48 x 70, whose losses are those of an RPN that has no other anchors: also
    where such an anchor is an object's best, as of the object at the edge."""
    boxes = torch.tensor([[[2.0, 20, 40, 58], [0, 0, 20, 20]], [[20, 10, 50, 40], [60, 30, 70, 48]]])
    targets = Targets(boxes, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool), torch.arange(2))
    sizes, generator = torch.tensor([[64, 96], [48, 70]]), torch.Generator().manual_seed(0)
    (anchors,) = make_rpn().anchors([(4, 6)], (64, 96), torch.device("cpu"))
    logits, deltas = (torch.randn(2, len(anchors), *more, generator=generator) for more in ((), (4,)))
    found = make_rpn(inside_only=True, **ALL).losses([logits], [deltas], [anchors], sizes, targets)

    sums, count = {"loss_rpn_cls": 0.0, "loss_rpn_box": 0.0}, 0
    for i, (height, width) in enumerate(sizes.tolist()):
        inside = [row for row, (x1, y1, x2, y2) in enumerate(anchors.tolist())
                  if x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height]
        alone = Targets(*(getattr(targets, name)[i:i + 1] for name in ("boxes", "labels", "valid", "seeds")))
        part = make_rpn(**ALL).losses([logits[i:i + 1, inside]], [deltas[i:i + 1, inside]], [anchors[inside]],
                                      sizes[i:i + 1], alone)
        every = make_rpn(**ALL).losses([logits[i:i + 1]], [deltas[i:i + 1]], [anchors], sizes[i:i + 1], alone)
        assert part["loss_rpn_box"] != every["loss_rpn_box"] > 0
        own = sum(match_of(anchors[row].tolist(), alone.boxes[0].tolist(), [anchors[r].tolist() for r in inside]) >= 0
                  for row in inside)
        count += own
        sums = {name: value + own * part[name].item() for name, value in sums.items()}
    assert {name: value.item() for name, value in found.items()} == {
        name: pytest.approx(value / count, rel=1e-5) for name, value in sums.items()}


def match_of(anchor, objects, anchors) -> int:
    """1, 0 or, where it is ignored, -1 (arXiv 1506.01497, section 3.1.2)."""
    def iou(a, b):
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(width, 0) * max(height, 0)
        return overlap / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - overlap)

    best = max(iou(anchor, box) for box in objects)
    is_best = any(iou(anchor, box) == max(iou(other, box) for other in anchors) > 0 for box in objects)
    return 1 if is_best or best >= 0.7 else 0 if best < 0.3 else -1
