"""Geometry is followed exactly, seen by a marker image for every transform.

Each object of a scene has a label of its own, and with it a colour, flags, and a label in the label map. So image,
masks, boxes, keypoints, flags and label map can all be compared after a transform, whichever image an object is from.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detres.config import AugmentConfig, InputConfig, PolicyOpConfig
from detres.data.augment_colour import turn_colours
from detres.data.augment_geometry import (IoUCrop, RandomAffine, about_middle, overlaps, rotation, shearing, warp,
                                          warp_boxes)
from detres.data.augment_mix import CopyPaste, MixUp, Mosaic, build_mixes, fit, paste
from detres.data.augment_policy import MOVES, Policy, RandAugment, apply_op
from detres.data.dataset import Dataset
from detres.data.transforms import LargeScaleJitter, RandomCrop, Sample, build_train_transforms, crop_sample, tight_box

BLENDED = 3  # pixels, in which colours mix by a warp of up to twice the size
FILL = (9.0, 9.0, 9.0)  # no object has it
PALETTE = np.random.default_rng(1).permutation(np.stack(np.meshgrid(*3 * [np.arange(40, 256, 43)]), -1).reshape(-1, 3))
CROWD, DIFFICULT = np.random.default_rng(2).random((2, len(PALETTE))) < 0.25
NO_DATA = Dataset("none", "coco", ("a",), (1,), (), ("left", "right"), ((0, 1),))
seeds = st.integers(0, 2**32)
often = settings(deadline=None, max_examples=40)


def scene(seed: int, first: int = 0, size: tuple[int, int] | None = None, masks: bool = True) -> Sample:
    """Up to six ellipses and rectangles, of one pixel or more, some at the border, each over those before. Keypoint 0
    is the centroid, keypoint 1 is not labelled."""
    rng = np.random.default_rng(seed)
    height, width = size or rng.integers(2, 90, 2).tolist()
    labels = np.arange(first, first + rng.integers(7))
    owner = np.full((height, width), -1)
    for label in labels:
        h, w = (1 + (rng.random(2) ** 2 * (height, width))).astype(int)
        y, x = rng.integers(-h // 2, height), rng.integers(-w // 2, width)
        shape = np.ones((h, w), bool) if rng.random() < 0.5 else cv2.getStructuringElement(
            cv2.MORPH_ELLIPSE, (w, h)).astype(bool)
        shape = shape[max(0, -y):height - y, max(0, -x):width - x]
        owner[max(0, y):, max(0, x):][:shape.shape[0], :shape.shape[1]][shape] = label
    labels = np.array([label for label in labels if (owner == label).any()], np.int64)
    bitmaps = (owner == labels[:, None, None]).astype(np.uint8)
    boxes = np.array([tight_box(mask) for mask in bitmaps], np.float32).reshape(-1, 4)
    keypoints = np.zeros((len(labels), 2, 3), np.float32)
    keypoints[:, 0] = [(*centroid(mask), 2) for mask in bitmaps] or 0
    image = np.where(owner[..., None] < 0, np.uint8(20), PALETTE[owner].astype(np.uint8))
    return Sample(image, boxes, labels, bitmaps if masks else None, keypoints, (owner + 1).astype(np.uint8),
                  CROWD[labels], DIFFICULT[labels])


def centroid(mask: np.ndarray) -> tuple[float, float]:
    ys, xs = np.nonzero(mask)
    return xs.mean() + 0.5, ys.mean() + 0.5


def flat(where: np.ndarray, radius: int) -> np.ndarray:
    """Pixels whose neighbours are in, too: those that interpolation blends with no others."""
    side = 2 * radius + 1
    return cv2.erode(where.astype(np.uint8), np.ones((side, side), np.uint8), borderValue=0) > 0


def blended(transform, sample: Sample) -> np.ndarray:
    """(H, W) bool: pixels after a transform that interpolation may have mixed with another colour. One pixel of another
    object is enough, which itself may be gone from the masks: white borders, interpolated likewise, tell."""
    inner = np.pad(sample.semantic, 1)
    around = [np.roll(inner, (y - 1, x - 1), (0, 1))[1:-1, 1:-1] for y, x in np.ndindex(3, 3)]
    border = np.any(np.not_equal(around, sample.semantic), 0)
    border[[0, -1]] = border[:, [0, -1]] = True
    return transform(replace(sample, image=border[..., None].repeat(3, 2) * np.uint8(255))).image.any(-1)


def assert_in_step(sample: Sample, mixed: np.ndarray | bool = False, gone_is_hidden: bool = True) -> None:
    """Colour, but for `mixed` pixels, mask, box, keypoint, flags and label map tell the same of every object."""
    height, width = sample.size
    assert sample.masks.shape == (len(sample.boxes), height, width) and sample.semantic.shape == (height, width)
    assert len(set(sample.labels.tolist())) == len(sample.labels) == len(sample.crowd) == len(sample.difficult)
    np.testing.assert_array_equal(sample.crowd, CROWD[sample.labels])
    np.testing.assert_array_equal(sample.difficult, DIFFICULT[sample.labels])
    assert_sound(sample)
    for row, label in enumerate(sample.labels):
        mask = sample.masks[row] > 0
        np.testing.assert_array_equal(mask, sample.semantic == label + 1)
        coloured = (sample.image == PALETTE[label]).all(-1)
        np.testing.assert_array_equal(coloured & ~mixed, mask & ~mixed)
        if mask.any():
            assert abs(sample.boxes[row] - tight_box(mask)).max() <= 1e-3
    if gone_is_hidden:
        assert set(np.unique(sample.semantic)) - {0, 255} <= set((sample.labels + 1).tolist())


def assert_sound(sample: Sample) -> None:
    """No degenerate box, nothing outside of the image, no keypoint outside or that is not labelled and not zero."""
    height, width = sample.size
    assert min(height, width) >= 1 and sample.boxes.dtype == np.float32 and sample.labels.dtype == np.int64
    assert (sample.boxes[:, :2] >= 0).all() and (sample.boxes[:, 2:] <= (width, height)).all()
    assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
    if sample.keypoints is not None:
        labelled = sample.keypoints[..., 2] > 0
        assert not sample.keypoints[~labelled].any() and not labelled[:, 1].any()
        assert (sample.keypoints[..., :2] <= (width, height)).all() and (sample.keypoints >= 0).all()


# One image


def affine(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angle, *shear = rng.uniform(-1, 1, 3) * (3, 0.5, 0.5)
    return rng.uniform(0.5, 1.4) * rotation(angle) @ shearing(*shear)


@given(seeds, seeds)
@often
def test_a_warp_moves_everything_alike(seed, other):
    sample = scene(seed)
    shift = np.random.default_rng(other).uniform(-20, 20, 2)
    matrix = about_middle(affine(other), sample.size, shift)
    found = warp(sample, matrix, FILL)
    assert_in_step(found, blended(lambda item: warp(item, matrix, FILL), sample))
    beyond = warp(replace(sample, semantic=np.ones(sample.size, np.uint8)), matrix, FILL).semantic
    assert set(np.unique(beyond)) <= {1, 255}
    assert (found.image[flat(beyond == 255, BLENDED)] == 9).all()


def test_a_warp_is_exact_where_pixels_meet_pixels():
    """A quarter turn, and a shift by whole pixels: as numpy does it."""
    sample = scene(5, size=(48, 48))
    turned = warp(sample, about_middle(rotation(np.pi / 2), sample.size), FILL)
    np.testing.assert_array_equal(turned.image, np.rot90(sample.image, -1))
    np.testing.assert_array_equal(turned.masks, np.rot90(sample.masks, -1, (1, 2)))
    x, y = sample.keypoints[:, 0, 0], sample.keypoints[:, 0, 1]
    np.testing.assert_allclose(turned.keypoints[:, 0, :2], np.stack([48 - y, x], 1), atol=1e-3)
    shifted = warp(sample, np.array([[1, 0, 3], [0, 1, 5.0]]), FILL)
    np.testing.assert_array_equal(shifted.image[5:, 3:], sample.image[:-5, :-3])
    np.testing.assert_array_equal(shifted.masks[:, 5:, 3:], sample.masks[:, :-5, :-3][np.isin(sample.labels,
                                                                                               shifted.labels)])


@given(seeds)
@often
def test_keypoints_land_where_their_marker_does(seed):
    """The centroid of a disc stays its centroid."""
    rng = np.random.default_rng(seed)
    x, y, radius = *rng.uniform(25, 75, 2), rng.uniform(8, 14)
    ys, xs = np.mgrid[:100, :100] + 0.5
    disc = ((xs - x) ** 2 + (ys - y) ** 2 < radius ** 2).astype(np.uint8)
    point = np.array([[[*centroid(disc), 2]]], np.float32)
    sample = Sample(disc[..., None].repeat(3, 2), np.array([tight_box(disc)], np.float32), np.zeros(1, int), disc[None],
                    point)
    found = warp(sample, about_middle(affine(seed), (100, 100), rng.uniform(-30, 30, 2)), FILL)
    if len(found.boxes) and found.boxes.min() > 0 and found.boxes.max() < 100:
        assert abs(found.keypoints[0, 0, :2] - centroid(found.masks[0])).max() < 0.4


def test_without_a_mask_a_box_holds_its_ellipse():
    """Of a disc the ellipse is all; its box is the disc's, not that of the turned corners."""
    ys, xs = np.mgrid[:200, :200] + 0.5
    disc = (((xs - 90) / 50) ** 2 + ((ys - 110) / 20) ** 2 < 1).astype(np.uint8)
    sample = Sample(disc[..., None].repeat(3, 2), np.array([tight_box(disc)], np.float32), np.zeros(1, int), disc[None])
    matrix = about_middle(affine(4), (200, 200))
    loose, exact = (warp(item, matrix, FILL).boxes for item in (replace(sample, masks=None), sample))
    assert abs(loose - exact).max() < 1.1
    still = np.array([[2, 0, 5], [0, 3, 7.0]])
    np.testing.assert_allclose(warp_boxes(np.array([[1, 2, 3, 5]], np.float32), still), [[7, 13, 11, 22]], rtol=1e-5)


