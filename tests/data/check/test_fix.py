"""The clean copy: checked, it is safe; what was right stays as it was; every change is listed."""

from __future__ import annotations

import csv
import json
import re

import pytest
import yaml

from detres.cli import main
from detres.config import SourceConfig
from detres.data.check.fix import Changes, write_clean_copy
from detres.data.check.run import check_data
from detres.data.dataset import load_dataset
from detres.data.masks import mask_area

NAN = float("nan")


def fix(path, out, images=None, **options):
    report = check_data(path, images, workers=1, **options)
    return write_clean_copy(report, images, out, workers=1, **options)


@pytest.fixture
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("fix") / "out"


def save(coco) -> None:
    coco.file.parent.mkdir(exist_ok=True)
    coco.file.write_text(json.dumps(coco.content))


def test_what_is_right_stays_byte_for_byte_the_same_content(coco, out):
    coco.content |= {"info": {"year": 2017}, "licenses": [{"id": 1}], "captions": ["a"]}
    coco.first["attributes"] = {"occluded": True, "score": 0.1}
    save(coco)
    after, changes = fix(coco.root, out)
    assert after.exit_status == 0 and changes.made == []
    assert (out / "annotations/instances_train2017.json").read_bytes() == coco.file.read_bytes()
    assert json.loads((out / "changes.json").read_text()) == []
    copied = load_dataset(SourceConfig(path=str(out)), "train")
    assert [record.annotations for record in copied.records] == [record.annotations for record in coco.load().records]
    assert copied.records[0].path.read_bytes() == coco.load().records[0].path.read_bytes()


