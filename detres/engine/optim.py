"""Optimizers, learning rate, gradient norm and averaged weights."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from detres.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step and the log so far: nothing to store, nothing to restore."""

    lr: float
    steps: int
    kind: Literal["multistep", "cosine", "plateau"] = "cosine"
    milestones: tuple[int, ...] = ()
    warmup_steps: int = 0
    warmup_factor: float = 1e-3
    warmup_until_error: float | None = None
    plateau_patience: int = 3

    @classmethod
    def scaled(cls, train: TrainConfig) -> Schedule:
        """The linear rule (arXiv 1706.02677, section 2.1): k times the batch, k times lr, 1/k of the steps."""
        ratio = train.batch_size / train.reference_batch_size
        return cls(lr=train.lr * ratio, steps=max(1, round(train.steps / ratio)), kind=train.schedule,
                   milestones=tuple(round(milestone / ratio) for milestone in train.milestones),
                   warmup_steps=round(train.warmup_steps / ratio), warmup_factor=train.warmup_factor,
                   warmup_until_error=train.warmup_until_error, plateau_patience=train.plateau_patience)

    def at(self, step: int, rows: Sequence[dict[str, float]] = ()) -> float:
        """The learning rate of update `step`, counted from 0. `rows` are those of the log."""
        warmup = 1.0
        if self.warmup_until_error is not None:  # arXiv 1512.03385, section 4.2, of 110 layers
            if not any(row.get("error", 1) < self.warmup_until_error for row in rows):
                warmup = self.warmup_factor
        elif step < self.warmup_steps:
            warmup = self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        if self.kind == "plateau":
            return self.lr * warmup * 0.1 ** plateaus([row["stale"] for row in rows if "stale" in row],
                                                      self.plateau_patience)
        if self.kind == "cosine":  # arXiv 1608.03983, one period
            return self.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * warmup * 0.1 ** bisect_right(self.milestones, step)

    def describe(self, train: TrainConfig) -> str:
        """One line for the log: what the rule made of the config."""
        decay = {"multistep": f", milestones {', '.join(map(str, self.milestones))}",
                 "plateau": f", divided by 10 after {self.plateau_patience} evaluations without a better one"}
        warmup = f"warm-up {self.warmup_steps}" if self.warmup_until_error is None else \
            f"lr {self.lr * self.warmup_factor:g} until the training error is under {self.warmup_until_error:g}"
        text = f"{self.kind}: lr {self.lr:g}, {self.steps} steps, {warmup}{decay.get(self.kind, '')}"
        if train.batch_size == train.reference_batch_size:
            return f"{text} (batch {train.batch_size}, as stated: no scaling)"
        ratio = train.batch_size / train.reference_batch_size
        return (f"{text} (linear rule: x{ratio:g} for batch {train.batch_size}, stated for "
                f"{train.reference_batch_size}: lr {train.lr:g}, {train.steps} steps)")


def plateaus(stale: Sequence[float], patience: int) -> int:
    """How often the lr was divided: each time that `patience` evaluations in a row brought nothing better.

    stale: of each evaluation, how many there were since the best; lr is divided again after as many more.
    """
    return sum(count > 0 and count % patience == 0 for count in stale)


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm_and_bias: bool) -> list[dict]:
    """Trainable parameters, those of norms and biases without decay if asked: they are the ones of one dimension."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_norm_and_bias:
        groups = [{"params": trainable, "weight_decay": weight_decay}]
    else:
        groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
                  {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW (arXiv 1711.05101). The learning rate is set before each step."""
    groups = parameter_groups(model, train.weight_decay, train.decay_norm_and_bias)
    if not groups:
        raise ValueError("the model must have a trainable parameter, got none. Lower model.backbone.freeze_stages.")
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")  # one pass over the memory instead of five
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, fused=fused)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Bounds the global L2 norm of the gradient if `max_norm` is given. Returns the norm before that, on the device."""
    with_grad = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in with_grad])
    if max_norm is not None:
        clip_grads_with_norm_(with_grad, max_norm, norm)
    return norm


class EMA:
    """An exponential moving average of the weights, in a copy of the model that can be evaluated and saved.

    The decay at update t is min(decay, (1 + t) / (10 + t)): the first weights, which are random, are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values()))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the model after update `step`, counted from 0. Integers are copied."""
        averages, values = zip(*self._floats)
        torch._foreach_lerp_(averages, values, 1 - min(self.decay, (1 + step) / (10 + step)))
        for average, value in self._others:
            average.copy_(value)
