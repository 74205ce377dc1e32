"""Tables 1 and 6 of arXiv 1512.03385, and each option of `ResNet` against plain Python or torchvision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from detres.build import build_model, build_resnet
from detres.config import BackboneConfig, ModelConfig
from detres.models.blocks import ProjectionShortcut, ZeroPadShortcut
from detres.models.resnet import ResNet, cifar_resnet, resnet
from detres.structures import ClassTargets, ImageBatch

from .conftest import make_batch, small_config
from .test_resnet import give_statistics


class Classifier(nn.Module):
    """With the pooling and the fc layer that the tables count; plain tensors go in."""

    def __init__(self, body: ResNet, classes: int):
        super().__init__()
        self.body, self.fc = body, nn.Linear(body.channels[-1], classes)

    def forward(self, x):
        return self.fc(self.body(x)[-1].mean((2, 3)))


def weighted_layers(body: ResNet) -> int:
    """As the paper counts: convolutions but for the shortcuts', and the fc layer."""
    return 1 + sum(isinstance(m, nn.Conv2d) for name, m in body.named_modules() if "downsample" not in name)


# --- the tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, options, multiply_adds, table", [
    (18, {"shortcut": "none"}, 1.795e9, 1.8), (18, {"shortcut": "A"}, 1.795e9, 1.8),
    (34, {"shortcut": "none"}, 3.645e9, 3.6), (34, {"shortcut": "A"}, 3.645e9, 3.6),
    (50, {"stride_in_1x1": True}, 3.858e9, 3.8),
    (101, {"stride_in_1x1": True}, 7.570e9, 7.6),
    (152, {"stride_in_1x1": True}, 11.282e9, 11.3)])
def test_multiply_adds_of_table_1(depth, options, multiply_adds, table):
    """The table has one digit after the point; all but its 3.8 of depth 50, where we count 3.858, are rounded."""
    body = resnet(depth, **options)
    analysis = FlopCountAnalysis(Classifier(body, 1000).eval(), torch.zeros(1, 3, 224, 224))
    with torch.no_grad():
        counts = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    count = counts["conv"] + counts["linear"]
    assert abs(count - multiply_adds) < 1e6 and abs(count / 1e9 - table) < (0.06 if depth == 50 else 0.05)
    assert weighted_layers(body) == depth
    assert body.strides == [4, 8, 16, 32] and body.channels[-1] == (512 if depth < 50 else 2048)


@pytest.mark.parametrize("shortcut", ["A", "none"])
@pytest.mark.parametrize("depth, table", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)])
def test_parameters_of_table_6(depth, table, shortcut):
    """Identity shortcuts have none: plain and residual networks are compared at the same number (section 4.2)."""
    with torch.device("meta"):
        body = cifar_resnet(depth, shortcut=shortcut)
    count = sum(p.numel() for p in Classifier(body, 10).parameters()) / 1e6
    assert abs(count - table) < (0.05 if depth in (110, 1202) else 0.005)  # the last digit of the table
    assert weighted_layers(body) == depth and body.channels == [16, 32, 64] and body.strides == [1, 2, 4]


def test_stem_and_maps_of_the_cifar_networks():
    body = cifar_resnet(20)
    assert body.conv1.kernel_size == (3, 3) and body.conv1.stride == (1, 1)
    assert [tuple(f.shape[1:]) for f in body(torch.randn(2, 3, 32, 32))] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("depth", [7, 21, 2])
def test_other_cifar_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 2 .*got {depth}"):
        cifar_resnet(depth)


@pytest.mark.parametrize("make", [lambda: resnet(50, groups=2, group_width=32), lambda: cifar_resnet(20),
                                  lambda: resnet(18, stem="deep", preact=True)])
def test_weights_begin_as_in_arxiv_1502_01852(make):
    """Normal with variance 2 / (k^2 d), its equation 14, d the filters of the layer; norms begin as the identity; no
    dropout (section 3.4)."""
    body = make()
    for module in body.modules():
        assert not isinstance(module, nn.Dropout)
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.bias is None and abs(module.weight.mean()) < 0.2 * expected
            assert module.weight.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * module.weight.numel()))
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()


# --- shortcuts ----------------------------------------------------------------------------------------------------


def test_option_a_pads_zeros():
    x = torch.randn(2, 3, 5, 4)
    expected = torch.zeros(2, 8, 3, 2)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, (2, 3, 3, 2))).tolist():
        expected[n, c, i, j] = x[n, c, 2 * i, 2 * j]
    assert torch.equal(ZeroPadShortcut(5, 2)(x), expected)


