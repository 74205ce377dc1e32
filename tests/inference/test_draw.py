"""Pictures of predictions. What they look like is judged by eye; that they are drawn right is tested here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detres.inference import draw as module
from detres.inference.draw import PALETTE, Objects, color_of, draw, draw_objects

GREY = 128


def found(boxes, labels=None, masks=None, names=None, keypoints=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), int) if labels is None else np.array(labels)
    arrays = {"boxes": boxes, "labels": labels, "scores": np.linspace(0.9, 0.5, len(boxes)), "masks": masks}
    arrays["keypoints"] = None if keypoints is None else np.array(keypoints, np.float32)
    return SimpleNamespace(names=names or [f"class {i}" for i in labels], numpy=lambda: arrays, skeleton=((0, 1),))


def grey(height, width):
    return np.full((height, width, 3), GREY, np.uint8)


def changed(picture) -> np.ndarray:
    return (np.array(picture) != GREY).any(-1)


def test_classes_have_colours_of_their_own_that_never_change():
    colors = [color_of(i) for i in range(3 * len(PALETTE))]
    assert len(set(colors)) == len(colors) and color_of(0) == (0x1F, 0x77, 0xD0)
    assert min(min(color) for color in colors) >= 0 and max(max(color) for color in colors) <= 255
    first = np.array(draw(grey(500, 500), found([(10, 10, 200, 200)], [3]), labels=False))
    second = np.array(draw(grey(600, 700), found([(50, 50, 90, 90), (10, 10, 200, 200)], [7, 3]), labels=False))
    assert tuple(first[100, 10]) == tuple(second[100, 10]) == color_of(3)


def test_nothing_found_leaves_the_image_as_it_is():
    image = np.random.default_rng(0).integers(0, 255, (500, 400, 3), np.uint8)
    before = image.copy()
    assert np.array_equal(np.array(draw(image, found([]))), before)
    draw(image, found([(10, 10, 200, 200)]))
    assert np.array_equal(image, before)  # never drawn into


def test_a_box_is_drawn_within_its_bounds():
    marked = changed(draw(grey(480, 640), found([(100, 50, 300, 250)]), labels=False))
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == pytest.approx((100, 50, 300, 250), abs=1)
    assert not marked[70:230, 120:280].any()


def test_keypoints_are_joined_where_both_are_sure():
    points = [[(100, 100, 0.9), (300, 100, 0.8)], [(100, 200, 0.9), (300, 200, 0.01)], [(0, 0, 0), (0, 0, 0)]]
    picture = draw(grey(480, 640), found([(50, 50, 400, 400)] * 3, keypoints=points), boxes=False, labels=False)
    marked = changed(picture)
    assert marked[100, 90:310].any() and marked[100, 105:295].all()  # two points and a line
    assert marked[200, 100] and not marked[190:210, 120:400].any()  # one point
    assert not marked[:50].any()
    assert not changed(draw(grey(480, 640), found([(50, 50, 400, 400)], keypoints=points[:1]), boxes=False,
                            labels=False, keypoint_thresh=0.95)).any()


def test_a_mask_fills_its_object_and_hides_the_box():
    mask = np.zeros((1, 480, 640), bool)
    mask[0, 100:200, 100:200] = True
    prediction = found([(100, 100, 200, 200)], masks=mask)
    marked = changed(draw(grey(480, 640), prediction, labels=False))
    assert marked[mask[0]].all() and not marked[90:210, 90:95].any() and not marked[:90].any()
    assert not changed(draw(grey(480, 640), prediction, labels=False, masks=False, boxes=False)).any()
    wide = found([(50, 50, 300, 300)], masks=mask)
    assert not changed(draw(grey(480, 640), wide, labels=False))[290:].any()
    assert changed(draw(grey(480, 640), wide, labels=False, boxes=True))[290:].any()


def test_small_images_are_enlarged_by_a_whole_factor():
    mask = np.ones((1, 100, 128), bool)
    prediction = found([(0, 0, 128, 100)], masks=mask)
    assert draw(grey(100, 128), prediction).size == (512, 400)
    assert draw(grey(100, 128), prediction, scale=1).size == (128, 100)
    assert draw(grey(480, 300), found([(0, 0, 9, 9)])).size == (300, 480)


@pytest.mark.parametrize("size", [(1, 700), (700, 1), (1, 1), (3, 5)])
@pytest.mark.parametrize("with_masks", [False, True])
def test_odd_images_and_boxes(size, with_masks):
    boxes = [(0, 0, size[1], size[0]), (0, 0, 0, 0), (0, 0, 1, 1)]
    masks = np.stack([np.ones(size, bool), np.zeros(size, bool), np.ones(size, bool)]) if with_masks else None
    scale = max(1, -(-480 // max(size)))
    names = ["a", "κόσμος", "very long name of a class " * 5]
    picture = draw(grey(*size), found(boxes, [0, 1, 2], masks, names), boxes=True)
    assert picture.size == (size[1] * scale, size[0] * scale)


def test_instances_can_have_colours_of_their_own():
    boxes = [(10, 10, 100, 100), (200, 200, 300, 300)]
    picture = np.array(draw(grey(500, 500), found(boxes), labels=False, color_by="instance"))
    assert tuple(picture[50, 10]) == color_of(0) and tuple(picture[250, 200]) == color_of(1)


BOXES = st.lists(st.tuples(*[st.integers(0, 600)] * 2, *[st.integers(1, 200)] * 2).map(
    lambda b: (b[0], b[1], min(b[0] + b[2], 640), min(b[1] + b[3], 640))), max_size=15)


@given(BOXES)
def test_labels_stay_inside_and_apart(boxes):
    corners, size = np.array(boxes, float).reshape(-1, 4), np.array([90.0, 20.0])
    placed = np.zeros((0, 4))
    for box in corners:
        plates = module._places(box, None, size, (640, 640))
        assert (plates >= 0).all() and (plates <= 640).all()
        plate = module._best(plates, placed, corners)
        if plate is not None:
            assert module._shared(plate[None], placed).sum() <= module.CROWDED * size.prod()
            placed = np.vstack([placed, plate])


def test_labels_are_left_out_rather_than_piled_up():
    corners = np.array([[x, y, x + 12, y + 12] for x in range(100, 160, 12) for y in range(100, 160, 12)], float)
    inner = module._places(corners[12], None, np.array([90.0, 20.0]), (640, 640))
    assert module._best(inner, np.zeros((0, 4)), corners) is None
    assert module._best(inner, np.zeros((0, 4)), corners[12:13]) is not None


def test_a_label_lies_on_its_object_where_there_is_room():
    mask = np.zeros((300, 300), bool)
    mask[50:250, 50:250] = True
    middle = module._middle(mask, scale=1)
    assert (middle.x, middle.y, middle.radius) == pytest.approx((150, 150, 100), abs=1)
    favourite = module._places(np.array([50.0, 50, 250, 250]), middle, np.array([80.0, 20.0]), (300, 300))[0]
    assert favourite.tolist() == pytest.approx([110, 140, 190, 160], abs=1)
    cramped = module._places(np.array([50.0, 50, 250, 250]), middle, np.array([80.0, 200.0]), (300, 300))[0]
    assert cramped[1] == 0  # above the object instead, pushed back into the picture


@pytest.mark.parametrize("index", range(len(PALETTE)))
def test_text_can_be_read_on_every_plate(index):
    color, ink = color_of(index), module.ink_on(color_of(index))
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    contrast = 1.05 / (luminance + 0.05) if ink == "white" else (luminance + 0.05) / 0.05
    assert contrast >= 3


def test_text_is_white_where_that_is_readable():
    inks = [module.ink_on(color) for color in (color_of(0), color_of(1), (0, 0, 0), (255, 255, 255))]
    assert inks == ["white", "black", "white", "black"]


# ---- annotations


def test_crowds_are_hatched_and_dashed_and_difficult_objects_dashed():
    mask = np.zeros((480, 640), bool)
    mask[100:300, 100:300] = True
    box = np.array([(100, 100, 300, 300)])

    def marks(masks=None, **flags) -> np.ndarray:
        objects = Objects(box, ["a"], [color_of(0)], masks, **flags)
        return changed(draw_objects(grey(480, 640), objects, labels=False))

    plain, crowd = marks([mask])[120:280, 120:280], marks([mask], crowd=np.array([True]))[120:280, 120:280]
    assert plain.all() and 0.3 < crowd.mean() < 0.7
    edge = (slice(100, 102), slice(110, 290))
    assert marks()[edge].all()
    for flags in ({"crowd": np.array([True])}, {"difficult": np.array([True])}):
        dashes = marks(**flags)[edge]
        assert 0.3 < dashes.mean() < 0.7 and np.abs(np.diff(dashes[0].astype(int))).sum() > 6
