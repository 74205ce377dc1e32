"""Evaluation from a model, or from a weights file, to named numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from detres.build import build_merge
from detres.config import Config, ModelConfig, Protocol, SourceConfig
from detres.data.dataset import Dataset, ImageRecord, Role, load_dataset, one_class
from detres.data.loader import build_loader
from detres.data.panoptic import align_panoptic, load_panoptic
from detres.data.problems import OnInvalid
from detres.data.semantic import align_semantic, load_semantic
from detres.data.transforms import scale_pyramid
from detres.engine.distributed import gather, rank, world_size
from detres.engine.failures import explain_out_of_memory, of_evaluation
from detres.evaluation.base import EvalResult, Evaluator, eval_mode, truths_of
from detres.evaluation.classify import evaluate_class_weights
from detres.evaluation.coco import CocoEvaluator
from detres.evaluation.coco_results import Compared
from detres.evaluation.files import save_errors, save_numbers
from detres.evaluation.ilsvrc import IlsvrcDetectionEvaluator
from detres.evaluation.overlaps import COCO_SIGMAS, box_overlaps
from detres.evaluation.proposals import ProposalEvaluator
from detres.evaluation.segmentation import PanopticTest, SemanticTest
from detres.evaluation.voc import VocEvaluator, save_for_server
from detres.inference.localize import refuse_localizers
from detres.inference.predictor import load_model
from detres.progress import track
from detres.structures import Batch

log = logging.getLogger(__name__)


def build_evaluators(dataset: Dataset, metrics: Sequence[Protocol], with_masks: bool, keep_masks: bool = False,
                     with_keypoints: bool = False) -> list[Evaluator]:
    """One evaluator per protocol. COCO evaluates masks and keypoints where the model predicts them and the data set has
    them.

    `keep_masks` is for results with masks.
    """
    masks = with_masks and bool(dataset.records.table()["masked"].any())
    keypoints = with_keypoints and bool(dataset.keypoint_names)
    types = ("bbox", *("segm",) * masks, *("keypoints",) * keypoints)
    sigmas = sigmas_of(dataset) if keypoints else COCO_SIGMAS
    build = {"coco": lambda: CocoEvaluator(dataset, types, keep_masks, sigmas),
             "voc": lambda: VocEvaluator(dataset),
             "ilsvrc": lambda: IlsvrcDetectionEvaluator(dataset, dataset.blacklist)}
    return [build[name]() for name in metrics]


def sigmas_of(dataset: Dataset) -> Sequence[float]:
    """Of OKS: COCO's for its 17 keypoints, else one over their number for each, with a warning."""
    count = len(dataset.keypoint_names)
    if count == len(COCO_SIGMAS):
        return COCO_SIGMAS
    log.warning("AP of keypoints takes 1/%d as the deviation of each keypoint (sigma of OKS): known are only those of "
                "COCO's 17 (%s).", count, dataset.name)
    return (1 / count,) * count


def check_keypoints(dataset: Dataset, config: ModelConfig) -> None:
    """Refuses a model of another number of keypoints than the data set names. Raises ValueError."""
    wanted, count = config.keypoint_head.num_keypoints, len(dataset.keypoint_names)
    if config.has_keypoints and count not in (0, wanted):
        raise ValueError(f"model.keypoint_head.num_keypoints must be the number of keypoints that the data set names, "
                         f"got {wanted}, where '{dataset.name}' has {count} ({', '.join(dataset.keypoint_names)}). "
                         f"Set model.keypoint_head.num_keypoints={count}.")


def load_for(model: ModelConfig, source: SourceConfig, role: Role, on_invalid: OnInvalid) -> Dataset:
    """The data set as this kind of model reads it."""
    read = load_semantic if model.is_semantic else load_panoptic if model.is_panoptic else load_dataset
    dataset = read(source, role, on_invalid)
    check_keypoints(dataset, model)
    return one_class(dataset) if model.name == "rpn" else dataset


def reads_of(model: ModelConfig) -> dict[str, bool]:
    """Options of `build_loader` for this kind of model."""
    return {"with_boxes": not model.is_semantic, "with_semantic": model.is_semantic or model.is_panoptic}


