"""Evaluation of classifiers: top-1 and top-5 over a loader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from detres.config import Config, SourceConfig
from detres.data.class_dataset import align_labels, load_class_dataset
from detres.data.class_loader import build_class_loader
from detres.engine.distributed import gather
from detres.engine.failures import explain_out_of_memory, of_evaluation
from detres.evaluation.base import EvalResult, eval_mode
from detres.evaluation.class_tests import ClassTest, build_class_test
from detres.evaluation.classification import ClassificationEvaluator
from detres.progress import track
from detres.structures import Batch

ROWS = 50  # classes up to which the table has a row for each


@torch.no_grad()
def evaluate_classifier(model: nn.Module, loader: Iterable[Batch], classes: Sequence[str], device: torch.device, *,
                        precision: Literal["fp32", "bf16"] = "fp32",
                        test: ClassTest = nn.Module.__call__) -> EvalResult:
    """Top-1, top-5 and the loss "val/loss_cls" over all processes. `test` (`class_tests`): how the model is asked.

    Raises torch.OutOfMemoryError that names the batch and what to change.
    """
    evaluator, total = ClassificationEvaluator(classes), torch.zeros(2, dtype=torch.float64, device=device)
    with eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in loader:
            with explain_out_of_memory(of_evaluation, batch, device):
                batch = batch.to(device, non_blocking=True)
                logits = test(model, batch.images).float()
            evaluator.update(logits, batch.targets.labels)
            total += torch.stack([F.cross_entropy(logits, batch.targets.labels, reduction="sum").double(),
                                  total.new_tensor(len(logits))])
    evaluator.merge(gather(evaluator.state()))
    loss, images = torch.stack(gather(total.cpu())).sum(0).tolist()
    return evaluator.compute().merged(EvalResult({"val/loss_cls": loss / max(images, 1)}))


def evaluate_class_weights(model: nn.Module, classes: Sequence[str], config: Config, source: SourceConfig,
                           batch_size: int) -> tuple[EvalResult, str]:
    """The result on a data set by the test that `config.eval` names, and on what it was measured, for people."""
    dataset = align_labels(load_class_dataset(source, "val"), classes)
    device = next(model.parameters()).device
    loader = build_class_loader(dataset, config, device, batch_size=batch_size, training=False)
    batches = track(loader, len(dataset), "evaluate", lambda batch: len(batch.images.pixels))
    result = evaluate_classifier(model, batches, classes, device, precision=config.train.precision,
                                 test=build_class_test(config))
    about = f"{dataset.name}: {len(dataset)} images, crops {config.eval.crops}"
    return (result if len(classes) <= ROWS else EvalResult(result.metrics)), about
