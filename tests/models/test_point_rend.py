from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from detres.build import build_model
from detres.config import ModelConfig
from detres.losses import mask_loss
from detres.models.roi_heads import standard
from detres.models.roi_heads.mask_head import MaskHead, crop_masks
from detres.models.roi_heads.multi_scale import multi_scale_regions
from detres.models.roi_heads.point_rend import PointRendHead, grid, uncertain_points
from detres.models.roi_heads.regions import Pool, Regions
from detres.ops.paste_masks import paste_masks
from detres.structures import ImageBatch, Targets
from detres.weights.detectron2 import FAMILIES
from detres.weights.importers import convert

from .conftest import make_batch, overfit, small_config

POINTS = {"coarse_fc_dim": 32, "fc_dim": 32, "fcs": 2, "train_points": 32, "steps": 3, "step_points": 200}


def config(backbone=None, **mask_head):
    return small_config(backbone=backbone or {}, mask_head={"type": "point_rend", "resolution": 14, "channels": 32,
                                                            "points": POINTS, **mask_head})


def make_head(classes=3, **options) -> tuple[PointRendHead, Regions, Tensor, Tensor]:
    """A head that is sure of little, and four regions of two images."""
    head = PointRendHead(8, classes, channels=8, coarse_fc_dim=16, fc_dim=16, fcs=2, **options)
    for layer in (head.coarse_head.predict, head.point_head.predict):
        nn.init.normal_(layer.weight, std=0.5)
    maps = [torch.randn(2, 8, 24, 32), torch.randn(2, 8, 12, 16)]
    boxes = torch.tensor([[8.0, 8, 60, 40], [-4, 20, 90, 96], [30, 30, 38, 35], [0, 0, 128, 96]])
    return head, Regions(Pool([4, 8]), maps), boxes, torch.tensor([0, 1, 1, 0])


# --- points -------------------------------------------------------------------------------------------------------


def test_training_points_by_loops():
    """Three quarters are the candidates whose interpolated logits are nearest to zero, the others the last drawn."""
    logits, noise = torch.randn(5, 7, 7), torch.rand(5, 3 * 16 + 4, 2)
    found = uncertain_points(logits, noise, 16, 0.75)
    assert found.shape == (5, 16, 2)
    for mask, points, row in zip(logits, noise, found):
        value = F.grid_sample(mask[None, None], points[None, None] * 2 - 1, align_corners=False).flatten().abs()
        doubtful = sorted(range(48), key=lambda k: float(value[k]))[:12]
        assert {tuple(point) for point in row[:12].tolist()} == {tuple(points[k].tolist()) for k in doubtful}
        assert torch.equal(row[12:], points[48:])


def test_points_depend_on_the_image_and_the_region_alone():
    """Not on other images of the batch, on the random state or on how many regions there are."""
    images, targets = make_batch(2)
    model = build_model(config(), 2)
    drawn = []

    def at(regions, coarse, boxes, image, points):
        drawn.append(points)
        return coarse.flatten(2).mT[:, :1] * 0 + points[..., :1]

    model.roi_heads.mask_head.at = at
    for order in ([0, 1], [1, 0], [0, 1]):
        torch.manual_seed(len(drawn))
        model.train()(ImageBatch(images.pixels[order], images.sizes[order]), Targets(
            boxes=targets.boxes[order], labels=targets.labels[order], valid=targets.valid, seeds=targets.seeds[order],
            masks=targets.masks.view(2, 2, 96, 128)[order].flatten(0, 1)))
    assert torch.equal(drawn[0], drawn[2])
    one, other = ({tuple(row) for row in each[:, -8:].flatten(1).tolist()} for each in drawn[:2])
    assert one == other and len(one) == len(drawn[0]), "each region has its own points"


def test_grid_is_row_by_row():
    points = grid(3, torch.device("cpu"))
    assert torch.allclose(points[:4] * 3, torch.tensor([[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5]]))


