from __future__ import annotations

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detres.models.matching import hash_noise, match_boxes, sample_boxes


def random_boxes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=generator) * 80
    return torch.cat([xy, xy + torch.rand(n, 2, generator=generator) * 60 + 2], 1)


def test_equals_torchvisions_matcher():
    boxes, gt = random_boxes(400, 0), random_boxes(40, 1)  # 40: three passes over the ground truth
    for low_quality in (True, False):
        match, index = match_boxes(boxes, gt[None], torch.ones(1, 40, dtype=torch.bool), 0.7, 0.3, low_quality)
        expected = Matcher(0.7, 0.3, low_quality)(box_iou(gt, boxes))
        assert torch.equal(match[0] == 1, expected >= 0) and torch.equal(match[0] == 0, expected == -1)
        assert torch.equal(index[0][expected >= 0], expected[expected >= 0])


def test_no_ground_truth_is_all_background():
    none = torch.zeros(2, 3, dtype=torch.bool)
    match, index = match_boxes(random_boxes(50, 0), torch.zeros(2, 3, 4), none, 0.7, 0.3, True)
    assert (match == 0).all() and (index == 0).all()


def test_sampling_counts_and_order():
    match = torch.full((2, 500), 0, dtype=torch.int8)
    match[0, :300], match[1, :5], match[:, 490:] = 1, 1, -1
    index, sampled = sample_boxes(match, torch.tensor([1, 2]), 64, 0.25, salt=0)
    assert index.shape == (2, 64) and (sampled == 1).sum(1).tolist() == [16, 5]
    assert (sampled == 0).sum(1).tolist() == [48, 59]
    assert torch.equal(sampled, match.gather(1, index))
    assert (sampled[:, :-1] >= sampled[:, 1:]).all()  # foreground first
    assert all(len(row.unique()) == 64 for row in index)


def test_too_few_boxes_are_marked():
    _, sampled = sample_boxes(torch.tensor([[1, 0, -1, -1]], dtype=torch.int8), torch.tensor([3]), 4, 0.5, salt=0)
    assert sampled.tolist() == [[1, 0, -1, -1]]


def test_draw_depends_on_the_seed_not_on_the_batch():
    match = (torch.rand(3, 200) > 0.5).to(torch.int8)
    seeds = torch.tensor([7, 2**40 + 1, 9])
    together = sample_boxes(match, seeds, 32, 0.5, salt=1)[0]
    for i in range(3):
        assert torch.equal(sample_boxes(match[i:i + 1], seeds[i:i + 1], 32, 0.5, salt=1)[0][0], together[i])
    assert not torch.equal(sample_boxes(match, seeds, 32, 0.5, salt=2)[0], together)


def test_noise_is_uniform_and_independent():
    noise = hash_noise(torch.arange(64), 4096, salt=0).double()
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 5e-3 and abs(noise.var() - 1 / 12) < 1e-3
    rows = torch.corrcoef(noise) - torch.eye(64)
    assert rows.abs().max() < 0.1
