"""What stops a training, an evaluation or a prediction, said so that it can be acted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from detres.config import Config
from detres.structures import Batch, ImageBatch, Targets


def non_finite(step: int, values: dict[str, float], paths: Sequence[str]) -> FloatingPointError:
    """The error for a step with a loss or a gradient that is not finite. `values`: those that are not."""
    named = ", ".join(f"{name}={value}" for name, value in values.items())
    return FloatingPointError(
        f"losses and gradients must be finite, got {named} in step {step}. Image files of that batch:{_listed(paths)}\n"
        "Nothing of it was saved. If these images and their annotations look right, training diverged: start again "
        "with a lower train.lr, a longer train.warmup_steps or train.grad_clip=1.")


@contextmanager
def explain_out_of_memory(tell: Callable[..., str], *about: Any) -> Iterator[None]:
    """Turns an out-of-memory error of the block into one that says `tell(*about)`: the batch and the remedies."""
    try:
        yield
    except RuntimeError as error:
        is_host = "DefaultCPUAllocator" in str(error)  # the host's allocator has no exception of its own
        if not is_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError(tell(*about)) from error


def of_training(config: Config, batch: Batch, step: int) -> str:
    """What to say when a training step runs out of memory."""
    images = len(batch.images.pixels)
    boxes = batch.targets.valid.sum(1).tolist() if isinstance(batch.targets, Targets) else [0] * images
    parts = config.train.accumulate
    remedies = [f"train.accumulate={2 * parts} (the same batch in smaller parts)"] if images > parts else []
    remedies += [] if config.train.precision == "bf16" else ["train.precision=bf16"]
    backbone = config.model.backbone
    if not backbone.activation_checkpointing and backbone.norm in ("frozen_bn", "gn"):  # what the config accepts
        remedies.append("model.backbone.activation_checkpointing=true (slower)")
    remedies.append("smaller model.input.max_size and min_size, data.augment.min_sizes or crop_size")
    remedies.append("a smaller train.batch_size (the learning rate follows)")
    return (f"a training step must fit into memory, ran out in step {step}: {images} images in {parts} parts on "
            f"{_canvas(batch.images)}, {sum(boxes)} boxes, at most {max(boxes)} in an image. "
            f"{_told(batch.paths, remedies)}")


def of_evaluation(batch: Batch, device: torch.device) -> str:
    """What to say when a batch of an evaluation runs out of memory."""
    images = len(batch.images.pixels)
    remedies = [f"eval.batch_size={images // 2}"] if images > 1 else []
    sizes = "eval.test_scales and test_max_size" if batch.images.pyramid else "model.input.max_size and min_size"
    remedies.append(f"smaller {sizes} (the results change with them)")
    remedies += [] if device.type == "cpu" else ["device=cpu (slower)"]
    return (f"a batch must fit into memory to be evaluated, ran out with {images} images on {_canvas(batch.images)}, "
            f"{_largest(batch.original_sizes)}. {_told(batch.paths, remedies)}")


def of_prediction(images: ImageBatch, original_sizes: Tensor, paths: Sequence[str | None], device: torch.device) -> str:
    """What to say when a batch of a prediction runs out of memory."""
    remedies = [f"batch_size={len(paths) // 2} (--batch-size {len(paths) // 2})"] if len(paths) > 1 else []
    remedies.append("smaller images, or smaller max_size and min_size of predict() (the results change with them)")
    remedies += [] if device.type == "cpu" else ["device='cpu' (--device cpu; slower)"]
    return (f"a batch must fit into memory to be predicted on, ran out with {len(paths)} images on {_canvas(images)}, "
            f"{_largest(original_sizes)}. {_told([path or 'an array' for path in paths], remedies)}")


def _canvas(images: ImageBatch) -> str:
    height, width = images.pixels.shape[-2:]
    return f"a canvas of {height}x{width} pixels (height x width)"


def _largest(sizes: Tensor) -> str:
    height, width = max(sizes.tolist(), key=math.prod)
    return f"originals up to {height}x{width}"


def _told(paths: Sequence[str], remedies: Sequence[str]) -> str:
    return f"Image files of that batch:{_listed(paths)}\nAny of these helps:{_listed(remedies)}"


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)
