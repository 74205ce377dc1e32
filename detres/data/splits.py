"""All splits of a data set: what `detres data ...` works on, where training asks for one by its role."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from detres.config import SourceConfig
from detres.data import coco, shards, voc, yolo
from detres.data.dataset import SPLITS, Dataset, Role, load_dataset
from detres.data.problems import OnInvalid


@dataclass(frozen=True)
class Split:
    """One split; `role` is what its name says, train if nothing."""

    name: str
    role: Role
    source: SourceConfig

    def load(self, on_invalid: OnInvalid = "error") -> Dataset:
        """Raises as `load_dataset`."""
        return load_dataset(self.source, self.role, on_invalid)


def find_splits(path: str | Path, images: str | None = None) -> tuple[Split, ...]:
    """The splits at a path: of a folder, a YAML file (YOLO) or an annotation file, which is one split.

    `images` is the folder of images, where it is not found by itself. Raises FileNotFoundError if there is nothing.
    """
    if shards.is_source(str(path)):
        return tuple(_split(name, str(path), None, name) for name in shards.split_names(str(path)))
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data set must exist, got {path} (seen from {Path.cwd()}). Check the path.")
    if path.is_file() and path.suffix == ".json":
        return (_split(path.stem, path, images, split=None),)
    description = path if path.suffix in (".yaml", ".yml") else yolo.find_yaml(path)
    if voc.is_root(path) or not description and voc.find_roots(path):
        return _voc(path, images)
    if description:
        content = yolo.parse(description)
        names = [name for names in SPLITS.values() for name in names if content.get(name)]
        return tuple(_split(name, description, images, name) for name in names)
    files = coco.instance_files(path)
    if not files:
        raise FileNotFoundError(f"folder must hold a data set in COCO, VOC or YOLO format, got {path}. Give the "
                                "annotation file itself.")
    return tuple(_split(file.parent.name if file.stem.startswith("_") else file.stem, file, images, None)
                 for file in files)


def _voc(path: Path, images: str | None) -> tuple[Split, ...]:
    """The image sets of each year, without those that only join others."""
    roots = [path] if voc.is_root(path) else voc.find_roots(path)
    found = []
    for root in roots:
        names = [file.stem for file in sorted((root / "ImageSets/Main").glob("*.txt")) if "_" not in file.stem]
        joins = {"trainval"} if {"train", "val"} <= set(names) else set()
        found += [_split(name if len(roots) == 1 else f"{root.name} {name}", root, images, name)
                  for name in names if name not in joins]
    return tuple(found)


def _split(name: str, path: str | Path, images: str | None, split: str | None) -> Split:
    roles = [role for role in ("val", "test") if coco.names_split(Path(name), role, None)]
    return Split(name, roles[0] if roles else "train", SourceConfig(path=str(path), images=images, split=split))
