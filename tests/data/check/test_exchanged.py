"""Classes that seem exchanged, by the shapes of their boxes."""

from __future__ import annotations

import numpy as np

from detres.data.check.exchanged import exchanged_classes


def shapes(seed: int, images: int = 400, **medians: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """An object of each class in each image, of sizes spread around a share of the image."""
    rng = np.random.default_rng(seed)
    return {name: (np.arange(images), median * np.exp(rng.normal(0, 0.3, (images, 2))))
            for name, median in medians.items()}


def test_only_what_boxes_show_clearly():
    assert exchanged_classes(shapes(0, a=0.1, b=0.4, c=0.4), shapes(1, a=0.4, b=0.1, c=0.4)) == [("a", "b")]
    assert exchanged_classes(shapes(0, a=0.1, b=0.4), shapes(1, a=0.1, b=0.4)) == []
    assert exchanged_classes(shapes(0, a=0.1, b=0.4), shapes(1, a=0.4, b=0.4)) == [], "one has moved, not both"
    assert exchanged_classes(shapes(0, a=0.1, b=0.11), shapes(1, a=0.11, b=0.1)) == [], "significant, but small"


def test_few_objects_tell_nothing():
    for few in (dict(images=9), dict(images=19)):
        assert exchanged_classes(shapes(0, a=0.1, b=0.4), shapes(1, a=0.4, b=0.1, **few)) == []
    assert exchanged_classes(shapes(0, a=0.1), shapes(1, b=0.1)) == exchanged_classes({}, {}) == []


def test_an_image_counts_once():
    """One image with many large objects of a class is no evidence."""
    first, second = shapes(0, images=30, a=0.1, b=0.4), shapes(1, images=30, a=0.1, b=0.4)
    for name, median in (("a", 0.4), ("b", 0.1)):
        image, sides = second[name]
        many = np.full((300, 2), median)
        second[name] = np.concatenate([image, np.zeros(300, int)]), np.concatenate([sides, many])
    assert exchanged_classes(first, second) == []