TRANSFORMS = {
    "affine": RandomAffine(1.0, 30, 10, (0.5, 1.5), 0.3, FILL),
    "iou_crop": IoUCrop((0.1, 0.5, 0.9), (0.3, 1), (0.5, 2)),
    "crop": RandomCrop(30), "jitter": LargeScaleJitter((1.0, 1.0), 64, True),
    **{name: lambda sample, rng, name=name: apply_op(sample, name, 9, rng, FILL) for name in MOVES}}


@pytest.mark.parametrize("name", TRANSFORMS)
@given(seeds)
@settings(deadline=None, max_examples=20)
def test_every_transform_of_one_image(name, seed):
    transform, sample = TRANSFORMS[name], scene(seed)
    if name == "jitter":
        sample = scene(seed, size=(64, 48))
    found = transform(sample, np.random.default_rng(seed))
    moves_pixels = "crop" in name or name == "jitter"
    assert_in_step(found, not moves_pixels and blended(lambda item: transform(item, np.random.default_rng(seed)), sample))
    again = transform(sample, np.random.default_rng(seed))
    assert all(np.array_equal(getattr(found, key), getattr(again, key)) for key in vars(found))
    assert_sound(transform(replace(sample, masks=None), np.random.default_rng(seed)))
    empty = transform(sample.take(np.zeros(len(sample.boxes), bool)), np.random.default_rng(seed))
    assert empty.boxes.shape == (0, 4) and empty.masks.shape == (0, *empty.size)


