"""Where the time goes: import, and the parts of a training step of Mask R-CNN R50-FPN on 2 images of 480 x 640.

    python benchmarks/breakdown.py [--precision fp32] [--device cuda]

The data row is decoding, resizing and batching of JPEGs of that size in one process; in training it overlaps with the
rest. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from mask_rcnn import CLASSES, inputs

from detres import losses
from detres.build import build_model
from detres.config import DataConfig, InputConfig, SourceConfig
from detres.data.dataset import load_dataset
from detres.data.loader import build_loader
from detres.data.shapes import ShapesOptions, write_shapes
from detres.structures import ImageBatch
from detres.weights.torchvision import torchvision_config

LOSSES = ("rpn_losses", "box_head_losses", "mask_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for what in ("detres", "detres.cli", "torch", "detres.build"):
        print(f"import {what:14} {import_seconds(what):6.2f} s")
    rows = {"data": data_seconds()}
    rows.update(step_seconds(args))
    total = sum(value for name, value in rows.items() if name != "data")
    print(f"\nstep, {args.precision}, {args.device}, {args.threads} threads")
    for name, seconds in rows.items():
        share = "" if name == "data" else f"{seconds / total:7.0%}"
        print(f"{name:10} {seconds:7.3f} s {share}")


def import_seconds(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(float(run.stdout) for run in runs)


def data_seconds() -> float:
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(folder, 12, options=ShapesOptions(size=(480, 640)), val_images=0, formats=("coco",),
                     progress=False)
        dataset = load_dataset(SourceConfig(path=folder), "train")
        loader = iter(build_loader(dataset, InputConfig(min_size=480, max_size=640), DataConfig(workers=0),
                                   batch_size=2, training=True, with_masks=True))
        times = []
        for _ in range(8):
            start = time.perf_counter()
            next(loader)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def step_seconds(args) -> dict[str, float]:
    spent: dict[str, float] = {}

    @contextmanager
    def timed(name: str):
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if args.device != "cpu":
            torch.cuda.synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    for name in LOSSES:  # the losses are called inside the forward pass: timed apart and taken off it
        def wrapped(*values, function=getattr(losses, name), **options):
            with timed("losses"):
                return function(*values, **options)
        setattr(losses, name, wrapped)

    model = build_model(torchvision_config(), CLASSES).to(args.device, memory_format=torch.channels_last)
    images, targets = inputs(args.device)
    images = ImageBatch(images.pixels.contiguous(memory_format=torch.channels_last), images.sizes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
    rounds = []
    for _ in range(args.rounds + 1):
        spent.clear()
        with timed("forward"), torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            found = model(images, targets)
        with timed("backward"):
            sum(found.values()).backward()
        with timed("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        spent["forward"] -= spent["losses"]
        rounds.append(dict(spent))
    names = ("forward", "losses", "backward", "optimizer")
    return {name: statistics.median(row[name] for row in rounds[1:]) for name in names}


if __name__ == "__main__":
    main()
