"""What a run tells: a live line or plain lines, log.jsonl, metrics.csv, TensorBoard.

A row is a dict of numbers with its "step". Rows are part of the training state: the files of a resumed run are written
again from them, so that nothing is told twice. Only rank 0 tells anything.
"""

from __future__ import annotations

import csv
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from detres.engine.checkpoint import atomic_write
from detres.engine.distributed import average, gather, rank
from detres.engine.failures import non_finite
from detres.structures import Batch

Row = dict[str, float]


def tell(text: str) -> None:
    """A line for people, before there is a `RunLog`."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


class LossWindow:
    """Losses since the last row, kept on the device: reading them is one transfer and the only wait for the device.

    `eager` checks each step, before it changes the weights: for devices where that costs nothing.
    """

    def __init__(self, eager: bool) -> None:
        self._eager = eager
        self._pending: list[tuple[int, tuple[str, ...], Tensor]] = []  # step, image files, values
        self._names: list[str] = []
        self._checked: list[Tensor] = []  # (S, V) each

    def add(self, step: int, values: dict[str, Tensor], batch: Batch) -> None:
        """Notes scalar tensors of a step that is about to change the weights."""
        self._names = list(values)
        self._pending.append((step, batch.paths, torch.stack([value.detach().float() for value in values.values()])))
        if self._eager:
            self.check()

    def check(self) -> None:
        """Raises FloatingPointError, on every rank, for the first step that has a value which is not finite."""
        if not self._pending:
            return
        own = torch.stack([values for *_, values in self._pending])  # (S, V)
        mean = average(own).cpu()
        finite = mean.isfinite().all(1)
        if not finite.all():
            error = self._error(int(finite.int().argmin()), mean)
            raise error if rank() == 0 else SystemExit(1)  # all ranks stop here, one tells
        self._checked.append(mean)
        self._pending.clear()

    def _error(self, row: int, mean: Tensor) -> FloatingPointError:
        step, paths, own = self._pending[row]
        losses = torch.tensor([name.startswith("loss") for name in self._names], device=own.device)
        is_bad = not own[losses].isfinite().all()  # a bad loss on one rank makes bad gradients on all
        found = gather((is_bad, paths))
        bad = [files for flag, files in found if flag] or [files for _, files in found]
        values = {name: value for name, value in zip(self._names, mean[row].tolist())
                  if not torch.tensor(value).isfinite()}
        return non_finite(step, values, [path for files in bad for path in files])

    def means(self) -> Row:
        """Means of all values since the last call."""
        self.check()
        means = torch.cat(self._checked).mean(0).tolist()
        self._checked.clear()
        return dict(zip(self._names, means))


class RunLog:
    """Entered for the time of a run. `rows` is shared with the training state and grows here."""

    def __init__(self, folder: Path, rows: list[Row], step: int, steps: int, batch_size: int):
        self.folder, self.rows, self.batch_size = folder, rows, batch_size
        self.step, self.steps = step, steps
        self._noted, self._since, self._waited = step, time.perf_counter(), 0.0
        self._active = rank() == 0
        self._console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._live: _LiveLine | None = None
        self._last_words = ("", "")  # speed and losses

    def __enter__(self) -> RunLog:
        if self._active:
            from torch.utils.tensorboard import SummaryWriter  # half a second

            # Line by line, so that a killed run has all its lines.
            self._jsonl = open(self.folder / "log.jsonl", "w", encoding="utf-8", buffering=1)
            self._jsonl.writelines(json.dumps(row) + "\n" for row in self.rows)
            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
            self._show()
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            self._hide()
            self.write_csv()
            self._jsonl.close()
            self._tensorboard.close()

    def say(self, text: str) -> None:
        """A line for people, above the live one."""
        if self._active:
            self._console.print(text, markup=False)

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time spent waiting for it is told in the next row."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def advance(self, step: int) -> None:
        """Moves the live line on to `step` updates done."""
        self.step = step
        if self._live:
            self._live.update(self._live.task_ids[0], completed=step)

    def train(self, values: Row, lr: float) -> None:
        """Notes a row of training: means of losses, and the speed since the last row."""
        now = time.perf_counter()
        seconds, steps = now - self._since, self.step - self._noted
        row = {"step": self.step, "loss": sum(value for name, value in values.items() if name.startswith("loss")),
               **values, "lr": lr, "steps_per_second": steps / seconds,
               "images_per_second": steps * self.batch_size / seconds, "waiting_for_data": self._waited / seconds,
               "memory_gib": peak_memory_gib()}
        self._note(row, "train/")
        self._last_words = speed, losses = _speed(row, self.steps), _losses(row)
        if self._live:
            self._live.show(speed, losses)
        else:
            self.say(f"step {self.step:>{len(str(self.steps))}}/{self.steps}  {losses}  {speed}")
        self._noted, self._since, self._waited = self.step, now, 0.0

    def evaluation(self, metrics: Row) -> None:
        """Notes a row of evaluation."""
        self._note({"step": self.step, **metrics}, "")
        self.write_csv()

    def _note(self, row: Row, prefix: str) -> None:
        self.rows.append(row)
        if self._active:
            self._jsonl.write(json.dumps(row) + "\n")
            for name, value in row.items():
                self._tensorboard.add_scalar(prefix + name, value, self.step)

    def write_csv(self) -> None:
        """One line per step that has a row, with the columns of all rows."""
        lines: dict[float, dict[str, Any]] = {}
        for row in self.rows:
            lines.setdefault(row["step"], {}).update(row)
        columns = list({name: None for row in self.rows for name in row})
        if self._active:
            with atomic_write(self.folder / "metrics.csv") as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(lines.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the live line away for the block, whose time is not that of steps."""
        start = time.perf_counter()
        self._hide()
        try:
            yield
        finally:
            self._show()
            self._since += time.perf_counter() - start

    def _show(self) -> None:
        if self._active and sys.stderr.isatty():
            self._live = _LiveLine(self._console, self.step, self.steps)
            self._live.show(*self._last_words)
            self._live.start()

    def _hide(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


class _LiveLine(Progress):
    """A bar with the speed, and below it the losses."""

    def __init__(self, console: Console, step: int, steps: int):
        self._losses = ""
        super().__init__(TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
                         console=console, transient=True)
        self.add_task("train", total=steps, completed=step, speed="")

    def show(self, speed: str, losses: str) -> None:
        self._losses = losses
        self.update(self.task_ids[0], speed=speed)

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        if self._losses:
            yield self._losses


def _losses(row: Row) -> str:
    terms = " ".join(f"{name[5:]} {value:.3f}" for name, value in row.items() if name.startswith("loss_"))
    error = f"  error {row['error']:.3f}" if "error" in row else ""
    return f"loss {row['loss']:.3f} ({terms}){error}  lr {row['lr']:.2g}"


def _speed(row: Row, steps: int) -> str:
    left = (steps - row["step"]) / row["steps_per_second"]
    return (f"{row['steps_per_second']:.2f} it/s  {row['images_per_second']:.1f} images/s  "
            f"data wait {100 * row['waiting_for_data']:.0f}%  {row['memory_gib']:.2f} GiB  {clock(left)} left")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def peak_memory_gib() -> float:
    """Highest use so far: of the GPU's allocator where there is one, else resident memory of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
