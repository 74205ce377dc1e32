"""Weights in the layouts of torchvision and Detectron2: the key tables of import, read the other way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from detres.config import ModelConfig
from detres.weights import detectron2, torchvision
from detres.weights.infer import infer
from detres.weights.source import Family, Sections

FORMATS = {"torchvision": torchvision.FAMILIES, "detectron2": detectron2.FAMILIES}
OF_INFERENCE = ("input", "anchors", "pool", "mask_head", "backbone", "keypoint_head", "dense_head")
OF_TRAINING = {"freeze_stages", "box_loss", "smooth_l1_beta"}


@dataclass(frozen=True)
class Exported:
    content: dict[str, Any]  # for torch.save
    usage: str  # how to load it
    differences: tuple[str, ...]  # what the other toolkit does otherwise, unless it is told


def export(tensors: Mapping[str, Tensor], model: ModelConfig, num_classes: int, families: tuple[Family, ...]) -> Exported:
    """Tensors under the names of the family that has them all. Raises ValueError where there is none."""
    problems = []
    for family in families:
        found, unknown = family.keymap.to_theirs(tensors)
        if not unknown and family.fits(found):
            break
        problems.append(f"{family.name} has no {unknown[0]}" if unknown else f"{family.name} is another model")
    else:
        raise ValueError(f"model must be one that {families[0].toolkit} has, got {model.name}, backbone.layout "
                         f"{model.backbone.layout}: {'; '.join(problems)}. Export as safetensors.")
    conventions = family.conventions(infer(tensors)[0])
    differences = tuple(f"{families[0].toolkit} computes with {name}={theirs}, this model has {ours}"
                        for name, theirs, ours in _differences(conventions, model.model_dump()))
    if family.toolkit == "Detectron2":
        usage = (f"Load it as MODEL.WEIGHTS of {family.name} with NUM_CLASSES {num_classes}, "
                 f"RESNETS.DEPTH {model.backbone.depth}.")
        return Exported({"model": found, "__author__": "detres"}, usage, differences)
    usage = f"Load it with load_state_dict into torchvision's {family.name}" + (
        f" of {num_classes} classes." if model.name == "classifier" or model.is_semantic else
        f" of {num_classes + 1} classes, background first.")
    return Exported(found, usage, differences)


def _differences(theirs: Sections, ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Fields that change what is computed, by their dotted names."""
    for section in OF_INFERENCE:
        for name, value in theirs.get(section, {}).items():
            same = value == ours[section][name] or _listed(value) == _listed(ours[section][name])
            if name not in OF_TRAINING and not same:
                yield f"{section}.{name}", value, ours[section][name]


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
