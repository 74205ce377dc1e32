"""Models of torchvision (.models, .models.detection, .segmentation): names of weights, and what they do otherwise."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torchvision import models
from torchvision.models import WeightsEnum

from detres.config import ModelConfig
from detres.weights.keymap import BACKGROUND_LAST, Change, KeyMap, without_background
from detres.weights.source import Family, Sections, merged
from detres.weights.zoo import checksum

# In detectors the body has our names. Names with ".0" less are of older versions.
FPN = [
    ("backbone.body.", "backbone.body."),
    ("backbone.fpn.inner_blocks.{i}.0.", "backbone.fpn.lateral.{i}."),
    ("backbone.fpn.inner_blocks.{i}.1.", "backbone.fpn.lateral_norm.{i}."),
    ("backbone.fpn.inner_blocks.{i}.", "backbone.fpn.lateral.{i}."),
    ("backbone.fpn.layer_blocks.{i}.0.", "backbone.fpn.output.{i}."),
    ("backbone.fpn.layer_blocks.{i}.1.", "backbone.fpn.output_norm.{i}."),
    ("backbone.fpn.layer_blocks.{i}.", "backbone.fpn.output.{i}."),
]
RCNN = [
    *FPN,
    ("rpn.head.conv.{i}.0.", "rpn.head.convs.{i}."),
    ("rpn.head.conv.", "rpn.head.convs.0."),
    ("rpn.head.cls_logits.", "rpn.head.cls."),
    ("rpn.head.bbox_pred.", "rpn.head.box."),
    ("roi_heads.box_predictor.cls_score.", "roi_heads.box_predictor.cls.", BACKGROUND_LAST),
    ("roi_heads.box_predictor.bbox_pred.", "roi_heads.box_predictor.box.", without_background(rows=4)),
    ("roi_heads.mask_head.{i}.0.", "roi_heads.mask_head.convs.{i}."),
    ("roi_heads.mask_head.{i}.1.", "roi_heads.mask_head.norms.{i}."),
    ("roi_heads.mask_head.mask_fcn{i+1}.", "roi_heads.mask_head.convs.{i}."),
    ("roi_heads.mask_predictor.conv5_mask.", "roi_heads.mask_head.deconv."),
    ("roi_heads.mask_predictor.mask_fcn_logits.", "roi_heads.mask_head.predict.", without_background()),
    ("roi_heads.keypoint_head.{2i}.", "roi_heads.keypoint_head.convs.{i}."),
    ("roi_heads.keypoint_predictor.kps_score_lowres.", "roi_heads.keypoint_head.deconv."),
]
TWO_FCS = [
    ("roi_heads.box_head.fc6.", "roi_heads.box_head.fcs.0."),
    ("roi_heads.box_head.fc7.", "roi_heads.box_head.fcs.1."),
]
CONVS_AND_FC = [
    ("roi_heads.box_head.{i}.0.", "roi_heads.box_head.convs.{i}."),
    ("roi_heads.box_head.{i}.1.", "roi_heads.box_head.norms.{i}."),
    ("roi_heads.box_head.5.", "roi_heads.box_head.fcs.0."),
]
# "conv." of towers.
CONV_AND_NORM = [("conv.{i}.0.", "tower.{i}."), ("conv.{i}.1.", "norm.{i}."), ("conv.{2i}.", "tower.{i}.")]
CONV_NORM_RELU = [("conv.{3i}.", "tower.{i}."), ("conv.{3i+1}.", "norm.{i}.")]


def _without_class_0(anchors: int) -> Change:
    """Of classes within anchors, (A * (K + 1), ...): objects are counted from 1 there, and no object has channel 0. It
    is exported with the weights zero and a probability that is nearly so."""
    def to_theirs(x: Tensor) -> Tensor:
        x = x.unflatten(0, (anchors, -1))
        return torch.cat([torch.full_like(x[:, :1], -30.0 if x.dim() == 2 else 0.0), x], 1).flatten(0, 1)

    return Change(lambda x: x.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1), to_theirs)


def _dense(anchors: int, towers: list[tuple[str, str]]) -> KeyMap:
    """anchors: of a cell, as torchvision's builders have them."""
    heads = [("head.classification_head.", "head.cls_"), ("head.regression_head.", "head.box_")]
    return KeyMap([
        *FPN,
        ("backbone.fpn.extra_blocks.p{i}.", "backbone.fpn.p{i}."),
        *((head + theirs, own + ours) for head, own in heads for theirs, ours in towers),
        ("head.classification_head.cls_logits.", "head.cls.", _without_class_0(anchors)),
        ("head.regression_head.bbox_reg.", "head.box."),
        ("head.regression_head.bbox_ctrness.", "head.centerness."),
    ])


