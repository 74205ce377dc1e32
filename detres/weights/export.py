"""Weights in the layouts of torchvision and Detectron2: the key tables of import, read the other way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from detres.config import RCNNS, ModelConfig
from detres.weights import detectron2, torchvision
from detres.weights.detectron2_config import translate
from detres.weights.detectron2_settings import settings
from detres.weights.infer import infer
from detres.weights.keymap import COUNTER
from detres.weights.source import Family, Sections, merged
from detres.weights.torchvision_calls import Call, call_for

FORMATS = {"torchvision": torchvision.FAMILIES, "detectron2": detectron2.FAMILIES}
# What a toolkit has of what names and shapes of tensors do not show, or would show by many of them.
BATCH_NORMS = ("frozen_bn", "bn", "sync_bn")
BOTH = {"backbone.stem": ("imagenet",), "backbone.preact": (False,), "backbone.avg_down": (False,),
        "backbone.shortcut": ("B",), "box_head.global_context": (False,)}
HAS = {"torchvision": {**BOTH, "backbone.norm": BATCH_NORMS, "backbone.width": (64,), "backbone.deform_stages": (0,)},
       "Detectron2": {**BOTH, "backbone.layout": ("fpn", "c4", "c5", "dc5")}}
BOTTLENECKS = {"torchvision": {"backbone.stride_in_1x1": (False,)}}
BASIC_BLOCKS = {"Detectron2": {"backbone.width": (64,), "backbone.layout": ("fpn", "c4", "c5")}}
# Fields that change what is found, by the kinds of models that read them.
OF_INPUT = ("input.channel_order", "input.mean", "input.std", "input.min_size", "input.max_size", "input.antialias",
            "input.size_divisor", "backbone.norm_eps", "backbone.stride_in_1x1")
OF_ANCHORS = ("anchors.sizes", "anchors.aspect_ratios", "anchors.convention")
OF_RPN = ("rpn.pre_nms_topk_test", "rpn.post_nms_topk_test", "rpn.nms_thresh", "rpn.min_size")
OF_BOXES = ("pool.type", "pool.sampling_ratio", "pool.aligned", "pool.canonical_side", "box_head.score_thresh",
            "box_head.nms_thresh", "box_head.detections_per_image", "box_head.refine", "box_head.vote_thresh")
OF_CASCADE, OF_MASKS = ("cascade.average",), ("mask_head.resolution", "mask_head.paste")
OF_KEYPOINTS = ("keypoint_head.resolution", "keypoint_head.score")
OF_DENSE = ("dense_head.score_thresh", "dense_head.nms_thresh", "dense_head.topk", "dense_head.clip_before_nms",
            "dense_head.detections_per_image")
OF_PANOPTIC = ("panoptic.score_thresh", "panoptic.overlap_thresh", "panoptic.stuff_area")


@dataclass(frozen=True)
class Exported:
    content: dict[str, Any]  # for torch.save
    usage: str  # how to load it
    differences: tuple[str, ...]  # what the other toolkit does otherwise
    settings: Sections = field(default_factory=dict)  # of Detectron2, under which it does the rest as the model


def export(tensors: Mapping[str, Tensor], model: ModelConfig, num_classes: int,
           families: tuple[Family, ...]) -> Exported:
    """Tensors under the names of the family that has them all. Raises ValueError, which says why, where the toolkit has
    no such model."""
    toolkit = families[0].toolkit
    lacking = [f"{name}={_value(model.model_dump(), name)}" for name, allowed in _had(toolkit, model).items()
               if _value(model.model_dump(), name) not in allowed]
    if lacking:
        raise _refused(toolkit, model, f"{toolkit} has no {', no '.join(lacking)}")
    per_cell = len(model.anchors.sizes[0]) * len(model.anchors.aspect_ratios)
    if toolkit == "torchvision" and model.name == "retinanet" and per_cell != 9:
        raise _refused(toolkit, model, f"its RetinaNet has 9 anchors a cell, this one {per_cell}")
    named = [(family, *family.keymap.their_names(tensors)) for family in families]
    family, names, unknown = min(named, key=lambda each: (len(each[2]), not each[0].fits(each[1])))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise _refused(toolkit, model, f"the nearest, its {family.name}, has no {unknown[0]}{more}")
    if not family.fits(names):
        raise _refused(toolkit, model, f"the nearest is its {family.name}")
    found, _ = family.keymap.to_theirs(tensors)
    if toolkit == "Detectron2":
        return _to_detectron2(found, tensors, model, num_classes)
    call = call_for(model, num_classes)
    if call is None:
        raise _refused(toolkit, model, "no function or class of its builds that")
    _check_builds(call, found, model)
    sections = merged(infer(tensors)[0], {"name": model.name})
    theirs = ModelConfig.model_validate(merged(sections, family.conventions(sections)))
    usage = f"Load it by load_state_dict(torch.load(FILE)) into\n  {call}"
    return Exported(found, usage, tuple(_differences(theirs, model)))


def _to_detectron2(found: dict[str, Tensor], tensors: Mapping[str, Tensor], model: ModelConfig,
                   num_classes: int) -> Exported:
    num_semantic = len(tensors.get("semantic_head.predict.weight", ()))
    needed = settings(model, num_classes, num_semantic)
    theirs = ModelConfig.model_validate({**translate(needed)[0]["model"], "weights": None})
    usage = (f"Load the weights, of {num_classes} classes, as MODEL.WEIGHTS under the settings of the .yaml file: "
             "cfg.merge_from_file(...)")
    differences = list(_differences(theirs, model))
    if model.has_masks and model.mask_head.type == "point_rend":
        differences.append("its PointRend, a project of its own, has settings of its own, which are not with it")
    return Exported({"model": found, "__author__": "detres"}, usage, tuple(differences), needed)


def _had(toolkit: str, model: ModelConfig) -> dict[str, tuple]:
    """What fields may be, in dotted names, of those that decide."""
    fields = HAS[toolkit] | (BOTTLENECKS if model.backbone.depth >= 50 else BASIC_BLOCKS).get(toolkit, {})
    if model.name not in RCNNS and not model.is_panoptic:
        del fields["box_head.global_context"]
    if toolkit == "Detectron2" and model.name == "retinanet":
        fields["fpn.top"] = ("c5",)
    if model.name == "classifier":
        fields.pop("backbone.layout", None)
    return fields


def _refused(toolkit: str, model: ModelConfig, why: str) -> ValueError:
    return ValueError(f"model must be one that {toolkit} has, got {model.name}, ResNet-{model.backbone.depth}, layout "
                      f"{model.backbone.layout}: {why}. Export as safetensors.")


def _check_builds(call: Call, found: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Raises ValueError if what the call builds has other tensors."""
    with torch.device("meta"):
        built = {name: tuple(tensor.shape) for name, tensor in call.make().state_dict().items()
                 if not name.endswith(COUNTER)}
    given = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = [f"{name} {built.get(name, 'nowhere')} there, {given.get(name, 'nowhere')} here"
             for name in {**given, **built} if given.get(name) != built.get(name)]
    if wrong:
        raise _refused("torchvision", model, f"{call} differs in {len(wrong)} tensors, such as {'; '.join(wrong[:3])}")


