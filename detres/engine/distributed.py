"""Processes that train together: torchrun's environment, process groups, and what crosses ranks.

Every function is the identity (or a no-op) in a single process, so callers never ask whether they are distributed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def mean_over_ranks(count: Tensor) -> Tensor:
    """The average of a tensor over ranks, as float; for the normaliser of a loss.

    DistributedDataParallel averages gradients, so a loss of `sum / mean_over_ranks(count)` on each rank trains as
    `sum over ranks / count over ranks`: the loss of one process that has the whole batch.
    """
    count = count.detach().to(torch.float32, copy=True)
    if is_distributed():
        dist.all_reduce(count)
        count /= world_size()
    return count
