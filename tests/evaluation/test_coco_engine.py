"""The engine against pycocotools: whole arrays, with ==."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detres.evaluation.coco_engine import Found, Protocol, Truths, accumulate, match
from detres.evaluation.overlaps import box_iou_pairs


def random_case(rng):
    """Truths and detections (image, label, box, ...) made so that ties, crowds and boxes on a threshold are common."""
    images, classes = rng.integers(1, 6), rng.integers(1, 5)
    grid = rng.choice([1, 4, 10])  # coarse coordinates repeat, and give overlaps of exactly 0.5, 0.6 ...
    scores = rng.choice([3, 10, 1000])
    size = rng.choice([30, 100, 250])

    def boxes(n):
        corner = rng.integers(0, size, (n, 2)) // grid * grid
        return np.concatenate([corner, 1 + rng.integers(0, size, (n, 2)) // grid * grid], 1).astype(float)

    n = rng.integers(0, 25)
    truths = {"image": rng.integers(0, images, n), "label": rng.integers(0, classes, n), "boxes": boxes(n),
              "crowd": rng.random(n) < rng.choice([0, 0.3])}
    truths["area"] = truths["boxes"][:, 2:].prod(1) * rng.choice([1, 0.5, 0.7])
    copies = rng.integers(0, max(n, 1), rng.integers(0, 60) if n else 0)
    jitter = rng.integers(-1, 2, (len(copies), 4)) * grid * rng.choice([0, 1])
    near = truths["boxes"][copies] + jitter
    near[:, 2:] = np.maximum(near[:, 2:], 1)
    m = rng.integers(0, 30)
    labels = np.where(rng.random(len(copies)) < 0.9, truths["label"][copies], 0)
    found = {"image": np.concatenate([truths["image"][copies], rng.integers(0, images, m)]),
             "label": np.concatenate([labels, rng.integers(0, classes, m)]),
             "boxes": np.concatenate([near, boxes(m)])}
    found["score"] = rng.integers(0, scores, len(found["image"])) / scores
    order = rng.permutation(len(found["image"]))
    return images, classes, truths, {key: value[order] for key, value in found.items()}


def random_protocol(rng):
    if rng.random() < 0.5:
        return Protocol()
    thresholds = tuple(rng.choice([0.0, 0.1, 0.3, 0.5, 0.55, 0.6, 0.75, 0.9, 1.0], rng.integers(1, 9)).tolist())
    recalls = rng.random(rng.integers(1, 30)) * 1.2 - 0.1
    recalls = tuple((np.sort(recalls) if rng.random() < 0.8 else recalls).tolist())
    lows = rng.integers(0, 2000, rng.integers(1, 12)).tolist()
    areas = tuple((low, low + float(rng.integers(1, 5000))) for low in lows)
    bounds = tuple(sorted(set(rng.integers(0, 12, rng.integers(1, 4)).tolist())))
    return Protocol(thresholds, recalls, areas, tuple(map(str, areas)), bounds)


def reference(images, classes, truths, found, protocol):
    def coco(annotations):
        result = COCO()
        result.dataset = {"images": [{"id": i} for i in range(images)],
                          "categories": [{"id": k} for k in range(classes)], "annotations": annotations}
        result.createIndex()
        return result

    gt = [{"id": i + 1, "image_id": int(image), "category_id": int(label), "bbox": box.tolist(), "area": float(area),
           "iscrowd": int(crowd)} for i, (image, label, box, area, crowd) in enumerate(
               zip(*(truths[key] for key in ("image", "label", "boxes", "area", "crowd"))))]
    dt = [{"id": i + 1, "image_id": int(image), "category_id": int(label), "bbox": box.tolist(),
           "area": float(box[2] * box[3]), "score": float(score), "iscrowd": 0} for i, (image, label, box, score)
          in enumerate(zip(*(found[key] for key in ("image", "label", "boxes", "score"))))]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco(gt), coco(dt), "bbox")
        params = evaluation.params
        params.iouThrs, params.recThrs = np.array(protocol.iou_thresholds), np.array(protocol.recall_thresholds)
        params.areaRng, params.maxDets = [list(pair) for pair in protocol.areas], list(protocol.max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def ours(images, classes, truths, found, protocol, device="cpu"):
    def tensor(values, dtype):
        return torch.as_tensor(np.ascontiguousarray(values)).to(device, dtype)

    t = Truths(tensor(truths["image"], torch.int64), tensor(truths["label"], torch.int64),
               tensor(truths["boxes"], torch.float64), tensor(truths["area"], torch.float64),
               tensor(truths["crowd"], torch.bool), tensor(truths["crowd"], torch.bool))
    f = Found(tensor(found["image"], torch.int64), tensor(found["label"], torch.int64),
              tensor(found["boxes"], torch.float64), tensor(found["score"], torch.float64),
              tensor(found["boxes"][:, 2:].prod(1), torch.float64))
    matches = match(t, f, classes, lambda d, g: box_iou_pairs(f.boxes_xywh, t.boxes_xywh, t.crowd, d, g), protocol)
    return accumulate(matches, classes, protocol)


def assert_equal(seed, device="cpu"):
    rng = np.random.default_rng(seed)
    case, protocol = random_case(rng), random_protocol(rng)
    expected, got = reference(*case, protocol), ours(*case, protocol, device)
    for name in ("precision", "recall", "scores"):
        values = getattr(got, name).cpu().numpy()
        assert values.shape == expected[name].shape
        assert (values == expected[name]).all(), (seed, name)


@pytest.mark.parametrize("block", range(10))
def test_arrays_are_pycocotools(block):
    for seed in range(30 * block, 30 * block + 30):
        assert_equal(seed)


@pytest.mark.slow
def test_arrays_are_pycocotools_thousands_of_times():
    for seed in range(10_000, 14_000):
        assert_equal(seed)


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("precision", "recall", "scores"))


@pytest.mark.parametrize("seed", range(40))
def test_the_order_of_images_does_not_matter_nor_a_second_time(seed):
    rng = np.random.default_rng(seed)
    images, classes, truths, found = random_case(rng)
    protocol = random_protocol(rng)
    whole = ours(images, classes, truths, found, protocol)
    shuffled = np.argsort(rng.random(images)[found["image"]], kind="stable")  # an image's own order is kept
    moved = {key: value[shuffled] for key, value in found.items()}
    for _ in range(2):
        assert equal(ours(images, classes, truths, moved, protocol), whole)


@pytest.mark.parametrize("seed", range(40))
def test_a_false_positive_never_raises_precision_nor_recall(seed):
    rng = np.random.default_rng(seed)
    images, classes, truths, found = random_case(rng)
    protocol = Protocol(max_detections=(1000,))  # where a bound pushes another detection out, it may
    before = ours(images, classes, truths, found, protocol)
    wrong = {"image": [rng.integers(images)], "label": [rng.integers(classes)], "boxes": [[5000.0, 5000.0, 9.0, 9.0]],
             "score": [rng.random()]}
    after = ours(images, classes, truths, {key: np.concatenate([found[key], wrong[key]]) for key in found}, protocol)
    assert (after.precision <= before.precision).all() and torch.equal(after.recall, before.recall)


def test_only_detections_before_others_lower_precision():
    """By hand: right, wrong, right; the wrong one costs only the recalls that the last one reaches."""
    box = np.array([[0.0, 0, 10, 10], [50, 0, 10, 10]])
    truths = {"image": np.zeros(2), "label": np.zeros(2), "boxes": box, "area": np.full(2, 100.0),
              "crowd": np.zeros(2, bool)}
    found = {"image": np.zeros(3), "label": np.zeros(3), "boxes": np.array([box[0], [90, 90, 9, 9], box[1]]),
             "score": np.array([0.9, 0.8, 0.7])}
    arrays = ours(1, 1, truths, found, Protocol(recall_thresholds=(0.0, 0.5, 0.6, 1.0)))
    assert arrays.precision[0, :, 0, 0, 2].tolist() == pytest.approx([1, 1, 2 / 3, 2 / 3])
    assert arrays.scores[0, :, 0, 0, 2].tolist() == [0.9, 0.9, 0.7, 0.7]
    assert arrays.recall[0, 0, 0].tolist() == [0.5, 1, 1]
    assert arrays.precision[0, :, 0, 2, 2].tolist() == [-1] * 4  # no medium objects


@pytest.mark.gpu
def test_arrays_are_pycocotools_on_cuda():
    for seed in range(300):
        assert_equal(seed, "cuda")
