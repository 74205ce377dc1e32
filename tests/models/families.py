"""Every family of detectors and segmenters in small, for the tests that hold for all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from detres.build import build_model
from detres.config import ModelConfig
from detres.structures import ImageBatch, SemanticTargets, Targets

from .conftest import make_batch, semantic_labels, small_config

CLASSES = 2  # of `make_batch`; of semantic segmentation 3, with the background
LAYOUTS = {
    "faster_rcnn": ("fpn", "c4", "c5", "dc5", "dc4"), "mask_rcnn": ("fpn", "c4", "c5", "dc5", "dc4"),
    "keypoint_rcnn": ("fpn", "c4", "c5", "dc5", "dc4"), "cascade_rcnn": ("fpn", "c5", "dc5", "dc4"),
    "cascade_mask_rcnn": ("fpn", "c5", "dc5", "dc4"), "point_rend": ("fpn",), "retinanet": ("fpn", "c4", "c5", "dc5", "dc4"),
    "fcos": ("fpn", "c4", "c5", "dc5", "dc4"), "rpn": ("fpn", "c4", "c5", "dc5", "dc4"), "fcn": ("dc4", "c5", "dc5"),
    "deeplabv3": ("dc4", "c5", "dc5"), "deeplabv3_plus": ("dc5", "c5", "dc4"), "semantic_fpn": ("fpn",),
    "panoptic_fpn": ("fpn",),
}
POINTS = {"coarse_fc_dim": 32, "fc_dim": 32, "train_points": 16, "steps": 2, "step_points": 64}
BACKBONES = {  # every kind of ResNet
    "basic": {"depth": 18},
    "plain": {"depth": 18, "shortcut": "none"},
    "zero padded": {"depth": 18, "shortcut": "A"},
    "bottleneck": {"depth": 50},
    "caffe": {"depth": 50, "stride_in_1x1": True, "shortcut": "C"},
    "resnext": {"depth": 50, "groups": 4, "group_width": 16},
    "wide": {"depth": 50, "group_width": 128},
    "resnet-d": {"depth": 50, "stem": "deep", "avg_down": True},
    "preact": {"depth": 50, "preact": True},
    "preact basic": {"depth": 18, "preact": True, "shortcut": "A"},
    "deformable": {"depth": 50, "deform_stages": 3},
    "all at once": {"depth": 50, "groups": 4, "group_width": 16, "stem": "deep", "avg_down": True, "preact": True,
                    "deform_stages": 4, "stride_in_1x1": True},
}


def family_config(name: str, layout: str | None = None, **sections) -> ModelConfig:
    """layout: by default the family's first. Sections override fields."""
    layout = layout or LAYOUTS[name][0]
    own = {"backbone": {"width": 8, "norm": "gn"}, "fpn": {"channels": 16}, "semantic_head": {"channels": 16, "norm": "gn"}}
    if name == "keypoint_rcnn":
        own["keypoint_head"] = {"num_keypoints": 4, "channels": 16, "convs": 1}
    if name in ("retinanet", "fcos"):
        own["dense_head"] = {"convs": 1, "norm": "gn", "box_loss": "giou"}
        own["fpn"]["top"] = {"retinanet": "c5", "fcos": "p5"}[name]
    if name == "point_rend":
        own["mask_head"] = {"type": "point_rend", "points": POINTS}
    for section, values in sections.items():
        own[section] = {**own.get(section, {}), **values}
    return small_config("mask_rcnn" if name == "point_rend" else name, layout, **own)


def family(name: str, layout: str | None = None, **sections) -> nn.Module:
    config = family_config(name, layout, **sections)
    return build_model(config, CLASSES + config.is_semantic, 3 if config.is_panoptic else 0)


def family_batch(name: str, n: int = 2, **options) -> tuple[ImageBatch, Targets | SemanticTargets]:
    """What the family trains on: the images of `make_batch`, with `options`."""
    images, targets = make_batch(n, **options)
    return images, targets_of(name, targets, images)


def targets_of(name: str, targets: Targets, images: ImageBatch) -> Targets | SemanticTargets:
    """The objects of `make_batch` as the family has them: corners as keypoints, two halves of the noise as stuff."""
    n, k = targets.valid.shape
    bitmaps = torch.zeros(n, k, *images.pixels.shape[-2:], dtype=torch.uint8)
    bitmaps[targets.valid] = targets.masks
    labels = semantic_labels(replace(targets, masks=bitmaps.flatten(0, 1)))
    if name in ("fcn", "deeplabv3", "deeplabv3_plus", "semantic_fpn"):
        return SemanticTargets(labels)
    if name == "panoptic_fpn":
        stuff = torch.ones_like(labels)
        stuff[..., labels.shape[-1] // 2:] = 2
        return replace(targets, semantic=torch.where(labels == 255, labels, torch.where(labels > 0, 0, stuff)))
    if name == "keypoint_rcnn":
        x1, y1, x2, y2 = (targets.boxes + torch.tensor([0.5, 0.5, -0.5, -0.5])).unbind(-1)
        corners = [torch.stack([x, y, torch.full_like(x, 2.0)], -1) for x in (x1, x2) for y in (y1, y2)]
        return replace(targets, keypoints=torch.stack(corners, 2) * targets.valid[..., None, None], masks=None)
    return targets if name in ("mask_rcnn", "cascade_mask_rcnn", "point_rend") else replace(targets, masks=None)
