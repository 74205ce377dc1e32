"""Which images are in which split: joined, chosen at random or by name, split anew by class and in groups.

Legend: U units (groups of images that stay together), K classes, P parts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from detres.data.check.lookalikes import find_lookalikes, thumbnail
from detres.data.coco import role_of
from detres.data.convert.classes import unified
from detres.data.convert.lost import Losses
from detres.data.convert.parts import Part
from detres.data.dataset import Dataset, ImageRecord
from detres.data.images import read_image

SAME = 0.01  # pixels that boxes of one object may differ by: what formats round


def joined(parts: Sequence[Part], name: str = "train") -> Part:
    """One part of several of the same classes."""
    first = parts[0]
    if len(parts) == 1:
        return replace(first, name=name)
    if bool(first.semantic) and len({part.semantic.classes for part in parts if part.semantic}) > 1:
        raise ValueError("joined data sets must have the same classes of label maps. Convert them one by one.")
    if len(names := {part.dataset.keypoint_names for part in parts if part.dataset.keypoint_names}) > 1:
        raise ValueError(f"joined data sets must have the same keypoints, got {len(names)} lists of them. Convert one "
                         "to a format without keypoints first.")
    posed = next((part.dataset for part in parts if part.dataset.keypoint_names), first.dataset)
    records = tuple(record for part in parts for record in part.dataset.records)
    dataset = replace(posed, records=records, extra=first.dataset.extra, keypoint_classes=tuple(dict.fromkeys(
        name for part in parts for name in part.dataset.keypoint_classes)))
    semantic = first.semantic and replace(first.semantic, records=tuple(
        record for part in parts for record in part.semantic.records))
    return Part(name, dataset, semantic)


def merged(data_sets: Sequence[Sequence[Part]], losses: Losses) -> list[Part]:
    """Splits of the same name, or for the same purpose, joined. An image file that is listed twice becomes one image
    with the objects of both, of which equal ones count once."""
    named = [{name for part in own for name in part.dataset.classes} for own in data_sets]
    losses.change("classes differ: {} are annotated in some of the data sets only, and are background in the images of "
                  "others", len(set.union(*named) - set.intersection(*named)))
    parts = unified([part for own in _by_role(data_sets, losses) for part in own])
    names = list(dict.fromkeys(part.name for part in parts))
    found = [joined([part for part in parts if part.name == name], name) for name in names]
    losses.lose("sections such as info are those of the first data set: those of {} others left out",
                sum(_other_sections([part for part in parts if part.name == name]) for name in names))
    _tell_copies([record for part in found for record in part.dataset.records], losses)
    return [_without_doubles(part, losses) for part in found]


def _by_role(data_sets: Sequence[Sequence[Part]], losses: Losses) -> list[list[Part]]:
    """With splits called train, val or test, where data sets differ in their names, and each has but one for it."""
    if len({frozenset(part.name for part in own) for own in data_sets}) == 1:
        return [list(own) for own in data_sets]
    found = [_called_by_role(own) for own in data_sets]
    names = {old.name: new.name for own, called in zip(data_sets, found) for old, new in zip(own, called)
             if old.name != new.name}
    told = ", ".join(f"{old} is {new}" for old, new in names.items()).replace("{", "{{").replace("}", "}}")
    losses.change(f"{{}} splits have another name, so that they join: {told}", len(names))
    return found


def _called_by_role(parts: Sequence[Part]) -> list[Part]:
    roles = [role_of(part.name) for part in parts]
    return [replace(part, name=role) if role and roles.count(role) == 1 else part for part, role in zip(parts, roles)]


def _other_sections(parts: Sequence[Part]) -> int:
    """Of how many the sections beside images, annotations and categories are not those of the first."""
    first, *others = ({key: value for key, value in (part.dataset.extra or {}).items() if key != "categories"}
                      for part in parts)
    return sum(bool(own) and own != first for own in others)


def _without_doubles(part: Part, losses: Losses) -> Part:
    places: dict[object, list[int]] = defaultdict(list)
    for i, record in enumerate(part.dataset.records):
        places[_file(record)].append(i)
    twice = len(part.dataset.records) - len(places)
    losses.change("{} images are listed more than once: their objects are joined", twice)
    if not twice:
        return part
    records = [_joined_record([part.dataset.records[i] for i in own], losses) for own in places.values()]
    return part.with_records(records, [own[0] for own in places.values()])


def _file(record: ImageRecord) -> object:
    """What is equal for the same file; an image in a shard is none."""
    return record.path.resolve() if isinstance(record.path, Path) else record.path


def _joined_record(records: Sequence[ImageRecord], losses: Losses) -> ImageRecord:
    items = [item for record in records for item in record.annotations]
    of_record = np.repeat(range(len(records)), [len(record.annotations) for record in records])
    rows = np.array([(1e6 * item.label, 1e6 * item.crowd, *item.box) for item in items]).reshape(-1, 6)
    same = (np.abs(rows[:, None] - rows).max(2, initial=0) < SAME) & (of_record < of_record[:, None])
    losses.change("{} objects of these are the same and counted once", same.any(1).sum())
    return replace(records[0], annotations=tuple(item for item, known in zip(items, same.any(1)) if not known))


def _tell_copies(records: Sequence[ImageRecord], losses: Losses) -> None:
    """Counts files that hold the same bytes as another."""
    copies = Counter(contents({file for file in map(_file, records) if isinstance(file, Path)}).values())
    losses.change("{} image files have the content of another: both are kept",
                  sum(count - 1 for count in copies.values()))


def contents(paths: set[Path]) -> dict[Path, str]:
    """What tells the content of files apart; files of a size that no other has are not read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        by_size[path.stat().st_size].append(path)
    return {path: hashlib.blake2b(path.read_bytes()).hexdigest() if len(own) > 1 else str(path)
            for own in by_size.values() for path in own}


