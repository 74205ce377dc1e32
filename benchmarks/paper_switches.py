"""What each improvement of appendix B of arXiv 1512.03385 (its Table 9) brings, at a size for two CPU cores.

    python benchmarks/paper_switches.py --data-root DIR                  what is done stays done
    python benchmarks/paper_switches.py --data-root DIR --data bccd      a part: processes may share the parts
    python benchmarks/paper_switches.py --table                          the table of what there is

DIR holds bccd/, voc_mini/ and cifar10_jpeg/; shapes are drawn. A seed of a data set takes five to fifteen minutes of
one core. For each data set and seed one detector is trained without and one with global context: ResNet-18 of width
16 to stage 4, stage 5 for each region, some hundred steps. Each row changes how they are tested. Everything is scaled
with the short side of the images as the paper's numbers are to 600 pixels: scales of 1/3 to 5/3 of it, regions that
aim at 224/600 of it. Training draws short sides from 2/3 to 4/3, as there is little pre-training to learn objects of
several sizes from; this range was chosen on bccd's val split (train split, seed 0: AP 31.8, of one size 31.0, of 1/3
to 5/3 26.9). These are small networks on small data: the table shows that the switches work and what they cost, and
is no estimate of what they bring to a ResNet-101 on COCO.

voc_mini, 196 images of 20 classes, is too little to learn from nothing (AP 0.1 %): there the backbone begins from a
classifier of CIFAR-10 at twice its size.

AP and AP50 are COCO's, of boxes, on images that did not train, in percent: mean and standard deviation over seeds, and
the gain over the baseline of the same seed. Seconds an image are the model's, without loading: processor time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from mask_rcnn import cpu_name

from detres.config import Config, SourceConfig
from detres.config_file import load_config
from detres.data.dataset import load_dataset
from detres.data.loader import build_loader
from detres.data.shapes import ShapesOptions, write_shapes
from detres.data.transforms import scale_pyramid
from detres.engine.train import train
from detres.evaluation.run import align_classes, build_evaluators, evaluate
from detres.inference.predictor import load_model

ROOT = Path(__file__).resolve().parents[1]
NMS = ("model.box_head.nms_thresh=0.3",)
REFINE = (*NMS, "model.box_head.refine=true")
VOTE = (*REFINE, "model.box_head.vote_thresh=0.5")
Seeds = tuple[int, ...]  # of the models that make one
SCALES = (1 / 3, 2 / 3, 1, 4 / 3, 5 / 3)


@dataclass(frozen=True)
class Data:
    """Where images are, their short side, and how long to train on them."""

    path: str
    train_split: str
    test_split: str
    short_side: int
    steps: int
    is_pretrained: bool = False


@dataclass(frozen=True)
class Row:
    """One way to test. ensemble: all seeds as one model."""

    name: str
    context: bool = False
    overrides: tuple[str, ...] = ()
    multi_scale: bool = False
    ensemble: bool = False


DATA = {"shapes": Data("shapes_data", "train", "val", 128, 400),
        "bccd": Data("bccd/BCCD", "trainval", "test", 180, 350),
        "voc_mini": Data("voc_mini/VOCdevkit", "train", "val", 128, 1500, is_pretrained=True)}
ROWS = (Row("baseline"),
        Row("NMS at 0.3 instead of 0.5", overrides=NMS),
        Row("NMS at 0.3, box refinement", overrides=REFINE),
        Row("NMS at 0.3, box refinement, voting", overrides=VOTE),
        Row("global context", context=True),
        Row("multi-scale testing", multi_scale=True),
        Row("all of these", context=True, overrides=VOTE, multi_scale=True),
        Row("ensemble of the seeds", ensemble=True),
        Row("ensemble of the seeds, all of these", context=True, overrides=VOTE, multi_scale=True, ensemble=True))


def settings(name: str, args: argparse.Namespace, context: bool, seed: int) -> Config:
    data, side = DATA[name], DATA[name].short_side
    root = args.out if name == "shapes" else args.data_root
    start = json.dumps(str(classifier(args))) if data.is_pretrained else "null"
    output = args.out / name / f"{'context' if context else 'plain'}_{seed}"
    return load_config(ROOT / "configs" / "_base" / "scratch_r18.yaml", [
        "model.name=faster_rcnn", f"model.input={{min_size: {side}, max_size: {2 * side}}}",
        "model.backbone.layout=c4", "model.backbone.width=16", f"model.backbone.weights={start}",
        f"model.anchors.sizes=[[{', '.join(str(round(side * part)) for part in (0.1, 0.2, 0.4, 0.8))}]]",
        "model.rpn.post_nms_topk_train=200", "model.rpn.post_nms_topk_test=100",
        "model.box_head.resolution=8", "model.box_head.batch_per_image=32", f"model.box_head.global_context={context}",
        f"data.train={{path: {json.dumps(str(root / data.path))}, split: {data.train_split}}}",
        "data.on_invalid=drop", "data.workers=0",
        f"data.augment.min_sizes={[round(side * part) for part in (2 / 3, 5 / 6, 1, 7 / 6, 4 / 3)]}",
        f"train.steps={data.steps}", f"train.seed={seed}", f"train.precision={args.precision}", f"device={args.device}",
        f"output={json.dumps(str(output))}"]).config


def classifier(args: argparse.Namespace) -> Path:
    """Where the weights are that `train_classifier` makes."""
    return args.out / "cifar10" / "checkpoints" / "final.safetensors"


def train_classifier(args: argparse.Namespace) -> None:
    """Of the objects of CIFAR-10, enlarged to 64 pixels."""
    data = json.dumps(str(args.data_root / "cifar10_jpeg"))
    train(load_config(ROOT / "configs" / "paper" / "_base" / "cifar.yaml", [
        "model.input={min_size: 64, max_size: 64, crop: 64}", "model.backbone.stem=imagenet", "model.backbone.depth=18",
        "model.backbone.shortcut=B", f"data.train.path={data}", f"data.val.path={data}", "data.classification.pad=8",
        "train.steps=2800", "train.milestones=[1600,2400]", "train.eval_every=700", f"train.precision={args.precision}",
        f"device={args.device}", f"output={json.dumps(str(args.out / 'cifar10'))}"]).config, resume=True)


def weights(name: str, args: argparse.Namespace, context: bool, seed: int) -> Path:
    """The trained weights; trains them where there are none."""
    config = settings(name, args, context, seed)
    path = Path(config.output) / "checkpoints" / "final.safetensors"
    if not path.is_file():
        if DATA[name].is_pretrained and not classifier(args).is_file():
            train_classifier(args)
        train(config, resume=True)
    return path


class Timed(nn.Module):
    """A model that counts its seconds, but for those of the first batch."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__()
        self.model, self.device, self.seconds, self.images, self.is_warm = model, device, 0.0, 0, False

    def forward(self, images):
        start = self.now()
        found = self.model(images)
        if self.is_warm:
            self.seconds += self.now() - start
            self.images += len(images.pixels)
        self.is_warm = True
        return found

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(name: str, row: Row, paths: list[Path], args: argparse.Namespace) -> dict[str, float]:
    data, overrides = DATA[name], list(row.overrides)
    if row.multi_scale:
        overrides += [f"eval.test_scales={[round(data.short_side * scale) for scale in SCALES]}",
                      f"model.pool.canonical_side={data.short_side * 224 / 600}"]
    model, meta, config = load_model(paths, args.device, overrides)
    source = SourceConfig(path=config.data.train.path, split=data.test_split)
    dataset = align_classes(load_dataset(source, "val", "drop"), meta.classes, meta.category_ids)
    loader = build_loader(dataset, config.model.input, config.data, batch_size=8, training=False, with_masks=False,
                          pyramid=scale_pyramid(config.model.input, config.eval))
    timed = Timed(model, next(model.parameters()).device)
    metrics = evaluate(timed, loader, build_evaluators(dataset, ("coco",), False), timed.device).metrics
    return {"AP": metrics["bbox/AP"], "AP50": metrics["bbox/AP50"], "seconds": timed.seconds / timed.images}


