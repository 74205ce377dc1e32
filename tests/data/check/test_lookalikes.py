"""Pairs of pictures that look the same, beside comparing all with all."""

from __future__ import annotations

import numpy as np
import pytest

from detres.data.check import lookalikes
from detres.data.check.lookalikes import BITS, CONTRAST, CORRELATION, SIDE, find_lookalikes


def naive(pictures: np.ndarray, groups: np.ndarray) -> tuple[list[int], list[int]]:
    """By the definition, pair by pair."""
    def alike(a: np.ndarray, b: np.ndarray) -> bool:
        if min(np.ptp(a), np.ptp(b)) < CONTRAST:
            return False
        small = [picture.reshape(8, 2, 8, 2).mean((1, 3)) for picture in (a, b)]
        signs = [np.concatenate([(s[:, 1:] > s[:, :-1]).ravel(), (s[1:] > s[:-1]).ravel()]) for s in small]
        return (signs[0] != signs[1]).sum() <= BITS and np.corrcoef(a.ravel(), b.ravel())[0, 1] >= CORRELATION

    own, other = [-1] * len(pictures), [-1] * len(pictures)
    for later in range(len(pictures)):
        for earlier in reversed(range(later)):
            if alike(pictures[later].astype(float), pictures[earlier].astype(float)):
                (own if groups[later] == groups[earlier] else other)[later] = earlier
    return own, other


@pytest.mark.parametrize("blocks", [(64, 8192), (3, 4)])
def test_pairs_are_those_of_the_definition(monkeypatch, blocks):
    monkeypatch.setattr(lookalikes, "ROWS", blocks[0])
    monkeypatch.setattr(lookalikes, "COLUMNS", blocks[1])
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, (12, SIDE, SIDE))
    noise = rng.normal(0, 1, (60, SIDE, SIDE)) * rng.choice([2, 12, 25], (60, 1, 1))
    pictures = (base[rng.integers(0, 12, 60)] + noise).clip(0, 255).astype(np.uint8)
    pictures[[5, 17, 40]] = 128  # flat, and nearly so: like each other, but nothing tells them apart
    pictures[[6, 18, 41]] = 128 + base[0] % (CONTRAST - 1)
    groups = rng.integers(0, 3, 60)
    own, other = find_lookalikes(pictures, groups)
    expected = naive(pictures, groups)
    assert own.tolist() == expected[0] and other.tolist() == expected[1]
    assert 10 < (own >= 0).sum() < 50 and 10 < (other >= 0).sum() < 57


def test_none_and_one():
    for count in (0, 1):
        own, other = find_lookalikes(np.zeros((count, SIDE, SIDE), np.uint8), np.zeros(count, int))
        assert own.tolist() == other.tolist() == [-1] * count
