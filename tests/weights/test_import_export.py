"""`detres import` on files of other toolkits: what is written, what is said, what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
import torchvision
import yaml

from detres.cli import main
from detres.engine.checkpoint import load_weights
from detres.inference.predictor import load_model
from detres.weights.importers import read_weights


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory):
    """A file as torch saves the state of torchvision's fasterrcnn_resnet50_fpn."""
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    path = tmp_path_factory.mktemp("theirs") / "faster_rcnn.pth"
    torch.save(model.state_dict(), path)
    return path, model.state_dict()


def test_import_writes_a_file_that_says_all(faster_rcnn, tmp_path, capsys):
    path, theirs = faster_rcnn
    assert main(["import", str(path), str(tmp_path / "out.safetensors"), "model.input.min_size=320"]) == 0
    told = capsys.readouterr().out
    assert "recognised  torchvision, R-CNN\n" in told and "90: person, bicycle, car, motorcycle ..." in told
    assert "RGB, short side 320, long side at most 1333, plain bilinear, mean 123.675" in told
    model, meta, config = load_model(tmp_path / "out.safetensors", "cpu")
    assert (meta.classes[0], meta.category_ids[0], meta.classes[-1], meta.category_ids[-1]) == (
        "person", 1, "toothbrush", 90)
    assert config.model.input.min_size == 320 and config.model.anchors.convention == "torchvision"
    assert model.state_dict()["rpn.head.cls.weight"].equal(theirs["rpn.head.cls_logits.weight"])


def test_new_classes_keep_the_rows_of_both_lists(faster_rcnn, tmp_path, capsys):
    path, theirs = faster_rcnn
    out = tmp_path / "out.safetensors"
    assert main(["import", str(path), str(out), "--new-classes", "gnu,car"]) == 0
    assert "begin anew, but for car, known to both" in capsys.readouterr().out
    tensors, meta = load_weights(out)
    cls = tensors["roi_heads.box_predictor.cls.weight"]
    assert meta.classes == ("gnu", "car") and len(cls) == 3
    assert cls[1:].equal(theirs["roi_heads.box_predictor.cls_score.weight"][[3, 0]])  # car, and the background


def test_classes_that_nobody_knows(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "theirs.pth")
    arguments = ["import", str(tmp_path / "theirs.pth"), str(tmp_path / "out.safetensors")]
    assert main(arguments) == 0
    assert "assumed     names of its 3 classes are not known: give --classes" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    assert main([*arguments, "--classes", str(tmp_path / "names.txt")]) == 0
    assert load_weights(tmp_path / "out.safetensors")[1].classes == ("ant", "bee", "cat")
    assert main([*arguments, "--classes", "ant,bee"]) == 1
    assert "classes must be 3 distinct names, got 2" in capsys.readouterr().err


def test_a_config_of_detectron2_says_what_tensors_do_not(tmp_path, capsys):
    """Trained on RGB images with strides in the 3x3, which nothing in the tensors shows."""
    from detres.build import build_model
    from detres.config import Config
    from detres.weights import detectron2
    from detres.weights.infer import infer
    from detres.weights.source import merged

    model = {"name": "faster_rcnn", "backbone": {"depth": 50, "width": 64, "weights": None}}
    state, _ = detectron2.FAMILIES[0].keymap.to_theirs(build_model(Config.model_validate({"model": model}).model, 3)
                                                       .state_dict())
    family = next(family for family in detectron2.FAMILIES if family.fits(state))
    assumed = merged(family.conventions(infer(family.keymap.to_ours(state)[0])[0]))
    assert assumed["backbone"]["stride_in_1x1"] and assumed["input"]["channel_order"] == "bgr"
    content = {"model": {name: tensor.numpy() for name, tensor in state.items()}, "__author__": "somebody"}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content, protocol=2))
    config = {"VERSION": 2, "_BASE_": "Base-RCNN-FPN.yaml", "INPUT": {"FORMAT": "RGB"},
              "MODEL": {"RESNETS": {"STRIDE_IN_1X1": False}, "PIXEL_MEAN": [123.675, 116.28, 103.53],
                        "PIXEL_STD": [58.395, 57.12, 57.375], "ROI_HEADS": {"NUM_CLASSES": 3}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out.safetensors"
    assert main(["import", str(tmp_path / "model_final.pkl"), str(out), "--config", str(tmp_path / "config.yaml"),
                 "--classes", "a,b,c"]) == 0
    found = Config.model_validate(load_weights(out)[1].config).model
    assert (found.input.channel_order, found.input.std[0], found.backbone.stride_in_1x1) == ("rgb", 58.395, False)


def test_a_config_alone_becomes_a_config(tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text("_BASE_: Base-RCNN-FPN.yaml\nVERSION: 2\nMODEL: {MASK_ON: false}\n"
                                          "SOLVER: {MAX_ITER: 1234, CLIP_GRADIENTS: {ENABLED: true}}\n")
    assert main(["import", "--config", str(tmp_path / "theirs.yaml"), str(tmp_path / "ours.yaml")]) == 0
    told = capsys.readouterr().out
    assert "not translated: SOLVER.CLIP_GRADIENTS" in told and "ours.yaml: detres train" in told
    assert main(["config", str(tmp_path / "ours.yaml")]) == 0
    assert "steps: 1234" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, told", [
    (["import"], "give SOURCE and OUT"), (["import", "a.pth"], "give SOURCE and OUT"),
    (["import", "a.pth", "b.safetensors", "c"], "give SOURCE and OUT")])
def test_arguments_that_make_no_sense(arguments, told, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("content, told", [
    ({"a.weight": torch.ones(1)}, "weights must be of a model of torchvision, .*tensors such as a.weight"),
    ({"model": {"a.weight": torch.ones(1)}}, "tensors such as a.weight"),
    ([torch.ones(1)], "a dict of tensors, got a list")])
def test_other_files_are_refused(content, told, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=told):
        read_weights(tmp_path / "other.pth")


def test_parts_of_ones_own_are_named(faster_rcnn, tmp_path):
    path, theirs = faster_rcnn
    torch.save({**theirs, "my_head.weight": torch.ones(1)}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="with 1 tensors of other parts, such as my_head.weight"):
        read_weights(tmp_path / "theirs.pth")


def test_a_file_that_lacks_a_layer_is_told_as_a_table(faster_rcnn, tmp_path):
    path, theirs = faster_rcnn
    torch.save({name: tensor for name, tensor in theirs.items() if name != "rpn.head.bbox_pred.bias"},
               tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"(?s)1 tensors that differ.*rpn.head.box.bias +missing +- +\(12,\)"):
        read_weights(tmp_path / "theirs.pth")