def test_iou_crops_fit_what_was_drawn():
    sample = replace(scene(0, size=(80, 80)), boxes=np.array([[10, 15, 60, 60], [50, 50, 80, 80]], np.float32),
                     masks=None, keypoints=None, labels=np.arange(2), crowd=None, difficult=None)
    grid = np.stack(np.mgrid[:80, :80], -1).astype(np.uint8)
    marked = replace(sample, image=np.dstack([grid, grid[..., :1]]))
    windows, asked = [], []
    for seed in range(200):
        found = IoUCrop((0.8,), (0.3, 1), (0.5, 2))(marked, np.random.default_rng(seed))
        (y1, x1), (y2, x2) = found.image[0, 0, :2].tolist(), (found.image[-1, -1, :2] + 1).tolist()
        windows.append((x1, y1, x2, y2))
        asked.append(np.random.default_rng(seed).integers(3) == 2)  # the first number drawn: none, any, 0.8
    windows, asked = np.array(windows), np.array(asked)
    is_cropped = (windows != (0, 0, 80, 80)).any(1)
    cropped = windows[is_cropped]
    sides = cropped[:, 2:] - cropped[:, :2]
    assert sides.min() >= 24 and (sides[:, 0] / sides[:, 1]).min() >= 0.5 and len(cropped) > 50
    reached = overlaps(cropped, sample.boxes).max(1) >= 0.8
    assert reached[asked[is_cropped]].all() and asked[is_cropped].sum() > 5 and reached.mean() < 0.5
    middle = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
    assert all(((window[:2] < middle) & (middle < window[2:])).all(1).any() for window in cropped)


