"""The settings under which Detectron2 builds and runs a model of ours: `detectron2_config`, the other way."""

from __future__ import annotations

from typing import Any

from detres.config import ModelConfig
from detres.weights.detectron2_config import NORMS, PYRAMID
from detres.weights.detectron2_defaults import DEFAULTS
from detres.weights.source import Sections

NAMES = {name: theirs for theirs, name in NORMS.items()} | {"none": ""}
KINDS = {"retinanet": "RetinaNet", "rpn": "ProposalNetwork", "panoptic_fpn": "PanopticFPN",
         "semantic_fpn": "SemanticSegmentor"}


def settings(model: ModelConfig, num_classes: int, num_semantic: int) -> dict[str, Any]:
    """By section and name, those that are not Detectron2's defaults. What it cannot do is not in them."""
    fpn, rcnn = model.backbone.layout == "fpn", model.name not in ("retinanet", "rpn", "semantic_fpn")
    found = {**_of_all(model), **_resnet(model)}
    if fpn:
        found |= _section("MODEL.FPN", IN_FEATURES=_stages(model), OUT_CHANNELS=model.fpn.channels,
                          NORM=NAMES[model.fpn.norm])
    if model.name != "semantic_fpn":
        found |= _section("MODEL.ANCHOR_GENERATOR", SIZES=model.anchors.sizes,
                          ASPECT_RATIOS=[model.anchors.aspect_ratios])
    if model.name in ("semantic_fpn", "panoptic_fpn"):
        found |= _section("MODEL.SEM_SEG_HEAD", NUM_CLASSES=num_semantic or num_classes,
                          CONVS_DIM=model.semantic_head.channels or 128, NORM=NAMES[model.semantic_head.norm or "gn"])
    if model.name == "retinanet":
        found |= _retinanet(model, num_classes)
    elif model.name != "semantic_fpn":
        found |= _rpn(model)
    if rcnn:
        found |= _box_head(model, num_classes)
    if model.has_masks:
        found |= _mask_head(model)
    if model.has_keypoints:
        found |= _keypoint_head(model)
    if model.is_panoptic:
        found |= _section("MODEL.PANOPTIC_FPN.COMBINE", INSTANCES_CONFIDENCE_THRESH=model.panoptic.score_thresh,
                          OVERLAP_THRESH=model.panoptic.overlap_thresh, STUFF_AREA_LIMIT=model.panoptic.stuff_area)
    plain = {key: _plain(value) for key, value in found.items()}
    return _nested({key: value for key, value in plain.items() if value != DEFAULTS[key]})


def _section(section: str, **values: Any) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.items()}


def _stages(model: ModelConfig) -> list[str]:
    layout = model.backbone.layout
    if layout == "fpn":
        return PYRAMID[_pyramid(model)]
    return ["res4"] if layout == "c4" else ["res5"]


def _pyramid(model: ModelConfig) -> str:
    return "build_resnet_fpn_backbone" if model.fpn.top == "pool" else "build_retinanet_resnet_fpn_backbone"


def _levels(model: ModelConfig, last: int) -> list[str]:
    """Maps that heads read, of a pyramid up to p{last}."""
    return [f"p{level}" for level in range(2, last + 1)] if model.backbone.layout == "fpn" else _stages(model)


def _of_all(model: ModelConfig) -> dict[str, Any]:
    own = model.input
    fpn = model.backbone.layout == "fpn"
    return {**_section("INPUT", FORMAT=own.channel_order.upper(), MIN_SIZE_TEST=own.min_size,
                       MAX_SIZE_TEST=own.max_size,
                       MIN_SIZE_TRAIN=[own.min_size], MAX_SIZE_TRAIN=own.max_size),
            **_section("MODEL", META_ARCHITECTURE=KINDS.get(model.name, "GeneralizedRCNN"), MASK_ON=model.has_masks,
                       KEYPOINT_ON=model.has_keypoints, PIXEL_MEAN=own.mean, PIXEL_STD=own.std),
            "MODEL.BACKBONE.NAME": _pyramid(model) if fpn else "build_resnet_backbone"}


