"""What is said of weights that do not fit: which layers, and the likely reason."""

from __future__ import annotations

import pytest
import torch

from detres.build import build_model
from detres.config import ModelConfig
from detres.weights.mismatch import WeightsMismatch, check_fit

ONE_LEVEL = {"sizes": [[32]]}


def shapes(classes=3, semantic=0, **sections) -> dict[str, tuple[int, ...]]:
    model = ModelConfig.model_validate({"name": "mask_rcnn", **sections})
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in build_model(model, classes, semantic).state_dict().items()}


def mismatch(given, wanted) -> WeightsMismatch:
    with pytest.raises(WeightsMismatch) as error:
        check_fit(given, wanted, "model.weights must be of a model of the same kind (mine.pth)", "Look again.")
    return error.value


def test_what_fits_is_not_told():
    check_fit(shapes(), shapes(), "never", "said")


def test_the_whole_message():
    found = mismatch(shapes(classes=80), shapes(classes=3))
    assert str(found) == """\
model.weights must be of a model of the same kind (mine.pth), got 6 tensors that differ:
  layer                                            in the weights   in the model
  roi_heads.box_predictor.cls.weight  wrong shape  (81, 1024)       (4, 1024)
  roi_heads.box_predictor.box.weight  wrong shape  (320, 1024)      (12, 1024)
  roi_heads.mask_head.predict.weight  wrong shape  (80, 256, 1, 1)  (3, 256, 1, 1)
Likely: other classes, 80 in the weights and 3 in the model. Train with model.weights=FILE: layers of classes then begin \
anew, but for classes of both."""
    assert (found.missing, found.unexpected) == ((), ()) and len(found.wrong) == 6


def test_layers_of_all_kinds_of_difference_are_shown():
    """One line for a layer, its norm's statistics included; none of the three kinds crowds out another."""
    found = mismatch(shapes(name="cascade_rcnn", backbone={"depth": 18}), shapes(name="retinanet", fpn={"top": "c5"}))
    lines = str(found).splitlines()
    assert len(lines) <= 3 + 12 + 3
    assert [sum(f" {kind} " in line for line in lines) for kind in ("wrong shape", "missing", "unexpected")] == [4, 4, 4]
    assert sum("layers more" in line for line in lines) == 3 and not any("running_" in line for line in lines)
    assert str(found).count("tensors that differ") == 1


MODEL = "Likely: weights of another model, model."
REASONS = [
    ({"backbone": {"depth": 101}}, {}, "backbone.depth=101 instead of 50."),
    ({"backbone": {"depth": 18}}, {}, "backbone.depth=18 instead of 50."),
    ({"name": "retinanet", "fpn": {"top": "c5"}}, {}, "name=retinanet instead of mask_rcnn, model.fpn.top=c5 instead of pool."),
    ({"name": "faster_rcnn"}, {}, "name=faster_rcnn instead of mask_rcnn."),
    ({}, {"name": "keypoint_rcnn"}, "name=mask_rcnn instead of keypoint_rcnn."),
    ({"name": "cascade_mask_rcnn", "cascade": {"ious": [0.6]}}, {"name": "cascade_mask_rcnn"},
     "cascade.ious=[0.6] instead of [0.6, 0.7]."),
    ({"backbone": {"norm": "gn"}}, {"backbone": {"norm": "bn"}}, "backbone.norm=gn instead of frozen_bn or bn."),
    ({}, {"fpn": {"norm": "gn"}}, "fpn.norm=none instead of gn."),
    ({"backbone": {"width": 32}}, {}, "backbone.width=32 instead of 64."),
    ({"fpn": {"channels": 128}}, {}, "fpn.channels=128 instead of 256."),
    ({"backbone": {"groups": 32, "group_width": 4}}, {},
     "backbone.groups=32 instead of 1, model.backbone.group_width=4 instead of 64."),
    ({"backbone": {"layout": "c4"}, "anchors": ONE_LEVEL, "box_head": {"resolution": 14}}, {}, "backbone.layout=c4 instead of"),
    ({"backbone": {"layout": "dc5"}, "anchors": ONE_LEVEL}, {}, "backbone.layout=dc5 instead of fpn."),
    ({"backbone": {"preact": True}}, {}, "backbone.preact=True instead of False."),
    ({"backbone": {"stem": "deep", "avg_down": True}}, {},
     "backbone.stem=deep instead of imagenet, model.backbone.avg_down=True instead of False."),
    ({"backbone": {"deform_stages": 2}}, {}, "backbone.deform_stages=2 instead of 0."),
    ({"mask_head": {"type": "point_rend"}}, {}, "mask_head.type=point_rend instead of fcn."),
    ({"mask_head": {"convs": 2}}, {}, "mask_head.convs=2 instead of 4."),
    ({"box_head": {"global_context": True}}, {}, "box_head.global_context=True instead of False."),
    ({"box_head": {"class_agnostic": True}}, {}, "box_head.class_agnostic=True instead of False."),
    ({"name": "semantic_fpn", "semantic_head": {"channels": 64}}, {"name": "semantic_fpn"},
     "semantic_head.channels=64 instead of 128."),
]


@pytest.mark.parametrize("given, wanted, told", REASONS, ids=[told.partition(" ")[0] for *_, told in REASONS])
def test_likely_reasons(given, wanted, told):
    text = str(mismatch(shapes(**given), shapes(**wanted)))
    assert MODEL + told in text and text.endswith("or take the model that the weights carry."), text
    assert len(text.splitlines()) <= 18


def test_many_fields_are_counted():
    text = str(mismatch(shapes(backbone={"depth": 18, "width": 32, "norm": "gn", "stem": "deep"}, fpn={"channels": 64}),
                        shapes()))
    assert " and 1 fields more." in text and text.count(" instead of ") == 4


def test_classes_of_segmentation_and_of_classifiers():
    for name, layout in (("fcn", "dc4"), ("classifier", "c5")):
        own = {"name": name, "backbone": {"layout": layout, "depth": 18}, "anchors": ONE_LEVEL}
        assert "other classes, 21 in the weights and 2 in the model." in str(mismatch(shapes(21, **own), shapes(2, **own)))


def test_anchors_are_no_classes():
    dense = {"name": "retinanet", "fpn": {"top": "c5"}}
    nine = {"anchors": {"sizes": [[32, 40, 50]] * 5}}
    assert "Likely: another number of anchors in a cell." in str(mismatch(shapes(**dense, **nine), shapes(**dense)))


def test_a_resnet_alone():
    """Names without a prefix, as a backbone's file has them."""
    body = {depth: {name.removeprefix("backbone.body."): shape for name, shape in shapes(
        backbone={"depth": depth}).items() if name.startswith("backbone.body.")} for depth in (50, 101)}
    assert f"{MODEL}backbone.depth=101 instead of 50." in str(mismatch(body[101], body[50]))


def test_a_network_of_no_known_depth():
    given = {name: shape for name, shape in shapes().items() if "layer3.5" not in name}
    assert str(mismatch(given, shapes())).endswith("another depth, with stages of (3, 4, 5, 3) blocks instead of (3, 4, 6, 3).")


def test_weights_of_something_else():
    text = str(mismatch({"encoder.weight": (3, 3)}, shapes()))
    assert text.endswith("Look again.") and "encoder.weight" in text
    assert "got 1 tensor that differs" in str(mismatch({**shapes(), "extra": ()}, shapes()))
