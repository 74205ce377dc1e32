"""VOC average precision: published numbers, hand-solved cases, and the kit's loop as the oracle."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detres.config import SourceConfig
from detres.data.dataset import load_dataset
from detres.evaluation.coco_engine import Found, Truths
from detres.evaluation.run import save_results
from detres.evaluation.voc import (THRESHOLDS, VocEvaluator, area, eleven_point, judge, match, mean_of_measured,
                                   voc_ap)


def flat(truths: list, found: list) -> tuple[Truths, Found]:
    """From rows (image, label, (x, y, w, h), difficult) and (image, label, (x, y, w, h), score)."""
    def columns(rows: list) -> list:
        image, label = torch.tensor([row[:2] for row in rows], dtype=torch.int64).reshape(-1, 2).unbind(1)
        boxes = torch.tensor([row[2] for row in rows], dtype=torch.float64).reshape(-1, 4)
        return [image, label, boxes, torch.tensor([row[3] for row in rows])]

    image, label, boxes, difficult = columns(truths)
    ground_truth = Truths(image, label, boxes, boxes[:, 2] * boxes[:, 3], torch.zeros(len(boxes), dtype=torch.bool),
                          difficult.bool())
    image, label, boxes, scores = columns(found)
    return ground_truth, Found(image, label, boxes, scores.double(), boxes[:, 2] * boxes[:, 3])


# Published numbers

EXPECTED = {  # detection_results/README.md: IoU threshold -> 11-point, every point
    0.1: (.3333333333, .3371980676), 0.3: (.2683982683, .2456866804), 0.5: (.0303030303, .0222222222), 0.75: (0.0, 0.0)}
# Objects x y w h, then detections score x y w h, of each of the seven images; widths are xmax - xmin.
TOY = """\
25 16 38 56, 129 123 41 62 | .88 5 67 31 48, .70 119 111 40 67, .80 124 9 49 67
123 11 43 55, 38 132 59 45 | .71 64 111 64 58, .54 26 140 60 47, .74 19 18 43 35
16 14 35 48, 123 30 49 44, 99 139 47 47 | .18 109 15 77 39, .67 86 63 46 45, .38 160 62 36 53, .91 105 131 47 47, \
.44 18 148 40 44
53 42 40 52, 154 43 31 34 | .35 83 28 28 26, .78 28 68 42 67, .45 87 89 25 39, .14 10 155 60 26
59 31 44 51, 48 128 34 52 | .62 50 38 28 46, .44 95 11 53 28, .95 29 131 72 29, .23 29 163 72 29
36 89 52 76, 62 58 44 67 | .45 43 48 74 38, .84 17 155 29 35, .43 95 110 25 42
28 31 55 63, 58 67 50 58 | .48 16 20 101 88, .95 33 116 37 49"""


def toy() -> tuple[list, list]:
    images = [[[tuple(map(float, row.split())) for row in part.split(",")] for part in line.split("|")]
              for line in TOY.splitlines()]
    return ([(i, 0, row, False) for i, (objects, _) in enumerate(images) for row in objects],
            [(i, 0, row[1:], row[0]) for i, (_, found) in enumerate(images) for row in found])


@pytest.mark.parametrize("threshold", EXPECTED)
def test_published_numbers_of_a_toy_set(threshold):
    truths, found = flat(*toy())
    both = [voc_ap(truths, found, 1, threshold, eleven_points=points, border=1)[0] for points in (True, False)]
    assert both == pytest.approx(EXPECTED[threshold], abs=1e-10)  # printed cut, not rounded


def test_toy_without_the_pixel_of_the_border():
    truths, found = flat(*toy())
    values = [voc_ap(truths, found, 1, threshold)[0] for threshold in (0.1, 0.3, 0.5)]
    assert values == pytest.approx((.2801, .2254, .0222), abs=5e-5)  # detection_results/README.md


def lines(folder: Path) -> list[tuple[int, list[str]]]:
    """The words of every line in a folder of text files, with the place of the file."""
    return [(i, line.split()) for i, file in enumerate(sorted(folder.iterdir()))
            for line in file.read_text().splitlines()]


@pytest.mark.data
def test_toy_is_the_published_one(shared_data):
    folder = shared_data / "detection_results" / "voc_toy24"
    truths = [(i, 0, tuple(map(float, box)), False) for i, (_, *box) in lines(folder / "groundtruths")]
    found = [(i, 0, tuple(map(float, box)), float(score)) for i, (_, score, *box) in lines(folder / "detections")]
    assert (truths, found) == toy()


@pytest.mark.data
def test_published_files_with_thirty_classes(shared_data):
    folder = shared_data / "detection_results" / "cartucho85"
    truths, found = lines(folder / "ground-truth"), lines(folder / "detection-results")
    names = sorted({name for _, (name, *_) in truths + found})

    def box(corners: list[str]) -> tuple[float, ...]:
        x1, y1, x2, y2 = map(float, corners)
        return x1, y1, x2 - x1, y2 - y1

    arrays = flat([(i, names.index(name), box(rest[:4]), False) for i, (name, *rest) in truths],
                  [(i, names.index(name), box(corners), float(score)) for i, (name, score, *corners) in found])
    values = voc_ap(*arrays, len(names), border=1)
    assert len(truths) == 686 and sum(value != -1 for value in values) == 30
    assert mean_of_measured(values) == pytest.approx(0.3105, abs=5e-5)


# Hand-solved cases


def evaluated(make_dataset, make_batch, truths: list, found: list, classes=("cat", "dog"), border=0.0) -> VocEvaluator:
    dataset = make_dataset({"a": truths, "b": []}, classes)
    evaluator = VocEvaluator(dataset, border)
    evaluator.update(*make_batch(dataset, {"a": found, "b": []}, scale=0.5))
    return evaluator


def test_perfect_and_absent_classes(make_dataset, make_batch):
    found = [(0, (0, 0, 10, 10), 0.9), (1, (0, 0, 9, 9), 0.9)]
    result = evaluated(make_dataset, make_batch, [(0, (0, 0, 10, 10))], found).compute()
    assert result.metrics == {"voc/AP": 1.0, "voc/AP50": 1.0, "voc/AP50_11point": 1.0}
    assert set(result.per_class["dog"].values()) == {-1.0}


def test_ap_is_the_mean_over_classes_and_over_thresholds(make_dataset, make_batch):
    truths = [(0, (0, 0, 20, 20)), (1, (0, 0, 10, 10)), (1, (30, 30, 40, 40))]
    found = [(0, (0, 0, 20, 13), 0.9), (1, (0, 0, 10, 10), 0.9)]  # IoU .65: four thresholds; half of the dogs
    result = evaluated(make_dataset, make_batch, truths, found).compute()
    assert result.per_class["cat"]["voc/AP"] == pytest.approx(0.4)
    assert result.metrics["voc/AP"] == pytest.approx((0.4 + 0.5) / 2)
    assert result.metrics["voc/AP50"] == pytest.approx((1 + 0.5) / 2)


def test_difficult_is_ignored_even_twice(make_dataset, make_batch):
    truths = [(0, (0, 0, 10, 10), {"difficult": True}), (0, (50, 50, 70, 70))]
    found = [(0, (0, 0, 10, 10), 0.9), (0, (0, 0, 10, 9), 0.8), (0, (50, 50, 70, 70), 0.7)]
    assert evaluated(make_dataset, make_batch, truths, found).compute().metrics["voc/AP50"] == 1.0
    only = evaluated(make_dataset, make_batch, truths[:1], found).compute()
    assert set(only.metrics.values()) == {-1.0}


def test_crowds_are_ignored(make_dataset, make_batch):
    truths = [(0, (0, 0, 10, 10), {"crowd": True}), (0, (50, 50, 70, 70))]
    found = [(0, (50, 50, 70, 70), 0.7)]
    assert evaluated(make_dataset, make_batch, truths, found).compute().metrics["voc/AP50"] == 1.0


@pytest.mark.parametrize("recall, points", [(0.2, 3), (0.3, 3), (0.5, 6), (0.6, 6), (0.7, 7), (1.0, 11)])
def test_three_of_the_eleven_points_lie_one_rounding_above(recall, points):
    assert eleven_point(np.array([recall]), np.array([1.0])) == points / 11


def test_a_second_detection_of_an_object_is_wrong():
    truths = [(0, 0, (0, 0, 20, 20), False), (0, 0, (50, 50, 20, 20), False)]
    found = [(0, 0, (0, 0, 20, 18), 0.9), (0, 0, (0, 0, 20, 20), 0.8), (0, 0, (50, 50, 20, 20), 0.7)]
    recall, precision = judge(match(*flat(truths, found), 1), 0.5).curve(0)  # right, double, right
    assert recall.tolist() == [0.5, 0.5, 1.0] and precision.tolist() == [1.0, 0.5, 2 / 3]
    assert area(recall, precision) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert eleven_point(recall, precision) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_overlap_on_the_threshold_counts(make_dataset, make_batch):
    evaluator = evaluated(make_dataset, make_batch, [(0, (0, 0, 20, 20))], [(0, (0, 0, 20, 10), 0.9)])  # IoU 1/2
    assert evaluator.compute().metrics["voc/AP50"] == 1.0


def test_without_the_kits_pixel_it_is_below_the_threshold(make_dataset, make_batch):
    evaluator = evaluated(make_dataset, make_batch, [(0, (0, 0, 20, 20))], [(0, (0, 0, 20, 10), 0.9)], border=-1)
    assert evaluator.compute().metrics["voc/AP50"] == 0.0  # 19 * 9 / 19 ** 2


def test_only_the_most_overlapped_object_can_be_found():
    truths = [(0, 0, (0, 0, 20, 20), False), (0, 0, (0, 4, 20, 20), False)]
    found = [(0, 0, (0, 0, 20, 20), 0.9), (0, 0, (0, 1, 20, 20), 0.8)]  # the second reaches .5 with both
    assert voc_ap(*flat(truths, found), 1) == [0.5]


def test_no_overlap_is_no_match_at_any_threshold():
    assert voc_ap(*flat([(0, 0, (0, 0, 2, 2), False)], [(0, 0, (5, 5, 2, 2), 0.9)]), 1, threshold=0.0) == [0.0]


def test_ties_keep_image_order_whatever_the_order_of_updates(make_dataset, make_batch):
    dataset = make_dataset({"a": [(0, (0, 0, 20, 20))], "b": []}, classes=("cat",))
    right, wrong = {"a": [(0, (0, 0, 20, 20), 0.5)]}, {"b": [(0, (0, 0, 20, 20), 0.5)]}
    for order in ((right, wrong), (wrong, right)):
        evaluator = VocEvaluator(dataset)
        for found in order:
            evaluator.update(*make_batch(dataset, found))
        assert evaluator.compute().metrics["voc/AP50"] == 1.0


def test_ties_keep_the_order_given_within_an_image():
    truths = [(0, 0, (0, 0, 20, 20), False)]
    rows = [(0, 0, (50, 50, 9, 9), 0.5)] * 20 + [(0, 0, (0, 0, 20, 20), 0.5)]
    assert voc_ap(*flat(truths, rows), 1) == [1 / 21] and voc_ap(*flat(truths, rows[::-1]), 1) == [1.0]


def test_minus_zero_ties_with_zero():
    truths, rows = [(0, 0, (0, 0, 20, 20), False)], [(0, 0, (0, 0, 20, 20), -0.0), (0, 0, (50, 50, 9, 9), 0.0)]
    assert voc_ap(*flat(truths, rows), 1) == [1.0]


def test_nothing_found(make_dataset, make_batch):
    evaluator = evaluated(make_dataset, make_batch, [(0, (0, 0, 20, 20))], [])
    assert set(evaluator.compute().metrics.values()) == {0.0} and evaluator.results() == []
    assert set(VocEvaluator(evaluator.dataset).compute().metrics.values()) == {0.0}


def test_nothing_to_find_and_nothing_at_all(make_dataset, make_batch):
    evaluator = evaluated(make_dataset, make_batch, [], [(0, (0, 0, 20, 20), 0.9)])
    assert set(evaluator.compute().metrics.values()) == {-1.0}
    assert voc_ap(*flat([], []), 2) == [-1.0, -1.0]


def test_files_for_the_server_have_the_corners_of_vocs_xml(tmp_path, make_batch):
    """What was found are the objects as they were read; what is written are the numbers of the XML."""
    root = tmp_path / "VOC2012"
    corners = {"a": [("dog", 1, 1, 40, 30), ("cat", 11, 6, 20, 29)], "b": [("dog", 5, 7, 6, 8)]}
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/test.txt").write_text("b\na\n")
    for image_id, objects in corners.items():
        boxes = "".join(f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
                        f"<ymax>{y2}</ymax></bndbox></object>" for name, x1, y1, x2, y2 in objects)
        for folder, name, text in (("JPEGImages", f"{image_id}.jpg", ""), ("Annotations", f"{image_id}.xml", (
                f"<annotation><size><width>40</width><height>30</height></size>{boxes}</annotation>"))):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / name).write_text(text)
    dataset = load_dataset(SourceConfig(path=str(root), split="test"), "val")
    evaluator = VocEvaluator(dataset)
    evaluator.update(*make_batch(dataset, {record.id: [(item.label, item.box, 0.9 - 0.25 * i) for i, item in
                                                       enumerate(record.annotations)] for record in dataset.records}))
    out = tmp_path / "results/VOC2012/Main"
    save_results(evaluator, out)
    assert len(list(out.iterdir())) == 20 and (out / "comp4_det_test_person.txt").read_text() == ""
    assert (out / "comp4_det_test_dog.txt").read_text() == (
        "a 0.900000 1.000 1.000 40.000 30.000\nb 0.900000 5.000 7.000 6.000 8.000\n")
    assert (out / "comp4_det_test_cat.txt").read_text() == "a 0.650000 11.000 6.000 20.000 29.000\n"


@pytest.mark.parametrize("found, message", [
    ([(0, 2, (0, 0, 1, 1), 0.5)], r"0\.\.1, got 2 \(detections\)"),
    ([(0, -1, (0, 0, 1, 1), 0.5)], r"got -1 \(detections\)"),
    ([(0, 0, (0, 0, 1, 1), 0.5), (0, 0, (0, 0, 1, 1), math.nan)], r"scores must be .*, got \[nan\] \(detection 1\)"),
    ([(0, 0, (0, 0, math.inf, 1), 0.5)], r"boxes must be finite, got \[0.0, 0.0, inf, 1.0\]")])
def test_unusable_detections_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        voc_ap(*flat([], found), 2)


def test_labels_of_objects_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"got 7 \(ground truth\)"):
        voc_ap(*flat([(0, 7, (0, 0, 1, 1), False)], []), 2)


# The kit's loop as the oracle


def naive(truths: list, found: list, label: int, threshold: float, eleven_points: bool) -> float:
    """VOCevaldet's description, one detection after another, with inclusive corners."""
    def corners(box: tuple) -> tuple[float, ...]:
        return box[0] + 1, box[1] + 1, box[0] + box[2], box[1] + box[3]

    positives = sum(row[1] == label and not row[3] for row in truths)
    if not positives:
        return -1.0
    taken, tp, fp, points = set(), 0, 0, []
    by_image = sorted((row for row in found if row[1] == label), key=lambda row: row[0])
    for image, _, box, _ in sorted(by_image, key=lambda row: -row[3]):
        best, best_overlap, (x1, y1, x2, y2) = None, -math.inf, corners(box)
        for j, (other_image, other_label, other, _) in enumerate(truths):
            if (other_image, other_label) != (image, label):
                continue
            a1, b1, a2, b2 = corners(other)
            w, h = min(x2, a2) - max(x1, a1) + 1, min(y2, b2) - max(y1, b1) + 1
            if w > 0 and h > 0:
                union = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1) - w * h
                if w * h / union > best_overlap:
                    best, best_overlap = j, w * h / union
        if best_overlap < threshold:
            fp += 1
        elif not truths[best][3]:
            tp, fp = (tp, fp + 1) if best in taken else (tp + 1, fp)
            taken.add(best)
        points.append((tp / positives, tp / (tp + fp) if tp + fp else 0.0))
    if eleven_points:
        return fmean(max([p for r, p in points if r >= t], default=0.0) for t in np.arange(0, 1.1, 0.1))
    recall, precision = [0.0, *(r for r, _ in points), 1.0], [0.0, *(p for _, p in points), 0.0]
    for i in reversed(range(len(precision) - 1)):
        precision[i] = max(precision[i], precision[i + 1])
    return math.fsum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


boxes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 5), st.integers(1, 5))
truth_rows = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), boxes, st.booleans()), max_size=8)
found_rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), boxes, st.sampled_from([0.1, 0.5, 0.9])),
                      max_size=12)


@given(truth_rows, found_rows, st.sampled_from([0.25, 0.5, 0.75, *THRESHOLDS]), st.booleans())
def test_equals_the_naive_loop(truths, found, threshold, eleven_points):
    expected = [naive(truths, found, label, threshold, eleven_points) for label in (0, 1)]
    assert voc_ap(*flat(truths, found), 2, threshold, eleven_points=eleven_points) == expected


@given(truth_rows, found_rows)
def test_order_between_images_does_not_matter(truths, found):
    shuffled = sorted(found, key=lambda row: -row[0])
    assert voc_ap(*flat(truths, found), 2) == voc_ap(*flat(truths, shuffled), 2)


@given(truth_rows, found_rows, st.sampled_from([0.05, 0.5, 0.95]))
def test_a_false_positive_never_raises_ap(truths, found, score):
    before = voc_ap(*flat(truths, found), 2)
    after = voc_ap(*flat(truths, [*found, (5, 0, (0, 0, 1, 1), score)]), 2)
    assert after[0] <= before[0] and after[1] == before[1]
