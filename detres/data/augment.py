"""Any albumentations pipeline from YAML: `[{HueSaturationValue: {p: 0.5}}, {OneOf: {transforms: [...], p: 1}}]`."""

from __future__ import annotations

import difflib
import inspect
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from detres.data.images import ImageError
from detres.data.transforms import Sample, hide_outside, settle, swap_pairs

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the network for newer versions

import albumentations  # noqa: E402

WHERE = "data.augment.albumentations"
# Points that tell a mirror, as fractions of width and height: several, as a pipeline may leave some out.
REFERENCE = np.stack(np.meshgrid(*2 * [np.arange(1, 6) / 6]), -1).reshape(-1, 2)


class Albumentations:
    """A pipeline that keeps boxes, masks, keypoints and labels in step, its chance all from the sample's generator.

    After a geometric transform the boxes of objects with masks fit these again (a rotated box would be too large), and
    objects that left the image are dropped; so are those of whose box less than `min_visible` is left (of the box,
    whatever the mask: by how much a pipeline scales is not known). Mirrored keypoints change places as `flip_pairs`
    say, which albumentations alone does not do. Of a label map, what comes from beyond the image is ignored, unless
    `fill_mask` says another value: k there is the label k - 1.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]], flip_pairs: Sequence[tuple[int, int]] = (),
                 min_visible: float = 0.0):
        self.flip_pairs = flip_pairs
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got processor for")  # pixels alone may change
            self.pipeline = albumentations.Compose(
                _build_all(entries, WHERE),
                bbox_params=albumentations.BboxParams("pascal_voc", clip=True, min_visibility=min_visible),
                keypoint_params=albumentations.KeypointParams("xy", remove_invisible=False))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        # One generator for all: with set_random_seed each transform would draw the same numbers.
        self.pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        out = self._run(sample)
        image, rows = out["image"], out["bboxes"][:, 4:].astype(int).ravel()  # none has no fifth column
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"{WHERE} must give a uint8 image (H, W, 3), got {image.dtype} {image.shape}. "
                             "Take out transforms to floats or tensors: the model normalises.")
        before = sample.take(rows)
        boxes = out["bboxes"][:, :4].astype(np.float32)
        moved = np.full(len(rows), True)
        if image.shape == sample.image.shape:  # float32 fractions make about 1e-4 px of noise
            moved = (np.abs(boxes - before.boxes) > 1e-2).any(1)
        after = replace(before, image=image, boxes=np.where(moved[:, None], boxes, before.boxes))
        if sample.masks is not None:  # it is not given an empty stack, which it cannot resize
            masks = out["masks"][rows] if "masks" in out else np.zeros((0, *image.shape[:2]), np.uint8)
            after = replace(after, masks=masks)
        if sample.keypoints is not None:
            after = replace(after, keypoints=self._keypoints(sample, out["keypoints"], image.shape)[rows])
        if sample.semantic is not None:
            after = replace(after, semantic=out["mask"] - np.uint8(1))
        return settle(after, before, moved=moved)

    def _run(self, sample: Sample) -> dict[str, Any]:
        height, width = sample.size
        fields = {"bboxes": np.hstack([sample.boxes, np.arange(len(sample.boxes), dtype=np.float32)[:, None]])}
        if sample.masks is not None and len(sample.masks):
            fields["masks"] = sample.masks
        if sample.keypoints is not None:
            points = np.concatenate([REFERENCE * (width, height), sample.keypoints[..., :2].reshape(-1, 2)])
            points = np.column_stack([points - 0.5, np.arange(len(points))])  # whole numbers are pixel centres there
            fields["keypoints"] = points.astype(np.float32)
        if sample.semantic is not None:
            fields["mask"] = sample.semantic + np.uint8(1)  # 0, with which it fills, is 255 here: ignored
        try:
            return self.pipeline(image=sample.image, **fields)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ImageError(f"{WHERE} must apply to every image, got {reason} for one of {width} x {height} px "
                             "(width x height). Correct its parameters.") from error

    def _keypoints(self, sample: Sample, points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """(G, J, 3): moved; exchanged left for right if the image was mirrored. Points that it left out, as dropout of
        regions does, are not labelled any more."""
        numbers, points = points[:, -1].astype(int), points[:, :2] + 0.5
        visible = np.append(np.zeros(len(REFERENCE)), sample.keypoints[..., 2])
        moved = np.zeros((len(visible), 3))
        moved[numbers] = np.column_stack([points, visible[numbers]])
        keypoints = moved[len(REFERENCE):].reshape(sample.keypoints.shape)
        still = numbers < len(REFERENCE)
        if mirrors(REFERENCE[numbers[still]], points[still]):
            keypoints = swap_pairs(keypoints, self.flip_pairs)
        return hide_outside(keypoints, *shape[:2])


def mirrors(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether points (P, 2) went from one hand to the other: by the affine map that fits best."""
    linear = np.linalg.lstsq(np.column_stack([before, np.ones(len(before))]), after, rcond=None)[0][:2]
    return np.linalg.det(linear) < -1e-3  # of points on one line, rounding may tell anything near zero


def _build_all(entries: Any, where: str) -> list[Any]:
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"{where} must be a list of transforms, got {entries!r}. "
                         "Write it as [{HorizontalFlip: {p: 0.5}}].")
    return [_build(entry, f"{where}[{number}]") for number, entry in enumerate(entries)]


def _build(entry: Any, where: str) -> Any:
    """One `{Name: {parameter: value}}`."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry.values())) or {}, Mapping):
        raise ValueError(f"{where} must be one name with its parameters, got {entry!r}. "
                         "Write it as {HorizontalFlip: {p: 0.5}}.")
    name, parameters = next(iter(entry.items()))
    kind, parameters, where = _kind(name, where), dict(parameters or {}), f"{where}.{name}"
    if "transforms" in parameters:
        parameters["transforms"] = _build_all(parameters["transforms"], f"{where}.transforms")
    known = [key for key in inspect.signature(kind).parameters if key not in ("self", "args", "kwargs")]
    if unknown := [key for key in parameters if key not in known]:
        raise ValueError(f"{where} must have known parameters, got {unknown[0]!r}.{_nearest(unknown[0], known)} "
                         f"There are: {', '.join(known)}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # it only warns of what it ignores or changes
            warnings.filterwarnings("ignore", ".*(consider|instead)")  # advice to use another
            return kind(**parameters)
    except (TypeError, ValueError, UserWarning) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3]).rstrip(".")
        raise ValueError(f"{where} must have valid parameters, got {parameters}: {reason}. "
                         f"There are: {', '.join(known)}.") from None


def _kind(name: str, where: str) -> type:
    bases = (albumentations.BasicTransform, albumentations.BaseCompose)
    kinds = {key: value for key, value in vars(albumentations).items()
             if inspect.isclass(value) and issubclass(value, bases)}
    if name not in kinds:
        raise ValueError(f"{where} must name a transform of albumentations {albumentations.__version__}, got {name!r}."
                         f"{_nearest(name, kinds)}")
    return kinds[name]


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(str(name), list(names), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
