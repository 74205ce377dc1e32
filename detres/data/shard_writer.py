"""Writes data sets as tar shards (`data.shards` says what is in them)."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detres.data import index
from detres.data.coco import pose_of
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import read_file
from detres.data.masks import PNGSegment, compressed
from detres.data.problems import OnInvalid
from detres.data.records import Records
from detres.data.shard_files import BLOCK, ShardImage
from detres.data.splits import find_splits
from detres.progress import track


def write_shards(dataset: Dataset, out: Path, name: str, shard_size: int, seed: int = 0, progress: bool = True
                 ) -> list[Path]:
    """Write a data set as shards of at most `shard_size` bytes each, and their index; the shards' paths.

    Images are shuffled first, so that a few shards are a fair sample. The same data, seed and size give the same bytes.
    Label maps are not written. Raises FileExistsError where the index is there already, and ImageError.
    """
    if (out / f"{name}.index").exists():
        raise FileExistsError(f"OUT must not have shards called {name} yet, got {out}. Give another folder.")
    out.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(dataset.records))
    writer = _Writer(out, name, shard_size)
    numbers = track(order.tolist(), len(order), "shard", lambda _: 1) if progress else order.tolist()
    records = [writer.add(place, dataset.records[number], dataset) for place, number in enumerate(numbers)]
    shards = writer.close()
    (out / f"{name}.json").write_text(json.dumps({"categories": _categories(dataset), "images": len(records)}))
    header = {"shards": [(shard.name, shard.stat().st_size) for shard in shards],
              "dataset": index.described(dataset)}
    index.save_records(out / f"{name}.index", header, Records.of(records))
    return shards


def write_splits(data: str, out: Path, images: str | None, shard_size: int, seed: int = 0,
                 on_invalid: OnInvalid = "error") -> Iterator[tuple[str, int, list[Path]]]:
    """Write all splits of a data set; yields name, number of images and shards of each as it is done. All are read
    before the first is written, so that nothing is left of data that are refused."""
    splits = find_splits(data, images)
    roles = [split.role for split in splits]
    for split, dataset in [(split, split.load(on_invalid)) for split in splits]:
        name = split.role if roles.count(split.role) == 1 else re.sub(r"\W+", "_", split.name)
        yield name, len(dataset.records), write_shards(dataset, out, name, shard_size, seed)


class _Writer:
    """Fills one shard after another; each gets its name when it is whole."""

    def __init__(self, out: Path, name: str, shard_size: int):
        self.out, self.name, self.shard_size = out, name, shard_size
        self.shards: list[Path] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, place: int, record: ImageRecord, dataset: Dataset) -> ImageRecord:
        """The record of the image in its shard."""
        data = read_file(record.path)
        items = tuple(replace(item, segmentation=compressed(item.segmentation, record.height, record.width))
                      if isinstance(item.segmentation, PNGSegment) else item for item in record.annotations)
        record = replace(record, annotations=items, label_map=None)
        text = json.dumps(_entry(record, dataset), separators=(",", ":"), default=list).encode()
        if self.tar and _padded(self.tar.offset + sum(BLOCK + _padded(len(part), BLOCK) for part in (data, text))
                                + 2 * BLOCK) > self.shard_size:
            self.close()
        if not self.tar:
            self.shards.append(self.out / f"{self.name}-{len(self.shards):06}.tar")
            self.tar = tarfile.open(_part(self.shards[-1]), "w", format=tarfile.USTAR_FORMAT)
        name, offset = f"{place:09}{Path(str(record.path)).suffix.lower()}", self.tar.offset + BLOCK
        self._write(name, data)
        self._write(f"{place:09}.json", text)
        return replace(record, path=ShardImage(self.shards[-1].name, name, offset, len(data)))

    def _write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))

    def close(self) -> list[Path]:
        if self.tar:
            self.tar.close()
            os.replace(_part(self.shards[-1]), self.shards[-1])
        self.tar = None
        return self.shards


def _padded(size: int, to: int = tarfile.RECORDSIZE) -> int:
    """A member is padded to blocks, an archive, with two empty blocks at its end, to records."""
    return size + -size % to


def _part(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.part")


def _categories(dataset: Dataset) -> list[dict[str, Any]]:
    return [{"id": number, "name": name, **pose_of(dataset, name)}
            for number, name in zip(dataset.category_ids, dataset.classes)]


def _entry(record: ImageRecord, dataset: Dataset) -> dict[str, Any]:
    """The JSON of an image."""
    return {"id": record.id, "file_name": Path(str(record.path)).name, "height": record.height, "width": record.width,
            "annotations": [_annotation(item, dataset) for item in record.annotations]}


def _annotation(item: Annotation, dataset: Dataset) -> dict[str, Any]:
    x, y, w, h = item.bbox
    entry = {"id": item.id, "category_id": dataset.category_ids[item.label], "category": dataset.classes[item.label],
             "bbox": item.bbox, "area": item.area, "iscrowd": int(item.crowd)}
    if item.size is None or (x + w, y + h) != item.box[2:]:
        entry["corners"] = item.box
    if item.segmentation:
        entry["segmentation"] = item.segmentation if isinstance(item.segmentation, dict) else list(
            map(list, item.segmentation))
    if item.keypoints:
        entry["keypoints"] = item.keypoints
    return entry | ({"difficult": True} if item.difficult else {})
