"""`detres import` on files of other toolkits: what is written, what is said, what is refused."""

from __future__ import annotations

import pickle
import re

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
    assert "classes must be 3 distinct names, got ant, bee" in capsys.readouterr().err
    assert main([*arguments, "--classes", ""]) == 1
    assert "classes must be 3 distinct names, got none" in capsys.readouterr().err
    assert main([*arguments, "--classes", "ant, bee ,cat"]) == 0
    assert load_weights(tmp_path / "out.safetensors")[1].classes == ("ant", "bee", "cat")


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
    ({"conv1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(1), "layer4.0.conv1.weight": torch.ones(1)},
     "Weights of a backbone belong in model.backbone.weights"),
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
    with pytest.raises(ValueError, match=r"(?s)1 tensor that differs.*rpn.head.box.bias +missing +- +\(12,\)"):
        read_weights(tmp_path / "theirs.pth")


# ---- what files are not, or do not say -----------------------------------------------------------------------------


def small(num_classes=4):
    """torchvision's Faster R-CNN on ResNet-18, by its tensors."""
    torch.manual_seed(0)
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return torchvision.models.detection.FasterRCNN(backbone, num_classes).state_dict()


@pytest.mark.parametrize("name, tensor, told", [
    ("roi_heads.box_predictor.cls_score.weight", None, "without 'roi_heads.box_predictor.cls.weight'"),
    ("roi_heads.box_predictor.cls_score.weight", torch.zeros(()), "whose shapes do not fit each other"),
    ("roi_heads.box_head.fc6.weight", torch.zeros(3), "whose shapes do not fit each other")])
def test_tensors_that_make_no_model(name, tensor, told, tmp_path):
    state = small()
    state[name] = tensor
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=f"weights must have all tensors of torchvision's R-CNN, got .*{told}"):
        read_weights(tmp_path / "theirs.pth")


@pytest.mark.parametrize("count, first, told", [
    (1, "class 0", "names of its 1 classes are not known"),
    (20, "aeroplane", r"those of a published data set of as many \(aeroplane, bicycle, bird ...\): give --classes")])
def test_classes_by_their_number_alone_are_told(count, first, told, tmp_path, caplog):
    torch.save(small(count + 1), tmp_path / "theirs.pth")
    _, meta, _ = load_model(tmp_path / "theirs.pth", "cpu")
    assert meta.classes[0] == first and re.search(rf"theirs.pth: .*{told}", caplog.text)


def test_values_that_are_not_finite_are_told(tmp_path):
    state = small()
    state["rpn.head.bbox_pred.bias"][0] = torch.nan
    torch.save(state, tmp_path / "theirs.pth")
    assert any("not finite, such as rpn.head.box.bias" in note for note in read_weights(tmp_path / "theirs.pth").notes)


def test_half_precision_computes_in_single(tmp_path):
    torch.save({name: tensor.bfloat16() for name, tensor in small().items()}, tmp_path / "theirs.pth")
    model, _, _ = load_model(tmp_path / "theirs.pth", "cpu")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_published_files_are_told_by_their_content(tmp_path, monkeypatch):
    """Not by a name or a folder, which others may have and which they may lose."""
    from detres.weights import detectron2, zoo
    from detres.weights import torchvision as source

    folder = tmp_path / "Cityscapes"
    folder.mkdir()
    file = folder / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    torch.save(small(), file)
    assert source.published(file) is None and detectron2.published(file) is None
    assert read_weights(file).meta.config["model"]["backbone"]["norm_eps"] == 1e-5 and read_weights(file).notes
    weights = torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1
    sha256 = zoo.checksum(file, "sha256")[:8]
    monkeypatch.setattr(source, "_by_checksum", lambda: {sha256: weights})
    renamed = file.rename(tmp_path / "mine.pth")
    assert read_weights(renamed).meta.config["model"]["backbone"]["norm_eps"] == 0 and not read_weights(renamed).notes
    md5 = zoo.checksum(renamed, "md5")[:6]
    monkeypatch.setitem(detectron2.MODELS, "Cityscapes/mask_rcnn_R_50_FPN", f"142423278/{md5}")
    assert detectron2.published(renamed)["input"]["max_size"] == 2048


