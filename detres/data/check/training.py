"""The check of image files before a training: a truncated photograph stops it now, not in the middle of an epoch.

Annotations were checked when they were read. What is found is kept (`data.cache`) for as long as files and annotations
stay as they are, so that only the first start reads all images.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from detres.config import SourceConfig
from detres.data.cache import cache_file, make_room, replacing
from detres.data.check.images import check_images
from detres.data.dataset import Dataset, without_images
from detres.data.index import as_plain, code
from detres.data.kinds import severity
from detres.data.problems import InvalidDataError, OnInvalid, Problem, Problems, raise_all, source_words
from detres.data.records import decode, encode
from detres.data.shard_files import ShardImage

log = logging.getLogger("detres")

LIMIT = 2**30  # bytes of what is kept


def check_files(datasets: Sequence[Dataset], sources: Sequence[SourceConfig], on_invalid: OnInvalid) -> list[Dataset]:
    """The data sets of a training, the one that is trained on first; with `on_invalid='drop'` without images whose file
    training could not use. Warnings (images that are in two of them, say) are one line for each kind. Images in shards
    are not looked at: these were checked when they were written, and may be more than anyone wants to read twice.

    Raises InvalidDataError for files that training could not use.
    """
    splits = [(str(number), dataset) for number, dataset in enumerate(datasets)
              if len(dataset.records) and not isinstance(dataset.records[0].path, ShardImage)]
    problems = _found(splits)
    checked, errors = list(datasets), []
    for split, dataset in splits:
        source, own = sources[int(split)], [problem for problem in problems if problem.split == split]
        try:
            Problems(dataset.name, source_words(source.path, source.images), own).close(on_invalid)
        except InvalidDataError as error:
            errors.append(error)
        unusable = {problem.image for problem in own if severity(problem.kind) == "error"}
        checked[int(split)] = without_images(dataset, unusable)
    raise_all(errors)
    return checked


def _found(splits: Sequence[tuple[str, Dataset]]) -> list[Problem]:
    """As `check_images`, from the cache if nothing changed."""
    file = cache_file("images", _state(splits))
    if file is None:
        return check_images(splits)
    with suppress(OSError, ValueError, TypeError, msgspec.DecodeError):
        found = [Problem(*values) for values in decode(file.read_bytes())]
        os.utime(file)  # when it was used last
        log.info("Images were checked before, and did not change")
        return found
    found = check_images(splits)
    with suppress(OSError, OverflowError, UnicodeEncodeError):  # a full or read-only disk
        _keep(file, encode([as_plain(problem) for problem in found]))
    return found


def _state(splits: Sequence[tuple[str, Dataset]]) -> str:
    """Of all that the check reads, and of its code."""
    digest = hashlib.blake2b(code().encode())
    for module in ("images", "lookalikes", "training"):
        digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
    for split, dataset in splits:
        records = dataset.records
        digest.update(repr((split, dataset.name, dataset.format, dataset.classes)).encode(errors="surrogateescape"))
        digest.update(records.images.tobytes() + records.annotations.tobytes() + records.rest.tobytes())
        for path in records.paths():
            with suppress(OSError):  # one that is gone is told by the check
                stat = os.stat(path)
                digest.update(repr((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)).encode())
    return digest.hexdigest()


def _keep(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as out:
        out.write(content)
    make_room(file.parent.iterdir(), LIMIT, file)
