"""Splits, joins and subsets: reproducible, by class, in groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detres.data.convert.lost import Losses
from detres.data.convert.parts import Part
from detres.data.convert.sets import contents, merged, split, stratified, subset
from detres.data.dataset import Annotation, Dataset, ImageRecord


def part(folder, rows, classes=("a", "b"), name="train", ids=None):
    """`rows`: file name and labels of each image."""
    records = []
    for i, (file, labels) in enumerate(rows):
        if not (folder / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (len(list(folder.rglob("*.png"))), 0, 0)).save(folder / file)
        items = tuple(Annotation(n, label, (n, 0, n + 5, 5)) for n, label in enumerate(labels, 1))
        records.append(ImageRecord(i, folder / file, 20, 20, items))
    return Part(name, Dataset("d", "coco", classes, ids or tuple(range(1, len(classes) + 1)), tuple(records)))


def names(part):
    return [record.path.name for record in part.dataset.records]


class TestSplit:
    def test_every_image_is_in_one_part_in_its_order_and_the_same_every_time(self, tmp_path):
        whole = part(tmp_path, [(f"{i:02}.png", [i % 2]) for i in range(20)])
        first = split(whole, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=3)
        assert [(one.name, len(one.dataset.records)) for one in first] == [("train", 14), ("val", 4), ("test", 2)]
        assert sorted(name for one in first for name in names(one)) == names(whole)
        assert all(names(one) == sorted(names(one)) for one in first)
        again, other = (split(whole, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=seed) for seed in (3, 4))
        assert [names(one) for one in first] == [names(one) for one in again] != [names(one) for one in other]

    @pytest.mark.parametrize("sizes, counts", (({"val": 5, "train": None}, (5, 15)), ({"a": 0.33, "b": 0.33}, (7, 6)),
                                               ({"a": 3}, (3,)), ({"a": 0.5, "b": 0.5}, (10, 10))))
    def test_sizes(self, tmp_path, sizes, counts):
        whole = part(tmp_path, [(f"{i:02}.png", []) for i in range(20)])
        assert tuple(len(one.dataset.records) for one in split(whole, sizes)) == counts

    @pytest.mark.parametrize("sizes", ({"a": 0.8, "b": 0.3}, {"a": 21}, {"a": None, "b": None}, {"a": -1.0}))
    def test_sizes_that_do_not_go_into_the_whole(self, tmp_path, sizes):
        with pytest.raises(ValueError, match="sizes of splits must be"):
            split(part(tmp_path, [(f"{i:02}.png", []) for i in range(20)]), sizes)

    def test_rare_classes_are_on_both_sides(self, tmp_path):
        """Ten images of a class in 100: a random split in 9 to 1 has none in val every third time."""
        whole = part(tmp_path, [(f"{i:02}.png", [1] if i % 10 == 0 else [0]) for i in range(100)])
        for seed in range(10):
            train, val = split(whole, {"train": 0.9, "val": 0.1}, seed=seed)
            assert sum(item.label for _, item in val.objects()) == 1

    def test_groups_stay_together(self, tmp_path):
        whole = part(tmp_path, [(f"v{i // 4}_{i % 4}.png", [i % 3 % 2]) for i in range(40)])
        parts = split(whole, {"train": 0.7, "val": 0.3}, group_by=r"(v\d+)_")
        videos = [{name.split("_")[0] for name in names(one)} for one in parts]
        assert videos[0].isdisjoint(videos[1]) and len(videos[0] | videos[1]) == 10
        assert abs(len(parts[1].dataset.records) - 12) <= 4

    @pytest.mark.parametrize("pattern, reason", (("frame", "got 'frame', which is in none of 4, such as '0.png'"),
                                                 ("png", "got none for train of 4 images in 1 group")))
    def test_groups_that_do_not_divide(self, tmp_path, pattern, reason):
        whole = part(tmp_path, [(f"{i}.png", []) for i in range(4)])
        with pytest.raises(ValueError, match=reason):
            split(whole, {"train": 0.5, "val": 0.5}, group_by=pattern)

    def test_what_is_in_no_split_is_told(self, tmp_path):
        losses = Losses()
        split(part(tmp_path, [(f"{i}.png", []) for i in range(10)]), {"train": 0.8}, losses=losses)
        assert losses.lines()[0].startswith("changed: 2 images are in none of the splits")

    def test_pictures_that_look_the_same_stay_together(self, tmp_path):
        rng = np.random.default_rng(0)
        for i in range(6):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64))
            picture.save(tmp_path / f"{i}.png")
            picture.resize((40, 40)).save(tmp_path / f"{i + 6}.png")
        whole = part(tmp_path, [(f"{i}.png", []) for i in range(12)])
        first, second = split(whole, {"a": 0.5, "b": 0.5}, lookalikes=True)
        assert {int(name[:-4]) % 6 for name in names(first)}.isdisjoint(int(name[:-4]) % 6 for name in names(second))

    @given(st.integers(0, 2**32 - 1), st.integers(5, 80), st.integers(1, 6), st.integers(2, 4))
    @settings(max_examples=60, deadline=None)
    def test_sizes_are_met_whatever_the_classes(self, seed, units, classes, parts):
        rng = np.random.default_rng(seed)
        counts = rng.poisson(rng.random(classes) * 2, (units, classes)).astype(float)
        sizes = np.diff([0, *sorted(rng.choice(np.arange(1, units), parts - 1, replace=False)), units])
        assigned = stratified(counts, np.ones(units, int), sizes, seed)
        assert np.bincount(assigned, minlength=parts).tolist() == [*sizes]

    def test_shares_of_classes_are_nearer_than_at_random(self):
        rng = np.random.default_rng(0)
        counts = rng.poisson(rng.gamma(0.3, 2, 30), (500, 30)).astype(float)
        counts = counts[:, counts.sum(0) > 4]

        def error(assigned):
            share = counts[assigned == 1].sum(0) / counts.sum(0)
            return np.abs(share - 0.2).mean()

        found = error(stratified(counts, np.ones(500, int), np.array([400, 100]), 0))
        chance = np.mean([error(rng.permutation(np.arange(500) % 5 == 0).astype(int)) for _ in range(20)])
        assert found < chance / 3


class TestMerge:
    def test_classes_by_name(self, tmp_path):
        one = part(tmp_path, [("x/1.png", [0, 1])], ("a", "b"), ids=(3, 5))
        two = part(tmp_path, [("y/1.png", [0, 1])], ("b", "c"), ids=(5, 3))
        [whole] = merged([[one], [two]], Losses())
        assert whole.dataset.classes == ("a", "b", "c") and whole.dataset.category_ids == (3, 5, 6)
        assert [whole.dataset.classes[item.label] for _, item in whole.objects()] == ["a", "b", "b", "c"]

    def test_sections_of_others_are_told(self, tmp_path):
        sets = [[part(tmp_path, [(f"{name}.png", [])])] for name in "abc"]
        sets = [[replace(own, dataset=replace(own.dataset, extra={"info": info, "categories": [{}, {}]}))]
                for [own], info in zip(sets, (1, 1, 2))]
        losses = Losses()
        merged(sets, losses)
        assert [(count, "sections" in text) for text, count in losses.lost.items()] == [(1, True)]

    def test_splits_by_name(self, tmp_path):
        sets = [[part(tmp_path, [(f"{i}/{name}.png", [])], name=name) for name in own]
                for i, own in enumerate((("train", "val"), ("val", "test")))]
        assert [(one.name, len(one.dataset.records)) for one in merged(sets, Losses())] == [
            ("train", 1), ("val", 2), ("test", 1)]

    def test_splits_for_the_same_purpose(self, tmp_path):
        """Under its name, if the data sets have others for them."""
        sets = [[part(tmp_path, [(f"{i}/{name}.png", [])], name=name) for name in own]
                for i, own in enumerate((("train2017",), ("balloon_train", "val_x")))]
        losses = Losses()
        assert [(one.name, len(one.dataset.records)) for one in merged(sets, losses)] == [("train", 2), ("val", 1)]
        assert losses.lines() == ["changed: 3 splits have another name, so that they join: train2017 is train, "
                                  "balloon_train is train, val_x is val"]

    def test_two_splits_for_a_purpose_keep_their_names(self, tmp_path):
        sets = [[part(tmp_path, [(f"{i}/{name}.png", [])], name=name) for name in own]
                for i, own in enumerate((("train_a", "train_b"), ("train",)))]
        assert [one.name for one in merged(sets, Losses())] == ["train_a", "train_b", "train"]

    def test_an_image_that_is_listed_twice(self, tmp_path):
        one, two = part(tmp_path, [("1.png", [0]), ("2.png", [0])]), part(tmp_path, [("2.png", [0, 1]), ("3.png", [])])
        losses = Losses()
        [whole] = merged([[one], [two]], losses)
        assert names(whole) == ["1.png", "2.png", "3.png"]
        assert [len(record.annotations) for record in whole.dataset.records] == [1, 2, 0]
        assert losses.lines() == ["changed: 1 images are listed more than once: their objects are joined",
                                  "changed: 1 objects of these are the same and counted once"]

    def test_copies_are_told(self, tmp_path):
        one, two = part(tmp_path, [("x/1.png", []), ("x/2.png", [])]), part(tmp_path, [("y/1.png", [])])
        (tmp_path / "y/1.png").write_bytes((tmp_path / "x/1.png").read_bytes())
        losses = Losses()
        merged([[one], [two]], losses)
        assert losses.lines() == ["changed: 1 image files have the content of another: both are kept"]


class TestSubset:
    def test_so_many_at_random_in_their_order(self, tmp_path):
        whole = part(tmp_path, [(f"{i:02}.png", [0]) for i in range(20)])
        [first], [again], [other] = (subset([whole], 5, seed=seed) for seed in (0, 0, 1))
        assert len(names(first)) == 5 and names(first) == sorted(names(first)) == names(again) != names(other)
        assert names(subset([whole], 50)[0]) == names(whole)

    def test_by_id_or_name(self, tmp_path):
        whole = part(tmp_path, [(f"x{i}.png", []) for i in range(6)])
        assert names(subset([whole], ids=["3", "x1", "x5.png"])[0]) == ["x1.png", "x3.png", "x5.png"]
        with pytest.raises(ValueError, match="got 1 that are not, such as 'x9'"):
            subset([whole], ids=["3", "x9"])

    def test_with_objects_only(self, tmp_path):
        whole = part(tmp_path, [("1.png", [0]), ("2.png", [])])
        assert names(subset([whole], with_objects=True)[0]) == ["1.png"]


def test_content_is_compared_for_files_of_the_same_size_only(tmp_path):
    for name, text in (("a", "12"), ("b", "12"), ("c", "13"), ("d", "123")):
        (tmp_path / name).write_text(text)
    found = contents({tmp_path / name for name in "abcd"})
    assert found[tmp_path / "a"] == found[tmp_path / "b"] and len(set(found.values())) == 3
