"""ILSVRC localization and detection: hand-solved cases, and the kit's loops as oracles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from detres.evaluation.coco_engine import Found, Truths
from detres.evaluation.ilsvrc import (IlsvrcDetectionEvaluator, LocalizationEvaluator, ilsvrc_ap, judge,
                                      relaxed_threshold)
from detres.evaluation.voc import voc_ap

SQUARE, HALF, LESS = (0, 0, 20, 20), (0, 0, 20, 10), (0, 0, 20, 9)  # HALF has IoU 1/2 with SQUARE

# Localization


def images(rows: list, classes=("cat", "dog", "owl")) -> LocalizationEvaluator:
    """Evaluator of images ([(class, box), ...] guesses, class, [box ...] objects), padded to one size."""
    evaluator = LocalizationEvaluator(classes)
    evaluator.update(**padded(rows))
    return evaluator


def padded(rows: list) -> dict:
    p, g = max(len(guesses) for guesses, *_ in rows), max(1, *(len(objects) for *_, objects in rows))
    n = len(rows)
    data = dict(labels=torch.zeros(n, p, dtype=torch.int64), boxes=torch.full((n, p, 4), math.nan),
                valid=torch.zeros(n, p, dtype=torch.bool), gt_labels=torch.tensor([label for _, label, _ in rows]),
                gt_boxes=torch.zeros(n, g, 4), gt_valid=torch.zeros(n, g, dtype=torch.bool))
    data["gt_boxes"][:] = torch.tensor([0.0, 0, 20, 20])  # padding that would match
    for i, (guesses, _, objects) in enumerate(rows):
        for j, (label, box) in enumerate(guesses):
            data["labels"][i, j], data["boxes"][i, j], data["valid"][i, j] = label, torch.tensor(box), True
        for j, box in enumerate(objects):
            data["gt_boxes"][i, j], data["gt_valid"][i, j] = torch.tensor(box), True
    return data


def errors(evaluator: LocalizationEvaluator) -> tuple[float, ...]:
    metrics = evaluator.compute().metrics
    return tuple(metrics[f"loc/{name}_error"] for name in ("top1", "top5", "cls_top1", "cls_top5"))


def test_class_and_box_must_be_of_one_guess():
    far = (50, 50, 70, 70)
    assert errors(images([([(0, SQUARE)], 0, [SQUARE])])) == (0, 0, 0, 0)
    assert errors(images([([(0, far), (1, SQUARE)], 0, [SQUARE])])) == (1, 1, 0, 0)
    assert errors(images([([(1, SQUARE), (0, SQUARE)], 0, [SQUARE])])) == (1, 0, 1, 0)
    assert errors(images([([(0, far), (0, SQUARE)], 0, [SQUARE])])) == (1, 0, 0, 0)


def test_any_object_of_the_class_will_do_and_half_is_enough():
    assert errors(images([([(0, HALF)], 0, [(50, 50, 70, 70), SQUARE])])) == (0, 0, 0, 0)
    assert errors(images([([(0, LESS)], 0, [(50, 50, 70, 70), SQUARE])])) == (1, 1, 0, 0)


def test_padding_is_no_object():
    far = (50, 50, 70, 70)
    assert errors(images([([(0, SQUARE)], 0, [far]), ([(0, SQUARE)], 0, [far, SQUARE])])) == (0.5, 0.5, 0, 0)


def test_the_sixth_guess_is_ignored():
    assert errors(images([([(1, SQUARE)] * 4 + [(0, SQUARE)], 0, [SQUARE])])) == (1, 0, 1, 0)
    assert errors(images([([(1, SQUARE)] * 5 + [(0, SQUARE)], 0, [SQUARE])])) == (1, 1, 1, 1)


def test_per_class_and_overall():
    result = images([([(0, SQUARE)], 0, [SQUARE]), ([(0, LESS)], 0, [SQUARE]), ([(2, SQUARE)], 1, [SQUARE]),
                     ([(1, LESS)], 1, [SQUARE])]).compute()
    assert result.metrics["loc/top1_error"] == 0.75 and result.metrics["loc/cls_top1_error"] == 0.25
    assert result.per_class["cat"]["loc/top1_error"] == 0.5 and result.per_class["cat"]["loc/cls_top1_error"] == 0.0
    assert result.per_class["dog"]["loc/top1_error"] == 1.0 and result.per_class["dog"]["loc/cls_top1_error"] == 0.5
    assert set(result.per_class["owl"].values()) == {-1.0}
    assert list(result.metrics) == list(LocalizationEvaluator.metric_names) and "gt_class_error" in result.table()


def test_box_of_the_true_class():
    rows = [([(1, SQUARE)], 0, [SQUARE])] * 3
    assert images(rows).compute().metrics["loc/gt_class_error"] == -1.0
    evaluator = LocalizationEvaluator("ab")
    evaluator.update(**padded(rows), gt_class_boxes=torch.tensor([HALF, LESS, LESS]).float())
    assert evaluator.compute().metrics["loc/gt_class_error"] == 2 / 3
    assert evaluator.compute().metrics["loc/top5_error"] == 1.0


def test_blacklisted_images_count_in_classification_only():
    evaluator = LocalizationEvaluator("ab")
    rows = [([(0, SQUARE)], 0, [SQUARE]), ([(1, SQUARE)], 0, []), ([(0, SQUARE)], 0, [SQUARE]),
            ([(0, LESS)], 0, [SQUARE])]
    evaluator.update(**padded(rows), gt_class_boxes=torch.tensor([SQUARE] * 4).float(),
                     counted=torch.tensor([True, False, False, True]))
    assert errors(evaluator) == (1 / 2, 1 / 2, 1 / 4, 1 / 4)
    assert evaluator.compute().metrics["loc/gt_class_error"] == 0.0


def test_unusable_images_are_told_in_the_end():
    with pytest.raises(ValueError, match="got 2 images without any"):
        images([([(0, SQUARE)], 0, []), ([(0, SQUARE)], 1, []), ([(0, SQUARE)], 1, [SQUARE])]).compute()
    with pytest.raises(ValueError, match=r"labels must be 0\.\.2, got 3"):
        images([([(3, SQUARE)], 3, [SQUARE])]).compute()
    with pytest.raises(ValueError, match="got nan or inf in 1 images"):
        images([([(0, SQUARE)], 0, [SQUARE]), ([(0, (0, 0, 1, math.inf))], 0, [SQUARE])]).compute()
    evaluator = LocalizationEvaluator("ab")
    evaluator.update(**padded([([(0, SQUARE)], 0, [SQUARE])]), gt_class_boxes=torch.full((1, 4), math.nan))
    with pytest.raises(ValueError, match="got nan or inf in 1 images"):
        evaluator.compute()


@pytest.mark.parametrize("name, shape", [("labels", (1,)), ("boxes", (1, 4)), ("gt_labels", (1, 1)),
                                         ("gt_boxes", (1, 2, 4)), ("gt_valid", (2, 1)), ("valid", (1, 2))])
def test_shapes_that_do_not_fit_are_refused(name, shape):
    data = padded([([(0, SQUARE)], 0, [SQUARE])])
    with pytest.raises(ValueError, match="Pad guesses and objects to one number"):
        LocalizationEvaluator("ab").update(**{**data, name: torch.zeros(shape).to(data[name].dtype)})


def test_guesses_without_an_axis_are_refused():
    data = padded([([(0, SQUARE)], 0, [SQUARE])])
    data.update({name: data[name][:, 0] for name in ("labels", "boxes", "valid")})
    with pytest.raises(ValueError, match=r"got \(1,\), \(1, 4\), \(1,\), "):
        LocalizationEvaluator("ab").update(**data)


def test_nothing_added_and_reset():
    evaluator = images([([(0, SQUARE)], 0, [SQUARE])])
    evaluator.reset()
    assert set(evaluator.compute().metrics.values()) == {-1.0}


def test_update_never_waits_for_the_device():
    with FakeTensorMode():  # whatever needs a value, not only a shape, raises
        labels, valid = torch.zeros(3, 5, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)
        LocalizationEvaluator("ab").update(labels, torch.zeros(3, 5, 4), labels[:, 0], torch.zeros(3, 2, 4), valid,
                                           gt_class_boxes=torch.zeros(3, 4), counted=valid[:, 0])


def overlap(a: tuple, b: tuple) -> float:
    """The kit's IoU of xyxy boxes, in inclusive corners."""
    a, b = ((x1 + 1, y1 + 1, x2, y2) for x1, y1, x2, y2 in (a, b))
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1))
    if w <= 0 or h <= 0:
        return -1.0
    sizes = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b)]
    return w * h / (sum(sizes) - w * h)


