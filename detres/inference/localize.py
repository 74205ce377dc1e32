"""Where the object of each class that is asked about is: views of the images, localizers, region classifiers.

    eval.crops  views of an image
    1           the centre crop (model.input.crop), or all of the image
    dense       all of the image, at eval.test_scales if there are any, and mirrored

Legend: N images, Q classes asked about in each, P boxes of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from detres.config import EvalConfig, ModelConfig, RPNConfig, TrainConfig
from detres.geometry.boxes import pairwise_iou, take
from detres.models.localizer import best_boxes
from detres.ops.box_voting import vote_boxes
from detres.structures import Batch, ImageBatch, Proposals

REGIONS_AT_ONCE = 1024  # that a region classifier is given, so that memory is bounded
VOTERS = 300  # candidates of a class that vote, those of the highest scores


@dataclass(frozen=True)
class View:
    """Images as a localizer sees them, and the way of its boxes back: x * scale + shift, in `width` - x if mirrored."""

    images: ImageBatch
    scale: Tensor  # (N, 2) x, y
    shift: Tensor  # (N, 2)
    is_mirrored: bool = False

    def restore(self, boxes: Tensor) -> Tensor:
        """Boxes (N, Q, P, 4) of the view in pixels of the images that it was made of."""
        if self.is_mirrored:
            width = self.images.sizes[:, 1, None, None].to(boxes)
            boxes = torch.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], -1)
        return boxes * self.scale.repeat(1, 2)[:, None, None] + self.shift.repeat(1, 2)[:, None, None]


@torch.no_grad()
def locate(model: nn.Module, images: ImageBatch, labels: Tensor, *, crops: Literal[1, "dense"], crop: int | None,
           nms_thresh: float, count: int, regions: nn.Module | None = None,
           vote_thresh: float | None = None) -> Proposals:
    """The box (N, Q, 1) of each class of `labels` (N, Q), in pixels of `images`.

    model: a localizer; crop: side of the centre crop. Of several views, and of several models (`LocalizerEnsemble`),
    the candidates are joined. regions: a region classifier that judges and moves the `count` best. The box is that of
    the highest score, or with `vote_thresh` the one that is `elected`.
    """
    views = views_of(images) if crops == "dense" else [centre_crop(images, crop)]
    found = candidates(model, views, labels)
    if regions is not None:
        found = judged(regions, images, best_boxes(found, nms_thresh, count), labels)
    return best_boxes(found, nms_thresh, 1) if vote_thresh is None else elected(found, vote_thresh)


def candidates(model: nn.Module, views: Iterable[View], labels: Tensor) -> Proposals:
    """What a localizer finds in the views of some images, in pixels of these."""
    parts = [(view, model(view.images, labels=labels)) for view in views]
    return joined([replace(found, boxes=view.restore(found.boxes)) for view, found in parts])


def elected(found: Proposals, iou_threshold: float) -> Proposals:
    """The box (N, Q, 1) that most agree with: each candidate has the votes, their scores, of those that overlap it by at
    least the threshold; the one with the most becomes the weighted mean of its voters (`ops.box_voting`).

    With a threshold of 0.5 it is what would be right most often, if the object were where a candidate is as often as
    scores say. A network that is unsure scores many boxes alike, and the highest of them is one by chance.
    """
    boxes, weights = found.boxes.flatten(0, 1), torch.where(found.valid, found.scores, 0.0).flatten(0, 1)
    weights, index = weights.topk(min(VOTERS, weights.shape[1]), dim=1)  # (N * Q, V)
    boxes = take(boxes, index)
    votes = torch.where(pairwise_iou(boxes, boxes) >= iou_threshold, weights[:, None], 0.0).sum(2)
    best = torch.where(weights > 0, votes, -1.0).argmax(1, keepdim=True)
    label = torch.zeros_like(index)
    mean = vote_boxes(take(boxes, best), label[:, :1], boxes, label, weights, iou_threshold)
    shape = found.scores.shape[:2]
    score = weights.gather(1, best)
    return Proposals(mean.unflatten(0, shape), score.unflatten(0, shape), (score > 0).unflatten(0, shape))


def build_locate(localizer: ModelConfig, options: EvalConfig, model: nn.Module, regions: nn.Module | None = None
                 ) -> Callable[[ImageBatch, Tensor], Proposals]:
    """`locate` with a localizer of this config, by the test that `options` name."""
    if options.crops == 10:
        raise ValueError("eval.crops must be 1 or dense for localizers, got 10.")
    return partial(locate, model, crops=options.crops, crop=localizer.input.crop, regions=regions,
                   nms_thresh=localizer.rpn.nms_thresh, count=localizer.rpn.post_nms_topk_test,
                   vote_thresh=localizer.box_head.vote_thresh)


def refuse_localizers(name: str, path: object) -> None:
    """For what finds and names objects by itself. Raises ValueError if a model of this `name` does not."""
    if name in ("localizer", "region_classifier"):
        raise ValueError(f"weights must be of a detector or a classifier, got a {name} ({path}), which finds the objects "
                         "of classes that others name. Use detres localize.")


def joined(parts: list[Proposals]) -> Proposals:
    """Boxes (N, Q, P) of several sources, one after another."""
    return Proposals(**{field.name: torch.cat([getattr(part, field.name) for part in parts], 2)
                        for field in fields(Proposals)})


def judged(regions: nn.Module, images: ImageBatch, found: Proposals, labels: Tensor) -> Proposals:
    size = max(1, REGIONS_AT_ONCE // labels.numel())
    columns = zip(found.boxes.split(size, 2), found.scores.split(size, 2), found.valid.split(size, 2))
    return joined([regions(images, proposals=Proposals(*part), labels=labels) for part in columns])


def with_proposals(batches: Iterable[Batch], localizer: nn.Module, rpn: RPNConfig, device: torch.device,
                   options: TrainConfig) -> Iterator[Batch]:
    """The batches on the device, their targets with the boxes that a localizer finds for the true class, in the images
    as they are: what trains region classifiers. They are found anew each time, so there is nothing to store, and images
    may be augmented."""
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            found = candidates(localizer, [centre_crop(batch.images, None)], batch.targets.labels[:, :1])
        found = best_boxes(found, rpn.nms_thresh, rpn.post_nms_topk_test)
        proposals = Proposals(found.boxes[:, 0], found.scores[:, 0], found.valid[:, 0])
        yield replace(batch, targets=replace(batch.targets, proposals=proposals))


class LocalizerEnsemble(nn.Module):
    """Localizers of the same classes as one: the candidates of all."""

    def __init__(self, models: list[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: ImageBatch, labels: Tensor) -> Proposals:
        return joined([model(images, labels=labels) for model in self.models])


# Views


def views_of(images: ImageBatch) -> Iterator[View]:
    """All of each image, at its own size or at those of its pyramid, and mirrored."""
    for scaled in images.pyramid or (images,):
        scale = (images.sizes / scaled.sizes).flip(1).float()
        view = View(replace(scaled, pyramid=()), scale, torch.zeros_like(scale))
        yield view
        yield replace(view, images=mirrored(view.images), is_mirrored=True)


def mirrored(images: ImageBatch) -> ImageBatch:
    """Left and right exchanged within each image's contents; what is beyond them is not defined."""
    column = torch.arange(images.pixels.shape[3], device=images.sizes.device)
    columns = (images.sizes[:, 1, None] - 1 - column).clamp(min=0)  # (N, W)
    row = torch.arange(images.pixels.shape[2], device=images.sizes.device)
    return ImageBatch(_gathered(images.pixels, row.expand(len(columns), -1), columns), images.sizes)


def centre_crop(images: ImageBatch, side: int | None) -> View:
    """The middle of each image, of at most `side` pixels a side; None: all of the image."""
    side = side or max(images.pixels.shape[-2:])
    sizes = images.sizes.clamp(max=side)
    first = (images.sizes - sizes) // 2  # (N, 2) y, x
    height, width = (min(side, length) for length in images.pixels.shape[-2:])
    rows = first[:, :1] + torch.arange(height, device=first.device)
    columns = first[:, 1:] + torch.arange(width, device=first.device)
    pixels = _gathered(images.pixels, rows.clamp(max=images.pixels.shape[2] - 1),
                       columns.clamp(max=images.pixels.shape[3] - 1))
    shift = first.flip(1).float()
    return View(ImageBatch(pixels, sizes), torch.ones_like(shift), shift)


def _gathered(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of each image the pixels at its own rows (N, H') and columns (N, W')."""
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
