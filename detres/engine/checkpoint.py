"""Weights files (safetensors, what users keep) and training states (`last.pt`, what a run resumes from).

Both are written atomically: to a temporary file beside the target, flushed to the disk, then renamed over it. A
reader, or a run that comes back after SIGKILL or a power cut, sees the old file or the new one, never a part.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from detres.engine.distributed import gather, rank
from detres.engine.optim import EMA

META_KEY = "detres"
SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")  # of weights of any toolkit


@dataclass(frozen=True)
class WeightsMeta:
    """What a weights file says about itself, so that nothing else need be given to use it."""

    config: dict[str, Any]  # the resolved Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # original ids of the data set, in the order of `classes`
    step: int
    metrics: dict[str, float]
    keypoints: dict[str, list] = field(default_factory=dict)  # "names", "skeleton", "classes", as in `data.Dataset`
    semantic_classes: tuple[str, ...] = ()  # of a panoptic model: "things", then stuff
    semantic_ids: tuple[int, ...] = ()  # their original ids, 0 for "things"


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
        temporary.write_bytes(save(tensors, metadata={META_KEY: json.dumps(asdict(meta))}))


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
                           metrics=dict(values["metrics"]), keypoints=dict(values.get("keypoints", {})),
                           **{name: tuple(values.get(name, ())) for name in ("semantic_classes", "semantic_ids")})
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
    raise FileNotFoundError(f"weights must be a file, a run folder or a published name, got {path}, {found}. "
                            "Check the path.")


def holds_weights(path: str | Path) -> bool:
    """Whether the path is a weights file, by its suffix, or the folder of a run that has one."""
    try:
        return find_weights(path).suffix in SUFFIXES
    except FileNotFoundError:
        return False


# ---- training state ------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Everything that a run resumes from, besides its config and data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None = None
    step: int = 0  # updates done
    evaluated: int = 0  # step of the last evaluation
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: dict[str, float] = field(default_factory=dict)  # those of the best evaluation, and its "step"
    stale: int = 0  # evaluations since the best
    rows: list[dict[str, float]] = field(default_factory=list)  # the log

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate and to keep: the averaged weights where there are any."""
        return self.ema.model if self.ema else self.model

    def is_best(self, metrics: dict[str, float], keep_best: str) -> bool:
        """Takes note of an evaluation at this step; says whether it is the best so far by the metric `keep_best`.

        "auto": panoptic quality, the AP of keypoints, of masks, of boxes, of VOC or of ILSVRC, mIoU, the AR of
        proposals, top-1, or the localization error, the first that there is. Losses and errors are better when lower.
        A value that is not finite is never the best: such an evaluation counts as stale.
        """
        name = keep_best
        if name == "auto":
            order = ("panoptic/PQ", "keypoints/AP", "segm/AP", "bbox/AP", "voc/AP", "ilsvrc/AP", "sem_seg/mIoU",
                     "box_proposals/AR@1000", "cls/top1", "loc/gt_class_error")
            name = next(known for known in order if known in metrics)
        sign = -1 if name.startswith("val/") or name.endswith("error") else 1
        value, before = metrics[name], self.best.get(name, math.nan)
        is_better = math.isfinite(value) and not sign * value <= sign * before  # also where there is none before
        self.evaluated, self.metrics = self.step, metrics
        self.stale = 0 if is_better else self.stale + 1
        if is_better:
            self.best = {**metrics, "step": self.step}
        return is_better

    def save(self, path: Path, **about: Any) -> None:
        """Writes `last.pt` on rank 0, with `about` (plain values: config, classes ...). To be called on every rank."""
        rng = gather(rng_state())
        if rank() == 0:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                     "ema": self.ema.model.state_dict() if self.ema else None,
                     "rng": rng, **{name: getattr(self, name) for name in _PLAIN}, **about}
            with atomic_write(path) as temporary:
                torch.save(state, temporary)

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `load_state` read, out of `saved`, except for the random numbers (`restore_rng`)."""
        self.model.load_state_dict(saved.pop("model"))
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        if self.ema:
            self.ema.model.load_state_dict(saved.pop("ema"))
        for name in _PLAIN:
            setattr(self, name, saved.pop(name))


_PLAIN = ("step", "evaluated", "metrics", "best", "stale", "rows")


def load_state(path: Path) -> dict[str, Any]:
    """Reads `last.pt`; no code in it is run. Raises ValueError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"a training state must be readable, got {path} ({error}). It is damaged: delete it to start "
                         "from the beginning.") from None


def rng_state() -> dict[str, Any]:
    """States of all random number generators of this process, as tensors and plain values."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, normal = random.getstate()
    return {"torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # of this rank's device
            "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, list(words), normal]}


def restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, words, normal = state["python"]
    random.setstate((version, tuple(words), normal))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What the block draws leaves no trace: evaluating more often does not change the training."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng(state)
