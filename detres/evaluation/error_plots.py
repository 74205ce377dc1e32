"""Pictures of an `ErrorAnalysis`: one page with all, and each panel on its own.

Legend: K classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detres.engine.checkpoint import atomic_write
from detres.evaluation.errors import Bin, ErrorAnalysis
from detres.plotting import axis_name, clean_axes

COLORS = {"classification": "#4477AA", "localization": "#EE8866", "both": "#AA3377", "duplicate": "#CCBB44",
          "background": "#66A182", "missed": "#BB3344", "false_positives": "0.62", "false_negatives": "0.4"}
DARK, LIGHT, CLASS_LINE = "#225588", "#A9C4DE", "0.78"
PATCH = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind a text that a line may cross
FEW = 8  # classes with a colour each; with more, they are grey lines behind the mean
CELLS = 12  # classes up to which a confusion matrix fits on the page and has numbers
LIST = 14  # largest confusions, where it does not
MATRIX = 90  # classes of a matrix on its own; of more, those with most confusions


def plot_errors(analysis: ErrorAnalysis, folder: Path) -> None:
    """Writes errors.png (all on one page), tide.png, confusion.png, precision_recall.png, f1.png and objects.png."""
    _save(folder / "errors.png", _page(analysis))
    for name, panel, size in (("tide", _tide, (6, 3.2)), ("precision_recall", _precision_recall, (5.5, 4)),
                              ("f1", _f1, (5.5, 4)), ("objects", _objects, (5.5, 6))):
        figure = _figure(size)
        panel(figure.subplots(), analysis)
        _save(folder / f"{name}.png", figure)
    side = 3.5 + 0.17 * min(len(analysis.classes), MATRIX)
    figure = _figure((side, side))
    _matrix(figure.subplots(), analysis, font=9)
    _save(folder / "confusion.png", figure)


def _figure(size: tuple[float, float]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=130)  # without pyplot: no window, no global state
    FigureCanvasAgg(figure)
    return figure


def _save(path: Path, figure) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _page(analysis: ErrorAnalysis):
    figure = _figure((13, 8))
    left, middle, right = figure.subfigures(1, 3, width_ratios=(4.5, 4.2, 4.1))  # each column has its own margins
    top, bottom = left.subplots(2)
    _tide(top, analysis)
    if len(analysis.classes) <= CELLS:
        _matrix(bottom, analysis, font=7)
    else:
        _confusions(bottom, analysis)
    top, bottom = middle.subplots(2)
    _precision_recall(top, analysis)
    _f1(bottom, analysis)
    _objects(right.subplots(), analysis)
    overall = analysis.overall
    figure.suptitle(f"AP {_number(overall.ap)}, AP50 {_number(overall.ap50)}; {overall.truths:,} objects of "
                    f"{len(analysis.classes):,} class{'es' * (len(analysis.classes) > 1)}", fontsize=10, color="0.3")
    return figure


def _number(value: float) -> str:
    return "n/a" if value == -1 else f"{value:.3f}"


def _tide(axes, analysis: ErrorAnalysis) -> None:
    """What each kind of mistake costs."""
    names, costs = list(COLORS), [analysis.tide.dap[name] for name in COLORS]
    places = np.arange(len(names)) + 0.5 * (np.arange(len(names)) >= 6)  # a gap before false positives and negatives
    axes.barh(places, costs, color=list(COLORS.values()), height=0.75)
    for place, name, cost in zip(places, names, costs):
        count = analysis.tide.counts.get(name)
        axes.annotate(f"{cost:.3f}" + (f"  ({count:,})" if count is not None else ""), (max(cost, 0), place),
                      xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(min(0, *costs), max(*costs, 0.02) * 1.35)
    clean_axes(axes, "AP50 lost to each kind of mistake (and their number)", grid="x")
    axes.set_xlabel("dAP50", fontsize=8)


def _matrix(axes, analysis: ErrorAnalysis, font: int) -> None:
    """Rows are truths; the colour is the share of the row, in the last row (false detections) that of the column."""
    matrix = analysis.confusion.matrix.numpy()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    shares[-1] = matrix[-1] / np.maximum(matrix.sum(0), 1)
    kept = _most_confused(matrix)
    names = [[*map(axis_name, analysis.classes), "background"][i] for i in kept]
    shares, shown = shares[np.ix_(kept, kept)], matrix[np.ix_(kept, kept)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(kept) <= CELLS + 1:
        for i, j in np.argwhere(shown):
            axes.text(j, i, f"{shown[i, j]:,}", ha="center", va="center", fontsize=font,
                      color="white" if shares[i, j] > 0.55 else "black")
    some = "" if len(kept) == len(matrix) else f", {len(kept) - 1} classes of {len(matrix) - 1:,}"
    clean_axes(axes, _with_threshold(f"confusion{some}", analysis))
    axes.grid(visible=False)
    edges = np.arange(len(kept) - 1) + 0.5
    axes.vlines(edges, -0.5, len(kept) - 0.5, color="0.92", linewidth=0.5)
    axes.hlines(edges, -0.5, len(kept) - 0.5, color="0.92", linewidth=0.5)
    axes.set_xticks(range(len(kept)), names, rotation=90 if len("".join(names)) > 40 else 0, fontsize=font)
    axes.set_yticks(range(len(kept)), names, fontsize=font)
    axes.set_xlabel("detected as (background: missed)", fontsize=font)
    axes.set_ylabel("truth (background: false detection)", fontsize=font)


def _most_confused(matrix: np.ndarray) -> np.ndarray:
    """Rows to show, ascending; the last one, background, is among them."""
    wrong = matrix[:-1, :-1] * (1 - np.eye(len(matrix) - 1, dtype=matrix.dtype))
    classes = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:MATRIX]
    return np.append(np.sort(classes), len(matrix) - 1)


def _with_threshold(text: str, analysis: ErrorAnalysis) -> str:
    return f"{text} at score \N{GREATER-THAN OR EQUAL TO} {analysis.confusion.score_threshold:.3f}"


def _confusions(axes, analysis: ErrorAnalysis) -> None:
    """The most frequent ones as bars."""
    pairs = analysis.confusion.largest(analysis.classes, LIST)
    clean_axes(axes, _with_threshold("largest confusions", analysis), grid="x")
    if not pairs:
        _say(axes, "no class was taken for another")
        return
    axes.barh(range(len(pairs)), [count for *_, count in pairs], color=COLORS["classification"], height=0.75)
    for place, (*_, count) in enumerate(pairs):
        axes.annotate(f"{count:,}", (count, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(pairs)), [f"{axis_name(truth)} \N{RIGHTWARDS ARROW} {axis_name(found)}"
                                        for truth, found, _ in pairs])
    axes.set_ylim(LIST - 0.4, -0.6)
    axes.set_xlim(0, pairs[0][2] * 1.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("objects (truth \N{RIGHTWARDS ARROW} detected)", fontsize=8)


def _say(axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.5", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def _precision_recall(axes, analysis: ErrorAnalysis) -> None:
    curves = analysis.curves
    recall = np.linspace(0, 1, curves.precision.shape[1])
    ap = curves.ap().tolist()
    labels = [f"{axis_name(name)} {value:.3f}" for name, value in zip(analysis.classes, ap)]
    _class_lines(axes, recall, curves.precision.numpy(), labels)
    if (curves.precision[:, 0] >= 0).sum() > 1:
        mean = curves.mean_precision()
        axes.plot(recall, mean, color="black", linewidth=1.8, label=f"mean {float(mean.mean()):.3f}")
    _unit_square(axes, "recall", "precision")
    clean_axes(axes, f"precision and recall at IoU {analysis.confusion.iou_threshold:g} (AP)")
    _legend(axes, "best" if len(labels) <= FEW else "lower left")


def _f1(axes, analysis: ErrorAnalysis) -> None:
    """The dots are the best thresholds."""
    curves = analysis.curves
    *best, pooled = curves.best
    labels = [f"{axis_name(name)} {point.f1:.3f} at {_number(point.threshold)}"
              for name, point in zip(analysis.classes, best)]
    colors = _class_lines(axes, curves.confidence.numpy(), curves.f1[:-1].numpy(), labels)
    dots = [(p.threshold, p.f1, DARK if color == CLASS_LINE else color) for p, color in zip(best, colors)
            if p.threshold != -1]
    if dots:
        x, y, shades = zip(*dots)
        axes.scatter(x, y, c=shades, s=9, zorder=3)
    if pooled.threshold != -1 and len(best) > 1:
        axes.plot(curves.confidence, curves.f1[-1], color="black", linewidth=1.8,
                  label=f"all in one pool {pooled.f1:.3f} at {pooled.threshold:.3f}")
        axes.plot(pooled.threshold, pooled.f1, "o", color="black", markersize=5, zorder=4)
    _unit_square(axes, "score threshold", "F1")
    axes.set_xlim(float(curves.confidence[0]), float(curves.confidence[-1]))
    axes.set_ylim(0, 1.02 if len(best) <= FEW else 1.17)  # room for the legend above the dots
    axes.set_yticks(np.linspace(0, 1, 6))
    clean_axes(axes, "F1 and score threshold (dots: best)")
    _legend(axes, "best" if len(best) <= FEW else "upper right")


def _class_lines(axes, x: np.ndarray, rows: np.ndarray, labels: list[str]) -> list[str]:
    """Draws a curve of each class that has truths; the colours of all."""
    drawn = (rows >= 0).all(1).nonzero()[0]
    if len(rows) > FEW:
        broken = np.pad(rows[drawn], ((0, 0), (0, 1)), constant_values=np.nan).ravel()  # quicker than a line each
        axes.plot(np.tile([*x, np.nan], len(drawn)), broken, color=CLASS_LINE, linewidth=0.6,
                  label=f"{len(drawn):,} classes" if len(drawn) else None)
        return [CLASS_LINE] * len(rows)
    for i in drawn:
        axes.plot(x, rows[i], color=f"C{i}", linewidth=1.3, label=labels[i])
    return [f"C{i}" for i in range(len(rows))]


def _unit_square(axes, x: str, y: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)


def _legend(axes, place: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8, loc=place)
    else:
        _say(axes, "no objects")


def _objects(axes, analysis: ErrorAnalysis) -> None:
    """AP of the objects in each bin, a block for each attribute."""
    place, ticks, names = 0.0, [], []
    for attribute, bins in analysis.bins.items():
        axes.text(0.015, place, attribute, fontsize=8.5, fontweight="bold", va="center", bbox=PATCH)
        for b in bins:
            place += 1
            _bar(axes, place, b)
            ticks.append(place)
            names.append(b.name)
        place += 1.4
    axes.set_yticks(ticks, names)
    axes.set_ylim(place - 0.6, -1)
    axes.set_xlim(0, 1.28)
    axes.set_xticks(np.linspace(0, 1, 6))
    for value, style in ((analysis.overall.ap50, "--"), (analysis.overall.ap, "-")):
        axes.axvline(max(value, 0), color="0.35", linestyle=style, linewidth=0.8)
    axes.barh([0, 0], [0, 0], color=LIGHT, label="AP50")
    axes.barh([0, 0], [0, 0], color=DARK, label="AP")
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.005), ncols=2)
    clean_axes(axes, "AP by kind of object (lines: all; right: number)", grid="x")


def _bar(axes, place: float, b: Bin) -> None:
    axes.barh(place, max(b.ap50, 0), color=LIGHT, height=0.8)
    axes.barh(place, max(b.ap, 0), color=DARK, height=0.45)
    axes.text(1.27, place, f"{b.truths:,}", fontsize=8, color="0.4", ha="right", va="center")
    if b.ap == -1:
        axes.text(0.015, place, "n/a", fontsize=8, color="0.5", va="center", bbox=PATCH)
