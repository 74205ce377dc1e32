"""Files that are kept for the next start: $DETRES_CACHE, by default ~/.cache/detres ($XDG_CACHE_HOME); DETRES_CACHE= is
none. All of it may be deleted at any time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_file(kind: str, *names: Any) -> Path | None:
    """Where what goes by these names is; None if nothing is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("DETRES_CACHE", f"{home}/detres")
    name = hashlib.blake2b(repr(names).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return Path(folder).expanduser() / kind / name if folder else None


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
