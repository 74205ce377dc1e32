"""Detectron2's configs as configs of detres: every setting is translated, named, or what detres does anyway."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml

from detres.build import build_model
from detres.config import Config
from detres.weights.detectron2_config import translate
from detres.weights.detectron2_defaults import BASES, DEFAULTS, SECTIONS

R50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
# As the model zoo writes them: settings over a base.
FAMILIES = {
    "faster_rcnn": {"_BASE_": "../Base-RCNN-FPN.yaml", "MODEL": {"WEIGHTS": R50, "MASK_ON": False}},
    "faster_rcnn c4": {"_BASE_": "../Base-RCNN-C4.yaml", "MODEL": {"WEIGHTS": R50}},
    "mask_rcnn": {"_BASE_": "../Base-RCNN-FPN.yaml", "MODEL": {"WEIGHTS": R50, "MASK_ON": True}},
    "mask_rcnn c4": {"_BASE_": "../Base-RCNN-C4.yaml", "MODEL": {"WEIGHTS": R50, "MASK_ON": True}},
    "mask_rcnn dc5": {"_BASE_": "../Base-RCNN-DilatedC5.yaml", "MODEL": {"WEIGHTS": R50, "MASK_ON": True}},
    "keypoint_rcnn": {"_BASE_": "Base-Keypoint-RCNN-FPN.yaml", "MODEL": {"WEIGHTS": R50}},
    "cascade_rcnn": {"_BASE_": "../Base-RCNN-FPN.yaml", "MODEL": {
        "ROI_HEADS": {"NAME": "CascadeROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True}}},
    "cascade_mask_rcnn": {"_BASE_": "../Base-RCNN-FPN.yaml", "MODEL": {
        "MASK_ON": True, "ROI_HEADS": {"NAME": "CascadeROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True},
        "RPN": {"POST_NMS_TOPK_TRAIN": 2000}}},
    "retinanet": {"_BASE_": "../Base-RetinaNet.yaml", "MODEL": {"WEIGHTS": R50}},
    "rpn": {"_BASE_": "../Base-RCNN-FPN.yaml", "MODEL": {"META_ARCHITECTURE": "ProposalNetwork",
                                                        "RPN": {"POST_NMS_TOPK_TEST": 2000}}},
    "rpn c4": {"_BASE_": "../Base-RCNN-C4.yaml", "MODEL": {"META_ARCHITECTURE": "ProposalNetwork"}},
    "panoptic_fpn": {"_BASE_": "Base-Panoptic-FPN.yaml", "MODEL": {"WEIGHTS": R50}},
    "semantic_fpn": {"_BASE_": "../Base-RCNN-FPN.yaml", "MODEL": {"META_ARCHITECTURE": "SemanticSegmentor"}},
}


def put(config: dict, key: str, value) -> dict:
    config = copy.deepcopy(config)
    *sections, name = key.split(".")
    inner = config
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return config


def named(notes) -> set[str]:
    return {note.key for note in notes}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    found, notes = translate(FAMILIES[family])
    config = Config.model_validate(found)
    name, _, layout = family.partition(" ")
    assert (config.model.name, config.model.backbone.layout) == (name, layout or "fpn")
    assert config.model.input.channel_order == "bgr" and config.model.input.mean == (103.53, 116.28, 123.675)
    assert config.model.input.std == (1, 1, 1) and config.model.backbone.stride_in_1x1
    assert config.model.input.size_divisor == (1 if layout else 32)
    assert (config.train.batch_size, config.train.steps, config.train.milestones) == (16, 90_000, (60_000, 80_000))
    assert config.train.lr == (0.01 if name == "retinanet" else 0.02)
    assert config.data.augment.min_sizes == (640, 672, 704, 736, 768, 800)
    assert "_BASE_" in named(notes)
    with torch.device("meta"):
        build_model(config.model, num_classes=3, num_semantic=3)


CHANGED = {  # settings of which no sum or other name is a value
    "INPUT.FORMAT": "RGB", "INPUT.RANDOM_FLIP": "none", "MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 101, "MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 1, "SEED": 3,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
}


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + (1 if value == 0 or isinstance(value, int) else value / 2)
    if isinstance(value, list):
        return [other(item) for item in value] or ["other"]
    return 0.5 if value is None else "other"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_setting_is_dropped(family):
    """Changed alone, each setting changes the translation, or is named, or refused."""
    before = translate(FAMILIES[family])
    dropped = []
    for key in sorted(set(DEFAULTS) - {"VERSION"}):
        values = (CHANGED.get(key, other(DEFAULTS[key])), DEFAULTS[key])  # the family may have the first already
        if all(seems_same(before, put(FAMILIES[family], key, value), key) for value in values):
            dropped.append(key)
    assert not dropped


def seems_same(before, config, key: str) -> bool:
    try:
        found, notes = translate(config)
    except ValueError:  # refused, and it says so
        return False
    return found == before[0] and not any(note.key == key and note not in before[1] for note in notes)


def test_settings_of_switches_are_named_where_the_switch_is_off():
    _, notes = translate(put(FAMILIES["faster_rcnn"], "MODEL.RETINANET.NUM_CONVS", 2))
    assert {str(note) for note in notes if "RETINANET" in note.key} == {
        "MODEL.RETINANET.NUM_CONVS = 2: of a part that this model does not have"}
    _, notes = translate(put(FAMILIES["faster_rcnn"], "MODEL.DETR.QUERIES", 100))
    assert any(note.key == "MODEL.DETR.QUERIES" and "no setting of Detectron2 itself" in note.why for note in notes)


@pytest.mark.parametrize("settings, path, wanted", [
    ({"INPUT.FORMAT": "RGB"}, "model.input.channel_order", "rgb"),
    ({"MODEL.RESNETS.STRIDE_IN_1X1": False}, "model.backbone.stride_in_1x1", False),
    ({"MODEL.RESNETS.NUM_GROUPS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 8}, "model.backbone.group_width", 8),
    ({"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}, "model.backbone.deform_stages", 3),
    ({"MODEL.FPN.NORM": "GN"}, "model.fpn.norm", "gn"),
    ({"MODEL.RESNETS.NORM": "SyncBN"}, "model.backbone.norm", "sync_bn"),
    ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"}, "model.pool.aligned", False),
    ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"}, "model.pool.type", "pool"),
    ({"MODEL.ROI_BOX_HEAD.NUM_CONV": 4, "MODEL.ROI_BOX_HEAD.NORM": "GN"}, "model.box_head.norm", "gn"),
    ({"MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5}, "model.box_head.box_loss", "smooth_l1"),
    ({"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou"}, "model.box_head.box_loss", "giou"),
    ({"MODEL.RPN.BOUNDARY_THRESH": 0}, "model.rpn.inside_only", True),
    ({"MODEL.RPN.IOU_THRESHOLDS": [0.2, 0.6]}, "model.rpn.bg_iou", 0.2),
    ({"MODEL.RPN.CONV_DIMS": [-1, -1]}, "model.rpn.convs", 2),
    ({"MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32]]}, "model.anchors.sizes", [[16, 32]] * 5),
    ({"INPUT.MIN_SIZE_TRAIN": "(640, 643)", "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, "data.augment.min_sizes",
     [640, 641, 642, 643]),
    ({"INPUT.RANDOM_FLIP": "none"}, "data.augment.flip", 0.0),
    ({"SOLVER.STEPS": "(60000, 80000, 120000)"}, "train.milestones", [60_000, 80_000]),
    ({"SOLVER.BASE_LR": "1e-3"}, "train.lr", 1e-3),
    ({"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model"}, "train.grad_clip", 1.0),
    ({"SOLVER.WEIGHT_DECAY_BIAS": 0.0}, "train.decay_norm_and_bias", False),
    ({"SOLVER.AMP.ENABLED": True}, "train.precision", "bf16"), ({"TEST.EVAL_PERIOD": 5000}, "train.eval_every", 5000),
    ({"MODEL.WEIGHTS": f"detectron2://COCO/{'x' * 4}/model_final_f10217.pkl"}, "model.backbone.weights", None),
    ({"MODEL.WEIGHTS": ""}, "model.backbone.weights", None), ({}, "model.backbone.weights", R50),
    ({"MODEL.WEIGHTS": "output/model_0004999.pth"}, "model.weights", "output/model_0004999.pth"),
    ({"DATASETS.TRAIN": "('voc_2007_trainval', 'voc_2012_trainval')"}, "data.train",
     {"path": "datasets/VOCdevkit", "split": "2007_trainval+2012_trainval"}),
    ({"DATASETS.TEST": ["voc_2007_test"]}, "eval.metrics", ["voc"]), ({"OUTPUT_DIR": "out"}, "output", "out"),
])
def test_values(settings, path, wanted):
    config = FAMILIES["mask_rcnn"]
    for key, value in settings.items():
        config = put(config, key, value)
    found, _ = translate(config)
    for name in path.split("."):
        found = found[name]
    assert found == wanted


@pytest.mark.parametrize("family, key, value", [
    ("mask_rcnn", "INPUT.MAX_SIZE_TRAIN", 1440), ("mask_rcnn", "INPUT.CROP.ENABLED", True),
    ("mask_rcnn", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign"),
    ("mask_rcnn", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True),
    ("mask_rcnn", "MODEL.FPN.FUSE_TYPE", "avg"), ("mask_rcnn", "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
    ("mask_rcnn", "MODEL.ROI_HEADS.NUM_CLASSES", 20), ("mask_rcnn", "TEST.AUG.ENABLED", True),
    ("mask_rcnn", "SOLVER.GAMMA", 0.5), ("mask_rcnn", "DATASETS.TRAIN", ["cityscapes_fine_instance_seg_train"]),
    ("mask_rcnn", "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
    ("mask_rcnn", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 2.0), ("mask_rcnn", "MODEL.RPN.LOSS_WEIGHT", 2.0),
    ("panoptic_fpn", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 2.0), ("mask_rcnn", "MODEL.KEYPOINT_ON", True),
    ("keypoint_rcnn", "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", 4.0),
    ("cascade_rcnn", "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", [[10, 10, 5, 5]] * 3),
])
def test_what_cannot_be_translated_is_named(family, key, value):
    _, before = translate(FAMILIES[family])
    _, notes = translate(put(FAMILIES[family], key, value))
    (note,) = [note for note in notes if note not in before]
    assert note.key == key and note.value == value and note.why


def test_plain_deformable_convolutions_are_named():
    config = put(FAMILIES["mask_rcnn"], "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
    assert "MODEL.RESNETS.DEFORM_MODULATED" in named(translate(config)[1])
    gap = put(config, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True, False, True, True])
    assert "MODEL.RESNETS.DEFORM_ON_PER_STAGE" in named(translate(gap)[1])
    modulated = put(config, "MODEL.RESNETS.DEFORM_MODULATED", True)
    assert "MODEL.RESNETS.DEFORM_MODULATED" not in named(translate(modulated)[1])


def test_weight_decay_of_norms_matters_where_norms_train():
    assert "SOLVER.WEIGHT_DECAY_NORM" not in named(translate(FAMILIES["mask_rcnn"])[1])
    assert "SOLVER.WEIGHT_DECAY_NORM" in named(translate(put(FAMILIES["mask_rcnn"], "MODEL.RESNETS.NORM", "GN"))[1])


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_chain_of_bases(tmp_path):
    (tmp_path / "Misc").mkdir()
    (tmp_path / "Base-RCNN-FPN.yaml").write_text(yaml.safe_dump({**BASES["Base-RCNN-FPN.yaml"], "SOLVER": {
        "BASE_LR": 0.04, "STEPS": [1, 2], "MAX_ITER": 9}}))
    (tmp_path / "Misc/gn.yaml").write_text("_BASE_: ../Base-RCNN-FPN.yaml\nMODEL:\n  MASK_ON: True\n  FPN: {NORM: GN}\n"
                                           "INPUT:\n  MIN_SIZE_TRAIN: (480, 512)\n")
    (tmp_path / "Misc/scratch.yaml").write_text("_BASE_: 'gn.yaml'\nMODEL:\n  WEIGHTS: ''\n  BACKBONE: {FREEZE_AT: 0}\n"
                                                "SOLVER: {MAX_ITER: 8}\nVERSION: 2\n")
    found, notes = translate(tmp_path / "Misc/scratch.yaml")
    assert named(notes) == {"SOLVER.WEIGHT_DECAY_NORM"}
    assert (found["model"]["name"], found["model"]["fpn"]["norm"]) == ("mask_rcnn", "gn")
    assert found["model"]["backbone"]["freeze_stages"] == 0 and found["output"] == "runs/scratch"
    assert (found["train"]["lr"], found["train"]["steps"], found["train"]["milestones"]) == (0.04, 8, [1, 2])
    assert found["data"]["augment"]["min_sizes"] == [480, 512]


RETINANET = """MODEL:
  META_ARCHITECTURE: "RetinaNet"
  BACKBONE: {NAME: "build_retinanet_resnet_fpn_backbone"}
  RESNETS: {OUT_FEATURES: ["res3", "res4", "res5"]}
  ANCHOR_GENERATOR:
    SIZES: !!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"]
  FPN: {IN_FEATURES: !!python/tuple ["res3", "res4", "res5"]}
  RETINANET: {SMOOTH_L1_LOSS_BETA: 0.0}
