"""Box voting against plain Python, one box at a time."""

from __future__ import annotations

import pytest
import torch

from detres.ops.box_voting import vote_boxes


def naive_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - overlap
    return overlap / union if union > 0 else 0.0


def naive_vote(box, label, voters, labels, weights, threshold):
    sums, total = [0.0] * 4, 0.0
    for voter, voter_label, weight in zip(voters, labels, weights):
        if voter_label == label and naive_iou(box, voter) >= threshold:
            total += weight
            sums = [s + weight * side for s, side in zip(sums, voter)]
    return [s / total for s in sums] if total > 0 else box


def random_boxes(generator, n, count):
    """Whole pixels around few places: equal boxes and equal overlaps come up."""
    corner = torch.randint(0, 3, (n, count, 2), generator=generator) * 20
    corner = corner + torch.randint(0, 4, (n, count, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(8, 14, (n, count, 2), generator=generator)], -1).float()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_each_box_is_the_weighted_mean_of_its_voters(threshold):
    generator = torch.Generator().manual_seed(0)
    voters, labels = random_boxes(generator, 5, 60), torch.randint(0, 2, (5, 60), generator=generator)
    weights = torch.rand(5, 60, generator=generator).clamp(min=0.2) - 0.2  # a fifth does not count
    boxes, box_labels = voters[:, :20], labels[:, :20]
    found = vote_boxes(boxes, box_labels, voters, labels, weights, threshold)
    assert found.dtype == torch.float32 and (found != boxes).any(-1).any() == (threshold < 1)
    for i in range(5):
        for box, label, result in zip(boxes[i], box_labels[i], found[i]):
            expected = naive_vote(box.tolist(), int(label), voters[i].tolist(), labels[i].tolist(),
                                  weights[i].tolist(), threshold)
            torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-6, atol=1e-5)


def test_an_overlap_of_exactly_the_threshold_votes():
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    voters = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 5, 10], [0, 0, 4.99, 10]]])  # IoU 1, 0.5 and less
    zeros = torch.zeros(1, 3, dtype=torch.int64)
    found = vote_boxes(boxes, zeros[:, :1], voters, zeros, torch.tensor([[0.75, 0.25, 0.9]]))
    assert found.tolist() == [[[0, 0, 0.75 * 10 + 0.25 * 5, 10]]]


def test_what_has_no_weight_may_be_anything():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [3, 3, 7, 7]]])
    voters = torch.tensor([[[0.0, 0, 10, 8], [float("nan")] * 4, [float("inf")] * 4]])
    labels = torch.tensor([[0, 0, 0]])
    found = vote_boxes(boxes, labels[:, :2], voters, labels, torch.tensor([[0.5, 0.0, 0.0]]))
    assert found.tolist() == [[[0, 0, 10, 8], [3, 3, 7, 7]]], "the second box has no voter and stays"
    none = torch.zeros(2, 0, 4)
    assert vote_boxes(none, none[..., 0], none, none[..., 0], none[..., 0]).shape == (2, 0, 4)


def test_means_stay_within_their_voters():
    generator = torch.Generator().manual_seed(0)
    voters = torch.tensor([0.0, 0, 1333.3, 799.7]).repeat(1, 500, 1)
    labels = torch.zeros(1, 500, dtype=torch.int64)
    for _ in range(20):
        found = vote_boxes(voters[:, :1], labels[:, :1], voters, labels, torch.rand(1, 500, generator=generator))
        assert torch.equal(found, voters[:, :1])


def test_coordinates_keep_their_precision_under_autocast():
    boxes = torch.tensor([[[1000.25, 1000.25, 1100.25, 1100.25]]])
    labels = torch.zeros(1, 1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vote_boxes(boxes, labels, boxes, labels, torch.ones(1, 1)), boxes)
