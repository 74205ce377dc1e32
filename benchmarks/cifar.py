"""Images per second of training CIFAR networks, data on the device, beside what the arithmetic and the memory allow.

    python benchmarks/cifar.py [--depth 20 56 110] [--batch 128] [--steps 50] [--compile]

Limits, from counts and from what this device does in the same run:
  FLOP limit    3 x the multiply-adds of a forward pass (forward, and two products in backward), at the rate of a large
                matrix product in the precision that trains
  copy limit    every activation of a convolution, norm and ReLU is written once and read once in forward, and as much
                again in backward, at the rate of a large copy
"""

from __future__ import annotations

import argparse
import platform
import time

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from detres.build import build_model
from detres.config import Config
from detres.data.cifar import MemoryLoader
from detres.data.class_dataset import ClassDataset
from detres.engine.optim import build_optimizer
from detres.engine.step import backward


def seconds(run, device: torch.device, repeats: int) -> float:
    run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return n**3 / seconds(lambda: a @ b, device, 10)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 10)


def activation_values(model: nn.Module, pixels: torch.Tensor) -> int:
    """Values that an image's convolutions, norms and ReLUs write in forward."""
    count = 0

    def note(module, inputs, output) -> None:
        nonlocal count
        count += output.numel() * (2 if isinstance(module, nn.BatchNorm2d) else 1)  # a ReLU follows the norm

    handles = [module.register_forward_hook(note) for module in model.modules()
               if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    model(pixels)
    for handle in handles:
        handle.remove()
    return count // len(pixels)


def measure(depth: int, args: argparse.Namespace, device: torch.device) -> str:
    config = Config.model_validate({
        "model": {"name": "classifier", "input": {"min_size": 32},
                  "backbone": {"depth": depth, "stem": "cifar", "shortcut": "A", "width": 16, "weights": None,
                               "norm": "bn", "freeze_stages": 0}},
        "train": {"batch_size": args.batch, "precision": args.precision, "optimizer": "sgd"}})
    torch.manual_seed(0)
    model = build_model(config.model, 10).to(device, memory_format=torch.channels_last).train()
    pixels = torch.zeros(1, 3, 32, 32, device=device)
    multiply_adds = FlopCountAnalysis(model.backbone.body.eval(), pixels)
    multiply_adds = multiply_adds.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    values = activation_values(model.backbone.body, pixels)
    model.train()
    if args.compile:
        model.backbone.compile()
    rng = np.random.default_rng(0)
    data = ClassDataset("noise", tuple("0123456789"), rng.integers(0, 10, 50_000),
                        pixels=rng.integers(0, 256, (50_000, 32, 32, 3), np.uint8))
    batches = iter(MemoryLoader(data, device, batch_size=args.batch, training=True, pad=4, flip=0.5))
    optimizer = build_optimizer(model, config.train)

    def step() -> None:
        backward(model, next(batches), device, config.train)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    rate = args.batch / seconds(step, device, args.steps)
    loading = args.batch / seconds(lambda: next(batches), device, args.steps)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    flop_limit = product_rate(device, dtype) / (3 * multiply_adds)
    copy_limit = copy_rate(device) / (4 * values * dtype.itemsize)
    return (f"| ResNet-{depth} | {rate:.0f} | {loading:.0f} | {flop_limit:.0f} | {copy_limit:.0f} | "
            f"{rate / min(flop_limit, copy_limit):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56, 110])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else \
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, batch {args.batch}, {args.precision}"
          f"{', compiled' if args.compile else ''}: images per second\n")
    print("| network | training | loader alone | FLOP limit | copy limit | of the lower limit |\n|---|---|---|---|---|---|")
    for depth in args.depth:
        print(measure(depth, args, device), flush=True)


if __name__ == "__main__":
    main()
