"""The built-in data set: drawn scenes with exact annotations, written as COCO and PASCAL VOC.

    OUT/shapes.json                         what was asked for, and whether it is complete
    OUT/{train,val}/000000000001.jpg        the pictures
    OUT/annotations/instances_{split}.json  boxes, polygons, RLE, crowds, keypoints
    OUT/annotations/panoptic_{split}.json   with OUT/annotations/panoptic_{split}/*.png (id = R + 256 G + 65536 B)
    OUT/annotations/semantic_{split}/*.png  the category id of every pixel, 8 bit
    OUT/voc/{Annotations,JPEGImages,ImageSets/Main}

Coordinates in the JSON files are continuous, also those of keypoints: the first pixel spans 0 to 1. VOC boxes are
1-based and inclusive. `shapes_scene` composes, `shapes_draw` and `shapes_texture` paint; this module writes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.progress import track

from detres.data.shapes_draw import KEYPOINT_NAMES, SKELETON
from detres.data.shapes_scene import (KEYPOINT_CLASSES, STUFF_IDS, THING_IDS, Scene, SceneObject, ShapesOptions, render)

__all__ = ["KEYPOINT_NAMES", "SKELETON", "STUFF_IDS", "THING_IDS", "Scene", "SceneObject", "ShapesOptions", "render",
           "segmentation", "write_shapes"]

_VERSION = 1  # to be raised when the same options begin to give other pictures
_FIRST = {"train": 0, "val": 1_000_000}  # index of a split's first scene, so that the splits never share one
Format = Literal["coco", "voc"]


def write_shapes(out: str | Path, images: int, seed: int = 0, *, options: ShapesOptions | None = None,
                 val_images: int | None = None, formats: tuple[Format, ...] = ("coco", "voc"),
                 progress: bool = True) -> Path:
    """Writes `images` training and `val_images` (default: a fifth, rounded down) held-out scenes under `out`.

    Image i is the same whatever the number of images. If `out` already holds exactly this, nothing is done; if it
    holds an interrupted start of it, that is written anew. Returns `out`.

    Raises:
        ValueError: a number is out of range, a format unknown, or `out` holds something else.
    """
    out, options = Path(out), options or ShapesOptions()
    val_images = images // 5 if val_images is None else val_images
    _check(images, val_images, seed, formats)
    request = json.loads(json.dumps({"version": _VERSION, "images": images, "val_images": val_images, "seed": seed,
                                     "formats": sorted(formats), "options": asdict(options)}))
    if _already_complete(out, request):
        if progress:
            print(f"{out} already holds these images; nothing to do.")
        return out
    _write_json(out / "shapes.json", {"complete": False, "request": request})
    for split, count in (("train", images), ("val", val_images)):
        writer = _SplitWriter(out, split, options, formats)
        for index in track(range(count), f"{out}: {split}", disable=not progress or not count):
            writer.add(_FIRST[split] + index, render(_FIRST[split] + index, seed, options))
        writer.finish()
    _write_json(out / "shapes.json", {"complete": True, "request": request})
    return out


def _check(images: int, val_images: int, seed: int, formats: tuple[Format, ...]) -> None:
    for name, value, low, high in (("images", images, 1, _FIRST["val"]), ("val_images", val_images, 0, _FIRST["val"]),
                                   ("seed", seed, 0, 2**63)):
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, got {value} (write_shapes).")
    if not formats or not set(formats) <= {"coco", "voc"}:
        raise ValueError(f"formats must be one or both of 'coco' and 'voc', got {formats!r} (write_shapes).")


def _already_complete(out: Path, request: dict[str, Any]) -> bool:
    marker = out / "shapes.json"
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"out must be a new or empty folder, or one that write_shapes made, got {out}. "
                             "Give another folder.")
        return False
    found = json.loads(marker.read_text())
    if found["request"] != request:
        other = [f"{key}={value!r} (asked: {request.get(key)!r})" for key, value in found["request"].items()
                 if value != request.get(key)]
        raise ValueError(f"out must not hold another data set, got one with {', '.join(other)} in {out}. "
                         "Give another folder, or delete this one.")
    return found["complete"]


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def _write_image(path: Path, pixels: np.ndarray, *parameters: int) -> None:
    """`pixels` (H, W) or (H, W, 3) RGB, uint8; the suffix gives the format."""
    done, data = cv2.imencode(path.suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels, parameters)
    assert done, "uint8 images can always be encoded"
    path.write_bytes(data.tobytes())


@dataclass
class _SplitWriter:
    """Writes the images of one split as they come, and its JSON files and lists at the end."""

    out: Path
    split: str
    options: ShapesOptions
    formats: tuple[Format, ...]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    panoptic: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.labels = self.out / "annotations"
        self.voc = self.out / "voc"
        folders = [self.out / self.split]
        if "coco" in self.formats:
            folders += [self.labels / f"panoptic_{self.split}", self.labels / f"semantic_{self.split}"]
        if "voc" in self.formats:
            folders += [self.voc / "Annotations", self.voc / "JPEGImages", self.voc / "ImageSets" / "Main"]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, index: int, scene: Scene) -> None:
        image_id = index + 1
        stem = f"{image_id:012d}"
        picture = self.out / self.split / f"{stem}.jpg"
        _write_image(picture, scene.image, cv2.IMWRITE_JPEG_QUALITY, 95)
        height, width = scene.image.shape[:2]
        self.images.append({"id": image_id, "file_name": picture.name, "height": height, "width": width})
        if "coco" in self.formats:
            for thing in scene.objects:
                number = len(self.annotations) + 1
                self.annotations.append({"id": number, "image_id": image_id, **_coco_annotation(thing)})
            pixels, segments = _panoptic(scene)
            self.panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
            _write_image(self.labels / f"panoptic_{self.split}" / f"{stem}.png", pixels)
            _write_image(self.labels / f"semantic_{self.split}" / f"{stem}.png", scene.semantic)
        if "voc" in self.formats:
            _link(picture, self.voc / "JPEGImages" / picture.name)
            (self.voc / "Annotations" / f"{stem}.xml").write_bytes(_voc_xml(picture.name, scene))

    def finish(self) -> None:
        info = {"description": "detres shapes: drawn scenes with exact annotations", "version": str(_VERSION)}
        things = [_category(name, THING_IDS[name], True) for name in self.options.classes]
        head = {"info": info, "licenses": [], "images": self.images}
        if "coco" in self.formats:
            _write_json(self.labels / f"instances_{self.split}.json",
                        {**head, "annotations": self.annotations, "categories": [_thing_category(c) for c in things]})
            colours = [{**c, "color": list(_segment_colour(c["id"]))} for c in
                       things + [_category(name, id_, False) for name, id_ in STUFF_IDS.items()]]
            _write_json(self.labels / f"panoptic_{self.split}.json",
                        {**head, "annotations": self.panoptic, "categories": colours})
        if "voc" in self.formats:
            names = "".join(f"{Path(image['file_name']).stem}\n" for image in self.images)
            (self.voc / "ImageSets" / "Main" / f"{self.split}.txt").write_text(names)


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _category(name: str, category_id: int, thing: bool) -> dict[str, Any]:
    return {"id": category_id, "name": name, "supercategory": "shape" if thing else "surface", "isthing": int(thing)}


def _thing_category(category: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in category.items() if key != "isthing"}
    if category["name"] not in KEYPOINT_CLASSES:
        return plain
    return {**plain, "keypoints": list(KEYPOINT_NAMES), "skeleton": [list(bone) for bone in SKELETON]}


def _coco_annotation(thing: SceneObject) -> dict[str, Any]:
    x0, y0, x1, y1 = thing.box
    annotation = {"category_id": thing.category_id, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(thing.mask.sum()),
                  "iscrowd": int(thing.crowd), "segmentation": segmentation(thing.mask, thing.crowd)}
    if thing.keypoints is not None:
        flat = [int(v) if j == 2 else float(v) for row in thing.keypoints for j, v in enumerate(row)]
        annotation |= {"keypoints": flat, "num_keypoints": int((thing.keypoints[:, 2] > 0).sum())}
    return annotation


def segmentation(mask: np.ndarray, crowd: bool = False) -> list[list[float]] | dict[str, Any]:
    """COCO's form of a mask (H, W) bool: polygons along the pixel edges, exact under any rasteriser and in area.

    COCO's polygons cannot have holes, so a mask with one becomes a compressed RLE; crowds are uncompressed RLE as
    in COCO's own files.
    """
    if crowd:
        return {"size": list(mask.shape), "counts": _run_lengths(mask)}
    # At twice the size the outline passes both pixels of an edge, so that halving it rounds to the edge itself.
    double = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if (tree[0, :, 3] >= 0).any():  # a contour with a parent is a hole
        code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        return {"size": list(mask.shape), "counts": code["counts"].decode()}
    return [_distinct((contour[:, 0] + 1) // 2).ravel().astype(float).tolist() for contour in contours]


def _distinct(points: np.ndarray) -> np.ndarray:
    """Without points (P, 2) that repeat the one before."""
    return points[(points != np.roll(points, 1, 0)).any(1)]


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of zeros and ones by turns, column by column, zeros first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def _panoptic(scene: Scene) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """COCO panoptic: pixels (H, W, 3) uint8 of segment ids, and the segments; one for each surface."""
    regions = [(thing.mask, thing.category_id, thing.crowd) for thing in scene.objects]
    free = scene.owner == 0
    regions += [(free & (scene.stuff == id_), id_, False) for id_ in STUFF_IDS.values()]
    numbers, colours, segments = np.zeros(scene.owner.shape, np.uint8), [(0, 0, 0)], []
    for mask, category_id, crowd in regions:
        area = int(np.count_nonzero(mask))
        if area:
            red, green, blue = _segment_colour(len(colours))
            numbers[mask] = len(colours)
            colours.append((red, green, blue))
            segments.append({"id": red + 256 * green + 65536 * blue, "category_id": category_id, "iscrowd": int(crowd),
                             "area": area, "bbox": list(cv2.boundingRect(mask.view(np.uint8)))})
    return np.array(colours, np.uint8)[numbers], segments


def _segment_colour(number: int) -> tuple[int, int, int]:
    """Distinct colours for 1, 2, ...: an odd factor permutes the numbers below 2^24, and 0 stays unused."""
    code = number * 10368889 % 2**24
    return code & 255, code >> 8 & 255, code >> 16


def _voc_xml(file_name: str, scene: Scene) -> bytes:
    """VOC has no crowds and no masks: a crowd is one difficult object, as are those of which little is seen."""
    height, width = scene.image.shape[:2]
    root = ElementTree.Element("annotation")
    for tag, text in (("folder", "voc"), ("filename", file_name)):
        ElementTree.SubElement(root, tag).text = text
    _children(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    ElementTree.SubElement(root, "segmented").text = "0"
    for thing in scene.objects:
        node = ElementTree.SubElement(root, "object")
        _children(node, name=thing.name, pose="Unspecified", truncated=int(thing.in_frame < 0.95),
                  occluded=int(thing.visible < 0.95 * thing.in_frame),
                  difficult=int(thing.crowd or thing.visible < 0.5))
        x0, y0, x1, y1 = (int(v) for v in thing.box)
        _children(ElementTree.SubElement(node, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ElementTree.indent(root)
    return ElementTree.tostring(root)


def _children(node: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(node, tag).text = str(text)
