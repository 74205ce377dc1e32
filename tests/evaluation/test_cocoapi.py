"""`COCO` and `COCOeval` against pycocotools' own: whole arrays, `evalImgs` and the printed text, with ==."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json

import numpy as np
import pytest
from pycocotools import coco as reference_coco
from pycocotools import cocoeval as reference
from pycocotools import mask as coco_mask

from detres.evaluation.cocoapi import COCO, COCOeval

HEIGHT, WIDTH = 40, 50
JOINTS = 17
ARRAYS = ("precision", "recall", "scores")


def random_boxes(rng, n):
    """Coarse, so that equal boxes and overlaps of exactly 0.5, 0.6 ... are common."""
    grid = rng.choice([1, 5])
    corner = rng.integers(0, [WIDTH - 12, HEIGHT - 12], (n, 2)) // grid * grid
    return np.concatenate([corner, 1 + rng.integers(0, 12, (n, 2)) // grid * grid], 1).astype(float)


def bitmap_of(rng, box):
    x, y, width, height = box.astype(int)
    result = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    result[y:y + height, x:x + width] = rng.random((height, width)) < rng.choice([0.6, 1])
    return result


def segmentation_of(rng, box, kinds):
    """The mask within a box as polygons, or run lengths that are compressed or not."""
    x, y, width, height = box
    kind = rng.choice(kinds)
    if kind == "polygons":
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        return [corners, (np.array(corners) + rng.integers(0, 4)).tolist()][:rng.integers(1, 3)]
    code = coco_mask.encode(bitmap_of(rng, box))
    if kind == "compressed":
        return {"size": code["size"], "counts": code["counts"].decode()}
    pixels = coco_mask.decode(code).flatten("F")
    changes = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(changes, prepend=0, append=pixels.size).tolist()}


def keypoints_of(rng, box):
    points = box[:2] + rng.random((JOINTS, 2)) * box[2:]
    labelled = rng.integers(0, 3, JOINTS) * (rng.random() < 0.8)
    return np.concatenate([points.round(1), labelled[:, None]], 1)


def shape_of(rng, iou_type, box, kinds):
    if iou_type == "keypoints":
        return {"keypoints": keypoints_of(rng, box).flatten().tolist()}
    return {} if iou_type == "bbox" else {"segmentation": segmentation_of(rng, box, kinds)}


def random_truth(rng, iou_type):
    numbers = rng.choice(100, rng.integers(1, 6), replace=False).tolist()
    images = [f"image {i}" for i in numbers] if rng.random() < 0.2 else numbers
    categories = rng.choice(100, rng.integers(1, 5), replace=False).tolist()
    n = rng.integers(0, 30)
    crowds = rng.choice([0, 0.3])
    annotations = []
    for i, box in zip((1 + rng.permutation(n)).tolist(), random_boxes(rng, n)):
        shape = shape_of(rng, iou_type, box, ["polygons", "compressed", "plain"])
        annotations.append({"id": i, "image_id": images[rng.integers(len(images))], "bbox": box.tolist(),
                            "category_id": int(rng.choice(categories)), "iscrowd": int(rng.random() < crowds),
                            "area": float(box[2:].prod()) * rng.choice([0.5, 1, 20]).item(), "ignore": 1, **shape})
        if iou_type == "keypoints":
            annotations[-1]["num_keypoints"] = int((np.array(shape["keypoints"][2::3]) > 0).sum())
    return {"images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in images],
            "categories": [{"id": k, "name": f"class {k}"} for k in categories], "annotations": annotations}


def random_results(rng, truth, iou_type):
    """Copies of truths, moved by a little or not, and others, in any order."""
    image_ids, category_ids = ([item["id"] for item in truth[name]] for name in ("images", "categories"))
    levels, results = int(rng.choice([3, 10, 1000])), []
    with_boxes = iou_type == "bbox" or iou_type == "segm" and rng.random() < 0.3
    for _ in range(rng.integers(1, 50)):
        box = random_boxes(rng, 1)[0]
        image_id, category_id = (ids[rng.integers(len(ids))] for ids in (image_ids, category_ids))
        shape = shape_of(rng, iou_type, box, ["compressed"])
        if truth["annotations"] and rng.random() < 0.7:
            item = truth["annotations"][rng.integers(len(truth["annotations"]))]
            image_id, category_id = item["image_id"], item["category_id"]
            box = np.array(item["bbox"])
            shape = shape_of(rng, iou_type, box, ["compressed"])
            if iou_type == "keypoints":
                points = np.array(item["keypoints"]).reshape(-1, 3)
                points[:, :2] += rng.normal(0, rng.choice([0.1, 1]), (JOINTS, 2))
                shape = {"keypoints": points.flatten().tolist()}
            elif rng.random() < 0.5:
                box[2:] = np.maximum(box[2:] + rng.integers(-2, 3, 2), 1)
        if with_boxes:
            shape["bbox"] = box.tolist()
        results.append({"image_id": image_id, "category_id": category_id, **shape,
                        "score": int(rng.integers(0, levels)) / levels})
    return results


def random_settings(rng, truth):
    """Values for some of `params`."""
    settings = {}
    if rng.random() < 0.5:
        image_ids = [item["id"] for item in truth["images"]]
        settings["imgIds"] = image_ids[:rng.integers(1, len(image_ids) + 1)]
    if rng.random() < 0.3:
        settings["catIds"] = [item["id"] for item in truth["categories"]][::-1][:rng.integers(1, 4)]
    if rng.random() < 0.5:
        settings["iouThrs"] = rng.choice([0.0, 0.1, 0.3, 0.5, 0.55, 0.6, 0.75, 0.9, 1.0], rng.integers(1, 9))
        settings["recThrs"] = np.sort(rng.random(rng.integers(1, 30)) * 1.2 - 0.1)
    if rng.random() < 0.3:
        settings["areaRng"] = [[low, low + 60] for low in rng.integers(0, 60, 4).tolist()]
        settings["areaRngLbl"] = ["all", "small", "medium", "large"]
    if rng.random() < 0.5:
        settings["maxDets"] = rng.choice([[1, 2, 3], [5, 2, 100], [1, 3, 20]]).tolist()
    return settings


def quiet(function, *args):
    """Its value and what it printed; times do not count."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        value = function(*args)
    return value, text.getvalue()