def kit_errors(rows: list, guesses: int) -> tuple[float, float]:
    """eval_clsloc's loops: errors of localization and of classification."""
    localization, classification = 0.0, 0.0
    for predictions, label, objects in rows:
        wrong = [float(predicted != label) for predicted, _ in predictions[:guesses]]
        classification += min(wrong)
        localization += min(max(d, min(float(overlap(box, other) < 0.5) for other in objects))
                            for d, (_, box) in zip(wrong, predictions))
    return localization / len(rows), classification / len(rows)


corner_boxes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))
image_rows = st.lists(st.tuples(
    st.lists(st.tuples(st.integers(0, 2), corner_boxes), min_size=1, max_size=6), st.integers(0, 2),
    st.lists(corner_boxes, min_size=1, max_size=3)), min_size=1, max_size=6)


@given(image_rows, st.integers(1, 6))
def test_localization_equals_the_kits_loops_in_parts_and_merged(rows, cut):
    merged = LocalizationEvaluator(("cat", "dog", "owl"))
    merged.merge([images(part).state() for part in (rows[cut:], rows[:cut]) if part])
    (loc1, cls1), (loc5, cls5) = kit_errors(rows, 1), kit_errors(rows, 5)
    assert errors(merged) == (loc1, loc5, cls1, cls5)


