"""Weights go to torchvision and Detectron2 under their names, load there, and come back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from detres.build import build_model
from detres.cli import main
from detres.config import Config, ModelConfig
from detres.engine.checkpoint import WeightsMeta, save_weights
from detres.weights import detectron2
from detres.weights import torchvision as tv
from detres.weights.detectron2_config import translate
from detres.weights.detectron2_defaults import DEFAULTS
from detres.weights.export import export
from detres.weights.importers import convert, read_weights
from detres.weights.source import merged
from detres.weights.torchvision_calls import call_for

CLASSES = 5
OF_NORMS = "num_batches_tracked"
V2 = {"backbone": {"norm": "bn"}, "fpn": {"norm": "bn"}, "rpn": {"convs": 2}, "mask_head": {"norm": "bn"},
      "box_head": {"convs": 4, "fcs": 1, "norm": "bn"}}
NINE = {"anchors": {"sizes": [[32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406], [512, 645, 812]]}}
DC4 = {"backbone": {"layout": "dc4", "norm": "bn"}}
DETECTION = "models.detection."
PYRAMID = DETECTION + "backbone_utils.resnet_fpn_backbone(backbone_name='resnet18', weights=None"
# Our model, and the call of torchvision that builds it.
THEIRS = [
    ({"name": "classifier", "backbone": {"depth": 18}}, "models.resnet18(num_classes=5)"),
    ({"name": "classifier", "backbone": {"groups": 32, "group_width": 4, "norm": "bn"}},
     "models.resnext50_32x4d(num_classes=5)"),
    ({"name": "classifier", "backbone": {"group_width": 128}}, "models.wide_resnet50_2(num_classes=5)"),
    *(({"name": name, **V2}, f"{DETECTION}{theirs}_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=6)")
      for name, theirs in (("faster_rcnn", "fasterrcnn"), ("mask_rcnn", "maskrcnn"))),
    *(({"name": name}, f"{DETECTION}{theirs}_resnet50_fpn(weights=None, weights_backbone=None, num_classes=6)")
      for name, theirs in (("faster_rcnn", "fasterrcnn"), ("mask_rcnn", "maskrcnn"))),
    ({"name": "keypoint_rcnn", "keypoint_head": {"num_keypoints": 7}},
     f"{DETECTION}keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=6, num_keypoints=7)"),
    ({"name": "mask_rcnn", "backbone": {"depth": 18}}, f"{DETECTION}MaskRCNN(backbone=torchvision.{PYRAMID}), num_classes=6)"),
    ({"name": "keypoint_rcnn", "backbone": {"depth": 18}},
     f"{DETECTION}KeypointRCNN(backbone=torchvision.{PYRAMID}), num_classes=6, num_keypoints=17)"),
    ({"name": "retinanet", "fpn": {"top": "p5"}, **NINE},
     f"{DETECTION}retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=6)"),
    ({"name": "retinanet", "fpn": {"top": "c5"}, "dense_head": {"norm": "gn"}, **NINE},
     f"{DETECTION}retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=6)"),
    ({"name": "retinanet", "backbone": {"depth": 18}, "fpn": {"top": "c5"}, **NINE},
     f"{DETECTION}RetinaNet(backbone=torchvision.{PYRAMID}, returned_layers=[2, 3, 4], extra_blocks="
     "torchvision.ops.feature_pyramid_network.LastLevelP6P7(in_channels=512, out_channels=256)), num_classes=6)"),
    ({"name": "fcos", "fpn": {"top": "p5"}, "dense_head": {"norm": "gn", "box_loss": "giou"}},
     f"{DETECTION}fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=6)"),
    ({"name": "fcn", **DC4},
     "models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)"),
    ({"name": "deeplabv3", "semantic_head": {"aux_weight": 0}, "backbone": {"layout": "dc4", "depth": 101}},
     "models.segmentation.deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=5, aux_loss=False)"),
]


def config(name="mask_rcnn", **sections) -> ModelConfig:
    return ModelConfig.model_validate({"name": name, **sections})


def random_tensors(model: ModelConfig, num_semantic=0) -> dict[str, torch.Tensor]:
    """Of the model; each begins elsewhere in one stretch of noise, as to draw all of it takes long."""
    with torch.device("meta"):
        state = build_model(model, CLASSES, num_semantic).state_dict()
    noise = torch.rand(max(tensor.numel() for tensor in state.values()) + len(state))
    return {name: noise[i:i + tensor.numel()].view(tensor.shape) if tensor.is_floating_point() else
            torch.zeros(tensor.shape, dtype=tensor.dtype) for i, (name, tensor) in enumerate(state.items())}


def without_counters(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(OF_NORMS)}


@pytest.mark.parametrize("sections, call", THEIRS, ids=[call.split("(")[0].rpartition(".")[2] for _, call in THEIRS])
def test_torchvision_and_back(sections, call):
    model = config(**sections)
    tensors = random_tensors(model)
    exported = export(tensors, model, CLASSES, tv.FAMILIES)
    assert exported.usage == f"Load it by load_state_dict(torch.load(FILE)) into\n  torchvision.{call}"
    with torch.device("meta"):
        theirs = eval(f"torchvision.{call}", {"torchvision": torchvision})  # what a user is told to write
    theirs.load_state_dict(exported.content, assign=True)
    weights = convert(without_counters(theirs.state_dict()), Path("back.pth"))
    expected, found = without_counters(tensors), without_counters(weights.tensors)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert weights.meta.config["model"]["name"] == model.name and len(weights.meta.classes) == CLASSES


def test_what_torchvision_computes_otherwise():
    model = config("faster_rcnn", input={"channel_order": "bgr", "min_size": 600}, box_head={"score_thresh": 0.01})
    found = export(random_tensors(model), model, CLASSES, tv.FAMILIES).differences
    assert {"input.channel_order: rgb there, bgr in this model", "input.min_size: 800 there, 600 in this model",
            "box_head.score_thresh: 0.05 there, 0.01 in this model", "pool.aligned: False there, True in this model",
            "anchors.convention: torchvision there, detectron2 in this model"} <= set(found)
    as_there = ModelConfig.model_validate(merged({"name": "faster_rcnn"}, tv.rcnn_conventions()))
    assert export(random_tensors(as_there), as_there, CLASSES, tv.FAMILIES).differences == ()


LACKING = [
    ({"backbone": {"preact": True}}, ("torchvision", "Detectron2"), "no backbone.preact=True"),
    ({"backbone": {"stem": "deep", "avg_down": True}}, ("torchvision", "Detectron2"),
     "no backbone.stem=deep, no backbone.avg_down=True"),
    ({"backbone": {"shortcut": "A"}}, ("torchvision", "Detectron2"), "no backbone.shortcut=A"),
    ({"box_head": {"global_context": True}}, ("torchvision", "Detectron2"), "no box_head.global_context=True"),
    ({"backbone": {"norm": "gn"}}, ("torchvision",), "no backbone.norm=gn"),
    ({"backbone": {"stride_in_1x1": True}}, ("torchvision",), "no backbone.stride_in_1x1=True"),
    ({"backbone": {"deform_stages": 3}}, ("torchvision",), "no backbone.deform_stages=3"),
    ({"backbone": {"width": 32, "depth": 18}}, ("torchvision", "Detectron2"), "no backbone.width=32"),
    ({"fpn": {"channels": 128}}, ("torchvision",), "backbone.fpn.inner_blocks.0.0.weight (256, 256, 1, 1) there, "
                                                   "(128, 256, 1, 1) here"),
    ({"mask_head": {"convs": 2}}, ("torchvision",), "roi_heads.mask_head.2.0.weight"),
    ({"backbone": {"groups": 8, "group_width": 8}}, ("torchvision",), "no function or class of its builds that"),
    ({"rpn": {"convs": 2}}, ("Detectron2",), "no rpn.head.convs.1.weight"),
    ({"name": "cascade_rcnn"}, ("torchvision",), "has no roi_heads.box_head.0.fcs.0.weight"),
    ({"mask_head": {"type": "point_rend"}}, ("torchvision",), "its R-CNN, has no roi_heads.mask_head.coarse_head.fcs.0.weight and"),
    ({"name": "semantic_fpn"}, ("torchvision",), "has no head.scales.0.0"),
    ({"name": "retinanet", "fpn": {"top": "c5"}}, ("torchvision",), "has 9 anchors a cell, this one 3"),
    ({"name": "faster_rcnn", "backbone": {"layout": "dc5"}, "anchors": {"sizes": [[32, 64]]}}, ("torchvision",),
     "layout dc5: no function or class of its builds that"),
    ({"name": "fcn", "backbone": {"layout": "dc4"}}, ("Detectron2",), "no backbone.layout=dc4"),
    ({"name": "deeplabv3_plus", "backbone": {"layout": "dc5"}}, ("Detectron2", "torchvision"), "has no head."),
    ({"name": "fcos", "fpn": {"top": "p5"}, "dense_head": {"box_loss": "giou"}}, ("Detectron2",), "has no head.centerness"),
    ({"name": "retinanet", "fpn": {"top": "p5"}}, ("Detectron2",), "no fpn.top=p5"),
    ({"name": "retinanet", "fpn": {"top": "c5"}, "dense_head": {"norm": "gn"}}, ("Detectron2",), "has no head.cls_norm.0"),
    ({"name": "classifier"}, ("Detectron2",), "has no fc.weight"),
]


@pytest.mark.parametrize("sections, toolkits, why", LACKING, ids=[why.rpartition("no ")[2] for *_, why in LACKING])
def test_models_that_they_do_not_have(sections, toolkits, why):
    model = config(**sections)
    tensors = random_tensors(model)
    for toolkit in toolkits:
        families = tv.FAMILIES if toolkit == "torchvision" else detectron2.FAMILIES
        with pytest.raises(ValueError, match=f"^model must be one that {toolkit} has, got {model.name}, ") as error:
            export(tensors, model, CLASSES, families)
        assert why in str(error.value) and str(error.value).endswith("Export as safetensors."), error.value


# ---- Detectron2 ----------------------------------------------------------------------------------------------------

ZOO = ["mask_rcnn_R_50_FPN_3x", "faster_rcnn_R_50_C4_1x", "cascade_mask_rcnn_R_50_FPN_3x", "keypoint_rcnn_R_50_FPN_3x",
       "retinanet_R_50_FPN_1x", "panoptic_fpn_R_50_3x"]
NOT_OF_US = ("pixel_mean", "pixel_std", "anchor_generator.cell_anchors")


@pytest.mark.parametrize("name", ZOO)
def test_detectron2_and_back(name, shared_data):
    """Its own keys and shapes; the settings are those of its config, but for its training."""
    folder = shared_data.parent / "reference/detectron2/state_dicts"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    shapes = {key: tuple(entry["shape"]) for key, entry in
              json.loads((folder / f"{name}.json").read_text())["state_dict"].items()}
    weights = convert({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, Path(f"{name}.pth"))
    model = Config.model_validate(weights.meta.config).model
    exported = export(weights.tensors, model, len(weights.meta.classes), detectron2.FAMILIES)
    found = {key: tuple(tensor.shape) for key, tensor in exported.content["model"].items()}
    assert found == {key: shape for key, shape in shapes.items() if not any(part in key for part in NOT_OF_US)}
    assert exported.differences == () and f"of {len(weights.meta.classes)} classes" in exported.usage
    assert_settings_are_of(yaml.safe_load((folder / f"{name}.cfg.yaml").read_text()), exported.settings)


OF_TRAINING = ("MIN_SIZE_TRAIN", "BATCH_SIZE", "LOSS", "BETA", "TOPK_TRAIN", "IOU_THRESHOLDS", "POSITIVE", "WEIGHTS",
               "FREEZE_AT", "MIN_KEYPOINTS")
OF_HEADS = {"GeneralizedRCNN": ("RETINANET", "SEM_SEG", "PANOPTIC"), "RetinaNet": ("RPN", "ROI_", "SEM_SEG", "PANOPTIC"),
            "PanopticFPN": ("RETINANET",)}


def assert_settings_are_of(theirs: dict, ours: dict) -> None:
    def leaves(tree, prefix=""):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]

    resolved = {**DEFAULTS, **dict(leaves(ours))}
    unread = OF_HEADS[theirs["MODEL"]["META_ARCHITECTURE"]]
    kinds = {"MASK_HEAD": theirs["MODEL"]["MASK_ON"], "KEYPOINT_HEAD": theirs["MODEL"]["KEYPOINT_ON"],
             "CASCADE": theirs["MODEL"]["ROI_HEADS"]["NAME"] == "CascadeROIHeads"}
    for key, value in leaves({name: theirs[name] for name in ("MODEL", "INPUT")}):
        if key in DEFAULTS and not any(part in key for part in (*OF_TRAINING, *unread)) and all(
                on or part not in key for part, on in kinds.items()) and not key.startswith(("INPUT.CROP", "MODEL.DEVICE")):
            assert normal(resolved[key]) == normal(value), key


def normal(value):
    return [normal(item) for item in value] if isinstance(value, (list, tuple)) else (
        round(value, 4) if isinstance(value, float) else value)


MODELS = [
    {}, {"name": "mask_rcnn", "backbone": {"norm": "gn"}, "fpn": {"norm": "gn", "channels": 128},
         "box_head": {"convs": 4, "fcs": 1, "norm": "gn", "fc_dim": 512, "class_agnostic": True}, "mask_head": {"norm": "gn"},
         "pool": {"sampling_ratio": 0}},
    {"name": "faster_rcnn", "backbone": {"depth": 18, "layout": "c4"}, "anchors": {"sizes": [[32, 64, 128]]},
     "box_head": {"resolution": 14, "nms_thresh": 0.3}, "input": {"channel_order": "bgr", "std": [1, 1, 1]}},
    {"name": "faster_rcnn", "backbone": {"layout": "dc5"}, "anchors": {"sizes": [[32, 64, 128]]}, "pool": {"type": "pool"}},
    {"name": "rpn", "rpn": {"nms_thresh": 0.6}},
    {"name": "cascade_rcnn", "cascade": {"ious": [0.6, 0.7, 0.8]}, "backbone": {"width": 32, "groups": 4, "group_width": 32}},
    {"name": "keypoint_rcnn", "keypoint_head": {"num_keypoints": 9, "convs": 2, "channels": 64}},
    {"name": "retinanet", "fpn": {"top": "c5"}, "dense_head": {"convs": 2, "topk": 500, "score_thresh": 0.1}},
    {"name": "semantic_fpn", "semantic_head": {"channels": 64}},
    {"name": "panoptic_fpn", "panoptic": {"stuff_area": 100}, "backbone": {"deform_stages": 3}},
]


@pytest.mark.parametrize("sections", MODELS, ids=lambda sections: sections.get("name", "default"))
def test_settings_of_detectron2_say_the_whole_model(sections):
    """Read back they give what is read in detection, without a note that something was lost."""
    model = config(**sections)
    tensors = random_tensors(model, 4 if model.is_panoptic else 0)
    exported = export(tensors, model, CLASSES, detectron2.FAMILIES)
    assert not [line for line in exported.differences if not line.startswith(("input.size_divisor", "input.antialias"))]
    fields, notes = translate(exported.settings)
    assert {note.key.rpartition(".")[2] for note in notes} <= {"NUM_CLASSES", "WEIGHT_DECAY_NORM"}
    there = ModelConfig.model_validate({**fields["model"], "backbone": {**fields["model"]["backbone"], "weights": None}})
    with torch.device("meta"):
        built = build_model(there, CLASSES, 4 if model.is_panoptic else 0).state_dict()
    assert {key: tensor.shape for key, tensor in built.items()} == {key: tensor.shape for key, tensor in tensors.items()}


def test_what_detectron2_cannot_be_told():
    model = config("keypoint_rcnn", box_head={"refine": True, "vote_thresh": 0.5}, pool={"canonical_side": 112},
                   anchors={"convention": "torchvision"}, keypoint_head={"score": "logit"}, input={"antialias": False})
    found = export(random_tensors(model), model, CLASSES, detectron2.FAMILIES).differences
    assert set(found) == {
        "input.antialias: True there, False in this model", "anchors.convention: detectron2 there, torchvision in this model",
        "pool.canonical_side: 224 there, 112 in this model", "box_head.refine: False there, True in this model",
        "box_head.vote_thresh: None there, 0.5 in this model", "keypoint_head.score: probability there, logit in this model"}
    point_rend = config(mask_head={"type": "point_rend"})
    assert "its PointRend" in export(random_tensors(point_rend), point_rend, CLASSES, detectron2.FAMILIES).differences[-1]


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    model = config("faster_rcnn", backbone={"depth": 18, "weights": None}, box_head={"fc_dim": 1024}, rpn={"min_size": 2.0})
    path = tmp_path_factory.mktemp("weights") / "ours.safetensors"
    tensors = {name: tensor.clone() for name, tensor in random_tensors(model).items()}  # they share memory
    save_weights(path, tensors, WeightsMeta(Config(model=model).model_dump(mode="json"), tuple("abcde"),
                                                          tuple(range(5)), 1, {}))
    return path


def test_the_command_to_torchvision(weights, tmp_path, capsys):
    out = tmp_path / "theirs.pth"
    assert main(["export", str(weights), str(out), "--format", "torchvision"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"Wrote {out}." and told[1].endswith("into") and told[2].startswith("  torchvision.models.detection.F")
    assert told[3] == "What torchvision does otherwise, unless it is told:"
    assert "  rpn.min_size: 0.001 there, 2 in this model" in told
    theirs = eval(told[2], {"torchvision": torchvision})
    theirs.load_state_dict(torch.load(out, weights_only=True))
    assert read_weights(out).tensors["roi_heads.box_predictor.cls.bias"].equal(
        read_weights(weights).tensors["roi_heads.box_predictor.cls.bias"])


def test_the_command_to_detectron2(weights, tmp_path, capsys):
    out = tmp_path / "theirs.pth"
    assert main(["export", str(weights), str(out), "--format", "detectron2"]) == 0
    told = capsys.readouterr().out
    assert f"Wrote {out}.\nWrote {out.with_suffix('.yaml')}.\n" in told and "of 5 classes" in told
    given = yaml.safe_load(out.with_suffix(".yaml").read_text())
    assert given["INPUT"] == {"FORMAT": "RGB"} and given["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert given["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False and given["MODEL"]["PROPOSAL_GENERATOR"] == {"MIN_SIZE": 2.0}
    assert set(torch.load(out, weights_only=True)) == {"model", "__author__"}
    back = tmp_path / "back.safetensors"
    assert main(["import", str(out), str(back), "--config", str(out.with_suffix(".yaml")), "--classes", "a,b,c,d,e"]) == 0
    assert all(torch.equal(tensor, read_weights(back).tensors[key]) for key, tensor in read_weights(weights).tensors.items())
    assert read_weights(back).meta.config["model"]["rpn"]["min_size"] == 2.0


def test_the_command_refuses(weights, tmp_path, capsys):
    tensors, meta = read_weights(weights).tensors, read_weights(weights).meta
    meta.config["model"]["backbone"]["preact"] = True
    save_weights(tmp_path / "preact.safetensors", tensors, meta)
    assert main(["export", str(tmp_path / "preact.safetensors"), str(tmp_path / "o.pth"), "--format", "torchvision"]) != 0
    assert "torchvision has no backbone.preact=True. Export as safetensors." in capsys.readouterr().err
    assert not (tmp_path / "o.pth").exists()


def test_calls_are_made_as_they_are_shown():
    call = call_for(config("faster_rcnn", backbone={"depth": 34}), 2)
    assert repr(call).startswith("torchvision.models.detection.FasterRCNN(backbone=torchvision.models.detection.backbone_")
    with torch.device("meta"):
        assert isinstance(call.make(), torchvision.models.detection.FasterRCNN)
