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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detres.build import build_model
from detres.config import Config, ModelConfig
from detres.config_file import override
from detres.engine.checkpoint import META_KEY, SUFFIXES, WeightsMeta, find_weights, load_weights
from detres.weights import detectron2, mmdet, timm, torchvision, zoo
from detres.weights.infer import infer
from detres.weights.known_classes import (
    Classes, detection_classes, image_classes, keypoint_classes, keypoint_layout, semantic_classes)
from detres.weights.mismatch import check_fit
from detres.weights.pickles import holds_tensors, read_tensors
from detres.weights.source import Family, Sections, State, UnknownNetwork, merged, shapes_of

ZOO_FOLDERS = tuple({name.partition("/")[0] + "/" for name in zoo.MODELS})
PUBLISHED = {"torchvision": torchvision.published, "Detectron2": detectron2.published}
BODY = {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}  # of a ResNet without a classifier
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

    model: sections of its config that the tensors do not show, over what is assumed of the toolkit; `overrides`
    likewise, as "model.input.min_size=600". classes: names, where they are not those of a published data set. All three
    are for other toolkits' weights; ours carry theirs.

    Raises FileNotFoundError, or ValueError for a file that is no weights, or of a model that no toolkit here has, or
    for what it carries itself; WeightsMismatch, if tensors do not fit the model that they show.
    """
    file = locate(source)
    if _is_own(file):
        if model or classes is not None or overrides:
            raise ValueError(f"weights of detres must be read as they describe themselves, got a config, classes or "
                             f"key=value beside {file}. Leave them out; predict and eval take key=value.")
        tensors, meta = load_weights(file)
        return Weights(tensors, meta, file)
    state, about = read_tensors(file)
    return convert(state, file, about, model=model, classes=classes, overrides=overrides)


def locate(source: str | Path) -> Path:
    """The file that a user means; of a name or URL, the one in the cache, downloaded into it first if need be."""
    if Path(source).exists():
        return _find(source)
    try:
        zoo.resolve(str(source))
    except ValueError:
        is_path = Path(source).name != str(source) or Path(source).suffix in SUFFIXES
        is_of_zoo = str(source).startswith(ZOO_FOLDERS) and Path(source).suffix not in SUFFIXES
        if is_path and not is_of_zoo and "://" not in str(source):
            return find_weights(source)
        raise
    return zoo.fetch(source)


def _find(path: str | Path) -> Path:
    """`find_weights` of what exists, which may hide what was meant."""
    try:
        return find_weights(path)
    except FileNotFoundError as error:
        if str(path) in zoo.names():
            raise FileNotFoundError(f"{error} It hides the published weights of that name: rename the folder, or run "
                                    "elsewhere.") from None
        raise


def _is_own(file: Path) -> bool:
    """Whether it is a safetensors file with our description. Any other is looked into by `read_tensors`."""
    try:
        with safe_open(file, "pt") as tensors:
            return META_KEY in (tensors.metadata() or {})
    except (SafetensorError, OSError):
        return False


def convert(state: State, file: Path, about: Mapping[str, Any] | None = None, *,
            model: Mapping[str, Any] | None = None, classes: Sequence[str] | None = None,
            overrides: Sequence[str] = ()) -> Weights:
    """Tensors of another toolkit; file: where they are from, if it is there still; about: what else it says. See
    `read_weights`."""
    about = about or {}
    family = recognise(state, file)
    tensors, sections, num_classes = _inferred(family, state, file)
    published = PUBLISHED[family.toolkit](file) if family.toolkit in PUBLISHED and file.is_file() else None
    told, names = family.told(about) if family.told else ({}, None)
    sections = merged(sections, family.conventions(sections), published or {}, told, model or {})
    config = _config(sections, overrides, file)
    given = names if classes is None else classes
    known, semantic = _classes(config.model, num_classes, tensors, given, file)
    with torch.device("meta"):  # its shapes are all that is looked at
        built = build_model(config.model, num_classes, **_semantic_channels(semantic))
    tensors = _with_counters(tensors, built)
    check_fit(shapes_of(tensors), shapes_of(built.state_dict()),
              f"weights must fit the model that they show ({file}, {family.toolkit}'s {family.name})",
              "Give what the tensors do not show as --config or key=value.")
    names, ids = known or (tuple(f"class {i}" for i in range(num_classes)), tuple(range(1, num_classes + 1)))
    layout = {"semantic_classes": semantic[0], "semantic_ids": semantic[1]} if semantic else {}
    if config.model.has_keypoints:
        layout["keypoints"] = keypoint_layout(config.model.keypoint_head.num_keypoints)
    meta = WeightsMeta(config.model_dump(mode="json"), names, ids, 0, {}, **layout)
    notes = () if published is not None else (*family.assumed, *_class_notes(known, num_classes, given))
    return Weights(tensors, meta, file, family, (*notes, *_file_notes(tensors, about)))


def _inferred(family: Family, state: State, file: Path) -> tuple[dict[str, Tensor], Sections, int]:
    """Tensors under our names, and what `infer` says of them. Raises ValueError for parts that are not known, and where
    parts lack."""
    try:
        tensors, unknown = family.keymap.to_ours(state)
        inferred = () if unknown else infer(tensors)
    except UnknownNetwork as error:
        raise ValueError(f"{error} ({file})") from None
    except (LookupError, ValueError, RuntimeError, ZeroDivisionError) as error:
        what = f"without {error}" if isinstance(error, KeyError) else f"whose shapes do not fit each other ({error})"
        raise ValueError(f"weights must have all tensors of {family.toolkit}'s {family.name}, got {file}, {what}. "
                         "Give the state dict of the whole model, as the toolkit builds it.") from None
    if unknown:
        raise ValueError(f"weights must be of a model that detres has, got {file}: {family.toolkit}'s {family.name} "
                         f"with {len(unknown)} tensors of other parts, such as {', '.join(unknown[:4])}. "
                         "Models with parts of one's own cannot be imported.")
    return tensors, *inferred


def _class_notes(known: Classes | None, count: int, given: Sequence[str] | None) -> list[str]:
    if given is not None:
        return []
    if known is None:
        return [f"names of its {count} classes are not known: give --classes to import"]
    few = ", ".join(known[0][:3]) + (" ..." if count > 3 else "")
    return [f"its classes are those of a published data set of as many ({few}): give --classes to import if they are "
            "others"] if count > 1 else []


def _file_notes(tensors: State, about: Mapping[str, Any]) -> list[str]:
    """What of a file is left aside, or odd."""
    notes = [f"'{name}', other tensors in the file, is left aside" for name, value in about.items()
             if holds_tensors(value)]
    if odd := [name for name, tensor in tensors.items() if not tensor.is_meta and not tensor.isfinite().all()]:
        notes.append(f"{len(odd)} tensors have values that are not finite, such as {odd[0]}: their training failed")
    return notes


def recognise(state: State, file: str | Path) -> Family:
    """The family whose names the tensors have. Raises ValueError."""
    for family in FAMILIES:
        if family.fits(state):
            return family
    kinds = ", ".join(dict.fromkeys(family.toolkit for family in FAMILIES))
    is_backbone = any(family.fits(state) for family in detectron2.BACKBONES) or BODY <= set(state)
    fix = "Weights of a backbone belong in model.backbone.weights" if is_backbone else \
        "Give the state dict of the whole model"
    raise ValueError(f"weights must be of a model of {kinds}, or of detres, got {file} with tensors such as "
                     f"{', '.join(list(state)[:4])}. {fix}.")


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
            raise ValueError(f"classes must be {count} distinct names, got {', '.join(given) or 'none'} ({file}).")
        published = detection_classes(count)  # whose ids have gaps, if these are they
        return (published if published and published[0] == tuple(given) else
                (tuple(given), tuple(range(1, count + 1)))), semantic
    if config.name == "rpn":
        return (("object",), (1,)), semantic
    if config.name == "classifier":
        return image_classes(count), semantic
    if config.is_semantic:
        return semantic_classes(count), semantic
    return (keypoint_classes if config.has_keypoints else detection_classes)(count), semantic


def _semantic_channels(semantic: Classes | None) -> dict[str, int]:
    return {} if semantic is None else {"num_semantic": len(semantic[0])}


def _with_counters(tensors: State, model: torch.nn.Module) -> dict[str, Tensor]:
    """Batch norms count their batches, which nothing depends on and not every toolkit saves."""
    counters = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in model.state_dict().items()
                if name.endswith("num_batches_tracked")}
    return {**counters, **tensors}
