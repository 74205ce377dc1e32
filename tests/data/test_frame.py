"""Frames and masks drawn through them, beside arrays that are resized, cropped and mirrored."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detres.config import SourceConfig
from detres.data.dataset import load_dataset
from detres.data.frame import Frame
from detres.data.masks import compressed, rasterize, rasterize_part, whole_masks
from detres.data.transforms import mirror_masks, resize_masks

sides = st.integers(1, 60)
# Tenths and halves are where rounding decides; some points lie outside.
points = st.lists(st.tuples(*[st.one_of(st.integers(-100, 700).map(lambda tenth: tenth / 10), st.floats(-10, 70))] * 2),
                  min_size=3, max_size=8)
polygons = st.lists(points.map(lambda pairs: [value for pair in pairs for value in pair]), min_size=1, max_size=3)


def in_place(part: np.ndarray, first: int, height: int, width: int) -> np.ndarray:
    whole = np.zeros((height, width), np.uint8)
    whole[:part.shape[0], first:first + part.shape[1]] = part
    return whole


@given(polygons, sides, sides)
@settings(deadline=None, max_examples=300)
def test_parts_have_the_bits_of_whole_bitmaps(segmentation, height, width):
    expected = rasterize(segmentation, height, width)
    np.testing.assert_array_equal(in_place(*rasterize_part(segmentation, height, width), height, width), expected)
    code = compressed(segmentation, height, width)
    for counts in (code["counts"], code["counts"].decode()):
        part = rasterize_part({"size": [height, width], "counts": counts}, height, width)
        np.testing.assert_array_equal(in_place(*part, height, width), expected)


def test_parts_are_small():
    part, first = rasterize_part([[300, 20, 340, 20, 340, 50]], 480, 640)
    assert first == 301 and part.shape == (52, 41)
    assert rasterize_part(None, 480, 640)[0].size == 0 == rasterize_part([[-9, -9, -5, -9, -5, -5]], 480, 640)[0].size


@pytest.mark.data
def test_parts_of_real_objects(shared_data):
    dataset = load_dataset(SourceConfig(path=str(shared_data / "coco_mini")), "val")
    for record in dataset.records[:30]:
        for item in record.annotations:
            size = record.height, record.width
            np.testing.assert_array_equal(in_place(*rasterize_part(item.segmentation, *size), *size),
                                          rasterize(item.segmentation, *size))


@given(st.tuples(sides, sides), st.tuples(sides, sides), st.data())
@settings(deadline=None, max_examples=100)
def test_views_are_the_resized_cropped_and_mirrored_bitmaps(source, size, data):
    height, width = source
    segmentations = [[[1, 1, width * 0.8, 2, width / 2, height * 0.9]], [[0, 0, width, 0, width, height, 0, height]],
                     compressed([[0, 0, 3, 0, 3, 9, 0, 9]], height, width), [[-9, -9, -5, -9, -5, -5]]]
    views = whole_masks(segmentations, height, width)
    masks = views.bitmaps()
    views, masks = views.resized(size), resize_masks(masks, size)
    for _ in range(2):  # mirrored before and after it is cropped
        if data.draw(st.booleans()):
            views, masks = views.mirrored(), mirror_masks(masks)
        y, x = (data.draw(st.integers(0, side - 1)) for side in masks.shape[1:])
        h, w = (data.draw(st.integers(1, side - first)) for side, first in zip(masks.shape[1:], (y, x)))
        views, masks = views.window(y, x, h, w), masks[:, y:y + h, x:x + w]
    np.testing.assert_array_equal(views.bitmaps(), masks)
    assert views.shape == masks.shape and views.any((1, 2)).tolist() == masks.any((1, 2)).tolist()
    np.testing.assert_array_equal(views[1], masks[1])
    for rows in (np.array([2, 0]), np.array([True, False, False, True]), slice(1, 3), []):
        np.testing.assert_array_equal(views[rows].bitmaps(), masks[rows])


def test_nearest_pixels_are_those_of_opencv():
    image = np.arange(37 * 53, dtype=np.uint16).reshape(37, 53)
    for size in ((37, 53), (80, 100), (11, 90), (1, 1)):
        rows, columns = Frame.whole((37, 53)).resize(size).nearest()
        np.testing.assert_array_equal(image[rows][:, columns],
                                      cv2.resize(image, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT))
