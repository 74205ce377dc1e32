"""What training needs to know of a kind of model: its data and its evaluation. `TASKS` has one builder for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from detres.config import PANOPTIC, RCNNS, SEMANTIC, Config, DataConfig, SourceConfig
from detres.data.check.training import check_files
from detres.data.class_dataset import align_labels, load_class_dataset
from detres.data.class_loader import build_class_loader
from detres.data.dataset import Dataset, Role, load_dataset
from detres.data.device import prepared
from detres.data.loader import build_loader
from detres.data.problems import InvalidDataError, OnInvalid, raise_all
from detres.data.transforms import scale_pyramid
from detres.engine import distributed
from detres.engine.interrupt import Interrupt
from detres.engine.optim import Schedule
from detres.evaluation.class_tests import build_class_test
from detres.evaluation.classification import ClassificationEvaluator
from detres.evaluation.base import eval_mode
from detres.evaluation.classify import evaluate_classifier
from detres.evaluation.localization import LocTruths, check_one_class, evaluate_localizer, load_proposer
from detres.evaluation.run import align_classes, align_to, evaluate, evaluators_for, load_for, reads_of
from detres.inference.localize import build_locate, with_proposals
from detres.structures import Batch

Metrics = dict[str, float]


@dataclass(frozen=True)
class Task:
    """Data and evaluation of one training, on one rank."""

    about: str  # the data, for people
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    loader: Callable[[int], Iterable[Batch]]  # batches from a step on
    validate: Callable[[nn.Module], Metrics] | None = None  # on data.val, with "val/loss_..."; None: there is none
    metric_names: tuple[str, ...] = ()  # of `validate`, but for the losses
    keypoints: dict[str, list] = field(default_factory=dict)  # as in `WeightsMeta`
    semantic_classes: tuple[str, ...] = ()  # of a panoptic model
    semantic_ids: tuple[int, ...] = ()


def detection(config: Config, device: torch.device, interrupt: Interrupt) -> Task:
    """Of detectors, and of semantic and panoptic models, for which only data and evaluators are others."""
    data, kind = config.data, config.model
    dataset, val = _checked(data, partial(load_for, kind))
    options = {"with_masks": kind.has_masks, "with_keypoints": kind.has_keypoints, **reads_of(kind),
               "device_type": device.type, **_rank()}
    loader = partial(build_loader, dataset, config.model.input, data, batch_size=config.train.batch_size, training=True,
                     seed=config.train.seed, steps=Schedule.scaled(config.train).steps, **options)
    loader()  # refuses data that does not fit before the run has a folder
    task = Task(f"{len(dataset.records)} images of {dataset.name}", dataset.classes, dataset.category_ids,
                lambda step: _on(device, data, loader(start_step=step)),
                keypoints=_keypoints(dataset) if kind.has_keypoints else {},
                semantic_classes=dataset.semantic_classes, semantic_ids=dataset.semantic_ids)
    if val is None:
        return task
    val = align_to(kind, val, dataset.classes, dataset.category_ids, dataset.semantic_classes)
    evaluators = evaluators_for(config, val)
    batches = build_loader(val, config.model.input, data, batch_size=config.eval.batch_size, training=False,
                           pyramid=scale_pyramid(config.model.input, config.eval), **options)

    def validate(model: nn.Module) -> Metrics:
        return evaluate(model, interrupt.watch(batches), evaluators, device, precision=config.train.precision,
                        losses=True).metrics

    names = tuple(metric for evaluator in evaluators for metric in evaluator.metric_names)
    return replace(task, validate=validate, metric_names=names)


def _checked(data: DataConfig, load: Callable[[SourceConfig, Role, OnInvalid], Dataset]
             ) -> tuple[Dataset, Dataset | None]:
    """Training and validation data, with what `detres data check` would find wrong refused, dropped or told."""
    sources = [source for source in (data.train, data.val) if source is not None]
    datasets, errors = [], []
    for source, role in zip(sources, ("train", "val")):
        try:
            datasets.append(load(source, role, data.on_invalid))
        except InvalidDataError as error:
            errors.append(error)
    raise_all(errors)
    if data.check_images:
        with distributed.first_on_each_machine():  # what the first finds is kept for the others
            datasets = check_files(datasets, sources, data.on_invalid)
    return datasets[0], datasets[1] if data.val is not None else None


def _on(device: torch.device, data: DataConfig, batches: Iterable[Any]) -> Iterable[Batch]:
    return prepared(batches, device) if data.on_device else batches


def _keypoints(dataset: Dataset) -> dict[str, list]:
    return {"names": list(dataset.keypoint_names), "skeleton": [list(bone) for bone in dataset.skeleton],
            "classes": list(dataset.keypoint_classes)}


def classification(config: Config, device: torch.device, interrupt: Interrupt) -> Task:
    data = config.data
    if data.on_device:
        raise ValueError("data.on_device must be false for a classifier, got true. Say data.on_device=false.")
    dataset = load_class_dataset(data.train, "train")
    loader = partial(build_class_loader, dataset, config, device, batch_size=config.train.batch_size, training=True,
                     **_rank())
    task = Task(f"{len(dataset)} images of {dataset.name}", dataset.classes, tuple(range(len(dataset.classes))),
                lambda step: loader(start_step=step))
    if data.val is None:
        return task
    batches = build_class_loader(align_labels(load_class_dataset(data.val, "val"), dataset.classes), config, device,
                                 batch_size=config.eval.batch_size, training=False, **_rank())

    def validate(model: nn.Module) -> Metrics:
        return evaluate_classifier(model, interrupt.watch(batches), dataset.classes, device,
                                   precision=config.train.precision, test=build_class_test(config)).metrics

    return Task(task.about, task.classes, task.category_ids, task.loader, validate,
                ClassificationEvaluator.metric_names)


def _rank() -> dict[str, int]:
    return {"rank": distributed.rank(), "world_size": distributed.world_size()}


def localization(config: Config, device: torch.device, interrupt: Interrupt) -> Task:
    """Of a localizer, or of a region classifier, which trains on the boxes of a localizer."""
    data = config.data.model_copy(update={"skip_empty": True})
    dataset, val = _checked(data, load_dataset)
    check_one_class(dataset)
    localizer, own = None, config  # `own`: the config of the localizer
    if config.model.name == "region_classifier":
        localizer, own = load_proposer(config, dataset.classes, device)
    options = {"with_masks": False, "device_type": device.type, **_rank()}
    loader = partial(build_loader, dataset, config.model.input, data, batch_size=config.train.batch_size, training=True,
                     seed=config.train.seed, steps=Schedule.scaled(config.train).steps, **options)

    def batches(start_step: int) -> Iterable[Batch]:
        plain = _on(device, data, loader(start_step=start_step))
        return plain if localizer is None else with_proposals(plain, localizer, own.model.rpn, device, config.train)

    task = Task(f"{len(dataset.records)} images of {dataset.name}", dataset.classes, dataset.category_ids, batches)
    if val is None:
        return task
    val = align_classes(val, dataset.classes, dataset.category_ids)
    truths = LocTruths.of(val, device)
    val_batches = build_loader(val, config.model.input, data, batch_size=config.eval.batch_size, training=False,
                               pyramid=scale_pyramid(config.model.input, config.eval), **options)

    def validate(model: nn.Module) -> Metrics:
        watched, asked = interrupt.watch(val_batches), (model, None)
        if localizer is not None:
            watched, asked = with_proposals(watched, localizer, own.model.rpn, device, config.train), (localizer, model)
        with eval_mode(model):
            return evaluate_localizer(build_locate(own.model, config.eval, *asked), watched, truths, val.classes,
                                      precision=config.train.precision,
                                      losses=lambda batch: model(batch.images, batch.targets)).metrics

    return Task(task.about, task.classes, task.category_ids, task.loader, validate, ("loc/gt_class_error",))


TASKS = {**dict.fromkeys([*RCNNS, *SEMANTIC, *PANOPTIC, "retinanet", "fcos", "rpn"], detection),
         "classifier": classification, "localizer": localization, "region_classifier": localization}
