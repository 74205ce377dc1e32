"""What is chosen to be looked at, and how it is drawn: sheets, a page for a browser, draws of the augmentation."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from detres import cli
from detres.config import Config
from detres.data import view_sheet
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.loader import build_loader
from detres.data.problems import Problem
from detres.data.sampling import Key
from detres.data.splits import find_splits
from detres.data.view import Choice, Entry, problem_box, problem_text, select
from detres.data.view_augment import write_augmented
from detres.data.view_html import script_json, svg_path, write_page
from detres.data.view_sheet import ALERT, GAP, TILE, draw_entry, draw_record, wrapped, write_sheets
from detres.inference.draw import color_of, sized_font

EVIL = '</script><script>alert("1")</script> & \'<i>\''  # a class
FILE = "a & <b>'s \"photo\".png"


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set of two splits with bad files, bad boxes and names that are code."""
    sizes = {1: (40, 60), 2: (50, 50), 3: (30, 90), 4: (50, 50), 5: (50, 50)}  # height, width
    files = {1: FILE, 2: "two.png", 3: "three.png", 4: "truncated.jpg", 5: "missing.png"}
    (tmp_path / "train").mkdir()
    for number, (height, width) in sizes.items():
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
        if number < 5:
            Image.fromarray(pixels).save(tmp_path / "train" / files[number])
    damaged = tmp_path / "train" / files[4]
    damaged.write_bytes(damaged.read_bytes()[:600])
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    boxes = [(1, 1, [5, 5, 20, 20]), (1, 2, [30, 10, 10, 10]), (2, 2, [0, 0, 40, 40]), (2, 2, [1, 1, 3, 3]),
             (2, 1, [9, 9, 0, 9]), (4, 1, [0, 0, 9, 9]), (5, 1, [0, 0, 9, 9]), (1, 2, [1, 2, 3, 4])]
    for split, chosen in (("train", boxes), ("val", boxes[:3])):
        content = {
            "images": [{"id": i, "file_name": files[i], "height": h, "width": w} for i, (h, w) in sizes.items()
                       if split == "train" or i < 4],
            "categories": [{"id": 1, "name": EVIL}, {"id": 2, "name": "dog"}],
            "annotations": [{"id": i + 1, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0,
                             "area": box[2] * box[3]} for i, (image, category, box) in enumerate(chosen)]}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def chosen(root, **choice) -> list[tuple[str, str]]:
    entries = select(root, None, Choice(**{"num": None, "order": "file"} | choice)).entries
    return [(entry.split.removeprefix("instances_"), entry.record and str(entry.record.id)) for entry in entries]


TRAIN, VAL = [("train", name) for name in "1234"], [("val", name) for name in "123"]


# ---- what is chosen


def test_splits_by_name_and_role(root):
    assert chosen(root) == [*TRAIN, *VAL]
    assert chosen(root, splits=["val"]) == chosen(root, splits=["instances_val"]) == VAL
    with pytest.raises(ValueError, match=r"--split must be .*instances_train.* got vla. Did you mean val\?"):
        chosen(root, splits=["vla"])


def test_classes_show_only_their_objects(root):
    assert chosen(root, classes=["dog"]) == [("train", "1"), ("train", "2"), ("val", "1"), ("val", "2")]
    entries = select(root, None, Choice(classes=["dog"], order="file")).entries
    assert [[item.id for item in entry.record.annotations] for entry in entries] == [[2, 8], [3, 4], [2], [3]]
    assert chosen(root, classes=["dog", EVIL], splits=["train"]) == [("train", "1"), ("train", "2"), ("train", "4")]
    with pytest.raises(ValueError, match="got dgo. Did you mean dog"):
        chosen(root, classes=["dgo"])


def test_images_by_id_and_name(root):
    assert chosen(root, images=["2"]) == [("train", "2"), ("val", "2")]
    assert chosen(root, images=[FILE, "three"], splits=["val"]) == [("val", "1"), ("val", "3")]
    with pytest.raises(ValueError, match="--image must be .* got 77, four"):
        chosen(root, images=["2", "77", "four"])


