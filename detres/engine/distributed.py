"""Processes that train together: torchrun's environment, process groups, and what crosses ranks.

Every function is the identity (or a no-op) in a single process, so callers never ask whether they are distributed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def mean_over_ranks(count: Tensor) -> Tensor:
    """The average of a tensor over ranks, as float; for the normaliser of a loss.

    DistributedDataParallel averages gradients, so a loss of `sum / mean_over_ranks(count)` on each rank trains as
    `sum over ranks / count over ranks`: the loss of one process that has the whole batch. Without gradients it is the
    identity: in an evaluation ranks may have different numbers of batches, and must not wait for each other.
    """
    count = count.detach().float()
    return average(count) if torch.is_grad_enabled() else count


def average(values: Tensor) -> Tensor:
    """The mean of a float tensor over ranks."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Host memory only: nothing waits for an accelerator."""
    if not is_distributed():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    any_rank(False)


def pick_device(name: str) -> torch.device:
    """The device that config.device names. Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got '{name}'.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be present, got '{name}' with {torch.cuda.device_count()} CUDA devices. "
                         "Take device=cpu, or check the driver with nvidia-smi.")
    return device


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did; yields this rank's device, made the current one."""
    processes, chosen = int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
    if chosen.type == "cuda":
        if processes > 1:  # one device each
            chosen = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    if processes == 1:
        yield chosen
        return
    # Gloo also beside NCCL: what the host decides is agreed on without waiting for the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if not isinstance(sys.exc_info()[1], Exception):  # else other ranks may be waiting in a collective
            dist.destroy_process_group()


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """The block runs on local rank 0, then on the others, which find what it downloaded."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def wrap(model: nn.Module) -> nn.Module:
    """DistributedDataParallel where there are several ranks. Every rank must start from the same weights."""
    if not is_distributed():
        return model
    has_statistics = any(isinstance(module, _BatchNorm) for module in model.modules())  # frozen ones never differ
    names = signature(DistributedDataParallel).parameters  # torch 2.14 renamed it
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: has_statistics})


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Gives every rank the buffers of rank 0, which is the one that saves: a batch norm's running statistics are those
    of the images of its own rank, so without this each would evaluate another model, and none the one that is kept.

    Training is not changed: DistributedDataParallel does the same at the beginning of each step.
    """
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def launch(processes: int, command: Sequence[str]) -> NoReturn:
    """torchrun in this process, without its tracebacks: `python *command` `processes` times on this machine.

    Raises SystemExit with the status of the command.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    options = parse_args(["--standalone", f"--nproc-per-node={processes}", *command])
    try:
        run(options)
    except SignalException as stopped:  # after the processes, which were sent the signal too, have ended
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:  # they have said why
        raise SystemExit(failed.get_first_failure()[1].exitcode) from None
    raise SystemExit(0)


def runs_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself. Processors without AVX-512 or AMX emulate it, very slowly."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
