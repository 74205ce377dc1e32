"""VOC average precision: published numbers and hand-solved cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detres.evaluation.voc import Matches, VocEvaluator, area, curve, eleven_point

TOY24 = {  # detection_results/README.md: IoU threshold -> 11-point, every point
    0.1: (.3333333333, .3371980676), 0.3: (.2683982683, .2456866804), 0.5: (.0303030303, .0222222222), 0.75: (0.0, 0.0)}


@pytest.mark.data
def test_published_numbers_of_a_toy_set(shared_data, make_dataset, make_batch):
    folder = shared_data / "detection_results" / "voc_toy24"

    def rows(kind: str) -> dict[str, list]:
        return {file.stem: [line.split()[1:] for line in file.read_text().splitlines()]
                for file in sorted((folder / kind).iterdir())}

    def box(numbers: list[str]) -> tuple[float, ...]:  # inclusive pixels x, y, x + w, y + h: that is w + 1 wide
        x, y, w, h = map(float, numbers)
        return x, y, x + w + 1, y + h + 1

    dataset = make_dataset({name: [(0, box(row)) for row in lines] for name, lines in rows("groundtruths").items()},
                           classes=("object",), size=(500, 500))
    evaluator = VocEvaluator(dataset)
    found = {name: [(0, box(row[1:]), float(row[0])) for row in lines] for name, lines in rows("detections").items()}
    evaluator.update(*make_batch(dataset, found))
    matches = evaluator.matches(0)
    assert len(matches.difficult) == 15 and len(matches.overlap) == 24
    for threshold, expected in TOY24.items():
        points = curve(matches, threshold)
        assert (eleven_point(*points), area(*points)) == pytest.approx(expected, abs=1e-10)  # printed cut, not rounded
    assert evaluator.compute().metrics["voc/AP50"] == pytest.approx(TOY24[0.5][1], abs=1e-10)


def evaluated(make_dataset, make_batch, truths: list, found: list, classes=("cat", "dog")) -> VocEvaluator:
    dataset = make_dataset({"a": truths, "b": []}, classes)
    evaluator = VocEvaluator(dataset)
    evaluator.update(*make_batch(dataset, {"a": found, "b": []}, scale=0.5))
    return evaluator


def test_perfect_and_absent_classes(make_dataset, make_batch):
    found = [(0, (0, 0, 10, 10), 0.9), (1, (0, 0, 9, 9), 0.9)]
    result = evaluated(make_dataset, make_batch, [(0, (0, 0, 10, 10))], found).compute()
    assert result.metrics == {"voc/AP": 1.0, "voc/AP50": 1.0, "voc/AP50_11point": pytest.approx(1.0)}
    assert set(result.per_class["dog"].values()) == {-1.0}


def test_difficult_is_ignored_even_twice(make_dataset, make_batch):
    truths = [(0, (0, 0, 10, 10), {"difficult": True}), (0, (50, 50, 70, 70))]
    found = [(0, (0, 0, 10, 10), 0.9), (0, (0, 0, 10, 9), 0.8), (0, (50, 50, 70, 70), 0.7)]
    assert evaluated(make_dataset, make_batch, truths, found).compute().metrics["voc/AP50"] == 1.0
    only = evaluated(make_dataset, make_batch, truths[:1], found).compute()
    assert set(only.metrics.values()) == {-1.0}


def test_a_second_detection_of_an_object_is_wrong(make_dataset, make_batch):
    truths = [(0, (0, 0, 20, 20)), (0, (50, 50, 70, 70))]
    found = [(0, (0, 0, 20, 18), 0.9), (0, (0, 0, 20, 20), 0.8), (0, (50, 50, 70, 70), 0.7)]  # right, double, right
    recall, precision = curve(evaluated(make_dataset, make_batch, truths, found).matches(0), 0.5)
    assert recall.tolist() == [0.5, 0.5, 1.0] and precision.tolist() == [1.0, 0.5, 2 / 3]
    assert area(recall, precision) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert eleven_point(recall, precision) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_overlap_on_the_threshold_counts(make_dataset, make_batch):
    evaluator = evaluated(make_dataset, make_batch, [(0, (0, 0, 20, 20))], [(0, (0, 0, 20, 10), 0.9)])  # IoU 1/2
    assert evaluator.compute().metrics["voc/AP50"] == 1.0


def test_ties_keep_image_order_whatever_the_order_of_updates(make_dataset, make_batch):
    dataset = make_dataset({"a": [(0, (0, 0, 20, 20))], "b": []}, classes=("cat",))
    right, wrong = {"a": [(0, (0, 0, 20, 20), 0.5)]}, {"b": [(0, (0, 0, 20, 20), 0.5)]}
    for order in ((right, wrong), (wrong, right)):
        evaluator = VocEvaluator(dataset)
        for found in order:
            evaluator.update(*make_batch(dataset, found))
        assert evaluator.compute().metrics["voc/AP50"] == 1.0


def test_nothing_found(make_dataset, make_batch):
    evaluator = evaluated(make_dataset, make_batch, [(0, (0, 0, 20, 20))], [])
    assert set(evaluator.compute().metrics.values()) == {0.0} and evaluator.results() == []


def naive(matches: Matches, threshold: float) -> tuple[list[float], list[float]]:
    """The kit's loop, one detection after another."""
    taken, right, wrong, points = set(), 0, 0, []
    for overlap, target in zip(matches.overlap, matches.target):
        if target < 0 or overlap < threshold:
            wrong += 1
        elif not matches.difficult[target]:
            right, wrong = (right, wrong + 1) if target in taken else (right + 1, wrong)
            taken.add(target)
        points.append((right / (~matches.difficult).sum(), right / max(right + wrong, 1)))
    return [r for r, _ in points], [p for _, p in points]


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.4, 0.5, 0.9]), st.integers(-1, 3)), max_size=12),
       st.lists(st.booleans(), min_size=3, max_size=3))
def test_curve_equals_the_naive_loop(found, difficult):
    overlap, target = np.array([o for o, _ in found]), np.array([t for _, t in found], int)
    matches = Matches(overlap, target, np.array([*difficult, False]))
    recall, precision = curve(matches, 0.5)
    expected = naive(matches, 0.5)
    assert (recall.tolist(), precision.tolist()) == expected
