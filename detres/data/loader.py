"""Records to padded batches, in worker processes, as a pure function of (seed, step).

Which images make up step k follows from the seed alone (`sampling.py`); what chance does to an image, and which others
it is combined with, follows from the seed and its key. No worker has a state, so any number of them gives the same
batches, and a resumed run only replays the drawing of numbers up to its step.

Legend: N images, G padded objects, M objects of the batch, J keypoints, (H, W) the padded canvas.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from detres.config import AugmentConfig, DataConfig, InputConfig, SamplingConfig
from detres.data.augment_colour import Photometric
from detres.data.augment_mix import Mix, build_mixes
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.device import ImageView, StoredBatch, store
from detres.data.frame import Frame
from detres.data.images import EncodedImage, ImageError, open_image, read_file
from detres.data.label_maps import IGNORED, SegmentImage
from detres.data.masks import MaskViews, whole_masks
from detres.data.sampling import InBlocks, Key, Order, TrainingBatches, build_order, in_order, sample_seed
from detres.data.transforms import MOVES, Pipeline, ResizeShortSide, Sample, build_train_transforms, resize_for_eval
from detres.structures import Batch, ImageBatch, PixelTruths, SemanticTargets, Targets


def build_loader(dataset: Dataset, model_input: InputConfig, data: DataConfig, *, batch_size: int, training: bool,
                 with_masks: bool, with_keypoints: bool = False, with_boxes: bool = True, with_semantic: bool = False,
                 pyramid: Sequence[InputConfig] = (), seed: int = 0, rank: int = 0, world_size: int = 1,
                 start_step: int = 0, steps: int | None = None, with_ignored: bool = False,
                 device_type: str = "cpu") -> Loader:
    """An iterable of `Batch` on the CPU, in pinned memory if `device_type` is cuda.

    Training: endless, from `start_step` on. `batch_size` images make a step over all ranks, of which this rank gets its
    slice; it must be a multiple of `world_size`. Images are drawn anew each epoch, as `data.sampling` says; what an
    epoch leaves over goes with the next one. `steps`: of the whole training, which `data.augment.mix_until` is a
    fraction of. `with_ignored`: crowds and difficult objects go through the transforms, too, for pictures
    (`Loader.sample`); the targets leave them out all the same.
    Evaluation: one pass in the order of the data set, `batch_size` images at a time; this rank gets every
    `world_size`-th. The targets are there too, for validation losses. `pyramid` (`transforms.scale_pyramid`): how each
    image is resized besides, for multi-scale testing.
    `with_semantic` adds label maps to the targets, and in evaluation `Batch.pixel_truths`; without boxes the targets
    are `SemanticTargets`.

    Raises ValueError for arguments or data that do not fit; while iterating, ImageError for an image that cannot be
    used.
    """
    _check_data(dataset, with_masks, with_keypoints, with_semantic)
    reader = _Reader(dataset.records, _eval_transform(model_input), with_masks,
                     len(dataset.keypoint_names) if with_keypoints else 0, with_boxes, with_semantic, seed,
                     model_input.size_divisor, with_ignored=with_ignored, keeps_truths=with_semantic and not training,
                     pyramid=pyramid, antialias=model_input.antialias)
    if not training:
        batches = in_order(range(rank, len(dataset.records), world_size), batch_size)
        return Loader(reader, batches, data.workers, device_type == "cuda", seed)
    augment, numbers = data.augment, _train_numbers(dataset, data.skip_empty, with_boxes, with_keypoints)
    _check_augment(augment, with_boxes)
    transform = build_train_transforms(augment, model_input, dataset)
    reader = replace(reader, transform=transform, canvas=augment.crop_size or 0, partners=np.array(numbers),
                     reduced_decode=data.reduced_decode and transform.resizes_first, on_device=data.on_device,
                     mixes=build_mixes(augment, model_input, with_masks=with_masks, with_semantic=with_semantic))
    if data.on_device:
        _check_device(reader)
    images = dataset.records.images
    wide = images["width"] > images["height"] if data.aspect_ratio_grouping else None
    order = _order(dataset, data.sampling, data.shard_window, numbers)
    last = None if steps is None else math.ceil(augment.mix_until * steps)
    batches = TrainingBatches(order, batch_size, seed, rank, world_size, start_step, wide, last)
    return Loader(reader, batches, data.workers, device_type == "cuda", seed)


def _eval_transform(model_input: InputConfig) -> Pipeline:
    return Pipeline((ResizeShortSide((model_input.min_size,), model_input.max_size, model_input.antialias,
                                     model_input.round_down),))


def _check_augment(augment: AugmentConfig, with_boxes: bool) -> None:
    if augment.iou_crop is not None and not with_boxes:
        raise ValueError("data.augment.iou_crop must be null for a model without boxes, got iou_crop. Say crop_size.")


def _order(dataset: Dataset, sampling: SamplingConfig, shard_window: int, numbers: Sequence[int]) -> Order:
    records, trains = dataset.records, dataset.records.trainable()
    order = build_order(sampling, numbers, records.image_of()[trains], records.table()["label"][trains])
    found, block = np.unique(records.images["block"], return_inverse=True)  # numbered anew: shards may be left out
    return InBlocks(order, block, shard_window) if len(found) > shard_window else order


class Loader:
    """Iterable of `Batch`; has a length, in batches, unless it is endless. `reader[keys]` makes a batch."""

    def __init__(self, reader: Any, batches: Iterable[list[Key]], workers: int, pin_memory: bool, seed: int):
        self.reader, self.batches = reader, batches
        self._loader = DataLoader(
            reader, batch_sampler=batches, num_workers=workers, collate_fn=_as_is, pin_memory=pin_memory,
            worker_init_fn=_start_worker, persistent_workers=workers > 0 and isinstance(batches, list),
            # Elsewhere, and by default from Python 3.14 on, each worker is sent all records: slow for 10^6 of them.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator().manual_seed(seed))  # else it draws from the generator that training uses

    def __len__(self) -> int:
        if not isinstance(self.batches, list):
            raise TypeError("a training loader has no length: it is endless")
        return len(self.batches)

    def sample(self, key: Key) -> Sample:
        """What becomes of one image, before it is batched. Raises ImageError."""
        sample = replace(self.reader, on_device=False).sample(key)[0]
        return replace(sample, masks=sample.masks.bitmaps()) if isinstance(sample.masks, MaskViews) else sample

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, ImageError):
                try:
                    raise batch
                finally:
                    del batch  # else error and frame hold each other, and with them the workers
            yield batch


def _as_is(batch: Batch | ImageError) -> Batch | ImageError:
    return batch


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends the workers
    sys.excepthook = _quiet_if_hung_up
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _quiet_if_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The thread that hands tensors over loses its connection if Ctrl-C hits the main process just then."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _check_data(dataset: Dataset, with_masks: bool, with_keypoints: bool, with_semantic: bool) -> None:
    if not dataset.records:
        raise ValueError(f"data set must have images, got none ({dataset.name}). Check its path and split.")
    if with_keypoints and not dataset.keypoint_names:
        raise ValueError(f"data set must have keypoints for a model with keypoints, got none ({dataset.name}). Give a "
                         "file that names them in its categories, of COCO person_keypoints_*.json, or use "
                         "model.name=faster_rcnn.")
    if with_semantic and any(record.label_map is None for record in dataset.records):
        raise ValueError(f"data set must have label maps for a model of pixels, got none ({dataset.name}). Read it "
                         "with load_semantic or load_panoptic.")
    if with_masks:
        if bare := dataset.records.without_masks(dataset.records.trainable()):
            raise ValueError(f"annotations must have a segmentation for a model with masks, got {bare} "
                             f"({dataset.name}, {dataset.format}). Add polygons, or train without masks, from weights "
                             "with them too: model.name=faster_rcnn, or cascade_rcnn in place of cascade_mask_rcnn.")


def _check_device(reader: _Reader) -> None:
    known = (*MOVES, Photometric)
    others = [type(step).__name__ for step in (*reader.transform.steps, *reader.mixes) if not isinstance(step, known)]
    others += ["label maps"] if reader.with_semantic or not reader.with_boxes else []
    if others:
        raise ValueError("data.on_device must be false but for detectors whose images are resized, cropped, "
                         f"mirrored and recoloured (photometric) only, got true with {', '.join(others)}. "
                         "Say data.on_device=false.")


def trainable(record: ImageRecord) -> list[Annotation]:
    """What trains: neither crowds (as in the references) nor difficult objects (as in py-faster-rcnn)."""
    return [item for item in record.annotations if not (item.crowd or item.difficult)]


def _train_numbers(dataset: Dataset, skip_empty: bool, with_boxes: bool, with_keypoints: bool) -> list[int]:
    """Which records train. Raises ValueError if none does. Label maps in files are not taken for empty: they would have
    to be read."""
    records = dataset.records
    teaches = records.trainable() & (records.table()["posed"] | (not with_keypoints))
    keep = np.full(len(records), not skip_empty)
    keep[records.image_of()[teaches]] = True
    numbers = [number for number in range(len(records))
               if keep[number] or not with_boxes and hasattr(records[number].label_map, "path")]
    if not numbers:
        raise ValueError(f"data set must have images with objects to train on, got none ({dataset.name}). "
                         "Check its annotations, or set data.skip_empty=false.")
    return numbers


# Reading


@dataclass(frozen=True)
class _Reader:
    """Makes a batch of keys: this is what runs in the workers."""

    records: Sequence[ImageRecord]
    transform: Pipeline
    with_masks: bool
    keypoints: int  # J, 0: none
    with_boxes: bool
    with_semantic: bool
    seed: int
    size_divisor: int
    canvas: int = 0  # least side of the canvas
    mixes: Sequence[Mix] = ()
    partners: np.ndarray | None = None  # numbers of the records that these draw from
    with_ignored: bool = False
    keeps_truths: bool = False
    pyramid: Sequence[InputConfig] = ()
    reduced_decode: bool = False
    on_device: bool = False
    antialias: bool = True

    def __getitems__(self, keys: list[Key]) -> Batch | StoredBatch | ImageError:
        """The error is given back rather than raised: it reaches the main process without the worker's traceback."""
        try:
            read = [self.sample(key) for key in keys]
        except ImageError as error:
            return error
        samples, scaled, label_maps = zip(*read)
        records = [self.records[key.number] for key in keys]
        seeds = [sample_seed(self.seed, key) for key in keys]
        if self.on_device:
            return collate_stored(samples, records, seeds, self.size_divisor, self.canvas, self.antialias)
        batch = collate(samples, records, seeds, self.size_divisor, self.canvas, self.with_boxes)
        pyramid = tuple(pad_images(images, self.size_divisor) for images in zip(*scaled))
        return replace(batch, images=replace(batch.images, pyramid=pyramid),
                       pixel_truths=self._truths(records, label_maps) if self.keeps_truths else None)

    def sample(self, key: Key) -> tuple[Sample, list[np.ndarray], np.ndarray | None]:
        """The sample, its image at the scales of the pyramid, and its label map at the original size."""
        rng = np.random.default_rng(sample_seed(self.seed, key))
        raw, out = self._transformed(key.number, rng)
        partners = self._partners(key.number) if self.mixes and key.mixes else ()
        for mix in self.mixes if key.mixes else ():
            out = mix(out, rng, lambda: self._transformed(int(rng.choice(partners)), rng)[1])
        return out, [resize_for_eval(raw.image, scale) for scale in self.pyramid], raw.semantic

    def _partners(self, number: int) -> np.ndarray:
        """Of shards those in the image's own, which is being read; of all, if nothing trains in that one."""
        block = self.records.images["block"]
        own = self.partners[block[self.partners] == block[number]] if self.records.store else self.partners
        return own if len(own) else self.partners

    def _transformed(self, number: int, rng: np.random.Generator) -> tuple[Sample, Sample]:
        """A record as it is on disk, and after the transforms of single images."""
        record = self.records[number]
        image: np.ndarray | EncodedImage | ImageView = open_image(read_file(record.path), str(record.path))
        _check_size(record, image)
        if self.on_device:
            image = ImageView(image, Frame.whole(image.shape[:2]), self.reduced_decode)
        elif not self.reduced_decode:
            image = image.pixels()
        sample = make_sample(record, image, self.with_masks, self.keypoints, self.with_boxes, self.with_semantic,
                             self.with_ignored, views=self.on_device or self.transform.views_masks and not self.mixes)
        try:
            return sample, self.transform(sample, rng)
        except ImageError as error:
            raise ImageError(f"{error} ({record.path})") from error

    def _truths(self, records: Sequence[ImageRecord], label_maps: Sequence[np.ndarray]) -> PixelTruths:
        ids = [torch.from_numpy(record.label_map.ids(record).copy()) for record in records
               if self.with_boxes and isinstance(record.label_map, SegmentImage)]
        return PixelTruths(tuple(map(torch.from_numpy, label_maps)), tuple(ids))


