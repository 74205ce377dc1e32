"""Labelled images in memory: which files there are and of which class, whatever layout they came in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from detres.config import SourceConfig
from detres.data.dataset import Role

IMAGENET, WORDNET_ID = 1000, re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassDataset:
    """`labels[i]`, an index into `classes`, is the class of image i: the file `paths[i]`, or, of a small data set that
    is held whole, `pixels[i]`."""

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray  # (n,) int64
    paths: tuple[str, ...] = ()  # strings: a million of them, in every worker
    pixels: np.ndarray | None = None  # (n, H, W, 3) uint8 RGB

    def __len__(self) -> int:
        return len(self.labels)


def load_class_dataset(source: SourceConfig, role: Role) -> ClassDataset:
    """Read a data set of labelled images; the layout is recognised from the path.

    - ILSVRC: a folder with `Data/CLS-LOC`, or with `ILSVRC/Data/CLS-LOC`, as Kaggle has it.
    - A data set for localization: a folder with `boxes.csv` and `classes.txt` (`data.localization`).
    - Folders of classes: `<split>/<class>/...`, or `<class>/...` alone.
    - CIFAR-10 or 100: the folder that torchvision keeps it in, or a folder with `*train*.zip` and `*test*.zip`, each of
      class folders (`data.cifar`).

    `source.split` names the image set; without it, the role does.

    Raises FileNotFoundError for a path or split that is not there, ValueError for what is no such data set.
    """
    from detres.data import cifar, class_folders, localization  # they import this module

    path = Path(source.path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data set must exist, got {source.path} (seen from {Path.cwd()}). Check the path.")
    if source.images is not None:
        raise ValueError(f"images must be null for labelled images, which say it themselves, got {source.images} "
                         f"({source.path}). Take it out.")
    if path.suffix == ".json" or list(path.glob("annotations/*.json")):
        raise ValueError(f"a classifier must have labelled images, in a folder for each class, got boxes or masks "
                         f"({source.path}). To train a detector, give weights of one; those of a classifier belong in "
                         "model.backbone.weights.")
    if root := class_folders.find_ilsvrc(path):
        return class_folders.read_ilsvrc(root, role, source.split)
    if localization.is_table(path):
        return localization.as_class_dataset(localization.read_table(path, role, source.split, "drop"))
    if cifar.is_root(path):
        return cifar.read_cifar(path, role, source.split)
    if folder := class_folders.find_split(path, role, source.split):
        return class_folders.read_folders(folder)
    if class_folders.is_of_classes(path):
        return class_folders.read_folders(path)
    raise FileNotFoundError(f"data set must be labelled images in a known layout, got {path}. Looked for: folders of "
                            "classes with image files, in train and val or at once; Data/CLS-LOC (ILSVRC); CIFAR's "
                            "batches, or zip files of class folders.")


def align_labels(dataset: ClassDataset, classes: Sequence[str]) -> ClassDataset:
    """The data set with its labels renumbered to `classes`, those that were trained. Raises ValueError for others.

    All of ImageNet's 1000 folders, which are called by WordNet ids, stand for 1000 trained classes in the order of the
    ids: that of torchvision's weights, which have English names.
    """
    if len(classes) == len(dataset.classes) == IMAGENET and all(map(WORDNET_ID.fullmatch, dataset.classes)) \
            and not any(map(WORDNET_ID.fullmatch, classes)):
        order = sorted(dataset.classes)
        labels = np.array([order.index(name) for name in dataset.classes])
        return replace(dataset, classes=tuple(classes), labels=labels[dataset.labels])
    unknown = [name for name in dataset.classes if name not in set(classes)]
    if unknown:
        raise ValueError(f"classes to evaluate on must be classes that were trained, got {', '.join(unknown[:5])} in "
                         f"{dataset.name}, {len(unknown)} unknown of {len(dataset.classes)}. Trained were "
                         f"{', '.join(classes[:5])} ... ({len(classes)}).")
    number = {name: label for label, name in enumerate(classes)}
    return replace(dataset, classes=tuple(classes),
                   labels=np.array([number[name] for name in dataset.classes])[dataset.labels])
