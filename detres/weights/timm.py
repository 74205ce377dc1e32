"""timm's ResNets: names of weights, and what it does otherwise.

Its resnet18 to resnet152, resnext50_32x4d, resnext101_32x8d and _64x4d, wide_resnet50_2 and _101_2 have torchvision's
names and are its networks: nothing in their weights tells them apart, and they are read as torchvision's. What only
timm's have is here: resnet50d, 101d and 152d (ResNet-D, arXiv 1812.01187), with their ImageNet classifier.

Features and logits of a given tensor are timm's. Its preprocessing is not all here: mean and deviation are the same,
and the resized short side and the crop below are those of timm's default of each network (for training's resolution:
224 of 256 pixels, 256 of 269 for 101d and 152d), but timm resizes bicubically, detres bilinearly (both antialiased).
Networks with torchvision's names that timm itself trained ("a1_in1k" and others) are resized to 235 pixels for a crop
of 224 there (`crop_pct` 0.95): say `model.input.min_size=235`. Where timm gives a resolution for tests, such as 288,
its published accuracies are of that: `model.input.min_size=288 model.input.crop=288`, of which 50d: 303 for 288.

Not told apart, as anti-aliasing has no weights: resnetaa50d from resnet50d, resnetblur50 from resnet50. Networks with
more weights (squeeze and excitation, tiered stems) are refused.
"""

from __future__ import annotations

from detres.weights.keymap import KeyMap
from detres.weights.source import Family, Sections
from detres.weights.torchvision import CLASSIFIER

TRAINED_AT_256 = (101, 152)  # depths of ResNet-D


def conventions(sections: Sections) -> Sections:
    large = sections["backbone"]["depth"] in TRAINED_AT_256
    return {"input": {"min_size": 269, "crop": 256} if large else {"min_size": 256, "crop": 224},
            "backbone": {"freeze_stages": 2}}


FAMILIES = (
    Family("timm", "ResNet-D", ("conv1.0.weight", "layer2.0.downsample.2.weight", "fc.weight"), KeyMap(CLASSIFIER),
           conventions),
)
