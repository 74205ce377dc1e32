"""Object detection and segmentation on ResNet backbones."""

from __future__ import annotations

__version__ = "0.1.0"
