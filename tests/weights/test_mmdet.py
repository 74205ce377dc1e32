"""MMDetection's names, written here as version 3.3.0 has them."""

from __future__ import annotations

import pytest
import torch

from detres.build import build_model
from detres.config import ModelConfig
from detres.weights import mmdet
from detres.weights.importers import read_weights

RCNN_NAMES = {"rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg", "roi_head.bbox_head.fc_cls",
              "roi_head.bbox_head.fc_reg", "roi_head.bbox_head.shared_fcs.0", "roi_head.bbox_head.shared_fcs.1",
              *(f"neck.{part}_convs.{i}.conv" for part in ("lateral", "fpn") for i in range(4))}
MASK_NAMES = {"roi_head.mask_head.convs.0.conv", "roi_head.mask_head.convs.1.conv", "roi_head.mask_head.upsample",
              "roi_head.mask_head.conv_logits"}
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def backbone_names(blocks=2) -> set[str]:
    """Of a ResNet-18, of weights and statistics."""
    names = {"conv1.weight"} | {f"bn1.{part}" for part in STATISTICS}
    for layer in (1, 2, 3, 4):
        for block in range(blocks):
            for k in (1, 2):
                names |= {f"layer{layer}.{block}.conv{k}.weight"}
                names |= {f"layer{layer}.{block}.bn{k}.{part}" for part in STATISTICS}
        if layer > 1:
            names |= {f"layer{layer}.0.downsample.0.weight"}
            names |= {f"layer{layer}.0.downsample.1.{part}" for part in STATISTICS}
    return {f"backbone.{name}" for name in names}


POINT_NAMES = {"roi_head.mask_head.downsample_conv.conv", "roi_head.mask_head.fcs.0", "roi_head.mask_head.fcs.1",
               "roi_head.mask_head.fc_logits", "roi_head.point_head.fcs.0.conv", "roi_head.point_head.fcs.1.conv",
               "roi_head.point_head.fc_logits"}
POINT_REND = {"type": "point_rend", "resolution": 14, "channels": 32,
              "points": {"coarse_fc_dim": 16, "fc_dim": 16, "fcs": 2}}


@pytest.mark.parametrize("name, heads, mask_head", [
    ("faster_rcnn", RCNN_NAMES, {}), ("mask_rcnn", RCNN_NAMES | MASK_NAMES, {"convs": 2}),
    ("mask_rcnn", RCNN_NAMES | POINT_NAMES, POINT_REND)])
def test_rcnn_there_and_back(tmp_path, name, heads, mask_head):
    family = mmdet.FAMILIES[0]
    config = ModelConfig.model_validate({
        "name": name, "backbone": {"depth": 18, "width": 16, "weights": None}, "fpn": {"channels": 32},
        "box_head": {"fc_dim": 64}, "mask_head": {"channels": 32, **mask_head}})
    model = build_model(config, 3).eval()
    theirs, unknown = family.keymap.to_theirs(model.state_dict())
    assert not unknown
    assert set(theirs) == backbone_names() | {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert all(tensor.dim() == 3 for key, tensor in theirs.items() if "point_head" in key and key.endswith("weight"))
    meta = {"CLASSES": ("a", "b", "c"), "config": V2.format(**CAFFE)}
    torch.save({"meta": meta, "state_dict": theirs}, tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth")
    found = ModelConfig.model_validate(read.meta.config["model"])
    assert read.family is family and read.meta.classes == ("a", "b", "c") and found.name == name
    assert found.pool.sampling_ratio == 0 and found.backbone.freeze_stages == 2
    assert found.rpn.post_nms_topk_train == 1000 and found.mask_head.paste == "detectron2"
    assert found.backbone.stride_in_1x1 and found.input.channel_order == "bgr"
    assert found.mask_head.type == mask_head.get("type", "fcn") and found.mask_head.points == config.mask_head.points
    assert read.tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, read.tensors[key]) for key, tensor in model.state_dict().items())


def test_retinanet_counts_anchors_ratio_by_ratio():
    """Row (r, s, k) of theirs, for ratio r, size s and class k, is row (s, r, k) here."""
    keymap, classes = mmdet.FAMILIES[1].keymap, 2
    rows = {(r, s, k): torch.tensor([100.0 * r + 10 * s + k]) for r in range(3) for s in range(3) for k in range(4)}
    theirs = {f"bbox_head.{name}.bias": torch.cat([rows[r, s, k] for r in range(3) for s in range(3) for k in range(width)])
              for name, width in (("retina_cls", classes), ("retina_reg", 4))}
    ours, _ = keymap.to_ours(theirs)
    for name, width in (("cls", classes), ("box", 4)):
        wanted = torch.cat([rows[r, s, k] for s in range(3) for r in range(3) for k in range(width)])
        assert torch.equal(ours[f"head.{name}.bias"], wanted)
    back, _ = keymap.to_theirs(ours)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


V2 = """model = dict(type='FasterRCNN', backbone=dict(type='ResNet', depth=50, style='{style}'),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]))
img_norm_cfg = dict(
    mean={mean}, std={std}, to_rgb={rgb})
"""
V3 = """model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor', mean={mean}, std={std}, bgr_to_rgb={rgb}, pad_size_divisor=32),
    backbone=dict(style='{style}'), bbox_coder=dict(target_means=[0.0], target_stds=[0.1]))
"""
RGB = {"style": "pytorch", "mean": "[123.675, 116.28, 103.53]", "std": "[\n    58.395, 57.12, 57.375\n]", "rgb": True}
CAFFE = {"style": "caffe", "mean": "[103.53, 116.28, 123.675]", "std": "[1.0, 1.0, 1.0]", "rgb": False}


@pytest.mark.parametrize("make", [
    lambda text, classes: {"config": text, "CLASSES": classes, "mmdet_version": "2.11.0"},
    lambda text, classes: {"cfg": text, "dataset_meta": {"classes": classes}},
    lambda text, classes: {"cfg": text, "dataset_meta": {"CLASSES": classes, "PALETTE": [(1, 2, 3)]}}])
@pytest.mark.parametrize("text", [V2, V3])
def test_meta_tells_what_weights_do_not(make, text):
    sections, classes = mmdet.of_meta({"meta": make(text.format(**CAFFE), ["cat", "dog"])})
    config = ModelConfig.model_validate(sections)
    assert classes == ("cat", "dog") and config.backbone.stride_in_1x1
    assert (config.input.channel_order, config.input.std) == ("bgr", (1, 1, 1))
    assert config.input.mean == (103.53, 116.28, 123.675)
    assert ModelConfig.model_validate(mmdet.of_meta({"meta": make(text.format(**RGB), ["cat"])})[0]) == ModelConfig()
    assert mmdet.of_meta({}) == ({}, None)
