"""Ctrl-C and SIGTERM: finish the step, save, say how to resume. A second Ctrl-C quits at once."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import TypeVar

from detres.engine.distributed import any_rank, is_distributed, rank

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Raised between steps, where the state of training is whole."""


class Interrupt:
    """Remembers a signal while it is entered. Does nothing outside the main thread: Python allows no handlers there."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # torchrun and batch systems follow up with SIGTERM
        self.signal = number
        if rank() == 0:  # not by print: a handler may run in the middle of another print
            os.write(2, b"\nFinishing this step, then saving. Ctrl-C again quits at once, without saving.\n")

    def check(self) -> None:
        """Raises Interrupted on every rank if any was signalled."""
        if any_rank(self.signal is not None):
            raise Interrupted

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an evaluation, which a signal cuts short. Ranks, which cannot agree on a batch, finish it."""
        for batch in start(batches):
            if self.signal is not None and not is_distributed():
                raise Interrupted
            yield batch

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or signal.SIGTERM)


def start(batches: Iterable[T]) -> Iterator[T]:
    """An iterator whose loader processes are started deaf to signals.

    Ctrl-C in a terminal, and batch systems, signal the whole process group: loader processes would die of it and take
    the step that is to be finished with them. They end with their iterator, or when their parent does.
    """
    before = set(active_children())
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a process inherits the mask
    try:
        iterator = iter(batches)
        first = list(islice(iterator, 1))  # a loader may start its processes only now
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if started := set(active_children()) - before:
            atexit.register(_end, started)
    return chain(first, iterator)


def _end(processes: Iterable[BaseProcess]) -> None:
    """At exit Python would ask them by SIGTERM, and wait: after an error, whose traceback keeps iterators alive."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain of their end
    for process in processes:
        process.kill()