def _check_size(record: ImageRecord, image: EncodedImage) -> None:
    size = image.shape[:2]
    if size != (record.height, record.width):
        fix = "Correct the annotations, or restore the original file."
        if size == (record.width, record.height):
            fix = "If they were made without its EXIF orientation, take that tag out of the file."
        raise ImageError(f"image file must have the size that its annotations state, {record.width} x {record.height} "
                         f"px (width x height), got {size[1]} x {size[0]} ({record.path}). {fix}")


def make_sample(record: ImageRecord, image: np.ndarray | EncodedImage | ImageView, with_masks: bool, keypoints: int = 0,
                with_boxes: bool = True, with_semantic: bool = False, with_ignored: bool = False, views: bool = False,
                ) -> Sample:
    """The image (H, W, 3) with its annotations, boxes clipped to it, and its label map. Crowds and difficult objects
    are among them only `with_ignored`: nothing that trains needs them, and their masks would cost time. `views`: masks
    are not drawn yet."""
    items = () if not with_boxes else record.annotations if with_ignored else trainable(record)
    height, width = image.shape[:2]
    boxes = np.array([item.box for item in items], np.float32).reshape(-1, 4)
    boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
    masks = points = None
    if with_masks:
        masks = whole_masks([item.segmentation for item in items], height, width)
        if not views:
            masks = masks.bitmaps()
    if keypoints:
        absent = (0.0,) * 3 * keypoints
        points = np.array([item.keypoints or absent for item in items], np.float32).reshape(-1, keypoints, 3)
    semantic = record.label_map.read(record) if with_semantic else None
    return Sample(image, boxes, np.array([item.label for item in items], np.int64), masks, points, semantic,
                  np.array([item.crowd for item in items], bool), np.array([item.difficult for item in items], bool))


