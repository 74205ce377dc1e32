"""A class for every pixel, by a model of semantic segmentation, and the segments of a panoptic one:

    model = detres.load("runs/deeplab")
    out = model.predict("image.jpg")
    out.draw().save("found.jpg")

Legend: N images, C classes, (h, w) content of an image on the canvas, (H, W) size of the image as given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detres.config import InputConfig
from detres.data.images import to_rgb_array
from detres.data.loader import pad_images
from detres.data.transforms import resize_for_eval
from detres.engine.failures import explain_out_of_memory, of_prediction
from detres.inference.batches import ImageLike, in_batches
from detres.inference.draw import draw_labels
from detres.models.panoptic import PanopticSegments

VALUES_AT_ONCE = 2**26  # bounds the float temporaries to about 256 MB


def original_labels(logits: Tensor, content: Sequence[int], size: Sequence[int]) -> Tensor:
    """The likeliest class (H, W) uint8 of each pixel of an image of `size` (H, W), by logits (C, h', w') on a canvas of
    which `content` (h, w) is the image: resized bilinearly, then compared, as in Detectron2's sem_seg_postprocess.

    A share of the classes at a time, as whole photographs at full size can be gigabytes.
    """
    logits = logits[:, :content[0], :content[1]]
    best = logits.new_full(tuple(size), -torch.inf, dtype=torch.float32)
    labels = torch.zeros(tuple(size), dtype=torch.uint8, device=logits.device)
    step = max(1, VALUES_AT_ONCE // best.numel())
    for first in range(0, len(logits), step):
        part = logits[None, first:first + step].float()
        value, label = F.interpolate(part, tuple(size), mode="bilinear", align_corners=False)[0].max(0)
        labels = torch.where(value > best, (label + first).to(torch.uint8), labels)
        best = best.maximum(value)
    return labels


@dataclass(frozen=True, repr=False)
class SemanticPrediction:
    """The class of each pixel of one image; on the CPU."""

    labels: Tensor  # (H, W) uint8, index into the classes of the model
    classes: tuple[str, ...]
    image: np.ndarray = field(compare=False)  # (H, W, 3) uint8 RGB
    path: str | None = None  # where the image was read from

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        return f"SemanticPrediction({self.path or 'image'}: {shares})"

    def shares(self) -> dict[str, float]:
        """The part of all pixels that each class has, the largest first; without classes that have none."""
        counts = torch.bincount(self.labels.flatten(), minlength=len(self.classes)) / self.labels.numel()
        order = counts.argsort(descending=True, stable=True).tolist()
        return {self.classes[k]: counts[k].item() for k in order if counts[k] > 0}

    def draw(self, **options: Any) -> Image.Image:
        """The image with its classes in translucent colours, and a legend; options are those of
        `detres.inference.draw.draw_labels`."""
        return draw_labels(self.image, self.labels.numpy(), self.classes, **options)

    def label_image(self) -> Image.Image:
        """The labels as a grey image, a byte a pixel: written as PNG it is a label map."""
        return Image.fromarray(self.labels.numpy())


class SemanticPredictor:
    """A model of semantic segmentation with its classes and preprocessing."""

    def __init__(self, model: nn.Module, classes: Sequence[str], preprocessing: InputConfig):
        self.model, self.classes, self.preprocessing = model.eval(), tuple(classes), preprocessing

    def predict(self, images: ImageLike | Sequence[ImageLike], *, min_size: int | None = None,
                max_size: int | None = None, batch_size: int = 8,
                paths: Sequence[str] | None = None) -> SemanticPrediction | list[SemanticPrediction]:
        """The class of each pixel of an image (a path, a PIL image, or an RGB array (H, W, 3) uint8), or of each of a
        list of them. Options and what it raises are those of `Predictor.predict`."""
        preprocessing = resized(self.preprocessing, min_size, max_size)
        return in_batches(partial(self._predict, preprocessing=preprocessing), images, paths, batch_size)

    @torch.no_grad()
    def _predict(self, items: list[ImageLike], paths: Sequence[str | None],
                 preprocessing: InputConfig) -> list[SemanticPrediction]:
        images = [to_rgb_array(item) for item in items]
        batch = pad_images([resize_for_eval(image, preprocessing) for image in images], preprocessing.size_divisor)
        contents, device = batch.sizes.tolist(), next(self.model.parameters()).device
        sizes = torch.tensor([image.shape[:2] for image in images])
        with explain_out_of_memory(of_prediction, batch, sizes, paths, device):
            logits = self.model(batch.to(device))
            labels = [original_labels(*each).cpu() for each in zip(logits, contents, sizes.tolist())]
        return [SemanticPrediction(*each, image, path) for each, image, path in
                zip(((own, self.classes) for own in labels), images, paths)]


def resized(preprocessing: InputConfig, min_size: int | None, max_size: int | None) -> InputConfig:
    """With other side lengths in pixels, where they are given."""
    changes = {name: side for name, side in (("min_size", min_size), ("max_size", max_size)) if side is not None}
    return InputConfig(**{**preprocessing.model_dump(), **changes})


Merge = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, PanopticSegments]]  # `build.build_merge`


@dataclass(frozen=True)
class PanopticMerger:
    """Instances and semantic labels to one map, whose segments have names."""

    merge: Merge
    classes: tuple[str, ...]  # of things
    category_ids: tuple[int, ...]
    semantic_classes: tuple[str, ...]  # "things", then stuff
    semantic_ids: tuple[int, ...] = ()  # none: as the channels count

    def __call__(self, scores: Tensor, labels: Tensor, bitmaps: Tensor,
                 semantic: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """A map (H, W) int32, and its segments as in COCO's segments_info, with name, score (None of stuff), and label:
        of things, then of stuff."""
        panoptic, found = self.merge(scores, labels, bitmaps, semantic)
        areas = torch.bincount(panoptic.flatten(), minlength=len(found.ids) + 1).tolist()
        semantic_ids = self.semantic_ids or range(len(self.semantic_classes))
        segments = []
        for number, label, is_thing, score in zip(*(column.tolist() for column in (
                found.ids, found.labels, found.is_thing, found.scores))):
            names, ids = (self.classes, self.category_ids) if is_thing else (self.semantic_classes, semantic_ids)
            segments.append({"id": number, "name": names[label], "category_id": ids[label], "isthing": is_thing,
                             "score": score if is_thing else None, "area": areas[number],
                             "label": label if is_thing else len(self.classes) + label - 1})
        return panoptic, segments
