"""From torchvision's file and a JPEG to what is found: `detres.load(FILE).predict(JPEG)` beside its own way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms._presets import ImageClassification, SemanticSegmentation

import detres

from .test_dense_parity import calibrate as calibrate_dense
from .test_torchvision_parity import calibrate, partners

MIN_SIZE, MAX_SIZE = 160, 240
COUNTS = {"maskrcnn_resnet50_fpn": 91, "keypointrcnn_resnet50_fpn": 2, "fcos_resnet50_fpn": 5}
SIZES = [(333, 500), (427, 301), (150, 640)]  # short side up, down, and bound by the long side


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEG files of smooth noise."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = []
    for i, (height, width) in enumerate(SIZES):
        small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        paths.append(folder / f"{i}.jpg")
        small.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def detector(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, min_size=MIN_SIZE,
                                                        max_size=MAX_SIZE, num_classes=COUNTS[name])
    if name.startswith("keypoint"):
        model.roi_heads.detections_per_img = 10  # eight convolutions of 512 channels take long
    if hasattr(model, "roi_heads"):
        model.backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None,
                                             norm_layer=torchvision.ops.FrozenBatchNorm2d)
        calibrate(model, torch.randn(1, 3, 160, 208))
        if COUNTS[name] == 91:  # else no class of so many is likely
            model.roi_heads.box_predictor.cls_score.weight.data.mul_(5)
    else:
        calibrate_dense(model, torch.randn(1, 3, 160, 208))
    return model.eval()


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_detections_from_a_jpeg(name, photos, tmp_path):
    theirs = detector(name)
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    fewer = ["model.box_head.detections_per_image=10"] if name.startswith("keypoint") else []
    ours = detres.load(tmp_path / f"{name}.pth", "cpu", fewer)
    assert ours.category_ids[0] == 1 and ours.classes[0] == ("class 0" if COUNTS[name] == 5 else "person")
    for path in photos[:2] if fewer else photos:
        expected, = theirs([pil_to_tensor(Image.open(path)) / 255])
        found = ours.predict(path, 0.0, min_size=MIN_SIZE, max_size=MAX_SIZE)
        labels = torch.tensor(found.category_ids)
        partner = partners(found.boxes, found.scores, labels, expected, pixels=2e-2)  # 1e-2 of the resized image
        if found.masks is not None:
            bitmaps = expected["masks"][partner, 0] >= 0.5
            assert (found.masks ^ bitmaps).sum() < 0.002 * (found.masks | bitmaps).sum()
        if found.keypoints is not None:
            assert (found.keypoints[..., :2] - expected["keypoints"][partner, :, :2]).abs().median() < 1e-2


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2"])
@torch.no_grad()
def test_classes_from_a_jpeg(name, photos, tmp_path):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    theirs.fc.weight.mul_(30)  # else all classes are alike
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = detres.load(tmp_path / "model.pth", "cpu")
    for path in photos[:2]:
        probabilities = theirs(ImageClassification(crop_size=224)(Image.open(path))[None]).softmax(1)[0]
        found = ours.predict(path, top=5)
        torch.testing.assert_close(found.probabilities, probabilities.topk(5).values, atol=1e-4, rtol=0)
        assert [ours.classes.index(name) for name in found.names] == probabilities.topk(5).indices.tolist()


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
@torch.no_grad()
def test_pixels_from_a_jpeg(name, photos, tmp_path):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=21).eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours = detres.load(tmp_path / "model.pth", "cpu")
    assert ours.classes[:2] == ("background", "aeroplane")
    for path in photos[:2]:
        image = Image.open(path)
        logits = theirs(SemanticSegmentation(resize_size=MIN_SIZE)(image)[None])["out"]
        expected = torch.nn.functional.interpolate(logits, image.size[::-1], mode="bilinear", align_corners=False)
        labels = ours.predict(path, min_size=MIN_SIZE).labels
        assert len(labels.unique()) > 3 and (labels != expected[0].argmax(0)).float().mean() < 1e-3
