"""Cityscapes (Cordts et al., arXiv 1604.01685), as unpacked:

    gtFine/<split>/<city>/<city>_000000_000019_gtFine_polygons.json    and *_labelIds.png for semantic segmentation
    leftImg8bit/<split>/<city>/<city>_000000_000019_leftImg8bit.png

A JSON file lists polygons from back to front: each hides what it covers of those before it. They are painted in this
order, as the official *_instanceIds.png were, by the same rasteriser; the mask of an object is what stays visible, and
its box encloses that. What is labelled a group ("cargroup") is a crowd, one for each class, as in those files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detres.data.dataset import SPLITS, Annotation, Dataset, ImageRecord
from detres.data.index import ImageFiles
from detres.data.label_maps import IGNORED, LabelImage
from detres.data.masks import run_code
from detres.data.problems import OnInvalid, Problems

# Labels by their official id (cityscapesScripts, helpers/labels.py); a license plate has none.
LABELS = ("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road",
          "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
          "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car",
          "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle")
WITHOUT_ID = "license plate"
THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # those that are evaluated
WITH_INSTANCES = (*THINGS, "caravan", "trailer")
NOT_TRAINED = {*LABELS[:7], "parking", "rail track", "guard rail", "bridge", "tunnel", "polegroup", "caravan",
               "trailer"}
SEMANTIC = tuple(name for name in LABELS if name not in NOT_TRAINED)  # the 19 classes that are evaluated
ENDING = "_gtFine_polygons.json"


def find_root(folder: Path) -> Path | None:
    """The folder that holds gtFine/."""
    folder = folder.parent if folder.name == "gtFine" else folder
    return folder if next((folder / "gtFine").glob(f"*/*/*{ENDING}"), None) else None


def splits(root: Path) -> list[str]:
    names = [path.name for path in (root / "gtFine").iterdir() if path.is_dir()]
    return sorted(names, key=lambda name: (name != "train", name))


def read_cityscapes(root: Path, role: str, split: str | None = None, images: str | None = None,
                    on_invalid: OnInvalid = "error", semantic: bool = False) -> Dataset:
    """Instances of the 8 classes of things; with `semantic` label maps of the 19 classes, without instances.

    Images of the test set have none of either. Category ids are the official ids, with `semantic` the labels.
    `images` is a folder in place of leftImg8bit. Raises as `load_dataset`.
    """
    name = next((name for name in ([split] if split else SPLITS[role]) if (root / "gtFine" / name).is_dir()), None)
    if name is None:
        raise FileNotFoundError(f"Cityscapes must have the split '{split or role}', got {splits(root)} ({root}). Give "
                                "one of them as data.*.split.")
    problems = Problems(f"{root.name} {name}")
    folder = Path(images).expanduser() if images else root / "leftImg8bit"
    files = sorted((root / "gtFine" / name).glob(f"*/*{ENDING}"))
    scenes = [scene for file in files if (scene := _scene(file, folder, problems)) is not None]
    records = tuple(_semantic(scenes, problems)) if semantic else _instances(scenes)
    classes = SEMANTIC if semantic else THINGS
    ids = tuple(range(len(classes))) if semantic else tuple(map(LABELS.index, classes))
    dataset = Dataset(problems.name, "cityscapes", classes, ids, records)
    owners = [scene.file for scene, record in zip(scenes, records) for _ in record.annotations]  # numbered from 1
    problems.located.append((dataset, lambda item: (str(owners[item.id - 1]), None, "")))
    problems.close(on_invalid)
    return dataset


@dataclass(frozen=True)
class Scene:
    """What a JSON file says: (label, polygon (P, 2)) from back to front."""

    file: Path
    image_id: str
    image: Path
    height: int
    width: int
    objects: list[tuple[str, np.ndarray]]


def _scene(file: Path, folder: Path, problems: Problems) -> Scene | None:
    stem = file.name.removesuffix(ENDING)
    image = folder / file.parent.parent.name / file.parent.name / f"{stem}_leftImg8bit.png"
    if not image.is_file():
        return problems.add(file, stem, None, "image", str(image), "must be an image file (add it)", "image_missing")
    try:
        return _parse(file, stem, image)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return problems.add(file, stem, None, "file", reason, "must be JSON of Cityscapes: imgHeight, imgWidth, and "
                            "objects with a known label and a polygon (correct it)", "unreadable")


def _parse(file: Path, stem: str, image: Path) -> Scene:
    content = json.loads(file.read_text(encoding="utf-8"))
    height, width = content["imgHeight"], content["imgWidth"]
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(f"size of {width} x {height}")
    objects = [(str(entry["label"]), np.array(entry["polygon"], float)) for entry in content["objects"]
               if not entry.get("deleted")]
    if unknown := {label for label, _ in objects if label != WITHOUT_ID and _class(label) is None}:
        raise ValueError(f"unknown label {sorted(unknown)[0]!r}")
    if any(polygon.ndim != 2 or polygon.shape[1] != 2 or len(polygon) < 2 or not np.isfinite(polygon).all()
           for _, polygon in objects):
        raise ValueError("a polygon without two finite points")
    return Scene(file, stem, image, height, width, objects)


def _class(label: str) -> int | None:
    name = label if label in LABELS else label.removesuffix("group")
    return LABELS.index(name) if name in LABELS else None


def _numbered(scene: Scene) -> Iterator[tuple[int, np.ndarray]]:
    """The id in *_instanceIds.png of each polygon: 1000 x class + number of an instance, else the class, as of groups.
    A license plate has none: it is of the car."""
    count: Counter[str] = Counter()
    for label, polygon in scene.objects:
        number = _class(label)
        if label in WITH_INSTANCES:
            count[label] += 1
            number = 1000 * number + count[label] - 1
        if number is not None:
            yield number, polygon


def paint(scene: Scene) -> np.ndarray:
    """(H, W) int32 of the ids in *_instanceIds.png."""
    canvas = Image.new("I", (scene.width, scene.height))
    draw = ImageDraw.Draw(canvas)
    for number, polygon in _numbered(scene):
        draw.polygon(polygon.ravel().tolist(), fill=number)
    return np.asarray(canvas)


def _name(number: int) -> str:
    """The class of an id."""
    return LABELS[number if number < 1000 else number // 1000]


def _instances(scenes: list[Scene]) -> tuple[ImageRecord, ...]:
    records, first = [], 1
    for scene in scenes:
        annotations = tuple(_visible(scene, first))
        first += len(annotations)
        records.append(ImageRecord(scene.image_id, scene.image, scene.height, scene.width, annotations))
    return tuple(records)


def _visible(scene: Scene, first: int) -> Iterator[Annotation]:
    """The instances and groups of things that can be seen, numbered from `first`."""
    ids, windows = paint(scene), _windows(scene)
    for number, (left, top, right, bottom) in sorted(windows.items()):
        inside = ids[top:bottom, left:right] == number
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if len(rows):
            box = tuple(float(edge) for edge in (left + columns[0], top + rows[0], left + columns[-1] + 1,
                                                 top + rows[-1] + 1))
            code = run_code(inside, top, left, scene.height, scene.width)
            yield Annotation(first, THINGS.index(_name(number)), box, code, area=float(np.count_nonzero(inside)),
                             crowd=number < 1000)
            first += 1


def _windows(scene: Scene) -> dict[int, tuple[int, int, int, int]]:
    """By id, the part of the image that the polygons of a thing may be in: left, top, right, bottom."""
    found: dict[int, np.ndarray] = {}
    for number, polygon in _numbered(scene):
        if _name(number) in THINGS:
            extent = np.array([np.floor(polygon.min(0)) - 1, -np.ceil(polygon.max(0)) - 2])
            found[number] = np.minimum(found.get(number, extent), extent)
    limits = np.array([scene.width, scene.height])
    return {number: tuple(np.clip(np.stack([low, -high]), 0, limits).astype(int).ravel().tolist())
            for number, (low, high) in found.items()}


# Semantic segmentation

TABLE = tuple(IGNORED if name in NOT_TRAINED else SEMANTIC.index(name) for name in LABELS)


def _semantic(scenes: list[Scene], problems: Problems) -> Iterator[ImageRecord]:
    exists = ImageFiles()
    for scene in scenes:
        png = scene.file.with_name(f"{scene.image_id}_gtFine_labelIds.png")
        if exists(png):
            yield ImageRecord(scene.image_id, scene.image, scene.height, scene.width, label_map=LabelImage(TABLE, png))
        else:
            problems.add(scene.file, scene.image_id, None, "label map", png.name,
                         "must be a PNG file beside the polygons (unpack gtFine again)", "image_missing")
