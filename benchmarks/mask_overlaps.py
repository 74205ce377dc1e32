"""Mask and boundary overlaps from run lengths beside pycocotools: CPU seconds of one thread, same pairs.

    python benchmarks/mask_overlaps.py                  100 images
    python benchmarks/mask_overlaps.py --images 5000    the size of COCO val: some 1.3 million pairs; 10 minutes

Images are 480 x 640 with 7.4 truths on average, 41/34/25 % small/medium/large, 1.2 % crowds, and 100 detections: two
moved and resized copies of each truth and false ones, two in three of a class that the image has. Masks are wavy
ellipses. Every value at or above the lowest threshold is compared with ==; the best of some rounds, turn by turn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import time
from dataclasses import dataclass

import numpy as np
import torch
from mask_rcnn import cpu_name
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detres.evaluation.boundary_overlaps import rle_boundary_iou_pairs
from detres.evaluation.mask_overlaps import decode_runs, rle_areas, rle_iou_pairs

HEIGHT, WIDTH, CLASSES, DETECTIONS = 480, 640, 80, 100
LOWEST = 0.5
AREAS = np.log([(80, 32**2), (32**2, 96**2), (96**2, 120_000)])
ANGLES = np.linspace(0, 2 * np.pi, 30, endpoint=False)


@dataclass(frozen=True)
class Masks:
    rles: list[dict]
    group: np.ndarray  # (n,) image * CLASSES + class


def blob(rng: np.random.Generator, box: np.ndarray) -> dict:
    phases, sizes = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0, 0.15, 2)
    radius = 0.45 * (1 + sizes[0] * np.sin(3 * ANGLES + phases[0]) + sizes[1] * np.sin(5 * ANGLES + phases[1]))
    unit = 0.5 + radius[:, None] * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
    return coco_mask.frPyObjects([(box[:2] + box[2:] * unit).ravel().tolist()], HEIGHT, WIDTH)[0]


def random_box(rng: np.random.Generator) -> np.ndarray:
    area, aspect = np.exp(rng.uniform(*AREAS[rng.choice(3, p=(0.41, 0.34, 0.25))])), np.exp(rng.normal(0, 0.4))
    size = np.minimum(1.2 * np.sqrt([area * aspect, area / aspect]), [0.95 * WIDTH, 0.95 * HEIGHT])
    return np.concatenate([rng.uniform(0, [WIDTH, HEIGHT] - size), size])


def moved(rng: np.random.Generator, box: np.ndarray) -> np.ndarray:
    sigma = rng.uniform(0.01, 0.12)
    return np.concatenate([box[:2] + rng.normal(0, sigma, 2) * box[2:], box[2:] * np.exp(rng.normal(0, sigma, 2))])


def generate(images: int, seed: int = 0) -> tuple[Masks, Masks, np.ndarray]:
    """Detections, truths, and which of these are crowds."""
    rng = np.random.default_rng(seed)
    boxes, groups = ([], []), ([], [])
    for image in range(images):
        truths = [random_box(rng) for _ in range(rng.poisson(7.4))]
        labels = rng.choice(CLASSES, 3, replace=False)[rng.choice(3, len(truths), p=(0.55, 0.3, 0.15))]
        found = [moved(rng, box) for box in truths for _ in range(2)]
        false = [random_box(rng) for _ in range(DETECTIONS - len(found))]
        of_image = rng.choice(labels if len(labels) else CLASSES, len(false))
        of_false = np.where(rng.random(len(false)) < 0.65, of_image, rng.integers(0, CLASSES, len(false)))
        for i, (more, labelled) in enumerate([(found + false, [*labels.repeat(2), *of_false]), (truths, labels)]):
            boxes[i].extend(more)
            groups[i].extend(image * CLASSES + np.array(labelled, int))
    found, truths = (Masks([blob(rng, box) for box in b], np.array(g)) for b, g in zip(boxes, groups))
    return found, truths, rng.random(len(truths.rles)) < 0.012


def pairs_by_group(found: Masks, truths: Masks) -> list[tuple[np.ndarray, np.ndarray]]:
    """Detections and truths of each image and class that has both."""
    members = [dict(zip(keys.tolist(), np.split(order, starts[1:]))) for order, (keys, starts) in
               ((order, np.unique(masks.group[order], return_index=True))
                for masks in (found, truths) for order in [np.argsort(masks.group, kind="stable")])]
    return [(members[0][key], members[1][key]) for key in members[0] if key in members[1]]


def by_pycocotools(found: Masks, truths: Masks, crowd: np.ndarray, groups) -> np.ndarray:
    return np.concatenate([coco_mask.iou([found.rles[i] for i in d], [truths.rles[i] for i in g], crowd[g]).ravel()
                           for d, g in groups])


def whole_evaluation(found: Masks, truths: Masks, crowd: np.ndarray) -> None:
    """pycocotools from lists of dicts to its arrays."""
    def rows(masks: Masks) -> list[dict]:
        return [{"image_id": int(group // CLASSES), "category_id": int(group % CLASSES), "segmentation": dict(code)}
                for code, group in zip(masks.rles, masks.group)]

    images = sorted(set((np.concatenate([found.group, truths.group]) // CLASSES).tolist()))
    coco = COCO()
    coco.dataset = {"info": {}, "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in images],
                    "categories": [{"id": i} for i in range(CLASSES)],
                    "annotations": [{**row, "id": i, "iscrowd": int(c), "area": int(a)} for i, (row, c, a) in
                                    enumerate(zip(rows(truths), crowd, rle_areas(truths.rles)), 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = [{**row, "score": (i % 997) / 997} for i, row in enumerate(rows(found))]
        run = COCOeval(coco, coco.loadRes(results), "segm")
        run.evaluate()
        run.accumulate()


def measure(functions, rounds: int) -> dict[str, tuple[float, object]]:
    """CPU seconds, the best of all rounds, and what came out."""
    times, results = {name: [] for name in functions}, {}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            results[name] = function()
            times[name].append(time.process_time() - start)
    return {name: (min(times[name]), results[name]) for name in functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, truths, crowd = generate(args.images)
    groups = pairs_by_group(found, truths)
    d = torch.from_numpy(np.concatenate([d.repeat(len(g)) for d, g in groups]))
    g = torch.from_numpy(np.concatenate([np.tile(g, len(d)) for d, g in groups]))
    areas = [torch.from_numpy(rle_areas(masks.rles)) for masks in (found, truths)]
    crowds, group = torch.from_numpy(crowd), torch.from_numpy(truths.group)

    def iou() -> torch.Tensor:
        return rle_iou_pairs(found.rles, truths.rles, *areas, crowds, group, d, g, LOWEST)

    def decode() -> list:
        return [decode_runs(found.rles[i:i + 2000]) for i in range(0, len(found.rles), 2000)]

    of_masks = iou()
    measured = measure({
        "pycocotools COCOeval, whole": lambda: whole_evaluation(found, truths, crowd),
        "pycocotools maskUtils.iou": lambda: by_pycocotools(found, truths, crowd, groups),
        "detres areas": lambda: rle_areas(found.rles),
        "detres mask IoU": iou,
        "detres boundary IoU": lambda: rle_boundary_iou_pairs(found.rles, truths.rles, crowds, d, g, of_masks, LOWEST),
        "detres decoding, checked": decode,
    }, args.rounds)
    expected = measured["pycocotools maskUtils.iou"][1]
    near = expected >= LOWEST
    assert (of_masks.numpy()[near] == expected[near]).all() and (of_masks.numpy()[~near] < LOWEST).all()
    print(f"{cpu_name()}, one thread; Python {platform.python_version()}, numpy {np.__version__}, torch "
          f"{torch.__version__}\n{args.images} images, {len(found.rles)} detections, {len(truths.rles)} truths, "
          f"{len(d)} pairs, {near.sum()} with IoU >= {LOWEST}\n\n| {'':28} | CPU s |\n|{'-' * 30}|-------|")
    for name, (seconds, _) in measured.items():
        print(f"| {name:28} | {seconds:5.2f} |")


if __name__ == "__main__":
    main()
