"""Files that are kept for the next start: $DETRES_CACHE, by default ~/.cache/detres ($XDG_CACHE_HOME); DETRES_CACHE= is
none. All of it may be deleted at any time."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def cache_file(kind: str, *names: Any) -> Path | None:
    """Where what goes by these names is; None if nothing is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("DETRES_CACHE", f"{home}/detres")
    name = hashlib.blake2b(repr(names).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return Path(folder).expanduser() / kind / name if folder else None


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A stream for what takes the place of `file` once it is whole and on the disk; nothing is left if it fails."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as out:
        try:
            yield out
            out.flush()
            os.fsync(out.fileno())  # else, after a power failure, it may have its name and not its content
            os.chmod(out.name, 0o644)
            os.replace(out.name, file)
        except BaseException:
            os.unlink(out.name)
            raise


def make_room(files: Iterable[Path], limit: int, keep: Path) -> None:
    """Delete the files that were used longest ago, beyond `limit` bytes of all; not `keep`. Who has one open or mapped
    reads on."""
    found = []
    for file in files:
        with suppress(OSError):  # deleted by another process meanwhile
            stat = file.stat()
            found.append((file != keep, -stat.st_mtime_ns, stat.st_size, file))
    total = 0
    for other, _, size, file in sorted(found):
        total += size
        if other and total > limit:
            file.unlink(missing_ok=True)
