"""What is wrong with weights that do not fit a model, as a table with the likely reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detres.config import ModelConfig
from detres.weights.infer import infer_shapes
from detres.weights.source import Shapes, merged

SHOWN = 12  # rows of the table
FIELDS = 4  # of those that differ

# Layers whose size depends on the classes, in any model.
OF_CLASSES = re.compile(
    r"(roi_heads\.(box_predictor(\.\d+)?|mask_head\.(predict|coarse_head\.predict|point_head\.(fcs\.\d+|predict)))"
    r"|fc|(aux_)?head\.\w*predict|semantic_head\.predict|head\.cls|head\.box|cls|box)\.")


class WeightsMismatch(ValueError):
    """Tensors that do not fit; `missing`, `unexpected` and `wrong` name them."""

    def __init__(self, title: str, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str], table: str):
        super().__init__(f"{title}:\n{table}")
        self.missing, self.unexpected, self.wrong = tuple(missing), tuple(unexpected), tuple(wrong)


@dataclass(frozen=True)
class Row:
    layer: str
    what: str  # missing, unexpected, wrong shape
    given: str
    wanted: str


def check_fit(given: Shapes, wanted: Shapes, title: str, fix: str) -> None:
    """Raises WeightsMismatch unless both have the same names and shapes. `title` says what must fit what, `fix` what to
    do, where no likelier reason is found."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    wrong = [name for name in wanted if name in given and given[name] != wanted[name]]
    if not (missing or unexpected or wrong):
        return
    rows = [*(Row(name, "wrong shape", str(given[name]), str(wanted[name])) for name in wrong),
            *(Row(name, "missing", "-", str(wanted[name])) for name in missing),
            *(Row(name, "unexpected", str(given[name]), "-") for name in unexpected)]
    reason = _reason(given, wanted, missing, unexpected, wrong) or fix
    raise WeightsMismatch(f"{title}, got {_count(rows)}", missing, unexpected, wrong, f"{_table(rows)}\n{reason}")


def _count(rows: Sequence[Row]) -> str:
    return "1 tensor that differs" if len(rows) == 1 else f"{len(rows)} tensors that differ"


def _table(rows: Sequence[Row]) -> str:
    """The first rows of each kind, one for each layer: its weight stands for its bias and its norm's statistics."""
    kinds = dict.fromkeys(row.what for row in rows)
    lines = [("layer", "", "in the weights", "in the model")]
    for kind in kinds:
        layers: dict[str, Row] = {}
        for row in rows:
            if row.what == kind:
                layers.setdefault(row.layer.rpartition(".")[0], row)
        shown = list(layers.values())[:max(1, SHOWN // len(kinds))]
        lines += [(row.layer, row.what, row.given, row.wanted) for row in shown]
        if len(layers) > len(shown):
            lines.append((f"and {len(layers) - len(shown)} layers more", kind, "", ""))
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  " + "  ".join(cells).rstrip() for cells in padded)


def _reason(given: Shapes, wanted: Shapes, missing: Sequence[str], unexpected: Sequence[str],
            wrong: Sequence[str]) -> str:
    """What the networks are of that the tensors show (`infer`); else what the names say."""
    differing = [*missing, *unexpected, *wrong]
    theirs, ours = _network(given), _network(wanted)
    if theirs and ours:
        (fields, classes), (own_fields, own_classes) = theirs, ours
        different = [f"model.{name}={_shown(value)} instead of {_shown(own_fields[name])}"
                     for name, value in fields.items()
                     if value != own_fields[name]]
        if different:
            more = f" and {len(different) - FIELDS} fields more" if len(different) > FIELDS else ""
            return (f"Likely: weights of another model, {', '.join(different[:FIELDS])}{more}. Set these fields as "
                    "the weights have them, or take the model that the weights carry.")
        if classes != own_classes:
            return (f"Likely: other classes, {classes} in the weights and {own_classes} in the model. Train "
                    "with model.weights=FILE: layers of classes then begin anew, but for classes of both.")
    if theirs and ours and all(name.startswith(("head.cls.", "head.box.")) for name in differing):
        return ("Likely: another number of anchors in a cell. Set model.anchors.sizes and aspect_ratios to those of "
                "the weights.")
    if all(OF_CLASSES.match(name) for name in differing):
        return ("Likely: other classes. Train with model.weights=FILE: layers of classes then begin anew, but for "
                "classes of both.")
    if all("running_" in name or "norm" in name or ".bn" in name for name in differing):
        return "Likely: another kind of norm. Set model.backbone.norm (and those of the heads) to that of the weights."
    if not missing and not unexpected:
        return ("Likely: layers of another width, or in groups. Set model.backbone.width, groups and group_width, or "
                "the channels of the heads.")
    if _blocks(given) != _blocks(wanted) and all(map(any, (_blocks(given), _blocks(wanted)))):
        return f"Likely: another depth, with stages of {_blocks(given)} blocks instead of {_blocks(wanted)}."
    return ""


def _network(shapes: Shapes) -> tuple[dict[str, Any], int] | None:
    """Fields of a model, or of its ResNet alone, and the number of classes; None if the shapes are of neither."""
    if "cls.weight" in shapes or "head.cls.weight" in shapes and "head.cls_tower.0.weight" not in shapes:
        return None  # a localizer or region classifier, which `infer` does not know
    if not any(name.startswith("backbone.") for name in shapes):
        shapes = {f"backbone.body.{name}": shape for name, shape in shapes.items()}
    try:
        sections, classes = infer_shapes(shapes)
    except (ArithmeticError, IndexError, KeyError, StopIteration, ValueError):  # they are not of a model that is here
        return None
    return dict(_leaves(merged(ModelConfig().model_dump(), sections))), classes


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if value == "frozen_bn":  # tensors do not tell them apart
        return "frozen_bn or bn"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _blocks(shapes: Shapes) -> tuple[int, ...]:
    """Blocks of each stage of the body."""
    numbers: dict[str, int] = {}
    for name in shapes:
        if match := re.search(r"\b(layer\d)\.(\d+)\.conv1\.", name):
            numbers[match[1]] = max(numbers.get(match[1], 0), int(match[2]) + 1)
    return tuple(numbers[stage] for stage in sorted(numbers))
