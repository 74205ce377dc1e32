"""Names of weights in another toolkit and here, as one table that is read in both directions.

A rule is a pair of beginnings of names, `("backbone.fpn.inner_blocks.{i}.0.", "backbone.fpn.lateral.{i}.")`, what comes
after them being the same. Whole numbers in braces are counted by a letter, `{i}`, or from or in steps of more than one,
`{i+2}`, `{2i}`, `{2i+1}`. The first rule that fits a name is the one; of several rules for one of our names, the first
is what is exported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLACE = re.compile(r"\{(\d*)([a-z])(?:\+(\d+))?\}")
COUNTER = "num_batches_tracked"  # of batch norms: nothing depends on it


@dataclass(frozen=True)
class Change:
    """How a tensor's rows differ, both ways."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


BACKGROUND_LAST = Change(lambda x: torch.cat([x[1:], x[:1]]), lambda x: torch.cat([x[-1:], x[:-1]]))


# Convolutions over single points (O, C, 1) are linear layers here.
POINTWISE = Change(lambda x: x[..., 0] if x.dim() == 3 else x, lambda x: x[..., None] if x.dim() == 2 else x)


def without_background(rows: int = 1) -> Change:
    """The first class, of `rows` rows, is background that has no use; it is exported as zeros."""
    return Change(lambda x: x[rows:], lambda x: torch.cat([x.new_zeros(rows, *x.shape[1:]), x]))


class _Template:
    """One side of a rule."""

    def __init__(self, text: str):
        self.text = text
        self.places = [(letter, int(step or 1), int(start or 0)) for step, letter, start in PLACE.findall(text)]
        parts = [re.escape(part) for part in PLACE.sub("\0", text).split("\0")]
        self.pattern = re.compile(r"(\d+)".join(parts))

    def read(self, name: str) -> tuple[dict[str, int], str] | None:
        """The numbers in a name by letter, and what comes after; None if it does not fit."""
        match = self.pattern.match(name)
        if match is None:
            return None
        numbers: dict[str, int] = {}
        for text, (letter, step, start) in zip(match.groups(), self.places):
            number, rest = divmod(int(text) - start, step)
            if rest or number < 0 or numbers.setdefault(letter, number) != number:
                return None
        return numbers, name[match.end():]

    def write(self, numbers: Mapping[str, int], rest: str) -> str:
        return PLACE.sub(lambda place: str(int(place[1] or 1) * numbers[place[2]] + int(place[3] or 0)),
                         self.text) + rest


class KeyMap:
    """Rules: pairs (theirs, ours), or triples with a `Change` of the tensors.

    ignored: names, as a pattern, that other toolkits save and nothing here needs.
    """

    def __init__(self, rules: Sequence[tuple], ignored: str = r"(?!)"):
        self.rules = [(_Template(theirs), _Template(ours), change[0] if change else None)
                      for theirs, ours, *change in rules]
        self.ignored = re.compile(ignored)

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors under our names, and the names that no rule fits."""
        return self._convert(state, [(a, b, change and change.to_ours) for a, b, change in self.rules])

    def to_theirs(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors under their names, and our names that no rule fits."""
        return self._convert(state, [(b, a, change and change.to_theirs) for a, b, change in self.rules])

    def their_names(self, ours: Iterable[str]) -> tuple[dict[str, None], list[str]]:
        """Their names of ours, and our names that no rule fits."""
        return self._convert(dict.fromkeys(ours), [(b, a, None) for a, b, _ in self.rules])

    def _convert(self, state: Mapping[str, Any], rules: list[tuple]) -> tuple[dict[str, Any], list[str]]:
        converted, unknown = {}, []
        for name, tensor in state.items():
            if name.endswith(COUNTER) or self.ignored.match(name):
                continue
            for source, target, change in rules:
                if found := source.read(name):
                    converted[target.write(*found)] = change(tensor) if change else tensor
                    break
            else:
                unknown.append(name)
        return converted, unknown