# Batching


def collate(samples: Sequence[Sample], records: Sequence[ImageRecord], seeds: Sequence[int], size_divisor: int,
            canvas: int = 0, with_boxes: bool = True) -> Batch:
    """Crowds and difficult objects are left out of the targets."""
    samples = list(map(_without_ignored, samples))
    return _collated(pad_images([sample.image for sample in samples], size_divisor, canvas), samples, records, seeds,
                     with_boxes)


def collate_stored(samples: Sequence[Sample], records: Sequence[ImageRecord], seeds: Sequence[int], size_divisor: int,
                   canvas: int, antialias: bool) -> StoredBatch:
    """Of samples whose images are `ImageView`."""
    samples = list(map(_without_ignored, samples))
    sizes = [sample.size for sample in samples]
    images = ImageBatch(torch.zeros(len(samples), 3, 0, 0, dtype=torch.uint8), torch.tensor(sizes))
    batch = _collated(images, [replace(sample, masks=None) for sample in samples], records, seeds, with_boxes=True)
    masks = None if samples[0].masks is None else [sample.masks for sample in samples]
    canvas = canvas_size(sizes, size_divisor, canvas)
    return store(batch, [sample.image for sample in samples], masks, canvas, antialias)


def _without_ignored(sample: Sample) -> Sample:
    return sample.take(~sample.ignored) if sample.ignored.any() else sample


