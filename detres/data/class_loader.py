"""Batches for classifiers: of image files in worker processes, or of images held on the device.

Both are a pure function of (seed, step), as `data.loader` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from detres.config import Config
from detres.data.cifar import MemoryLoader
from detres.data.class_dataset import ClassDataset
from detres.data.class_transforms import Views, build_test_views, build_train_view, mean_colour
from detres.data.images import ImageError, read_image, read_size
from detres.data.loader import Loader, pad_images
from detres.data.sampling import Key, Shuffle, TrainingBatches, in_order, sample_seed
from detres.structures import Batch, ClassTargets, ImageBatch


def build_class_loader(dataset: ClassDataset, config: Config, device: torch.device, *, batch_size: int, training: bool,
                       start_step: int = 0, rank: int = 0, world_size: int = 1) -> Loader | MemoryLoader:
    """Training: endless, from `start_step` on; `batch_size` images make a step over all ranks. Evaluation: one pass,
    `batch_size` images at a time, with the views of `eval.crops`: the first as `Batch.images`, the others as its
    `pyramid`; this rank gets every `world_size`-th image.

    Batches of image files are on the CPU, in pinned memory if `device` is a GPU. Raises ValueError for arguments or
    data that do not fit; while iterating, ImageError for a file that cannot be used.
    """
    options, model_input, seed = config.data.classification, config.model.input, config.train.seed
    ranks = {"rank": rank, "world_size": world_size}
    if not len(dataset):
        raise ValueError(f"data set must have images, got none ({dataset.name}). Check its path and split.")
    if dataset.pixels is not None:
        _check_in_memory(config, dataset)
        return MemoryLoader(dataset, device, batch_size=batch_size, training=training, size=model_input.min_size,
                            pad=options.pad, fill=mean_colour(model_input), flip=options.flip, seed=seed,
                            start_step=start_step, **ranks)
    numbers = range(rank, len(dataset), world_size)
    if training:
        views = build_train_view(options, model_input)
        batches = TrainingBatches(Shuffle(range(len(dataset))), batch_size, seed, start_step=start_step, **ranks)
    else:
        views = build_test_views(config.eval, model_input)
        batches = (_of_one_size(dataset, numbers, batch_size) if config.eval.crops == "dense"
                   else in_order(numbers, batch_size))
    return Loader(_ClassReader(dataset, views, seed), batches, config.data.workers, device.type == "cuda", seed)


def _check_in_memory(config: Config, dataset: ClassDataset) -> None:
    options, tests = config.data.classification, config.eval
    if options.scales is not None or options.pca_colour or tests.crops != 1:
        raise ValueError(f"images held in memory ({dataset.name}) must have data.classification.scales=null, "
                         f"data.classification.pca_colour=0 and eval.crops=1, got {options.scales}, "
                         f"{options.pca_colour} and {tests.crops}. Unpack them into class folders for these.")


def _of_one_size(dataset: ClassDataset, numbers: Sequence[int], batch_size: int) -> list[list[Key]]:
    """Batches of images of one size each: whole images are not padded, as padding would reach into their features."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        by_size.setdefault(read_size(dataset.paths[number]), []).append(number)
    return [keys for same in by_size.values() for keys in in_order(same, batch_size)]


@dataclass(frozen=True)
class _ClassReader:
    """Makes a batch of keys: this is what runs in the workers."""

    dataset: ClassDataset
    views: Views
    seed: int

    def __getitems__(self, keys: list[Key]) -> Batch | ImageError:
        numbers = [key.number for key in keys]
        paths = tuple(self.dataset.paths[number] for number in numbers)
        try:
            images = [read_image(path) for path in paths]
        except ImageError as error:  # given back rather than raised, as in data.loader
            return error
        views = [self.views(image, np.random.default_rng(sample_seed(self.seed, key)))
                 for image, key in zip(images, keys)]
        labels = torch.from_numpy(self.dataset.labels[numbers])
        return Batch(stack_views(views), ClassTargets(labels), tuple(numbers), paths,
                     torch.tensor([image.shape[:2] for image in images]))


def stack_views(views: Sequence[Sequence[np.ndarray]]) -> ImageBatch:
    """For each image its views, of one size for all images -> the first views, with the others as `pyramid`."""
    first, *others = (pad_images(same, size_divisor=1) for same in zip(*views))
    return replace(first, pyramid=tuple(others))
