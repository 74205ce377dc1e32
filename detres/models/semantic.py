"""Semantic segmentation: FCN (arXiv 1411.4038, with dilations), DeepLabV3 (1706.05587), DeepLabV3+ (1802.02611) and
Semantic FPN (1901.02446, section 3.1).

A network is a backbone, a head that reads its maps, and perhaps an auxiliary head on the stage before the last.

Legend: N images, C channels of classes (background is one of them where the data has it), D channels inside a head,
(H, W) the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres import losses
from detres.models.backbone import AllStagesBackbone, FPNBackbone
from detres.models.faster_rcnn import Normalize
from detres.models.norms import conv_norm, make_conv, make_norm
from detres.structures import ImageBatch, SemanticTargets


class SemanticSegmenter(nn.Module):
    """head, aux_head: (maps of the backbone, sizes (N, 2) of the contents) -> logits (N, C, h, w); aux_head None: none.
    loss: see `losses.semantic_loss`; aux_weight: of the loss of aux_head."""

    def __init__(self, normalize: Normalize, backbone: AllStagesBackbone | FPNBackbone, head: nn.Module,
                 aux_head: nn.Module | None = None, *, loss: str = "ce", loss_weight: float = 1.0,
                 aux_weight: float = 0.5):
        super().__init__()
        self.normalize, self.backbone, self.head, self.aux_head = normalize, backbone, head, aux_head
        self.loss, self.loss_weight, self.aux_weight = loss, loss_weight, aux_weight

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ("loss_semantic",) if self.aux_head is None else ("loss_semantic", "loss_aux")

    def forward(self, images: ImageBatch, targets: SemanticTargets | None = None) -> dict[str, Tensor] | Tensor:
        """Logits (N, C, H, W), or losses by name if targets are given, in training and evaluation mode alike."""
        features = self.features(images)
        logits = on_canvas(self.head(features, images.sizes), images)
        if targets is None:
            return logits
        found = {"loss_semantic": losses.semantic_loss(logits, targets.labels, self.loss) * self.loss_weight}
        if self.aux_head is not None:
            logits = on_canvas(self.aux_head(features, images.sizes), images)
            found["loss_aux"] = losses.semantic_loss(logits, targets.labels, self.loss) * self.aux_weight
        return found

    def features(self, images: ImageBatch) -> list[Tensor]:
        return self.backbone(self.normalize(images))


def on_canvas(logits: Tensor, images: ImageBatch) -> Tensor:
    """Logits of any size -> (N, C, H, W) fp32."""
    return _resize(logits.float(), images.pixels)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class ConvNormReLU(nn.Module):
    """relu(norm(conv(x))); norm as in `norms.make_norm`."""

    def __init__(self, in_channels: int, channels: int, kernel: int, norm: str, dilation: int = 1):
        super().__init__()
        self.conv = make_conv(in_channels, channels, kernel, dilation=dilation, bias=norm == "none")
        self.norm = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(conv_norm(x, self.conv, self.norm))


class FCNHead(nn.Module):
    """One 3x3 and the predictor on one stage: torchvision's; the skips of the paper are left out, as there.

    stage: which of the backbone's maps; channels: a fourth of its own by default.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int | None = None, norm: str = "bn",
                 dropout: float = 0.1, stage: int = -1):
        super().__init__()
        channels = channels or in_channels // 4
        self.stage = stage
        self.conv = ConvNormReLU(in_channels, channels, 3, norm)
        self.dropout = nn.Dropout(dropout)
        self.predict = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        return self.predict(self.dropout(self.conv(features[self.stage])))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (arXiv 1706.05587, section 3.3): a 1x1, a 3x3 of each dilation, and the mean of
    the image, side by side; a 1x1 of all of them. (N, in_channels, h, w) -> (N, D, h, w).

    The mean is over the content of each image, so that it does not depend on what an image is batched with; torchvision
    takes that of the canvas. Without padding they are the same.
    """

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], stride: int, norm: str, dropout: float):
        super().__init__()
        self.stride = stride
        self.branches = nn.ModuleList([ConvNormReLU(in_channels, channels, 1, norm),
                                       *(ConvNormReLU(in_channels, channels, 3, norm, rate) for rate in rates)])
        self.pool = ConvNormReLU(in_channels, channels, 1, norm)
        self.project = ConvNormReLU((len(rates) + 2) * channels, channels, 1, norm)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        if len(x) == 1 and self.training and isinstance(self.pool.norm, nn.BatchNorm2d):
            raise ValueError("batches must have two images or more on each process, got 1: the batch norm of the image "
                             "mean (DeepLab) has no variance otherwise. Raise train.batch_size, lower "
                             "train.accumulate, or set model.semantic_head.norm=gn.")
        whole = self.pool(mean_inside(x, sizes, self.stride)).expand(-1, -1, *x.shape[-2:])
        return self.dropout(self.project(torch.cat([*(branch(x) for branch in self.branches), whole], 1)))


def mean_inside(x: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """Means (N, D, 1, 1) of maps (N, D, h, w) over the cells that hold some of the content of `sizes` (N, 2)."""
    cells = (sizes + stride - 1) // stride  # (N, 2)
    height, width = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    inside = (height < cells[:, 0, None])[:, None, :, None] & (width < cells[:, 1, None])[:, None, None, :]
    total = (x * inside).sum((2, 3), keepdim=True, dtype=torch.float32)
    return (total / inside.sum((2, 3), keepdim=True)).to(x.dtype)


class DeepLabV3Head(nn.Module):
    """ASPP, one 3x3, the predictor. rates: dilations of ASPP, by default `default_rates`."""

    def __init__(self, in_channels: int, num_classes: int, *, stride: int, channels: int = 256, norm: str = "bn",
                 dropout: float = 0.5, rates: Sequence[int] | None = None):
        super().__init__()
        rates = default_rates(stride) if rates is None else rates
        self.aspp = ASPP(in_channels, channels, rates, stride, norm, dropout)
        self.conv = ConvNormReLU(channels, channels, 3, norm)
        self.predict = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        return self.predict(self.conv(self.aspp(features[-1], sizes)))


def default_rates(stride: int) -> tuple[int, ...]:
    """6, 12 and 18 at stride 16, doubled at stride 8 (arXiv 1706.05587, section 4.2): equally far in pixels."""
    return tuple(max(1, k * 96 // stride) for k in (1, 2, 3))


class DeepLabV3PlusHead(nn.Module):
    """ASPP, and a decoder that joins it with stage 2 at stride 4 (arXiv 1802.02611, Figure 2): 48 channels of these,
    two 3x3 on both, the predictor. low_channels: of stage 2."""

    def __init__(self, low_channels: int, in_channels: int, num_classes: int, *, stride: int, channels: int = 256,
                 norm: str = "bn", dropout: float = 0.5, rates: Sequence[int] | None = None):
        super().__init__()
        rates = default_rates(stride) if rates is None else rates
        self.aspp = ASPP(in_channels, channels, rates, stride, norm, dropout)
        self.low = ConvNormReLU(low_channels, 48, 1, norm)
        self.decoder = nn.Sequential(ConvNormReLU(channels + 48, channels, 3, norm),
                                     ConvNormReLU(channels, channels, 3, norm))
        self.predict = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        low = self.low(features[0])
        high = _resize(self.aspp(features[-1], sizes), low)
        return self.predict(self.decoder(torch.cat([high, low], 1)))


class SemanticFPNHead(nn.Module):
    """P2..P5 brought to stride 4 by 3x3 and bilinear upsampling in turn, and summed (arXiv 1901.02446, Figure 3).

    `scales[i]` has a 3x3 for each doubling, one for P2; a level is upsampled to the size of the next finer one.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 128, norm: str = "gn",
                 dropout: float = 0.0):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.ModuleList(ConvNormReLU(channels if k else in_channels, channels, 3, norm) for k in range(max(1, level)))
            for level in range(4))
        self.dropout = nn.Dropout(dropout)
        self.predict = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        total = 0
        for level, convs in enumerate(self.scales):
            x = features[level]
            for k, conv in enumerate(convs):
                x = conv(x)
                if level:
                    x = _resize(x, features[level - k - 1])
            total = total + x
        return self.predict(self.dropout(total))
