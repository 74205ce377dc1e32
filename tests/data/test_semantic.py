"""Label maps: VOC's, of instances, of COCO's panoptic format; through transforms and loader, in step with the image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detres.config import AugmentConfig, DataConfig, InputConfig, SourceConfig
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import ImageError
from detres.data.label_maps import InstanceMasks
from detres.data.loader import build_loader
from detres.data.problems import InvalidDataError
from detres.data.semantic import align_semantic, load_semantic
from detres.data.transforms import (LargeScaleJitter, Sample, build_train_transforms, crop_sample, flip, resize)
from detres.structures import SemanticTargets

NO_DATA = Dataset("none", "voc", ("a",), (0,), ())
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def write_label_map(path, values: np.ndarray, mode: str = "P") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8), "L")
    if mode == "P":
        image.putpalette([i * 37 % 256 for i in range(768)])  # any colours: indices count
    image.save(path)


@pytest.fixture
def voc(tmp_path, files):
    """Two images, of 40 x 30 px (width x height), and their maps."""
    root = tmp_path / "VOC2012"
    files.voc(root, {"a": "", "b": ""}, {"train": "a\n"})
    (root / "ImageSets/Segmentation").mkdir()
    (root / "ImageSets/Segmentation/train.txt").write_text("b\na\n")
    values = np.zeros((30, 40))
    values[2:10, 3:20], values[2:10, 20] = 12, 255
    write_label_map(root / "SegmentationClass/a.png", values)
    write_label_map(root / "SegmentationClass/b.png", values[:, ::-1])
    return root


def load(path, **options):
    return load_semantic(SourceConfig(path=str(path), **options), "train")


# Readers


@pytest.mark.parametrize("above", [False, True])
def test_voc_label_maps_are_palette_indices(voc, above):
    dataset = load(voc.parent if above else voc)
    assert dataset.classes[:2] == ("background", "aeroplane") and len(dataset.classes) == 21
    assert dataset.category_ids == tuple(range(21))
    assert [(record.id, record.height, record.width, record.annotations) for record in dataset.records] == [
        ("b", 30, 40, ()), ("a", 30, 40, ())]
    labels = dataset.records[1].label_map.read(dataset.records[1])
    assert labels.dtype == np.uint8 and labels[2:10, 3:20].tolist() == [[12] * 17] * 8
    assert (labels == 255).sum() == 8 and (labels == 0).sum() == 1200 - 8 * 18
    assert dataset.classes[12] == "dog"


def test_voc_with_classes_of_ones_own_and_grey_maps(voc):
    (voc / "classes.txt").write_text("road\nsky\n\n")
    write_label_map(voc / "SegmentationClass/a.png", np.arange(1200).reshape(30, 40) % 2, "L")
    dataset = load(voc)
    assert dataset.classes == ("road", "sky")
    assert dataset.records[1].label_map.read(dataset.records[1])[0, :4].tolist() == [0, 1, 0, 1]
    with pytest.raises(ImageError, match=r"must be 0 to 1, or 255 where ignored, got \[12\] \(.*b.png\).*classes.txt"):
        dataset.records[0].label_map.read(dataset.records[0])
    (voc / "classes.txt").write_text("road\nroad\n")
    with pytest.raises(ValueError, match="must have a distinct name a line"):
        load(voc)


def test_augmented_voc_has_maps_of_its_own(voc):
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text("a\n")
    write_label_map(voc / "SegmentationClassAug/a.png", np.full((30, 40), 3))
    (record,) = load(voc, split="trainaug").records
    assert (record.label_map.read(record) == 3).all()


def test_bad_voc_data_is_named(voc):
    (voc / "SegmentationClass/a.png").unlink()
    (voc / "ImageSets/Segmentation/train.txt").write_text("a\nb\nb\nc\n")
    with pytest.raises(InvalidDataError) as caught:
        load(voc)
    problems = "\n".join(map(str, caught.value.problems))
    for part in ("image 'a': label map must be a PNG file", "image 'b': image id must be listed once",
                 "image 'c': image must be an image file"):
        assert part in problems
    dataset = load_semantic(SourceConfig(path=str(voc)), "train", "drop")
    assert [record.id for record in dataset.records] == ["b"]


def test_bad_maps_are_named_by_the_loader(voc, files):
    record = load(voc).records[0]
    write_label_map(record.label_map.path, np.zeros((40, 30)))
    with pytest.raises(ImageError, match=r"size of its image, 40 x 30 px.*got 30 x 40 \(.*b.png"):
        record.label_map.read(record)
    files.image(record.label_map.path, 30, 40)
    with pytest.raises(ImageError, match="one channel of 8 bits.*got mode RGB.*number of the class"):
        record.label_map.read(record)
    record.label_map.path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="readable PNG.*b.png"):
        next(iter(build_loader(load(voc), InputConfig(min_size=32), DataConfig(workers=0), batch_size=1, training=True,
                               with_masks=False, with_boxes=False, with_semantic=True)))


def test_instances_are_painted(coco):
    """A polygon, another class over a part of it, and a crowd."""
    coco.content["annotations"][1]["segmentation"] = [[0, 0, 20, 0, 20, 20, 0, 20]]  # over 10..20, 10..20 of the first
    coco.content["annotations"].append({**coco.content["annotations"][1], "id": 4,
                                        "segmentation": [[0, 0, 5, 0, 5, 5, 0, 5]]})  # of the same class, within it
    coco.load()
    dataset = load(coco.root)
    assert dataset.classes == ("background", "ant", "zebra")
    first, second = (record.label_map.read(record) for record in dataset.records)
    assert (first[10:20, 10:20] == 255).all() and (first[:10, :20] == 1).all() and (first[20:40, 10:30] == 2).all()
    assert np.bincount(first.ravel()).tolist()[:3] == [4800 - 400 - 600 + 100, 300, 500]
    assert set(np.unique(second)) == {0, 1} and (second == 1).sum() == 100, "a crowd is of its class"


def test_boxes_alone_are_refused(coco):
    del coco.content["annotations"][0]["segmentation"]
    coco.load()
    with pytest.raises(ValueError, match="must have a segmentation for semantic segmentation, got 1 without"):
        load(coco.root)
    coco.content["annotations"] = []
    coco.content["categories"][0]["name"] = "background"
    coco.load()
    with pytest.raises(ValueError, match="must not be called background"):
        load(coco.root)


def test_classes_of_a_model_in_another_order(voc):
    (voc / "classes.txt").write_text("\n".join(["background", *"abcdefghijklmn"]))
    dataset = load(voc)
    aligned = align_semantic(dataset, ("l", "background", *"abcdefghijk", "m", "n", "other"))
    labels = aligned.records[0].label_map.read(aligned.records[0])
    assert sorted(np.unique(labels)) == [0, 1, 255] and (labels == 0).sum() == 8 * 17, "12 was l"
    assert align_semantic(dataset, dataset.classes) is dataset
    with pytest.raises(ValueError, match="must be known to the weights, got n in"):
        align_semantic(dataset, ("background", *"abcdefghijklm"))


# In step with the image


def pixels_of(sample: Sample) -> None:
    """The colour of every pixel says its label; black, which transforms fill with, is ignored or of no object."""
    for label, colour in enumerate(COLOURS[1:], 1):
        np.testing.assert_array_equal(sample.semantic == label, (sample.image == colour).all(-1))


def marked(height: int = 48, width: int = 64) -> Sample:
    blocks = np.random.default_rng(0).integers(1, 4, (height // 4, width // 4), np.uint8)
    semantic = blocks.repeat(4, 0).repeat(4, 1)
    return Sample(COLOURS[semantic], np.zeros((0, 4), np.float32), np.zeros(0, np.int64), semantic=semantic)


def test_every_transform_moves_the_map_with_the_image():
    sample = marked()
    for out in (flip(sample), crop_sample(sample, 5, 7, 20, 30)):
        pixels_of(out)
    assert flip(sample).semantic[:, 0].tolist() == sample.semantic[:, -1].tolist()
    assert crop_sample(sample, 5, 7, 20, 30).semantic.shape == (20, 30)


@pytest.mark.parametrize("size", [(96, 128), (31, 77), (36, 40)])
def test_resize_takes_the_nearest_pixel_centre(size):
    sample = marked()
    out = resize(sample, size, True)
    places = [(2 * np.arange(new) + 1) * old / (2 * new) for new, old in zip(size, (48, 64))]
    rows, columns = (place.astype(int) for place in places)
    clear = np.ix_(*(place % 1 > 0 for place in places))  # between two centres either is as near
    np.testing.assert_array_equal(out.semantic[clear], sample.semantic[rows][:, columns][clear])
    mask = replace(sample, masks=(sample.semantic == 2)[None].astype(np.uint8), boxes=np.ones((1, 4), np.float32),
                   labels=np.zeros(1, int))
    np.testing.assert_array_equal(resize(mask, size, True).masks[0], out.semantic == 2)


@pytest.mark.parametrize("entries", [({"HorizontalFlip": {"p": 1}},), ({"RandomRotate90": {"p": 1}},),
                                     ({"Affine": {"translate_px": [9, 9], "interpolation": 0, "p": 1}},),
                                     ({"CenterCrop": {"height": 20, "width": 24}},)])
def test_albumentations_move_the_map_with_the_image(entries):
    augment = AugmentConfig(albumentations=entries, flip=0.5, crop_size=16)
    transform = build_train_transforms(augment, InputConfig(min_size=48, max_size=1000), NO_DATA)
    from detres.data.augment import Albumentations

    for seed in range(5):
        alone = Albumentations(entries)(marked(), np.random.default_rng(seed))
        pixels_of(alone)
        filled = (alone.image == 0).all(-1)
        assert (alone.semantic[filled] == 255).all(), "what comes from beyond the image is ignored"
        assert ("Affine" in entries[0]) == bool(filled.any())
        assert transform(marked(), np.random.default_rng(seed)).semantic.shape == (16, 16)


def test_jitter_keeps_the_size_of_the_image():
    for seed in range(5):
        out = LargeScaleJitter((0.5, 2.0), 40, True)(marked(), np.random.default_rng(seed))
        assert out.semantic.shape == out.image.shape[:2]
        nearest = np.abs(out.image[:, :, None].astype(int) - COLOURS).sum(-1).argmin(-1)
        assert (nearest == out.semantic).mean() > 0.85, "but for the blurred edges"


# Batches


def test_batches_of_label_maps(voc):
    dataset = load(voc)
    options = {"with_masks": False, "with_boxes": False, "with_semantic": True, "batch_size": 2}
    data = DataConfig(workers=0, augment=AugmentConfig(crop_size=48, flip=0), skip_empty=True)
    batch = next(iter(build_loader(dataset, InputConfig(min_size=30, max_size=40), data, training=True, **options)))
    assert isinstance(batch.targets, SemanticTargets) and batch.pixel_truths is None
    labels, names = batch.targets.labels, batch.image_ids
    assert labels.shape == (2, 64, 64) and labels.dtype == torch.uint8, "a crop of 48, on a multiple of 32"
    a = dataset.records[1]
    np.testing.assert_array_equal(labels[names.index("a"), :30, :40], a.label_map.read(a))
    assert (labels[:, 30:] == 255).all() and (labels[:, :, 40:] == 255).all()

    (batch,) = build_loader(dataset, InputConfig(min_size=60, max_size=90), data, training=False, **options)
    assert batch.targets.labels.shape == (2, 64, 96) and batch.image_ids == ("b", "a")
    np.testing.assert_array_equal(batch.pixel_truths.semantic[1], a.label_map.read(a))
    assert batch.to("meta").pixel_truths.semantic[0].is_meta


def test_data_without_label_maps_is_refused(tmp_path, files):
    files.image(tmp_path / "a.png", 8, 8)
    dataset = Dataset("bare", "coco", ("a",), (1,), (ImageRecord(1, tmp_path / "a.png", 8, 8),))
    with pytest.raises(ValueError, match="must have label maps"):
        build_loader(dataset, InputConfig(), DataConfig(), batch_size=1, training=False, with_masks=False,
                     with_semantic=True)


def test_images_without_objects_train_unless_skipped(tmp_path, files):
    files.image(tmp_path / "a.png", 8, 8)
    painted = InstanceMasks((0, 1))
    empty = ImageRecord(1, tmp_path / "a.png", 8, 8, label_map=painted)
    full = replace(empty, id=2, annotations=(Annotation(1, 0, (0, 0, 4, 4), [[0, 0, 4, 0, 4, 4, 0, 4]]),))
    dataset = Dataset("two", "coco", ("background", "a"), (0, 1), (empty, full))
    for skip, expected in ((True, {2}), (False, {1, 2})):
        loader = iter(build_loader(dataset, InputConfig(min_size=8), DataConfig(workers=0, skip_empty=skip),
                                   batch_size=2, training=True, with_masks=False, with_boxes=False, with_semantic=True))
        assert set(next(loader).image_ids) == expected


# Real data


@pytest.mark.data
def test_voc_mini(shared_data):
    sizes = {"train": 143, "val": 150}
    for split, count in sizes.items():
        dataset = load_semantic(SourceConfig(path=str(shared_data / "voc_mini")), split)
        assert len(dataset.records) == count and len(dataset.classes) == 21
        seen = set()
        for record in dataset.records[:40]:
            seen |= set(np.unique(record.label_map.read(record)).tolist())
        assert {0, 255} < seen <= {*range(21), 255}
    found = load_semantic(SourceConfig(path=str(shared_data / "voc_mini/VOCdevkit/VOC2012")), "val")
    assert [record.id for record in found.records] == [record.id for record in dataset.records]


@pytest.mark.data
def test_instances_as_torchvision_paints_them(shared_data):
    """Its reference script, but for overlaps of one class, which it ignores, too."""
    from pycocotools import mask as coco_mask

    dataset = load_semantic(SourceConfig(path=str(shared_data / "coco_mini")), "val")
    for record in dataset.records[:25]:
        masks = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(
            [list(polygon) for polygon in item.segmentation] if isinstance(item.segmentation, list)
            else [item.segmentation], record.height, record.width))) for item in record.annotations]
        masks = np.stack(masks)
        labels = (masks * np.array([1 + item.label for item in record.annotations])[:, None, None]).max(0)
        ours, once = record.label_map.read(record), masks.sum(0) <= 1
        np.testing.assert_array_equal(ours[once], labels[once])
        twice = np.array([[len(set(1 + item.label for item, mask in zip(record.annotations, masks) if mask[y, x]))
                           for y, x in np.argwhere(~once)[:50]]]).ravel()
        got = np.array([ours[y, x] for y, x in np.argwhere(~once)[:50]])
        np.testing.assert_array_equal(got == 255, twice > 1)
