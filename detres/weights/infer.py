"""The network that tensors under our names are of: the fields of `ModelConfig` that their shapes show.

What shapes do not show (preprocessing, anchors, thresholds, which convolution strides) each toolkit's importer adds.
"""

from __future__ import annotations

import re

from detres.models.resnet import DEPTHS
from detres.weights.source import Sections, Shapes, State, UnknownNetwork, shapes_of

BODY = "backbone.body."
CONV5 = "roi_heads.box_head."  # the last stage of a C4 detector
CONV5_LAYER = re.compile(r"roi_heads\.box_head\.\d+\.(conv|bn|downsample)")


def infer(state: State) -> tuple[Sections, int]:
    """Sections of the model's config, and its number of classes.

    Raises UnknownNetwork for a body that is no ResNet of `DEPTHS`, LookupError or ValueError where tensors are missing
    or of the wrong shape.
    """
    return infer_shapes(shapes_of(state))


def infer_shapes(shapes: Shapes) -> tuple[Sections, int]:
    """As `infer`, of shapes."""
    backbone = _backbone(shapes)
    if "fc.weight" in shapes:
        return {"name": "classifier", "backbone": {**backbone, "layout": "c5"}, "anchors": {"sizes": [[32]]}}, \
            shapes["fc.weight"][0]
    sections: Sections = {"backbone": backbone}
    if "head.predict.weight" in shapes:
        return _semantic(shapes, sections)
    if "backbone.fpn.lateral.0.weight" in shapes:
        backbone["layout"] = "fpn"
        sections["fpn"] = _fpn(shapes)
        if "backbone.fpn.p6.weight" in shapes:
            is_p5 = shapes["backbone.fpn.p6.weight"][1] == sections["fpn"]["channels"]
            sections["fpn"]["top"] = "p5" if is_p5 else "c5"
    elif BODY + "layer4.0.conv1.weight" not in shapes:
        backbone["layout"] = "c4"
    else:
        backbone["layout"] = "dc5"
    if "head.cls.weight" in shapes:
        return _dense(shapes, sections)
    sections["rpn"] = {"convs": _count(shapes, r"rpn\.head\.convs\.(\d+)\.weight")}
    if not any(name.startswith("roi_heads.") for name in shapes):
        return {"name": "rpn", **sections}, 1
    return _rcnn(shapes, sections)


def _dense(shapes: Shapes, sections: Sections) -> tuple[Sections, int]:
    sections["dense_head"] = {"convs": _count(shapes, r"head\.cls_tower\.(\d+)\.weight"),
                              "norm": _norm(shapes, "head.cls_norm.0.")}
    name = "fcos" if "head.centerness.weight" in shapes else "retinanet"
    return {"name": name, **sections}, shapes["head.cls.weight"][0] // (shapes["head.box.weight"][0] // 4)


def _rcnn(shapes: Shapes, sections: Sections) -> tuple[Sections, int]:
    stages = _count(shapes, r"roi_heads\.box_predictor\.(\d+)\.cls\.weight")  # of a cascade
    name, first = ("cascade_rcnn", "0.") if stages else ("faster_rcnn", "")
    num_classes = shapes[f"roi_heads.box_predictor.{first}cls.weight"][0] - 1
    boxes = shapes[f"roi_heads.box_predictor.{first}box.weight"][0] // 4
    sections["box_head"] = {"class_agnostic": boxes == 1 < num_classes,
                            **_box_head(shapes, sections, f"roi_heads.box_head.{first}")}
    if stages:
        ious = [round(0.5 + 0.1 * k, 2) for k in range(1, stages)]  # which only training asks for
        sections["cascade"] = {"ious": ious}
    if "roi_heads.keypoint_head.deconv.weight" in shapes:
        name = "keypoint_rcnn"
        channels, count, *_ = shapes["roi_heads.keypoint_head.deconv.weight"]
        sections["keypoint_head"] = {"num_keypoints": count, "channels": channels,
                                     "convs": _count(shapes, r"roi_heads\.keypoint_head\.convs\.(\d+)\.weight")}
    if "roi_heads.mask_head.predict.weight" in shapes:
        name = "cascade_mask_rcnn" if stages else "mask_rcnn"
        sections["mask_head"] = {"convs": _count(shapes, r"roi_heads\.mask_head\.convs\.(\d+)\.weight"),
                                 "channels": shapes["roi_heads.mask_head.deconv.weight"][1],
                                 "norm": _norm(shapes, "roi_heads.mask_head.norms.0.")}
    if "roi_heads.mask_head.coarse_head.conv.weight" in shapes:
        name = "cascade_mask_rcnn" if stages else "mask_rcnn"
        sections["mask_head"] = _point_rend(shapes, "roi_heads.mask_head.")
    if "semantic_head.predict.weight" in shapes:
        name = "panoptic_fpn"
        sections["semantic_head"] = _semantic_head(shapes, "semantic_head.scales.0.0.")
    return {"name": name, **sections}, num_classes


