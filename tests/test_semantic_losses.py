"""Losses of semantic segmentation against loops over pixels, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from detres.losses import IGNORED, semantic_loss

N, C, H, W = 3, 4, 3, 5


def make(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that are absent from an image, ignored pixels, and an image with nothing but these."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, C, H, W, generator=generator) * 2
    labels = torch.randint(0, C - 1, (N, H, W), generator=generator).to(torch.uint8)
    labels[0, 0] = IGNORED
    labels[1][labels[1] == 1] = 3
    labels[2] = IGNORED
    return logits, labels


def pixels(logits, labels):
    """Of each image: the probabilities and the label of each pixel that counts."""
    for i in range(N):
        probs = logits[i].double().softmax(0)
        yield [(probs[:, y, x].tolist(), int(labels[i, y, x])) for y in range(H) for x in range(W)
               if labels[i, y, x] != IGNORED]


def naive_ce(logits, labels) -> float:
    terms = [-math.log(probs[label]) for image in pixels(logits, labels) for probs, label in image]
    return sum(terms) / len(terms)


def naive_dice(logits, labels) -> float:
    terms = []
    for image in pixels(logits, labels):
        for c in {label for _, label in image}:
            common = sum(probs[c] for probs, label in image if label == c)
            squares = sum(probs[c] ** 2 + (label == c) ** 2 for probs, label in image)
            terms.append(1 - 2 * common / squares)
    return sum(terms) / len(terms)


def naive_lovasz(logits, labels) -> float:
    """Sums, over pixels from the worst error on, of the error times what 1 - IoU grows by where it is made."""
    terms = []
    for image in pixels(logits, labels):
        for c in {label for _, label in image}:
            errors = [1 - probs[c] if label == c else probs[c] for probs, label in image]
            truth = {p for p, (_, label) in enumerate(image) if label == c}
            made, loss = set(), [0.0]
            total = 0.0
            for p in sorted(range(len(image)), key=lambda p: -errors[p]):
                made.add(p)
                loss.append(1 - len(truth - made) / len(truth | made))
                total += errors[p] * (loss[-1] - loss[-2])
            terms.append(total)
    return sum(terms) / len(terms)


NAIVE = {"ce": naive_ce, "dice": naive_dice, "lovasz": naive_lovasz}


@pytest.mark.parametrize("kind", ["ce", "dice", "lovasz", "ce+dice", "ce+lovasz"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_loops_over_pixels(kind, seed):
    logits, labels = make(seed)
    expected = sum(NAIVE[name](logits, labels) for name in kind.split("+"))
    assert float(semantic_loss(logits, labels, kind)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", sorted(NAIVE))
def test_gradients_are_finite_differences(kind):
    logits, labels = make()
    leaf = logits.clone().requires_grad_()
    semantic_loss(leaf, labels, kind).backward()
    exact, step = logits.double(), 1e-6
    for index in torch.cartesian_prod(*map(torch.arange, (N, C, H, W)))[::7].tolist():
        ends = []
        for sign in (-1, 1):
            moved = exact.clone()
            moved[tuple(index)] += sign * step
            ends.append(NAIVE[kind](moved, labels))
        assert float(leaf.grad[tuple(index)]) == pytest.approx((ends[1] - ends[0]) / (2 * step), abs=2e-6)


def test_lovasz_of_certain_answers_is_one_minus_iou():
    labels = torch.tensor([[[0, 0, 0, 1, 1, 1]]], dtype=torch.uint8)
    answer = torch.tensor([0, 0, 1, 1, 1, 1])
    logits = 1000 * torch.nn.functional.one_hot(answer, 2).T.float()[None, :, None]
    loss = 1 - (2 / 3 + 3 / 4) / 2
    assert float(semantic_loss(logits, labels, "lovasz")) == pytest.approx(loss)


@pytest.mark.parametrize("kind", sorted(NAIVE))
def test_nothing_known_trains_nothing_and_low_precision_is_raised(kind):
    logits, labels = make()
    leaf = logits.bfloat16().requires_grad_()
    loss = semantic_loss(leaf, torch.full_like(labels, IGNORED), kind)
    loss.backward()
    assert loss == 0 and not leaf.grad.any()
    loss = semantic_loss(leaf, labels, kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, semantic_loss(leaf.float(), labels, kind))
