from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detres.build import build_model
from detres.evaluation.panoptic import Segments, match_segments
from detres.models.panoptic import merge_panoptic
from detres.ops.paste_masks import paste_masks

from .conftest import make_batch, overfit, semantic_labels, small_config


def make_panoptic_batch(n=2):
    """Rectangles are things; the noise is stuff of two classes, its left and its right half."""
    images, targets = make_batch(n)
    things = semantic_labels(targets)
    stuff = torch.ones_like(things)
    stuff[:, :, 64:] = 2
    semantic = torch.where(things == 255, things, torch.where(things > 0, 0, stuff))
    return images, replace(targets, semantic=semantic)


def test_losses_detections_and_gradients():
    images, targets = make_panoptic_batch()
    config = small_config("panoptic_fpn", semantic_head={"loss_weight": 0.5})
    model = build_model(config, 2, num_semantic=3)
    found = model(images, targets)
    assert set(found) == set(model.loss_names)
    assert set(found) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask", "loss_semantic"}
    sum(found.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    detections = model.eval()(images)
    assert detections.semantic.shape == (2, 3, 96, 128) and detections.masks is not None
    found = model(images, targets)
    plain = build_model(small_config("panoptic_fpn", semantic_head={"loss_weight": 1.0}), 2, num_semantic=3)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(found["loss_semantic"], plain.eval()(images, targets)["loss_semantic"] / 2)
    with pytest.raises(ValueError, match="num_semantic must be at least 2"):
        build_model(config, 2)


def test_overfits_four_images():
    torch.manual_seed(0)
    images, targets = make_panoptic_batch(4)
    config = small_config("panoptic_fpn", semantic_head={"channels": 32})
    model = build_model(config, 2, num_semantic=3)
    overfit(model, images, targets, steps=110)
    found = model.train()(images)  # by the statistics of the batch: those kept lag behind
    for i in range(4):
        keep = found.valid[i]
        bitmaps = paste_masks(found.masks[i][keep], found.boxes[i][keep], (96, 128))
        panoptic, segments = merge_panoptic(found.scores[i][keep], found.labels[i][keep], bitmaps,
                                            found.semantic[i].argmax(0), stuff_area=500)
        classes = torch.where(segments.is_thing, segments.labels, 1 + segments.labels)
        truth, true_segments = true_map(targets, i)
        matches = match_segments(panoptic, Segments(segments.ids, classes, torch.zeros_like(segments.is_thing)),
                                 truth, true_segments)
        assert matches.iou.min() > 0.65 and not matches.wrong.any(), matches


def true_map(targets, i):
    """Segments of two things and two classes of stuff; ids are 1 + label."""
    stuff = targets.semantic[i].int()
    ids = torch.where(stuff == 255, 0, torch.where(stuff > 0, stuff + 2, 0))
    for label, mask in zip(targets.labels[i], targets.masks[2 * i:2 * i + 2]):
        ids[mask.bool()] = int(label) + 1
    ids[:4] = 0
    return ids, Segments(torch.arange(1, 5), torch.arange(4), torch.zeros(4, dtype=torch.bool))


def naive_merge(scores, labels, bitmaps, semantic_labels, overlap_thresh, stuff_area, score_thresh):
    """Pixels in sets, one instance after another."""
    owner: dict[int, int] = {}
    segments = []
    for d in sorted(range(len(scores)), key=lambda d: -float(scores[d])):
        mask = {p for p, inside in enumerate(bitmaps[d].flatten().tolist()) if inside}
        free = {p for p in mask if p not in owner}
        if float(scores[d]) < score_thresh or not mask or len(mask - free) / len(mask) > overlap_thresh or not free:
            continue
        segments.append((int(labels[d]), True, float(scores[d])))
        owner |= dict.fromkeys(free, len(segments))
    flat = semantic_labels.flatten().tolist()
    for channel in sorted(set(flat) - {0}):
        free = {p for p, own in enumerate(flat) if own == channel and p not in owner}
        if free and len(free) >= stuff_area:
            segments.append((channel, False, 1.0))
            owner |= dict.fromkeys(free, len(segments))
    return torch.tensor([owner.get(p, 0) for p in range(len(flat))]).view_as(semantic_labels), segments


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("overlap_thresh, stuff_area, score_thresh", [(0.5, 20, 0.5), (0.0, 0, 0.0), (1.0, 6, 0.2)])
def test_merging_equals_sets_of_pixels(seed, overlap_thresh, stuff_area, score_thresh):
    generator = torch.Generator().manual_seed(seed)
    d, height, width = 12, 10, 13
    scores = torch.rand(d, generator=generator)
    labels = torch.randint(0, 5, (d,), generator=generator)
    corners = torch.randint(0, 10, (d, 4), generator=generator)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    bitmaps = torch.stack([(y >= a) & (y < a + c) & (x >= b) & (x < b + e) for a, b, c, e in corners])
    semantic = torch.randint(0, 4, (height // 5, width), generator=generator).repeat_interleave(5, 0)
    options = {"overlap_thresh": overlap_thresh, "stuff_area": stuff_area, "score_thresh": score_thresh}
    panoptic, segments = merge_panoptic(scores, labels, bitmaps, semantic, **options)
    expected, expected_segments = naive_merge(scores, labels, bitmaps, semantic, **options)
    assert panoptic.dtype == torch.int32 and torch.equal(panoptic.long(), expected)
    assert segments.ids.tolist() == list(range(1, len(expected_segments) + 1))
    found = zip(segments.labels.tolist(), segments.is_thing.tolist(), segments.scores.tolist())
    assert list(found) == expected_segments


def test_merging_nothing():
    """No instances, and one class of stuff that is too small."""
    semantic = torch.zeros(4, 4, dtype=torch.int64)
    semantic[0, :2] = 3
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.bool)
    panoptic, segments = merge_panoptic(*empty, semantic, stuff_area=3)
    assert not panoptic.any() and len(segments.ids) == 0
    panoptic, segments = merge_panoptic(*empty, semantic, stuff_area=2)
    assert segments.labels.tolist() == [3] and not segments.is_thing.any() and panoptic.sum() == 2
