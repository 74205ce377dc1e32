"""Models of other toolkits, as their weights show them.

Each toolkit has a list of families. A family is known by names that only its weights have; it says how its names read
here (`KeyMap`), and what its toolkit does otherwise than the defaults of `ModelConfig`. What the network looks like
(depth, heads, classes) is read from the tensors, under our names (`infer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from detres.weights.keymap import KeyMap

State = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Sections = dict[str, Any]  # of ModelConfig
Told = tuple[Sections, tuple[str, ...] | None]  # sections to add, and names of the classes, where it has them


class UnknownNetwork(ValueError):
    """Weights of a model that nothing here is."""


@dataclass(frozen=True)
class Family:
    """Models of one toolkit that share names and conventions."""

    toolkit: str  # 'torchvision', 'Detectron2' ...
    name: str  # for people: 'Faster and Mask R-CNN'
    has: tuple[str, ...]  # names that only their weights have, all of them
    keymap: KeyMap
    conventions: Callable[[Sections], Sections]  # sections of the network as read from its tensors -> what to add
    assumed: tuple[str, ...] = ()  # for people: what of that may differ in models that are not the published ones
    shows_stride: bool = True  # whether `conventions` know which convolution of a bottleneck strides
    told: Callable[[Mapping[str, Any]], Told] | None = None  # what a file says beside its tensors -> what that means

    def fits(self, names: Mapping[str, Any]) -> bool:
        return all(name in names for name in self.has)


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def merged(*layers: Mapping[str, Any]) -> Sections:
    """Sections of a config, later layers over earlier ones, field by field."""
    result: Sections = {}
    for layer in layers:
        for name, value in layer.items():
            inner = result.get(name)
            result[name] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return result
