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
from detres.data.class_loader import build_class_loader
from detres.data.dataset import Dataset, load_dataset
from detres.data.images import read_image
from detres.data.loader import build_loader
from detres.data.localization import as_class_dataset
from detres.data.transforms import scale_pyramid
from detres.engine.distributed import gather
from detres.engine.failures import explain_out_of_memory, of_evaluation
from detres.evaluation.base import EvalResult
from detres.evaluation.class_tests import build_class_test
from detres.evaluation.classify import ROWS
from detres.evaluation.files import save_numbers
from detres.evaluation.ilsvrc import LocalizationEvaluator, localized
from detres.evaluation.run import LossMeans, align_classes, device_of, source_of
from detres.inference.localize import build_locate
from detres.inference.predictor import Prediction, load_model
from detres.progress import track
from detres.structures import Batch, ImageBatch, Proposals

PICTURES = 100  # how many are drawn
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
        boxes = [[item.box for item in record.annotations] for record in dataset.records]  # difficult, too: the kit
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
                             f"({dataset.name}, {dataset.format}). Take a data set for localization: ILSVRC CLS-LOC, "
                             "or a folder with boxes.csv.")


@torch.no_grad()
def evaluate_localizer(locate: Locate, loader: Iterable[Batch], truths: LocTruths, classes: Sequence[str],
                       guesses: Tensor | None = None, *, precision: Literal["fp32", "bf16"] = "fp32",
                       losses: Callable[[Batch], dict[str, Tensor]] | None = None,
                       seen: Callable[[Batch, Tensor, Tensor], None] | None = None) -> EvalResult:
    """Errors over all processes: that of the true class's box, and with `guesses` (n, Q), the at most five classes that
    a classifier names, best first, top-1 and top-5.

    `losses` adds its means, "val/loss_cls" .... `seen` is called with each batch, the labels (N, 1 + Q) asked about,
    the true one first, and their boxes (N, 1 + Q, 4) in pixels of the original images.
    """
    evaluator, means, device = LocalizationEvaluator(classes), LossMeans(), truths.labels.device
    guesses = truths.labels.new_zeros(len(truths.labels), 0) if guesses is None else guesses
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


def check_fits(config: Config, classes: Sequence[str], name: str, model_input: InputConfig,
               other_classes: Sequence[str], path: str | Path | Sequence[Path]) -> None:
    """Raises ValueError if weights are no `name`, or not of the classes and the image size of those they work with."""
    shown = path if isinstance(path, (str, Path)) else ", ".join(map(str, path))
    if config.model.name != name:
        raise ValueError(f"weights must be of a {name}, got a {config.model.name} ({shown}).")
    if tuple(classes) != tuple(other_classes):
        examples = [f", '{own}' in the place of '{other}'" for own, other in zip(classes, other_classes)
                    if own != other]
        raise ValueError(f"weights must have the {len(other_classes)} classes of those they work with, in their order, "
                         f"got {len(classes)}{''.join(examples[:1])} ({shown}).")
    if name != "classifier":  # which sees the images in its own way
        for field in ("min_size", "max_size"):
            value, wanted = getattr(config.model.input, field), getattr(model_input, field)
            if value != wanted:
                raise ValueError(f"weights must have model.input.{field} {wanted} to work with the others, got {value} "
                                 f"({shown}).")


# From weights


