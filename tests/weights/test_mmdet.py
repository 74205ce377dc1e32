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


CASCADE_NAMES = {name for name in RCNN_NAMES if "bbox_head" not in name} | {
    name.replace("bbox_head", f"bbox_head.{k}") for name in RCNN_NAMES for k in range(3) if "bbox_head" in name}
THREE_MASKS = {name.replace("mask_head", f"mask_head.{k}") for name in MASK_NAMES for k in range(3)}


@pytest.mark.parametrize("name", ["cascade_rcnn", "cascade_mask_rcnn"])
def test_cascade(tmp_path, name):
    """The last stage's deltas are scaled: its deviations are 0.033 and 0.067 there, 1/30 and 1/15 here."""
    config = ModelConfig.model_validate({
        "name": name, "backbone": {"depth": 18, "width": 16, "weights": None}, "fpn": {"channels": 32},
        "box_head": {"fc_dim": 64}, "mask_head": {"channels": 32, "convs": 2}})
    state = build_model(config, 3).state_dict()
    theirs, unknown = mmdet.FAMILIES[1].keymap.to_theirs(state)
    masks = {key: tensor for key, tensor in theirs.items() if ".mask_head.2." in key}
    theirs |= {key.replace("head.2.", f"head.{k}."): tensor + 1 for key, tensor in masks.items() for k in (0, 1)}
    heads = CASCADE_NAMES | (THREE_MASKS if "mask" in name else set())
    assert not unknown
    assert set(theirs) == backbone_names() | {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    torch.save({"meta": {}, "state_dict": theirs}, tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth")
    assert read.meta.config["model"]["name"] == name and read.meta.config["model"]["cascade"]["average"] == "logits"
    for key, tensor in state.items():
        torch.testing.assert_close(read.tensors[key], tensor)
    last, ours = (source[name] for source, name in ((theirs, "roi_head.bbox_head.2.fc_reg.weight"),
                                                    (state, "roi_heads.box_predictor.2.box.weight")))
    torch.testing.assert_close(last * torch.tensor([[0.033], [0.033], [0.067], [0.067]]),
                               ours / torch.tensor([[30.0], [30.0], [15.0], [15.0]]), rtol=1e-4, atol=0)


def test_retinanet_counts_anchors_ratio_by_ratio():
    """Row (r, s, k) of theirs, for ratio r, size s and class k, is row (s, r, k) here."""
    keymap, classes = mmdet.FAMILIES[2].keymap, 2
    rows = {(r, s, k): torch.tensor([100.0 * r + 10 * s + k]) for r in range(3) for s in range(3) for k in range(4)}
    theirs = {f"bbox_head.{name}.bias": torch.cat([rows[r, s, k] for r in range(3) for s in range(3)
                                                   for k in range(width)])
              for name, width in (("retina_cls", classes), ("retina_reg", 4))}
    ours, _ = keymap.to_ours(theirs)
    for name, width in (("cls", classes), ("box", 4)):
        wanted = torch.cat([rows[r, s, k] for s in range(3) for r in range(3) for k in range(width)])
        assert torch.equal(ours[f"head.{name}.bias"], wanted)
    back, _ = keymap.to_theirs(ours)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def test_retinanet_there_and_back(tmp_path):
    config = ModelConfig.model_validate({
        "name": "retinanet", "backbone": {"depth": 18, "width": 16, "weights": None}, "dense_head": {"convs": 2},
        "fpn": {"channels": 32, "top": "c5"}, "anchors": {"sizes": [[32, 40, 50]] * 5}})
    state = build_model(config, 3).state_dict()
    theirs, unknown = mmdet.FAMILIES[2].keymap.to_theirs(state)
    layers = {f"neck.lateral_convs.{i}.conv" for i in range(3)} | {f"neck.fpn_convs.{i}.conv" for i in range(5)} | {
        f"bbox_head.{tower}_convs.{i}.conv" for tower in ("cls", "reg") for i in range(2)} | {
        "bbox_head.retina_cls", "bbox_head.retina_reg"}
    assert not unknown
    assert set(theirs) == backbone_names() | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    torch.save({"meta": {}, "state_dict": theirs}, tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth")
    found = ModelConfig.model_validate(read.meta.config["model"])
    assert found.fpn.top == "c5" and not found.fpn.top_relu and found.dense_head.clip_before_nms
    assert found.anchors.sizes[0] == (32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)) and len(found.anchors.sizes) == 5
    assert all(torch.equal(read.tensors[key], tensor) for key, tensor in state.items())


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
