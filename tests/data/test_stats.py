"""Statistics of data sets against what was counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detres import cli
from detres.config import AnchorConfig, InputConfig
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.shapes import ShapesOptions, write_shapes
from detres.data.stats import GRID, QUANTILES, anchor_fits, columns_of, poor_share, split_stats
from detres.data.stats_report import Table, advice, as_text, show_stats, tables


def made(records, classes=("cat", "dog", "cow")) -> Dataset:
    return Dataset("mine", "coco", tuple(classes), tuple(range(len(classes))), tuple(records))


def boxes(image: int, *corners, label=0, size=(100, 200)) -> ImageRecord:
    items = [Annotation(100 * image + i, label, box, area=(box[2] - box[0]) * (box[3] - box[1]))
             for i, box in enumerate(corners)]
    return ImageRecord(image, Path(f"{image}.jpg"), *size, tuple(items))


@pytest.fixture
def three() -> Dataset:
    """Two images with four annotations, and an empty one."""
    first = (Annotation(1, 0, (0, 0, 20, 20), area=399.0, segmentation=[[0, 0, 20, 0, 20, 20]]),
             Annotation(2, 0, (150, 50, 250, 90), area=4000.0, keypoints=(1.0, 1.0, 2.0), difficult=True),
             Annotation(3, 1, (0, 0, 200, 100), area=20000.0, crowd=True))
    second = (Annotation(4, 1, (10, 10, 110, 310), area=30000.0),)
    return made([ImageRecord(1, Path("a"), 100, 200, first), ImageRecord(2, Path("b"), 400, 400, second),
                 ImageRecord(3, Path("c"), 400, 400)])


def test_counts(three):
    stats = split_stats(columns_of("train", three))
    assert (stats.name, stats.images, stats.empty_images, stats.annotations) == ("train", 3, 1, 4)
    assert (stats.crowds, stats.difficult, stats.masks, stats.keypoints) == (1, 1, 1, 1)
    assert (stats.small, stats.medium, stats.large) == (1, 1, 1)  # without the crowd
    assert stats.classes == (("cat", 2, 1, 0.5), ("dog", 2, 2, 0.5), ("cow", 0, 0, 0.0))


def test_small_and_large_begin_where_coco_has_them():
    areas = (1023.9, 1024, 9215.9, 9216, 9216)
    items = tuple(Annotation(i, 0, (0, 0, 9, 9), area=area) for i, area in enumerate(areas))
    stats = split_stats(columns_of("", made([ImageRecord(1, Path("a"), 99, 99, items)])))
    assert (stats.small, stats.medium, stats.large) == (1, 2, 2)


def test_sizes_shapes_and_places_are_of_objects_clipped_to_their_image(three):
    columns = columns_of("train", three)
    assert columns.object_sides.tolist() == [[20, 20], [40, 50], [300, 100]]
    assert columns.objects_per_image.tolist() == [2, 1, 0] and columns.classes_per_image.tolist() == [2, 1, 0]
    quantiles = split_stats(columns).quantiles
    middle = {name: values[QUANTILES.index(0.5)] for name, values in quantiles.items()}
    assert middle == pytest.approx({
        "image width, px": 400, "image height, px": 400, "box side, px": 2000**0.5,
        "box side, % of image side": 100 * (2000 / 20000)**0.5, "box height / width": 1, "objects an image": 1,
        "classes an image": 1})
    centers = columns.centers
    assert centers.sum() == 3 and centers[int(0.1 * GRID), int(0.05 * GRID)] == 1
    assert centers[int(0.7 * GRID), int(175 / 200 * GRID)] == 1 and centers[int(0.4 * GRID), int(60 / 400 * GRID)] == 1


def test_nothing_annotated_and_nothing_there():
    for dataset in (made([boxes(1)]), made([]), made([boxes(1)], classes=())):
        columns = columns_of("test", dataset)
        stats = split_stats(columns)
        assert stats.annotations == 0 and stats.empty_images == stats.images and anchor_fits(columns) == ()
        assert all(as_text(table) for table in tables([stats], 80, 10))


def test_anchors_that_fit():
    size = InputConfig(min_size=100, max_size=200)
    anchors = AnchorConfig(sizes=((32,),), aspect_ratios=(1.0,))

    def poor(*corners, size=size) -> float:
        return poor_share(columns_of("", made([boxes(1, *corners)])), size, anchors)

    assert poor((0, 0, 32, 32)) == 0 and poor((0, 0, 8, 8)) == 1 and poor((0, 0, 8, 8), (50, 50, 80, 80)) == 0.5
    assert poor((0, 0, 23, 23)) == 0 and poor((0, 0, 22, 22)) == 1  # IoU 529 / 1024 and 484 / 1024
    assert poor((0, 0, 64, 33)) == 1 and poor((0, 0, 62, 32)) == 0  # 32 / 62.8 and 32 / 62
    assert poor((0, 0, 16, 16), size=InputConfig(min_size=200, max_size=400)) == 0  # enlarged


def test_advice_names_what_is_better():
    slim = made([boxes(1, *[(10 * i, 0, 10 * i + 5, 25) for i in range(10)])])
    plain, *better = anchor_fits(columns_of("train", slim))
    assert (plain.overrides, plain.poor) == ("", 1.0) and [fit.overrides for fit in better] == [
        "model.anchors.aspect_ratios=[0.25,0.5,1,2,4]"]
    assert "0% with model.anchors.aspect_ratios" in "\n".join(advice({"train": (plain, *better)}))
    assert anchor_fits(columns_of("train", made([boxes(1, (0, 0, 50, 50))]))) == () and not advice({"train": (plain,)})


def test_advice_are_overrides_of_a_config():
    from detres.config_file import load_config

    speck = made([boxes(1, (0, 0, 2, 2))])
    texts = [word for fit in anchor_fits(columns_of("", speck))[1:] for word in fit.overrides.split()]
    assert texts and load_config(None, texts).config.model.anchors.sizes[0] == (16,)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_tables_fit_80_columns(splits):
    names = [f"class with quite a long name {i}" for i in range(80)]
    dataset = made([boxes(i, *[(0, 0, 10 + i, 20)] * (i + 1), label=i) for i in range(80)], names)
    stats = [split_stats(columns_of(f"instances_of_the_split_{i}", dataset)) for i in range(splits)]
    short = [as_text(table) for table in tables(stats, 80, 10)]
    assert max(len(line) for text in short for line in text.splitlines()) <= 80
    classes = [text for text in short if text.startswith("Classes")]
    assert all(len(text.splitlines()) == 3 + 10 + 1 + 10 and "60 more: --all" in text for text in classes)
    assert sum(len(text.splitlines()) == 3 + 80 for text in map(as_text, tables(stats, 80, None))) == len(classes)
    assert len(classes) == -(-splits // 2)  # two beside each other


def test_quantiles_fit_60_columns():
    stats = [split_stats(columns_of(name, made([boxes(1, (0, 0, 9, 9))]))) for name in ("train", "val")]
    narrow, wide = (next(as_text(table) for table in tables(stats, width, 10) if table.title == "Quantiles")
                    for width in (60, 80))
    assert "99%" in wide and "99%" not in narrow and max(map(len, narrow.splitlines())) <= 60


def test_text_of_a_table():
    text = as_text(Table("Things", ("", "a", "b"), [("one", "1", "22"), ("three", "3", "4")]))
    rule = "\N{BOX DRAWINGS LIGHT HORIZONTAL}" * 13
    assert text.splitlines() == ["Things  a   b", rule, "one     1  22", "three   3   4"]


def test_command(tmp_path, capsys, monkeypatch):
    write_shapes(tmp_path / "d<b>", 3, options=ShapesOptions("easy", size=(64, 96)), val_images=2, progress=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "stats", "d<b>", "--out", "a.png", "more/a.svg", "a.html"]) == 0
    out = capsys.readouterr().out
    assert "Counts" in out and "train" in out and "val" in out and "Wrote more/a.svg" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "more/a.svg").is_file()
    page = (tmp_path / "a.html").read_text()
    assert "d&lt;b&gt;" in page and "<b>" not in page and "data:image/png;base64," in page
    assert cli.main(["data", "stats", "d<b>", "--json"]) == 0
    train, val = json.loads(capsys.readouterr().out)
    assert (train["images"], val["images"]) == (3, 2) and train["quantiles"]["at"] == list(QUANTILES)
    assert sum(row["instances"] for row in train["classes"]) == train["annotations"] > 0
    assert cli.main(["data", "stats", "d<b>", "--out", "a.jpg"]) == 1 and ".html, got a.jpg" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.parametrize("name, images, annotations, classes", [
    ("coco_mini", [153, 79], [1382, 624], 80), ("voc_mini", [196, 204], [566, 590], 20),
    ("bccd", [205, 87, 72], [2804, 1137, 945], 3), ("nuts", [18], [165], 3), ("balloon", [61, 13], [255, 50], 1)])
def test_real_data(shared_data, tmp_path, capsys, name, images, annotations, classes):
    stats = show_stats(shared_data / name, out=[tmp_path / "a.png"])
    assert [split.images for split in stats] == images and [split.annotations for split in stats] == annotations
    assert len(stats[0].classes) == classes and np.isfinite([list(q) for q in stats[0].quantiles.values()]).all()
    assert max(map(len, capsys.readouterr().out.split("Wrote")[0].splitlines())) <= 80


def test_pages_may_be_asked_for_one_by_one(tmp_path):
    root = write_shapes(tmp_path / "data", 2, options=ShapesOptions("easy", size=(64, 96)), progress=False)
    files = [tmp_path / "a.png", tmp_path / "a.svg"]
    assert not cli.main(["data", "stats", str(root), "--out", str(files[0]), "--out", str(files[1])])
    assert all(file.is_file() for file in files)