# Detection


def flat(truths: list, found: list) -> tuple[Truths, Found]:
    """From rows (image, label, (x1, y1, x2, y2)) and (image, label, (x1, y1, x2, y2), score)."""
    def columns(rows: list) -> list:
        image, label = torch.tensor([row[:2] for row in rows], dtype=torch.int64).reshape(-1, 2).unbind(1)
        boxes = torch.tensor([row[2] for row in rows], dtype=torch.float64).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        return [image, label, boxes]

    image, label, boxes = columns(truths)
    no = torch.zeros(len(boxes), dtype=torch.bool)
    ground_truth = Truths(image, label, boxes, boxes[:, 2] * boxes[:, 3], no, no)
    image, label, boxes = columns(found)
    scores = torch.tensor([row[3] for row in found], dtype=torch.float64)
    return ground_truth, Found(image, label, boxes, scores, boxes[:, 2] * boxes[:, 3])


def test_thresholds_by_size():
    sizes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 30], [0, 0, 25, 25], [5, 5, 300, 200]]).double()
    assert relaxed_threshold(sizes).tolist() == [0.25, 0.375, 0.5, 0.5]  # of 25 x 25: .5102, limited


def test_a_small_object_is_found_with_less():
    small, around = (5, 5, 15, 15), (0, 0, 20, 20)  # the example of the kit's readme: IoU .25
    assert ilsvrc_ap(*flat([(0, 0, small)], [(0, 0, around, 0.9)]), 1) == [1.0]
    assert ilsvrc_ap(*flat([(0, 0, small)], [(0, 0, (0, 0, 20, 21), 0.9)]), 1) == [0.0]
    assert voc_ap(*flat([(0, 0, small)], [(0, 0, around, 0.9)]), 1) == [0.0]


def test_the_threshold_is_the_objects_not_the_detections():
    assert ilsvrc_ap(*flat([(0, 0, (0, 0, 40, 40))], [(0, 0, (0, 0, 20, 20), 0.9)]), 1) == [0.0]


def test_a_detection_takes_the_best_free_object():
    truths = [(0, 0, (0, 0, 40, 40)), (0, 0, (0, 8, 40, 48))]
    found = [(0, 0, (0, 0, 40, 40), 0.9), (0, 0, (0, 1, 40, 41), 0.8)]  # the second prefers the first object
    assert ilsvrc_ap(*flat(truths, found), 1) == [1.0] and voc_ap(*flat(truths, found), 1) == [0.5]


def test_a_detection_takes_the_object_it_overlaps_most():
    truths = [(0, 0, (0, 8, 40, 48)), (0, 0, (0, 0, 40, 40))]
    found = [(0, 0, (0, 0, 40, 40), 0.9), (0, 0, (0, 16, 40, 56), 0.8)]  # .67 and 1; then .67 and .43
    assert ilsvrc_ap(*flat(truths, found), 1) == [1.0]


def test_the_higher_score_takes_the_object_whatever_its_overlap():
    found = [(0, 0, (0, 0, 40, 40), 0.8), (0, 0, (0, 0, 40, 30), 0.9)]
    assert judge(*flat([(0, 0, (0, 0, 40, 40))], found), 1).right.tolist() == [True, False]


def test_an_object_without_area_is_found_by_nothing():
    assert ilsvrc_ap(*flat([(0, 0, (5, 5, 5, 5))], [(0, 0, (9, 9, 20, 20), 0.9)]), 1) == [0.0]


def test_a_duplicate_is_wrong():
    rows = [(0, 0, (0, 0, 40, 40), 0.9), (0, 0, (0, 0, 40, 40), 0.8), (0, 0, (60, 60, 90, 90), 0.7)]
    verdicts = judge(*flat([(0, 0, (0, 0, 40, 40)), (0, 0, (60, 60, 90, 90))], rows), 1)
    assert verdicts.right.tolist() == [True, False, True] and verdicts.wrong.tolist() == [False, True, False]
    assert verdicts.curve(0)[1].tolist() == [1.0, 0.5, 2 / 3]