def _collated(images: ImageBatch, samples: Sequence[Sample], records: Sequence[ImageRecord], seeds: Sequence[int],
              with_boxes: bool) -> Batch:
    size = images.pixels.shape[-2:]
    targets = _targets(samples, seeds, size) if with_boxes else SemanticTargets(_label_maps(samples, size))
    original = torch.tensor([(record.height, record.width) for record in records])
    return Batch(images, targets, tuple(record.id for record in records), tuple(str(record.path) for record in records),
                 original)


def pad_images(images: Sequence[np.ndarray], size_divisor: int, canvas: int = 0) -> ImageBatch:
    """Images (H, W, 3) of any sizes, uint8 or float32, on one canvas: at least `canvas` a side, a multiple of
    `size_divisor`."""
    sizes = [image.shape[:2] for image in images]
    pixels = np.zeros((len(images), 3, *canvas_size(sizes, size_divisor, canvas)), images[0].dtype)
    for padded, image in zip(pixels, images):
        window = padded[:, :image.shape[0], :image.shape[1]]
        if image.strides[1] == image.itemsize:  # planes already
            window[:] = image.transpose(2, 0, 1)
            continue
        for channel, plane in enumerate(window):  # a fifth faster than one copy of a transposed view
            cv2.extractChannel(image, channel, dst=plane)
    return ImageBatch(torch.from_numpy(pixels), torch.tensor(sizes))


