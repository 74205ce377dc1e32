"""10-crop and fully convolutional tests and ensembles against loops in plain Python."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detres.build import build_model
from detres.config import Config, ModelConfig
from detres.evaluation.class_tests import build_class_test
from detres.models.classifier import Classifier, ClassifierEnsemble
from detres.structures import ImageBatch

CROP = 64  # a map of 2 x 2


def make_model(seed: int, classes: int = 4) -> Classifier:
    torch.manual_seed(seed)
    config = ModelConfig.model_validate({"name": "classifier", "backbone": {
        "depth": 18, "width": 8, "weights": None, "norm": "gn", "freeze_stages": 0}})
    model = build_model(config, classes).eval()
    model.fc.weight.data *= 3  # so that probabilities are far from uniform
    return model


def make_images(*sizes: tuple[int, int], n: int = 3) -> ImageBatch:
    """One view of each size."""
    views = [ImageBatch(torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8), torch.tensor([size] * n))
             for size in sizes]
    return replace(views[0], pyramid=tuple(views[1:]))


def alone(images: ImageBatch, row: int) -> ImageBatch:
    return ImageBatch(images.pixels[row:row + 1], images.sizes[row:row + 1])


def class_test(crops):
    return build_class_test(Config.model_validate({"eval": {"crops": crops}, "model": {"input": {"crop": CROP}}}))


@pytest.fixture(scope="module")
def model() -> Classifier:
    return make_model(0)


def mirrored(images: ImageBatch) -> ImageBatch:
    columns = [images.pixels[..., x] for x in reversed(range(images.pixels.shape[-1]))]
    return replace(images, pixels=torch.stack(columns, -1))


@torch.no_grad()
def test_one_crop_is_the_models_own_prediction(model):
    images = make_images((CROP, CROP))
    assert torch.equal(class_test(1)(model, images), model(images))


@torch.no_grad()
def test_ten_crops_are_ten_predictions_averaged(model):
    images = make_images(*[(CROP, CROP)] * 5)
    found = class_test(10)(model, images).softmax(1)
    for row in range(3):
        probabilities = []
        for view in (images, *images.pyramid):
            one = alone(view, row)
            probabilities += [model(one).softmax(1)[0], model(mirrored(one)).softmax(1)[0]]
        expected = sum(probabilities) / len(probabilities)
        assert len(probabilities) == 10
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)
        assert (found[row] - probabilities[0]).abs().max() > 0.01


def score_map(model: Classifier, images: ImageBatch, window: int = 2) -> list[Tensor]:
    """Scores of one image at each place of the pool of a crop, whose map is `window` wide, by loops."""
    features = model.features(images)[0]  # (C, H, W)
    height, width = features.shape[1:]
    places = itertools.product(range(height - window + 1), range(width - window + 1))
    scores = []
    for y, x in places:
        pixels = [features[:, y + i, x + j] for i in range(window) for j in range(window)]
        pooled = sum(pixels) / len(pixels)
        scores.append(torch.stack([(pooled * row).sum() + bias for row, bias in zip(model.fc.weight, model.fc.bias)]))
    return scores


@torch.no_grad()
def test_fully_convolutional_scores_are_averaged_over_places_and_scales(model):
    sizes = [(64, 100), (96, 150), (130, 203)]
    images = make_images(*sizes)
    found = class_test("dense")(model, images).softmax(1)
    for row in range(3):
        probabilities, places = [], []
        for view in (images, *images.pyramid):
            for one in (alone(view, row), mirrored(alone(view, row))):
                scores = score_map(model, one)
                places.append(len(scores))
                probabilities.append((sum(scores) / len(scores)).softmax(0))
        assert places == [1 * 3, 1 * 3, 2 * 4, 2 * 4, 4 * 6, 4 * 6]
        torch.testing.assert_close(found[row], sum(probabilities) / 6, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_of_a_crop_the_fully_convolutional_form_is_the_network(model):
    images = make_images((CROP, CROP))
    torch.testing.assert_close(model.dense_logits(images, CROP), model(images))


@torch.no_grad()
def test_the_map_of_a_crop_is_rounded_up(model):
    """As strides do: 50 pixels have a map of 2 x 2, 97 one of 4 x 4."""
    images = make_images((100, 150), n=1)
    for crop, window in ((50, 2), (64, 2), (65, 3), (97, 4)):
        assert model.features(make_images((crop, crop))).shape[2:] == (window, window)
        scores = score_map(model, images, window)
        torch.testing.assert_close(model.dense_logits(images, crop)[0], sum(scores) / len(scores))


@torch.no_grad()
@pytest.mark.parametrize("crops", [1, 10, "dense"])
def test_ensembles_average_probabilities(model, crops):
    images, test = make_images((CROP, CROP), (CROP, CROP)), class_test(crops)
    members = [model, make_model(1), make_model(2)]
    found = test(ClassifierEnsemble(members), images).softmax(1)
    each = [test(member, images).softmax(1) for member in members]
    torch.testing.assert_close(found, sum(each) / 3, atol=1e-5, rtol=1e-4)
    assert all((found - probabilities).abs().max() > 0.01 for probabilities in each)
    same = test(ClassifierEnsemble([model, model]), images).softmax(1)
    torch.testing.assert_close(same, each[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_probabilities_of_nothing_do_not_become_infinite(model):
    sure = make_model(0)
    sure.fc.weight.data *= 1000
    logits = class_test(10)(sure, make_images((CROP, CROP)))
    assert logits.isfinite().all()
