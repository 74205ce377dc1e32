"""Ground truth and detections of the size of COCO val, made up: what the evaluators are timed on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

IMAGES, CLASSES, TRUTHS, DETECTIONS = 5_000, 80, 36_781, 500_000
SIDES = ((8, 32, 0.41), (32, 96, 0.34), (96, 400, 0.25))  # from, to (pixels), share: COCO's small, medium and large


def make(scale: float = 1.0, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Columns of truths and detections; `scale` shrinks all counts.

    Some classes and images have many objects, 1.2 % of the truths are crowds, an eighth of the detections are truths
    moved by some pixels, and scores have three decimals, so that there are ties. That makes 1.1 million pairs of one
    image and class, of which 66 thousand overlap by half.
    """
    rng = np.random.default_rng(seed)
    images, truths, detections = (round(scale * n) for n in (IMAGES, TRUTHS, DETECTIONS))
    share = 1 / np.arange(1, CLASSES + 1)
    label = rng.choice(CLASSES, truths, p=share / share.sum())
    busy = rng.gamma(0.7, 1.0, images)  # images with few and with many objects
    image = rng.choice(images, truths, p=busy / busy.sum())
    box = _boxes(rng, truths)
    t = {"image": image, "label": label, "box": box, "area": box[:, 2:].prod(1) * rng.uniform(0.5, 1, truths),
         "crowd": rng.random(truths) < 0.012}
    copies = rng.integers(0, truths, detections // 8)
    near = box[copies] + rng.normal(0, 0.08, (len(copies), 4)) * np.tile(box[copies, 2:], 2)
    near[:, 2:] = np.maximum(near[:, 2:], 1)
    rest = detections - len(copies)
    alike = rng.integers(0, truths, rest)  # false detections are mostly of classes that the image has
    strange = rng.random(rest) < 0.2
    d = {"image": np.concatenate([image[copies], np.where(strange, rng.integers(0, images, rest), image[alike])]),
         "label": np.concatenate([label[copies], np.where(strange, rng.integers(0, CLASSES, rest), label[alike])]),
         "box": np.concatenate([near, _boxes(rng, rest)]).round(2),
         "score": np.concatenate([rng.beta(4, 2, len(copies)), rng.beta(1, 6, rest)]).round(3)}
    order = np.lexsort((-d["score"], d["image"]))  # as models give them: image by image, best first
    return t, {key: value[order] for key, value in d.items()}


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    low, high, share = map(np.array, zip(*SIDES))
    size = rng.choice(len(SIDES), count, p=share)
    side = np.exp(rng.uniform(np.log(low[size]), np.log(high[size])))
    aspect = np.exp(rng.normal(0, 0.3, count))
    extent = np.stack([np.minimum(side * aspect, 639), np.minimum(side / aspect, 479)], 1)
    corner = rng.random((count, 2)) * (np.array([640, 480]) - extent)
    return np.concatenate([corner, extent], 1).round(2)


def write(folder: Path, truths: dict[str, np.ndarray], found: dict[str, np.ndarray], masks: bool = False
          ) -> tuple[Path, Path]:
    """Both as COCO files. Truths have a polygon of 20 corners, detections a box or, with `masks`, run lengths alone."""
    rng = np.random.default_rng(0)
    annotations = []
    for i, (image, label, box, area, crowd) in enumerate(zip(*(truths[k].tolist() for k in (
            "image", "label", "box", "area", "crowd"))), 1):
        annotations.append({"segmentation": [_outline(rng, box)], "area": area, "iscrowd": int(crowd),
                            "image_id": image + 1, "bbox": box, "category_id": label + 1, "id": i})
    count = int(max(truths["image"].max(), found["image"].max())) + 1
    truth = {"images": [{"id": i + 1, "file_name": f"{i + 1:012}.jpg", "height": 480, "width": 640}
                        for i in range(count)],
             "categories": [{"id": k + 1, "name": f"class {k + 1}"} for k in range(CLASSES)],
             "annotations": annotations}
    results = [{"image_id": image + 1, "category_id": label + 1, "score": score,
                **({"segmentation": _run_lengths(_outline(rng, box))} if masks else {"bbox": box})}
               for image, label, box, score in zip(*(found[k].tolist() for k in ("image", "label", "box", "score")))]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "truth.json", folder / "results.json"
    for path, content in zip(paths, (truth, results)):
        path.write_text(json.dumps(content))
    return paths


def _outline(rng: np.random.Generator, box: list[float]) -> list[float]:
    """A polygon of 20 corners, a dented ellipse in the box."""
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    corners = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.8, 1, (20, 1))
    half = np.array(box[2:]) / 2
    return (box[:2] + half + half * corners).round(2).flatten().tolist()


def _run_lengths(polygon: list[float]) -> dict:
    (code,) = coco_mask.frPyObjects([polygon], 480, 640)
    return {"size": code["size"], "counts": code["counts"].decode()}
