"""Image sets held in memory: reading, splits, and batches as a pure function of (seed, step)."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from detres.config import SourceConfig
from detres.data.cifar import MemoryLoader
from detres.data.class_dataset import ClassDataset, load_class_dataset

CPU = torch.device("cpu")


def make_dataset(n: int = 10, size: int = 6) -> ClassDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    return ClassDataset("noise", ("a", "b"), np.arange(n) % 2, pixels=pixels)


def write_zips(folder: Path, sizes: tuple[int, ...] = (8,)) -> Path:
    folder.mkdir()
    for split, count in (("train", 4), ("test", 2)):
        with zipfile.ZipFile(folder / f"my_{split}.zip", "w") as file:
            for name, grey in (("dark", 10), ("light", 200)):
                for i in range(count):
                    picture = io.BytesIO()
                    Image.new("L", (sizes[i % len(sizes)],) * 2, grey + i).save(picture, "PNG")
                    file.writestr(f"{split}/{name}/{i}.png", picture.getvalue())
    return folder


def test_zips_of_class_folders(tmp_path):
    data = load_class_dataset(SourceConfig(path=str(write_zips(tmp_path / "data"))), "train")
    assert data.classes == ("dark", "light") and data.labels.tolist() == [0] * 4 + [1] * 4
    assert data.pixels.shape == (8, 8, 8, 3) and data.pixels[5].tolist() == np.full((8, 8, 3), 201).tolist()
    assert len(load_class_dataset(SourceConfig(path=str(tmp_path / "data")), "val")) == 4


def test_images_of_several_sizes_are_refused(tmp_path):
    source = SourceConfig(path=str(write_zips(tmp_path / "data", (8, 9))))
    with pytest.raises(ValueError, match="one size"):
        load_class_dataset(source, "train")


def test_torchvision_batches_and_splits(tmp_path, monkeypatch):
    """Files as torchvision keeps them, ten images each: its checksums do not apply."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3072), np.uint8)
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        rows = slice(10 * k, 10 * k + 10)
        (folder / name).write_bytes(pickle.dumps({"data": pixels[rows], "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("detres.data.cifar.HELD_OUT", 5)
    sets = {split: load_class_dataset(SourceConfig(path=str(tmp_path), split=split), "train")
            for split in ("train", "train45k", "val5k", "test")}
    assert {name: len(data) for name, data in sets.items()} == {"train": 50, "train45k": 45, "val5k": 5, "test": 10}
    assert (sets["train"].pixels[3] == pixels[3].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert sets["test"].classes == tuple("abcdefghij") and sets["test"].labels.tolist() == list(range(10))
    both = np.concatenate([sets["train45k"].pixels, sets["val5k"].pixels]).reshape(50, -1)
    everything = [bytes(image) for image in sets["train"].pixels.reshape(50, -1)]
    assert sorted(map(bytes, both)) == sorted(everything)
    places = [everything.index(bytes(image)) for image in sets["val5k"].pixels.reshape(5, -1)]
    assert places not in (list(range(5)), list(range(45, 50))), "a random part: files may be sorted by class"
    again = load_class_dataset(SourceConfig(path=str(tmp_path), split="val5k"), "train")
    assert (again.pixels == sets["val5k"].pixels).all()


def test_unknown_split(tmp_path):
    source = SourceConfig(path=str(write_zips(tmp_path / "data")), split="trial")
    with pytest.raises(FileNotFoundError, match="train45k"):
        load_class_dataset(source, "train")


def batches(start_step: int = 0, count: int = 8, **options) -> list:
    loader = MemoryLoader(make_dataset(), CPU, **{"batch_size": 4, "training": True, "pad": 2, "fill": (7, 8, 9),
                                                  "flip": 0.5, "start_step": start_step, **options})
    return [batch for batch, _ in zip(loader, range(count))]


def test_batches_are_crops_of_padded_images():
    """Every image of a batch is one of the 2 x 5 x 5 views of the padded image of its label, and all kinds occur."""
    data = make_dataset()
    padded = np.empty((10, 10, 10, 3), np.uint8)
    padded[:] = (7, 8, 9)
    padded[:, 2:8, 2:8] = data.pixels
    views = {}
    for n in range(10):
        for y in range(5):
            for x in range(5):
                crop = padded[n, y:y + 6, x:x + 6]
                views[crop.tobytes()] = (n, y, x, False)
                views[np.ascontiguousarray(crop[:, ::-1]).tobytes()] = (n, y, x, True)
    seen = []
    for batch in batches(count=50):
        assert batch.images.sizes.tolist() == [[6, 6]] * 4
        for image, label in zip(batch.images.pixels, batch.targets.labels):
            view = views[np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes()]
            assert data.labels[view[0]] == label
            seen.append(view)
    assert [len({view[k] for view in seen}) for k in range(4)] == [10, 5, 5, 2]
    for epoch in range(20):  # each image once an epoch
        assert sorted(view[0] for view in seen[10 * epoch:10 * epoch + 10]) == list(range(10))


def test_batches_depend_on_the_step_alone():
    whole, later = batches(count=8), batches(start_step=5, count=3)
    for a, b in zip(whole[5:], later):
        assert torch.equal(a.images.pixels, b.images.pixels) and torch.equal(a.targets.labels, b.targets.labels)
    assert not torch.equal(whole[0].images.pixels, batches(seed=1)[0].images.pixels)


def test_ranks_share_a_batch():
    parts = [batches(rank=rank, world_size=2) for rank in range(2)]
    for whole, first, second in zip(batches(), *parts):
        assert torch.equal(whole.images.pixels, torch.cat([first.images.pixels, second.images.pixels]))


def test_evaluation_is_one_pass_in_order():
    data = make_dataset()
    loader = MemoryLoader(data, CPU, batch_size=4, training=False, pad=2)
    found = list(loader)
    assert len(loader) == len(found) == 3
    assert torch.equal(torch.cat([batch.images.pixels for batch in found]),
                       torch.from_numpy(data.pixels).permute(0, 3, 1, 2))
    halves = [torch.cat([batch.targets.labels for batch in MemoryLoader(
        data, CPU, batch_size=4, training=False, rank=rank, world_size=2)]) for rank in range(2)]
    assert sorted(torch.cat(halves).tolist()) == sorted(data.labels.tolist())


def test_larger_images_are_averaged_down():
    """As Pillow does it, which resizes image files."""
    data = make_dataset(size=12)
    (batch,) = MemoryLoader(data, CPU, batch_size=10, training=False, size=5)
    for pixels, image in zip(batch.images.pixels.permute(0, 2, 3, 1).numpy(), data.pixels, strict=True):
        resized = np.asarray(Image.fromarray(image).resize((5, 5), Image.Resampling.BILINEAR))
        assert np.abs(pixels.astype(int) - resized).max() <= 1


@pytest.mark.data
def test_cifar10_jpeg(shared_data):
    data = load_class_dataset(SourceConfig(path=str(shared_data / "cifar10_jpeg"), split="test"), "val")
    assert data.pixels.shape == (10_000, 32, 32, 3) and np.bincount(data.labels).tolist() == [1000] * 10
    assert data.classes[:3] == ("airplane", "automobile", "bird")
