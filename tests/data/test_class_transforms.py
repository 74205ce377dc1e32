"""What classifiers see of an image: training crops, the views of tests, colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from detres.config import ClassAugmentConfig, EvalConfig, InputConfig, SourceConfig
from detres.data.class_dataset import load_class_dataset
from detres.data.class_transforms import (COLOUR_DIRECTIONS, COLOUR_VARIANCES, build_test_views, build_train_view,
                                          resized_window, shift_colours)
from detres.data.images import read_image
from detres.data.transforms import resize_image

SIZES = [(60, 91), (83, 57), (64, 64), (40, 45), (301, 64)]


def noise(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(height).integers(0, 256, (height // 3, width // 3, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height)))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Tests


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("side", "crop"), [(64, 56), (57, 48), (48, 48)])
def test_crops_are_torchvisions(size, side, crop):
    image = noise(*size)
    resized = TF.resize(Image.fromarray(image), side)
    model_input = InputConfig(min_size=side, crop=crop)
    (centre,) = build_test_views(EvalConfig(), model_input)(image, rng())
    np.testing.assert_array_equal(centre, np.asarray(TF.center_crop(resized, crop)))
    five = build_test_views(EvalConfig(crops=10), model_input)(image, rng())
    for ours, theirs in zip(five, TF.ten_crop(resized, crop)[:5], strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_whole_images_at_several_sizes():
    test = build_test_views(EvalConfig(crops="dense", test_scales=(32, 48, 75)), InputConfig(crop=32))
    views = test(noise(60, 91), rng())
    assert [view.shape for view in views] == [(32, 48, 3), (48, 72, 3), (75, 113, 3)]
    np.testing.assert_array_equal(views[1], np.asarray(TF.resize(Image.fromarray(noise(60, 91)), 48)))


@pytest.mark.parametrize(("build", "message"), [
    (lambda: build_test_views(EvalConfig(), InputConfig(min_size=256)), "smallest short side, 256 px, got null"),
    (lambda: build_test_views(EvalConfig(crops="dense", test_scales=(99,)), InputConfig(crop=224)), "99 px, got 224"),
    (lambda: build_train_view(ClassAugmentConfig(scales=(99, 256)), InputConfig(crop=224)), "99 px, got 224"),
    (lambda: build_test_views(EvalConfig(test_scales=(224,)), InputConfig(crop=224)), "eval.crops=dense")])
def test_crops_must_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Training


@pytest.mark.parametrize("size", SIZES)
def test_a_window_is_a_crop_of_the_whole(size):
    image, whole_size = noise(*size), (70, 88)
    whole = resize_image(image, whole_size, True)
    for y, x in ((0, 0), (38, 56), (11, 23)):
        window = resized_window(image, whole_size, y, x, 32)
        difference = np.abs(whole[y:y + 32, x:x + 32].astype(int) - window)
        assert difference.max() <= 2 and difference.mean() < 0.2


@pytest.mark.parametrize(("pad", "antialias"), [(0, True), (0, False), (4, True), (4, False)])
def test_training_view_step_by_step(pad, antialias):
    """Resize, pad, crop, mirror, in plain Python with the same draws."""
    augment = ClassAugmentConfig(scales=(40, 50), pad=pad, flip=0.5)
    view = build_train_view(augment, InputConfig(crop=36, antialias=antialias, mean=(7, 8, 9)))
    image = noise(60, 91)
    for seed in range(8):
        draws = rng(seed)
        side = draws.integers(40, 51)
        size = (side, 91 * side // 60)
        padded = np.empty((size[0] + 2 * pad, size[1] + 2 * pad, 3))
        padded[:] = (7, 8, 9)
        padded[pad:pad + size[0], pad:pad + size[1]] = resize_image(image, size, antialias)
        y = draws.integers(size[0] + 2 * pad - 36 + 1)
        x = draws.integers(size[1] + 2 * pad - 36 + 1)
        expected = padded[y:y + 36, x:x + 36]
        if draws.random() < 0.5:
            expected = expected[:, ::-1]
        (found,) = view(image, rng(seed))
        assert found.dtype == (np.uint8 if antialias else np.float32)
        np.testing.assert_allclose(found, expected, atol=2 if antialias and not pad else 1e-4)


def test_scales_places_and_mirrors_are_uniform():
    """Of a ramp of brightness the slope tells the scale, its sign the mirror and its beginning the place."""
    ramp = np.broadcast_to(2 * np.arange(120, dtype=np.uint8)[:, None], (120, 120, 3)).copy()
    view = build_train_view(ClassAugmentConfig(scales=(40, 80)), InputConfig(crop=20))
    rows = np.array([view(ramp, rng(seed))[0][10, [4, 15], 0] for seed in range(3000)], float)
    slope = (rows[:, 1] - rows[:, 0]) / 11  # 2 * 120 / side
    side = 240 / np.abs(slope)
    assert 38 < side.min() < 42 and 78 < side.max() < 84  # the slope is known to one level in 11 pixels
    assert np.abs(np.histogram(side, [40, 50, 60, 70, 80])[0] / len(side) - 0.25).max() < 0.035
    assert abs((slope < 0).mean() - 0.5) < 0.03
    left = rows.min(1) * side / 240 - 4.5  # between 0 and side - 20
    assert abs((left / (side - 20)).mean() - 0.5) < 0.03 and abs((left / (side - 20)).std() - 12 ** -0.5) < 0.02


# Colours


def test_colours_are_shifted_along_the_components():
    image = noise(12, 15)
    for seed in range(5):
        alphas = rng(seed).normal(0, 1, 3)
        shift = [255 * sum(COLOUR_DIRECTIONS[channel, i] * alphas[i] * COLOUR_VARIANCES[i] for i in range(3))
                 for channel in range(3)]
        expected = [[[min(255, max(0, round(int(value) + step))) for value, step in zip(pixel, shift)] for pixel in row]
                    for row in image]
        np.testing.assert_array_equal(shift_colours(image, alphas), expected)
        np.testing.assert_allclose(shift_colours(image.astype(np.float32), alphas), image + shift, rtol=1e-5, atol=1e-3)


def test_colours_of_training_have_the_stated_spread():
    """Covariance of the shifts: (0.1 * variance)^2 along each component."""
    grey = np.full((8, 8, 3), 120, np.uint8)
    view = build_train_view(ClassAugmentConfig(pca_colour=0.1), InputConfig(min_size=8, crop=8, antialias=False))
    shifts = np.array([view(grey, rng(seed))[0][0, 0] for seed in range(4000)]) / 255
    measured = COLOUR_DIRECTIONS.T @ np.cov(shifts.T) @ COLOUR_DIRECTIONS
    np.testing.assert_allclose(measured.diagonal() ** 0.5, 0.1 * COLOUR_VARIANCES, rtol=0.05)
    assert len(np.unique(view(grey, rng())[0].reshape(-1, 3), axis=0)) == 1  # one shift for the whole image
    (plain,) = build_train_view(ClassAugmentConfig(), InputConfig(min_size=8, crop=8))(grey, rng())
    assert (plain == 120).all()


def test_components_are_orthonormal():
    np.testing.assert_allclose(COLOUR_DIRECTIONS.T @ COLOUR_DIRECTIONS, np.eye(3), atol=2e-3)


@pytest.mark.data
def test_components_are_those_of_imagenet_in_units_of_one(shared_data):
    data = load_class_dataset(SourceConfig(path=str(shared_data / "imagenette224_mini")), "train")
    pixels = np.concatenate([read_image(path)[::16, ::16].reshape(-1, 3) for path in data.paths[::3]]) / 255
    values, vectors = np.linalg.eigh(np.cov(pixels.T))
    np.testing.assert_allclose(values[::-1], COLOUR_VARIANCES, rtol=0.35)
    cosines = np.abs((vectors[:, ::-1] * COLOUR_DIRECTIONS).sum(0))
    assert cosines.min() > 0.97 and torch.tensor(cosines).argmax() == 0
