"""What was read is kept, and never used when it is out of date."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest

from detres.config import SourceConfig
from detres.data import coco, index, panoptic
from detres.data.dataset import InvalidDataError, load_dataset
from detres.data.shapes import ShapesOptions, write_shapes


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """An annotation file that was not changed just now."""
    monkeypatch.setenv("DETRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "LEAST", 0)
    folder = write_shapes(tmp_path / "shapes", 6, options=ShapesOptions("easy", size=(64, 96)), val_images=2,
                          formats=("coco",), progress=False)
    file = folder / "annotations/instances_train.json"
    settle(file)
    return file


def settle(file: Path, seconds: int = 100) -> None:
    os.utime(file, (file.stat().st_mtime - seconds,) * 2)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that were read."""
    files, parse = [], coco.parse
    monkeypatch.setattr(coco, "parse", lambda file: files.append(file) or parse(file))
    return files


def load(file: Path, on_invalid: str = "error", **options):
    return load_dataset(SourceConfig(path=str(file), **options), "train", on_invalid)


def kept(folder: Path) -> list[Path]:
    return list((folder / "cache/index").glob("*"))


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    settle(file)


def test_the_second_start_reads_nothing(data, reads, tmp_path):
    first, second = load(data), load(data)
    assert reads == [data] and len(kept(tmp_path)) == 1
    assert vars(first) == vars(second) and len(second.records) == 6
    assert load(data, keypoint_offset=0.5).keypoint_offset == 0.5 and len(reads) == 1
    assert load(data.parents[1]) == second and len(reads) == 1


def test_an_edit_of_the_same_size_is_noticed(data, reads):
    before, stat = load(data), data.stat()
    text = data.read_text()
    box = json.loads(text)["annotations"][0]["bbox"][0]
    data.write_text(text.replace(f'"bbox": [{box},', f'"bbox": [{str(box)[:-1] + str((int(str(box)[-1]) + 1) % 10)},'))
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # by a tool that hides it
    assert data.stat().st_size == stat.st_size
    after = load(data)
    assert len(reads) == 2 and before.records != after.records


def test_a_file_changed_just_now_is_not_kept(data, reads, tmp_path):
    data.touch()
    load(data), load(data)
    assert len(reads) == 2 and not kept(tmp_path)


def test_images_that_come_and_go_are_noticed(data, reads):
    image = load(data).records[0].path
    image.rename(image.with_suffix(".gone"))
    with pytest.raises(InvalidDataError, match="must be an image file"):
        load(data)
    assert len(load(data, "drop").records) == 5
    image.with_suffix(".gone").rename(image)
    assert len(load(data).records) == 6
    other = data.parents[1] / "instances_train"  # nearer by name
    other.mkdir()
    for path in list(image.parent.iterdir()):
        os.link(path, other / path.name)
    assert load(data).records[0].path.parent == other
    load(data, images=str(image.parent))
    assert load(data, images=str(image.parent)).records[0].path.parent == image.parent


def test_problems_are_told_again(data, reads, caplog):
    def spoil(content):
        content["annotations"][0]["bbox"][0] = -1e4
        content["annotations"][1]["bbox"][2] += 500

    edit(data, spoil)
    told = []
    for _ in range(2):
        with pytest.raises(InvalidDataError) as error:
            load(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = load(data, "drop")
        told.append((str(error.value), error.value.problems, caplog.messages, dataset))
    assert reads == [data] and told[0] == told[1] and len(told[0][2]) == 2


def test_damaged_and_foreign_files_are_made_anew(data, reads, tmp_path):
    good = load(data)
    file, = kept(tmp_path)
    content = file.read_bytes()
    other = content.replace(good.classes[0].encode(), good.classes[0][::-1].encode(), 1)
    assert other != content
    flips = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]  # in each of the arrays
             for place in (-1, -len(good.records.rest) - 64, -len(good.records.rest) - good.records.annotations.nbytes - 128)]
    for number, bad in enumerate((b"", b"PK" * 50, content[:-1], content[:20], other, *flips), 2):
        file.unlink()  # what is mapped stays
        file.write_bytes(bad)
        assert load(data) == good and len(reads) == number
    assert load(data) == good and len(reads) == number


def test_files_of_records_say_what_is_wrong(data, tmp_path):
    index.save_records(file := tmp_path / "some", {}, load(data).records)
    content = file.read_bytes()
    for name, bad, text in (("cut", content[:-1], "must be whole"), ("text", b"{}", "must be a file of detres"),
                            ("flip", content[:-1] + bytes([content[-1] ^ 4]), "must be as it was written")):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ValueError, match=f"index {text}.*{name}"):
            index.map_records(tmp_path / name)


def test_other_code_reads_anew(data, reads, monkeypatch):
    load(data)
    monkeypatch.setattr(index, "code", lambda: "other")
    load(data), load(data)
    assert len(reads) == 2


def test_off_read_only_and_small(data, reads, tmp_path, monkeypatch):
    monkeypatch.setenv("DETRES_CACHE", str(data))  # a file, where no folder can be made
    load(data), load(data)
    monkeypatch.setenv("DETRES_CACHE", "")
    load(data), load(data)
    monkeypatch.setenv("DETRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "LEAST", 2**20)
    load(data), load(data)
    assert len(reads) == 6 and not kept(tmp_path)


def test_several_at_once(data, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(load(data))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(dataset == found[0] for dataset in found) and len(kept(tmp_path)) == 1


def test_room(data, tmp_path, monkeypatch):
    load(data)
    first, = kept(tmp_path)
    settle(first)
    monkeypatch.setattr(index, "LIMIT", first.stat().st_size + 100)
    val = data.with_name("instances_val.json")
    settle(val)
    load(val)
    assert len(kept(tmp_path)) == 1 and first not in kept(tmp_path)


def test_panoptic(data, reads):
    file = data.with_name("panoptic_train.json")
    settle(file)
    source = SourceConfig(path=str(file))
    first, second = (panoptic.load_panoptic(source, "train") for _ in range(2))
    assert reads == [file] and vars(first) == vars(second) and len(first.records) == 6
    first.records[0].label_map.path.unlink()
    with pytest.raises(InvalidDataError, match="must be a PNG file"):
        panoptic.load_panoptic(source, "train")
