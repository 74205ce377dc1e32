"""One picture of a run: losses, metrics and learning rate over the steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detres.engine.checkpoint import atomic_write

Row = dict[str, float]
SMOOTHING = 25  # a smoothed curve averages about this part of the run's rows


def plot_curves(rows: list[Row], path: Path, title: str = "") -> None:
    """Writes a PNG of the rows of a run (see `engine.log`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=130)  # without pyplot: no window, no global state
    FigureCanvasAgg(figure)
    losses, metrics, rate = figure.subplots(1, 3, width_ratios=(5, 5, 2.6))
    _losses(losses, rows)
    _metrics(metrics, rows)
    _curve(rate, rows, "lr", color="0.25")
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    for axes in (losses, metrics, rate):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="x", style="plain")
    figure.suptitle(title, fontsize=10, color="0.4")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _losses(axes, rows: list[Row]) -> None:
    names = list({name: None for row in rows for name in row if name.startswith("loss")})
    for i, name in enumerate(names):
        color = "black" if name == "loss" else f"C{i - 1}"
        steps, values = _series(rows, name)
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color=color, linewidth=1.6, label=name.removeprefix("loss_"))
    _curve(axes, rows, "val/loss", color="black", marker="o", linestyle=":", label="loss, validation")
    axes.set_title("losses (thin: as measured; thick: smoothed)")
    positive = [value for row in rows for name, value in row.items() if name == "loss" and value > 0]
    axes.set_ylim(0, float(np.quantile(positive, 0.98)) * 1.15 if positive else None)
    if names:
        axes.legend(frameon=False, fontsize=8, ncols=2)


def _metrics(axes, rows: list[Row]) -> None:
    names = list({name: None for row in rows for name in row if name.rpartition("/")[2] in ("AP", "AP50", "AP75")})
    groups = list(dict.fromkeys(name.partition("/")[0] for name in names))
    styles = {"AP": "-", "AP50": "--", "AP75": ":"}
    for name in names:
        group, _, short = name.rpartition("/")
        _curve(axes, rows, name, color=f"C{groups.index(group)}", linestyle=styles[short], marker="o", label=name)
    axes.set_title("validation")
    axes.set_ylim(0, 1)
    if names:
        axes.legend(frameon=False, fontsize=8, ncols=len(groups))
    else:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color="0.5")


def _curve(axes, rows: list[Row], name: str, **style) -> None:
    steps, values = _series(rows, name)
    if steps:
        axes.plot(steps, values, **{"linewidth": 1.6, "markersize": 3.5, **style})


def _series(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _smoothed(values: list[float]) -> np.ndarray:
    """A centred moving average over a part of the series; at the ends over what there is."""
    width = max(1, len(values) // SMOOTHING) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
