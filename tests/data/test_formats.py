"""The formats that tools for labelling export, and the same boxes in nine of them."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from detres.config import SourceConfig
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.masks import rasterize
from detres.data.splits import find_splits

VOC100 = {"coco_format_v1": 1, "coco_format_v2": 1, "cvat_format": 1, "labelme_format_no_imagedata": 1,
          "openimages_format": 1, "yolo_format": 1, "imagenet_format": 0, "pascalvoc_format": 0}


def load(path, role="train", **options):
    return load_dataset(SourceConfig(path=str(path), **options), role)


def rows(dataset, offset=0):
    """Sorted (file, class, box), boxes with `offset` taken from the left and upper edge."""
    return sorted((record.path.name, dataset.classes[item.label], *(round(value - offset * (i < 2)) for i, value in
                                                                    enumerate(item.box)))
                  for record in dataset.records for item in record.annotations)


@pytest.mark.data
@pytest.mark.parametrize("name", VOC100)
def test_all_formats_of_the_same_images_have_the_same_boxes(shared_data, name):
    """Those that were exported from VOC kept its numbers, which count from 1: only VOC's readers take 1 off."""
    images = shared_data / "voc_mini/VOCdevkit/VOC2012/JPEGImages"
    folder = shared_data / "detection_results/voc100_formats/gts"
    [split] = find_splits(folder / name, str(images))
    found = rows(split.load(), offset=VOC100[name])
    assert len(found) == 273
    assert found == rows(load(folder / "pascalvoc_format", images=str(images)))


