"""Predicted masks as the COCO evaluator keeps them.

On the CPU they become run lengths, which are small, and overlaps are computed at the end. On a GPU a mask is compared
with the truths of its image as soon as it is pasted, bitmap with bitmap, and only the overlaps stay.

Legend: n rows of a part (detections), G truths of the data set, P pairs, D detections of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from detres.data.dataset import ImageRecord
from detres.data.masks import compressed, encode_masks
from detres.data.records import Records
from detres.evaluation.boundary_overlaps import bitmap_boundary_iou_pairs, rle_boundary_iou_pairs
from detres.evaluation.flat import Truths
from detres.evaluation.mask_overlaps import (Rle, bitmap_iou_pairs, decode_runs, rle_areas, rle_iou_pairs,
                                             runs_to_bitmaps)
from detres.evaluation.overlaps import Overlaps
from detres.ops.paste_masks import PasteConvention, paste_masks

OF_BITMAPS = {"segm": bitmap_iou_pairs, "boundary": bitmap_boundary_iou_pairs}


@dataclass(frozen=True)
class RunLengths:
    """Masks as compressed run lengths; None in rows that pad."""

    codes: list[Rle | None]  # n

    def rows(self, keep: Tensor) -> RunLengths:
        return RunLengths([self.codes[i] for i in keep.tolist()])

    def to(self, device: torch.device | str) -> RunLengths:
        return self

    def joined(self, others: Sequence[RunLengths]) -> RunLengths:
        return RunLengths([code for part in (self, *others) for code in part.codes])


@dataclass(frozen=True)
class PairOverlaps:
    """Areas of masks, and their overlaps with the truths of the same image and class."""

    area: Tensor  # (n,) int64
    row: Tensor  # (P,) int64
    truth: Tensor  # (P,) int64, of all G
    iou: dict[str, Tensor]  # "segm" and "boundary": (P,) float64

    def rows(self, keep: Tensor) -> PairOverlaps:
        place = torch.full_like(self.area, -1)
        place[keep] = torch.arange(len(keep), device=keep.device)
        row = place[self.row]
        kept = (row >= 0).nonzero()[:, 0]
        return PairOverlaps(self.area[keep], row[kept], self.truth[kept],
                            {name: iou[kept] for name, iou in self.iou.items()})

    def to(self, device: torch.device | str) -> PairOverlaps:
        return PairOverlaps(self.area.to(device), self.row.to(device), self.truth.to(device),
                            {name: iou.to(device) for name, iou in self.iou.items()})

    def joined(self, others: Sequence[PairOverlaps]) -> PairOverlaps:
        parts, start, rows = (self, *others), 0, []
        for part in parts:
            rows.append(part.row + start)
            start += len(part.area)
        return PairOverlaps(torch.cat([part.area for part in parts]), torch.cat(rows),
                            torch.cat([part.truth for part in parts]),
                            {name: torch.cat([part.iou[name] for part in parts]) for name in self.iou})

    def lookup(self, iou_type: str, truths: int) -> Overlaps:
        """IoU of pairs of rows and of the G `truths`."""
        key, order = (self.row * truths + self.truth).sort()
        return lambda d, g: self.iou[iou_type][order[torch.searchsorted(key, d * truths + g)]]


def encode(masks: Tensor, boxes: Tensor, valid: Tensor, record: ImageRecord,
           convention: PasteConvention) -> list[Rle | None]:
    """Codes of (D, S, S) masks predicted in boxes (D, 4) of an image; None where not valid (D,)."""
    rows = valid.nonzero()[:, 0]
    codes: list[Rle | None] = [None] * len(valid)
    bitmaps = paste_masks(masks[rows], boxes[rows], (record.height, record.width), convention=convention)
    for row, code in zip(rows.tolist(), encode_masks(bitmaps)):
        codes[row] = code
    return codes


def truth_codes(records: Sequence[ImageRecord]) -> list[Rle]:
    """Run lengths of all annotations of images. Files are read by several threads at once."""
    def of(record: ImageRecord) -> list[Rle]:
        return [compressed(item.segmentation, record.height, record.width) for item in record.annotations]

    with ThreadPoolExecutor() as pool:
        return [code for codes in pool.map(of, records) for code in codes]


def code_overlaps(iou_type: str, codes: Sequence[Rle], areas: Tensor, truth: Sequence[Rle], truths: Truths,
                  classes: int, lowest: float, dilation_ratio: float = 0.02) -> Overlaps:
    """IoU of pairs of masks by their run lengths, which must be sound; `areas` (n,) are pixels of the detections."""
    truth_areas = torch.from_numpy(rle_areas(truth))
    group = truths.image * classes + truths.label

    def overlaps(d: Tensor, g: Tensor) -> Tensor:
        iou = rle_iou_pairs(codes, truth, areas, truth_areas, truths.crowd, group, d, g, lowest)
        if iou_type == "boundary":
            return rle_boundary_iou_pairs(codes, truth, truths.crowd, d, g, iou, lowest, dilation_ratio)
        return iou

    return overlaps


class BitmapComparer:
    """Compares pasted masks with the truths of their images, on the device of the masks."""

    def __init__(self, records: Records, codes: Sequence[Rle], iou_types: Sequence[str]):
        self.records, self.codes, self.iou_types = records, codes, iou_types
        self.first = [0, *records.counts().cumsum().tolist()]  # row of the first truth of each image

    def compare(self, image: int, masks: Tensor, boxes: Tensor, labels: Tensor,
                convention: PasteConvention) -> PairOverlaps:
        """Of the masks (D, S, S) predicted in boxes (D, 4) of an image; labels (D,) are -1 in rows that pad."""
        record, device = self.records[image], masks.device
        size = record.height, record.width
        runs = decode_runs(self.codes[self.first[image]:self.first[image + 1]])
        assert (runs.sizes == size).all(), f"masks of {record.path} are not of its size"
        truth = runs_to_bitmaps(*(torch.from_numpy(x).to(device) for x in (runs.lengths, runs.number)), size)
        gt_labels = torch.tensor([item.label for item in record.annotations], device=device)
        crowd = torch.tensor([item.crowd for item in record.annotations], dtype=torch.bool, device=device)
        d, g = (labels[:, None] == gt_labels).nonzero(as_tuple=True)
        bitmaps = paste_masks(masks, boxes, size, convention=convention)
        results = {name: OF_BITMAPS[name](bitmaps, truth, crowd, d, g) for name in self.iou_types}
        area = next(iter(results.values()))[1]
        return PairOverlaps(area, d, g + self.first[image], {name: iou for name, (iou, _) in results.items()})
