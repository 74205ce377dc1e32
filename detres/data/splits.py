"""All splits of a data set: what `detres data ...` works on, where training asks for one by its role."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detres.config import SourceConfig
from detres.data import coco
from detres.data.dataset import Dataset, Role, load_dataset
from detres.data.formats import recognise
from detres.data.problems import OnInvalid

log = logging.getLogger("detres")


@dataclass(frozen=True)
class Split:
    """One split; `role` is what its name says, train if nothing."""

    name: str
    role: Role
    source: SourceConfig

    def load(self, on_invalid: OnInvalid = "error", *, keep_extra: bool = False) -> Dataset:
        """Raises as `load_dataset`."""
        return load_dataset(self.source, self.role, on_invalid, keep_extra=keep_extra)


def find_splits(path: str | Path, images: str | None = None) -> tuple[Split, ...]:
    """The splits at a path: of a folder, a YAML file (YOLO) or an annotation file, which is one split.

    `images` is the folder of images, where it is not found by itself. Raises FileNotFoundError if there is none.
    """
    format, found = recognise(path)
    images = images if "images" in format.uses else None
    places = format.splits(Path(path).expanduser(), found)
    if not places:
        raise FileNotFoundError(f"data set must have a split of images with objects, got none in {path}, read as "
                                f"{format.name} ({format.layout}). Name one; panoptic data become objects by "
                                "`detres data convert DATA OUT --to coco`.")
    return tuple(_split(name, place, images, split) for name, place, split in places)


def load_readable(splits: Sequence[Split]) -> list[tuple[str, Dataset]]:
    """What is valid of each split, by its name. A split that cannot be read hides none of the others: it is left out,
    and the log says so. Raises as `load_dataset` if there is no other."""
    found: list[tuple[str, Dataset]] = []
    errors: list[Exception] = []
    for split in splits:
        try:
            found.append((split.name, split.load("drop")))
        except (OSError, ValueError) as error:
            errors.append(error)
            if len(errors) == len(splits):
                raise
            log.warning("%s is left out: %s", split.name, error)
    return found


def _split(name: str, path: str | Path, images: str | None, split: str | None) -> Split:
    roles = [role for role in ("val", "test") if coco.names_split(Path(name), role, None)]
    return Split(name, roles[0] if roles else "train", SourceConfig(path=str(path), images=images, split=split))
