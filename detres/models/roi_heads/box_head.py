"""What turns a pooled region into features, and features into classes and boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detres.models.norms import conv_norm, make_conv, make_norm


class ConvFCHead(nn.Module):
    """3x3 convolutions, then fully connected layers. (M, C, S, S) -> (M, dim).

    Two fully connected layers in FPN (arXiv 1612.03144, section 4.2); four convolutions with norms and one fully
    connected layer in Group Normalization (arXiv 1803.08494, section 4.2).
    """

    def __init__(self, channels: int, resolution: int, dim: int = 1024, fcs: int = 2, convs: int = 0,
                 norm: str = "none"):
        super().__init__()
        self.convs = nn.ModuleList(make_conv(channels, channels, 3, bias=norm == "none") for _ in range(convs))
        self.norms = nn.ModuleList(make_norm(norm, channels) for _ in range(convs))
        widths = [channels * resolution**2] + [dim] * fcs
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        for layer in self.fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            pooled = F.relu_(conv_norm(pooled, conv, norm))
        hidden = pooled.flatten(1)
        for layer in self.fcs:
            hidden = F.relu_(layer(hidden))
        return hidden


class BoxPredictor(nn.Module):
    """Class logits (M, K + 1), background last, and deltas (M, K, 4), or (M, 1, 4) if class-agnostic."""

    def __init__(self, dim: int, num_classes: int, class_agnostic: bool = False):
        super().__init__()
        self.boxes = 1 if class_agnostic else num_classes
        self.cls = nn.Linear(dim, num_classes + 1)
        self.box = nn.Linear(dim, 4 * self.boxes)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        nn.init.zeros_(self.cls.bias)
        nn.init.zeros_(self.box.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls(features), self.box(features).view(-1, self.boxes, 4)
