"""Every config of the zoo builds, tells its reference and its command; every field of the schema is used."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from detres.build import build_model
from detres.cli import build_parser
from detres.config import Config, RPNConfig, Section
from detres.config_file import format_config, load_config
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.train import train

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ZOO = [path for path in CONFIGS if re.search(r"_(fpn|c4)_(1x|3x|voc)$", path.stem)]
SEGMENTATION = [path for path in CONFIGS if path not in ZOO and re.search(r"_(1x|3x|voc)$", path.stem)]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def _header(path: Path) -> str:
    return "".join(line[1:] for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds_and_tells_where_its_values_come_from(path):
    resolved = load_config(path)
    assert f"# configs/{path.name}:" in format_config(resolved) and "# configs/_base/" in format_config(resolved)
    with torch.device("meta"):
        model = build_model(resolved.config.model, num_classes=20, num_semantic=5 * resolved.config.model.is_panoptic)
    heads = getattr(model, "roi_heads", None)
    assert (heads is not None and heads.mask_head is not None) == resolved.config.model.has_masks
    assert (heads is not None and heads.keypoint_head is not None) == resolved.config.model.has_keypoints
    assert resolved.config.data.train and resolved.config.data.val


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_gives_reference_and_command(path):
    header = _header(path)
    assert re.search(r"^   reference  \S", header, re.M)
    (command,) = re.findall(r"^   command    (.+)", header, re.M)
    for part in command.split(" && "):
        program, *arguments = shlex.split(part)
        if program == "detres":
            args, _ = build_parser().parse_known_args(arguments)
            assert getattr(args, "config", Path(f"configs/{path.name}")) == Path(f"configs/{path.name}")
        else:
            assert part.startswith("make ")


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_zoo_name_says_what_is_inside(path):
    kind, depth, layout, schedule = re.fullmatch(r"(\w+)_r(\d+)_(fpn|c4)_(1x|3x|voc)", path.stem).groups()
    is_dense = kind in ("retinanet", "fcos")
    config = load_config(path).config
    point_rend = config.model.mask_head.type == "point_rend"
    backbone = config.model.backbone
    assert ("pointrend_" * point_rend + config.model.name, backbone.depth, backbone.layout) == (
        kind, int(depth), layout)
    steps = {"1x": (90_000, (60_000, 80_000)), "3x": (270_000, (210_000, 250_000)), "voc": (18_000, (12_000, 16_000))}
    assert (config.train.steps, config.train.milestones) == steps[schedule]
    assert (config.train.batch_size, config.train.lr, config.data.skip_empty) == (16, 0.01 if is_dense else 0.02, True)
    assert config.model.fpn.top == {"retinanet": "c5", "fcos": "p5"}.get(kind, "pool")
    assert config.output == f"runs/{path.stem}"
    assert config.eval.metrics == (("voc",) if schedule == "voc" else ("coco",))
    assert ("no published reference known" in _header(path)) == (
        depth == "18" or kind == "cascade_rcnn" or (depth, layout, schedule) == ("101", "c4", "1x")
        or (schedule == "voc" and layout == "fpn")), "R18 and what nobody published have none; the others cite one"


def test_zoo_is_complete():
    names = {path.stem for path in ZOO}
    parts = [(depth, layout) for depth in (18, 50, 101) for layout in ("fpn", "c4")]
    coco = {f"{kind}_rcnn_r{depth}_{layout}_{schedule}" for kind in ("faster", "mask") for depth, layout in parts
            for schedule in ("1x", "3x")}
    others = {f"{kind}_r50_fpn_{schedule}" for schedule in ("1x", "3x") for kind in (
        "cascade_rcnn", "cascade_mask_rcnn", "keypoint_rcnn", "pointrend_mask_rcnn")} | {"keypoint_rcnn_r101_fpn_3x"}
    dense = {"retinanet_r50_fpn_1x", "retinanet_r50_fpn_3x", "retinanet_r101_fpn_3x", "fcos_r50_fpn_1x",
             "rpn_r50_fpn_1x", "rpn_r50_c4_1x"}
    assert names == coco | others | dense | {f"faster_rcnn_r{depth}_{layout}_voc" for depth, layout in parts}


@pytest.mark.parametrize("path", SEGMENTATION, ids=lambda path: path.stem)
def test_segmentation_name_says_what_is_inside(path):
    kind, depth, schedule = re.fullmatch(r"(\w+)_r(\d+)_(1x|3x|voc)", path.stem).groups()
    config = load_config(path).config
    model, steps = config.model, {"1x": 90_000, "3x": 270_000, "voc": 20_000}
    assert (model.name, model.backbone.depth, config.train.steps) == (kind, int(depth), steps[schedule])
    assert model.backbone.layout == ("dc4" if schedule == "voc" else "fpn") and config.output == f"runs/{path.stem}"
    assert model.semantic_head.loss_weight == (0.5 if model.is_panoptic else 1)
    assert config.data.train.split == ("2012_trainaug" if schedule == "voc" else "panoptic_train2017")


def test_segmentation_is_complete():
    assert {path.stem for path in SEGMENTATION} == {
        "fcn_r50_voc", "deeplabv3_r50_voc", "deeplabv3_r101_voc", "deeplabv3_plus_r50_voc", "semantic_fpn_r50_1x",
        "panoptic_fpn_r50_1x", "panoptic_fpn_r50_3x", "panoptic_fpn_r101_3x"}


def test_c4_is_detectron2s():
    """Numbers of Detectron2's config/defaults.py and Base-RCNN-C4.yaml."""
    model = load_config("configs/mask_rcnn_r50_c4_1x.yaml").config.model
    assert model.anchors.sizes == ((32, 64, 128, 256, 512),) and model.box_head.resolution == 14
    assert model.rpn == RPNConfig(pre_nms_topk_train=12000, pre_nms_topk_test=6000, post_nms_topk_train=2000,
                                  post_nms_topk_test=1000)


