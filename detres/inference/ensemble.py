"""Ensembles of models that were trained apart (arXiv 1512.03385, appendix B).

Legend: N images, P proposals of all models, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from detres.config import Config
from detres.engine.checkpoint import WeightsMeta


def build_ensemble(models: Sequence[nn.Module], metas: Sequence[WeightsMeta], configs: Sequence[Config],
                   paths: Sequence[str | Path]) -> nn.Module:
    """One model out of several (of one: that one), in what they share: the first one's.

    Raises ValueError that names what differs where all must be the same: the kind of model, the classes, the sizes that
    images are resized to. Mean, deviation and order of channels are each model's own affair.
    """
    members = [_shared(meta, config) for meta, config in zip(metas, configs)]
    for path, member in zip(paths[1:], members[1:]):
        for name in {**members[0], **member}:
            first, other = members[0].get(name, "none"), member.get(name, "none")
            if first != other:
                raise ValueError(f"models of an ensemble must have the same {name}, got {first} ({paths[0]}) and {other} "
                                 f"({path}). Leave one out, or, if it is a size, set it for all: {name}={first}.")
    return models[0] if len(models) == 1 else ENSEMBLES[configs[0].model.name](models)


def _shared(meta: WeightsMeta, config: Config) -> dict[str, Any]:
    sizes = config.model.input.model_dump(exclude={"channel_order", "mean", "std"})
    return {"model.name": config.model.name, **{f"class {i}": name for i, name in enumerate(meta.classes)},
            **{f"model.input.{name}": value for name, value in sizes.items()}}


class DetectorEnsemble(nn.Module):
    """Detectors of the same classes as one."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)


ENSEMBLES = {"faster_rcnn": DetectorEnsemble, "mask_rcnn": DetectorEnsemble}
