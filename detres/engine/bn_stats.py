"""Statistics of batch norms over the training set, after training (arXiv 1512.03385, appendix A).

The paper's detectors begin from a classifier whose batch norms are constants: "statistics (means and variances) for
each layer on the ImageNet training set". Of the released models the authors add that these are "strictly computed using
average (not moving average) on a sufficiently large training batch after the training procedure" (disclaimer 4 of
github.com/KaimingHe/deep-residual-networks). So that is the default: one pass, in which batches are normalised by their
own statistics, as in training, and the input of each layer is averaged over all of them.

What reaches layer k then depends on the batch it is in. If all of the set were one batch, it would not: the layers
before k would use the statistics of the set, as they do afterwards. `sequential` gives these: each layer is measured in
a pass of its own while those before it use their final statistics. It costs half a pass over the data for each layer,
and the default tends to it as batches grow.

Legend: C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detres.config import Config, SourceConfig
from detres.data.class_dataset import load_class_dataset
from detres.data.class_loader import build_class_loader
from detres.data.dataset import load_dataset
from detres.data.loader import build_loader
from detres.engine.checkpoint import save_weights
from detres.engine.log import tell
from detres.evaluation.base import eval_mode
from detres.inference.predictor import load_model
from detres.progress import track
from detres.structures import Batch


def write_statistics(path: str | Path, out: str | Path, *, data: str | None = None, split: str | None = None,
                     batch_size: int | None = None, sequential: bool = False, device: str = "auto") -> None:
    """Measures the batch norms of a weights file or run folder over the images it was trained on, or over `data`, and
    writes the weights with these statistics. `model.backbone.weights: out` with norm frozen_bn begins from them.

    Images are resized and cropped as for evaluation: each counts once, and nothing is left to chance. Of a detector
    the backbone is measured, with the padding of a batch to a common canvas, as in training.
    Raises ValueError for a model without batch norms or with some outside its backbone, or another suffix of `out` than
    .safetensors.
    """
    if Path(out).suffix != ".safetensors":
        raise ValueError(f"out must be a .safetensors file, got {out}.")
    model, meta, config = load_model(path, device)
    source = config.data.train if data is None else SourceConfig(path=data)
    if source is None:
        raise ValueError(f"a data set must be given for weights that do not name one, got none ({path}). "
                         "Say which with --data.")
    source = source.model_copy(update={"split": split}) if split else source
    batches, images = _loader(config, source, batch_size or config.train.batch_size, next(model.parameters()).device)
    measure(model, batches, images, sequential)
    save_weights(out, model.state_dict(), replace(meta, metrics={}))  # they were those of other statistics
    tell(f"Wrote {out}: take it as model.backbone.weights, with model.backbone.norm=frozen_bn.")


def _loader(config: Config, source: SourceConfig, batch_size: int, device: torch.device) -> tuple[Iterable[Batch], int]:
    """One pass over the training images, and their number."""
    if config.model.name == "classifier":
        one_crop = config.model_copy(update={"eval": config.eval.model_copy(update={"crops": 1})})
        images = load_class_dataset(source, "train")
        return build_class_loader(images, one_crop, device, batch_size=batch_size, training=False), len(images)
    dataset = load_dataset(source, "train", config.data.on_invalid)
    loader = build_loader(dataset, config.model.input, config.data, batch_size=batch_size, training=False,
                          with_masks=False, device_type=device.type)
    return loader, len(dataset.records)


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Batch], images: int, sequential: bool = False) -> None:
    """Gives every batch norm of the model the statistics of its input over the batches, which are read once, or, if
    `sequential`, once for each layer. Variances are those of the population: divided by the count."""
    device, norms = next(model.parameters()).device, _in_order(model, batches)
    groups = [[norm] for norm in norms] if sequential else [norms]
    for number, group in enumerate(groups, 1):
        sums = [Sums(norm.num_features, device) for norm in group]
        what = f"layer {number}/{len(groups)}" if sequential else "measure"
        with eval_mode(model), nullcontext() if sequential else normalising_by_batch(norms), _adding(group, sums):
            for batch in track(batches, images, what, lambda batch: len(batch.images.pixels)):
                with suppress(_Added):
                    model.features(batch.images.to(device, non_blocking=True))
        for norm, own in zip(group, sums):
            own.install(norm)


def _in_order(model: nn.Module, batches: Iterable[Batch]) -> list[nn.Module]:
    """The batch norms, as the backbone comes to them."""
    named = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    order: list[nn.Module] = []
    hooks = [norm.register_forward_pre_hook(lambda norm, _: order.append(norm)) for norm in named]
    with eval_mode(model):
        model.features(next(iter(batches)).images.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    outside = [name for norm, name in named.items() if norm not in order]
    if outside:
        raise ValueError(f"batch norms must be in the backbone to be measured over images, got {len(outside)} "
                         f"elsewhere, such as {outside[0]}. Measure the classifier that the detector begins from.")
    if not order:
        raise ValueError("the model must have batch norms to measure, got none. Give weights trained with "
                         "model.backbone.norm=bn.")
    return order


class _Added(Exception):
    """Ends a forward pass at the only layer that is measured."""


@contextmanager
def _adding(norms: Sequence[nn.Module], sums: Sequence[Sums]) -> Iterator[None]:
    """What comes into the layers is added to the sums; where there is but one, nothing after it runs."""
    def add(own: Sums, x: Tensor) -> None:
        own.add(x)
        if len(norms) == 1:
            raise _Added

    hooks = [norm.register_forward_pre_hook(lambda _, inputs, own=own: add(own, inputs[0]))
             for norm, own in zip(norms, sums)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def normalising_by_batch(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norms in an evaluation take the statistics of each batch, and leave the running ones as they are."""
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


class Sums:
    """Counts and sums of a layer's input, in float64 on its device: nothing waits for it."""

    def __init__(self, channels: int, device: torch.device):
        self.count, self.total = 0, torch.zeros(2, channels, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """x (N, C, H, W). A batch's own mean and variance are taken in its precision, then weighted by its count."""
        count = x.numel() // x.shape[1]
        variance, mean = (value.double() for value in torch.var_mean(x.float(), (0, 2, 3), correction=0))
        self.count += count
        self.total += count * torch.stack([mean, variance + mean**2])

    def install(self, norm: nn.Module) -> None:
        """Makes mean and variance of all that was added the layer's own."""
        mean, square = self.total / self.count
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean**2).clamp(min=0))
