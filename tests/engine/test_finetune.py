"""Training that begins from a trained model, with its classes or with others."""

from __future__ import annotations

import pytest
import torch

from detres.build import build_model
from detres.config import ModelConfig
from detres.config_file import ConfigError, load_config
from detres.engine.checkpoint import WeightsMeta, load_weights, save_weights
from detres.engine.train import train
from detres.weights.finetune import load_start

from .conftest import MODEL

SHAPES = ("disc", "triangle", "cross")
CLASSIFIER = {"name": "classifier", "backbone": {**MODEL["backbone"], "stem": "cifar", "depth": 8, "shortcut": "A"}}
LOCALIZER = {"name": "localizer", "backbone": {**MODEL["backbone"], "layout": "c5"}, "anchors": {"sizes": [[32]]}}
RETINANET = {"name": "retinanet", **{key: MODEL[key] for key in ("backbone", "fpn", "anchors")},
             "dense_head": {"convs": 1}}
REGIONS = {**CLASSIFIER, "name": "region_classifier", "input": {"crop": 64}}
OF_CLASSES = {"classifier": {"fc"}, "retinanet": {"head.cls"}, "localizer": {"head.cls", "head.box"},
              "region_classifier": {"cls", "box"},
              "mask_rcnn": {f"roi_heads.{name}" for name in ("box_predictor.cls", "box_predictor.box",
                                                             "mask_head.predict")}}


@pytest.fixture(params=[{"name": "mask_rcnn", **MODEL}, CLASSIFIER, LOCALIZER, REGIONS, RETINANET],
                ids=lambda model: model["name"])
def model_config(request):
    return ModelConfig.model_validate(request.param)


def saved(config, classes, path):
    model = build_model(config, len(classes))
    save_weights(path, model.state_dict(), WeightsMeta(
        {"model": config.model_dump(mode="json")}, tuple(classes), tuple(range(len(classes))), 1, {}))
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


def test_classes_of_both_lists_keep_their_rows(model_config, tmp_path):
    """Of a, b, c the new c, z, b have two, at other places."""
    path = tmp_path / "w.safetensors"
    theirs = build_model(model_config, 3)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    meta = WeightsMeta({"model": model_config.model_dump(mode="json")}, tuple("abc"), (1, 2, 3), 1, {})
    save_weights(path, theirs.state_dict(), meta)
    model = build_model(model_config, 3)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "but for c, b, known to both" in load_start(model, str(path), "czb")
    for name in sorted(changed(model.state_dict(), theirs.state_dict())):
        assert name.rsplit(".", 1)[0] in OF_CLASSES[model_config.name]
        background = "box_predictor.cls" in name
        found, source, initial = (state[name].unflatten(0, (3 + background, -1)) for state in
                                  (model.state_dict(), theirs.state_dict(), own))
        if model_config.name == "retinanet":  # classes within anchors
            found, source, initial = (part.flatten(0, 1).unflatten(0, (-1, 3)).transpose(0, 1)
                                      for part in (found, source, initial))
        expected = torch.stack([source[2], initial[1], source[1], *source[3:]])
        assert found.equal(expected), name


def test_one_box_for_all_classes_goes_on(tmp_path):
    config = ModelConfig.model_validate({"name": "mask_rcnn", **MODEL, "box_head": {**MODEL.get("box_head", {}),
                                                                                    "class_agnostic": True}})
    before = saved(config, "ab", tmp_path / "w.safetensors")
    model = build_model(config, 2)
    load_start(model, str(tmp_path / "w.safetensors"), "xy")
    assert not any("box_predictor.box" in name for name in changed(model.state_dict(), before))


def test_layers_of_the_same_classes_go_on(model_config, tmp_path):
    before = saved(model_config, "abc", tmp_path / "w.safetensors")
    model = build_model(model_config, 3)
    load_start(model, str(tmp_path / "w.safetensors"), "abc")
    assert not changed(model.state_dict(), before)


def test_another_network_is_named(tmp_path):
    saved(ModelConfig.model_validate(CLASSIFIER), "abc", tmp_path / "w.safetensors")
    wider = ModelConfig.model_validate({**CLASSIFIER, "backbone": {**CLASSIFIER["backbone"], "width": 16}})
    told = r"(?s)same kind.*w.safetensors.*conv1.weight +wrong shape +\(8, 3, 3, 3\) +\(16, 3.*width"
    with pytest.raises(ValueError, match=told):
        load_start(build_model(wider, 3), str(tmp_path / "w.safetensors"), "abc")


def test_training_begins_from_them(detector_config, tmp_path):
    config = detector_config(steps=1, lr=1e-12, ema=None, eval_every=None)
    torch.manual_seed(7)  # other weights than those that training would begin from
    before = saved(config.model, SHAPES, tmp_path / "w.safetensors")
    model = config.model.model_copy(update={"weights": str(tmp_path / "w.safetensors")})
    train(config.model_copy(update={"model": model, "data": config.data.model_copy(update={"val": None})}))
    after, _ = load_weights(f"{config.output}/checkpoints/final.safetensors")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


