"""Detectron2's names of PointRend, of both versions of its project."""

from __future__ import annotations

import torch

from detres.build import build_model
from detres.config import ModelConfig
from detres.weights.detectron2 import FAMILIES
from detres.weights.importers import convert

from ..models.conftest import small_config
from .test_mmdet import POINT_REND

NAMES = {"coarse_head.reduce_spatial_dim_conv": (32, 32, 2, 2), "coarse_head.fc1": (16, 1568),
         "coarse_head.fc2": (16, 16), "coarse_head.prediction": (147, 16), "point_head.fc1": (16, 35, 1), "point_head.fc2": (16, 19, 1),
         "point_head.predictor": (3, 19, 1)}


def older(name: str) -> str:
    """As in the published files."""
    for new, old in (("mask_head.coarse_head.fc", "mask_coarse_head.coarse_mask_fc"),
                     ("mask_head.coarse_head", "mask_coarse_head"), ("mask_head.point_head", "mask_point_head")):
        name = name.replace(new, old)
    return name


def test_both_versions(tmp_path):
    config = small_config(mask_head=POINT_REND, backbone={"norm": "frozen_bn"})
    model = build_model(config, 3)
    theirs, unknown = FAMILIES[0].keymap.to_theirs(model.state_dict())
    prefix = "roi_heads.mask_head."
    shapes = {name.removeprefix(prefix).removesuffix(".weight"): tuple(tensor.shape) for name, tensor in theirs.items()
              if name.startswith(prefix) and name.endswith(".weight")}
    assert not unknown and shapes == NAMES
    for state in (theirs, {older(name): tensor for name, tensor in theirs.items()}):
        read = convert(state, tmp_path / "model.pkl")
        found = ModelConfig.model_validate(read.meta.config["model"]).mask_head
        assert (found.type, found.on_pred_boxes, found.points) == ("point_rend", True, config.mask_head.points)
        assert all(torch.equal(tensor, read.tensors[key]) for key, tensor in model.state_dict().items())