def test_own_weights_are_read_as_they_say(tmp_path, capsys):
    torch.save(small(), tmp_path / "theirs.pth")
    own = str(tmp_path / "own.safetensors")
    assert main(["import", str(tmp_path / "theirs.pth"), own, "--classes", "a,b,c"]) == 0
    for more in (["--classes", "x,y,z"], ["model.input.min_size=300"]):
        assert main(["import", own, str(tmp_path / "out.safetensors"), *more]) == 1
        assert "must be read as they describe themselves" in capsys.readouterr().err


@pytest.mark.parametrize("out, arguments, told", [
    ("folder", ["--format", "torchvision"], "which is a folder"),
    ("file.pth/out.pth", ["--format", "torchvision"], "which cannot be made"),
    ("out.safetensors", ["--format", "torchvision"], "for torchvision. Say .*out.pth"),
    ("out.pth", ["--format", "safetensors"], "for safetensors. Say .*out.safetensors")])
def test_outputs_that_cannot_be(out, arguments, told, tmp_path, capsys):
    torch.save(small(), tmp_path / "theirs.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.pth").touch()
    assert main(["export", str(tmp_path / "theirs.pth"), str(tmp_path / out), *arguments]) == 1
    assert re.search(f"error: output must be .*{told}", capsys.readouterr().err)


def test_a_proposal_network_has_no_new_classes(tmp_path):
    from detres.build import build_model
    from detres.config import Config
    from detres.engine.checkpoint import WeightsMeta, save_weights
    from detres.weights.run import import_weights

    config = Config.model_validate({"model": {"name": "rpn", "backbone": {"depth": 18, "width": 16, "weights": None}}})
    save_weights(tmp_path / "rpn.safetensors", build_model(config.model, 1).state_dict(),
                 WeightsMeta(config.model_dump(mode="json"), ("object",), (1,), 0, {}))
    with pytest.raises(ValueError, match="new classes must be for a model that tells classes apart"):
        import_weights(tmp_path / "rpn.safetensors", tmp_path / "out.safetensors", new_classes=["a", "b"])


def test_a_folder_that_hides_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet50").mkdir()
    with pytest.raises(FileNotFoundError, match="It hides the published weights of that name"):
        read_weights("resnet50")


def test_commands_take_urls(tmp_path, monkeypatch, capsys):
    """Which are no paths: these lose a slash."""
    from detres.weights import zoo

    def offline(url, *arguments, **options):
        raise OSError(f"no network to {url}")

    monkeypatch.setattr(zoo.torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for arguments in (["predict", "https://x.invalid/a.pth", "image.jpg"], ["eval", "https://x.invalid/a.pth"],
                      ["export", "https://x.invalid/a.pth", str(tmp_path / "a.pth"), "--format", "torchvision"]):
        (tmp_path / "image.jpg").touch()
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 1
        assert "got no network to https://x.invalid/a.pth" in capsys.readouterr().err


# ---- weights: in a config ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides, told", [
    (["model=5"], "model must be a mapping, got 5"),
    (["model.weights=other.pth"], r"model.weights must be null or left out beside weights, got other.pth \(command line\)"),
    (["model.name=retinanet"], r"weights must be of a retinanet, which model.name asks for \(command line\), got those"),
    (["model.name.x=5"], "model.name must be faster_rcnn"),
    (["weights=none.pth", "train.lrr=1"], r"(?s)train.lrr is not .*none.pth, which does not.*\(weights, command")])
def test_weights_of_a_config_that_cannot_be(overrides, told, tmp_path):
    from detres.config_file import ConfigError, load_config

    torch.save(small(), tmp_path / "theirs.pth")
    with pytest.raises(ConfigError, match=told):
        load_config(None, [f"weights={tmp_path / 'theirs.pth'}", *overrides])


def test_a_typo_in_a_name_of_the_zoo_is_no_path():
    with pytest.raises(ValueError, match="Did you mean 'COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x'"):
        read_weights("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3xx")


def test_a_config_of_detectron2_does_not_go_with_torchvisions_weights(faster_rcnn, tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text("_BASE_: Base-RCNN-FPN.yaml\nVERSION: 2\nMODEL: {MASK_ON: false}\n")
    assert main(["import", str(faster_rcnn[0]), str(tmp_path / "out.safetensors"), "--config",
                 str(tmp_path / "theirs.yaml")]) == 1
    assert "config must go with weights of Detectron2" in capsys.readouterr().err
