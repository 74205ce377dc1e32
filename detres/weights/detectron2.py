"""Detectron2's models (its model zoo, .pkl and .pth): names of weights, and what they do otherwise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from detres.config import CASCADES
from detres.weights.keymap import POINTWISE, Change, KeyMap
from detres.weights.source import Family, Sections, merged
from detres.weights.zoo import MODELS, checksum


def _of_all_taps(fill: float) -> Change:
    """Version 1 of deformable convolutions has no modulation: here it is 1, which is sigmoid(20) in float32."""
    def to_ours(x: Tensor) -> Tensor:
        return x if len(x) % 27 == 0 else torch.cat([x, x.new_full((len(x) // 2, *x.shape[1:]), fill)])

    return Change(to_ours, lambda x: x)


def stages(theirs: str, ours: str) -> list[tuple]:
    """Blocks of stages that are called {theirs}.0, {theirs}.1 ... there."""
    return [
        (f"{theirs}.{{j}}.shortcut.norm.", f"{ours}.{{j}}.downsample.1."),
        (f"{theirs}.{{j}}.shortcut.", f"{ours}.{{j}}.downsample.0."),
        (f"{theirs}.{{j}}.conv2_offset.weight", f"{ours}.{{j}}.conv2.offset.weight", _of_all_taps(0.0)),
        (f"{theirs}.{{j}}.conv2_offset.bias", f"{ours}.{{j}}.conv2.offset.bias", _of_all_taps(20.0)),
        (f"{theirs}.{{j}}.conv{{k}}.norm.", f"{ours}.{{j}}.bn{{k}}."),
        (f"{theirs}.{{j}}.conv{{k}}.", f"{ours}.{{j}}.conv{{k}}."),
    ]


def body(prefix: str) -> list[tuple]:
    return [
        (f"{prefix}stem.conv1.norm.", "backbone.body.bn1."),
        (f"{prefix}stem.conv1.", "backbone.body.conv1."),
        *stages(f"{prefix}res{{i+2}}", "backbone.body.layer{i+1}"),
    ]


def fpn(finest: int) -> list[tuple]:
    """finest: the number of the finest level, 2 for P2."""
    return [
        *body("backbone.bottom_up."),
        (f"backbone.fpn_lateral{{i+{finest}}}.norm.", "backbone.fpn.lateral_norm.{i}."),
        (f"backbone.fpn_lateral{{i+{finest}}}.", "backbone.fpn.lateral.{i}."),
        (f"backbone.fpn_output{{i+{finest}}}.norm.", "backbone.fpn.output_norm.{i}."),
        (f"backbone.fpn_output{{i+{finest}}}.", "backbone.fpn.output.{i}."),
    ]


RPN = [
    ("proposal_generator.rpn_head.conv.weight", "rpn.head.convs.0.weight"),
    ("proposal_generator.rpn_head.conv.bias", "rpn.head.convs.0.bias"),
    ("proposal_generator.rpn_head.objectness_logits.", "rpn.head.cls."),
    ("proposal_generator.rpn_head.anchor_deltas.", "rpn.head.box."),
]
HEADS = [
    *stages("roi_heads.res5", "roi_heads.box_head"),
    ("roi_heads.box_head.conv{i+1}.norm.", "roi_heads.box_head.norms.{i}."),
    ("roi_heads.box_head.conv{i+1}.", "roi_heads.box_head.convs.{i}."),
    ("roi_heads.box_head.fc{i+1}.", "roi_heads.box_head.fcs.{i}."),
    ("roi_heads.box_predictor.cls_score.", "roi_heads.box_predictor.cls."),
    ("roi_heads.box_predictor.bbox_pred.", "roi_heads.box_predictor.box."),
    ("roi_heads.box_head.{k}.conv{i+1}.norm.", "roi_heads.box_head.{k}.norms.{i}."),  # of stage k of a cascade
    ("roi_heads.box_head.{k}.conv{i+1}.", "roi_heads.box_head.{k}.convs.{i}."),
    ("roi_heads.box_head.{k}.fc{i+1}.", "roi_heads.box_head.{k}.fcs.{i}."),
    ("roi_heads.box_predictor.{k}.cls_score.", "roi_heads.box_predictor.{k}.cls."),
    ("roi_heads.box_predictor.{k}.bbox_pred.", "roi_heads.box_predictor.{k}.box."),
    ("roi_heads.mask_head.mask_fcn{i+1}.norm.", "roi_heads.mask_head.norms.{i}."),
    ("roi_heads.mask_head.mask_fcn{i+1}.", "roi_heads.mask_head.convs.{i}."),
    ("roi_heads.mask_head.deconv.", "roi_heads.mask_head.deconv."),
    ("roi_heads.mask_head.predictor.", "roi_heads.mask_head.predict."),
    # PointRend; the second of two names is of its first version, which the published files have
    *((f"roi_heads.{theirs}.{layer}.", f"roi_heads.mask_head.coarse_head.{ours}.")
      for theirs in ("mask_head.coarse_head", "mask_coarse_head")
      for layer, ours in (("reduce_spatial_dim_conv", "conv"), ("fc{i+1}", "fcs.{i}"),
                          ("coarse_mask_fc{i+1}", "fcs.{i}"),
                          ("prediction", "predict"))),
    *((f"roi_heads.{theirs}.{layer}.", f"roi_heads.mask_head.point_head.{ours}.", POINTWISE)
      for theirs in ("mask_head.point_head", "mask_point_head")
      for layer, ours in (("fc{i+1}", "fcs.{i}"), ("predictor", "predict"))),
    ("roi_heads.keypoint_head.conv_fcn{i+1}.", "roi_heads.keypoint_head.convs.{i}."),
    ("roi_heads.keypoint_head.score_lowres.", "roi_heads.keypoint_head.deconv."),
]
DENSE = [
    ("backbone.top_block.p{i}.", "backbone.fpn.p{i}."),
    ("head.cls_subnet.{2i}.", "head.cls_tower.{i}."),
    ("head.bbox_subnet.{2i}.", "head.box_tower.{i}."),
    ("head.cls_score.", "head.cls."),
    ("head.bbox_pred.", "head.box."),
]


def semantic_head(ours: str) -> list[tuple]:
    return [
        ("sem_seg_head.p{i+2}.{2k}.norm.", f"{ours}.scales.{{i}}.{{k}}.norm."),
        ("sem_seg_head.p{i+2}.{2k}.", f"{ours}.scales.{{i}}.{{k}}.conv."),
        ("sem_seg_head.predictor.", f"{ours}.predict."),
    ]


IGNORED = r"pixel_mean|pixel_std|(proposal_generator\.)?anchor_generator\."
BGR_MEAN, BGR_STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)
ASSUMED = ("images and strides as in the model zoo (BGR; ResNets but for those with norms in the pyramid stride in the "
           "first 1x1): give --config for a model that was trained otherwise",)


def conventions(sections: Sections) -> Sections:
    """Those of the model zoo, whose backbones come from Caffe: stride in the first 1x1, no deviations. ResNeXts and
    models with norms in their pyramids stride in the 3x3; ResNeXts alone have deviations."""
    backbone = sections["backbone"]
    resnext = backbone.get("groups", 1) > 1
    in_1x1 = not resnext and sections.get("fpn", {}).get("norm", "none") == "none"
    found = {
        "input": {"channel_order": "bgr", "mean": BGR_MEAN, "std": BGR_STD if resnext else (1.0, 1.0, 1.0)},
        "backbone": {"stride_in_1x1": in_1x1, "freeze_stages": 0 if backbone["norm"] == "gn" else 2},
        "pool": {"sampling_ratio": 0},
    }
    if sections["name"] in CASCADES:
        found["rpn"] = {"post_nms_topk_train": 2000}
    if sections["name"] == "keypoint_rcnn":
        found |= {"rpn": {"post_nms_topk_train": 1500}, "box_head": {"box_loss": "smooth_l1", "smooth_l1_beta": 0.5}}
    if sections["name"] == "panoptic_fpn":
        found["semantic_head"] = {"loss_weight": 0.5}
    if backbone["layout"] != "fpn":
        found["input"]["size_divisor"] = 1  # a canvas is as large as its largest image
        found["anchors"] = {"sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),)}
        found["rpn"] = {"pre_nms_topk_train": 12_000, "pre_nms_topk_test": 6000, "post_nms_topk_train": 2000}
    if sections.get("mask_head", {}).get("type") == "point_rend":
        found["mask_head"] = {"on_pred_boxes": True}
    return found


def retinanet_conventions(sections: Sections) -> Sections:
    sizes = [[side * 2 ** (octave / 3) for octave in range(3)] for side in (32.0, 64.0, 128.0, 256.0, 512.0)]
    return merged(conventions(sections), {"anchors": {"sizes": sizes}})


FAMILIES = (
    Family("Detectron2", "R-CNN with FPN", ("proposal_generator.rpn_head.conv.weight", "backbone.fpn_lateral2.weight"),
           KeyMap([*fpn(2), *RPN, *HEADS, *semantic_head("semantic_head")], IGNORED), conventions, ASSUMED),
    Family("Detectron2", "Semantic FPN", ("sem_seg_head.predictor.weight", "backbone.fpn_lateral2.weight"),
           KeyMap([*fpn(2), *semantic_head("head")], IGNORED), conventions, ASSUMED),
    Family("Detectron2", "RetinaNet", ("head.cls_subnet.0.weight", "backbone.fpn_lateral3.weight"),
           KeyMap([*fpn(3), *DENSE], IGNORED), retinanet_conventions, ASSUMED),
    Family("Detectron2", "R-CNN without FPN", ("proposal_generator.rpn_head.conv.weight", "backbone.stem.conv1.weight"),
           KeyMap([*body("backbone."), *RPN, *HEADS], IGNORED), conventions, ASSUMED),
)


def published(file: Path) -> Sections | None:
    """What the config of a file of the zoo does otherwise than the others; None for any other file. By checksums, so
    that a name or a folder alone says nothing."""
    md5 = checksum(file, "md5")[:6]
    config = next((name for name, model in MODELS.items() if model.endswith(f"/{md5}")), None)
    if config is None:
        return None
    if config.startswith("Cityscapes/"):
        return {"input": {"min_size": 1024, "max_size": 2048}}
    if config.startswith("LVIS"):
        return {"box_head": {"score_thresh": 1e-4, "detections_per_image": 300}}
    return {}


# ---- backbones -----------------------------------------------------------------------------------------------------


def _caffe() -> list[tuple]:
    """Names of Caffe2's ResNets, whose batch norms are scales and shifts alone."""
    rules = [("conv1_w", "backbone.body.conv1.weight")]
    norms = [("res_conv1_bn_", "backbone.body.bn1."), ("conv1_gn_", "backbone.body.bn1.")]
    stage, ours = "res{i+2}_{j}_", "backbone.body.layer{i+1}.{j}."
    layers = [("branch1", "downsample.0.", "downsample.1."),
              *((f"branch2{'abc'[k - 1]}", f"conv{k}.", f"bn{k}.") for k in (1, 2, 3))]
    for branch, conv, norm in layers:
        rules.append((f"{stage}{branch}_w", f"{ours}{conv}weight"))
        norms += [(f"{stage}{branch}_{kind}_", f"{ours}{norm}") for kind in ("bn", "gn")]
    parts = [("s", "weight"), ("b", "bias"), ("rm", "running_mean"), ("riv", "running_var")]
    return [*rules, *((theirs + part, ours + name) for theirs, ours in norms for part, name in parts)]


BACKBONES = (
    Family("Caffe", "ResNet", ("conv1_w", "res2_0_branch2a_w"),
           KeyMap(_caffe(), r"pred_|fc1000_|conv1_b|lr$|weight_order"),
           conventions, ASSUMED),
    Family("Detectron2", "ResNet", ("stem.conv1.weight", "res2.0.conv1.weight"),
           KeyMap(body(""), r"stem\.fc\.|fc\.|linear"),
           conventions, ASSUMED, shows_stride=False),  # its converter gives torchvision's these names too
)