# Subsets


def subset(parts: Sequence[Part], count: int | None = None, ids: Sequence[str] = (), with_objects: bool = False,
           seed: int = 0) -> list[Part]:
    """Of each split the images of `ids` (ids or file names, with or without the suffix), those that have objects, and
    of these `count` at random, in their order. Raises ValueError for ids that no split has."""
    missing = set(ids) - {key for part in parts for record in part.dataset.records for key in _keys(record)}
    if missing:
        raise ValueError(f"image must be in the data set, got {len(missing)} that are not, such as "
                         f"'{sorted(missing)[0]}'. Give ids, or names of files.")
    wanted, found = set(ids), []
    for part in parts:
        records = part.dataset.records
        keep = [i for i, record in enumerate(records) if (not ids or not wanted.isdisjoint(_keys(record)))
                and (record.annotations or not with_objects)]
        if count is not None and count < len(keep):
            keep = sorted(np.random.default_rng(seed).choice(keep, count, replace=False).tolist())
        found.append(part.with_records((records[i] for i in keep), keep))
    return [part for part in found if len(part.dataset.records)] or found[:1]


def _keys(record: ImageRecord) -> tuple[str, str, str]:
    return str(record.id), Path(record.path.name).name, record.path.stem


# Splits


def split(part: Part, sizes: Mapping[str, float | None], group_by: str | None = None, lookalikes: bool = False,
          seed: int = 0, losses: Losses | None = None) -> list[Part]:
    """New splits of these sizes: a fraction below 1, a number of images, or None for the rest.

    Each gets its share of every class as well as that is possible (Sechidis, Tsoumakas and Vlahavas 2011). Images whose
    names agree in the regular expression `group_by` (in its first group, if it has one) stay together, as do, with
    `lookalikes`, pictures that look the same (`check.lookalikes`). Then sizes are met as groups allow; what is
    in none of them is told to `losses`. Raises ValueError for a split that no group fits in.
    """
    records = part.dataset.records
    groups = _groups(records, group_by, lookalikes)
    wanted = _numbers(sizes, len(records))
    assigned = stratified(_counts(part.dataset, groups), np.bincount(groups), np.array(list(wanted.values())), seed)
    of_image = assigned[groups]
    keeps = {name: np.flatnonzero(of_image == k).tolist() for k, name in enumerate(wanted)}
    if empty := [name for name, keep in keeps.items() if not keep]:
        units = int(groups.max(initial=-1)) + 1
        raise ValueError(f"splits must have an image at least, got none for {', '.join(empty)} of {len(records)} "
                         f"images in {units} group{'s'[:units != 1]}. Change --parts, or how images are grouped.")
    if losses:
        losses.change("{} images are in none of the splits (a name without a size in --parts gets the rest)",
                    len(records) - sum(map(len, keeps.values())))
    return [replace(part.with_records((records[i] for i in keep), keep), name=name) for name, keep in keeps.items()]


