"""Ensembles of detectors, against plain Python and against the model alone."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torchvision

import detres
from detres import losses
from detres.build import build_model
from detres.config import Config, SourceConfig
from detres.data.dataset import load_dataset
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.checkpoint import WeightsMeta, save_weights
from detres.evaluation.run import evaluate_weights
from detres.geometry.boxes import decode
from detres.inference.ensemble import DetectorEnsemble, build_ensemble, mean_heatmaps, mean_masks, union
from detres.structures import Detections, ImageBatch, Proposals

CLASSES = ("disc", "triangle", "cross")


def config(name="faster_rcnn", **changes) -> Config:
    model = {"name": name, "input": {"min_size": 64, "max_size": 96}, "fpn": {"channels": 16},
             "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "gn", "freeze_stages": 0},
             "rpn": {"pre_nms_topk_test": 50, "post_nms_topk_test": 40},
             "box_head": {"fc_dim": 16, "nms_thresh": 0.4}, "mask_head": {"channels": 16, "convs": 1},
             "keypoint_head": {"num_keypoints": 3, "channels": 16, "convs": 1}}
    for section, fields in changes.items():
        model[section] = {**model.get(section, {}), **fields}
    return Config.model_validate({"model": model, "data": {"workers": 0}, "train": {"precision": "fp32"}})


def detector(seed: int, name="faster_rcnn", **changes):
    """Untrained, but sure of itself: classes and boxes differ from proposal to proposal."""
    torch.manual_seed(seed)
    model = build_model(config(name, **changes).model, len(CLASSES)).eval()
    heads = model.roi_heads
    for predictor in heads.box_predictor if "cascade" in name else [heads.box_predictor]:
        torch.nn.init.normal_(predictor.cls.weight, std=0.7)
        torch.nn.init.normal_(predictor.box.weight, std=0.3)
    if heads.mask_head is not None:
        torch.nn.init.normal_(heads.mask_head.predict.weight)
    return model


def pictures() -> ImageBatch:
    pixels = torch.randint(0, 255, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageBatch(pixels, torch.tensor([[64, 96], [50, 90]]))


def assert_same(found: Detections, expected: Detections, **tolerance) -> None:
    for name in ("boxes", "scores", "labels", "valid", "masks", "keypoints"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)


def test_of_one_is_the_model():
    model, meta = detector(0), WeightsMeta({}, CLASSES, (1, 2, 3), 0, {})
    assert build_ensemble([model], [meta], [config()], ["a"]) is model
    assert_same(DetectorEnsemble([model])(pictures()), model(pictures()), rtol=0, atol=0)


ALL = {"refine": True, "vote_thresh": 0.5, "global_context": True, "nms_thresh": 0.3}  # of appendix B


@pytest.mark.parametrize("name, scales, box_head", [
    ("faster_rcnn", (), {}), ("mask_rcnn", (), {}), ("faster_rcnn", (0.5, 1.0, 1.5), {}),
    ("mask_rcnn", (0.5, 1.0, 1.5), ALL), ("cascade_mask_rcnn", (0.5, 1.0, 1.5), ALL),
    ("keypoint_rcnn", (0.5, 1.0, 1.5), ALL)],
    ids=["boxes", "masks", "multi-scale", "all of appendix B", "cascade", "keypoints"])
def test_of_twins_finds_what_one_finds(name, scales, box_head):
    """Every proposal is there twice, with the same scores: NMS leaves one of both, and votes have the same mean."""
    images = pictures()
    pyramid = [torch.nn.functional.interpolate(images.pixels.float(), scale_factor=scale) for scale in scales]
    images = replace(images, pyramid=tuple(ImageBatch(pixels, (images.sizes * scale).long())
                                           for pixels, scale in zip(pyramid, scales)))
    model = detector(0, name, pool={"canonical_side": 30}, box_head=box_head)
    alone = model(images)
    assert alone.valid.sum() > 20
    assert_same(DetectorEnsemble([model, model])(images), alone, rtol=1e-4, atol=1e-4)


def test_heatmaps_are_averaged_as_probabilities():
    first, second = torch.randn(2, 1, 2, 3, 4, 4)
    probs = (first.flatten(3).softmax(-1) + second.flatten(3).softmax(-1)) / 2
    torch.testing.assert_close(mean_heatmaps([first, second]).flatten(3).softmax(-1), probs)


def naive(models, images, threshold=0.05, nms=0.4, most=100):
    """(box, score, label) of each image: proposals of all, one proposal and one model at a time."""
    views = [model.propose(images) for model in models]
    results = []
    for i, size in enumerate(images.sizes.tolist()):
        boxes, scores, labels = [], [], []
        for proposals, _ in views:
            for box in proposals.boxes[i][proposals.valid[i]]:
                probs, deltas = [], []
                for model, (_, regions) in zip(models, views):
                    heads = model.roi_heads
                    logits, delta = heads.box_predictor(heads.box_head(regions(box[None], torch.tensor([i]), 7)))
                    probs.append(logits.softmax(-1)[0])
                    deltas.append(delta[0])
                for k in range(len(CLASSES)):
                    score = float(np.mean([float(p[k]) for p in probs]))
                    if score > threshold:
                        mean = torch.stack([d[min(k, len(d) - 1)] for d in deltas]).mean(0)
                        out = decode(mean, box, losses.BOX_WEIGHTS)
                        boxes.append(torchvision.ops.clip_boxes_to_image(out, tuple(size)))
                        scores.append(score)
                        labels.append(k)
        boxes, scores, labels = torch.stack(boxes), torch.tensor(scores), torch.tensor(labels)
        kept = torchvision.ops.batched_nms(boxes, scores, labels, nms)[:most]
        results.append((boxes[kept], scores[kept], labels[kept]))
    return results


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"box_head": {"class_agnostic": True, "nms_thresh": 0.9}}],
                         ids=["per class", "one of them class-agnostic"])
def test_averages_over_the_union_of_proposals(changes):
    """The second model's own thresholds and kind of boxes do not matter to the ensemble's NMS."""
    models, images = [detector(0), detector(1, **changes)], pictures()
    found = DetectorEnsemble(models)(images)
    for i, (boxes, scores, labels) in enumerate(naive(models, images)):
        assert found.valid[i].sum() == len(scores) > 10
        torch.testing.assert_close(found.scores[i, :len(scores)], scores, rtol=0, atol=2e-4)
        torch.testing.assert_close(found.boxes[i, :len(scores)], boxes, rtol=0, atol=0.01)
        assert torch.equal(found.labels[i, :len(scores)], labels)


def test_union_keeps_what_is_valid():
    boxes = torch.arange(24.0).view(1, 6, 4)
    parts = [Proposals(boxes[:, :2], torch.tensor([[0.9, 0.1]]), torch.tensor([[True, False]])),
             Proposals(boxes[:, 2:], torch.tensor([[0.8, 0.7, 0.6, 0.5]]), torch.tensor([[True, True, True, False]]))]
    both = union(parts)
    assert torch.equal(both.boxes, boxes) and both.valid.tolist() == [[True, False, True, True, True, False]]
    assert both.scores[0, 2] == 0.8


def test_masks_are_averaged_at_the_finest_resolution():
    models, images = [detector(0, "mask_rcnn"), detector(1, "mask_rcnn", mask_head={"resolution": 7})], pictures()
    found = DetectorEnsemble(models)(images)
    single = [model.roi_heads.predict_masks(model.propose(images)[1], found) for model in models]
    assert [each.shape[-1] for each in single] == [28, 14] and found.masks.shape[-1] == 28
    for row in found.valid.nonzero().tolist():
        fine, coarse = (each[tuple(row)].numpy() for each in single)
        expected = (fine + cv2.resize(coarse, (28, 28), interpolation=cv2.INTER_LINEAR)) / 2
        np.testing.assert_allclose(found.masks[tuple(row)].numpy(), expected, atol=1e-5)
    one, zero = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    assert mean_masks([one, zero, zero]).unique().tolist() == [pytest.approx(1 / 3)]


def save(folder, seed, classes=CLASSES, settings=None, **changes):
    settings = settings or config(**changes)
    model = detector(seed, **changes) if classes == CLASSES else build_model(settings.model, len(classes))
    meta = WeightsMeta(settings.model_dump(mode="json"), classes, tuple(range(1, 1 + len(classes))), seed, {})
    save_weights(folder / f"{seed}.safetensors", model.state_dict(), meta)
    return folder / f"{seed}.safetensors"


def test_from_files(tmp_path, capsys):
    """`load` and `evaluate_weights` take several; overrides change all of them."""
    data = write_shapes(tmp_path / "data", 1, val_images=2, options=ShapesOptions("easy", size=(64, 96)),
                        progress=False)
    a, b = save(tmp_path, 0), save(tmp_path, 1)
    image = load_dataset(SourceConfig(path=str(data)), "val").records[0].path
    both = detres.load([a, b], "cpu").predict(image, 0.0)
    batch = ImageBatch(torch.from_numpy(both.image.transpose(2, 0, 1))[None].contiguous(), torch.tensor([[64, 96]]))
    expected = DetectorEnsemble([detector(0), detector(1)])(batch)
    torch.testing.assert_close(both.scores, expected.scores[expected.valid], rtol=1e-4, atol=1e-5)
    alone = evaluate_weights(a, data=str(data), split="val", device="cpu")
    twins = evaluate_weights([a, a], data=str(data), split="val", device="cpu")
    assert twins == pytest.approx(alone, abs=1e-3) and f"weights {a} + {a}\n" in capsys.readouterr().out
    smaller = detres.load([a, b], "cpu", ["model.input.min_size=32", "model.box_head.score_thresh=0.3"])
    assert smaller.preprocessing.min_size == 32 and smaller.predict(image, 0.0).scores.min() > 0.3


@pytest.mark.parametrize("other, told", [
    ({"classes": ("disc", "square", "cross")}, "class 1, got triangle .*0.safetensors. and square .*1.safetensors"),
    ({"classes": CLASSES[:2]}, "class 2, got cross .*and none"),
    ({"input": {"min_size": 48}}, "model.input.min_size, got 64 .*and 48 .*set it for all: model.input.min_size=64"),
    ({"name": "mask_rcnn"}, "model.name, got faster_rcnn .*and mask_rcnn")])
def test_models_that_make_no_ensemble(tmp_path, other, told):
    with pytest.raises(ValueError, match=f"models of an ensemble must have the same {told}"):
        detres.load([save(tmp_path, 0), save(tmp_path, 1, **other)], "cpu")


def test_each_model_normalises_in_its_own_way(tmp_path):
    a, b = save(tmp_path, 0), save(tmp_path, 1, input={"mean": (0, 0, 0), "channel_order": "bgr"})
    first, second = detres.load([a, b], "cpu").model.models
    assert not first.normalize.bgr and second.normalize.bgr and second.normalize.mean.sum() == 0
