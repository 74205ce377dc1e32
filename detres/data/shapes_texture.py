"""The surfaces of the built-in data set: grey-scale textures and the colours laid over them.

Everything is integer arithmetic, or OpenCV functions that are bit-exact on every processor, so that the same
seed gives the same pixels everywhere. `np.random.RandomState` is used for its frozen stream: NumPy guarantees
that it never changes.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
from numpy.random import RandomState

SIDE = 768  # pixels of a texture in the bank; pictures show random cuts of it
_SINE = np.array([round(127.5 + 127.5 * math.sin(2 * math.pi * i / 256)) for i in range(256)], np.int32)

# hue, saturation and value ranges of what each surface is made of
STUFF_COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "plaster": ((0.00, 1.00), (0.04, 0.25), (0.55, 0.95)),
    "wood": ((0.05, 0.11), (0.30, 0.60), (0.40, 0.85)),
    "gravel": ((0.05, 0.65), (0.03, 0.20), (0.45, 0.80)),
    "fabric": ((0.00, 1.00), (0.10, 0.45), (0.35, 0.80)),
    "foliage": ((0.14, 0.38), (0.25, 0.60), (0.35, 0.75)),
    "tiles": ((0.00, 1.00), (0.05, 0.35), (0.50, 0.90)),
    "haze": ((0.00, 1.00), (0.08, 0.40), (0.40, 0.90)),
}


def cut(kind: str, rng: RandomState, height: int, width: int, zoom: float) -> np.ndarray:
    """A random cut (height, width) uint8 of texture `kind`, enlarged `zoom` times, mirrored at random."""
    tile = _texture(kind)
    zoom = max(zoom, height / SIDE, width / SIDE)
    rows, columns = max(1, int(height / zoom)), max(1, int(width / zoom))
    top, left = rng.randint(SIDE - rows + 1), rng.randint(SIDE - columns + 1)
    piece = tile[top:top + rows, left:left + columns]
    if rng.randint(2):
        piece = piece[:, ::-1]
    return cv2.resize(np.ascontiguousarray(piece), (width, height), interpolation=cv2.INTER_LINEAR_EXACT)


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB (3,) int32 in 0..255."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return np.array([round(red * 255), round(green * 255), round(blue * 255)], np.int32)


def stuff_ramp(kind: str, rng: RandomState, contrast: float, vividness: float) -> np.ndarray:
    """Colours (256, 3) uint8 from the dark to the light parts of a background surface."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in STUFF_COLOURS[kind])
    saturation *= vividness
    drift = rng.uniform(-0.04, 0.04)
    return ramp(colour(hue + drift, saturation * 1.15, value * (1 - contrast)),
                colour(hue - drift, saturation * 0.85, value * (1 + contrast)))