def evaluated(coco, evaluation, truth, results, iou_type, settings, index=None):
    """After all three steps, with what `summarize` printed, or the exception it raised."""
    truth, results = copy.deepcopy((truth, results))
    gt = (index or coco)()
    gt.dataset = truth
    quiet(gt.createIndex)
    e, _ = quiet(evaluation, gt, quiet(gt.loadRes, results)[0], iou_type)
    for name, value in copy.deepcopy(settings).items():
        setattr(e.params, name, value)
    quiet(e.evaluate)
    quiet(e.accumulate)
    try:
        return e, quiet(e.summarize)[1]
    except Exception as error:  # where areas or bounds are not there
        return e, repr(error)


def assert_same(ours, theirs):
    """Arrays, `evalImgs` and `stats`."""
    assert ours.eval["counts"] == theirs.eval["counts"]
    assert np.array_equal(ours.stats, theirs.stats)
    for name in ARRAYS:
        assert ours.eval[name].dtype == theirs.eval[name].dtype
        assert np.array_equal(ours.eval[name], theirs.eval[name]), name
    for mine, other in zip(ours.evalImgs, theirs.evalImgs, strict=True):
        assert (mine is None) == (other is None)
        for key in other or ():
            assert type(mine[key]) is type(other[key]), key
            assert np.array_equal(mine[key], other[key]), key
        assert mine is None or mine.keys() == other.keys()


