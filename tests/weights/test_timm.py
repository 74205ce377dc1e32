"""timm's names, on networks whose names and shapes are written here as timm 1.0 has them."""

from __future__ import annotations

import pytest
import torch

from detres.build import build_model
from detres.config import ModelConfig
from detres.weights.importers import recognise
from detres.weights.infer import infer
from detres.weights.keymap import KeyMap
from detres.weights.source import merged
from detres.weights.torchvision import CLASSIFIER

# name: depth, groups, group width, deep stem and averaging projections; shapes of layer1.0.conv2 and layer4.1.conv2
NETWORKS = {
    "resnet18": (18, 1, 64, False, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnet34": (34, 1, 64, False, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnet50": (50, 1, 64, False, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnet101": (101, 1, 64, False, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnet152": (152, 1, 64, False, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnet50d": (50, 1, 64, True, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnet101d": (101, 1, 64, True, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnet152d": (152, 1, 64, True, (64, 64, 3, 3), (512, 512, 3, 3)),
    "resnext50_32x4d": (50, 32, 4, False, (128, 4, 3, 3), (1024, 32, 3, 3)),
    "resnext101_32x8d": (101, 32, 8, False, (256, 8, 3, 3), (2048, 64, 3, 3)),
    "resnext101_64x4d": (101, 64, 4, False, (256, 4, 3, 3), (2048, 32, 3, 3)),
    "wide_resnet50_2": (50, 1, 128, False, (128, 128, 3, 3), (1024, 1024, 3, 3)),
    "wide_resnet101_2": (101, 1, 128, False, (128, 128, 3, 3), (1024, 1024, 3, 3)),
}
# what resnet50d has before layer1 and in its projections, weights alone
DEEP = {"conv1.0.weight": (32, 3, 3, 3), "conv1.1.weight": (32,), "conv1.3.weight": (32, 32, 3, 3),
        "conv1.4.weight": (32,), "conv1.6.weight": (64, 32, 3, 3), "bn1.weight": (64,),
        "layer1.0.downsample.1.weight": (256, 64, 1, 1), "layer1.0.downsample.2.weight": (256,),
        "layer3.0.downsample.1.weight": (1024, 512, 1, 1),
        "fc.weight": (10, 2048)}
PLAIN = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "layer2.0.downsample.0.weight": (512, 256, 1, 1),
         "layer2.0.downsample.1.weight": (512,), "fc.weight": (10, 2048)}


def network(name) -> ModelConfig:
    depth, groups, group_width, deep, *_ = NETWORKS[name]
    return ModelConfig.model_validate({"name": "classifier", "anchors": {"sizes": [[32]]}, "backbone": {
        "depth": depth, "groups": groups, "group_width": group_width, "stem": "deep" if deep else "imagenet",
        "avg_down": deep, "layout": "c5", "weights": None}})


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_known_by_their_weights(name):
    with torch.device("meta"):
        ours = build_model(network(name), 10).state_dict()
    theirs, unknown = KeyMap(CLASSIFIER).to_theirs(ours)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    deep, first, last = NETWORKS[name][3:]
    assert not unknown and (shapes["layer1.0.conv2.weight"], shapes["layer4.1.conv2.weight"]) == (first, last)
    if name in ("resnet50", "resnet50d"):
        wanted = DEEP if deep else PLAIN
        assert {key: shapes[key] for key in wanted} == wanted
    family = recognise(theirs, name)
    assert (family.toolkit, family.name) == (("timm", "ResNet-D") if deep else ("torchvision", "classifier"))
    back, unknown = KeyMap(CLASSIFIER).to_ours({**theirs, "bn1.num_batches_tracked": torch.tensor(1)})
    sections, classes = infer(back)
    assert not unknown and back.keys() == ours.keys() and classes == 10
    found = ModelConfig.model_validate(merged(sections, family.conventions(sections)))
    assert found.backbone.model_copy(update={"freeze_stages": 2}) == network(name).backbone
    if deep:
        large = name != "resnet50d"
        assert (found.input.min_size, found.input.crop) == ((269, 256) if large else (256, 224))