SEGMENTATION = [
    ("backbone.", "backbone.body."),
    ("aux_classifier.0.", "aux_head.conv.conv."),
    ("aux_classifier.1.", "aux_head.conv.norm."),
    ("aux_classifier.4.", "aux_head.predict."),
    ("classifier.4.", "head.predict."),
]
FCN = [
    ("classifier.0.", "head.conv.conv."),
    ("classifier.1.", "head.conv.norm."),
]
DEEPLABV3 = [
    ("classifier.0.convs.4.1.", "head.aspp.pool.conv."),
    ("classifier.0.convs.4.2.", "head.aspp.pool.norm."),
    ("classifier.0.convs.{i}.0.", "head.aspp.branches.{i}.conv."),
    ("classifier.0.convs.{i}.1.", "head.aspp.branches.{i}.norm."),
    ("classifier.0.project.0.", "head.aspp.project.conv."),
    ("classifier.0.project.1.", "head.aspp.project.norm."),
    ("classifier.1.", "head.conv.conv."),
    ("classifier.2.", "head.conv.norm."),
]
CLASSIFIER = [
    ("fc.", "fc."),
    *((f"{part}.", f"backbone.body.{part}.") for part in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
]


def rcnn_conventions(sections: Sections | None = None) -> Sections:
    return {
        "input": {"antialias": False},
        "backbone": {"freeze_stages": 2},
        "anchors": {"convention": "torchvision"},
        "rpn": {"min_size": 1e-3, "post_nms_topk_train": 2000, "box_loss": "smooth_l1"},
        "pool": {"sampling_ratio": 2, "aligned": False},
        "box_head": {"box_loss": "smooth_l1", "smooth_l1_beta": 1 / 9, "min_size": 1e-2},
        "mask_head": {"paste": "torchvision"},
        "keypoint_head": {"score": "logit"},
    }


def torchvision_config(name: str = "mask_rcnn", **changes) -> ModelConfig:
    """The config under which detres computes what torchvision's {faster,mask,keypoint}rcnn_resnet50_fpn computes.

    `changes` override sections: torchvision_config(backbone={"norm_eps": 0.0}) for its published COCO weights.
    """
    return ModelConfig.model_validate(
        merged({"name": name, "backbone": {"weights": None}}, rcnn_conventions(), changes))


DENSE = {"input": {"antialias": False}, "backbone": {"freeze_stages": 2}, "anchors": {"convention": "torchvision"}}


def retinanet_conventions(sections: Sections) -> Sections:
    """Boxes of version 2, whose P6 is made from C5, train by GIoU."""
    return {
        **DENSE,
        "anchors": {"convention": "torchvision", "sizes": [[side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))]
                                                           for side in (32, 64, 128, 256, 512)]},
        "dense_head": {"box_loss": "giou" if sections["fpn"]["top"] == "c5" else "l1", "normalize": "image",
                       "clip_before_nms": True, "detections_per_image": 300},
    }


def fcos_conventions(sections: Sections) -> Sections:
    head = {"box_loss": "giou", "clip_before_nms": True, "score_thresh": 0.2, "nms_thresh": 0.6}
    return {**DENSE, "dense_head": head}


def classifier_conventions(sections: Sections) -> Sections:
    return {"input": {"min_size": 256, "crop": 224}, "backbone": {"freeze_stages": 0}}


def segmentation_conventions(sections: Sections | None = None) -> Sections:
    """Images are resized to a short side of 520 pixels, however long the other, and not padded."""
    return {"input": {"min_size": 520, "max_size": 100_000, "size_divisor": 1, "round_down": True},
            "backbone": {"freeze_stages": 0}}


EPS = ("batch norms have epsilon 1e-5; of a model that was trained on from torchvision's COCO_V1 weights it is 0: give "
       "model.backbone.norm_eps=0",)
# Weights whose models torchvision builds with batch norms without epsilon.
WITHOUT_EPS = {"FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
               "KeypointRCNN_ResNet50_FPN_Weights.COCO_V1", "RetinaNet_ResNet50_FPN_Weights.COCO_V1"}


def published(file: Path) -> Sections | None:
    """What torchvision does otherwise with a file that it publishes than with any other of the model; None for a file
    that it does not. By the checksum, which torchvision writes into names: a file may have been renamed."""
    weights = _by_checksum().get(checksum(file, "sha256")[:8])
    if weights is None:
        return None
    if str(weights) in WITHOUT_EPS:
        return {"backbone": {"norm_eps": 0.0}}
    options = getattr(weights.transforms, "keywords", {})
    if "crop_size" in options:
        return {"input": {"min_size": options.get("resize_size", 256), "crop": options["crop_size"]}}
    return {}


@lru_cache
def _by_checksum() -> dict[str, WeightsEnum]:
    names = [name for module in (models, models.detection, models.segmentation) for name in models.list_models(module)]
    return {match[1]: weights for name in names for weights in models.get_model_weights(name)
            if (match := re.search(r"-([0-9a-f]{8})\.pth$", weights.url))}


FAMILIES = (
    Family("torchvision", "R-CNN, version 2", ("rpn.head.conv.1.0.weight", "roi_heads.box_head.5.weight"),
           KeyMap([*RCNN, *CONVS_AND_FC]), rcnn_conventions),
    Family("torchvision", "R-CNN", ("rpn.head.cls_logits.weight", "roi_heads.box_head.fc6.weight"),
           KeyMap([*RCNN, *TWO_FCS]), rcnn_conventions, EPS),
    Family("torchvision", "FCOS", ("head.regression_head.bbox_ctrness.weight",), _dense(1, CONV_NORM_RELU),
           fcos_conventions),
    Family("torchvision", "RetinaNet", ("head.regression_head.bbox_reg.weight",), _dense(9, CONV_AND_NORM),
           retinanet_conventions, assumed=("boxes of version 2 trained by GIoU", *EPS)),
    Family("torchvision", "DeepLabV3", ("classifier.0.project.0.weight",), KeyMap([*DEEPLABV3, *SEGMENTATION]),
           segmentation_conventions),
    Family("torchvision", "FCN", ("classifier.0.weight", "classifier.4.weight", "backbone.layer4.0.conv1.weight"),
           KeyMap([*FCN, *SEGMENTATION]), segmentation_conventions),
    Family("torchvision", "classifier", ("conv1.weight", "bn1.running_mean", "layer4.0.conv1.weight", "fc.weight"),
           KeyMap(CLASSIFIER), classifier_conventions),
)
