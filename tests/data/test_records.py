"""Packed records are the records, and cost worker processes nothing."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.label_maps import InstanceMasks, LabelImage, SegmentImage
from detres.data.masks import PNGSegment
from detres.data.records import Records

numbers = st.floats(allow_nan=False)
ints = st.integers(-2**63 + 1, 2**63 - 1)
names = st.text(st.characters(codec="utf-8"), min_size=1).map(lambda text: text.replace("\0", "0"))
paths = names.map(Path) | st.just(Path(os.fsdecode(b"folder/\xff.jpg")))
rles = st.fixed_dictionaries({"size": st.lists(ints, min_size=2, max_size=2), "counts": names | st.lists(ints)})
polygons = st.lists(st.lists(numbers).map(lambda values: array("d", values)))
tables = st.lists(st.integers(0, 255)).map(tuple)
annotations = st.builds(
    Annotation, ints, ints, st.tuples(numbers, numbers, numbers, numbers),
    st.none() | polygons | rles | st.builds(PNGSegment, paths, ints), st.none() | st.lists(numbers).map(tuple),
    numbers, st.booleans(), st.booleans(), st.none() | st.tuples(numbers, numbers))
label_maps = (st.builds(LabelImage, tables, paths) | st.builds(InstanceMasks, tables)
              | st.builds(SegmentImage, tables, paths, st.lists(ints).map(lambda values: array("q", values))))
images = st.builds(ImageRecord, ints | names | st.just("\udcff.jpg"), paths, ints, ints,
                   st.lists(annotations, max_size=3).map(tuple), st.none() | ints, st.none() | label_maps)


@settings(max_examples=100, deadline=None)
@given(st.lists(images, max_size=4).map(tuple))
def test_equal_to_the_tuple(records):
    packed = Records.of(records)
    assert packed == records and tuple(packed) == records and packed.ids() == [record.id for record in records]
    assert list(packed.paths()) == [record.path for record in records]
    for ours, theirs in zip(packed, records):
        assert repr(ours) == repr(theirs), "types, too"


def some(count: int, start: int = 0) -> tuple[ImageRecord, ...]:
    def item(number: int) -> Annotation:
        return Annotation(number, number % 5, (1.5, 2.5, 30.0, 40.0), [array("d", range(60))], crowd=number % 7 == 0,
                          size=(28.5, 37.5) if number % 2 else None)

    return tuple(ImageRecord(i, Path(f"/data/{i}.jpg"), 480, 640, tuple(item(9 * i + k) for k in range(i % 9)))
                 for i in range(start, start + count))


def test_parts_and_columns():
    records = some(30)
    packed = Records.of(records)
    assert packed[-1] == records[-1] and packed[3:20:4] == records[3:20:4]
    order = np.random.default_rng(0).permutation(30).tolist()
    part = packed.take(order)
    assert part == tuple(records[i] for i in order)
    items = [(place, item) for place, i in enumerate(order) for item in records[i].annotations]
    table = part.table()
    assert part.image_of().tolist() == [place for place, _ in items]
    assert table["id"].tolist() == [item.id for _, item in items]
    assert table["box"].tolist() == [list(item.box) for _, item in items]
    assert [tuple(size) if sized else None for sized, size in zip(table["sized"], table["size"].tolist())] == [
        item.size for _, item in items]
    assert part.trainable().tolist() == [not item.crowd for _, item in items]
    with pytest.raises(IndexError):
        packed[30]


def test_no_images():
    packed = Records.of(())
    assert not packed and packed == () and packed.ids() == [] and len(packed.table()) == 0


def test_joined():
    parts = some(7), some(5, start=7), ()
    joined = Records.joined([Records.of(part).take(slice(1, None)) for part in parts])
    assert joined == parts[0][1:] + parts[1][1:]


def test_which_have_no_mask():
    records = some(5)
    bare = replace(records[3].annotations[1], segmentation=None)
    packed = Records.of((*records[:3], replace(records[3], annotations=(records[3].annotations[0], bare)), records[4]))
    assert packed.without_masks() == f"1 without, such as annotation {bare.id} of /data/3.jpg"
    assert packed.without_masks(packed.table()["id"] != bare.id) == "" == Records.of(records).without_masks()


@pytest.mark.parametrize("record", [ImageRecord(2**70, Path("a"), 1, 1), ImageRecord(1, Path("a"), 1, 1, (
    Annotation(1, 0, (0, 0, 1, 1), {"size": [1, 1], "counts": "\ud800"}),))])
def test_what_does_not_fit(record):
    with pytest.raises(ValueError, match="must be whole numbers below 2.63, and texts valid Unicode"):
        Records.of([record])


def test_a_data_set_packs_its_records():
    dataset = Dataset("some", "coco", tuple("abcde"), (1, 2, 3, 4, 5), some(4))
    assert isinstance(dataset.records, Records)
    again = replace(dataset, records=tuple(replace(record, id=record.id + 1) for record in dataset.records))
    assert isinstance(again.records, Records) and again.records.ids() == [1, 2, 3, 4]


def private_growth(records, epochs: int = 2) -> list[int]:
    """Bytes of its own that a process forked now has more after each epoch of looking at all records."""
    def private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))

    read, write = os.pipe()
    if (child := os.fork()) == 0:
        gc.disable()
        before, told = private(), []
        for epoch in range(epochs):
            for number in np.random.default_rng(epoch).permutation(len(records)):
                sum(item.label for item in records[number].annotations)
            told.append(private() - before)
        os.write(write, " ".join(map(str, told)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return [int(word) for word in pipe.read().split()]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux")
def test_workers_share_the_records():
    # In a process of its own: what other tests left behind in this one's memory would be counted, too.
    told = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True).stdout
    tuples, flat = json.loads(told)
    assert tuples[0] > 25e6, "else the test shows nothing"
    assert max(flat) < tuples[0] / 2 and flat[1] - flat[0] < 5e5  # Python writes some pages of its own


if __name__ == "__main__":
    as_tuple = some(20_000)
    as_arrays = Records.of(as_tuple)
    print(json.dumps([private_growth(as_tuple, epochs=1), private_growth(as_arrays)]))
