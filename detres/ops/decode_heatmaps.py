"""Heatmaps over boxes -> keypoints.

Legend: D boxes, J keypoints, S side of a heatmap, (H, W) the canvas, L its H or W, (h, w) a box in whole pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELLS_AT_ONCE = 2**27  # bounds the float temporary to 512 MB
SHARPNESS = -0.75  # the free parameter of cubic convolution (Keys 1981), as torch and OpenCV set it


@torch.no_grad()
def decode_heatmaps(heatmaps: Tensor, boxes: Tensor, size: tuple[int, int], score: str = "probability") -> Tensor:
    """Keypoints (D, J, 3): x, y and score, at the peaks of heatmaps (D, J, S, S) of logits over boxes (D, 4) in pixels
    of a canvas of `size` (height, width), none of which is larger than it.

    As torchvision and Detectron2 do: a heatmap is resized bicubically to the size of its box, rounded up to whole
    pixels, the first largest of which is the keypoint, at its centre. What they differ in is the score. "logit":
    torchvision's, the value of that pixel. "probability": Detectron2's, the exponential of that value over the sum of
    the exponentials of the S * S logits, so that scores do not depend on the size of the box; it may be above 1.

    Resizing is separable and linear in the heatmap: two matrix products, rows @ heatmap @ columns.
    """
    heatmaps, boxes = heatmaps.float(), boxes.float()
    extent = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)  # (D, 2) width, height
    pixels = extent.ceil()
    find = _peaks_inside if heatmaps.device.type == "cpu" else _peaks_whole
    with torch.autocast(heatmaps.device.type, enabled=False):  # bf16 products would move peaks
        peak, x, y = find(heatmaps, pixels, size)
    position = torch.stack([x, y], -1) + 0.5  # (D, J, 2)
    points = boxes[:, None, :2] + position * (extent / pixels)[:, None]
    if score == "probability":
        peak = (peak - heatmaps.flatten(2).logsumexp(-1)).exp()
    return torch.cat([points, peak[..., None]], -1)


def _peaks_whole(heatmaps: Tensor, pixels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns and rows (D, J) of the largest pixels; no loop over boxes, as if all were as large as the canvas.

    Shapes do not depend on the boxes, and the host does not wait for their sizes.
    """
    height, width = size
    side, chunk = heatmaps.shape[-1], max(1, CELLS_AT_ONCE // (heatmaps.shape[1] * height * width))
    found = []
    for maps, extent in zip(heatmaps.split(chunk), pixels.split(chunk)):
        (rows, inside_y), (columns, inside_x) = (_resize(extent[:, axis], length, side)
                                                 for axis, length in ((1, height), (0, width)))
        resized = rows[:, None] @ maps @ columns[:, None].mT  # (D, J, H, W)
        outside = ~(inside_y[:, :, None] & inside_x[:, None])
        found.append(resized.masked_fill_(outside[:, None], -torch.inf).flatten(2).max(-1))
    if not found:
        return (heatmaps.new_zeros(heatmaps.shape[:2]),) * 3
    peak, index = (torch.cat(parts) for parts in zip(*found))
    return peak, index % width, index // width


def _peaks_inside(heatmaps: Tensor, pixels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of which only pixels inside boxes are computed: a small part of the canvas.

    The loop is over boxes, as they differ in size; on a CPU arithmetic is what takes time, not the loop.
    """
    side = heatmaps.shape[-1]
    peak, index = heatmaps.new_zeros(heatmaps.shape[:2]), heatmaps.new_zeros(heatmaps.shape[:2], dtype=torch.int64)
    widths = [int(width) for width in pixels[:, 0]]
    for box, (maps, (width, height)) in enumerate(zip(heatmaps, pixels.int().tolist())):
        rows, columns = (_resize(pixels[box:box + 1, axis], length, side)[0][0]
                         for axis, length in ((1, height), (0, width)))
        peak[box], index[box] = (rows @ maps @ columns.mT).flatten(1).max(-1)
    width = torch.tensor(widths)[:, None]
    return peak, index % width, index // width


def _resize(pixels: Tensor, length: int, side: int) -> tuple[Tensor, Tensor]:
    """Matrices (D, L, S) that resize S cells bicubically to the first `pixels` (D,) of L; which are these (D, L)."""
    pixel = torch.arange(length, device=pixels.device)[None]
    position = (pixel + 0.5) * (side / pixels)[:, None] - 0.5  # in cells, -0.5 to S - 0.5
    cells = torch.arange(-2, side + 2, device=pixels.device)
    weights = _cubic((position[..., None] - cells).abs())  # (D, L, S + 4)
    inner = weights[..., 2:-2].clone()  # beyond the border, the cells at the border count
    inner[..., 0] += weights[..., :2].sum(-1)
    inner[..., -1] += weights[..., -2:].sum(-1)
    return inner, pixel < pixels[:, None]


def _cubic(x: Tensor) -> Tensor:
    """The kernel of cubic convolution at distances x >= 0."""
    a = SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
