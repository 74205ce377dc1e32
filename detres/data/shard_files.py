"""Bytes of members of tar shards, wherever the shards are: a disk, or what fsspec reaches by a URL (s3, http, gs ...).

An image is read by one request for its range of bytes, its tar header included, which must name it. A store may keep
whole shards on a local disk, the last used up to a number of bytes: worth it where images are read in the order of
`sampling.InBlocks`, which is nearly that of the shards, or more often than once.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from detres.data.images import ImageError

BLOCK = tarfile.BLOCKSIZE  # bytes of a header


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
            url = str(self._copied(url, shard))
        if not is_remote(url):
            file = _opened(local(url))
            return os.pread(file.number, size, start)
        system, path = system_of(url)
        return system.cat_file(path, start=start, end=start + size)

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
                    _make_room(Path(self.cache).expanduser(), self.limit, copy)
        os.utime(copy)  # when it was read last
        return copy


def _make_room(folder: Path, limit: int, keep: Path) -> None:
    """Delete the copies that were read longest ago, beyond the limit; who has one open reads on."""
    copies = sorted(((copy.stat().st_mtime_ns, copy.stat().st_size, copy) for copy in folder.glob("*/*.tar")),
                    key=lambda item: (item[2] != keep, -item[0]))
    total = 0
    for _, size, copy in copies:
        total += size
        if total > limit and copy != keep:
            copy.unlink(missing_ok=True)


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
        named = self.name.startswith(header.name) or not self.name.isascii()  # in PAX, long ones are cut, others mangled
        if header.size != self.size or not named:
            raise self._error(f"must be where the index says, got {header.name} of {header.size} bytes")
        return data[BLOCK:]

    def _error(self, text: str) -> ImageError:
        return ImageError(f"member of a shard {text} ({self.store.url(self.shard)}, {self.name}, at byte {self.offset}). "
                          "Restore the shard, or write shards and index anew.")


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith(("file://", "local://"))


def local(path: str) -> str:
    return path.removeprefix("file://").removeprefix("local://")


def system_of(url: str) -> tuple[Any, str]:
    """File system and path in it. Raises ImportError where a package is missing, and ValueError for unknown kinds."""
    import fsspec  # takes a moment

    return fsspec.core.url_to_fs(url)


class _Open:
    """A descriptor that is closed with the last use."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = lru_cache(maxsize=64)(_Open)