@pytest.fixture
def put(tmp_path, files):
    """Writes text, or an image of 40 x 30 (width x height) for no text."""
    def write(name, text=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.image(path, 30, 40) if text is None else path.write_text(text)

    return write


def labelme(**shape):
    return json.dumps({"version": "5.0", "shapes": [shape], "imagePath": "a.png", "imageHeight": 30, "imageWidth": 40})


class TestLabelme:
    def test_kinds_of_shapes(self, tmp_path, put):
        inside = np.zeros((5, 8), bool)
        inside[1:, 2:] = True
        stream = io.BytesIO()
        Image.fromarray(inside.astype(np.uint8)).save(stream, "PNG")
        shapes = [
            {"label": "b", "points": [[20, 9], [10, 3]], "shape_type": "rectangle"},
            {"label": "a", "points": [[1, 1], [9, 1], [9, 8]], "shape_type": "polygon", "group_id": 3},
            {"label": "a", "points": [[11, 1], [19, 1], [19, 8]], "shape_type": "polygon", "group_id": 3},
            {"label": "a", "points": [[11, 1], [19, 1], [19, 9]], "shape_type": "polygon"},
            {"label": "b", "points": [[20, 15], [25, 15]], "shape_type": "circle"},
            {"label": "b", "points": [[30, 20], [37, 24]], "shape_type": "mask",
             "mask": base64.b64encode(stream.getvalue()).decode()},
            {"label": "c", "points": [[30, 20]], "shape_type": "point"}]
        put("a.png")
        put("a.json", json.dumps({"shapes": shapes, "imagePath": "..\\a.png", "imageHeight": 30, "imageWidth": 40}))
        dataset = load(tmp_path)
        [record] = dataset.records
        assert dataset.format == "labelme" and dataset.classes == ("a", "b", "c")
        boxes = [(dataset.classes[item.label], item.box) for item in record.annotations]
        assert boxes == [("b", (10, 3, 20, 9)), ("a", (1, 1, 19, 8)), ("a", (11, 1, 19, 9)), ("b", (15, 10, 25, 20)),
                         ("b", (32, 21, 38, 25))]
        assert len(record.annotations[1].segmentation) == 2
        assert record.annotations[3].area == pytest.approx(np.pi * 25, abs=3)
        expected = np.zeros((30, 40), bool)
        expected[20:25, 30:38] = inside
        assert (rasterize(record.annotations[4].segmentation, 30, 40) == expected).all()

    def test_splits_by_folder(self, tmp_path, put):
        for folder, label in (("train", "a"), ("valid", "b")):
            put(f"{folder}/a.png")
            put(f"{folder}/a.json", labelme(label=label, points=[[1, 1], [9, 9]], shape_type="rectangle"))
        assert [(split.name, split.role) for split in find_splits(tmp_path)] == [("train", "train"), ("valid", "val")]
        dataset = load(tmp_path, "val")
        assert dataset.classes == ("a", "b") and dataset.records[0].annotations[0].label == 1
        with pytest.raises(FileNotFoundError, match="must hold the split 'test'"):
            load(tmp_path, "test")

    @pytest.mark.parametrize("text, message", (
        ("{", "must be a JSON file of labelme"), ('{"shapes": [], "imagePath": "none.png"}', "must be an image file"),
        (labelme(label="a", points=[[1, 2]], shape_type="rectangle"), "must be those of a rectangle"),
        (labelme(label="", points=[[1, 2], [3, 4]], shape_type="rectangle"), "must be the name of a class"),
        (labelme(label="a", points=[[1, 2], [3, 4]], shape_type="polygon"), "3 points or more")))
    def test_what_is_wrong_is_told(self, tmp_path, put, text, message):
        put("b.png")
        put("b.json", json.dumps({"shapes": [], "imagePath": "b.png"}))
        put("c/a.png")
        put("c/x.json", text)
        with pytest.raises(InvalidDataError, match=message):
            load(tmp_path)


def test_cvat(tmp_path, put):
    put("images/a.png")
    put("annotations.xml", """<?xml version="1.0"?><annotations><meta><job><labels><label><name>dog</name></label>
        <label><name>cat</name></label></labels></job></meta>
        <image id="0" name="a.png" width="40" height="30">
          <box label="cat" occluded="1" xtl="1.5" ytl="2" xbr="9.25" ybr="8"/>
          <polygon label="dog" points="1,1;9,1;9,8"/>
          <mask label="dog" rle="2, 2, 4" left="30" top="10" width="4" height="2"/>
          <points label="dog" points="1,1"/>
        </image></annotations>""")
    dataset = load(tmp_path / "annotations.xml")
    assert dataset == load(tmp_path) and (dataset.format, dataset.classes) == ("cvat", ("dog", "cat"))
    assert [(item.label, item.box) for item in dataset.records[0].annotations] == [
        (1, (1.5, 2, 9.25, 8)), (0, (1, 1, 9, 8)), (0, (32, 10, 34, 11))]


def test_openimages(tmp_path, put):
    put("images/a.png")
    put("images/b.png")
    put("class-descriptions-boxable.csv", "/m/1,Ant\n/m/2,Bee\n")
    for split, image, group in (("train", "a", 0), ("validation", "b", 1)):
        put(f"{split}-annotations-bbox.csv", "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\n"
            f"{image},x,/m/2,1,0.25,0.5,0.1,0.3,{group}\n")
    assert [split.role for split in find_splits(tmp_path)] == ["train", "val"]
    dataset = load(tmp_path, "val")
    [item] = dataset.records[0].annotations
    assert dataset.classes == ("Bee",) and item.crowd and item.box == pytest.approx((10, 3, 20, 9))


class TestLooseVoc:
    def test_images_beside(self, tmp_path, files, put):
        files.voc(tmp_path, {"a": files.object("ant", (11.5, 6, 20, 30))}, {})
        (tmp_path / "Annotations/a.xml").rename(tmp_path / "Annotations/b.xml")  # the file says which image it means
        (tmp_path / "ImageSets/Main").rmdir()
        for path in (tmp_path, tmp_path / "Annotations"):
            dataset = load(path, "val")
            assert dataset.format == "voc" and dataset.classes == ("ant",)
            assert [item.box for item in dataset.records[0].annotations] == [(10.5, 5, 20, 30)]

    def test_splits_by_folder(self, tmp_path, put):
        for folder, name in (("train", "ant"), ("valid", "bee"), ("test", "bee")):
            put(f"{folder}/a.jpg")  # the same name in each: the nearest is meant
            put(f"{folder}/a.xml", f"<annotation><filename>a.jpg</filename><object><name>{name}</name><bndbox><xmin>1"
                "</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>")
        assert [split.name for split in find_splits(tmp_path)] == ["train", "valid", "test"]
        dataset = load(tmp_path, "val")
        assert dataset.classes == ("ant", "bee") and dataset.records[0].path == tmp_path / "valid/a.jpg"
        assert (dataset.records[0].height, dataset.records[0].annotations[0].label) == (30, 1)

    def test_images_that_are_not_there(self, tmp_path, put):
        put("a.xml", "<annotation><filename>a.jpg</filename></annotation>")
        with pytest.raises(InvalidDataError, match="must be an image file .* give the folder"):
            load(tmp_path)

    def test_other_xml_is_no_data_set(self, tmp_path, put):
        put("a.xml", "<project/>")
        with pytest.raises(FileNotFoundError, match="one of the formats"):
            load(tmp_path)


def test_annotations_are_checked_without_images(tmp_path, put):
    """Where sizes are stated; without them, it is told that nothing was looked at."""
    from detres.data.check.run import check_data

    put("cvat/annotations.xml", '<annotations><image id="0" name="a.png" width="40" height="30">'
        '<box label="x" xtl="1" ytl="2" xbr="3" ybr="4"/></image></annotations>')
    put("voc/a.xml", "<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size><object>"
        "<name>x</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>")
    put("open/a.csv", "ImageID,LabelName,XMin,XMax,YMin,YMax\na,x,.1,.2,.1,.2\n")
    for name, status, count in (("cvat", 0, 1), ("voc", 0, 1), ("open", 1, 0)):
        report = check_data(tmp_path / name, read_images=False)
        assert (report.exit_status, report.splits[0].annotations) == (status, count), name
        assert check_data(tmp_path / name).exit_status == 1, "the file is not there"
        with pytest.raises(InvalidDataError):
            load(tmp_path / name)
        assert not len(load_dataset(SourceConfig(path=str(tmp_path / name)), "train", "drop").records)


def test_no_clean_copy_of_loose_files(tmp_path, put):
    from detres.data.check.fix import write_clean_copy
    from detres.data.check.run import check_data

    put("data/images/a.png")
    put("data/labels/a.txt", TestLooseYolo.BOX)
    with pytest.raises(ValueError, match="got YOLO as .txt files .* detres data convert .* --drop-invalid"):
        write_clean_copy(check_data(tmp_path / "data"), None, tmp_path / "out")


class TestLooseYolo:
    BOX = "1 .5 .5 .5 .5\n"

    @pytest.mark.parametrize("images, labels", (("images/train", "labels/train"), ("train/images", "train/labels"),
                                                ("train", "train")))
    def test_folders(self, tmp_path, put, images, labels):
        for split in ("train", "val"):
            put(f"{images.replace('train', split)}/a.png")
            put(f"{images.replace('train', split)}/empty.png")
            put(f"{labels.replace('train', split)}/a.txt", self.BOX)
        put("classes.txt", "ant\nbee\n")
        assert [split.name for split in find_splits(tmp_path)] == ["train", "val"]
        dataset = load(tmp_path, "val")
        assert (dataset.format, dataset.classes) == ("yolo", ("ant", "bee"))
        assert [[item.box for item in record.annotations] for record in dataset.records] == [[(10, 7.5, 30, 22.5)], []]
        assert all("val" in record.path.parts for record in dataset.records)

    def test_without_names(self, tmp_path, put, caplog):
        put("images/a.png")
        put("labels/a.txt", self.BOX)
        assert load(tmp_path).classes == ("0", "1") and "called by their numbers" in caplog.text

    def test_darknet(self, tmp_path, put):
        for name in "ab":
            put(f"obj_train_data/{name}.png")
            put(f"obj_train_data/{name}.txt", self.BOX)
        put("obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n")
        put("obj.names", "ant\nbee\n")
        put("train.txt", "data/obj_train_data/a.png\n")
        put("valid.txt", "data/obj_train_data/b.png\n")
        assert [(split.name, split.role) for split in find_splits(tmp_path)] == [("train", "train"), ("valid", "val")]
        [record] = load(tmp_path, "val").records
        assert record.path.name == "b.png" and len(record.annotations) == 1

    def test_notes_are_no_labels(self, tmp_path, put):
        put("labels/readme.txt", "about these data")
        with pytest.raises(FileNotFoundError, match="one of the formats"):
            load(tmp_path)


class TestLvis:
    CONTENT = {
        "images": [{"id": 5, "coco_url": "http://images.cocodataset.org/val2017/000000000005.png", "height": 30,
                    "width": 40, "neg_category_ids": [1], "not_exhaustive_category_ids": [2]}],
        "categories": [{"id": 1, "name": "ant", "frequency": "r"}, {"id": 2, "name": "bee", "frequency": "f"}],
        "annotations": [{"id": 9, "image_id": 5, "category_id": 2, "bbox": [1, 2, 8, 6], "area": 30.5,
                         "segmentation": [[1, 2, 9, 2, 9, 8]]}]}

    @pytest.mark.parametrize("place", ("val2017", "images/val2017", "images"))
    def test_images_by_their_address(self, tmp_path, put, place):
        put(f"{place}/000000000005.png")
        put("annotations/lvis_v1_val.json", json.dumps(self.CONTENT))
        dataset = load(tmp_path, "val")
        assert dataset.format == "lvis" and dataset.records[0].path.is_file() and dataset.records[0].extra is None

    def test_what_evaluation_needs_is_kept_if_asked_for(self, tmp_path, put):
        put("val2017/000000000005.png")
        put("lvis_val.json", json.dumps(self.CONTENT))
        [split] = find_splits(tmp_path)
        dataset = split.load(keep_extra=True)
        assert dataset.records[0].extra["neg_category_ids"] == [1]
        assert dataset.extra["categories"] == [{"frequency": "r"}, {"frequency": "f"}]

    @pytest.mark.data
    def test_real_annotations(self, shared_data, tmp_path, put):
        file = shared_data / "detection_results/lvis_gt_only/lvis_val_100.json"
        images = json.loads(file.read_text())["images"]
        for image in images:
            (tmp_path / image["coco_url"].rpartition("/")[2]).touch()
        dataset = load(file, images=str(tmp_path))
        assert dataset.format == "lvis" and len(dataset.records) == 100
        assert sum(len(record.annotations) for record in dataset.records) == 977
