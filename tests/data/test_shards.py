"""Shards have the very same records and images, from anywhere, in an order that reads them one after another."""

from __future__ import annotations

import http.server
import io
import json
import os
import tarfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from detres.cli import main
from detres.config import AugmentConfig, DataConfig, InputConfig, SourceConfig
from detres.data.dataset import Dataset, InvalidDataError, load_dataset, read_all
from detres.data.images import ImageError, read_image
from detres.data.loader import build_loader
from detres.data.problems import Problems
from detres.data.sampling import InBlocks, Key, Shuffle
from detres.data.shapes import ShapesOptions, write_shapes
from detres.data.shard_files import ShardStore
from detres.data.shard_scan import Scan
from detres.data.shard_writer import write_shards
from detres.data.splits import find_splits


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 14, val_images=4, formats=("coco",), progress=False,
                        options=ShapesOptions("full", size=(64, 96)))


@pytest.fixture(scope="module")
def original(shapes) -> Dataset:
    return load(shapes)


@pytest.fixture(scope="module")
def written(shapes, original, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    write_shards(original, out, "train", 25_000, progress=False)
    write_shards(load(shapes, "val"), out, "val", 10**6, progress=False)
    return out


@pytest.fixture
def copy(written, tmp_path) -> Path:
    for file in written.iterdir():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "copy"


def load(path: Path | str, role: str = "train", on_invalid: str = "error", **options) -> Dataset:
    return load_dataset(SourceConfig(path=str(path), **options), role, on_invalid)


def assert_same(dataset: Dataset, original: Dataset) -> None:
    """But for the order."""
    records = {record.id: record for record in original.records}
    assert sorted(dataset.records.ids()) == sorted(original.records.ids())
    for record in dataset.records:
        assert replace(record, path=records[record.id].path) == records[record.id]
        np.testing.assert_array_equal(read_image(record.path), read_image(records[record.id].path))
    names = ("classes", "category_ids", "keypoint_names", "flip_pairs", "skeleton", "keypoint_classes")
    assert [getattr(dataset, name) for name in names] == [getattr(original, name) for name in names]


def test_the_same_records_and_images(written, original, shapes):
    assert original.keypoint_names
    assert len(list(written.glob("train-*.tar"))) > 2
    assert all(file.stat().st_size <= 25_000 for file in written.glob("train-*.tar"))
    dataset = load(written)
    assert_same(dataset, original)
    assert_same(load(written, "val"), load(shapes, "val"))
    assert load(written / "val.index").records == load(written, split="val").records
    assert dataset.records.ids() != original.records.ids(), "shuffled"
    assert [(split.name, split.role) for split in find_splits(written)] == [("train", "train"), ("val", "val")]
    assert load(written, keypoint_offset=0.5).records[0].path == dataset.records[0].path


def test_the_same_bytes_for_the_same_seed(written, original, tmp_path):
    for seed, same in ((0, True), (1, False)):
        write_shards(original, tmp_path / str(seed), "train", 25_000, seed, progress=False)
        for name in ("train-000000.tar", "train.index"):
            assert ((tmp_path / str(seed) / name).read_bytes() == (written / name).read_bytes()) == same
    with pytest.raises(FileExistsError, match="called train yet"):
        write_shards(original, tmp_path / "0", "train", 25_000, progress=False)


def test_every_tar_reads_them(written, original):
    with tarfile.open(written / "train-000000.tar") as tar:
        names = tar.getnames()
        entry = json.load(tar.extractfile("000000000.json"))
    assert names[:2] == ["000000000.jpg", "000000000.json"] and len(names) % 2 == 0
    record = {record.id: record for record in original.records}[entry["id"]]
    assert len(entry["annotations"]) == len(record.annotations)
    assert {item["category"] for item in entry["annotations"]} == {
        original.classes[item.label] for item in record.annotations}


def test_shards_without_an_index(copy, original, tmp_path, monkeypatch):
    monkeypatch.setenv("DETRES_CACHE", str(tmp_path / "cache"))
    scans, scan = [], Scan.read
    monkeypatch.setattr(Scan, "read", lambda self, names: scans.append(names) or scan(self, names))
    (copy / "train.index").unlink()
    problems = []
    for _ in range(2):
        dataset = read_all(SourceConfig(path=str(copy), split="train"), "train", told := Problems("x"))
        assert_same(dataset, original)
        problems.append([(problem.annotation_id, problem.kind) for problem in told.found])
    assert len(scans) == 1 and problems[0] == problems[1] != []
    assert len(load(copy / "train-{000000..000001}.tar").records) < 14 and len(scans) == 2


def test_real_data(shared_data, tmp_path):
    """Crowds, run lengths, and an index that is lost."""
    original = load(shared_data / "coco_mini")
    write_shards(original, tmp_path, "train", 5_000_000, progress=False)
    dataset = load(tmp_path)
    (tmp_path / "train.index").unlink()
    assert_same(load(tmp_path), original)
    assert load(tmp_path).records == dataset.records


def test_corners_that_width_and_height_do_not_give(tmp_path, original):
    boxes = np.random.default_rng(0).uniform(0, 60, (100, 2, 2))
    record = original.records[0]
    items = tuple(replace(record.annotations[0], id=i + 1, box=(*box.min(0).tolist(), *(box.max(0) + 0.1).tolist()),
                          size=None, difficult=i % 2 == 0, keypoints=None) for i, box in enumerate(boxes))
    assert any(x1 + (x2 - x1) != x2 for x1, _, x2, _ in (item.box for item in items))
    one = replace(original, records=(replace(record, annotations=items),))
    write_shards(one, tmp_path, "train", 10**6, progress=False)
    (tmp_path / "train.index").unlink()
    assert load(tmp_path).records[0].annotations == items


def of_others(folder: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(stream, "png")
    return stream.getvalue()


def test_shards_of_others(tmp_path):
    long, entry = "ünd/" + "x" * 150, {"category": "dog", "bbox": [1, 2, 3, 4]}
    of_others(tmp_path, ("a/1.png", png()), ("a/1.json", json.dumps([entry, {**entry, "category": "cat"}]).encode()),
              (f"{long}.PNG", png()), (f"{long}.cls", b"7"), (f"{long}.json", b'{"annotations": []}'), ("readme", b"x"))
    dataset = load(tmp_path)
    assert dataset.records.ids() == ["a/1", long] and dataset.classes == ("cat", "dog")
    record, empty = dataset.records
    assert [(item.label, item.box, item.area) for item in record.annotations] == [
        (1, (1, 2, 4, 6), 12), (0, (1, 2, 4, 6), 12)]
    assert (record.height, record.width) == (30, 40) and empty.annotations == ()
    assert read_image(empty.path).shape == (30, 40, 3)


def test_problems_of_others_are_told(tmp_path):
    entries = [{"category": "dog", "bbox": [1, 2, width, 4]} for width in (-3, 3)]
    of_others(tmp_path, ("1.png", png()), ("2.png", png()), ("2.json", b"{"), ("3.png", png()),
              ("3.json", json.dumps(entries).encode()))
    with pytest.raises(InvalidDataError) as error:
        load(tmp_path)
    assert [problem.image for problem in error.value.problems] == ["1", "2", "3"]
    assert len(load(tmp_path, on_invalid="drop").records) == 1


def test_what_is_no_file_is_passed_over(tmp_path):
    folder = of_others(tmp_path, ("1.png", png()), ("1.json", b'[{"category": "dog", "bbox": [1, 2, 3, 4]}]'))
    with tarfile.open(folder / "00000.tar", "a") as tar:
        for name, kind in (("x.json", tarfile.DIRTYPE), ("2.json", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "nowhere"
            tar.addfile(member)
    assert load(folder).records.ids() == ["1"]


def test_images_of_others_that_cannot_be_read_are_told(tmp_path):
    of_others(tmp_path, ("1.png", png()), ("1.json", b'[{"category": "dog", "bbox": [1, 2, 3, 4]}]'),
              ("2.png", b"nonsense"), ("2.json", b"[]"))
    with pytest.raises(InvalidDataError, match=r"00000.tar, image '2': image must be readable.*known format"):
        load(tmp_path)
    assert load(tmp_path, on_invalid="drop").records.ids() == ["1"]


def test_damaged_shards_without_an_index_are_not_cut_short(tmp_path):
    """`tarfile` reads up to the damage, and says nothing."""
    entry = b'[{"category": "dog", "bbox": [1, 2, 3, 4]}]'
    file = of_others(tmp_path, ("1.png", png()), ("1.json", entry), ("2.png", png()), ("2.json", entry)) / "00000.tar"
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        second = tar.getmember("2.png").offset
    for bad in (content[:second] + b"?" + content[second + 1:], content[:second], content[:second + 100]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"must be a whole tar archive, got .*at byte {second} \("):
            load(tmp_path)


@pytest.mark.parametrize("ids", [(1, 1), (None, 1)])
def test_classes_of_others_must_not_share_an_id(tmp_path, ids):
    """Else the objects of one would be taken for the other's."""
    entries = [{"category": name, "bbox": [1, 2, 3, 4]} | ({} if number is None else {"category_id": number})
               for name, number in zip(("cat", "dog"), ids)]
    of_others(tmp_path, ("1.png", png()), ("1.json", json.dumps(entries).encode()))
    with pytest.raises(ValueError, match=r"category and category_id must go together .* got \{1\}"):
        load(tmp_path)
    (tmp_path / "shards.json").write_text('{"categories": [{"id": 1, "name": "pet"}]}')
    assert load(tmp_path, on_invalid="drop").classes == ("pet",)


def damage(file: Path, offset: int, data: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_damaged_shards(copy):
    dataset = load(copy)
    record, other = dataset.records[0].path, dataset.records[1].path
    shard = copy / record.shard
    damage(shard, record.offset - 512, b"someone.else")
    with pytest.raises(ImageError, match=rf"follow its tar header.*{record.shard}, 000000000.jpg, at byte 512"):
        read_image(record)
    damage(shard, other.offset, bytes(100))
    with pytest.raises(ImageError, match="known format.*000000001.jpg"):
        read_image(other)
    with pytest.raises(ImageError, match="where the index says, got 000000001.jpg"):
        read_image(replace(record, offset=other.offset))
    with open(shard, "r+b") as stream:
        stream.truncate(other.offset + 50)
    with pytest.raises(ImageError, match=rf"whole, got 50 of {other.size} bytes.*{record.shard}, 000000001"):
        read_image(other)
    with pytest.raises(ValueError, match=r"must have the \d+ bytes that its index has, got .*Restore it"):
        load(copy)
    (copy / "train.index").unlink()
    with pytest.raises(ValueError, match="whole tar archive"):
        load(copy)
    shard.unlink()
    with pytest.raises(ImageError, match="No such file|readable"):
        load(copy, "val"), read_image(replace(record, shard="train-000009.tar"))
    (copy / "val-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="shard must exist"):
        load(copy, "val")
    (copy / "val.index").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="index must be a file of detres"):
        load(copy, "val")


def test_in_memory_of_fsspec_and_copies_on_disk(written, original, tmp_path, monkeypatch):
    system = fsspec.filesystem("memory")
    for file in written.iterdir():
        system.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    assert_same(load("memory://bucket"), original)
    for cache in ("", str(written / "train.index")):  # none; a file, where no folder can be made
        monkeypatch.setenv("DETRES_CACHE", cache)
        assert_same(load("memory://bucket"), original)
    assert_same(load(f"file://{written}"), original)
    limit = 60_000
    dataset = load("memory://bucket", shard_cache=str(tmp_path), shard_cache_gb=limit / 1e9)
    assert_same(dataset, original)
    copies = list(tmp_path.glob("*/*.tar"))
    assert 2 <= len(copies) < len(list(written.glob("train-*.tar")))
    assert sum(copy.stat().st_size for copy in copies) <= limit
    with pytest.raises(FileNotFoundError, match="file must exist, got none at memory://bucket/other.index"):
        load("memory://bucket/other.index")
    system.pipe_file("/bucket/val.index", b"nonsense")
    with pytest.raises(ValueError, match=r"got memory://bucket/val.index. Delete it"):
        load("memory://bucket", "val")
    system.rm("/bucket", recursive=True)
    with pytest.raises(FileNotFoundError):
        load("memory://bucket")


def test_copies_may_be_deleted_at_any_time(written, original, tmp_path, monkeypatch):
    """By another process that makes room; and none that is deleted stays open, which would keep its place on disk."""
    dataset = load(f"file://{written}", shard_cache=str(tmp_path), shard_cache_gb=1)
    open_ = ShardStore._copied

    def deleted_once(self, url, shard):
        copy = open_(self, url, shard)
        if shard not in deleted:
            deleted.append(shard)
            copy.unlink()
        return copy

    deleted = []
    monkeypatch.setattr(ShardStore, "_copied", deleted_once)
    assert_same(dataset, original)
    assert len(deleted) == len(list(written.glob("train-*.tar")))
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not any(str(tmp_path) in name for name in held)


def test_hosts_without_ranges_are_told(written, monkeypatch):
    """They answer with the whole file, which fsspec takes for the range."""
    system = fsspec.filesystem("memory")
    for file in written.iterdir():
        system.pipe_file(f"/whole/{file.name}", file.read_bytes())
    record = load("memory://whole").records[0]
    monkeypatch.setattr(type(system), "cat_file", lambda self, path, **_: self.store[path].getvalue())
    with pytest.raises(ImageError, match="its host knows no ranges: say data.*shard_cache"):
        read_image(record.path)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """With ranges of bytes, of which it keeps a list."""

    asked: list[str] = []

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if wanted is None or not path.is_file():
            return super().do_GET()
        first, last = (int(word) for word in wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()
        self.asked.append(wanted)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(data[first:last + 1])))
        self.end_headers()
        self.wfile.write(data[first:last + 1])

    def log_message(self, *_) -> None:
        pass


def test_over_http(written, original, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("DETRES_CACHE", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=written)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        dataset = load(f"{url}/train.index")
        assert_same(dataset, original)
        path = dataset.records[0].path
        assert f"bytes={path.offset - 512}-{path.offset + path.size - 1}" in Ranges.asked
        batches = [next(iter(loader(f"{url}/train.index", workers=workers))) for workers in (0, 2)]
        assert torch.equal(batches[0].images.pixels, batches[1].images.pixels)
        server.shutdown()


# Order


def loader(path: Path | str, workers: int = 0, window: int = 2, **options):
    return build_loader(load(path), InputConfig(min_size=64, max_size=96),
                        DataConfig(workers=workers, shard_window=window), batch_size=4, training=True, with_masks=True,
                        **options)


def ids(batches, count: int) -> list[tuple]:
    return [batch.image_ids for batch, _ in zip(batches, range(count))]


def test_workers_ranks_and_resuming_change_nothing(written):
    steps = ids(loader(written), 12)
    assert ids(loader(written, workers=2), 12) == steps
    assert ids(loader(written, start_step=5), 7) == steps[5:]
    halves = [ids(loader(written, rank=rank, world_size=2), 12) for rank in range(2)]
    assert [a + b for a, b in zip(*halves)] == steps
    assert ids(loader(written, seed=1), 12) != steps


def test_images_are_combined_with_those_of_their_shard(written):
    dataset = load(written)
    data = DataConfig(workers=0, augment=AugmentConfig(mosaic={"probability": 1.0}))
    reader = build_loader(dataset, InputConfig(min_size=64, max_size=96), data, batch_size=4, training=True,
                          with_masks=False).reader
    seen = []
    object.__setattr__(reader, "_transformed", lambda number, rng: seen.append(number) or type(reader)._transformed(
        reader, number, rng))
    for number in range(len(dataset.records)):
        seen.clear()
        reader.sample(Key(0, number))
        assert len(seen) == 4 and len(set(dataset.records.images["block"][seen])) == 1
    object.__setattr__(reader, "partners", np.flatnonzero(dataset.records.images["block"] != 0))  # skip_empty left none
    seen.clear()
    reader.sample(Key(0, int(np.argmin(dataset.records.images["block"]))))
    assert len(seen) == 4, "a picture of what does not train"


def test_a_few_shards_at_a_time():
    blocks = InBlocks(Shuffle(range(200)), np.repeat(np.arange(10), 20), 3)
    epochs = [blocks.epoch(7, epoch) for epoch in (0, 1)]
    for order in epochs:
        assert sorted(order) == list(range(200))
        read = blocks.block[order]
        parts = [read[start:start + 60] for start in range(0, 200, 60)]
        assert [len(set(part)) for part in parts] == [3, 3, 3, 1]
        assert (np.diff(parts[0]) != 0).sum() > 20, "mixed"
    assert list(dict.fromkeys(blocks.block[epochs[0]])) != list(dict.fromkeys(blocks.block[epochs[1]]))


def test_shards_that_are_left_out_take_no_place_in_the_window(written):
    """Of the last three of many, two are mixed at a time."""
    dataset = load(written)
    part = dataset.records.take(np.arange(14))
    part.images["block"] = 1000 + np.arange(14) % 3
    order = build_loader(replace(dataset, records=part), InputConfig(), DataConfig(workers=0, shard_window=2),
                         batch_size=1, training=True, with_masks=False).batches.order
    reads = [part.images["block"][order.epoch(0, epoch)] for epoch in range(5)]
    changes = [int((np.diff(read) != 0).sum()) for read in reads]
    assert min(changes) > 2, changes


def test_few_shards_are_one_shuffle(written):
    count = len(list(written.glob("train-*.tar")))
    assert ids(loader(written, window=count), 9) == ids(loader(written, window=10**6), 9)
    assert ids(loader(written, window=count), 9) != ids(loader(written, window=count - 1), 9)


def test_command(shapes, original, tmp_path, capsys):
    assert main(["data", "shard", str(shapes), str(tmp_path), "--shard-size", "25kB"]) == 0
    assert "train: 14 images in" in capsys.readouterr().out
    assert_same(load(tmp_path), original)
    assert main(["data", "shard", str(shapes), str(tmp_path)]) == 1
    with pytest.raises(SystemExit):
        main(["data", "shard", str(shapes), str(tmp_path), "--shard-size", "big"])
    assert "such as 500MB, got 'big'" in capsys.readouterr().err
