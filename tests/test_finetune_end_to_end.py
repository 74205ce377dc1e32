"""Fine-tuning as a user does it: weights of a name, data of one's own, configs/finetune; what docs/finetune.md says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import detres
from detres.cli import build_parser, main
from detres.config_file import load_config
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.checkpoint import find_weights, load_weights, save_weights
from detres.weights import zoo

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "configs/finetune/small.yaml"
SHORT = ["train.steps=1", "train.batch_size=2", "train.reference_batch_size=2", "train.warmup_steps=0",
         "data.workers=0", "train.eval_every=1", "train.precision=fp32"]
TINY = ["model.input.min_size=64", "model.input.max_size=96", "model.backbone.width=8", "model.fpn.channels=16",
        "model.box_head.fc_dim=32", "model.mask_head.channels=16", "model.mask_head.convs=1",
        "model.rpn.post_nms_topk_train=50", "model.rpn.post_nms_topk_test=50"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return write_shapes(folder, 6, options=ShapesOptions("easy", size=(64, 96)), val_images=3, progress=False)


@pytest.fixture(scope="module")
def mine(shapes) -> Path:
    """COCO JSON of one's own: triangles are people here, and crosses new. In two files, the second without masks."""
    content = json.loads((shapes / "annotations/instances_train.json").read_text())
    for category in content["categories"]:
        category["name"] = {"triangle": "person"}.get(category["name"], category["name"])
    (shapes / "train/mine.json").write_text(json.dumps(content))
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (shapes / "train/boxes.json").write_text(json.dumps(content))
    return shapes / "train/mine.json"


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    """A run: a small Mask R-CNN of disc, triangle and cross, whose batch norms all train."""
    run = tmp_path_factory.mktemp("run") / "shapes"
    assert main(["train", str(ROOT / "configs/demo.yaml"), *SHORT, *TINY, "train.eval_every=null", f"output={run}",
                 f"data.train={shapes}", "data.val=null"]) == 0
    return run


def finetune(weights, data, run, *more) -> list[str]:
    return ["train", str(SMALL), f"weights={weights}", f"data.train={data}", f"output={run}", *SHORT, *more]


def test_weights_of_torchvision_by_name(mine, shapes, tmp_path, monkeypatch, capsys):
    """From the command of the issue to the file for torchvision, with random numbers in the place of the published."""
    file = tmp_path / Path(zoo.resolve("maskrcnn_resnet50_fpn").file).name
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(theirs.state_dict(), file)
    monkeypatch.setattr(zoo, "fetch", lambda name: file if name == "maskrcnn_resnet50_fpn" else pytest.fail(name))
    run = tmp_path / "run"
    assert main(finetune("maskrcnn_resnet50_fpn", mine, run, "model.input.min_size=64", "model.input.max_size=96",
                         "train.precision=bf16", "train.lr=1e-4")) == 0
    printed = capsys.readouterr()
    assert "layers of classes begin anew, but for person, known to both" in printed.out + printed.err
    assert "data.val is not given: nothing is evaluated" in printed.out + printed.err

    theirs = torch.load(file, weights_only=True)
    file.unlink()  # a run needs its start no longer
    tensors, meta = load_weights(find_weights(run))
    model = load_config(run).config.model
    assert meta.classes == ("disc", "person", "cross") and model.weights == "maskrcnn_resnet50_fpn"
    assert (model.backbone.norm, model.backbone.norm_eps, model.anchors.convention) == (
        "frozen_bn", 1e-5, "torchvision")
    rows = {"box_predictor.cls": "box_predictor.cls_score", "box_predictor.box": "box_predictor.bbox_pred",
            "mask_head.predict": "mask_predictor.mask_fcn_logits"}
    for ours, name in rows.items():
        found, source = tensors[f"roi_heads.{ours}.weight"], theirs[f"roi_heads.{name}.weight"]
        size = 4 if ours.endswith("box") else 1
        assert torch.allclose(found[size:2 * size], source[size:2 * size], atol=1e-3), "person: 2nd here, 1st there"
        assert not torch.allclose(found[:size], source[:size], atol=1e-3), "others are new"
    for stage, is_frozen in (("conv1", True), ("layer1.0.conv1", True), ("layer2.0.conv1", False)):
        same = torch.equal(tensors[f"backbone.body.{stage}.weight"], theirs[f"backbone.body.{stage}.weight"])
        assert same == is_frozen, stage

    assert main(["train", str(run), "--resume"]) == 0
    assert main(["eval", str(run), "--data", str(mine), "--json", str(tmp_path / "numbers.json")]) == 0
    assert "segm/AP" in json.loads((tmp_path / "numbers.json").read_text())
    assert main(["predict", str(run), str(shapes / "val"), "--out", str(tmp_path / "found")]) == 0
    assert main(["export", str(run), str(tmp_path / "theirs.pth"), "--format", "torchvision"]) == 0
    back = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    back.load_state_dict(torch.load(tmp_path / "theirs.pth", weights_only=True))


