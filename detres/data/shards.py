"""Data sets as tar shards, as WebDataset writes them: for images that are too many for a disk or a file system.

    train-000000.tar     000000000.jpg  000000000.json  000000001.jpg ...: the image, and what is annotated in it
    train-000001.tar     ...
    train.index          where each image is, and all annotations (`index.save_records`): nothing is read at the start
    train.json           the categories, as in COCO

The JSON of an image is an entry of COCO's `images`, with its `annotations`; each of those has, besides COCO's keys,
the name of its `category`, `difficult`, and `corners`, its box as xyxy where that is not x, y, x + w, y + h to the last
bit. Shards without an index are scanned once. Of shards of others the same is read: an image, and a JSON that is
an object with `annotations`, or a list of them; size and ids may be missing. Other members (`.cls`, `.txt` ...) are not.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from detres.config import SourceConfig
from detres.data import coco, coco_json, index
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import IMAGE_SUFFIXES, open_image, read_file
from detres.data.masks import PNGSegment, compressed
from detres.data.problems import Problem, Problems
from detres.data.records import Records
from detres.data.shard_files import BLOCK, ShardImage, ShardStore, is_remote, local, system_of
from detres.progress import track

# Writing


def write_shards(dataset: Dataset, out: Path, name: str, shard_size: int, seed: int = 0, progress: bool = True
                 ) -> list[Path]:
    """Write a data set as shards of at most `shard_size` bytes each, and their index; the shards' paths.

    Images are shuffled first, so that a few shards are a fair sample. The same data, seed and size give the same bytes.
    Label maps are not written. Raises FileExistsError where the index is there already, and ImageError.
    """
    if (out / f"{name}.index").exists():
        raise FileExistsError(f"OUT must not have shards called {name} yet, got {out}. Give another folder.")
    out.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(dataset.records))
    writer = _Writer(out, name, shard_size)
    numbers = track(order.tolist(), len(order), "shard", lambda _: 1) if progress else order.tolist()
    records = [writer.add(place, dataset.records[number], dataset) for place, number in enumerate(numbers)]
    shards = writer.close()
    (out / f"{name}.json").write_text(json.dumps({"categories": _categories(dataset), "images": len(records)}))
    header = {"shards": [(shard.name, shard.stat().st_size) for shard in shards],
              "dataset": index.described(dataset)}
    index.save_records(out / f"{name}.index", header, Records.of(records))
    return shards


def write_splits(data: str, out: Path, images: str | None, shard_size: int, seed: int = 0
                 ) -> Iterator[tuple[str, int, list[Path]]]:
    """Write all splits of a data set; yields name, number of images and shards of each as it is done."""
    from detres.data.splits import find_splits  # it imports this module

    splits = find_splits(data, images)
    roles = [split.role for split in splits]
    for split in splits:
        dataset = split.load()
        name = split.role if roles.count(split.role) == 1 else re.sub(r"\W+", "_", split.name)
        yield name, len(dataset.records), write_shards(dataset, out, name, shard_size, seed)


class _Writer:
    """Fills one shard after another; each gets its name when it is whole."""

    def __init__(self, out: Path, name: str, shard_size: int):
        self.out, self.name, self.shard_size = out, name, shard_size
        self.shards: list[Path] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, place: int, record: ImageRecord, dataset: Dataset) -> ImageRecord:
        """The record of the image in its shard."""
        data = read_file(record.path)
        items = tuple(replace(item, segmentation=compressed(item.segmentation, record.height, record.width))
                      if isinstance(item.segmentation, PNGSegment) else item for item in record.annotations)
        record = replace(record, annotations=items, label_map=None)
        text = json.dumps(_entry(record, dataset), separators=(",", ":"), default=list).encode()
        if self.tar and _padded(self.tar.offset + sum(BLOCK + _padded(len(part), BLOCK) for part in (data, text))
                                + 2 * BLOCK) > self.shard_size:
            self.close()
        if not self.tar:
            self.shards.append(self.out / f"{self.name}-{len(self.shards):06}.tar")
            self.tar = tarfile.open(_part(self.shards[-1]), "w", format=tarfile.USTAR_FORMAT)
        name, offset = f"{place:09}{Path(str(record.path)).suffix.lower()}", self.tar.offset + BLOCK
        self._write(name, data)
        self._write(f"{place:09}.json", text)
        return replace(record, path=ShardImage(self.shards[-1].name, name, offset, len(data)))

    def _write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))

    def close(self) -> list[Path]:
        if self.tar:
            self.tar.close()
            os.replace(_part(self.shards[-1]), self.shards[-1])
        self.tar = None
        return self.shards


def _padded(size: int, to: int = tarfile.RECORDSIZE) -> int:
    """A member is padded to blocks, an archive, with two empty blocks at its end, to records."""
    return size + -size % to


def _part(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.part")


def _categories(dataset: Dataset) -> list[dict[str, Any]]:
    categories = [{"id": number, "name": name} for number, name in zip(dataset.category_ids, dataset.classes)]
    for category in categories:
        if category["name"] in dataset.keypoint_classes:
            category |= {"keypoints": dataset.keypoint_names, "skeleton": [(a + 1, b + 1) for a, b in dataset.skeleton]}
    return categories


def _entry(record: ImageRecord, dataset: Dataset) -> dict[str, Any]:
    """The JSON of an image."""
    return {"id": record.id, "file_name": Path(str(record.path)).name, "height": record.height, "width": record.width,
            "annotations": [_annotation(item, dataset) for item in record.annotations]}


def _annotation(item: Annotation, dataset: Dataset) -> dict[str, Any]:
    x1, y1, x2, y2 = item.box
    w, h = item.size or (x2 - x1, y2 - y1)
    entry = {"id": item.id, "category_id": dataset.category_ids[item.label], "category": dataset.classes[item.label],
             "bbox": [x1, y1, w, h], "area": item.area, "iscrowd": int(item.crowd)}
    if item.size is None or (x1 + w, y1 + h) != (x2, y2):
        entry["corners"] = item.box
    if item.segmentation:
        entry["segmentation"] = item.segmentation if isinstance(item.segmentation, dict) else list(
            map(list, item.segmentation))
    if item.keypoints:
        entry["keypoints"] = item.keypoints
    return entry | ({"difficult": True} if item.difficult else {})


# Reading

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
        file = _local_copy(store, f"{name}.index")
    except FileNotFoundError:
        return _scanned(store, name, shards, problems)
    header, records = index.map_records(file, store)
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
    system, path = _system(folder)
    try:
        return sorted(name.rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False))
    except Exception as error:
        raise FileNotFoundError(f"folder of shards must be readable, got {type(error).__name__}: {error} ({folder}). "
                                "Check it, or give a pattern such as train-{000000..000146}.tar.") from None


def _system(url: str) -> tuple[Any, str]:
    try:
        return system_of(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"URL of shards must be of a kind that fsspec reads, got {url} ({error}). Install what it "
                         "needs: pip install aiohttp for http, s3fs for s3.") from None


def _local_copy(store: ShardStore, name: str) -> Path:
    """A file that can be mapped. Raises FileNotFoundError."""
    if not is_remote(store.root):
        if not (file := Path(local(store.url(name)))).is_file():
            raise FileNotFoundError(file)
        return file
    system, path = _system(store.url(name))
    try:
        stamp = repr(sorted(system.info(path).items(), key=str))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"shards must be in reach, got {type(error).__name__}: {error} ({store.url(name)})") from None
    folder = index.cache_file("shards", store.url(name), stamp)
    file = folder or Path(tempfile.mkdtemp(prefix="detres-")) / "index"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        system.get_file(path, str(part))
        os.replace(part, file)
    return file


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
            raise ValueError(f"shard must have the {size} bytes that its index has, got {path.stat().st_size} ({path}). "
                             "Restore it, or delete the index if the shard was changed on purpose.")


# Shards without an index


def _scanned(store: ShardStore, name: str, shards: Sequence[str], problems: Problems) -> Dataset:
    """By reading all headers and JSON members, once: the index is kept in the cache."""
    stamps = [_stamp(store, shard) for shard in shards]
    kept = index.cache_file("shards", store.root, name, list(shards), stamps, index.code())
    with suppress(OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
        header, records = index.map_records(kept, store)
        problems.found += [Problem(*values) for values in header["problems"]]
        return Dataset(**header["dataset"], records=records)
    before = len(problems.found)
    dataset = _Scan(store, name, problems).read(shards)
    if kept:
        with suppress(OSError, OverflowError, UnicodeEncodeError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            told = [index.as_plain(problem) for problem in problems.found[before:]]
            index.save_records(kept, {"dataset": index.described(dataset), "problems": told}, dataset.records)
    return dataset


def _stamp(store: ShardStore, shard: str) -> Any:
    """Changes with the shard."""
    if is_remote(store.root):
        system, path = _system(store.url(shard))
        try:
            return repr(sorted(system.info(path).items(), key=str))
        except Exception as error:
            raise FileNotFoundError(f"shard must be in reach, got {type(error).__name__}: {error} ({store.url(shard)}). "
                                    "Check the pattern.") from None
    path = Path(local(store.url(shard)))
    if not path.is_file():
        raise FileNotFoundError(f"shard must exist, got none at {path}. Check the pattern.")
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@dataclass
class _Scan:
    """Makes a COCO file's entries of the members of shards, and has them checked as such."""

    store: ShardStore
    name: str
    problems: Problems
    images: dict[Any, ImageRecord | None] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def read(self, shards: Sequence[str]) -> Dataset:
        for shard in shards:
            self._shard(shard)
        file = Path(self.store.url(f"{self.name}.tar"))
        categories = coco.parse_categories(self._categories(), file, self.problems)
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        names, pairs, skeleton = coco._keypoints(categories, file, self.problems)
        reader = coco._Reader(file, self.problems, self.images, label_of, frozenset(), len(names))
        found = reader.read(self.annotations)
        corners = {entry["id"]: entry for entry in self.annotations if "corners" in entry or "difficult" in entry}
        records = tuple(replace(image, annotations=tuple(_exact(item, corners.get(item.id, {}))
                                                         for item in found.get(image.id, ())))
                        for image in self.images.values())
        classes = [category for category in categories if category.get("keypoints")]
        return Dataset(self.name, "coco", tuple(category["name"] for category in categories),
                       tuple(category["id"] for category in categories), records, names, pairs, skeleton=skeleton,
                       keypoint_classes=tuple(category["name"] for category in classes))

    def _shard(self, shard: str) -> None:
        url, members = self.store.url(shard), {}
        try:
            system, path = _system(url)
            with system.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    members.setdefault(f"{folder}/{key}" if folder else key, {})[f".{kind.lower()}"] = (
                        member, tar.extractfile(member).read() if kind.lower() == "json" else None)
                for key, files in members.items():
                    self._image(shard, key, files, tar)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"shard must be a whole tar archive, got {type(error).__name__}: {error} ({url}). "
                             "Restore it, or leave it out.") from None

    def _image(self, shard: str, key: str, files: dict[str, Any], tar: tarfile.TarFile) -> None:
        images = [kind for kind in files if kind in IMAGE_SUFFIXES]
        if not images:
            return
        member, place = files[images[0]][0], self.store.url(shard)
        try:
            content = msgspec.json.decode(files[".json"][1]) if ".json" in files else None
        except msgspec.DecodeError as error:
            content = str(error)
        content = {"annotations": content} if isinstance(content, list) else content
        if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
            self.problems.add(place, key, None, "json", content, "must be an object with annotations, or a list of them "
                              "(as COCO's)", "bad_image", member.name)
            return
        path = ShardImage(shard, member.name, member.offset_data, member.size, self.store)
        image_id = content["id"] if coco.is_id(content.get("id")) or isinstance(content.get("id"), str) else key
        if image_id in self.images:
            self.problems.add(place, image_id, None, "id", image_id, "must differ from other images' (give it another)",
                              "duplicate_image", member.name)
            return
        size = content.get("height"), content.get("width")
        if not all(type(side) is int and side > 0 for side in size):
            size = open_image(tar.extractfile(member).read(), str(path)).shape[:2]
        self.images[image_id] = ImageRecord(image_id, path, *size)
        for entry in content["annotations"]:
            entry = dict(entry) if isinstance(entry, dict) else {}
            entry.setdefault("id", len(self.annotations) + 1)
            self.annotations.append(coco_json.pack(entry | {"image_id": image_id}))

    def _categories(self) -> list[dict[str, Any]]:
        """Of the JSON file beside the shards; else those that annotations name, whose ids go by their names where
        there are none."""
        with suppress(FileNotFoundError):
            return json.loads(_local_copy(self.store, f"{self.name}.json").read_bytes())["categories"]
        names = {entry["category"] for entry in self.annotations if isinstance(entry.get("category"), str)}
        number = {name: place for place, name in enumerate(sorted(names), 1)}
        for entry in self.annotations:
            entry.setdefault("category_id", number.get(entry.get("category")))
        named = {entry["category_id"]: entry["category"] for entry in self.annotations if entry.get("category") in names}
        if not named:
            raise ValueError(f"annotations in shards must have a category, its name, got none ({self.store.root}). Add "
                             f"it, or {self.name}.json with COCO's categories beside the shards.")
        return [{"id": number, "name": name} for number, name in named.items()]


def _exact(item: Annotation, entry: dict[str, Any]) -> Annotation:
    corners = entry.get("corners")
    box = {"box": tuple(corners), "size": None} if isinstance(corners, list) and len(corners) == 4 else {}
    return replace(item, difficult=entry.get("difficult") is True, **box)