def localize_weights(path: str | Path | Sequence[str | Path], *, classifiers: Sequence[Path] = (),
                     regions: Sequence[Path] = (), data: str | None = None, split: str | None = None,
                     crops: str | None = None, class_crops: str | None = None, batch_size: int | None = None,
                     device: str = "auto", overrides: Sequence[str] = (), draw: Path | None = None,
                     numbers: Path | None = None) -> dict[str, float]:
    """Evaluate a localizer (or several) on a data set; print the table; return the metrics.

    With `classifiers` a box is found for each of their five guesses; `regions` are region classifiers that judge the
    localizer's boxes. Several weights of a kind are an ensemble. `crops` and `class_crops` name the tests of localizers
    and of classifiers (`eval.crops`); these and the data set default to what is in the weights. `overrides` are of the
    localizer's config; classifiers take over eval.test_scales, if `class_crops` is dense. `draw` is a folder for
    pictures of the first images, `numbers` a file for the metrics, as JSON.
    """
    model, meta, config = load_model(path, device, [*overrides, *_crops(crops)])
    check_fits(config, meta.classes, "localizer", config.model.input, meta.classes, path)
    judge = None
    if regions:
        judge, other, own = load_model(regions, device)
        check_fits(own, other.classes, "region_classifier", config.model.input, meta.classes, regions)
    source = source_of(config.data.val, data, split, path)
    dataset = align_classes(load_dataset(source, "val", config.data.on_invalid), meta.classes, meta.category_ids)
    truths, precision = LocTruths.of(dataset, device_of(model)), config.train.precision
    batch_size = batch_size or config.eval.batch_size
    guesses = None
    if classifiers:
        guesses = guess_classes(classifiers, dataset, batch_size, device, class_test(class_crops, overrides))
    loader = build_loader(dataset, config.model.input, config.data, batch_size=batch_size, training=False,
                          with_masks=False, pyramid=scale_pyramid(config.model.input, config.eval),
                          device_type=device_of(model).type)
    batches = track(loader, len(dataset.records), "localize", lambda batch: len(batch.image_ids))
    result = evaluate_localizer(build_locate(config.model, config.eval, model, judge), batches, truths, dataset.classes,
                                guesses, precision=precision, seen=draw and Pictures(draw, dataset, truths))
    shown = result if len(dataset.classes) <= ROWS else EvalResult(result.metrics)
    print(f"{dataset.name}: {len(dataset.records)} images, {int(truths.counted.sum())} with boxes that count, crops "
          f"{config.eval.crops}\n{shown.table()}")
    if numbers is not None:
        save_numbers(result.metrics, numbers)
    return result.metrics


def _crops(value: str | None) -> list[str]:
    return [] if value is None else [f"eval.crops={value}"]


def class_test(crops: str | None, overrides: Sequence[str]) -> list[str]:
    """Fields of a classifier's config: its test, at the localizer's scales if it is fully convolutional."""
    scales = [item for item in overrides if item.startswith("eval.test_scales=")]
    return [*_crops(crops), *(scales if crops == "dense" else [])]


@torch.no_grad()
def guess_classes(paths: Sequence[Path], dataset: Dataset, batch_size: int, device: str, overrides: Sequence[str]
                  ) -> Tensor:
    """The five likeliest classes (n, 5) of each image, best first, by a classifier or an ensemble of several."""
    model, meta, config = load_model(paths, device, overrides)
    check_fits(config, meta.classes, "classifier", config.model.input, dataset.classes, paths)
    device, test = device_of(model), build_class_test(config)
    loader = build_class_loader(as_class_dataset(dataset), config, device, batch_size=batch_size, training=False)
    guesses = torch.empty(len(dataset.records), min(5, len(dataset.classes)), dtype=torch.int64, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        for batch in track(loader, len(guesses), "classify", lambda batch: len(batch.image_ids)):
            with explain_out_of_memory(of_evaluation, batch, device):
                batch = batch.to(device, non_blocking=True)
                rows = torch.tensor(batch.image_ids).to(device)
                guesses[rows] = test(model, batch.images).topk(guesses.shape[1], dim=1).indices
    return guesses


class Pictures:
    """Writes a picture of each of the first images: its objects, and the box of every guess, those that are right by
    the measure of the challenge with a tick."""

    def __init__(self, folder: Path, dataset: Dataset, truths: LocTruths):
        self.folder, self.classes, self.truths, self.left = Path(folder), dataset.classes, truths, PICTURES
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: Batch, labels: Tensor, boxes: Tensor) -> None:
        first = 1 if labels.shape[1] > 1 else 0  # without guesses, the box of the true class
        for i, path in enumerate(batch.paths[:self.left]):
            row = self.truths.place[batch.image_ids[i]]
            objects = self.truths.boxes[row, self.truths.valid[row]]
            found = boxes[i, first:].float()
            right = localized(found[None], objects[None], objects.new_ones(1, len(objects), dtype=torch.bool))[0]
            right &= labels[i, first:] == self.truths.labels[row]
            names = [f"true: {self.classes[self.truths.labels[row]]}"] * len(objects)
            names += [f"{place} {self.classes[label]}{' ✓' if ok else ''}" for place, (label, ok) in
                      enumerate(zip(labels[i, first:].tolist(), right.tolist()), 1)]
            self._save(path, torch.cat([objects, found]).cpu(), len(objects), names)
        self.left -= min(self.left, len(batch.paths))

    def _save(self, path: str, boxes: Tensor, objects: int, names: list[str]) -> None:
        places = torch.arange(len(boxes)).sub(objects - 1).clamp(min=0)  # a colour for the truth, one for each guess
        found = Prediction(boxes, torch.ones(len(boxes)), places, names, places.tolist(), None, read_image(path), path)
        found.draw(scores=False).save(self.folder / f"{Path(path).stem}.jpg", quality=90)
