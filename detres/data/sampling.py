"""Which images make up which step: a pure function of (seed, step), the same on all ranks.

An order gives the numbers of each epoch; what an epoch leaves over goes with the next one. A run that resumes draws
numbers again, up to its step, but reads no image.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from detres.config import SamplingConfig


class Key(NamedTuple):
    """One appearance of one record."""

    epoch: int
    number: int  # of the record in the data set
    repeat: int = 0  # how often the epoch had it before
    mixes: bool = True  # whether it may be combined with other images


class Order(Protocol):
    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Numbers of records in their order."""

    def length(self, seed: int, epoch: int) -> int:
        """How many these are."""


@dataclass(frozen=True)
class Shuffle:
    """Each once an epoch."""

    numbers: Sequence[int]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        return np.asarray(self.numbers)[np.random.default_rng([seed, epoch]).permutation(len(self.numbers))]

    def length(self, seed: int, epoch: int) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class RepeatFactor:
    """LVIS (arXiv 1908.03195), section 3: each `factors[k]` times an epoch, its fraction rounded up or down by chance,
    anew in each epoch."""

    numbers: Sequence[int]
    factors: np.ndarray

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        return rng.permutation(np.repeat(self.numbers, self._counts(rng)))

    def length(self, seed: int, epoch: int) -> int:
        return int(self._counts(np.random.default_rng([seed, epoch])).sum())

    def _counts(self, rng: np.random.Generator) -> np.ndarray:
        whole = np.floor(self.factors)
        return (whole + (rng.random(len(whole)) < self.factors - whole)).astype(int)


@dataclass(frozen=True)
class ClassBalanced:
    """An epoch is as many draws as there are images: each a class, uniformly, then one of its images, uniformly.
    Images without objects do not come. (Class-aware sampling of arXiv 1512.05830, but with independent draws.)"""

    numbers: Sequence[int]
    of_class: Sequence[np.ndarray]  # numbers of the images of each class that has any

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        counts = np.array([len(found) for found in self.of_class])
        classes = rng.integers(len(counts), size=len(self.numbers))
        place = (rng.random(len(classes)) * counts[classes]).astype(int)
        return np.concatenate(self.of_class)[(counts.cumsum() - counts)[classes] + place]

    def length(self, seed: int, epoch: int) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class InBlocks:
    """`order` with the images of `window` shards before those of the next, so that shards are read one after another.

    `block` (N,) numbers each image's shard. Shards are drawn anew each epoch; their images come as mixed as they were.
    """

    order: Order
    block: np.ndarray
    window: int

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        numbers = self.order.epoch(seed, epoch)
        places = np.random.default_rng([seed, epoch, 1]).permutation(self.block.max() + 1)
        return numbers[np.argsort(places[self.block[numbers]] // self.window, kind="stable")]

    def length(self, seed: int, epoch: int) -> int:
        return self.order.length(seed, epoch)


def build_order(options: SamplingConfig, numbers: Sequence[int], images: np.ndarray, labels: np.ndarray) -> Order:
    """Of the records `numbers`, in ascending order. `images` and `labels` (A,): record and class of each object; those
    of other records do not count. Raises ValueError if there is no class to go by."""
    if options.name == "shuffle":
        return Shuffle(numbers)
    numbers, counts = np.asarray(numbers), np.isin(images, numbers)
    places, classes = np.unique([np.searchsorted(numbers, images[counts]), labels[counts]], axis=1).astype(int)
    if not len(classes):
        raise ValueError(f"data.sampling.name must be shuffle for images without objects, got {options.name}.")
    if options.name == "repeat_factor":
        return RepeatFactor(numbers, repeat_factors(places, classes, len(numbers), options.repeat_thresh))
    return ClassBalanced(numbers, [numbers[places[classes == label]] for label in np.unique(classes)])


def repeat_factors(places: np.ndarray, classes: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """(count,): r(i) = max over the classes c of image i of max(1, sqrt(threshold / f(c))), where f(c) is the fraction
    of images with c. `places` and `classes` are the pairs (i, c), each once."""
    frequency = np.bincount(classes) / count
    factors = np.ones(count)
    np.maximum.at(factors, places, np.sqrt(threshold / frequency[classes]))
    return factors


@dataclass(frozen=True)
class TrainingBatches:
    """The keys of each step's images, of this rank. `wide`: for each record, whether it is; None: shapes may mix.
    From `mix_steps` on, images are not combined; None: always."""

    order: Order
    batch_size: int
    seed: int
    rank: int
    world_size: int
    start_step: int
    wide: Sequence[bool] | None = None
    mix_steps: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(f"train.batch_size must be a multiple of the number of processes, got {self.batch_size} "
                             f"for {self.world_size}. Change one of them.")

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch_size // self.world_size
        for step, keys in enumerate(self._steps(), self.start_step):
            mixes = self.mix_steps is None or step < self.mix_steps
            yield [key._replace(mixes=mixes) for key in keys[self.rank * share:(self.rank + 1) * share]]

    def _steps(self) -> Iterator[list[Key]]:
        if self.wide is None:
            keys = _drawn(self.order, self.seed, self.start_step * self.batch_size)
            return iter(lambda: list(itertools.islice(keys, self.batch_size)), [])
        steps = _grouped(_drawn(self.order, self.seed), self.wide, self.batch_size)
        return itertools.islice(steps, self.start_step, None)


def in_order(numbers: Iterable[int], batch_size: int) -> list[list[Key]]:
    """Keys of one pass in order."""
    keys = [Key(0, number) for number in numbers]
    return [keys[start:start + batch_size] for start in range(0, len(keys), batch_size)]


def _drawn(order: Order, seed: int, start: int = 0) -> Iterator[Key]:
    """Endless, from the key `start` on."""
    for epoch in itertools.count():
        length = order.length(seed, epoch)
        if start < length:
            numbers = order.epoch(seed, epoch)
            for number, repeat in zip(numbers[start:].tolist(), occurrences(numbers)[start:].tolist()):
                yield Key(epoch, number, repeat)
        start = max(0, start - length)


def occurrences(numbers: np.ndarray) -> np.ndarray:
    """For each number, how often it was there before: 5 5 3 5 -> 0 1 0 2."""
    order = np.argsort(numbers, kind="stable")
    _, first, counts = np.unique(numbers[order], return_index=True, return_counts=True)
    found = np.empty(len(numbers), int)
    found[order] = np.arange(len(numbers)) - np.repeat(first, counts)
    return found


def _grouped(keys: Iterator[Key], wide: Sequence[bool], batch_size: int) -> Iterator[list[Key]]:
    """Batches of one shape, as they fill up."""
    filling: dict[bool, list[Key]] = {False: [], True: []}
    for key in keys:
        group = filling[wide[key.number]]
        group.append(key)
        if len(group) == batch_size:
            yield group.copy()
            group.clear()


def sample_seed(seed: int, key: Key) -> int:
    """63 bits for one appearance of one record."""
    parts = (seed, key.epoch, key.number, key.repeat)[:4 if key.repeat else 3]
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}Q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
