"""Localization error of models: tables 13 and 14 of arXiv 1512.03385.

Legend: n images of the data set, N of a batch, G padded objects of an image, K classes, Q classes asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from detres.config import Config, InputConfig
from detres.data.dataset import Dataset
from detres.data.loader import trainable
from detres.engine.distributed import gather
from detres.engine.failures import explain_out_of_memory, of_evaluation
from detres.evaluation.base import EvalResult
from detres.evaluation.ilsvrc import LocalizationEvaluator
from detres.evaluation.run import LossMeans
from detres.inference.predictor import load_model
from detres.structures import Batch, ImageBatch, Proposals

Locate = Callable[[ImageBatch, Tensor], Proposals]  # images, labels (N, Q) -> boxes (N, Q, P), best first


@dataclass(frozen=True)
class LocTruths:
    """The truth of all images, in original pixels, on the device of the models."""

    labels: Tensor  # (n,) int64
    boxes: Tensor  # (n, G, 4)
    valid: Tensor  # (n, G)
    counted: Tensor  # (n,) False for images on the blacklist or without a box
    place: dict[int | str, int]  # row of an image id

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> LocTruths:
        check_one_class(dataset)
        boxes = [[item.box for item in trainable(record)] for record in dataset.records]
        most = max(1, *map(len, boxes))
        padded = torch.tensor([[*own, *[(0.0,) * 4] * (most - len(own))] for own in boxes])
        valid = torch.arange(most) < torch.tensor([*map(len, boxes)])[:, None]
        excluded = {image_id for image_id, _ in dataset.blacklist}
        counted = torch.tensor([record.id not in excluded for record in dataset.records]) & valid.any(1)
        labels = torch.tensor([record.label for record in dataset.records])
        return cls(labels.to(device), padded.to(device), valid.to(device), counted.to(device),
                   {record.id: row for row, record in enumerate(dataset.records)})


def check_one_class(dataset: Dataset) -> None:
    """Raises ValueError where an image has no class, or objects of another."""
    for record in dataset.records:
        if record.label is None or any(item.label != record.label for item in record.annotations):
            raise ValueError(f"images must be of one class each to be localized, got several or none for {record.path} "
                             f"({dataset.name}, {dataset.format}). Take a data set for localization: ILSVRC CLS-LOC, or "
                             "a folder with boxes.csv.")


@torch.no_grad()
def evaluate_localizer(locate: Locate, loader: Iterable[Batch], truths: LocTruths, classes: Sequence[str],
                       guesses: Tensor | None = None, *, precision: Literal["fp32", "bf16"] = "fp32",
                       losses: Callable[[Batch], dict[str, Tensor]] | None = None,
                       seen: Callable[[Batch, Tensor, Tensor], None] | None = None) -> EvalResult:
    """Errors over all processes: that of the true class's box, and with `guesses` (n, Q), the classes that a classifier
    names, best first, top-1 and top-5.

    `losses` adds its means, "val/loss_cls" .... `seen` is called with each batch, the labels (N, 1 + Q) asked about, the true
    one first, and their boxes (N, 1 + Q, 4) in pixels of the original images.
    """
    evaluator, means, device = LocalizationEvaluator(classes), LossMeans(), truths.labels.device
    guesses = truths.labels.new_zeros(len(truths.labels), 0) if guesses is None else guesses[:, :5]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in loader:
            rows = torch.tensor([truths.place[image_id] for image_id in batch.image_ids]).to(device)
            with explain_out_of_memory(of_evaluation, batch, device):
                batch = batch.to(device, non_blocking=True)
                labels = torch.cat([truths.labels[rows, None], guesses[rows]], 1)
                boxes = first_boxes(locate(batch.images, labels), batch)
                if losses is not None:
                    means.add(losses(batch), len(batch.image_ids))
            evaluator.update(labels[:, 1:], boxes[:, 1:], truths.labels[rows], truths.boxes[rows], truths.valid[rows],
                             gt_class_boxes=boxes[:, 0], counted=truths.counted[rows])
            if seen is not None:
                seen(batch, labels, boxes)
    evaluator.merge(gather(evaluator.state()))
    result = evaluator.compute()
    return (result if guesses.shape[1] else only(result, "loc/gt_class_error")).merged(means.compute())


def first_boxes(found: Proposals, batch: Batch) -> Tensor:
    """The best box of each class (N, Q, 4), in pixels of the original images; all of the image where there is none."""
    original = batch.original_sizes.to(found.boxes)
    ratio = (original / batch.images.sizes).flip(1).repeat(1, 2)[:, None]  # (N, 1, 4)
    whole = torch.cat([torch.zeros_like(original), original.flip(1)], 1)[:, None]
    return torch.where(found.valid[:, :, :1], found.boxes[:, :, 0] * ratio, whole)


def only(result: EvalResult, name: str) -> EvalResult:
    return EvalResult({name: result.metrics[name]},
                      {each: {name: numbers[name]} for each, numbers in result.per_class.items()})


def load_proposer(config: Config, classes: Sequence[str], device: torch.device) -> tuple[nn.Module, Config]:
    """The localizer of `data.proposals`, on whose boxes a region classifier is trained, and its config."""
    path = config.data.proposals
    if path is None:
        raise ValueError("data.proposals must be given to train a region classifier, got null. Name the run of a "
                         "localizer.")
    model, meta, own = load_model(path, str(device))
    check_fits(own, meta.classes, "localizer", config.model.input, classes, path)
    return model, own


def check_fits(config: Config, classes: Sequence[str], name: str, model_input: InputConfig, other_classes: Sequence[str],
               path: str | Path) -> None:
    """Raises ValueError if weights are no `name`, or not of the classes and the image size of those they work with."""
    pairs = [("model.name", config.model.name, name), ("classes", tuple(classes), tuple(other_classes))]
    if name != "classifier":  # which sees the images in its own way
        pairs += [(f"model.input.{field}", getattr(config.model.input, field), getattr(model_input, field))
                  for field in ("min_size", "max_size")]
    for field, value, wanted in pairs:
        if value != wanted:
            raise ValueError(f"weights must have {field} {wanted} to work with the others, got {value} ({path}).")
