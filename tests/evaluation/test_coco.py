"""COCO numbers: published ones, hand-solved cases, and pycocotools itself on the files that we write."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detres.config import SourceConfig
from detres.data.dataset import load_dataset
from detres.data.masks import encode_masks, rasterize
from detres.evaluation.coco import CocoEvaluator
from detres.evaluation.coco_files import results_columns, truth_columns
from detres.evaluation.coco_results import evaluate_columns

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
ONE = pytest.approx(1.0, abs=3e-16)  # a class with one object scores 1 / (1 + 2^-52) in pycocotools, and so here
PUBLISHED = {  # detection_results/README.md: folder, ground truth, results, kind
    ("cocoapi_fake100", "instances_val2014_100.json", "instances_val2014_fakebbox100_results.json", "bbox"):
        (.50458, .69697, .57298, .58563, .51940, .50140, .38681, .59368, .59535, .63981, .56642, .56429),
    ("cocoapi_fake100", "instances_val2014_100.json", "instances_val2014_fakesegm100_results.json", "segm"):
        (.31955, .56229, .29893, .38737, .31018, .32693, .26823, .41545, .41684, .46945, .37676, .38147),
    ("coco_bboxarea100", "gt.json", "dt_results.json", "bbox"):
        (.503647, .696973, .571667, .593252, .557991, .489363, .386813, .593680, .595353, .654764, .603130, .553744)}


def coco_dict(dataset) -> dict:
    """The contents of the annotation file of a data set."""
    annotations = []
    for record in dataset.records:
        for item in record.annotations:
            x1, y1, x2, y2 = item.box
            annotations.append({"id": item.id, "image_id": record.id, "category_id": dataset.category_ids[item.label],
                                "bbox": [x1, y1, *(item.size or (x2 - x1, y2 - y1))], "area": item.area,
                                "iscrowd": int(item.crowd), "segmentation": item.segmentation})
    return {"images": [{"id": r.id, "height": r.height, "width": r.width} for r in dataset.records],
            "categories": [{"id": i, "name": name} for i, name in zip(dataset.category_ids, dataset.classes)],
            "annotations": annotations}


def coco_metrics(truth: dict, results: list[dict], iou_type: str) -> dict[str, float]:
    """Of the contents of two files."""
    truth = json.loads(json.dumps(truth, default=list))
    masks = iou_type == "segm"
    result = evaluate_columns(truth_columns(truth, masks), results_columns(results, masks), iou_type)
    return {name.split("/")[1]: value for name, value in result.metrics.items()}


def pycocotools_metrics(ground_truth: dict, results: list[dict], iou_type: str) -> dict[str, float]:
    """The reference as its users call it, through loadRes. `segm` drops boxes, so that areas are those of masks."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps({"info": {}, **ground_truth}, default=list))
        coco.createIndex()
        loaded = json.loads(json.dumps(results))
        for result in loaded:
            result.pop("bbox" if iou_type == "segm" else "segmentation", None)
        run = COCOeval(coco, coco.loadRes(loaded), iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(NAMES, map(float, run.stats)))


@pytest.mark.data
@pytest.mark.parametrize("files", PUBLISHED, ids=lambda files: f"{files[0]}-{files[3]}")
def test_published_numbers_and_pycocotools_to_the_last_bit(shared_data, files):
    folder, *names, kind = files
    folder = shared_data / "detection_results" / folder
    ground_truth, results = (json.loads((folder / name).read_text()) for name in names)
    metrics = coco_metrics(ground_truth, results, kind)
    assert tuple(metrics.values()) == pytest.approx(PUBLISHED[files], abs=5e-6)
    assert metrics == pycocotools_metrics(ground_truth, results, kind)


def encoded(mask: np.ndarray) -> dict:
    return encode_masks(torch.from_numpy(mask)[None].bool())[0]


def evaluated(dataset, make_batch, found, **options):
    evaluator = CocoEvaluator(dataset, **options)
    evaluator.update(*make_batch(dataset, found, scale=2.0, masks="segm" in evaluator.iou_types))
    return evaluator