def _semantic(shapes: Shapes, sections: Sections) -> tuple[Sections, int]:
    """Stages are dilated as in torchvision: that is not in the tensors."""
    num_classes = shapes["head.predict.weight"][0]
    if "head.scales.0.0.conv.weight" in shapes:
        sections["backbone"]["layout"] = "fpn"
        sections |= {"fpn": _fpn(shapes), "semantic_head": _semantic_head(shapes, "head.scales.0.0.")}
        return {"name": "semantic_fpn", **sections}, num_classes
    sections["backbone"]["layout"] = "dc4"
    name, first = "fcn", "head.conv."
    if "head.aspp.project.conv.weight" in shapes:
        name, first = "deeplabv3_plus" if "head.low.conv.weight" in shapes else "deeplabv3", "head.aspp.project."
    sections["semantic_head"] = _semantic_head(shapes, first)
    if "aux_head.predict.weight" not in shapes:
        sections["semantic_head"]["aux_weight"] = 0.0
    return {"name": name, **sections}, num_classes


def _semantic_head(shapes: Shapes, first: str) -> Sections:
    """first: a convolution of the head and its norm."""
    norm = _norm(shapes, first + "norm.")
    return {"channels": shapes[first + "conv.weight"][0], "norm": "bn" if norm == "frozen_bn" else norm}


def _fpn(shapes: Shapes) -> Sections:
    return {"channels": shapes["backbone.fpn.lateral.0.weight"][0],
            "norm": _norm(shapes, "backbone.fpn.lateral_norm.0.")}


def _point_rend(shapes: Shapes, prefix: str) -> Sections:
    channels = shapes[prefix + "coarse_head.conv.weight"][0]
    dim, inputs = shapes[prefix + "coarse_head.fcs.0.weight"]
    points = {"coarse_fc_dim": dim, "fc_dim": shapes[prefix + "point_head.fcs.0.weight"][0],
              "fcs": _count(shapes, re.escape(prefix) + r"point_head\.fcs\.(\d+)\.weight")}
    return {"type": "point_rend", "channels": channels, "resolution": 2 * round((inputs / channels)**0.5),
            "points": points}


def _box_head(shapes: Shapes, sections: Sections, prefix: str = "roi_heads.box_head.") -> Sections:
    if sections["backbone"]["layout"] == "c4":
        return {"resolution": 14}
    channels = sections["fpn"]["channels"] if "fpn" in sections else _last_channels(shapes)
    dim, inputs = shapes[prefix + "fcs.0.weight"]
    return {"fc_dim": dim, "resolution": round((inputs / channels)**0.5), "norm": _norm(shapes, prefix + "norms.0."),
            "global_context": shapes[prefix.replace("box_head", "box_predictor") + "cls.weight"][1] == 2 * dim,
            "fcs": _count(shapes, re.escape(prefix) + r"fcs\.(\d+)\.weight"),
            "convs": _count(shapes, re.escape(prefix) + r"convs\.(\d+)\.weight")}


def _backbone(shapes: Shapes) -> Sections:
    """Of the ResNet, whose last stage may be the box head of a C4 detector."""
    moved = {name.replace(CONV5, BODY + "layer4.", 1): shape for name, shape in shapes.items()
             if name.startswith(BODY) or CONV5_LAYER.match(name)}
    blocks = tuple(_count(moved, rf"{re.escape(BODY)}layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4))
    bottleneck = BODY + "layer1.0.conv3.weight" in moved
    depth = next((depth for depth, (kind, stages) in DEPTHS.items()
                  if kind == bottleneck and blocks in (stages, (*stages[:3], 0))), None)  # an RPN in C4 has three
    if depth is None:
        raise UnknownNetwork(f"weights must be of a ResNet of {', '.join(map(str, DEPTHS))} layers, got stages of "
                             f"{blocks} {'bottleneck' if bottleneck else 'basic'} blocks. Other networks cannot be "
                             "imported.")
    deep = BODY + "conv1.0.weight" in moved
    width = moved[BODY + ("conv1.6.weight" if deep else "conv1.weight")][0]
    found = {"depth": depth, "width": width, "weights": None, "stem": "deep" if deep else "imagenet",
             "preact": BODY + "layer1.norm.weight" in moved, "norm": _norm(moved, BODY + "bn1."),
             "avg_down": BODY + "layer2.0.downsample.2.weight" in moved}
    if bottleneck:
        inner, per_group = moved[BODY + "layer1.0.conv2.weight"][:2]
        found["groups"] = inner // per_group
        found["group_width"] = per_group * 64 // width
        found["deform_stages"] = sum(BODY + f"layer{i}.0.conv2.offset.weight" in moved for i in (1, 2, 3, 4))
    return found


def _last_channels(shapes: Shapes) -> int:
    last = max(int(match[1]) for name in shapes if (match := re.match(r"backbone\.body\.layer4\.(\d+)\.", name)))
    names = (f"{BODY}layer4.{last}.conv{k}.weight" for k in (3, 2))
    return next(shapes[name][0] for name in names if name in shapes)


def _count(shapes: Shapes, pattern: str) -> int:
    """How many layers there are: one more than the highest number."""
    return max((int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name))), default=-1) + 1


def _norm(shapes: Shapes, prefix: str) -> str:
    """frozen_bn stands for all batch norms: which of them trains is not in the tensors."""
    if prefix + "weight" not in shapes:
        return "none"
    return "frozen_bn" if prefix + "running_mean" in shapes else "gn"
