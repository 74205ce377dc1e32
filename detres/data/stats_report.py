"""`detres data stats`: tables in the terminal, JSON, and a page of plots."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from detres.data.dataset import SPLITS
from detres.data.splits import find_splits, load_readable
from detres.data.stats import (POOR_IOU, QUANTILES, AnchorFit, ClassCount, Columns, SplitStats, anchor_fits,
                               columns_of, split_stats)
from detres.data.stats_plots import plot_stats
from detres.engine.checkpoint import atomic_write

PICTURES = (".png", ".pdf", ".svg")
LISTED = 10  # classes from each end that the terminal lists where there are more than twice as many
FIGURE, NAME = 30, 20  # characters of what is counted, and of a class
SPLIT, SPLIT_OF_CLASSES = 20, 26  # of a split in the tables of counts and of classes


class Table(NamedTuple):
    title: str
    header: Sequence[str]  # the first column is of words, the others are of numbers
    rows: Sequence[Sequence[str]]
    groups: Sequence[str] = ()  # names above the columns of numbers, for an equal number of them each


def show_stats(path: str | Path, images: str | None = None, out: Sequence[Path] = (), *, as_json: bool = False,
               all_classes: bool = False) -> list[SplitStats]:
    """Prints the numbers of all splits at a path, and writes pages of plots, by their suffix .png, .pdf, .svg or .html.

    What is invalid is left out, and the log says so. Raises as `find_splits`; ValueError for another suffix.
    """
    from rich.console import Console

    _check_suffixes(out)
    splits = sorted(find_splits(path, images), key=lambda split: list(SPLITS).index(split.role))
    columns = [columns_of(name, dataset) for name, dataset in load_readable(splits)]
    stats = list(map(split_stats, columns))
    fits = {c.name: anchor_fits(c) for c in columns}
    if as_json:
        print(json.dumps([to_json(split, fits[split.name]) for split in stats], indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        for table in tables(stats, console.width, None if all_classes else LISTED):
            console.print(as_text(table), "", sep="\n", markup=False, soft_wrap=True)
        for text in advice(fits):
            console.print(text, markup=False)
    for file in out:
        write_page(file, str(path), columns, stats, fits)
        if not as_json:
            print(f"Wrote {file}")
    return stats


def _check_suffixes(files: Sequence[Path]) -> None:
    for file in files:
        if file.suffix not in (*PICTURES, ".html"):
            raise ValueError(f"--out must end in {', '.join(PICTURES)} or .html, got {file}. Give it one of them.")


def to_json(split: SplitStats, fits: Sequence[AnchorFit]) -> dict:
    numbers = asdict(split) | {"classes": [row._asdict() for row in split.classes]}
    numbers["quantiles"] = {"at": QUANTILES, **split.quantiles}
    return numbers | {"anchors": [fit._asdict() for fit in fits]}


# Tables


def tables(stats: Sequence[SplitStats], width: int, listed: int | None) -> list[Table]:
    """Those of counts and classes in parts where the splits would not fit into `width` characters. `listed`: classes
    from each end; None: all."""
    total: Counter[str] = Counter()
    for split in stats:
        total.update({row.name: row.instances for row in split.classes})
    names = [name for name, _ in total.most_common()]
    split_width = min(SPLIT, max([12, *(len(split.name) for split in stats)]))
    return [*(_counts(part) for part in _parts(stats, (width - FIGURE) // (split_width + 2))),
            _quantiles(stats, width),
            *(_classes(part, names, listed) for part in _parts(stats, (width - NAME) // (SPLIT_OF_CLASSES + 2)))]


def _parts(stats: Sequence[SplitStats], length: int) -> list[Sequence[SplitStats]]:
    length = max(1, length)
    return [stats[start:start + length] for start in range(0, len(stats), length)]


def _counts(stats: Sequence[SplitStats]) -> Table:
    """Rows of what no split has are left out."""
    def objects(split: SplitStats) -> int:
        return split.annotations - split.crowds

    counts = {
        "images": [(split.images, 0) for split in stats],
        "  without annotations": [(split.empty_images, split.images) for split in stats],
        "annotations": [(split.annotations, 0) for split in stats],
        "  crowds": [(split.crowds, split.annotations) for split in stats],
        "  difficult": [(split.difficult, split.annotations) for split in stats],
        "  with mask": [(split.masks, split.annotations) for split in stats],
        "  with keypoints": [(split.keypoints, split.annotations) for split in stats],
        "objects, small (below 32\u00b2 px)": [(split.small, objects(split)) for split in stats],
        "  medium": [(split.medium, objects(split)) for split in stats],
        "  large (from 96\u00b2 px)": [(split.large, objects(split)) for split in stats],
        "classes with annotations": [(sum(row.instances > 0 for row in split.classes), 0) for split in stats],
        "  without": [(sum(row.instances == 0 for row in split.classes), 0) for split in stats]}
    rows = [(name, *(_share(*pair) for pair in pairs)) for name, pairs in counts.items()
            if not name.startswith("  ") or any(count for count, _ in pairs)]
    return Table("Counts", ("", *(_cut(split.name, SPLIT) for split in stats)), rows)


def _share(count: int, total: int) -> str:
    return f"{count:,} {f'{count / total:.0%}' if total else '':>4}"


def _quantiles(stats: Sequence[SplitStats], width: int) -> Table:
    """Without the outermost where `width` is not enough for all."""
    kept = slice(None) if width >= NAME + 7 * len(QUANTILES) else slice(1, -1)
    rows = []
    for name in dict.fromkeys(name for split in stats for name in split.quantiles):
        found = [(split.name, *map(_number, split.quantiles[name][kept])) for split in stats if name in split.quantiles]
        rows += [(name, *found[0][1:])] if len(stats) == 1 else [
            (name, *[""] * len(QUANTILES[kept])), *((f"  {_cut(split, NAME)}", *numbers) for split, *numbers in found)]
    return Table("Quantiles", ("", *(f"{q:.0%}" for q in QUANTILES[kept])), rows)


def _number(value: float) -> str:
    """Three digits, also where the last are zeros, so that those of a row compare; whole numbers stay whole."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2}f}"


