"""Object detection and segmentation on ResNet backbones.

    model = detres.load("runs/demo")
    out = model.predict("image.jpg")
    out.draw().save("found.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names and where they live; imported on first use, so that `import detres` does not wait for torch.
_PUBLIC = {
    "load": "detres.inference.predictor",
    "Predictor": "detres.inference.predictor",
    "Prediction": "detres.inference.predictor",
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
    from detres.inference.predictor import Prediction, Predictor, load

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'detres' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted(__all__)
