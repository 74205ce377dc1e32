"""Each usual mistake is made on purpose and must be named, alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detres.evaluation.coco_files import results_columns, truth_columns
from detres.evaluation.diagnosis import diagnose

CATEGORIES = (1, 2, 5, 9, 20)


def scene(seed: int = 0, images: int = 60, sized: bool = True):
    """Ground truth with five objects an image, and detections: each object jittered, and as many anywhere."""
    random = np.random.default_rng(seed)
    listed, annotations, found = [], [], []
    for i in range(images):
        height, width = (int(side) for side in random.integers(300, 640, 2))
        image_id = 1000 + 7 * i
        listed.append({"id": image_id, **({"height": height, "width": width} if sized else {})})
        for _ in range(5):
            size = random.uniform(20, 150, 2)
            box = np.concatenate([random.uniform(0, (width, height) - size), size])
            label = int(random.choice(CATEGORIES))
            common = {"image_id": image_id, "category_id": label}
            annotations.append({**common, "id": len(annotations) + 1, "area": 1, "bbox": box.tolist()})
            found.append({**common, "bbox": (box + random.normal(0, 2, 4)).tolist(), "score": 0.9})
            size = random.uniform(20, 150, 2)
            elsewhere = np.concatenate([random.uniform(0, (width, height) - size), size])
            found.append({**common, "bbox": elsewhere.tolist(), "score": float(random.uniform())})
    truth = {"images": listed, "annotations": annotations, "categories": [{"id": i} for i in CATEGORIES]}
    return truth_columns(truth), results_columns(found)


TRUTH, RESULTS = scene()
PLACE = np.searchsorted(TRUTH.images.ids, RESULTS.image_ids)
SIZES = np.stack([TRUTH.images.width, TRUTH.images.height], 1)[PLACE].astype(float)
BOXES = RESULTS.boxes_xywh
CORNERS = np.concatenate([BOXES[:, :2], BOXES[:, :2] + BOXES[:, 2:]], 1)
CENTRES = np.concatenate([BOXES[:, :2] + BOXES[:, 2:] / 2, BOXES[:, 2:]], 1)
WHOLE = np.tile(SIZES, 2)
LONGER, SHORTER = SIZES.max(1, keepdims=True), SIZES.min(1, keepdims=True)
MIDDLE = BOXES * 640 / LONGER + np.concatenate([(640 - SIZES * 640 / LONGER) / 2, 0 * SIZES], 1)
LABELS = np.searchsorted(CATEGORIES, RESULTS.category_ids)

MISTAKES = {
    "corners": (dict(boxes_xywh=CORNERS), "Boxes are [x1, y1, x2, y2]:"),
    "fractions": (dict(boxes_xywh=BOXES / WHOLE), "Boxes are in fractions of the image's width and height:"),
    "corners in fractions": (
        dict(boxes_xywh=CORNERS / WHOLE),
        "Boxes are [x1, y1, x2, y2], in fractions of the image's"),
    "YOLO": (dict(boxes_xywh=CENTRES / WHOLE), "Boxes are [center x, center y, width, height], in fractions of the"),
    "transposed": (
        dict(boxes_xywh=BOXES[:, [1, 0, 3, 2]]),
        "Boxes are exchanged in x and y, as of a transposed image:"),
    "800": (
        dict(boxes_xywh=BOXES * np.minimum(800 / SHORTER, 1333 / LONGER)),
        "Boxes are in pixels of the image resized to a shorter side of 800, a longer of at most 1333:"),
    "square": (dict(boxes_xywh=BOXES / WHOLE * 1024), "Boxes are in pixels of the image resized to 1024 x 1024:"),
    "longer": (
        dict(boxes_xywh=BOXES / LONGER * 1024),
        "Boxes are in pixels of the image resized to a longer side of 1024:"),
    "middle": (dict(boxes_xywh=MIDDLE), "Boxes are in pixels of the image resized into the middle of 640 x 640:"),
    "label high": (dict(category_ids=RESULTS.category_ids + 1), "Category ids are one too high:"),
    "label low": (dict(category_ids=RESULTS.category_ids - 1), "Category ids are one too low:"),
    "label from 0": (
        dict(category_ids=LABELS),
        "Category ids are positions in the ground truth's list, counted from 0:"),
    "label from 1": (
        dict(category_ids=LABELS + 1),
        "Category ids are positions in the ground truth's list, counted from 1:"),
    "labels": (dict(category_ids=np.array(CATEGORIES)[(LABELS + 2) % 5]), "Classes are wrong: "),
    "image high": (dict(image_ids=RESULTS.image_ids + 1), "Image ids are one too high:"),
    "image low": (dict(image_ids=RESULTS.image_ids - 1), "Image ids are one too low:"),
    "image from 0": (dict(image_ids=PLACE), "Image ids are positions in the ground truth's list, counted from 0:"),
    "image from 1": (dict(image_ids=PLACE + 1), "Image ids are positions in the ground truth's list, counted from 1:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_named(mistake):
    changes, cause = MISTAKES[mistake]
    told = diagnose(TRUTH, replace(RESULTS, **changes))
    assert len(told) == 1 and told[0].startswith(cause)


def test_mistakes_add_up():
    wrong = replace(RESULTS, image_ids=RESULTS.image_ids - 1, boxes_xywh=CORNERS, category_ids=RESULTS.category_ids + 1)
    told = diagnose(TRUTH, wrong)
    assert [text.split(":")[0] for text in told] == ["Image ids are one too low", "Boxes are [x1, y1, x2, y2]",
                                                     "Category ids are one too high"]


def test_images_that_all_exist_are_judged_by_overlaps():
    truth = replace(TRUTH, images=replace(TRUTH.images, ids=np.arange(60)), image_ids=(TRUTH.image_ids - 1000) // 7)
    told = diagnose(truth, replace(RESULTS, image_ids=PLACE - 1))
    assert len(told) == 1 and told[0].startswith("Image ids are one too low: corrected, 302 of 600 sampled")


def test_what_is_told():
    truth = truth_columns({"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [100 * i, 50, 40, 40]} for i in (1, 2, 3)]})
    found = results_columns([{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [100 * i, 50, 100 * i + 40, 90]}
                             for i in (1, 2, 3, 9)])
    assert diagnose(truth, found) == [
        "Boxes are [x1, y1, x2, y2]: corrected, 3 of 4 sampled detections overlap an object with an IoU of 0.5 or "
        "more; as they are, 0. Write [x, y, width, height] in pixels of the original image."]


def corners(results):
    boxes = results.boxes_xywh
    return replace(results, boxes_xywh=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))


def test_the_best_detections_of_an_image_decide():
    poor = [{"image_id": int(image), "category_id": 1, "score": 0.01, "bbox": [0, 0, 1, 1]}
            for image in TRUTH.images.ids for _ in range(40)]
    good = [{"image_id": int(image), "category_id": 1, "score": 0.9, "bbox": box}
            for image, box in zip(TRUTH.image_ids, TRUTH.boxes_xywh.tolist())]
    told = diagnose(TRUTH, corners(results_columns(poor + good)))
    assert told[0].startswith("Boxes are [x1, y1, x2, y2]: corrected, 300 of 600 sampled")


def test_one_change_is_preferred_to_two():
    boxes = [[20 * i, 20 * i, 20, 20] for i in range(19)] + [[300, 20, 30, 10]]  # the last is exchanged in x and y
    truth = truth_columns({"images": [{"id": i, "height": 400, "width": 400} for i in (1, 2)],
                           "categories": [{"id": 1}], "annotations": [
                               {"id": i, "image_id": 1 + i % 2, "category_id": 1, "bbox": box}
                               for i, box in enumerate(boxes)]})
    boxes[-1] = [20, 300, 10, 30]
    found = results_columns([{"image_id": 1 + i % 2, "category_id": 1, "score": 1, "bbox": [v / 400 for v in box]}
                             for i, box in enumerate(boxes)])
    assert diagnose(truth, found)[0].startswith(
        "Boxes are in fractions of the image's width and height: corrected, 19 of")


def test_nothing_is_named_without_a_reason():
    shuffled = np.random.default_rng(1).permutation(len(BOXES))
    assert diagnose(TRUTH, RESULTS) == []
    assert diagnose(TRUTH, replace(RESULTS, boxes_xywh=BOXES[shuffled])) == []  # a model that has learnt nothing
    assert diagnose(TRUTH, replace(RESULTS, boxes_xywh=BOXES * np.nan)) == []


def test_without_detections_or_objects():
    nobody = np.zeros(0, np.int64)
    assert diagnose(TRUTH, RESULTS.select(nobody)) == diagnose(TRUTH.select(nobody), RESULTS) == []
    assert diagnose(TRUTH.select(nobody), RESULTS.select(nobody)) == []


def test_sizes_of_images_and_numeric_ids_may_be_missing():
    truth, results = scene(sized=False)
    named = replace(truth, image_ids=truth.image_ids.astype(str),
                    images=replace(truth.images, ids=truth.images.ids.astype(str)))
    told = diagnose(named, replace(corners(results), image_ids=results.image_ids.astype(str)))
    assert len(told) == 1 and told[0].startswith("Boxes are [x1, y1, x2, y2]:")


def test_only_a_sample_of_a_large_set_is_used():
    truth, results = scene(images=900)
    told = diagnose(truth, corners(results))
    assert len(told) == 1 and "of 4000 sampled detections" in told[0]


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(MISTAKES)))
def test_the_order_of_the_results_does_not_matter(seed, mistake):
    order = np.random.default_rng(seed).permutation(len(BOXES))
    wrong = replace(RESULTS, **MISTAKES[mistake][0])
    assert diagnose(TRUTH, wrong.select(order)) == diagnose(TRUTH, wrong)
