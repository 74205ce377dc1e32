"""Contact sheets: images with their annotations drawn, in a grid, as PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import ImageError, read_image
from detres.data.kinds import KINDS
from detres.data.masks import rasterize
from detres.data.view import Entry, Selection, problem_box, problem_text, size_note
from detres.engine.checkpoint import atomic_write
from detres.inference.draw import Objects, color_of, draw_labels, draw_objects, sized_font

TILE, HEIGHT = 440, 360  # pixels: the greatest width and height of a tile
COLUMNS, ROWS = 4, 3  # of a sheet
GAP = 12
CAPTION = 13  # size of the letters
LINES = 6  # of a caption
ALERT = (220, 0, 30)  # frames what is wrong
FRAME = 16  # pixels: the least side of a frame

Tile = tuple[Image.Image, list[str]]  # with the lines of its caption, of which all but the first are in ALERT


def write_sheets(selection: Selection, out: Path) -> list[Path]:
    """Writes the images of a selection, COLUMNS x ROWS on a sheet; of several sheets, the files have numbers."""
    sheets = [selection.entries[i:i + COLUMNS * ROWS] for i in range(0, len(selection.entries), COLUMNS * ROWS)]
    files = [out] if len(sheets) == 1 else [out.with_stem(f"{out.stem}_{i + 1}") for i in range(len(sheets))]
    for file, entries in zip(files, sheets):
        save(grid([draw_entry(entry, selection.classes) for entry in entries], COLUMNS), file)
    return files


def save(sheet: Image.Image, file: Path) -> None:
    with atomic_write(file) as temporary:
        sheet.save(temporary, format="PNG", compress_level=4)  # a tenth of the time of the best, 6% larger


def draw_entry(entry: Entry, classes: Sequence[str]) -> Tile:
    """The image, fit into a tile, with what is annotated; where it cannot be read, a tile that says why."""
    size = f", {entry.record.width} x {entry.record.height}" if entry.record else ""
    caption = [f"{entry.name} ({entry.split}{size})"]
    problems = [f"{KINDS[problem.kind].title}: {problem_text(problem)}" for problem in entry.problems]
    if entry.record is None:
        return placeholder("The image cannot be shown."), caption + problems
    try:
        image = read_image(entry.record.path)
        scale = tile_scale(*image.shape[:2])
        picture = draw_record(image, entry.dataset, entry.record, classes, scale)
    except ImageError as error:  # of the image, or of a PNG with its masks
        return placeholder(str(error)), caption + problems
    for problem in entry.problems:
        if box := problem_box(problem, entry.record):
            _frame(picture, np.array(box) * scale)
    note = size_note(entry.record, image.shape[:2])
    return picture, caption + [note] * bool(note) + problems


def draw_record(image: np.ndarray, dataset: Dataset, record: ImageRecord, classes: Sequence[str],
                scale: float) -> Image.Image:
    """An image (H, W, 3) at a scale with all annotations of its record, or the classes of its pixels."""
    if record.label_map is not None and not record.annotations:
        return draw_pixels(image, record.label_map.read(record), dataset.classes, scale)
    return draw_scaled(image, objects_of(dataset, record, classes, image.shape[:2]), scale)


def objects_of(dataset: Dataset, record: ImageRecord, classes: Sequence[str], size: tuple[int, int]) -> Objects:
    """The annotations of a record, largest first, on its image of a size (height, width). `classes` are those whose
    places choose the colours."""
    items = sorted(record.annotations, key=lambda item: (item.box[0] - item.box[2]) * (item.box[3] - item.box[1]))
    names = [dataset.classes[item.label] for item in items]
    masks = points = None
    if any(item.segmentation for item in items):
        masks = [_mask(item, record, size) for item in items]
    if any(item.keypoints for item in items):
        absent = (0.0,) * 3 * len(dataset.keypoint_names)
        points = np.array([item.keypoints or absent for item in items], float).reshape(len(items), -1, 3)
    return Objects(np.array([item.box for item in items], float).reshape(-1, 4),
                   [label_text(name, item.crowd, item.difficult) for item, name in zip(items, names)],
                   [color_of(classes.index(name)) for name in names], masks, points, dataset.skeleton,
                   np.array([item.crowd for item in items], bool), np.array([item.difficult for item in items], bool))


def label_text(name: str, crowd: bool, difficult: bool) -> str:
    return name + ", crowd" * crowd + ", difficult" * difficult


def _mask(item: Annotation, record: ImageRecord, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool; the file may have another size than its annotations state."""
    on_image = np.zeros(size, bool)
    if item.segmentation:
        stated = rasterize(item.segmentation, record.height, record.width)[:size[0], :size[1]]
        on_image[:stated.shape[0], :stated.shape[1]] = stated
    return on_image


