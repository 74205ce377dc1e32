"""Annotations that were read once, kept in a file that the next start maps: train2017 of COCO in a second.

A file of the cache is used only if nothing changed that reading depends on: the annotation file (size, times, inode),
the options, the list of files in each folder of images, which folder that is, and detres' own code. What was found to
be wrong is kept, too, and told again. Small files are not kept: they are read at once.

The files are in the folder `index` of the cache (`data.cache`), which is kept below LIMIT by deleting what was not used
for longest. Nothing in them is executable: a header in MessagePack, and arrays of fixed types (`save_records`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from detres.data.cache import cache_file, make_room, replacing
from detres.data.dataset import Annotation, Dataset
from detres.data.problems import Problem, Problems
from detres.data.records import ANNOTATION, IMAGE, Records, decode, encode, plain
from detres.data.shard_files import ShardStore

log = logging.getLogger("detres")

LEAST = 4 * 2**20  # bytes of an annotation file: below, reading takes a moment
LIMIT = 20 * 2**30  # bytes of the cache
SETTLED = 2.0  # seconds: a file changed more recently may change again within the same tick of its clock


@dataclass
class ImageFiles:
    """Which files there are, by listing each folder once: quick for many files on slow disks. Reading an annotation
    file depends on them, and on which `folder` has images of the names in `sample`."""

    listed: dict[Path, set[str]] = field(default_factory=dict)
    sample: list[list[str]] = field(default_factory=list)  # names that each may have
    folder: Path | None = None

    def __call__(self, path: Path) -> bool:
        """Whether the file exists."""
        if path.parent not in self.listed:
            self.listed[path.parent] = _names(path.parent)
        return path.name in self.listed[path.parent]


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


@dataclass(frozen=True)
class Places:
    """Where annotations are in their file: `numbers` of the entries with `ids`."""

    file: Path
    ids: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, file: Path, numbers: dict[int, int]) -> Places:
        return cls(file, np.fromiter(numbers, np.int64), np.fromiter(numbers.values(), np.int64))

    def __call__(self, annotation: Annotation) -> tuple[str, int, str]:
        """File, id and place there."""
        return str(self.file), annotation.id, f"annotations[{self.at([annotation.id])[0]}]"

    def at(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.numbers[self._order[np.searchsorted(self.ids, ids, sorter=self._order)]]

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids)


Read = Callable[[ImageFiles], tuple[Dataset, Problems]]


def cached(file: Path, options: tuple, find: Callable[[Sequence[Sequence[str]]], Path | None], read: Read
           ) -> tuple[Dataset, Problems]:
    """What `read` makes of an annotation file, and what it found to be wrong: from the cache if nothing changed.

    `options` are the reader's; `find` gives the folder of images for the sample of their names.
    """
    state = _state(file, options)
    store = cache_file("index", str(file.absolute()), options)
    if store is None or state["size"] < LEAST:
        return read(ImageFiles())
    with suppress(OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
        header, records = map_records(store)
        if header["state"] == state and _same_files(header, find):
            with suppress(OSError):
                os.utime(store)  # when it was used last
            log.info("%s: annotations from %s", file.stem, store)
            return _restored(header, records)
    files, start = ImageFiles(), time.time()
    dataset, problems = read(files)
    settled = start - state["mtime"] / 1e9 > SETTLED and _state(file, options) == state
    if files.folder is None or not settled:
        return dataset, problems
    return _kept(store, state, files, dataset, problems)


def _state(file: Path, options: tuple) -> dict[str, Any]:
    """What a file of the cache is for: other content of the annotation file has another state."""
    stat = os.stat(file)
    return {"file": os.fsencode(file.absolute()), "options": repr(options), "size": stat.st_size,
            "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns, "inode": stat.st_ino, "code": code()}


@cache
def code() -> str:
    """Of the modules that say what is read, and how it is kept: others may read the same file differently."""
    folder = Path(__file__).parent
    content = [(folder / f"{name}.py").read_bytes() for name in (
        "check/layout", "coco", "coco_json", "dataset", "index", "kinds", "label_maps", "masks", "panoptic", "problems",
        "records", "shard_files", "shard_scan", "shards")]
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def _same_files(header: dict[str, Any], find: Callable[[Sequence[Sequence[str]]], Path | None]) -> bool:
    folders = {os.fsdecode(name): digest for name, digest in header["folders"]}
    return os.fsencode(find(header["sample"]) or "") == header["folder"] and all(
        _digest(_names(Path(folder))) == digest for folder, digest in folders.items())


def _digest(names: Iterable[str]) -> bytes:
    return hashlib.blake2b(b"\0".join(sorted(map(os.fsencode, names))), digest_size=16).digest()


def _kept(store: Path, state: dict[str, Any], files: ImageFiles, dataset: Dataset, problems: Problems
          ) -> tuple[Dataset, Problems]:
    """The same, mapped from the file of the cache; as it is if that cannot be written."""
    header = {"state": state, "sample": files.sample, "folder": os.fsencode(files.folder), "folders": [
        (os.fsencode(folder), _digest(names)) for folder, names in files.listed.items()]}
    header["dataset"] = described(dataset)
    header |= {"name": problems.name, "problems": [as_plain(problem) for problem in problems.found]}
    header["places"] = [places.at(dataset.records.annotations["id"]).tobytes() for _, places in problems.located]
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        save_records(store, header, dataset.records)
        make_room(store.parent.iterdir(), LIMIT, store)
        return _restored(*map_records(store))
    except (OSError, OverflowError, UnicodeEncodeError) as error:  # a full or read-only disk; values beyond 64 bits
        log.info("%s: annotations cannot be kept for the next start (%s)", dataset.name, error)
        return dataset, problems


def _restored(header: dict[str, Any], records: Records) -> tuple[Dataset, Problems]:
    problems = Problems(header["name"])
    problems.found = [Problem(*values) for values in header["problems"]]
    dataset, file = Dataset(**header["dataset"], records=records), Path(os.fsdecode(header["state"]["file"]))
    problems.located = [(dataset, Places(file, records.annotations["id"], np.frombuffer(numbers, np.int64)))
                        for numbers in header["places"]]
    return dataset, problems


# Files of records


def as_plain(problem: Problem) -> list[Any]:
    return [plain(value) for value in vars(problem).values()]


def described(dataset: Dataset) -> dict[str, Any]:
    """All but the records, as the header of a file has it."""
    return {item.name: plain(getattr(dataset, item.name)) for item in fields(Dataset) if item.name != "records"}


_LAYOUT = repr((IMAGE.descr, ANNOTATION.descr))
_MAGIC = b"detres\n\x02"
_HEAD = struct.Struct("<8sQI")  # magic, bytes of the header, its CRC


def save_records(file: Path, header: dict[str, Any], records: Records) -> None:
    """Write records, and what else there is to say as plain values, so that a reader sees all of it or nothing."""
    arrays = [np.ascontiguousarray(array) for array in (records.images, records.annotations, records.rest)]
    content = encode({**header, "layout": _LAYOUT, "arrays": [(array.nbytes, zlib.crc32(array)) for array in arrays]})
    with replacing(file) as out:
        out.write(_HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content)
        for array in arrays:
            out.write(bytes(-out.tell() % 64))
            out.write(array.data.cast("B") if array.nbytes else b"")


def map_records(file: Path, store: ShardStore | None = None, name: str = "") -> tuple[dict[str, Any], Records]:
    """The header and the records of a file. Raises OSError, and ValueError for anything but a whole file, which it
    calls by `name`."""
    name = name or str(file)
    size = os.stat(file).st_size
    with open(file, "rb") as stream:
        head = stream.read(_HEAD.size)
        magic, length, crc = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0)
        content = stream.read(length) if magic == _MAGIC and length <= size else b""
    if not content or zlib.crc32(content) != crc:
        raise ValueError(f"index must be a file of detres, of this version, got {name}. Delete it.")
    header = decode(content)
    if header["layout"] != _LAYOUT:
        raise ValueError(f"index must be of this version of detres, got another's ({name}). Delete it.")
    offset, arrays = _HEAD.size + length, []
    for (count, crc), kind in zip(header["arrays"], (IMAGE, ANNOTATION, np.dtype("u1"))):
        offset += -offset % 64
        if offset + count > size:
            raise ValueError(f"index must be whole, got {size} bytes ({name}). Delete it.")
        array = np.memmap(file, kind, "r", offset, count // kind.itemsize) if count else np.zeros(0, kind)
        if zlib.crc32(array) != crc:  # half a second for 10^6 objects; else a flipped bit is a wrong label
            raise ValueError(f"index must be as it was written, got damaged bytes ({name}). Delete it.")
        arrays.append(np.asarray(array))
        offset += count
    return header, Records(*arrays, store)
