"""Weights of backbones: which file of torchvision's a config names, and files of one's own."""

from __future__ import annotations

import pytest
import torch
import torchvision

from detres.build import build_model
from detres.config import BackboneConfig, ModelConfig
from detres.engine.checkpoint import WeightsMeta, save_weights
from detres.weights.backbone import imagenet_file, load_backbone, read_backbone

NETWORKS = {
    "resnet18": {"depth": 18}, "resnet34": {"depth": 34}, "resnet50": {"depth": 50}, "resnet101": {"depth": 101},
    "resnet152": {"depth": 152}, "resnext50_32x4d": {"depth": 50, "groups": 32, "group_width": 4},
    "resnext101_32x8d": {"depth": 101, "groups": 32, "group_width": 8},
    "resnext101_64x4d": {"depth": 101, "groups": 64, "group_width": 4},
    "wide_resnet50_2": {"depth": 50, "group_width": 128}, "wide_resnet101_2": {"depth": 101, "group_width": 128},
}


def config(name="faster_rcnn", layout="fpn", **backbone) -> ModelConfig:
    sizes = {"fpn": [[32], [64], [128], [256], [512]], "c4": [[32, 64, 128]]}[layout]
    return ModelConfig.model_validate({"name": name, "anchors": {"sizes": sizes}, "fpn": {"channels": 8},
                                       "box_head": {"fc_dim": 8}, "backbone": {"layout": layout, **backbone}})


@pytest.mark.parametrize("name", list(NETWORKS))
def test_imagenet_names_the_file_that_torchvision_publishes(name):
    expected = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    assert "https://download.pytorch.org/models/" + imagenet_file(BackboneConfig(**NETWORKS[name])) == expected


def test_offsets_and_dilation_do_not_need_weights_of_their_own():
    assert imagenet_file(BackboneConfig(deform_stages=3, layout="dc5")) == "resnet50-0676ba61.pth"


@pytest.mark.parametrize("options, told", [
    ({"stem": "deep", "avg_down": True}, "got stem=deep, avg_down=True. Give"), ({"preact": True}, "got preact=True"),
    ({"depth": 34, "shortcut": "none"}, "got shortcut=none"), ({"shortcut": "A"}, "got shortcut=A"),
    ({"stem": "cifar", "depth": 20}, "got stem=cifar, depth=20, groups=1, group_width=64"),
    ({"groups": 8, "group_width": 8}, "got depth=50, groups=8, group_width=8"), ({"norm": "gn"}, "got norm=gn"),
    ({"depth": 152, "group_width": 128}, "got depth=152, groups=1"), ({"width": 32}, "got width=32"),
    ({"stride_in_1x1": True}, "got stride_in_1x1=True"),
])
def test_where_torchvision_publishes_none(options, told):
    with pytest.raises(ValueError, match="'imagenet' must be for a network that torchvision publishes") as error:
        imagenet_file(BackboneConfig(**options))
    assert told in str(error.value)


def test_stride_in_1x1_changes_no_basic_block():
    assert imagenet_file(BackboneConfig(depth=18, stride_in_1x1=True)).startswith("resnet18")


@pytest.mark.parametrize("layout, deform_stages", [("fpn", 0), ("fpn", 2), ("c4", 1)])
def test_a_resnext_of_torchvisions_in_a_detector(layout, deform_stages, tmp_path):
    """Every tensor arrives; offsets, which the file has not, stay zero."""
    bottleneck = torchvision.models.resnet.Bottleneck
    theirs = torchvision.models.ResNet(bottleneck, [3, 4, 6, 3], groups=2, width_per_group=8)
    path = tmp_path / "resnext.pth"
    torch.save(theirs.state_dict(), path)
    options = config(layout=layout, groups=2, group_width=8, deform_stages=deform_stages, weights=str(path))
    model = build_model(options, 3)
    load_backbone(model, options)
    ours = model.backbone.body.state_dict()
    if layout == "c4":
        ours |= {f"layer4.{key}": value for key, value in model.roi_heads.box_head.state_dict().items()}
    offsets = {key for key in ours if ".offset." in key}
    assert len(offsets) == 2 * {0: 0, 1: 3, 2: 9}[deform_stages] and not any(ours[key].any() for key in offsets)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.items() if key not in offsets)


@pytest.mark.parametrize("layout", ["fpn", "c4"])
def test_a_classifier_of_ours_becomes_the_backbone_of_a_detector(layout, tmp_path):
    backbone = {"depth": 18, "width": 8, "preact": True, "freeze_stages": 0}
    classifier = build_model(config("classifier", norm="bn", weights=None, **backbone), 5)
    torch.nn.init.normal_(classifier.backbone.body.layer4.norm.running_mean)
    path = tmp_path / "best.safetensors"
    save_weights(path, classifier.state_dict(), WeightsMeta({}, tuple("abcde"), tuple(range(5)), 1, {}))
    options = config(layout=layout, weights=str(path), **backbone)
    detector = build_model(options, 3)
    load_backbone(detector, options)
    conv5 = detector.roi_heads.box_head if layout == "c4" else detector.backbone.body.layer4
    x = torch.randn(1, 3, 64, 64)
    body = detector.backbone.body(x)
    found = conv5(body[-1]) if layout == "c4" else body[-1]
    torch.testing.assert_close(found, classifier.eval().backbone.body(x)[-1], rtol=1e-4, atol=1e-5)


def test_a_file_of_another_network_is_told_apart(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    options = config(depth=18, weights=str(path), preact=True)
    told = "(?s)must fit the configured ResNet .*layer1.norm.weight +missing.*unexpected"
    with pytest.raises(ValueError, match=told):
        load_backbone(build_model(options, 3), options)


def test_offsets_in_the_file_need_a_deformable_network(tmp_path):
    path = tmp_path / "deform.pth"
    options = config(width=8, weights=str(path), deform_stages=1)
    torch.save(build_model(options, 3).backbone.body.state_dict(), path)
    load_backbone(build_model(options, 3), options)
    plain = config(width=8, weights=str(path))
    with pytest.raises(ValueError, match="(?s)6 tensors that differ.*layer4.0.conv2.offset.weight +unexpected"):
        load_backbone(build_model(plain, 3), plain)


@pytest.mark.parametrize("path, hint", [("r50.pth", "or null\\.$"),
                                        ("runs/r50/checkpoints/best.safetensors", "or train the run runs/r50 first")])
def test_missing_weights_of_a_run_ask_for_it(path, hint):
    with pytest.raises(FileNotFoundError, match=hint):
        read_backbone(path, BackboneConfig())