def assert_equal(seed, iou_type):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, iou_type)
    results, settings = random_results(rng, truth, iou_type), random_settings(rng, truth)
    if iou_type != "keypoints" and rng.random() < 0.2:
        settings["useCats"] = 0
    index = reference_coco.COCO if rng.random() < 0.3 else COCO
    theirs, their_text = evaluated(reference_coco.COCO, reference.COCOeval, truth, results, iou_type, settings)
    ours, text = evaluated(COCO, COCOeval, truth, results, iou_type, settings, index)
    assert text == their_text
    assert_same(ours, theirs)


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("block", range(4))
def test_everything_is_pycocotools(block, iou_type):
    for seed in range(20 * block, 20 * block + 20):
        assert_equal(seed, iou_type)


@pytest.mark.slow
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_everything_is_pycocotools_thousands_of_times(iou_type):
    for seed in range(10_000, 12_000):
        assert_equal(seed, iou_type)


def naive_boundary(bitmap):
    """Pixels from which background or the border is at most 2 % of the diagonal away, at least 1, in squares."""
    distance = max(1, round(0.02 * np.hypot(*bitmap.shape)))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(bitmap, distance), (2 * distance + 1,) * 2)
    return bitmap & ~windows.all((2, 3))


class NaiveBoundary(reference.COCOeval):
    """pycocotools with the lesser of mask and boundary IoU (crowds: mask IoU), from bitmaps."""

    def computeIoU(self, imgId, catId):
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        key = (imgId, catId)
        found = sorted(self._dts[key], key=lambda item: -item["score"])[:self.params.maxDets[-1]]
        for (i, d), (j, g) in itertools.product(enumerate(found), enumerate(self._gts[key])):
            a, b = (naive_boundary(coco_mask.decode(item["segmentation"]).astype(bool)) for item in (d, g))
            if not g["iscrowd"]:
                ious[i, j] = min(ious[i, j], (a & b).sum() / max((a | b).sum(), 1))
        return ious


def test_boundaries():
    def ours(gt, dt, iou_type):
        return COCOeval(gt, dt, "boundary")

    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = random_truth(rng, "segm")
        results = random_results(rng, truth, "segm")
        theirs, their_text = evaluated(reference_coco.COCO, NaiveBoundary, truth, results, "segm", {})
        mine, text = evaluated(COCO, ours, truth, results, "segm", {})
        assert text == their_text
        assert_same(mine, theirs)
        assert mine.params.iouType == "boundary"


def test_boundaries_may_be_wider():
    truth, results = one_image("segm")
    gt = index_of(truth)
    dt = gt.loadRes(results)
    narrow, wide = (COCOeval(gt, dt, "boundary", dilation_ratio=ratio) for ratio in (0.02, 0.2))
    for e in (narrow, wide):
        run(e)
    assert narrow.stats[0] < wide.stats[0]


def one_image(iou_type="bbox"):
    """A truth and a detection that is a little to the right."""
    boxes = np.array([[5.0, 5, 30, 30], [6.0, 5, 30, 30]])
    shapes = [{"segmentation": coco_mask.encode(np.asfortranarray(np.pad(
        np.ones((30, 30), np.uint8), ((5, HEIGHT - 35), (int(box[0]), WIDTH - 30 - int(box[0]))))))} for box in boxes]
    if iou_type == "bbox":
        shapes = [{"bbox": box.tolist()} for box in boxes]
    truth = {"images": [{"id": 3, "height": HEIGHT, "width": WIDTH}], "categories": [{"id": 7, "name": "cat"}],
             "annotations": [{"id": 1, "image_id": 3, "category_id": 7, "area": 900.0, "iscrowd": 0, **shapes[0]}]}
    return truth, [{"image_id": 3, "category_id": 7, "score": 0.5, **shapes[1]}]


def index_of(truth):
    gt = COCO()
    gt.dataset = copy.deepcopy(truth)
    gt.createIndex()
    return gt


