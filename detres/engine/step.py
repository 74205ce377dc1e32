"""Gradients of one batch, whole or in parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from detres.config import TrainConfig
from detres.engine.distributed import is_distributed
from detres.structures import Batch, ClassTargets, ImageBatch, Proposals, SemanticTargets, Targets


def backward(model: nn.Module, batch: Batch, device: torch.device, options: TrainConfig) -> dict[str, Tensor]:
    """Adds the gradients of a batch's losses, in `options.accumulate` parts one after another.

    Returns the losses, averaged over parts, on the device, and what else the model measures: only names that begin with
    "loss" are trained. Losses are divided by counts (of sampled boxes, of
    positive ones), each part by its own; so where all parts have the same counts, the gradient is that of the whole
    batch to rounding, and where they differ, images of smaller counts weigh a little more.
    """
    total: dict[str, Tensor] = {}
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    parts = split(batch, options.accumulate)
    for i, part in enumerate(parts):
        part = part.to(device, non_blocking=True)
        images = replace(part.images, pixels=part.images.pixels.contiguous(memory_format=memory_format))
        is_waiting = i < len(parts) - 1 and is_distributed()
        with model.no_sync() if is_waiting else nullcontext():  # ranks exchange gradients in the last part only
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                losses = model(images, part.targets)
            (sum(value for name, value in losses.items() if name.startswith("loss")) / len(parts)).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach() / len(parts)
    return total


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch on the host as `parts` batches of consecutive images, on the same canvas."""
    if parts == 1:
        return [batch]
    size = len(batch.images.pixels) // parts
    if isinstance(batch.targets, (ClassTargets, SemanticTargets)):
        return [replace(batch, images=_rows(batch.images, rows), targets=replace(
            batch.targets, labels=batch.targets.labels[rows]))
                for rows in (slice(i * size, (i + 1) * size) for i in range(parts))]
    instances = batch.targets.valid.sum(1).split(size)
    ends = torch.tensor([int(counts.sum()) for counts in instances]).cumsum(0).tolist()
    pieces = []
    for i, (begin, end) in enumerate(zip([0, *ends], ends)):
        rows = slice(i * size, (i + 1) * size)
        targets = batch.targets
        targets = Targets(
            boxes=targets.boxes[rows], labels=targets.labels[rows], valid=targets.valid[rows],
            seeds=targets.seeds[rows],
            masks=None if targets.masks is None else targets.masks[begin:end],
            keypoints=None if targets.keypoints is None else targets.keypoints[rows],
            proposals=None if targets.proposals is None else Proposals(
                targets.proposals.boxes[rows], targets.proposals.scores[rows], targets.proposals.valid[rows]),
            semantic=None if targets.semantic is None else targets.semantic[rows])
        pieces.append(Batch(_rows(batch.images, rows), targets, batch.image_ids[rows], batch.paths[rows],
                            batch.original_sizes[rows]))
    return pieces


def _rows(images: ImageBatch, rows: slice) -> ImageBatch:
    return ImageBatch(images.pixels[rows], images.sizes[rows])
