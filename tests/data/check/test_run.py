"""Each kind of damage is told as its kind, and one hides nothing of the others."""

from __future__ import annotations

import json

import pytest

from detres.config import SourceConfig
from detres.data.check.run import check_data
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.kinds import KINDS

NAN = float("nan")
RLE = {"size": [60, 80], "counts": [4800]}
QUIET = {"category_gap", "image_empty", "class_rare", "class_unused", "class_not_measured", "image_grey"}


def kinds(root, **options) -> set[str]:
    report = check_data(root, workers=1, **options)
    return {problem.kind for problem in report.problems} - QUIET


def save(coco) -> None:
    coco.file.parent.mkdir(exist_ok=True)
    coco.file.write_text(json.dumps(coco.content))


@pytest.mark.parametrize(("kind", "change"), [
    ("bad_annotation", {"id": "1"}), ("bad_annotation", {"id": 2**70}), ("duplicate_annotation", {"id": 2}),
    ("id_zero", {"id": 0}), ("unknown_image", {"image_id": 99}), ("unknown_image", {"image_id": [7]}),
    ("unknown_category", {"category_id": 5}), ("bad_box", {"bbox": [1, 2, 3]}), ("bad_box", {"bbox": None}),
    ("box_not_finite", {"bbox": [1, 2, NAN, 4]}), ("box_negative", {"bbox": [10, 10, -5, 5]}),
    ("box_empty", {"bbox": [10, 10, 0, 5]}), ("box_outside", {"bbox": [90, 10, 5, 5]}),
    ("box_past_edge", {"bbox": [70, 10, 20, 30], "segmentation": None}), ("bad_area", {"area": "1"}),
    ("bad_area", {"area": 10**400}), ("area_differs", {"area": 900}),
    ("area_differs", {"area": 900, "segmentation": []}),
    ("area_differs", {"segmentation": RLE | {"counts": [100, 600, 4100]}, "area": 400}),
    ("box_mask_differs", {"bbox": [10, 10, 28, 30]}), ("bad_iscrowd", {"iscrowd": 2}),
    ("bad_segmentation", {"segmentation": 5}), ("bad_segmentation", {"segmentation": [1, 2, 3, 4, 5, 6]}),
    ("polygon_odd", {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}), ("polygon_short", {"segmentation": [[1, 2, 3, 4]]}),
    ("polygon_not_finite", {"segmentation": [[1, 2, 3, NAN, 5, 6]]}),
    ("polygon_not_finite", {"segmentation": [[1, 2, 3, 1e9, 5, 6]]}),
    ("polygon_crosses", {"segmentation": [[10, 10, 30, 40, 30, 10, 10, 40]], "area": 300}),
    ("mask_empty", {"segmentation": [[10, 10, 30, 10, 20, 10]]}),
    ("rle_size", {"segmentation": RLE | {"size": [80, 60]}}), ("bad_rle", {"segmentation": RLE | {"counts": [1]}}),
    ("bad_rle", {"segmentation": RLE | {"counts": "~~~"}}),
])
def test_a_broken_annotation(coco, kind, change):
    coco.first.update(change)
    save(coco)
    found = [problem for problem in check_data(coco.root, workers=1).problems if problem.kind == kind]
    assert len(found) == 1
    problem = found[0]
    place = "annotations[1]" if kind == "duplicate_annotation" else "annotations[0]"
    assert (problem.file, problem.split, problem.place) == (str(coco.file), "instances_train2017", place)
    assert problem.field in (*change, "segmentation", "segmentation[0]", "area", "bbox")


@pytest.mark.parametrize(("kind", "key", "entry"), [
    ("bad_category", "categories", {"name": "x"}), ("bad_category", "categories", 5),
    ("duplicate_category", "categories", {"id": 4, "name": "x"}),
    ("duplicate_category", "categories", {"id": 5, "name": "ant"}),
    ("category_keypoints", "categories", {"id": 5, "name": "x", "keypoints": 5}),
    ("bad_image", "images", {"file_name": "a.png"}), ("bad_image", "images", None),
    ("duplicate_image", "images", {"id": 7, "file_name": "a.png", "height": 60, "width": 80}),
    ("image_size", "images", {"id": 8, "file_name": "a.png", "height": 0, "width": 80}),
    ("image_missing", "images", {"id": 8, "file_name": "gone.png", "height": 60, "width": 80}),
    ("image_missing", "images", {"id": 8, "file_name": None, "height": 60, "width": 80}),
    ("bad_annotation", "annotations", "x"),
])
def test_a_broken_entry(coco, kind, key, entry):
    coco.content[key].append(entry)
    save(coco)
    assert kinds(coco.root) - {"image_listed_twice"} == {kind}
    report = check_data(coco.root, workers=1)
    assert report.splits[0].annotations == 3 and report.exit_status == 1
    with pytest.raises(InvalidDataError, match="detres data check "):
        load_dataset(SourceConfig(path=str(coco.root)), "train")


