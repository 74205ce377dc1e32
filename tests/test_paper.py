"""`detres paper`: index, configs, headers, docs and commands say the same; the published numbers agree with one
another, and with the text of arXiv 1512.03385."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from statistics import mean

import pytest
import setuptools
import torch
import yaml

from detres import cli, paper
from detres.build import build_model
from detres.config_file import load_config
from detres.evaluation.localization import class_test

from .test_configs import labelled_images

ROOT = Path(__file__).resolve().parents[1]
PARTS = paper.load_paper()
ROWS = {row.id: (part, row) for part in PARTS.values() for row in part.rows if row.id}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def trains(row: paper.Row) -> bool:
    return any(words[1] == "train" for words in row.commands)


TRAINED = {f"runs/paper/{key}" for key, (_, row) in ROWS.items() if trains(row)} | {
    word.removeprefix("output=") for _, row in ROWS.values() for words in row.commands for word in words
    if word.startswith("output=")}


def published(row_id: str) -> list[float]:
    return [float(value) for value in ROWS[row_id][1].published if value != "-"]


# ---- the numbers


def test_every_table_and_figure_is_there():
    assert list(PARTS) == [*(f"table{i}" for i in range(1, 15)), "figure1", "figure4", "figure6", "figure7"]
    assert all(part.rows or part.run in paper.ANALYSES for part in PARTS.values())
    assert len(ROWS) == sum(bool(row.id) for part in PARTS.values() for row in part.rows), "ids are unique"


def test_rows_have_a_number_for_each_column():
    for part in PARTS.values():
        for row in part.rows:
            assert len(row.published) == len(part.columns or ["published"]), (part.name, row.what)
            assert all(re.fullmatch(r"\d+\.\d+|-", value) for value in row.published), (part.name, row.what)
            assert len(row.classes) in (0, 20)


@pytest.mark.parametrize("left, right", [
    ("table2/plain34", "table3/plain34"), ("table2/resnet34", "table3/resnet34a"),
    ("table8/resnet101", "table9/baseline"), ("table7/voc2007", "table10/baseline"),
    ("table7/voc2012", "table11/baseline"), ("table13/ensemble", "table14/ensemble")])
def test_a_number_in_two_tables_is_the_same(left, right):
    a, b = published(left), published(right)
    assert a[0] == b[0] and (a[1:] == b[1:] or 1 in (len(a), len(b)))


@pytest.mark.parametrize("part", ["table10", "table11"])
def test_map_is_the_mean_of_its_classes(part):
    rows = [row for row in PARTS[part].rows if row.classes]
    assert len(rows) == 3
    for row in rows:  # classes and mean are rounded to 0.1
        assert abs(mean(map(float, row.classes)) - float(row.published[0])) < 0.1, row.what


@pytest.mark.parametrize("claim, value, digits", [
    ("section 4.1: ResNet-34 beats ResNet-18 by 2.8", ("table2/resnet18", "table2/resnet34"), 2.8),
    ("section 4.1: and plain-34 by 3.5", ("table2/plain34", "table2/resnet34"), 3.5),
    ("section 4.2: ResNet-1202 is worse than ResNet-110", ("table6/resnet1202", "table6/resnet110"), 1.5),
    ("section 4.3: more than 3 over VGG-16's 73.2", ("table7/voc2007", 73.2), 3.2),
    ("appendix A: 6.9 over VGG-16's 41.5", ("table8/resnet101", 41.5), 6.9),
    ("appendix A: on VOC, 83.8 is 10 points above 73.8", ("table11/improved", "table11/baseline"), 10.0)])
def test_numbers_fit_the_text(claim, value, digits):
    a, b = (published(x)[0] if isinstance(x, str) else x for x in value)
    assert round(a - b, 1) == digits, claim


# ---- configs, headers, commands


@pytest.mark.parametrize("row_id", ROWS)
def test_header_says_what_the_index_says(row_id):
    part, row = ROWS[row_id]
    fields = paper.header(row.config)
    assert list(fields) == ["reference", "detres", "command"]
    assert fields["reference"] == part.reference(row)
    if row.here:
        assert (ROOT / re.search(r"results/\S+", row.here)[0].rstrip(".,;)")).is_file()


@pytest.mark.parametrize("row_id", ROWS)
def test_config_builds_and_trains_where_it_says(row_id):
    row = ROWS[row_id][1]
    config = load_config(row.config).config
    with torch.device("meta"):
        build_model(config.model, num_classes=20)
    if trains(row):
        assert config.output == f"runs/paper/{row_id}"
        assert row.commands[0][1:3] == ["train", f"configs/paper/{row_id}.yaml"]
    else:
        assert config.output != f"runs/paper/{row_id}"


def test_every_config_is_of_a_row():
    files = {str(path.relative_to(ROOT / "configs/paper")) for path in (ROOT / "configs/paper").glob("[!_]*/*.yaml")}
    assert files == {f"{row_id}.yaml" for row_id in ROWS}


@pytest.mark.parametrize("row_id", [row_id for row_id, (_, row) in ROWS.items() if not trains(row)])
def test_config_of_a_test_is_that_of_its_training_with_the_commands_fields(row_id):
    row = ROWS[row_id][1]
    base = row.config.parent / yaml.safe_load(row.config.read_text())["base"]
    args, _ = cli.build_parser().parse_known_args(row.commands[-1][1:])
    overrides = [item for item in getattr(args, "more", []) if "=" in item]
    assert load_config(row.config).config == load_config(base, overrides).config


@pytest.mark.parametrize("row_id", ROWS)
def test_commands_are_valid(row_id):
    for words in ROWS[row_id][1].commands:
        assert words[0] == "detres"
        args, rest = cli.build_parser().parse_known_args(words[1:])
        args.parser.check_rest(rest)
        assert not rest or args.rest
        for word in words:
            if word.startswith("configs/"):
                assert (ROOT / word).is_file()
            if "/checkpoints/" in word:
                run, file = word.removeprefix("data.proposals=").split("/checkpoints/")
                assert run in TRAINED and file in ("final.safetensors", "bn.safetensors")


def test_weights_that_trainings_begin_from_are_written():
    for _, row in ROWS.values():
        for name, path in paper._paths(load_config(row.config).config):
            if name != "output":
                needed, file = re.fullmatch(r"runs/paper/(\w+/\w+)/checkpoints/(.+)", path).groups()
                commands = ROWS[needed][1].commands
                assert commands[0][1] == "train" if file == "final.safetensors" else path in commands[-1]


def test_configs_are_shipped(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: found.update(options))
    runpy.run_path("setup.py")
    for _, row in ROWS.values():
        assert f"detres.configs.paper.{row.config.parent.name}" in found["packages"]


# ---- docs


def test_docs_have_the_tables():
    text = (ROOT / "docs/paper.md").read_text()
    assert paper.markdown() in text, "paste the output of detres paper --markdown"
    for target in re.findall(r"\]\((\.\./[^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


# ---- the command


def test_lists_all_one_table_one_row(capsys):
    assert cli.main(["paper"]) == 0
    text = capsys.readouterr().out
    assert all(row_id in text for row_id in ROWS) and "table6/resnet56" in text
    assert re.search(r"table3/resnet34c +24.19 / 7.40 +not run here +ResNet-34, shortcuts C", text)
    assert cli.main(["paper", "table6"]) == 0
    text = capsys.readouterr().out
    assert "Maxout" in text and "table3" not in text
    assert cli.main(["paper", "table10/improved"]) == 0
    text = capsys.readouterr().out
    assert "mAP 85.6 %" in text and "tvmonitor 86.8" in text
    assert "command    detres train configs/paper/table10/improved.yaml" in text


@pytest.mark.parametrize("argv, expected", [
    (["tabel6"], "Did you mean table6?"), (["run", "table6"], "Take one of table6/resnet20"),
    (["run"], "followed by a row"),
    (["table6", "train.steps=1"], "go behind run ROW"), (["--data", "x"], "go behind run ROW"),
    (["run", "figure4", "--out", "/nowhere"], "no /nowhere/table2/plain18. Make them first: detres paper run table2/"),
    (["run", "table6/resnet20", "--networks", "x"], "networks must go with figure1, figure6, figure7, got table6/resnet20.\n"),
    (["run", "table4/resnet50", "--out", "/nowhere"],
     "/nowhere/table3/resnet50/checkpoints/final.safetensors. Make them first: detres paper run table3/resnet50"),
    (["run", "table6/resnet20", "--seeds", "1"], "seeds must go with figure1, figure6, figure7, got table6/resnet20"),
    (["run", "figure6", "--networks", "resnet21"], "network must be one of plain110"),
    (["run", "table8/resnet101"], "Make them first: detres paper run table3/resnet101")])
def test_mistakes_are_told(argv, expected, capsys):
    try:
        assert cli.main(["paper", *argv]) == 1
    except SystemExit as stop:
        assert stop.code == 2
    assert expected in capsys.readouterr().err


def commands_of(row_id: str, monkeypatch, **options) -> list[list[str]]:
    called = []
    monkeypatch.setattr(paper, "_call", called.append)
    monkeypatch.setattr(paper, "_require_runs", lambda *_: None)
    monkeypatch.setattr(paper, "_measured", lambda *_: "")
    paper.run(row_id, **options)
    return called


def test_runs_the_commands_of_the_header(monkeypatch):
    train, test = commands_of("table3/resnet50", monkeypatch)
    assert train == ["train", f"{ROOT}/configs/paper/table3/resnet50.yaml", "--resume"]
    weights = "runs/paper/table3/resnet50/checkpoints/final.safetensors"
    assert test == ["eval", weights, "eval.crops=10", "--json", "runs/paper/table3/resnet50.json"]


def test_data_and_folder_of_the_user_take_the_place_of_the_configs(monkeypatch):
    first, second, test, server = commands_of("table12/ensemble", monkeypatch, data="/d", out="/o", num_gpus=8,
                                              overrides=["train.steps=1"])
    data, weights = ["data.train.path=/d", "data.val.path=/d"], "/o/table12/{}/checkpoints/final.safetensors"
    pretrained = "model.backbone.weights=/o/table3/resnet101/checkpoints/bn.safetensors"
    common = ["--resume", "--num-gpus", "8", *data]
    config = f"{ROOT}/configs/paper/table12/ensemble.yaml"
    assert first == ["train", config, *common, "output=/o/table12/ensemble", pretrained, "train.steps=1"]
    assert second == ["train", config, "train.seed=2", "output=/o/table12/ensemble_2", *common, pretrained,
                      "train.steps=1"]
    members = [weights.format(name) for name in ("single", "ensemble", "ensemble_2")]
    assert test == ["eval", *members, *data, "train.steps=1", "--json", "/o/table12/ensemble.json"]
    assert server == ["eval", *members, "--split", "test", "--save", "/o/table12/ensemble/test.json", *data,
                      "train.steps=1"]


def test_data_of_a_server_is_found_in_the_users_folder(monkeypatch):
    (test,) = commands_of("table9/multiscale_testdev", monkeypatch, data="/d")
    assert test[3:5] == ["--data", "/d/annotations/image_info_test-dev2015.json"]
    assert "data.val.path=/d" not in test, "there is none: the truth is not published"


def test_a_row_without_a_test_of_its_own_has_the_numbers_of_its_training(tmp_path):
    part, row = ROWS["table8/resnet101"]
    (tmp_path / "table8/resnet101").mkdir(parents=True)
    (tmp_path / "table8/resnet101/results.json").write_text('{"bbox/AP50": 0.481, "bbox/AP": 0.27, "step": 3}')
    found = paper._measured(part, row, row.commands, str(tmp_path))
    assert found == f"mAP@.5 48.10 %, mAP@[.5, .95] 27.00 % ({tmp_path}/table8/resnet101/results.json)"


def test_classes_are_guessed_at_the_scales_of_the_row():
    """Table 13's 14.4 rests on the classes of Table 4."""
    words = ROWS["table13/dense"][1].commands[0]
    args, _ = cli.build_parser().parse_known_args(words[1:])
    scales = "eval.test_scales=[224,256,384,480,640]"
    assert class_test(args.class_crops, args.more) == ["eval.crops=dense", scales]
    assert class_test("10", args.more) == ["eval.crops=10"] and class_test(None, args.more) == []