def _classes(stats: Sequence[SplitStats], names: Sequence[str], listed: int | None) -> Table:
    counts = [{row.name: row for row in split.classes} for split in stats]
    rows = [(_cut(name, NAME), *(text for found in counts for text in _class_cells(found.get(name))))
            for name in names]
    if listed is not None and len(rows) > 2 * listed:
        rows[listed:-listed] = [(f"... {len(rows) - 2 * listed} more: --all", *[""] * (3 * len(stats)))]
    return Table("Classes", ("", *("instances", "images", "share") * len(stats)), rows,
                 [_cut(split.name, SPLIT_OF_CLASSES) for split in stats])


def _class_cells(row: ClassCount | None) -> tuple[str, str, str]:
    """Dashes for a class that the split does not list."""
    return ("-", "-", "-") if row is None else (f"{row.instances:,}", f"{row.images:,}", f"{row.share:.1%}")


def _cut(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[:limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def as_text(table: Table) -> str:
    """Columns as wide as they must be; a group's name at the right, above its columns."""
    widths = [max(map(len, column)) for column in zip([table.title, *table.header[1:]], *table.rows)]
    if table.groups:
        span = (len(widths) - 1) // len(table.groups)
        widths[1:] = [max(width, least) for width, least in zip(widths[1:], (11, 7, 6) * len(table.groups))]
        wide = [sum(widths[start:start + span]) + 2 * (span - 1) for start in range(1, len(widths), span)]
        head = [_line([table.title, *table.groups], [widths[0], *wide]), _line(table.header, widths)]
    else:
        head = [_line([table.title, *table.header[1:]], widths)]
    rule = "\N{BOX DRAWINGS LIGHT HORIZONTAL}" * max(map(len, head))
    return "\n".join([*head, rule, *(_line(row, widths).rstrip() for row in table.rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(cells, widths)))
    return "  ".join([first, *others])


def advice(fits: dict[str, Sequence[AnchorFit]]) -> list[str]:
    """What the shapes of objects say of anchors and input size; nothing where no setting tried is better."""
    texts = []
    for name, (plain, *better) in ((name, found) for name, found in fits.items() if len(found) > 1):
        texts.append(f"{name}: {plain.poor:.0%} of the objects have an IoU below {POOR_IOU:g} with every anchor of the "
                     "default config, even one centred on them. Fewer:")
        texts += [f"  {fit.poor:4.0%} with {fit.overrides}" for fit in better]
    return texts


# Pages


def write_page(file: Path, title: str, columns: Sequence[Columns], stats: Sequence[SplitStats],
               fits: dict[str, Sequence[AnchorFit]]) -> None:
    """The plots; as .html with all tables, in one file."""
    figure, kind = plot_stats(columns, stats, title), file.suffix.removeprefix(".")
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind != "html":
        with atomic_write(file) as temporary:
            figure.savefig(temporary, format=kind)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    parts = [_html(table) for table in tables(stats, 10**6, None)]
    parts.append(f"<pre>{html.escape(chr(10).join(advice(fits)))}</pre>")
    with atomic_write(file) as temporary:
        Path(temporary).write_text(_PAGE.format(
            title=html.escape(title), picture=base64.b64encode(picture.getvalue()).decode(), body="\n".join(parts)),
            encoding="utf-8")


def _html(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    return f"<h2>{html.escape(table.title)}</h2>\n<table>\n{row(table.header, 'th')}\n{body}\n</table>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }}
body {{ max-width: 1500px; margin: 1rem auto; padding: 0 1rem; }}
img {{ width: 100%; background: white; }}
td, th {{ padding: .1rem .7rem; text-align: right; white-space: pre; font-variant-numeric: tabular-nums; }}
td:first-child {{ text-align: left; }}
th {{ vertical-align: bottom; border-bottom: 1px solid gray; }}
</style></head><body>
<h1>{title}</h1>
<img alt="plots" src="data:image/png;base64,{picture}">
{body}
</body></html>
"""
