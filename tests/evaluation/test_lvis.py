"""LVIS: random cases against a naive loop, hand-solved cases, and what the package `lvis` gave for real annotations."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detres.evaluation import lvis
from detres.evaluation.coco_files import read_truth, results_columns, truth_columns
from detres.evaluation.coco_numbers import LVIS
from detres.evaluation.lvis import evaluate_lvis, is_lvis, printout

SIZE = 300  # of the images, both ways


def rectangle(x, y, w, h):
    """Its run lengths; x, y, w, h are whole numbers."""
    bitmap = np.zeros((SIZE, SIZE), np.uint8, order="F")
    bitmap[int(y):int(y + h), int(x):int(x + w)] = 1
    code = coco_mask.encode(bitmap)
    return {"size": [SIZE, SIZE], "counts": code["counts"].decode()}


def annotation(image, category, box, **fields):
    return {"image_id": image, "category_id": category, "bbox": box, "segmentation": rectangle(*box),
            "area": box[2] * box[3], **fields}


def detection(image, category, box, score=0.5):
    return {"image_id": image, "category_id": category, "bbox": box, "segmentation": rectangle(*box), "score": score}


def evaluate(annotations, detections, frequency="r", images=None, iou_type="bbox"):
    """With categories 1, 2 ... of these frequencies, and images 1, 2 ... with classes (negative, not exhaustive)."""
    data = {"images": [{"id": i, "height": SIZE, "width": SIZE, "neg_category_ids": negative,
                        "not_exhaustive_category_ids": partial}
                       for i, (negative, partial) in enumerate(images or [([], [])], 1)],
            "categories": [{"id": k, "name": f"c{k}", "frequency": letter} for k, letter in enumerate(frequency, 1)],
            "annotations": [{"id": i, **item} for i, item in enumerate(annotations, 1)]}
    masks = iou_type != "bbox"
    return evaluate_lvis(truth_columns(data, masks), results_columns(detections, masks), iou_type)


# Random cases against a naive loop.


def random_case(rng):
    """Made so that ties, boxes on a threshold, ignored, excused and empty objects are common; all within the images."""
    ids, categories = (rng.permutation(50)[:rng.integers(1, 6)].tolist() for _ in range(2))
    grid = rng.choice([1, 4, 10])

    def box():
        x, y, w, h = (rng.integers(0, 130, 4) // grid * grid + [0, 0, 1, 1]).tolist()
        return [float(value) for value in (x, y, w, h)]

    def some(share):
        return [k for k in [*categories, 99] if rng.random() < share]

    def annotate():
        item = annotation(int(rng.choice(ids)), int(rng.choice(categories)), box(), iscrowd=int(rng.random() < 0.2))
        item["area"] *= float(rng.choice([1, 1, 1, 0.6, 0, -1, 1e10]))
        return {**item, "ignore": int(rng.random() < 0.4)} if rng.random() < 0.5 else item

    def detect():
        score = float(rng.integers(0, 10) / 10)
        if not annotations or rng.random() < 0.3:
            return detection(int(rng.choice(ids)), int(rng.choice(categories)), box(), score)
        item = annotations[rng.integers(len(annotations))]
        near = np.maximum(item["bbox"] + rng.integers(-1, 2, 4) * grid * rng.integers(0, 2), 0).tolist()
        category = item["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
        return detection(item["image_id"], category, near, score)

    annotations = [{"id": i + 1, **annotate()} for i in range(rng.integers(0, 25))]
    images = [{"id": i, "height": SIZE, "width": SIZE, "neg_category_ids": some(0.4),
               "not_exhaustive_category_ids": some(0.3)} for i in ids]
    frequency = rng.choice(["r", "c", "f"], len(categories)).tolist()
    data = {"images": images, "annotations": annotations, "categories": [
        {"id": k, "name": f"c{k}", "frequency": letter} for k, letter in zip(categories, frequency)]}
    return data, [detect() for _ in range(rng.integers(0, 60))], int(rng.choice([2, 5, 300]))


def box_iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def by_score(detections):
    return sorted(detections, key=lambda item: -item["score"])


def verdicts(image, truths, detections, threshold, low, high):
    """(score, right) of the detections of one image and class that are counted, and the number of objects to find."""
    def beyond(area):
        return area < low or area > high

    ignored = [bool(item.get("ignore")) or beyond(item["area"]) for item in truths]
    result, taken = [], set()
    for item in by_score(detections):
        ious = [box_iou(item["bbox"], truth["bbox"]) for truth in truths]
        free = [(not ignored[i], iou, i) for i, iou in enumerate(ious)
                if i not in taken and iou >= min(threshold, 1 - 1e-10)]
        if free:
            counts, _, i = max(free)
            taken.add(i)
            result += [(item["score"], True)] * counts
        elif not beyond(item["bbox"][2] * item["bbox"][3]) and (
                item["category_id"] not in image["not_exhaustive_category_ids"]):
            result.append((item["score"], False))
    return result, ignored.count(False)


def naive(data, detections, limit):
    """Precision (T, R, K, A) and recall (T, K, A)."""
    categories = sorted(item["id"] for item in data["categories"])
    precision = -np.ones((10, 101, len(categories), 4))
    recall = -np.ones((10, len(categories), 4))
    kept = {image["id"]: by_score(item for item in detections if item["image_id"] == image["id"])[:limit]
            for image in data["images"]}
    for (t, threshold), (k, category), (a, (low, high)) in product(*map(enumerate, (
            LVIS.iou_thresholds, categories, LVIS.areas))):
        points, sought = [], 0
        for image in sorted(data["images"], key=lambda item: item["id"]):
            truths = [item for item in data["annotations"] if item["image_id"] == image["id"]
                      and item["category_id"] == category and item["area"] > 0]
            found = [item for item in kept[image["id"]] if item["category_id"] == category
                     and item["bbox"][2] * item["bbox"][3] > 0]
            if truths or category in image["neg_category_ids"]:
                judged, number = verdicts(image, truths, found, threshold, low, high)
                points, sought = points + judged, sought + number
        if sought:
            right = np.cumsum([flag for _, flag in sorted(points, key=lambda point: -point[0])])
            quality = right / (np.arange(1, len(points) + 1) + np.spacing(1))
            recall[t, k, a] = right[-1] / sought if points else 0
            for r, wanted in enumerate(LVIS.recall_thresholds):
                precision[t, r, k, a] = quality[right / sought >= wanted].max(initial=0) if points else 0
    return precision, recall


def named(data, precision, recall):
    """The numbers in the order in which `lvis` prints them."""
    def mean(values):
        return float(np.mean(values[values > -1])) if (values > -1).any() else -1.0

    frequency = np.array([item["frequency"] for item in sorted(data["categories"], key=lambda item: item["id"])])
    return [mean(precision[..., 0]), mean(precision[:1, ..., 0]), mean(precision[5:6, ..., 0]),
            *(mean(precision[..., a]) for a in (1, 2, 3)),
            *(mean(precision[:, :, frequency == letter, 0]) for letter in "rcf"),
            *(mean(recall[..., a]) for a in (0, 1, 2, 3))]


NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs", "ARm", "ARl"]


def assert_equal(seed, monkeypatch):
    data, detections, limit = random_case(np.random.default_rng(seed))
    monkeypatch.setattr(lvis, "LVIS", replace(LVIS, max_detections=(limit,)))
    precision, recall = naive(data, detections, limit)
    for iou_type in ("bbox", "segm"):  # the masks are the boxes
        result = evaluate_lvis(truth_columns(data, True), results_columns(detections, True), iou_type)
        arrays = result.curves[iou_type]
        assert (arrays.precision[..., 0].numpy() == precision).all(), (seed, iou_type)
        assert (arrays.recall[..., 0].numpy() == recall).all(), (seed, iou_type)
        expected = zip(NAMES, named(data, precision, recall))
        assert list(result.metrics.items()) == [(f"{iou_type}/{name}", value) for name, value in expected], seed


@pytest.mark.parametrize("block", range(6))
def test_random_cases(block, monkeypatch):
    for seed in range(10 * block, 10 * block + 10):
        assert_equal(seed, monkeypatch)


@pytest.mark.slow
def test_a_thousand_random_cases(monkeypatch):
    for seed in range(1000, 2000):
        assert_equal(seed, monkeypatch)


# Hand-solved cases.

BOX, ELSEWHERE = [10, 10, 20, 20], [60, 60, 20, 20]


@pytest.mark.parametrize(("images", "expected"), [
    ([([], []), ([], [])], 1),  # nobody knows whether image 2 has the class
    ([([], []), ([1], [])], 0.5),  # it is known not to: a mistake, before the object is found
    ([([], []), ([1], [1])], 1),  # a contradiction in the file, which excuses
])
def test_detections_in_an_image_without_the_class(images, expected):
    result = evaluate([annotation(1, 1, BOX)], [detection(2, 1, BOX, 0.9), detection(1, 1, BOX, 0.1)], images=images)
    assert result.metrics["bbox/AP"] == pytest.approx(expected)


@pytest.mark.parametrize(("partial", "expected"), [([], 0.5), ([2], 0.5), ([1], 1)])
def test_not_every_object_is_labelled(partial, expected):
    detections = [detection(1, 1, ELSEWHERE, 0.9), detection(1, 1, BOX, 0.1)]
    result = evaluate([annotation(1, 1, BOX)], detections, "rr", [([], partial)])
    assert result.metrics["bbox/AP"] == pytest.approx(expected)


def test_an_image_has_300_detections_whatever_their_classes():
    unknown = [detection(1, 2, BOX, 0.9)] * 299  # of a class for which the image is not labelled
    truths = [annotation(1, 1, BOX), annotation(1, 1, ELSEWHERE)]
    result = evaluate(truths, [detection(1, 1, BOX), detection(1, 1, ELSEWHERE), *unknown], "rc")
    assert result.metrics["bbox/AR300"] == 0.5  # of equal scores the first
    assert evaluate(truths, [detection(1, 1, ELSEWHERE, 0.6), detection(1, 1, BOX, 0.6), *unknown[1:]],
                    "rc").metrics["bbox/AR300"] == 1


@pytest.mark.parametrize("fields", [{"ignore": 1}, {"area": 0}])
def test_objects_that_are_not_sought(fields):
    """The detection of one that is ignored does not count; one without area is as if absent."""
    truths = [annotation(1, 1, BOX), annotation(1, 1, ELSEWHERE, **fields)]
    result = evaluate(truths, [detection(1, 1, ELSEWHERE, 0.9), detection(1, 1, BOX, 0.1)])
    assert result.metrics["bbox/AP"] == pytest.approx(1 if "ignore" in fields else 0.5)
    assert result.metrics["bbox/AR300"] == 1


def test_nothing_is_a_crowd():
    result = evaluate([annotation(1, 1, BOX, iscrowd=1)], [])
    assert result.metrics["bbox/AP"] == 0
    assert evaluate([annotation(1, 1, BOX, iscrowd=1)], [detection(1, 1, BOX)]).metrics["bbox/AR300"] == 1


def test_classes_by_frequency():
    truths = [annotation(1, k, BOX) for k in (1, 2, 3)]
    result = evaluate(truths, [detection(1, 1, BOX), detection(1, 2, ELSEWHERE), detection(1, 2, BOX, 0.1)], "frr")
    approximate = {name: pytest.approx(value) for name, value in {"AP": 1.5 / 3, "APr": 0.25, "APf": 1}.items()}
    assert {name: result.metrics[f"bbox/{name}"] for name in approximate} == approximate
    assert result.metrics["bbox/APc"] == -1
    assert [result.per_class[f"c{k}"]["bbox/APr"] for k in (1, 2, 3)] == [-1, pytest.approx(0.5), 0]
    assert [result.per_class[f"c{k}"]["bbox/AP50"] for k in (1, 2, 3)] == [pytest.approx(1), pytest.approx(0.5), 0]
    assert list(result.per_class["c1"]) == list(result.metrics)
    assert "APr" in result.table()


def test_classes_go_by_their_ids():
    data = {"images": [{"id": 1, "neg_category_ids": []}], "categories": [
        {"id": 7, "name": "late", "frequency": "c"}, {"id": 3, "name": "early", "frequency": "f"}],
        "annotations": [{"id": 1, **annotation(1, 7, BOX)}, {"id": 2, **annotation(1, 3, ELSEWHERE)}]}
    result = evaluate_lvis(truth_columns(data), results_columns([detection(1, 7, BOX)]))
    assert result.per_class["late"]["bbox/AP"] == result.per_class["late"]["bbox/APc"] == pytest.approx(1)
    assert result.per_class["early"]["bbox/AP50"] == result.metrics["bbox/APf"] == 0
    assert result.curves["bbox"].precision[0, 0, :, 0, 0].tolist() == [0, pytest.approx(1)]


def test_masks_and_boundaries():
    """Rings of 8 pixels in squares of 60 and 52 have 1664 and 1408 pixels, of which 768 are common: IoU 1/3."""
    truths, found = [annotation(1, 1, [20, 20, 60, 60])], [detection(1, 1, [24, 24, 52, 52])]
    del found[0]["bbox"]
    assert evaluate(truths, found, iou_type="segm").metrics["segm/AP"] == pytest.approx(0.6)  # IoU 52² / 60² = .75
    assert evaluate(truths, found, iou_type="boundary").metrics["boundary/AP"] == 0
    assert evaluate(truths, [detection(1, 1, [20, 20, 60, 60])], iou_type="boundary").metrics["boundary/APm"] == (
        pytest.approx(1))


def test_the_area_of_a_mask_is_its_own():
    """Also beside a box. It matters for detections that match nothing: this one is small, its box medium."""
    found = {**detection(1, 1, BOX, 0.9), "bbox": [10, 10, 50, 50]}
    truths = [annotation(1, 1, ELSEWHERE), annotation(1, 1, [0, 40, 50, 50])]
    detections = [found, detection(1, 1, ELSEWHERE, 0.1), detection(1, 1, [0, 40, 50, 50], 0.1)]
    numbers = evaluate(truths, detections, iou_type="segm").metrics
    assert (numbers["segm/APs"], numbers["segm/APm"]) == (pytest.approx(0.5), pytest.approx(1))


def test_printout():
    lines = printout(evaluate([annotation(1, 1, BOX)], [detection(1, 1, BOX)])).splitlines()
    assert len(lines) == len(NAMES)
    assert lines[0] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=300 catIds=all] = 1.000"
    assert lines[2] == " Average Precision  (AP) @[ IoU=0.75      | area=   all | maxDets=300 catIds=all] = 1.000"
    assert lines[7] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=300 catIds=  c] = -1.000"
    assert lines[10] == " Average Recall     (AR) @[ IoU=0.50:0.95 | area=     s | maxDets=300 catIds=all] = 1.000"


def test_annotations_that_are_not_lvis():
    image, category = {"id": 1, "neg_category_ids": []}, {"id": 1, "name": "cat", "frequency": "x"}

    def truth(image, category):
        return truth_columns({"images": [image], "categories": [category], "annotations": []})

    results = results_columns([])
    assert is_lvis(truth(image, category))
    for columns in (truth({"id": 1}, category), truth(image, {"id": 1, "name": "cat"})):
        assert not is_lvis(columns)
        with pytest.raises(ValueError, match="must have `frequency` in categories and `neg_category_ids` in images"):
            evaluate_lvis(columns, results)
    with pytest.raises(ValueError, match="`frequency` must be r, c or f, got 'x' .*category 1"):
        evaluate_lvis(truth(image, category), results)
    with pytest.raises(ValueError, match="bbox, segm or boundary, got 'keypoints'"):
        evaluate_lvis(truth(image, category), results, "keypoints")


# Annotations of LVIS val.

# By `lvis` 0.5.3 (pycocotools 2.0.11, numpy 2 with np.float = float) of `disturbed` detections, in the order of NAMES.
EXPECTED = [
    0.6353804187480149, 0.8685016886159149, 0.6350914971673357, 0.6460801426776098, 0.693360079392693,
    0.6676420350760962, 0.375, 0.6558009795494671, 0.6331650954442694, 0.937697490664652, 0.931610848486125,
    0.9202922370027634, 0.9587646652864044,
]


def disturbed(objects):
    """Each object 8 times, ever less wide; every fourth is taken for the class of another, maybe in another image."""
    return [{"image_id": item["image_id"], "score": 37 * (i + n) % 50 / 50,
             "category_id": (objects[(i + n) // 4] if (i + n) % 4 == 0 else item)["category_id"],
             "bbox": [*item["bbox"][:2], item["bbox"][2] * (1 - n / 8), item["bbox"][3]]}
            for n in range(8) for i, item in enumerate(objects)]


@pytest.fixture
def lvis_val(shared_data):
    return shared_data / "detection_results" / "lvis_gt_only" / "lvis_val_100.json"


@pytest.mark.data
def test_numbers_of_the_package(lvis_val):
    detections = disturbed(json.loads(lvis_val.read_text())["annotations"])
    result = evaluate_lvis(read_truth(lvis_val), results_columns(detections))
    assert list(result.metrics.values()) == EXPECTED


@pytest.mark.data
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "boundary"])
def test_annotations_as_detections(lvis_val, iou_type):
    objects = json.loads(lvis_val.read_text())["annotations"]
    truth = read_truth(lvis_val, masks=True)
    assert is_lvis(truth)
    found = results_columns([{**item, "score": 1.0} for item in objects], True)
    numbers = evaluate_lvis(truth, found, iou_type).metrics
    almost = 1 - 2**-52  # 1 / (1 + 2**-52): each rare class has one object here
    assert numbers == {f"{iou_type}/{name}": almost if name == "APr" else 1.0 for name in NAMES}
