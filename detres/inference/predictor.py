"""Three lines from a weights file to pictures:

    model = detres.load("runs/mine")
    out = model.predict("image.jpg")
    out.draw().save("found.jpg")

Legend: N images, D detections, (H, W) size of the image as given.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detres.build import build_merge, build_model
from detres.config import Config, InputConfig, ModelConfig
from detres.config_file import override
from detres.data.images import to_rgb_array
from detres.data.loader import pad_images
from detres.data.masks import encode_masks
from detres.data.transforms import resize_for_eval, scale_pyramid, tight_box
from detres.engine.checkpoint import WeightsMeta
from detres.engine.distributed import pick_device
from detres.engine.failures import explain_out_of_memory, of_prediction
from detres.inference.batches import ImageLike, in_batches
from detres.inference.classify import ClassPredictor
from detres.inference.draw import draw
from detres.inference.ensemble import build_ensemble
from detres.inference.localize import refuse_localizers
from detres.inference.segment import PanopticMerger, SemanticPredictor, original_labels, resized
from detres.ops.paste_masks import paste_masks
from detres.structures import Detections
from detres.weights.importers import read_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Prediction:
    """What was found in one image, best first, in its own pixels; on the CPU."""

    boxes: Tensor  # (D, 4) xyxy float32
    scores: Tensor  # (D,)
    labels: Tensor  # (D,) int64, index into the classes of the model
    names: list[str]  # class of each detection
    category_ids: list[int]  # the data set's own id of each detection's class
    masks: Tensor | None  # (D, H, W) bool
    image: np.ndarray = field(compare=False)  # (H, W, 3) uint8 RGB
    path: str | None = None  # where the image was read from
    keypoints: Tensor | None = None  # (D, J, 3) x, y, score; all 0 for classes that have none
    keypoint_names: tuple[str, ...] = ()  # J
    skeleton: tuple[tuple[int, int], ...] = ()  # keypoints that a line joins
    panoptic: Tensor | None = None  # of a panoptic model: (H, W) int32 ids of its segments, 0 where there is none
    segments: list[dict[str, Any]] = field(default_factory=list)  # id, name, category_id, isthing, score, area
    semantic: Tensor | None = None  # of a panoptic model: (H, W) uint8 likeliest class, 0 things, then stuff

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        counts = {name: self.names.count(name) for name in self.names}
        found = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
        return f"Prediction({self.path or 'image'}, {height}x{width} pixels: {found})"

    def above(self, score: float) -> Prediction:
        """Only the detections with at least this score."""
        return self[self.scores >= score]

    def __getitem__(self, which: Tensor | slice | list[int]) -> Prediction:
        """Some of the detections: a slice, indices, or a mask of D booleans. Maps of pixels stay as they are."""
        rows = torch.arange(len(self))[which]
        return replace(self, boxes=self.boxes[rows], scores=self.scores[rows], labels=self.labels[rows],
                       names=[self.names[i] for i in rows], category_ids=[self.category_ids[i] for i in rows],
                       masks=None if self.masks is None else self.masks[rows],
                       keypoints=None if self.keypoints is None else self.keypoints[rows])

    def draw(self, **options: Any) -> Image.Image:
        """The image with what was found, by a panoptic model its segments; options are those of
        `detres.inference.draw.draw`."""
        return draw(self.image, self if self.panoptic is None else self.of_segments(), **options)

    def of_segments(self) -> Prediction:
        """The segments of the panoptic map as detections: those of stuff have no score, nan, and labels after things.
        """
        maps = [self.panoptic == segment["id"] for segment in self.segments]
        boxes = [tight_box(inside.numpy()) for inside in maps]
        scores = [math.nan if segment["score"] is None else segment["score"] for segment in self.segments]
        labels = [segment["label"] for segment in self.segments]
        return Prediction(torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)), torch.tensor(scores),
                          torch.tensor(labels, dtype=torch.int64), [segment["name"] for segment in self.segments],
                          [segment["category_id"] for segment in self.segments],
                          torch.stack(maps) if maps else self.panoptic.new_zeros(0, *self.panoptic.shape).bool(),
                          self.image, self.path)

    def numpy(self) -> dict[str, np.ndarray | None]:
        """Arrays "boxes", "scores", "labels", "masks" and "keypoints" (None for a model without them)."""
        return {name: None if (value := getattr(self, name)) is None else value.numpy()
                for name in ("boxes", "scores", "labels", "masks", "keypoints")}

    def to_coco(self, image_id: int | str) -> list[dict]:
        """COCO results; masks as compressed RLE, keypoints x, y, score one after another."""
        codes = None if self.masks is None else encode_masks(self.masks)
        results = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            result = {"image_id": image_id, "category_id": self.category_ids[i], "bbox": [x1, y1, x2 - x1, y2 - y1],
                      "score": float(self.scores[i])}
            if codes is not None:
                result["segmentation"] = codes[i]
            if self.keypoints is not None:
                result["keypoints"] = self.keypoints[i].flatten().tolist()
            results.append(result)
        return results


class Predictor:
    """A model with its classes and preprocessing; `pyramid` (`transforms.scale_pyramid`) for multi-scale testing;
    `keypoints` as in `WeightsMeta`; `panoptic` for panoptic models."""

    def __init__(self, model: nn.Module, classes: Sequence[str], category_ids: Sequence[int],
                 preprocessing: InputConfig, pyramid: Sequence[InputConfig] = (),
                 keypoints: Mapping[str, Sequence] | None = None, panoptic: PanopticMerger | None = None):
        self.model = model.eval()
        self.classes, self.category_ids, self.preprocessing = tuple(classes), tuple(category_ids), preprocessing
        self.pyramid, self.panoptic = tuple(pyramid), panoptic
        layout = keypoints or {}
        self.keypoint_names = tuple(layout.get("names", ()))
        self.skeleton = tuple(map(tuple, layout.get("skeleton", ())))
        own = layout.get("classes") or self.classes
        self.has_keypoints = torch.tensor([name in own for name in self.classes])  # (K,)

    def predict(self, images: ImageLike | Sequence[ImageLike], score_thresh: float = 0.5, *,
                min_size: int | None = None, max_size: int | None = None, batch_size: int = 8,
                paths: Sequence[str] | None = None) -> Prediction | list[Prediction]:
        """Detect in an image (a path, a PIL image, or an RGB array (H, W, 3) uint8), or in each of a list of them.

        `score_thresh` 0.5 keeps what is worth looking at; 0 keeps all that the model gives (its own threshold, 0.05 by
        default, is meant for evaluation); of a panoptic model what is not kept is not in the map, for which thresholds
        of the model's own count besides. `min_size` and `max_size` replace the side lengths in pixels that images
        are resized to. A list is run in padded batches of `batch_size`. `paths` says where arrays of a list were read
        from.

        Raises ImageError for a file that is no readable image, ValueError or TypeError for what is no RGB image,
        torch.OutOfMemoryError that names the batch and what to change.
        """
        preprocessing = resized(self.preprocessing, min_size, max_size)
        predict = partial(self._predict, score_thresh=score_thresh, preprocessing=preprocessing)
        return in_batches(predict, images, paths, batch_size)

    @torch.no_grad()
    def _predict(self, items: list[ImageLike], paths: Sequence[str | None], *, score_thresh: float,
                 preprocessing: InputConfig) -> list[Prediction]:
        images = [to_rgb_array(item) for item in items]
        batch, *pyramid = (pad_images([resize_for_eval(image, scale) for image in images], scale.size_divisor)
                           for scale in (preprocessing, *self.pyramid))
        batch = replace(batch, pyramid=tuple(pyramid))
        sizes = torch.tensor([image.shape[:2] for image in images])
        contents, device = batch.sizes.tolist(), next(self.model.parameters()).device
        with explain_out_of_memory(of_prediction, batch, sizes, paths, device):
            batch = batch.to(device)
            detections = self.model(batch).rescale(batch.sizes, sizes)
            return [self._prediction(detections, i, image, path, score_thresh, contents[i])
                    for i, (image, path) in enumerate(zip(images, paths))]

    def _prediction(self, found: Detections, i: int, image: np.ndarray, path: str | None, score_thresh: float,
                    content: Sequence[int]) -> Prediction:
        keep = found.valid[i] & (found.scores[i] >= score_thresh)
        boxes, labels = found.boxes[i, keep].float(), found.labels[i, keep].cpu()
        masks = None
        if found.masks is not None:
            masks = paste_masks(found.masks[i, keep], boxes, image.shape[:2], convention=found.paste)
        points = None
        if found.keypoints is not None:
            points = found.keypoints[i, keep].float().cpu() * self.has_keypoints[labels, None, None]
        semantic, panoptic, segments = None, None, []
        if found.semantic is not None:
            semantic = original_labels(found.semantic[i], content, image.shape[:2])
            panoptic, segments = self.panoptic(found.scores[i, keep].float(), found.labels[i, keep], masks, semantic)
        return Prediction(boxes.cpu(), found.scores[i, keep].float().cpu(), labels, [self.classes[k] for k in labels],
                          [self.category_ids[k] for k in labels], None if masks is None else masks.cpu(), image, path,
                          points, self.keypoint_names, self.skeleton, None if panoptic is None else panoptic.cpu(),
                          segments, None if semantic is None else semantic.cpu())


def load_predictor(path: str | Path | Sequence[str | Path], device: str = "auto",
                   overrides: Sequence[str] = ()) -> Predictor | ClassPredictor | SemanticPredictor:
    """From a weights file or a run folder, which carry all that is needed, or an ensemble of several (`load_model`)."""
    model, meta, config = load_model(path, device, overrides)
    refuse_localizers(config.model.name, path)
    if config.model.name == "classifier":
        return ClassPredictor(model, meta.classes, config)
    preprocessing = config.model.input
    if config.model.is_semantic:
        return SemanticPredictor(model, meta.classes, preprocessing)
    panoptic = None
    if config.model.is_panoptic:
        panoptic = PanopticMerger(build_merge(config.model.panoptic), meta.classes, meta.category_ids,
                                  meta.semantic_classes, meta.semantic_ids)
    return Predictor(model, meta.classes, meta.category_ids, preprocessing, scale_pyramid(preprocessing, config.eval),
                     meta.keypoints, panoptic)


def load_model(path: str | Path | Sequence[str | Path], device: str = "auto",
               overrides: Sequence[str] = ()) -> tuple[nn.Module, WeightsMeta, Config]:
    """A model in eval mode, with what its weights file (or run folder) says about it, and the config in use.

    That is the config of the weights with `device`, then with `overrides` (key=value) that keep the network.
    Several paths make an ensemble, which has the description and the config of the first.
    Logs what was assumed of weights of another toolkit. Raises what `read_weights` does, ConfigError for bad overrides,
    and ValueError for weights that do not fit their own model, for overrides that make another one, or for models that
    make no ensemble.
    """
    if isinstance(path, (str, os.PathLike)):
        return _load_one(path, device, overrides)
    members = [_load_one(each, device, overrides) for each in path]
    models, metas, configs = zip(*members)
    return build_ensemble(models, metas, configs, path), metas[0], configs[0]


def _load_one(path: str | Path, device: str, overrides: Sequence[str]) -> tuple[nn.Module, WeightsMeta, Config]:
    weights = read_weights(path)
    file, tensors, meta = weights.file, weights.tensors, weights.meta
    for note in weights.notes:
        log.warning("%s: %s", file, note)
    try:
        own = Config.model_validate({**meta.config, "device": device})
        model = build_model(own.model, len(meta.classes), len(meta.semantic_classes))
        model.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"weights must fit the model that they describe, got {file}: {error}. "
                         "They are probably of another version of detres; use that one, or train again.") from None
    config = override(own, overrides, str(file)) if overrides else own
    if config.model != own.model:
        model = _rebuilt(model, config.model, meta, overrides, file)
    return model.to(pick_device(config.device)).eval(), meta, config


def _rebuilt(model: nn.Module, config: ModelConfig, meta: WeightsMeta, overrides: Sequence[str],
             file: Path) -> nn.Module:
    """A model of another config with the same weights."""
    other = build_model(config, len(meta.classes), len(meta.semantic_classes))
    weights = model.state_dict()
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in state.items()}
                      for state in (weights, other.state_dict()))
    differing = [name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(f"overrides must keep the network of the weights, got {' '.join(overrides)} for {file}, which "
                         f"changes {len(differing)} of its tensors, the first {name}: {shapes.get(name, 'absent')} in "
                         f"the file, {wanted.get(name, 'absent')} with the overrides. Leave out those that change "
                         "layers; a network can only be evaluated with other thresholds, sizes and the like.")
    other.load_state_dict(weights)
    return other
