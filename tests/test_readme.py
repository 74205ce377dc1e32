"""What the README says is run as written, and its figures are those of results/."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from detres.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_make_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert named == ["demo", "test"] and set(named) <= set(targets)


def test_commands_and_python_run(tmp_path, monkeypatch):
    """In an empty folder with the configs; training is cut to two steps."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("detres ")]
    assert len(commands) == 9
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        short = ["train.steps=2", "train.batch_size=2", "train.reference_batch_size=2", "train.warmup_steps=1"]
        assert main(words + (short if words[0] == "train" else [])) == 0, command
    assert Path("runs/mine/detections.json").is_file() and Path("found/predictions.json").is_file()
    shutil.move("runs/mine", "runs/demo")
    shutil.copy(next(Path("datasets/shapes/val").glob("*.jpg")), "image.jpg")
    (code,) = blocks("python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert Path("found.png").is_file()
    assert {"boxes", "scores", "labels", "masks"} <= set(names["out"].numpy()) and isinstance(names["out"].names, list)
    assert isinstance(names["out"].to_coco(1), list)


def test_files_named_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["demo", "bccd_r18", "nuts_mask_rcnn_r18"])
def test_results_are_those_measured(name):
    record = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert {"command", "hardware", "commit", "versions", "metrics"} <= set(record)
    row = next(line for line in README.splitlines() if line.startswith("|") and f"results/{name}.json" in line)
    figures = re.findall(r"(\w+/\w+) (\d\.\d+)", row)
    assert figures
    for metric, figure in figures:
        assert f"{record['metrics'][metric]:.3f}" == figure, (name, metric)


def test_speed_table_is_the_one_printed():
    printed = (ROOT / "results" / "mask_rcnn_cpu.md").read_text()
    rows = [line for line in README.splitlines() if re.match(r"\| (train|infer)", line)]
    assert len(rows) == 8 and all(row in printed for row in rows)



def test_evaluation_table_is_the_one_printed():
    printed = (ROOT / "results" / "coco_eval_cpu.md").read_text().split("from arrays\n")[1].split("from json\n")[:2]
    arrays, files = ({row.split()[0]: row.split()[1:] for row in part.splitlines() if len(row.split()) == 4}
                     for part in printed)
    rows = re.findall(r"\| (\w+) \| (\S+) s \| (\S+) s \| (\d+) \| (.+) \|", README)
    assert len(rows) == 6
    for name, from_arrays, from_files, memory, equal in rows:
        assert (from_arrays, from_files, memory) == (arrays[name][0], *files[name][:2])
        assert equal.replace("not compared", "-") == files[name][2] == arrays[name][2]


def test_degradation_table_is_the_one_printed():
    printed = (ROOT / "results" / "cifar_degradation.md").read_text()
    rows = re.findall(r"^\| ((?:plain|resnet)\d+) \| (.+) \| (.+) \|$", README, re.M)
    assert len(rows) == 4
    for network, training, test in rows:
        assert f"| {network} | 3 | {training} | {test} |" in printed


def test_table_of_switches_is_the_one_printed():
    printed = (ROOT / "results" / "appendix_b_switches.md").read_text()
    parts = {name: re.findall(r"^\| (.+?) \| (.+?) \| .+? \| (.*?) \| .+ \|$", part, re.M) for name, part in
             re.findall(r"^(\w+): short side.+?\n(.+?)(?=^\w+: short|^What)", printed, re.M | re.S)}
    table = README.split("| AP | shapes | bccd | voc_mini |")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 9
    for name, *cells, _ in rows:
        for data, cell in zip(("shapes", "bccd", "voc_mini"), cells):
            (wanted,) = [gain or ap for what, ap, gain in parts[data] if what == name]
            assert cell.lstrip("+") == wanted, (name, data)
