"""COCO's panoptic format: things as annotations, stuff in label maps, all pixels from the PNG."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detres.config import AugmentConfig, DataConfig, InputConfig, SourceConfig
from detres.data import masks
from detres.data.images import ImageError
from detres.data.loader import build_loader
from detres.data.masks import compressed, rasterize
from detres.data.panoptic import align_panoptic, load_panoptic
from detres.data.problems import InvalidDataError
from detres.data.semantic import load_semantic
from detres.evaluation.run import align_classes

CATEGORIES = [{"id": 200, "name": "rug", "isthing": 0}, {"id": 9, "name": "zebra", "isthing": 1},
              {"id": 4, "name": "ant", "isthing": 1}, {"id": 92, "name": "sky", "isthing": 0}]
SEGMENTS = {  # id: category, crowd, (y1, x1, y2, x2)
    70000: (9, 0, (0, 0, 10, 20)), 300: (4, 0, (10, 0, 20, 20)), 7: (4, 1, (20, 0, 30, 20)),
    8: (92, 0, (0, 20, 30, 30)), 9: (200, 0, (0, 30, 30, 38))}  # the last two columns are void


class PanopticFolder:
    """One image of 40 x 30 px (width x height), whose contents a test may change before it loads."""

    def __init__(self, root: Path):
        self.root, self.file = root, root / "annotations" / "panoptic_train.json"
        self.png = self.file.with_suffix("") / "a.png"
        self.png.parent.mkdir(parents=True)
        (root / "train").mkdir()
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(root / "train" / "a.jpg")
        self.ids = np.zeros((30, 40), np.int64)
        infos = []
        for number, (category, crowd, (y1, x1, y2, x2)) in SEGMENTS.items():
            self.ids[y1:y2, x1:x2] = number
            infos.append({"id": number, "category_id": category, "iscrowd": crowd, "area": (y2 - y1) * (x2 - x1),
                          "bbox": [x1, y1, x2 - x1, y2 - y1]})
        self.content = {"images": [{"id": 5, "file_name": "a.jpg", "height": 30, "width": 40}],
                        "categories": [dict(category) for category in CATEGORIES],
                        "annotations": [{"image_id": 5, "file_name": "a.png", "segments_info": infos}]}
        self.save()

    def save(self) -> None:
        ids = self.ids
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(self.png)
        masks._last.path = None  # as files do not change otherwise

    @property
    def infos(self) -> list[dict]:
        return self.content["annotations"][0]["segments_info"]

    def load(self, read=load_panoptic, on_invalid: str = "error", path: str = "", **options):
        self.file.write_text(json.dumps(self.content))
        return read(SourceConfig(path=str(self.root / path), **options), "train", on_invalid)


@pytest.fixture
def panoptic(tmp_path) -> PanopticFolder:
    return PanopticFolder(tmp_path)


def test_things_are_annotations_and_stuff_is_in_the_map(panoptic):
    dataset = panoptic.load()
    assert (dataset.classes, dataset.category_ids) == (("ant", "zebra"), (4, 9))
    assert (dataset.semantic_classes, dataset.semantic_ids) == (("things", "sky", "rug"), (0, 92, 200))
    (record,) = dataset.records
    assert [(item.label, item.box, item.area, item.crowd) for item in record.annotations] == [
        (1, (0, 0, 20, 10), 200, False), (0, (0, 10, 20, 20), 200, False), (0, (0, 20, 20, 30), 200, True)]
    for item, number in zip(record.annotations, SEGMENTS):
        mask = rasterize(item.segmentation, 30, 40)
        np.testing.assert_array_equal(mask, panoptic.ids == number)
        assert rasterize(compressed(item.segmentation, 30, 40), 30, 40).tolist() == mask.tolist()
    labels = record.label_map.read(record)
    assert (labels[:, :20] == 0).all() and (labels[:, 20:30] == 1).all() and (labels[:, 30:38] == 2).all()
    assert (labels[:, 38:] == 255).all()
    assert pickle.loads(pickle.dumps(dataset)) == dataset


@pytest.mark.parametrize("options", [{}, {"path": "annotations/panoptic_train.json"}, {"split": "panoptic_train"}])
def test_all_categories_are_classes_of_a_semantic_model(panoptic, options):
    dataset = panoptic.load(load_semantic, **options)
    assert dataset.classes == ("ant", "zebra", "sky", "rug") and dataset.category_ids == (0, 1, 2, 3)
    assert dataset.semantic_classes == () == dataset.records[0].annotations
    labels = dataset.records[0].label_map.read(dataset.records[0])
    assert labels[[0, 15, 25, 0, 0, 0], [0, 0, 0, 25, 35, 39]].tolist() == [1, 0, 0, 2, 3, 255]


def test_beside_instances_the_split_says_panoptic(panoptic, coco):
    coco.load()  # its annotations are in the same folder: tmp_path
    assert panoptic.load(load_semantic, split="train2017").classes == ("background", "ant", "zebra")
    assert panoptic.load(load_semantic, split="panoptic_train").classes[-1] == "rug"
    assert panoptic.load().semantic_classes[-1] == "rug", "a panoptic model reads nothing else"


def test_a_folder_without_it_says_what_it_looked_for(panoptic, coco):
    with pytest.raises(FileNotFoundError, match=r"one JSON file for 'val'.*got \['annotations/panoptic_train.json'\]"):
        panoptic.load(split="val")
    with pytest.raises(FileNotFoundError, match="must exist"):
        panoptic.load(path="nowhere")
    coco.load()
    with pytest.raises(ValueError, match="category must say isthing"):
        load_panoptic(SourceConfig(path=str(coco.file)), "train")


def change(infos, row: int, **values) -> None:
    infos[row].update(values)


@pytest.mark.parametrize("spoil, part", [
    (lambda p: change(p.infos, 0, bbox=None), "annotation 70000: bbox must be four numbers"),
    (lambda p: change(p.infos, 0, bbox=[50, 0, 5, 5]), "annotation 70000: bbox must overlap its image"),
    (lambda p: change(p.infos, 0, category_id=5), "category_id must be the id of a category"),
    (lambda p: change(p.infos, 0, iscrowd=2), "iscrowd must be 0 or 1"),
    (lambda p: change(p.infos, 0, area=None), "area must be a number of pixels"),
    (lambda p: change(p.infos, 0, id=0), "id must be a whole number from 1 to"),
    (lambda p: change(p.infos, 1, id=70000), "id must be a whole number from 1 to 2\\^24 - 1, and not another's"),
    (lambda p: p.png.unlink(), "image 5: file_name must be a PNG file"),
    (lambda p: p.content["annotations"].clear(), "image 5: annotations must have one for each image"),
    (lambda p: p.content["annotations"].append({"image_id": 5}), r"annotations\[1\].image_id must differ"),
    (lambda p: p.content["annotations"].append({"image_id": 6}), "image_id must be the id of an image"),
    (lambda p: p.content["annotations"][0].pop("file_name"), "file_name must be the name of a PNG"),
    (lambda p: p.content["annotations"][0].pop("segments_info"), "segments_info must be a list"),
])
def test_bad_entries_are_named(panoptic, spoil, part):
    spoil(panoptic)
    with pytest.raises(InvalidDataError, match=part):
        panoptic.load()
    assert len(panoptic.load(on_invalid="drop").records) <= 1


def test_bad_categories_stop(panoptic):
    del panoptic.content["categories"][0]["isthing"]
    with pytest.raises(ValueError, match="category must say isthing, 0 or 1"):
        panoptic.load()
    panoptic.content["categories"] = [category for category in CATEGORIES if not category["isthing"]]
    with pytest.raises(ValueError, match="one or more of them things, got 0 things and 2"):
        panoptic.load()


def test_bad_pngs_are_named_when_they_are_read(panoptic):
    (record,) = panoptic.load().records
    panoptic.ids[0, 0] = 12345
    panoptic.save()
    with pytest.raises(ImageError, match=r"must be 0 or those of its segments_info, got \[12345\].*a.png"):
        record.label_map.read(record)
    panoptic.ids = panoptic.ids.T
    panoptic.save()
    with pytest.raises(ImageError, match=r"size of its image, 40 x 30 px.*got 30 x 40 \(.*a.png"):
        record.label_map.read(record)


def test_nothing_is_read_before_it_is_needed(panoptic, monkeypatch):
    """And in a batch each PNG once."""
    read = []
    original = masks.read_image
    monkeypatch.setattr(masks, "read_image", lambda path: read.append(path) or original(path))
    dataset = panoptic.load()
    options = {"batch_size": 1, "with_masks": True, "with_semantic": True}
    for training in (True, False):
        loader = build_loader(dataset, InputConfig(min_size=32), DataConfig(workers=0), training=training, **options)
        assert read == []
        next(iter(loader))
        assert read == [panoptic.png]
        read.clear()
        masks._last.path = None


def test_batches(panoptic):
    dataset = panoptic.load()
    options = {"batch_size": 1, "with_masks": True, "with_semantic": True}
    data = DataConfig(workers=0, augment=AugmentConfig(flip=1))
    batch = next(iter(build_loader(dataset, InputConfig(min_size=30), data, training=True, **options)))
    targets = batch.targets
    assert targets.valid.sum() == 2 and targets.masks.shape == (2, 32, 64), "the crowd does not train"
    assert targets.semantic.shape == (1, 32, 64)
    np.testing.assert_array_equal(targets.masks[0, :30, :40], (panoptic.ids == 70000)[:, ::-1])
    assert targets.semantic[0, 0, :40].tolist() == [255] * 2 + [2] * 8 + [1] * 10 + [0] * 20
    assert (targets.semantic[0, 30:] == 255).all() and (targets.semantic[0, :, 40:] == 255).all()

    (batch,) = build_loader(dataset, InputConfig(min_size=60), data, training=False, **options)
    assert batch.targets.semantic.shape == (1, 64, 96)
    np.testing.assert_array_equal(batch.pixel_truths.segments[0], panoptic.ids)
    assert batch.pixel_truths.semantic[0].shape == (30, 40)


def test_classes_of_a_model_in_another_order(panoptic):
    dataset = panoptic.load()
    things, semantic = ("zebra", "bee", "ant"), ("things", "rug", "wall", "sky")
    aligned = align_panoptic(dataset, align_classes(dataset, things, (1, 2, 3)), semantic)
    assert aligned.classes == things and aligned.semantic_classes == semantic
    (record,) = aligned.records
    assert [item.label for item in record.annotations] == [0, 2, 2]
    labels = record.label_map.read(record)
    assert labels[0, [0, 25, 35, 39]].tolist() == [0, 3, 1, 255]
    assert record.label_map.columns().tolist() == [list(SEGMENTS), [0, 2, 2, 5, 3], [0, 0, 1, 0, 0]]
    assert align_panoptic(dataset, dataset, dataset.semantic_classes) is dataset
    with pytest.raises(ValueError, match="stuff of the data set must be known to the weights, got sky"):
        align_panoptic(dataset, dataset, ("things", "rug"))


@pytest.mark.data
def test_coco_mini(shared_data):
    folder = shared_data / "coco_mini" / "panoptic"
    source = SourceConfig(path=str(folder / "panoptic_examples.json"), images=str(folder / "input_images"))
    dataset = load_panoptic(source, "val")
    assert len(dataset.classes) == 80 and len(dataset.semantic_classes) == 54
    assert dataset.classes[0] == "person" and dataset.semantic_classes[1] == "banner"
    for record in dataset.records:
        labels = record.label_map.read(record)
        ids, k, crowd = record.label_map.columns()
        for item in record.annotations:
            mask = rasterize(item.segmentation, record.height, record.width)
            assert mask.sum() == item.area and (labels[mask == 1] == 0).all()
            ys, xs = np.nonzero(mask)
            assert item.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), "its boxes are tight"
        assert (labels == 255).sum() == (record.label_map.ids(record) == 0).sum()
    assert sum(item.crowd for record in dataset.records for item in record.annotations) >= 1
    every = load_semantic(source, "val")
    assert len(every.classes) == 133
    batch = next(iter(build_loader(dataset, InputConfig(min_size=100, max_size=160), DataConfig(workers=0),
                                   batch_size=2, training=True, with_masks=True, with_semantic=True)))
    assert batch.targets.semantic.shape == batch.images.pixels[:, 0].shape
    assert set(torch.unique(batch.targets.semantic).tolist()) <= {*range(54), 255}

