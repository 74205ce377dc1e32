"""Batches: what is in them, and that they depend on seed and step alone."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detres.config import AugmentConfig, DataConfig, InputConfig, SourceConfig
from detres.data.dataset import Annotation, Dataset, ImageRecord, load_dataset
from detres.data.images import ImageError
from detres.data.loader import build_loader, make_sample, pad_images
from detres.data.sampling import Key, sample_seed
from detres.structures import Batch

INPUT = InputConfig(min_size=32, max_size=64, size_divisor=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """11 images, wide and tall; image k has k % 4 objects, a crowd and a difficult one."""
    folder, records, rng = tmp_path_factory.mktemp("images"), [], np.random.default_rng(0)
    numbers = itertools.count(1)
    for k in range(11):
        height, width = (30, 40) if k % 3 else (48, 32)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{k}.png")
        items = []
        for _ in range(k % 4):
            x, y = rng.uniform(0, 20, 2)
            polygon = [x, y, x + 10, y, x + 10, y + 8, x, y + 8]
            items.append(Annotation(next(numbers), int(rng.integers(3)), (x, y, x + 10, y + 8), [polygon],
                                    (x, y, 2, 0, 0, 0)))
        items.append(Annotation(next(numbers), 0, (0, 0, 20, 20), [[0, 0, 9, 0, 9, 9]], crowd=True))
        items.append(Annotation(next(numbers), 0, (0, 0, 20, 20), [[0, 0, 9, 0, 9, 9]], difficult=True))
        records.append(ImageRecord(100 + k, folder / f"{k}.png", height, width, tuple(items)))
    return Dataset("tiny", "coco", ("a", "b", "c"), (1, 2, 3), tuple(records), ("left", "right"), ((0, 1),))


def batches(dataset: Dataset, count: int | None = None, *, workers: int = 0, model_input: InputConfig = INPUT,
            **options) -> list[Batch]:
    settings = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    data = DataConfig(workers=workers, **settings)
    options = {"batch_size": 4, "training": True, "with_masks": True, "with_keypoints": True, "seed": 3} | options
    return list(itertools.islice(build_loader(dataset, model_input, data, **options), count))


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.image_ids == b.image_ids and a.paths == b.paths
    for x, y in ((a.images.pixels, b.images.pixels), (a.images.sizes, b.images.sizes),
                 (a.original_sizes, b.original_sizes),
                 *((getattr(a.targets, name), getattr(b.targets, name)) for name in vars(a.targets))):
        assert x is y is None or x.dtype == y.dtype and torch.equal(x, y)


AUGMENT = AugmentConfig(min_sizes=(24, 32), albumentations=({"HueSaturationValue": {"p": 0.5}}, {"Rotate": {"p": 0.5}}))


# What is in a batch


def test_evaluation_is_one_pass_in_order(dataset):
    found = batches(dataset, training=False)
    assert [batch.image_ids for batch in found] == [(100, 101, 102, 103), (104, 105, 106, 107), (108, 109, 110)]
    loader = build_loader(dataset, INPUT, DataConfig(workers=0), batch_size=4, training=False, with_masks=False)
    assert len(loader) == 3 == len(list(loader)) == len(list(loader))
    ranks = [batches(dataset, training=False, rank=rank, world_size=3) for rank in range(3)]
    assert [image_id for batch in ranks[1] for image_id in batch.image_ids] == [101, 104, 107, 110]
    assert sorted(image_id for rank in ranks for batch in rank for image_id in batch.image_ids) == list(range(100, 111))


def test_contents_of_a_batch(dataset):
    batch = batches(dataset, training=False)[0]
    targets = batch.targets
    assert batch.images.pixels.dtype == torch.uint8 and batch.images.pixels.shape == (4, 3, 48, 48)
    assert batch.images.sizes.tolist() == [[48, 32], [32, 43], [32, 43], [48, 32]]
    assert batch.original_sizes.tolist() == [[48, 32], [30, 40], [30, 40], [48, 32]]
    assert batch.paths[2] == str(dataset.records[2].path)
    assert targets.valid.tolist() == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert (targets.boxes.dtype, targets.labels.dtype, targets.masks.dtype) == (torch.float32, torch.int64, torch.uint8)
    assert targets.masks.shape == (6, 48, 48) and targets.keypoints.shape == (4, 3, 2, 3)
    assert not targets.boxes[~targets.valid].any() and not targets.labels[~targets.valid].any()
    for i, record in enumerate(dataset.records[:4]):  # crowds and difficult objects are not among them
        scale = (batch.images.sizes[i] / batch.original_sizes[i]).flip(0).repeat(2)
        boxes = torch.tensor([item.box for item in record.annotations[:-2]], dtype=torch.float32).reshape(-1, 4)
        torch.testing.assert_close(targets.boxes[i, targets.valid[i]], boxes * scale)
        height, width = batch.images.sizes[i]
        assert batch.images.pixels[i, :, :height, :width].any()
        assert not batch.images.pixels[i, :, height:].any() and not batch.images.pixels[i, :, :, width:].any()
    image = torch.tensor([i for i, row in enumerate(targets.valid) for _ in range(int(row.sum()))])
    for mask, box in zip(targets.masks, targets.boxes[targets.valid]):  # row-major over (image, row)
        ys, xs = mask.nonzero().T
        extent = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (extent - box).abs().max() <= 1.6  # a pixel, resized by up to 1.08, and half a pixel of nearest
    assert len(image) == 6 and targets.seeds.tolist() == [sample_seed(3, Key(0, number)) for number in range(4)]


def test_the_stored_image_is_what_comes_out(dataset):
    batch = batches(dataset, training=False, batch_size=1, model_input=InputConfig(min_size=48, max_size=48))[0]
    stored = np.asarray(Image.open(dataset.records[0].path))
    np.testing.assert_array_equal(batch.images.pixels[0, :, :48, :32].permute(1, 2, 0), stored)


def test_batches_without_objects(dataset):
    empty = replace(dataset, records=(dataset.records[0],))
    (batch,) = batches(empty, training=False)
    assert batch.targets.boxes.shape == (1, 1, 4) and not batch.targets.valid.any()
    assert batch.targets.masks.shape == (0, 48, 32) and batch.targets.keypoints.shape == (1, 1, 2, 3)


def test_without_antialiasing_pixels_are_floats(dataset):
    batch = batches(dataset, 1, model_input=InputConfig(min_size=32, max_size=64, antialias=False))[0]
    assert batch.images.pixels.dtype == torch.float32 and 100 < batch.images.pixels.max() <= 255


def test_large_scale_jitter_has_one_canvas(dataset):
    augment = AugmentConfig(jitter=(0.3, 2.0), crop_size=40)
    found = batches(dataset, 5, augment=augment)
    assert {batch.images.pixels.shape for batch in found} == {(4, 3, 48, 48)}  # 40, in steps of 16
    assert max(batch.images.sizes.max() for batch in found) == 40
    assert batches(dataset, training=False, augment=augment)[0].images.pixels.shape == (4, 3, 48, 48)


def test_boxes_are_clipped_to_the_image():
    record = ImageRecord(1, Path("x"), 30, 40, (Annotation(1, 0, (-5, 3, 50, 31)),))
    assert make_sample(record, np.zeros((30, 40, 3), np.uint8), False).boxes.tolist() == [[0, 3, 40, 30]]


def test_pad_images():
    padded = pad_images([np.full((5, 7, 3), 9, np.uint8), np.full((8, 2, 3), 8, np.uint8)], 8)
    assert padded.pixels.shape == (2, 3, 8, 8) and padded.sizes.tolist() == [[5, 7], [8, 2]]
    assert padded.pixels[0].sum() == 3 * 35 * 9 and padded.pixels[0, :, :5, :7].min() == 9


# Order


def test_every_epoch_has_every_image_once(dataset):
    found = batches(dataset, 22, aspect_ratio_grouping=False)
    ids = [image_id for batch in found for image_id in batch.image_ids]
    epochs = [ids[start:start + 11] for start in range(0, 88, 11)]
    assert all(sorted(epoch) == list(range(100, 111)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert batches(dataset, 3, seed=4, aspect_ratio_grouping=False)[0].image_ids != found[0].image_ids


def test_grouping_mixes_no_shapes_and_loses_no_image(dataset):
    found = batches(dataset, 22)
    for batch in found:
        assert len({height > width for height, width in batch.original_sizes.tolist()}) == 1
    counts = Counter(image_id for batch in found for image_id in batch.image_ids)
    assert set(counts) == set(range(100, 111)) and max(counts.values()) - min(counts.values()) <= 1


def test_skip_empty_is_for_training_only(dataset):
    empty = {100, 104, 108}  # crowds and difficult objects alone do not count
    seen = {image_id for batch in batches(dataset, 12, skip_empty=True) for image_id in batch.image_ids}
    assert seen == set(range(100, 111)) - empty
    assert len(batches(dataset, training=False, skip_empty=True)) == 3
    with pytest.raises(ValueError, match="images with objects to train on"):
        batches(replace(dataset, records=(dataset.records[0],)), 1, skip_empty=True)


# Reproducibility


@pytest.mark.parametrize("grouping", [True, False])
def test_start_step_is_as_good_as_having_run(dataset, grouping):
    whole = batches(dataset, 9, augment=AUGMENT, aspect_ratio_grouping=grouping)
    for start in (1, 4, 8):
        for a, b in zip(whole[start:], batches(dataset, 9 - start, start_step=start, augment=AUGMENT,
                                               aspect_ratio_grouping=grouping), strict=True):
            assert_equal(a, b)


def test_workers_change_nothing(dataset):
    for options in ({"augment": AUGMENT}, {"training": False}):
        one = batches(dataset, 3, **options)
        torch.manual_seed(7)
        for a, b in zip(one, batches(dataset, 3, workers=2, **options), strict=True):
            assert_equal(a, b)


def test_ranks_share_what_one_process_has(dataset):
    whole = batches(dataset, 4, augment=AUGMENT)
    halves = [batches(dataset, 4, augment=AUGMENT, rank=rank, world_size=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        first, second = halves[0][step], halves[1][step]
        assert first.image_ids + second.image_ids == batch.image_ids
        assert first.targets.seeds.tolist() + second.targets.seeds.tolist() == batch.targets.seeds.tolist()
        for i, (half, place) in enumerate([(first, 0), (first, 1), (second, 0), (second, 1)]):
            height, width = batch.images.sizes[i]
            pixels, boxes = batch.images.pixels[i, :, :height, :width], batch.targets.boxes[i][batch.targets.valid[i]]
            assert torch.equal(half.images.pixels[place, :, :height, :width], pixels)
            assert torch.equal(half.targets.boxes[place][half.targets.valid[place]], boxes)
    with pytest.raises(ValueError, match="multiple of the number of processes, got 4 for 3"):
        batches(dataset, 1, world_size=3)


def test_training_keeps_its_own_random_numbers(dataset):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    batches(dataset, 2, workers=1)
    assert torch.equal(torch.rand(1), expected)


def test_an_image_differs_from_epoch_to_epoch(dataset):
    one = replace(dataset, records=(dataset.records[7],))
    found = batches(one, 12, batch_size=1, augment=AUGMENT)
    assert len({batch.images.pixels.numpy().tobytes() for batch in found}) > 5
    seeds = {sample_seed(seed, Key(epoch, number)) for seed in range(5) for epoch in range(20) for number in range(50)}
    assert len(seeds) == 5000 and min(seeds) >= 0 and max(seeds) < 2**63 and len({s % 64 for s in seeds}) == 64


def test_for_keypoints_images_without_any_are_empty_images(dataset):
    """With skip_empty only those with a labelled one train."""
    unlabelled = replace(dataset.records[3].annotations[0], keypoints=None)
    others = replace(dataset.records[3], id=99, annotations=(unlabelled,))
    for with_keypoints, expected in ((True, {dataset.records[3].id}), (False, {dataset.records[3].id, 99})):
        found = batches(replace(dataset, records=(others, dataset.records[3])), 3, batch_size=1, skip_empty=True,
                        with_keypoints=with_keypoints)
        assert {batch.image_ids[0] for batch in found} == expected


# Images that are combined

MIX = AugmentConfig(copy_paste={}, mosaic={"probability": 1}, mixup={}, affine={}, rand_augment={}, photometric={})


def test_combined_images_depend_on_seed_and_step_alone(dataset):
    options = {"augment": MIX, "sampling": {"name": "repeat_factor", "repeat_thresh": 0.9}}
    whole = batches(dataset, 6, **options)
    assert sum(len(batch.targets.masks) for batch in whole) > 2 * sum(
        len(batch.targets.masks) for batch in batches(dataset, 6, sampling=options["sampling"]))
    for start, workers in ((0, 2), (4, 0), (3, 1)):
        for a, b in zip(whole[start:], batches(dataset, 6 - start, start_step=start, workers=workers, **options),
                        strict=True):
            assert_equal(a, b)
    halves = [batches(dataset, 6, rank=rank, world_size=2, **options) for rank in (0, 1)]
    for batch, first, second in zip(whole, *halves):
        assert first.image_ids + second.image_ids == batch.image_ids
        assert torch.cat([first.targets.labels[first.targets.valid], second.targets.labels[second.targets.valid]]
                         ).tolist() == batch.targets.labels[batch.targets.valid].tolist()


def test_images_are_combined_up_to_a_fraction_of_the_training(dataset):
    """After it, batches are those without."""
    mixed, plain = MIX.model_copy(update={"mix_until": 0.5}), AugmentConfig(affine={}, rand_augment={}, photometric={})
    found, without = (batches(dataset, 6, augment=augment, steps=8) for augment in (mixed, plain))
    for step, (a, b) in enumerate(zip(found, without)):
        if step < 4:
            assert not torch.equal(a.images.pixels, b.images.pixels)
        else:
            assert_equal(a, b)


def test_crowds_and_difficult_objects_go_along_if_asked(dataset):
    """And the targets are the same."""
    options = {"batch_size": 4, "training": True, "with_masks": True, "seed": 3}
    data = DataConfig(workers=0, augment=AugmentConfig(crop_size=20, min_sizes=(30,)))
    without, with_ignored = (build_loader(dataset, INPUT, data, with_ignored=asked, **options)
                             for asked in (False, True))
    for a, b in itertools.islice(zip(without, with_ignored), 4):
        assert_equal(a, b)
    sample = with_ignored.sample(Key(0, 3))
    assert not without.sample(Key(0, 3)).ignored.any()
    assert sample.crowd.sum() == sample.difficult.sum() == 1 or len(sample.boxes) < 5
    assert sample.masks[sample.crowd].any() and not (sample.crowd & sample.difficult).any()


def test_a_partner_that_cannot_be_read_is_told(dataset, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"nothing")
    broken = replace(dataset.records[2], path=tmp_path / "cut.png")
    told = image_error(replace(dataset, records=(dataset.records[1], broken)), augment=MIX, batch_size=1)
    assert re.search("known format, got .*cut.png", told)


def test_what_the_targets_do_not_allow(dataset):
    with pytest.raises(ValueError, match="copy_paste must be null for a model without masks"):
        batches(dataset, 1, augment=MIX, with_masks=False)
    with pytest.raises(ValueError, match="iou_crop must be null for a model without boxes"):
        batches(dataset, 1, augment=AugmentConfig(iou_crop={}), with_boxes=False)


# What goes wrong


def test_data_that_does_not_fit_the_model(dataset):
    record = dataset.records[3]
    bare = replace(record, annotations=(replace(record.annotations[0], segmentation=None),))
    number = bare.annotations[0].id
    with pytest.raises(ValueError, match=rf"1 without, such as annotation {number} of .*3.png .*faster_rcnn"):
        batches(replace(dataset, records=(bare,)), 1)
    with pytest.raises(ValueError, match="must have keypoints"):
        batches(replace(dataset, keypoint_names=()), 1)
    with pytest.raises(ValueError, match="must have images, got none"):
        batches(replace(dataset, records=()), 1)
    with pytest.raises(TypeError, match="endless"):
        len(build_loader(dataset, INPUT, DataConfig(workers=0), batch_size=2, training=True, with_masks=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_told_in_one_line(dataset, tmp_path, workers):
    record = dataset.records[1]
    (tmp_path / "cut.png").write_bytes(record.path.read_bytes()[:600])
    for change, message in (({"path": tmp_path / "cut.png"}, "cut.png must be readable, got"),
                            ({"path": tmp_path / "gone.png"}, "must exist, got .*gone.png"),
                            ({"height": 31}, r"state, 40 x 31 px \(width x height\), got 40 x 30 \(.*1.png\). Correct"),
                            ({"height": 40, "width": 30}, "EXIF")):
        told = image_error(replace(dataset, records=(replace(record, **change),)), training=False, workers=workers)
        assert re.search(message, told) and "\n" not in told and "Traceback" not in told


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipeline_that_fails_names_the_image(dataset, workers):
    augment = AugmentConfig(albumentations=({"RandomCrop": {"height": 999, "width": 9, "p": 1}},))
    told = image_error(dataset, augment=augment, workers=workers)
    assert re.search(r"albumentations must apply .* \(.*\d.png\)", told)


def image_error(dataset: Dataset, **options) -> str:
    """Its message alone: pytest would keep the error, and with it the workers."""
    try:
        batches(dataset, 1, **options)
    except ImageError as error:
        return str(error)
    return "no error"


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
from pathlib import Path
from detres.config import DataConfig, InputConfig
from detres.data.dataset import Dataset, ImageRecord
from detres.data.loader import build_loader
dataset = Dataset("one", "coco", ("a",), (1,), (ImageRecord(1, Path(sys.argv[1]), 30, 40),))
loader = build_loader(dataset, InputConfig(), DataConfig(workers=2), batch_size=1, training=True, with_masks=False)
try:
    for step, batch in enumerate(loader):
        if step == 1:
            print("running", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_ctrl_c_reaches_the_main_process_only(dataset):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(dataset.records[1].path)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "running\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    try:
        out, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it would go on for ever
        raise
    assert (out, errors, process.returncode) == ("stopped\n", "", 0)


@pytest.mark.data
@pytest.mark.parametrize(("name", "role", "masks"), [("coco_mini", "train", True), ("bccd", "val", False),
                                                     ("voc_mini", "train", False), ("nuts", "train", True)])
def test_real_data(shared_data, name, role, masks):
    dataset = load_dataset(SourceConfig(path=str(shared_data / name)), role, "drop")
    dataset = replace(dataset, records=dataset.records[:8])
    small = InputConfig(min_size=160, max_size=256)
    (batch,) = batches(dataset, model_input=small, training=False, batch_size=8, with_masks=masks, with_keypoints=False)
    boxes = batch.targets.boxes[batch.targets.valid]
    limits = batch.images.sizes.flip(1).repeat(1, 2)[:, None].expand_as(batch.targets.boxes)[batch.targets.valid]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes <= limits + 1e-3).all()
    if masks:  # almost all of a mask lies in its box
        for mask, (x1, y1, x2, y2) in zip(batch.targets.masks, boxes.round().int().tolist()):
            assert mask[max(0, y1 - 1):y2 + 1, max(0, x1 - 1):x2 + 1].sum() >= 0.95 * mask.sum()


# Faster ways


def jpeg_set(folder: Path, size: tuple[int, int] = (160, 240)) -> Dataset:
    image = np.random.default_rng(0).integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
    Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / "x.jpg")
    item = Annotation(1, 0, (20, 20, 100, 90), [[20, 20, 100, 20, 100, 90, 20, 90]])
    return Dataset("one", "coco", ("a",), (1,), (ImageRecord(1, folder / "x.jpg", *size, (item,)),))


def test_reduced_decoding_trains_on_nearly_the_same_pixels(tmp_path):
    dataset, small = jpeg_set(tmp_path), InputConfig(min_size=48, max_size=200)
    options = {"batch_size": 1, "model_input": small, "with_keypoints": False, "count": 1}
    (full,), (reduced,) = (batches(dataset, reduced_decode=flag, **options) for flag in (False, True))
    difference = (full.images.pixels.float() - reduced.images.pixels.float()).abs()
    assert 0 < difference.mean() < 2 and torch.equal(full.targets.masks, reduced.targets.masks)
    # A size that is more than half of the file's, evaluation, and a step that looks at pixels first: all of the image.
    blur = AugmentConfig(albumentations=({"HorizontalFlip": {"p": 1.0}},))
    for change in ({"model_input": InputConfig(min_size=81, max_size=200)}, {"training": False}, {"augment": blur}):
        (full,), (reduced,) = (batches(dataset, reduced_decode=flag, **options | change) for flag in (False, True))
        assert_equal(full, reduced)


def test_the_size_of_a_file_is_checked_before_it_is_decoded(tmp_path):
    dataset = jpeg_set(tmp_path)
    wrong = replace(dataset, records=(replace(dataset.records[0], width=241),))
    with pytest.raises(ImageError, match="241 x 160 px .* got 240 x 160"):
        batches(wrong, reduced_decode=True, batch_size=1, count=1, with_keypoints=False)


@pytest.mark.parametrize("augment", [{}, {"jitter": (0.5, 2.0), "crop_size": 96}])
def test_torch_resizes_nearly_as_pillow(dataset, augment):
    pillow, torch_ = (batches(dataset, 2, augment=AugmentConfig(resize=name, **augment)) for name in ("pillow", "torch"))
    for a, b in zip(pillow, torch_):
        difference = (a.images.pixels.int() - b.images.pixels.int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.05 and b.images.pixels.dtype == torch.uint8
        assert_equal(a, replace(b, images=a.images))
