"""CIFAR-10 and 100, and small image sets like them: held whole in memory, on the device that trains.

Batches are a pure function of (seed, step), as `data.loader`'s are; pixels never leave the device, and chance is drawn
once an epoch, so that a step waits for nothing. Section 4.2 of arXiv 1512.03385.

Legend: n images of the data set, N of a batch, (H, W) their size.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from detres.data.class_dataset import ClassDataset
from detres.data.dataset import Role
from detres.structures import Batch, ClassTargets, ImageBatch

HELD_OUT = 5000  # images that `train45k` leaves to `val5k`
SPLITS = ("train", "train45k", "val5k", "test")


def is_root(folder: Path) -> bool:
    return _format(folder) is not None or bool(_zips(folder))


def _format(folder: Path) -> type[CIFAR10] | None:
    return next((kind for kind in (CIFAR10, CIFAR100) if (folder / kind.base_folder).is_dir()), None)


def _zips(folder: Path) -> dict[str, Path]:
    found = {name: sorted(folder.glob(f"*{name}*.zip")) for name in ("train", "test")}
    return {name: paths[0] for name, paths in found.items() if paths}


def read_cifar(folder: Path, role: Role, split: str | None = None) -> ClassDataset:
    """`split`: train (50,000 images), test, or train45k and val5k, which part the training set at random, always the
    same way (section 4.2 says 45k/5k, not which). The role val means test: results are reported on it.
    """
    split = split or {"train": "train"}.get(role, "test")
    if split not in SPLITS:
        raise FileNotFoundError(f"split must be one of {', '.join(SPLITS)}, got '{split}' ({folder}).")
    file = "test" if split == "test" else "train"
    kind = _format(folder)
    pixels, labels, classes = _zip(folder, file) if kind is None else _batches(folder, kind, file == "train")
    if split in ("train45k", "val5k"):
        held_out, rest = np.split(np.random.default_rng(0).permutation(len(labels)), [HELD_OUT])
        rows = np.sort(rest if split == "train45k" else held_out)
        pixels, labels = pixels[rows], labels[rows]
    return ClassDataset(f"{folder.name} {split}", classes, labels, pixels=pixels)


def _batches(folder: Path, kind: type[CIFAR10], train: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    data = kind(folder, train=train)  # checks the files' checksums
    return data.data, np.array(data.targets, np.int64), tuple(data.classes)


def _zip(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images at .../<class>/<file> of a zip file."""
    zips = _zips(folder)
    if name not in zips:
        raise FileNotFoundError(f"folder must hold *{name}*.zip, got {', '.join(p.name for p in zips.values())} "
                                f"({folder}).")
    with zipfile.ZipFile(zips[name]) as file:
        names = sorted(entry for entry in file.namelist() if entry.count("/") > 0 and not entry.endswith("/"))
        images = [np.asarray(Image.open(io.BytesIO(file.read(entry))).convert("RGB")) for entry in names]
    sizes = {image.shape for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images of {zips[name]} must have one size to be held in memory, got {len(sizes)} sizes. "
                         "Unpack it, and train on the folder.")
    folders = [entry.split("/")[-2] for entry in names]
    classes = tuple(sorted(set(folders)))
    return np.stack(images), np.array([classes.index(each) for each in folders], np.int64), classes


class MemoryLoader:
    """Batches of this rank from images held on `device`.

    Training: endless, from `start_step` on; each epoch in a new order, what it leaves over going with the next one.
    Images larger than `size` are first averaged down to it. In training each is padded by `pad` pixels of `fill`,
    cropped at random to its size, and flipped with probability `flip`.
    Evaluation: one pass in order.
    """

    def __init__(self, dataset: ClassDataset, device: torch.device, *, batch_size: int, training: bool, size: int = 32,
                 pad: int = 0, fill: tuple[float, ...] = (0, 0, 0), flip: float = 0.0, seed: int = 0,
                 rank: int = 0, world_size: int = 1, start_step: int = 0):
        pixels = torch.from_numpy(dataset.pixels).to(device).permute(0, 3, 1, 2)
        if size < pixels.shape[2]:
            pixels = F.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True).round().byte()
        self.size, self.pad = tuple(pixels.shape[-2:]), pad if training else 0
        self.padded = torch.tensor(fill, device=device).round().byte().view(1, 3, 1, 1).repeat(
            len(pixels), 1, *(side + 2 * self.pad for side in self.size))
        self.padded[:, :, self.pad:self.pad + self.size[0], self.pad:self.pad + self.size[1]] = pixels
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.batch_size, self.training, self.flip, self.seed = batch_size, training, flip, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self._sizes = torch.tensor([self.size]).expand(batch_size, 2)
        self._device_sizes = self._sizes.to(device)
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        if self.training:
            raise TypeError("a training loader has no length: it is endless")
        return -(-len(self.labels[self.rank::self.world_size]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if not self.training:
            own = torch.arange(self.rank, len(self.labels), self.world_size, device=self.labels.device)
            still = torch.zeros(3, self.batch_size, dtype=torch.int64, device=own.device)
            yield from (self._batch(index, *still[:, :len(index)]) for index in own.split(self.batch_size))
            return
        share = self.batch_size // self.world_size
        step = self.start_step
        while True:
            start = step * self.batch_size + self.rank * share
            yield self._batch(*self._span(start, share))
            step += 1

    def _span(self, start: int, count: int) -> Tensor:
        """Draws (4, count) of the positions from `start` on, of epochs laid end to end."""
        parts = []
        while count:
            epoch, position = divmod(start, len(self.labels))
            part = self._epoch(epoch)[:, position:position + count]
            parts.append(part)
            start, count = start + part.shape[1], count - part.shape[1]
        return torch.cat(parts, 1)

    def _draw(self, epoch: int) -> Tensor:
        """Of one epoch: image, top, left and flip (4, n) int64 on the device."""
        rng, n = np.random.default_rng([self.seed, epoch]), len(self.labels)
        draws = [rng.permutation(n), *rng.integers(0, 2 * self.pad + 1, (2, n)), rng.random(n) < self.flip]
        return torch.from_numpy(np.stack([draw.astype(np.int64) for draw in draws])).to(self.labels.device)

    def _batch(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Batch:
        height, width = self.size
        rows = top[:, None] + torch.arange(height, device=index.device)  # (N, H)
        columns = torch.arange(width, device=index.device).expand(len(index), -1)
        columns = left[:, None] + torch.where(flip[:, None] == 1, columns.flip(1), columns)
        channels = torch.arange(3, device=index.device)
        pixels = self.padded[index[:, None, None, None], channels[:, None, None], rows[:, None, :, None],
                             columns[:, None, None, :]]
        n = len(index)
        return Batch(ImageBatch(pixels, self._device_sizes[:n]), ClassTargets(self.labels[index]), (), (),
                     self._sizes[:n])
