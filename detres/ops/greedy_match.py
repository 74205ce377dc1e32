"""The greedy assignment of detections to ground truth, for many groups and many settings at once.

Legend: E entries (a detection and a truth it may take), D detections, G truths; a lane is one setting, such as an IoU
threshold with an area range, and has one bit of an int64 word.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 62  # settings in a word, the sign left alone


def greedy_match(group: Tensor, detection: Tensor, truth: Tensor, allowed: Tensor, shared: Tensor) -> Tensor:
    """The lanes in which each entry becomes a match: where its detection has none yet and its truth is still free.

    Entries are offered in order, and independently in each group; no detection and no truth is in two groups.

    Args:
        group: (E,) int64, ascending.
        detection: (E,) int64, the rows of one detection in succession, best truth first.
        truth: (E,) int64 in 0..G-1.
        allowed: (E,) int64, the lanes in which the entry may match.
        shared: (G,) bool, truths that any number of detections may take (crowds).

    Returns: (E,) int64, a subset of `allowed`.
    """
    if group.is_cuda and len(group):
        from detres.ops import greedy_match_triton
        return greedy_match_triton.greedy_match(group, detection, truth, allowed, shared)
    return lock_step(group, detection, truth, allowed, shared)


def lock_step(group: Tensor, detection: Tensor, truth: Tensor, allowed: Tensor, shared: Tensor) -> Tensor:
    """Definition of `greedy_match` in torch: step s settles the s-th entry of every group that has so many."""
    _, counts = group.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    step = torch.arange(len(group), device=group.device) - starts.repeat_interleave(counts)
    order = step.argsort(stable=True)
    d, g, allowed = detection[order], truth[order], allowed[order]
    free_lanes = torch.full_like(shared, -1, dtype=torch.int64)  # of each truth
    taken_lanes = torch.zeros(int(d.max()) + 1 if len(d) else 0, dtype=torch.int64, device=d.device)  # of detections
    keep = torch.where(shared, -1, 0)
    won = torch.empty_like(allowed)
    first = 0
    for size in step.bincount().tolist():
        now = slice(first, first + size)
        match = allowed[now] & ~taken_lanes[d[now]] & free_lanes[g[now]]
        taken_lanes[d[now]] |= match
        free_lanes[g[now]] &= ~match | keep[g[now]]
        won[now] = match
        first += size
    return torch.empty_like(won).scatter_(0, order, won)
