"""RoIAlign from one level, forward and backward, beside torchvision's kernel.

    python benchmarks/roi_align.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torchvision

from detres.ops.roi_align import roi_align


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    feature = torch.randn(2, 256, 120, 160, device=args.device)
    corner = torch.rand(1024, 2, device=args.device) * torch.tensor([500.0, 350.0], device=args.device)
    boxes = torch.cat([corner, corner + torch.rand(1024, 2, device=args.device) * 100 + 20], 1)
    image = torch.arange(1024, device=args.device) % 2
    rois = torch.cat([image[:, None].float(), boxes], 1)
    contiguous = feature.clone().requires_grad_()
    channels_last = feature.contiguous(memory_format=torch.channels_last).requires_grad_()
    contenders = {"torchvision": lambda: torchvision.ops.roi_align(contiguous, rois, 7, 0.25, 2, True),
                  "detres": lambda: roi_align([channels_last], [4], boxes, image, 7, 2, True)}
    times = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, forward in contenders.items():
            start = time.perf_counter()
            forward().sum().backward()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"1024 RoIs of 7x7 from 2 x 256 x 120 x 160, {args.device}, {args.threads} threads, "
          f"torch {torch.__version__}")
    for name, seconds in medians.items():
        print(f"{name:12} {seconds * 1e3:8.1f} ms   {medians['torchvision'] / seconds:5.1f} x")


if __name__ == "__main__":
    main()