def test_problems(root):
    assert chosen(root, problems=["box_empty"]) == [("train", "2")]
    assert chosen(root, problems=["image_missing"]) == [("train", None)]
    assert {*chosen(root, problems=["any"])} >= {("train", "2"), ("train", None)}
    entry = select(root, None, Choice(problems=["box_empty"])).entries[0]
    assert [(problem.annotation_id, problem.kind) for problem in entry.problems] == [(5, "box_empty")]
    assert problem_box(entry.problems[0], entry.record) == (9, 9, 9, 18)
    with pytest.raises(ValueError, match="got box_emtpy. Did you mean box_empty"):
        chosen(root, problems=["box_emtpy"])


def test_orders(root):
    assert chosen(root, order="most", num=3) == [("train", "1"), ("train", "2"), ("val", "1")]
    assert chosen(root, order="smallest", num=2) == [("train", "2"), ("train", "1")]
    assert chosen(root, order="smallest", num=1, classes=[EVIL]) == [("train", "4")]
    first, again, other = (chosen(root, order="random", seed=seed) for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other) == [*TRAIN, *VAL]
    assert chosen(root, order="random", num=3) == first[:3]
    assert select(root, None, Choice(num=2)).found == 7


def test_what_a_problem_is_about():
    record = ImageRecord(1, Path("a"), 9, 9, (Annotation(4, 0, (1, 2, 3, 4)),))
    def problem(field, value, number=None):
        return Problem("f.json", 1, number, field, value, "must be so (do it)", "box_empty", place="annotations[3]")

    assert problem_box(problem("bbox", [5, 6, 7, 8]), None) == (5, 6, 12, 14)
    assert problem_box(problem("bndbox", ("5", "6", "7.5", "8")), None) == (5, 6, 7.5, 8)
    corners = replace(problem("bbox", [5, 6, 7, 8], 4), place="object 4")  # of labelme: a number, no id
    assert problem_box(corners, record) == problem_box(problem("box", [5, 6, 7, 8]), None) == (5, 6, 7, 8)
    assert problem_box(problem("bbox", [5, 6, 7, 8], 4), record) == (1, 2, 3, 4)
    assert problem_box(problem("bbox", [5, 6, None, 8]), None) is problem_box(problem("bbox", ["a"] * 4), None) is None
    assert problem_box(problem("bbox", [5, 6, float("nan"), 8]), None) is None
    assert problem_box(problem("bbox", "box"), record) is None and problem_box(problem("area", 7, 9), record) is None
    assert problem_box(problem("area", 7, 4), record) == (1, 2, 3, 4)
    assert problem_box(replace(problem("row", "1 2", 4), place="line 4"), record) is None  # not the id
    assert problem_text(problem("bbox", [5], 4)) == "annotation 4: bbox must be so; got [5]"
    assert problem_text(problem("file_name", "x" * 99)) == f"file_name must be so; got {'x' * 60}..."


# ---- sheets


def test_sheets_are_the_same_for_a_seed_and_have_a_tile_for_each_image(root, tmp_path):
    first, again = (write_sheets(select(root, None, Choice(seed=3)), tmp_path / name)[0] for name in ("a.png", "b.png"))
    assert first.read_bytes() == again.read_bytes()
    assert Image.open(first).width == 4 * (TILE + GAP) + GAP
    three = write_sheets(select(root, None, Choice(num=3)), tmp_path / "c.png")
    assert Image.open(three[0]).width == 3 * (TILE + GAP) + GAP


def test_many_images_take_several_sheets(root, tmp_path, monkeypatch):
    monkeypatch.setattr(view_sheet, "ROWS", 1)
    files = write_sheets(select(root, None, Choice()), tmp_path / "a.png")
    assert [file.name for file in files] == ["a_1.png", "a_2.png"] and all(file.is_file() for file in files)


def test_images_that_cannot_be_read_have_a_tile_that_says_why(root):
    selection = select(root, None, Choice(images=["4"], splits=["train"]))
    picture, lines = draw_entry(selection.entries[0], selection.classes)
    assert (np.array(picture) == ALERT).all(-1).any() and lines == ["truncated.jpg (instances_train, 50 x 50)"]
    selection = select(root, None, Choice(problems=["image_missing"]))
    picture, lines = draw_entry(selection.entries[0], selection.classes)
    assert picture.width == TILE and lines[0] == "image 5 (instances_train)" and "missing.png" in lines[1]


