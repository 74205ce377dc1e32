"""Conversion there and back: what returns is what was there, up to what is told as lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from detres.config import SourceConfig
from detres.data.convert.classes import ClassChange
from detres.data.convert.masks import joined, to_rle
from detres.data.convert.run import Options, convert
from detres.data.dataset import load_dataset
from detres.data.masks import run_code
from detres.data.panoptic import load_panoptic
from detres.data.semantic import load_semantic
from detres.data.splits import find_splits

HEIGHT, WIDTH = 30, 40
NAMES = ("a", "b c", "ü", "ant")  # of classes
FILES = ("plain", "with space", "ünï", "with.dot", "quote'\"&<")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Blank images; the same for all examples."""
    folder = tmp_path_factory.mktemp("images")
    for name in FILES:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{name}.png")
    return folder


def rectangle(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


@st.composite
def annotations(draw, number, masks=True):
    """An entry of COCO JSON. Boxes are inside the image, wider than a pixel, and end on 1/16 or on any float."""
    grid = draw(st.sampled_from((1, 16, 1000003)))
    x1, y1 = draw(st.integers(0, (WIDTH - 4) * grid)) / grid, draw(st.integers(0, (HEIGHT - 4) * grid)) / grid
    x2, y2 = (draw(st.integers(int((low + 2) * grid), side * grid)) / grid for low, side in ((x1, WIDTH), (y1, HEIGHT)))
    entry = {"id": number, "category_id": draw(st.sampled_from((3, 7, 8, 20))), "iscrowd": 0,
             "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    kind = draw(st.sampled_from(("box", "polygon", "parts", "rle", "crowd") if masks else ("box",)))
    if kind == "polygon":
        entry["segmentation"] = [rectangle(x1, y1, x2, y2)]
    elif kind == "parts":
        middle = (x1 + x2) / 2
        entry["segmentation"] = [rectangle(x1, y1, middle, y2), rectangle(min(middle + 1, x2), y1, x2, y2)]
    elif kind != "box":
        inside = np.random.default_rng(number).random((HEIGHT, WIDTH)) < 0.3
        entry["segmentation"] = run_code(inside, 0, 0, HEIGHT, WIDTH)
        entry["iscrowd"] = int(kind == "crowd")
    if draw(st.booleans()) and kind != "crowd":
        entry["keypoints"] = [x1 + 1, y1 + 1, 2, 0, 0, 0]
        entry["num_keypoints"] = 1
    if draw(st.booleans()) and kind != "crowd":
        entry["difficult"] = 1
    return entry


@st.composite
def contents(draw, masks=True):
    """COCO JSON of two to five images, some empty."""
    found = {"info": {"year": 2026}, "images": [], "annotations": [], "categories": [
        {"id": number, "name": name, "supercategory": "x", "keypoints": ["left", "right"], "skeleton": [[1, 2]]}
        for number, name in zip((3, 7, 8, 20), NAMES)]}
    for i, name in enumerate(FILES[:draw(st.integers(2, len(FILES)))]):
        found["images"].append({"id": 10 * i + 5, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH,
                                "license": i})
        for _ in range(draw(st.integers(0, 3))):
            entry = draw(annotations(len(found["annotations"]) + 1, masks))
            found["annotations"].append(entry | {"image_id": 10 * i + 5})
    return found


def write(folder, images, content, name="train"):
    file = folder / "annotations" / f"instances_{name}.json"
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(content))
    link = folder / name
    if not link.exists():
        link.symlink_to(images)
    return folder


def load(path, **options):
    [split] = find_splits(path)
    return split.load(**options)


def rows(dataset, *fields, stem=str, skip=lambda item: False):
    """By file, the class, box and other fields of each object."""
    return {stem(record.path.stem): [(dataset.classes[item.label], *(pytest.approx(v, abs=1e-7) for v in item.box),
                                      *(getattr(item, field) for field in fields))
                                     for item in record.annotations if not skip(item)] for record in dataset.records}


def masks(dataset):
    return {record.path.stem: [to_rle(item.segmentation, HEIGHT, WIDTH) if item.segmentation else None
                               for item in record.annotations] for record in dataset.records}


there_and_back = settings(max_examples=25, deadline=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def fresh(tmp_path_factory, images):
    """A folder with these contents, new for each example; and a place for the result."""
    def make(content):
        folder = tmp_path_factory.mktemp("example")
        return write(folder / "data", images, content), folder / "out"

    return make


@given(content=contents())
@there_and_back
def test_coco_to_coco_loses_nothing(fresh, content):
    source, out = fresh(content)
    result = convert([source], out, Options("coco", strict=True))
    before, after = load(source, keep_extra=True), load(out, keep_extra=True)
    assert dataclasses.replace(before, records=()) == dataclasses.replace(after, records=())
    assert [dataclasses.replace(record, extra=None) for record in before.records] == [
        dataclasses.replace(record, path=before.records[i].path, extra=None, annotations=tuple(
            dataclasses.replace(item, extra=None) for item in record.annotations)) for i, record in
        enumerate(after.records)] and before.records[0].extra == after.records[0].extra
    assert not result.losses.lost


@given(content=contents())
@there_and_back
def test_coco_by_run_lengths_and_polygons_has_the_same_masks(fresh, content):
    source, out = fresh(content)
    convert([source], out / "rle", Options("coco", "rle", strict=True))
    convert([out / "rle"], out / "polygon", Options("coco", "polygon", strict=True))
    before, after = load(source), load(out / "polygon")
    assert masks(before) == masks(after)
    assert all(isinstance(item.segmentation, list) or item.crowd for record in after.records
               for item in record.annotations if item.segmentation)


@given(content=contents())
@there_and_back
def test_coco_to_voc_and_back(fresh, content):
    """Crowds are difficult objects in VOC."""
    source, out = fresh(content)
    first = convert([source], out / "voc", Options("voc"))
    convert([out / "voc"], out / "coco", Options("coco", strict=True))
    before, after = load(source), load(out / "coco")
    expected = {name.replace(" ", "_"): [(*row[:5], row[5] or row[6]) for row in found] for name, found in
                rows(before, "difficult", "crowd").items()}
    assert rows(after, "difficult") == expected
    items = [item for record in before.records for item in record.annotations]
    told = " ".join(first.losses.lines())
    assert ("has no masks" in told) == any(item.segmentation for item in items)
    assert ("no keypoints" in told) == any(item.keypoints for item in items)
    assert ("no crowds" in told) == any(item.crowd for item in items)
    assert ("without any left out" in told) == (len({item.label for item in items}) < len(NAMES))


@given(content=contents(masks=False))
@there_and_back
def test_coco_to_yolo_and_back(fresh, content):
    """Boxes come back to a tenth of a millionth of a pixel."""
    source, out = fresh(content)
    first = convert([source], out / "yolo", Options("yolo"))
    convert([out / "yolo"], out / "coco", Options("coco", strict=True))
    before, after = load(source), load(out / "coco")
    assert rows(after) == rows(before, skip=lambda item: item.difficult)
    lost = Counter({text: count for text, count in first.losses.lost.items() if "further keys" not in text})
    assert lost.total() == sum(item.difficult for record in before.records for item in record.annotations
                                            ) + sum(bool(item.keypoints) for r in before.records for item in r.annotations)
    assert after.classes == NAMES


@given(content=contents())
@there_and_back
def test_masks_in_yolo(fresh, content):
    """Masks come back; parts are one polygon. An image with masks has rectangles for its boxes."""
    source, out = fresh(content)
    convert([source], out, Options("yolo"))
    for old, new in zip(load(source).records, sorted(load(out).records, key=lambda record: FILES.index(
            record.path.stem))):
        kept = [item for item in old.annotations if not (item.crowd or item.difficult)]
        assert len(kept) == len(new.annotations)
        for one, other in zip(kept, new.annotations):
            if isinstance(one.segmentation, list):  # an edge halfway between pixels may fall to the other
                points = joined([np.array(part).reshape(-1, 2) for part in one.segmentation])
                assert np.abs(points.ravel() - other.segmentation[0]).max() < 1e-7
            elif one.segmentation:
                assert to_rle(one.segmentation, HEIGHT, WIDTH) == to_rle(other.segmentation, HEIGHT, WIDTH)
            else:
                assert other.box == pytest.approx(one.box, abs=1e-7)


@given(content=contents())
@there_and_back
def test_coco_to_lvis_and_back(fresh, content):
    source, out = fresh(content)
    first = convert([source], out / "lvis", Options("lvis"))
    before, after = load(source), load(out / "lvis")
    assert after.format == "lvis"
    assert rows(after, "difficult", "area") == rows(before, "difficult", "area", skip=lambda item: item.crowd)
    crowds = sum(item.crowd for record in before.records for item in record.annotations)
    assert sum(count for text, count in first.losses.lost.items() if "crowds" in text) == crowds
    second = convert([out / "lvis"], out / "again", Options("lvis", strict=True))
    assert not second.losses.lost
    one, two = (json.loads((out / name / "annotations/lvis_v1_train.json").read_text()) for name in ("lvis", "again"))
    assert one == two
    for image in one["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert image["not_exhaustive_category_ids"] == sorted({e["category_id"] for e in own if e["iscrowd"]})
        assert image["neg_category_ids"] == sorted({3, 7, 8, 20} - {entry["category_id"] for entry in own})


# What formats look like to other tools


@pytest.fixture
def source(tmp_path, images):
    entries = [
        {"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0,
         "segmentation": [rectangle(1, 2, 11, 10)]},
        {"id": 2, "image_id": 5, "category_id": 20, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0,
         "segmentation": [rectangle(5, 5, 25, 25)]},
        {"id": 3, "image_id": 15, "category_id": 7, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1,
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}}]
    content = {"images": [{"id": 10 * i + 5, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH}
                          for i, name in enumerate(FILES[:3])],
               "categories": [{"id": number, "name": name} for number, name in zip((3, 7, 8, 20), NAMES)],
               "annotations": entries}
    write(tmp_path / "data", images, content)
    return write(tmp_path / "data", images, content | {"annotations": []}, "val")


@pytest.mark.parametrize("to, masks", (("coco", None), ("lvis", None), ("voc", None), ("voc", "png"), ("yolo", None)))
@pytest.mark.parametrize("mode", ("reference", "link", "copy"))
def test_both_splits_are_found_and_have_their_images(source, tmp_path, to, masks, mode):
    convert([source], tmp_path / "out", Options(to, masks, mode))
    there = {}
    for role in ("train", "val"):
        dataset = load_dataset(SourceConfig(path=str(tmp_path / "out")), role)
        there[role] = {"images": 3, "objects": len(dataset.records.rows())}
        assert dataset.format == to and len(dataset.records) == 3
        for record in dataset.records:
            assert record.path.is_file()
            inside = record.path.is_relative_to(tmp_path / "out")
            assert inside == (mode != "reference" or to in ("voc", "yolo"))
            assert record.path.is_symlink() == (inside and mode != "copy")
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert report["splits"] == there and there["train"]["objects"] == (2 if to in ("lvis", "yolo") else 3)


def test_widths_are_written_as_they_were_read(source, tmp_path):
    """x + w - x is another number."""
    file, box = source / "annotations/instances_train.json", [0.1, 1.7, 0.2, 3.3]
    assert box[0] + box[2] - box[0] != box[2]
    content = json.loads(file.read_text())
    content["annotations"][0] |= {"bbox": box, "segmentation": []}
    file.write_text(json.dumps(content))
    convert([source], tmp_path / "out", Options("coco", strict=True))
    assert json.loads((tmp_path / "out/annotations/instances_train.json").read_text())["annotations"][0]["bbox"] == box


def test_pycocotools_reads_the_coco(source, tmp_path):
    convert([source], tmp_path / "out", Options("coco"))
    coco = COCO(tmp_path / "out/annotations/instances_train.json")
    assert coco.annToMask(coco.anns[1]).sum() == 80 and coco.annToMask(coco.anns[3]).sum() == 1200
    assert [coco.cats[number]["name"] for number in (3, 7, 8, 20)] == list(NAMES)
    assert all(Path(image["file_name"]).is_file() for image in coco.dataset["images"])


def test_yolo_as_ultralytics_reads_it(source, tmp_path):
    """Rows of one kind in a file, classes from 0, coordinates in 0..1, labels/ for images/."""
    import yaml

    out = tmp_path / "out"
    convert([source], out, Options("yolo"))
    content = yaml.safe_load((out / "data.yaml").read_text())
    assert content == {"path": ".", "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    lines = (out / "labels/train/plain.txt").read_text().splitlines()
    assert lines[0].startswith("0 0.025 0.066666666667 ") and [len(line.split()) for line in lines] == [9, 9]
    assert (out / "labels/train/with space.txt").read_text() == ""
    values = np.array([float(word) for line in lines for word in line.split()[1:]])
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("to, folder", (("yolo", "images/train"), ("voc", "JPEGImages")))
def test_files_of_the_same_name_get_another(tmp_path, to, folder):
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for i, name in enumerate(("x/1.png", "y/1.png", "y/1.bmp")):
        (tmp_path / "data/train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (i, 0, 0)).save(tmp_path / "data/train" / name)
        content["images"].append({"id": i + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
        content["annotations"].append({"id": i + 1, "image_id": i + 1, "category_id": 1, "iscrowd": 0, "area": 100,
                                       "bbox": [i, 0, 10, 10]})
    (tmp_path / "data/train.json").write_text(json.dumps(content))
    result = convert([tmp_path / "data"], tmp_path / "out", Options(to))
    assert "changed: 2 images have a number after their name, as others are called so" in result.losses.lines()
    assert sorted(path.name for path in (tmp_path / "out" / folder).iterdir()) == ["1.png", "1_2.png", "1_3.bmp"]
    found = {record.path.resolve().relative_to(tmp_path / "data/train").as_posix(): record.annotations[0].box[0]
             for record in load(tmp_path / "out").records}
    assert found == pytest.approx({"x/1.png": 0, "y/1.png": 1, "y/1.bmp": 2})


@pytest.mark.parametrize("to", ("yolo", "voc"))
def test_an_image_without_suffix_gets_one(source, tmp_path, to):
    file = source / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "no.suffix"
    shutil.copyfile(source / "train/plain.png", source / "train/no.suffix")
    file.write_text(json.dumps(content))
    convert([source], tmp_path / "out", Options(to))
    dataset = load_dataset(SourceConfig(path=str(tmp_path / "out")), "train")
    assert sorted(record.path.name for record in dataset.records)[0] == "no.png" and len(dataset.records) == 3


@pytest.mark.parametrize("to", ("yolo", "voc", "panoptic"))
def test_keys_that_a_format_has_not_are_told(source, tmp_path, to):
    file = source / "annotations/instances_train.json"
    content = json.loads(file.read_text()) | {"info": {"year": 2026}}
    content["images"][0]["license"] = content["annotations"][0]["truncated"] = 1
    content["categories"][1]["supercategory"] = "x"
    file.write_text(json.dumps(content))
    told = [line for line in convert([file], tmp_path / to, Options(to)).losses.lines() if "further keys" in line]
    assert len(told) == 1 and f" {3 if to == 'voc' else 4} entries" in told[0]


def test_names_of_splits_may_have_points_in_panoptic(source, tmp_path):
    for old, new in (("train", "v1.train"), ("val", "v1.val")):
        (source / f"annotations/instances_{old}.json").rename(source / f"annotations/instances_{new}.json")
    convert([source], tmp_path / "out", Options("panoptic"))
    assert sorted(file.name for file in (tmp_path / "out/annotations").glob("*.json")) == [
        "panoptic_v1.train.json", "panoptic_v1.val.json"]


def test_several_splits_to_train_on_are_all_there_in_yolo(source, tmp_path):
    folder = source / "annotations"
    for old, new in (("train", "train2014"), ("val", "train2017")):
        (folder / f"instances_{old}.json").rename(folder / f"instances_{new}.json")
        (source / old).rename(source / new)
    result = convert([source], tmp_path / "out", Options("yolo"))
    assert any(line.endswith("train, val and test: 2 are joined") for line in result.losses.lines())
    assert len(load_dataset(SourceConfig(path=str(tmp_path / "out")), "train").records) == 6


def test_class_names_of_blanks_in_voc(source, tmp_path):
    file = source / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = " zebra"
    file.write_text(json.dumps(content))
    result = convert([file], tmp_path / "out", Options("voc"))
    assert any("blanks at their ends: those of 1" in line for line in result.losses.lines())
    content["categories"][0]["name"] = "  "
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="--rename '  =NEW'"):
        convert([file], tmp_path / "other", Options("voc"))
    convert([file], tmp_path / "other", Options("voc", classes=ClassChange({"  ": "new"})))


def test_yolo_clips_boxes(source, tmp_path):
    file = source / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [content["annotations"][0] | {"bbox": [-0.5, 25, 10, 6], "segmentation": []}]
    file.write_text(json.dumps(content))
    result = convert([source], tmp_path / "out", Options("yolo"))
    assert "lost: YOLO's boxes end at the edge of the image: 1 clipped" in result.losses.lines()
    [item] = load_dataset(SourceConfig(path=str(tmp_path / "out")), "train").records[0].annotations
    assert item.box == pytest.approx((0, 25, 9.5, 30))


def test_what_lvis_knows_of_an_image_follows_its_classes(source, tmp_path):
    """A merged class is not there if none of them is, and not labelled in full if one of them is not."""
    file = source / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    for image, negative, partial in zip(content["images"], ([7, 8], [7], []), ([], [8], [20])):
        image |= {"neg_category_ids": negative, "not_exhaustive_category_ids": partial}
    for category in content["categories"]:
        category["frequency"] = "r"
    content["annotations"] = content["annotations"][:2]
    file.write_text(json.dumps(content))
    (source / "annotations/instances_val.json").unlink()
    change = ClassChange({"b c": "x", "ü": "x"}, ("a", "x"))
    convert([source], tmp_path / "out", Options("lvis", classes=change))
    found = json.loads((tmp_path / "out/annotations/lvis_v1_train.json").read_text())
    assert [(category["id"], category["name"]) for category in found["categories"]] == [(3, "a"), (7, "x")]
    assert [(image["neg_category_ids"], image["not_exhaustive_category_ids"]) for image in found["images"]] == [
        ([7], []), ([], [7]), ([], [])]


def test_voc_counts_from_one_in_whole_numbers(source, tmp_path):
    convert([source], tmp_path / "out", Options("voc"))
    text = (tmp_path / "out/Annotations/plain.xml").read_text()
    assert "<xmin>2</xmin>" in text and "<ymin>3</ymin>" in text and "<xmax>11</xmax>" in text
    assert (tmp_path / "out/ImageSets/Main/train.txt").read_text().split() == ["plain", "with_space", "ünï"]
    assert "<difficult>1</difficult>" in (tmp_path / "out/Annotations/with_space.xml").read_text()


def test_a_box_of_one_pixel_is_told(source, tmp_path):
    file = source / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= {"bbox": [3, 2, 1, 8], "segmentation": []}
    file.write_text(json.dumps(content))
    result = convert([source], tmp_path / "out", Options("voc"))
    assert "lost: in VOC a box of exactly one pixel is taken for a stray click: 1 left out" in result.losses.lines()
    assert len(load_dataset(SourceConfig(path=str(tmp_path / "out")), "train").records[0].annotations) == 1


def test_voc_masks_come_back_where_nothing_covers_them(source, tmp_path):
    result = convert([source], tmp_path / "voc", Options("voc", "png"))
    assert any("pixels of objects that others cover" in line for line in result.losses.lines())
    semantic = load_semantic(SourceConfig(path=str(tmp_path / "voc")), "train")
    assert semantic.classes == ("background", *NAMES)
    labels = {record.id: record.label_map.read(record) for record in semantic.records}
    assert (labels["plain"] == 1).sum() == 80 and (labels["plain"] == 4).sum() == 400 - 6 * 5
    assert (labels["with_space"] == 255).all()  # a crowd
    convert([tmp_path / "voc"], tmp_path / "coco", Options("coco", "polygon"))
    items = load_dataset(SourceConfig(path=str(tmp_path / "coco")), "train").records[0].annotations
    assert [item.area for item in items] == [80, 370]
    assert to_rle(items[0].segmentation, HEIGHT, WIDTH) == to_rle([array("d", rectangle(1, 2, 11, 10))], HEIGHT, WIDTH)


# Panoptic


def test_instances_to_panoptic_and_back(source, tmp_path):
    result = convert([source], tmp_path / "panoptic", Options("panoptic"))
    assert any("cover" in line for line in result.losses.lines())
    dataset = load_panoptic(SourceConfig(path=str(tmp_path / "panoptic")), "train")
    assert [(dataset.classes[item.label], item.area, item.crowd) for record in dataset.records
            for item in record.annotations] == [("a", 80, False), ("ant", 370, False), ("b c", 1200, True)]
    back = convert([tmp_path / "panoptic"], tmp_path / "coco", Options("coco", "polygon"))
    assert [part.name for part in back.parts] == ["train", "val"]
    items = load_dataset(SourceConfig(path=str(tmp_path / "coco")), "train").records[0].annotations
    assert to_rle(items[0].segmentation, HEIGHT, WIDTH) == to_rle([array("d", rectangle(1, 2, 11, 10))], HEIGHT, WIDTH)
    again = convert([tmp_path / "panoptic"], tmp_path / "again", Options("panoptic", strict=True))
    assert not again.losses.lines()
    for name in ("plain", "with space"):
        one, two = (np.array(Image.open(tmp_path / folder / f"annotations/panoptic_train/{name}.png"))
                    for folder in ("panoptic", "again"))
        assert (one == two).all()


def test_stuff_comes_from_label_maps(source, tmp_path):
    """A class that is no object's is stuff; what is labelled as an object's, but of no object, is nothing."""
    maps = tmp_path / "maps"
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (maps / folder).mkdir(parents=True)
    (maps / "JPEGImages").symlink_to(source / "train")
    (maps / "classes.txt").write_text("sky\na\n")
    for split in ("train", "val"):
        (maps / f"ImageSets/Segmentation/{split}.txt").write_text("plain\nünï\n")
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, 30:] = 1
    labels[0] = 255
    for name in ("plain", "ünï"):
        Image.fromarray(labels).save(maps / f"SegmentationClass/{name}.png")
    with pytest.raises(ValueError, match="each image must have a label map, got none for 1"):
        convert([source], tmp_path / "out", Options("panoptic"), semantic=str(maps))
    for split in ("train", "val"):
        file = source / f"annotations/instances_{split}.json"
        content = json.loads(file.read_text())
        del content["images"][1]
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] == 5]
        file.write_text(json.dumps(content))
    convert([source], tmp_path / "out", Options("panoptic"), semantic=str(maps))
    dataset = load_semantic(SourceConfig(path=str(tmp_path / "out")), "train")
    assert dataset.classes == (*NAMES, "sky")
    record = dataset.records[0]
    found = record.label_map.read(record)
    assert (found[0, :] == 255).all() and (found[1:2, :30] == 4).all() and (found[:, 30:] == 255).all()
    convert([tmp_path / "out"], tmp_path / "apart", Options("coco"))
    assert load_dataset(SourceConfig(path=str(tmp_path / "apart")), "train").classes == NAMES
    parts = load_semantic(SourceConfig(path=str(tmp_path / "apart/semantic")), "train")
    assert parts.classes == (*NAMES, "sky")
    assert (parts.records[0].label_map.read(parts.records[0]) == found).all()


@pytest.mark.data
def test_real_panoptic_data_come_back_exactly(shared_data, tmp_path):
    file, images = (str(shared_data / "coco_mini/panoptic" / name) for name in ("panoptic_examples.json",
                                                                                 "input_images"))
    convert([file], tmp_path / "out", Options("panoptic", strict=True), images=images)
    before = load_semantic(SourceConfig(path=file, images=images), "val")
    after = load_semantic(SourceConfig(path=str(next((tmp_path / "out/annotations").glob("*.json")))), "val")
    for one, two in zip(before.records, after.records):
        first, second = one.label_map.read(one), two.label_map.read(two)
        names = np.array([*before.classes, *[""] * 256], object), np.array([*after.classes, *[""] * 256], object)
        assert (names[0][first] == names[1][second]).all()


# What is refused


def test_images_come_out_of_shards(source, tmp_path):
    from detres.data.shard_writer import write_shards

    before = load_dataset(SourceConfig(path=str(source)), "train")
    write_shards(before, tmp_path / "shards", "train", 10**6, progress=False)
    result = convert([tmp_path / "shards"], tmp_path / "out")
    after = load_dataset(SourceConfig(path=str(tmp_path / "out")), "train")
    assert result.to == "coco"
    assert {record.id: (record.annotations, record.path.read_bytes()) for record in before.records} == {
        record.id: (record.annotations, record.path.read_bytes()) for record in after.records}


def test_nothing_is_left_after_a_refusal(source, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must lose nothing, got: VOC's XML has no masks: 3 left out"):
        convert([source], tmp_path / "out", Options("voc", strict=True))
    assert sorted(tmp_path.iterdir()) == before


def test_out_must_be_empty(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert([source], tmp_path / "out", Options("coco"))
    with pytest.raises(ValueError, match="OUT must be a new or empty folder"):
        convert([source], tmp_path / "out", Options("coco"))


def test_masks_that_a_format_has_not(source, tmp_path):
    with pytest.raises(ValueError, match="--masks must be none or png for voc, got rle"):
        convert([source], tmp_path / "out", Options("voc", "rle"))


# Classes


@pytest.mark.parametrize("change, classes, ids, counts", (
    (ClassChange({"a": "x"}), ("x", "b c", "ü", "ant"), (3, 7, 8, 20), (1, 1, 0, 1)),
    (ClassChange({"a": "x", "ant": "x"}), ("x", "b c", "ü"), (3, 7, 8), (2, 1, 0)),
    (ClassChange({"a": "ant"}), ("ant", "b c", "ü"), (3, 7, 8), (2, 1, 0)),
    (ClassChange(keep=("ant", "a")), ("ant", "a"), (1, 2), (1, 1)),
    (ClassChange({"ant": "bee"}, ("bee",)), ("bee",), (20,), (1,)),
    (ClassChange({"ant": "bee"}, ("ant",)), ("bee",), (20,), (1,))))
def test_classes_renamed_merged_and_chosen(source, tmp_path, change, classes, ids, counts):
    convert([source], tmp_path / "out", Options("coco", classes=change))
    dataset = load_dataset(SourceConfig(path=str(tmp_path / "out")), "train")
    assert (dataset.classes, dataset.category_ids) == (classes, ids)
    labels = [item.label for record in dataset.records for item in record.annotations]
    assert tuple(np.bincount(labels, minlength=len(classes))) == counts


def test_the_order_of_classes_in_yolo(source, tmp_path):
    convert([source], tmp_path / "out", Options("yolo", classes=ClassChange(keep=("ant", "a"))))
    assert load_dataset(SourceConfig(path=str(tmp_path / "out")), "train").classes == ("ant", "a")


def test_classes_that_are_not_there(source, tmp_path):
    with pytest.raises(ValueError, match="class must be one of the 4 there are, got 'amt'. Did you mean ant?"):
        convert([source], tmp_path / "out", Options("coco", classes=ClassChange(keep=("amt",))))