CASCADE = {"name": "cascade_mask_rcnn", **MODEL, "cascade": {"ious": [0.6]}}
KEYPOINTS = {"name": "keypoint_rcnn", **MODEL, "keypoint_head": {"num_keypoints": 4, "channels": 16, "convs": 1}}
PANOPTIC = {"name": "panoptic_fpn", **MODEL, "semantic_head": {"channels": 16}}
MASK = {"name": "mask_rcnn", **MODEL}


@pytest.mark.parametrize("theirs, name, told", [
    (MASK, "faster_rcnn", "their mask head is left out"), (CASCADE, "cascade_rcnn", "their mask head is left out"),
    (PANOPTIC, "mask_rcnn", "their semantic head is left out"),
    (KEYPOINTS, "faster_rcnn", "their keypoint head is left out"),
    ({**MASK, "name": "faster_rcnn"}, "mask_rcnn", "the mask head begins anew, as they have none"),
    ({**MASK, "name": "faster_rcnn"}, "keypoint_rcnn", "the keypoint head begins anew"),
    (MASK, "panoptic_fpn", "the semantic head begins anew")])
def test_heads_come_and_go(tmp_path, theirs, name, told):
    """All else goes on, the layers of classes among it, as the classes are the same."""
    things = ("things", "sky")
    theirs = ModelConfig.model_validate(theirs)
    before = build_model(theirs, 2, 2 * theirs.is_panoptic)
    meta = WeightsMeta({"model": theirs.model_dump(mode="json")}, tuple("ab"), (1, 2), 1, {},
                       semantic_classes=things if theirs.is_panoptic else ())
    save_weights(tmp_path / "w.safetensors", before.state_dict(), meta)
    config = load_config(None, [f"weights={tmp_path / 'w.safetensors'}", f"model.name={name}"]).config.model
    assert config.name == name and config.backbone == theirs.backbone
    model = build_model(config, 2, 2 * config.is_panoptic)
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert f"all layers go on, as the classes are the same; {told}" in load_start(
        model, str(tmp_path / "w.safetensors"), "ab", things if config.is_panoptic else ())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict().get(key, own[key])), key


def test_kinds_of_other_networks_are_refused(tmp_path):
    saved(ModelConfig.model_validate(MASK), "ab", tmp_path / "w.safetensors")
    for name in ("retinanet", "cascade_rcnn", "semantic_fpn"):
        with pytest.raises(ConfigError, match=f"must be of a {name}.*got those of a mask_rcnn.*Leave model.name out"):
            load_config(None, [f"weights={tmp_path / 'w.safetensors'}", f"model.name={name}"])


def test_another_number_of_keypoints(tmp_path):
    before = saved(ModelConfig.model_validate(KEYPOINTS), "a", tmp_path / "w.safetensors")
    model = build_model(ModelConfig.model_validate({**KEYPOINTS, "keypoint_head": {
        **KEYPOINTS["keypoint_head"], "num_keypoints": 3}}), 1)
    assert "layer of keypoints begins anew" in load_start(model, str(tmp_path / "w.safetensors"), "a")
    layers = {name.rsplit(".", 1)[0] for name in changed(model.state_dict(), before)}
    assert layers == {"roi_heads.keypoint_head.deconv"}


@pytest.mark.parametrize("change", [{"freeze_stages": 2}, {"norm": "frozen_bn"}])
def test_batch_norms_may_be_frozen_and_thawed(tmp_path, change):
    """Frozen ones have no counter of batches."""
    trained = {**MASK, "backbone": {**MODEL["backbone"], "norm": "bn"}}
    frozen = {**trained, "backbone": {**trained["backbone"], **change}}
    for theirs, ours in ((trained, frozen), (frozen, trained)):
        before = saved(ModelConfig.model_validate(theirs), "ab", tmp_path / "w.safetensors")
        model = build_model(ModelConfig.model_validate(ours), 2)
        load_start(model, str(tmp_path / "w.safetensors"), "ab")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


def test_conventions_that_no_shape_shows_are_told(tmp_path):
    """As of `model.weights=FILE` beside a config for weights of another toolkit."""
    theirs = {**MASK, "anchors": {**MASK["anchors"], "convention": "torchvision"}, "pool": {"aligned": False}}
    saved(ModelConfig.model_validate(theirs), "ab", tmp_path / "w.safetensors")
    for ours, told in ((theirs, False), (MASK, True)):
        ours = ModelConfig.model_validate(ours)
        said = load_start(build_model(ours, 2), str(tmp_path / "w.safetensors"), "ab", config=ours)
        different = "anchors.convention detectron2, theirs is torchvision, pool.aligned True, theirs is False"
        assert told == (different in said)
