"""Batches for classifiers: what is in them, and that they depend on seed and step alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detres.build import build_normalize
from detres.config import Config
from detres.data.class_dataset import ClassDataset
from detres.data.class_loader import build_class_loader
from detres.data.class_transforms import build_test_views, build_train_view
from detres.data.images import ImageError
from detres.data.sampling import Key, sample_seed
from detres.structures import Batch

SIZES = [(40, 60), (50, 40), (40, 60), (36, 36), (40, 60)]
AUGMENT = {"scales": [34, 50], "pca_colour": 0.5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ClassDataset:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for k in range(10):
        paths.append(str(folder / f"{k}.png"))
        Image.fromarray(rng.integers(0, 256, (*SIZES[k % 5], 3), np.uint8)).save(paths[-1])
    return ClassDataset("tiny", ("a", "b", "c"), np.arange(10) % 3, tuple(paths))


def config_of(workers: int = 0, seed: int = 3, **tests) -> Config:
    return Config.model_validate({
        "model": {"name": "classifier", "input": {"min_size": 36, "crop": 32}}, "eval": tests, "train": {"seed": seed},
        "data": {"workers": workers, "classification": AUGMENT}})


def batches(dataset: ClassDataset, count: int | None = None, config: Config | None = None, **options) -> list[Batch]:
    loader = build_class_loader(dataset, config or config_of(), torch.device("cpu"),
                                **{"batch_size": 4, "training": True, **options})
    return list(itertools.islice(loader, count))


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.image_ids == b.image_ids and a.paths == b.paths and torch.equal(a.targets.labels, b.targets.labels)
    for x, y in ((a.images.pixels, b.images.pixels), (a.images.sizes, b.images.sizes),
                 (a.original_sizes, b.original_sizes)):
        assert x.dtype == y.dtype and torch.equal(x, y)


def channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def test_training_batches(dataset):
    """Every image once an epoch, each by its own generator, which follows from seed, epoch and number."""
    view = build_train_view(config_of().data.classification, config_of().model.input)
    ids = []
    for batch in batches(dataset, 5):
        assert batch.images.pixels.shape == (4, 3, 32, 32) and batch.images.pixels.dtype == torch.uint8
        assert batch.images.sizes.tolist() == [[32, 32]] * 4 and batch.images.pyramid == ()
        for pixels, number, label, path in zip(batch.images.pixels, batch.image_ids, batch.targets.labels, batch.paths):
            rng = np.random.default_rng(sample_seed(3, Key(len(ids) // 10, number)))
            assert torch.equal(pixels, channels_first(view(np.asarray(Image.open(path)), rng)[0]))
            assert label == number % 3 and path == dataset.paths[number]
            ids.append(number)
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10)) and ids[:10] != ids[10:]


@pytest.mark.parametrize("start", [1, 3, 6])
def test_start_step_is_as_good_as_having_run(dataset, start):
    for a, b in zip(batches(dataset, 8)[start:], batches(dataset, 8 - start, start_step=start), strict=True):
        assert_equal(a, b)


def test_workers_and_ranks_change_nothing(dataset):
    whole = batches(dataset, 3)
    for a, b in zip(whole, batches(dataset, 3, config_of(workers=2)), strict=True):
        assert_equal(a, b)
    halves = [batches(dataset, 3, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, first, second in zip(whole, *halves):
        assert torch.equal(batch.images.pixels, torch.cat([first.images.pixels, second.images.pixels]))
        assert batch.image_ids == first.image_ids + second.image_ids
    assert not torch.equal(batches(dataset, 1, config_of(seed=4))[0].images.pixels, whole[0].images.pixels)
    with pytest.raises(ValueError, match="multiple of the number of processes, got 4 for 3"):
        batches(dataset, 1, world_size=3)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("is_in_memory", [True, False])
def test_padding_becomes_zero_in_the_model(dataset, order, is_in_memory):
    """Of an image of the mean colour nothing is left, its padding included, in whatever order the mean is given."""
    mean = (40.0, 80.0, 120.0)
    grey = np.empty((2, 32, 32, 3), np.uint8)
    grey[:] = mean if order == "rgb" else mean[::-1]
    data = ClassDataset("mean", ("a",), np.zeros(2, np.int64), pixels=grey)
    if not is_in_memory:
        paths = [Path(dataset.paths[0]).with_name(f"mean_{order}_{k}.png") for k in range(2)]
        for path, image in zip(paths, grey):
            Image.fromarray(image).save(path)
        data = ClassDataset("mean", ("a",), np.zeros(2, np.int64), tuple(map(str, paths)))
    model = {"name": "classifier", "input": {"min_size": 32, "crop": 32, "mean": mean, "channel_order": order}}
    config = Config.model_validate({"model": model, "data": {"workers": 0, "classification": {"pad": 9}}})
    for batch in batches(data, 4, config, batch_size=2):
        assert not build_normalize(config.model)(batch.images).any()


@pytest.mark.parametrize(("crops", "views"), [(1, 1), (10, 5)])
def test_crops_of_a_test(dataset, crops, views):
    config = config_of(crops=crops)
    found = batches(dataset, config=config, training=False)
    assert [batch.image_ids for batch in found] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    view = build_test_views(config.eval, config.model.input)
    for batch in found:
        images = [batch.images, *batch.images.pyramid]
        assert len(images) == views and batch.original_sizes.tolist() == [list(SIZES[i % 5]) for i in batch.image_ids]
        for row, path in enumerate(batch.paths):
            expected = view(np.asarray(Image.open(path)), np.random.default_rng(0))
            for got, crop in zip(images, expected, strict=True):
                assert torch.equal(got.pixels[row], channels_first(crop))
    ranks = [batches(dataset, config=config, training=False, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(i for rank in ranks for batch in rank for i in batch.image_ids) == list(range(10))


def test_whole_images_are_batched_by_size_and_never_padded(dataset):
    found = batches(dataset, config=config_of(crops="dense", test_scales=[32, 48]), training=False)
    assert sorted(i for batch in found for i in batch.image_ids) == list(range(10))
    assert [len(batch.image_ids) for batch in found] == [4, 2, 2, 2]
    for batch in found:
        images = [batch.images, *batch.images.pyramid]
        assert [min(view.pixels.shape[2:]) for view in images] == [32, 48]
        for view in images:
            assert (view.sizes == torch.tensor(view.pixels.shape[2:])).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(dataset, tmp_path, workers):
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(dataset.paths[0]).read_bytes()[:500])
    with pytest.raises(ImageError, match="cut.png must be readable"):
        batches(ClassDataset("cut", ("a",), np.zeros(1, np.int64), (str(cut),)), config=config_of(workers=workers),
                training=False)


def test_what_does_not_fit():
    held = ClassDataset("held", ("a",), np.zeros(2, np.int64), pixels=np.zeros((2, 36, 36, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images held in memory \(held\) must have .*scales=null"):
        batches(held, 1)
    with pytest.raises(ValueError, match="must have images, got none"):
        batches(ClassDataset("none", ("a",), np.zeros(0, np.int64)), 1)
