"""From COCO's arrays to its named numbers, and their printout.

The means are numpy's over the same values in the same order as in pycocotools, so their bits are the same.

Legend: T IoU thresholds, R recall thresholds, K classes, A area ranges, M bounds on detections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from detres.evaluation.coco_engine import Arrays, Protocol

IouType = Literal["bbox", "segm", "keypoints", "boundary"]

# Protocols by IoU type. The bounds of areas are in pixels; OKS has no small objects.
KEYPOINT_AREAS = tuple(area for area, name in zip(Protocol().areas, Protocol().area_names) if name != "small")
KEYPOINTS = Protocol(areas=KEYPOINT_AREAS, area_names=("all", "medium", "large"), max_detections=(20,))
LVIS = Protocol(max_detections=(300,))


@dataclass(frozen=True)
class Row:
    """A number that is reported: a mean over classes, and over what is not fixed here."""

    name: str
    kind: Literal["AP", "AR"]
    iou: float | None = None  # None: all thresholds
    area: str = "all"
    bound: int = -1  # index of the bound on detections

    def of(self, arrays: Arrays, protocol: Protocol, classes: np.ndarray | slice = slice(None)) -> float:
        """Of arrays on the CPU; -1 where nothing could be measured."""
        values = self._values(arrays, protocol)[..., classes]
        measured = values[values > -1]
        return float(np.mean(measured)) if len(measured) else -1.0

    def of_each_class(self, arrays: Arrays, protocol: Protocol) -> list[float]:
        """As `of` one class; K."""
        values = self._values(arrays, protocol)
        columns = np.moveaxis(values, -1, 0).reshape(values.shape[-1], math.prod(values.shape[:-1]))
        return columns.mean(1).tolist() if columns.shape[1] else [-1.0] * len(columns)

    def _values(self, arrays: Arrays, protocol: Protocol) -> np.ndarray:
        """(T', R, K) or (T', K), of which a class has -1 everywhere or nowhere."""
        thresholds = slice(None) if self.iou is None else np.array(protocol.iou_thresholds) == self.iou
        values = (arrays.precision if self.kind == "AP" else arrays.recall).numpy()
        return values[thresholds][..., protocol.area_names.index(self.area), self.bound]

    def line(self, value: float, protocol: Protocol) -> str:
        """As pycocotools prints it."""
        title = {"AP": "Average Precision", "AR": "Average Recall"}[self.kind]
        first, last = protocol.iou_thresholds[0], protocol.iou_thresholds[-1]
        iou = f"{first:0.2f}:{last:0.2f}" if self.iou is None else f"{self.iou:0.2f}"
        return (f" {title:<18} ({self.kind}) @[ IoU={iou:<9} | area={self.area:>6s} | "
                f"maxDets={protocol.max_detections[self.bound]:>3d} ] = {value:0.3f}")


AREAS = (("s", "small"), ("m", "medium"), ("l", "large"))
_PRECISION = (Row("AP", "AP"), Row("AP50", "AP", 0.5), Row("AP75", "AP", 0.75))
_PRECISION_BY_AREA = tuple(Row(f"AP{letter}", "AP", area=area) for letter, area in AREAS)
_RECALL_BY_AREA = tuple(Row(f"AR{letter}", "AR", area=area) for letter, area in AREAS)
DETECTION_ROWS = (*_PRECISION, *_PRECISION_BY_AREA,
                  *(Row(f"AR{limit}", "AR", bound=i) for i, limit in enumerate(Protocol().max_detections)),
                  *_RECALL_BY_AREA)
KEYPOINT_ROWS = (*_PRECISION, *_PRECISION_BY_AREA[1:], Row("AR", "AR"), Row("AR50", "AR", 0.5),
                 Row("AR75", "AR", 0.75), *_RECALL_BY_AREA[1:])
LVIS_ROWS = (*_PRECISION, *_PRECISION_BY_AREA, Row("AR300", "AR"), *_RECALL_BY_AREA)


def rows_of(iou_type: IouType) -> tuple[Row, ...]:
    return KEYPOINT_ROWS if iou_type == "keypoints" else DETECTION_ROWS


def protocol_of(iou_type: IouType) -> Protocol:
    return KEYPOINTS if iou_type == "keypoints" else Protocol()
