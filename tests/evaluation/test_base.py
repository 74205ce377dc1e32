"""What evaluators share: collecting, and columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detres.evaluation.base import EvalResult, Evaluator, truths_of


def test_columns_are_in_the_order_of_image_ids(make_dataset, make_batch):
    dataset = make_dataset({"z": [], "a": [(1, (1, 2, 31, 42), {"difficult": True})], "m": [(0, (0, 0, 5, 5))]})
    evaluator = Evaluator(dataset)
    evaluator.update(*make_batch(dataset, {"z": [(0, (0, 0, 9, 9), 0.25)], "m": [(1, (3, 4, 13, 24), 0.5)]}))
    truths, found = truths_of(evaluator.records), evaluator.found()
    assert truths.image.tolist() == [0, 1] and truths.ignore.tolist() == [True, False]
    assert truths.boxes_xywh[0].tolist() == [1, 2, 30, 40] and truths.label.tolist() == [1, 0]
    assert found.image.tolist() == [1, 2] and found.label.tolist() == [1, 0] and found.scores.tolist() == [0.5, 0.25]
    assert found.boxes_xywh[0].tolist() == [3, 4, 10, 20] and found.area.tolist() == [200, 81]


def test_sizes_are_those_of_the_file(make_dataset):
    size = {"size": (38.65, 1.1)}  # 473.07 + 38.65 - 473.07 is not 38.65
    truths = truths_of(make_dataset({1: [(0, (473.07, 0, 473.07 + 38.65, 1.1), size)]}).records)
    assert truths.boxes_xywh.tolist() == [[473.07, 0, 38.65, 1.1]]


def test_an_image_seen_again_replaces_what_was_found_in_it(make_dataset, make_batch):
    dataset = make_dataset({1: [], 2: [], 3: []})
    evaluator = Evaluator(dataset)
    for found in ({1: [(0, (0, 0, 1, 1), 0.1)], 2: [(0, (0, 0, 1, 1), 0.2), (0, (0, 0, 1, 1), 0.3)]},
                  {3: [(0, (0, 0, 1, 1), 0.4)], 2: [(1, (0, 0, 1, 1), 0.5)]}, {1: []}):
        evaluator.update(*make_batch(dataset, found))
    for _ in range(2):
        assert evaluator.found().image.tolist() == [1, 2]
        assert torch.equal(evaluator.found().scores, torch.tensor([0.5, 0.4]).double())
    evaluator.update(*make_batch(dataset, {3: []}))  # after numbers were asked for
    assert evaluator.found().image.tolist() == [1]


def test_results_merge_by_name():
    a = EvalResult({"bbox/AP": 0.5, "val/loss": 1.0}, {"cat": {"bbox/AP": 0.5}}, {"bbox": 1})
    b = EvalResult({"segm/AP": 0.25}, {"cat": {"segm/AP": 0.25}, "dog": {"segm/AP": 0.0}}, {"segm": 2})
    both = a.merged(b)
    assert both.metrics == {"bbox/AP": 0.5, "val/loss": 1.0, "segm/AP": 0.25}
    assert both.per_class == {"cat": {"bbox/AP": 0.5, "segm/AP": 0.25}, "dog": {"segm/AP": 0.0}}
    assert both.curves == {"bbox": 1, "segm": 2}


def test_the_table_has_a_column_for_every_name():
    table = EvalResult({"panoptic/PQ": 0.5, "panoptic/PQ_th": 0.25}, {"cat": {"panoptic/PQ": 1.0, "panoptic/SQ": 0.75}})
    assert [line.split() for line in table.table().splitlines()[::2]] == [
        ["panoptic", "PQ", "PQ_th", "SQ"], ["all", "0.500", "0.250", "n/a"]]
    assert table.table().splitlines()[-1].split() == ["cat", "1.000", "n/a", "0.750"]
    large = EvalResult({"val/loss": 14.706, "val/loss_cls": 1234.5678}).table()
    assert large.splitlines()[-1].split() == ["all", "14.706", "1234.568"]


def test_a_batch_has_an_image_once(make_dataset, make_batch):
    dataset = make_dataset({1: [], 2: []})
    detections, batch = make_batch(dataset, {1: [(0, (0, 0, 1, 1), 0.1)], 2: []})
    with pytest.raises(ValueError, match=r"must differ, got ids \[1, 1\]"):
        Evaluator(dataset).update(detections, replace(batch, image_ids=(1, 1)))


def test_detections_do_not_keep_a_graph_alive(make_dataset, make_batch):
    dataset = make_dataset({1: []})
    detections, batch = make_batch(dataset, {1: [(0, (0, 0, 1, 1), 0.1)]})
    evaluator = Evaluator(dataset)
    evaluator.update(replace(detections, boxes=detections.boxes.requires_grad_()), batch)
    assert not evaluator.found().boxes_xywh.requires_grad