def ramp(dark: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Linear blend (256, 3) uint8 from one RGB colour to another."""
    t = np.arange(256)[:, None]
    return ((dark * (255 - t) + light * t + 127) // 255).astype(np.uint8)


@lru_cache(maxsize=None)
def _texture(kind: str) -> np.ndarray:
    """The bank: each texture is drawn once per process, from a seed of its own."""
    rng = RandomState(list(kind.encode()))
    return _spread(_PAINTERS[kind](rng))


def _spread(values: np.ndarray) -> np.ndarray:
    """Integers of any range to uint8 over the whole of 0..255, the outermost values clipped."""
    values = values.astype(np.int64)
    low, high = (int(np.partition(values.ravel(), at)[at]) for at in (values.size // 500, -values.size // 500))
    return (np.clip((values - low) * 255 // max(high - low, 1), 0, 255)).astype(np.uint8)


def _noise(rng: RandomState, rows: int, columns: int, smooth: bool = True) -> np.ndarray:
    """One octave: `rows` x `columns` random values enlarged to the side of the bank, (SIDE, SIDE) uint8."""
    grid = rng.randint(0, 256, (rows, columns)).astype(np.uint8)
    octave = cv2.resize(grid, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR_EXACT)
    cell = SIDE // max(rows, columns)
    return cv2.GaussianBlur(octave, (cell | 1, cell | 1), 0) if smooth and cell > 2 else octave


def _fractal(rng: RandomState, first: int, octaves: int, persistence: float) -> np.ndarray:
    """Multi-octave noise (SIDE, SIDE) int32 in 0..255."""
    total = np.zeros((SIDE, SIDE), np.int32)
    for octave in range(octaves):
        weight = round(256 * persistence ** octave)
        cells = min(first * 2 ** octave, SIDE)
        total += weight * (_noise(rng, cells, cells).astype(np.int32) - 128)
    return _spread(total).astype(np.int32)


def _plaster(rng: RandomState) -> np.ndarray:
    return _fractal(rng, 4, 8, 0.62)


def _wood(rng: RandomState) -> np.ndarray:
    x = np.arange(SIDE)[None]
    bend = _spread(_noise(rng, 2, 10).astype(np.int32) + _noise(rng, 3, 5) // 2).astype(np.int32)
    rings = _SINE[(x * 3 + bend * 4) & 255]
    fibres = _noise(rng, 12, SIDE).astype(np.int32) + _noise(rng, 48, SIDE // 2)
    planks = rng.randint(-60, 60, SIDE // 96)[np.arange(SIDE) // 96]
    joints = np.where(np.arange(SIDE) % 96 < 2, -160, 0)
    return 3 * rings + 2 * fibres + 4 * (planks + joints)[None]


def _scatter(rng: RandomState, count: int, long: tuple[float, float], flat: float,
             shades: tuple[int, int]) -> np.ndarray:
    """`count` small ellipses in random greys, one over the other, (SIDE, SIDE) uint8."""
    canvas = np.full((SIDE, SIDE), shades[0], np.uint8)
    for _ in range(count):
        x, y, turn = rng.randint(SIDE * 16), rng.randint(SIDE * 16), rng.randint(180)
        axis = int(16 * rng.uniform(*long))
        shade = int(rng.randint(*shades))
        axes = (axis, max(8, int(axis * flat * rng.uniform(0.7, 1.3))))
        cv2.ellipse(canvas, (x, y), axes, turn, 0, 360, shade // 2, -1, cv2.LINE_8, 4)  # its dark rim
        inner = (axes[0] * 7 // 8, axes[1] * 7 // 8)
        cv2.ellipse(canvas, (x - 8, y - 8), inner, turn, 0, 360, shade, -1, cv2.LINE_8, 4)
    return cv2.GaussianBlur(canvas, (3, 3), 0)


def _gravel(rng: RandomState) -> np.ndarray:
    return 4 * _scatter(rng, 9000, (3, 8), 0.75, (70, 220)).astype(np.int32) + _fractal(rng, 96, 3, 0.8)


def _foliage(rng: RandomState) -> np.ndarray:
    return 3 * _scatter(rng, 9000, (4, 13), 0.3, (40, 240)).astype(np.int32) + 2 * _fractal(rng, 6, 3, 0.6)


def _fabric(rng: RandomState) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    warp, weft = _SINE[(x * 40) & 255], _SINE[(y * 40) & 255]
    weave = np.where((x * 40 // 256 + y * 40 // 256) % 2, warp, weft)
    bands = 60 * ((x // 48) % 3 == 0) + 60 * ((y // 48) % 3 == 0)
    return weave + 3 * bands + _fractal(rng, 6, 7, 0.75)


def _tiles(rng: RandomState) -> np.ndarray:
    rows, columns = np.arange(SIDE) // 32, np.arange(SIDE)[None] + (np.arange(SIDE) // 32 % 2 * 32)[:, None]
    shades = rng.randint(-70, 70, (SIDE // 32, SIDE // 64 + 2))[rows[:, None], columns // 64]
    joints = (np.arange(SIDE) % 32 < 3)[:, None] | (columns % 64 < 3)
    soft = cv2.GaussianBlur(np.where(joints, 0, 200).astype(np.uint8), (3, 3), 0).astype(np.int32)
    return 2 * (shades + soft) + _fractal(rng, 12, 6, 0.75)


def _haze(rng: RandomState) -> np.ndarray:
    """Clutter far out of focus."""
    canvas = np.full((SIDE, SIDE), 110, np.uint8)
    for _ in range(420):
        x, y = rng.randint(SIDE, size=2)
        corners = rng.randint(-60, 61, (rng.randint(3, 7), 2)) + (x, y)
        cv2.fillConvexPoly(canvas, cv2.convexHull(corners.astype(np.int32)), int(rng.randint(20, 240)))
    return cv2.GaussianBlur(canvas, (65, 65), 0)


def _stripes(rng: RandomState) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = _SINE[(x * 14 + y * 6 + _noise(rng, 6, 6) // 8) & 255]
    return 3 * np.clip(4 * wave - 382, 0, 255) + _fractal(rng, 12, 6, 0.8)


def _dots(rng: RandomState) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    u, v = x % 20 - 10, (y + x // 20 % 2 * 10) % 20 - 10
    return 3 * np.clip(10 * (36 - u * u - v * v) + 128, 0, 255) + _fractal(rng, 12, 6, 0.8)


def _grain(rng: RandomState) -> np.ndarray:
    """Noise of a sensor: near enough to a normal distribution, each pixel on its own."""
    return rng.randint(0, 64, (4, SIDE, SIDE)).sum(0)


_PAINTERS: dict[str, Callable[[RandomState], np.ndarray]] = {
    "plaster": _plaster, "wood": _wood, "gravel": _gravel, "fabric": _fabric, "foliage": _foliage, "tiles": _tiles,
    "haze": _haze, "stripes": _stripes, "dots": _dots, "grain": _grain,
}