@pytest.mark.parametrize("shortcut, projections", [("A", 0), ("B", 3), ("C", 8), ("none", 0)])
def test_options_project_where_the_paper_says(shortcut, projections):
    """In ResNet-18: the three places where the size changes, or all eight units."""
    body = resnet(18, width=8, shortcut=shortcut)
    assert sum(isinstance(m, ProjectionShortcut) for m in body.modules()) == projections


@pytest.mark.parametrize("shortcut", ["B", "none"])
def test_a_plain_unit_is_a_residual_unit_without_its_sum(shortcut):
    block = resnet(18, width=8, shortcut=shortcut).eval().layer1[0]
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        assert torch.equal(block(x), F.relu(branch + x if shortcut == "B" else branch))


# --- ResNeXt and Wide ResNet --------------------------------------------------------------------------------------

GROUPED = {"resnext50_32x4d": (50, 32, 4), "resnext101_32x8d": (101, 32, 8), "resnext101_64x4d": (101, 64, 4),
           "wide_resnet50_2": (50, 1, 128), "wide_resnet101_2": (101, 1, 128)}


@pytest.mark.parametrize("name", list(GROUPED))
def test_keys_and_shapes_are_torchvisions(name):
    depth, groups, group_width = GROUPED[name]
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
        ours = resnet(depth, groups=groups, group_width=group_width).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if k[:3] != "fc."}


@pytest.mark.parametrize("groups, group_width", sorted({v[1:] for v in GROUPED.values()}))
def test_features_are_torchvisions(groups, group_width):
    """With batch norm the same bits; with the frozen one, folded into grouped convolutions, in float64."""
    torch.manual_seed(0)
    blocks, options = (1, 2, 1, 1), {"groups": groups, "group_width": group_width}
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, list(blocks), groups=groups,
                                       width_per_group=group_width)
    theirs = give_statistics(theirs)
    features = create_feature_extractor(theirs, {f"layer{i}": str(i) for i in (1, 2, 3, 4)})
    x = torch.randn(2, 3, 64, 48)
    for norm in ("bn", "frozen_bn"):
        ours = ResNet(bottleneck=True, blocks=blocks, norm=norm, **options).eval()
        ours.load_state_dict(theirs.state_dict(), strict=False)
        if norm == "frozen_bn":
            ours, features, x = ours.double(), features.double(), x.double()
        with torch.no_grad():
            for feature, reference in zip(ours(x), features(x).values(), strict=True):
                assert torch.equal(feature, reference) if norm == "bn" else \
                    (feature - reference).abs().max() < 1e-12 * reference.abs().max()


def test_options_of_bottlenecks_are_refused_elsewhere():
    for options in ({"groups": 2}, {"group_width": 32}, {"deform_stages": 1}):
        with pytest.raises(ValueError, match="without bottlenecks"):
            resnet(18, **options)


# --- ResNet-D -----------------------------------------------------------------------------------------------------


