"""`detres import` and `detres export`: files in, files out, and in words what was found and what had to be assumed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from detres.build import build_model
from detres.config import Config, ModelConfig
from detres.engine.checkpoint import WeightsMeta, atomic_write, save_weights
from detres.weights.detectron2_config import translate
from detres.weights.export import FORMATS, export
from detres.weights.finetune import refit, tell_kept
from detres.weights.importers import Weights, read_weights


def import_weights(source: str | Path, out: str | Path, *, config: str | Path | None = None,
                   classes: Sequence[str] | None = None, new_classes: Sequence[str] | None = None,
                   overrides: Sequence[str] = ()) -> Weights:
    """Write weights of any toolkit as a weights file of detres, and print what they are.

    config: Detectron2's YAML of the model, for what its tensors do not show. classes: names of those it has;
    new_classes: those that it is to have, for which layers of classes begin anew (`finetune`). Raises as
    `read_weights`, and ValueError for an output that cannot be written.
    """
    out = _output(out, "safetensors")
    sections = None
    if config is not None:
        fields, notes = translate(config)
        sections = {name: value for name, value in fields["model"].items() if name != "name"}
        sections["backbone"] = {**sections["backbone"], "weights": None}
        _print_notes([note for note in notes if note.key.startswith(("MODEL.", "INPUT.FORMAT", "INPUT.M"))])
    weights = read_weights(source, model=sections, classes=classes, overrides=overrides)
    if config is not None and weights.family is not None and weights.family.toolkit != "Detectron2":
        raise ValueError(f"config must go with weights of Detectron2, whose YAML it is, got {config} for {weights.file}, "
                         f"of {weights.family.toolkit}. Leave it out; fields are set as key=value.")
    if new_classes is not None:
        weights = of_new_classes(weights, new_classes)
    save_weights(out, weights.tensors, weights.meta)
    print(f"{weights.file}\n{describe(weights)}\n"
          f"Wrote {out}: detres predict {out} IMAGES, detres eval {out} --data DATA")
    return weights


def _output(out: str | Path, format: str) -> Path:
    """The path, once it is known that a file of that format can be written there."""
    out = Path(out)
    if (out.suffix == ".safetensors") != (format == "safetensors"):
        fit = out.with_suffix(".safetensors" if format == "safetensors" else ".pth")
        raise ValueError(f"output must be a .safetensors file for weights of detres, and no such for others, got {out} "
                         f"for {format}. Say {fit}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        problem = "is a folder" if out.is_dir() else "is in a read-only folder" * (not os.access(out.parent, os.W_OK))
    except OSError as error:
        problem = f"cannot be made: {error}"
    if problem:
        raise ValueError(f"output must be a file that can be written, got {out}, which {problem}. Give another path.")
    return out


def of_new_classes(weights: Weights, classes: Sequence[str]) -> Weights:
    """The same model for other classes: random layers of classes, but for the rows of classes of both lists."""
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"new classes must be one or more distinct names, got {', '.join(classes) or 'none'}.")
    model = _model(weights.meta)
    if model.name == "rpn":
        raise ValueError(f"new classes must be for a model that tells classes apart, got {', '.join(classes)} for an "
                         f"rpn ({weights.file}). Leave them out.")
    own = build_model(model, len(classes), len(weights.meta.semantic_classes)).state_dict()
    tensors = refit(weights, own, classes, weights.meta.semantic_classes)
    meta = replace(weights.meta, classes=tuple(classes), category_ids=tuple(range(1, len(classes) + 1)))
    told = tell_kept(weights.meta, classes, weights.meta.semantic_classes)
    return replace(weights, tensors=tensors, meta=meta, notes=(*weights.notes, told))


def import_config(source: str | Path, out: str | Path) -> None:
    """Write a Detectron2 YAML config as one of detres, and print what could not be translated."""
    fields, notes = translate(source)
    config = Config.model_validate(fields)
    with atomic_write(Path(out)) as path:
        own = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), default_flow_style=None, width=120,
                             sort_keys=False)
        path.write_text(f"# From {Path(source).name}, a config of Detectron2: what is not a default.\n{own}",
                        encoding="utf-8")
    _print_notes(notes)
    print(f"Wrote {out}: detres train {out}{'' if config.data.train else ' data.train=PATH data.val=PATH'}")


def export_weights(source: str | Path, out: str | Path, format: str) -> None:
    """Write weights in the layout of another toolkit, with its settings if it has such files, and print how to load
    them there and what it does otherwise.

    format: a key of `export.FORMATS`, or safetensors. Raises ValueError for a model that it does not have.
    """
    out = _output(out, format)
    weights = read_weights(source)
    for note in weights.notes:
        print(f"assumed: {note}")
    if format == "safetensors":
        save_weights(out, weights.tensors, weights.meta)
        print(f"Wrote {out}.")
        return
    exported = export(weights.tensors, _model(weights.meta), len(weights.meta.classes), FORMATS[format])
    with atomic_write(out) as path:
        torch.save(exported.content, path)
    print(f"Wrote {out}.")
    if exported.settings:
        with atomic_write(out.with_suffix(".yaml")) as path:
            path.write_text(yaml.safe_dump(exported.settings, default_flow_style=None, width=120), encoding="utf-8")
        print(f"Wrote {out.with_suffix('.yaml')}.")
    print(exported.usage)
    if exported.differences:
        title = f"What {FORMATS[format][0].toolkit} does otherwise, unless it is told:"
        print("\n  ".join([title, *exported.differences]))


def describe(weights: Weights) -> str:
    """What the weights are of, in lines."""
    model, classes = _model(weights.meta), weights.meta.classes
    own, body = model.input, model.backbone
    origin = "detres" if weights.family is None else f"{weights.family.toolkit}, {weights.family.name}"
    few = ", ".join(classes[:4]) + (" ..." if len(classes) > 4 else "")
    size = f"short side {own.min_size}, " + (f"crop {own.crop}" if own.crop else f"long side at most {own.max_size}")
    lines = [f"recognised  {origin}",
             f"model       {model.name}, ResNet-{body.depth}, layout {body.layout}, norm {body.norm}",
             f"classes     {len(classes)}: {few}",
             f"input       {own.channel_order.upper()}, {size}, {'antialiased' if own.antialias else 'plain'} "
             f"bilinear, mean {_numbers(own.mean)}, std {_numbers(own.std)}"]
    return "\n".join([*lines, *(f"assumed     {note}" for note in weights.notes)])


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _model(meta: WeightsMeta) -> ModelConfig:
    return Config.model_validate(meta.config).model


def _print_notes(notes: Sequence[object]) -> None:
    for note in notes:
        print(f"not translated: {note}")