def test_ground_truth_as_detections_scores_one(make_dataset, make_batch):
    truths = {7: [(0, (10, 10, 30, 40)), (1, (50, 20, 90, 90))], 3: [(0, (0, 0, 100, 80))]}
    dataset = make_dataset(truths, category_ids=(4, 90))
    found = {7: [(0, (10, 10, 30, 40), 0.9), (1, (50, 20, 90, 90), 0.8)], 3: [(0, (0, 0, 100, 80), 0.7)]}
    result = evaluated(dataset, make_batch, found).compute()
    assert [name for name in result.metrics] == [f"{kind}/{name}" for kind in ("bbox", "segm") for name in NAMES]
    assert result.metrics["bbox/AP"] == ONE and result.metrics["segm/AP75"] == ONE  # pasting moves edges by a pixel
    assert result.per_class["dog"]["bbox/APs"] == -1 and result.per_class["dog"]["segm/AP75"] == ONE
    assert "n/a" in result.table() and "1.000" in result.table()


def test_results_have_original_ids_and_pycocotools_accepts_them(make_dataset, make_batch):
    dataset = make_dataset({7: [(1, (10, 10, 30, 40))], 3: [(0, (0, 0, 99, 80))]}, category_ids=(4, 90))
    evaluator = evaluated(dataset, make_batch, {3: [(0, (0, 0, 100, 80), 0.75)], 7: [(1, (10, 10, 30, 40), 0.5)]})
    second, first = evaluator.results()  # by image id
    assert (first["image_id"], first["category_id"], first["bbox"]) == (7, 90, [10, 10, 20, 30])
    assert (second["image_id"], second["category_id"], second["score"]) == (3, 4, 0.75)
    assert second["segmentation"]["size"] == [100, 120] and isinstance(second["segmentation"]["counts"], str)
    truth = coco_dict(dataset)
    for i, annotation in enumerate(truth["annotations"], 1):
        annotation["id"] = i
    for kind in ("bbox", "segm"):
        expected = {f"{kind}/{name}": v for name, v in pycocotools_metrics(truth, evaluator.results(), kind).items()}
        assert expected.items() <= evaluator.compute().metrics.items()


def test_crowd_is_neither_missed_nor_wrong(make_dataset, make_batch):
    crowd = {"crowd": True, "segmentation": {"size": [100, 120], "counts": [60 * 100, 60 * 100]}}
    dataset = make_dataset({1: [(0, (60, 0, 120, 100), crowd), (0, (0, 0, 40, 40))]})
    inside = [(0, (61 + i, 1, 81 + i, 30), 0.9 - i / 100) for i in range(5)]  # before the right one, in the crowd
    result = evaluated(dataset, make_batch, {1: [*inside, (0, (0, 0, 40, 40), 0.5)]}).compute()
    assert result.metrics["bbox/AP"] == ONE and result.metrics["segm/AP"] == ONE


def test_half_right_is_solved_by_hand(make_dataset, make_batch):
    dataset = make_dataset({1: [(0, (0, 0, 50, 50)), (0, (60, 0, 110, 50))]}, classes=("cat",))
    # A wrong one first, then one that is right up to IoU .6: precision 1/2 at recalls 0 .. .5 (51 of 101 points).
    found = {1: [(0, (0, 60, 50, 100), 0.9), (0, (0, 0, 50, 30), 0.8)]}
    metrics = evaluated(dataset, make_batch, found, iou_types=("bbox",)).compute().metrics
    assert metrics["bbox/AP50"] == pytest.approx(51 / 101 / 2, rel=1e-12)
    assert metrics["bbox/AP75"] == 0.0
    assert metrics["bbox/AP"] == pytest.approx(3 * 51 / 101 / 2 / 10, rel=1e-12)  # thresholds .5, .55, .6
    assert metrics["bbox/AR1"] == 0.0 and metrics["bbox/AR10"] == pytest.approx(0.15)


def test_masks_are_small_or_large_by_their_own_area(make_dataset):
    truth = coco_dict(make_dataset({1: [(0, (0, 0, 10, 10))]}))

    def result(box: list[int], corner: int, score: float) -> dict:
        mask = np.zeros((100, 120), np.uint8, order="F")
        mask[corner:corner + 10, corner:corner + 10] = 1
        return {"image_id": 1, "category_id": 1, "bbox": box, "score": score, "segmentation": encoded(mask)}

    # The wrong one, first, is small by its mask and large by its box.
    metrics = coco_metrics(truth, [result([0, 0, 100, 100], 80, 0.9), result([0, 0, 10, 10], 0, 0.8)], "segm")
    assert metrics["APs"] == pytest.approx(0.5)