def _fields(section: type[Section]):
    for name, field in section.model_fields.items():
        yield f"{section.__name__}.{name}"
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from _fields(inner)


def labelled_images(folder: Path) -> None:
    """Two classes of one image each, in folders."""
    for split in ("train", "val"):
        for name in ("red", "blue"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), name).save(folder / split / name / "0.png")


def located_images(folder: Path) -> None:
    """A class with one object in its one image, as a table."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "images" / "a.png")
    rows = [f"a.png,n1,0,{split},4,4,20,20" for split in ("train", "val")]
    (folder / "boxes.csv").write_text("\n".join(["file,wnid,label,split,xmin,ymin,xmax,ymax", *rows]))
    (folder / "classes.txt").write_text("n1\tred")


def test_every_field_is_read(tmp_path, monkeypatch):
    """Watches one step of training, of every kind of model: a field that no code asks for would be a setting without
    effect.

    `build.py` hands whole sections on as keyword arguments; constructors refuse what they do not know.
    """
    read = set()

    def caller() -> str:
        return sys._getframe(2).f_globals.get("__name__", "")

    def watched_get(self, name):
        if caller().startswith("detres.") and caller() not in ("detres.config", "detres.config_file"):
            read.add(f"{type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    def watched_dump(self, **options):
        if caller() in ("detres.build", "detres.evaluation.run") or caller().startswith("detres.data."):
            read.update(f"{type(self).__name__}.{name}" for name in type(self).model_fields)
        return BaseModel.model_dump(self, **options)

    data = write_shapes(tmp_path / "data", 2, options=ShapesOptions("easy", size=(48, 64)), val_images=1,
                        formats=("coco",), progress=False)
    detector = [f"data.train={data}", f"data.val={data}", f"output={tmp_path / 'run'}", "data.workers=0",
                "train.steps=1", "train.batch_size=2", "train.reference_batch_size=2",
                "model.input.min_size=48", "model.input.max_size=64", "model.rpn.post_nms_topk_test=5"]
    point_rend = [*detector, "model.mask_head.type=point_rend", f"output={tmp_path / 'point_rend'}"]
    alternating = [*detector, "train.alternate=true", f"output={tmp_path / 'alternating'}"]
    segmenter = [*detector, "data.augment.crop_size=64", f"output={tmp_path / 'semantic'}"]
    augmented = [*detector, f"output={tmp_path / 'augmented'}", "data.sampling.name=repeat_factor",
                 *(f"data.augment.{name}={{}}" for name in ("photometric", "rand_augment", "affine", "iou_crop",
                                                            "copy_paste", "mosaic", "mixup"))]
    panoptic = [*segmenter, f"output={tmp_path / 'panoptic'}"]
    labelled_images(tmp_path / "images")
    classifier = ["model.name=classifier", "model.input.min_size=32", "model.input.crop=32", "data.workers=0",
                  "model.backbone.weights=null", "model.backbone.width=8", "train.steps=1",
                  f"data.train={tmp_path / 'images'}", f"data.val={tmp_path / 'images'}",
                  f"output={tmp_path / 'classes'}", "train.schedule=plateau", "train.eval_every=1",
                  "train.batch_size=2", "train.reference_batch_size=2"]
    located_images(tmp_path / "boxes")
    localizer = [*classifier, "model.name=localizer", "model.backbone.layout=c5", "model.anchors.sizes=[[16]]",
                 f"data.train={tmp_path / 'boxes'}", f"data.val={tmp_path / 'boxes'}",
                 f"output={tmp_path / 'localizer'}"]
    regions = [*localizer, "model.name=region_classifier", f"data.proposals={tmp_path / 'localizer'}",
               "model.box_head.context=4", f"output={tmp_path / 'regions'}"]
    monkeypatch.setattr("detres.engine.train.plot_curves", lambda *_, **options: None)  # most of the time, and reads no field
    monkeypatch.setattr(Section, "__getattribute__", watched_get)
    monkeypatch.setattr(Section, "model_dump", watched_dump, raising=False)
    for overrides in (detector, augmented, point_rend, alternating):
        train(load_config("configs/demo.yaml", overrides).config)
    train(load_config("configs/shapes_deeplabv3_r18.yaml", segmenter).config)
    train(load_config("configs/shapes_panoptic_fpn_r18.yaml", panoptic).config)
    for overrides in (classifier, localizer, regions):
        train(load_config(None, overrides).config)
    with torch.device("meta"):
        for name in ("keypoint_rcnn", "cascade_mask_rcnn", "retinanet", "fcos"):  # trained as other detectors
            build_model(load_config(None, [f"model.name={name}", "model.dense_head.box_loss=giou"]).config.model, 3)
    unread = [name for name in _fields(Config) if name not in read]
    assert not unread, f"fields that nothing reads: {', '.join(unread)}"
