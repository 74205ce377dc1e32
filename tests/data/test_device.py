"""Batches prepared on the device, beside those of the CPU pipeline."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detres.config import AugmentConfig, DataConfig, InputConfig, SourceConfig
from detres.data.dataset import Annotation, Dataset, ImageRecord, load_dataset
from detres.data.device import StoredBatch, prepare, prepared
from detres.data.loader import build_loader
from detres.data.masks import compressed, rasterize
from detres.structures import Batch

INPUT = InputConfig(min_size=96, max_size=160, size_divisor=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """8 images; image k has k % 4 objects: an ellipse, one in two parts that overlap, one with run lengths."""
    folder, records, rng = tmp_path_factory.mktemp("images"), [], np.random.default_rng(0)
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    for k in range(8):
        height, width = (150, 200) if k % 3 else (180, 120)
        noise = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg", quality=95)
        items = []
        for number in range(k % 4):
            x, y = rng.uniform(30, 90, 2)
            ellipse = np.stack([x + 28 * np.cos(turn), y + 25 * np.sin(turn)], -1)
            polygons = [ellipse.ravel().tolist()] + [(ellipse + 15).ravel().tolist()] * (number == 1)
            segmentation = compressed(polygons, height, width) if number == 2 else polygons
            box = (x - 28, y - 25, x + 28 + 15 * (number == 1), y + 25 + 15 * (number == 1))
            items.append(Annotation(10 * k + number, number, box, segmentation, (x, y, 2, 0, 0, 0)))
        items.append(Annotation(10 * k + 9, 0, (0, 0, 20, 20), [[0, 0, 9, 0, 9, 9]], crowd=True))
        records.append(ImageRecord(k, folder / f"{k}.jpg", height, width, tuple(items)))
    return Dataset("tiny", "coco", ("a", "b", "c"), (1, 2, 3), tuple(records), ("left", "right"), ((0, 1),))


def both(dataset: Dataset, augment: AugmentConfig, model_input: InputConfig = INPUT, count: int = 3, **options,
         ) -> list[tuple[Batch, Batch]]:
    """Batches of the CPU pipeline, and prepared ones."""
    def batches(on_device: bool):
        data = DataConfig(workers=0, augment=augment, on_device=on_device)
        return build_loader(dataset, model_input, data, **{"batch_size": 4, "training": True, "with_masks": True,
                                                           "with_keypoints": True, "seed": 3} | options)

    return list(itertools.islice(zip(batches(False), prepared(batches(True), CPU)), count))


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M,) IoU of masks (M, H, W); 1 where both are empty."""
    union = (a | b).sum((1, 2))
    return torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp(min=1), 1.0)


AUGMENTS = {
    "resize": AugmentConfig(scales=(0.5, 1.5)), "as it is": AugmentConfig(min_sizes=(150,)),
    "jitter": AugmentConfig(jitter=(0.4, 2.0), crop_size=128), "crop": AugmentConfig(crop_size=80),
    "colours": AugmentConfig(photometric={"probability": 1.0, "channel_order": 0.5})}


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("name", AUGMENTS)
def test_a_prepared_batch_is_that_of_the_cpu(dataset, name, antialias):
    model_input = INPUT.model_copy(update={"antialias": antialias, "max_size": 400})
    for cpu, device in both(dataset, AUGMENTS[name], model_input):
        assert cpu.image_ids == device.image_ids and torch.equal(cpu.original_sizes, device.original_sizes)
        assert torch.equal(cpu.images.sizes, device.images.sizes)
        a, b = cpu.images.pixels, device.images.pixels
        assert a.dtype == b.dtype and a.shape == b.shape
        difference = (a.float() - b.float()).abs()
        # Hue and saturation are bytes on the CPU. Ratios such as 5 to 6 give halves, which round either way.
        mean, most = (0.8, 12) if name == "colours" else (0.1, 2) if antialias else (1e-3, 0.02)
        assert difference.mean() < mean and difference.max() <= most
        for field in ("boxes", "labels", "valid", "seeds", "keypoints"):
            assert torch.equal(getattr(cpu.targets, field), getattr(device.targets, field)), field
        a, b = cpu.targets.masks, device.targets.masks
        assert a.shape == b.shape and b.dtype == torch.uint8 and b.max() <= 1
        # The CPU draws at the size of the file and takes the nearest pixels; here edges are where the polygon has them.
        assert overlap(a, b).mean() > 0.97 and overlap(a, b).min() > 0.9


def test_masks_at_the_size_of_the_file_are_those_of_pycocotools(dataset):
    """Polygons but for a hundredth of their pixels; run lengths to the bit."""
    for _, device in both(dataset, AugmentConfig(min_sizes=(150, 180), flip=0), count=4, batch_size=1,
                          model_input=INPUT.model_copy(update={"max_size": 1000})):
        record = next(record for record in dataset.records if record.id == device.image_ids[0])
        if device.images.sizes.tolist() != [[record.height, record.width]]:
            continue
        for mask, item in zip(device.targets.masks, record.annotations):
            expected = torch.from_numpy(rasterize(item.segmentation, record.height, record.width))
            found = mask[:record.height, :record.width]
            assert torch.equal(found, expected) if item.label == 2 else overlap(found[None], expected[None]) > 0.99


