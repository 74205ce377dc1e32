"""The folder of a run: opened once, never overwritten, resumed only by the same training.

    config.yaml  log.jsonl  metrics.csv  results.json  curves.png  tensorboard/
    checkpoints/  last.pt  best.safetensors  final.safetensors
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detres.config import Config, TrainConfig
from detres.config_file import dump_yaml
from detres.engine.checkpoint import atomic_write, load_state
from detres.engine.distributed import barrier, rank, world_size

# What may differ when a run is resumed: it does not change the weights.
FREE = {"data.val", "data.workers", "train.log_every", "train.checkpoint_every", "train.eval_every", "train.keep_best",
        "train.patience", "train.compile", "model.weights", "model.backbone.weights",
        "model.backbone.activation_checkpointing"}
# What does, if the schedule listens to evaluations.
STEERS_PLATEAU = {"data.val", "train.eval_every", "train.keep_best", "eval.crops", "eval.test_scales"}


def open_run(config: Config, resume: bool) -> dict[str, Any] | None:
    """Looks into the folder; returns the training state to resume from, or None to start from the beginning.

    Raises FileExistsError where something would be overwritten, ValueError where the config is not that of the run.
    """
    folder = Path(config.output)
    last = folder / "checkpoints" / "last.pt"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output must be a folder, got {folder}, which is a file. Choose another output=FOLDER.")
    used = folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir())
    if used and not (folder / "config.yaml").is_file():
        raise FileExistsError(f"output must be a new folder or that of a run, got {folder}, which holds other files. "
                              "Choose another output=FOLDER.")
    if used and not resume:
        raise FileExistsError(f"output must be a new or empty folder, got {folder}, which holds a run. Go on with it "
                              "by --resume, or choose another output=FOLDER.")
    if not last.is_file():
        return None
    saved = load_state(last)
    check_same(saved["config"], config, last)
    return saved


def write_config(config: Config) -> None:
    """Makes the folder that of this run: once all is known to be right, so that a mistake does not occupy it."""
    barrier()  # no rank may look into the folder after rank 0 has begun to write
    if rank() == 0:
        with atomic_write(Path(config.output) / "config.yaml") as temporary:
            temporary.write_text(dump_yaml(config), encoding="utf-8")
    barrier()


def check_same(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Raises ValueError that names every field in which the config differs from the saved one and must not."""
    before, now = dict(_leaves(saved)), dict(_leaves(config.model_dump(mode="json")))
    differences = [f"{name}: {_shown(before, name)} in the run, {_shown(now, name)} now"
                   for name in {**before, **now} if before.get(name) != now.get(name)
                   and not _is_free(name, config.train)]
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise ValueError(f"a resumed run must keep its config, got {len(differences)} differences to {path}:{lines}\n"
                         "Resume with the config.yaml of the run folder, or start a new run in another output=FOLDER.")


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else key)


def _is_free(name: str, train: TrainConfig) -> bool:
    steers = STEERS_PLATEAU if train.schedule == "plateau" else set()
    if train.warmup_until_error is not None:  # of a row of the log
        steers = {*steers, "train.log_every"}
    return not _is_in(name, steers) and (not name.startswith(("model.", "data.", "train.")) or _is_in(name, FREE))


def _is_in(name: str, fields: set[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _shown(leaves: dict[str, Any], name: str) -> str:
    return repr(leaves[name]) if name in leaves else "absent"


def resume_command(config: Config) -> str:
    """The command that goes on with a run, however it was started."""
    processes = f" --num-gpus {world_size()}" if world_size() > 1 else ""
    return f"detres train {shlex.quote(config.output)} --resume{processes}"
