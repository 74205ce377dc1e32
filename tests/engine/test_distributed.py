from __future__ import annotations

import multiprocessing as mp
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from detres.config import Config, TrainConfig
from detres.engine import distributed
from detres.engine.checkpoint import load_weights
from detres.engine.interrupt import Interrupt
from detres.engine.step import backward
from detres.engine.train import fit
from detres.structures import Batch, ImageBatch, Targets


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


# ---- batch norm with statistics of its own rank ---------------------------------------------------------------------


class Normed(nn.Module):
    """A loss that depends on a batch norm."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, images: ImageBatch, targets: Targets) -> dict[str, torch.Tensor]:
        return {"loss_cls": (self.backbone(images.pixels.float() / 255) - images.pixels / 255).square().mean()}


def _images_of(rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(2 * step + rank)
    pixels = torch.randint(0, 100 + 100 * rank, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    none = torch.zeros(2, 1, dtype=torch.bool)
    targets = Targets(torch.zeros(2, 1, 4), none.long(), none, torch.zeros(2, dtype=torch.int64))
    sizes = torch.tensor([[8, 8]] * 2)
    return Batch(ImageBatch(pixels, sizes), targets, (0, 1), ("a.jpg", "b.jpg"), sizes)


def _train_rank(rank: int, folder: Path, ema: float | None) -> None:
    """Each rank notes what it evaluates."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"bbox/AP": float(len(seen))}

    train = {"batch_size": 4, "reference_batch_size": 4, "steps": 4, "eval_every": 2, "lr": 0.1, "warmup_steps": 0,
             "milestones": [100], "precision": "fp32", "ema": ema}
    config = Config.model_validate({"output": str(folder / "run"), "device": "cpu", "train": train})
    torch.manual_seed(0)
    batches = (lambda step: (_images_of(rank, number) for number in range(step, 10**6)))
    fit(config, Normed(), batches, validate, torch.device("cpu"), Interrupt(), {"classes": ["a"], "category_ids": [1]})
    torch.save(seen, folder / f"seen{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ema", [None, 0.5])
def test_every_rank_evaluates_what_is_saved(tmp_path, ema):
    context = mp.get_context("spawn")  # autograd does not survive a fork
    ranks = [context.Process(target=_train_rank, args=(rank, tmp_path, ema)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"seen{rank}.pt") for rank in (0, 1))
    best, meta = load_weights(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert len(first) == 2 and meta.step == 4 and not torch.equal(best["backbone.1.running_mean"], torch.zeros(3))
    for one, two in zip(first, second, strict=True):
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert [name for name in best if not torch.equal(best[name], first[-1][name])] == []
