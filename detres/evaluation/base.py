"""What every detection evaluator shares: detections kept compactly on the host, and the typed result.

Legend: N images, D detections, S side of a predicted mask, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from detres.data.dataset import Dataset, ImageRecord
from detres.ops.paste_masks import paste_masks
from detres.structures import Batch, Detections


@dataclass(frozen=True)
class EvalResult:
    """Named numbers of an evaluation, as fractions of 1; -1 where nothing could be measured (as in pycocotools).

    `metrics` has names such as "bbox/AP"; `per_class` has the same names for each class.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)

    def merged(self, other: EvalResult) -> EvalResult:
        """Both results in one; names of `other` win."""
        names = [*self.per_class, *(name for name in other.per_class if name not in self.per_class)]
        return EvalResult({**self.metrics, **other.metrics},
                          {name: {**self.per_class.get(name, {}), **other.per_class.get(name, {})} for name in names})

    def table(self) -> str:
        """A table for each protocol, as text: a row for all, then one for each class."""
        classes = {name: _grouped(numbers) for name, numbers in self.per_class.items()}
        tables = [_table(group, {"all": numbers, **{name: own[group] for name, own in classes.items() if group in own}})
                  for group, numbers in _grouped(self.metrics).items()]
        return "\n\n".join(tables)


def _grouped(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        group, _, short = name.rpartition("/")
        groups.setdefault(group, {})[short] = value
    return groups


def _table(title: str, rows: dict[str, dict[str, float]]) -> str:
    columns = {name: max(6, len(name) + 1) for name in rows["all"]}
    first = max(map(len, [title, *rows]))
    lines = [title.ljust(first) + "".join(name.rjust(width) for name, width in columns.items())]
    lines.append("-" * len(lines[0]))
    lines += [name.ljust(first) + "".join(_number(numbers[column]).rjust(width) for column, width in columns.items())
              for name, numbers in rows.items()]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "n/a" if value == -1 else f"{value:.3f}"


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, in pixels of the original, in the model's order: 24 bytes each, and the masks."""

    boxes: np.ndarray  # (D, 4) float32
    scores: np.ndarray  # (D,) float32
    labels: np.ndarray  # (D,) int32
    masks: tuple[bytes, ...] | None = None  # compressed RLE counts at the size of the original


class Evaluator:
    """Collects detections image by image; a subclass adds `compute`.

    An image seen again replaces what was kept of it. The order of results is that of the data set, whatever the order
    of batches or ranks.
    """

    with_masks = False
    metric_names: tuple[str, ...]  # of what `compute` gives

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._records = {record.id: record for record in dataset.records}
        self._seen: dict[int | str, ImageDetections] = {}

    def reset(self) -> None:
        """Forget all detections."""
        self._seen = {}

    def update(self, detections: Detections, batch: Batch) -> None:
        """Add a batch of N images. `detections` are in pixels of the padded batch, on the model's device.

        Raises ValueError for images that the data set does not have and for numbers that are not finite.
        """
        detections = detections.rescale(batch.images.sizes, batch.original_sizes)
        singles = torch.stack([x.float() for x in (detections.scores, detections.labels, detections.valid)], -1)
        table = torch.cat([detections.boxes.float(), singles], -1).cpu().numpy()  # (N, D, 7): one copy to the host
        for i, image_id in enumerate(batch.image_ids):
            rows = np.flatnonzero(table[i, :, 6])
            boxes, scores, labels = np.split(table[i, rows, :6], (4, 5), axis=1)
            self._check(image_id, batch.paths[i], boxes, scores)
            masks = self._encode(detections, i, rows, self._records[image_id]) if self.with_masks else None
            self._seen[image_id] = ImageDetections(boxes, scores[:, 0], labels[:, 0].astype(np.int32), masks)

    def _check(self, image_id: int | str, path: str, boxes: np.ndarray, scores: np.ndarray) -> None:
        if image_id not in self._records:
            raise ValueError(f"images must belong to the data set '{self.dataset.name}', got id {image_id!r} ({path}). "
                             "Build the evaluator from the data set that is loaded.")
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"boxes and scores must be finite, got nan or inf from the model ({path}). "
                             "The training has probably diverged: lower train.lr.")

    def _encode(self, detections: Detections, i: int, rows: np.ndarray, record: ImageRecord) -> tuple[bytes, ...]:
        if detections.masks is None:
            raise ValueError("detections must have masks for segm, got none. Evaluate with iou_types=('bbox',).")
        index = torch.from_numpy(rows).to(detections.boxes.device)
        bitmaps = paste_masks(detections.masks[i, index], detections.boxes[i, index], (record.height, record.width))
        return encode_masks(bitmaps)

    def state(self) -> dict[int | str, ImageDetections]:
        """What was collected so far, to be sent to other ranks."""
        return self._seen

    def merge(self, states: list[dict[int | str, ImageDetections]]) -> None:
        """Take over what all ranks collected; their order does not matter."""
        self._seen = {image_id: found for state in states for image_id, found in state.items()}

    def results(self) -> list[dict]:
        """COCO results (original image and category ids) that pycocotools' `loadRes` accepts, best first per image."""
        return [_result(record, self.dataset.category_ids, self._seen[record.id], row)
                for record in self.dataset.records if record.id in self._seen
                for row in range(len(self._seen[record.id].scores))]

    def compute(self) -> EvalResult:
        raise NotImplementedError


def _result(record: ImageRecord, category_ids: tuple[int, ...], found: ImageDetections, row: int) -> dict:
    x1, y1, x2, y2 = found.boxes[row].tolist()
    result = {"image_id": record.id, "category_id": category_ids[found.labels[row]],
              "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(found.scores[row])}
    if found.masks is not None:
        result["segmentation"] = {"size": [record.height, record.width], "counts": found.masks[row].decode()}
    return result


def encode_masks(masks: Tensor) -> tuple[bytes, ...]:
    """Compressed RLE counts of bitmaps (D, h, w) on any device."""
    # pycocotools reads (h, w, D) in Fortran order, which in memory is (D, w, h): transpose where the masks are.
    columns = masks.transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
    return tuple(code["counts"] for code in rle.encode(columns.transpose(2, 1, 0)))
