"""`model.backbone.weights` from files of other toolkits: Caffe's, Detectron2's, torchvision's, timm's."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detres.build import build_model
from detres.config import ModelConfig
from detres.models.resnet import resnet
from detres.weights import detectron2
from detres.weights import torchvision as tv
from detres.weights.backbone import load_backbone

BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}
WIDTH = 8


def config(layout="fpn", name="faster_rcnn", depth=50, **backbone) -> ModelConfig:
    sizes = {"fpn": [[32], [64], [128], [256], [512]]}.get(layout, [[32, 64, 128]])
    return ModelConfig.model_validate({
        "name": name, "anchors": {"sizes": sizes}, "fpn": {"channels": 8}, "box_head": {"fc_dim": 8},
        "backbone": {"depth": depth, "width": WIDTH, "layout": layout, "freeze_stages": 0, **backbone}})


def loaded(path, layout="fpn", name="faster_rcnn", **backbone) -> torch.nn.Module:
    options = config(layout, name, weights=str(path), **backbone)
    model = build_model(options, 3).eval()
    load_backbone(model, options)
    return model


def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def assert_alike(found, expected) -> None:
    """To rounding, of values that grow from stage to stage."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4 * b.abs().max()


def stages_of(model) -> list[torch.Tensor]:
    """Features of C2..C5 of one image, also of a C4 detector."""
    found = model.backbone.body(image())
    return found if len(found) == 4 else [*found, model.roi_heads.box_head(found[-1])]


def randomize(model) -> torch.nn.Module:
    """Norms with values of their own."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.copy_(torch.randn(tensor.shape) / 10)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model.eval()


# ---- Caffe ---------------------------------------------------------------------------------------------------------


def caffe_blobs() -> dict[str, np.ndarray]:
    """Names and shapes of MSRA's R-50.pkl, of width 8."""
    rng = np.random.default_rng(0)
    blobs = {}

    def layer(name, norm, out, inputs, kernel):
        blobs[f"{name}_w"] = rng.normal(0, (2 / (inputs * kernel**2))**0.5, (out, inputs, kernel, kernel))
        blobs[f"{norm}_s"], blobs[f"{norm}_b"] = rng.uniform(0.3, 0.8, out), rng.normal(0, 0.1, out)

    layer("conv1", "res_conv1_bn", WIDTH, 3, 7)
    inputs = WIDTH
    for stage, count in BLOCKS.items():
        inner = WIDTH * 2**(stage - 2)
        for block in range(count):
            place = f"res{stage}_{block}_branch"
            if block == 0:
                layer(f"{place}1", f"{place}1_bn", 4 * inner, inputs, 1)
            for part, (out, into, kernel) in zip("abc", ((inner, inputs, 1), (inner, inner, 3), (4 * inner, inner, 1))):
                layer(f"{place}2{part}", f"{place}2{part}_bn", out, into, kernel)
            inputs = 4 * inner
    blobs |= {"pred_w": rng.normal(size=(10, inputs)), "pred_b": rng.normal(size=10), "conv1_w_momentum": np.zeros(3)}
    return {name: blob.astype(np.float32) for name, blob in blobs.items()}


def caffe_features(blobs, x) -> list[torch.Tensor]:
    """As Caffe computes them: scales and shifts after convolutions, stride in the first 1x1."""
    blobs = {name: torch.from_numpy(blob) for name, blob in blobs.items()}

    def conv(x, name, stride=1, norm=None):
        weight, norm = blobs[f"{name}_w"], norm or f"{name}_bn"
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return x * blobs[f"{norm}_s"][:, None, None] + blobs[f"{norm}_b"][:, None, None]

    x = F.max_pool2d(conv(x, "conv1", 2, "res_conv1_bn").relu(), 3, 2, 1)
    found = []
    for stage, count in BLOCKS.items():
        for block in range(count):
            place, stride = f"res{stage}_{block}_branch", 2 if stage > 2 and block == 0 else 1
            short = conv(x, f"{place}1", stride) if block == 0 else x
            inner = conv(conv(x, f"{place}2a", stride).relu(), f"{place}2b").relu()
            x = (conv(inner, f"{place}2c") + short).relu()
        found.append(x)
    return found


@pytest.fixture(scope="module")
def caffe(tmp_path_factory):
    path, blobs = tmp_path_factory.mktemp("caffe") / "R-50.pkl", caffe_blobs()
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    return path, blobs


@pytest.mark.parametrize("layout, norm", [("fpn", "frozen_bn"), ("c4", "frozen_bn"), ("dc5", "bn")])
def test_features_of_caffes(caffe, layout, norm, caplog):
    path, blobs = caffe
    model = loaded(path, layout, norm=norm, stride_in_1x1=True)
    assert not caplog.records
    expected = caffe_features(blobs, image())[:3 if layout == "dc5" else 4]  # whose last stage is dilated
    assert expected[-1].std() > 0.1
    assert_alike(stages_of(model)[:len(expected)], expected)


def test_caffes_stride(caffe, caplog):
    loaded(caffe[0])
    assert "have, as far as is known, the stride in the first 1x1: say model.backbone.stride_in_1x1=true" in caplog.text
    assert "channel_order=bgr, mean=[103.53, 116.28, 123.675] and std=[1.0, 1.0, 1.0]" in caplog.text


