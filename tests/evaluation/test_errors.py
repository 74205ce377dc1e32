"""Error analysis on hand-solved scenes, and beside numbers that tidecv and pycocotools gave."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from detres.evaluation.coco_engine import Found, Truths
from detres.evaluation.errors import OperatingPoint, analyse_errors
from detres.evaluation.tide import KINDS

CLASSES = ("cat", "dog")
CAT, DOG = range(2)
A, B, FAR = (0, 0, 10, 10), (100, 0, 10, 10), (300, 300, 10, 10)  # xywh


def columns(rows: list, size: int) -> list[torch.Tensor]:
    table = torch.tensor([[*row[:2], *row[2], *row[3:]] for row in rows], dtype=torch.float64).reshape(-1, size)
    return [table[:, 0].long(), table[:, 1].long(), table[:, 2:6], *table[:, 6:].unbind(1)]


def make_truths(rows: list) -> Truths:
    """From (image, label, box, crowd) each; the area is that of the box."""
    image, label, boxes, crowd = columns([(*row, 0)[:4] for row in rows], 7)
    return Truths(image, label, boxes, boxes[:, 2:].prod(1), crowd.bool(), crowd.bool())


def make_found(rows: list) -> Found:
    """From (image, label, box, score) each."""
    image, label, boxes, scores = columns(rows, 7)
    return Found(image, label, boxes, scores, boxes[:, 2:].prod(1))


def analyse(truths: list, found: list, classes=CLASSES, **options):
    return analyse_errors(make_truths(truths), make_found(found), classes, **options)


# TIDE: mistake, truths, detections, AP50, and all dAP that are not 0. Solved by hand; tidecv 1.0.1 gives the same.
TWO = [(0, CAT, A), (1, DOG, B)]
SCENES = {
    # dog: a false one before the right one, 1/2; cat: 0. Mended, both are 1. Without false positives dog is 1; without
    # false negatives the cats are gone, and 1/2 of the dogs is all there is.
    "classification": (TWO, [(0, DOG, A, 0.9), (1, DOG, B, 0.8)], 0.25,
                       {"classification": 0.75, "false_positives": 0.25, "false_negatives": 0.25}),
    # IoU .4, twice: the better one is put right, the other vanishes.
    "localization": ([(0, CAT, A), (1, CAT, B)],
                     [(0, CAT, (0, 0, 10, 4), 0.9), (0, CAT, (0, 0, 4, 10), 0.8), (1, CAT, B, 0.7)], 51 / 101 / 3,
                     {"localization": 1 - 51 / 101 / 3, "false_positives": 51 / 101 * 2 / 3,
                      "false_negatives": 1 / 3 - 51 / 101 / 3}),
    "both": (TWO, [(0, DOG, (0, 0, 10, 4), 0.9), (1, DOG, B, 0.8)], 0.25,
             {"both": 0.25, "missed": 0.25, "false_positives": 0.25, "false_negatives": 0.25}),
    # Precision 1 up to recall 1/2 (51 of 101 points), 2/3 beyond.
    "duplicate": ([(0, CAT, A), (0, CAT, B)], [(0, CAT, A, 0.9), (0, CAT, A, 0.8), (0, CAT, B, 0.7)],
                  (51 + 50 * 2 / 3) / 101, {"duplicate": 50 / 3 / 101, "false_positives": 50 / 3 / 101}),
    "background": ([(0, CAT, A)], [(0, CAT, FAR, 0.9), (0, CAT, A, 0.8)], 0.5,
                   {"background": 0.5, "false_positives": 0.5}),
    "missed": ([(0, CAT, A), (1, CAT, B)], [(0, CAT, A, 0.9)], 51 / 101,
               {"missed": 50 / 101, "false_negatives": 50 / 101}),
}


@pytest.mark.parametrize("mistake", SCENES)
def test_each_kind_of_mistake(mistake):
    truths, found, ap50, gains = SCENES[mistake]
    tide = analyse(truths, found).tide
    assert tide.ap50 == pytest.approx(ap50, abs=1e-12)
    assert tide.dap == pytest.approx({name: gains.get(name, 0.0) for name in tide.dap}, abs=1e-12)
    assert tide.counts[mistake] == {"localization": 2}.get(mistake, 1)
    assert sum(tide.counts.values()) == {"localization": 2, "both": 2}.get(mistake, 1)  # both: a truth is missed, too


@pytest.mark.parametrize("box, label, kind", [((0, 0, 10, 5), CAT, "localization"),  # .5 of a truth that is taken
                                              ((0, 0, 10, 6), CAT, "duplicate"),
                                              ((0, 0, 10, 1), CAT, "localization"),  # .1
                                              ((0, 0, 10, 5), DOG, "classification"),
                                              ((0, 0, 10, 2), DOG, "both"),
                                              ((0, 0, 10, 1), DOG, "background")])
def test_bounds_of_the_kinds(box, label, kind):
    counts = analyse([(0, CAT, A)], [(0, CAT, A, 0.9), (0, label, box, 0.8)]).tide.counts
    assert counts == {name: int(name == kind) for name in KINDS}


def test_a_truth_that_is_taken_cannot_be_had_by_mending():
    tide = analyse(TWO, [(0, CAT, A, 0.9), (0, DOG, A, 0.8), (1, DOG, B, 0.7)]).tide
    assert tide.ap50 == 0.75 and tide.dap["classification"] == 0.25  # the false dog vanishes


def test_detections_in_a_crowd_are_not_wrong_but_may_be_mended():
    crowd = (0, CAT, (0, 0, 40, 40), 1)
    tide = analyse([(0, CAT, A), crowd], [(0, CAT, (0, 0, 10, 4), 0.9), (0, CAT, (20, 20, 10, 10), 0.8)]).tide
    assert tide.ap50 == 0.0 and tide.counts == dict.fromkeys(KINDS, 0)
    assert tide.dap["localization"] == 1.0  # as in tidecv 1.0.1
    wrong = analyse([(0, CAT, A), crowd], [(0, DOG, (20, 20, 10, 10), 0.9)]).tide
    assert wrong.counts == {**dict.fromkeys(KINDS, 0), "background": 1, "missed": 1}


def random_scene(seed: int) -> tuple[Truths, Found]:
    rng = np.random.default_rng(seed)
    images, classes, truths, found = 20, 4, 80, 300
    box = np.concatenate([rng.uniform(0, 100, (truths, 2)), rng.uniform(5, 60, (truths, 2))], 1)
    image, label = rng.integers(0, images, truths), rng.integers(0, classes, truths)
    copied, same = rng.integers(0, truths, found), rng.random(found) < 0.7
    near = box[copied] * (1 + rng.normal(0, 0.15, (found, 4)))
    near[:, 2:] = np.abs(near[:, 2:]) + 1
    labels = np.where(same, label[copied], rng.integers(0, classes, found))
    images = np.where(rng.random(found) < 0.8, image[copied], rng.integers(0, images, found))
    return (make_truths(list(zip(image, label, box, rng.random(truths) < 0.1))),
            make_found(list(zip(images, labels, near, rng.random(found)))))


# Printed by tidecv 1.0.1 (a Data of these columns with ignore regions for the crowds, TIDE().evaluate,
# fix_main_errors and fix_special_errors, / 100); counts are of its error_dict, less predictions with used = None.
TIDECV = {
    0: (0.1529476232143154, (0.041361476734436964, 0.2093889103895927, 0.012874356587792252, 0.005257266291194238,
                             0.0351054893467685, 0.022034628240952668, 0.4163593074787538, 0.10601910458794082),
        (21, 93, 41, 27, 62, 10)),
    1: (0.14819066956418075, (0.04233712450846028, 0.18871045024858568, 0.025293240701520857, 0.011007883552335578,
                              0.0485859527653669, 0.01806175940475576, 0.40378952845562116, 0.12038048143851725),
        (26, 76, 42, 32, 76, 8)),
    2: (0.13961874675829627, (0.010319884706105995, 0.179540050352608, 0.02286049433722713, 0.002320447616813066,
                              0.08267234325083389, 0.03000730311417808, 0.3752327383902186, 0.12449413388989491),
        (14, 86, 49, 20, 81, 12))}


@pytest.mark.parametrize("seed", TIDECV)
def test_random_scenes_as_tidecv(seed):
    truths, found = random_scene(seed)
    tide = analyse_errors(truths, found, tuple("abcd")).tide
    ap50, gains, counts = TIDECV[seed]
    assert tide.ap50 == pytest.approx(ap50, abs=1e-12)
    assert tuple(tide.dap.values()) == pytest.approx(gains, abs=1e-12)
    assert tuple(tide.counts.values()) == counts


# Confusion


def test_confusion_matrix_by_hand():
    truths = [(0, CAT, A), (0, DOG, B), (1, CAT, A), (1, CAT, (50, 50, 40, 40), 1)]
    found = [(0, DOG, A, 0.9), (0, CAT, A, 0.8),  # the better one has the truth, although its class is wrong
             (0, DOG, B, 0.7), (1, CAT, FAR, 0.6), (1, CAT, (60, 60, 9, 9), 0.6),  # the last one in the crowd
             (1, DOG, (60, 60, 9, 9), 0.6), (1, CAT, A, 0.5)]  # not excused by it; below the threshold
    confusion = analyse(truths, found, score_threshold=0.55).confusion
    assert confusion.matrix.tolist() == [[0, 1, 1], [0, 1, 0], [2, 1, 0]]
    assert confusion.largest(CLASSES, 5) == [("cat", "dog", 1)]
    assert analyse(truths, found, score_threshold=0.5).confusion.matrix.tolist() == [[1, 1, 0], [0, 1, 0], [2, 1, 0]]


def test_confusion_is_one_to_one_and_takes_the_best_overlap():
    truths = [(0, CAT, (0, 0, 10, 10)), (0, DOG, (2, 0, 10, 10))]
    matrix = analyse(truths, [(0, DOG, (2, 0, 10, 10), 0.9), (0, CAT, (2, 0, 10, 10), 0.8)]).confusion.matrix
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_the_threshold_of_the_confusion_is_the_best_of_all_classes_pooled():
    result = analyse(TWO, [(0, CAT, A, 0.9), (1, DOG, B, 0.7), (1, DOG, FAR, 0.6), (1, CAT, FAR, 0.5)])
    assert result.confusion.score_threshold == 0.7 == result.curves.best[-1].threshold
    assert result.confusion.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


# Curves


def test_curves_by_hand():
    truths = [(i, CAT, A) for i in range(4)]
    found = [(0, CAT, A, 0.9), (1, CAT, FAR, 0.75), (1, CAT, A, 0.75), (2, CAT, A, 0.5), (2, CAT, FAR, 0.2)]
    curves = analyse(truths, found, ("cat", "dog")).curves
    assert curves.precision[0].tolist() == [1.0] * 26 + [0.75] * 50 + [0.0] * 25
    assert curves.ap()[0] == (26 + 0.75 * 50) / 101 and curves.mean_precision().tolist() == curves.precision[0].tolist()
    assert (curves.precision[1] == -1).all() and (curves.f1[1] == -1).all()
    at = {round(c, 2): f1 for c, f1 in zip(curves.confidence.tolist(), curves.f1[0].tolist())}
    assert (at[0.0], at[0.2], at[0.21], at[0.5], at[0.51], at[0.75], at[0.76], at[0.9], at[1.0]) == pytest.approx(
        (6 / 9, 6 / 9, 6 / 8, 6 / 8, 4 / 7, 4 / 7, 2 / 5, 2 / 5, 0))
    assert curves.best == (OperatingPoint(0.5, 0.75, 0.75, 0.75), OperatingPoint(-1, -1, -1, -1),
                           OperatingPoint(0.5, 0.75, 0.75, 0.75))


def test_equal_scores_have_one_threshold():
    # Between the two of score .5 F1 would be 1.
    best = analyse([(0, CAT, A)], [(0, CAT, A, 0.5), (0, CAT, FAR, 0.5)], ("cat",)).curves.best[0]
    assert best == OperatingPoint(0.5, pytest.approx(2 / 3), 0.5, 1.0)
    # Nor does it count that F1 is 2/3, as at .7, after the first of the two of score .9.
    found = [(0, CAT, A, 0.9), (0, CAT, FAR, 0.9), (0, CAT, FAR, 0.8), (1, CAT, A, 0.7)]
    best = analyse([(0, CAT, A), (1, CAT, A)], found, ("cat",)).curves.best[0]
    assert best == OperatingPoint(0.7, pytest.approx(2 / 3), 0.5, 1.0)


def test_the_pool_has_one_threshold_for_all_classes():
    found = [(0, CAT, A, 0.3), (1, CAT, FAR, 0.1), (1, DOG, B, 0.9), (1, DOG, FAR, 0.4)]
    cat, dog, pooled = analyse(TWO, found).curves.best
    assert (cat.threshold, dog.threshold) == (0.3, 0.9) and cat.f1 == dog.f1 == 1
    assert pooled == OperatingPoint(0.3, pytest.approx(0.8), pytest.approx(2 / 3), 1.0)


def test_scores_beyond_one_are_on_the_curve():
    curves = analyse([(0, CAT, A)], [(0, CAT, A, 7.0), (0, CAT, FAR, -3.0)], ("cat",)).curves
    assert (curves.confidence[0], curves.confidence[-1]) == (-3, 7)
    assert curves.f1[0, 0] == pytest.approx(2 / 3) and curves.f1[0, -1] == 1 and curves.best[0].threshold == 7


# Bins


def bins_of(result, attribute: str) -> dict:
    return {b.name: (b.truths, pytest.approx(b.ap50, abs=1e-9)) for b in result.bins[attribute] if b.truths}


def test_aspect_ratio_by_hand():
    truths = [(0, CAT, (0, 0, 10, 40)), (0, CAT, (100, 0, 10, 10)), (0, CAT, (200, 0, 30, 10))]
    found = [(0, CAT, (100, 0, 10, 10), 0.9), (0, CAT, FAR, 0.8), (0, CAT, (200, 0, 30, 10), 0.7)]
    result = analyse(truths, found, ("cat",))
    # The false one is square: it counts there, after the right one, and not among the wide ones.
    assert bins_of(result, "aspect ratio") == {"< 1:3": (1, 0), "2:3 - 3:2": (1, 1), "> 3:1": (1, 1)}
    result = analyse(truths, [*found, (0, CAT, FAR, 0.95)], ("cat",))
    assert bins_of(result, "aspect ratio") == {"< 1:3": (1, 0), "2:3 - 3:2": (1, 0.5), "> 3:1": (1, 1)}


def test_crowding_by_hand():
    truths = [(0, CAT, A), (1, CAT, A), (1, CAT, (0, 0, 10, 4)), (1, DOG, B), (1, CAT, (0, 0, 10, 9), 1),
              (0, DOG, (500, 0, 90, 90), 1)]
    found = [(0, CAT, FAR, 0.9), (0, CAT, A, 0.8), (1, CAT, A, 0.7), (1, DOG, B, 0.6)]
    result = analyse(truths, found)
    # Alone in image 0, where the first one is wrong. In image 1 half of the cats are found (precision 1 at 51 recalls).
    assert bins_of(result, "objects in the image") == {"1": (1, 0.5), "2 - 5": (3, (51 / 101 + 1) / 2)}
    # The two cats of image 1 overlap by .4 (crowds do not count); the wrong one overlaps no truth.
    assert bins_of(result, "overlap with another object") == {"< .1": (2, 0.75), ".3 - .5": (2, 51 / 101)}


def test_neighbours_may_be_of_another_class():
    result = analyse([(0, CAT, A), (0, DOG, A)], [(0, CAT, A, 0.9)])
    assert bins_of(result, "overlap with another object") == {"> .5": (2, 0.5)}


def test_a_false_detection_is_crowded_as_the_truth_that_it_overlaps_most():
    truths = [(0, CAT, A), (0, CAT, (0, 0, 10, 6)), (1, DOG, B)]
    result = analyse(truths, [(0, DOG, A, 0.9), (1, DOG, B, 0.8)])  # the first one is no matter of the lonely dog
    assert bins_of(result, "overlap with another object") == {"> .5": (2, 0), "< .1": (1, 1)}


# All together


@pytest.mark.parametrize("seed", range(3))
def test_order_of_detections_and_images_does_not_matter(seed):
    truths, found = random_scene(seed)
    order, rename = torch.randperm(len(found.image)), torch.randperm(20)
    shuffled = Found(rename[found.image[order]], found.label[order], found.boxes_xywh[order], found.scores[order],
                     found.area[order])
    first, second = (analyse_errors(*pair, tuple("abcd")).as_dict()
                     for pair in ((truths, found), (replace(truths, image=rename[truths.image]), shuffled)))
    assert json.loads(json.dumps(second), parse_float=rounded) == json.loads(json.dumps(first), parse_float=rounded)


def rounded(number: str) -> float:
    return round(float(number), 12)  # pairs come in another order, sums round differently


def test_only_the_best_of_an_image_count():
    found = [(0, CAT, FAR, 0.9), (1, CAT, FAR, 0.2), (0, CAT, A, 0.8)]
    assert analyse([(0, CAT, A)], found, max_detections=2).tide.ap50 == 0.5
    result = analyse([(0, CAT, A)], found, max_detections=1)
    assert (result.tide.ap50, result.overall.ap50, result.tide.counts["background"]) == (0, 0, 2)


def test_overlaps_may_be_of_anything_else():
    """All rows refer to what was given, although detections are sorted inside."""
    found = make_found([(0, CAT, FAR, 0.1), (0, CAT, FAR, 0.9)])
    result = analyse_errors(make_truths([(0, CAT, A)]), found, CLASSES, lambda d, g: (d == 0).double())
    assert result.tide.ap50 == 0.5 == result.overall.ap50 and result.tide.counts["background"] == 1


def test_excused_detections_are_not_wrong():
    found = replace(make_found([(0, CAT, FAR, 0.9), (0, CAT, A, 0.8)]), excused=torch.tensor([True, False]))
    result = analyse_errors(make_truths([(0, CAT, A)]), found, CLASSES)
    assert result.tide.ap50 == 1.0 and result.overall.ap50 == pytest.approx(1) and result.curves.best[0].f1 == 1
    assert result.confusion.matrix.sum() == 1


@pytest.mark.parametrize("truths, found, ap50, missed, background", [
    ([], [], -1, 0.0, 0.0), ([(0, CAT, A)], [], 0, 1.0, 0.0), ([], [(0, CAT, A, 0.5)], 0, 0.0, 1.0)])
def test_nothing_to_find_or_nothing_found(truths, found, ap50, missed, background):
    result = analyse(truths, found)
    assert result.tide.ap50 == ap50 and result.overall.ap50 == (0 if truths else -1)
    assert (result.tide.dap["missed"], result.tide.dap["background"]) == (missed, background)
    assert result.curves.best[0] == OperatingPoint(-1, *([0] * 3 if truths else [-1] * 3))
    assert result.confusion.matrix.sum() == len(truths) + len(found)
    assert "n/a" in result.table() and json.loads(json.dumps(result.as_dict(), allow_nan=False))


def test_dict_and_table():
    result = analyse(*SCENES["classification"][:2])
    data = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert data["tide"]["dap"]["classification"] == 0.75 and data["tide"]["counts"]["classification"] == 1
    assert data["confusion"] == {"matrix": [[0, 1, 0], [0, 1, 0], [0, 0, 0]], "score_threshold": 0.8,
                                 "iou_threshold": 0.5, "classes": ["cat", "dog", "background"]}
    assert data["per_class"]["dog"]["threshold"] == 0.8 and len(data["per_class"]["dog"]["f1_at_confidence"]) == 101
    assert data["bins"]["size"][0] == {"name": "small", "truths": 2, "ap": pytest.approx(0.25),
                                       "ap50": pytest.approx(0.25)}
    lines = [line.split() for line in result.table().splitlines()]
    assert ["classification", "0.750", "1"] in lines and ["cat", "taken", "for", "dog", "1"] in lines
    assert ["dog", "0.500", "0.667", "0.500", "1.000", "0.800"] in lines
    assert ["size:", "small", "0.250", "0.250", "2"] in lines


@pytest.mark.parametrize("options", [{"background_threshold": 0.6}, {"background_threshold": 0.0},
                                     {"iou_threshold": 1.5}])
def test_thresholds_must_make_sense(options):
    with pytest.raises(ValueError, match="0 < background_threshold <= iou_threshold <= 1, got"):
        analyse(TWO, [], **options)


# Published data


def read_coco(folder) -> tuple[Truths, Found, tuple[str, ...]]:
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    images = {i: n for n, i in enumerate(sorted(image["id"] for image in truth["images"]))}
    categories = sorted((c["id"], c["name"]) for c in truth["categories"])
    labels = {i: n for n, (i, _) in enumerate(categories)}
    truths = make_truths([(images[a["image_id"]], labels[a["category_id"]], a["bbox"], a["iscrowd"])
                          for a in truth["annotations"]])
    area = torch.tensor([a["area"] for a in truth["annotations"]], dtype=torch.float64)
    found = make_found([(images[r["image_id"]], labels[r["category_id"]], r["bbox"], r["score"]) for r in results])
    return replace(truths, area=area), found, tuple(name for _, name in categories)


@pytest.mark.data
def test_coco_100(shared_data):
    truths, found, classes = read_coco(shared_data / "detection_results" / "cocoapi_fake100")
    result = analyse_errors(truths, found, classes)
    # As published: see the README beside the data.
    assert (result.overall.ap, result.overall.ap50) == pytest.approx((0.50458, 0.69697), abs=5e-6)
    assert [b.ap for b in result.bins["size"]] == pytest.approx([0.58563, 0.51940, 0.50140], abs=5e-6)
    # TIDE's AP50 is lower, as six classes have detections and no truth. tidecv 1.0.1 printed these numbers for scores
    # less 1e-9 times their place by image and score; on the scores as they are its dAP differ by up to 4e-5 (ties).
    assert result.tide.ap50 == pytest.approx(0.6420498881733425, abs=1e-12)
    assert tuple(result.tide.dap.values()) == pytest.approx(
        (0.22249761920897457, 0.002301545944067982, 0.0, 0.00018972971237019465, 0.0, 0.08525952163212736,
         0.06821587524510463, 0.17687731037188045), abs=1e-12)
    assert tuple(result.tide.counts.values()) == (83, 1, 0, 1, 0, 97)
    for group in result.bins.values():
        assert sum(b.truths for b in group) == result.overall.truths == 830
    matrix = result.confusion.matrix
    assert matrix[:-1].sum() == 830 and matrix[:, :-1].sum() <= len(found.scores)


@pytest.mark.gpu
def test_on_a_gpu_the_numbers_are_the_same():
    truths, found = random_scene(0)
    there = [type(x)(*(v if v is None else v.cuda() for v in vars(x).values())) for x in (truths, found)]
    here = analyse_errors(truths, found, tuple("abcd")).as_dict()
    cuda = analyse_errors(*there, tuple("abcd")).as_dict()
    assert json.loads(json.dumps(cuda), parse_float=rounded) == json.loads(json.dumps(here), parse_float=rounded)
