from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from detres.engine import log as module
from detres.engine.log import LossWindow, RunLog, clock
from detres.engine.plots import plot_curves

VALUES = {"loss_cls": 0.5, "loss_box": 0.25, "grad_norm": 3.0}


def test_only_files_of_the_rank_with_the_bad_loss_are_named(batch, monkeypatch):
    monkeypatch.setattr(module, "gather", lambda own: [own, (True, ("theirs.jpg",)), (False, ("fine.jpg",))])
    window = LossWindow(eager=False)
    window.add(4, {"loss_cls": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)}, batch(4))
    window.add(5, {"loss_cls": torch.tensor(1.0), "grad_norm": torch.tensor(torch.nan)}, batch(5))
    with pytest.raises(FloatingPointError, match="step 5") as error:
        window.check()
    assert "theirs.jpg" in str(error.value)
    assert "fine.jpg" not in str(error.value) and "image_5" not in str(error.value)


def test_a_terminal_shows_one_live_line(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr, **options: Console(
        file=screen, force_terminal=True, width=160, **options))
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    with RunLog(tmp_path, [], step=0, steps=8, batch_size=2) as log:
        log.advance(4)
        log.train(VALUES, lr=0.01)
        with log.paused():
            assert log._live is None
        assert log._live is not None
        log.say("a line of its own")
    shown = screen.getvalue()
    assert "4/8" in shown and "loss 0.750 (cls 0.500 box 0.250)  lr 0.01" in shown and "a line of its own" in shown
    for unit in ("it/s", "images/s", "data wait", "GiB", "left"):
        assert unit in shown
    assert "\x1b[?25h" in shown  # the cursor is back
    [row] = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row.items() >= {"step": 4, "loss": 0.75, "lr": 0.01, **VALUES}.items()


def test_time_of_an_evaluation_is_not_that_of_steps(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with RunLog(tmp_path, [], step=0, steps=100, batch_size=4) as log:
        def batches():
            now[0] += 1
            yield "batch"

        assert log.next(batches()) == "batch"
        now[0] += 1
        with log.paused():
            now[0] += 50
        now[0] += 2
        log.advance(2)
        log.train(VALUES, lr=0.1)
        [row] = log.rows
    assert (row["steps_per_second"], row["images_per_second"], row["waiting_for_data"]) == (0.5, 2.0, 0.25)


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


@pytest.mark.parametrize("rows", [
    [], [{"step": 1, "loss": 2.0, "loss_cls": 2.0, "lr": 0.1}],
    [{"step": s, "loss": 2 / s, "loss_cls": 2 / s, "lr": 0.1, "bbox/AP": -1.0, "val/loss": 3.0} for s in range(1, 90)]])
@pytest.mark.filterwarnings("error")
def test_curves_of_any_run(tmp_path, rows):
    plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