def test_points_of_two_scales_are_the_larger():
    boxes, index = torch.tensor([[8.0, 8, 60, 40], [30, 30, 90, 80]]), torch.tensor([0, 1])
    points, pool = torch.rand(2, 7, 2), Pool([4])
    sizes = torch.tensor([[96, 128], [90, 100]])
    maps = [[torch.randn(2, 3, 12, 16)], [torch.randn(2, 3, 24, 32)]]
    pyramid = tuple(ImageBatch(torch.full((2,), i), (sizes * scale).long()) for i, scale in enumerate((0.5, 1.0)))
    regions = multi_scale_regions(pool, lambda images: maps[int(images.pixels[0])], ImageBatch(None, sizes, pyramid))
    expected = torch.maximum(pool.points(maps[0], boxes / 2, index, points), pool.points(maps[1], boxes, index, points))
    torch.testing.assert_close(regions.points(boxes, index, points), expected)


# --- subdivision --------------------------------------------------------------------------------------------------


def every_point(head, regions, boxes, image, labels, side):
    """The point head at each cell, one region and one class at a time."""
    coarse = head.coarse(regions, boxes, image)
    masks = []
    for m, label in enumerate(labels.tolist()):
        part = slice(m, m + 1)
        logits = head.at(regions, coarse[part], boxes[part], image[part], grid(side, boxes.device)[None])
        masks.append(logits[0, :, label].view(side, side).sigmoid())
    return torch.stack(masks)


def test_all_points_taken_equal_full_evaluation():
    head, regions, boxes, image = make_head(steps=2, step_points=28**2 - 1)
    labels = torch.tensor([2, 0, 1, 1])
    assert (head.first_side, head.steps) == (14, 1), "steps that would compute every point are not taken"
    expected = every_point(head, regions, boxes, image, labels, 28)
    found = head.predict(regions, boxes, image, labels)
    assert (found - expected).abs().flatten(1).gt(1e-5).sum(1).tolist() == [1] * 4, "all but the surest one"
    whole = make_head(steps=2, step_points=28**2)[0]
    whole.load_state_dict(head.state_dict())
    torch.testing.assert_close(whole.predict(regions, boxes, image, labels), expected)


