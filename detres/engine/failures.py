"""What stops a training, said so that it can be acted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from detres.config import Config
from detres.structures import Batch


def non_finite(step: int, values: dict[str, float], paths: Sequence[str]) -> FloatingPointError:
    """The error for a step with a loss or a gradient that is not finite. `values`: those that are not."""
    named = ", ".join(f"{name}={value}" for name, value in values.items())
    return FloatingPointError(
        f"losses and gradients must be finite, got {named} in step {step}. Image files of that batch:{_listed(paths)}\n"
        "Nothing of it was saved. If these images and their annotations look right, training diverged: start again "
        "with a lower train.lr, a longer train.warmup_steps or train.grad_clip=1.")


@contextmanager
def explain_out_of_memory(config: Config, batch: Batch, step: int) -> Iterator[None]:
    """Turns an out-of-memory error of the block into one that names the batch and the remedies."""
    try:
        yield
    except RuntimeError as error:
        is_host = "DefaultCPUAllocator" in str(error)  # the host's allocator has no exception of its own
        if not is_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError(_out_of_memory(config, batch, step)) from error


def _out_of_memory(config: Config, batch: Batch, step: int) -> str:
    images, _, height, width = batch.images.pixels.shape
    boxes = batch.targets.valid.sum(1).tolist() if batch.targets is not None else [0] * images
    parts = config.train.accumulate
    remedies = [f"train.accumulate={2 * parts} (the same batch in smaller parts)"] if images > parts else []
    remedies += [] if config.train.precision == "bf16" else ["train.precision=bf16"]
    backbone = config.model.backbone
    if not backbone.activation_checkpointing and backbone.norm in ("frozen_bn", "gn"):  # what the config accepts
        remedies.append("model.backbone.activation_checkpointing=true (slower)")
    remedies.append("smaller model.input.max_size and min_size, data.augment.min_sizes or crop_size")
    remedies.append("a smaller train.batch_size (the learning rate follows)")
    return (f"a training step must fit into memory, ran out in step {step}: {images} images in {parts} parts on a "
            f"canvas of {height}x{width} pixels (height x width), {sum(boxes)} boxes, at most {max(boxes)} in an "
            f"image. Image files of that batch:{_listed(batch.paths)}\nAny of these helps:{_listed(remedies)}")


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)