def test_files_of_another_size_are_told(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    record = ImageRecord(1, tmp_path / "a.png", 30, 20, (Annotation(1, 0, (0, 0, 9, 9), [[0, 0, 9, 0, 9, 9]]),))
    dataset = Dataset("mine", "coco", ("cat",), (1,), (record,))
    _, lines = draw_entry(Entry("train", dataset, 0, record), ("cat",))
    assert lines[1] == "the file has 30 x 20 px, its annotations state 20 x 30"


def test_what_is_annotated_is_drawn_where_it_is():
    square = [100, 20, 160, 20, 160, 70, 100, 70]
    items = (Annotation(1, 1, (10, 20, 60, 70)), Annotation(2, 0, (100, 20, 160, 70), [square]))
    dataset = Dataset("mine", "coco", ("cat", "dog"), (1, 2), (ImageRecord(1, Path("a"), 100, 200, items),))
    grey = np.full((100, 200, 3), 128, np.uint8)
    drawn = np.array(draw_record(grey, dataset, dataset.records[0], ("cat", "x", "dog"), 2.0))
    assert drawn.shape == (200, 400, 3)
    assert tuple(drawn[100, 20]) == color_of(2) and (drawn[100, 40] == 128).all()  # the frame; inside it
    assert (drawn[100, 260] != 128).any() and (drawn[180] == 128).all()  # the mask; below both


def test_the_box_of_a_problem_is_framed(root):
    selection = select(root, None, Choice(problems=["box_empty"]))
    picture, lines = draw_entry(selection.entries[0], selection.classes)
    alert = (np.array(picture) == ALERT).all(-1)
    scale = picture.width / 50
    rows, columns = np.flatnonzero(alert.any(1)), np.flatnonzero(alert.any(0))
    assert abs(columns.mean() - 9 * scale) < 2 and abs(rows.mean() - 13.5 * scale) < 2
    assert lines[1].startswith("boxes without area: annotation 5: bbox must") and lines[1].endswith("got [9, 9, 0, 9]")


def test_lines_are_no_wider_than_they_may():
    font = sized_font(13)
    lines = wrapped(f"some words and {'averylongword' * 20} and more", font, 200)
    assert all(font.getlength(line) <= 200 for line in lines) and "".join(lines).count("averylongword") > 15
    assert wrapped("", font, 200) == [""]


# ---- the page


class Page(HTMLParser):
    """Elements, texts of scripts, and what is loaded."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.ids, self.loads, self.title = [], [], [], [], ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        if self.open and self.open[-1] == "title":
            self.title += data


@pytest.fixture
def page(root, tmp_path) -> tuple[Page, dict, Path]:
    selection = select(root, None, Choice(num=None, order="file", problems=["any"]), with_problems=True)
    everything = select(root, None, Choice(num=None, order="file"), with_problems=True)
    selection = replace(everything, entries=everything.entries + [e for e in selection.entries if e.record is None])
    write_page(selection, tmp_path / "out & #1/look %41.html", f"data {EVIL}")
    file = tmp_path / "out & #1/look %41.html"
    parsed = Page(file.read_text(encoding="utf-8"))
    return parsed, json.loads(parsed.scripts[0]), file


def test_names_do_not_become_elements(page):
    parsed, data, file = page
    assert len(parsed.scripts) == 2 and parsed.tags.count("script") == 2 and "i" not in parsed.tags
    assert data["classes"][0] == [EVIL, "#1f77d0", "white"] and parsed.title == f"data {EVIL}"
    assert data["images"][0]["name"] == FILE
    assert len(set(parsed.ids)) == len(parsed.ids) and parsed.tags.count("h1") == 1


def test_the_page_loads_nothing_from_elsewhere(page):
    parsed, data, file = page
    assert parsed.loads == [] and not {"link", "iframe", "object"} & set(parsed.tags)
    text = file.read_text(encoding="utf-8")
    assert text.count("://") == text.count("http://www.w3.org/2000/svg") == 1 and "@import" not in text
    assert "innerHTML" not in text and "document.write" not in text  # names get in as text only


def test_the_files_of_the_page_are_there(page):
    _, data, file = page
    shown = [image for image in data["images"] if not image["error"]]
    names = {f"{image['file']}{suffix}.jpg" for image in shown for suffix in ("", "t")}
    assert {path.name for path in (file.parent / data["files"]).iterdir()} == names and len(shown) == 6
    assert unquote(data["files"]) != data["files"]  # so the script has to encode it
    picture = Image.open(file.parent / data["files"] / f"{shown[0]['file']}.jpg")
    assert list(picture.size) == shown[0]["size"]


def test_what_the_page_knows(page):
    _, data, _ = page
    one, two, _, truncated, *_, missing = data["images"]
    assert [item["box"] for item in one["objects"]] == [[5, 5, 25, 25], [30, 10, 40, 20], [1, 2, 4, 6]]
    assert one["split"] == "instances_train" and one["id"] == "1" and one["size"] == [60, 40]
    assert [(problem["kind"], problem["box"]) for problem in two["problems"]] == [
        ("box_empty", [9, 9, 9, 18]), ("box_speck", [1, 1, 4, 4])]
    assert data["kinds"]["box_empty"]["title"] == "boxes without area"
    assert "truncated.jpg" in truncated["error"] and missing["error"] and missing["name"] == "image 5"


def test_a_second_page_takes_the_place_of_the_first(root, tmp_path):
    for count in (3, 1):
        write_page(select(root, None, Choice(num=count, order="file")), tmp_path / "a.html", "a")
    assert sorted(path.name for path in (tmp_path / "a_files").iterdir()) == ["0.jpg", "0t.jpg"]


def test_json_in_a_script():
    value = {"a": "</script><!-- & \u2028", "b": ["<", ">"]}
    text = script_json(value)
    assert not set("<>&") & set(text) and json.loads(text) == value
    with pytest.raises(ValueError):
        script_json([float("nan")])


def test_outlines_of_bitmaps_have_holes():
    from detres.data.view_html import _outlines

    bitmap = np.zeros((20, 20), np.uint8)
    bitmap[2:18, 2:18] = 1
    bitmap[6:12, 6:12] = 0
    counts = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], bitmap.T.ravel(), [0]])))).tolist()
    runs = [int(np.flatnonzero(bitmap.T.ravel())[0]), *counts]
    runs += [400 - sum(runs)]
    record = ImageRecord(1, Path("a"), 20, 20)
    item = Annotation(1, 0, (2, 2, 18, 18), {"size": [20, 20], "counts": runs})
    outlines = list(_outlines(item, record))
    assert len(outlines) == 2 and svg_path(outlines).count("M") == 2
    assert svg_path([np.array([[0, 0], [10.04, 0.5], [3, 4]])]) == "M0,0 10,0.5 3,4Z"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to read JavaScript")
def test_the_script_is_valid(page, tmp_path):
    (tmp_path / "page.js").write_text(page[0].scripts[1], encoding="utf-8")
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


# ---- what training sees


def config_of(**augment) -> Config:
    return Config.model_validate({"model": {"name": "faster_rcnn", "input": {"min_size": 40, "max_size": 60}},
                                  "data": {"augment": {"scales": (1, 1), **augment}}, "train": {"seed": 5}})


def test_draws_are_those_of_training(root, tmp_path):
    """An image without objects, so that nothing is drawn on it; it becomes 60 x 20 px of a canvas of 64 x 32."""
    def content(sheet: Path, column: int) -> np.ndarray:
        left = GAP + column * (TILE + GAP)
        scale = TILE / 64
        return np.array(Image.open(sheet))[GAP:GAP + int(20 * scale), left:left + int(60 * scale)].astype(int)

    choice = Choice(images=["3"], splits=["train"])
    plain, flipped = (write_augmented(root, None, choice, config_of(flip=flip), 2, tmp_path / f"{flip}.png")
                      for flip in (0, 1))
    assert (content(plain, 1) == content(plain, 2)).all()
    assert np.abs(content(flipped, 1) - content(plain, 1)[:, ::-1]).mean() < 5
    assert np.abs(content(flipped, 1) - content(plain, 1)).mean() > 20


def test_draws_are_samples_of_the_loader(root):
    from detres.data.view_augment import draw_epochs, training_loader

    dataset = find_splits(root)[0].load("drop")
    config = config_of(flip=0.5)
    loader = training_loader(dataset, config)
    alone = replace(dataset, records=dataset.records.take([0]))
    data = config.data.model_copy(update={"workers": 0})
    batch = next(iter(build_loader(alone, config.model.input, data, batch_size=1, training=True, with_masks=False,
                                   seed=5)))
    sample = loader.sample(Key(0, 0))
    assert (batch.images.pixels[0, :, :40, :60].permute(1, 2, 0).numpy() == sample.image).all()
    assert (batch.targets.boxes[0].numpy() == sample.boxes).all()
    entry = select(root, None, Choice(images=["1"], splits=["train"])).entries[0]
    tiles = draw_epochs(loader, entry, dataset.classes, 3)
    assert [lines for _, lines in tiles] == [[f"epoch {i}: 60 x 40, padded to 64 x 64"] for i in range(3)]
    assert all(np.array(picture)[-40:, :, 0].min() > 160 for picture, _ in tiles)  # the stripes below
    unreadable = select(root, None, Choice(images=["4"], splits=["train"])).entries[0]
    assert len(draw_epochs(loader, unreadable, dataset.classes, 3)) == 3


def test_draws_show_crowds_and_difficult_objects(root):
    from detres.data.view_augment import draw_epochs, training_loader

    dataset = find_splits(root)[0].load("drop")
    record = dataset.records[0]
    first, second, third = record.annotations
    marked = replace(record, annotations=(replace(first, crowd=True), replace(second, difficult=True), third))
    plain, crowd = (replace(dataset, records=(one,)) for one in (record, marked))
    third_alone = replace(dataset, records=(replace(record, annotations=(third,)),))
    pictures = []
    for data in (plain, crowd, third_alone):
        entry = Entry("train", data, 0, data.records[0])
        pictures.append(np.array(draw_epochs(training_loader(data, config_of()), entry, data.classes, 1)[0][0]))
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()


# ---- the command


def test_command(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {name: faster_rcnn, input: {min_size: 40, max_size: 60}}\n")
    assert cli.main(["data", "view", "."]) == 0 and Path("view.png").is_file()
    assert cli.main(["data", "view", ".", "--problem", "box_empty", "--html", "look.html"]) == 0
    assert Path("look.html").is_file() and len(list(Path("look_files").iterdir())) == 2
    assert cli.main(["data", "view", ".", "--augment", "c.yaml", "data.augment.flip=1", "--draws", "2", "--image", "1",
                     "--out", "seen.png"]) == 0
    assert "Wrote seen.png" in capsys.readouterr().out and Image.open("seen.png").width == 3 * (TILE + GAP) + GAP
    capsys.readouterr()
    for options, expected in ((["--out", "a.jpg"], "--out must end in .png, got a.jpg"),
                              (["--html", "page"], "--html must end in .html, got page")):
        assert cli.main(["data", "view", ".", *options]) == 1 and expected in capsys.readouterr().err
    for options, expected in ((["--html", "a.html", "--augment", "c.yaml"], "--html cannot go with --augment"),
                              (["data.augment.flip=1"], "key=value goes with --augment"),
                              (["--problem", "any", "--augment", "c.yaml"], "--problem cannot go with --augment")):
        with pytest.raises(SystemExit):
            cli.main(["data", "view", ".", *options])
        assert expected in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco_mini", "voc_mini", "bccd", "nuts", "balloon"])
def test_real_data(shared_data, tmp_path, name):
    selection = select(shared_data / name, None, Choice(num=4))
    write_sheets(selection, tmp_path / "a.png")
    write_page(selection, tmp_path / "a.html", name)
    data = json.loads(Page((tmp_path / "a.html").read_text(encoding="utf-8")).scripts[0])
    assert len(data["images"]) == 4 and not any(image["error"] for image in data["images"])
    assert [len(image["objects"]) for image in data["images"]] == [len(e.record.annotations) for e in selection.entries]


def test_an_object_of_two_classes_has_its_box():
    two = Problem("a.jpg", 1, None, "classes", ["chair", "couch", [1, 2, 8, 9]], "must be one", "object_two_classes")
    assert problem_box(two, None) == (1, 2, 8, 9) and problem_text(two) == (
        "classes must be one; got [chair, couch, [1, 2, 8, 9]]")


def test_nothing_to_show_is_told(root, tmp_path, capsys):
    for options in (["--out", str(tmp_path / "a.png")], ["--html", str(tmp_path / "a.html")]):
        assert not cli.main(["data", "view", str(root), "--problem", "image_cmyk", *options])
        assert "No image fits" in capsys.readouterr().out and not list(tmp_path.glob("a.*"))
