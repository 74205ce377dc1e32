"""`detres data convert`, `split`, `merge` and `subset` as they are typed, and the guide."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from detres.cli import main
from detres.config import SourceConfig
from detres.data.dataset import load_dataset
from detres.data.shapes import ShapesOptions, write_shapes
from detres.data.splits import find_splits

ROOT = Path(__file__).parents[3]
# A network and a training too small to learn anything.
SHORT = ["train.steps=1", "train.batch_size=2", "train.reference_batch_size=2", "train.warmup_steps=0",
         "train.eval_every=1", "model.input.min_size=64", "model.input.max_size=64", "model.backbone.width=8",
         "model.fpn.channels=8", "model.rpn.post_nms_topk_test=2"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return str(write_shapes(folder, 12, options=ShapesOptions("easy", size=(64, 96)), val_images=4, progress=False))


def counts(folder):
    return {split.name: len(split.load().records) for split in find_splits(folder)}


def test_what_is_printed(shapes, tmp_path, capsys):
    assert not main(["data", "convert", shapes, str(tmp_path / "yolo"), "--to", "yolo"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("yolo: yolo, 3 classes")
    assert lines[1].startswith("  train  ") and lines[1].endswith(" objects in 12 images")
    assert any(line.startswith("changed: YOLO numbers classes from 0") for line in lines)


def test_split(shapes, tmp_path):
    out = tmp_path / "out"
    assert not main(["data", "split", shapes, str(out), "--parts", "train=10,val=3,test", "--to", "voc"])
    assert counts(out) == {"train": 10, "val": 3, "test": 3}


def test_merge_and_rename(shapes, tmp_path):
    main(["data", "convert", shapes, str(tmp_path / "voc"), "--to", "voc", "--copy-images"])
    assert not main(["data", "merge", shapes, str(tmp_path / "voc"), str(tmp_path / "out"), "--to", "coco", "--rename",
                     "disc=ball", "--merge-classes", "triangle,cross=corners"])
    assert counts(tmp_path / "out") == {"instances_train": 24, "instances_val": 8}
    assert load_dataset(SourceConfig(path=str(tmp_path / "out")), "val").classes == ("ball", "corners")
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert {"what": "16 image files have the content of another: both are kept", "count": 16} in report["changed"]


def test_merging_other_classes_is_told(shapes, tmp_path, capsys):
    """What is annotated in one of them only is taught as background by the images of the other."""
    assert not main(["data", "subset", str(shapes), str(tmp_path / "discs"), "--classes", "disc"])
    assert not main(["data", "merge", str(shapes), str(tmp_path / "discs"), str(tmp_path / "out")])
    assert "2 are annotated in some of the data sets only" in capsys.readouterr().out
    assert not main(["data", "merge", str(shapes), str(shapes), str(tmp_path / "same")])
    assert "annotated in some" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ("convert", "shard"))
def test_data_that_are_refused_leave_nothing_and_name_the_option(shapes, tmp_path, capsys, command):
    broken = shutil.copytree(shapes, tmp_path / "broken")
    file = broken / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    arguments = ["data", command, str(broken), str(tmp_path / "out")]
    assert main(arguments) == 1 and not (tmp_path / "out").exists()
    assert "or give --drop-invalid to leave out" in capsys.readouterr().err
    assert main([*arguments, "--drop-invalid"]) == 0 and len(counts(tmp_path / "out")) == 2
    if command == "shard":
        return
    lost = json.loads((tmp_path / "out/conversion.json").read_text())["lost"]
    assert {"what": "invalid, left out: 1 (boxes without area)", "count": 1} in lost
    assert main([*arguments[:-1], str(tmp_path / "strict"), "--drop-invalid", "--strict"])


def test_ids_that_clash_are_counted_anew(shapes, tmp_path, capsys):
    main(["data", "convert", shapes, str(tmp_path / "copy"), "--copy-images"])
    assert not main(["data", "merge", shapes, str(tmp_path / "copy"), str(tmp_path / "out")])
    assert "changed: ids of 32 images are counted from 1" in capsys.readouterr().out


def test_subset(shapes, tmp_path):
    (tmp_path / "ids.txt").write_text("".join(f"{record.path.stem}\n" for split in find_splits(shapes)
                                              for record in split.load().records[:2]))
    assert not main(["data", "subset", shapes, str(tmp_path / "out"), "--ids", str(tmp_path / "ids.txt")])
    assert counts(tmp_path / "out") == {"instances_train": 2, "instances_val": 2}


def test_what_is_invalid_is_left_out_by_the_option_that_is_told(shapes, tmp_path, capsys):
    file = Path(shapes) / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = None
    (tmp_path / "val.json").write_text(json.dumps(content))
    words = ["data", "convert", str(tmp_path / "val.json"), str(tmp_path / "out"), "--images", f"{shapes}/val"]
    assert main(words) and "give --drop-invalid to leave out" in capsys.readouterr().err
    assert not main([*words, "--drop-invalid"])


@pytest.mark.parametrize("words, message", (
    (["split", "--parts", "train=x"], "must be NAME=SIZE"), (["split", "--parts", "a=1,a=2"], "must be NAME=SIZE"),
    (["split", "--parts", "train=1.0"], "a fraction below 1 or a number"),
    (["convert", "--rename", "x"], "must be OLD=NEW"), (["convert", "--rename", "x=y"], "class must be one of"),
    (["convert", "--to", "voc", "--strict"], "must lose nothing"),
    (["subset", "--ids", "nothing"], "image must be in the data set")))
def test_errors_are_one_line(shapes, tmp_path, capsys, words, message):
    try:
        status = main(["data", words[0], shapes, str(tmp_path / "out"), *words[1:]])
    except SystemExit as error:
        status = error.code
    assert status and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_guide_runs_as_written(run_guide, tmp_path, capsys):
    commands = run_guide("docs/convert.md", SHORT)
    printed = re.search(r"prints\n\n```\n(.*?)```", (ROOT / "docs/convert.md").read_text(), re.DOTALL)[1]
    assert len(commands) >= 10 and printed in capsys.readouterr().out
    assert counts(Path("datasets/shapes-yolo")) == {"train": 40, "val": 8}


@pytest.mark.parametrize("options, reason", (([], "what to choose must be said"), (["--ids", "no.txt"], "must exist")))
def test_a_subset_of_nothing(shapes, tmp_path, capsys, options, reason):
    try:
        assert main(["data", "subset", shapes, str(tmp_path / "out"), *options]) == 1
    except SystemExit as end:
        assert end.code == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()
