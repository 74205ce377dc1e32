"""Every table and figure of *Deep Residual Learning* (arXiv 1512.03385), row by row: `detres paper`.

What was published is in configs/paper/index.yaml. A row of the paper's own has a config, configs/paper/TABLE/ROW.yaml,
whose header says what was measured here and by which commands; `run` runs them. A row is either a training and its
test, or only a test of weights that another row trains.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from detres.config import Config
from detres.config_file import load_config, shipped_configs

if TYPE_CHECKING:
    from torch import Tensor, nn

RUNS = "runs/paper"  # where the configs put their runs
CONFIGS = "configs/paper"
NOT_MEASURED = "not yet measured"


@dataclass(frozen=True)
class Row:
    """A line of a table. Numbers are strings, digit by digit as printed: "5.60"; "-" where there is none."""

    id: str  # "table6/resnet56"
    what: str
    published: tuple[str, ...]  # in the columns of its table
    note: str = ""
    classes: tuple[str, ...] = ()  # AP of each class
    config: Path | None = None  # None: another system

    @property
    def here(self) -> str:
        """What detres measured, and where the record is; "" if nothing."""
        measured = header(self.config)["detres"] if self.config else ""
        return "" if measured == NOT_MEASURED else measured

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command."""
        return [shlex.split(command) for command in header(self.config)["command"].split(" && ")]


@dataclass(frozen=True)
class Part:
    """A table or a figure. columns: name -> metric of detres, "" where only a server measures."""

    name: str  # "table6"
    title: str
    protocol: str
    rows: tuple[Row, ...] = ()
    columns: dict[str, str] | None = None
    classes: tuple[str, ...] = ()
    published: str = ""  # of a part without rows, or whose result is a picture
    here: str = ""  # what was measured of it, other than its rows
    run: str = ""  # key of ANALYSES

    @property
    def heading(self) -> str:
        """Its name as the paper writes it: "Table 6"."""
        return re.sub(r"(\D+)(\d+)", r"\1 \2", self.name).capitalize()

    def reference(self, row: Row) -> str:
        """What was published, in one line: the header of the row's config has the same."""
        pairs = zip(self.columns or {"no number": ""}, row.published)
        numbers = ", ".join(f"{column} {value} %" for column, value in pairs if value != "-") or "no number"
        note = f" ({row.note})" if row.note else ""
        return f"{numbers}{note}: {self.heading}, {self.protocol}"


def header(config: Path) -> dict[str, str]:
    """The fields of a config's first comment: reference, detres, command. Lines that are indented further go on."""
    text = config.read_text(encoding="utf-8")
    fields = re.findall(r"^#   (\w+) +(.+(?:\n#     +.+)*)", text, re.M)
    return {name: re.sub(r"\n# +", " ", value) for name, value in fields}


