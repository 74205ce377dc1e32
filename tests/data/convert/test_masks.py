"""Masks between polygons, run lengths and pixels: exact."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from detres.data.convert.masks import joined, outlines, to_polygons, to_rle
from detres.data.masks import box_of, mask_area, rasterize, run_code


@st.composite
def bitmaps(draw, most=16):
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = rng.random((height, width)) < draw(st.floats(0.05, 0.95))
    return np.kron(coarse, np.ones((draw(st.integers(1, 3)),) * 2)).astype(np.uint8)


@given(bitmaps())
@settings(max_examples=300, deadline=None)
def test_run_lengths_to_polygons_and_back_are_exact(inside):
    """Holes, pixels that touch at corners, pixels at the edge of the image."""
    height, width = inside.shape
    code = run_code(inside.astype(bool), 0, 0, height, width)
    assert (coco_mask.decode(code) == inside).all()
    polygons = to_polygons(code, height, width)
    assert all(len(polygon) >= 8 for polygon in polygons)
    if polygons:
        assert to_rle(polygons, height, width) == code
        assert mask_area(polygons, height, width) == inside.sum()


@given(bitmaps(8), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_window_of_an_image(inside, top, left):
    whole = np.zeros((20 + len(inside), 24 + inside.shape[1]), np.uint8)
    whole[top:top + len(inside), left:left + inside.shape[1]] = inside
    code = run_code(inside.astype(bool), top, left, *whole.shape)
    assert (rasterize(code, *whole.shape) == whole).all()
    if inside.any():
        rows, columns = np.nonzero(whole)
        assert box_of(code) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_outlines_are_short():
    ring = np.ones((5, 6), np.uint8)
    ring[2, 2:4] = 0
    [polygon] = outlines(ring)
    assert len(polygon) == 4 + 1 + 4 + 1  # there, round, and back
    [square] = outlines(np.ones((3, 4), np.uint8))
    assert sorted(map(tuple, square.tolist())) == [(0, 0), (0, 3), (4, 0), (4, 3)]


def test_parts_stay_apart_without_holes():
    inside = np.zeros((4, 9), np.uint8)
    inside[:, :3] = inside[:, 5:] = 1
    assert [len(polygon) for polygon in outlines(inside)] == [4, 4]
    inside[1, 6] = 0  # a hole in one of them
    assert sorted(len(polygon) for polygon in outlines(inside)) == [4, 10]


def test_joined_parts_cover_the_same_pixels():
    parts = [[1, 1, 9, 1, 9, 8], [12, 3, 18.5, 3, 18.5, 9], [3, 12, 9, 12, 9, 18]]
    whole = joined([np.array(part, float).reshape(-1, 2) for part in parts])
    assert to_rle([array("d", whole.ravel())], 20, 20) == to_rle([array("d", part) for part in parts], 20, 20)


@pytest.mark.data
def test_masks_of_coco_come_back_exactly(shared_data):
    import json

    content = json.loads((shared_data / "coco_mini/annotations/instances_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for entry in content["annotations"][::4]:
        size, found = sizes[entry["image_id"]], entry["segmentation"]
        code = to_rle([array("d", part) for part in found] if isinstance(found, list) else found, *size)
        assert to_rle(to_polygons(code, *size), *size) == code
