from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from detres.engine.checkpoint import (TrainState, WeightsMeta, atomic_write, find_weights, load_state, load_weights,
                                      preserved_rng, restore_rng, rng_state, save_weights)

META = WeightsMeta({"model": {"name": "mask_rcnn"}}, ("cat", "naïve"), (3, 90), 12, {"bbox/AP": 1 / 3})


def test_weights_come_back_with_what_they_say_about_themselves(tmp_path):
    state = {"a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "b": torch.tensor(7),
             "c": torch.randn(3).bfloat16()}
    save_weights(tmp_path / "new" / "w.safetensors", state, META)
    loaded, meta = load_weights(tmp_path / "new" / "w.safetensors")
    assert meta == META
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)
    assert os.stat(tmp_path / "new" / "w.safetensors").st_mode & 0o044  # readable by others, as the umask allows


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("load", [load_weights, load_state])
def test_code_in_files_is_never_run(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "w.pt")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("w.pt", "w.pkl"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_weights_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_weights(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="only tensors"):
        load_weights(tmp_path / "bare.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "odd.safetensors", metadata={"detres": '{"classes": 3}'})
    with pytest.raises(ValueError, match="header of .*odd.safetensors"):
        load_weights(tmp_path / "odd.safetensors")


def test_find_weights_prefers_the_best(tmp_path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_weights(tmp_path / "absent")
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="folder without weights"):
        find_weights(tmp_path)
    (folder / "last.pt").touch()
    with pytest.raises(FileNotFoundError, match="--resume"):
        find_weights(tmp_path)
    for name in ("final.safetensors", "best.safetensors"):
        (folder / name).touch()
        assert find_weights(tmp_path) == find_weights(folder) == find_weights(folder / name) == folder / name


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def crash(*_):
        raise OSError("no space left on device")

    if moment != "write":
        monkeypatch.setattr(os, moment, crash)
    with pytest.raises(OSError, match="no space"), atomic_write(path) as temporary:
        temporary.write_text("new, half of i")
        if moment == "write":
            crash()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["last.pt"]


def draw() -> list:
    return [torch.rand(2).tolist(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]


def test_random_numbers_continue_where_they_were(tmp_path):
    draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draw()
    assert draw() != expected
    restore_rng(load_state(tmp_path / "rng.pt"))
    assert draw() == expected
    state = rng_state()
    with preserved_rng():
        draw()
    expected = draw()
    restore_rng(state)
    assert draw() == expected


def state_with(evaluations: list[dict[str, float]], keep_best: str = "auto") -> tuple[TrainState, list[bool]]:
    model = torch.nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    taken = []
    for state.step, metrics in enumerate(evaluations, 1):
        taken.append(state.is_best(metrics, keep_best))
    return state, taken


def test_best_by_the_first_ap_there_is_or_by_name():
    rising = [{"bbox/AP": 0.3, "segm/AP": 0.1, "val/loss": 2.0}, {"bbox/AP": 0.2, "segm/AP": 0.2, "val/loss": 1.0},
              {"bbox/AP": 0.4, "segm/AP": 0.2, "val/loss": 1.5}]
    state, taken = state_with(rising)
    assert taken == [True, True, False]
    assert (state.best["step"], state.best["bbox/AP"], state.stale) == (2, 0.2, 1)
    assert state_with(rising, "bbox/AP")[1] == [True, False, True]
    assert state_with(rising, "val/loss")[1] == [True, True, False]
    assert state_with([{"voc/AP": 0.1}, {"voc/AP": 0.2}])[1] == [True, True]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("keep_best, values, taken, stale", [
    ("bbox/AP", [NAN, NAN, 0.0, 0.2, NAN, 0.1], [False, False, True, True, False, False], 2),
    ("val/loss", [INF, 2.0, NAN, 1.0], [False, True, False, True], 0),
    ("val/loss", [NAN, INF, NAN], [False] * 3, 3)])
def test_what_is_not_finite_is_never_the_best(keep_best, values, taken, stale):
    state, found = state_with([{keep_best: value} for value in values], keep_best)
    assert (found, state.stale) == (taken, stale)
    assert state.best.get("step") == (len(values) - stale if any(taken) else None)


def test_another_metric_may_be_chosen_on_the_way():
    """A resumed run: what was best by metrics that are no longer measured is not known to be better."""
    state, _ = state_with([{"bbox/AP": 0.9}])
    assert state.is_best({"voc/AP": 0.1}, "auto") and not state.is_best({"voc/AP": 0.1}, "auto")
