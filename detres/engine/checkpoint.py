"""Weights files (safetensors, what users keep) and training states (`last.pt`, what a run resumes from).

Both are written atomically: to a temporary file beside the target, flushed to the disk, then renamed over it. A
reader, or a run that comes back after SIGKILL or a power cut, sees the old file or the new one, never a part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

META_KEY = "detres"


@dataclass(frozen=True)
class WeightsMeta:
    """What a weights file says about itself, so that nothing else need be given to use it."""

    config: dict[str, Any]  # the resolved Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # original ids of the data set, in the order of `classes`
    step: int
    metrics: dict[str, float]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; what is written there takes the place of `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(path: str | Path, state_dict: dict[str, Tensor], meta: WeightsMeta) -> None:
    """Writes a weights file: tensors, and `meta` as JSON in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={META_KEY: json.dumps(asdict(meta))})


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], WeightsMeta]:
    """Reads a weights file. Pickles are never executed.

    Raises FileNotFoundError if there is none, ValueError if it is not a weights file of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}, which does not exist. "
                                "Check the path, or give a run folder.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"weights must be a safetensors file, got {path} ({error}). Give best.safetensors or "
                         "final.safetensors of a run; pickled files (.pt, .pth, .pkl) are not opened, as they can "
                         "run code.") from None
    if META_KEY not in metadata:
        raise ValueError(f"weights must carry their model and classes, got {path}, which has only tensors. "
                         "Give a file written by training; a backbone's weights belong in model.backbone.weights.")
    return tensors, _read_meta(path, metadata[META_KEY])


def _read_meta(path: Path, text: str) -> WeightsMeta:
    try:
        values = json.loads(text)
        return WeightsMeta(config=dict(values["config"]), classes=tuple(values["classes"]),
                           category_ids=tuple(values["category_ids"]), step=int(values["step"]),
                           metrics=dict(values["metrics"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the header of {path} must describe a model, got {text[:80]!r} ({error!r}). "
                         "The file is damaged or from another version; write it again.") from None


def find_weights(path: str | Path) -> Path:
    """The weights file that a user means: the file itself, or of a run folder the best, else the final weights.

    Raises FileNotFoundError that says what is there instead.
    """
    path = Path(path)
    if path.is_file():
        return path
    candidates = [folder / name for folder in (path / "checkpoints", path)
                  for name in ("best.safetensors", "final.safetensors")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if (path / "checkpoints" / "last.pt").is_file():
        raise FileNotFoundError(f"a run must have finished or been evaluated to have weights, got {path}, which was "
                                "interrupted before. Resume it with --resume.")
    found = "a folder without weights" if path.is_dir() else "which does not exist"
    raise FileNotFoundError(f"weights must be a .safetensors file or a run folder, got {path}, {found}.")