def test_the_rule_for_what_is_dropped():
    masks = np.zeros((1, 40, 40), np.uint8)
    masks[0, :10, :10] = np.tri(10)  # 55 pixels, of which 15 lie at x >= 5
    sample = Sample(np.zeros((40, 40, 3), np.uint8), np.array([[0, 0, 10, 10]], np.float32), np.zeros(1, int), masks)
    for item, kept in ((sample, 15 / 55), (replace(sample, masks=None), 50 / 100)):
        for cut in (lambda bound: crop_sample(item, 0, 5, 40, 35, bound),
                    lambda bound: warp(item, np.array([[1, 0, -5], [0, 1, 0.0]]), FILL, bound),
                    lambda bound: warp(item, np.array([[2, 0, -10], [0, 2, 0.0]]), FILL, bound)):
            assert [len(cut(bound).boxes) for bound in (0.0, kept - 0.01, kept + 0.01)] == [1, 1, 0]


def test_magnitude_ten_is_the_papers():
    """Thirty degrees, a shear of 0.3, 150 of 331 pixels."""
    points = np.array([[[100, 100, 2], [100, 120, 2]]], np.float32)  # the middle, and 20 pixels below
    sample = Sample(np.zeros((200, 200, 3), np.uint8), np.array([[90, 90, 110, 130]], np.float32), np.zeros(1, int),
                    keypoints=points)
    for name, middle, below in (("rotate", (0, 0), (10, 20 * 3 ** 0.5 / 2)), ("shear_x", (0, 0), (6, 20)),
                                ("shear_y", (0, 0), (0, 20)), ("translate_x", (200 * 150 / 331, 0), (0, 20)),
                                ("translate_y", (0, 200 * 150 / 331), (0, 20))):
        found = [apply_op(sample, name, 10, np.random.default_rng(seed), FILL).keypoints[0, :, :2] for seed in range(9)]
        found = [pair for pair in found if pair.all()]  # shifted by nearly half the image, one may leave it
        np.testing.assert_allclose([abs(pair[0] - 100) for pair in found], [middle] * len(found), atol=1e-3)
        np.testing.assert_allclose([abs(pair[1] - pair[0]) for pair in found], [below] * len(found), atol=1e-3)
        assert name == "shear_y" or len({pair.tobytes() for pair in found}) == 2 - (name == "translate_y")