@pytest.mark.parametrize("found", [{}, {1: []}], ids=["never updated", "nothing found"])
def test_no_detections_score_zero(make_dataset, make_batch, found):
    dataset = make_dataset({1: [(0, (0, 0, 50, 50))], 2: []})
    evaluator = CocoEvaluator(dataset)
    if found:
        evaluator.update(*make_batch(dataset, found, masks=True))
    result = evaluator.compute()
    assert result.metrics["bbox/AP"] == 0.0 and result.metrics["segm/AR100"] == 0.0
    assert result.per_class["dog"]["bbox/AP"] == -1.0 and evaluator.results() == []


@pytest.mark.parametrize("images", [{}, {1: [], 2: []}], ids=["no images", "no annotations"])
def test_without_ground_truth_nothing_is_measured(make_dataset, make_batch, images):
    dataset = make_dataset(images)
    evaluator = CocoEvaluator(dataset, ("bbox",))
    if images:
        evaluator.update(*make_batch(dataset, {1: [(0, (0, 0, 9, 9), 0.9)]}))
    assert set(evaluator.compute().metrics.values()) == {-1.0}


def test_image_ids_may_be_strings(make_dataset, make_batch):
    images = {"2007_000033": [(0, (0, 0, 50, 50))], "2007_000027": [(0, (0, 0, 50, 50))]}
    evaluator = evaluated(make_dataset(images), make_batch, {name: [(0, (0, 0, 50, 50), 0.9)] for name in images})
    assert evaluator.compute().metrics["segm/AP"] == ONE
    assert [result["image_id"] for result in evaluator.results()] == sorted(images)


def test_ranks_and_batches_may_come_in_any_order(make_dataset, make_batch):
    truths = {i: [(0, (10, 10, 60, 60)), (1, (5, 5, 30, 90))] for i in (5, 2, 9)}
    found = {i: [(0, (10 + i, 10, 60, 60), 0.5), (0, (10, 10, 60, 58), 0.5), (1, (5, 5, 30, 80), 0.5)]  # ties
             for i in truths}
    dataset = make_dataset(truths)
    whole = evaluated(dataset, make_batch, found)
    parts = [evaluated(dataset, make_batch, {i: found[i] for i in ids}).state() for ids in ((9,), (2, 5))]
    for states in (parts, parts[::-1]):
        merged = CocoEvaluator(dataset)
        merged.merge(states)
        assert merged.results() == whole.results() and merged.compute() == whole.compute()


def test_a_second_evaluation_replaces_the_first(make_dataset, make_batch):
    dataset = make_dataset({1: [(0, (0, 0, 50, 50))]})
    evaluator = evaluated(dataset, make_batch, {1: [(0, (60, 60, 90, 90), 0.9)]})
    evaluator.update(*make_batch(dataset, {1: [(0, (0, 0, 50, 50), 0.3)]}, masks=True))
    assert evaluator.compute().metrics["bbox/AP"] == ONE


def test_refuses_what_cannot_be_evaluated(make_dataset, make_batch):
    dataset = make_dataset({1: [(0, (0, 0, 50, 50))]})
    detections, batch = make_batch(dataset, {1: [(0, (0, 0, 50, 50), 0.9)]})
    with pytest.raises(ValueError, match="must have masks for segm"):
        CocoEvaluator(dataset).update(detections, batch)
    with pytest.raises(ValueError, match="got id 8 .*Build the evaluator"):
        CocoEvaluator(dataset, ("bbox",)).update(detections, replace(batch, image_ids=(8,)))
    with pytest.raises(ValueError, match="must be finite.*1.jpg"):
        evaluator = CocoEvaluator(dataset, ("bbox",))
        evaluator.update(replace(detections, scores=detections.scores * float("nan")), batch)
        evaluator.compute()
    without = make_dataset({1: [(0, (0, 0, 50, 50), {"segmentation": None})]})
    with pytest.raises(ValueError, match="got 1 without, such as annotation 0 of 1.jpg"):
        CocoEvaluator(without)


BOX = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2).map(lambda box: [8 * number for number in box])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_equals_pycocotools_on_anything(data):
    image_ids, category_ids = [3, 11, 4], [1, 7]
    places = st.tuples(st.sampled_from(image_ids), st.sampled_from(category_ids), BOX)
    crowd, score = st.sampled_from([0, 0, 1]), st.sampled_from([0.3, 0.5, 0.9])
    truths = [{"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": data.draw(crowd),
               "area": box[2] * box[3], "segmentation": square(*box)}
              for i, (image, category, box) in enumerate(data.draw(st.lists(places, max_size=8)), 1)]
    results = [{"image_id": image, "category_id": category, "bbox": box, "score": data.draw(score)}
               for image, category, box in data.draw(st.lists(places, min_size=1, max_size=8))]
    ground_truth = {"images": [{"id": i, "height": 200, "width": 200} for i in image_ids],
                    "categories": [{"id": i, "name": str(i)} for i in category_ids], "annotations": truths}
    assert coco_metrics(ground_truth, results, "bbox") == pycocotools_metrics(ground_truth, results, "bbox")


