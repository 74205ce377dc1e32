"""Classes whose names seem to be exchanged between two splits, told from the sizes and shapes of their boxes.

A class of the one split is a Gaussian of log size and log aspect ratio. Two classes are exchanged if in the other split
the objects of either fit the other's Gaussian better than their own. This finds only what boxes can show (cells of
unlike size, persons and cars), and is silent about dogs and cats.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

OBJECTS, IMAGES = 20, 10  # that a class must have in both splits
GAIN = 0.3  # nats an image by which the other class must fit better
SIGMAS = 3.0  # and by how many standard errors
VARIANCE = 0.02  # of log size and aspect ratio, at least: (14%)^2

Shapes = Mapping[str, tuple[np.ndarray, np.ndarray]]  # class -> images (A,), and width and height (A, 2) as a share


def exchanged_classes(first: Shapes, second: Shapes) -> list[tuple[str, str]]:
    """Pairs of names. Objects of an image are alike, so each image counts once."""
    usable = [name for name in first if name in second and _enough(*first[name]) and _enough(*second[name])]
    fits = {name: _gaussian(_features(first[name][1])) for name in usable}
    features = {name: _features(second[name][1]) for name in usable}
    scores = {name: {other: _log_density(features[name], fits[other]) for other in usable} for name in usable}

    def prefers(name: str, other: str) -> bool:
        gain = scores[name][other] - scores[name][name]
        _, image = np.unique(second[name][0], return_inverse=True)
        means = np.bincount(image, gain) / np.bincount(image)
        return means.mean() > max(GAIN, SIGMAS * means.std(ddof=1) / len(means)**0.5)

    return [(a, b) for a, b in combinations(usable, 2) if prefers(a, b) and prefers(b, a)]


def _enough(image: np.ndarray, sides: np.ndarray) -> bool:
    return len(sides) >= OBJECTS and len(np.unique(image)) >= IMAGES


def _features(sides: np.ndarray) -> np.ndarray:
    """(A, 2) log size, log aspect ratio."""
    width, height = np.log(sides.clip(1e-6)).T
    return np.stack([(width + height) / 2, height - width], 1)


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features.T) + VARIANCE * np.eye(2)


def _log_density(features: np.ndarray, fit: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(A,), up to a constant."""
    mean, covariance = fit
    offset = features - mean
    return -((offset @ np.linalg.inv(covariance)) * offset).sum(1) / 2 - np.log(np.linalg.det(covariance)) / 2
