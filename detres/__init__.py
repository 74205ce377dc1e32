"""Object detection and segmentation on ResNet backbones.

    model = detres.load("runs/demo")
    out = model.predict("image.jpg")
    out.draw().save("found.png")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names and where they live; imported on first use, so that `import detres` does not wait for torch.
_PUBLIC = {
    "Predictor": "detres.inference.predictor",
    "Prediction": "detres.inference.predictor",
    "ClassPredictor": "detres.inference.classify",
    "Classification": "detres.inference.classify",
    "SemanticPredictor": "detres.inference.segment",
    "SemanticPrediction": "detres.inference.segment",
    "load_config": "detres.config_file",
    "load_dataset": "detres.data.dataset",
    "build_model": "detres.build",
    "train": "detres.engine.train",
    "evaluate_weights": "detres.evaluation.run",
}

if TYPE_CHECKING:
    from detres.build import build_model
    from detres.config_file import load_config
    from detres.data.dataset import load_dataset
    from detres.engine.train import train
    from detres.evaluation.run import evaluate_weights
    from detres.inference.classify import Classification, ClassPredictor
    from detres.inference.predictor import Prediction, Predictor
    from detres.inference.segment import SemanticPrediction, SemanticPredictor

__all__ = [*_PUBLIC, "load", "__version__"]


def load(path: str | os.PathLike | Sequence[str | os.PathLike], device: str = "auto",
         overrides: Sequence[str] = ()) -> Predictor | ClassPredictor | SemanticPredictor:
    """A model ready to predict, with its classes and preprocessing: from a run folder, a weights file of detres,
    torchvision, Detectron2, timm or MMDetection, a URL, or a published name such as "maskrcnn_resnet50_fpn_v2" or
    "COCO-Detection/faster_rcnn_R_50_FPN_3x" (`weights.importers`).

    Several make an ensemble. device: auto (a GPU where there is one), cpu, cuda, cuda:1 ... `overrides` are of
    the config that weights carry, such as "model.box_head.nms_thresh=0.3". Raises FileNotFoundError; ConnectionError
    where a published file cannot be had; ValueError for an unknown name, or a file that is no such model's.
    """
    from detres.inference.predictor import load_predictor

    return load_predictor(path, device, overrides)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'detres' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted(__all__)
