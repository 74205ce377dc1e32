"""COCO JSON."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from detres.config import SourceConfig
from detres.data.coco import find_annotations
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.masks import mask_area, rasterize, run_lengths


def test_boxes_labels_and_ids(coco):
    dataset = coco.load()
    assert (dataset.name, dataset.format) == ("instances_train2017", "coco")
    assert dataset.classes == ("ant", "zebra") and dataset.category_ids == (4, 90)  # by id, with gaps
    first, second = dataset.records
    assert (first.id, first.path.name, first.height, first.width) == (7, "a.png", 60, 80)
    zebra, ant = first.annotations
    assert (zebra.id, zebra.label, zebra.box, zebra.area, zebra.crowd) == (1, 1, (10, 10, 30, 40), 600, False)
    assert [list(polygon) for polygon in zebra.segmentation] == [[10, 10, 30, 10, 30, 40, 10, 40]]
    assert (ant.label, ant.box) == (0, (0.5, 0, 9.5, 9))
    assert ant.area == mask_area(ant.segmentation, 60, 80) > 0  # not in the file
    assert second.annotations[0].crowd and second.annotations[0].segmentation["counts"] == [100, 100, 4600]


def test_values_of_the_wrong_kind_are_all_told_at_once(coco):
    """Each problem of a broken file, with file, image, annotation, field and value."""
    content = coco.content
    content["images"] += [{"id": 7, "file_name": "a.png", "height": 60, "width": 80},
                          {"id": 8, "file_name": "gone.png", "height": 60, "width": 80},
                          {"id": 9, "file_name": "a.png", "height": 0, "width": 80}, {"file_name": "a.png"}]
    good = coco.first
    broken = {
        10: {"image_id": 1000}, 11: {"category_id": 1}, 12: {"bbox": [10, 10, 0, 5]}, 13: {"bbox": [80, 0, 9, 9]},
        14: {"bbox": [1, 2, float("nan"), 3]}, 15: {"bbox": [1, 2, "3", 4]}, 16: {"bbox": [1, 2, 3]},
        17: {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, 18: {"segmentation": [[1, 2, 3, 4]]},
        19: {"segmentation": [[1, 2, 3, float("nan"), 5, 6]]}, 20: {"segmentation": [[1, 2, 3, "4", 5, 6]]},
        21: {"segmentation": {"size": [80, 60], "counts": [4800]}},
        22: {"segmentation": {"size": [60, 80], "counts": [1, 2, 3]}},
        23: {"segmentation": {"size": [60, 80], "counts": "~~~"}}, 24: {"segmentation": 5},
        31: {"segmentation": [[1, 2, 3, 4, 1e9, 6]]},
        30: {"segmentation": {"size": [60, 80], "counts": "PP0"}}, 25: {"iscrowd": 2},
        26: {"area": float("inf")}, 27: {"image_id": 8}, 28: {"bbox": [-30, 0, 20, 20]}, 29: {"bbox": None},
    }
    content["annotations"] += [good | {"id": number} | change for number, change in broken.items()]
    content["annotations"] += [dict(good), {"image_id": 7}]
    with pytest.raises(InvalidDataError) as caught:
        coco.load()
    told = {(problem.annotation_id, problem.field) for problem in caught.value.problems}
    assert told == {
        (None, "id"), (None, "file_name"), (None, "height"), (None, "images[5].id"),
        *((None, name) for name in ("id", "category_id", "bbox")),
        (10, "image_id"), (11, "category_id"), *((number, "bbox") for number in (12, 13, 14, 15, 16, 28, 29)),
        *((number, "segmentation") for number in (*range(17, 25), 30, 31)), (25, "iscrowd"), (26, "area"), (1, "id")}
    by_id = {problem.annotation_id: problem for problem in caught.value.problems}
    assert by_id[13].image == 7 and by_id[13].value == [80, 0, 9, 9] and by_id[13].file == str(coco.file)
    assert "80 px wide, 60 px high" in by_id[13].reason
    assert "odd length" in by_id[17].reason and "3 points" in by_id[18].reason and "finite" in by_id[19].reason
    assert "[60, 80]" in by_id[21].reason and by_id[21].value == [80, 60]
    kept = coco.load("drop")
    assert [[item.id for item in record.annotations] for record in kept.records] == [[1, 2], [3]]


def test_a_box_past_the_edge_is_no_error(coco, caplog):
    coco.first["bbox"] = [70, 50, 10.02, 10.9]  # rounding
    coco.content["annotations"][1]["bbox"] = [-20, 0, 30, 9]
    with caplog.at_level(logging.WARNING, "detres"):
        dataset = coco.load()
    assert dataset.records[0].annotations[1].box == (-20, 0, 10, 9)  # as annotated: evaluation counts it so
    assert "1 x boxes that reach past" in caplog.text


def test_keypoints_and_what_a_mirror_swaps(coco):
    coco.content["categories"][0]["keypoints"] = ["nose", "left_eye", "right_eye", "left_ear"]
    coco.first["keypoints"] = [1, 2, 2, 3, 4, 1, 0, 0, 0, 5, 6, 2]
    dataset = coco.load()
    assert dataset.keypoint_names == ("nose", "left_eye", "right_eye", "left_ear") and dataset.flip_pairs == ((1, 2),)
    assert [item.keypoints for item in dataset.records[0].annotations] == [(1, 2, 2, 3, 4, 1, 0, 0, 0, 5, 6, 2), None]
    assert dataset.keypoint_classes == ("zebra",) and dataset.skeleton == ()
    moved = dataset.moved_keypoints(0.5)
    assert moved.records[0].annotations[0].keypoints == (1.5, 2.5, 2, 3.5, 4.5, 1, 0, 0, 0, 5.5, 6.5, 2)
    assert moved.records[0].annotations[1] == dataset.records[0].annotations[1] and moved.keypoint_offset == 0.5
    coco.content["categories"][0]["skeleton"] = [[1, 2], [4, 3], [4, 9]]
    assert coco.load().skeleton == ((0, 1), (3, 2))
    coco.first["keypoints"].pop()
    with pytest.raises(InvalidDataError, match=r"keypoints must be finite: .*\(12 numbers\)"):
        coco.load()
    coco.content["categories"][1]["keypoints"] = ["other"]
    with pytest.raises(InvalidDataError, match="the same for all categories"):
        coco.load()


@pytest.mark.parametrize(("change", "message"), [
    ({"categories": []}, "one or more"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "categories.1.: category id must differ .*got 1"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "category name must differ .*got 'a'"),
    ({"categories": [{"id": "1", "name": "a"}]}, "whole number as id"),
    ({"annotations": None}, "got no annotations"),
])
def test_files_that_cannot_be_used_at_all(coco, change, message):
    coco.content |= change
    for on_invalid in ("error", "drop"):
        with pytest.raises(ValueError, match=message):
            coco.load(on_invalid)


def test_a_cut_file_is_named(coco):
    coco.load()
    coco.file.write_text(coco.file.read_text()[:-20])
    with pytest.raises(ValueError, match="must be JSON, got .*instances_train2017.json"):
        load_dataset(SourceConfig(path=str(coco.file)), "train")


@pytest.mark.parametrize(("names", "role", "split", "expected"), [
    (["annotations/instances_train2017.json", "annotations/captions_train2017.json",
      "annotations/person_keypoints_train2017.json", "annotations/instances_val2017.json"], "train", None, 0),
    (["annotations/instances_train.json", "annotations/panoptic_train.json", "shapes.json"], "train", None, 0),
    (["annotations/train.json", "annotations/captions_train.json"], "train", None, 0),
    (["annotations/instances_train.json", "annotations/instances_minitrain.json"], "train", "minitrain", 1),
    (["annotations/image_info_test2017.json", "annotations/instances_val2017.json"], "test", None, 0),
    (["balloon_train_coco.json", "balloon_val_coco.json"], "val", None, 1),
    (["train/_annotations.coco.json", "valid/_annotations.coco.json"], "val", None, 1),
    (["trainval.json"], "val", None, 0),
    (["train.json"], "val", None, None),  # validation on training images is never a guess
    (["train_a.json", "train_b.json"], "train", None, None),
])
def test_the_file_of_a_role(tmp_path, names, role, split, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    if expected is None:
        with pytest.raises(FileNotFoundError, match=f"one annotation file for role '{role}'.*{names[0]}"):
            find_annotations(tmp_path, role, split)
    else:
        assert find_annotations(tmp_path, role, split) == tmp_path / names[expected]


@pytest.mark.parametrize("folder", ["train", "images", "images/train", "annotations", "."])
def test_images_are_found_beside_the_file(coco, folder):
    target = coco.root / folder
    target.mkdir(parents=True, exist_ok=True)
    (coco.root / "val").mkdir(exist_ok=True)
    for path in (coco.root / "train2017").iterdir():
        path.rename(target / path.name)
    coco.file = coco.root / "annotations" / "instances_train.json"
    assert coco.load().records[0].path == target / "a.png"


def test_images_that_are_nowhere_or_elsewhere(coco, tmp_path):
    coco.load()
    elsewhere = (coco.root / "train2017").rename(coco.root / "elsewhere")
    for on_invalid in ("error", "drop"):
        with pytest.raises(InvalidDataError, match="in the folder of images .*give the folder as data.*got 'a.png'"):
            load_dataset(SourceConfig(path=str(coco.root)), "train", on_invalid)
    source = SourceConfig(path=str(coco.root), images=str(elsewhere))
    assert load_dataset(source, "train").records[0].path == elsewhere / "a.png"
    wrong = SourceConfig(path=str(coco.root), images=str(tmp_path))
    with pytest.raises(InvalidDataError, match=r"got 1 problem(.|\n)*check data"):
        load_dataset(wrong, "train", "drop")


def test_rasterize_is_pycocotools():
    bitmap = np.zeros((20, 30), np.uint8)
    bitmap[3:9, 4:17] = bitmap[12:18, 20:25] = 1
    compressed = coco_mask.encode(np.asfortranarray(bitmap))
    polygons = [[4, 3, 17, 3, 17, 9, 4, 9], [20, 12, 25, 12, 25, 18, 20, 18]]
    flat = bitmap.T.ravel()
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    for segmentation in (compressed, {"size": [20, 30], "counts": compressed["counts"].decode()},
                         {"size": [20, 30], "counts": runs}, polygons):
        np.testing.assert_array_equal(rasterize(segmentation, 20, 30), bitmap)
        assert mask_area(segmentation, 20, 30) == bitmap.sum()


@given(st.lists(st.integers(0, 10**6), max_size=30).map(lambda runs: [*runs, 5]))
def test_run_lengths_undo_pycocotools(runs):
    """Against the encoder of pycocotools; and what its decoder would crash on is told from what it would not."""
    code = coco_mask.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)["counts"].decode()
    assert run_lengths(code) == runs
    assert run_lengths(code + "o") is run_lengths("~" + code) is run_lengths("") is None


@pytest.mark.data
@pytest.mark.parametrize(("name", "role", "images", "annotations", "crowds"), [
    ("coco_mini", "train", 153, 1382, 14), ("coco_mini", "val", 79, 624, 5), ("nuts", "val", 18, 165, 0),
    ("balloon", "train", 61, 255, 0), ("balloon", "val", 13, 50, 0)])
def test_real_files_have_no_problems(shared_data, caplog, name, role, images, annotations, crowds):
    with caplog.at_level(logging.WARNING, "detres"):
        dataset = load_dataset(SourceConfig(path=str(shared_data / name)), role)
    items = [item for record in dataset.records for item in record.annotations]
    assert (len(dataset.records), len(items), sum(item.crowd for item in items)) == (images, annotations, crowds)
    if name == "coco_mini":
        assert not caplog.text and dataset.category_ids[-1] == 90 and len(dataset.classes) == 80
        raw = json.loads((shared_data / name / "annotations" / f"instances_{role}2017.json").read_text())
        boxes = {entry["id"]: entry["bbox"] for entry in raw["annotations"]}
        for item in items:
            x, y, w, h = boxes[item.id]
            assert item.box == (x, y, x + w, y + h)


def test_a_union_of_splits_has_the_images_of_both(coco, files):
    """As COCO 2014's trainval35k: the second file's images are in a folder that its name does not tell."""
    coco.load()
    content = copy.deepcopy(coco.content)
    content["images"] = [{"id": 42, "file_name": "COCO_val2014_42.png", "height": 60, "width": 80}]
    content["annotations"] = [coco.first | {"id": 1, "image_id": 42, "category_id": 4}]
    files.image(coco.root / "val2014" / "COCO_val2014_42.png", 60, 80)
    other = coco.root / "annotations" / "instances_valminusminival2014.json"

    def joined(split="train2017+valminusminival2014"):
        other.write_text(json.dumps(content))
        return load_dataset(SourceConfig(path=str(coco.root), split=split), "train")

    dataset = joined()
    assert dataset.name == "instances_train2017+instances_valminusminival2014"
    assert [(record.id, record.path.parent.name, len(record.annotations)) for record in dataset.records] == [
        (7, "train2017", 2), (3, "train2017", 1), (42, "val2014", 1)]
    assert dataset.category_ids == (4, 90) and dataset.records[2].annotations[0].label == 0
    with pytest.raises(ValueError, match="no image in common, got 2, such as id 7 "):
        joined("train2017+train2017")
    content["categories"] = content["categories"][::-1] + [{"id": 91, "name": "yak"}]
    with pytest.raises(ValueError, match="same categories .*valminusminival2014 than in instances_train2017"):
        joined()


def test_panoptic_files_hold_no_instances(coco):
    coco.content["annotations"] = [{"image_id": 7, "file_name": "a.png", "segments_info": []}]
    with pytest.raises(ValueError, match="got the panoptic format"):
        coco.load()
