"""What is wrong with weights that do not fit a model, as a table with the likely reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHOWN = 12  # rows of the table

Shapes = Mapping[str, tuple[int, ...]]

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
    raise WeightsMismatch(f"{title}, got {len(rows)} tensors that differ", missing, unexpected, wrong,
                          f"{_table(rows)}\n{reason}")


def _table(rows: Sequence[Row]) -> str:
    """The first rows of each kind, one for each layer."""
    kinds = dict.fromkeys(row.what for row in rows)
    lines = [("tensor", "", "in the weights", "in the model")]
    for kind in kinds:
        of_kind = [row for row in rows if row.what == kind]
        shown = of_kind[:max(1, SHOWN // len(kinds))]
        lines += [(row.layer, row.what, row.given, row.wanted) for row in shown]
        if len(of_kind) > len(shown):
            lines.append((f"and {len(of_kind) - len(shown)} more", kind, "", ""))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _reason(given: Shapes, wanted: Shapes, missing: Sequence[str], unexpected: Sequence[str],
            wrong: Sequence[str]) -> str:
    differing = [*missing, *unexpected, *wrong]
    if all(OF_CLASSES.match(name) for name in differing):
        return ("Likely: other classes. Say that heads begin anew for them: train with weights=..., where classes of both "
                "lists keep their rows, or give --classes to import.")
    if _blocks(given) != _blocks(wanted):
        return f"Likely: another depth, with stages of {_blocks(given)} blocks instead of {_blocks(wanted)}. Set " \
               "model.backbone.depth to that of the weights."
    parts = [{_part(name) for name in shapes} for shapes in (given, wanted)]
    if parts[0] != parts[1]:
        return (f"Likely: another family of models. The weights have {_list(parts[0] - parts[1])}, the model has "
                f"{_list(parts[1] - parts[0])} instead. Set model.name, or take the model that the weights carry.")
    if all("running_" in name or "norm" in name or ".bn" in name or name.endswith(".bias") for name in differing):
        return "Likely: another kind of norm. Set model.backbone.norm (and those of the heads) to that of the weights."
    if not missing and not unexpected:
        return "Likely: layers of another width, or in groups. Set model.backbone.width, groups and group_width, or the " \
               "channels of the heads."
    return ""


def _blocks(shapes: Shapes) -> tuple[int, ...]:
    """Blocks of each stage of the body."""
    numbers: dict[str, int] = {}
    for name in shapes:
        if match := re.search(r"\b(layer\d)\.(\d+)\.conv1\.", name):
            numbers[match[1]] = max(numbers.get(match[1], 0), int(match[2]) + 1)
    return tuple(numbers[stage] for stage in sorted(numbers))


def _part(name: str) -> str:
    """backbone.body, rpn.head, roi_heads.mask_head ..."""
    return ".".join(name.split(".")[:2]) if name.startswith(("backbone.", "roi_heads.")) else name.split(".")[0]


def _list(parts: set[str]) -> str:
    return ", ".join(sorted(parts)) or "nothing"
