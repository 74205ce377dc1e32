"""What cannot be trusted is refused with all its faults, or left out with a warning; areas are held against masks."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detres.evaluation.coco_files import read_truth, results_columns, truth_columns
from detres.evaluation.trust import area_report, check

NAN, INF = float("nan"), float("inf")
KEYPOINTS = [3.0, 4.0, 2, 9.5, 1.25, 1]


def square(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def encoded(height: int, width: int, box: tuple[int, int, int, int]) -> dict:
    x, y, w, h = box
    bitmap = np.zeros((height, width), np.uint8, order="F")
    bitmap[y:y + h, x:x + w] = 1
    code = rle.encode(bitmap)
    return {"size": code["size"], "counts": code["counts"].decode()}


def truth(**changes) -> dict:
    """Two objects in each of three images, with `changes` of the second."""
    annotations = [{"id": 2 * i + k + 1, "image_id": 10 * (i + 1), "category_id": k + 1, "area": 600, "iscrowd": 0,
                    "bbox": [5 + 40 * k, 5, 30, 20], "segmentation": square(5 + 40 * k, 5, 30, 20),
                    "keypoints": KEYPOINTS, "num_keypoints": 2} for i in range(3) for k in range(2)]
    annotations[1].update(changes)
    return {"info": {}, "images": [{"id": 10 * i, "height": 50, "width": 90} for i in (1, 2, 3)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], "annotations": annotations}


def results(**changes) -> list[dict]:
    """The objects of `truth` as detections, with `changes` of the third."""
    found = [{"image_id": item["image_id"], "category_id": item["category_id"], "bbox": item["bbox"],
              "score": 0.9 - i / 10, "segmentation": encoded(50, 90, item["bbox"]), "keypoints": KEYPOINTS}
             for i, item in enumerate(truth()["annotations"])]
    found[2].update(changes)
    return found


def checked(ground_truth: dict, found: list[dict], iou_type: str = "bbox", lenient: bool = False):
    return check(truth_columns(ground_truth, masks=True, keypoints=True),
                 results_columns(found, masks=True, keypoints=True), iou_type, lenient)


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints", "boundary"])
def test_sound_files_pass_unchanged(iou_type):
    found = checked(truth(), results(), iou_type)
    assert found.warnings == []
    assert found.truth.ids.tolist() == [1, 2, 3, 4, 5, 6] and len(found.results.scores) == 6


def repeated_images() -> dict:
    data = truth()
    return {**data, "images": [*data["images"], data["images"][0]]}


# Ground truth, results, kind; the beginning of what is told; what is done when lenient; entries left of each.
FAULTS = {
    "id 0": (
        truth(id=0), results(), "bbox",
        "1 of 6 annotations have the id 0: entry 1 (0). pycocotools takes a match with it for none, so that perfect "
        "detections score below 1.",
        "Kept: detres matches without ids", 6, 6),
    "same id": (
        truth(id=1), results(), "bbox",
        "1 of 6 annotations have the id of another: entry 1 (1). pycocotools replaces each of them by the last.",
        "Kept, each as it is", 6, 6),
    "same image": (
        repeated_images(), results(), "bbox",
        "1 of 4 images have the id of another: entry 3 (10). pycocotools takes",
        "Done here, too.", 6, 6),
    "same category": (
        {**truth(), "categories": [{"id": i} for i in (1, 2, 2)]}, results(), "bbox",
        "1 of 3 categories have the id of another: entry 2 (2). pycocotools takes them for one",
        "Done here, too.", 6, 6),
    "image of a truth": (
        truth(image_id=11), results(), "bbox",
        "1 of 6 annotations are of an image that the ground truth does not list: entry 1 (11). pycocotools leaves "
        "them out silently.",
        "Left out.", 5, 6),
    "category of a truth": (
        truth(category_id=9), results(), "bbox",
        "1 of 6 annotations are of a category that the ground truth does not list: entry 1 (9). pycocotools leaves",
        "Left out.", 5, 6),
    "box of a truth": (
        truth(bbox=[NAN, 0, 1, 1]), results(), "bbox",
        "1 of 6 annotations have no finite box: entry 1 ([nan, 0.0, 1.0, 1.0]). pycocotools takes an overlap that is "
        "NaN for a match",
        "Left out.", 5, 6),
    "absent box": (
        truth(bbox=None), results(), "bbox",
        "1 of 6 annotations have no finite box: entry 1",
        "Left out.", 5, 6),
    "negative truth": (
        truth(bbox=[9, 9, -1, 1]), results(), "bbox",
        "1 of 6 annotations have a box of negative width or height: entry 1 ([9.0, 9.0, -1.0, 1.0])",
        "Left out.", 5, 6),
    "area": (
        truth(area=None), results(), "bbox",
        "1 of 6 annotations have no finite area: entry 1 (nan). pycocotools stops with a KeyError",
        "The area of the box is used.", 6, 6),
    "neither area nor box": (
        truth(area=None, bbox=None), results(), "segm",
        "1 of 6 annotations have neither a finite area nor a box: entry 1 (nan). pycocotools stops with a KeyError",
        "Left out.", 5, 6),
    "mask of a truth": (
        truth(segmentation=None), results(), "segm",
        "1 of 6 annotations have no mask: entry 1 (10). pycocotools stops with a KeyError.",
        "Left out.", 5, 6),
    "keypoints of a truth": (
        truth(keypoints=None), results(), "keypoints",
        "1 of 6 annotations have no keypoints, or some that are not finite: entry 1 ([nan",
        "Left out.", 5, 6),
    "NaN score": (
        truth(), results(score=NAN), "bbox",
        "1 of 6 detections have a score that is not finite: entry 2 (nan). pycocotools ranks NaN below all others",
        "Left out.", 6, 5),
    "infinite score": (
        truth(), results(score=INF), "bbox",
        "1 of 6 detections have a score that is not finite: entry 2 (inf).",
        "Left out.", 6, 5),
    "image": (
        truth(), results(image_id=99), "bbox",
        "1 of 6 detections are of an image that the ground truth does not list: entry 2 (99). pycocotools stops at "
        "unknown images",
        "Left out.", 6, 5),
    "category": (
        truth(), results(category_id=0), "bbox",
        "1 of 6 detections are of a category that the ground truth does not list: entry 2 (0). pycocotools stops at "
        "unknown images, and leaves out unknown categories silently.",
        "Left out.", 6, 5),
    "infinite box": (
        truth(), results(bbox=[0, 0, INF, 1]), "bbox",
        "1 of 6 detections have no finite box: entry 2 ([0.0, 0.0, inf, 1.0]).",
        "Left out.", 6, 5),
    "negative": (
        truth(), results(bbox=[9, 9, 5, -5]), "bbox",
        "1 of 6 detections have a box of negative width or height: entry 2 ([9.0, 9.0, 5.0, -5.0]). pycocotools "
        "takes their area as negative",
        "Left out.", 6, 5),
    "mask": (
        truth(), results(segmentation=None), "segm",
        "1 of 6 detections have no mask: entry 2 (20). pycocotools evaluates their boxes as masks.",
        "Left out.", 6, 5),
    "size of a mask": (
        truth(), results(segmentation=encoded(90, 50, (1, 1, 9, 9))), "boundary",
        "1 of 6 detections have a mask whose size is not the image's: entry 2 ((90, 50)). In pycocotools they "
        "overlap nothing.",
        "Left out.", 6, 5),
    "keypoints": (
        truth(), results(keypoints=[NAN] * 6), "keypoints",
        "1 of 6 detections have no keypoints, or some that are not finite: entry 2 ([nan",
        "Left out.", 6, 5),
    "number of keypoints": (
        truth(), [{**item, "keypoints": [1.0] * 9} for item in results()], "keypoints",
        "6 of 6 detections have 3 keypoints, annotations 2: entry 0 (10), entry 1 (10), entry 2 (20), ....",
        "Left out.", 6, 0),
    "empty": (
        truth(), [], "bbox",
        "the results has no detections. pycocotools stops with an IndexError.",
        "All is missed: AP is 0.", 6, 0),
    "shifted images": (
        truth(), [{**item, "image_id": item["image_id"] - 1} for item in results()], "bbox",
        "6 of 6 detections are of an image",
        "Adding 1 makes all of them known. Left out.", 6, 0),
    "shifted categories": (
        truth(), [{**item, "category_id": item["category_id"] + 1} for item in results()], "bbox",
        "3 of 6 detections are of a category that the ground truth does not list: entry 1 (3), entry 3 (3), entry 5 "
        "(3). pycocotools",
        "Subtracting 1 makes all of them known. Left out.", 6, 3),
    "positions": (
        truth(), [{**item, "image_id": item["image_id"] // 10 - 1} for item in results()], "bbox",
        "6 of 6 detections are of an image",
        "They may be positions in the list, counted from 0. Left out.", 6, 0),
    "strings": (
        truth(), [{**item, "image_id": str(item["image_id"])} for item in results()], "bbox",
        "6 of 6 detections are of an image",
        "These ids are strings, the listed ones numbers. Left out.", 6, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_refused_or_told(fault):
    ground_truth, found, iou_type, told, done, truths_left, found_left = FAULTS[fault]
    with pytest.raises(ValueError, match="must be sound to be compared, got:\n- ") as error:
        checked(ground_truth, found, iou_type)
    assert f"\n- {told}" in str(error.value) and str(error.value).count("\n- ") == 1
    assert str(error.value).endswith("or evaluate what is left: --lenient, in Python lenient=True.")
    rest = checked(ground_truth, found, iou_type, lenient=True)
    assert len(rest.warnings) == 1 and rest.warnings[0].startswith(told) and done in rest.warnings[0]
    assert (len(rest.truth.ids), len(rest.results.scores)) == (truths_left, found_left)
    assert checked_again(rest, iou_type) == [] or "Kept" in done or "Done here" in done or found_left == 0


def checked_again(rest, iou_type: str) -> list[str]:
    return check(rest.truth, rest.results, iou_type, lenient=True).warnings


def test_all_faults_are_told_at_once():
    ground_truth, found = truth(id=0), results(score=NAN)
    found[0]["image_id"] = found[1]["image_id"] = 7
    with pytest.raises(ValueError) as error:
        checked(ground_truth, found)
    assert str(error.value).count("\n- ") == 3 and "2 of 6 detections are of an image" in str(error.value)
    assert len(checked(ground_truth, found, lenient=True).results.scores) == 3


def test_numbers_in_quotes_are_other_ids():
    data = truth()
    data["images"] += [{"id": i} for i in range(100, 140)]  # numpy would compare that many as strings
    with pytest.raises(ValueError, match="6 of 6 detections.* strings, the listed ones numbers"):
        checked(data, [{**item, "image_id": str(item["image_id"])} for item in results()])


def test_an_absent_area_is_the_box():
    assert checked(truth(area=None, bbox=[0, 0, 4, 2.5]), results(), lenient=True).truth.area[1] == 10.0


def test_masks_of_other_kinds_need_no_size():
    uncompressed = {"size": [50, 90], "counts": [100, 50 * 90 - 100]}
    assert checked(truth(segmentation=uncompressed), results(), "segm").warnings == []


def pycocotools_ap(ground_truth: dict, found: list[dict]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground_truth)
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0])


ONE = pytest.approx(1.0)
MORE = {"image_id": 10, "category_id": 1, "score": 0.99}


@pytest.mark.parametrize("ground_truth, found, expected", [
    (truth(), results(), True),
    (truth(id=0), results(), False),
    (truth(id=1), results(), False),
    (truth(), results(score=NAN), True),
    (truth(), results() + [{**MORE, "bbox": [50, 30, 5, 5]}], False),
    (truth(), results() + [{**MORE, "bbox": [55, 35, -5, 5]}], True),
    (truth(), results() + [{**MORE, "category_id": 5, "bbox": [50, 30, 5, 5]}], True),
    (truth(), results(bbox=[NAN] * 4), True),
], ids=["sound", "id 0", "same id", "NaN score", "false", "negative", "category", "NaN box"])
def test_what_we_say_of_pycocotools(ground_truth, found, expected):
    """True where it gives full marks: rightly, or because it does not see what is wrong."""
    assert (pycocotools_ap(ground_truth, found) == ONE) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([10, 20, 30, 40]), st.integers(0, 3), st.sampled_from([0.5, NAN, INF]),
                          st.sampled_from([3.0, 0.0, -2.0, NAN, -INF])), max_size=8))
def test_what_is_left_is_sound(rows):
    found = [{"image_id": image, "category_id": label, "score": score, "bbox": [1, 1, width, 4]}
             for image, label, score, width in rows]
    rest = checked(truth(), found, lenient=True)
    good = [row for row in rows if row[0] < 40 and row[1] in (1, 2) and row[2] == 0.5 and row[3] >= 0]
    assert rest.results.image_ids.tolist() == [row[0] for row in good]
    assert rest.results.boxes_xywh[:, 2].tolist() == [row[3] for row in good]
    assert (rest.warnings == []) == (len(good) == len(rows) > 0)


def report(*items: tuple[float, object], crowd: int = 0):
    """Of annotations (area, segmentation) in a 200 x 300 image."""
    annotations = [{"id": i, "image_id": 1, "category_id": 1, "area": area, "bbox": [0, 0, 10, 10], "iscrowd": crowd,
                    "segmentation": mask} for i, (area, mask) in enumerate(items, 1)]
    return area_report(truth_columns({"images": [{"id": 1, "height": 200, "width": 300}], "categories": [{"id": 1}],
                                      "annotations": annotations}, masks=True))


def test_areas_of_polygons_and_masks_agree():
    triangle = [[10, 10, 60, 10, 10, 50]]
    overlapping = [*square(0, 0, 50, 50), *square(25, 0, 50, 50)]
    found = report((1000, triangle), (1000.5, triangle), (3750, overlapping), (500, encoded(200, 300, (5, 5, 25, 20))),
                   (520, encoded(200, 300, (5, 5, 25, 20))), (60.9, [[10, 10, 110, 10, 110, 10.6, 10, 10.6]]),
                   (100, {"size": [200, 300], "counts": [7, 100, 59893]}), (5, None), (NAN, triangle))
    assert found.lines == [] and np.isnan(found.area[-1]) and found.area[:3].tolist() == [1000, 1000.5, 3750]


def test_areas_that_disagree_and_what_that_does():
    box = square(0, 0, 40, 40)
    found = report((500, box), (1600, box), (100, square(100, 0, 200, 200)), (1650, encoded(200, 300, (0, 0, 40, 40))))
    assert found.lines == [
        "3 of 4 annotations of the ground truth have an area that is not their mask's: entry 0 says 500, its mask has "
        "1600 pixels; entry 2 says 100, its mask has 40000 pixels; entry 3 says 1650, its mask has 1600 pixels.",
        "By their masks, of another size are 2: 0 small, 3 medium, 1 large instead of 2 small, 2 medium, 0 large. "
        "APs, APm, APl, ARs, ARm and ARl are of other objects than their names say; AP is not affected."]
    assert found.area.tolist() == [1600, 1600, 40000, 1600]


def test_areas_of_boxes_are_recognised_and_sizes_may_stay():
    found = report((100, [[0, 0, 10, 0, 0, 10]]))
    assert found.lines[0].endswith("its mask has 45 pixels. They are areas of boxes.")
    assert found.lines[1] == "None is of another size for it: no number is affected."
    crowds = report((9e4, square(0, 0, 40, 40)), crowd=1)
    assert crowds.lines[1].startswith("None") and crowds.area.tolist() == [1600]


def test_damaged_masks_are_refused():
    with pytest.raises(ValueError, match=r"\(the ground truth, entry 1\)"):
        report((100, square(0, 0, 10, 10)), (100, {"size": [200, 300], "counts": "12"}))


@pytest.mark.data
def test_areas_of_published_files(shared_data):
    folder = shared_data / "detection_results"
    found = area_report(read_truth(folder / "cocoapi_fake100" / "instances_val2014_100.json", masks=True))
    assert found.lines[0].startswith("8 of 839 annotations") and found.lines[1].startswith("None is of another size")
    assert "of another size are 1:" in area_report(
        read_truth(folder / "lvis_gt_only" / "lvis_val_100.json", masks=True)).lines[1]
