"""Every kind of problem of labels, and what must not be told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detres.data.check.labels import check_labels, overlapping
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.kinds import KINDS
from detres.data.splits import find_splits

BOX = (10, 10, 50, 40)
CLASSES = ("ant", "bee")


def dataset(*images, classes=CLASSES, ids=None, form="coco") -> Dataset:
    """Each image is a list of (label, box) or (label, box, crowd)."""
    number = iter(range(1, 10**6))
    records = tuple(ImageRecord(place, Path(f"{place}.jpg"), 100, 200, tuple(
        Annotation(next(number), label, tuple(map(float, box)), crowd=bool(crowd)) for label, box, *crowd in items))
        for place, items in enumerate(images))
    return Dataset("set", form, classes, ids or tuple(range(1, len(classes) + 1)), records)


def kinds(*splits: Dataset, names=("train", "val", "test"), but=("class_rare", "class_unused")) -> list[str]:
    problems = check_labels(list(zip(names, splits)))
    for problem in problems:
        assert problem.reason.startswith("must ") and problem.kind in KINDS and problem.split in names and problem.file
    return [problem.kind for problem in problems if problem.kind not in but]


def test_sound_labels():
    assert kinds(dataset([(0, BOX), (1, (60, 10, 90, 40))], [(0, BOX), (0, (12, 14, 54, 46))])) == []
    assert kinds(dataset()) == kinds() == []


def test_objects_drawn_twice():
    near = (10.5, 10, 51, 40.5)
    data = dataset([(0, (0, 0, 5, 5)), (0, BOX), (0, near)], [(0, BOX)], [(1, BOX)])
    problem, = [problem for problem in check_labels([("train", data)]) if problem.kind == "object_twice"]
    assert (problem.image, problem.annotation_id, problem.field, problem.value) == (0, 3, "bbox", [10.5, 10, 40.5, 30.5])
    assert "annotation 2" in problem.reason
    assert kinds(dataset([(0, BOX)] * 4)) == ["object_twice"] * 3, "each with the first"
    assert kinds(dataset([(0, BOX), (0, BOX, "crowd")])) == []
    assert kinds(dataset([(0, BOX), (1, near)])) == ["object_two_classes"]
    assert kinds(dataset([(0, BOX), (1, (10, 10, 50, 43))])) == [], "a cat that fills its sofa: IoU 0.91"
    voc = check_labels([("train", dataset([(0, BOX), (0, BOX)], form="voc"))])[0]
    assert (voc.field, voc.value) == ("box", list(BOX)) and str(list(map(float, BOX))) in voc.reason, "it has no ids"


@pytest.mark.parametrize("least", [0.9, 0.6, 0.3])
def test_overlaps_are_those_of_all_pairs(least):
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 40, (300, 2))
    boxes = np.concatenate([start, start + rng.uniform(1, 40, (300, 2))], 1)
    boxes[::7] = boxes[0] + rng.uniform(0, 1, (len(boxes[::7]), 4))
    boxes[::7, 2:] += 5
    image = rng.integers(0, 4, 300)
    expected = {}
    for a in range(300):
        for b in range(a + 1, 300):
            w, h = (min(boxes[a, i + 2], boxes[b, i + 2]) - max(boxes[a, i], boxes[b, i]) for i in (0, 1))
            shared = max(w, 0) * max(h, 0)
            areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (boxes[a], boxes[b])]
            if image[a] == image[b] and shared / (sum(areas) - shared) >= least:
                expected[a, b] = shared / (sum(areas) - shared)
    first, second, iou = overlapping(image, boxes, least)
    assert list(zip(first.tolist(), second.tolist())) == sorted(expected, key=lambda pair: pair[::-1])
    np.testing.assert_allclose(iou, [expected[pair] for pair in zip(first, second)])
    assert len(expected) > 50


def test_tiny_boxes():
    assert kinds(dataset([(0, (5, 5, 5.5, 40))])) == ["box_under_pixel"]
    assert kinds(dataset([(0, (5, 5, 8, 8.5))])) == ["box_speck"]
    assert kinds(dataset([(0, (5, 5, 6, 9))])) == [], "thin, not small"


def test_boxes_that_are_the_image():
    whole = [[(0, (0, 0, 200, 100))]] * 10
    assert kinds(dataset(*whole, [(0, BOX)])) == ["class_fills_images"]
    assert kinds(dataset(*whole, *[[(0, BOX)]] * 10)) == [], "half of them: sofas are large"
    assert kinds(dataset(*whole[1:])) == []


def test_class_names():
    for names, found in ((("Person", "person"), 1), (("traffic light", "traffic_light"), 1), (("cars", "car"), 1),
                         (("box", "boxes"), 1), (("glass", "glasses"), 1), (("bus", "bu"), 0), (("mas", "mass"), 0),
                         (("cat", "cattle"), 0), (("ab", "abs"), 0)):
        assert kinds(dataset([(0, BOX)], classes=names)) == ["class_name_variant"] * found, names
    assert kinds(dataset([(0, BOX)], classes=("car ", "bus"))) == ["class_name_blank"]
    assert kinds(dataset([(0, BOX)], classes=("car ", "car"))) == ["class_name_blank", "class_name_variant"]


def test_images_without_annotations():
    data = dataset([(0, BOX)], [], [])
    assert [problem.image for problem in check_labels([("train", data)]) if problem.kind == "image_empty"] == [1, 2]
    assert kinds(dataset([], [])) == [], "that nothing is annotated is told once, by the reader"


def test_classes_that_are_missing():
    bees, ants = dataset([(1, BOX)]), dataset([(0, BOX)])
    assert kinds(ants, bees, but=()) == ["class_rare", "class_not_measured", "class_not_trained"]
    assert kinds(ants, ants, but=()) == ["class_rare", "class_unused"]
    assert kinds(ants, dataset([(0, BOX)], classes=("ant",))) == []
    assert kinds(dataset(*[[(0, BOX)]] * 11, [(1, BOX)] * 30), but=()) == ["class_rare", *["object_twice"] * 29][::-1]
    assert kinds(bees, dataset([]), dataset([]), but=("class_rare", "class_unused", "no_annotations")) == [], \
        "a test split without labels measures nothing"
    assert kinds(bees, ants, names=("valid", "test")) == [], "nothing here is to be trained on"


def test_class_lists_that_differ():
    train = dataset([(0, BOX), (1, (60, 10, 90, 40))])
    assert kinds(train, dataset([(0, BOX)], classes=("bee", "ant"), ids=(2, 1))) == ["class_not_measured"], "same ids"
    assert kinds(train, dataset([(0, BOX), (1, (60, 10, 90, 40))], classes=("bee", "ant"))) == ["class_id_differs"] * 2
    found = kinds(train, dataset([(0, BOX), (1, (60, 10, 90, 40))], classes=("ant", "wasp")))
    assert sorted(found) == ["class_not_measured", "class_not_trained", "class_unknown"]


def shaped(seed: int, exchanged: bool) -> Dataset:
    """Large flat ants and small tall bees."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(30):
        size = rng.uniform(0.8, 1.2, 4)
        images.append([(int(exchanged), (5, 5, 5 + 80 * size[0], 5 + 30 * size[1])),
                       (int(not exchanged), (100, 5, 100 + 10 * size[2], 5 + 20 * size[3]))])
    return dataset(*images)


