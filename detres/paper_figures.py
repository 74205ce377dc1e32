"""Figures 6 and 7 of arXiv 1512.03385: how deep plain networks degrade on CIFAR-10, how residual ones do not, and how
strongly their layers respond. `run_figures` trains what is missing; the figures are drawn from logs and weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detres.config_file import load_config, shipped_configs
from detres.data.class_dataset import align_labels, load_class_dataset
from detres.data.class_loader import build_class_loader
from detres.engine.bn_stats import normalising_by_batch
from detres.engine.checkpoint import atomic_write
from detres.engine.run_folder import open_run
from detres.engine.train import train
from detres.evaluation.run import eval_mode
from detres.inference.predictor import load_model
from detres.structures import Batch

Series = list[tuple[float, float]]  # step, value
COLORS = ("#e6a000", "#c2185b", "#2e7d32", "#1565c0", "#6a1b9a")


def run_figures(data: str, runs: Path, out: Path, networks: Sequence[str], seeds: int = 1,
                overrides: Sequence[str] = ()) -> str:
    """Train each network ("plain20", "resnet56" ...) with seeds 0, 1 ... by its config, with `overrides`, then write
    under `out`: figure6.png, figure7.png, table.md. Returns the table, and where they are.

    data: see `data.cifar`; images of `train45k` train, test images test. runs: the trainings go where the rows of these
    networks have theirs, `runs`/table6/resnet56, further seeds beside them (resnet56_1): what is finished is kept, what
    was interrupted goes on. Raises ValueError for an unknown network, or for a run with other settings.
    """
    for network in networks:
        _config(network)
    folders = {(name, seed): _trained(data, runs, name, seed, overrides) for seed in range(seeds) for name in networks}
    found = [Network(name, tuple(folders[name, seed] for seed in range(seeds))) for name in networks]
    out.mkdir(parents=True, exist_ok=True)
    table = error_table(found)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    plot_errors(found, out / "figure6.png")
    plot_responses({network.name: list(responses_of(network.runs[0]).values()) for network in found},
                   out / "figure7.png")
    return f"{table}\n\nThe table is {out}/table.md, errors are figure6.png, responses of layers figure7.png beside it."


def _config(network: str) -> Path:
    """Plain networks are rows of figure 6, residual ones of table 6."""
    folder = shipped_configs() / "paper"
    known = {file.stem: file for part in ("figure6", "table6") for file in sorted(folder.glob(f"{part}/*.yaml"))}
    if network not in known:
        raise ValueError(f"network must be one of {', '.join(known)}, got '{network}'.")
    return known[network]


def _trained(data: str, runs: Path, network: str, seed: int, overrides: Sequence[str]) -> Path:
    """The folder of a finished run."""
    file = _config(network)
    run = runs / file.parent.name / (network if seed == 0 else f"{network}_{seed}")
    sources = [f"data.{role}={{path: {json.dumps(data)}, split: {split}}}"
               for role, split in (("train", "train45k"), ("val", "test"))]
    config = load_config(file, [*sources, f"output={json.dumps(str(run))}", f"train.seed={seed}", *overrides]).config
    if (run / "results.json").is_file():
        open_run(config, resume=True)  # raises where settings differ
    else:
        train(config, resume=True)
    return run


@dataclass(frozen=True)
class Network:
    """The runs of one network, which differ in their seed."""

    name: str
    runs: tuple[Path, ...]

    @property
    def depth(self) -> int:
        return int(re.search(r"\d+", self.name)[0])

    @property
    def is_plain(self) -> bool:
        return self.name.startswith("plain")

    def errors(self, name: str) -> list[Series]:
        """Of each run: "error" of training, "cls/top1_error" of the test images, in percent over the steps."""
        return [[(row["step"], 100 * row[name]) for row in _rows(run) if name in row] for run in self.runs]


def _rows(run: Path) -> list[dict[str, float]]:
    log = run / "log.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"run must have a log.jsonl, got {run}. Give folders that `detres train` wrote.")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def error_table(networks: Sequence[Network], last: int = 5) -> str:
    """Markdown: final errors in percent, mean and standard deviation over the seeds. Training errors are of the last
    `last` rows of the log: one row is only a few hundred images."""
    lines = ["| network | seeds | training error % | test error % |", "|---|---|---|---|"]
    for network in networks:
        training = [mean(value for _, value in run[-last:]) for run in network.errors("error")]
        test = [run[-1][1] for run in network.errors("cls/top1_error")]
        lines.append(f"| {network.name} | {len(network.runs)} | {_spread(training)} | {_spread(test)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def plot_errors(networks: Sequence[Network], path: Path, title: str = "") -> None:
    """Figure 6, left and middle: dashed the training error, bold the test error; plain networks beside residual ones.
    The line is the mean over seeds, the band from the lowest to the highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    depths = sorted({network.depth for network in networks})
    for ax, plain in zip(axes, (True, False)):
        for network in (network for network in networks if network.is_plain == plain):
            color = COLORS[depths.index(network.depth) % len(COLORS)]
            _band(ax, [_smoothed(run) for run in network.errors("error")], color=color, linestyle="--", linewidth=1)
            _band(ax, network.errors("cls/top1_error"), color=color, linewidth=2.2, label=network.name)
        ax.set_title("plain networks" if plain else "residual networks")
        ax.set_xlabel("step")
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.lines:
            ax.legend(frameon=False, title="bold: test, dashed: training", title_fontsize=8)
    axes[0].set_ylabel("error (%)")
    figure.suptitle(title, fontsize=10, color="0.4")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _smoothed(series: Series, part: int = 20) -> Series:
    """Means of neighbouring rows: a row of training is only a few hundred images."""
    width = max(1, len(series) // part)
    groups = [series[start:start + width] for start in range(0, len(series) - width + 1, width)]
    return [(mean(step for step, _ in group), mean(value for _, value in group)) for group in groups]


def _band(ax, runs: list[Series], label: str | None = None, **style) -> None:
    """Runs of one network have their rows at the same steps, up to the shortest."""
    columns = list(zip(*runs))
    steps = [points[0][0] for points in columns]
    values = [[value for _, value in points] for points in columns]
    marker = "o" if len(steps) == 1 else None
    ax.plot(steps, [mean(each) for each in values], label=label, marker=marker, **style)
    ax.fill_between(steps, [min(each) for each in values], [max(each) for each in values], color=style["color"],
                    alpha=0.15, linewidth=0)


@torch.no_grad()
def layer_responses(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """Standard deviation of the output of every 3x3 layer of a classifier's backbone, after BN and before the addition
    and ReLU, in the order of the layers (section 4.2, Figure 7). All images, positions and channels of a layer count.

    Norms take the statistics of each batch, as in training: with the running ones, an image that is unlike those of
    training can grow from block to block to a hundred times the response of others, and would be all that is measured.
    """
    sums: dict[str, Tensor] = {}
    layers = _three_by_three(model)

    def note(name: str):
        def hook(module, inputs, output) -> None:
            values = output.double()
            moments = torch.stack([values.new_tensor(values.numel()), values.sum(), (values * values).sum()])
            sums[name] = sums.get(name, 0) + moments
        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        with eval_mode(model), normalising_by_batch(norms):
            for batch in batches:
                model(batch.to(device, non_blocking=True).images)
    finally:
        for handle in handles:
            handle.remove()
    count, total, squares = torch.stack([sums[name] for name in layers]).unbind(1)
    deviation = (squares / count - (total / count) ** 2).clamp(min=0).sqrt()
    return dict(zip(layers, deviation.tolist()))


def _three_by_three(model: nn.Module) -> dict[str, nn.Module]:
    """The norm behind each 3x3 convolution: `bn<k>` stands beside `conv<k>`."""
    modules = dict(model.backbone.body.named_modules())
    norms = {name: modules[re.sub(r"conv(\d)$", r"bn\1", name)] for name, module in modules.items()
             if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)}
    if not any(isinstance(norm, _BatchNorm) for norm in norms.values()):
        raise ValueError("model must have batch norm behind its 3x3 convolutions to measure responses, got "
                         f"{', '.join(sorted({type(norm).__name__ for norm in norms.values()})) or 'none'}.")
    return norms


def plot_responses(responses: dict[str, list[float]], path: Path) -> None:
    """Figure 7: by the order of layers above, sorted by size below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    depths = sorted({int(re.search(r"\d+", name)[0]) for name in responses})
    for name, values in responses.items():
        style = {"color": COLORS[depths.index(int(re.search(r"\d+", name)[0])) % len(COLORS)],
                 "linestyle": "--" if name.startswith("plain") else "-", "label": name, "linewidth": 1.6}
        upper.plot(range(1, len(values) + 1), values, **style)
        lower.plot(range(1, len(values) + 1), sorted(values, reverse=True), **style)
    upper.set_xlabel("layer")
    lower.set_xlabel("layer, by size")
    for ax in (upper, lower):
        ax.set_ylabel("standard deviation")
        ax.set_ylim(bottom=0)
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False, ncols=2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def responses_of(run: Path, images: int = 1000) -> dict[str, float]:
    """`layer_responses` of the last weights of a run to the first test images."""
    model, meta, config = load_model(run / "checkpoints" / "final.safetensors")
    device = next(model.parameters()).device
    val = align_labels(load_class_dataset(config.data.val, "val"), meta.classes)
    batch_size = min(100, images)
    batches = build_class_loader(val, config, device, batch_size=batch_size, training=False)
    return layer_responses(model, islice(batches, images // batch_size), device)