def test_a_file_without_its_blobs_section(caffe, tmp_path):
    path, blobs = caffe
    flat = tmp_path / "R-50.pkl"
    flat.write_bytes(pickle.dumps({**blobs, "__author__": "MSRA"}, protocol=2))
    for a, b in zip(stages_of(loaded(flat, stride_in_1x1=True)), stages_of(loaded(path, stride_in_1x1=True))):
        assert torch.equal(a, b)


def test_group_norms_of_caffe2(tmp_path, caffe):
    blobs = {name.replace("res_conv1_bn", "conv1_gn").replace("_bn_", "_gn_"): blob for name, blob in caffe[1].items()}
    (tmp_path / "R-50-GN.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    model = loaded(tmp_path / "R-50-GN.pkl", norm="gn", stride_in_1x1=True)
    assert model.backbone.body.layer3[5].bn3.weight.equal(torch.from_numpy(caffe[1]["res4_5_branch2c_bn_s"]))


# ---- other toolkits ------------------------------------------------------------------------------------------------


def test_a_backbone_with_detectron2s_names(tmp_path, caplog):
    """As its converter writes torchvision's weights: R-50.pkl, of which nobody knows the stride."""
    body = randomize(resnet(50, width=WIDTH))
    theirs, unknown = detectron2.BACKBONES[1].keymap.to_theirs(
        {f"backbone.body.{name}": tensor for name, tensor in body.state_dict().items()})
    some = {"stem.conv1.norm.running_var", "res2.0.conv1.norm.weight", "res5.0.shortcut.weight"}
    assert not unknown and some <= set(theirs)
    arrays = {name: tensor.numpy() for name, tensor in theirs.items()}
    content = {"model": {**arrays, "stem.fc.weight": np.zeros((10, 256))},
               "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))
    for layout in ("fpn", "c4"):
        assert_alike(stages_of(loaded(tmp_path / "R-50.pkl", layout)), body(image()))
    loaded(tmp_path / "R-50.pkl", stride_in_1x1=True)
    assert not caplog.records


DETECTORS = [(family, layout) for family, layouts in ((detectron2, ("fpn", "c4", "dc5")), (tv, ("fpn",)))
             for layout in layouts]


@pytest.mark.parametrize("toolkit, layout", DETECTORS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("into", ["fpn", "c4", "c5"])
def test_the_body_of_a_detector(toolkit, layout, into, tmp_path, caplog):
    """Its conv5 too, wherever it is and goes; what else it has is not asked for."""
    source = randomize(build_model(config(layout), 7))
    family = next(family for family in toolkit.FAMILIES if not family.keymap.their_names(source.state_dict())[1]
                  and family.fits(family.keymap.their_names(source.state_dict())[0]))
    theirs, _ = family.keymap.to_theirs(source.state_dict())
    torch.save({"model": theirs} if toolkit is detectron2 else theirs, tmp_path / "model_final.pth")
    model = loaded(tmp_path / "model_final.pth", into)
    dilated = 3 if layout == "dc5" else 4
    assert_alike(stages_of(model)[:dilated], stages_of(source)[:dilated])
    a, b = (conv5_of(each) for each in (model, source))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert ("have, as far as is known, the stride in the first 1x1" in caplog.text) == (toolkit is detectron2)


def conv5_of(model) -> dict[str, torch.Tensor]:
    return dict((getattr(model.backbone.body, "layer4", None) or model.roi_heads.box_head).state_dict())


@pytest.mark.parametrize("kind", [{}, {"stem": "deep", "avg_down": True}], ids=["resnet50", "resnet50d"])
def test_timms(kind, tmp_path, caplog):
    """A safetensors file with a classifier, which a detector does not read and a classifier of as many classes does."""
    from safetensors.torch import save_file

    body = randomize(resnet(50, width=WIDTH, **kind))
    fc = {"fc.weight": torch.randn(3, 32 * WIDTH), "fc.bias": torch.randn(3)}
    save_file({**body.state_dict(), **fc}, tmp_path / "model.safetensors")
    assert_alike(stages_of(loaded(tmp_path / "model.safetensors", **kind)), body(image()))
    assert torch.equal(loaded(tmp_path / "model.safetensors", "c5", "classifier", **kind).fc.weight, fc["fc.weight"])
    assert not caplog.records
    loaded(tmp_path / "model.safetensors", stride_in_1x1=True, **kind)
    assert "have the stride in the 3x3: say model.backbone.stride_in_1x1=false" in caplog.text


# ---- what is refused -----------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_runs_code(tmp_path, capsys):
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": Hostile()}}, protocol=2))
    with pytest.raises(ValueError, match=r"got the global \S+print \(.*R-50.pkl\). Nothing of it was run"):
        loaded(tmp_path / "R-50.pkl")
    assert capsys.readouterr().out == ""


def test_a_file_of_another_kind(tmp_path):
    torch.save({f"features.{i}.weight": torch.zeros(3) for i in range(5)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="(?s)must fit the configured ResNet .*features.0.weight +unexpected") as error:
        loaded(tmp_path / "vgg.pth")
    assert len(str(error.value).splitlines()) <= 18
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="a file that begins with b'no weigh'"):
        loaded(tmp_path / "text.pth")


def test_caffes_of_another_depth(caffe):
    with pytest.raises(ValueError, match="weights of another model, model.backbone.depth=50 instead of 101"):
        loaded(caffe[0], depth=101, stride_in_1x1=True)
