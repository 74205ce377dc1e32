"""A page to look through a data set in a browser, without a network: thumbnails and pictures in a folder beside it,
annotations as data from which its script draws shapes over them.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import ImageError, read_image
from detres.data.kinds import KINDS
from detres.data.masks import rasterize
from detres.data.view import Entry, Selection, problem_box, problem_text, size_note
from detres.engine.checkpoint import atomic_write
from detres.inference.draw import color_of, ink_on
from detres.progress import track

THUMBNAIL, PICTURE = 360, 1280  # pixels: the longest sides of the files
QUALITY = 82  # of JPEG: some 20 and 200 kB an image
SLACK = 0.5  # pixels that an outline traced from a bitmap may be off


def write_page(selection: Selection, out: Path, title: str) -> Path:
    """Writes the page `out` and the folder `<out>_files`; takes the place of those of an earlier run."""
    folder = out.with_name(f"{out.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.jpg"):
        old.unlink()
    page = _Page(folder, selection.classes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(page.image, range(len(selection.entries)), selection.entries)
        shown = list(track(images, len(selection.entries), "write", lambda image: 1))
    template = Path(__file__).with_name("view_page.html").read_text(encoding="utf-8")
    data = {"files": folder.name, "found": selection.found, "images": shown,
            "classes": [[name, _css(color_of(i)), ink_on(color_of(i))] for i, name in enumerate(selection.classes)],
            "kinds": {slug: KINDS[slug]._asdict() for slug in sorted({p["kind"] for image in shown
                                                                      for p in image["problems"]})}}
    with atomic_write(out) as temporary:
        temporary.write_text(template.replace("{{title}}", html.escape(title)).replace("{{data}}", script_json(data)),
                             encoding="utf-8")
    return out


def script_json(data: Any) -> str:
    """JSON that may stand in a script element: no `<` ends it, whatever names hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _css(color: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in color)


class _Page:
    def __init__(self, folder: Path, classes: Sequence[str]):
        self.folder = folder
        self.place = {name: i for i, name in enumerate(classes)}

    def image(self, number: int, entry: Entry) -> dict[str, Any]:
        """What the script knows of an image, whose files are written; "error" says why there are none."""
        record = entry.record
        shown = {"name": entry.name, "split": entry.split, "error": "The image cannot be shown.", "note": "",
                 "size": [4, 3], "problems": [self._problem(problem, record) for problem in entry.problems],
                 "objects": [], "skeleton": entry.dataset.skeleton}
        if record is None:
            return shown | {"id": str(entry.problems[0].image)}
        shown |= {"id": str(record.id), "size": [record.width, record.height]}
        try:
            pixels = read_image(record.path)
            objects = [self._object(item, entry.dataset, record) for item in record.annotations]
        except ImageError as error:  # of the image, or of a PNG with its masks
            return shown | {"error": str(error)}
        shown |= {"size": pixels.shape[1::-1], "note": size_note(record, pixels.shape[:2])}
        for side, suffix in ((PICTURE, ""), (THUMBNAIL, "t")):
            pixels = _fit(pixels, side)
            Image.fromarray(pixels).save(self.folder / f"{number}{suffix}.jpg", quality=QUALITY)
        return shown | {"error": None, "file": str(number), "objects": objects}

    def _object(self, item: Annotation, dataset: Dataset, record: ImageRecord) -> dict[str, Any]:
        return {"id": item.id, "class": self.place[dataset.classes[item.label]], "box": _rounded(item.box),
                "area": round(item.area), "crowd": item.crowd, "difficult": item.difficult,
                "mask": svg_path(_outlines(item, record)), "points": _rounded(item.keypoints or ())}

    def _problem(self, problem, record: ImageRecord | None) -> dict[str, Any]:
        box = problem_box(problem, record)
        return {"kind": problem.kind, "text": problem_text(problem), "id": problem.annotation_id,
                "box": box and _rounded(box)}


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) no longer than `side`."""
    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = [max(1, round(length * scale)) for length in pixels.shape[1::-1]]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 1) for value in values]


def _outlines(item: Annotation, record: ImageRecord) -> Iterator[np.ndarray]:
    """Polygons (P, 2) x, y of a mask; of a bitmap its traced outlines, holes too."""
    if isinstance(item.segmentation, list):
        yield from (np.reshape(polygon, (-1, 2)) for polygon in item.segmentation)
    elif item.segmentation:
        bitmap = rasterize(item.segmentation, record.height, record.width)
        contours, _ = cv2.findContours(bitmap, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        yield from (cv2.approxPolyDP(contour, SLACK, True)[:, 0] + 0.5 for contour in contours)


def svg_path(polygons: Iterable[np.ndarray]) -> str:
    """One path of all polygons, which fills by the even-odd rule."""
    return "".join("M" + " ".join(f"{x:g},{y:g}" for x, y in np.round(points, 1).tolist()) + "Z"
                   for points in polygons)
