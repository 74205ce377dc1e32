"""Evaluation of classifiers: top-1 and top-5 over a loader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from detres.engine.distributed import gather
from detres.engine.failures import explain_out_of_memory, of_evaluation
from detres.evaluation.base import EvalResult
from detres.evaluation.class_tests import ClassTest
from detres.evaluation.classification import ClassificationEvaluator
from detres.evaluation.run import eval_mode
from detres.structures import Batch


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