def _differences(theirs: ModelConfig, ours: ModelConfig) -> Iterator[str]:
    """In dotted names, what the model reads and would be otherwise."""
    there, here = theirs.model_dump(), ours.model_dump()
    for name in _read(ours):
        a, b = _value(there, name), _value(here, name)
        if not _same(a, b):
            yield f"{name}: {_shown(a)} there, {_shown(b)} in this model"


def _read(model: ModelConfig) -> Iterator[str]:
    rcnn = model.name in RCNNS or model.is_panoptic
    yield from (name for name in OF_INPUT if model.backbone.depth >= 50 or not name.endswith("1x1"))
    kinds = ((model.name == "classifier", ("input.crop",)), (rcnn or model.name in ("rpn", "retinanet"), OF_ANCHORS),
             (model.name == "fcos", ("anchors.convention",)), (rcnn or model.name == "rpn", OF_RPN), (rcnn, OF_BOXES),
             (model.name.startswith("cascade"), OF_CASCADE), (model.has_masks, OF_MASKS),
             (model.has_keypoints, OF_KEYPOINTS), (model.name in ("retinanet", "fcos"), OF_DENSE),
             (model.name == "deeplabv3", ("semantic_head.rates",)), (model.is_panoptic, OF_PANOPTIC))
    for holds, names in kinds:
        yield from names if holds else ()


def _value(dump: Mapping[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return dump[section][key]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return None not in (a, b) and math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-9)
    return a == b


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
