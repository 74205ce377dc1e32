"""Data sets as tar shards, as WebDataset writes them: for images that are too many for a disk or a file system.

    train-000000.tar     000000000.jpg  000000000.json  000000001.jpg ...: the image, and what is annotated in it
    train-000001.tar     ...
    train.index          where each image is, and all annotations (`index.save_records`): nothing is read at the start
    train.json           the categories, as in COCO

The JSON of an image is an entry of COCO's `images`, with its `annotations`; each of those has, besides COCO's keys,
the name of its `category`, `difficult`, and `corners`, its box as xyxy where that is not x, y, x + w, y + h to the last
bit. Shards without an index are scanned once. Of shards of others the same is read: an image, and a JSON that is
an object with `annotations`, or a list of them; size and ids may be missing. Other members (`.cls`, `.txt`) are not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from detres.config import SourceConfig
from detres.data import coco, index
from detres.data.cache import cache_file
from detres.data.dataset import Dataset
from detres.data.problems import Problem, Problems
from detres.data.shard_files import ShardStore, is_remote, local, local_copy, stamp, system_of
from detres.data.shard_scan import Scan

_SHARD = re.compile(r"(.*?)[-_]?\d{5,}\.tar")  # the name of one of several
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_source(path: str) -> bool:
    """Whether a path means shards: a URL, a pattern such as train-{000000..000146}.tar, an index, or a folder of
    them."""
    if is_remote(path) or path.startswith("file://") or _BRACES.search(path) or path.endswith((".tar", ".index")):
        return True
    folder = Path(path).expanduser()
    return folder.is_dir() and any(name.endswith(".index") or _SHARD.fullmatch(name) for name in os.listdir(folder))


def read_shards(source: SourceConfig, role: str, problems: Problems) -> Dataset:
    """The data set of a role or split in a folder of shards, or of the shards that a pattern names; what is wrong with
    its annotations is added to `problems`. Raises FileNotFoundError, and ValueError for damaged files."""
    root, name, shards = _find(source.path, role, source.split)
    dataset = _read(source, root, name, shards, problems)
    problems.located.append((dataset, lambda item: (f"{root}/{name}", item.id, "")))
    return dataset


def _read(source: SourceConfig, root: str, name: str, shards: Sequence[str], problems: Problems) -> Dataset:
    store = ShardStore(root, source.shard_cache, int(source.shard_cache_gb * 1e9))
    try:
        file = local_copy(store, f"{name}.index")
    except FileNotFoundError:
        if not shards:  # the index was asked for
            raise
        return _scanned(store, name, shards, problems)
    header, records = index.map_records(file, store, store.url(f"{name}.index"))
    sizes = dict(header["shards"])
    _check_sizes(store, {shard: size for shard, size in sizes.items() if not shards or shard in shards})
    if shards:
        blocks = [block for block, shard in enumerate(sizes) if shard in shards]
        records = records.take(np.isin(records.images["block"], blocks))
    return Dataset(**header["dataset"], records=records)


def split_names(path: str) -> list[str]:
    """Of all splits at a path."""
    path = path.rstrip("/")
    if path.endswith((".index", ".tar")):
        return [_find(path, "train", None)[1]]
    return _splits(_listed(path))


def _splits(names: Sequence[str]) -> list[str]:
    """Of a folder with these files."""
    indices = {name.removesuffix(".index") for name in names if name.endswith(".index")}
    return sorted(indices | {_prefix(name) for name in names if _SHARD.fullmatch(name)})


def _find(path: str, role: str, split: str | None) -> tuple[str, str, list[str]]:
    """Folder, name of the split, and names of shards; none: those of the index."""
    path = path if is_remote(path) else str(Path(local(path)).expanduser())
    root, _, last = path.rstrip("/").rpartition("/")
    if last.endswith(".index"):
        return root, last.removesuffix(".index"), []
    if last.endswith(".tar"):
        names = _expanded(last)
        return root, _prefix(names[0]), names
    names = _listed(path)
    splits = _splits(names)
    chosen = [name for name in splits if coco.names_split(Path(name), role, split)]
    chosen = chosen or splits * (len(splits) == 1 and split is None)
    if len(chosen) != 1:
        raise FileNotFoundError(f"shards must have one split for '{split or role}', got {splits} ({path}). Give its "
                                "name as split, or its index as path.")
    shards = [name for name in names if _SHARD.fullmatch(name) and _prefix(name) == chosen[0]]
    return path, chosen[0], [] if f"{chosen[0]}.index" in names else shards


def _prefix(shard: str) -> str:
    match = _SHARD.fullmatch(shard)
    return (match[1] if match else shard.removesuffix(".tar")) or "shards"


def _expanded(pattern: str) -> list[str]:
    """train-{000000..000002}.tar -> three names."""
    if not (match := _BRACES.search(pattern)):
        return [pattern]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [name for number in numbers for name in _expanded(
        f"{pattern[:match.start()]}{number:0{len(match[1])}}{pattern[match.end():]}")]


def _listed(folder: str) -> list[str]:
    """Names of files. Raises FileNotFoundError."""
    system, path = system_of(folder)
    try:
        return sorted(name.rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False))
    except Exception as error:
        raise FileNotFoundError(f"folder of shards must be readable, got {type(error).__name__}: {error} ({folder}). "
                                "Check it, or give a pattern such as train-{000000..000146}.tar.") from None


def _check_sizes(store: ShardStore, sizes: dict[str, int]) -> None:
    """Of shards on a disk; others are found out when they are read."""
    if is_remote(store.root):
        return
    for shard, size in sizes.items():
        path = Path(local(store.url(shard)))
        if not path.is_file():
            raise FileNotFoundError(f"shard must exist, got none at {path}, which its index has. Restore it, or delete "
                                    "the index to read the shards that are there.")
        if path.stat().st_size != size:
            raise ValueError(f"shard must have the {size} bytes that its index has, got {path.stat().st_size} "
                             f"({path}). Restore it, or delete the index if the shard was changed on purpose.")


# Without an index


def _scanned(store: ShardStore, name: str, shards: Sequence[str], problems: Problems) -> Dataset:
    """By reading all headers and JSON members, once: the index is kept in the cache."""
    stamps = [stamp(store.url(shard)) for shard in shards]
    kept = cache_file("shards", store.root, name, list(shards), stamps, index.code())
    with suppress(OSError, ValueError, KeyError, TypeError):
        header, records = index.map_records(kept, store)
        problems.found += [Problem(*values) for values in header["problems"]]
        return Dataset(**header["dataset"], records=records)
    before = len(problems.found)
    dataset = Scan(store, name, problems).read(shards)
    if kept:
        with suppress(OSError, OverflowError, UnicodeEncodeError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            told = [index.as_plain(problem) for problem in problems.found[before:]]
            index.save_records(kept, {"dataset": index.described(dataset), "problems": told}, dataset.records)
    return dataset
