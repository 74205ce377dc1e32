"""Panoptic quality: hand-solved cases, a naive oracle, distribution, files in COCO's format."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detres.data.shapes import write_shapes
from detres.evaluation.panoptic import (PanopticEvaluator, Segments, count_overlaps, evaluate_panoptic,
                                        match_segments)

CLASSES, THINGS = ("cat", "dog", "grass"), (True, True, False)


def segments(*rows: tuple[int, ...]) -> Segments:
    """segments((id, label) or (id, label, crowd), ...)"""
    table = torch.tensor([(*row, 0)[:3] for row in rows], dtype=torch.int64).view(-1, 3)
    return Segments(table[:, 0], table[:, 1], table[:, 2] == 1)


def strip(*runs: tuple[int, int]) -> Tensor:
    """A map (1, W): strip((id, pixels), ...)"""
    return torch.tensor([[number for number, pixels in runs for _ in range(pixels)]])


def evaluated(pred_map: Tensor, pred: Segments, gt_map: Tensor, gt: Segments) -> PanopticEvaluator:
    evaluator = PanopticEvaluator(CLASSES, THINGS)
    evaluator.update("a", pred_map, pred, gt_map, gt)
    return evaluator


def test_hand_solved():
    """Cat 1 is found with IoU 6/7 and cat 2 missed; a cat and a dog are wrong; the grass is found with IoU 7/9."""
    truth = strip((1, 7), (2, 2), (9, 9)), segments((1, 0), (2, 0), (9, 2))
    found = strip((5, 6), (6, 1), (7, 1), (6, 3), (8, 7)), segments((5, 0), (6, 1), (7, 0), (8, 2))
    evaluator = evaluated(*found, *truth)
    counts = evaluator.counts()
    assert (counts.tp, counts.fp, counts.fn) == ([1, 0, 1], [1, 1, 0], [1, 0, 0])
    assert counts.iou_sum == [6 / 7, 0.0, 7 / 9]
    result = evaluator.compute()
    cat, grass = (6 / 7 / 2, 6 / 7, 1 / 2), (7 / 9, 7 / 9, 1.0)
    things = [value / 2 for value in cat]
    both = [(a + b) / 3 for a, b in zip(cat, grass)]
    assert list(result.metrics.values()) == pytest.approx([*both, *things, *grass])
    assert list(result.metrics) == ["panoptic/PQ", "panoptic/SQ", "panoptic/RQ", "panoptic/PQ_th", "panoptic/SQ_th",
                                    "panoptic/RQ_th", "panoptic/PQ_st", "panoptic/SQ_st", "panoptic/RQ_st"]
    assert result.per_class["dog"] == {"panoptic/PQ": 0.0, "panoptic/SQ": 0.0, "panoptic/RQ": 0.0}


def outcome(pred_map: Tensor, pred: Segments, gt_map: Tensor, gt: Segments) -> tuple:
    counts = evaluated(pred_map, pred, gt_map, gt).counts()
    return sum(counts.tp), sum(counts.fp), sum(counts.fn), math.fsum(counts.iou_sum)


def test_a_match_needs_more_than_half():
    truth = strip((1, 20)), segments((1, 0))
    assert outcome(strip((5, 10), (0, 10)), segments((5, 0)), *truth) == (0, 1, 1, 0)
    assert outcome(strip((5, 11), (0, 9)), segments((5, 0)), *truth) == (1, 0, 0, 11 / 20)
    assert outcome(strip((5, 11), (0, 9)), segments((5, 1)), *truth) == (0, 1, 1, 0)  # another class


def test_true_void_does_not_count_against_a_prediction():
    truth = strip((1, 10), (0, 90)), segments((1, 0))
    assert outcome(strip((5, 100)), segments((5, 0)), *truth) == (1, 0, 0, 1.0)
    assert outcome(strip((0, 49), (5, 51)), segments((5, 0)), *truth) == (0, 0, 1, 0)  # all of it in void
    truth = strip((0, 10), (1, 30)), segments((1, 0))
    assert outcome(strip((5, 20), (0, 20)), segments((5, 1)), *truth) == (0, 1, 1, 0)  # half is not more than half
    assert outcome(strip((5, 19), (0, 21)), segments((5, 1)), *truth) == (0, 0, 1, 0)


def test_crowds_are_never_missed_and_excuse_their_class():
    truth = strip((1, 30)), segments((1, 0, 1))
    assert outcome(strip((5, 30)), segments((5, 0)), *truth) == (0, 0, 0, 0)
    assert outcome(strip((5, 30)), segments((5, 1)), *truth) == (0, 1, 0, 0)
    mixed = strip((1, 6), (0, 5), (2, 10)), segments((1, 0, 1), (2, 1))
    assert outcome(strip((5, 21)), segments((5, 0)), *mixed) == (0, 0, 1, 0)  # crowd and void together
    assert outcome(strip((5, 11), (6, 10)), segments((5, 0), (6, 1)), *mixed) == (1, 0, 0, 1.0)


def test_of_several_crowds_the_last_excuses():
    gt_map = strip((1, 10), (2, 20))
    first, last = (5, 0), (6, 0)
    found = strip((5, 10), (6, 20)), segments(first, last)
    matches = match_segments(*found, gt_map, segments((1, 0, 1), (2, 0, 1)))
    assert matches.wrong.tolist() == [True, False]
    matches = match_segments(*found, gt_map, segments((2, 0, 1), (1, 0, 1)))
    assert matches.wrong.tolist() == [False, True]


def test_nothing_at_all():
    evaluator = evaluated(strip((0, 5)), segments(), strip((0, 5)), segments())
    assert set(evaluator.compute().metrics.values()) == {-1.0}
    assert set(PanopticEvaluator(CLASSES, THINGS).compute().metrics.values()) == {-1.0}
    assert outcome(strip((0, 5)), segments(), strip((1, 5)), segments((1, 0))) == (0, 0, 1, 0)
    assert outcome(strip((5, 5)), segments((5, 0)), strip((0, 5)), segments()) == (0, 0, 0, 0)


def test_overlaps_count_every_pixel_once():
    table = count_overlaps(strip((7, 2), (0, 2), (4, 3)), segments((7, 0), (4, 0)),
                           strip((0, 1), (3, 4), (2, 2)), segments((3, 0), (2, 0)))
    assert table.tolist() == [[0, 1, 0], [2, 1, 1], [0, 0, 2]]


def test_maps_may_be_of_any_integer_type():
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        found = strip((5, 6), (0, 4)).to(dtype), segments((5, 0))
        assert outcome(*found, strip((1, 10)).to(dtype), segments((1, 0))) == (1, 0, 0, 0.6)


# A naive oracle


def naive(pred_map: Tensor, pred: Segments, gt_map: Tensor, gt: Segments) -> dict[int, tuple[list, int, int]]:
    """Per class: the IoU of every match, false positives, false negatives. Sets of pixels, as the paper has them."""
    def regions(map_: Tensor, listed: Segments) -> dict[int, set[int]]:
        pixels = map_.flatten().tolist()
        return {i: {at for at, value in enumerate(pixels) if value == i} for i in [0, *listed.ids.tolist()]}

    found, true = regions(pred_map, pred), regions(gt_map, gt)
    results = {label: ([], 0, 0) for label in range(len(CLASSES))}
    matched = set()
    for i, label, crowd in zip(gt.ids.tolist(), gt.labels.tolist(), gt.crowd.tolist()):
        ious, fp, fn = results[label]
        hit = False
        for j, other in zip(pred.ids.tolist(), pred.labels.tolist()):
            seen = found[j] - true[0]
            if other == label and not crowd and len(seen & true[i]) / len(seen | true[i]) > 0.5:
                ious.append(len(seen & true[i]) / len(seen | true[i]))
                matched.add(j)
                hit = True
        results[label] = ious, fp, fn + (not hit and not crowd)
    for j, label in zip(pred.ids.tolist(), pred.labels.tolist()):
        excused = set(true[0])
        crowds = [i for i, other, crowd in zip(gt.ids.tolist(), gt.labels.tolist(), gt.crowd.tolist())
                  if crowd and other == label]
        excused |= true[crowds[-1]] if crowds else set()
        if j not in matched and len(found[j] & excused) / len(found[j]) <= 0.5:
            ious, fp, fn = results[label]
            results[label] = ious, fp + 1, fn
    return results


def random_map(rng: random.Random, height: int, width: int) -> list[list[int]]:
    """Rectangles 0..4 over one another, 0 being void."""
    ground = rng.randrange(3)
    rows = [[ground] * width for _ in range(height)]
    for _ in range(rng.randrange(1, 9)):
        top, left, value = rng.randrange(height), rng.randrange(width), rng.randrange(5)
        for y in range(top, min(height, top + rng.randrange(1, height + 1))):
            for x in range(left, min(width, left + rng.randrange(2, width + 2))):
                rows[y][x] = value
    return rows


def random_case(seed: int) -> tuple[Tensor, Segments, Tensor, Segments]:
    """Truth, and a prediction that is made from it by moving, overwriting, and renumbering."""
    rng = random.Random(seed)
    height, width = rng.randrange(1, 9), rng.randrange(1, 12)
    gt_map = torch.tensor(random_map(rng, height, width))
    pred_map = gt_map.roll(rng.choice((0, 0, 1)), 1)
    noise = torch.tensor(random_map(rng, height, width))
    pred_map = torch.where(torch.tensor([[rng.random() < rng.choice((0.0, 0.3, 0.6)) for _ in range(width)]
                                         for _ in range(height)]), noise, pred_map)
    label = {i: rng.randrange(len(CLASSES)) for i in range(1, 5)}
    guess = {i: label[i] if rng.random() < 0.8 else rng.randrange(len(CLASSES)) for i in label}
    names = rng.sample(range(1, 2**24), 10)

    def renamed(map_: Tensor, names: list[int]) -> Tensor:
        return torch.tensor([0, *names])[map_]

    def listed(map_: Tensor, names: list[int], labels: dict[int, int], crowds: float) -> Segments:
        present = [i for i in range(1, 5) if (map_ == i).any()]
        rng.shuffle(present)
        return segments(*[(names[i - 1], labels[i], int(rng.random() < crowds)) for i in present])

    return (renamed(pred_map, names[:4]), listed(pred_map, names[:4], guess, 0.5),  # crowd means nothing here
            renamed(gt_map, names[5:9]), listed(gt_map, names[5:9], label, 0.3))


def test_equals_the_naive_loops():
    kinds = np.zeros(3, int)
    for seed in range(600):
        case = random_case(seed)
        counts, expected = evaluated(*case).counts(), naive(*case)
        for label, (ious, fp, fn) in expected.items():
            assert (counts.tp[label], counts.fp[label], counts.fn[label]) == (len(ious), fp, fn), seed
            assert counts.iou_sum[label] == math.fsum(ious), seed
            kinds += len(ious), fp, fn
    assert kinds.min() > 200  # the cases are of all kinds


@pytest.mark.gpu
def test_the_device_gives_the_same():
    for seed in range(100):
        pred_map, pred, gt_map, gt = random_case(seed)
        pred, gt = (Segments(x.ids.cuda(), x.labels.cuda(), x.crowd.cuda()) for x in (pred, gt))
        assert evaluated(pred_map.cuda(), pred, gt_map.cuda(), gt).counts() == evaluated(*random_case(seed)).counts()


# Collecting


def test_any_world_size_and_order_gives_the_same():
    whole = PanopticEvaluator(CLASSES, THINGS)
    for seed in range(40):
        whole.update(seed, *random_case(seed))
    ranks = [PanopticEvaluator(CLASSES, THINGS) for _ in range(3)]
    for seed in reversed(range(40)):
        ranks[seed % 7 % 3].update(seed, *random_case(seed))
    states = [rank.state() for rank in ranks]
    for order in (states, states[::-1]):
        ranks[0].merge(order)
        assert ranks[0].counts() == whole.counts() and ranks[0].compute() == whole.compute()
    whole.reset()
    assert set(whole.compute().metrics.values()) == {-1.0}


def test_an_image_seen_again_replaces_the_first():
    evaluator = PanopticEvaluator(CLASSES, THINGS)
    for seed in (0, 1, 2):
        evaluator.update("a", *random_case(seed))
    assert evaluator.counts() == evaluated(*random_case(2)).counts()


ONE = strip((1, 4)), segments((1, 0))


@pytest.mark.parametrize(("pred", "gt", "message"), [
    ((strip((1, 3)), segments((1, 0))), ONE, r"one size, got \(1, 3\) and \(1, 4\)"),
    ((strip((1, 2), (8, 2)), segments((1, 0))), ONE, r"map of the prediction must be 0 .* got 8 \(image 'a'\)"),
    (ONE, (strip((-1, 2), (1, 2)), segments((1, 0))), r"map of the ground truth must be 0 .* got -1 \(image 'a'\)"),
    ((strip((1, 4)), segments((1, 0), (3, 0))), ONE, r"segments of the prediction must have pixels .* none of id 3 "),
    (ONE, (strip((1, 4)), segments((1, 0), (3, 0))), "segments of the ground truth must have pixels"),
    ((strip((1, 4)), segments((1, 0), (1, 1))), ONE, "ids of the prediction must be distinct and not 0 .*got 1 again"),
    ((strip((0, 4)), segments((0, 0))), ONE, "must be distinct and not 0 .*got 0 again"),
    ((strip((1, 4)), segments((1, 3))), ONE, "labels of segments must be 0 to 2, got 0 to 3"),
])
def test_wrong_input_is_refused(pred, gt, message):
    with pytest.raises(ValueError, match=message):
        evaluated(*pred, *gt)


def test_wrong_segments_and_classes_are_refused():
    with pytest.raises(ValueError, match=r"must each be \(S,\)"):
        Segments(torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([False, False]))
    with pytest.raises(ValueError, match="distinct names"):
        PanopticEvaluator(["cat", "cat"], [True, True])
    with pytest.raises(ValueError, match="distinct names"):
        PanopticEvaluator(["cat", "dog"], [True])


# Files


def write_case(folder: Path, name: str, maps: dict[int, tuple[Tensor, Segments]], **extra) -> Path:
    """COCO's panoptic format, with category ids 10, 20 and 30."""
    annotations = []
    (folder / name).mkdir(parents=True)
    for image_id, (map_, listed) in maps.items():
        pixels = np.stack([map_.numpy() >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{image_id}.png")
        infos = [{"id": i, "category_id": 10 * (label + 1), "iscrowd": int(crowd), "area": int((map_ == i).sum())}
                 for i, label, crowd in zip(listed.ids.tolist(), listed.labels.tolist(), listed.crowd.tolist())]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos})
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"annotations": annotations, **extra}))
    return file