def test_a_broken_file_is_mended(coco, out):
    content, good = coco.content, dict(coco.first)
    broken = {10: {"image_id": 1000}, 12: {"bbox": [10, 10, 0, 5]}, 13: {"bbox": [NAN, 0, 9, 9], "segmentation": None},
              14: {"bbox": [30, 40, -20, -30], "segmentation": None}, 15: {"area": 900}, 16: {"area": "x"},
              17: {"segmentation": [good["segmentation"][0], [1, 2, 3, 4]]},
              18: {"segmentation": good["segmentation"][0]},
              19: {"image_id": 3, "bbox": [40, 50, 40, 40], "segmentation": None, "area": None}, 20: {"iscrowd": 3},
              21: {"segmentation": {"size": [1, 2], "counts": [2]}}, 0: {}}
    content["annotations"] += [good | {"id": number} | change for number, change in broken.items()]
    content["annotations"] += [dict(good), good | {"bbox": [11, 10, 19, 30]}, "x"]
    content["categories"] += [{"id": 91, "name": "ant"}, {"id": 92}]
    content["annotations"] += [good | {"id": 30, "category_id": 91}, good | {"id": 31, "category_id": 92}]
    content["images"] += [{"id": 8, "file_name": "gone.png", "height": 9, "width": 9},
                          {"id": 9, "file_name": "a.png", "height": 0, "width": 80}]
    content["annotations"] += [good | {"id": 40, "image_id": 8}, good | {"id": 41, "image_id": 9}]
    save(coco)
    before = coco.file.read_bytes()
    after, changes = fix(coco.root, out)
    assert after.exit_status == 0 and coco.file.read_bytes() == before
    mended = json.loads((out / "annotations/instances_train2017.json").read_text())
    by_id = {entry["id"]: entry for entry in mended["annotations"]}
    assert set(by_id) == {1, 2, 3, 12, 14, 15, 16, 17, 18, 19, 20, 30, 31, 41, 42, 43}
    assert by_id[12]["bbox"] == by_id[14]["bbox"] == [10, 10, 20, 30]  # from the mask; turned
    assert by_id[15]["area"] == mask_area(good["segmentation"], 60, 80) and "area" not in by_id[16]
    assert by_id[17]["segmentation"] == by_id[18]["segmentation"] == good["segmentation"]
    assert by_id[19]["bbox"] == [40, 50, 20, 30] and by_id[20]["iscrowd"] == 0
    assert by_id[30]["category_id"] == 4  # merged by name
    assert [entry["name"] for entry in mended["categories"]] == ["zebra", "ant", "category_92"]
    assert [(entry["id"], entry["height"]) for entry in mended["images"]] == [(7, 60), (3, 80), (9, 60)]
    with open(out / "changes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(changes.made) == len(json.loads((out / "changes.json").read_text()))
    row = next(row for row in rows if row["annotation"] == "19")
    assert (row["file"], row["image"], row["field"], row["old"], row["new"]) == (
        "annotations/instances_train2017.json", "3", "bbox", "[40, 50, 40, 40]", "[40, 50, 20, 30]")
    again, more = fix(out, out.parent / "twice")
    assert more.made == [] and again.problems != [] and again.exit_status == 0


@pytest.mark.parametrize("scale", ["corners", "fractions"])
def test_another_layout_is_converted(coco, scale, out):
    boxes = [[50, 30, 28, 28], [40, 5, 39, 45], [30, 10, 25, 69]]
    for entry, (x, y, w, h) in zip(coco.content["annotations"], boxes):
        width, height = (60, 80) if entry["image_id"] == 3 else (80, 60)
        entry |= {"segmentation": None, "iscrowd": 0, "area": w * h, "bbox": [x, y, x + w, y + h] if scale == "corners"
                  else [x / width, y / height, w / width, h / height]}
    save(coco)
    after, changes = fix(coco.root, out)
    assert after.exit_status == 0
    mended = json.loads((out / "annotations/instances_train2017.json").read_text())
    for entry, box in zip(mended["annotations"], boxes):
        assert entry["bbox"] == pytest.approx(box)
    assert mended["annotations"][0]["area"] == boxes[0][2] * boxes[0][3], "pixels, as they were"


@pytest.mark.parametrize("layout", ["elsewhere", "links", "inside", "beside", "roboflow", "file"])
def test_the_copy_finds_its_images(coco, out, layout):
    coco.first["bbox"] = [10, 10, -20, 30]
    save(coco)
    path, images = coco.root, None
    if layout == "elsewhere":
        images = (coco.root / "train2017").rename(out.parent / "photos")
    if layout == "links":
        path = out.parent / "links"
        path.mkdir()
        for name in ("annotations", "train2017"):
            (path / name).symlink_to(coco.root / name)
    if layout == "inside":  # where it is not looked for
        images = (coco.root / "train2017").rename(coco.root / "photos")
    if layout == "file":
        path = coco.file
    if layout in ("beside", "roboflow"):
        path = out.parent / "set"
        folder = path / "train" if layout == "roboflow" else path
        folder.parent.mkdir(exist_ok=True)
        (coco.root / "train2017").rename(folder)
        coco.file.rename(folder / ("_annotations.coco.json" if layout == "roboflow" else "train.json"))
    after, changes = fix(path, out, images)
    assert after.exit_status == 0 and len(changes.made) == 1
    again = check_data(after.path)  # without being told where the images are
    assert again.exit_status == 0 and again.splits[0].images == 2 and again.splits[0].annotations == 3


def test_what_is_not_mended_is_as_it_was(coco, out):
    coco.content["categories"][0]["keypoints"] = ["nose"]
    coco.first.update(keypoints=[1, 2], num_keypoints=1, score=NAN, big=2**70)
    save(coco)
    _, changes = fix(coco.root, out)
    assert [(change.field, change.new) for change in changes.made] == [("keypoints", None), ("num_keypoints", None)]
    text = (out / "annotations/instances_train2017.json").read_text()
    assert '"score": NaN' in text and json.loads(text)["annotations"][0]["big"] == 2**70


def test_voc(tmp_path, files, out):
    objects = [files.object(box=(30, 5, 20, 9)), files.object(box=(5, 5, 5, 9)), files.object(box=(1, 1, "x", 9)),
               files.object(box=(-5, 5, 50, 9)), files.object()]
    images = {name: "" for name in ("no_image", "cut")} | {"a": "<!-- kept -->" + "".join(objects)}
    files.voc(tmp_path / "voc", images, {"train": "a\na\nno_image\ncut\n", "dog_train": "a 1\ncut -1\n"})
    (tmp_path / "voc/JPEGImages/no_image.jpg").unlink()
    (tmp_path / "voc/Annotations/cut.xml").write_text("<annotation><obj")
    after, changes = fix(tmp_path / "voc", out)
    assert after.exit_status == 0
    text = (out / "Annotations/a.xml").read_text()
    assert "<!-- kept -->" in text and "<truncated>1</truncated>" in text and text.count("<object>") == 3
    (record,) = load_dataset(SourceConfig(path=str(out)), "train").records
    assert [item.box for item in record.annotations] == [(19, 4, 30, 9), (0, 4, 40, 9), (10, 5, 20, 30)]
    assert (out / "ImageSets/Main/train.txt").read_text() == "a\n"
    assert (out / "ImageSets/Main/dog_train.txt").read_text() == "a 1\n"
    assert {(change.file, change.field, change.old, change.new) for change in changes.made} >= {
        ("Annotations/a.xml", "xmin", "30", "20"), ("ImageSets/Main/train.txt", "line 2", "a", None)}


def test_voc_in_another_layout(tmp_path, files, out):
    boxes = [(20, 10, 12, 15), (25, 5, 10, 20), (12, 3, 20, 21), (9, 12, 8, 9)]
    files.voc(tmp_path / "voc", {"a": "".join(files.object(box=box) for box in boxes)}, {"train": "a"})
    after, changes = fix(tmp_path / "voc", out)
    assert after.exit_status == 0
    (record,) = load_dataset(SourceConfig(path=str(out)), "train").records
    assert [item.box for item in record.annotations] == [(x - 1, y - 1, x + w, y + h) for x, y, w, h in boxes]


def test_yolo(tmp_path, files, out):
    rows = ["0 .5 .5 .1 .1", "2 .5 .5 .1 .1", "0 x .5 .1 .1", "0 .9 .5 .4 .2", "1 .5 .5 -.1 .1"]
    file = files.yolo(tmp_path / "yolo", {"a": "\n".join(rows), "b": "0 .5 .5 .1 .1"},
                      "path: .\ntrain: images/train\nnames: [cat, dog]\nroboflow: {license: MIT}\n")
    (tmp_path / "yolo/images/train/b.png").write_bytes(b"no image")
    after, changes = fix(file, out)
    assert after.exit_status == 0 and after.path == str(out / "data.yaml")
    assert (out / "labels/train/a.txt").read_text() == (
        "0 .5 .5 .1 .1\n0 0.85 0.5 0.3 0.2\n1 0.5 0.5 0.1 0.1\n")
    assert (out / "train.txt").read_text() == "./images/train/a.png\n"
    assert yaml.safe_load((out / "data.yaml").read_text())["roboflow"] == {"license": "MIT"}
    assert {(change.annotation, change.new) for change in changes.made} >= {(2, None), (3, None), (None, None)}


@pytest.mark.parametrize(("row", "expected"), [("0 20 15 10 6\n", "0 0.5 0.5 0.25 0.2"),
                                               ("1 .6 .5 .95 .98\n", "1 0.775 0.74 0.35 0.48")])
def test_yolo_in_another_layout(tmp_path, files, row, expected, out):
    files.yolo(tmp_path / "yolo", {"a": row * 3}, "path: .\ntrain: images/train\nnames: [cat, dog]\n")
    after, changes = fix(tmp_path / "yolo", out)
    assert after.exit_status == 0 and len(changes.made) == 3
    assert (out / "labels/train/a.txt").read_text().splitlines() == [expected] * 3


def test_where_a_copy_must_not_go(coco, out):
    save(coco)
    report = check_data(coco.root)
    for inside in (coco.root, coco.root / "annotations/new"):
        with pytest.raises(ValueError, match="outside of the data set"):
            write_clean_copy(report, None, inside)
    (out.parent / "full").mkdir()
    (out.parent / "full/file").touch()
    with pytest.raises(ValueError, match="new or empty folder"):
        write_clean_copy(report, None, out.parent / "full")


def test_images_of_voc_and_yolo_that_cannot_be_decoded_are_left_out(tmp_path, files, out):
    files.voc(tmp_path / "voc", dict.fromkeys("ab", files.object()), {"train": "a\nb\n"})
    (tmp_path / "voc/classes.txt").write_text("dog")
    (tmp_path / "voc/JPEGImages/a.jpg").write_bytes(b"")
    after, changes = fix(tmp_path / "voc", out / "voc")
    assert (out / "voc/ImageSets/Main/train.txt").read_text() == "b\n" and after.splits[0].images == 1
    assert (out / "voc/classes.txt").read_text() == "dog" and check_data(out / "voc", workers=1).exit_status == 0
    files.yolo(tmp_path / "yolo", dict.fromkeys("ab", "0 .5 .5 .5 .5"), "path: .\ntrain: images/train\nnames: [cat]\n")
    file = tmp_path / "yolo/images/train/a.png"
    file.write_bytes(file.read_bytes()[:200])
    fix(tmp_path / "yolo", out / "yolo")
    assert (out / "yolo/train.txt").read_text() == "./images/train/b.png\n"
    assert check_data(out / "yolo", workers=1).exit_status == 0


def test_sizes_with_width_and_height_exchanged_are_turned_and_objects_kept(coco, tmp_path, files, out):
    for image in coco.content["images"]:
        image["width"], image["height"] = image["height"], image["width"]
    save(coco)
    after, changes = fix(coco.root, out / "coco")
    assert [(change.field, change.kind) for change in changes.made] == [
        ("height", "image_differs"), ("width", "image_differs")] * 2
    assert (after.exit_status, after.splits[0].annotations) == (0, 3)
    files.voc(tmp_path / "voc", {"a": files.object(box=(25, 1, 39, 20))}, {"train": "a\n"},
              "<size><width>30</width><height>40</height></size>")
    after, changes = fix(tmp_path / "voc", out / "voc")
    assert [(change.field, change.old, change.new) for change in changes.made] == [("width", 30, 40), ("height", 40, 30)]
    assert (after.exit_status, after.splits[0].annotations) == (0, 1)


def test_images_that_cannot_be_decoded_are_left_out(coco, out):
    save(coco)
    (coco.root / "train2017/a.png").write_bytes((coco.root / "train2017/a.png").read_bytes()[:300])
    after, changes = fix(coco.root, out)
    assert after.exit_status == 0 and check_data(out).exit_status == 0
    assert [record.id for record in load_dataset(SourceConfig(path=str(out)), "train").records] == [3]
    assert len(changes.made) == 3  # the image and its two objects


def test_nothing_is_left_of_a_copy_that_failed(coco, out, monkeypatch):
    coco.first["bbox"] = [10, 10, -20, 30]
    save(coco)
    monkeypatch.setattr(Changes, "write", lambda self: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        fix(coco.root, out)
    assert not out.exists() and len(list((coco.root / "train2017").iterdir())) == 2


def test_a_split_of_which_nothing_is_left_is_told(coco, capsys, out):
    for entry in coco.content["annotations"]:
        entry["image_id"] = 99
    save(coco)
    assert main(["data", "check", str(coco.root), "--fix", str(out)]) == 0
    assert "no objects are left in instances_train2017" in " ".join(capsys.readouterr().out.split())


def test_on_the_command_line(coco, capsys, out):
    coco.first["bbox"] = [10, 10, -20, 30]
    save(coco)
    assert main(["data", "check", str(coco.root)]) == 1
    assert main(["data", "check", str(coco.root), "--fix", str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 changes in" not in text and re.search(r"1 change in .*out", text) and "safe to train on" in text
    assert main(["data", "check", str(out)]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(coco.root), "--json", "--fix", str(out.parent / "other")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["verdict"] == "errors" and content["fix"]["verdict"] == "ok" and content["fix"]["changes"] == 1
