"""Pictures of predictions and annotations, fit for print: translucent masks with outlines, or boxes, keypoints with
their skeleton, and labels that do not collide.

A class has the same colour in every picture. Line widths and text grow with the image, and small images are enlarged
first, so that labels stay readable. A label lies on its object's mask where there is room, else beside the object. It
covers no other label and hides no other object; where that cannot be, it is left out (the colour tells the class).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from detres.inference.predictor import Prediction

Color = tuple[int, int, int]

# After Paul Tol's vibrant and muted schemes for any colour vision (personal.sron.nl/~pault);
# the first ones differ most.
PALETTE = ("#1F77D0", "#F07F23", "#00A08A", "#EE3377", "#33BBEE", "#D0331A", "#E5B022", "#A347A8", "#3FA34D", "#5B63E0",
           "#D9678A", "#8E9A1F", "#1E9CB5", "#8F2A5B", "#B97A2A", "#157A3C")
SMALLEST = 480  # pixels; an image with a shorter long side is enlarged by a whole factor to at least this
FILL = 0.42  # opacity of masks
CROWDED = 0.04  # part of a label that others may cover at most
HIDING = 1.2  # objects that a label may hide at most, in sum of their hidden parts


def color_of(index: int) -> Color:
    """The RGB colour of a class (or an instance); every further round through the palette is lighter, then darker."""
    turn, place = divmod(index, len(PALETTE))
    color = np.array([int(PALETTE[place][i:i + 2], 16) for i in (1, 3, 5)])
    towards, strength = ((0, 0.0), (255, 0.3), (0, 0.35))[turn % 3]
    return tuple(int(c) for c in np.rint(color + (towards - color) * strength))


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels of the canvas."""

    scale: int  # canvas pixels per image pixel
    line: int  # of boxes
    outline: int  # of masks, to which cv2 adds a soft rim
    font: int

    @classmethod
    def of(cls, height: int, width: int, scale: int | None) -> _Style:
        scale = scale or max(1, -(-SMALLEST // max(height, width)))
        side = (height * width) ** 0.5 * scale
        return cls(scale, line=max(2, round(side / 220)), outline=max(1, round(side / 280)),
                   font=max(11, round(side / 42)))


@dataclass(frozen=True)
class Objects:
    """What is drawn of one image: D objects, those first whose labels matter most. Pixels of the image."""

    boxes: np.ndarray  # (D, 4) xyxy
    texts: Sequence[str]  # on the labels
    colors: Sequence[Color]
    masks: Sequence[np.ndarray] | None = None  # (H, W) bool each
    keypoints: np.ndarray | None = None  # (D, J, 3) x, y, score
    skeleton: Sequence[tuple[int, int]] = ()  # keypoints that a line joins
    crowd: np.ndarray | None = None  # (D,) bool: hatched, with dashed boxes
    difficult: np.ndarray | None = None  # (D,) bool: dashed boxes


def draw(image: np.ndarray, prediction: Prediction, *, boxes: bool | None = None, masks: bool = True,
         labels: bool = True, scores: bool = True, color_by: Literal["class", "instance"] = "class",
         scale: int | None = None, keypoint_thresh: float = 0.05) -> Image.Image:
    """A picture of what was found in an image (H, W, 3) RGB uint8.

    `boxes`: None draws them where there is no mask to show. `keypoint_thresh`: the score of keypoints that are drawn.
    `scale`: whole factor by which the image is enlarged; None chooses one for small images.
    """
    found = prediction.numpy()
    colors = [color_of(label if color_by == "class" else i) for i, label in enumerate(found["labels"].tolist())]
    texts = [f"{name} {score:.2f}" if scores and not np.isnan(score) else name
             for name, score in zip(prediction.names, found["scores"])]
    objects = Objects(found["boxes"], texts, colors, found["masks"] if masks else None, found["keypoints"],
                      prediction.skeleton)
    return draw_objects(image, objects, boxes=boxes, labels=labels, scale=scale, keypoint_thresh=keypoint_thresh)


def draw_objects(image: np.ndarray, objects: Objects, *, boxes: bool | None = None, labels: bool = True,
                 scale: int | None = None, keypoint_thresh: float = 0.05) -> Image.Image:
    """A picture of an image (H, W, 3) RGB uint8 with its objects; options as in `draw`."""
    style = _Style.of(*image.shape[:2], scale)
    canvas = _enlarged(image, style)
    corners = objects.boxes * style.scale  # (D, 4)
    crowd, difficult = (np.zeros(len(corners), bool) if flags is None else flags
                        for flags in (objects.crowd, objects.difficult))
    for i in np.argsort(-_areas(corners), kind="stable"):  # the small ones on top
        if objects.masks is not None:
            _draw_mask(canvas, objects.masks[i], objects.colors[i], style, hatched=crowd[i])
        if boxes or (boxes is None and objects.masks is None):
            _draw_box(canvas, corners[i], objects.colors[i], style, dashed=crowd[i] or difficult[i])
    points = () if objects.keypoints is None else objects.keypoints
    for place, color in reversed(list(zip(points, objects.colors))):
        _draw_keypoints(canvas, place, objects.skeleton, color, style, keypoint_thresh)
    picture = Image.fromarray(canvas)
    if labels:
        middles = [None] * len(corners) if objects.masks is None else [_middle(mask, style.scale)
                                                                       for mask in objects.masks]
        _draw_labels(picture, corners, middles, objects.texts, objects.colors, style)
    return picture


def draw_labels(image: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, legend: bool = True,
                scale: int | None = None) -> Image.Image:
    """A picture of an image (H, W, 3) RGB uint8 with the classes (H, W) of its pixels, all but one called background,
    and a legend at its right, the largest first. `scale` as in `draw`."""
    style = _Style.of(*image.shape[:2], scale)
    canvas = _enlarged(image, style)
    present, counts = np.unique(labels[labels < len(classes)], return_counts=True)
    order = [k for k in present[np.argsort(-counts, kind="stable")].tolist() if classes[k] != "background"]
    for k in order:
        _draw_mask(canvas, labels == k, color_of(k), style)
    return _with_legend(canvas, order, classes, style) if legend and order else Image.fromarray(canvas)


def _with_legend(canvas: np.ndarray, order: Sequence[int], classes: Sequence[str], style: _Style) -> Image.Image:
    """A panel beside the canvas with the colours of the classes; those for which there is no room are left out."""
    height, width = canvas.shape[:2]
    font = sized_font(style.font)
    pad, line = max(2, round(font.size * 0.5)), round(sum(font.getmetrics()) * 1.3)
    shown = order[:max(1, (height - pad) // line)]
    side = line - pad
    panel = 3 * pad + side + max(round(font.getlength(classes[k])) for k in shown)
    picture = Image.new("RGB", (width + panel, height), "white")
    picture.paste(Image.fromarray(canvas))
    pen = ImageDraw.Draw(picture)
    for row, k in enumerate(shown):
        x, y = width + pad, pad + row * line
        pen.rectangle((x, y, x + side, y + side), fill=color_of(k))
        pen.text((x + side + pad, y + side / 2), classes[k], fill="black", font=font, anchor="lm")
    return picture


def draw_names(image: np.ndarray, texts: Sequence[str], labels: Sequence[int]) -> Image.Image:
    """A picture of an image (H, W, 3) RGB uint8 with lines of text in its corner, in the colours of class labels."""
    style = _Style.of(*image.shape[:2], None)
    picture, font = Image.fromarray(_enlarged(image, style)), sized_font(style.font)
    pad, height = max(2, round(font.size * 0.3)), sum(font.getmetrics())
    for row, (text, label) in enumerate(zip(texts, labels)):
        top = pad + row * (height + pad)
        plate = np.array([pad, top, 3 * pad + np.ceil(font.getlength(text)), top + height])
        _draw_plate(picture, plate, text, font, color_of(label), pad)
    return picture


def _enlarged(image: np.ndarray, style: _Style) -> np.ndarray:
    """A copy at the scale of the canvas."""
    if style.scale == 1:
        return image.copy()
    return cv2.resize(image, None, fx=style.scale, fy=style.scale, interpolation=cv2.INTER_CUBIC)


def _areas(corners: np.ndarray) -> np.ndarray:
    return (corners[:, 2:] - corners[:, :2]).prod(1)


def _draw_box(canvas: np.ndarray, corners: np.ndarray, color: Color, style: _Style, dashed: bool = False) -> None:
    """A frame within the box, so that boxes at the border show whole."""
    x1, y1, x2, y2 = np.rint(corners).astype(int)
    inside = canvas[y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)]
    for strip in (inside[:style.line], inside[-style.line:], inside[:, :style.line], inside[:, -style.line:]):
        drawn = _stripes(strip.shape[:2], 4 * style.line) if dashed else np.ones(strip.shape[:2], bool)
        strip[drawn] = color


def _stripes(shape: tuple[int, ...], width: int) -> np.ndarray:
    """(H, W) bool: slanting stripes with gaps as wide; along a narrow strip, dashes."""
    return np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % (2 * width) < width


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, color: Color, style: _Style, hatched: bool = False) -> None:
    """Blend one mask (H, W) bool into the canvas, within its own bounds, and draw its outline."""
    part, left, top = _cropped(mask, margin=2)
    if not part.any():
        return
    # Enlarging and a slight blur turn the stairs of pixels into a smooth edge, inside which alpha falls off.
    soft = cv2.resize(part.astype(np.float32), None, fx=style.scale, fy=style.scale, interpolation=cv2.INTER_LINEAR)
    soft = cv2.GaussianBlur(soft, (0, 0), 0.5 + 0.5 * style.scale)
    y, x = top * style.scale, left * style.scale
    window = canvas[y:y + soft.shape[0], x:x + soft.shape[1]]
    alpha = FILL * soft[..., None] * (_stripes(soft.shape, 3 * style.line)[..., None] if hatched else 1)
    window[:] = np.rint(window * (1 - alpha) + np.array(color) * alpha)
    contours, _ = cv2.findContours((soft >= 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    line = style.outline if part.sum() ** 0.5 * style.scale > 20 * style.outline else max(1, style.outline // 2)
    cv2.polylines(canvas, [contour + np.int32([x, y]) for contour in contours], True, color, line, cv2.LINE_AA)


def _draw_keypoints(canvas: np.ndarray, points: np.ndarray, skeleton: Sequence[tuple[int, int]], color: Color,
                    style: _Style, threshold: float) -> None:
    """Points (J, 3) as discs, and lines between those that the skeleton joins."""
    fine = 4  # bits after the point
    places = np.rint((points[:, :2] * style.scale - 0.5) * 2**fine).astype(int).tolist()
    sure = points[:, 2] >= threshold
    pale = tuple((128 + np.array(color) // 2).tolist())
    for a, b in skeleton:
        if sure[a] and sure[b]:
            cv2.line(canvas, places[a], places[b], color, style.line, cv2.LINE_AA, fine)
    for place, drawn in zip(places, sure):
        if drawn:
            for radius, fill in ((1.6, color), (0.9, pale)):
                cv2.circle(canvas, place, round(radius * style.line * 2**fine), fill, -1, cv2.LINE_AA, fine)


def _cropped(mask: np.ndarray, margin: int) -> tuple[np.ndarray, int, int]:
    """The part of a mask (H, W) that holds all of it, and the left and top of that part."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return mask[:0, :0], 0, 0
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    return mask[top:rows[-1] + 1 + margin, left:columns[-1] + 1 + margin], left, top


# ---- labels --------------------------------------------------------------------------------------------------------


class _Middle(NamedTuple):
    """The largest circle inside a mask: where a label is surely on the object. Pixels of the canvas."""

    x: float
    y: float
    radius: float


def _middle(mask: np.ndarray, scale: int) -> _Middle | None:
    part, left, top = _cropped(mask, margin=0)
    if not part.size:
        return None
    depth = cv2.distanceTransform(np.pad(part, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return _Middle((left + x - 0.5) * scale, (top + y - 0.5) * scale, float(depth.max()) * scale)


def _draw_labels(picture: Image.Image, corners: np.ndarray, middles: list[_Middle | None], texts: list[str],
                 colors: list[Color], style: _Style) -> None:
    """Put a plate with its text at each object, in the order given (best first)."""
    placed = np.zeros((0, 4))
    for i, text in enumerate(texts):
        font = sized_font(_font_size(corners[i], style))
        pad = max(2, round(font.size * 0.3))
        size = np.ceil([font.getlength(text) + 2 * pad, sum(font.getmetrics()) + pad * 0.5])
        plates = _places(corners[i], middles[i], size, picture.size)
        plate = _best(plates, placed, corners)
        if plate is not None:
            placed = np.vstack([placed, plate])
            _draw_plate(picture, plate, text, font, colors[i], pad)


def _font_size(box: np.ndarray, style: _Style) -> int:
    """Smaller for small objects, so that a label does not bury what it names."""
    side = float(np.sqrt(np.prod(box[2:] - box[:2])))
    return max(10, round(style.font * np.clip(0.7 + side / (20 * style.font), 0.7, 1.0)))


def _places(box: np.ndarray, middle: _Middle | None, size: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    """Corners (C, 4) that a plate of `size` (width, height) may have, within the picture, the favourite first."""
    (x1, y1, x2, y2), (w, h) = box, size
    starts = [(x1, y1 - h), (x1, y1), (x2 - w, y1 - h), (x2 - w, y1), (x1, y2), (x1, y2 - h), (x2, y1), (x1 - w, y1),
              ((x1 + x2 - w) / 2, (y1 + y2 - h) / 2)]
    if middle and np.hypot(w, h) < 2.2 * middle.radius and w * h < 0.15 * (x2 - x1) * (y2 - y1):  # ample room inside
        starts.insert(0, (middle.x - w / 2, middle.y - h / 2))
    starts = np.rint(np.clip(starts, 0, np.maximum(np.array(limits) - size, 0)))
    return np.hstack([starts, starts + size])


def _best(plates: np.ndarray, placed: np.ndarray, corners: np.ndarray) -> np.ndarray | None:
    """The plate that covers least of the plates already placed and of the objects; None where all cover too much."""
    covered = _shared(plates, placed).sum(1) / _areas(plates)
    hidden = (_shared(plates, corners) / np.maximum(_areas(corners), 1)).sum(1)
    cost = 10 * covered + hidden + 0.1 * np.arange(len(plates))
    best = int(np.argmin(cost))
    return plates[best] if covered[best] <= CROWDED and hidden[best] <= HIDING else None


def _shared(plates: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Areas (C, B) that plates (C, 4) and boxes (B, 4) have in common."""
    sides = np.minimum(plates[:, None, 2:], boxes[:, 2:]) - np.maximum(plates[:, None, :2], boxes[:, :2])
    return np.clip(sides, 0, None).prod(-1)


def _draw_plate(picture: Image.Image, plate: np.ndarray, text: str, font: ImageFont.FreeTypeFont, color: Color,
                pad: int) -> None:
    x1, y1, x2, y2 = plate.astype(int)
    fine = 4  # PIL does not smooth shapes: draw large, shrink
    cover = Image.new("L", ((x2 - x1) * fine, (y2 - y1) * fine))
    outline = (0, 0, cover.width - 1, cover.height - 1)
    ImageDraw.Draw(cover).rounded_rectangle(outline, radius=pad * fine * 0.6, fill=235)
    picture.paste(Image.new("RGB", (x2 - x1, y2 - y1), color), (x1, y1), cover.reduce(fine))
    ImageDraw.Draw(picture).text((x1 + pad, (y1 + y2) / 2), text, fill=ink_on(color), font=font, anchor="lm")


def ink_on(color: Color) -> str:
    """White where it contrasts enough with a colour (3:1 by the relative luminance of WCAG 2), else black."""
    channels = np.array(color) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "white" if 1.05 / (luminance + 0.05) >= 3 else "black"


@functools.lru_cache
def sized_font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # comes with DejaVu Sans, which covers Latin, Greek, Cyrillic and much more

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
