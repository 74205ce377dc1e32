"""A clean copy of a data set's annotations, with images by reference, and a list of every change.

The copy has the layout of the original and links to its images, so it is used in its place. It is made of the files as
they are, so keys that detres does not know stay. It is checked and mended again until nothing is left to mend.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from detres.data.check.images import UNUSABLE
from detres.data.check.labels import check_labels
from detres.data.check.run import Report, SplitSummary, check_annotations, in_files
from detres.data.formats import recognise
from detres.data.kinds import KINDS
from detres.data.problems import Problem

ENTRIES = ("images", "annotations", "categories", "object", "row", "file")  # fields of changes to more than a value
PASSES = 8  # what is mended can show what was hidden: in practice two


@dataclass(frozen=True)
class Change:
    """One value or entry of a file. `new` is None for what was deleted."""

    file: str  # below the copy
    image: int | str | None
    annotation: int | str | None
    field: str
    old: Any
    new: Any
    why: str  # title of the kind of problem
    kind: str


class Changes:
    """Of a copy at `root`, in the order they were made."""

    def __init__(self, root: Path):
        self.root = root
        self.made: list[Change] = []

    def add(self, problem: Problem, field: str, old: Any, new: Any, file: Path | None = None, **of: Any) -> None:
        """`of`: image and annotation, where they are not the problem's."""
        file = Path(problem.file) if file is None else file
        name = file.relative_to(self.root).as_posix() if file.is_relative_to(self.root) else str(file)
        where = {"image": problem.image, "annotation": problem.annotation_id} | of
        self.made.append(Change(name, where["image"], where["annotation"], field, old, new,
                                KINDS[problem.kind].title, problem.kind))

    def write(self) -> None:
        from detres.data.check.report import plain

        rows = [replace(change, old=plain(change.old), new=plain(change.new)) for change in self.made]
        names = [field.name for field in fields(Change)]
        with open(self.root / "changes.json", "w", encoding="utf-8") as file:
            json.dump([dict(zip(names, astuple(row))) for row in rows], file, indent=1)
        with open(self.root / "changes.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(astuple(row) for row in rows)


def write_clean_copy(report: Report, images: str | Path | None, out: str | Path, *, read_images: bool = True,
                     workers: int | None = None) -> tuple[Report, Changes]:
    """Writes the copy of what `report` is about; returns the report on it and the changes.

    Problems of images are those of `report`: they are not decoded again. Raises ValueError for a data set that cannot
    be copied, or an `out` that is not empty or is the data set itself.
    """
    from detres.data.check import fix_coco, fix_voc, fix_yolo

    path, out = Path(os.path.abspath(Path(report.path).expanduser())), Path(out).expanduser().resolve()
    check_out(path.resolve(), out)
    fixes = {"coco": fix_coco, "lvis": fix_coco, "voc": fix_voc, "yolo": fix_yolo}[_format(report)]
    given = None if images is None else Path(images).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        target = fixes.copy(path, report.splits, given, out)
        return _mended(fixes, report, target, Changes(out), read_images, workers)
    except BaseException:  # half a copy looks like a whole one
        shutil.rmtree(out, ignore_errors=True)
        raise


def _mended(fixes: ModuleType, report: Report, target: Path, changes: Changes, read_images: bool, workers: int | None
            ) -> tuple[Report, Changes]:
    """The copy at `target`, checked and mended until nothing is left to mend."""
    for problem in report.problems:
        if problem.kind == "unreadable":
            changes.add(problem, "file", problem.value, None)
    # What the images showed is known of the original only.
    seen = [problem for problem in report.problems if problem.kind in UNUSABLE]
    for _ in range(PASSES):
        after, datasets, located = check_annotations(target, images_needed=read_images, workers=workers)
        made = len(changes.made)
        # These first and alone: with another size of the image, boxes are not outside of it.
        fixes.apply(_of_copy(seen, after.splits) if seen else after.problems, changes)
        if len(changes.made) == made and not seen:
            break
        seen = []
    changes.write()
    return replace(after, problems=after.problems + in_files(check_labels(datasets), located)), changes


def check_out(path: Path, out: Path) -> None:
    """Raises ValueError if a copy of the data set cannot be written there; both paths are resolved."""
    root = path if path.is_dir() else path.parent
    if out == root or path.is_dir() and out.is_relative_to(root):
        raise ValueError(f"the copy must be outside of the data set, got {out} (of {path}). Give another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"the copy must be a new or empty folder, got {out}. Give another, or delete it.")


def _format(report: Report) -> str:
    format = next((split.format for split in report.splits if split.format), None)
    if format is None:
        raise ValueError(f"a data set must be readable in part, got {report.path}. Correct what the check tells.")
    if not report.mendable:
        found = recognise(report.path)[0]
        raise ValueError("a clean copy must be of COCO, LVIS, VOC with ImageSets/Main/ or YOLO with data.yaml, got "
                         f"{found.name} as {found.layout} ({report.path}). Convert it to COCO first, without what is "
                         f"invalid: {without_invalid(report)}.")
    return format


def without_invalid(report: Report) -> str:
    """The command that is left where there is no `--fix`."""
    return f"detres data convert {report.source} OUT --to coco --drop-invalid"


def _of_copy(problems: Sequence[Problem], splits: Sequence[SplitSummary]) -> list[Problem]:
    """Problems of the original's images, in the files of the copy."""
    files = {split.name: split.file for split in splits}
    return [replace(problem, file=files[problem.split]) for problem in problems if problem.split in files]


def link(target: Path, source: Path) -> None:
    """A symbolic link; nothing if it is there already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        target.symlink_to(source.resolve())


def delete_lines(problem: Problem, file: Path, is_own: Callable[[str], bool], changes: Changes, keep: int = 0) -> None:
    """Of a text file, those that `is_own` says, but for the first `keep`."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    own = [i for i, line in enumerate(lines) if is_own(line)][keep:]
    for i in own:
        changes.add(problem, f"line {i + 1}", lines[i], None, file)
    if own:
        file.write_text("".join(f"{line}\n" for i, line in enumerate(lines) if i not in own), encoding="utf-8")


def by_file(problems: Sequence[Problem]) -> dict[Path, list[Problem]]:
    found: dict[Path, list[Problem]] = {}
    for problem in problems:
        found.setdefault(Path(problem.file), []).append(problem)
    return found


def summary(changes: Changes) -> list[str]:
    """Lines such as 'boxes without area: 12 deleted'."""
    counts: dict[str, Counter[str]] = {}
    for change in changes.made:
        whole = change.field in ENTRIES or change.field.startswith("line ")
        what = "corrected" if change.new is not None else "deleted" if whole else "values taken away"
        counts.setdefault(change.why, Counter())[what] += 1
    return [f"{why}: " + ", ".join(f"{count:,} {what}" for what, count in found.items())
            for why, found in counts.items()]