def test_nothing_hides_the_rest(coco, tmp_path):
    """A broken category, image, folder of images and other split: the annotations are checked all the same."""
    content = coco.content
    content["categories"][0]["name"] = None
    content["images"][0]["file_name"] = "gone.png"
    content["images"][1]["height"] = "80"
    for number, bbox in ((0, [NAN, 1, 1, 1]), (1, [90, 0, 5, 5]), (2, [1, 1, 0, 5])):
        content["annotations"][number]["bbox"] = bbox
    content["annotations"][0] |= {"segmentation": [[1, 2]], "area": -1, "iscrowd": None}
    save(coco)
    (coco.file.parent / "instances_val2017.json").write_text('{"images": [\n  {"id": 1},]}')
    assert kinds(coco.root) == {
        "unreadable", "bad_category", "image_missing", "image_size", "box_not_finite", "box_outside", "box_empty",
        "polygon_short", "bad_area", "bad_iscrowd"}
    report = check_data(coco.root, workers=1)
    broken = next(problem for problem in report.problems if problem.kind == "unreadable")
    assert "line 2 column 1" in broken.value and [split.format for split in report.splits] == ["coco", ""]
    (coco.root / "train2017").rename(tmp_path / "away")
    assert {"images_nowhere", "box_not_finite", "box_outside"} <= kinds(coco.root)
    without = kinds(coco.root, read_images=False)
    assert {"box_not_finite", "box_outside"} <= without and not {"images_nowhere", "image_missing"} & without
    assert "images_nowhere" not in kinds(coco.file, images=tmp_path / "away")
    assert "images_nowhere" in kinds(coco.file, images=tmp_path / "nowhere")


def test_boxes_in_another_layout_are_told_once(coco):
    coco.content["annotations"][0] |= {"bbox": [50, 30, 78, 58], "segmentation": [[50, 30, 78, 30, 78, 58, 50, 58]]}
    coco.content["annotations"][1] |= {"bbox": [40, 5, 79, 50], "segmentation": None, "area": None}
    coco.content["annotations"][2] |= {"bbox": [30, 10, 55, 79], "segmentation": None, "iscrowd": 0, "area": None}
    save(coco)
    assert kinds(coco.root) == {"boxes_xyxy"}
    for on_invalid in ("error", "drop"):  # all would be lost: that is no answer
        with pytest.raises(InvalidDataError, match="corners, x1, y1, x2, y2, of 3 boxes"):
            load_dataset(SourceConfig(path=str(coco.root)), "train", on_invalid)
    for entry in coco.content["annotations"]:
        entry["bbox"] = [0.25, 0.5, 0.1, 0.2]
    save(coco)
    assert kinds(coco.root) == {"boxes_normalised"}, "a cause, not what follows from it"
    for entry in coco.content["annotations"]:
        entry["bbox"] = [10, 20, 11, 12]  # both would fit: no pattern
    save(coco)
    assert not {"boxes_normalised", "boxes_xyxy"} & kinds(coco.root)


def test_layouts_of_voc_and_yolo(tmp_path, files):
    boxes = [(20, 10, 12, 15), (25, 5, 10, 20), (12, 3, 20, 21), (9, 12, 8, 9)]
    files.voc(tmp_path / "voc", {"a": "".join(files.object(box=box) for box in boxes)}, {"train": "a"})
    assert kinds(tmp_path / "voc") == {"boxes_xywh"}
    for kind, row in (("boxes_in_pixels", "0 20 10 12 15\n"), ("boxes_xyxy", "1 .6 .5 .95 .98\n")):
        files.yolo(tmp_path / kind, {"a": row * 3}, "path: .\ntrain: images/train\nnames: [cat, dog]\n")
        assert kinds(tmp_path / kind) == {kind}


def test_kinds_of_voc_and_yolo(tmp_path, files):
    objects = [files.object(), files.object(box=(20, 5, 5, 9)), files.object(box=(1, 1, "nan", 9)),
               files.object(box=(1, 1, "x", 9)), files.object(name=""), files.object(box=(5, 5, 50, 9))]
    images = {name: "" for name in ("no_image", "no_xml")} | {"a": "".join(objects)}
    files.voc(tmp_path / "voc", images, {"train": "a\na\nno_image\nno_xml\n"})
    (tmp_path / "voc/JPEGImages/no_image.jpg").unlink()
    (tmp_path / "voc/Annotations/no_xml.xml").unlink()
    assert kinds(tmp_path / "voc") == {"duplicate_image", "image_missing", "bad_xml", "box_negative", "box_not_finite",
                                       "bad_box", "unknown_category", "box_past_edge"}
    rows = ["0 .5 .5 .1 .1", "2 .5 .5 .1 .1", "0 x .5 .1 .1", "0 .1 .1 .5 .1 .5", "0 .1 .1 .5 .5 .5 .1 .1 .5"]
    files.yolo(tmp_path / "yolo", {"a": "\n".join(rows), "b": "0 .5 .5 0 .1"},
               "path: .\ntrain: images/train\nnames: [cat, dog]\n")
    (tmp_path / "yolo/images/train/b.png").write_bytes(b"no image")
    assert kinds(tmp_path / "yolo") == {"unknown_category", "bad_row", "polygon_odd", "polygon_crosses",
                                        "image_missing", "box_empty"}
    crossed = next(p for p in check_data(tmp_path / "yolo", workers=1).problems if p.kind == "polygon_crosses")
    assert (crossed.annotation_id, crossed.place, crossed.file[-5:]) == (5, "line 5", "a.txt")
    (tmp_path / "yolo/labels/train/b.txt").write_bytes(b"0 .5 .5 .1 .1\n\xff\xfe\n")  # hides no other file
    assert kinds(tmp_path / "yolo") >= {"unknown_category", "bad_row", "polygon_odd", "image_missing"}