def run(e):
    for step in (e.evaluate, e.accumulate, e.summarize):
        step()
    return e


def random_pair(seed=0, iou_type="bbox"):
    """Indices of random truths, not too few, and of results for them."""
    rng, truth, results = np.random.default_rng(seed), {"images": [], "annotations": []}, []
    while min(len(truth["images"]), len(truth["annotations"]) / 8, len(results) / 8) < 3:
        truth = random_truth(rng, iou_type)
        results = random_results(rng, truth, iou_type)
    gt = index_of(truth)
    return gt, gt.loadRes(results)


def test_no_detections():
    truth, _ = one_image()
    with pytest.warns(UserWarning, match="results are empty"):
        found = index_of(truth).loadRes([])
    e = run(COCOeval(index_of(truth), found, "bbox"))
    expected = run(reference.COCOeval(index_of(truth), reference_coco.COCO(), "bbox"))
    assert e.stats[0] == 0
    assert_same(e, expected)
    assert_same(run(COCOeval(index_of(truth), COCO(), "bbox")), expected)


def test_no_truths():
    truth, results = one_image()
    gt = index_of({**truth, "annotations": []})
    dt = gt.loadRes(results)
    assert_same(run(COCOeval(gt, dt, "bbox")), run(reference.COCOeval(gt, dt, "bbox")))


def test_image_by_image_as_torchvision_does():
    """Its evaluator keeps the `evalImgs` of batches, and has them averaged once they are all there."""
    gt, dt = random_pair()
    image_ids = sorted(gt.imgs)
    parts = []
    for image_id in image_ids:
        e = COCOeval(gt, iouType="bbox")
        e.cocoDt = gt.loadRes([item for item in dt.dataset["annotations"] if item["image_id"] == image_id])
        e.params.imgIds = [image_id]
        e.evaluate()
        parts.append(np.asarray(e.evalImgs).reshape(-1, len(e.params.areaRng), 1))
    merged = COCOeval(gt, iouType="bbox")
    merged.evalImgs, merged.params.imgIds = np.concatenate(parts, 2).flatten().tolist(), image_ids
    merged._paramsEval = copy.deepcopy(merged.params)
    merged.accumulate()
    whole = run(COCOeval(gt, dt, "bbox"))
    assert whole.stats[0] > 0
    for name in ARRAYS:
        assert (merged.eval[name] == whole.eval[name]).all()


def test_an_evaluator_can_be_used_again():
    """Nothing of the first evaluation remains."""
    (gt, dt), (other_gt, other_dt) = random_pair(0), random_pair(1)
    e = run(COCOeval(gt, dt, "bbox"))
    assert e.evalImgs and e.ious
    e.cocoGt, e.cocoDt = other_gt, other_dt
    e.params.imgIds, e.params.catIds = other_gt.getImgIds(), other_gt.getCatIds()
    expected = run(reference.COCOeval(other_gt, other_dt, "bbox"))
    assert_same(run(e), expected)
    assert e.ious.keys() == expected.ious.keys()


def test_nothing_is_left_of_a_failed_evaluation(capsys):
    gt, dt = random_pair()
    e = run(COCOeval(gt, dt, "bbox"))
    dt.dataset["annotations"][0]["score"] = float("nan")
    with pytest.raises(ValueError, match="`score` must be finite"):
        e.evaluate()
    capsys.readouterr()
    with pytest.raises(IndexError):  # from pycocotools, after it has said what is missing
        e.accumulate()
    assert "Please run evaluate() first" in capsys.readouterr().out


def test_changed_matches_count():
    gt, dt = random_pair()
    e = COCOeval(gt, dt, "bbox")
    e.evaluate()
    for entry in filter(None, e.evalImgs):
        entry["dtIgnore"][:] = True
    e.accumulate()
    assert e.eval["precision"].max() == 0


