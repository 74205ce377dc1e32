"""Detectron2's outputs on known weights and images, and its key lists and configs, from a folder of references."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch

import detres
from detres.config import Config, ModelConfig
from detres.data.masks import encode_masks
from detres.weights.detectron2_config import translate
from detres.weights.importers import convert

MASK_RCNN, C4 = "mask_rcnn_R_50_FPN_3x", "faster_rcnn_R_50_C4_1x"
SLOW = [(MASK_RCNN, "full"), (MASK_RCNN, "full_batch"), (C4, "small_batch"), (C4, "full"), (C4, "full_batch")]
NAMES = {"mask_rcnn_R_50_FPN_3x": "mask_rcnn", "faster_rcnn_R_50_C4_1x": "faster_rcnn",
         "cascade_mask_rcnn_R_50_FPN_3x": "cascade_mask_rcnn", "keypoint_rcnn_R_50_FPN_3x": "keypoint_rcnn",
         "retinanet_R_50_FPN_1x": "retinanet", "panoptic_fpn_R_50_3x": "panoptic_fpn"}
OF_TRAINING = {"backbone.weights", "weights"}  # where training begins, which a checkpoint does not say


@pytest.fixture(scope="session")
def reference(shared_data) -> Path:
    folder = shared_data.parent / "reference" / "detectron2"
    if not folder.is_dir():
        pytest.skip(f"no outputs of Detectron2 at {folder}")
    return folder


def module(reference: Path, name: str):
    spec = importlib.util.spec_from_file_location(f"detectron2_{name}", reference / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def checkpoint(request, reference, tmp_path_factory):
    """A model of the zoo as its file would be, a pickle of arrays, and its outputs."""
    name = request.param
    rule = module(reference, "weights_rule")
    state = rule.build_state_dict(str(reference / f"state_dicts/{name}.json"), str(reference / f"{name}.overrides.pth"))
    outputs = torch.load(reference / f"{name}.outputs.pth", weights_only=True)
    assert rule.fingerprint(state) == outputs["meta"]["state_dict_sha256"]
    file = tmp_path_factory.mktemp(name) / "model_final.pkl"
    content = {"model": {key: value.numpy() for key, value in state.items()}, "__author__": "Detectron2 Model Zoo"}
    file.write_bytes(pickle.dumps(content, protocol=2))
    return detres.load(file, "cpu"), outputs


@pytest.mark.parametrize("checkpoint, name", [
    (MASK_RCNN, "small"), (MASK_RCNN, "small_batch"), (C4, "small"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], indirect=["checkpoint"])
def test_outputs_of_detectron2(checkpoint, name, reference):
    predictor, outputs = checkpoint
    images = [reference / "images" / f"img{i}.png" for i in (0, 1)]
    side = {"full": 800, "small": 320}[name.partition("_")[0]]
    found = predictor.predict(images, 0.0, min_size=side, batch_size=2 if name.endswith("batch") else 1)
    for theirs, ours in zip(outputs[name], found):
        got = {"boxes": ours.boxes, "scores": ours.scores, "classes": ours.labels}
        if ours.masks is not None:
            got["masks_rle"] = encode_masks(ours.masks)
        agrees, report = module(reference, "compare").compare(theirs, got)
        print(f"\n{name}: {report}")  # with -s
        assert agrees and report["matched"] == len(theirs["scores"]) > 5, report
        assert report["box_px"] < 1e-2 and report["score"] < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_read_and_conventions_are_those_of_the_config(reference, name):
    """What is assumed of a checkpoint without its config is what Detectron2's resolved config of it says."""
    keys = json.loads((reference / f"state_dicts/{name}.json").read_text())["state_dict"]
    state = {key: torch.empty(entry["shape"], device="meta") for key, entry in keys.items()}
    weights = convert(state, Path(f"{name}.pth"))
    assert set(weights.tensors) and weights.notes
    found = Config.model_validate(weights.meta.config).model
    expected = ModelConfig.model_validate(translate(reference / f"state_dicts/{name}.cfg.yaml")[0]["model"])
    assert found.name == expected.name == NAMES[name]
    differing = dict(differences(found.model_dump(), expected.model_dump()))
    unused = "pool." if name.startswith("retinanet") else "\0"
    assert not {field: pair for field, pair in differing.items() if field not in OF_TRAINING
                and not field.startswith(unused)}


def differences(a: dict, b: dict, prefix: str = ""):
    for name in a:
        if isinstance(a[name], dict):
            yield from differences(a[name], b[name], f"{prefix}{name}.")
        elif a[name] != b[name]:
            yield f"{prefix}{name}", (a[name], b[name])
