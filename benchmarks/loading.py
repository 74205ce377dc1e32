"""Loading of COCO images for training, beside torchvision's reference script and a plain loader with OpenCV.

    python benchmarks/loading.py COCO                # a folder of COCO's layout; under three minutes
    python benchmarks/loading.py COCO --only detres torchvision --runs 5

All load the same images in the same order, two a batch, with a torch DataLoader, mirror half of them, and aim at a
short side of 800 pixels. "ms" is the CPU time an image takes without worker processes, on one core, "images/s" what
that makes. Then images a second with one and with two worker processes, by the clock, in the middle of an endless
pass. Runs of different loaders alternate, and the table has medians.

Loaders end at different points. Ours gives bytes at the size of training, padded to a batch, and normalises in the
model; torchvision's gives floats at the size of the file, and resizes, normalises and pads in the model; the plain one
resizes by OpenCV (not antialiased), pads, and knows no objects. So there are two tables: as far as each loader goes;
and to floats that go into the backbone, where the process that trains does the model's part, as it does in a training:
`GeneralizedRCNNTransform`, or our normalisation.

torchvision's script draws masks for all models; its rows "boxes" leave them out. Its masks have the size of the file
where the loader ends.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: a core for each process

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional as tvf

from detres.config import AugmentConfig, DataConfig, InputConfig, SourceConfig
from detres.data.dataset import Dataset, ImageRecord, load_dataset
from detres.data.images import decode_image, read_file
from detres.data.loader import build_loader, trainable
from detres.data.sampling import Key
from detres.data.transforms import resized_size
from detres.structures import Movable

BATCH, SKIPPED, MEASURED = 2, 4, 24  # images; batches
MEAN, STD = InputConfig().mean, InputConfig().std
Keys = list[Key]


@dataclass(frozen=True)
class TorchvisionReader:
    """What `references/detection/train.py` of torchvision loads by default, written anew: PIL, masks by pycocotools,
    a flip, floats."""

    records: Sequence[ImageRecord]
    masks: bool

    def __getitems__(self, keys: Keys) -> Any:
        rng = np.random.default_rng(keys[0].number)
        return [self._sample(self.records[key.number], rng) for key in keys]

    def finish(self, batch: Any) -> Any:
        return TRANSFORM(*map(list, zip(*batch)))

    def _sample(self, record: ImageRecord, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, target = Image.open(record.path).convert("RGB"), self._target(record)
        if rng.random() < 0.5:
            image = tvf.hflip(image)
            target["boxes"][:, [0, 2]] = image.width - target["boxes"][:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return tvf.convert_image_dtype(tvf.pil_to_tensor(image), torch.float), target

    def _target(self, record: ImageRecord) -> dict[str, torch.Tensor]:
        items, size = trainable(record), (record.height, record.width)
        boxes = torch.tensor([item.box for item in items]).reshape(-1, 4)
        boxes[:, 0::2].clamp_(min=0, max=record.width)
        boxes[:, 1::2].clamp_(min=0, max=record.height)
        target = {"boxes": boxes, "labels": torch.tensor([item.label for item in items], dtype=torch.long)}
        if self.masks:
            parts = [coco_mask.decode(coco_mask.frPyObjects(item.segmentation, *size)) for item in items]
            target["masks"] = torch.stack([torch.as_tensor(part).any(2).to(torch.uint8) for part in parts]
                                          ) if parts else torch.zeros(0, *size, dtype=torch.uint8)
        return target


TRANSFORM = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class PlainReader:
    records: Sequence[ImageRecord]

    def __getitems__(self, keys: Keys) -> torch.Tensor:
        images = [self._image(self.records[key.number], key.number % 2 == 0) for key in keys]
        size = [max(side) for side in zip(*(image.shape for image in images))]
        padded = np.zeros((len(images), *size), np.uint8)
        for place, image in zip(padded, images):
            place[:image.shape[0], :image.shape[1]] = image
        return torch.from_numpy(padded).permute(0, 3, 1, 2)

    def finish(self, batch: torch.Tensor) -> torch.Tensor:
        return normalised(batch)

    def _image(self, record: ImageRecord, mirrored: bool) -> np.ndarray:
        image = cv2.cvtColor(cv2.imread(str(record.path)), cv2.COLOR_BGR2RGB)
        image = cv2.resize(image, resized_size(*image.shape[:2], 800, 1333, True)[::-1])
        return cv2.flip(image, 1) if mirrored else image


@dataclass(frozen=True)
class DetresReader:
    reader: Any

    def __getitems__(self, keys: Keys) -> Any:
        return self.reader.__getitems__(keys)

    def finish(self, batch: Any) -> Any:
        return normalised(batch.images.pixels), batch.targets


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() - mean) / std


def detres(dataset: Dataset, masks: bool, side: int = 800, **data: Any) -> DetresReader:
    augment = AugmentConfig(resize=data.pop("resize", "pillow"))
    loader = build_loader(dataset, InputConfig(min_size=side), DataConfig(workers=0, augment=augment, **data),
                          batch_size=BATCH, training=True, with_masks=masks)
    return DetresReader(loader.reader)


TO_INPUT = "to the model's input"


def loaders(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Tables of readers by name."""
    whole = {
        "detres, boxes": detres(dataset, False),
        "detres, masks": detres(dataset, True),
        "detres, boxes, resize=torch": detres(dataset, False, resize="torch"),
        "detres, masks, resize=torch": detres(dataset, True, resize="torch"),
        "torchvision, boxes": TorchvisionReader(dataset.records, False),
        "torchvision, masks": TorchvisionReader(dataset.records, True),
        "OpenCV, no objects": PlainReader(dataset.records)}
    return {
        "as far as each loader goes": whole,
        TO_INPUT: whole,
        "short side 160, as far as the loader goes": {
            "detres, masks at 160": detres(dataset, True, side=160),
            "detres, masks at 160, reduced_decode": detres(dataset, True, side=160, reduced_decode=True)},
        "resized on the device (data.on_device): the loader's part": {
            "detres, boxes, on_device": detres(dataset, False, on_device=True),
            "detres, masks, on_device": detres(dataset, True, on_device=True)}}