@torch.no_grad()
def test_a_step_by_loops():
    head, regions, boxes, image = make_head(steps=1, step_points=40)
    labels = torch.tensor([0, 0, 1, 2])
    assert (head.first_side, head.steps) == (7, 1)
    coarse = head.coarse(regions, boxes, image)
    found = head.predict(regions, boxes, image, labels)
    for m, label in enumerate(labels.tolist()):
        part = slice(m, m + 1)
        first = head.at(regions, coarse[part], boxes[part], image[part], grid(7, boxes.device)[None])[0, :, label]
        fine = F.interpolate(first.view(1, 1, 7, 7), (14, 14), mode="bilinear").flatten()
        for k in sorted(range(196), key=lambda k: fine.abs()[k])[:40]:
            point = torch.tensor([[[(k % 14 + 0.5) / 14, (k // 14 + 0.5) / 14]]])
            fine[k] = head.at(regions, coarse[part], boxes[part], image[part], point)[0, 0, label]
        torch.testing.assert_close(found[m].flatten(), fine.sigmoid(), atol=1e-5, rtol=1e-4)


def test_default_is_the_papers():
    model = build_model(small_config(mask_head={"type": "point_rend", "resolution": 14}), 80)
    head = model.roi_heads.mask_head
    assert (head.coarse_head.side, head.first_side, head.steps) == (7, 28, 3)  # the point head begins at 28 x 28
    found = model.eval()(make_batch()[0])
    assert found.masks.shape[2:] == (224, 224)


def test_no_region():
    head, regions, boxes, image = make_head(steps=2, step_points=50)
    assert head.predict(regions, boxes[:0], image[:0], image[:0]).shape == (0, 28, 28)


# --- in a detector ------------------------------------------------------------------------------------------------


def test_losses_and_gradients(batch):
    model = build_model(config(on_pred_boxes=True), 3)
    losses = model(*batch)
    assert set(losses) == set(model.loss_names) and {"loss_mask", "loss_mask_point"} <= set(losses)
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    images, targets = batch
    none = replace(targets, valid=torch.zeros_like(targets.valid), masks=targets.masks[:0])
    losses = model(images, none)
    sum(losses.values()).backward()
    assert losses["loss_mask"] == losses["loss_mask_point"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_masks_are_trained_in_predicted_boxes(batch, monkeypatch):
    images, targets = batch
    model, seen = build_model(config(on_pred_boxes=True), 3).eval(), []
    model.roi_heads.mask_head.losses = lambda regions, boxes, *others: seen.append(boxes) or {}
    sample = model.roi_heads.sample
    monkeypatch.setattr(model.roi_heads, "sample", lambda *a: seen.append(sample(*a)) or seen[0])
    nn.init.zeros_(model.roi_heads.box_predictor.box.weight)
    with torch.no_grad():
        model.roi_heads.box_predictor.box.bias.copy_(torch.tensor([1.0, 0, 0, 0]).repeat(3))  # a tenth of their width
    model(images, targets)
    rois, boxes = seen
    own = rois.boxes[(rois.labels < 3) & rois.valid]
    width = own[:, 2] - own[:, 0]
    torch.testing.assert_close(boxes, own + torch.stack([width * 0.1, width * 0, width * 0.1, width * 0], 1))


def test_all_rows_give_the_numbers_of_the_valid_ones(monkeypatch):
    images, targets = make_batch(2)
    targets = replace(targets, valid=torch.tensor([[True, True], [False, True]]), masks=targets.masks[[0, 1, 3]])
    sizes = torch.tensor([[96, 128], [70, 90]])
    pyramid = tuple(ImageBatch(F.interpolate(images.pixels.float(), scale_factor=scale), (sizes * scale).long())
                    for scale in (0.5, 1.0))
    model = build_model(config(), 3).eval()
    nn.init.normal_(model.roi_heads.box_predictor.cls.weight, std=0.5)
    batches = [ImageBatch(images.pixels, sizes), ImageBatch(images.pixels, sizes, pyramid)]
    expected = [model(each).masks for each in batches], model(batches[0], targets)
    assert not torch.equal(*expected[0])
    monkeypatch.setattr(standard, "rows_of", lambda valid: torch.arange(valid.numel()))
    found = [model(each).masks for each in batches], model(batches[0], targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        masks, losses = model(batches[0]).masks, model(batches[0], targets)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in (masks, *losses.values()))
    assert not torch.equal(masks, masks.bfloat16().float())


def test_overfits_four_images():
    images, targets = make_batch(4)
    model = build_model(config(), 2)
    overfit(model, images, targets, steps=120)
    found = model.train()(images)  # batch statistics: those kept lag behind
    for i in range(4):
        best = found.valid[i] & (found.scores[i] > 0.5)
        assert best.sum() == 2 and set(found.labels[i][best].tolist()) == {0, 1}
        bitmaps = paste_masks(found.masks[i][best], found.boxes[i][best], (96, 128), convention=found.paste)
        assert overlap(bitmaps, targets.masks[2 * i:2 * i + 2][found.labels[i][best]].bool()).min() > 0.75


def overlap(a, b):
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


def test_fine_detail_is_sharper_than_from_the_fcn_head():
    """Combs with teeth and gaps of 5 pixels, each of a cell of the 28 x 28 that the fcn head has."""
    bitmaps, boxes = torch.zeros(4, 160, 160, dtype=torch.uint8), torch.zeros(4, 4)
    for i in range(4):
        x, y = 3 + 2 * i, 4 + 3 * i
        bitmaps[i, y:y + 20, x:x + 135] = 1
        for tooth in range(x, x + 135, 10):
            bitmaps[i, y:y + 144, tooth:tooth + 5] = 1
        boxes[i] = torch.tensor([x, y, x + 135, y + 144])
    every = torch.arange(4)
    labels, valid = torch.zeros_like(every), torch.ones(4, dtype=torch.bool)
    pixels = bitmaps[:, None] * 2.0 - 1 + 0.1 * torch.randn(4, 1, 160, 160)
    found = {}
    for head in (MaskHead(32, 1, 32, 2), PointRendHead(32, 1, channels=32, coarse_fc_dim=32, fc_dim=32, fcs=2, steps=4,
                                                       step_points=56**2)):
        stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1))
        optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], lr=5e-3)
        for step in range(120):
            regions = Regions(Pool([4]), [stem(pixels)])
            if isinstance(head, MaskHead):
                loss = mask_loss(head(regions(boxes, every, 14)), crop_masks(bitmaps, every, boxes, 28), labels, valid)
            else:
                loss = head.losses(regions, boxes, every, labels, valid, bitmaps, every, every + 4 * step, every)
            sum(loss.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            regions = Regions(Pool([4]), [stem(pixels)])
            masks = head(regions(boxes, every, 14))[:, 0].sigmoid() if isinstance(head, MaskHead) else \
                head.predict(regions, boxes, every, labels)
        pasted = paste_masks(masks, boxes, (160, 160), convention="detectron2")
        found[type(head)] = overlap(pasted, bitmaps.bool()).mean()
    assert found[PointRendHead] > 0.97 and found[MaskHead] < 0.85, found


@pytest.mark.parametrize("mask_head, layout, message", [
    ({"type": "point_rend"}, "dc5", "finest map"), ({"on_pred_boxes": True}, "c4", "on_pred_boxes must be false"),
    ({"type": "point_rend", "resolution": 7}, "fpn", "resolution must be even")])
def test_what_does_not_go_together(mask_head, layout, message):
    with pytest.raises(ValidationError, match=message):
        small_config("mask_rcnn", layout, mask_head=mask_head)


# --- Detectron2's names -------------------------------------------------------------------------------------------

NAMES = {"coarse_head.reduce_spatial_dim_conv": (32, 32, 2, 2), "coarse_head.fc1": (16, 1568),
         "coarse_head.fc2": (16, 16), "coarse_head.prediction": (147, 16), "point_head.fc1": (16, 35, 1),
         "point_head.fc2": (16, 19, 1), "point_head.predictor": (3, 19, 1)}


def older(name: str) -> str:
    """As in the published files."""
    for new, old in (("mask_head.coarse_head.fc", "mask_coarse_head.coarse_mask_fc"),
                     ("mask_head.coarse_head", "mask_coarse_head"), ("mask_head.point_head", "mask_point_head")):
        name = name.replace(new, old)
    return name


def test_names_of_both_versions_of_detectron2s_project(tmp_path):
    small = config(points={"coarse_fc_dim": 16, "fc_dim": 16, "fcs": 2}, backbone={"norm": "frozen_bn"})
    model = build_model(small, 3)
    theirs, unknown = FAMILIES[0].keymap.to_theirs(model.state_dict())
    prefix = "roi_heads.mask_head."
    shapes = {name.removeprefix(prefix).removesuffix(".weight"): tuple(tensor.shape) for name, tensor in theirs.items()
              if name.startswith(prefix) and name.endswith(".weight")}
    assert not unknown and shapes == NAMES
    for state in (theirs, {older(name): tensor for name, tensor in theirs.items()}):
        read = convert(state, tmp_path / "model.pkl")
        found = ModelConfig.model_validate(read.meta.config["model"]).mask_head
        assert (found.type, found.on_pred_boxes, found.points) == ("point_rend", True, small.mask_head.points)
        assert all(torch.equal(tensor, read.tensors[key]) for key, tensor in model.state_dict().items())
