"""Torch files that hold objects of other toolkits beside their tensors: read, and nothing of theirs is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch


class Opaque:
    """What stands for an object of a class, or what a function gave, that torch does not know to be harmless."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_opaque(path: str | Path) -> Any:
    """What `torch.load(path, weights_only=True)` gives, with an `Opaque` in place of what it would refuse.

    So checkpoints that MMEngine saved in training are read: beside weights they hold its records of losses. Raises
    `pickle.UnpicklingError` where torch refuses even that (functions of `os` or `sys`).
    """
    zipped = is_zipfile(path)  # older files are not, and hold nothing that torch could list
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if zipped else ()
    with torch.serialization.safe_globals([(Opaque, name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True)