@pytest.mark.data
def test_real_masks(shared_data):
    dataset = load_dataset(SourceConfig(path=str(shared_data / "nuts")), "train")
    for cpu, device in both(dataset, AugmentConfig(), InputConfig(min_size=400), batch_size=2, with_keypoints=False):
        assert (cpu.images.pixels.float() - device.images.pixels.float()).abs().mean() < 0.01
        assert overlap(cpu.targets.masks, device.targets.masks).mean() > 0.98


def test_batches_without_objects_and_without_masks(dataset):
    empty = replace(dataset, records=(dataset.records[0], dataset.records[4]))
    (cpu, device), = both(empty, AugmentConfig(), count=1, batch_size=2)
    assert device.targets.masks.shape == cpu.targets.masks.shape == (0, *device.images.pixels.shape[2:])
    (_, device), = both(dataset, AugmentConfig(), count=1, with_masks=False)
    assert device.targets.masks is None and device.images.pixels.any()


def test_workers_and_ranks_change_nothing(dataset):
    """Batches as the processes send them; evaluation is not concerned."""
    def stored(workers: int = 0, **options) -> list[StoredBatch]:
        data = DataConfig(workers=workers, on_device=True, augment=AugmentConfig(scales=(0.5, 1)))
        options = {"batch_size": 4, "training": True, "with_masks": True, "seed": 3} | options
        return list(itertools.islice(build_loader(dataset, INPUT, data, **options), 3))

    alone, sent = stored(), stored(workers=2)
    for a, b in zip(alone, sent):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.outlines.edges, b.outlines.edges)
        assert torch.equal(prepare(a).targets.masks, prepare(b).targets.masks)
    ranks = [stored(rank=rank, world_size=2) for rank in range(2)]
    assert [*ranks[0][0].batch.image_ids, *ranks[1][0].batch.image_ids] == list(alone[0].batch.image_ids)
    assert all(isinstance(batch, Batch) for batch in stored(training=False))


def test_images_may_be_decoded_at_a_reduced_size(dataset):
    data = DataConfig(workers=0, on_device=True, reduced_decode=True)
    loader = build_loader(dataset, InputConfig(min_size=60), data, batch_size=4, training=True, with_masks=True)
    stored = next(iter(loader))
    assert stored.frames.stored.max() <= 100 < stored.frames.source.max()
    expected = next(iter(build_loader(dataset, InputConfig(min_size=60), DataConfig(workers=0), batch_size=4,
                                      training=True, with_masks=True)))
    found = prepare(stored)
    assert (found.images.pixels.float() - expected.images.pixels.float()).abs().mean() < 3
    assert overlap(found.targets.masks, expected.targets.masks).mean() > 0.95


@pytest.mark.parametrize("augment, named", [
    ({"albumentations": ({"Blur": {}},)}, "Albumentations"), ({"affine": {}}, "RandomAffine"), ({"mosaic": {}}, "Mosaic")])
def test_what_it_cannot_do_is_refused(dataset, augment, named):
    with pytest.raises(ValueError, match=f"data.on_device must be false .* {named}.*data.on_device=false"):
        both(dataset, AugmentConfig.model_validate(augment), count=1)


def test_nothing_depends_on_the_device_s_values(dataset, monkeypatch):
    """No tensor is read by the host, so that it need not wait: on "meta" there is nothing to read. Nor is one made of the
    host's numbers, which waits for the copy."""
    data = DataConfig(workers=0, on_device=True, augment=AUGMENTS["colours"])
    stored = next(iter(build_loader(dataset, INPUT, data, batch_size=8, training=True, with_masks=True)))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", None)
        found = prepare(stored.to("meta"))
    assert found.images.pixels.device.type == "meta" and found.targets.masks.shape == prepare(stored).targets.masks.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["jitter", "colours"])
def test_on_a_gpu_it_is_as_on_the_cpu(dataset, name):
    data = DataConfig(workers=0, on_device=True, augment=AUGMENTS[name])
    stored = next(iter(build_loader(dataset, INPUT, data, batch_size=8, training=True, with_masks=True,
                                    device_type="cuda")))
    expected = prepare(stored)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = prepare(stored.to("cuda", non_blocking=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (found.images.pixels.cpu().float() - expected.images.pixels.float()).abs().mean()
    assert difference < (0.1 if name == "colours" else 1e-3)  # rounding turns hues that lie between two
    assert overlap(found.targets.masks.cpu(), expected.targets.masks).min() > 0.99