def test_boxes_alone_for_weights_with_masks(trained, mine, tmp_path, capsys):
    boxes, run = mine.with_name("boxes.json"), tmp_path / "run"
    assert main(finetune(trained, boxes, run)) != 0
    assert re.search("must have a segmentation.*got .* without.*model.name=faster_rcnn", capsys.readouterr().err)
    assert not run.exists(), "the mistake can be mended under the same name"
    assert main(finetune(trained, boxes, run, "model.name=faster_rcnn", f"data.val={boxes}")) == 0
    printed = capsys.readouterr()
    assert "but for disc, cross, known to both; their mask head is left out" in printed.out + printed.err
    tensors, meta = load_weights(find_weights(run))
    assert meta.config["model"]["name"] == "faster_rcnn" and not any("mask" in name for name in tensors)
    assert "bbox/AP" in json.loads((run / "results.json").read_text())


def test_resume_does_not_look_for_the_weights(trained, mine, tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(trained, start)
    assert main(finetune(start, mine, run, "model.backbone.norm=frozen_bn", "train.checkpoint_every=1")) == 0
    shutil.rmtree(start)
    before = (run / "results.json").read_text()
    assert main(["train", str(run), "--resume"]) == 0 and (run / "results.json").read_text() == before
    model = load_config(run / "config.yaml").config.model
    assert (model.name, model.backbone.norm, model.input.min_size) == ("mask_rcnn", "frozen_bn", 64)


def test_other_kinds_of_models(shapes, tmp_path):
    """The same file fine-tunes a model of pixels."""
    config, run = ROOT / "configs/shapes_deeplabv3_r18.yaml", tmp_path / "run"
    small = ["model.backbone.width=8", "model.input.min_size=64", "model.input.max_size=96"]
    assert main(["train", str(config), *SHORT, *small, "train.eval_every=null", f"data.train={shapes}",
                 f"data.val={shapes}", f"output={run}"]) == 0
    assert main(finetune(run, shapes, tmp_path / "tuned", f"data.val={shapes}")) == 0
    assert "sem_seg/mIoU" in json.loads((tmp_path / "tuned/results.json").read_text())


@pytest.mark.parametrize("path", sorted(SMALL.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs(path, trained, monkeypatch):
    """They say nothing of the model, which is that of the weights, and their headers are like those of the zoo."""
    monkeypatch.setattr(zoo, "fetch", lambda name: find_weights(trained))
    monkeypatch.chdir(ROOT)
    config = load_config(path, [] if path != SMALL else [f"weights={trained}"]).config
    before = load_config(trained).config.model
    assert config.model.model_copy(update={"weights": None}) == before and config.model.weights
    options = config.train
    assert options.batch_size == options.reference_batch_size == 4 and options.lr <= 0.02 * 4 / 16
    header = "".join(line[1:] for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert re.search(r"^   reference  \S", header, re.M) and re.search(r"^   detres     \S", header, re.M)
    (command,) = re.findall(r"^   command    (.+)", header, re.M)
    for part in command.split(" && "):
        args, _ = build_parser().parse_known_args(shlex.split(part)[1:])
        assert getattr(args, "config", Path(f"configs/finetune/{path.name}")) == Path(f"configs/finetune/{path.name}")


PAGE = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")


def stand_in_balloon(shapes: Path, folder: Path) -> None:
    """Images and VIA's polygons, in the layout of balloon."""
    for split in ("train", "val"):
        content = json.loads((shapes / f"annotations/instances_{split}.json").read_text())
        (folder / split).mkdir(parents=True)
        photos = {}
        for image in content["images"]:
            shutil.copy(shapes / split / image["file_name"], folder / split)
            boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]
            outlines = [{"name": "polygon", "all_points_x": [int(x), int(x + w), int(x)],
                         "all_points_y": [int(y), int(y), int(y + h)]}
                        for x, y, w, h in boxes]
            photos[image["file_name"]] = {"filename": image["file_name"], "regions": {
                str(i): {"shape_attributes": outline, "region_attributes": {}} for i, outline in enumerate(outlines)}}
        (folder / split / "via_region_data.json").write_text(json.dumps(photos))


def without_masks(run: Path, file: Path) -> Path:
    tensors, meta = load_weights(find_weights(run))
    meta.config["model"]["name"] = "faster_rcnn"
    save_weights(file, {name: tensor for name, tensor in tensors.items() if "mask_head" not in name}, meta)
    return file


def test_the_guide_runs_as_written(trained, mine, shapes, tmp_path, monkeypatch, capsys):
    """In an empty folder with the configs; small weights stand for published ones, drawn scenes for photographs."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    boxes = without_masks(trained, tmp_path / "faster_rcnn.safetensors")
    monkeypatch.setattr(zoo, "fetch", lambda name: boxes if name.startswith("faster") else find_weights(trained))
    stand_in_balloon(shapes, Path("datasets/balloon"))
    shutil.copytree(shapes / "voc", "datasets/BCCD_Dataset/BCCD")
    lists = Path("datasets/BCCD_Dataset/BCCD/ImageSets/Main")
    shutil.copy(lists / "val.txt", lists / "test.txt")
    for split in ("train", "val"):
        shutil.copytree(shapes / "train", f"my/{split}")
        shutil.copy(mine, f"my/{split}.json")
    names: dict = {}
    count = 0
    for language, code in re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL):
        if language == "python":
            exec(compile(code, "finetune.md", "exec"), names)
            continue
        for command in code.splitlines():
            words = shlex.split(command)
            count += 1
            status = main(words[1:] + SHORT * (words[1] == "train"))
            is_export = words[1] == "export"  # torchvision has no networks as narrow as those that stand in
            assert words[0] == "detres" and status == is_export, command
    assert count == 9 and names["coco"]["annotations"]
    printed = capsys.readouterr()
    (said,) = re.findall(r"^Weights \S+: .*$", PAGE, re.MULTILINE)
    assert said.replace("person", "disc, cross") in printed.out + printed.err
    assert "must be one that torchvision has, got mask_rcnn" in printed.err
    for file in ("found/predictions.json", "runs/bccd_from_masks/results.json", "runs/balloon/errors"):
        assert Path(file).exists(), file


def test_figures_of_the_guide_are_those_measured():
    metrics = json.loads((ROOT / "results/finetune_cpu.json").read_text())["metrics"]
    rows = re.findall(r"^\| (BCCD|balloon) \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for data, metric, tuned, scratch in rows:
        for figure, run in ((tuned, data.lower()), (scratch, f"{data.lower()}_scratch")):
            assert figure == f"{metrics[f'{run}/{metric}']:.3f}", (data, metric)
    others = re.findall(r"segm/AP (0\.\d+)", PAGE)
    assert others == [f"{metrics[f'{run}/segm/AP']:.3f}" for run in ("balloon_lr", "balloon_frozen")]


def test_what_the_guide_names_exists():
    for file in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / file).exists(), file
    for name in re.findall(r"`([\w-]+/\w+_\dx|\w+_resnet\d+\w*)`", PAGE):
        assert zoo.resolve(name).url.startswith("https://"), name
