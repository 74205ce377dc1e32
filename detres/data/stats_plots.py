"""One page of plots of the splits of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from detres.data.stats import MEDIUM, SMALL, Columns, SplitStats
from detres.plotting import axis_name, clean_axes

COLORS = ("#1F77D0", "#F07F23", "#00A08A", "#A347A8", "#D0331A", "#8E9A1F")  # of splits, in turn
BINS = 32
FEW = 8  # classes; bars of fewer would be too broad
TOP, BOTTOM = 12, 6  # classes shown where there are more than fit
MAPS = 3  # splits whose box centres are shown


def plot_stats(columns: Sequence[Columns], stats: Sequence[SplitStats], title: str = ""):
    """A matplotlib figure of 13 x 9 inches; splits without annotations show in image sizes only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained", dpi=120)  # without pyplot: no window, no global state
    FigureCanvasAgg(figure)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(4.2, 4.4, 4.4))
    _classes(left.subplots(), stats)
    boxes, relative, ratios = middle.subplots(3)
    _box_sides(boxes, columns)
    _curves(relative, columns, _relative_sides, np.linspace(0, 1, BINS + 1), "box side / image side", "objects")
    _curves(ratios, columns, lambda c: _ratios(c.object_sides), np.geomspace(1 / 8, 8, BINS + 1),
            "box height / width", "objects", log=True)
    ratios.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    top, bottom = right.subfigures(2, 1, height_ratios=(2, 1))
    counts, images = top.subplots(2)
    _counts(counts, columns)
    _image_sizes(images, columns)
    _centers(bottom, columns)
    handles, labels = images.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(axis_name(title, 60), x=0.01, ha="left", fontsize=11)
    return figure


def _bins(columns: Sequence[Columns]) -> int:
    """Fewer for few objects, of which each would be a spike of its own."""
    fewest = min((len(c.object_sides) for c in columns if len(c.object_sides)), default=0)
    return int(np.clip(2 * fewest**0.5, 8, BINS))


def _classes(axes, stats: Sequence[SplitStats]) -> None:
    """Share of the annotations, a bar for each split; of many classes the largest and the smallest."""
    shares = {split.name: {row.name: 100 * row.share for row in split.classes} for split in stats}
    total: dict[str, int] = {}
    for row in (row for split in stats for row in split.classes):
        total[row.name] = total.get(row.name, 0) + row.instances
    names = sorted(total, key=lambda name: -total[name])
    left_out = len(names) - TOP - BOTTOM
    if left_out > 0:
        names = names[:TOP] + names[-BOTTOM:]
    places = np.arange(len(names)) + 0.8 * (left_out > 0) * (np.arange(len(names)) >= TOP)
    height = 0.8 / max(1, len(stats))
    for i, split in enumerate(stats):
        widths = [shares[split.name].get(name, 0) for name in names]
        axes.barh(places + (i + 0.5) * height - 0.4, widths, height, color=COLORS[i % len(COLORS)])
    if left_out > 0:
        axes.text(0.5, TOP - 0.1, f"{left_out} more classes", transform=axes.get_yaxis_transform(), ha="center",
                  va="center", fontsize=8, color="0.4")
    axes.set_yticks(places, list(map(axis_name, names)))
    axes.set_ylim(max(len(names), FEW) - 0.5 + 0.8 * (left_out > 0), -0.5)
    clean_axes(axes, "share of annotations, %", grid="x")


def _box_sides(axes, columns: Sequence[Columns]) -> None:
    from matplotlib.ticker import MaxNLocator

    sides = [_sides(c) for c in columns if len(c.object_sides)]
    low, high = (min(map(np.min, sides)), max(map(np.max, sides))) if sides else (1, 1000)
    edges = np.geomspace(max(low, 1), max(high, 2 * max(low, 1)), _bins(columns) + 1)
    _curves(axes, columns, _sides, edges, "box side, px (dashed: COCO's small, medium, large)",
            "objects", log=True)
    for border in (SMALL**0.5, MEDIUM**0.5):
        axes.axvline(border, color="0.45", linewidth=0.8, linestyle="--")
    axes.set_xlim(edges[0], edges[-1])
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if edges[0] <= tick <= edges[-1]]
    if len(ticks) < 4:
        ticks = [tick for tick in MaxNLocator(6).tick_values(edges[0], edges[-1]) if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _sides(columns: Columns) -> np.ndarray:
    return np.sqrt(columns.object_sides.prod(1))


def _relative_sides(columns: Columns) -> np.ndarray:
    return np.sqrt((columns.object_sides / columns.image_sides).prod(1))


def _ratios(sides: np.ndarray) -> np.ndarray:
    return np.clip(sides[:, 0] / sides[:, 1], 1 / 8, 8)


def _curves(axes, columns: Sequence[Columns], values: Callable[[Columns], np.ndarray], edges: np.ndarray, title: str,
            unit: str, log: bool = False) -> None:
    """Histograms as outlines, in per cent of each split, so that large and small ones compare."""
    for i, split in enumerate(columns):
        if len(split.object_sides):
            counts, _ = np.histogram(values(split), edges)
            axes.stairs(100 * counts / max(1, counts.sum()), edges, color=COLORS[i % len(COLORS)], linewidth=1.5)
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"% of {unit}", fontsize=8)
    clean_axes(axes, title)


def _counts(axes, columns: Sequence[Columns]) -> None:
    """Objects per image; the last bin takes what is beyond the 99th percentile."""
    busiest = [np.quantile(c.objects_per_image, 0.99) for c in columns if len(c.sizes)]
    last = int(max(busiest, default=1)) + 1
    edges = np.arange(0, last + 2, max(1, last // BINS)) - 0.5
    _curves(axes, columns, lambda c: np.minimum(c.objects_per_image, edges[-1]), edges,
            "objects an image (the last bin: or more)", "images")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _image_sizes(axes, columns: Sequence[Columns]) -> None:
    """A disc for each size, its area the share of images."""
    for i, split in enumerate(columns):
        sizes, counts = np.unique(split.sizes, axis=0, return_counts=True)
        discs = 12 + 500 * counts / max(1, counts.sum())
        color = COLORS[i % len(COLORS)]
        axes.scatter(sizes[:, 1], sizes[:, 0], s=discs, color=color, alpha=0.35, linewidths=0)
        axes.scatter([], [], s=50, color=color, label=axis_name(split.name, 30))
    height, width = np.concatenate([c.sizes for c in columns]).max(0, initial=1)
    axes.set_xlim(0, 1.12 * width)  # room for the larger discs
    axes.set_ylim(0, 1.2 * height)
    axes.set_ylabel("height", fontsize=8)
    clean_axes(axes, "image width and height, px (large disc: many)")


def _centers(figure, columns: Sequence[Columns]) -> None:
    shown = [(i, split) for i, split in enumerate(columns) if len(split.object_sides)][:MAPS]
    if not shown:
        return
    for axes, (i, split) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown):
        axes.imshow(split.centers, cmap="magma", vmin=0, extent=(0, 1, 1, 0))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(axis_name(split.name), fontsize=9, color=COLORS[i % len(COLORS)])
    figure.suptitle("box centres in the image", fontsize=10)
