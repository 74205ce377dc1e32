"""Names for images, by a classifier:

    model = detres.load("runs/classifier")
    out = model.predict("image.jpg")
    print(out.names[0], out.probabilities[0])

Legend: N images, K classes, T classes told (at most 5), (H, W) size of the image as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detres.config import Config
from detres.data.class_loader import stack_views
from detres.data.class_transforms import build_test_views
from detres.data.images import to_rgb_array
from detres.engine.failures import explain_out_of_memory, of_prediction
from detres.evaluation.class_tests import build_class_test
from detres.inference.batches import ImageLike, in_batches
from detres.inference.draw import draw_names


@dataclass(frozen=True, repr=False)
class Classification:
    """The likeliest classes of one image, best first; on the CPU."""

    names: list[str]
    probabilities: Tensor  # (T,)
    labels: Tensor  # (T,) int64, index into the classes of the model
    image: np.ndarray = field(compare=False)  # (H, W, 3) uint8 RGB
    path: str | None = None  # where the image was read from

    def __repr__(self) -> str:
        return f"Classification({self.path or 'image'}: {', '.join(self._texts())})"

    def _texts(self) -> list[str]:
        return [f"{name} {value:.2f}" for name, value in zip(self.names, self.probabilities.tolist())]

    def draw(self) -> Image.Image:
        """The image with its names."""
        return draw_names(self.image, self._texts(), self.labels.tolist())


class ClassPredictor:
    """A classifier with its classes and the test that `config.eval` names."""

    def __init__(self, model: nn.Module, classes: Sequence[str], config: Config):
        self.model, self.classes = model.eval(), tuple(classes)
        self.views, self.test = build_test_views(config.eval, config.model.input), build_class_test(config)
        self.is_dense = config.eval.crops == "dense"

    def predict(self, images: ImageLike | Sequence[ImageLike], top: int = 5, *, batch_size: int = 8,
                paths: Sequence[str] | None = None) -> Classification | list[Classification]:
        """The `top` likeliest classes of an image (a path, a PIL image, or an RGB array (H, W, 3) uint8), or of each of
        a list of them. `paths` says where arrays of a list were read from. Raises as `Predictor.predict`.
        """
        def predict(items: list[ImageLike], where: Sequence[str | None]) -> list[Classification]:
            return self._predict(items, where, min(top, len(self.classes)))

        return in_batches(predict, images, paths, 1 if self.is_dense else batch_size)  # whole images differ in size

    @torch.no_grad()
    def _predict(self, items: list[ImageLike], paths: Sequence[str | None], top: int) -> list[Classification]:
        images = [to_rgb_array(item) for item in items]
        batch = stack_views([self.views(image, np.random.default_rng(0)) for image in images])
        sizes, device = torch.tensor([image.shape[:2] for image in images]), next(self.model.parameters()).device
        with explain_out_of_memory(of_prediction, batch, sizes, paths, device):
            logits = self.test(self.model, batch.to(device))
        found = logits.softmax(1).cpu().topk(top)
        return [Classification([self.classes[label] for label in labels], values, labels, image, path)
                for values, labels, image, path in zip(*found, images, paths)]
