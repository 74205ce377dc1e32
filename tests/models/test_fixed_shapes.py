"""What a GPU does, done on the CPU: heads run on all rows, and what is not valid is masked; bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detres.build import build_model
from detres.models.roi_heads import multi_scale, standard
from detres.structures import ImageBatch, Targets

from .conftest import make_batch, small_config

APPENDIX_B = {"global_context": True, "refine": True, "vote_thresh": 0.5, "nms_thresh": 0.3}


def make_model(layout, head) -> nn.Module:
    resolution = 8 if layout == "c4" else 7
    config = small_config("mask_rcnn", layout, backbone={"norm": "gn"}, pool={"canonical_side": 40},
                          rpn={"min_size": 20, "nms_thresh": 0.3},
                          box_head={"resolution": resolution, "batch_per_image": 64, **head})
    model = build_model(config, 3).eval()
    nn.init.normal_(model.roi_heads.box_predictor.cls.weight, std=0.5)
    nn.init.normal_(model.roi_heads.box_predictor.box.weight, std=0.1)
    return model


def images_at(scales) -> tuple[ImageBatch, Targets]:
    """Two images of unlike size, of the second's objects one; and the images at other scales."""
    images, targets = make_batch(2)
    targets = replace(targets, valid=torch.tensor([[True, True], [False, True]]), masks=targets.masks[[0, 1, 3]])
    sizes = torch.tensor([[96, 128], [70, 90]])
    pyramid = tuple(ImageBatch(F.interpolate(images.pixels.float(), scale_factor=scale), (sizes * scale).long())
                    for scale in scales)
    return ImageBatch(images.pixels, sizes, pyramid), targets


SWITCHES = pytest.mark.parametrize("head, scales", [({}, ()), (APPENDIX_B, (0.5, 1.0, 1.5))],
                                   ids=["plain", "appendix B"])
LAYOUTS = pytest.mark.parametrize("layout", ["c4", "fpn"])


@SWITCHES
@LAYOUTS
def test_all_rows_give_the_numbers_of_the_valid_ones(monkeypatch, layout, head, scales):
    model, (images, targets) = make_model(layout, head), images_at(scales)
    proposals, _ = model.propose(images)
    assert proposals.valid.any() and not proposals.valid.all()
    expected = model(images), model(images, targets)
    for module in (standard, multi_scale):
        monkeypatch.setattr(module, "rows_of", lambda valid: torch.arange(valid.numel()))
    found = model(images), model(images, targets)
    assert expected[0].valid.sum() > 10
    for name in ("boxes", "scores", "labels", "valid", "masks"):
        torch.testing.assert_close(getattr(found[0], name), getattr(expected[0], name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


@SWITCHES
@LAYOUTS
def test_under_bf16_what_comes_out_is_fp32(layout, head, scales):
    """Scores and boxes are not rounded to the 8 bits that features have."""
    model, (images, targets) = make_model(layout, head), images_at(scales)
    with torch.autocast("cpu", torch.bfloat16):
        found, losses = model(images), model(images, targets)
    assert found.valid.sum() > 10
    detections = [getattr(found, name)[found.valid] for name in ("boxes", "scores", "masks")]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in (*detections, *losses.values()))
    assert not any(torch.equal(value, value.bfloat16().float()) for value in detections)
