"""Labelled image files: folders of classes, and ILSVRC as Kaggle has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detres.config import SourceConfig
from detres.data.class_dataset import ClassDataset, align_labels, load_class_dataset


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def load(path: Path, role: str = "train", **options) -> ClassDataset:
    return load_class_dataset(SourceConfig(path=str(path), **options), role)


def listed(data: ClassDataset, root: Path) -> list[tuple[str, str]]:
    return [(data.classes[label], str(Path(path).relative_to(root))) for label, path in zip(data.labels, data.paths)]


# Folders of classes


def test_splits_of_class_folders(tmp_path):
    touch(tmp_path, "train/cat/b.JPEG", "train/cat/a.png", "train/ant/deep/er/c.jpg", "valid/cat/d.jpg",
          "valid/ant/e.jpg", "test/cat/f.jpg")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    data = load(tmp_path)
    assert data.classes == ("ant", "cat") and data.labels.dtype == np.int64 and len(data) == 3
    assert listed(data, tmp_path) == [("ant", "train/ant/deep/er/c.jpg"), ("cat", "train/cat/a.png"),
                                      ("cat", "train/cat/b.JPEG")]
    assert listed(load(tmp_path, "val"), tmp_path) == [("ant", "valid/ant/e.jpg"), ("cat", "valid/cat/d.jpg")]
    assert listed(load(tmp_path, "val", split="test"), tmp_path) == [("cat", "test/cat/f.jpg")]
    with pytest.raises(FileNotFoundError, match="folder extra of class folders, got train, valid, test"):
        load(tmp_path, split="extra")


def test_class_folders_alone(tmp_path):
    """Here "train" is a class: it has images, not folders."""
    touch(tmp_path, "train/a.jpg", "tram/b.jpg")
    assert load(tmp_path).classes == load(tmp_path, "val").classes == ("train", "tram")
    with pytest.raises(FileNotFoundError, match="folder val of class folders, got none"):
        load(tmp_path, split="val")


def test_absent_split_and_classes(tmp_path):
    touch(tmp_path, "train/a/b.jpg")
    with pytest.raises(FileNotFoundError, match="val or valid or validation of class folders, got train"):
        load(tmp_path, "val")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"none in 1 of 2, such as .*train/empty"):
        load(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="labelled images in a known layout"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="must exist"):
        load(tmp_path / "gone")
    with pytest.raises(ValueError, match="images must be null"):
        load(tmp_path, images="elsewhere")


def test_labels_are_aligned_by_name():
    data = ClassDataset("val", ("b", "d"), np.array([0, 1, 1, 0]), ("w", "x", "y", "z"))
    aligned = align_labels(data, ("a", "b", "c", "d"))
    assert aligned.classes == ("a", "b", "c", "d") and aligned.labels.tolist() == [1, 3, 3, 1]
    assert aligned.paths == data.paths
    with pytest.raises(ValueError, match="got d in val, 1 unknown of 2. Trained were a, b, c"):
        align_labels(data, ("a", "b", "c"))


# ILSVRC

SYNSETS = "n02 tench, Tinca tinca\nn01 goldfish\nn07 cock\n"
SOLUTION = "ImageId,PredictionString\nval_2,n07 1 2 3 4 n07 5 6 7 8 \nval_1,n02 1 2 3 4 \n"


@pytest.fixture
def ilsvrc(tmp_path) -> Path:
    touch(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", "train/n02/a.JPEG", "train/n01/b.JPEG", "train/n07/c.JPEG",
          "val/val_1.JPEG", "val/val_2.JPEG", "test/test_1.JPEG")
    return tmp_path


def write_xml(root: Path, **names: str) -> None:
    folder = root / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    for stem, name in names.items():
        (folder / f"{stem}.xml").write_text(f"<annotation><object><name>{name}</name></object></annotation>")


@pytest.mark.parametrize("inside", [True, False])
def test_kaggles_labels(ilsvrc, inside):
    side = ilsvrc / "ILSVRC" if inside else ilsvrc
    (side / "LOC_synset_mapping.txt").write_text(SYNSETS)
    (side / "LOC_val_solution.csv").write_text(SOLUTION)
    for path in (ilsvrc, ilsvrc / "ILSVRC"):
        data = load(path)
        assert data.classes == ("n01", "n02", "n07")
        assert [name for name, _ in listed(data, ilsvrc)] == ["n01", "n02", "n07"]
        data = load(path, "val")
        assert data.classes == ("n01", "n02", "n07")
        images = ilsvrc / "ILSVRC" / "Data" / "CLS-LOC" / "val"
        assert listed(data, images) == [("n02", "val_1.JPEG"), ("n07", "val_2.JPEG")]
    with pytest.raises(FileNotFoundError, match="train or val, .* got 'test'"):
        load(ilsvrc, "val", split="test")


def test_labels_of_annotations(ilsvrc):
    write_xml(ilsvrc, val_1="n02", val_2="n01")
    assert [name for name, _ in listed(load(ilsvrc, "val"), ilsvrc)] == ["n02", "n01"]
    assert load(ilsvrc, "val").classes == ("n01", "n02", "n07")  # of train


def test_validation_images_in_class_folders(ilsvrc):
    folder = ilsvrc / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    for name, image in (("n02", "val_1.JPEG"), ("n07", "val_2.JPEG")):
        (folder / name).mkdir()
        (folder / image).rename(folder / name / image)
    assert [name for name, _ in listed(load(ilsvrc, "val"), ilsvrc)] == ["n02", "n07"]


def test_labels_that_are_not_there(ilsvrc):
    with pytest.raises(ValueError, match="LOC_val_solution.csv .* got 2 images, 2 of them without"):
        load(ilsvrc, "val")
    write_xml(ilsvrc, val_1="n02", val_2="n99")
    with pytest.raises(ValueError, match="must be classes of .*, got n99"):
        load(ilsvrc, "val")


@pytest.mark.data
def test_imagenette(shared_data):
    train, val = (load(shared_data / "imagenette224_mini", role) for role in ("train", "val"))
    assert (len(train), len(val)) == (600, 200) and train.classes == val.classes
    assert np.bincount(train.labels).tolist() == [60] * 10 and np.bincount(val.labels).tolist() == [20] * 10


def test_imagenets_folders_are_torchvisions_classes_in_order():
    """Weights with English names, data with WordNet ids: both are in the order of the ids."""
    ids = tuple(f"n{10**7 + 7 * i:08d}" for i in range(1000))
    shuffled = tuple(np.random.default_rng(0).permutation(ids).tolist())
    dataset = ClassDataset("imagenet", shuffled, np.arange(1000))
    names = tuple(f"thing {i}" for i in range(1000))
    aligned = align_labels(dataset, names)
    assert aligned.classes == names and [ids[label] for label in aligned.labels] == list(shuffled)
    with pytest.raises(ValueError, match="classes to evaluate on must be classes that were trained"):
        align_labels(ClassDataset("part", shuffled[:10], np.arange(10)), names)


def test_a_detectors_data_are_no_class_folders(tmp_path):
    """A COCO folder has folders, too: `annotations`, `train` and `val` are no classes."""
    touch(tmp_path / "train", "a.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text("{}")
    for path in (tmp_path, tmp_path / "annotations/instances_train.json"):
        with pytest.raises(ValueError, match="labelled images.*got boxes or masks.*model.backbone.weights"):
            load(path)