def _resnet(model: ModelConfig) -> dict[str, Any]:
    own = model.backbone
    deform = [stage >= 4 - own.deform_stages for stage in range(4)]
    return _section("MODEL.RESNETS", DEPTH=own.depth, NORM=NAMES[own.norm], NUM_GROUPS=own.groups,
                    WIDTH_PER_GROUP=own.group_width * own.width // 64, STEM_OUT_CHANNELS=own.width,
                    RES2_OUT_CHANNELS=own.width * (4 if own.depth >= 50 else 1), STRIDE_IN_1X1=own.stride_in_1x1,
                    RES5_DILATION=2 if own.layout == "dc5" else 1, OUT_FEATURES=_stages(model),
                    DEFORM_ON_PER_STAGE=deform, DEFORM_MODULATED=any(deform))


def _rpn(model: ModelConfig) -> dict[str, Any]:
    own = model.rpn
    return {"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": own.min_size,
            **_section("MODEL.RPN", IN_FEATURES=_levels(model, 6), CONV_DIMS=[-1] * own.convs,
                       NMS_THRESH=own.nms_thresh, PRE_NMS_TOPK_TEST=own.pre_nms_topk_test,
                       POST_NMS_TOPK_TEST=own.post_nms_topk_test)}


def _pool(model: ModelConfig) -> dict[str, Any]:
    own = model.pool
    kind = "ROIPool" if own.type == "pool" else "ROIAlignV2" if own.aligned else "ROIAlign"
    return {"POOLER_TYPE": kind, "POOLER_SAMPLING_RATIO": own.sampling_ratio}


def _box_head(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    own, name, c4 = model.box_head, "StandardROIHeads", model.backbone.layout == "c4"
    found = _section("MODEL.ROI_BOX_HEAD", POOLER_RESOLUTION=own.resolution, **_pool(model))
    if c4:
        name = "Res5ROIHeads"
    else:
        found |= _section("MODEL.ROI_BOX_HEAD", NAME="FastRCNNConvFCHead", NUM_FC=own.fcs, FC_DIM=own.fc_dim,
                          NUM_CONV=own.convs, NORM=NAMES[own.norm])
        found |= {"MODEL.ROI_BOX_HEAD.CONV_DIM": model.fpn.channels} if own.convs else {}
    if model.name.startswith("cascade"):
        name, ious = "CascadeROIHeads", [own.fg_iou, *model.cascade.ious]
        weights = [[stage * weight for weight in (10.0, 10.0, 5.0, 5.0)] for stage in range(1, len(ious) + 1)]
        found |= _section("MODEL.ROI_BOX_CASCADE_HEAD", IOUS=ious, BBOX_REG_WEIGHTS=weights)
    return {**found, "TEST.DETECTIONS_PER_IMAGE": own.detections_per_image,
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": own.class_agnostic or name == "CascadeROIHeads",
            **_section("MODEL.ROI_HEADS", NAME=name, NUM_CLASSES=num_classes, IN_FEATURES=_levels(model, 5),
                       SCORE_THRESH_TEST=own.score_thresh, NMS_THRESH_TEST=own.nms_thresh)}


def _mask_head(model: ModelConfig) -> dict[str, Any]:
    own = model.mask_head
    found = _section("MODEL.ROI_MASK_HEAD", CONV_DIM=own.channels, NUM_CONV=own.convs, NORM=NAMES[own.norm])
    if model.backbone.layout == "c4":
        return found
    return {**found, **_section("MODEL.ROI_MASK_HEAD", POOLER_RESOLUTION=own.resolution, **_pool(model))}


def _keypoint_head(model: ModelConfig) -> dict[str, Any]:
    own = model.keypoint_head
    return _section("MODEL.ROI_KEYPOINT_HEAD", CONV_DIMS=[own.channels] * own.convs, NUM_KEYPOINTS=own.num_keypoints,
                    POOLER_RESOLUTION=own.resolution, **_pool(model))


def _retinanet(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    own = model.dense_head
    return {"TEST.DETECTIONS_PER_IMAGE": own.detections_per_image,
            **_section("MODEL.RETINANET", NUM_CLASSES=num_classes, NUM_CONVS=own.convs, NORM=NAMES[own.norm],
                       SCORE_THRESH_TEST=own.score_thresh, NMS_THRESH_TEST=own.nms_thresh,
                       TOPK_CANDIDATES_TEST=own.topk)}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _nested(flat: dict[str, Any]) -> Sections:
    tree: Sections = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree
