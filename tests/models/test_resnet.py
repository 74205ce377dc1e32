from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from detres.models.norms import FrozenBatchNorm2d
from detres.models.resnet import DEPTHS, resnet


def give_statistics(model):
    """Running statistics of real activations, so that features are of order one."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model(torch.randn(2, 3, 96, 96))
    return model.eval()


def theirs_and_ours(depth: int, norm: str):
    """torchvision's network as a list of features per stage, ours with its weights, and images."""
    theirs = give_statistics(getattr(torchvision.models, f"resnet{depth}")(weights=None))
    ours = resnet(depth, norm=norm).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and all(k.startswith("fc.") or k.endswith("num_batches_tracked") for k in unexpected)
    features = create_feature_extractor(theirs, {f"layer{i}": str(i) for i in (1, 2, 3, 4)})
    return features, ours, torch.randn(2, 3, 64, 96)


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@pytest.mark.parametrize("depth", [18, 50])
def test_features_equal_torchvisions(depth, norm):
    theirs, ours, x = theirs_and_ours(depth, norm)
    with torch.no_grad():
        for feature, reference in zip(ours.double()(x.double()), theirs.double()(x.double()).values(), strict=True):
            assert (feature - reference).abs().max() / reference.abs().max() < 1e-12


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_batch_norm_gives_the_bits_of_torchvision(depth):
    theirs, ours, x = theirs_and_ours(depth, "bn")
    with torch.no_grad():
        for feature, reference in zip(ours(x), theirs(x).values(), strict=True):
            assert torch.equal(feature, reference)


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_folding_adds_no_error(depth):
    """In float32, where no two orders of operations agree: both are as far from the result in float64."""
    theirs, ours, x = theirs_and_ours(depth, "frozen_bn")
    with torch.no_grad():
        pairs = list(zip(ours(x), theirs(x).values(), strict=True))
        for (feature, reference), exact in zip(pairs, theirs.double()(x.double()).values(), strict=True):
            assert (feature - exact).norm() < 1.5 * (reference - exact).norm()


@pytest.mark.parametrize("depth", list(DEPTHS))
def test_keys_and_shapes_are_torchvisions(depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).state_dict()
        ours = resnet(depth).state_dict()
    expected = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == expected


def test_dilated_stages_keep_their_resolution():
    with torch.device("meta"):
        maps = resnet(18, shortcut="C", dilated_stages=2)(torch.randn(1, 3, 64, 64))
    assert [f.shape[-1] for f in maps] == [16, 8, 8, 8]


def test_stride_in_1x1_moves_the_stride():
    for flag, expected in ((True, (2, 1)), (False, (1, 2))):
        block = resnet(50, stride_in_1x1=flag).layer2[0]
        assert (block.conv1.stride[0], block.conv2.stride[0]) == expected


def test_frozen_stages_do_not_train():
    model = resnet(18, norm="bn")
    model.freeze(2)
    assert isinstance(model.bn1, FrozenBatchNorm2d) and isinstance(model.layer1[0].bn1, FrozenBatchNorm2d)
    assert isinstance(model.layer2[0].bn1, torch.nn.BatchNorm2d)
    sum(f.sum() for f in model(torch.randn(2, 3, 32, 32))).backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"layer2", "layer3", "layer4"}


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain = resnet(18, width=16, norm="gn")
    saving = resnet(18, width=16, norm="gn", activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for model in (plain, saving):
        sum(f.square().mean() for f in model(x)).backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="depth must be one of .*got 51"):
        resnet(51)
