"""A detector small enough to train in a test, a data set for it, and a model that is only a model by its interface."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detres.config import Config
from detres.config_file import dump_yaml
from detres.engine.interrupt import Interrupt
from detres.structures import Batch, ImageBatch, Targets

MODEL = {"input": {"min_size": 64, "max_size": 96},
         "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "gn", "freeze_stages": 0},
         "fpn": {"channels": 16}, "anchors": {"sizes": [[12], [24], [48], [96], [160]]},
         "rpn": {"pre_nms_topk_train": 100, "pre_nms_topk_test": 100, "post_nms_topk_train": 50,
                 "post_nms_topk_test": 50},
         "box_head": {"batch_per_image": 16, "fc_dim": 32}, "mask_head": {"channels": 16, "convs": 1}}
TRAIN = {"batch_size": 4, "reference_batch_size": 4, "lr": 0.01, "steps": 12, "milestones": [8], "warmup_steps": 4,
         "precision": "fp32", "log_every": 1, "checkpoint_every": 4, "ema": 0.9}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    from detres.data.shapes import ShapesOptions, write_shapes

    folder = tmp_path_factory.mktemp("shapes")
    return write_shapes(folder, 10, options=ShapesOptions(preset="easy", size=(64, 96)), val_images=4,
                        formats=("coco",), progress=False)


@pytest.fixture(scope="session")
def detector_config(shapes: Path, tmp_path_factory) -> Callable[..., Config]:
    """A Mask R-CNN on drawn scenes, in a folder of its own; keyword arguments go into `train`."""
    def make(workers: int = 2, **train: Any) -> Config:
        source = {"path": str(shapes)}
        return Config.model_validate({
            "output": str(tmp_path_factory.mktemp("runs") / "run"), "device": "cpu", "model": copy.deepcopy(MODEL),
            "data": {"train": source, "val": source, "workers": workers},
            "train": {**TRAIN, **train}, "eval": {"batch_size": 2}})

    return make


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Starts `detres train` with a config, in a process group of its own; `prelude` is code that runs before."""
    def run(config: Config, *options: str, prelude: str = "") -> subprocess.Popen:
        path = tmp_path / "config.yaml"
        path.write_text(dump_yaml(config))
        code = f"import sys\n{prelude}\nfrom detres.cli import main\nsys.exit(main({['train', str(path), *options]}))"
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)

    return run


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Sums are split by threads: results are the same to the last bit only for the same number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- a model by its interface only ---------------------------------------------------------------------------------


class Dot(nn.Module):
    """Losses of a linear map of mean colours; per-image means, so that parts of a batch average to the whole."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Dot:
        return self  # its norm is frozen

    def forward(self, images: ImageBatch, targets: Targets) -> dict[str, torch.Tensor]:
        features = self.norm(self.backbone(images.pixels.float() / 255)).float().mean((2, 3))  # (N, 4)
        return {"loss_cls": (features - 1).square().mean(), "loss_box": features[:, 0].square().mean()}


def make_batch(step: int, images: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (images, 3, 8, 12), generator=generator, dtype=torch.uint8)
    counts = torch.arange(images) % 3
    valid = torch.arange(3) < counts[:, None]
    masks = torch.arange(int(valid.sum()), dtype=torch.uint8)[:, None, None].expand(-1, 8, 12)
    targets = Targets(torch.rand(images, 3, 4, generator=generator), torch.zeros(images, 3, dtype=torch.int64), valid,
                      torch.arange(images), masks)
    sizes = torch.tensor([[8, 12]] * images)
    return Batch(ImageBatch(pixels, sizes), targets, tuple(range(images)),
                 tuple(f"image_{step}_{i}.jpg" for i in range(images)), sizes)


@pytest.fixture
def dot() -> Dot:
    torch.manual_seed(0)
    return Dot()


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture
def fit_dot(tmp_path: Path, dot: Dot, monkeypatch) -> Callable[..., dict[str, float]]:
    """Trains `Dot` on endless batches, and draws no curves; keyword arguments go into `train`."""
    from detres.engine.checkpoint import load_state
    from detres.engine.train import fit

    monkeypatch.setattr("detres.engine.train.plot_curves", lambda rows, path, title: None)

    def run(validate=None, model: nn.Module = dot, resume: bool = False, loader=None,
            interrupt: Interrupt | None = None, **train: Any) -> dict[str, float]:
        options = {**TRAIN, "steps": 10, "lr": 0.1, "ema": None, **train}
        config = Config.model_validate({"output": str(tmp_path / "run"), "device": "cpu", "train": options})
        last = tmp_path / "run" / "checkpoints" / "last.pt"
        saved = load_state(last) if resume else None
        batches = loader or (lambda step: (make_batch(number) for number in range(step, 10**6)))
        return fit(config, model, batches, validate, torch.device("cpu"), interrupt or Interrupt(),
                   {"classes": ["a"], "category_ids": [7]}, saved)

    return run