def test_of_equal_overlaps_the_earlier_object_is_taken():
    truths = [(0, 0, (0, 0, 40, 40)), (0, 0, (10, 0, 50, 40))]
    found = [(0, 0, (5, 0, 45, 40), 0.9), (0, 0, (0, 0, 30, 40), 0.8)]  # 7/9 with both; .75 with one, .4 with the other
    assert ilsvrc_ap(*flat(truths, found), 1) == [0.5]
    assert ilsvrc_ap(*flat(truths[::-1], found), 1) == [1.0]


def test_evaluator_and_its_blacklist(make_dataset, make_batch):
    box, far = (0, 0, 40, 40), (50, 50, 90, 90)
    dataset = make_dataset({"c": [], "a": [(0, box)], "b": [(0, far), (1, far)]}, size=(100, 100))
    found = {"a": [(0, box, 0.5)], "b": [(0, box, 0.9), (1, far, 0.9)], "c": [(1, far, 0.3)]}

    def result(*arguments):
        evaluator = IlsvrcDetectionEvaluator(dataset, *arguments)
        evaluator.update(*make_batch(dataset, found))
        return evaluator.compute()

    assert result().per_class == {"cat": {"ilsvrc/AP": 0.25}, "dog": {"ilsvrc/AP": 1.0}}
    assert result().metrics == {"ilsvrc/AP": 0.625}
    assert result([("b", "cat")]).per_class == {"cat": {"ilsvrc/AP": 1.0}, "dog": {"ilsvrc/AP": 1.0}}
    assert result([("b", "dog"), ("c", "dog")]).metrics == {"ilsvrc/AP": 0.25}
    for unknown in (("z", "cat"), ("a", "cow")):
        with pytest.raises(ValueError, match="a blacklist must name images and classes of 'tiny'"):
            result([unknown])


def test_nothing_at_all():
    assert ilsvrc_ap(*flat([], []), 2) == [-1.0, -1.0]
    assert ilsvrc_ap(*flat([], [(0, 0, SQUARE, 0.5)]), 2) == [-1.0, -1.0]
    assert ilsvrc_ap(*flat([(0, 0, SQUARE)], []), 2) == [0.0, -1.0]


def kit_ap(truths: list, found: list, skipped: list, label: int) -> float:
    """eval_detection's description, one detection after another."""
    positives = sum(row[1] == label and row[:2] not in skipped for row in truths)
    if not positives:
        return -1.0
    taken, points, tp, fp = set(), [(0.0, 0.0)], 0, 0
    for image, _, box, _ in sorted(sorted((row for row in found if row[1] == label), key=lambda row: row[0]),
                                   key=lambda row: -row[3]):
        if (image, label) in skipped:
            continue
        best, best_overlap = None, -math.inf
        for j, (other_image, other_label, other) in enumerate(truths):
            if (other_image, other_label) != (image, label) or j in taken:
                continue
            x1, y1, x2, y2 = other[0] + 1, other[1] + 1, *other[2:]
            w, h = x2 - x1 + 1, y2 - y1 + 1
            value = overlap(box, other)
            if value > 0 and value >= min(0.5, w * h / ((w + 10) * (h + 10))) and value > best_overlap:
                best, best_overlap = j, value
        taken.add(best)
        tp, fp = (tp, fp + 1) if best is None else (tp + 1, fp)
        points.append((tp / positives, tp / (tp + fp)))
    return math.fsum((r - last) * max(p for q, p in points if q >= r)
                     for (last, _), (r, _) in zip(points, points[1:]))


detection_boxes = st.tuples(*[st.sampled_from([0, 2, 4])] * 2, *[st.sampled_from([8, 10, 40])] * 2).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))
places = (st.integers(0, 1), st.integers(0, 1))


@settings(max_examples=300)
@given(st.lists(st.tuples(*places, detection_boxes), max_size=8),
       st.lists(st.tuples(*places, detection_boxes, st.sampled_from([0.1, 0.5, 0.9])), max_size=12),
       st.lists(st.tuples(*places), max_size=1))
def test_detection_equals_the_kits_loop(truths, found, skipped):
    pairs = torch.tensor(skipped, dtype=torch.int64).reshape(-1, 2)
    assert ilsvrc_ap(*flat(truths, found), 2, pairs) == [kit_ap(truths, found, skipped, label) for label in (0, 1)]
