"""Progress of a long loop: one live line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY = 10.0  # seconds between plain lines


def track(items: Iterable[T], total: int, what: str, size: Callable[[T], int], unit: str = "images") -> Iterator[T]:
    """Yields the items and tells on stderr how many of `total` units are done, at which rate, and the time left.

    `size` gives the units of an item.
    """
    shown = _live if sys.stderr.isatty() else _plain
    return shown(items, total, what, size, unit)


def _live(items: Iterable[T], total: int, what: str, size: Callable[[T], int], unit: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task, start = progress.add_task(what, total=total, rate=""), time.monotonic()
        for item in items:
            yield item
            progress.advance(task, size(item))
            done = progress.tasks[0].completed
            progress.update(task, rate=f"{_rate(done, start):.1f} {unit}/s")


def _plain(items: Iterable[T], total: int, what: str, size: Callable[[T], int], unit: str) -> Iterator[T]:
    done, start = 0, time.monotonic()
    last = start
    for item in items:
        yield item
        done += size(item)
        if time.monotonic() - last >= EVERY or done >= total:
            last = time.monotonic()
            rate = _rate(done, start)
            print(f"{what} {done}/{total} {unit}, {rate:.1f} {unit}/s, {_clock((total - done) / rate)} left",
                  file=sys.stderr, flush=True)


def _rate(done: float, start: float) -> float:
    return done / max(time.monotonic() - start, 1e-6)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
