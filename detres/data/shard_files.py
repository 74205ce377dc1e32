"""Bytes of members of tar shards, wherever the shards are: a disk, or what fsspec reaches by a URL (s3, http, gs ...).

An image is read by one request for its range of bytes, its tar header included, which must name it. A store may keep
whole shards on a local disk, the last used up to a number of bytes: worth it where images are read in the order of
`sampling.InBlocks`, which is nearly that of the shards, or more often than once.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from detres.data.cache import cache_file, make_room
from detres.data.images import ImageError

BLOCK = tarfile.BLOCKSIZE  # bytes of a header
COPIES = 20 * 2**30  # bytes of indices of remote shards that are kept


@dataclass(frozen=True)
class ShardStore:
    """Where shards are: a folder or URL. `cache`: a local folder to keep copies in, of `limit` bytes at most (but for
    the one in use)."""

    root: str
    cache: str | None = None
    limit: int = 0

    def url(self, shard: str) -> str:
        return f"{self.root.rstrip('/')}/{shard}" if self.root else shard

    def read(self, shard: str, start: int, size: int) -> bytes:
        """May be fewer bytes where the shard ends. Raises OSError, and ImportError where fsspec lacks a package."""
        url = self.url(shard)
        if self.cache:
            return self._read_copy(url, shard, start, size)
        if not is_remote(url):
            file = _opened(local(url))
            return os.pread(file.number, size, start)
        system, path = system_of(url)
        data = system.cat_file(path, start=start, end=start + size)
        if len(data) > size:  # a server may answer with all of a file
            raise OSError(f"all {len(data)} bytes of the shard, as its host knows no ranges: say data.*.shard_cache, "
                          "which copies whole shards")
        return data

    def _read_copy(self, url: str, shard: str, start: int, size: int) -> bytes:
        """Opened anew each time: the disk keeps a copy that was deleted for as long as it is open."""
        while True:
            copy = self._copied(url, shard)
            with suppress(FileNotFoundError), open(copy, "rb") as file:  # else deleted by who made room, just now
                os.utime(file.fileno())  # when it was read last
                return os.pread(file.fileno(), size, start)

    def _copied(self, url: str, shard: str) -> Path:
        """The local copy, made by one of the processes that ask for it."""
        folder = Path(self.cache).expanduser() / hashlib.blake2b(self.root.encode(), digest_size=8).hexdigest()
        copy = folder / shard
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{copy}.lock"):
                if not copy.exists():
                    part = copy.with_name(f"{copy.name}.part")
                    system, path = system_of(url)
                    system.get_file(path, str(part))
                    os.replace(part, copy)
                    make_room(Path(self.cache).expanduser().glob("*/*.tar"), self.limit, copy)
        return copy


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image in a shard: stands where records have the path of a file. `offset` is of its bytes, after the header."""

    shard: str
    name: str
    offset: int
    size: int
    store: ShardStore = ShardStore("")

    def __str__(self) -> str:
        return f"{self.store.url(self.shard)}/{self.name}"

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    def read_bytes(self) -> bytes:
        """The file. Raises ImageError, which names shard, member and offset."""
        try:
            data = self.store.read(self.shard, self.offset - BLOCK, BLOCK + self.size)
        except Exception as error:  # each of fsspec's file systems has its own
            raise self._error(f"must be readable, got {type(error).__name__}: {error}") from None
        if len(data) < BLOCK + self.size:
            raise self._error(f"must be whole, got {max(0, len(data) - BLOCK)} of {self.size} bytes")
        try:
            header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise self._error(f"must follow its tar header, got {error}") from None
        named = self.name.startswith(header.name) or not self.name.isascii()  # in PAX, some are cut or mangled
        if header.size != self.size or not named:
            raise self._error(f"must be where the index says, got {header.name} of {header.size} bytes")
        return data[BLOCK:]

    def _error(self, text: str) -> ImageError:
        return ImageError(f"member of a shard {text} ({self.store.url(self.shard)}, {self.name}, at byte "
                          f"{self.offset}). Restore the shard, or write shards and index anew.")


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith(("file://", "local://"))


def local(path: str) -> str:
    return path.removeprefix("file://").removeprefix("local://")


def system_of(url: str) -> tuple[Any, str]:
    """File system and path in it. Raises ValueError for URLs that fsspec cannot read, or lacks a package for."""
    import fsspec  # takes a moment

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"URL of shards must be of a kind that fsspec reads, got {url} ({error}). Install what it "
                         "needs: pip install 'detres[remote]'.") from None


def stamp(url: str) -> str:
    """Of a file: changes with it, as far as its host says. Raises FileNotFoundError, and ValueError if the host cannot
    be asked."""
    system, path = system_of(url)
    try:
        info = system.info(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"file must exist, got none at {url}. Check the path.") from None
    except Exception as error:  # each of fsspec's file systems has its own
        raise ValueError(f"file must be in reach, got {type(error).__name__}: {error} ({url}). Check the network, and "
                         "the rights to read.") from None
    return repr(sorted(info.items(), key=str))


def local_copy(store: ShardStore, name: str) -> Path:
    """A file beside the shards, as one that can be mapped. Raises FileNotFoundError if there is none."""
    url = store.url(name)
    if not is_remote(url):
        if not (file := Path(local(url))).is_file():
            raise FileNotFoundError(f"file must exist, got none at {file}. Check the path.")
        return file
    mark = stamp(url)
    file = cache_file("shards", url, mark)
    if file is None or not _is_writable(file.parent):
        file = _temporary() / hashlib.blake2b(f"{url} {mark}".encode()).hexdigest()
    if not file.exists():
        system, path = system_of(url)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        system.get_file(path, str(part))
        os.replace(part, file)
        make_room(file.parent.iterdir(), COPIES, file)
    return file


def _is_writable(folder: Path) -> bool:
    """Makes it, if it can be made."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


@cache
def _temporary() -> Path:
    """Deleted when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="detres-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


class _Open:
    """A descriptor that is closed with the last use."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = lru_cache(maxsize=64)(_Open)
