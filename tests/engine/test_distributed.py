from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from detres.config import TrainConfig
from detres.engine import distributed
from detres.engine.step import backward


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.gather("a")) == (0, 1, ["a"])
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    count = distributed.mean_over_ranks(torch.tensor(3))
    assert count == 3 and count.dtype == torch.float32


def test_gradients_are_exchanged_once_a_batch(alone, dot, batch, monkeypatch):
    wrapped = distributed.wrap(dot)
    waits = []
    no_sync = type(wrapped).no_sync
    monkeypatch.setattr(type(wrapped), "no_sync", lambda self: waits.append(1) or no_sync(self))
    options = TrainConfig(accumulate=4, precision="fp32")
    backward(wrapped, batch(0), torch.device("cpu"), options)
    assert len(waits) == 3


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"device must be .*'{name}'"):
        distributed.pick_device(name)
    assert distributed.pick_device("cpu").type == "cpu"
