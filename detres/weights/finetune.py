"""Training that begins from a trained model rather than from a backbone: `model.weights`.

So arXiv 1512.03385 (appendix B, "PASCAL VOC") fine-tunes its COCO detector on PASCAL VOC.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from detres.engine.checkpoint import find_weights, load_weights

OF_CLASSES = re.compile(r"(roi_heads\.(box_predictor|mask_head\.predict)|fc|head|cls|box)\.")


def load_start(model: nn.Module, path: str, classes: Sequence[str]) -> None:
    """Put the weights of a model of the same kind into `model`, which is to learn `classes`. Where these are others,
    the layers that tell classes apart begin anew.

    path: a weights file or run folder. Raises FileNotFoundError, or ValueError that names tensors that do not fit.
    """
    file = find_weights(path)
    tensors, meta = load_weights(file)
    own = model.state_dict()
    if meta.classes != tuple(classes):
        tensors = {name: own.get(name, tensor) if OF_CLASSES.match(name) else tensor
                   for name, tensor in tensors.items()}
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (tensors, own))
    differing = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(f"model.weights must be of a model of the same kind, got {file}, in which {len(differing)} "
                         f"tensors differ, the first {name}: {shapes.get(name, 'absent')} instead of "
                         f"{wanted.get(name, 'absent')}. Train with the model section that the weights carry.")
    model.load_state_dict(tensors)