def evaluators_for(config: Config, dataset: Dataset, keep_masks: bool = False) -> list[Evaluator]:
    """What this kind of model is measured by. `keep_masks` is for results with masks."""
    if config.model.name == "rpn":
        return [ProposalEvaluator(dataset)]
    if config.model.is_semantic:
        return [SemanticTest(dataset)]
    evaluators = build_evaluators(dataset, config.eval.metrics, config.model.has_masks, keep_masks,
                                  config.model.has_keypoints)
    if config.model.is_panoptic:
        evaluators.append(PanopticTest(dataset, build_merge(config.model.panoptic)))
    return evaluators


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Batch], evaluators: Sequence[Evaluator], device: torch.device | str, *,
             precision: Literal["fp32", "bf16"] = "fp32", losses: bool = False, progress: bool = True) -> EvalResult:
    """Run the model in eval mode over a loader and compute every evaluator's numbers, of this run alone.

    `losses` adds the validation losses, "val/loss_cls" ..., averaged over images (this costs a second forward pass).
    With processes that train together each loads its own part, and every one returns the result of the whole.
    Raises torch.OutOfMemoryError that names the batch and what to change.
    """
    device = torch.device(device)
    means = LossMeans()
    for evaluator in evaluators:
        evaluator.reset()
    batches = loader
    if progress and evaluators and rank() == 0:
        own_images = -(-len(evaluators[0].dataset.records) // world_size())
        batches = track(loader, own_images, "evaluate", lambda batch: len(batch.image_ids))
    with eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in batches:
            with explain_out_of_memory(of_evaluation, batch, device):
                batch = batch.to(device, non_blocking=True)
                detections = model(batch.images)
                for evaluator in evaluators:
                    evaluator.update(detections, batch)
                if losses and batch.targets is not None:
                    means.add(model(batch.images, batch.targets), len(batch.image_ids))
    result = EvalResult({})
    for evaluator in evaluators:
        if world_size() > 1:  # alone, detections stay on their device
            evaluator.merge(gather(evaluator.state()))
        result = result.merged(evaluator.compute())
    return result.merged(means.compute())


class LossMeans:
    """Sums of losses on the device, so that nothing waits for them before the end."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.images = 0

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        self.images += images
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach().double() * images

    def compute(self) -> EvalResult:
        """Means over the images of all ranks, as "val/loss_cls" ..."""
        ranks = gather(({name: float(value) for name, value in self.sums.items()}, self.images))
        images = sum(count for _, count in ranks)
        names = {name: None for sums, _ in ranks for name in sums}
        return EvalResult({f"val/{name}": sum(sums.get(name, 0.0) for sums, _ in ranks) / images for name in names})


def evaluate_weights(path: str | Path | Sequence[str | Path], *, data: str | SourceConfig | None = None,
                     split: str | None = None, save: str | Path | None = None,
                     metrics: Sequence[Protocol] | None = None, batch_size: int | None = None,
                     device: str = "auto", overrides: Sequence[str] = (), numbers: str | Path | None = None,
                     errors: str | Path | None = None) -> dict[str, float]:
    """Evaluate a weights file or a run folder, or several as an ensemble; print the table; return the metrics.

    `data` and `split` default to what the weights (of several, the first) were validated on in training, `metrics` and
    `batch_size` to their config, which `overrides` such as "model.box_head.score_thresh=0.1" change first
    (`load_model`). The precision is that of training, so the numbers are those of the run. `save` is a .json file for
    the detections as COCO results, which pycocotools' `loadRes` reads, or, of VOC data, a folder for text files
    (`voc.save_for_server`); `numbers` a file for the metrics, as JSON; `errors` a folder for an analysis of the errors
    of boxes; of these a classifier has only `numbers`.
    """
    model, meta, config = load_model(path, device, overrides)
    refuse_localizers(config.model.name, path)
    source, batch_size = source_of(config.data.val, data, split, path), batch_size or config.eval.batch_size
    weights = f"{path} (step {meta.step})" if isinstance(path, (str, PathLike)) else " + ".join(map(str, path))
    if config.model.name == "classifier":
        _refuse_options(config.model.name, save=save, metrics=metrics, errors=errors)
        result, about = evaluate_class_weights(model, meta.classes, config, source, batch_size)
        print(f"{about}, weights {weights}\n{result.table()}")
        if numbers is not None:
            save_numbers(result.metrics, numbers)
        return result.metrics
    if config.model.is_semantic:
        _refuse_options(config.model.name, save=save, metrics=metrics, errors=errors)
    if config.eval.crops != 1:
        raise ValueError(f"eval.crops must be 1 but for classifiers and localizers, got {config.eval.crops} for a "
                         f"{config.model.name}. Several sizes are eval.test_scales.")
    if config.model.name == "rpn":
        _refuse_options(config.model.name, metrics=metrics)
    if metrics is not None:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"metrics": tuple(metrics)})})
    dataset = align_to(config.model, load_for(config.model, source, "val", config.data.on_invalid), meta.classes,
                       meta.category_ids, meta.semantic_classes)
    if save is not None and Path(save).suffix != ".json" and dataset.format != "voc":
        raise ValueError(f"save must be a .json file, or, for data in VOC's format alone, a folder, got {save}. "
                         f"Say {save}.json.")
    evaluators = evaluators_for(config, dataset, save is not None)
    loader = build_loader(dataset, config.model.input, config.data, batch_size=batch_size, **reads_of(config.model),
                          training=False, with_masks=False, pyramid=scale_pyramid(config.model.input, config.eval),
                          device_type=device_of(model).type)
    result = evaluate(model, loader, evaluators, device_of(model), precision=config.train.precision)
    print(f"{dataset.name}: {len(dataset.records)} images, weights {weights}\n{result.table()}")
    evaluator = max(evaluators, key=lambda evaluator: isinstance(evaluator, CocoEvaluator))
    if save is not None:
        save_results(evaluator, save)
    if numbers is not None:
        save_numbers(result.metrics, numbers)
    if errors is not None:
        truths, found = truths_of(evaluator.records, device_of(model)), evaluator.found()
        save_errors(Compared(truths, found, dataset.classes, box_overlaps(truths, found)), errors)
    return result.metrics


def _refuse_options(kind: str, **options) -> None:
    if given := [f"{name}={value}" for name, value in options.items() if value is not None]:
        raise ValueError(f"options of an evaluation must fit the model, got {', '.join(given)}, which a {kind} does "
                         "not have. Leave them out.")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def source_of(default: SourceConfig | None, data: str | SourceConfig | None, split: str | None,
            weights: str | Path) -> SourceConfig:
    source = SourceConfig(path=data) if isinstance(data, str) else data or default
    if source is None:
        raise ValueError("a data set must be given for weights that were trained without one to validate on, got none "
                         f"({weights}). Say which with --data.")
    return source if split is None else source.model_copy(update={"split": split})


def save_results(evaluator: Evaluator, path: str | Path) -> None:
    """Write COCO results JSON, or, if the path is no .json, VOC's text files into it; folders are created."""
    path = Path(path)
    if path.suffix != ".json":
        save_for_server(evaluator.results(), evaluator.dataset, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evaluator.results()))


