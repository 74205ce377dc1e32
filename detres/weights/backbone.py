"""Weights of backbones: torchvision's, by the network; files and published names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detres.config import BackboneConfig, ModelConfig
from detres.weights.detectron2 import BACKBONES
from detres.weights.importers import FAMILIES
from detres.weights.infer import BODY, CONV5, CONV5_LAYER, infer
from detres.weights.mismatch import check_fit
from detres.weights.pickles import read_tensors
from detres.weights.source import Family, merged
from detres.weights.zoo import fetch

# Files that torchvision publishes (models/resnet.py, IMAGENET1K_V1: the recipe nearest the paper's), by depth, groups
# and group width.
IMAGENET_FILES = {
    (18, 1, 64): "resnet18-f37072fd.pth",
    (34, 1, 64): "resnet34-b627a593.pth",
    (50, 1, 64): "resnet50-0676ba61.pth",
    (101, 1, 64): "resnet101-63fe2227.pth",
    (152, 1, 64): "resnet152-394f9c45.pth",
    (50, 32, 4): "resnext50_32x4d-7cdf4587.pth",
    (101, 32, 8): "resnext101_32x8d-8ba56ff5.pth",
    (101, 64, 4): "resnext101_64x4d-173b62eb.pth",
    (50, 1, 128): "wide_resnet50_2-95faca4d.pth",
    (101, 1, 128): "wide_resnet101_2-32ee1156.pth",
}
# What else its networks have in common.
IMAGENET_OPTIONS = {"width": 64, "stem": "imagenet", "shortcut": "B", "preact": False, "avg_down": False}
OFFSET = re.compile(r".*\.offset\.(weight|bias)$")


def load_backbone(model: nn.Module, config: ModelConfig) -> None:
    """Put the weights that `config.backbone.weights` names into the model's ResNet; nothing if that is null.

    'imagenet': torchvision's file for the network, from the torch hub cache or downloaded into it, checksum verified.
    Otherwise a file or a published name (`zoo`) of a ResNet or of any model with one: torchvision's, timm's,
    Detectron2's, Caffe's (MSRA), or of detres. Offsets of deformable convolutions that are not in it stay zero. Raises
    FileNotFoundError, or WeightsMismatch with the tensors that do not fit.
    """
    source = config.backbone.weights
    if source is None:
        return
    if source == "imagenet":
        url = "https://download.pytorch.org/models/" + imagenet_file(config.backbone)
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    else:
        state = read_backbone(source, config.backbone)
    load_resnet(model, state, source)


def imagenet_file(config: BackboneConfig) -> str:
    """The file that torchvision publishes for the network. Raises ValueError where it publishes none."""
    network = (config.depth, config.groups, config.group_width)
    wrong = [f"{name}={getattr(config, name)}" for name, value in IMAGENET_OPTIONS.items()
             if getattr(config, name) != value]
    if config.stride_in_1x1 and config.depth >= 50:  # the shapes would fit, the features would not
        wrong.append("stride_in_1x1=True")
    if config.norm == "gn":
        wrong.append("norm=gn")
    if network not in IMAGENET_FILES:
        wrong.append("depth={}, groups={}, group_width={}".format(*network))
    if wrong:
        raise ValueError("model.backbone.weights 'imagenet' must be for a network that torchvision publishes (ResNet, "
                         "ResNeXt-50 32x4d, -101 32x8d, -101 64x4d, Wide ResNet-50-2, -101-2; width 64, batch norm, "
                         f"stride in the 3x3), got {', '.join(wrong)}. Give the path of a file, or set weights=null to "
                         "train from scratch.")
    return IMAGENET_FILES[network]


def read_backbone(source: str, config: BackboneConfig) -> dict[str, Tensor]:
    """The ResNet, and the fc layer if it has one, of a file or a published name, under torchvision's names."""
    file = _locate(source)
    state, about = read_tensors(file)
    family = next((family for family in (*FAMILIES, *BACKBONES) if family.fits(state)), None)
    if family is not None:
        state, _ = family.keymap.to_ours(state)
        _warn_of_stride(family, state, about, config)
        if family.toolkit == "Caffe" and config.norm != "gn":
            state = _with_statistics(state, config.norm_eps)
    if not any(name.startswith(BODY) for name in state):  # a ResNet alone
        return dict(state)
    body = {name.removeprefix(BODY): tensor for name, tensor in state.items() if name.startswith((BODY, "fc."))}
    conv5 = {f"layer4.{name.removeprefix(CONV5)}": tensor for name, tensor in state.items() if CONV5_LAYER.match(name)}
    return {**body, **conv5}


