from __future__ import annotations

import os
import signal

import pytest

from detres.engine.interrupt import Interrupt, Interrupted, start


def test_the_first_signal_waits_for_the_step_the_second_does_not(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupt.check()
        assert interrupt.exit_code == 130
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("Ctrl-C again quits") == 1


def test_a_signal_cuts_an_evaluation_short():
    seen = []
    with pytest.raises(Interrupted), Interrupt() as interrupt:
        for number in interrupt.watch(range(5)):
            seen.append(number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2]


def test_loaders_start_with_signals_blocked():
    def loader():
        yield signal.pthread_sigmask(signal.SIG_BLOCK, ())
        yield signal.pthread_sigmask(signal.SIG_BLOCK, ())

    first, second = start(loader())
    assert {signal.SIGINT, signal.SIGTERM} <= first and not {signal.SIGINT, signal.SIGTERM} & second
    assert list(start([])) == []