def _numbers(sizes: Mapping[str, float | None], images: int) -> dict[str, int]:
    """Images of each split. Raises ValueError for sizes that do not go into the whole."""
    exact = {name: size * images if size is not None and size < 1 else size for name, size in sizes.items()}
    given = sum(size for size in exact.values() if size is not None)
    rest = [name for name, size in exact.items() if size is None]
    if len(rest) > 1 or given > images + 1e-6 or any(size is not None and size <= 0 for size in sizes.values()):
        raise ValueError(f"sizes of splits must be fractions that add up to at most 1, or numbers of at most {images} "
                         f"images in all, and one may be the rest, got {dict(sizes)}. Correct --parts.")
    exact |= {name: images - given for name in rest}
    found = {name: int(size + 1e-9) for name, size in exact.items()}
    short = round(sum(exact.values())) - sum(found.values())
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[:short]:  # the largest remainders
        found[name] += 1
    return found


def _groups(records: Sequence[ImageRecord], pattern: str | None, lookalikes: bool) -> np.ndarray:
    """(N,) the unit of each image, 0 to U - 1."""
    keys = [_key(record, pattern, i) for i, record in enumerate(records)]
    if pattern and records and all(key.startswith("i ") for key in keys):
        raise ValueError(f"--group-by must match names of files, got {pattern!r}, which is in none of {len(records)}, "
                         f"such as {records[0].path.name!r}. Correct it.")
    if lookalikes:
        keys = _united(keys, _like(records))
    return np.unique(keys, return_inverse=True)[1].reshape(-1)


def _key(record: ImageRecord, pattern: str | None, place: int) -> str:
    match = pattern and re.search(pattern, record.path.name)
    return f"g {match[1] if match.re.groups else match[0]}" if match else f"i {place}"


def _like(records: Sequence[ImageRecord]) -> np.ndarray:
    """(N,) the first image that each looks like, or itself. Raises ImageError for one that cannot be read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        thumbnails = list(pool.map(lambda record: thumbnail(read_image(record.path)), records))
    first, _ = find_lookalikes(np.stack(thumbnails), np.zeros(len(records), int))
    return np.where(first < 0, np.arange(len(records)), first)


def _united(keys: Sequence[str], earlier: Sequence[int]) -> list[str]:
    """The keys, made one with that of the earlier place, of each place."""
    above: dict[str, str] = {}

    def root(key: str) -> str:
        while key in above:
            key = above[key]
        return key

    for key, place in zip(keys, earlier):
        one, other = root(key), root(keys[place])
        if one != other:
            above[one] = other
    return [root(key) for key in keys]


def _counts(dataset: Dataset, groups: np.ndarray) -> np.ndarray:
    """(U, K) objects of each class."""
    found = np.zeros((groups.max(initial=-1) + 1, len(dataset.classes)))
    table = dataset.records.table()
    np.add.at(found, (groups[dataset.records.image_of()], table["label"]), 1)
    return found


def stratified(counts: np.ndarray, images: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """(U,) the part of each unit, P for none, from its objects of each class `counts` (U, K) and images (U,).

    The class with the fewest units left goes first; each of its units goes to the part that still wants the most of the
    class, then the most images, among those that it fits in.
    """
    rng = np.random.default_rng(seed)
    total = images.sum()
    sizes = np.append(sizes, max(total - sizes.sum(), 0)).astype(float)  # the last: in no part
    wants = sizes[:, None] / max(total, 1) * counts.sum(0)  # (P + 1, K)
    space, assigned = sizes.copy(), np.full(len(counts), -1)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-images[order], kind="stable")]  # large groups first: they fit worst
    while (left := assigned < 0).any():
        having = (counts[left] > 0).sum(0)
        rarest = int(np.where(having > 0, having, len(counts) + 1).argmin()) if (having > 0).any() else None
        units = [u for u in order if left[u] and (rarest is None or counts[u, rarest] > 0)]
        for unit in units:
            want = wants[:, rarest] if rarest is not None else space
            fits = space >= images[unit]
            keys = np.lexsort((space, want, fits) if fits.any() else (want, space))
            part = int(keys[-1])
            assigned[unit] = part
            wants[part] -= counts[unit]
            space[part] -= images[unit]
    return assigned
