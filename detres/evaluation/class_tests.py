"""The tests of classifiers in section 3.4 of arXiv 1512.03385: a prediction from several views of each image.

    eval.crops  views of an image (`data.class_transforms`)           compared in
    1           the centre crop                                       figure 4
    10          four corners and the centre, and their mirror images  tables 2 and 3
    dense       the whole image at several scales, and mirrored       tables 4 and 5

Probabilities of views are averaged. Of a whole image the scores of all places, before the softmax, are averaged first,
as in VGG (arXiv 1409.1556, section 3.2), which the paper follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from detres.config import Config
from detres.models.classifier import mean_probabilities
from detres.structures import ImageBatch

ClassTest = Callable[[nn.Module, ImageBatch], Tensor]  # model, images with further views as pyramid -> logits (N, K)


def build_class_test(config: Config) -> ClassTest:
    if config.eval.crops == 1:
        return nn.Module.__call__  # the model's own logits, to the bit
    return partial(predict_views, dense_crop=config.model.input.crop if config.eval.crops == "dense" else None)


def predict_views(model: nn.Module, images: ImageBatch, dense_crop: int | None = None) -> Tensor:
    """Logits (N, K), whose softmax is the mean of the model's probabilities over views and their mirror images.

    Images must fill their canvas. dense_crop: the side of the crops that the model was trained on, for fully
    convolutional views; None: views are such crops.
    """
    views = [replace(images, pyramid=()), *images.pyramid]
    views += [replace(view, pixels=view.pixels.flip(-1)) for view in views]
    return mean_probabilities([model(view) if dense_crop is None else model.dense_logits(view, dense_crop)
                               for view in views])