def _warn_of_stride(family: Family, state: Mapping[str, Tensor], about: Mapping[str, Any],
                    config: BackboneConfig) -> None:
    """Which convolution of a bottleneck strides is not in the tensors: features are others, and no shape shows it."""
    try:
        sections, _ = infer(state)
    except (ValueError, LookupError):  # no ResNet that is here, or not all of it: `load_resnet` says what does not fit
        return
    told, _ = family.told(about) if family.told else ({}, None)
    there = merged(ModelConfig().model_dump(), family.conventions(sections), told)
    stride = there["backbone"]["stride_in_1x1"]
    if config.depth < 50 or stride == config.stride_in_1x1 or not family.shows_stride:
        return
    own = there["input"]
    logging.getLogger(__name__).warning(
        "Backbone weights of %s (%s) %s the stride in the %s: say model.backbone.stride_in_1x1=%s, and give "
        "model.input channel_order=%s, mean=%s and std=%s of theirs.", family.toolkit, family.name,
        "have, as far as is known," if family.assumed else "have", "first 1x1" if stride else "3x3",
        str(stride).lower(),
        own["channel_order"], list(own["mean"]), list(own["std"]))


def _with_statistics(state: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Norms that are scales and shifts alone are batch norms whose deviation, with epsilon, is 1."""
    found = dict(state)
    for name, weight in state.items():
        if weight.dim() == 1 and name.endswith(".weight"):
            prefix = name.removesuffix("weight")
            found.setdefault(f"{prefix}running_mean", torch.zeros_like(weight))
            found.setdefault(f"{prefix}running_var", torch.full_like(weight, 1 - eps))
    return found


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    try:
        return fetch(source)
    except ValueError:
        run = f", or train the run {path.parents[1]} first" if path.parent.name == "checkpoints" else ""
        raise FileNotFoundError(f"weights file must exist, got '{path}' (model.backbone.weights). "
                                f"Give a path, a published name, 'imagenet', or null{run}.") from None


def load_resnet(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a ResNet under torchvision's names into `model.backbone.body`, its conv5 into the box head of a C4 detector,
    its fc into that of a classifier of as many classes. Raises WeightsMismatch."""
    body = model.backbone.body
    parts: dict[str, nn.Module] = {"": body}
    if hasattr(model, "roi_heads") and not hasattr(body, "layer4"):
        parts["layer4."] = model.roi_heads.box_head
    own_fc = getattr(model, "fc", None)
    if own_fc is not None and getattr(state.get("fc.weight"), "shape", None) == own_fc.weight.shape:
        own_fc.load_state_dict({key: state[f"fc.{key}"] for key in ("weight", "bias")})
    unread = r"|layer4\." if "layer4." not in parts and not hasattr(body, "layer4") else ""  # of an RPN in C4
    ignored = re.compile(r"fc\.|.*num_batches_tracked$" + unread)
    wanted = {prefix + key: tuple(tensor.shape) for prefix, module in parts.items()
              for key, tensor in module.state_dict().items() if not ignored.match(key)}
    given = {key: tuple(tensor.shape) for key, tensor in state.items() if not ignored.match(key)}
    offsets = {key: shape for key, shape in wanted.items() if OFFSET.match(key) and key not in given}
    check_fit({**offsets, **given}, wanted,
              f"backbone weights must fit the configured ResNet (model.backbone.weights='{source}')",
              "Check model.backbone.depth, width, norm and the other options of the network.")
    for prefix, module in parts.items():
        own = {name: state[prefix + name] for name in module.state_dict() if prefix + name in state}
        module.load_state_dict(own, strict=False)