# Several images


def fetches(seed: int, count: int = 3, **options):
    """A function that gives scenes with labels of their own."""
    scenes = iter([scene(seed + number, 10 * number, **options) for number in range(1, count + 1)])
    return lambda: next(scenes)


MIXES = {"copy_paste": CopyPaste(1.0, 3, FILL), "mosaic": Mosaic(1.0, (1.0, 1.0), (0.25, 0.75), FILL),
         "mosaic_resized": Mosaic(1.0, (0.4, 1.6), (0.0, 1.0), FILL)}


@pytest.mark.parametrize("name", MIXES)
@given(seeds)
@often
def test_every_mix(name, seed):
    sample, mix = scene(seed), MIXES[name]
    before = [array.copy() for array in (sample.image, sample.masks, sample.semantic)]
    found = mix(sample, np.random.default_rng(seed), fetches(seed))
    assert found.size == sample.size
    if name == "mosaic_resized":  # antialiased colours are no one's, small masks vanish
        assert_sound(found)
        assert (found.boxes[:, 2:] - found.boxes[:, :2] >= 1).all()
        for row, label in enumerate(found.labels):
            np.testing.assert_array_equal(found.masks[row] > 0, found.semantic == label + 1)
    else:
        assert_in_step(found, gone_is_hidden=name == "mosaic")
    again = mix(sample, np.random.default_rng(seed), fetches(seed))
    assert all(np.array_equal(getattr(found, key), getattr(again, key)) for key in vars(found))
    assert all(map(np.array_equal, before, (sample.image, sample.masks, sample.semantic)))  # not written to
    floats = replace(sample, image=sample.image.astype(np.float32))  # as plain bilinear resizing gives them
    others = iter([replace(other, image=other.image.astype(np.float32)) for other in map(scene, range(3))])
    assert mix(floats, np.random.default_rng(seed), lambda: next(others)).image.dtype == np.float32
    nothing = mix(scene(seed).take(slice(0, 0)), np.random.default_rng(seed), lambda: scene(seed).take(slice(0, 0)))
    assert nothing.boxes.shape == (0, 4) and nothing.masks.shape == (0, *nothing.size)


def test_copy_paste_pastes_objects_and_no_crowds():
    counts = set()
    for seed in range(100):
        sample, other = scene(seed, size=(60, 60)), scene(seed + 1, 10 * (1 + seed % 7), size=(60, 60))
        found = CopyPaste(1.0, 3, FILL)(sample, np.random.default_rng(seed), lambda: other)
        pasted = found.labels[found.labels >= 10]
        counts.add(len(pasted))
        assert not CROWD[pasted].any() and not DIFFICULT[pasted].any()
        for label in pasted:  # whole, as both images have one size
            np.testing.assert_array_equal(found.masks[found.labels == label], other.masks[other.labels == label])
        union = found.masks[found.labels >= 10].any(0)
        np.testing.assert_array_equal(found.image, np.where(union[..., None], other.image, sample.image))
    assert counts == {0, 1, 2, 3}, counts