CATEGORIES = [{"id": 10 * (label + 1), "name": CLASSES[label], "isthing": int(THINGS[label])} for label in (2, 0, 1)]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    cases = {seed: random_case(seed) for seed in range(12)}
    return (write_case(tmp_path, "gt", {seed: case[2:] for seed, case in cases.items()}, categories=CATEGORIES),
            write_case(tmp_path, "pred", {seed: case[:2] for seed, case in reversed(cases.items())}))


def changed(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_files_give_the_numbers_of_the_maps(files):
    gt, pred = files
    evaluator = PanopticEvaluator(CLASSES, THINGS)
    for seed in range(12):
        evaluator.update(seed, *random_case(seed))
    assert evaluate_panoptic(gt, None, pred, None) == evaluator.compute()
    moved = pred.with_name("elsewhere")
    pred.with_suffix("").rename(moved)
    assert evaluate_panoptic(str(gt), str(gt.with_suffix("")), str(pred), str(moved)) == evaluator.compute()


def _first(change):
    """Changes the first segment of the last image that has any."""
    def of(content: dict) -> None:
        infos = [entry["segments_info"] for entry in content["annotations"] if entry["segments_info"]][-1]
        change(infos)
    return of


@pytest.mark.parametrize(("side", "change", "message"), [
    ("pred", lambda c: c["annotations"].pop(), r"no prediction for 1 of them, such as id 0 .*pred\.json"),
    ("gt", lambda c: c["annotations"].pop(), r"predictions for unknown 1 of them, such as id 11"),
    ("pred", lambda c: c["annotations"].append(c["annotations"][0]), "one annotation, got 13 for 12 images"),
    ("pred", _first(lambda infos: infos.pop()), r"map of the prediction must be 0 .*pred/\d+\.png"),
    ("gt", _first(lambda infos: infos.pop()), r"map of the ground truth must be 0 .*gt/\d+\.png"),
    ("pred", _first(lambda infos: infos.append({"id": 5, "category_id": 10})), "prediction must have pixels .* id 5 "),
    ("pred", _first(lambda infos: infos[0].update(category_id=99)), r"got id 99 in segment \d+ \(image"),
    ("gt", _first(lambda infos: infos[0].update(category_id=99)), r"got id 99 in segment \d+ \(image"),
    ("gt", _first(lambda infos: infos[0].update(area=10**6)), "area of a segment of the ground truth .* got 1000000 "),
    ("pred", _first(lambda infos: infos[0].pop("id")), "each entry must have id, category_id, got no id in"),
    ("gt", lambda c: c.pop("categories"), "annotations and categories, got no categories"),
    ("gt", lambda c: c["categories"].append(c["categories"][0]), r"ids must be distinct, got \[10, 20, 30, 30"),
    ("gt", lambda c: c["categories"][0].pop("isthing"), "got no isthing"),
])
def test_wrong_files_are_refused(files, side, change, message):
    gt, pred = files
    changed({"gt": gt, "pred": pred}[side], change)
    with pytest.raises(ValueError, match=message):
        evaluate_panoptic(gt, None, pred, None)


def test_files_that_cannot_be_read_are_refused(files):
    gt, pred = files
    (pred.with_suffix("") / "7.png").unlink()
    with pytest.raises(ValueError, match=r"image file must exist, got .*7\.png"):
        evaluate_panoptic(gt, None, pred, None)
    pred.write_text("{")
    with pytest.raises(ValueError, match=r"must be JSON, got .*pred\.json"):
        evaluate_panoptic(gt, None, pred, None)


def test_areas_of_predictions_and_absent_areas_do_not_matter(files):
    gt, pred = files
    before = evaluate_panoptic(gt, None, pred, None)
    changed(pred, _first(lambda infos: infos[0].update(area=10**6)))
    changed(gt, _first(lambda infos: infos[0].pop("area")))
    assert evaluate_panoptic(gt, None, pred, None) == before


def test_truth_of_the_shapes_data_set_is_perfect(tmp_path):
    truth = write_shapes(tmp_path / "shapes", 4, val_images=1, progress=False) / "annotations" / "panoptic_train.json"
    result = evaluate_panoptic(truth, None, truth, None)
    assert set(result.metrics.values()) == {1.0}
    assert {value for numbers in result.per_class.values() for value in numbers.values()} <= {1.0, -1.0}


@pytest.mark.data
def test_truth_of_coco_is_perfect_and_its_crowd_no_mistake(shared_data):
    folder = shared_data / "coco_mini" / "panoptic"
    files = folder / "panoptic_examples.json", folder / "panoptic_examples"
    result = evaluate_panoptic(*files, *files)
    assert set(result.metrics.values()) == {1.0}
    assert sum(numbers["panoptic/PQ"] == 1 for numbers in result.per_class.values()) == 8


@pytest.mark.data
def test_moved_truth_of_coco_gives_the_numbers_of_panopticapi(shared_data, tmp_path):
    """Everything 8 pixels to the right, the border repeated: numbers of panopticapi (1ad5afa) for these files."""
    folder = shared_data / "coco_mini" / "panoptic"
    file, maps = folder / "panoptic_examples.json", folder / "panoptic_examples"
    for png in maps.iterdir():
        pixels = np.array(Image.open(png))
        Image.fromarray(np.concatenate([pixels[:, :8], pixels[:, :-8]], 1)).save(tmp_path / png.name)
    result = evaluate_panoptic(file, None, file, tmp_path)
    assert list(result.metrics.values()) == pytest.approx([
        0.5355301137114357, 0.6151226732895448, 0.7316433566433567, 0.2873175880030587, 0.44650270715927687,
        0.4632867132867133, 0.7837426394198126, 0.7837426394198126, 1.0], rel=1e-14)
