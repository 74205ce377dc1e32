"""What every detection evaluator shares: detections kept compactly where they were made, and the typed result.

Legend: N images, D detections of an image (padded), n rows of a part, G truths, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from detres.data.dataset import Dataset
from detres.data.records import Records
from detres.evaluation.flat import Found, Truths
from detres.structures import Batch, Detections


@dataclass(frozen=True)
class EvalResult:
    """Named numbers of an evaluation, as fractions of 1; -1 where nothing could be measured (as in pycocotools).

    `metrics` has names such as "bbox/AP"; `per_class` has the same names for each class; `curves` has what they are
    means of, such as "bbox": precision, recall and scores (`coco_engine.Arrays`).
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict, compare=False)

    def merged(self, other: EvalResult) -> EvalResult:
        """Both results in one; names of `other` win."""
        names = [*self.per_class, *(name for name in other.per_class if name not in self.per_class)]
        return EvalResult({**self.metrics, **other.metrics},
                          {name: {**self.per_class.get(name, {}), **other.per_class.get(name, {})} for name in names},
                          {**self.curves, **other.curves})

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
    columns = {name: 1 + max(5, len(name), *(len(_number(numbers.get(name, -1))) for numbers in rows.values()))
               for row in rows.values() for name in row}
    first = max(map(len, [title, *rows]))
    lines = [title.ljust(first) + "".join(name.rjust(width) for name, width in columns.items())]
    lines.append("-" * len(lines[0]))
    for name, numbers in rows.items():
        lines.append(name.ljust(first) + "".join(_number(numbers.get(column, -1)).rjust(width)
                                                 for column, width in columns.items()))
    return "\n".join(lines)


def _number(value: float) -> str:
    return "n/a" if value == -1 else f"{value:.3f}"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Rows(Protocol):
    """Something that a `Part` keeps for each of its n rows, such as masks."""

    def rows(self, keep: Tensor) -> Rows: ...
    def to(self, device: torch.device | str) -> Rows: ...
    def joined(self, others: Sequence[Rows]) -> Rows: ...


@dataclass(frozen=True)
class Values:
    """A tensor (n, ...) as `Rows`."""

    values: Tensor

    def rows(self, keep: Tensor) -> Values:
        return Values(self.values[keep])

    def to(self, device: torch.device | str) -> Values:
        return Values(self.values.to(device))

    def joined(self, others: Sequence[Values]) -> Values:
        return Values(torch.cat([part.values for part in (self, *others)]))


@dataclass(frozen=True)
class Part:
    """What was found in some images: 28 bytes a detection, in pixels of the originals, in the model's order.

    Rows with label -1 pad a batch. They go when numbers are computed: dropping them earlier would wait for the device.
    """

    images: tuple[int, ...]  # which images this part tells of, as places in the order of image ids
    image: Tensor  # (n,) int32, likewise
    boxes: Tensor  # (n, 4) float32 xyxy
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int32
    extras: dict[str, Rows] = field(default_factory=dict)

    def rows(self, keep: Tensor) -> Part:
        """The rows at `keep` (m,) int64."""
        return Part(self.images, self.image[keep], self.boxes[keep], self.scores[keep], self.labels[keep],
                    {name: extra.rows(keep) for name, extra in self.extras.items()})

    def to(self, device: torch.device | str) -> Part:
        return Part(self.images, self.image.to(device), self.boxes.to(device), self.scores.to(device),
                    self.labels.to(device), {name: extra.to(device) for name, extra in self.extras.items()})

    def found(self) -> Found:
        """The rows, which must be free of padding, as columns in float64."""
        boxes = self.boxes.double()
        size = boxes[:, 2:] - boxes[:, :2]
        return Found(self.image.long(), self.labels.long(), torch.cat([boxes[:, :2], size], 1), self.scores.double(),
                     size[:, 0] * size[:, 1])

    @staticmethod
    def joined(parts: Sequence[Part]) -> Part:
        """The rows of all, in the order of images, without padding; of an image that several tell of, the last does."""
        first, last = parts[0], {image: number for number, part in enumerate(parts) for image in part.images}
        whole = Part(tuple(sorted(last)), *(torch.cat([getattr(part, name) for part in parts])
                                            for name in ("image", "boxes", "scores", "labels")),
                     {name: extra.joined([part.extras[name] for part in parts[1:]])
                      for name, extra in first.extras.items()})
        valid = whole.labels >= 0
        if len(last) < sum(len(part.images) for part in parts):  # images were seen again
            number = torch.cat([torch.full_like(part.image, i) for i, part in enumerate(parts)])
            table = torch.zeros(max(last) + 1, dtype=torch.int32)
            table[list(last)] = torch.tensor(list(last.values()), dtype=torch.int32)
            valid &= table.to(number.device)[whole.image.long()] == number
        keep = valid.nonzero()[:, 0]
        return whole.rows(keep[whole.image[keep].argsort(stable=True)])


