"""Training that begins from a trained model, with its classes or with others."""

from __future__ import annotations

import pytest
import torch

from detres.build import build_model
from detres.config import ModelConfig
from detres.engine.checkpoint import WeightsMeta, load_weights, save_weights
from detres.engine.train import train
from detres.weights.finetune import load_start

from .conftest import MODEL

SHAPES = ("disc", "triangle", "cross")
CLASSIFIER = {"name": "classifier", "backbone": {**MODEL["backbone"], "stem": "cifar", "depth": 8, "shortcut": "A"}}
LOCALIZER = {"name": "localizer", "backbone": {**MODEL["backbone"], "layout": "c5"}, "anchors": {"sizes": [[32]]}}
REGIONS = {**CLASSIFIER, "name": "region_classifier", "input": {"crop": 64}}
OF_CLASSES = {"classifier": {"fc"}, "localizer": {"head.cls", "head.box"}, "region_classifier": {"cls", "box"},
              "mask_rcnn": {f"roi_heads.{name}" for name in ("box_predictor.cls", "box_predictor.box",
                                                             "mask_head.predict")}}


@pytest.fixture(params=[{"name": "mask_rcnn", **MODEL}, CLASSIFIER, LOCALIZER, REGIONS],
                ids=lambda model: model["name"])
def model_config(request):
    return ModelConfig.model_validate(request.param)


def saved(config, classes, path):
    model = build_model(config, len(classes))
    save_weights(path, model.state_dict(), WeightsMeta({}, tuple(classes), tuple(range(len(classes))), 1, {}))
    return model.state_dict()


def changed(state, before) -> set[str]:
    return {name for name, tensor in state.items()
            if tensor.shape != before[name].shape or not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("classes", ["xy", "xyz"])
def test_layers_of_other_classes_begin_anew(model_config, tmp_path, classes):
    before = saved(model_config, "abc", tmp_path / "w.safetensors")
    model = build_model(model_config, len(classes))
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_start(model, str(tmp_path / "w.safetensors"), classes)
    new = changed(model.state_dict(), before)
    assert {name.rsplit(".", 1)[0] for name in new} == OF_CLASSES[model_config.name]
    assert all(torch.equal(model.state_dict()[name], own[name]) for name in new)


def test_layers_of_the_same_classes_go_on(model_config, tmp_path):
    before = saved(model_config, "abc", tmp_path / "w.safetensors")
    model = build_model(model_config, 3)
    load_start(model, str(tmp_path / "w.safetensors"), "abc")
    assert not changed(model.state_dict(), before)


def test_another_network_is_named(tmp_path):
    saved(ModelConfig.model_validate(CLASSIFIER), "abc", tmp_path / "w.safetensors")
    wider = ModelConfig.model_validate({**CLASSIFIER, "backbone": {**CLASSIFIER["backbone"], "width": 16}})
    with pytest.raises(ValueError, match=r"same kind.*w.safetensors.*conv1.weight: \(8, 3, 3, 3\) instead of \(16, 3"):
        load_start(build_model(wider, 3), str(tmp_path / "w.safetensors"), "abc")


def test_training_begins_from_them(detector_config, tmp_path):
    config = detector_config(steps=1, lr=1e-12, ema=None, eval_every=None)
    torch.manual_seed(7)  # other weights than those that training would begin from
    before = saved(config.model, SHAPES, tmp_path / "w.safetensors")
    model = config.model.model_copy(update={"weights": str(tmp_path / "w.safetensors")})
    train(config.model_copy(update={"model": model, "data": config.data.model_copy(update={"val": None})}))
    after, _ = load_weights(f"{config.output}/checkpoints/final.safetensors")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
