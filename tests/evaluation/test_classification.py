"""Top-1 and top-5: hand-solved cases, a stable sort as the oracle, parts that are merged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from detres.evaluation.classification import ClassificationEvaluator, rank_of

EIGHT = tuple("abcdefgh")


def evaluated(scores, labels, classes=EIGHT) -> ClassificationEvaluator:
    evaluator = ClassificationEvaluator(classes)
    evaluator.update(torch.tensor(scores), torch.tensor(labels))
    return evaluator


def test_first_fifth_and_sixth_place():
    descending = [8.0, 7, 6, 5, 4, 3, 2, 1]
    result = evaluated([descending] * 4, [0, 0, 4, 5]).compute()
    assert result.metrics == {"cls/top1": 0.5, "cls/top5": 0.75, "cls/top1_error": 0.5, "cls/top5_error": 0.25}
    assert result.per_class["a"] == {"cls/top1": 1.0, "cls/top5": 1.0, "cls/top1_error": 0.0, "cls/top5_error": 0.0}
    assert [result.per_class[name]["cls/top5"] for name in "bef"] == [-1.0, 1.0, 0.0]
    assert list(result.metrics) == list(ClassificationEvaluator.metric_names) and "n/a" in result.table()


def test_three_classes_five_guesses():
    result = evaluated([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]], [2, 1, 0], "abc").compute()
    assert result.metrics["cls/top1"] == 1 / 3 and result.metrics["cls/top1_error"] == 2 / 3
    assert result.metrics["cls/top5"] == 1.0 and result.metrics["cls/top5_error"] == 0.0


def test_of_equal_scores_the_lower_class_is_first():
    assert rank_of(torch.zeros(3, 8), torch.tensor([0, 4, 7])).tolist() == [0, 4, 7]
    assert evaluated([[0.0] * 8] * 2, [0, 7]).compute().metrics["cls/top1"] == 0.5


def test_masked_classes_are_last():
    assert evaluated([[-math.inf, 1.0]], [1], "ab").compute().metrics["cls/top1"] == 1.0


batches = st.integers(1, 8).flatmap(lambda k: st.lists(
    st.tuples(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=k, max_size=k), st.integers(0, k - 1)),
    min_size=1, max_size=12))


@given(batches, st.integers(0, 12))
def test_equals_a_stable_sort_in_parts_and_merged(rows, cut):
    classes = EIGHT[:len(rows[0][0])]
    parts = [ClassificationEvaluator(classes) for _ in range(2)]
    for part, own in zip(parts, (rows[:cut], rows[cut:])):
        scores = torch.tensor([scores for scores, _ in own]).reshape(-1, len(classes))
        part.update(scores, torch.tensor([label for _, label in own], dtype=torch.int64))
    whole = ClassificationEvaluator(classes)
    whole.merge([part.state() for part in parts[::-1]])
    guesses = [np.argsort(-np.array(scores), kind="stable") for scores, _ in rows]
    for name, k in (("cls/top1", 1), ("cls/top5", 5)):
        right = [label in order[:k] for order, (_, label) in zip(guesses, rows)]
        assert whole.compute().metrics[name] == sum(right) / len(rows)
        for c, class_name in enumerate(classes):
            own = [x for x, (_, label) in zip(right, rows) if label == c]
            assert whole.compute().per_class[class_name][name] == (sum(own) / len(own) if own else -1.0)


def test_reset_and_nothing_added():
    evaluator = evaluated([[1.0, 0.0]], [0], "ab")
    evaluator.reset()
    assert set(evaluator.compute().metrics.values()) == {-1.0}
    evaluator.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert set(evaluator.compute().metrics.values()) == {-1.0}


@pytest.mark.parametrize("labels, got", [([0, 2], "2"), ([-1, 1], "-1"), ([5, -3], "-3")])
def test_labels_out_of_range_are_told_in_the_end(labels, got):
    evaluator = evaluated([[1.0, 0.0]] * 2, labels, "ab")
    evaluator.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    merged = ClassificationEvaluator("ab")
    merged.merge([ClassificationEvaluator("ab").state(), evaluator.state()])
    for each in (evaluator, merged):
        with pytest.raises(ValueError, match=rf"labels must be 0\.\.1, got {got}\."):
            each.compute()


def test_nan_is_told_in_the_end():
    with pytest.raises(ValueError, match="got nan or inf in 2 images"):
        evaluated([[1.0, math.nan], [0.0, 1.0], [math.nan, 0.0]], [0, 1, 1], "ab").compute()


@pytest.mark.parametrize("scores, labels", [((2, 3), (2,)), ((2, 2), (3,)), ((2,), (2,)), ((2, 2), (2, 1))])
def test_shapes_that_do_not_fit_are_refused(scores, labels):
    with pytest.raises(ValueError, match=r"scores must be \(N, 2\) and labels \(N,\)"):
        ClassificationEvaluator("ab").update(torch.zeros(scores), torch.zeros(labels, dtype=torch.int64))


def test_update_never_waits_for_the_device():
    with FakeTensorMode():  # whatever needs a value, not only a shape, raises
        evaluator = ClassificationEvaluator("ab")
        evaluator.update(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