def measure(reader: Any, batches: Sequence[Keys], workers: int, to_input: bool) -> float:
    """CPU milliseconds an image without workers, else images a second by the clock."""
    stream = itertools.islice(itertools.cycle(batches), SKIPPED + MEASURED + 8 * max(1, workers))
    loader = iter(DataLoader(reader, batch_sampler=list(stream), num_workers=workers, collate_fn=as_is,
                             worker_init_fn=one_thread, multiprocessing_context="fork" if workers else None))
    finish = reader.finish if to_input else as_is
    clock: Callable[[], float] = time.perf_counter if workers else time.process_time
    for _ in range(SKIPPED):
        read(finish(next(loader)))
    start = clock()
    for _ in range(MEASURED):
        read(finish(next(loader)))
    seconds = clock() - start
    return MEASURED * BATCH / seconds if workers else seconds / MEASURED / BATCH * 1e3


def read(batch: Any) -> None:
    """Touches all memory of a batch, as whoever copies it to a GPU does: pages of shared memory are mapped then."""
    if isinstance(batch, torch.Tensor):
        batch.reshape(-1)[::1024].sum()
    elif isinstance(batch, dict):
        read(tuple(batch.values()))
    elif isinstance(batch, Movable):
        read(tuple(vars(batch).values()))
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            read(item)
    elif isinstance(batch, ImageList):
        read(batch.tensors)


def as_is(batch: Any) -> Any:
    return batch


def one_thread(_worker: int = 0) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def limits(dataset: Dataset) -> None:
    """What cannot be avoided: decoding, and writing a batch once."""
    data = [(read_file(record.path), record) for record in dataset.records]

    def milliseconds(function: Callable[[], Any], count: int) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            function()
            times.append((time.process_time() - start) / count * 1e3)
        return statistics.median(times)

    decoding = milliseconds(lambda: [decode_image(item, str(record.path)) for item, record in data], len(data))
    batch = detres(dataset, True).__getitems__([Key(0, number) for number in range(20)])
    print(f"limits on a core, ms an image: decoding {decoding:.2f}", end="")
    for name, tensor in (("image", batch.images.pixels), ("masks", batch.targets.masks)):
        copying = milliseconds(lambda: tensor.clone(), 20)
        print(f"; copying its {tensor.numel() / 20e6:.1f} MB of {name} {copying:.2f}", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    one_thread()
    dataset = load_dataset(SourceConfig(path=str(args.coco)), "train")
    numbers = [number for number, record in enumerate(dataset.records) if trainable(record)]
    dataset = Dataset(dataset.name, dataset.format, dataset.classes, dataset.category_ids,
                      tuple(dataset.records[number] for number in numbers))
    batches = list(itertools.islice(build_loader(dataset, InputConfig(), DataConfig(workers=0), batch_size=BATCH,
                                                 training=True, with_masks=False).batches, len(numbers) // BATCH))
    height, width = (np.mean([getattr(record, side) for record in dataset.records]) for side in ("height", "width"))
    objects = np.mean([len(trainable(record)) for record in dataset.records])
    print(f"{len(numbers)} images, on average {width:.0f} x {height:.0f} px with {objects:.1f} objects; load "
          f"{os.getloadavg()[0]:.1f}")
    limits(dataset)
    for title, readers in loaders(dataset).items():
        report(title, {name: reader for name, reader in readers.items() if name.startswith(tuple(args.only))}, batches,
               args.runs)


def report(title: str, readers: dict[str, Any], batches: Sequence[Keys], runs: int) -> None:
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(runs):
        for name, workers in itertools.product(readers, (0, 1, 2)):
            found.setdefault((name, workers), []).append(measure(readers[name], batches, workers, title == TO_INPUT))
    print(f"\n{title}\n{'':38}{'ms':>8}{'images/s':>12}{'1 worker':>12}{'2 workers':>12}", flush=True)
    for name in readers:
        ms, one, two = (statistics.median(found[name, workers]) for workers in (0, 1, 2))
        print(f"{name:38}{ms:8.1f}{1e3 / ms:12.1f}{one:12.1f}{two:12.1f}", flush=True)


if __name__ == "__main__":
    main()