def square(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def test_large_states_stay_small(make_dataset, make_batch):
    import pickle

    dataset = make_dataset({1: []})
    rng = np.random.default_rng(0)
    found = {1: [(0, tuple(map(float, rng.uniform(0, 100, 4))), float(rng.uniform())) for _ in range(1000)]}
    state = evaluated(dataset, make_batch, found, iou_types=("bbox",)).state()
    assert len(pickle.dumps(state)) < 30_000  # 28 bytes each, and the frame


@pytest.mark.data
def test_coco_mini_equals_pycocotools_on_its_own_file(shared_data, make_batch):
    """Ids with gaps, crowds, RLE: through the reader, against the annotation file as it is."""
    folder = shared_data / "coco_mini"
    file = folder / "annotations" / "instances_val2017.json"
    dataset = load_dataset(SourceConfig(path=str(folder)), "val")
    dataset = replace(dataset, records=dataset.records[:20])
    evaluator = CocoEvaluator(dataset, ("bbox",))
    rng = np.random.default_rng(0)
    for record in dataset.records:
        found = [(item.label, tuple(np.add(item.box, rng.normal(0, 3, 4))), round(float(rng.uniform(0.1, 1)), 1))
                 for item in record.annotations for _ in range(2) if not item.crowd]
        evaluator.update(*make_batch(dataset, {record.id: found}))
    truth = json.loads(file.read_text())
    kept = {record.id for record in dataset.records}
    truth["images"] = [image for image in truth["images"] if image["id"] in kept]
    truth["annotations"] = [item for item in truth["annotations"] if item["image_id"] in kept]
    expected = pycocotools_metrics(truth, evaluator.results(), "bbox")
    assert evaluator.compute().metrics == {f"bbox/{name}": value for name, value in expected.items()}
    assert 0.2 < expected["AP"] < 0.9 and len(truth["annotations"]) > 50


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco_mini", "nuts"])
def test_ground_truth_of_real_data_scores_one(shared_data, name):
    dataset = load_dataset(SourceConfig(path=str(shared_data / name)), "val")
    dataset = replace(dataset, records=dataset.records[:40])
    sizes = {record.id: (record.height, record.width) for record in dataset.records}
    truth = coco_dict(dataset)

    def mask(item: dict) -> dict:
        return encoded(rasterize(item["segmentation"], *sizes[item["image_id"]]))

    results = [{"image_id": item["image_id"], "category_id": item["category_id"], "bbox": item["bbox"], "score": 0.5,
                "segmentation": mask(item)}
               for item in truth["annotations"] if not item["iscrowd"]]
    for kind in ("bbox", "segm"):
        metrics = coco_metrics(truth, results, kind)
        assert [metrics["AP"], metrics["AP50"], metrics["AR100"]] == [ONE] * 3


class AtOnce(CocoEvaluator):
    """Compares bitmaps on the CPU, too."""

    @staticmethod
    def _compares_at_once(device):
        return True


@pytest.mark.parametrize("seed", range(8))
def test_bitmaps_and_run_lengths_and_pycocotools_agree(make_dataset, make_batch, seed):
    rng = np.random.default_rng(seed)
    crowd = {"crowd": True, "segmentation": {"size": [100, 120], "counts": [60 * 100, 60 * 100]}}

    def box():
        corner = rng.integers(0, 60, 2)
        return tuple(map(int, (*corner, *(corner + rng.integers(5, 40, 2)))))

    truths = {i: [(int(rng.integers(2)), box()) for _ in range(rng.integers(0, 5))] for i in (4, 1, 7)}
    truths[1].append((0, (60, 0, 120, 100), crowd))
    dataset = make_dataset(truths)
    found = {i: [(label, tuple(np.add(place, rng.integers(-3, 4, 4)).tolist()), float(rng.integers(1, 4)) / 4)
                 for label, place, *_ in 2 * truths[i]] for i in truths}
    kinds = ("bbox", "segm", "boundary")
    evaluators = [kind(dataset, kinds, keep_masks=True) for kind in (CocoEvaluator, AtOnce)]
    for evaluator in evaluators:
        for images in ((7,), (1, 4)):
            evaluator.update(*make_batch(dataset, {i: found[i] for i in images}, scale=1.5, masks=True))
        evaluator.merge([evaluator.state()])
    runs, bitmaps = (evaluator.compute() for evaluator in evaluators)
    for kind in kinds:
        for name in ("precision", "recall", "scores"):
            assert torch.equal(getattr(runs.curves[kind], name), getattr(bitmaps.curves[kind], name)), (kind, name)
    assert runs.metrics["boundary/AP50"] <= runs.metrics["segm/AP50"] and runs.metrics["segm/AP50"] > 0
    truth = coco_dict(dataset)
    for i, annotation in enumerate(truth["annotations"], 1):
        annotation["id"] = i
    assert evaluators[0].results() == evaluators[1].results()
    expected = pycocotools_metrics(truth, evaluators[0].results(), "segm")
    assert expected == {name: runs.metrics[f"segm/{name}"] for name in NAMES}


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_keypoints_of_a_model_are_pycocotools(make_dataset, make_batch, offset):
    """offset: of keypoints from those of the file, which pycocotools reads."""
    rng = np.random.default_rng(0)
    sigmas = (0.1, 0.05, 0.2)

    def points(seen):
        return tuple(float(v) for x, y in rng.integers(0, 90, (3, 2)) for v in (x, y, 2 * seen))

    truths = {i: [(0, (10, 10, 70, 80), {"keypoints": points(seen)}) for seen in (1, 1, 0)] for i in (3, 1, 2)}
    truths[1].append((0, (0, 0, 90, 90)))  # without any
    dataset = replace(make_dataset(truths, classes=("person",)), keypoint_names=("a", "b", "c"))
    found = {i: [(0, (10, 10, 70, 80), float(rng.integers(1, 5)) / 4) for _ in range(6)] for i in truths}
    detections, batch = make_batch(dataset, found, scale=2.0)
    near = torch.zeros(*detections.labels.shape, 3, 3)
    for i, image in enumerate(found):
        for j in range(1, 7):
            own = np.array(truths[image][j % 3][2]["keypoints"]).reshape(3, 3) + rng.normal(0, 2, (3, 3))
            near[i, j] = torch.tensor(own * [2, 2, 1])
    near[..., :2] += 2 * offset
    evaluator = CocoEvaluator(dataset.moved_keypoints(offset), ("bbox", "keypoints"), sigmas=sigmas)
    evaluator.update(replace(detections, keypoints=near), batch)
    metrics = evaluator.compute().metrics
    truth = coco_dict(dataset)
    for number, (annotation, item) in enumerate(zip(truth["annotations"], (
            item for record in dataset.records for item in record.annotations)), 1):
        keypoints = item.keypoints or (0.0,) * 9
        annotation.update(id=number, keypoints=list(keypoints), num_keypoints=sum(v > 0 for v in keypoints[2::3]))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps({"info": {}, **truth}, default=list))
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(json.loads(json.dumps(evaluator.results()))), "keypoints")
        run.params.kpt_oks_sigmas = np.array(sigmas)
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert [value for name, value in metrics.items() if name.startswith("keypoints")] == run.stats.tolist()
    assert 0.1 < metrics["keypoints/AP"] < 0.99
    with pytest.raises(ValueError, match="each of the 3 keypoints .* got 17"):
        CocoEvaluator(dataset, ("keypoints",))
    with pytest.raises(ValueError, match="must have keypoints"):
        evaluator.update(detections, batch)


@pytest.mark.gpu
def test_detections_on_a_gpu_give_the_same(make_dataset, make_batch):
    dataset = make_dataset({1: [(0, (10, 10, 60, 60))], 2: [(1, (5, 5, 90, 90))]})
    found = {1: [(0, (10, 12, 60, 60), 0.9)], 2: [(1, (5, 5, 90, 80), 0.8)]}
    detections, batch = make_batch(dataset, found, masks=True)
    results = []
    for device in ("cpu", "cuda"):
        evaluator = CocoEvaluator(dataset, keep_masks=True)
        evaluator.update(detections.to(device), batch.to(device))
        results.append((evaluator.results(), evaluator.compute()))
    assert results[0] == results[1]
