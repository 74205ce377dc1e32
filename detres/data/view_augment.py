"""What a network sees of images in training: several draws of each through the loader of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from detres.config import Config
from detres.data.dataset import Dataset
from detres.data.images import ImageError
from detres.data.loader import build_loader
from detres.data.sampling import Key
from detres.data.splits import find_splits
from detres.data.view import Choice, Entry, choose_splits, select_from
from detres.data.view_sheet import Tile, draw_entry, draw_pixels, draw_scaled, grid, placeholder, save, tile_scale
from detres.inference.draw import Objects, color_of
from detres.structures import Batch, Targets

PADDING = np.array([215, 185], np.uint8)  # greys of the stripes that stand for what is padded
STRIPE = 16  # pixels


def write_augmented(path: str | Path, images: str | None, choice: Choice, config: Config, draws: int,
                    out: Path) -> Path:
    """Writes a sheet with a row for each image: as it is, then as training sees it in the first `draws` epochs that
    `train.seed` gives. Raises as `find_splits`, `select` and `build_loader`."""
    from detres.evaluation.run import load_for, reads_of

    if config.model.name == "classifier":
        raise ValueError("--augment needs the config of a model of boxes, masks or pixels, got a classifier's. "
                         "Give another config.")
    splits = choose_splits(find_splits(path, images), choice.splits or ("train",))
    datasets = [(split.name, load_for(config.model, split.source, split.role, "drop")) for split in splits]
    selection = select_from(datasets, choice)
    tiles = []
    for entry in selection.entries:
        reader = _reader(entry.dataset, config, reads_of(config.model))
        tiles += [draw_entry(entry, selection.classes), *_draws(reader, entry, selection.classes, draws)]
    save(grid(tiles, draws + 1), out)
    return out


def _reader(dataset: Dataset, config: Config, reads: dict[str, bool]):
    data = config.data.model_copy(update={"workers": 0})
    kind = config.model
    return build_loader(dataset, kind.input, data, batch_size=1, training=True, with_masks=kind.has_masks,
                        with_keypoints=kind.has_keypoints, seed=config.train.seed, **reads).reader


def _draws(reader, entry: Entry, classes: Sequence[str], draws: int) -> list[Tile]:
    """The image in the first epochs, batched together, so that padding shows."""
    batch = reader.__getitems__([Key(epoch, entry.number) for epoch in range(draws)])
    if isinstance(batch, ImageError):
        return [(placeholder(str(batch)), [""])] * draws
    return [(_draw(batch, row, entry.dataset, classes), [_size_text(batch, row)]) for row in range(draws)]


def _size_text(batch: Batch, row: int) -> str:
    height, width = batch.images.sizes[row].tolist()
    canvas = batch.images.pixels.shape[-2:]
    padded = f", padded to {canvas[1]} x {canvas[0]}" if (height, width) != tuple(canvas) else ""
    return f"epoch {row}: {width} x {height}{padded}"


def _draw(batch: Batch, row: int, dataset: Dataset, classes: Sequence[str]) -> Image.Image:
    """One image of a batch, with its padding, fit into a tile."""
    pixels = np.rint(batch.images.pixels[row].float().numpy().transpose(1, 2, 0)).clip(0, 255).astype(np.uint8)
    height, width = batch.images.sizes[row].tolist()
    padded = np.ones(pixels.shape[:2], bool)
    padded[:height, :width] = False
    stripes = np.add.outer(*map(np.arange, padded.shape)) // STRIPE % 2
    pixels[padded] = np.take(PADDING, stripes[padded])[:, None]
    scale = tile_scale(*padded.shape)
    if isinstance(batch.targets, Targets):
        return draw_scaled(pixels, _objects(batch.targets, row, dataset, classes), scale)
    return draw_pixels(pixels, batch.targets.labels[row].numpy(), dataset.classes, scale)


def _objects(targets: Targets, row: int, dataset: Dataset, classes: Sequence[str]) -> Objects:
    valid = targets.valid[row]
    names = [dataset.classes[label] for label in targets.labels[row][valid].tolist()]
    masks = points = None
    if targets.masks is not None:
        first = int(targets.valid[:row].sum())
        masks = list(targets.masks[first:first + len(names)].numpy().astype(bool))
    if targets.keypoints is not None:
        points = targets.keypoints[row][valid].numpy()
    return Objects(targets.boxes[row][valid].numpy(), names, [color_of(classes.index(name)) for name in names], masks,
                   points, dataset.skeleton)