def test_resnet_d_has_the_keys_of_timm():
    keys = set(resnet(50, width=16, stem="deep", avg_down=True, norm="frozen_bn").state_dict())
    norm = {f"{name}.{value}" for name in ("conv1.1", "conv1.4", "bn1")
            for value in ("weight", "bias", "running_mean", "running_var")}
    assert {k for k in keys if not k.startswith("layer")} == norm | {f"conv1.{i}.weight" for i in (0, 3, 6)}
    assert {k.split(".downsample.")[1].split(".")[0] for k in keys if "downsample" in k} == {"1", "2"}
    assert {k.split(".downsample")[0] for k in keys if "downsample" in k} == {f"layer{i}.0" for i in (1, 2, 3, 4)}


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_the_deep_stem_is_three_convolutions(norm):
    body = give_statistics(resnet(18, width=8, stem="deep")).double()
    if norm == "frozen_bn":
        frozen = resnet(18, width=8, stem="deep", norm=norm).double()
        frozen.load_state_dict({k: v for k, v in body.state_dict().items() if "num_batches" not in k})
        body = frozen
    x = expected = torch.randn(2, 3, 31, 44, dtype=torch.float64)
    stem = body.conv1
    assert [(c.kernel_size[0], c.stride[0], c.out_channels) for c in (stem[0], stem[3], stem[6])] == \
        [(3, 2, 4), (3, 1, 4), (3, 1, 8)]
    with torch.no_grad():
        for conv, bn in ((stem[0], stem[1]), (stem[3], stem[4]), (stem[6], body.bn1)):
            expected = F.conv2d(expected, conv.weight, stride=conv.stride, padding=1)
            expected = F.batch_norm(expected, bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()
        torch.testing.assert_close(body.run_stem(x), F.max_pool2d(expected, 3, 2, 1), rtol=1e-12, atol=1e-12)


def test_the_shortcut_of_resnet_d_averages_what_exists():
    """2x2 means, at the border of an odd side the mean of one or two pixels; then the 1x1 without stride."""
    shortcut = ProjectionShortcut(3, 5, 2, "bn", 1e-5, avg_down=True).eval().double()
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    expected = torch.zeros(1, 5, 3, 2, dtype=torch.float64)
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        pixels = x[0, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].flatten(1)
        expected[0, :, i, j] = shortcut[1].weight[:, :, 0, 0] @ pixels.mean(1) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(shortcut(x), expected)
    where = [type(m.downsample[0]).__name__ for m in (resnet(50, width=8, avg_down=True).get_submodule(f"layer{i}.0")
                                                      for i in (1, 2, 3, 4))]
    assert where == ["Identity", "AvgPool2d", "AvgPool2d", "AvgPool2d"]


# --- pre-activation -----------------------------------------------------------------------------------------------


def naive_preact(state, x, blocks, bottleneck, shortcut):
    """arXiv 1603.05027 as its authors' code has it: every unit but the very first begins with norm and relu, those
    where the size changes share them with their shortcut, and a last norm and relu follow the last unit."""
    def activate(x, key):
        return F.batch_norm(x, *(state[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight",
                                                                    "bias"))).relu()

    convs, features = (3 if bottleneck else 2), []
    x = F.max_pool2d(activate(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1"), 3, 2, 1)
    for stage, count in enumerate(blocks, 1):
        for k in range(count):
            key, stride = f"layer{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            if k == 0 and stage > 1:
                x = activate(x, f"layer{stage - 1}.norm")  # what a feature of the stage before is
                features.append(x)
            out, identity = (x if k == 0 else activate(x, f"{key}.bn1")), x
            for i in range(1, convs + 1):
                if i > 1:
                    out = activate(out, f"{key}.bn{i}")
                weight = state[f"{key}.conv{i}.weight"]
                strides = stride if i == (2 if bottleneck else 1) else 1
                out = F.conv2d(out, weight, stride=strides, padding=weight.shape[-1] // 2)
            if f"{key}.downsample.0.weight" in state:
                identity = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride)
            elif out.shape != x.shape:
                assert shortcut == "A"
                identity = torch.cat([x[:, :, ::stride, ::stride]] * 2, 1)
                identity[:, x.shape[1]:] = 0
            x = identity + out
    return [*features, activate(x, f"layer{len(blocks)}.norm")]


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@pytest.mark.parametrize("bottleneck, shortcut", [(False, "A"), (False, "B"), (True, "B")])
def test_preactivation_is_that_of_its_paper(bottleneck, shortcut, norm):
    torch.manual_seed(0)
    blocks = (2, 3)
    options = {"bottleneck": bottleneck, "blocks": blocks, "width": 8, "shortcut": shortcut, "preact": True}
    body = give_statistics(ResNet(**options)).double()
    state = {k: v for k, v in body.state_dict().items() if "num_batches" not in k}
    if norm == "frozen_bn":
        body = ResNet(norm=norm, **options).double()
        body.load_state_dict(state)
    x = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        for feature, expected in zip(body(x), naive_preact(state, x, blocks, bottleneck, shortcut), strict=True):
            torch.testing.assert_close(feature, expected, rtol=1e-10, atol=1e-10)
            assert feature.min() == 0 and feature.std() > 0.1


def test_in_the_last_stage_of_a_c4_detector_the_last_norm_goes_along():
    body = resnet(18, width=8, preact=True)
    conv5 = body.pop_last_stage()
    x = body(torch.randn(1, 3, 64, 64))[-1]
    assert conv5(x).min() == 0 and isinstance(conv5.norm, nn.BatchNorm2d) and conv5[0].bn1 is None


# --- as the config has them ---------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {"depth": 18, "shortcut": "none"}, "option_a": {"depth": 18, "shortcut": "A"},
    "option_c": {"depth": 18, "shortcut": "C"}, "resnext": {"depth": 50, "groups": 8, "group_width": 8},
    "wide": {"depth": 50, "group_width": 128}, "resnet_d": {"depth": 50, "stem": "deep", "avg_down": True},
    "preact": {"depth": 18, "preact": True}, "preact_bottleneck": {"depth": 50, "preact": True, "stride_in_1x1": True},
    "deform": {"depth": 50, "deform_stages": 3},
    "deform_resnext_d": {"depth": 50, "stem": "deep", "avg_down": True, "deform_stages": 1, "groups": 2,
                         "group_width": 32, "preact": True, "norm": "frozen_bn", "freeze_stages": 1},
}


@pytest.mark.parametrize("layout", ["fpn", "c4", "dc5"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_detectors_train_on_every_variant(variant, layout):
    """All parameters but the frozen ones get a finite gradient."""
    backbone = {"width": 8, **VARIANTS[variant]}
    model = build_model(small_config("faster_rcnn", layout, backbone=backbone), 2)
    losses = model(*make_batch(1, 64, 64))
    sum(losses.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained) and len(trained) > 20
    assert model.eval()(make_batch(1, 64, 64)[0]).boxes.shape[0] == 1


def test_every_option_reaches_the_network():
    def signature(**options):
        with torch.device("meta"):
            body = build_resnet(ModelConfig(name="classifier", backbone=BackboneConfig(weights=None, **options)))
        return str(body)

    base = {"depth": 50}
    changes = [{"shortcut": "A"}, {"shortcut": "C"}, {"stem": "deep"}, {"stem": "cifar"}, {"groups": 2},
               {"group_width": 128}, {"preact": True}, {"avg_down": True}, {"deform_stages": 1}, {"deform_stages": 2},
               {"stride_in_1x1": True}]
    signatures = {signature(**{**base, **change}) for change in [{}, *changes]}
    assert len(signatures) == len(changes) + 1


def test_a_cifar_classifier_from_its_config():
    backbone = {"stem": "cifar", "depth": 20, "width": 16, "shortcut": "A", "weights": None, "norm": "bn",
                "freeze_stages": 0}
    model = build_model(ModelConfig.model_validate({"name": "classifier", "backbone": backbone}), 10)
    assert sum(p.numel() for p in model.parameters()) == 269722
    images = ImageBatch(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([[32, 32]] * 2))
    model(images, ClassTargets(torch.tensor([3, 9])))["loss_cls"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("options, message", [
    ({"depth": 51}, "depth must be 18, 34, 50, 101 or 152 with stem=imagenet, got 51"),
    ({"depth": 20, "stem": "deep"}, "depth must be 18, 34, 50, 101 or 152 with stem=deep, got 20"),
    ({"depth": 21, "stem": "cifar"}, "depth must be 6n \\+ 2 with stem=cifar .*, got 21"),
    ({"depth": 50, "shortcut": "none"}, "shortcut must be A, B or C in bottlenecks .*got shortcut=none, depth=50"),
    ({"depth": 18, "groups": 32}, "without bottlenecks .*got groups=32, group_width=64, deform_stages=0"),
    ({"depth": 34, "group_width": 128}, "without bottlenecks .*got groups=1, group_width=128, deform_stages=0"),
    ({"depth": 18, "deform_stages": 1}, "without bottlenecks .*got groups=1, group_width=64, deform_stages=1"),
    ({"depth": 56, "stem": "cifar", "deform_stages": 1}, "without bottlenecks .*deform_stages=1"),
    ({"group_width": 4, "width": 8}, "width \\* group_width must be a multiple of 64.*width=8, group_width=4"),
    ({"avg_down": True, "shortcut": "A"}, "avg_down must go with projections, shortcut B or C, got shortcut=A"),
    ({"preact": True, "shortcut": "C"}, "preact must go with identities, shortcut A or B, got shortcut=C"),
    ({"deform_stages": 5}, "less than or equal to 4"),
])
def test_networks_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**options)


@pytest.mark.parametrize("layout", ["fpn", "c4", "dc5"])
def test_no_detector_on_a_cifar_network(layout):
    backbone = {"stem": "cifar", "depth": 20}
    with pytest.raises(ValueError, match="must go with models that read the last stage alone.*got name=faster_rcnn"):
        small_config("faster_rcnn", layout, backbone=backbone)


@pytest.mark.parametrize("variant", ["preact_bottleneck", "deform", "resnet_d"])
def test_checkpointing_changes_nothing(variant):
    options = {"width": 8, "norm": "gn", **VARIANTS[variant]}
    torch.manual_seed(0)
    straight, saving = resnet(**options), resnet(**options, activation_checkpointing=True)
    saving.load_state_dict(straight.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for model in (straight, saving):
        sum(f.square().mean() for f in model(x)).backward()
    for a, b in zip(straight.parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("variant", ["preact_bottleneck", "resnet_d"])
def test_frozen_stages_do_not_train(variant):
    model = resnet(width=8, norm="bn", **VARIANTS[variant])
    model.freeze(2)
    norms = [m for name in ("conv1", "bn1", "layer1") for m in getattr(model, name).modules()]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in norms)
    sum(f.sum() for f in model(torch.randn(2, 3, 64, 64))).backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"layer2", "layer3", "layer4"}