def twice(root) -> tuple:
    problem, = (problem for problem in check_data(root, workers=1).problems if problem.kind == "object_twice")
    return problem.file, problem.annotation_id, problem.place


def test_problems_of_labels_are_told_where_they_are_in_the_files(coco, tmp_path, files):
    coco.content["annotations"].insert(2, coco.first | {"id": 90})
    save(coco)
    assert twice(coco.root) == (str(coco.file), 90, "annotations[2]")
    root = tmp_path / "voc"
    objects = [files.object(box=(5, 5, 5, 9)), files.object(), files.object()]  # the first cannot be read
    files.voc(root, {"a": "", "b": "".join(objects)}, {"train": "a\nb\n"})
    assert twice(root) == (str(root / "Annotations/b.xml"), 3, "object 3")
    for path in (root / "ImageSets/Main/train.txt", root / "ImageSets/Main", root / "ImageSets"):
        path.unlink() if path.is_file() else path.rmdir()
    assert twice(root) == (str(root / "Annotations/b.xml"), 3, "object 3")  # without lists of images
    root = tmp_path / "yolo"
    files.yolo(root, {"a": "", "b": "\n0 .5 .5 .5 .5\n0 .5 .5 .5 .5\n"}, "path: .\ntrain: images/train\nnames: [cat]\n")
    assert twice(root) == (str(root / "labels/train/b.txt"), 3, "line 3")


@pytest.mark.parametrize("name", ["nowhere", "empty", "empty.json", "text.json", "list.json", "bad.yaml", "list.yaml"])
def test_what_is_no_data_set(tmp_path, name):
    (tmp_path / "empty").mkdir()
    for file, text in (("empty.json", ""), ("text.json", "\x00\xff"), ("list.json", "[1]"), ("bad.yaml", "names: [a"),
                       ("list.yaml", "- a")):
        (tmp_path / file).write_text(text, "latin-1")
    report = check_data(tmp_path / name)
    assert report.exit_status == 2 and [problem.kind for problem in report.problems] == ["unreadable"]
    assert name in report.problems[0].value


def test_splits_without_annotations(coco):
    coco.content["annotations"] = []
    save(coco)
    assert kinds(coco.root) == {"no_annotations"}


def test_warnings_do_not_stop_training(coco, caplog):
    coco.first["bbox"] = [70, 10, 20, 30]
    coco.first["id"] = 0
    save(coco)
    assert check_data(coco.root, workers=1).exit_status == 0
    assert len(load_dataset(SourceConfig(path=str(coco.root)), "train").records) == 2
    assert "1 x boxes that reach past the edge of their image: training clips them" in caplog.text
    assert "1 x annotations with id 0" in caplog.text


@pytest.mark.data
@pytest.mark.parametrize(("name", "allowed"), [
    ("coco_mini", {"polygon_crosses"}), ("voc_mini", set()), ("balloon", set()), ("nuts", set()),
    ("bccd/BCCD", {"box_empty"})])
def test_real_data_is_not_accused(shared_data, name, allowed):
    """Of what the reader and the geometry look at; images and labels have tests of their own."""
    from detres.data.check.run import check_annotations

    report, *_ = check_annotations(shared_data / name)
    assert {problem.kind for problem in report.problems} - {"category_gap"} <= allowed


def test_every_kind_is_described():
    for slug, kind in KINDS.items():
        assert kind.severity in ("error", "warning", "note") and kind.title and kind.effect, slug
        assert not kind.effect.endswith(".") and not kind.fix.endswith("."), slug


def test_a_folder_of_which_many_images_are_gone_is_found(coco):
    """Also if the few that are looked at first are among them."""
    coco.content["images"] = [coco.content["images"][0] | {
        "id": number, "file_name": "a.png" if number % 5 else "gone.png"} for number in range(1000)]
    coco.content["annotations"] = []
    save(coco)
    found = [problem.kind for problem in check_data(coco.root, workers=1).problems]
    assert found.count("image_missing") == 200 and "images_nowhere" not in found