def load_paper() -> dict[str, Part]:
    """All tables and figures, in the paper's order."""
    folder = shipped_configs() / "paper"
    # BaseLoader: numbers stay as they are printed
    index = yaml.load((folder / "index.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)
    return {name: _part(folder, name, entry) for name, entry in index.items()}


def _part(folder: Path, name: str, entry: dict) -> Part:
    others, of_classes = entry.pop("others", {}), entry.pop("other_classes", {})
    rows = [Row("", what, _numbers(published), classes=tuple(of_classes.get(what, "").split()))
            for what, published in others.items()]
    rows += [Row(f"{name}/{key}", row["what"], _numbers(row["published"]), row.get("note", ""),
                 tuple(row.get("classes", "").split()), folder / name / f"{key}.yaml")
             for key, row in entry.pop("rows", {}).items()]
    classes = tuple(entry.pop("classes", "").split())
    return Part(name, rows=tuple(rows), classes=classes, **entry)


def _numbers(published: str) -> tuple[str, ...]:
    return tuple(published.split(" / "))


def find(parts: dict[str, Part], name: str) -> tuple[Part, Row | None]:
    """The part of that name, or the row of that id and its part. Raises ValueError that names the nearest."""
    rows = {row.id: (part, row) for part in parts.values() for row in part.rows if row.id}
    known = {**{key: (part, None) for key, part in parts.items()}, **rows}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"row must be one that `detres paper` lists, such as table6 or table6/resnet56, got '{name}'."
                         f"{f' Did you mean {close[0]}?' if close else ''}")
    return known[name]


# Showing


def listing(name: str | None = None) -> str:
    """Text for a terminal: all parts, one, or one row with its commands."""
    parts = load_paper()
    if name is None:
        return "\n\n".join([*(_table(part) for part in parts.values()),
                            "Commands of a row: detres paper ROW. Run them: detres paper run ROW --data PATH. Its "
                            f"config is {CONFIGS}/ROW.yaml."])
    part, row = find(parts, name)
    if row is None:
        return _table(part)
    lines = [f"{row.id}: {row.what}", f"  published  {part.reference(row)}",
             f"  here       {row.here or 'not run here'}", f"  config     {CONFIGS}/{row.id}.yaml",
             *(f"  command    {shlex.join(words)}" for words in row.commands)]
    return "\n".join([*lines, *_class_lines(part, [row])])


def _table(part: Part) -> str:
    lines = [f"{part.heading}. {part.title} ({part.protocol})"]
    if part.published:
        lines.append(f"  published: {part.published}")
    if part.published or part.here:
        lines.append(f"  here: {part.here or 'not run here'}")
    if part.run:
        lines.append(f"  detres paper run {part.name}")
    cells = [(row.id, " / ".join(row.published), row.here or ("not run here" if row.id else ""), _what(row))
             for row in part.rows]
    if cells:
        cells.insert(0, ("row", " / ".join(part.columns or ["published"]), "here", "what"))
    widths = [max((len(column) for column in columns), default=0) for columns in zip(*cells)]
    lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([*lines, *_class_lines(part, part.rows)])


def _what(row: Row) -> str:
    return f"{row.what} ({row.note})" if row.note else row.what


def _class_lines(part: Part, rows: Sequence[Row]) -> list[str]:
    return [f"  {row.what}: {', '.join(f'{name} {value}' for name, value in zip(part.classes, row.classes))}"
            for row in rows if row.classes]


def markdown() -> str:
    """The tables of docs/paper.md, where configs are two folders away."""
    return "\n\n".join("\n".join(_markdown(part)) for part in load_paper().values())


def _markdown(part: Part) -> Iterator[str]:
    yield f"### {part.heading}. {part.title}\n\n{part.protocol[0].upper()}{part.protocol[1:]}."
    if part.published:
        yield f"\nPublished: {part.published}. Here: {part.here or 'not run here'}."
    elif part.here:
        yield f"\nHere: {part.here}."
    if part.run:
        yield f"\n`detres paper run {part.name}`"
    if part.rows:
        yield from ["", *_grid(["row", "what", *(part.columns or {"published": ""}), "here"], [
            [f"[{row.id}](../{CONFIGS}/{row.id}.yaml)" if row.id else "", _what(row), *row.published,
             (row.here or "not run here") if row.id else ""] for row in part.rows])]
    if part.classes:
        yield from ["", *_grid(["what", *part.classes], [[row.what, *row.classes] for row in part.rows])]


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


# Running


def run(name: str, *, data: str | None = None, out: str = RUNS, overrides: Sequence[str] = (),
        num_gpus: int = 1, seeds: int | None = None, networks: Sequence[str] = ()) -> None:
    """Run exactly the commands of a row, or the function of a part, and print what came out beside what was published.

    Trainings go on where they stopped. `data` takes the place of the config's data set, `out` that of runs/paper,
    `overrides` are added to every command. Figures of CIFAR-10 can be of other `networks` than the paper's, each with
    several `seeds`. Raises ValueError for an unknown row, FileNotFoundError for weights of another row that is to be
    run first; SystemExit with the status of a command that failed.
    """
    part, row = find(load_paper(), name)
    if row is None and not part.run:
        ids = ", ".join(row.id for row in part.rows if row.id)
        raise ValueError(f"run must name a row, got '{name}', a table. Take one of {ids}.")
    chosen = {key: value for key, value in (("seeds", seeds), ("networks", networks)) if value}
    if chosen and (row is not None or part.run not in CIFAR_FIGURES):
        hint = " Of a row, set train.seed=1." if row is not None and seeds else ""
        raise ValueError(f"{' and '.join(chosen)} must go with {', '.join(CIFAR_FIGURES)}, got {name}.{hint}")
    if row is None:
        print(ANALYSES[part.run](data, Path(out), overrides, **chosen))
        return
    commands = [_adapted(words, row, data, out, overrides, num_gpus) for words in row.commands]
    _require_runs(row, commands, out, overrides)
    for words in commands:
        print(f"$ {shlex.join(words)}", flush=True)
        _call(words[1:])
    changed = f"\n  changed    {shlex.join(overrides)}: not what was published" if overrides else ""
    print(f"{row.id}\n  published  {part.reference(row)}\n  here       {_measured(part, row, commands, out)}{changed}")


def _adapted(words: Sequence[str], row: Row, data: str | None, out: str, overrides: Sequence[str],
             num_gpus: int) -> list[str]:
    """A command of a row's header with the user's own places and settings."""
    words, fields = [_moved(word, out) for word in words], []
    config = load_config(words[2] if words[1] == "train" else row.config).config
    if data is not None:
        root = config.data.train.path
        words = [data + word[len(root):] if word == root or word.startswith(f"{root}/") else word for word in words]
        fields = [f"data.{role}.path={data}" for role in ("train", "val") if getattr(config.data, role)]
    if words[1] == "bn-stats":
        return words
    if words[1] != "train":
        # what is saved goes to a server, which has the truth
        is_test = words[1] in ("eval", "localize") and "--save" not in words
        return [*words, *fields, *overrides, *(["--json", _numbers_file(row, out)] if is_test else [])]
    for name, path in _paths(config):
        if out != RUNS and not any(word.startswith(f"{name}=") for word in words):
            fields.append(f"{name}={_moved(path, out)}")
    gpus = ["--num-gpus", str(num_gpus)] if num_gpus > 1 else []
    return [*words, "--resume", *gpus, *fields, *overrides]


def _paths(config: Config) -> list[tuple[str, str]]:
    """Fields of a config that are places in runs/paper."""
    places = {"output": config.output, "model.weights": config.model.weights,
              "model.backbone.weights": config.model.backbone.weights, "data.proposals": config.data.proposals}
    return [(name, path) for name, path in places.items() if path and path.startswith(f"{RUNS}/")]


def _moved(word: str, out: str) -> str:
    """With the user's `out` for runs/paper, and configs as they are installed."""
    word = word.replace(f"{RUNS}/", f"{out}/")
    return str(shipped_configs() / word.removeprefix("configs/")) if word.startswith(f"{CONFIGS}/") else word


def _numbers_file(row: Row, out: str) -> str:
    return f"{out}/{row.id}.json"


def _require_runs(row: Row, commands: Sequence[Sequence[str]], out: str, overrides: Sequence[str]) -> None:
    """Raises FileNotFoundError if weights of other rows are missing that the user has not replaced."""
    trains, set_by_user = any(words[1] == "train" for words in commands), {item.partition("=")[0] for item in overrides}
    places = _paths(load_config(row.config).config) if trains else []
    needed = [_moved(path, out) for name, path in places if name not in set_by_user]
    for path in [*needed, *(word for words in commands for word in words)]:
        found = re.match(rf"{re.escape(out)}/(\w+/\w+)/checkpoints/", path)
        if found and not found[1].startswith(row.id) and not Path(path).is_file():
            raise FileNotFoundError(f"weights of {found[1]} must be there for {row.id}, got no file {path}. "
                                    f"Make them first: detres paper run {found[1]}")


def _call(words: Sequence[str]) -> None:
    from detres.cli import main

    try:
        status = main(words)
    except SystemExit as stopped:  # --num-gpus ends so, and what was interrupted
        status = stopped.code
    if status:
        raise SystemExit(status)


def _measured(part: Part, row: Row, commands: Sequence[Sequence[str]], out: str) -> str:
    is_tested = any("--json" in words for words in commands)
    output = _moved(load_config(row.config).config.output, out)
    file = Path(_numbers_file(row, out) if is_tested else f"{output}/results.json")
    metrics = json.loads(file.read_text(encoding="utf-8"))
    found = [f"{column} {100 * metrics[metric]:.2f} %" for column, metric in (part.columns or {}).items()
             if metrics.get(metric, -1) >= 0]
    return f"{', '.join(found) or 'not measured'} ({file})"


# Analyses: (data set or None, folder of runs, overrides) -> what to print; figures are written beside the runs


def table1(data: str | None, out: Path, overrides: Sequence[str]) -> str:
    """Counted on tensors without storage."""
    import torch

    from detres.models.resnet import resnet

    lines = ["depth  10^9 multiply-adds"]
    for depth in (18, 34, 50, 101, 152):
        with torch.device("meta"):
            body = resnet(depth, shortcut="A" if depth < 50 else "B", stride_in_1x1=True)
            count = multiply_adds(body, torch.zeros(1, 3, 224, 224)) + body.channels[-1] * 1000  # the fc layer
        lines.append(f"{depth:5}  {count / 1e9:.3f}")
    return "\n".join(lines)


def multiply_adds(body: nn.Module, pixels: Tensor) -> int:
    """Of all convolutions: each value of an output is a product with the weights of its channel."""
    counts: list[int] = []

    def note(conv, inputs, output) -> None:
        counts.append(output.numel() * conv.weight[0].numel())

    for module in body.modules():
        if hasattr(module, "kernel_size") and hasattr(module, "weight"):
            module.register_forward_hook(note)
    body(pixels)
    return sum(counts)


def cifar_curves(figure: str, data: str | None, out: Path, overrides: Sequence[str], seeds: int = 1,
                 networks: Sequence[str] = ()) -> str:
    """Figures 1, 6 and 7: the same drawings, of other networks."""
    from detres.paper_figures import run_figures

    return run_figures(data or "datasets/cifar10", out, out / figure, networks or CIFAR_FIGURES[figure], seeds,
                       overrides)


def imagenet_curves(data: str | None, out: Path, overrides: Sequence[str]) -> str:
    """Figure 4, from the logs of Table 2's runs. It trains nothing itself."""
    from detres.paper_figures import Network, error_table, plot_errors

    networks = [Network(name, (out / "table2" / name,)) for name in ("plain18", "plain34", "resnet18", "resnet34")]
    for network in networks:
        if not (network.runs[0] / "log.jsonl").is_file():
            raise FileNotFoundError(f"runs of table2 must be there for figure4, got no {network.runs[0]}. Make them "
                                    f"first: detres paper run table2/{network.name}")
    picture = out / "figure4" / "figure4.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_errors(networks, picture)
    return f"{error_table(networks)}\n\nThe figure is {picture}."


PLAIN = ("plain20", "plain32", "plain44", "plain56")
RESIDUAL = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
CIFAR_FIGURES = {"figure1": ("plain20", "plain56"),
                 "figure6": (*PLAIN, "plain110", *RESIDUAL, "resnet1202"),
                 "figure7": ("plain20", "plain56", "resnet20", "resnet56", "resnet110")}
ANALYSES: dict[str, Callable[..., str]] = {
    "table1": table1, "figure4": imagenet_curves, **{name: partial(cifar_curves, name) for name in CIFAR_FIGURES}}
