"""Mask R-CNN R50-FPN beside torchvision's: same weights, same inputs, turn by turn in one process.

    python benchmarks/mask_rcnn.py                       training step and inference, fp32 and bf16
    python benchmarks/mask_rcnn.py --device cuda

A training step is forward, backward and SGD on 2 images of 480 x 640 with 512 RoIs an image, R50 with frozen BN and
the first two stages frozen, as both train it. Medians over rounds; peak memory is that of a fresh process that does
two steps, less what it held before the model. The last column is torchvision's fp32 time over this one's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time

import torch
import torchvision
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detres.build import build_model
from detres.structures import ImageBatch, Targets
from detres.weights.keymap import KeyMap
from detres.weights.torchvision import RCNN, TWO_FCS, torchvision_config

N, HEIGHT, WIDTH, G, CLASSES = 2, 480, 640, 8, 80
CONTENDERS = ("torchvision fp32", "torchvision bf16", "detres fp32", "detres bf16")


def inputs(device: str):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (N, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
    corner = torch.rand(N, G, 2, generator=generator) * torch.tensor([WIDTH * 0.6, HEIGHT * 0.6])
    boxes = torch.cat([corner, corner + torch.rand(N, G, 2, generator=generator) * 180 + 20], -1)
    labels = torch.randint(0, CLASSES, (N, G), generator=generator)
    masks = torch.zeros(N * G, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, box in zip(masks, boxes.flatten(0, 1).int().tolist()):
        mask[box[1]: box[3], box[0]: box[2]] = 1
    images = ImageBatch(pixels, torch.tensor([[HEIGHT, WIDTH]] * N))
    targets = Targets(boxes=boxes, labels=labels, valid=torch.ones(N, G, dtype=torch.bool), seeds=torch.arange(N),
                      masks=masks)
    return images.to(device), targets.to(device)


def torchvision_model(device: str):
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=HEIGHT,
                                  max_size=WIDTH, rpn_post_nms_top_n_train=1000)
    model.backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3,
                                         norm_layer=torchvision.ops.FrozenBatchNorm2d)
    for name, module in model.backbone.named_modules():  # without trained statistics: keep activations of order one
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d) and name.endswith(("bn3", "downsample.1")):
            module.weight.fill_(0.5)
    model.rpn.head.bbox_pred.weight.data.zero_()  # proposals are anchors: a natural share of foreground
    return model.to(device)


def make(name: str, device: str):
    """A function that does one training step, and one that detects."""
    library, precision = name.split()
    images, targets = inputs(device)
    model = torchvision_model(device)
    if library == "detres":
        config = torchvision_config(rpn={"post_nms_topk_train": 1000})
        ours = build_model(config, CLASSES)
        ours.load_state_dict(KeyMap([*RCNN, *TWO_FCS]).to_ours(model.state_dict())[0])
        model = ours.to(device, memory_format=torch.channels_last)
        images = ImageBatch(images.pixels.contiguous(memory_format=torch.channels_last), images.sizes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
    floats = list(images.pixels.float() / 255)
    dicts = [{"boxes": b, "labels": c + 1, "masks": m} for b, c, m in
             zip(targets.boxes, targets.labels, targets.masks.view(N, G, HEIGHT, WIDTH))]
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def train():
        model.train()
        with autocast:
            losses = model(images, targets) if library == "detres" else model(floats, dicts)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def infer():
        model.eval()
        with autocast:
            return model(images) if library == "detres" else model(floats)

    return {"train": train, "infer": infer}


def measure(functions, rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each, turn by turn."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):  # the first warms up
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: tuple(statistics.median(column) for column in zip(*rows)) for name, rows in times.items()}


def peak_memory(name: str, what: str, device: str) -> float:
    """GiB, in this process."""
    before = peak_rss()
    function = make(name, device)[what]
    function(), function()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (peak_rss() - before) / 2**20


def peak_rss() -> int:
    """KiB of this program alone: getrusage would count the parent's before exec."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", nargs="+", choices=("train", "infer"), default=("train", "infer"))
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_memory(*args.memory, args.device))
        return
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{cpu_name()}, {args.threads} threads"
    print(f"{device}; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}; detres {commit}\n{N} images of {HEIGHT}x{WIDTH}, medians of "
          f"{args.rounds} rounds, turn by turn\n")
    print(f"| {'':5} | {'':16} | wall s | CPU s | peak GiB | speed-up |\n"
          "|-------|------------------|--------|-------|----------|----------|")
    for what in args.what:
        times = measure({name: make(name, args.device)[what] for name in CONTENDERS}, args.rounds, args.device)
        for name, (wall, cpu) in times.items():
            command = [sys.executable, __file__, "--device", args.device, "--threads", str(args.threads),
                       "--memory", name, what]
            memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"| {what:5} | {name:16} | {wall:6.3f} | {cpu:5.2f} | {memory:8.2f} | "
                  f"{times[CONTENDERS[0]][0] / wall:8.2f} |", flush=True)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
