"""Cascades and keypoints of other toolkits: every tensor has its place, and the config says what model it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision

from detres.build import build_model
from detres.config import ModelConfig
from detres.weights import detectron2
from detres.weights.importers import convert
from detres.weights.infer import infer

FILE = Path("model.pkl")


def detectron2_state(shared_data, name):
    """Tensors without values, of the names and shapes that Detectron2 saves."""
    path = shared_data.parent / "reference/detectron2/state_dicts" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    tensors = json.loads(path.read_text())["state_dict"]
    return {name: torch.empty(tensor["shape"], device="meta") for name, tensor in tensors.items()}


def test_keypoints_of_detectron2(shared_data):
    weights = convert(detectron2_state(shared_data, "keypoint_rcnn_R_50_FPN_3x"), FILE)
    model = weights.meta.config["model"]
    assert (model["name"], weights.meta.classes) == ("keypoint_rcnn", ("person",))
    assert model["keypoint_head"] == {"num_keypoints": 17, "resolution": 14, "channels": 512, "convs": 8,
                                      "score": "probability"}
    assert model["rpn"]["post_nms_topk_train"] == 1500 and model["box_head"]["smooth_l1_beta"] == 0.5
    names = weights.meta.keypoints["names"]
    joined = {(names[a], names[b]) for a, b in weights.meta.keypoints["skeleton"]}
    assert len(joined) == 19 and ("left_ankle", "left_knee") in joined and ("left_wrist", "right_wrist") not in joined


def test_cascade_of_detectron2(shared_data):
    state = detectron2_state(shared_data, "cascade_mask_rcnn_R_50_FPN_3x")
    weights = convert(state, FILE)
    model = weights.meta.config["model"]
    assert model["name"] == "cascade_mask_rcnn" and len(weights.meta.classes) == 80
    assert model["cascade"]["ious"] == pytest.approx((0.6, 0.7)) and model["rpn"]["post_nms_topk_train"] == 2000
    back, unknown = detectron2.FAMILIES[0].keymap.to_theirs(weights.tensors)
    assert not unknown and {name: t.shape for name, t in back.items()} == {
        name: t.shape for name, t in state.items() if "pixel_" not in name and "anchor_generator" not in name}


def test_a_cascade_without_masks_and_of_two_stages(shared_data):
    state = {name: tensor for name, tensor in detectron2_state(shared_data, "cascade_mask_rcnn_R_50_FPN_3x").items()
             if "mask_head" not in name and ".2.fc" not in name and "box_predictor.2" not in name}
    model = convert(state, FILE).meta.config["model"]
    assert (model["name"], tuple(model["cascade"]["ious"])) == ("cascade_rcnn", (0.6,))


def test_keypoints_of_torchvision():
    with torch.device("meta"):
        theirs = torchvision.models.detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    weights = convert(theirs.state_dict(), FILE)
    model = weights.meta.config["model"]
    assert (model["name"], weights.meta.classes) == ("keypoint_rcnn", ("person",))
    assert model["keypoint_head"]["score"] == "logit"


def test_a_cascade_of_heads_with_convolutions():
    config = ModelConfig.model_validate({"name": "cascade_rcnn", "backbone": {"depth": 18, "width": 16},
                                         "fpn": {"channels": 16},
                                         "box_head": {"convs": 2, "fcs": 1, "norm": "gn", "fc_dim": 32}})
    sections, classes = infer(build_model(config, 3).state_dict())
    assert (sections["name"], classes, sections["backbone"]["depth"]) == ("cascade_rcnn", 3, 18)
    assert {key: sections["box_head"][key] for key in ("convs", "fcs", "norm")} == {"convs": 2, "fcs": 1, "norm": "gn"}
