"""What turns a pooled region into features, and features into classes and boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TwoFCHead(nn.Module):
    """Two fully connected layers (FPN, arXiv 1612.03144, section 4.2). (M, C, S, S) -> (M, dim)."""

    def __init__(self, channels: int, resolution: int, dim: int = 1024):
        super().__init__()
        self.fc1 = nn.Linear(channels * resolution**2, dim)
        self.fc2 = nn.Linear(dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu_(self.fc2(F.relu_(self.fc1(pooled.flatten(1)))))


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