def test_classes_that_are_exchanged_between_splits():
    assert kinds(shaped(0, False), shaped(1, False)) == []
    problem, = check_labels([("train", shaped(0, False)), ("val", shaped(1, True))])
    assert (problem.kind, problem.split, problem.value) == ("class_exchanged", "val", ["ant", "bee"])


def test_real_data(shared_data):
    """All that is told there is true: objects with two classes, cells drawn twice."""
    def found(folder: str) -> list[str]:
        splits = [(split.name, split.load("drop")) for split in find_splits(shared_data / folder)]
        return [problem.kind for problem in check_labels(splits) if KINDS[problem.kind].severity != "note"]

    assert found("coco_mini") == ["object_two_classes"] * 4
    assert found("bccd/BCCD") == ["object_twice"] * 7
    assert found("voc_mini/VOCdevkit/VOC2012") == found("nuts") == found("balloon") == []


def test_exchanged_cells_are_found(shared_data):
    from dataclasses import replace

    splits = {split.name: split.load("drop") for split in find_splits(shared_data / "bccd" / "BCCD")}
    names = splits["val"].classes
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        mixed = replace(splits["val"], classes=tuple(names[place] for place in order))
        told = [problem.value for problem in check_labels([("train", splits["train"]), ("val", mixed)])
                if problem.kind == "class_exchanged"]
        moved = [name for place, name in enumerate(names) if order[place] != place]
        assert [sorted(pair) for pair in told] == [sorted(moved)]