@pytest.mark.parametrize("change", [
    {"maxDets": [1, 100]}, {"maxDets": [7]}, {"recThrs": np.array([0.5])}, {"catIds": []}, {"imgIds": []},
    {"areaRng": [[0, 1e10]]}, {"useCats": 0}])
def test_accumulate_with_other_params(change):
    results = []
    for evaluation in (COCOeval, reference.COCOeval):
        gt, dt = random_pair()
        e = evaluation(gt, dt, "bbox")
        e.params.maxDets = [1, 3, 100]
        e.evaluate()
        for name, value in change.items():
            setattr(e.params, name, value)
        e.accumulate()
        results.append(e.eval)
    assert results[0]["counts"] == results[1]["counts"]
    assert results[0]["params"].maxDets == results[1]["params"].maxDets
    for name in ARRAYS:
        assert np.array_equal(results[0][name], results[1][name])


def test_accumulate_twice_without_categories():
    gt, dt = random_pair()
    e = COCOeval(gt, dt, "bbox")
    e.params.useCats = 0
    e = run(e)
    first = e.eval
    e.accumulate()
    assert (e.eval["precision"] == first["precision"]).all()
    assert first["precision"].max() > 0


def test_a_subclass_may_override_the_overlaps():
    class Nothing(COCOeval):
        def computeIoU(self, imgId, catId):
            ious = super().computeIoU(imgId, catId)
            return ious * 0 if len(ious) else ious

    gt, dt = random_pair()
    assert run(COCOeval(gt, dt, "bbox")).stats[0] > 0
    assert run(Nothing(gt, dt, "bbox")).stats[0] == 0


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_what_is_made_when_read(iou_type):
    gt, dt = random_pair(0, iou_type)
    expected = run(reference.COCOeval(*copy.deepcopy((gt, dt)), iou_type))
    e = run(COCOeval(gt, dt, iou_type))
    assert e.ious.keys() == expected.ious.keys()
    assert all(np.array_equal(e.ious[key], expected.ious[key]) for key in e.ious)
    for name in ("_gts", "_dts"):
        mine, other = getattr(e, name), getattr(expected, name)
        assert {key: [item["id"] for item in mine[key]] for key in mine if mine[key]} == {
            key: [item["id"] for item in other[key]] for key in other if other[key]}
    image_id, category_id = gt.anns[1]["image_id"], gt.anns[1]["category_id"]
    mine, other = (ev.evaluateImg(image_id, category_id, [0, 1e10], 100) for ev in (e, expected))
    assert mine["gtIds"] and all(np.array_equal(mine[key], other[key]) for key in other)


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_annotations_are_not_written_to(iou_type):
    gt, dt = random_pair(0, iou_type)
    before = repr((gt.dataset, dt.dataset))
    assert run(COCOeval(gt, dt, iou_type)).evalImgs
    assert repr((gt.dataset, dt.dataset)) == before


def test_use_segm():
    gt, dt = random_pair()
    e = COCOeval(gt, dt, "segm")
    e.params.useSegm = 0
    _, text = quiet(e.evaluate)
    assert "useSegm (deprecated) is not None. Running bbox evaluation\nEvaluate annotation type *bbox*\n" in text


