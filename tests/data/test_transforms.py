"""Geometry: image, boxes, masks, keypoints and labels move as one.

Marker images: object k is a rectangle of its own colour, so that what a transform did to the pixels tells where its
box, mask and keypoints have to be.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.functional import _compute_resized_output_size
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detres.config import AugmentConfig, InputConfig
from detres.data.dataset import Dataset
from detres.data.images import ImageError
from detres.data.transforms import (LargeScaleJitter, Sample, build_train_transforms, crop_sample, flip, resize,
                                    resize_for_eval, resized_size)

NO_DATA = Dataset("none", "coco", ("a",), (1,), (), ("left", "right"), ((0, 1),))
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def markers(boxes: list[tuple[int, int, int, int]], height: int = 48, width: int = 64, masks: bool = True) -> Sample:
    """Rectangles; keypoint 0 is the centre of the left upper pixel of each, keypoint 1 is not labelled."""
    image, bitmaps = np.zeros((height, width, 3), np.uint8), np.zeros((len(boxes), height, width), np.uint8)
    keypoints = np.zeros((len(boxes), 2, 3), np.float32)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = COLOURS[k + 1]
        bitmaps[k, y1:y2, x1:x2] = 1
        keypoints[k, 0] = x1 + 0.5, y1 + 0.5, 2
    return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), np.arange(len(boxes)), bitmaps if masks else None,
                  keypoints)


BOXES = [(3, 5, 20, 17), (30, 2, 44, 40), (50, 30, 64, 48)]


def extent(where: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(where)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def assert_in_step(sample: Sample) -> None:
    """Each object's colour in the image, its box and its mask say the same, exactly."""
    for row, label in enumerate(sample.labels):
        coloured = (sample.image == COLOURS[label + 1]).all(-1)
        np.testing.assert_array_equal(sample.masks[row], coloured)
        np.testing.assert_allclose(sample.boxes[row], extent(coloured), atol=1e-3)
    visible = {tuple(colour) for colour in sample.image.reshape(-1, 3).tolist()} - {(0, 0, 0)}
    assert visible == {tuple(COLOURS[label + 1].tolist()) for label in sample.labels}


