"""Small data sets on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from detres.config import SourceConfig
from detres.data.dataset import Dataset, load_dataset

SQUARE = [10, 10, 30, 10, 30, 40, 10, 40]  # polygon of the box 10, 10, 30, 40
COCO = {
    "images": [{"id": 7, "file_name": "a.png", "height": 60, "width": 80},
               {"id": 3, "file_name": "b.png", "height": 80, "width": 60}],
    "categories": [{"id": 90, "name": "zebra"}, {"id": 4, "name": "ant"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 10, 20, 30], "segmentation": [SQUARE], "area": 600,
         "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0.5, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9]]},
        {"id": 3, "image_id": 3, "category_id": 4, "bbox": [0, 0, 60, 80], "iscrowd": 1, "area": 100,
         "segmentation": {"size": [80, 60], "counts": [100, 100, 4600]}},
    ],
}


def write_image(path: Path, height: int, width: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


class CocoFolder:
    """A COCO folder whose contents a test may change before it loads."""

    def __init__(self, root: Path):
        self.root, self.content = root, copy.deepcopy(COCO)
        self.file = root / "annotations" / "instances_train2017.json"
        for image in self.content["images"]:
            write_image(root / "train2017" / image["file_name"], image["height"], image["width"], image["id"])

    @property
    def first(self) -> dict:
        return self.content["annotations"][0]

    def load(self, on_invalid: str = "error") -> Dataset:
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(self.content))
        return load_dataset(SourceConfig(path=str(self.root)), "train", on_invalid)


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path)


def voc_object(name: str = "dog", box: tuple = (11, 6, 20, 30), difficult: int | None = 0) -> str:
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{flag}<truncated>1</truncated><bndbox>{corners}</bndbox>{part}</object>"


def write_voc(root: Path, images: dict[str, str], sets: dict[str, str], size: str | None = None) -> None:
    """`images`: id -> objects as XML; `sets`: name -> lines. All images are 40 x 30 (width x height)."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>" if size is None else size
    for image_id, objects in images.items():
        write_image(root / "JPEGImages" / f"{image_id}.jpg", 30, 40)
        (root / "Annotations" / f"{image_id}.xml").write_text(
            f"<annotation><filename>{image_id}.jpg</filename>{size}{objects}</annotation>")
    for name, lines in sets.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)


def write_yolo(root: Path, labels: dict[str, str | None], yaml: str | None = None) -> Path:
    """`labels`: name -> rows of its text file, None for no file; all images are 40 x 30 (width x height)."""
    for name, rows in labels.items():
        write_image(root / "images" / "train" / f"{name}.png", 30, 40)
        file = root / "labels" / "train" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if rows is not None:
            file.write_text(rows)
    default = "path: .\ntrain: images/train\nval: images/train\nnc: 2\nnames: [cat, dog]\n"
    (root / "data.yaml").write_text(yaml or default)
    return root / "data.yaml"


# Functions as fixtures: test modules cannot import from here.


@pytest.fixture(scope="session")
def files() -> SimpleNamespace:
    return SimpleNamespace(image=write_image, voc=write_voc, object=voc_object, yolo=write_yolo)
