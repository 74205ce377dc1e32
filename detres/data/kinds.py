"""Kinds of problems in data sets: how bad each is, what it does, and what mends it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]  # refused by training; told; for information


class Kind(NamedTuple):
    severity: Severity
    title: str  # heading of the group, such as "boxes without area"
    effect: str  # on training or on AP
    fix: str


KINDS: dict[str, Kind] = {
    "invalid": Kind("error", "invalid entries", "training refuses them", "correct or delete them"),
}