def assert_same(a: Sample, b: Sample) -> None:
    for name in ("image", "labels", "masks"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("boxes", "keypoints"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-4, err_msg=name)


sides = st.integers(1, 90)
boxes_in_64x48 = st.lists(
    st.tuples(st.integers(0, 62), st.integers(0, 46), st.integers(1, 64), st.integers(1, 48)).map(
        lambda b: (b[0], b[1], min(64, b[0] + b[2]), min(48, b[1] + b[3]))), max_size=3)


# Flip


@given(boxes_in_64x48)
def test_flipping_twice_changes_nothing(boxes):
    sample = markers(boxes)
    assert_same(flip(flip(sample, [(0, 1)]), [(0, 1)]), sample)


def test_flip_is_exact():
    flipped = flip(markers(BOXES), [(0, 1)])
    assert_in_step(flipped)
    assert flipped.boxes[0].tolist() == [44, 5, 61, 17]
    assert flipped.keypoints[0].tolist() == [[0, 0, 0], [60.5, 5.5, 2]]  # places exchanged, the absent one still zero


# Resize


@pytest.mark.parametrize(("size", "min_size", "max_size", "expected"), [
    ((480, 640), 800, 1333, (800, 1067)), ((427, 640), 800, 1333, (800, 1199)), ((640, 427), 800, 1333, (1199, 800)),
    ((333, 500), 800, 1333, (800, 1201)), ((375, 1242), 800, 1333, (402, 1333)), ((500, 500), 640, 1333, (640, 640)),
    ((1, 5000), 800, 1333, (1, 1333)), ((5000, 1), 800, 1333, (1333, 1))])
def test_size_as_detectron2(size, min_size, max_size, expected):
    """Values of Detectron2's ResizeShortestEdge.get_output_shape; it would make a side of 0 of the last two."""
    assert resized_size(*size, min_size, max_size, antialias=True) == expected


@given(st.integers(20, 2000), st.integers(20, 2000), st.integers(20, 900))
def test_size_as_torchvision(height, width, min_size):
    """torchvision's own resize, on one channel so that it is quick."""
    max_size = int(1.6 * min_size)
    scale = min(min_size / min(height, width), max_size / max(height, width))
    assume(height * scale >= 1)  # torchvision fails otherwise
    column = torch.zeros(1, 1, height, 1)
    expected = F.interpolate(column, scale_factor=(scale, 1), recompute_scale_factor=True).shape[2]
    assert resized_size(height, width, min_size, max_size, antialias=False)[0] == expected


@given(st.integers(2, 3000), st.integers(2, 3000), st.integers(20, 900))
def test_size_as_torchvision_resizes_pictures(height, width, min_size):
    """What its presets of classification and segmentation do."""
    expected = tuple(_compute_resized_output_size((height, width), [min_size]))
    assume(max(expected) < 10**5)
    assert resized_size(height, width, min_size, 10**5, antialias=True, round_down=True) == expected


@pytest.mark.parametrize("size", [(33, 47), (48, 30), (40, 100)])
def test_plain_bilinear_is_torchvisions_transform(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    theirs = GeneralizedRCNNTransform(64, 100, [0, 0, 0], [1, 1, 1])
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    box = torch.tensor([[1., 2, 20, 30]])
    batch, targets = theirs([pixels], [{"boxes": box}])
    found = resize_for_eval(image, InputConfig(min_size=64, max_size=100, antialias=False))
    assert found.dtype == np.float32 and found.shape[:2] == batch.image_sizes[0]
    np.testing.assert_allclose(found, batch.tensors[0, :, :found.shape[0], :found.shape[1]].permute(1, 2, 0), atol=1e-3)
    sample = Sample(image, box.numpy(), np.zeros(1, int))
    np.testing.assert_allclose(resize(sample, found.shape[:2], False).boxes, targets[0]["boxes"], atol=1e-4)


def test_antialiased_resize_averages():
    stripes = np.tile(np.array([0, 200], np.uint8)[None, :, None], (64, 32, 3))
    small = resize_for_eval(stripes, InputConfig(min_size=16, max_size=16))
    assert small.dtype == np.uint8 and abs(small[4:-4, 4:-4].astype(int) - 100).max() <= 1


@given(boxes_in_64x48, sides, sides, st.booleans())
@settings(deadline=None)
def test_resize_scales_coordinates(boxes, height, width, antialias):
    sample = markers(boxes)
    found = resize(sample, (height, width), antialias)
    assert found.image.shape == (height, width, 3) and found.masks.shape == (len(boxes), height, width)
    scale = np.array([width / 64, height / 48])
    np.testing.assert_allclose(found.boxes, sample.boxes * np.tile(scale, 2), rtol=1e-5)
    np.testing.assert_allclose(found.keypoints, sample.keypoints * np.append(scale, 1), rtol=1e-5)


def test_whole_factors_are_exact():
    large = resize(markers(BOXES), (144, 192), False)
    np.testing.assert_array_equal(large.masks, markers(BOXES).masks.repeat(3, 1).repeat(3, 2))
    small = resize(markers([(3, 6, 21, 18)]), (16, 21 * 64 // 63), True)
    assert extent(small.masks[0]) == [1, 2, 7, 6]


# Large-scale jitter


def test_crop_is_exact_and_drops_what_leaves():
    sample = markers(BOXES)
    cropped = crop_sample(sample, y=10, x=12, height=28, width=32)
    assert cropped.labels.tolist() == [0, 1]
    assert_in_step(cropped)
    assert cropped.keypoints[:, 0].tolist() == [[0, 0, 0], [0, 0, 0]]  # both outside now
    assert crop_sample(sample, 0, 0, 20, 20).labels.tolist() == [0]
    bare = replace(sample, masks=None)
    np.testing.assert_array_equal(crop_sample(bare, 10, 12, 28, 32).boxes, cropped.boxes)


def test_after_a_crop_boxes_fit_their_masks():
    sample = markers([(0, 0, 40, 40)])
    masks = np.tril(np.ones((48, 64), np.uint8))[None] * sample.masks  # a triangle: the right end lies at its foot
    cropped = crop_sample(replace(sample, masks=masks), 0, 0, 20, 64)
    assert cropped.boxes.tolist() == [[0, 0, 20, 20]]
    assert len(crop_sample(replace(sample, masks=masks), 0, 20, 20, 44).boxes) == 0  # box inside, mask outside


def test_objects_thinner_than_a_pixel():
    sample = replace(markers([(4, 4, 9, 9)]), masks=np.zeros((1, 48, 64), np.uint8))
    assert len(crop_sample(sample, 0, 0, 20, 20).boxes) == 1  # never had a mask: the box counts
    assert len(crop_sample(replace(sample, masks=None), 0, 8, 20, 20).boxes) == 1
    assert len(crop_sample(replace(sample, boxes=sample.boxes - 0.5, masks=None), 0, 8, 20, 20).boxes) == 0


@given(boxes_in_64x48, st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_jitter_stays_in_step(boxes, seed):
    rng = np.random.default_rng(seed)
    found = LargeScaleJitter((0.2, 3.0), 40, True)(markers(boxes), rng)
    height, width = found.size
    assert max(height, width) <= 40 and found.masks.shape == (len(found.boxes), height, width)
    assert (found.boxes >= 0).all() and (found.boxes <= [width, height] * 2).all()
    for row, mask in enumerate(found.masks):
        np.testing.assert_array_equal(found.boxes[row], extent(mask))


def test_jitter_covers_its_scales_and_places():
    jitter, rng = LargeScaleJitter((0.5, 2.0), 32, True), np.random.default_rng(0)
    results = [jitter(markers(BOXES), rng) for _ in range(100)]
    widths = [sample.size[1] for sample in results]
    assert min(widths) < 20 and widths.count(32) > 40  # scale 0.5 gives 16; from 1 on the canvas is full
    assert {tuple(sample.labels.tolist()) for sample in results} >= {(0, 1), (1, 2), (0, 1, 2)}


# Pipelines


def apply(sample: Sample, seed: int = 0, **augment) -> Sample:
    augment = {"flip": 0.0, "min_sizes": [min(sample.size)]} | augment
    transform = build_train_transforms(AugmentConfig(**augment), InputConfig(min_size=48, max_size=64), NO_DATA)
    return transform(sample, np.random.default_rng(seed))


def test_short_sides_are_drawn_from_all_and_flips_by_chance():
    results = [apply(markers(BOXES), seed, min_sizes=(24, 36, 48), flip=0.3) for seed in range(60)]
    assert {min(sample.size) for sample in results} == {24, 36, 48}
    flipped = sum(sample.boxes[0, 0] > sample.boxes[2, 0] for sample in results)
    assert 8 < flipped < 30


def test_short_sides_follow_the_model():
    """Of a model of 48 pixels, at scales of 0.8 to 1."""
    for scales, sides in (((1.0, 1.0), {48}), ((0.8, 1.0), set(range(38, 49)))):
        found = {min(apply(markers(BOXES), seed, min_sizes=None, scales=scales).size) for seed in range(90)}
        assert found == sides
    with pytest.raises(ValueError, match="scales must be a range, got .1.0, 0.8."):
        AugmentConfig(scales=(1.0, 0.8))


@pytest.mark.parametrize("entry", [
    {"HorizontalFlip": {"p": 1}}, {"VerticalFlip": {"p": 1}}, {"Transpose": {"p": 1}}, {"RandomRotate90": {"p": 1}},
    {"D4": {"p": 1}}, {"RandomCrop": {"height": 30, "width": 40, "p": 1}},
    {"PadIfNeeded": {"min_height": 60, "min_width": 80, "p": 1}},
    {"OneOf": {"transforms": [{"HorizontalFlip": {"p": 1}}, {"VerticalFlip": {}}], "p": 1}}])
@pytest.mark.parametrize("seed", range(4))
def test_albumentations_are_exact(entry, seed):
    from detres.data.augment import Albumentations

    found = Albumentations([entry], [(0, 1)])(markers(BOXES), np.random.default_rng(seed))
    assert_in_step(found)


def test_a_rotated_box_fits_its_mask():
    from detres.data.augment import Albumentations

    rotate = Albumentations([{"Rotate": {"limit": [30, 30], "p": 1}}])
    found = rotate(markers([(20, 20, 40, 30)]), np.random.default_rng(0))
    assert found.boxes[0].tolist() == extent(found.masks[0])
    loose = rotate(markers([(20, 20, 40, 30)], masks=False), np.random.default_rng(0))
    assert (loose.boxes[0, :2] <= found.boxes[0, :2] + 1).all() and (loose.boxes[0, 2:] >= found.boxes[0, 2:] - 1).all()


def test_mirrors_of_albumentations_exchange_keypoints():
    from detres.data.augment import Albumentations

    for entry, mirrored in (({"HorizontalFlip": {"p": 1}}, True), ({"VerticalFlip": {"p": 1}}, True),
                            ({"Rotate": {"limit": [20, 20], "p": 1}}, False), ({"Blur": {"p": 1}}, False)):
        found = Albumentations([entry], [(0, 1)])(markers([(20, 20, 40, 30)]), np.random.default_rng(0))
        assert found.keypoints[0, :, 2].tolist() == ([0, 2] if mirrored else [2, 0])
    ours = flip(markers(BOXES), [(0, 1)])
    theirs = Albumentations([{"HorizontalFlip": {"p": 1}}], [(0, 1)])(markers(BOXES), np.random.default_rng(0))
    assert_same(theirs, ours)


def test_keypoints_that_a_pipeline_leaves_out_are_not_labelled():
    """Distortions leave out what left the image, rather than to say where it is."""
    sample, lost = markers([(0, 0, 20, 20), (20, 20, 40, 30)]), 0
    for seed in range(20):
        found = apply(sample, seed, albumentations=[{"ThinPlateSpline": {"p": 1}}, {"HorizontalFlip": {"p": 1}}])
        labelled = found.keypoints[..., 2] > 0
        assert not labelled[:, 0].any() and not found.keypoints[~labelled].any(), "left and right change places"
        lost += len(labelled) - labelled.sum()
    assert lost > 3


def test_pixel_transforms_leave_the_objects_alone():
    sample = replace(markers(BOXES), boxes=np.array([[3.3, 5.1, 3.9, 5.6], [0, 0, 64, 48], [1, 2, 3, 4.7]], np.float32))
    found = apply(sample, albumentations=[{"HueSaturationValue": {"p": 1}}, {"GaussNoise": {"p": 1}}])
    assert (found.image != sample.image).any()
    assert_same(replace(found, image=sample.image), sample)


def test_an_image_without_objects_goes_through_everything():
    for augment in ({}, {"jitter": (0.5, 2.0), "crop_size": 32}, {"flip": 1.0},
                    {"albumentations": [{"RandomCrop": {"height": 30, "width": 30, "p": 1}}, {"Rotate": {"p": 1}}]}):
        found = apply(markers([]), **augment)
        assert found.boxes.shape == (0, 4) and found.masks.shape == (0, *found.size)
        assert found.keypoints.shape == (0, 2, 3)


def test_chance_comes_from_the_generator_alone():
    entries = [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}, {"GaussNoise": {"p": 0.5}},
               {"RandomResizedCrop": {"size": [48, 64], "p": 0.5}}]
    results = [apply(markers(BOXES), seed, albumentations=entries) for seed in range(20)]
    np.random.seed(1)
    for seed, sample in enumerate(results):
        assert_same(apply(markers(BOXES), seed, albumentations=entries), sample)
    assert len({sample.image.tobytes() for sample in results}) > 12
    flips = [apply(markers(BOXES), seed, albumentations=entries[:2]).boxes[0] for seed in range(40)]
    assert len({(box[0] > 32, box[1] > 24) for box in flips}) == 4  # the two do not draw the same number


@pytest.mark.parametrize(("entries", "message"), [
    ([{"HorizontalFlop": {}}], r"albumentations\[0\] must name a transform .* Did you mean 'HorizontalFlip'"),
    ([{"Blur": {"blur_limt": 3}}], r"albumentations\[0\].Blur must have known .*Did you mean 'blur_limit'"),
    ([{"Blur": {}}, {"Blur": {"p": "often"}}], r"\[1\].Blur must have valid parameters, got {'p': 'often'}"),
    ([{"OneOf": {"transforms": [{"Nothing": {}}]}}], r"\[0\].OneOf.transforms\[0\] must name"),
    ([{"OneOf": {"transforms": []}}], "must be a list of transforms"),
    ([{"Blur": {}, "CLAHE": {}}], "one name with its parameters"), ([{"Blur": 3}], "one name with its parameters")])
def test_pipelines_that_cannot_be_built(entries, message):
    with pytest.raises(ValueError, match=message):
        apply(markers(BOXES), albumentations=entries)


def test_advice_to_use_another_is_no_error():
    for name in ("ShiftScaleRotate", "PiecewiseAffine"):
        assert len(apply(markers(BOXES), albumentations=[{name: {"p": 1}}]).boxes)
    with pytest.raises(ValueError, match="must have valid parameters.* kernel sizes must be odd"):
        apply(markers(BOXES), albumentations=[{"Blur": {"blur_limit": 4}}])


@pytest.mark.parametrize(("entry", "message"), [
    ({"Normalize": {"p": 1}}, "must give a uint8 image"),
    ({"RandomCrop": {"height": 300, "width": 30, "p": 1}}, "must apply to every image, got CropSizeError.*64 x 48 px")])
def test_pipelines_that_fail_on_an_image(entry, message):
    with pytest.raises(ImageError, match=message):
        apply(markers(BOXES), albumentations=[entry])