@pytest.mark.parametrize("kind", ["path", "str", "list", "array", "float32"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_results_are_loaded_as_by_pycocotools(tmp_path, kind, iou_type):
    rng = np.random.default_rng(3)
    truth = random_truth(rng, iou_type)
    while isinstance(truth["images"][0]["id"], str):
        truth = random_truth(rng, iou_type)
    results = random_results(rng, truth, iou_type)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    if kind in ("array", "float32"):
        columns = [[item["image_id"], 1.1, 2.2, 3.3, 4.4, item["score"], item["category_id"]] for item in results]
        given = [np.array(columns, np.float64 if kind == "array" else np.float32)] * 2
    elif kind == "list":
        given = results, copy.deepcopy(results)
    else:
        path = tmp_path / "results.json"
        given = str(path) if kind == "str" else path, str(path)
    mine = COCO(tmp_path / "truth.json")
    theirs = reference_coco.COCO(str(tmp_path / "truth.json"))
    assert mine.dataset == theirs.dataset
    found, expected = mine.loadRes(given[0]), theirs.loadRes(given[1])
    assert isinstance(found, COCO)
    one, other = ([{key: np.asarray(value).tolist() for key, value in item.items()}
                   for item in index.dataset["annotations"]] for index in (found, expected))
    assert one == other
    assert found.dataset.keys() == expected.dataset.keys()
    assert found.imgToAnns.keys() == expected.imgToAnns.keys()


def test_files_may_hold_nan(tmp_path):
    truth, _ = one_image()
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "info": {"version": float("nan")}}))
    assert np.isnan(COCO(tmp_path / "truth.json").dataset["info"]["version"])


