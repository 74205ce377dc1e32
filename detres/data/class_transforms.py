"""What is done to an image before a classifier sees it: section 3.4 of arXiv 1512.03385.

Training: the short side at a random length, a random crop of that or of its mirror image, shifted along the principal
colours. Tests give several views of an image: crops, or the whole image at several sizes. Normalisation is the model's.

Legend: H, W the image; S side of the crop. Images are (H, W, 3) RGB, uint8 (float32 after a resize without
antialiasing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from detres.config import ClassAugmentConfig, EvalConfig, InputConfig
from detres.data.transforms import mean_colour, resize_image

# Variances along, and directions of, the principal components of ImageNet's RGB values in 0-1, a component in each
# column: as computed for fb.resnet.torch (datasets/imagenet.lua) and used by its successors. The units matter: the
# shift is proportional to the variance (Krizhevsky et al. 2012, section 4.1), not to the standard deviation.
COLOUR_VARIANCES = np.array([0.2175, 0.0188, 0.0045])
COLOUR_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

Views = Callable[[np.ndarray, np.random.Generator], list[np.ndarray]]  # image -> what the model sees of it


def build_train_view(augment: ClassAugmentConfig, model_input: InputConfig) -> Views:
    """The training pipeline: one random crop, all of whose chance comes from the generator."""
    scales = augment.scales or (model_input.min_size, model_input.min_size)
    _check_crop(model_input, scales[0] + 2 * augment.pad)
    return TrainView(scales, model_input.crop, augment.pad, mean_colour(model_input), augment.flip, augment.pca_colour,
                     model_input.antialias)


def build_test_views(options: EvalConfig, model_input: InputConfig) -> Views:
    """The views of the test that `eval.crops` names; mirrored ones are made on the device (`class_tests`)."""
    if options.crops == "dense":
        scales = options.test_scales or (model_input.min_size,)
        _check_crop(model_input, min(scales))
        return ShortSides(scales, model_input.antialias)
    if options.test_scales is not None:
        raise ValueError(f"eval.test_scales must be null for a classifier that is tested on crops, got "
                         f"{list(options.test_scales)}. Say eval.crops=dense.")
    _check_crop(model_input, model_input.min_size)
    return Crops(model_input.min_size, model_input.crop, options.crops == 10, model_input.antialias)


def _check_crop(model_input: InputConfig, smallest: int) -> None:
    crop = model_input.crop
    if crop is None or crop > smallest:
        raise ValueError(f"model.input.crop must be given for a classifier of image files, and fit into the smallest "
                         f"short side, {smallest} px, got {'null' if crop is None else crop}. Say model.input.crop=224 "
                         "model.input.min_size=256, as the paper does.")


@dataclass(frozen=True)
class TrainView:
    """scales: range of the short side, in pixels; crop: S; pad: pixels of `fill` on each side before the crop; flip:
    its probability; colour: standard deviation of `shift_colours`' alphas."""

    scales: tuple[int, int]
    crop: int
    pad: int
    fill: Sequence[float]
    flip: float
    colour: float
    antialias: bool

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        size = short_side_size(*image.shape[:2], int(rng.integers(self.scales[0], self.scales[1] + 1)))
        y, x = (int(rng.integers(side + 2 * self.pad - self.crop + 1)) for side in size)
        view = self._window(image, size, y, x)
        if rng.random() < self.flip:
            view = cv2.flip(view, 1)
        return [shift_colours(view, rng.normal(0, self.colour, 3)) if self.colour else view]

    def _window(self, image: np.ndarray, size: tuple[int, int], y: int, x: int) -> np.ndarray:
        if self.antialias and not self.pad:
            return resized_window(image, size, y, x, self.crop)
        whole = resize_image(image, size, self.antialias)
        whole = cv2.copyMakeBorder(whole, *[self.pad] * 4, cv2.BORDER_CONSTANT, value=tuple(self.fill))
        return whole[y:y + self.crop, x:x + self.crop]


@dataclass(frozen=True)
class Crops:
    """The crop at the centre; with `corners`, those at the four corners before it (AlexNet's test)."""

    short_side: int
    crop: int
    corners: bool
    antialias: bool

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        size = short_side_size(*image.shape[:2], self.short_side)
        image = resize_image(image, size, self.antialias)
        bottom, right = (side - self.crop for side in size)
        places = [(0, 0), (0, right), (bottom, 0), (bottom, right)] if self.corners else []
        places.append((round(bottom / 2), round(right / 2)))
        return [image[y:y + self.crop, x:x + self.crop] for y, x in places]


@dataclass(frozen=True)
class ShortSides:
    """The whole image at several sizes."""

    short_sides: Sequence[int]
    antialias: bool

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        height, width = image.shape[:2]
        return [resize_image(image, short_side_size(height, width, side), self.antialias) for side in self.short_sides]


# Pure functions


def short_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width after a resize of the short side, the long one rounded down as torchvision's Resize does."""
    long = int(side * max(height, width) / min(height, width))
    return (side, long) if height <= width else (long, side)


def resized_window(image: np.ndarray, size: tuple[int, int], y: int, x: int, crop: int) -> np.ndarray:
    """The window (S, S) at (y, x) of the image (uint8) resized to `size`, of which nothing else is computed: several
    times faster than the whole. Equal to a crop of the whole, but that ties in rounding may fall the other way."""
    ratio_y, ratio_x = image.shape[0] / size[0], image.shape[1] / size[1]
    right, bottom = min((x + crop) * ratio_x, image.shape[1]), min((y + crop) * ratio_y, image.shape[0])
    box = x * ratio_x, y * ratio_y, right, bottom
    return np.array(Image.fromarray(image).resize((crop, crop), Image.Resampling.BILINEAR, box))


def shift_colours(image: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Adds directions @ (alphas * variances), in units of 0-1, to every pixel; uint8 is rounded and clipped."""
    shift = 255 * COLOUR_DIRECTIONS @ (alphas * COLOUR_VARIANCES)
    return cv2.add(image, (*shift, 0.0))
