"""The things of the built-in data set: outlines with keypoints, exact coverage, and how they are painted.

An outline lives in the unit circle, y down, upright. A part is a list of closed contours filled even-odd (an
inner contour is a hole); a shape is the union of its parts. Pixels are integers throughout, as in
`shapes_texture`, so that every machine draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import RandomState

from detres.data.shapes_texture import cut

SUB = 4  # samples per pixel side; coverage counts SUB * SUB = 16 of them
KEYPOINT_NAMES = ("head", "neck", "left_elbow", "right_elbow", "left_hand", "right_hand", "hip",
                  "left_knee", "right_knee", "left_foot", "right_foot")
SKELETON = ((1, 2), (2, 3), (3, 5), (2, 4), (4, 6), (2, 7), (7, 8), (8, 10), (7, 9), (9, 11))  # from 1, as in COCO

Contour = np.ndarray  # (P, 2) float64 x, y
Joints = dict[str, tuple[float, float]]
_CIRCLE = np.array([(math.cos(math.pi * i / 36), math.sin(math.pi * i / 36)) for i in range(72)])


@dataclass(frozen=True)
class Outline:
    parts: list[list[Contour]]
    joints: Joints  # by keypoint name; empty for classes without keypoints


@dataclass(frozen=True)
class Patch:
    """Coverage of the pixels around a thing, in sixteenths, and where its corner lies in the picture."""

    cover: np.ndarray  # (h, w) uint8, 0..16
    top: int
    left: int

    @property
    def mask(self) -> np.ndarray:
        """Pixels of which at least half is covered, (h, w) bool."""
        return self.cover >= SUB * SUB // 2


def _disc(rng: RandomState, grain: float) -> Outline:
    return Outline([[_CIRCLE]], {})


def _square(rng: RandomState, grain: float) -> Outline:
    side = math.sqrt(0.5)
    return Outline([[np.array([(-side, -side), (side, -side), (side, side), (-side, side)])]], {})


def _star_points(spikes: int, inner: float) -> Contour:
    angles = (math.pi * i / spikes for i in range(2 * spikes))
    return np.array([((1, inner)[i % 2] * math.sin(a), -(1, inner)[i % 2] * math.cos(a)) for i, a in enumerate(angles)])


def _triangle(rng: RandomState, grain: float) -> Outline:
    return Outline([[_star_points(3, 0.5)]], {})


def _star(rng: RandomState, grain: float) -> Outline:
    return Outline([[_star_points(int(rng.randint(5, 8)), rng.uniform(0.42, 0.52))]], {})


def _ring(rng: RandomState, grain: float) -> Outline:
    return Outline([[_CIRCLE, _CIRCLE * rng.uniform(0.45, 0.65)]], {})


def _cross(rng: RandomState, grain: float) -> Outline:
    w = rng.uniform(0.24, 0.34)
    arm = np.array([(-w, -0.95), (w, -0.95), (w, 0.95), (-w, 0.95)])
    return Outline([[arm], [arm[:, ::-1].copy()]], {})


def _arrow(rng: RandomState, grain: float) -> Outline:
    w = rng.uniform(0.17, 0.25)
    half = np.array([(0, -0.98), (0.66, -0.2), (w, -0.2), (w, 0.95)])
    joints = {"head": (0, -0.86), "neck": (0, -0.2), "hip": (0, 0.82)}
    for side, name in ((1, "left"), (-1, "right")):
        joints |= {f"{name}_hand": (side * 0.5, -0.27), f"{name}_foot": (side * (w - 0.08), 0.86)}
    return Outline([[np.vstack([half, half[::-1] * (-1, 1)])]], joints)


def _figure(rng: RandomState, grain: float) -> Outline:
    """A person from the front, so its own left is at positive x; limbs keep `grain`, the least radius."""
    joints: Joints = {"head": (0, -0.7), "neck": (0, -0.42), "hip": (0, 0.14)}
    parts = [[_CIRCLE * 0.24 + (0, -0.7)], [_limb((0, -0.24), (0, 0.1), max(0.19, grain))],
             [_limb((0, -0.5), (0, -0.3), max(0.09, grain))]]
    for side, name in ((1, "left"), (-1, "right")):
        raise_ = math.radians(rng.uniform(5, 140))
        bend = raise_ + math.radians(rng.uniform(-50, 60))
        swing = math.radians(rng.uniform(2, 38))
        shin = swing + math.radians(rng.uniform(-35, 10))
        shoulder, socket = (side * 0.16, -0.34), (side * 0.1, 0.16)
        elbow, knee = _step(shoulder, 0.3, side, raise_), _step(socket, 0.38, side, swing)
        hand, foot = _step(elbow, 0.28, side, bend), _step(knee, 0.36, side, shin)
        joints |= {f"{name}_elbow": elbow, f"{name}_hand": hand, f"{name}_knee": knee, f"{name}_foot": foot}
        parts += [[_limb(a, b, max(r, grain))] for a, b, r in
                  ((shoulder, elbow, 0.085), (elbow, hand, 0.08), (socket, knee, 0.105), (knee, foot, 0.09))]
    return Outline(parts, joints)


def _step(start: tuple[float, float], length: float, side: int, angle: float) -> tuple[float, float]:
    """End of a bone that hangs down at angle 0 and points outwards at 90 degrees."""
    return start[0] + side * length * math.sin(angle), start[1] + length * math.cos(angle)


def _limb(start: tuple[float, float], end: tuple[float, float], radius: float) -> Contour:
    """A rod with round ends."""
    along = math.atan2(end[1] - start[1], end[0] - start[0])
    turns = [along + math.pi * (i / 12 - 0.5) for i in range(13)]
    cap = np.array([(math.cos(turn), math.sin(turn)) for turn in turns]) * radius
    return np.vstack([cap + end, start - cap])


OUTLINES: dict[str, Callable[[RandomState, float], Outline]] = {
    "disc": _disc, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring, "cross": _cross,
    "arrow": _arrow, "figure": _figure,
}


def place(outline: Outline, radius: float, angle: float, squeeze: float,
          centre: tuple[float, float]) -> tuple[Patch, Joints]:
    """Turns, scales and moves an outline into the picture; `radius` and `centre` in pixels, `angle` in radians.

    `squeeze` narrows it along its own x axis. The patch has a margin for blur and shadow around the shape.
    """
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius

    def move(points: np.ndarray) -> np.ndarray:
        x, y = points[:, 0] * squeeze, points[:, 1]
        return np.stack([x * cos - y * sin + centre[0], x * sin + y * cos + centre[1]], 1)

    parts = [[move(contour) for contour in part] for part in outline.parts]
    points = np.concatenate([contour for part in parts for contour in part])
    margin = 2 + int(0.2 * radius)
    left, top = (math.floor(v) - margin for v in points.min(0))
    width, height = math.ceil(points[:, 0].max()) + margin - left, math.ceil(points[:, 1].max()) + margin - top
    patch = Patch(_coverage(parts, top, left, height, width), top, left)
    joints = {name: tuple(move(np.array([point]))[0].tolist()) for name, point in outline.joints.items()}
    return patch, joints


def _coverage(parts: list[list[Contour]], top: int, left: int, height: int, width: int) -> np.ndarray:
    canvas = np.zeros((height * SUB, width * SUB), np.uint8)
    for part in parts:
        # whole numbers are the centres of samples; in steps of 1/256, so that no last bit of a sine shows
        _fill(canvas, [np.round(((contour - (left, top)) * SUB - 0.5) * 256) / 256 for contour in part])
    return cv2.resize(canvas * (SUB * SUB), (width, height), interpolation=cv2.INTER_AREA)  # mean of 0s and 16s


def _fill(canvas: np.ndarray, contours: list[Contour]) -> None:
    """Sets the samples with their centre inside, even-odd. `cv2.fillPoly` paints the rim too, and varies by version."""
    points = np.concatenate(contours)
    (left, top), (right, bottom) = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int) + 1
    turns = np.zeros((bottom - top, right - left + 1), np.uint8)  # 1 where a row changes between outside and inside
    rows = np.arange(top, bottom)[:, None]
    for contour in contours:
        (x0, y0), (x1, y1) = contour.T, np.roll(contour, -1, 0).T
        row, edge = np.nonzero((y0 <= rows) != (y1 <= rows))
        x = x0[edge] + (row + top - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
        np.bitwise_xor.at(turns, (row, np.floor(x).astype(int) + 1 - left), 1)
    canvas[top:bottom, left:right] |= np.bitwise_xor.accumulate(turns, 1)[:, :-1]


@dataclass(frozen=True)
class Light:
    """Where light comes from, and its shadows."""

    x: int  # of a unit vector, in 1/256
    y: int
    shadow: int  # how dark, 0..255
    reach: float  # how far, in object sizes


@dataclass(frozen=True)
class Surface:
    texture: str
    zoom: float
    ramp: np.ndarray  # (256, 3) uint8
    relief: int  # how strong edges are lit, in 1/256
    bevel: float  # how wide they are, in object sizes
    gloss: int  # how strong highlights are, in 1/256


def cast_shadow(image: np.ndarray, patch: Patch, size: float, light: Light) -> None:
    """Darkens `image` (H, W, 3) uint8 in place where the thing keeps the light away."""
    blur = 2 * int(0.11 * size) + 3
    soft = cv2.GaussianBlur(patch.cover * 15, (blur, blur), 0).astype(np.uint16)
    shift_y, shift_x = (-round(v * size * light.reach / 256) for v in (light.y, light.x))
    inside = overlap(image, patch, shift_y, shift_x)
    if inside is not None:
        region, part = inside
        region[:] = region * (256 - (soft[part] * light.shadow >> 8))[..., None] >> 8


def paint(image: np.ndarray, patch: Patch, size: float, light: Light, surface: Surface, rng: RandomState) -> None:
    """Draws the thing over `image` (H, W, 3) uint8 in place: textured, lit from the side, with smooth edges."""
    height, width = patch.cover.shape
    texture = cut(surface.texture, rng, height, width, surface.zoom)
    bright, gleam = _relief(patch.cover, size, light, surface)
    inside = overlap(image, patch)
    if inside is None:
        return
    region, part = inside
    lit = (surface.ramp[texture[part]] * bright[part][..., None] >> 8) + gleam[part][..., None]
    cover = patch.cover[part][..., None].astype(np.int32)
    region[:] = region * (16 - cover) + np.minimum(lit, 255) * cover + 8 >> 4


def _relief(cover: np.ndarray, size: float, light: Light, surface: Surface) -> tuple[np.ndarray, np.ndarray]:
    """Brightness (h, w) int32 in 1/256 and what a highlight adds: edges that face the light, a slope across."""
    height, width = cover.shape
    blur = 2 * int(surface.bevel * size / 2) + 3
    hill = cv2.GaussianBlur(cover * 15, (blur, blur), 0).astype(np.int32)
    step_y, step_x = (round(v * max(1.0, blur / 5) / 256) for v in (light.y, light.x))
    slope = np.roll(hill, (step_y, step_x), (0, 1)) - np.roll(hill, (-step_y, -step_x), (0, 1))
    y, x = (np.arange(n, dtype=np.int32) * 2 - n for n in (height, width))
    across = (light.x * x[None] + light.y * y[:, None]) // max(int(size), 1)  # -256..256 along the light
    bright = 236 + (across * 30 >> 8) + (slope * surface.relief >> 8)
    gleam = np.maximum(slope - 60, 0) * surface.gloss >> 8
    return np.clip(bright, 60, 400), gleam


def overlap(canvas: np.ndarray, patch: Patch, down: int = 0,
            right: int = 0) -> tuple[np.ndarray, tuple[slice, slice]] | None:
    """The view of `canvas` (H, W, ...) under a patch moved by (down, right), and the rows and columns of the patch that
    lie on it; None where none do."""
    over, within = [], []
    for start, length, limit in ((patch.top + down, patch.cover.shape[0], canvas.shape[0]),
                                 (patch.left + right, patch.cover.shape[1], canvas.shape[1])):
        low, high = max(0, -start), min(length, limit - start)
        if low >= high:
            return None
        over.append(slice(low + start, high + start))
        within.append(slice(low, high))
    return canvas[tuple(over)], (within[0], within[1])
