"""Outlines that cross themselves, areas and boxes of masks: against plain loops."""

from __future__ import annotations

import json
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detres.data.check import geometry
from detres.data.check.geometry import _crossings, _polygon_areas
from detres.data.check.layout import wrong_layout
from detres.data.check.run import check_annotations
from detres.data.problems import segmentation_problem, unsound_polygons

points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=12)


def packed(polygons):
    lengths = np.array([len(polygon) for polygon in polygons])
    return np.array([point for polygon in polygons for point in polygon], float), np.cumsum(lengths) - lengths, lengths


def side(a, b, c) -> int:
    return np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def crosses(polygon) -> bool:
    edges = list(zip(polygon, polygon[1:] + polygon[:1]))
    return any(side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
               for i, (a, b) in enumerate(edges) for c, d in edges[i + 1:])


@settings(max_examples=200, deadline=None)
@given(st.lists(points, min_size=1, max_size=8))
def test_crossings_are_those_of_every_pair_of_edges(polygons):
    assert _crossings(*packed(polygons)).tolist() == [crosses(polygon) for polygon in polygons]


def test_polygons_of_very_different_lengths():
    circle = [(100 + 50 * np.cos(t), 100 + 50 * np.sin(t)) for t in np.linspace(0, 6.2, 700)]
    bow = [(10, 10), (30, 40), (30, 10), (10, 40)]
    pentagram = [(100 + 50 * np.cos(t), 100 + 50 * np.sin(t)) for t in np.arange(5) * 4 * np.pi / 5]
    closed = [(0, 0), (9, 0), (9, 9), (0, 9), (0, 0)]
    square = [(600.25, 400.5), (640.75, 400.5), (640.75, 480), (600.25, 480)]
    assert _crossings(*packed([circle, bow, square, pentagram, closed])).tolist() == [False, True, False, True, False]
    assert _polygon_areas(*packed([square, closed])) == pytest.approx([40.5 * 79.5, 81])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 5.0, -3.5, float("nan"), float("inf"), -1e7, 1e300]), max_size=9),
                max_size=6))
def test_polygons_seen_together_are_those_seen_alone(polygons):
    polygons = [array("d", polygon) for polygon in polygons]
    alone = [i for i, polygon in enumerate(polygons) if segmentation_problem([polygon], None, None)]
    assert unsound_polygons(polygons) == alone


def test_chunks_and_processes_find_the_same(coco, monkeypatch):
    coco.content["annotations"] = [coco.first | {"id": number, "image_id": (7, 3)[number % 2], "area": 600 + number}
                                   for number in range(1, 300)]
    coco.file.parent.mkdir(exist_ok=True)
    coco.file.write_text(json.dumps(coco.content))
    alone = check_annotations(coco.root, workers=1)[0].problems
    assert len([problem for problem in alone if problem.kind == "area_differs"]) > 100
    monkeypatch.setattr(geometry, "CHUNK", 1)
    monkeypatch.setattr(geometry, "FEW", 0)
    assert sorted(check_annotations(coco.root, workers=2)[0].problems, key=str) == sorted(alone, key=str)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_boxes_as_they_should_be_are_no_pattern(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(30, 900, (rng.integers(1, 60), 2)).astype(float)
    first = rng.uniform(0, 0.9, sizes.shape) * sizes[:, ::-1]
    second = first + 2 + rng.uniform(0, 1, sizes.shape) * (sizes[:, ::-1] - first - 2)
    corners, limits = np.concatenate([first, second], 1), np.tile(sizes[:, ::-1], 2)
    sides = np.concatenate([first, second - first], 1)
    assert wrong_layout(corners, sizes, "xyxy") is wrong_layout(sides, sizes, "xywh") is None
    centres = np.concatenate([(first + second) / 2, second - first], 1) / limits
    assert wrong_layout(centres, np.ones_like(sizes), "cxcywh") is None
    if len(sizes) >= 40:
        assert wrong_layout(corners, sizes, "xywh") == "boxes_xyxy"
        assert wrong_layout(sides / limits, sizes, "xywh") == "boxes_normalised"
        assert wrong_layout(np.concatenate([(first + second) / 2, second - first], 1), np.ones_like(sizes),
                            "cxcywh") == "boxes_in_pixels"
