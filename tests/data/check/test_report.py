"""The report: grouped, counted, worst first, for people and for machines."""

from __future__ import annotations

import io
import json
import time

import pytest

from detres.cli import main
from detres.data.check.report import EXAMPLES, print_report, to_json
from detres.data.check.run import Report, SplitSummary, check_data
from detres.data.problems import Problem

SPLITS = (SplitSummary("train", "/d/train.json", "coco", 5, 1200000, ("a", "b")),
          SplitSummary("val", "/d/val.json", "coco", 5, 7, ("a", "b")))


def problem(kind: str, number: int = 1, split: str = "train", value: object = 0.5, **more) -> Problem:
    return Problem(f"/d/{split}.json", number, number, "bbox", value, "must be right", kind, split, **more)


def text(report: Report, monkeypatch, **options) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    file = io.StringIO()
    print_report(report, file=file, **options)
    return file.getvalue()


def test_groups_are_worst_first_and_short(monkeypatch):
    problems = [problem("category_gap"), problem("area_differs", better=7)]
    problems += [problem("box_empty", number, "train" if number < 9 else "val") for number in range(12)]
    shown = text(Report("/d", SPLITS, problems), monkeypatch)
    heads = [line for line in shown.splitlines() if line.startswith(("✗", "!", "·"))]
    assert heads[0] == "✗ boxes without area: 12 errors (9 in train, 3 in val)"
    assert [head[:1] for head in heads[:3]] == ["✗", "!", "·"] and "and 9 more" in shown
    assert "train, image 1, annotation 1: bbox 0.5, better 7" in shown and "1,200,000" in shown
    assert heads[-1].startswith("✗ 12 errors and 1 warning: training refuses this data set.")
    assert shown.count("annotation ") == EXAMPLES + 2
    assert text(Report("/d", SPLITS, problems), monkeypatch, every=True).count("must be right; got") == 14
    assert max(map(len, shown.splitlines())) <= 80 and all(line == line.rstrip() for line in shown.splitlines())


@pytest.mark.parametrize(("kind", "options", "advice"), [
    ("box_empty", {"images": "my photos"}, "detres data check /d --images 'my photos' --fix OUT"),
    ("box_empty", {"mendable": False}, "detres data convert /d OUT --to coco --drop-invalid"),
    ("images_nowhere", {}, None), ("unreadable", {}, None)])
def test_what_is_advised_does_what_it_says(monkeypatch, kind, options, advice):
    shown = text(Report("/d", SPLITS, [problem(kind)], **options), monkeypatch)
    assert "training refuses" in shown and (advice in " ".join(shown.split()) if advice else "detres data" not in shown)


def test_unreadable_files_are_told_by_name(monkeypatch):
    found = [Problem(f"/d/{name}", None, None, "file", value, "must be readable", "unreadable", "train")
             for name, value in (("a.json", "no JSON"), ("b.json", "no JSON (/d/b.json)"))]
    shown = text(Report("/d", SPLITS, found), monkeypatch)
    assert "/d/a.json: no JSON\n" in shown and "    no JSON (/d/b.json)\n" in shown


def test_values_of_any_kind_are_told(monkeypatch):
    deep = []
    for _ in range(3000):
        deep = [deep]
    values = [deep, 10**5000, "[bold]x[/bold]", "\ud800\n", float("nan"), {"a": [float("inf")]}, b"x", "w" * 10**6]
    report = Report("/d", SPLITS, [problem("bad_box", value=value) for value in values])
    shown = text(report, monkeypatch, every=True)
    assert "[bold]x[/bold]" in shown and len(shown) < 5000
    told = json.dumps(to_json(report), allow_nan=False)
    assert json.loads(told)["problems"][4]["value"] == "nan"


def test_many_problems_are_told_in_a_moment(monkeypatch):
    problems = [problem("box_empty", number) for number in range(100_000)]
    start = time.process_time()
    shown = text(Report("/d", SPLITS, problems), monkeypatch)
    assert time.process_time() - start < 2 and len(shown.splitlines()) < 15 and "99,997 more" in shown


def test_json_has_everything(coco, capsys):
    coco.content["annotations"][1]["bbox"] = [1, 2, float("nan"), 4]
    coco.first["area"] = 1000
    coco.file.parent.mkdir(exist_ok=True)
    coco.file.write_text(json.dumps(coco.content))
    assert main(["data", "check", str(coco.root), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"version", "path", "verdict", "exit_status", "counts", "splits", "kinds", "problems"}
    assert content["splits"][0] | {"file": ""} == {
        "name": "instances_train2017", "file": "", "format": "coco", "images": 2, "annotations": 2,
        "classes": ["ant", "zebra"]}
    first = content["problems"][0]
    assert first | {"reason": ""} == {
        "split": "instances_train2017", "kind": "box_not_finite", "severity": "error", "file": str(coco.file),
        "image": 7, "annotation": 2, "place": "annotations[1]", "field": "bbox",
        "value": [1, 2, "nan", 4], "reason": "", "better": None}
    assert content["kinds"]["area_differs"]["count"] == 1 and content["counts"]["error"] == 1
    area = next(told for told in content["problems"] if told["kind"] == "area_differs")
    assert area["better"] == 600 and area["value"] == 1000
    assert sum(kind["count"] for kind in content["kinds"].values()) == len(content["problems"])


def test_exit_statuses(coco, capsys, monkeypatch):
    coco.load()
    assert main(["data", "check", str(coco.root)]) == 0
    assert main(["data", "check", str(coco.root / "nowhere")]) == 2
    assert "✗ data set must exist, got" in capsys.readouterr().out
    coco.file.write_text("{")
    assert check_data(coco.file).exit_status == 2 and main(["data", "check", str(coco.file), "--fix", "x"]) == 2


def test_a_copy_that_cannot_be_written_is_refused_before_anything_is_read(coco, tmp_path_factory, capsys):
    coco.load()
    out = tmp_path_factory.mktemp("out")
    (out / "file").touch()
    assert main(["data", "check", str(coco.root), "--fix", str(out)]) == 1
    told = capsys.readouterr()
    assert "must be a new or empty folder" in told.err and not told.out


def test_detections_that_are_not_there_are_told_before_anything_is_read(coco, capsys):
    assert main(["data", "check", str(coco.root), "--detections", "none.json"]) == 1
    assert capsys.readouterr().err.startswith("detres: error: --detections must be a file, got none.json")


def test_words_need_no_quotation_marks(monkeypatch):
    values = ("5 images", " blank ", "", "two\nlines")
    shown = text(Report("/d", SPLITS, [problem("bad_box", value=value) for value in values]), monkeypatch, every=True)
    assert [line.rpartition("got ")[2] for line in shown.splitlines() if "got " in line] == [
        "5 images", "' blank '", "''", "'two\\nlines'"]


def test_training_is_told_first(coco):
    coco.load()
    for name in ("instances_val2017", "instances_test2017"):
        (coco.file.parent / f"{name}.json").write_text(coco.file.read_text())
    assert [split.name for split in check_data(coco.root, read_images=False).splits] == [
        "instances_train2017", "instances_val2017", "instances_test2017"]


def test_a_split_that_is_gone_from_the_copy_is_told(coco, tmp_path_factory, capsys):
    coco.load()
    (coco.file.parent / "instances_val2017.json").write_text("{")
    assert main(["data", "check", str(coco.root), "--no-images", "--fix", str(tmp_path_factory.mktemp("clean"))]) == 0
    assert "no objects are left in instances_val2017.json" in " ".join(capsys.readouterr().out.split())
