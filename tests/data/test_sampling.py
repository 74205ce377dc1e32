"""Which images come when: as the formulas say, and the same again from any step, on any rank."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detres.config import SamplingConfig
from detres.data.sampling import (ClassBalanced, Key, RepeatFactor, Shuffle, TrainingBatches, build_order, occurrences,
                                  sample_seed)

# Images 2, 3, 5, 7 and 8 train. Class 0 is in all but the last, class 1 in two, class 4 in one; image 3 has two of
# class 0, the last has none.
NUMBERS = [2, 3, 5, 7, 8]
OBJECTS = np.array([(2, 0), (3, 0), (3, 0), (3, 1), (5, 0), (5, 1), (7, 0), (7, 4), (9, 4), (9, 1)])


def order(name: str, **options):
    return build_order(SamplingConfig(name=name, **options), NUMBERS, *OBJECTS.T)


def keys(order, steps: int, start: int = 0, batch_size: int = 4, **options) -> list[list[Key]]:
    options = {"seed": 3, "rank": 0, "world_size": 1} | options
    return list(itertools.islice(TrainingBatches(order, batch_size, start_step=start, **options), steps))


def test_repeat_factors_are_lviss():
    """By hand: f = 4/5, 2/5, 1/5."""
    found = order("repeat_factor", repeat_thresh=0.6)
    np.testing.assert_allclose(found.factors, [1, np.sqrt(0.6 / 0.4), np.sqrt(0.6 / 0.4), np.sqrt(0.6 / 0.2), 1])
    assert (order("repeat_factor", repeat_thresh=0.001).factors == 1).all()


def test_images_come_as_often_as_their_factors_say():
    found = order("repeat_factor", repeat_thresh=0.6)
    epochs = [found.epoch(0, epoch) for epoch in range(3000)]
    for epoch in epochs[:100]:  # in each epoch rounded down or up
        counts = [int((epoch == number).sum()) for number in NUMBERS]
        assert all(np.floor(factor) <= count <= np.ceil(factor) for factor, count in zip(found.factors, counts))
    assert [found.length(0, epoch) for epoch in range(50)] == [len(epoch) for epoch in epochs[:50]]
    counts = Counter(np.concatenate(epochs).tolist())
    np.testing.assert_allclose([counts[number] / 3000 for number in NUMBERS], found.factors, atol=0.03)
    assert len({tuple(epoch) for epoch in epochs[:50]}) > 45


def test_class_balanced_draws_classes_alike():
    """P(image) = sum over its classes of 1 / (classes * images of the class): class 0 has four, 1 two, 4 one."""
    found = order("class_balanced")
    drawn = np.concatenate([found.epoch(0, epoch) for epoch in range(4000)])
    assert len(drawn) == 4000 * len(NUMBERS) == sum(found.length(0, epoch) for epoch in range(4000))
    expected = np.array([1 / 4, 1 / 4 + 1 / 2, 1 / 4 + 1 / 2, 1 / 4 + 1, 0]) / 3
    np.testing.assert_allclose([(drawn == number).mean() for number in NUMBERS], expected, atol=0.02)


def test_without_objects_there_are_no_classes():
    for name in ("repeat_factor", "class_balanced"):
        with pytest.raises(ValueError, match="sampling.name must be shuffle for images without objects"):
            build_order(SamplingConfig(name=name), NUMBERS, np.zeros(0, int), np.zeros(0, int))


ORDERS = {"shuffle": Shuffle(NUMBERS),
          "repeat_factor": RepeatFactor(np.array(NUMBERS), np.array([1, 2.3, 1, 0.2, 1.5])),
          "class_balanced": ClassBalanced(NUMBERS, [np.array([2, 3]), np.array([3, 7, 8])])}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("wide", [None, np.array([0, 0, 1, 0, 0, 1, 0, 0, 1], bool)])
def test_resumed_runs_and_ranks_draw_the_same(name, wide):
    whole = keys(ORDERS[name], 30, wide=wide)
    for start in (1, 2, 7, 29):
        assert keys(ORDERS[name], 30 - start, start, wide=wide) == whole[start:]
    first, second = (keys(ORDERS[name], 30, wide=wide, rank=rank, world_size=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second)] == whole
    assert keys(ORDERS[name], 30, wide=wide, seed=4) != whole
    flat = list(itertools.chain(*whole))
    assert len(set(flat)) == len(flat) == len({sample_seed(3, key) for key in flat})  # each has its own chance
    if wide is not None:
        assert all(len({bool(wide[key.number]) for key in batch}) == 1 for batch in whole)


@given(st.lists(st.integers(0, 5)))
def test_occurrences(numbers):
    assert occurrences(np.array(numbers, int)).tolist() == [numbers[:place].count(x) for place, x in enumerate(numbers)]


def test_images_are_combined_up_to_a_step():
    for start in (0, 2):
        found = keys(Shuffle(NUMBERS), 6 - start, start, mix_steps=4)
        assert [{key.mixes for key in batch} for batch in found] == [{True}] * (4 - start) + [{False}] * 2
    assert all(key.mixes for batch in keys(Shuffle(NUMBERS), 3) for key in batch)
