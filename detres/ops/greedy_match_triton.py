"""`greedy_match` as one kernel: a program for each group, a thread for each lane."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 64  # lanes side by side


def greedy_match(group: Tensor, detection: Tensor, truth: Tensor, allowed: Tensor, shared: Tensor) -> Tensor:
    """See `detres.ops.greedy_match`; needs at least one entry."""
    _, counts = group.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    taken = torch.zeros(len(shared), _WIDTH, dtype=torch.int8, device=shared.device)
    detection, truth, allowed = detection.contiguous(), truth.contiguous(), allowed.contiguous()
    won = torch.empty_like(allowed)
    with torch.cuda.device_of(group):  # a kernel runs on the current device
        _kernel[(len(counts),)](ends - counts, ends, detection, truth, allowed, shared.to(torch.int8), taken, won,
                                width=_WIDTH, num_warps=2)
    return won


@triton.jit
def _kernel(starts, ends, detection, truth, allowed, shared, taken, won, width: tl.constexpr):
    lane = tl.arange(0, width).to(tl.int64)
    start, end = tl.load(starts + tl.program_id(0)), tl.load(ends + tl.program_id(0))
    previous = tl.full((), -1, tl.int64)
    matched = tl.zeros((width,), tl.int8)
    for entry in range(start, end):
        d, g = tl.load(detection + entry), tl.load(truth + entry)
        matched = tl.where(d == previous, matched, 0).to(tl.int8)
        previous = d
        # Each thread reads and writes its own lane of `taken` only, so it sees what it wrote.
        busy = tl.load(taken + g * width + lane) * (1 - tl.load(shared + g))
        bit = ((tl.load(allowed + entry) >> lane) & 1).to(tl.int8)
        match = bit * (1 - matched) * (1 - busy)
        matched += match
        tl.store(taken + g * width + lane, tl.where(match > 0, 1, busy).to(tl.int8))
        tl.store(won + entry, tl.sum(match.to(tl.int64) << lane, 0))