class Evaluator:
    """Collects detections batch by batch, on their device; a subclass adds `compute`.

    An image seen again replaces what was kept of it. The order of results is that of image ids, and in an image the
    model's, whatever the order of batches or ranks.
    """

    metric_names: tuple[str, ...]  # of what `compute` gives

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        ids = dataset.records.ids()
        order = sorted(range(len(ids)), key=lambda place: (isinstance(ids[place], str), ids[place]))
        self.records = dataset.records.take(order)
        self._place = {ids[number]: place for place, number in enumerate(order)}
        self._parts: list[Part] = []

    def reset(self) -> None:
        """Forget all detections."""
        self._parts = []

    @torch.no_grad()
    def update(self, detections: Detections, batch: Batch) -> None:
        """Add a batch of N images. `detections` are in pixels of the padded batch, on the model's device.

        Raises ValueError for images that the data set does not have, or that are twice in the batch.
        """
        if len(set(batch.image_ids)) < len(batch.image_ids):
            raise ValueError(f"images of a batch must differ, got ids {list(batch.image_ids)}. Correct the loader.")
        for image_id, path in zip(batch.image_ids, batch.paths):
            if image_id not in self._place:
                raise ValueError(f"images must belong to the data set '{self.dataset.name}', got id {image_id!r} "
                                 f"({path}). Build the evaluator from the data set that is loaded.")
        if not batch.image_ids:
            return
        detections = detections.rescale(batch.images.sizes, batch.original_sizes)
        images = [self._place[image_id] for image_id in batch.image_ids]
        image = torch.tensor(images, dtype=torch.int32).to(detections.boxes.device, non_blocking=True)
        labels = detections.labels.int().masked_fill(~detections.valid, -1)
        self._parts.append(Part(tuple(images), image[:, None].expand_as(labels).flatten(),
                                detections.boxes.float().flatten(0, 1), detections.scores.float().flatten(),
                                labels.flatten(), self._extras(detections, images)))

    def _extras(self, detections: Detections, images: list[int]) -> dict[str, Rows]:
        """What else to keep of (N, D) detections, whose boxes are in pixels of the originals."""
        return {}

    def state(self) -> list[Part]:
        """What was collected so far, on the host, to be sent to other ranks."""
        return [Part.joined(self._parts).to("cpu")] if self._parts else []

    def merge(self, states: list[list[Part]]) -> None:
        """Take over what all ranks collected."""
        device = self._parts[0].boxes.device if self._parts else "cpu"
        self._parts = [part.to(device) for state in states for part in state]

    def collected(self) -> Part:
        """All rows, in the order of images. Raises ValueError for numbers that are not finite."""
        if not self._parts:
            nothing = torch.zeros(0)
            return Part((), nothing.int(), nothing.reshape(0, 4), nothing, nothing.int())
        self._parts = [Part.joined(self._parts)]
        self._require_finite(self._parts[0])
        return self._parts[0]

    def _require_finite(self, part: Part) -> None:
        bad = ~(part.boxes.isfinite().all(1) & part.scores.isfinite())
        if bool(bad.any()):
            record = self.records[int(part.image[bad][0])]
            raise ValueError(f"boxes and scores must be finite, got nan or inf from the model ({record.path}). "
                             "The training has probably diverged: lower train.lr.")

    def found(self) -> Found:
        """What was collected, as columns in float64. Raises as `collected`."""
        return self.collected().found()

    def results(self) -> list[dict[str, Any]]:
        """COCO results (original image and category ids) that pycocotools' `loadRes` accepts."""
        return self._results(self.collected())

    def _results(self, part: Part) -> list[dict[str, Any]]:
        found = part.found()
        columns = (part.image, part.labels, found.boxes_xywh, found.scores)
        return [{"image_id": self.records[image].id, "category_id": self.dataset.category_ids[label], "bbox": box,
                 "score": score} for image, label, box, score in zip(*(column.tolist() for column in columns))]

    def compute(self) -> EvalResult:
        raise NotImplementedError


def truths_of(records: Records, device: torch.device | str = "cpu") -> Truths:
    """The ground truth of images in the order given, crowds and difficult objects ignored; G rows."""
    table, box = records.table(), records.table()["box"]
    size = np.where(table["sized"][:, None], table["size"], box[:, 2:] - box[:, :2])
    columns = (records.image_of(), table["label"], np.concatenate([box[:, :2], size], 1), table["area"],
               table["crowd"], table["crowd"] | table["difficult"])
    return Truths(*(torch.tensor(column, device=device) for column in columns))