def test_a_row_runs_small_and_goes_on(tmp_path, capsys):
    """The whole way: training from the header's command, its test, what came out."""
    labelled_images(tmp_path / "images")
    small = ["train.steps=2", "train.batch_size=2", "train.reference_batch_size=2", "model.backbone.width=8",
             "data.train.split=train", "data.val.split=val", "data.workers=0", "device=cpu"]
    places = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "runs")]
    for _ in range(2):
        assert cli.main(["paper", "run", "table6/resnet20", *places, *small]) == 0
        text = capsys.readouterr().out
        assert "published  test error 8.75 %: Table 6" in text
        assert re.search(r"here       test error \d+\.00 % \(.*/runs/table6/resnet20.json\)\n  changed    train.steps=2 ",
                         text)
    assert (tmp_path / "runs/table6/resnet20/results.json").is_file()


def test_a_figure_draws_runs_that_rows_share(tmp_path, capsys):
    labelled_images(tmp_path / "images")
    small = ["train.batch_size=2", "train.reference_batch_size=2", "model.backbone.width=8", "data.train.split=train",
             "data.val.split=val", "data.workers=0", "device=cpu", "eval.batch_size=2"]
    figure = ["paper", "run", "figure7", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "runs"),
              "--networks", "plain20,resnet20", "--seeds", "2"]
    assert cli.main([*figure, *small, "train.steps=2"]) == 0
    assert re.search(r"\| resnet20 \| 2 \| [\d.]+ ± [\d.]+ \|", capsys.readouterr().out)
    runs = [tmp_path / "runs" / name for name in ("figure6/plain20", "figure6/plain20_1", "table6/resnet20",
                                                  "table6/resnet20_1")]
    before = [(run / "log.jsonl").stat().st_mtime_ns for run in runs]
    assert all((tmp_path / "runs/figure7" / name).is_file() for name in ("figure6.png", "figure7.png", "table.md"))
    assert cli.main([*figure, *small, "train.steps=2"]) == 0
    assert [(run / "log.jsonl").stat().st_mtime_ns for run in runs] == before, "what is finished is kept"
    assert cli.main([*figure, *small, "train.steps=3"]) == 1, "and not taken for another training"
    assert "train.steps: 2 in the run, 3 now" in capsys.readouterr().err


def test_a_command_that_fails_stops_the_run(tmp_path):
    with pytest.raises(SystemExit, match="1"):
        paper.run("table6/resnet20", data=str(tmp_path / "nothing"), out=str(tmp_path / "runs"))


def test_table_1_is_counted(tmp_path):
    text = paper.ANALYSES["table1"](None, tmp_path, [])
    counts = [line.split()[1] for line in text.splitlines()[1:]]
    assert PARTS["table1"].here.startswith(f"{', '.join(counts[:4])} and {counts[4]} times 10^9")
