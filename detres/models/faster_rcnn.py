"""Faster R-CNN (arXiv 1506.01497) and, with a head for masks or keypoints, Mask and Keypoint R-CNN (arXiv 1703.06870).

JPEG to loss goes: `forward` -> backbone -> rpn -> roi_heads -> `losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from detres.models.roi_heads.multi_scale import multi_scale_regions
from detres.models.roi_heads.regions import Pool, Regions
from detres.models.roi_heads.standard import RoIHeads
from detres.models.rpn import RPN
from detres.ops.roi_align import CANONICAL_SIDE
from detres.structures import Detections, ImageBatch, Proposals, Targets


class Normalize(nn.Module):
    """uint8 or float pixels (N, 3, H, W) in 0-255, RGB -> normalised fp32, zero where padded."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], bgr: bool = False):
        super().__init__()
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: ImageBatch) -> Tensor:
        pixels = images.pixels.flip(1) if self.bgr else images.pixels
        pixels = (pixels.float() - self.mean) / self.std
        height, width = (torch.arange(side, device=pixels.device) for side in pixels.shape[-2:])
        inside_y = height < images.sizes[:, 0, None]  # (N, H)
        inside_x = width < images.sizes[:, 1, None]
        return pixels * (inside_y[:, None, :, None] & inside_x[:, None, None, :])


class FasterRCNN(nn.Module):
    """The two-stage detector: the parts are built by `build.build_model`, or by hand.

    canonical_side: of the regions that multi-scale testing aims at, in pixels."""

    def __init__(self, normalize: Normalize, backbone: nn.Module, rpn: RPN, pool: Pool, roi_heads: RoIHeads,
                 canonical_side: float = CANONICAL_SIDE):
        super().__init__()
        self.normalize, self.backbone, self.rpn, self.roi_heads = normalize, backbone, rpn, roi_heads
        self.pool, self.canonical_side = pool, canonical_side

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Of what `forward` gives with targets: known before there is a batch."""
        return ("loss_rpn_cls", "loss_rpn_box", *self.roi_heads.loss_names)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Losses by name if targets are given, in training and evaluation mode alike; else detections."""
        features = self.features(images)
        return self.detect(features, images) if targets is None else self.losses(features, images, targets)

    def losses(self, features: list[Tensor], images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        proposals, rpn_losses = self.rpn(features, images.pixels.shape[-2:], images.sizes, targets)
        return rpn_losses | self.roi_heads.losses(Regions(self.pool, features), proposals, targets, images.sizes)

    def detect(self, features: list[Tensor], images: ImageBatch) -> Detections:
        heads = self.roi_heads
        proposals, regions = self.propose(images, features)
        score = partial(heads.score, regions, sizes=images.sizes)
        found = heads.detect(score, proposals, images.sizes)
        if heads.mask_head is not None:
            found = replace(found, masks=heads.predict_masks(regions, found))
        if heads.keypoint_head is not None:
            heatmaps = heads.predict_heatmaps(regions, found)
            found = replace(found, keypoints=heads.locate_keypoints(heatmaps, found, images.pixels.shape[-2:]))
        return found

    def features(self, images: ImageBatch) -> list[Tensor]:
        return self.backbone(self.normalize(images))

    def propose(self, images: ImageBatch, features: list[Tensor] | None = None) -> tuple[Proposals, Regions]:
        """Where to look, and how the heads see it: at the images' own size, or at those of their pyramid."""
        features = self.features(images) if features is None else features
        proposals, _ = self.rpn(features, images.pixels.shape[-2:], images.sizes)
        if images.pyramid:
            return proposals, multi_scale_regions(self.pool, self.features, images, self.canonical_side)
        return proposals, Regions(self.pool, features)