def draw_scaled(image: np.ndarray, objects: Objects, scale: float) -> Image.Image:
    """An image (H, W, 3) at a scale, and its objects drawn on it there, so that lines and letters stay legible."""
    shrunk = _resized(image, scale)
    ratio = np.divide(shrunk.shape[1::-1], image.shape[1::-1])  # x, y
    boxes = (objects.boxes * np.tile(ratio, 2)).clip(0, np.tile(shrunk.shape[1::-1], 2))
    masks, points = objects.masks, objects.keypoints
    if masks is not None:
        masks = [_resized_map(mask.view(np.uint8), shrunk).astype(bool) for mask in masks]
    if points is not None:
        points = points * np.append(ratio, 1)
    objects = replace(objects, boxes=boxes, masks=masks, keypoints=points)
    return draw_objects(shrunk, objects, boxes=True, scale=1, keypoint_thresh=0.5)


def draw_pixels(image: np.ndarray, labels: np.ndarray, classes: Sequence[str], scale: float) -> Image.Image:
    """An image (H, W, 3) at a scale with the classes (H, W) of its pixels."""
    shrunk = _resized(image, scale)
    return draw_labels(shrunk, _resized_map(labels, shrunk), classes, legend=False, scale=1)


def _resized(image: np.ndarray, scale: float) -> np.ndarray:
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _resized_map(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return cv2.resize(values, like.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def tile_scale(height: int, width: int) -> float:
    """By which an image fits a tile."""
    return min(TILE / width, HEIGHT / height)


def _frame(picture: Image.Image, box: np.ndarray) -> None:
    """Mark a box, xyxy; of one outside the picture, the nearest part of the edge."""
    x1, y1, x2, y2 = np.clip(box, 0, np.tile(np.array(picture.size) - 1, 2)).tolist()
    (x1, x2), (y1, y2) = (_at_least(*sorted(ends)) for ends in ((x1, x2), (y1, y2)))
    pen = ImageDraw.Draw(picture)
    for width, color in ((7, (255, 255, 255)), (3, ALERT)):
        grown = (width - 1) / 2
        pen.rectangle((x1 - grown, y1 - grown, x2 + grown, y2 + grown), outline=color, width=width)


def _at_least(low: float, high: float) -> tuple[float, float]:
    """Both ends moved out where a frame would be a dot."""
    short = max(0, (FRAME - high + low) / 2)
    return low - short, high + short


# Layout


def placeholder(reason: str, size: tuple[int, int] = (HEIGHT * 4 // 5, TILE)) -> Image.Image:
    """A tile of a size (height, width) that says why there is no image."""
    picture = Image.new("RGB", size[::-1], (228, 228, 228))
    pen, font = ImageDraw.Draw(picture), sized_font(CAPTION + 2)
    pen.line((0, 0, *picture.size), fill=(205, 205, 205), width=2)
    pen.line((0, picture.height, picture.width, 0), fill=(205, 205, 205), width=2)
    lines = wrapped(reason, font, picture.width - 4 * GAP)[:8]
    pen.multiline_text((picture.width / 2, picture.height / 2), "\n".join(lines), fill=ALERT, font=font, anchor="mm",
                       align="center")
    return picture


def grid(tiles: Sequence[Tile], columns: int) -> Image.Image:
    """Tiles with the lines of their captions, row by row; a row is as high as its highest tile."""
    font = sized_font(CAPTION)
    line = sum(font.getmetrics()) + 1
    columns = min(columns, len(tiles))
    captions = [list(_caption_lines(texts, font)) for _, texts in tiles]
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    heights = [max(tiles[i][0].height + 4 + line * len(captions[i]) for i in row) + GAP for row in rows]
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, sum(heights) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, top in zip(rows, np.cumsum([GAP, *heights[:-1]]).tolist()):
        for column, i in enumerate(row):
            left = GAP + column * (TILE + GAP)
            sheet.paste(tiles[i][0], (left, top))
            for number, (text, color) in enumerate(captions[i]):
                pen.text((left, top + tiles[i][0].height + 4 + number * line), text, fill=color, font=font)
    return sheet


def _caption_lines(texts: Sequence[str], font) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The first text on one line, then up to LINES of the others."""
    head, *others = texts
    yield wrapped(head, font, TILE)[0], (40, 40, 40)
    lines = [line for text in others for line in wrapped(text, font, TILE)]
    for line in lines[:LINES - 1 if len(lines) > LINES else LINES]:
        yield line, ALERT
    if len(lines) > LINES:
        yield "...", ALERT


def wrapped(text: str, font, width: float) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces, or anywhere in longer words."""
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        if font.getlength(f"{lines[-1]} {word}") <= width or not lines[-1]:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
        while font.getlength(lines[-1]) > width:
            fit = next(n for n in range(len(lines[-1]) - 1, 0, -1) if font.getlength(lines[-1][:n]) <= width or n == 1)
            lines[-1:] = [lines[-1][:fit], lines[-1][fit:]]
    return lines