def align_to(model: ModelConfig, dataset: Dataset, classes: Sequence[str], category_ids: Sequence[int],
             semantic_classes: Sequence[str]) -> Dataset:
    """The data set with all its labels renumbered to those of a model. Raises as `align_classes`."""
    if model.is_semantic:
        return align_semantic(dataset, classes)
    aligned = align_classes(dataset, classes, category_ids)
    return align_panoptic(dataset, aligned, semantic_classes) if model.is_panoptic else aligned


def align_classes(dataset: Dataset, classes: Sequence[str], category_ids: Sequence[int]) -> Dataset:
    """The data set with its labels renumbered to the classes of a model, matched by name.

    Its category ids stay those of its own file. Classes that only the model knows get ids of the model, or new ones
    where taken. Raises ValueError for classes that the model does not know.
    """
    if dataset.classes == tuple(classes):
        return dataset
    missing = [name for name in dataset.classes if name not in classes]
    if missing:
        raise ValueError(f"classes of the data set must be known to the weights, got {', '.join(missing)} in "
                         f"'{dataset.name}'. The weights know {', '.join(classes)}: evaluate on data with these names.")
    own = dict(zip(dataset.classes, dataset.category_ids))
    free = iter(range(max([*own.values(), *category_ids]) + 1, 2**31))
    spare = {name: i if i not in own.values() else next(free) for name, i in zip(classes, category_ids)}
    label = [tuple(classes).index(name) for name in dataset.classes]

    def relabelled(record: ImageRecord) -> ImageRecord:
        annotations = tuple(replace(item, label=label[item.label]) for item in record.annotations)
        return replace(record, annotations=annotations, label=None if record.label is None else label[record.label])

    return replace(dataset, classes=tuple(classes), category_ids=tuple(own.get(name, spare[name]) for name in classes),
                   records=dataset.records.mapped(relabelled))
