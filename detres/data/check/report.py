"""What the check found, for people and for machines."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from detres.data.check.fix import Changes, summary, without_invalid
from detres.data.check.run import Report
from detres.data.kinds import KINDS, severity
from detres.data.problems import Problem, shortened

EXAMPLES = 3  # of a kind, unless all are asked for
SEVERITIES = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "dim")}
ONLY_BY_HAND = frozenset({"images_nowhere", "unreadable", "class_unknown"})  # a clean copy has them, too
VERDICTS = ("ok", "errors", "unreadable")  # by exit status
ORDER = {kind: (list(SEVERITIES).index(about.severity), place) for place, (kind, about) in enumerate(KINDS.items())}


def grouped(problems: Sequence[Problem]) -> Iterator[tuple[str, list[Problem]]]:
    """By kind, worst first."""
    ordered = sorted(problems, key=lambda problem: ORDER[problem.kind])
    for kind, group in groupby(ordered, lambda problem: problem.kind):
        yield kind, list(group)


def print_report(report: Report, every: bool = False, file: TextIO | None = None, fix: bool = False) -> None:
    """As text, `every` problem in full or some of each kind in short. `fix`: the last line needs not speak of --fix."""
    console = Console(file=file or sys.stdout, highlight=False)
    if report.splits:
        console.print(_splits(report))
        console.print()
    if not report.splits:  # nothing was found at the path
        for problem in report.problems:
            _print(console, f"✗ {problem.value}", 0, "red", hang=2)
        return
    for kind, problems in grouped(report.problems):
        _print_kind(console, kind, problems, report, every)
        console.print()
    _print(console, _verdict(report, fix), 0, ("green", "red", "red")[report.exit_status], hang=2)


def _print(console: Console, text: str, indent: int, style: str = "", hang: int = 0) -> None:
    for line in textwrap.wrap(text, console.width, initial_indent=" " * indent, subsequent_indent=" " * (indent + hang),
                              break_long_words=True):
        console.print(Text(line, style))


def _splits(report: Report) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 2), pad_edge=False, header_style="bold")
    for name in ("split", "format"):
        table.add_column(name, overflow="fold")
    for name in ("images", "annotations", "classes"):
        table.add_column(name, justify="right")
    for split in report.splits:
        counts = [split.images, split.annotations, len(split.classes)]
        table.add_row(Text(split.name), split.format or Text("unreadable", "red"),
                      *(f"{count:,}" if split.format else "-" for count in counts))
    return table


def _print_kind(console: Console, kind: str, problems: Sequence[Problem], report: Report, every: bool) -> None:
    about = KINDS[kind]
    mark, style = SEVERITIES[about.severity]
    count = f"{len(problems):,} {about.severity}{'s'[:len(problems) > 1]}"
    _print(console, f"{mark} {about.title}: {count}{_shares(problems, report)}", 0, f"bold {style}")
    _print(console, " ".join(f"{text[0].upper()}{text[1:]}." for text in (about.effect, about.fix) if text), 2)
    for problem in problems[:None if every else EXAMPLES]:
        _print(console, _told(problem, report, every), 4, "dim", hang=2)
    if not every and len(problems) > EXAMPLES:
        _print(console, f"and {len(problems) - EXAMPLES:,} more", 4, "dim")


def _shares(problems: Sequence[Problem], report: Report) -> str:
    """How many each split has, where several have some."""
    counts = Counter(problem.split for problem in problems)
    shares = ", ".join(f"{counts[split.name]:,} in {split.name}" for split in report.splits if counts[split.name])
    return f" ({shares})" if len(counts) > 1 else ""


def _told(problem: Problem, report: Report, in_full: bool) -> str:
    value = _value(problem.value, 200 if in_full else 60)
    if problem.kind == "unreadable":
        told = Path(problem.file).name in str(problem.value)
        return f"{'' if told else f'{problem.file}: '}{problem.value}"
    if in_full:
        return f"{_where(problem, report)}: {problem.field} {problem.reason}; got {value}"
    better = f", better {shortened(problem.better)}" if problem.better is not None else ""
    return f"{_where(problem, report)}: {problem.field} {'missing' if problem.value is None else value}{better}"


def _value(value: Any, limit: int) -> str:
    """Plain words without quotation marks, which show where others begin and end."""
    plain = isinstance(value, str) and value.isprintable() and "" != value == value.strip() and len(value) <= limit
    return value if plain else shortened(value, limit)


def _where(problem: Problem, report: Report) -> str:
    """A split of one file goes by its own name."""
    files = {split.file: split.name for split in report.splits}
    name = files.get(problem.file, Path(problem.file).name)
    where = [name] if len(report.splits) > 1 or problem.file not in files else []
    where += [f"image {problem.image!r}"] if problem.image is not None else []
    where += [f"annotation {problem.annotation_id!r}"] if problem.annotation_id is not None else []
    where += [problem.place] if problem.place and problem.annotation_id is None else []
    return ", ".join(where) or name


def print_fix(after: Report, changes: Changes) -> None:
    """What was changed in a copy, and what the check says of it."""
    console = Console(file=sys.stdout, highlight=False)
    console.print()
    count = len(changes.made)
    _print(console, f"{count:,} change{'s'[:count != 1]} in {changes.root}, listed in changes.json and changes.csv", 0,
           "bold")
    for line in summary(changes):
        _print(console, line, 2, hang=2)
    if after.problems:
        _print(console, "left:", 2)
    for kind, problems in grouped(after.problems):
        _print(console, f"{KINDS[kind].title}: {len(problems):,} {KINDS[kind].severity}{'s'[:len(problems) > 1]}", 4,
               hang=2)
    status = after.exit_status
    emptied = [split.name for split in after.splits if split.format and not split.annotations]
    emptied += [Path(change.file).name for change in changes.made if change.kind == "unreadable"]
    verdict = "✗ the copy has errors that only you can mend" if status else (
        f"! the copy has no errors, but no objects are left in {', '.join(emptied)}: look at the changes" if emptied
        else "✓ the copy is safe to train on")
    _print(console, verdict, 0, "red" if status else "yellow" if emptied else "green")


def _verdict(report: Report, fix: bool) -> str:
    counts = report.counts()
    told = " and ".join(f"{count:,} {name}{'s'[:count > 1]}" for name, count in counts.items()
                        if count and name != "note")
    return (f"✓ {told or 'No problems'}: training is safe.",
            f"✗ {told}: training refuses this data set.{'' if fix else _advice(report)}",
            "✗ Nothing could be read.")[report.exit_status]


def _advice(report: Report) -> str:
    """The command that leaves out or mends the errors, if there is one."""
    kinds = {problem.kind for problem in report.problems if severity(problem.kind) == "error"}
    if kinds <= ONLY_BY_HAND:
        return ""
    if not report.mendable:
        return f" `{without_invalid(report)}` writes it without what is invalid."
    return f" `detres data check {report.source} --fix OUT` writes a clean copy."


# For machines


def to_json(report: Report) -> dict[str, Any]:
    """All of it; docs/data.md has the schema."""
    kinds = {kind: KINDS[kind]._asdict() | {"count": len(problems)} for kind, problems in grouped(report.problems)}
    problems = [{"split": problem.split, "kind": problem.kind, "severity": KINDS[problem.kind].severity,
                 "file": problem.file, "image": problem.image, "annotation": problem.annotation_id,
                 "place": problem.place, "field": problem.field, "value": plain(problem.value),
                 "reason": problem.reason, "better": plain(problem.better)}
                for _, group in grouped(report.problems) for problem in group]
    return {"version": 1, "path": report.path, "verdict": VERDICTS[report.exit_status],
            "exit_status": report.exit_status, "counts": report.counts(),
            "splits": [asdict(split) for split in report.splits], "kinds": kinds, "problems": problems}


def print_json(content: Any, file: TextIO | None = None) -> None:
    json.dump(content, file or sys.stdout, indent=1, allow_nan=False)
    print(file=file or sys.stdout)


def plain(value: Any) -> Any:
    """As strict JSON holds it: NaN and infinity as texts, and what is nested too deep or too long shortened."""
    try:
        return _plain(value)
    except RecursionError:
        return shortened(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (array, list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and value.bit_length() > 64:
        return shortened(value)
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