def canvas_size(sizes: Sequence[tuple[int, int]], size_divisor: int, canvas: int) -> tuple[int, int]:
    return tuple(-(-max(canvas, *side) // size_divisor) * size_divisor for side in zip(*sizes))


def _targets(samples: Sequence[Sample], seeds: Sequence[int], size: Sequence[int]) -> Targets:
    count = [len(sample.boxes) for sample in samples]
    padded = max(1, *count)

    def rows(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        out = np.zeros((len(arrays), padded, *arrays[0].shape[1:]), arrays[0].dtype)
        for place, array in zip(out, arrays):
            place[:len(array)] = array
        return torch.from_numpy(out)

    masks = keypoints = None
    if samples[0].masks is not None:
        bitmaps = np.zeros((sum(count), *size), np.uint8)
        places = np.split(bitmaps, np.cumsum(count)[:-1])
        for place, sample in zip(places, samples):
            masks, (height, width) = sample.masks, sample.size
            if isinstance(masks, MaskViews):
                masks.draw(place)
            else:
                place[:, :height, :width] = masks
        masks = torch.from_numpy(bitmaps)
    if samples[0].keypoints is not None:
        keypoints = rows([sample.keypoints for sample in samples])
    semantic = None if samples[0].semantic is None else _label_maps(samples, size)
    valid = torch.arange(padded) < torch.tensor(count)[:, None]
    return Targets(rows([sample.boxes for sample in samples]), rows([sample.labels for sample in samples]), valid,
                   torch.tensor(seeds), masks, keypoints, semantic=semantic)


def _label_maps(samples: Sequence[Sample], size: Sequence[int]) -> torch.Tensor:
    """(N, H, W) uint8, ignored where padded."""
    out = np.full((len(samples), *size), IGNORED, np.uint8)
    for padded, sample in zip(out, samples):
        height, width = sample.size
        padded[:height, :width] = sample.semantic
    return torch.from_numpy(out)
