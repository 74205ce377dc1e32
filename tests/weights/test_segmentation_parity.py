"""Given torchvision's weights, networks of semantic segmentation compute torchvision's logits and losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn.functional import cross_entropy

from detres.build import build_model
from detres.config import ModelConfig
from detres.models.semantic import on_canvas
from detres.structures import ImageBatch, SemanticTargets
from detres.weights import detectron2
from detres.weights import torchvision as tables
from detres.weights.importers import convert
from detres.weights.known_classes import VOC

KINDS = ["fcn", "deeplabv3"]
BUILDERS = {f"{kind}_resnet{depth}": getattr(torchvision.models.segmentation, f"{kind}_resnet{depth}")
            for kind in KINDS for depth in (50, 101)}
FILE = Path("model.pth")


def calibrate(model) -> None:
    """Random weights that behave like trained ones: statistics of what the layers see, varied scores."""
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over what it sees
        norm.weight.data.uniform_(0.5, 0.9, generator=generator)
        norm.bias.data.normal_(std=0.1, generator=generator)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 96, 96, generator=generator))
    for norm in norms:
        norm.momentum = 0.1


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    torch.manual_seed(0)
    theirs = BUILDERS[f"{request.param}_resnet50"](weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    calibrate(theirs)
    weights = convert(theirs.state_dict(), FILE, model={"backbone": {"norm": "bn"}})
    ours = build_model(ModelConfig.model_validate(weights.meta.config["model"]), len(weights.meta.classes))
    ours.load_state_dict(weights.tensors)
    assert weights.meta.classes == ("background", *VOC)
    return theirs.eval(), ours.eval()


def make_images(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([[height, width]] * n))
    labels = torch.randint(0, 21, (n, height, width), generator=generator).to(torch.uint8)
    labels[:, :9] = 255
    return images, SemanticTargets(labels)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_logits(pair):
    """A batch of one size, then other sizes one at a time, no multiples of any stride."""
    theirs, ours = pair
    for images, _ in (make_images(2, 96, 128), make_images(1, 83, 101), make_images(1, 121, 66)):
        expected = theirs(ours.normalize(images))["out"]
        assert expected.std() > 0.05
        assert_close(ours(images), expected)


@torch.no_grad()
def test_a_batch_of_other_sizes(pair):
    """Zeros around the second image are read as torchvision reads them, but by the image mean of DeepLab, which is of
    the content here; of the canvas if that is said to be the content."""
    theirs, ours = pair
    images, _ = make_images(2, 96, 128)
    canvas = images.sizes.clone()
    images.sizes[1] = torch.tensor([64, 80])
    expected = theirs(ours.normalize(images))["out"]
    assert_close(on_canvas(ours.head(ours.features(images), canvas), images), expected)
    if hasattr(ours.head, "aspp"):
        assert not torch.allclose(ours(images)[1], expected[1], rtol=1e-3)
    else:
        assert_close(ours(images), expected)


@pytest.mark.parametrize("training", [False, True])
def test_losses(pair, training):
    """As references/segmentation/train.py of torchvision: cross-entropy, and half of that of the auxiliary head."""
    theirs, ours = (model.train(training) for model in pair)
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in pair]
    images, targets = make_images(2, 96, 128)
    with torch.no_grad():
        found = theirs(ours.normalize(images))
        out, aux = (cross_entropy(found[name], targets.labels.long(), ignore_index=255) for name in ("out", "aux"))
        own = ours(images, targets)
    for model, state in zip(pair, before):
        model.load_state_dict(state)
        model.eval()
    assert set(own) == {"loss_semantic", "loss_aux"}
    torch.testing.assert_close(own["loss_semantic"], out, rtol=1e-4, atol=0)
    torch.testing.assert_close(own["loss_aux"], 0.5 * aux, rtol=1e-4, atol=0)


@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_name_both_ways(name, aux):
    with torch.device("meta"):
        theirs = BUILDERS[name](weights=None, weights_backbone=None, num_classes=21, aux_loss=aux).state_dict()
    weights = convert(theirs, FILE)
    model = weights.meta.config["model"]
    assert (model["name"], model["backbone"]["depth"]) == (name.partition("_")[0], int(name[-3:].lstrip("t")))
    assert (model["semantic_head"]["aux_weight"], model["backbone"]["layout"]) == (0.5 if aux else 0, "dc4")
    family = next(family for family in tables.FAMILIES if family.fits(theirs))
    back, unknown = family.keymap.to_theirs(weights.tensors)
    assert not unknown and {key: value.shape for key, value in back.items()} == {
        key: value.shape for key, value in theirs.items() if not key.endswith("num_batches_tracked")}


def test_semantic_head_of_detectron2(shared_data):
    path = shared_data.parent / "reference/detectron2/state_dicts/panoptic_fpn_R_50_3x.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    state = {name: torch.empty(tensor["shape"], device="meta")
             for name, tensor in json.loads(path.read_text())["state_dict"].items()}
    weights = convert(state, FILE)
    model = weights.meta.config["model"]
    assert (model["name"], len(weights.meta.classes)) == ("panoptic_fpn", 80)
    assert weights.meta.semantic_classes[:2] == ("things", "banner") and len(weights.meta.semantic_ids) == 54
    assert {"channels": 128, "norm": "gn", "loss_weight": 0.5}.items() <= model["semantic_head"].items()
    back, unknown = detectron2.FAMILIES[0].keymap.to_theirs(weights.tensors)
    assert not unknown and {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in state.items() if "pixel_" not in name and "anchor_generator" not in name}
    alone = {name: tensor for name, tensor in state.items() if name.startswith(("backbone.", "sem_seg_head."))}
    weights = convert(alone, FILE)
    assert weights.meta.config["model"]["name"] == "semantic_fpn" and len(weights.meta.classes) == 54
