"""Labelled images in memory: which files there are and of which class, whatever layout they came in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detres.config import SourceConfig
from detres.data.dataset import Role


@dataclass(frozen=True)
class ClassDataset:
    """`labels[i]`, an index into `classes`, is the class of image i: the file `paths[i]`, or, of a small data set that
    is held whole, `pixels[i]`."""

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray  # (n,) int64
    paths: tuple[Path, ...] = ()
    pixels: np.ndarray | None = None  # (n, H, W, 3) uint8 RGB

    def __len__(self) -> int:
        return len(self.labels)


def load_class_dataset(source: SourceConfig, role: Role) -> ClassDataset:
    """Read a data set of labelled images; the layout is recognised from the path.

    - CIFAR-10 or 100: the folder that torchvision keeps it in, or a folder with `*train*.zip` and `*test*.zip`, each of
      class folders (`data.cifar`).

    `source.split` names the image set; without it, the role does.

    Raises FileNotFoundError for a path or split that is not there, ValueError for what is no such data set.
    """
    from detres.data import cifar  # it imports this module

    path = Path(source.path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data set must exist, got {source.path} (seen from {Path.cwd()}). Check the path.")
    if cifar.is_root(path):
        return cifar.read_cifar(path, role, source.split)
    raise FileNotFoundError(f"data set must be labelled images in a known layout, got {path}. Looked for: "
                            "CIFAR's batches, or zip files of class folders.")