"""


def test_arithmetic_of_the_retinanet_base(tmp_path):
    (tmp_path / "retinanet.yaml").write_text(RETINANET)
    anchors = translate(tmp_path / "retinanet.yaml")[0]["model"]["anchors"]
    assert anchors == translate(FAMILIES["retinanet"])[0]["model"]["anchors"]
    assert anchors["sizes"][1] == [64, 80.63494719327188, 101.59366732596476]


@pytest.mark.parametrize("text, told", [
    ("!!python/object/apply:eval ['open(\"ran\", \"w\")']", "only arithmetic is computed"),
    ("!!python/object/apply:eval ['(1).__class__']", "only arithmetic"),
    ("!!python/object/apply:eval ['y + 1']", "only arithmetic"),
    ("!!python/object/apply:eval ['9 ** 9 ** 9 ** 9']", "only arithmetic is computed"),
    ("!!python/object/apply:eval ['" + "(" * 5000 + "']", "only arithmetic"),
    ("!!python/object/apply:eval [1, 2]", "only"),
    ("!!python/object/apply:os.system ['touch ran']", "python/object/apply:os.system"),
    ("!!python/name:os.system ''", "python/name:os.system"), ("!!python/module:os ''", "python/module"),
    ("!!python/object/new:os.system ['touch ran']", "object/new"), ("[a", "must be YAML"),
])
def test_hostile_yaml_runs_nothing(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(f"MODEL:\n  WEIGHTS: {text}\n")
    with pytest.raises(ValueError, match="must be YAML without Python objects") as error:
        translate(tmp_path / "a.yaml")
    assert told in str(error.value) and "a.yaml" in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text, told", [
    ("VERSION: 1\n", "VERSION must be 2, got 1"), ("MODEL: {WEIGHT: x}\n", "names of version 1"),
    ("[1, 2]\n", "must be a mapping of sections"), ("", "must be a mapping"), ("1: 2\n", "sections of named settings"),
    ("a: &a {b: *a}\n", "sections of named settings"), ("MODEL: {RPN: {NMS_THRESH: {a: 1}}}\n", "must be a setting"),
    ("MODEL: {RPN: {NMS_THRESH: high}}\n", "MODEL.RPN.NMS_THRESH must be a float"),
    ("MODEL: {MASK_ON: 1}\n", "MODEL.MASK_ON must be a bool"), ("SOLVER: 3\n", "SOLVER"),
    ("MODEL: {RPN: {IOU_THRESHOLDS: [0.5]}}\n", "must have 2 entries"),
    ("MODEL: {RPN: {NMS_THRESH: 2.0}}\n", "for model.rpn.nms_thresh"),
    ("MODEL: {META_ARCHITECTURE: MaskFormer}\n", "META_ARCHITECTURE must be one of 'GeneralizedRCNN'"),
    ("MODEL: {BACKBONE: {NAME: build_vgg_backbone}}\n", "MODEL.BACKBONE.NAME must be one of"),
    ("MODEL: {ROI_HEADS: {NAME: StandardROIHeads}}\n", "OUT_FEATURES must be res4 with Res5ROIHeads"),
    ("MODEL: {MASK_ON: true, ROI_MASK_HEAD: {NAME: PointRendMaskHead}}\n", "MODEL.ROI_MASK_HEAD.NAME must be one of"),
    ("_BASE_: none.yaml\n", "none.yaml"), ("_BASE_: https://example.org/a.yaml\n", "_BASE_ must be one path"),
    ("_BASE_: a.yaml\n", "must not lead back"), ("_BASE_: [a]\n", "_BASE_ must be one path"),
])
def test_errors(tmp_path, text, told):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        translate(tmp_path / "a.yaml")
    assert told in str(error.value) and "a.yaml" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="config of Detectron2 must exist"):
        translate(tmp_path / "a.yaml")


SIX = {"faster_rcnn_R_50_C4_1x": "faster_rcnn", "mask_rcnn_R_50_FPN_3x": "mask_rcnn",
       "retinanet_R_50_FPN_1x": "retinanet", "keypoint_rcnn_R_50_FPN_3x": "keypoint_rcnn",
       "cascade_mask_rcnn_R_50_FPN_3x": "cascade_mask_rcnn",
       "panoptic_fpn_R_50_3x": "panoptic_fpn"}


@pytest.mark.parametrize("file", SIX)
def test_what_detectron2_itself_resolved(shared_data, file):
    """The whole settings that Detectron2 wrote: nothing of them is named but what the model zoo changed."""
    path = shared_data.parent / "reference/detectron2/state_dicts" / f"{file}.cfg.yaml"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found, notes = translate(path)
    config = Config.model_validate(found)
    assert config.model.name == SIX[file] and config.train.steps == (90_000 if file.endswith("1x") else 270_000)
    assert named(notes) <= {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_MASK_HEAD.NUM_CONV", *(
        {"SOLVER.WEIGHT_DECAY_NORM", "DATASETS.TRAIN", "DATASETS.TEST"} if file.startswith("panoptic") else ())}
    stated = {key for section, values in SECTIONS.items() for key in values}
    with path.open() as lines:
        assert {line.split(":")[0].strip() for line in lines if line[0] != "-"} >= stated - {"VERSION"}
    base = {"faster_rcnn": "faster_rcnn c4"}.get(config.model.name, config.model.name)
    short, _ = translate(FAMILIES[base])
    for section in ("rpn", "pool", "box_head", "mask_head", "keypoint_head", "cascade", "dense_head", "anchors", "fpn",
                    "semantic_head", "panoptic", "input"):
        assert short["model"].get(section) == found["model"].get(section), section
    assert short["data"] == found["data"]