def test_covered_objects_lose_their_pixels_boxes_and_points():
    def one(x: int, width: int, label: int) -> Sample:
        sample = scene(0, size=(20, 30)).take(slice(0, 0))
        masks = np.zeros((1, 20, 30), np.uint8)
        masks[0, 5:15, x:x + width] = 1
        point = np.array([[[x + 0.5, 10, 2], [0, 0, 0]]], np.float32)
        return replace(sample, boxes=np.array([[x, 5, x + width, 15]], np.float32), labels=np.array([label]),
                       masks=masks, keypoints=point, crowd=np.zeros(1, bool), difficult=np.zeros(1, bool))

    half = paste(one(5, 10, 0), one(2, 8, 1))
    assert half.boxes.tolist() == [[10, 5, 15, 15], [2, 5, 10, 15]] and half.labels.tolist() == [0, 1]
    assert half.keypoints[:, 0, 2].tolist() == [0, 2]
    assert paste(one(5, 10, 0), one(4, 20, 1)).labels.tolist() == [1]
    assert paste(one(5, 10, 0), one(2, 8, 1), min_visible=0.51).labels.tolist() == [1]
    assert paste(one(5, 10, 0), one(20, 8, 1), min_visible=0.99).labels.tolist() == [0, 1]


@given(seeds)
@often
def test_mixup_blends_and_keeps_the_objects_of_both(seed):
    """Red shows this image, green the other."""
    sample = scene(seed)
    size = tuple(np.random.default_rng(seed).integers(2, 90, 2).tolist())
    black, colours = (0, 0, 0), np.array([[240, 0, 0], [0, 240, 0]], np.uint8)
    red, green = (replace(item, semantic=None, image=item.masks.any(0)[..., None] * colour)
                  for item, colour in zip((sample, scene(seed + 1, 10, size)), colours))
    found = MixUp(1.0, 20.0, black)(red, np.random.default_rng(seed), lambda: green)
    assert_sound(found)
    own = found.labels < 10
    np.testing.assert_array_equal(found.image[..., 0] > 0, found.masks[own].any(0))
    np.testing.assert_array_equal(found.image[..., 1] > 0, found.masks[~own].any(0))
    np.testing.assert_array_equal(found.masks[own], red.masks)
    if own.any() and not own.all():
        assert abs(int(found.image[..., 0].max()) + found.image[..., 1].max() - 240) <= 1
    assert not len(MixUp(1.0, 20.0, black, 0.9)(red, np.random.default_rng(seed), lambda: green).boxes)


def test_fit_cuts_and_fills():
    small, large = scene(1, size=(10, 50)), scene(1, size=(50, 10))
    for sample in (small, large):
        for seed in range(10):
            found = fit(sample, (30, 30), np.random.default_rng(seed), FILL)
            assert found.size == (30, 30) and found.image.dtype == np.uint8
            assert_in_step(found)
            moved = found.boxes[:, :2] - sample.boxes[np.isin(sample.labels, found.labels), :2]
            whole = found.masks.sum((1, 2)) == sample.masks.sum((1, 2))[np.isin(sample.labels, found.labels)]
            points = sample.keypoints[np.isin(sample.labels, found.labels), 0, :2] + moved
            np.testing.assert_allclose(found.keypoints[whole, 0, :2], points[whole], atol=1e-4)
    floats = fit(replace(small, image=small.image.astype(np.float32)), (30, 60), np.random.default_rng(0), (1.5, 2, 3))
    assert floats.image.dtype == np.float32 and {1.5} < set(np.unique(floats.image[..., 0]))


def test_what_targets_do_not_allow():
    model = InputConfig()
    with pytest.raises(ValueError, match="copy_paste must be null for a model without masks"):
        build_mixes(AugmentConfig(copy_paste={}), model, with_masks=False, with_semantic=False)
    with pytest.raises(ValueError, match="mixup must be null for a model with label maps"):
        build_mixes(AugmentConfig(mixup={}), model, with_masks=True, with_semantic=True)
    kinds = build_mixes(AugmentConfig(mixup={}, mosaic={}, copy_paste={}), model, with_masks=True, with_semantic=False)
    assert [type(kind) for kind in kinds] == [CopyPaste, Mosaic, MixUp]


# Pixels


def pipeline(sample: Sample, seed: int, **augment) -> Sample:
    options = AugmentConfig(**({"flip": 0.0, "min_sizes": [min(sample.size)]} | augment))
    return build_train_transforms(options, InputConfig(max_size=10**4), NO_DATA)(sample, np.random.default_rng(seed))