def test_a_results_file_is_no_ground_truth(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must be a JSON object, got a list \(.*results.json\)"):
        COCO(tmp_path / "results.json")


def test_results_for_unknown_images():
    truth, results = one_image()
    with pytest.raises(ValueError, match=r"got 1 others, the first 4 \(entry 1\)"):
        index_of(truth).loadRes([*results, {**results[0], "image_id": 4}])
    with pytest.raises(ValueError, match="first 9"):
        index_of(truth).loadRes(np.array([[9, 1, 2, 3, 4, 0.5, 7.0]]))


@pytest.mark.parametrize("side", ["ground truth", "results"])
def test_id_zero_counts_with_a_warning(side):
    truth, results = one_image()
    gt = index_of(truth)
    dt = gt.loadRes(results)
    changed = gt if side == "ground truth" else dt
    changed.dataset["annotations"][0]["id"] = 0
    changed.createIndex()
    with pytest.warns(UserWarning, match=rf"should not be 0, got one \({side}\)"):
        e = run(COCOeval(gt, dt, "bbox"))
    assert e.stats[1] == pytest.approx(1)  # AP50


@pytest.mark.parametrize("side", ["ground truth", "results"])
def test_duplicate_ids(side):
    truth, results = one_image()
    gt = index_of(truth)
    dt = gt.loadRes(results)
    changed = gt if side == "ground truth" else dt
    changed.dataset["annotations"] *= 2
    changed.createIndex()
    with pytest.raises(ValueError, match=rf"must be distinct, got 1 2 times \({side}\)"):
        COCOeval(gt, dt, "bbox").evaluate()


@pytest.mark.parametrize(("field", "value", "message"), [
    ("score", float("nan"), r"`score` must be finite, got nan \(annotation 1 of image 3\)"),
    ("bbox", [1.0, 2.0, float("nan"), 4.0], "`bbox` must be finite"),
    ("bbox", [1.0, 2.0, 3.0], "`bbox` must be 4 numbers"),
    ("score", None, "annotations must have `score`, got only .*Is this the ground truth"),
])
def test_unusable_results(field, value, message):
    truth, results = one_image()
    gt = index_of(truth)
    dt = gt.loadRes(results)
    item, = dt.dataset["annotations"]
    if value is None:
        del item[field]
    else:
        item[field] = value
    with pytest.raises(ValueError, match=message):
        COCOeval(gt, dt, "bbox").evaluate()


def test_damaged_run_lengths():
    truth, results = one_image("segm")
    results[0]["segmentation"]["counts"] = results[0]["segmentation"]["counts"][:-1]
    gt = index_of(truth)
    with pytest.raises(ValueError, match=r"run lengths must add up .*\(detection 0\)"):
        COCOeval(gt, gt.loadRes(results), "segm").evaluate()


def test_keypoints_need_categories():
    gt, dt = random_pair(0, "keypoints")
    e = COCOeval(gt, dt, "keypoints")
    e.params.useCats = 0
    with pytest.raises(ValueError, match="useCats must be 1 for keypoints"):
        e.evaluate()


def test_other_sigmas():
    gt, dt = random_pair(0, "keypoints")
    evaluations = [evaluation(*copy.deepcopy((gt, dt)), "keypoints") for evaluation in (COCOeval, reference.COCOeval)]
    before = run(COCOeval(gt, dt, "keypoints")).eval["precision"]
    for e in evaluations:
        e.params.kpt_oks_sigmas = np.linspace(0.01, 0.2, JOINTS)
        run(e)
    assert_same(*evaluations)
    assert not np.array_equal(evaluations[0].eval["precision"], before)


PUBLISHED = {
    ("cocoapi_fake100", "bbox"): (
        "instances_val2014_100.json", "instances_val2014_fakebbox100_results.json",
        [.50458, .69697, .57298, .58563, .51940, .50140, .38681, .59368, .59535, .63981, .56642, .56429]),
    ("cocoapi_fake100", "segm"): (
        "instances_val2014_100.json", "instances_val2014_fakesegm100_results.json",
        [.31955, .56229, .29893, .38737, .31018, .32693, .26823, .41545, .41684, .46945, .37676, .38147]),
    ("coco_bboxarea100", "bbox"): (
        "gt.json", "dt_results.json",
        [.503647, .696973, .571667, .593252, .557991, .489363, .386813, .593680, .595353, .654764, .603130, .553744]),
    ("keypoints_one_image", "keypoints"): (
        "gt.json", "dt.json", [.50488, .72277, .63366, .46634, .75050, .51818, .72727, .63636, .46667, .75]),
}


@pytest.mark.data
@pytest.mark.parametrize(("folder", "iou_type"), PUBLISHED)
def test_published_numbers(shared_data, folder, iou_type):
    truth, results, numbers = PUBLISHED[folder, iou_type]
    tolerance = 5.1e-7 if folder == "coco_bboxarea100" else 5.1e-6  # of the digits given
    paths = [str(shared_data / "detection_results" / folder / name) for name in (truth, results)]
    runs = []
    for coco, evaluation in ((COCO, COCOeval), (reference_coco.COCO, reference.COCOeval)):
        gt = coco(paths[0])
        runs.append(evaluation(gt, gt.loadRes(paths[1]), iou_type))
        runs[-1].text = quiet(run, runs[-1])[1].splitlines()[-len(numbers):]
    assert np.abs(runs[0].stats - numbers).max() < tolerance
    assert runs[0].text == runs[1].text
    assert_same(*runs)


CROWDPOSE_SIGMAS = np.array([79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89, 79, 79]) / 1000


@pytest.mark.data
@pytest.mark.parametrize(("crowding", "numbers"), [
    ((0, 1), {0: .78772, 1: .98812, 2: .73144, 5: .82222}),
    ((0, 0.1), {0: 1.0}), ((0.1, 0.8), {0: .9802}), ((0.8, 1), {0: .4116}),
])
def test_crowdpose(shared_data, crowding, numbers):
    """CrowdPose has no areas of masks: its kit takes 0.53 of the box. Easy, medium and hard are subsets of images."""
    folder = shared_data / "detection_results" / "crowdpose"
    truth = json.loads((folder / "gt.json").read_text())
    for item in truth["annotations"]:
        item["area"] = item["bbox"][2] * item["bbox"][3] * 0.53
    gt = index_of(truth)
    e = COCOeval(gt, gt.loadRes(folder / "dt.json"), "keypoints")
    e.params.imgIds = [item["id"] for item in truth["images"] if crowding[0] <= item["crowdIndex"] <= crowding[1]]
    e.params.kpt_oks_sigmas = CROWDPOSE_SIGMAS
    stats = run(e).stats
    for place, number in numbers.items():
        assert stats[place] == pytest.approx(number, abs=5.1e-5 if len(numbers) == 1 else 5.1e-6)
