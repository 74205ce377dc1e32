"""Weights of backbones: torchvision's by name, and files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from detres.config import BackboneConfig, ModelConfig

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
OURS = "backbone.body."  # what a ResNet's keys begin with in the weights of a model of detres


def load_backbone(model: nn.Module, config: ModelConfig) -> None:
    """Put the weights that `config.backbone.weights` names into the model's ResNet; nothing if that is null.

    'imagenet': torchvision's file for the network, from the torch hub cache or downloaded into it, checksum verified.
    Otherwise a path to a state dict of a ResNet under torchvision's key names (.pth, or .safetensors), or to the
    weights of a classifier that detres trained. Offsets of deformable convolutions that are not in it stay zero.
    Raises FileNotFoundError, or ValueError with the keys that do not fit.
    """
    source = config.backbone.weights
    if source is None:
        return
    if source == "imagenet":
        url = "https://download.pytorch.org/models/" + imagenet_file(config.backbone)
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    else:
        state = read_state_dict(Path(source))
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


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A plain state dict from .safetensors, or from a torch file without executing pickled code."""
    if not path.is_file():
        run = f", or train the run {path.parents[1]} first" if path.parent.name == "checkpoints" else ""
        raise FileNotFoundError(f"weights file must exist, got '{path}' (model.backbone.weights). "
                                f"Give a path, 'imagenet', or null{run}.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state.get("model", state))


def load_resnet(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a classifier's state dict into `model.backbone.body`, its conv5 into the box head of a C4 detector, its fc
    into that of a classifier of as many classes."""
    if any(key.startswith(OURS) for key in state):  # of a model of ours, whose other parts do not matter
        state = {key.removeprefix(OURS): value for key, value in state.items() if key.startswith((OURS, "fc."))}
    body = model.backbone.body
    parts: dict[str, nn.Module] = {"": body}
    if hasattr(model, "roi_heads") and not hasattr(body, "layer4"):
        parts["layer4."] = model.roi_heads.box_head
    own_fc = getattr(model, "fc", None)
    if own_fc is not None and getattr(state.get("fc.weight"), "shape", None) == own_fc.weight.shape:
        own_fc.load_state_dict({key: state[f"fc.{key}"] for key in ("weight", "bias")})
    wanted = {prefix + key: (module, key) for prefix, module in parts.items() for key in module.state_dict()}
    ignored = re.compile(r"fc\.|.*num_batches_tracked$")
    optional = re.compile(ignored.pattern + r"|.*\.offset\.(weight|bias)$")
    missing = [key for key in wanted if key not in state and not optional.match(key)]
    unexpected = [key for key in state if key not in wanted and not ignored.match(key)]
    shapes = {key: module.state_dict()[name].shape for key, (module, name) in wanted.items()}
    wrong = [f"{key} {tuple(state[key].shape)}, not {tuple(shape)}" for key, shape in shapes.items()
             if key in state and state[key].shape != shape]
    if missing or unexpected or wrong:
        raise ValueError(f"backbone weights must fit the configured ResNet (model.backbone.weights='{source}'): "
                         f"{_few('missing', missing)}{_few('unexpected', unexpected)}{_few('wrong shape', wrong)}"
                         "Check model.backbone.depth, width, norm and the other options of the network.")
    for prefix, module in parts.items():
        own = {name: state[prefix + name] for name in module.state_dict() if prefix + name in state}
        module.load_state_dict(own, strict=False)


def _few(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what}: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}. " if keys else ""
