"""Small data sets and detections for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.structures import Batch, Detections, ImageBatch


def square(x1: float, y1: float, x2: float, y2: float) -> list[list[float]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


@pytest.fixture
def make_dataset():
    """make_dataset({image_id: [(label, box), (label, box, {"crowd": True}) ...]}, classes) -> Dataset."""

    def build(images: dict, classes=("cat", "dog"), category_ids=None, size=(100, 120)) -> Dataset:
        numbers = iter(range(10**6))  # annotation ids from 0: the id that pycocotools takes for no match
        records = []
        for image_id, truths in images.items():
            items = []
            for label, box, *flags in truths:
                values = dict(id=next(numbers), label=label, box=tuple(map(float, box)), segmentation=square(*box),
                              area=float((box[2] - box[0]) * (box[3] - box[1])))
                items.append(Annotation(**{**values, **(flags[0] if flags else {})}))
            records.append(ImageRecord(image_id, Path(f"{image_id}.jpg"), *size, tuple(items)))
        ids = tuple(category_ids or range(1, len(classes) + 1))
        return Dataset("tiny", "coco", tuple(classes), ids, tuple(records))

    return build


@pytest.fixture
def make_batch():
    """make_batch(dataset, {image_id: [(label, box, score) ...]}, scale) -> Detections, Batch.

    As a model that sees images at `scale` gives them: padded to one number of rows, here with an invalid one in front.
    """

    def build(dataset: Dataset, found: dict, scale: float = 1.0, masks: bool = False) -> tuple[Detections, Batch]:
        records = {record.id: record for record in dataset.records}
        longest = 1 + max((len(rows) for rows in found.values()), default=0)
        shape = (len(found), longest)
        boxes, scores = torch.full((*shape, 4), 7.0), torch.full(shape, 0.99)
        labels, valid = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for i, rows in enumerate(found.values()):
            for j, (label, box, score) in enumerate(rows, 1):
                boxes[i, j], scores[i, j], labels[i, j], valid[i, j] = torch.tensor(box) * scale, score, label, True
        sizes = torch.tensor([[records[i].height, records[i].width] for i in found])
        resized = (sizes * scale).round().long()
        canvas = torch.zeros(len(found), 3, int(resized[:, 0].max()), int(resized[:, 1].max()), dtype=torch.uint8)
        paths = tuple(str(records[i].path) for i in found)
        batch = Batch(ImageBatch(canvas, resized), None, tuple(found), paths, sizes)
        probs = torch.ones(*shape, 28, 28) if masks else None
        return Detections(boxes, scores, labels, valid, probs), batch

    return build
