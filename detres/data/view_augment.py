"""What a network sees of images in training: several draws of each through the loader of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detres.config import Config
from detres.data.dataset import Dataset
from detres.data.images import ImageError
from detres.data.label_maps import IGNORED
from detres.data.loader import Loader, build_loader, pad_images
from detres.data.sampling import Key
from detres.data.splits import find_splits
from detres.data.transforms import Sample
from detres.data.view import Choice, Entry, choose_splits, select_from
from detres.data.view_sheet import (Tile, draw_entry, draw_pixels, draw_scaled, grid, label_text, placeholder, save,
                                    tile_scale)
from detres.inference.draw import Objects, color_of

PADDING = np.array([215, 185], np.uint8)  # greys of the stripes that stand for what is padded
STRIPE = 16  # pixels


def write_augmented(path: str | Path, images: str | None, choice: Choice, config: Config, draws: int,
                    out: Path) -> Path:
    """Writes a sheet with a row for each image: as it is, then as training sees it in the first `draws` epochs that
    `train.seed` gives. Raises as `find_splits`, `select` and `build_loader`."""
    from detres.evaluation.run import load_for

    if config.model.name == "classifier":
        raise ValueError("--augment needs the config of a model of boxes, masks or pixels, got a classifier's. "
                         "Give another config.")
    splits = choose_splits(find_splits(path, images), choice.splits or ("train",))
    datasets = [(split.name, load_for(config.model, split.source, split.role, "drop")) for split in splits]
    selection = select_from(datasets, choice)
    tiles = []
    for entry in selection.entries:
        loader = training_loader(entry.dataset, config)
        tiles += [draw_entry(entry, selection.classes), *draw_epochs(loader, entry, selection.classes, draws)]
    save(grid(tiles, draws + 1), out)
    return out


def training_loader(dataset: Dataset, config: Config) -> Loader:
    """As the config trains on the data set, but in this process; crowds and difficult objects come along."""
    from detres.evaluation.run import reads_of

    kind = config.model
    return build_loader(dataset, kind.input, config.data.model_copy(update={"workers": 0}), batch_size=1, training=True,
                        with_masks=kind.has_masks, with_keypoints=kind.has_keypoints, with_ignored=True,
                        seed=config.train.seed, **reads_of(kind))


def draw_epochs(loader: Loader, entry: Entry, classes: Sequence[str], draws: int) -> list[Tile]:
    """The image in the first epochs, padded to one canvas, as if they were a batch."""
    try:
        samples = [loader.sample(Key(epoch, entry.number)) for epoch in range(draws)]
    except ImageError as error:
        return [(placeholder(str(error)), [""])] * draws
    canvases = pad_images([sample.image for sample in samples], loader.reader.size_divisor, loader.reader.canvas).pixels
    return [_draw(f"epoch {epoch}", sample, canvas.permute(1, 2, 0).float().numpy(), entry.dataset, classes)
            for epoch, (sample, canvas) in enumerate(zip(samples, canvases))]


def _draw(name: str, sample: Sample, canvas: np.ndarray, dataset: Dataset, classes: Sequence[str]) -> Tile:
    """A sample on its canvas (H, W, 3) of 0-255, fit into a tile."""
    (height, width), size = sample.size, canvas.shape[:2]
    pixels = np.rint(canvas).clip(0, 255).astype(np.uint8)
    padded = np.ones(size, bool)
    padded[:height, :width] = False
    stripes = np.add.outer(*map(np.arange, size)) // STRIPE % 2
    pixels[padded] = np.take(PADDING, stripes[padded])[:, None]
    text = f"{name}: {width} x {height}" + (f", padded to {size[1]} x {size[0]}" if padded.any() else "")
    scale = tile_scale(*size)
    if sample.semantic is not None and not len(sample.boxes):
        labels = np.pad(sample.semantic, [(0, size[0] - height), (0, size[1] - width)], constant_values=IGNORED)
        return draw_pixels(pixels, labels, dataset.classes, scale), [text]
    return draw_scaled(pixels, _objects(sample, size, dataset, classes), scale), [text]


def _objects(sample: Sample, size: tuple[int, int], dataset: Dataset, classes: Sequence[str]) -> Objects:
    """Of a sample whose canvas has a size (height, width)."""
    names = [dataset.classes[label] for label in sample.labels.tolist()]
    masks = None
    if sample.masks is not None:
        beyond = np.subtract(size, sample.size)
        masks = list(np.pad(sample.masks, [(0, 0), (0, beyond[0]), (0, beyond[1])]).astype(bool))
    texts = [label_text(*row) for row in zip(names, sample.crowd.tolist(), sample.difficult.tolist())]
    return Objects(sample.boxes, texts, [color_of(classes.index(name)) for name in names], masks, sample.keypoints,
                   dataset.skeleton, sample.crowd, sample.difficult)
