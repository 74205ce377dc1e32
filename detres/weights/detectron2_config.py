"""A YAML config of Detectron2 as a config of detres: the model, how images are resized, the schedule.

What it says and detres cannot do is named, each with its value and the reason (`detectron2_yaml.Settings`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detres.config import Config
from detres.weights.detectron2_defaults import DEFAULTS
from detres.weights.detectron2_yaml import Settings, Untranslated, read


def translate(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], list[Untranslated]]:
    """The fields of `Config` that a Detectron2 config decides, nested as in YAML, and what could not be translated.

    source: a file, or the mapping of one. Its `_BASE_` is read from where it says, or is Detectron2's own of that name
    where there is none. Settings that it lacks are Detectron2's defaults. Pretrained weights keep the name that they
    have there (`weights.zoo`). Raises FileNotFoundError, or ValueError for a file that is no such config and for a
    model that detres does not have.
    """
    notes: list[Untranslated] = []
    settings = read(source, notes)
    found = {"model": _model(settings), "data": _data(settings), "train": _train(settings), **_run(settings, source)}
    found["eval"] = {"metrics": ["voc"] if "VOC" in str(found["data"].get("val")) else ["coco"]}
    settings.name_unread()
    try:
        Config.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"config of Detectron2 must have values that detres can use, got {first['input']!r:.80} for "
                         f"{'.'.join(map(str, first['loc']))}: {first['msg']} ({settings.where}).") from None
    return found, notes


# ---- the model -----------------------------------------------------------------------------------------------------

NORMS = {"FrozenBN": "frozen_bn", "BN": "bn", "SyncBN": "sync_bn", "GN": "gn"}
LAYER_NORMS = {"": "none", **NORMS}
POOLERS = {"ROIAlignV2": {"type": "align", "aligned": True}, "ROIAlign": {"type": "align", "aligned": False},
           "ROIPool": {"type": "pool"}}
PYRAMID = {"build_resnet_fpn_backbone": ["res2", "res3", "res4", "res5"],
           "build_retinanet_resnet_fpn_backbone": ["res3", "res4", "res5"]}
CLASSES = "classes are those of the data set or of the weights"


def _model(s: Settings) -> dict[str, Any]:
    name = _name(s)
    model = {"name": name, **_weights(s), "input": _input(s)}
    model["backbone"].update(_backbone(s))
    layout = model["backbone"]["layout"]
    if layout == "fpn":
        model["fpn"] = _fpn(s)
        model["input"]["size_divisor"] = 32
    if name == "retinanet":
        return {**model, "anchors": _anchors(s, "MODEL.RETINANET.IN_FEATURES", layout), "dense_head": _dense_head(s)}
    if name in ("semantic_fpn", "panoptic_fpn"):
        model["semantic_head"] = _semantic_head(s)
    if name == "semantic_fpn":
        return model
    model |= {"anchors": _anchors(s, "MODEL.RPN.IN_FEATURES", layout), "rpn": _rpn(s)}
    if name == "rpn":
        return model
    model |= {"pool": _pool(s), "box_head": _box_head(s, layout)}
    if name.startswith("cascade"):
        model["cascade"] = _cascade(s, model["box_head"])
    if name in ("mask_rcnn", "cascade_mask_rcnn", "panoptic_fpn"):
        model["mask_head"] = _mask_head(s, layout)
    if name == "keypoint_rcnn":
        model["keypoint_head"] = _keypoint_head(s)
    if name == "panoptic_fpn":
        model["panoptic"] = _panoptic(s)
    return model


def _name(s: Settings) -> str:
    kind = s.choose("MODEL.META_ARCHITECTURE", {"GeneralizedRCNN": "rcnn", "RetinaNet": "retinanet",
                                                "ProposalNetwork": "rpn", "PanopticFPN": "panoptic_fpn",
                                                "SemanticSegmentor": "semantic_fpn"})
    if kind == "rcnn":
        heads = s.choose("MODEL.ROI_HEADS.NAME", {"Res5ROIHeads": "", "StandardROIHeads": "",
                                                  "CascadeROIHeads": "cascade_"})
        masks, keypoints = s("MODEL.MASK_ON"), s("MODEL.KEYPOINT_ON")
        if keypoints and (masks or heads):
            s.name("MODEL.KEYPOINT_ON", "keypoints come without masks and without a cascade")
            keypoints = False
        return f"{heads}{'keypoint_' if keypoints else 'mask_' if masks else '' if heads else 'faster_'}rcnn"
    if kind == "panoptic_fpn":
        s.choose("MODEL.ROI_HEADS.NAME", {"StandardROIHeads": ""})
        s.expect("MODEL.MASK_ON", True, "a panoptic model has masks")
        s.expect("MODEL.KEYPOINT_ON", False, "a panoptic model has no keypoints")
    return kind


def _weights(s: Settings) -> dict[str, Any]:
    """Of a backbone, or of a whole model to begin from."""
    weights = s("MODEL.WEIGHTS") or None
    whole = weights is not None and not re.search(r"ImageNet|(^|/)[RX]-?\d+[^/]*$", weights)
    return {"weights": weights if whole else None, "backbone": {"weights": None if whole else weights}}


def _input(s: Settings) -> dict[str, Any]:
    s.expect("INPUT.MAX_SIZE_TRAIN", s("INPUT.MAX_SIZE_TEST"), "one bound on the long side, model.input.max_size")
    min_size = s("INPUT.MIN_SIZE_TEST")
    if min_size == 0:
        s.name("INPUT.MIN_SIZE_TEST", "images are always resized; give model.input.min_size")
        min_size = 800
    return {"min_size": min_size, "max_size": s("INPUT.MAX_SIZE_TEST"),
            "channel_order": s.choose("INPUT.FORMAT", {"BGR": "bgr", "RGB": "rgb"}),
            "mean": s("MODEL.PIXEL_MEAN", 3), "std": s("MODEL.PIXEL_STD", 3), "size_divisor": 1, "antialias": True}


def _backbone(s: Settings) -> dict[str, Any]:
    part = "MODEL.RESNETS"
    stages = s(f"{part}.DEFORM_ON_PER_STAGE", 4)
    deform = stages[::-1].index(False) if False in stages else 4
    if any(stages[:4 - deform]):
        s.name(f"{part}.DEFORM_ON_PER_STAGE", "deformable stages are the last ones, without gaps")
    if any(stages):
        s.expect(f"{part}.DEFORM_MODULATED", True,
                 "deformable convolutions are modulated (DCNv2); weights of plain ones come with a modulation of 1")
    s.expect(f"{part}.DEFORM_NUM_GROUPS", 1, "one group of offsets")
    width, depth = s(f"{part}.STEM_OUT_CHANNELS"), s(f"{part}.DEPTH")
    s.expect(f"{part}.RES2_OUT_CHANNELS", width * (4 if depth >= 50 else 1),
             "stage 2 has the channels of the stem, four times as many with bottlenecks")
    return {"depth": depth, "width": width, "groups": s(f"{part}.NUM_GROUPS"),
            "group_width": s(f"{part}.WIDTH_PER_GROUP") * 64 // width, "norm": s.choose(f"{part}.NORM", NORMS),
            "stride_in_1x1": s(f"{part}.STRIDE_IN_1X1"), "deform_stages": deform,
            "freeze_stages": s("MODEL.BACKBONE.FREEZE_AT"), "layout": _layout(s)}


def _layout(s: Settings) -> str:
    name, part = s("MODEL.BACKBONE.NAME"), "MODEL.RESNETS"
    if name in PYRAMID:
        s.expect(f"{part}.RES5_DILATION", 1, "a pyramid has no dilation")
        for key in ("MODEL.FPN.IN_FEATURES", f"{part}.OUT_FEATURES"):
            s.expect(key, PYRAMID[name], f"the pyramid reads {', '.join(PYRAMID[name])}")
        return "fpn"
    s.choose("MODEL.BACKBONE.NAME", {"build_resnet_backbone": "", **dict.fromkeys(PYRAMID, "")})
    features, dilation = s(f"{part}.OUT_FEATURES"), s(f"{part}.RES5_DILATION")
    layout = {("res4", 1): "c4", ("res5", 1): "c5", ("res5", 2): "dc5"}.get((" ".join(features), dilation))
    regions = s("MODEL.META_ARCHITECTURE") == "GeneralizedRCNN"
    if layout is None or regions and (layout == "c4") != (s("MODEL.ROI_HEADS.NAME") == "Res5ROIHeads"):
        heads = f" and {s('MODEL.ROI_HEADS.NAME')}" if regions else ""
        raise ValueError(f"{part}.OUT_FEATURES must be res4 with Res5ROIHeads, or res5 with others, to be translated, "
                         f"got {features}, RES5_DILATION = {dilation}{heads} ({s.where}). detres has nothing like it.")
    return layout


def _fpn(s: Settings) -> dict[str, Any]:
    s.expect("MODEL.FPN.FUSE_TYPE", "sum", "levels are added")
    top = {"top": "c5"} if s("MODEL.BACKBONE.NAME") == "build_retinanet_resnet_fpn_backbone" else {}
    return {"channels": s("MODEL.FPN.OUT_CHANNELS"), "norm": s.choose("MODEL.FPN.NORM", LAYER_NORMS), **top}


def _anchors(s: Settings, features: str, layout: str) -> dict[str, Any]:
    """features: the setting that names the maps that they are on."""
    part = "MODEL.ANCHOR_GENERATOR"
    s.choose(f"{part}.NAME", {"DefaultAnchorGenerator": ""})
    s.expect(f"{part}.OFFSET", 0.0, "anchors begin in the corner of the image")
    dense = s("MODEL.BACKBONE.NAME") == "build_retinanet_resnet_fpn_backbone"
    levels = {"fpn": [f"p{level + dense}" for level in range(2, 7)], "c4": ["res4"]}.get(layout, ["res5"])
    s.expect(features, levels, f"anchors are on {', '.join(levels)}")
    sizes, ratios = s(f"{part}.SIZES"), s(f"{part}.ASPECT_RATIOS")
    if any(other != ratios[0] for other in ratios):
        s.name(f"{part}.ASPECT_RATIOS", "the same ratios on all levels; those of the first are taken")
    return {"sizes": sizes * len(levels) if len(sizes) == 1 else sizes, "aspect_ratios": ratios[0],
            "convention": "detectron2"}


def _box_loss(s: Settings, kind: str, beta: str) -> dict[str, Any]:
    loss = s.choose(kind, {name: name for name in ("smooth_l1", "giou", "diou", "ciou")})
    if loss != "smooth_l1":
        return {"box_loss": loss}
    corner = s(beta)
    return {"box_loss": loss, "smooth_l1_beta": corner} if corner else {"box_loss": "l1"}


def _rpn(s: Settings) -> dict[str, Any]:
    part = "MODEL.RPN"
    s.choose("MODEL.PROPOSAL_GENERATOR.NAME", {"RPN": ""})
    s.choose(f"{part}.HEAD_NAME", {"StandardRPNHead": ""})
    s.expect(f"{part}.BBOX_REG_WEIGHTS", [1.0] * 4, "deltas of the RPN are not scaled")
    s.expect(f"{part}.IOU_LABELS", [0, -1, 1], "below both thresholds background, above both an object")
    s.expect(f"{part}.LOSS_WEIGHT", 1.0, "the loss of objectness has weight 1; that of boxes is rpn.box_loss_weight")
    convs = s(f"{part}.CONV_DIMS")
    if set(convs) != {-1} and set(convs) != {s("MODEL.FPN.OUT_CHANNELS")}:
        s.name(f"{part}.CONV_DIMS", "convolutions of the RPN keep the channels of the features")
    edge = s(f"{part}.BOUNDARY_THRESH")
    if edge > 0:
        s.name(f"{part}.BOUNDARY_THRESH", "anchors may reach over the border, or not at all (rpn.inside_only)")
    bg_iou, fg_iou = s(f"{part}.IOU_THRESHOLDS", 2)
    topk = {f"{when}_nms_topk_{stage}": s(f"{part}.{when.upper()}_NMS_TOPK_{stage.upper()}")
            for when in ("pre", "post") for stage in ("train", "test")}
    return {**topk, "convs": len(convs), "nms_thresh": s(f"{part}.NMS_THRESH"),
            "min_size": s("MODEL.PROPOSAL_GENERATOR.MIN_SIZE"), "batch_per_image": s(f"{part}.BATCH_SIZE_PER_IMAGE"),
            "positive_fraction": s(f"{part}.POSITIVE_FRACTION"), "fg_iou": fg_iou, "bg_iou": bg_iou,
            "inside_only": edge == 0, **_box_loss(s, f"{part}.BBOX_REG_LOSS_TYPE", f"{part}.SMOOTH_L1_BETA"),
            "box_loss_weight": s(f"{part}.BBOX_REG_LOSS_WEIGHT") * s(f"{part}.LOSS_WEIGHT")}


def _pool(s: Settings) -> dict[str, Any]:
    part = "MODEL.ROI_BOX_HEAD"
    return {**s.choose(f"{part}.POOLER_TYPE", POOLERS), "sampling_ratio": s(f"{part}.POOLER_SAMPLING_RATIO")}


def _same_pool(s: Settings, part: str) -> None:
    for name in ("POOLER_TYPE", "POOLER_SAMPLING_RATIO"):
        s.expect(f"{part}.{name}", s(f"MODEL.ROI_BOX_HEAD.{name}"), "all heads pool alike, model.pool")


def _box_head(s: Settings, layout: str) -> dict[str, Any]:
    part, heads = "MODEL.ROI_BOX_HEAD", "MODEL.ROI_HEADS"
    levels = {"fpn": ["p2", "p3", "p4", "p5"], "c4": ["res4"]}.get(layout, ["res5"])
    s.expect(f"{heads}.IN_FEATURES", levels, f"regions are pooled from {', '.join(levels)}")
    s.expect(f"{heads}.IOU_LABELS", [0, 1], "an object above the threshold, else background")
    s.expect(f"{heads}.PROPOSAL_APPEND_GT", True, "true boxes are always among the proposals")
    s.expect(f"{heads}.NUM_CLASSES", DEFAULTS[f"{heads}.NUM_CLASSES"], CLASSES)
    s.expect(f"{part}.BBOX_REG_WEIGHTS", [10.0, 10.0, 5.0, 5.0], "deltas are scaled by 10, 10, 5, 5")
    s.expect(f"{part}.TRAIN_ON_PRED_BOXES", False, "masks are trained in the sampled regions")
    options = {}
    if layout != "c4":
        s.choose(f"{part}.NAME", {"FastRCNNConvFCHead": ""})
        options = {"convs": s(f"{part}.NUM_CONV"), "fcs": s(f"{part}.NUM_FC"), "fc_dim": s(f"{part}.FC_DIM"),
                   "norm": s.choose(f"{part}.NORM", LAYER_NORMS)}
        if options["convs"] and s(f"{part}.CONV_DIM") != s("MODEL.FPN.OUT_CHANNELS"):
            s.name(f"{part}.CONV_DIM", "convolutions of the box head keep the channels of the features")
    (fg_iou,) = s(f"{heads}.IOU_THRESHOLDS", 1)
    return {"batch_per_image": s(f"{heads}.BATCH_SIZE_PER_IMAGE"), "positive_fraction": s(f"{heads}.POSITIVE_FRACTION"),
            "fg_iou": fg_iou, "resolution": s(f"{part}.POOLER_RESOLUTION"), **options,
            "class_agnostic": s(f"{part}.CLS_AGNOSTIC_BBOX_REG"),
            **_box_loss(s, f"{part}.BBOX_REG_LOSS_TYPE", f"{part}.SMOOTH_L1_BETA"),
            "box_loss_weight": s(f"{part}.BBOX_REG_LOSS_WEIGHT"), "score_thresh": s(f"{heads}.SCORE_THRESH_TEST"),
            "nms_thresh": s(f"{heads}.NMS_THRESH_TEST"), "detections_per_image": s("TEST.DETECTIONS_PER_IMAGE")}


def _cascade(s: Settings, box_head: dict[str, Any]) -> dict[str, Any]:
    part = "MODEL.ROI_BOX_CASCADE_HEAD"
    first, *others = s(f"{part}.IOUS")
    box_head["fg_iou"] = first
    s.expect("MODEL.ROI_HEADS.IOU_THRESHOLDS", [first], "that of the first stage is in ROI_BOX_CASCADE_HEAD.IOUS")
    weights = [[stage * weight for weight in (10.0, 10.0, 5.0, 5.0)] for stage in range(1, len(others) + 2)]
    s.expect(f"{part}.BBOX_REG_WEIGHTS", weights, "deltas of stage k are scaled by k times 10, 10, 5, 5")
    s.expect("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "boxes of a cascade are class-agnostic")
    return {"ious": others}


def _mask_head(s: Settings, layout: str) -> dict[str, Any]:
    part = "MODEL.ROI_MASK_HEAD"
    s.choose(f"{part}.NAME", {"MaskRCNNConvUpsampleHead": ""})
    s.expect(f"{part}.CLS_AGNOSTIC_MASK", False, "a mask for each class")
    options = {}
    if layout != "c4":  # else what the box head pooled
        _same_pool(s, part)
        options = {"resolution": s(f"{part}.POOLER_RESOLUTION")}
    return {**options, "channels": s(f"{part}.CONV_DIM"), "convs": s(f"{part}.NUM_CONV"),
            "norm": s.choose(f"{part}.NORM", LAYER_NORMS), "paste": "detectron2"}


def _keypoint_head(s: Settings) -> dict[str, Any]:
    part = "MODEL.ROI_KEYPOINT_HEAD"
    s.choose(f"{part}.NAME", {"KRCNNConvDeconvUpsampleHead": ""})
    _same_pool(s, part)
    s.expect(f"{part}.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", True, "the loss is a mean over visible keypoints")
    s.expect(f"{part}.LOSS_WEIGHT", 1.0, "the loss of keypoints has weight 1")
    channels = s(f"{part}.CONV_DIMS")
    if len(set(channels)) != 1:
        s.name(f"{part}.CONV_DIMS", "convolutions of the keypoint head have the same channels; the first are taken")
    return {"num_keypoints": s(f"{part}.NUM_KEYPOINTS"), "resolution": s(f"{part}.POOLER_RESOLUTION"),
            "convs": len(channels), **({"channels": channels[0]} if channels else {}), "score": "probability"}


def _dense_head(s: Settings) -> dict[str, Any]:
    part = "MODEL.RETINANET"
    s.expect(f"{part}.BBOX_REG_WEIGHTS", [1.0] * 4, "deltas of RetinaNet are not scaled")
    s.expect(f"{part}.IOU_LABELS", [0, -1, 1], "below both thresholds background, above both an object")
    s.expect(f"{part}.NUM_CLASSES", DEFAULTS[f"{part}.NUM_CLASSES"], CLASSES)
    bg_iou, fg_iou = s(f"{part}.IOU_THRESHOLDS", 2)
    return {"convs": s(f"{part}.NUM_CONVS"), "norm": s.choose(f"{part}.NORM", {"": "none", "GN": "gn"}),
            "prior": s(f"{part}.PRIOR_PROB"), "focal_alpha": s(f"{part}.FOCAL_LOSS_ALPHA"),
            "focal_gamma": s(f"{part}.FOCAL_LOSS_GAMMA"), "fg_iou": fg_iou, "bg_iou": bg_iou,
            **_box_loss(s, f"{part}.BBOX_REG_LOSS_TYPE", f"{part}.SMOOTH_L1_LOSS_BETA"),
            "topk": s(f"{part}.TOPK_CANDIDATES_TEST"), "score_thresh": s(f"{part}.SCORE_THRESH_TEST"),
            "nms_thresh": s(f"{part}.NMS_THRESH_TEST"), "detections_per_image": s("TEST.DETECTIONS_PER_IMAGE")}


def _semantic_head(s: Settings) -> dict[str, Any]:
    part = "MODEL.SEM_SEG_HEAD"
    s.choose(f"{part}.NAME", {"SemSegFPNHead": ""})
    s.expect(f"{part}.IN_FEATURES", ["p2", "p3", "p4", "p5"], "the semantic head reads p2, p3, p4, p5")
    s.expect(f"{part}.COMMON_STRIDE", 4, "logits have stride 4")
    s.expect(f"{part}.IGNORE_VALUE", 255, "255 is the label of no class")
    s.expect(f"{part}.NUM_CLASSES", DEFAULTS[f"{part}.NUM_CLASSES"], CLASSES)
    return {"channels": s(f"{part}.CONVS_DIM"), "norm": s.choose(f"{part}.NORM", NORMS),
            "loss_weight": s(f"{part}.LOSS_WEIGHT")}


def _panoptic(s: Settings) -> dict[str, Any]:
    part = "MODEL.PANOPTIC_FPN"
    s.expect(f"{part}.INSTANCE_LOSS_WEIGHT", 1.0, "losses of instances have weight 1; see semantic_head.loss_weight")
    return {"score_thresh": s(f"{part}.COMBINE.INSTANCES_CONFIDENCE_THRESH"),
            "overlap_thresh": s(f"{part}.COMBINE.OVERLAP_THRESH"), "stuff_area": s(f"{part}.COMBINE.STUFF_AREA_LIMIT")}


# ---- data, schedule, run -------------------------------------------------------------------------------------------


def _data(s: Settings) -> dict[str, Any]:
    data = {"skip_empty": s("DATALOADER.FILTER_EMPTY_ANNOTATIONS"), "workers": s("DATALOADER.NUM_WORKERS"),
            "aspect_ratio_grouping": s("DATALOADER.ASPECT_RATIO_GROUPING"), "augment": _augment(s)}
    for role, key in (("train", "DATASETS.TRAIN"), ("val", "DATASETS.TEST")):
        sources = [_source(name) for name in s(key)]
        joined = _joined(sources)
        if sources and joined is None:
            s.name(key, f"not among the data sets that datasets/README.md lays out; give data.{role}=PATH")
        elif joined is not None:
            data[role] = joined
            if "panoptic" in joined["path"]:
                s.name(key, "masks are those of the panoptic PNGs, which do not overlap, not of the instances file")
    return data


def _source(name: str) -> dict[str, str] | None:
    """Where a data set that Detectron2 registers is in datasets/ (datasets/README.md)."""
    if match := re.fullmatch(r"voc_(2007|2012)_(\w+)", name):
        return {"path": "datasets/VOCdevkit", "split": f"{match[1]}_{match[2]}"}
    if match := re.fullmatch(r"coco_(2014|2017)_(train|val|minival|valminusminival)", name):
        return {"path": "datasets/coco", "split": f"{match[2]}{match[1]}"}
    if match := re.fullmatch(r"keypoints_coco_(2014|2017)_(train|val)", name):
        return {"path": f"datasets/coco/annotations/person_keypoints_{match[2]}{match[1]}.json"}
    if match := re.fullmatch(r"coco_2017_(train|val)_panoptic_separated", name):
        return {"path": f"datasets/coco/annotations/panoptic_{match[1]}2017.json"}
    return None


def _joined(sources: Sequence[dict[str, str] | None]) -> dict[str, str] | None:
    """One source for several, if they are splits of one folder."""
    if not sources or None in sources or len({source["path"] for source in sources}) > 1:
        return None
    if len(sources) == 1:
        return sources[0]
    return {"path": sources[0]["path"], "split": "+".join(source["split"] for source in sources)}


def _augment(s: Settings) -> dict[str, Any]:
    sizes = s("INPUT.MIN_SIZE_TRAIN")
    if s.choose("INPUT.MIN_SIZE_TRAIN_SAMPLING", {"choice": False, "range": True}):
        low, high = s("INPUT.MIN_SIZE_TRAIN", 2)
        sizes = list(range(low, high + 1))
    flip = s.choose("INPUT.RANDOM_FLIP", {"horizontal": 0.5, "vertical": 0.0, "none": 0.0})
    vertical = {"albumentations": [{"VerticalFlip": {"p": 0.5}}]} if s("INPUT.RANDOM_FLIP") == "vertical" else {}
    return {"min_sizes": sizes, "flip": flip, **vertical}


def _train(s: Settings) -> dict[str, Any]:
    s.expect("SOLVER.NESTEROV", False, "momentum is not Nesterov's")
    s.expect("SOLVER.BIAS_LR_FACTOR", 1.0, "biases learn at the same rate")
    s.expect("SOLVER.WARMUP_METHOD", "linear", "the warm-up is linear")
    steps, batch = s("SOLVER.MAX_ITER"), s("SOLVER.IMS_PER_BATCH")
    found = {"batch_size": batch, "reference_batch_size": batch, "lr": s("SOLVER.BASE_LR"), "steps": steps,
             "schedule": s.choose("SOLVER.LR_SCHEDULER_NAME", {"WarmupMultiStepLR": "multistep",
                                                               "WarmupCosineLR": "cosine"}),
             "warmup_steps": s("SOLVER.WARMUP_ITERS"), "warmup_factor": s("SOLVER.WARMUP_FACTOR"), "optimizer": "sgd",
             "momentum": s("SOLVER.MOMENTUM"), "checkpoint_every": s("SOLVER.CHECKPOINT_PERIOD"),
             "eval_every": s("TEST.EVAL_PERIOD") or None, "seed": max(0, s("SEED")), **_decay(s), **_clip(s)}
    if found["schedule"] == "multistep":
        s.expect("SOLVER.GAMMA", 0.1, "milestones multiply the learning rate by 0.1")
        found["milestones"] = [step for step in s("SOLVER.STEPS") if step < steps]
    else:
        s.expect("SOLVER.BASE_LR_END", 0.0, "the cosine ends at 0")
    found["precision"] = "bf16" if s("SOLVER.AMP.ENABLED") else "fp32"
    if s("SOLVER.AMP.ENABLED"):
        s.name("SOLVER.AMP.ENABLED", "mixed precision is bf16, not fp16 with scaled losses")
    return found


def _decay(s: Settings) -> dict[str, Any]:
    """Weight decay. Detectron2 has one for norms and one for biases; here both have that of weights, or none."""
    decay = s("SOLVER.WEIGHT_DECAY")
    biases = s("SOLVER.WEIGHT_DECAY_BIAS")
    of_all = biases is None or biases != 0
    if biases not in (None, 0, decay):
        s.name("SOLVER.WEIGHT_DECAY_BIAS", "biases have the weight decay of weights, or none")
    norms = [s(key) for key in DEFAULTS if key.endswith(".NORM") and key in s.read]
    if set(norms) - {"", "FrozenBN"}:  # else none trains
        s.expect("SOLVER.WEIGHT_DECAY_NORM", decay if of_all else 0,
                 "norms have the same weight decay as biases (train.decay_norm_and_bias)")
    return {"weight_decay": decay, "decay_norm_and_bias": of_all}


def _clip(s: Settings) -> dict[str, Any]:
    part = "SOLVER.CLIP_GRADIENTS"
    if not s(f"{part}.ENABLED"):
        return {}
    kind, value, norm = (s(f"{part}.{name}") for name in ("CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE"))
    if kind == "full_model" and norm == 2.0:
        return {"grad_clip": value}
    s.name(f"{part}.ENABLED", f"train.grad_clip bounds the L2 norm of the whole gradient; CLIP_TYPE {kind} is another")
    return {}


def _run(s: Settings, source: Any) -> dict[str, Any]:
    output = s("OUTPUT_DIR")
    if output == DEFAULTS["OUTPUT_DIR"]:
        output = "runs/default" if isinstance(source, Mapping) else f"runs/{Path(source).name.split('.')[0]}"
    return {"output": output, "device": "cpu" if s("MODEL.DEVICE") == "cpu" else "auto"}
