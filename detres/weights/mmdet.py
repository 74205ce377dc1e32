"""MMDetection's models (2.x and 3.x): names of weights, and what they do otherwise.

Faster and Mask R-CNN with FPN, PointRend: from the same pixels, detections are MMDetection's: its anchors begin at
the corner of their cells and its RoIAlign is aligned, as Detectron2's; its background is the last class; deltas of
the box head have the usual weights (its deviations 0.1 and 0.2 are one over 10 and 5). Not the same: it suppresses
duplicates after boxes are scaled to the original image, whose sides were rounded each for itself.

RetinaNet: anchors of a cell are counted ratio by ratio there, size by size here: the importer reorders the weights.
Its P7 has no relu before it (`fpn.top_relu`).

Preprocessing: its size is `input.min_size` and `max_size`, rounded as here. OpenCV resizes bilinearly without
smoothing, on integers. Images that are made larger, as all of COCO's at 800 pixels, come out within one level of 255;
of images that are made smaller the pixels differ, as detres smooths them: with `input.antialias=false` they do not,
but then sides are cut, not rounded, and may be a pixel less. JPEGs are decoded by OpenCV there, by Pillow here.

A checkpoint shows neither the order of channels nor which convolution strides: what "caffe" configs say of that is
read from the text of the config in its `meta` (`of_meta`), where there is one.

Fine-tuning: batch norms learn their weights there, with fixed statistics; here frozen ones are fixed altogether.

Cascade R-CNN, with masks or without: boxes and scores are MMDetection's (the deviations of its last stage, 0.033 and
0.067, are not quite one over 30 and 15: the importer scales that layer). Masks are not: it averages those of three
heads, detres has that of the last.

Not read: networks with group norms; files of version 1, whose first class is background.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detres.weights.keymap import POINTWISE, Change, KeyMap
from detres.weights.source import Family, Sections, Told, merged


def scaled_rows(factors: Tensor) -> Change:
    """Each row by a factor of its own."""
    def by(x: Tensor, factors: Tensor) -> Tensor:
        return x * factors.view(-1, *[1] * (x.dim() - 1))

    return Change(lambda x: by(x, factors), lambda x: by(x, 1 / factors))


FPN = [
    ("backbone.", "backbone.body."),
    ("neck.lateral_convs.{i}.conv.", "backbone.fpn.lateral.{i}."),
    ("neck.fpn_convs.{i}.conv.", "backbone.fpn.output.{i}."),
]
RPN = [
    *FPN,
    ("rpn_head.rpn_conv.", "rpn.head.convs.0."),
    ("rpn_head.rpn_cls.", "rpn.head.cls."),
    ("rpn_head.rpn_reg.", "rpn.head.box."),
]
RCNN = [
    *RPN,
    ("roi_head.bbox_head.shared_fcs.{i}.", "roi_heads.box_head.fcs.{i}."),
    ("roi_head.bbox_head.fc_cls.", "roi_heads.box_predictor.cls."),
    ("roi_head.bbox_head.fc_reg.", "roi_heads.box_predictor.box."),
    ("roi_head.mask_head.convs.{i}.conv.", "roi_heads.mask_head.convs.{i}."),
    ("roi_head.mask_head.upsample.", "roi_heads.mask_head.deconv."),
    ("roi_head.mask_head.conv_logits.", "roi_heads.mask_head.predict."),
    ("roi_head.mask_head.downsample_conv.conv.", "roi_heads.mask_head.coarse_head.conv."),
    ("roi_head.mask_head.fcs.{i}.", "roi_heads.mask_head.coarse_head.fcs.{i}."),
    ("roi_head.mask_head.fc_logits.", "roi_heads.mask_head.coarse_head.predict."),
    ("roi_head.point_head.fcs.{i}.conv.", "roi_heads.mask_head.point_head.fcs.{i}.", POINTWISE),
    ("roi_head.point_head.fc_logits.", "roi_heads.mask_head.point_head.predict.", POINTWISE),
]
LAST_STAGE = torch.tensor([0.033 * 30, 0.033 * 30, 0.067 * 15, 0.067 * 15])  # its deviations, times weights here
CASCADE = [
    *RPN,
    ("roi_head.bbox_head.{k}.shared_fcs.{i}.", "roi_heads.box_head.{k}.fcs.{i}."),
    ("roi_head.bbox_head.{k}.fc_cls.", "roi_heads.box_predictor.{k}.cls."),
    ("roi_head.bbox_head.2.fc_reg.", "roi_heads.box_predictor.2.box.", scaled_rows(LAST_STAGE)),
    ("roi_head.bbox_head.{k}.fc_reg.", "roi_heads.box_predictor.{k}.box."),
    ("roi_head.mask_head.2.convs.{i}.conv.", "roi_heads.mask_head.convs.{i}."),
    ("roi_head.mask_head.2.upsample.", "roi_heads.mask_head.deconv."),
    ("roi_head.mask_head.2.conv_logits.", "roi_heads.mask_head.predict."),
]
SIZES, RATIOS = 3, 3  # of RetinaNet's anchors in a cell


def _regroup(outer: int, inner: int) -> Change:
    """Rows counted by ratio, then size, become rows by size, then ratio; each has a few of its own."""
    def swap(x: Tensor, first: int, second: int) -> Tensor:
        return x.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)

    return Change(lambda x: swap(x, outer, inner), lambda x: swap(x, inner, outer))


RETINANET = [
    ("neck.fpn_convs.3.conv.", "backbone.fpn.p6."),
    ("neck.fpn_convs.4.conv.", "backbone.fpn.p7."),
    *FPN,
    ("bbox_head.cls_convs.{i}.conv.", "head.cls_tower.{i}."),
    ("bbox_head.reg_convs.{i}.conv.", "head.box_tower.{i}."),
    ("bbox_head.retina_cls.", "head.cls.", _regroup(RATIOS, SIZES)),
    ("bbox_head.retina_reg.", "head.box.", _regroup(RATIOS, SIZES)),
]


def rcnn_conventions(sections: Sections) -> Sections:
    return {"backbone": {"freeze_stages": 2}, "pool": {"sampling_ratio": 0}}


def cascade_conventions(sections: Sections) -> Sections:
    return merged(rcnn_conventions(sections), {"cascade": {"average": "logits"}})


def retinanet_conventions(sections: Sections) -> Sections:
    sizes = tuple(tuple(side * 2**(k / SIZES) for k in range(SIZES)) for side in (32, 64, 128, 256, 512))
    return {"backbone": {"freeze_stages": 2}, "fpn": {"top": "c5", "top_relu": False}, "anchors": {"sizes": sizes},
            "dense_head": {"clip_before_nms": True}}


def of_meta(about: Mapping[str, Any]) -> Told:
    """What a checkpoint's `meta` tells beside its weights.

    Of the text of its config (`config`, or `cfg` in version 3) the mean, the deviation and the order of channels are
    read, and which convolution strides ("caffe": the first 1x1). Nothing in it is executed.
    """
    meta = about["meta"] if isinstance(about.get("meta"), dict) else {}
    data = meta.get("dataset_meta") or {}
    classes = data.get("classes") or data.get("CLASSES") or meta.get("CLASSES")
    text = str(meta.get("cfg") or meta.get("config") or "")
    found: Sections = {}
    for name in ("mean", "std"):
        if match := re.search(rf"\b{name}=(\[[-\d., \n]+\])", text):
            found[name] = tuple(ast.literal_eval(match[1]))
    if match := re.search(r"\b(?:bgr_to_rgb|to_rgb)=(True|False)", text):
        found["channel_order"] = "rgb" if match[1] == "True" else "bgr"
    sections: Sections = {"input": found} if found else {}
    if re.search(r"\bstyle='caffe'", text):
        sections = merged(sections, {"backbone": {"stride_in_1x1": True}})
    return sections, tuple(classes) if isinstance(classes, (list, tuple)) and classes else None


FAMILIES = (
    Family("MMDetection", "Faster and Mask R-CNN, PointRend",
           ("rpn_head.rpn_conv.weight", "roi_head.bbox_head.shared_fcs.0.weight"), KeyMap(RCNN), rcnn_conventions,
           told=of_meta),
    Family("MMDetection", "Cascade R-CNN",
           ("rpn_head.rpn_conv.weight", "roi_head.bbox_head.2.shared_fcs.0.weight"),
           KeyMap(CASCADE, ignored=r"roi_head\.mask_head\.[01]\."), cascade_conventions,
           ("masks, where it has them, are those of the last of MMDetection's three heads, which averages all",),
           of_meta),
    Family("MMDetection", "RetinaNet", ("bbox_head.retina_cls.weight", "neck.lateral_convs.0.conv.weight"),
           KeyMap(RETINANET), retinanet_conventions, told=of_meta),
)