def run(args: argparse.Namespace) -> None:
    """Trains and evaluates what is missing. The result of each cell is a file."""
    for name in args.data:
        if name == "shapes":
            write_shapes(args.out / DATA[name].path, 500, val_images=100, options=ShapesOptions("easy"),
                         formats=("coco",))
        for row in ROWS:
            for seeds in seeds_of(args, row):
                cell = cell_of(args, name, row, seeds)
                if not cell.is_file():
                    paths = [weights(name, args, row.context, seed) for seed in seeds]
                    cell.parent.mkdir(parents=True, exist_ok=True)
                    cell.write_text(json.dumps(measure(name, row, paths, args)))
                    print(f"{name}, {row.name}, seeds {seeds}: {cell.read_text()}", flush=True)


def seeds_of(args: argparse.Namespace, row: Row) -> list[Seeds]:
    """The models of each cell of a row. One alone is no ensemble."""
    if row.ensemble:
        return [tuple(args.seeds)] if len(args.seeds) > 1 else []
    return [(seed,) for seed in args.seeds]


def cell_of(args: argparse.Namespace, name: str, row: Row, seeds: Seeds) -> Path:
    return args.out / name / "cells" / f"{re.sub(r'[^A-Za-z0-9.]+', '_', row.name)}_{'_'.join(map(str, seeds))}.json"


def table(args: argparse.Namespace) -> str:
    lines = []
    for name in args.data:
        data = DATA[name]
        lines += [f"\n{name}: short side {data.short_side} px, {data.steps} steps of 8 images, "
                  f"{len(args.seeds)} seeds\n", "| test | AP | AP50 | gain in AP | s / image |",
                  "|---|---|---|---|---|"]
        base = cells(args, name, ROWS[0])
        lines += [line(row, found, base) for row in ROWS if (found := cells(args, name, row))]
    return "\n".join(lines)


def cells(args: argparse.Namespace, name: str, row: Row) -> dict[Seeds, dict[str, float]]:
    files = {seeds: cell_of(args, name, row, seeds) for seeds in seeds_of(args, row)}
    return {seeds: json.loads(file.read_text()) for seeds, file in files.items() if file.is_file()}


def line(row: Row, found: dict[Seeds, dict[str, float]], base: dict[Seeds, dict[str, float]]) -> str:
    """The gain of an ensemble is over the mean of the baselines."""
    mean = statistics.fmean(cell["AP"] for cell in base.values())
    gains = [cell["AP"] - (mean if row.ensemble else base[seeds]["AP"]) for seeds, cell in found.items()]
    ap, ap50, gain = (spread(values) for values in ([cell["AP"] for cell in found.values()],
                                                    [cell["AP50"] for cell in found.values()], gains))
    seconds = statistics.fmean(cell["seconds"] for cell in found.values())
    return f"| {row.name} | {ap} | {ap50} | {'' if row is ROWS[0] else gain} | {seconds:.3f} |"


def spread(values: list[float]) -> str:
    """In percent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=ROOT / "datasets", metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("runs/paper_switches"), metavar="DIR")
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training; tests are fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print what there is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        run(args)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = f"{cpu_name()}, {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"\n{device}; trained in {args.precision}; Python {platform.python_version()}, torch {torch.__version__}; "
          f"detres {commit}\n{table(args)}")


if __name__ == "__main__":
    main()