def test_colours_leave_objects_alone():
    sample = scene(7, size=(60, 80))
    ops = [name for name in PolicyOpConfig.model_fields["op"].annotation.__args__ if name not in MOVES]
    for augment in ({"photometric": {"probability": 1, "channel_order": 1}},
                    *({"policy": [[{"op": name, "magnitude": 8}]]} for name in ops if name != "identity")):
        results = [pipeline(sample, seed, **augment) for seed in range(4)]
        assert any((found.image != sample.image).any() for found in results), augment
        for found in results:
            assert found.image.dtype == np.uint8 and found.image.shape == sample.image.shape
            others = set(vars(sample)) - {"image"}
            assert all(np.array_equal(getattr(found, key), getattr(sample, key)) for key in others)


def test_photometric_distortion_is_ssds():
    """Against the same in floats, for one drawing of each."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    sample = Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, int))
    still = {"probability": 1, "brightness": 0, "contrast": (1, 1), "saturation": (1, 1), "hue": 0}
    brighter = pipeline(sample, 0, photometric={**still, "brightness": 32}).image.astype(int)
    (shift,) = np.unique((brighter - image)[(brighter > 0) & (brighter < 255)])
    assert 0 < abs(shift) <= 32
    np.testing.assert_array_equal(brighter, (image.astype(int) + shift).clip(0, 255))
    flatter = pipeline(sample, 0, photometric={**still, "contrast": (0.5, 0.5)}).image
    np.testing.assert_array_equal(flatter, np.rint(image * 0.5))
    grey = pipeline(sample, 0, photometric={**still, "saturation": (0, 0)}).image
    assert (grey == image.max(-1, keepdims=True)).all()  # HSV's value stays
    turned = pipeline(sample, 0, photometric={**still, "hue": 18}).image
    assert (turned.max(-1) == image.max(-1)).all() and (turned != image).any()
    red, green = (np.full((2, 2, 3), colour, np.uint8) for colour in ([240, 0, 0], [0, 240, 0]))
    assert abs(turn_colours(red, 1, 256 / 3).astype(int) - green).max() < 5
    swapped = pipeline(sample, 1, photometric={**still, "channel_order": 1}).image
    assert (swapped != image).any() and (np.sort(swapped, -1) == np.sort(image, -1)).all()


def test_policies_draw_lists_and_operations():
    """Each of two lists in half of the images; operations by their probability."""
    sample = scene(7, size=(40, 40))
    bright, dark = {"op": "solarize", "magnitude": 10}, {"op": "posterize", "magnitude": 10}
    policy = Policy([[PolicyOpConfig(**bright, probability=0.5)], [PolicyOpConfig(**dark)]], FILL)
    results = [policy(sample, np.random.default_rng(seed)).image.tobytes() for seed in range(200)]
    counts = sorted(results.count(image) for image in set(results))
    assert len(counts) == 3 and 30 < counts[0] < 70 and 30 < counts[1] < 70 and 80 < counts[2] < 120
    drawn = [RandAugment(3, 10, FILL)(sample, np.random.default_rng(seed)) for seed in range(100)]
    assert len({found.image.tobytes() for found in drawn}) > 60
    assert {len(found.boxes) for found in drawn} >= {len(sample.boxes), len(sample.boxes) - 1}


def test_flags_stay_with_their_objects_through_albumentations():
    sample = scene(13, size=(60, 60))
    assert sample.ignored.any() and not sample.ignored.all()
    for seed in range(10):
        found = pipeline(sample, seed, albumentations=[{"RandomCrop": {"height": 40, "width": 40, "p": 1}},
                                                       {"D4": {"p": 1}}], min_sizes=[40], min_visible=0.3)
        np.testing.assert_array_equal(found.ignored, (CROWD | DIFFICULT)[found.labels])
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
