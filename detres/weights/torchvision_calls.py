"""The calls of torchvision that build a model of ours there, to be shown to people and to be made."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torchvision
from torch import nn

from detres.config import ModelConfig
from detres.weights.backbone import IMAGENET_FILES

RCNNS = {"faster_rcnn": ("fasterrcnn", "FasterRCNN"), "mask_rcnn": ("maskrcnn", "MaskRCNN"),
         "keypoint_rcnn": ("keypointrcnn", "KeypointRCNN")}
DENSE = {"retinanet": ("retinanet", "RetinaNet"), "fcos": ("fcos", "FCOS")}
NO_WEIGHTS = {"weights": None, "weights_backbone": None}


@dataclass(frozen=True)
class Call:
    """function: its name below torchvision; arguments may be calls themselves."""

    function: str
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"torchvision.{self.function}({arguments})"

    def make(self) -> nn.Module:
        arguments = {name: value.make() if isinstance(value, Call) else value
                     for name, value in self.arguments.items()}
        return attrgetter(self.function)(torchvision)(**arguments)


def call_for(model: ModelConfig, num_classes: int) -> Call | None:
    """What builds the model with its own number of classes; None where nothing of torchvision's does. It may be of
    other sizes than the model."""
    network = IMAGENET_FILES.get((model.backbone.depth, model.backbone.groups, model.backbone.group_width))
    if network is None:
        return None
    network = network.partition("-")[0]
    if model.name == "classifier":
        return Call(f"models.{network}", {"num_classes": num_classes})
    if model.name in ("fcn", "deeplabv3"):
        if network not in ("resnet50", "resnet101") or model.backbone.layout != "dc4":
            return None
        return Call(f"models.segmentation.{model.name}_{network}",
                    {**NO_WEIGHTS, "num_classes": num_classes, "aux_loss": model.semantic_head.aux_weight > 0})
    if model.backbone.layout != "fpn":
        return None
    arguments = {"num_classes": num_classes + 1}
    if model.name == "keypoint_rcnn":
        arguments["num_keypoints"] = model.keypoint_head.num_keypoints
    if model.name in RCNNS:
        return _detector(*RCNNS[model.name], network, model.rpn.convs == 2, arguments, {})
    if model.name in DENSE and model.fpn.top != "pool":
        second = model.name == "retinanet" and model.fpn.top == "c5"
        channels = (512 if model.backbone.depth < 50 else 2048) if model.fpn.top == "c5" else 256
        extra = Call("ops.feature_pyramid_network.LastLevelP6P7", {"in_channels": channels, "out_channels": 256})
        return _detector(*DENSE[model.name], network, second, arguments, {"returned_layers": [2, 3, 4],
                                                                          "extra_blocks": extra})
    return None


def _detector(function: str, kind: str, network: str, second: bool, arguments: dict[str, Any],
              pyramid: dict[str, Any]) -> Call:
    """second: version 2, whose heads only the function builds."""
    if network == "resnet50":
        return Call(f"models.detection.{function}_resnet50_fpn{'_v2' if second else ''}", {**NO_WEIGHTS, **arguments})
    backbone = Call("models.detection.backbone_utils.resnet_fpn_backbone",
                    {"backbone_name": network, "weights": None, **pyramid})
    return Call(f"models.detection.{kind}", {"backbone": backbone, **arguments})
