"""Composes one scene of the built-in data set: what lies where, what hides what, and the picture of it.

`render` is a pure function of (index, seed, options). Things are put down back to front; the pixels of a thing
are those it covers by at least half, less those of the things in front of it, so that masks never overlap and
every pixel belongs to one thing or to one background surface.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.random import RandomState

from detres.data.shapes_draw import (KEYPOINT_NAMES, OUTLINES, Joints, Light, Patch, Surface, cast_shadow, overlap,
                                     paint, place)
from detres.data.shapes_texture import STUFF_COLOURS, colour, cut, ramp, stuff_ramp

# Category ids have gaps on purpose, as COCO's do. Stuff ids stay below 256: they are pixels of the semantic map.
THING_IDS = {"disc": 1, "square": 2, "triangle": 4, "star": 7, "ring": 8, "cross": 11, "arrow": 13, "figure": 18}
STUFF_IDS = dict(zip(STUFF_COLOURS, (101, 102, 104, 105, 109, 110, 115), strict=True))
KEYPOINT_CLASSES = ("arrow", "figure")

_MIN_VISIBLE = 12  # pixels; a place where a thing would show fewer is not taken
_MIN_DIAMETER = 8.0  # pixels; what is smaller has no shape to speak of
_PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(size=(240, 320), classes=tuple(THING_IDS), max_objects=12, min_size=0.05, max_size=0.75, occlusion=0.6,
                 touching=0.5, crowd=0.08, empty=0.05),
    "easy": dict(size=(128, 128), classes=("disc", "triangle", "cross"), max_objects=4, min_size=0.2, max_size=0.5,
                 occlusion=0.35, touching=0.25, crowd=0.03, empty=0.03),
}


@dataclass(frozen=True)
class ShapesOptions:
    """What the scenes are like. A field left None takes the preset's value and is never None afterwards.

    "full" is hard and varied; "easy" is what a small network learns from scratch in minutes on a CPU.
    """

    preset: Literal["full", "easy"] = "full"
    size: tuple[int, int] | None = None  # (height, width) in pixels, each 32..2048
    classes: tuple[str, ...] | None = None  # of THING_IDS
    max_objects: int | None = None  # per image, 1..200
    min_size: float | None = None  # diameter of the circle around an object, over the image's short side; >= 8 pixels
    max_size: float | None = None
    occlusion: float | None = None  # largest share of an object that others or the image border hide, 0..0.9
    touching: float | None = None  # chance that an object is put against or over another
    crowd: float | None = None  # chance of a crowd in an image
    empty: float | None = None  # chance that an image shows no object

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {self.preset!r} (ShapesOptions).")
        least = _MIN_DIAMETER if self.min_size is None else 0  # the preset's min_size gives way in small images
        for name, value in _PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("size", "classes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._require("size", len(self.size) == 2 and all(isinstance(s, int) and 32 <= s <= 2048 for s in self.size),
                      "be (height, width), each of 32 to 2048 pixels")
        object.__setattr__(self, "min_size", max(self.min_size, least / min(self.size)))
        self._check()

    def _check(self) -> None:
        known = set(self.classes) <= set(THING_IDS) and len(set(self.classes)) == len(self.classes) > 0
        self._require("classes", known, f"be distinct names of {', '.join(THING_IDS)}")
        self._require("max_objects", 1 <= self.max_objects <= 200, "be 1 to 200")
        self._require("min_size", round(self.min_size * min(self.size), 6) >= _MIN_DIAMETER,
                      f"be at least {_MIN_DIAMETER:g} pixels over the short side")
        self._require("max_size", self.min_size <= self.max_size <= 1, "be between min_size and 1")
        self._require("occlusion", 0 <= self.occlusion <= 0.9, "be 0 to 0.9")
        for name in ("touching", "crowd", "empty"):
            self._require(name, 0 <= getattr(self, name) <= 1, "be a probability, 0 to 1")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} must {rule}, got {getattr(self, name)!r} (ShapesOptions).")


@dataclass(frozen=True)
class SceneObject:
    """One annotated object, or a crowd of one class (its `mask` is their union)."""

    name: str
    category_id: int
    mask: np.ndarray  # (H, W) bool, the visible pixels
    box: tuple[float, float, float, float]  # xyxy, the extent of `mask`; a box over the first pixel is 0, 0, 1, 1
    crowd: bool
    in_frame: float  # share of the whole object that lies within the image
    visible: float  # share of it that is seen
    keypoints: np.ndarray | None  # (11, 3) x, y in the same coordinates as the box, and COCO visibility 0, 1, 2


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (H, W, 3) uint8 RGB
    objects: tuple[SceneObject, ...]  # back to front
    owner: np.ndarray  # (H, W) uint8, 0 background, i + 1 where objects[i] is seen
    stuff: np.ndarray  # (H, W) uint8, category ids of the background surfaces, also where objects hide them

    @property
    def semantic(self) -> np.ndarray:
        """Category id of every pixel, (H, W) uint8."""
        ids = np.array([0] + [thing.category_id for thing in self.objects], np.uint8)[self.owner]
        return np.where(self.owner > 0, ids, self.stuff)


def render(index: int, seed: int = 0, options: ShapesOptions = ShapesOptions()) -> Scene:
    """Scene number `index` (>= 0) of the endless series that `seed` (>= 0) begins; depends on nothing else."""
    rng = RandomState([index & 0xFFFFFFFF, index >> 32, seed & 0xFFFFFFFF, seed >> 32])
    turn = rng.uniform(0, 2 * math.pi)
    light = Light(round(256 * math.cos(turn)), round(256 * math.sin(turn)), shadow=int(rng.randint(60, 170)),
                  reach=rng.uniform(0.03, 0.12))
    image, stuff = _background(rng, options, light)
    table = _Table(options)
    if rng.random_sample() >= options.empty:
        _fill(table, rng)
    for thing in table.things:
        _paint_thing(image, thing, light, rng, options.preset == "easy")
    image = _photograph(image, rng, options.preset == "easy")
    return Scene(image, tuple(table.annotate(i) for i in range(len(table.things))), table.owner, stuff)


@dataclass(frozen=True)
class _Thing:
    name: str
    members: list[tuple[Patch, float]]  # what is painted, with its diameter; a crowd has many
    whole: Patch  # the union of the members
    diameter: float
    joints: Joints
    crowd: bool = False

    def moved(self, down: int, right: int) -> _Thing:
        def shift(patch: Patch) -> Patch:
            return replace(patch, top=patch.top + down, left=patch.left + right)

        joints = {name: (x + right, y + down) for name, (x, y) in self.joints.items()}
        return replace(self, members=[(shift(p), d) for p, d in self.members], whole=shift(self.whole), joints=joints)

    def moved_to(self, x: float, y: float) -> _Thing:
        """Its centre within half a pixel of (x, y)."""
        height, width = self.whole.cover.shape
        return self.moved(round(y - height / 2) - self.whole.top, round(x - width / 2) - self.whole.left)

    @property
    def centre(self) -> tuple[float, float]:
        return self.whole.left + self.whole.cover.shape[1] / 2, self.whole.top + self.whole.cover.shape[0] / 2


@dataclass
class _Table:
    """Where things lie: who owns which pixel, and how much of each is left to see."""

    options: ShapesOptions
    things: list[_Thing] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)  # pixels of each whole thing, also outside the image
    visible: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner = np.zeros(self.options.size, np.uint8)  # 0 background, i + 1 for things[i]

    def under(self, patch: Patch) -> tuple[np.ndarray, np.ndarray] | None:
        """The view of `owner` beneath a patch and the patch's mask there."""
        inside = overlap(self.owner, patch)
        return inside and (inside[0], patch.mask[inside[1]])

    def add(self, thing: _Thing) -> bool:
        """Puts a thing on top, unless that would hide too much of it or of another."""
        below = self.under(thing.whole)
        if below is None:
            return False
        owners, mask = below
        counts = np.bincount(owners[mask], minlength=len(self.things) + 1)
        totals = self.totals + [int(thing.whole.mask.sum())]
        visible = [v - int(c) for v, c in zip(self.visible, counts[1:])] + [int(counts.sum())]
        share = 1 - self.options.occlusion
        if any(left < max(share * total, _MIN_VISIBLE) for left, total in zip(visible, totals)):
            return False
        self.things.append(thing)
        self.totals, self.visible = totals, visible
        owners[mask] = len(self.things)
        return True

    def slide(self, thing: _Thing, other: int, angle: float) -> _Thing:
        """Moves a thing from afar towards things[other] until the two just touch."""
        x, y = self.things[other].centre
        best = thing
        for distance in range(int(self.things[other].diameter + thing.diameter) // 2 + 4, 0, -1):
            moved = thing.moved_to(x + distance * math.cos(angle), y + distance * math.sin(angle))
            below = self.under(moved.whole)
            if below is not None and (below[0][below[1]] == other + 1).any():
                break
            best = moved
        return best

    def annotate(self, i: int) -> SceneObject:
        thing, mask = self.things[i], self.owner == i + 1
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        box = (float(x), float(y), float(x + width), float(y + height))
        below = self.under(thing.whole)
        assert below is not None, "add() refuses what lies outside"
        keypoints = self._keypoints(i) if thing.name in KEYPOINT_CLASSES else None
        in_frame, visible = int(below[1].sum()) / self.totals[i], self.visible[i] / self.totals[i]
        return SceneObject(thing.name, THING_IDS[thing.name], mask, box, thing.crowd, in_frame, visible, keypoints)

    def _keypoints(self, i: int) -> np.ndarray:
        """COCO's rule: 2 seen, 1 hidden by another object, 0 (at 0, 0) outside, of another class, of a crowd."""
        keypoints = np.zeros((len(KEYPOINT_NAMES), 3))
        height, width = self.owner.shape
        for j, name in enumerate(KEYPOINT_NAMES):
            if name in self.things[i].joints:
                x, y = _into(self.things[i].whole, *self.things[i].joints[name])
                if 0 <= x < width and 0 <= y < height:
                    keypoints[j] = x, y, 2 if self.owner[int(y), int(x)] == i + 1 else 1
        return keypoints


def _into(patch: Patch, x: float, y: float) -> tuple[float, float]:
    """The point; where a thin part only grazes its pixel, the centre of the nearest pixel of the mask."""
    row, column = math.floor(y) - patch.top, math.floor(x) - patch.left
    if patch.mask[row, column]:
        return round(x, 2), round(y, 2)
    rows, columns = np.nonzero(patch.mask)
    nearest = int(np.argmin((rows - row) ** 2 + (columns - column) ** 2))
    return float(columns[nearest] + patch.left + 0.5), float(rows[nearest] + patch.top + 0.5)


def _fill(table: _Table, rng: RandomState) -> None:
    options = table.options
    height, width = options.size
    if rng.random_sample() < options.crowd:
        crowd = _crowd(rng, options)
        for _ in range(8):
            if table.add(crowd.moved_to(rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height)):
                break
    for _ in range(rng.randint(1, options.max_objects + 1)):
        span = options.max_size / options.min_size
        diameter = min(options.size) * options.min_size * span ** rng.random_sample()
        thing = _thing(options.classes[rng.randint(len(options.classes))], diameter, rng)
        for _ in range(10):
            if table.add(_put(table, thing, rng)):
                break


def _put(table: _Table, thing: _Thing, rng: RandomState) -> _Thing:
    """Somewhere: anywhere, against another thing, or partly over one."""
    height, width = table.options.size
    way, angle = rng.random_sample() / max(table.options.touching, 1e-9), rng.uniform(0, 2 * math.pi)
    if table.things and way < 1:
        other = rng.randint(len(table.things))
        if way < 0.5 or not table.options.occlusion:
            return table.slide(thing, other, angle)
        x, y = table.things[other].centre
        distance = rng.uniform(0.3, 0.5) * (table.things[other].diameter + thing.diameter)
        return thing.moved_to(x + distance * math.cos(angle), y + distance * math.sin(angle))
    edge = thing.diameter * (0.5 - 0.6 * table.options.occlusion)  # negative: its centre may lie outside
    return thing.moved_to(rng.uniform(edge, max(width - edge, edge)), rng.uniform(edge, max(height - edge, edge)))


def _thing(name: str, diameter: float, rng: RandomState) -> _Thing:
    outline = OUTLINES[name](rng, 2.4 / diameter)
    squeeze = rng.uniform(0.78, 1.0) if name not in KEYPOINT_CLASSES else 1.0
    lean = rng.uniform(0, 2 * math.pi) if name != "figure" or rng.random_sample() < 0.4 else rng.uniform(-0.35, 0.35)
    patch, joints = place(outline, diameter / 2, lean, squeeze, (rng.random_sample(), rng.random_sample()))
    return _Thing(name, [(patch, diameter)], patch, diameter, joints)


def _crowd(rng: RandomState, options: ShapesOptions) -> _Thing:
    """Many small things of one class, packed too close to be told apart one by one."""
    name = options.classes[rng.randint(len(options.classes))]
    diameter = min(options.size) * rng.uniform(0.09, 0.16)
    members: list[tuple[Patch, float]] = []
    for i in range(rng.randint(9, 18)):  # along a spiral, as the seeds of a sunflower
        reach, turn = 0.42 * diameter * math.sqrt(i + 0.3), 2.4 * i
        one = _thing(name, diameter * rng.uniform(0.85, 1.15), rng)
        members.append(one.moved_to(reach * math.cos(turn) * 1.3, reach * math.sin(turn)).members[0])
    whole = _union([patch for patch, _ in members])
    return _Thing(name, members, whole, float(max(whole.cover.shape)), {}, crowd=True)


def _union(patches: list[Patch]) -> Patch:
    top, left = min(p.top for p in patches), min(p.left for p in patches)
    bottom = max(p.top + p.cover.shape[0] for p in patches)
    right = max(p.left + p.cover.shape[1] for p in patches)
    cover = np.zeros((bottom - top, right - left), np.uint8)
    for p in patches:
        rows, columns = (slice(at, at + length) for at, length in zip((p.top - top, p.left - left), p.cover.shape))
        cover[rows, columns] = np.maximum(cover[rows, columns], p.cover)
    return Patch(cover, top, left)


def _background(rng: RandomState, options: ShapesOptions, light: Light) -> tuple[np.ndarray, np.ndarray]:
    """One surface, or a wall over a floor, under uneven light: picture (H, W, 3) uint8 and stuff map (H, W) uint8."""
    height, width = options.size
    kinds = [list(STUFF_IDS)[rng.randint(len(STUFF_IDS))] for _ in range(1 + rng.randint(2))]
    contrast = (0.10, 0.30) if options.preset == "easy" else (0.15, 0.55)
    vividness = 0.6 if options.preset == "easy" else 0.9
    ramps, textures = [], []
    for kind in kinds:
        ramps.append(stuff_ramp(kind, rng, rng.uniform(*contrast), vividness))
        textures.append(cut(kind, rng, height, width, rng.uniform(0.6, 1.6) * min(height, width) / 240).astype(np.intp))
    texture, stuff = textures[0], np.full((height, width), STUFF_IDS[kinds[0]], np.uint8)
    y, x = np.arange(height, dtype=np.int32)[:, None], np.arange(width, dtype=np.int32)[None]
    shade = np.full((height, width), 256, np.int32)
    if len(kinds) == 2:
        depth = y * 64 - int(rng.uniform(0.25, 0.75) * height) * 64 - (x - width // 2) * rng.randint(-12, 13)
        texture = np.where(depth > 0, textures[1] + 256, texture)  # the second ramp
        stuff[depth > 0] = STUFF_IDS[kinds[1]]
        shade -= np.maximum(70 - np.abs(depth) * 70 // (height * 4), 0)  # the corner where they meet gets less light
    v, u = ((n * 256 - size * 128) // max(height, width) for n, size in ((y, height), (x, width)))  # -128..128
    shade = shade + (light.x * u + light.y * v) * rng.randint(10, 70) // 32768
    shade = shade - (u * u + v * v) * rng.randint(40) // 16384
    image = np.minimum(np.concatenate(ramps)[texture] * shade[..., None] >> 8, 255).astype(np.uint8)
    blur = 2 * rng.randint(0, 3) + 1
    return cv2.GaussianBlur(image, (blur, blur), 0), stuff


def _paint_thing(image: np.ndarray, thing: _Thing, light: Light, rng: RandomState, easy: bool) -> None:
    for patch, diameter in thing.members:
        inside = overlap(image, patch)
        if inside is not None:
            surface = _surface(rng, np.round(cv2.mean(inside[0])[:3]), diameter, easy)
            cast_shadow(image, patch, diameter, light)
            paint(image, patch, diameter, light, surface, rng)


def _surface(rng: RandomState, ground: np.ndarray, diameter: float, easy: bool) -> Surface:
    """A material whose colour stands out from the mean colour (3,) of the ground, clearly so if `easy`."""
    saturations, values, apart = ((0.6, 1.0), (0.5, 1.0), 130) if easy else ((0.1, 1.0), (0.15, 1.0), 60)
    best, most = (0.0, 0.0, 0.0), -1.0
    for _ in range(12):
        hsv = rng.random_sample(), rng.uniform(*saturations), rng.uniform(*values)
        distance = float(((colour(*hsv) - ground) ** 2).sum())
        if distance > most:
            best, most = hsv, distance
        if most > apart ** 2:
            break
    hue, pure, value = best
    dark, light = colour(hue, pure, value * 0.78), colour(hue, pure * 0.9, value * 1.12)
    texture = ("plaster", "plaster", "wood", "fabric", "gravel", "stripes", "dots")[rng.randint(7)]
    if texture in ("stripes", "dots"):
        light = colour(hue + rng.uniform(-0.1, 0.1), pure * rng.uniform(0.2, 0.7), value + rng.uniform(0.1, 0.4))
    zoom = max(diameter / 80, 0.5) * rng.uniform(0.7, 1.5)
    return Surface(texture, zoom, ramp(dark, light), relief=int(rng.randint(90, 230)), bevel=rng.uniform(0.06, 0.4),
                   gloss=int(rng.randint(0, 200)))


def _photograph(image: np.ndarray, rng: RandomState, easy: bool) -> np.ndarray:
    """What a camera adds: white balance, exposure, a touch of blur, noise."""
    height, width = image.shape[:2]
    gain = rng.randint(246, 267, 3) * rng.randint(*(240, 280) if easy else (200, 300)) // 256
    blur = 2 * rng.randint(0, 2 if easy else 3) + 1
    image = cv2.GaussianBlur(image, (blur, blur), 0)
    noise = (cut("grain", rng, height, width, 1.0).astype(np.int32) - 128) * rng.randint(4, 16 if easy else 28) // 256
    return np.clip((image * gain >> 8) + noise[..., None], 0, 255).astype(np.uint8)
