"""Random crops of training images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from detres.config import AugmentConfig, InputConfig
from detres.data.dataset import Dataset
from detres.data.transforms import RandomCrop, Sample, build_train_transforms


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50),
       st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=3), st.integers(0, 2**32))
def test_holds_the_middle_of_an_object(height, width, side, corners, seed):
    """Of an image whose pixels say where they are."""
    y, x = np.mgrid[:height, :width]
    boxes = np.array([[min(a, b) * width, min(c, d) * height, max(a, b) * width, max(c, d) * height]
                      for a, c, b, d in corners], np.float32).reshape(-1, 4)
    sample = Sample(np.stack([y, x, x], -1).astype(np.uint8), boxes, np.arange(len(boxes)))
    cropped = RandomCrop(side)(sample, np.random.default_rng(seed))
    top, left, _ = cropped.image[0, 0].tolist()
    kept = min(side, height), min(side, width)
    assert np.array_equal(cropped.image, sample.image[top:top + kept[0], left:left + kept[1]]) and cropped.size == kept
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2 - (left, top)
    assert not len(boxes) or ((middles >= 0) & (middles <= kept[::-1])).all(1).any()
    own = boxes[cropped.labels] - np.tile([left, top], 2)
    assert np.allclose(cropped.boxes, own.clip(0, np.tile(kept[::-1], 2)))


def test_every_place_is_drawn():
    sample = Sample(np.arange(6, dtype=np.uint8)[None, :, None].repeat(3, 2), np.array([[3, 0, 4, 1]], np.float32),
                    np.zeros(1, np.int64))
    lefts = {int(RandomCrop(2)(sample, np.random.default_rng(seed)).image[0, 0, 0]) for seed in range(50)}
    assert lefts == {2, 3}


def test_is_part_of_training():
    """After the resize: 40 x 80 px become 20 x 40, of which 16 x 16 are cut."""
    data = Dataset("none", "table", ("a",), (0,), ())
    transform = build_train_transforms(AugmentConfig(crop_size=16, flip=0), InputConfig(min_size=20, max_size=99), data)
    sample = Sample(np.zeros((40, 80, 3), np.uint8), np.array([[0, 0, 8, 8]], np.float32), np.zeros(1, np.int64))
    out = transform(sample, np.random.default_rng(0))
    assert out.size == (16, 16) and len(out.boxes) == 1
    with pytest.raises(ValidationError, match="crop_size must be given with jitter"):
        AugmentConfig(jitter=(0.5, 1.0))
