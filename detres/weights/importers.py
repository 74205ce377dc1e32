"""Any weights: detres's own, or those of torchvision, Detectron2, timm and MMDetection, recognised by their tensors.

    read_weights("runs/mine")                    a run, or a weights file
    read_weights("maskrcnn_resnet50_fpn_v2")     a published name: torchvision's, or of Detectron2's model zoo
    read_weights("model_final_f10217.pkl")       a file of another toolkit

All give tensors under our names, and a `WeightsMeta` that says what model they are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from detres.build import build_model
from detres.config import Config, ModelConfig
from detres.config_file import override
from detres.engine.checkpoint import META_KEY, WeightsMeta, find_weights, load_weights
from detres.weights import detectron2, mmdet, timm, torchvision, zoo
from detres.weights.infer import infer
from detres.weights.known_classes import Classes, detection_classes, image_classes, keypoint_layout, semantic_classes
from detres.weights.mismatch import check_fit
from detres.weights.pickles import read_tensors
from detres.weights.source import Family, Sections, State, merged

PUBLISHED = {"torchvision": torchvision.published, "Detectron2": detectron2.published}
SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")
FAMILIES: tuple[Family, ...] = (*torchvision.FAMILIES, *detectron2.FAMILIES, *timm.FAMILIES, *mmdet.FAMILIES)


@dataclass(frozen=True)
class Weights:
    """Tensors under our names, what they are of, and where they come from."""

    tensors: dict[str, Tensor]
    meta: WeightsMeta
    file: Path
    family: Family | None = None  # None: detres's own
    notes: tuple[str, ...] = field(default=())  # what had to be assumed


def read_weights(source: str | Path, *, model: Mapping[str, Any] | None = None, classes: Sequence[str] | None = None,
                 overrides: Sequence[str] = ()) -> Weights:
    """Weights of a run folder, a file, a URL or a published name (`zoo`).

    model: sections of its config that the tensors do not show, over what is assumed of the toolkit; `overrides` likewise,
    as "model.input.min_size=600". classes: names, where they are not those of a published data set. All three are for
    other toolkits' weights; ours carry theirs.

    Raises FileNotFoundError, or ValueError for a file that is no weights, or of a model that no toolkit here has;
    WeightsMismatch, if tensors do not fit the model that they show.
    """
    file = locate(source)
    if _is_own(file):
        tensors, meta = load_weights(file)
        return Weights(tensors, meta, file)
    state, about = read_tensors(file)
    return convert(state, file, about, model=model, classes=classes, overrides=overrides)


def locate(source: str | Path) -> Path:
    """The file that a user means; of a name or URL, the one in the cache, downloaded into it first if need be."""
    if Path(source).exists():
        return find_weights(source)
    try:
        zoo.resolve(str(source))
    except ValueError:
        if Path(source).name != str(source) or Path(source).suffix in SUFFIXES:  # meant as a path
            return find_weights(source)
        raise
    return zoo.fetch(source)


def _is_own(file: Path) -> bool:
    """Whether it is a safetensors file with our description. Any other is looked into by `read_tensors`."""
    with file.open("rb") as stream:
        start = stream.read(8)
        header = stream.read(min(int.from_bytes(start, "little"), 2**20)) if len(start) == 8 else b""
    return header.startswith(b"{") and f'"{META_KEY}"'.encode() in header


def convert(state: State, file: Path, about: Mapping[str, Any] | None = None, *,
            model: Mapping[str, Any] | None = None, classes: Sequence[str] | None = None,
            overrides: Sequence[str] = ()) -> Weights:
    """Tensors of another toolkit; about: what else the file says. See `read_weights`."""
    family = recognise(state, file)
    tensors, unknown = family.keymap.to_ours(state)
    if unknown:
        raise ValueError(f"weights must be of a model that detres has, got {file}: {family.toolkit}'s {family.name} with "
                         f"{len(unknown)} tensors of other parts, such as {', '.join(unknown[:4])}. "
                         "Models with parts of one's own cannot be imported.")
    sections, num_classes = infer(tensors)
    published = PUBLISHED.get(family.toolkit, lambda file: {})(file)
    told, names = family.told(about or {}) if family.told else ({}, None)
    config = _config(merged(sections, family.conventions(sections), published, told, model or {}), overrides, file)
    known, semantic = _classes(config.model, num_classes, tensors, classes or names, file)
    built = build_model(config.model, num_classes, **_semantic_channels(semantic))
    tensors = _with_counters(tensors, built)
    check_fit(_shapes(tensors), _shapes(built.state_dict()),
              f"weights must fit the model that they show ({file}, {family.toolkit}'s {family.name})",
              "Give what the tensors do not show as --config or key=value.")
    names, ids = known or (tuple(f"class {i}" for i in range(num_classes)), tuple(range(1, num_classes + 1)))
    notes = [] if known else [f"names of its {num_classes} classes are not known: give --classes"]
    about = {"semantic_classes": semantic[0], "semantic_ids": semantic[1]} if semantic else {}
    if config.model.has_keypoints:
        about["keypoints"] = keypoint_layout(config.model.keypoint_head.num_keypoints)
    meta = WeightsMeta(config.model_dump(mode="json"), names, ids, 0, {}, **about)
    return Weights(tensors, meta, file, family, (*family.assumed, *notes))


def recognise(state: State, file: str | Path) -> Family:
    """The family whose names the tensors have. Raises ValueError."""
    for family in FAMILIES:
        if family.fits(state):
            return family
    kinds = ", ".join(dict.fromkeys(family.toolkit for family in FAMILIES))
    raise ValueError(f"weights must be of a model of {kinds}, or of detres, got {file} with tensors such as "
                     f"{', '.join(list(state)[:4])}. Give the state dict of the whole model.")


def _config(sections: Sections, overrides: Sequence[str], file: Path) -> Config:
    try:
        config = Config(model=ModelConfig.model_validate(sections))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"weights must be of a network that detres has, got {file}: "
                         f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    return override(config, overrides, str(file)) if overrides else config


def _classes(config: ModelConfig, count: int, tensors: State, given: Sequence[str] | None,
             file: Path) -> tuple[Classes | None, Classes | None]:
    """Classes, and those of the semantic channels of a panoptic model."""
    semantic = None
    if config.is_panoptic:
        channels = len(tensors["semantic_head.predict.weight"])
        semantic = semantic_classes(channels) or (("things", *(f"stuff {i}" for i in range(1, channels))),
                                                  tuple(range(channels)))
    if given is not None:
        if len(given) != count or len(set(given)) != count:
            raise ValueError(f"classes must be {count} distinct names, got {len(given)} ({file}).")
        published = detection_classes(count)  # whose ids have gaps, if these are they
        return (published if published and published[0] == tuple(given) else
                (tuple(given), tuple(range(1, count + 1)))), semantic
    if config.name == "rpn":
        return (("object",), (1,)), semantic
    if config.name == "classifier":
        return image_classes(count), semantic
    if config.is_semantic:
        return semantic_classes(count), semantic
    return detection_classes(count), semantic


def _semantic_channels(semantic: Classes | None) -> dict[str, int]:
    return {} if semantic is None else {"num_semantic": len(semantic[0])}


def _with_counters(tensors: State, model: torch.nn.Module) -> dict[str, Tensor]:
    """Batch norms count their batches, which nothing depends on and not every toolkit saves."""
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return {**counters, **tensors}


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
