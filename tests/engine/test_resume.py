"""Killed, interrupted and distributed runs of a real detector, with loader processes, in processes of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detres.config_file import dump_yaml
from detres.engine.checkpoint import load_state, load_weights
from detres.engine.train import train

# Kills its own process, as by SIGKILL from outside, at the beginning of a step, or in the middle of a file.
KILL_IN_STEP = """
import os, signal
from detres.engine.optim import Schedule
at = Schedule.at
Schedule.at = lambda self, step, rows: os.kill(os.getpid(), signal.SIGKILL) if step == {step} else at(self, step, rows)
"""
KILL_IN_FILE = """
import io, os, signal, torch
save = torch.save
def half(state, path):
    if state["step"] < {step}:
        return save(state, path)
    whole = io.BytesIO()
    save(state, whole)
    path.write_bytes(whole.getvalue()[: whole.tell() // 2])
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


@pytest.fixture(scope="module")
def final_weights(detector_config, one_thread):
    """Those of a run that was never interrupted."""
    config = detector_config()
    train(config)
    return weights_of(config.output)


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_weights(Path(folder) / "checkpoints" / "final.safetensors")[0]


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert weights.keys() == expected.keys() and not different


def test_killed_and_resumed_gives_the_same_bits(detector_config, run_cli, final_weights):
    config = detector_config()
    last = Path(config.output) / "checkpoints" / "last.pt"
    step = random.SystemRandom().randrange(1, 8)
    process = run_cli(config, prelude=KILL_IN_STEP.format(step=step))
    _, told = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, told
    assert last.exists() == (step >= 4)  # counted from 0

    process = run_cli(config, "--resume", prelude=KILL_IN_FILE.format(step=8))
    _, told = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, told
    assert ("from the beginning" in told) == (step < 4)
    assert last.with_name("last.pt.tmp").exists() and load_state(last)["step"] == 4

    train(config, resume=True)
    assert_equal(weights_of(config.output), final_weights)
    rows = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13)), f"killed first in step {step}"
    assert not list(Path(config.output).rglob("*.tmp"))


def test_ctrl_c_saves_and_says_how_to_resume(detector_config, run_cli, final_weights):
    config = detector_config(checkpoint_every=100)
    process = run_cli(config)
    told = ""
    while "step  3/12" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    # To the whole group, loader processes too: a terminal sends the first, batch systems the second.
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    out, rest = process.communicate(timeout=60)
    told += rest
    assert process.returncode == 130, told
    assert f"detres train {config.output} --resume" in told and "Saved at step" in told and "Traceback" not in told
    step = load_state(Path(config.output) / "checkpoints" / "last.pt")["step"]
    assert 3 <= step < 12 and f"Saved at step {step} of 12" in told
    train(config, resume=True)
    assert_equal(weights_of(config.output), final_weights)


def test_a_run_that_fails_ends_with_its_loader_processes(detector_config, run_cli):
    process = run_cli(detector_config(lr=1e9, warmup_steps=0, ema=None))
    _, told = process.communicate(timeout=60)  # as long as a loader process lives, it holds the pipe
    assert process.returncode == 1
    assert "error: losses and gradients must be finite" in told and told.count(".jpg") == 4 and "Traceback" not in told


def test_two_processes_give_the_losses_of_one(detector_config, tmp_path, one_thread):
    """Through `--num-gpus 2`, that is torchrun, with gloo on the CPU."""
    options = {"steps": 4, "lr": 0.002, "ema": None, "checkpoint_every": 100}
    single, double = detector_config(**options), detector_config(**options)
    (tmp_path / "config.yaml").write_text(dump_yaml(double))
    process = subprocess.run(
        [sys.executable, "-m", "detres.cli", "train", str(tmp_path / "config.yaml"), "--num-gpus", "2"], text=True,
        capture_output=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    train(single)
    both = [[json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
            for config in (single, double)]
    names = [name for name in both[0][0] if name.startswith("loss") or name == "grad_norm"]
    assert len(names) == 7
    for one, two in zip(*both, strict=True):
        if "loss" in one:
            assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)
    validation = [name for name in both[0][-1] if name != "step"]
    assert {name: both[1][-1][name] for name in validation} == pytest.approx(
        {name: both[0][-1][name] for name in validation}, rel=1e-2, abs=1e-3)
    assert len(load_state(Path(double.output) / "checkpoints" / "last.pt")["rng"]) == 2
    assert process.stderr.count("Starting at step 0") == 1  # only one of them talks
