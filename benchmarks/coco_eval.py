"""COCO evaluation of boxes and masks at the size of COCO val, beside pycocotools and the compiled evaluators.

    pip install -e '.[benchmark]'
    python benchmarks/coco_eval.py                 # from arrays and from JSON files, all evaluators
    python benchmarks/coco_eval.py --only detres hotcoco --runs 5
    python benchmarks/coco_eval.py --iou-type segm --scale 0.2      # masks, from JSON files with run lengths

Each run is a process of its own on one core; runs of different evaluators alternate, and the table has medians. "CPU s"
is the user and system time from after the imports to the twelve numbers. From arrays: the ground truth is loaded
before the clock starts, and detections are an (N, 7) array. From JSON: both files are read. "MB" is what the peak
memory grew by after the imports. "equal" tells whether precision, recall and scores are pycocotools' bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from coco_scene import make, write

Stages = tuple[Callable[[], Any], Callable[[Any], dict]]  # ground truth, then detections to pycocotools' `eval`


def api(coco: type, evaluation: type) -> Callable[[Path, Any, str], Stages]:
    """An evaluator with the classes of pycocotools."""

    def run(truth: Path, results: Any, iou_type: str) -> Stages:
        def evaluate(gt) -> dict:
            e = evaluation(gt, gt.loadRes(results), iou_type)
            e.evaluate()
            e.accumulate()
            e.summarize()
            return e.eval

        return lambda: coco(str(truth)), evaluate

    return run


def pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    return api(COCO, COCOeval)


def faster_coco_eval():
    from faster_coco_eval import COCO, COCOeval_faster
    return api(COCO, COCOeval_faster)


def hotcoco():
    from hotcoco import COCO, COCOeval
    return api(COCO, COCOeval)


def ultrafast_pycocotools():
    from ultrafast_pycocotools import COCO, COCOeval
    return api(COCO, COCOeval)


def vernier():
    from vernier.instance import Bbox, CocoDataset, Evaluator

    def run(truth: Path, results: Any, iou_type: str) -> Stages:
        detections = Path(results).read_bytes if isinstance(results, str) else lambda: results
        evaluator = Evaluator(iou=Bbox(), parity_mode="strict")
        return (lambda: CocoDataset.from_json(truth.read_bytes()),
                lambda gt: {"stats": evaluator.evaluate(gt, detections(), num_threads=1).stats})

    return run


def detres():
    import torch

    from detres.evaluation.coco import coco_result
    from detres.evaluation.coco_engine import Found
    from detres.evaluation.coco_files import read_results, read_truth
    from detres.evaluation.coco_results import class_names, evaluate_columns, truth_tensors
    from detres.evaluation.overlaps import box_overlaps
    from detres.evaluation.trust import check

    torch.set_num_threads(1)

    def run(truth: Path, results: Any, iou_type: str) -> Stages:
        masks = iou_type == "segm"

        def from_files(gt) -> dict:
            checked = check(gt, read_results(results, masks), iou_type)
            return vars(evaluate_columns(checked.truth, checked.results, iou_type).curves[iou_type])

        def from_arrays(gt) -> dict:
            truths, classes = gt
            columns = torch.from_numpy(results).T.contiguous()
            image, x, y, w, h, score, label = columns
            found = Found(image.long() - 1, label.long() - 1, torch.stack([x, y, w, h], 1), score, w * h)
            result = coco_result(truths, found, classes, box_overlaps(truths, found), "bbox")
            return vars(result.curves["bbox"])

        if isinstance(results, str):
            return lambda: read_truth(truth, masks), from_files
        columns = read_truth(truth)
        return lambda: (truth_tensors(columns), class_names(columns)), from_arrays

    return run


EVALUATORS = {function.__name__: function for function in (
    detres, pycocotools, faster_coco_eval, hotcoco, ultrafast_pycocotools, vernier)}


def measure(name: str, source: str, folder: Path, iou_type: str) -> dict:
    """One evaluation in this process."""
    truth, results = folder / "truth.json", str(folder / "results.json")
    if source == "arrays":
        results = np.load(folder / "results.npy")
    with redirect_stdout(sys.stderr):
        load, evaluate = EVALUATORS[name]()(truth, results, iou_type)
        before = peak_mb()
        gt = load() if source == "arrays" else None
        start = cpu_seconds()
        evaluation = evaluate(load() if gt is None else gt)
        seconds = cpu_seconds() - start
    arrays = [np.asarray(evaluation[key]) for key in ("precision", "recall", "scores") if key in evaluation]
    return {"cpu": seconds, "mb": peak_mb() - before,
            "bits": hashlib.sha1(b"".join(map(np.ascontiguousarray, arrays))).hexdigest() if arrays else None}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mb() -> float:
    """Linux: of this program alone, where getrusage has that of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EVALUATORS,
                        help="(default: all; vernier wants boxes beside masks)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of COCO val (default: 1)")
    parser.add_argument("--iou-type", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, source, folder = args.one
        print(json.dumps(measure(name, source, Path(folder), args.iou_type)))
        return
    names = args.only or [name for name in EVALUATORS if args.iou_type == "bbox" or name != "vernier"]
    with tempfile.TemporaryDirectory() as folder:
        truths, found = make(args.scale)
        write(Path(folder), truths, found, masks=args.iou_type == "segm")
        columns = [found["image"] + 1, *found["box"].T, found["score"], found["label"] + 1]
        np.save(Path(folder) / "results.npy", np.stack(columns, 1))
        print(f"{found['image'].max() + 1} images, {len(truths['image'])} truths, {len(found['image'])} detections")
        for source in ("arrays", "json") if args.iou_type == "bbox" else ("json",):
            report(source, compare(names, source, folder, args.runs, args.iou_type))


def compare(names: list[str], source: str, folder: str, runs: int, iou_type: str) -> dict[str, list[dict]]:
    """Runs of each evaluator, in turns."""
    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    measured: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            command = [sys.executable, __file__, "--one", name, source, folder, "--iou-type", iou_type]
            process = subprocess.run(command, env=one_core, capture_output=True, text=True)
            if process.returncode:
                sys.exit(f"{name} from {source} failed:\n{process.stderr}")
            measured[name].append(json.loads(process.stdout))
    return measured


def report(source: str, measured: dict[str, list[dict]]) -> None:
    reference = measured.get("pycocotools", [{"bits": None}])[0]["bits"]
    print(f"\nfrom {source}\n{'':22}{'CPU s':>8}{'MB':>8}  equal")
    for name, runs in measured.items():
        bits = runs[0]["bits"]
        equal = "-" if bits is None or reference is None else "yes" if bits == reference else "no"
        cpu, mb = (statistics.median(run[key] for run in runs) for key in ("cpu", "mb"))
        print(f"{name:22}{cpu:8.2f}{mb:8.0f}  {equal}")


if __name__ == "__main__":
    main()
