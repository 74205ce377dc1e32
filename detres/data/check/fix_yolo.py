"""Mends YOLO's text files and lists of images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from detres.data import yolo
from detres.data.check.fix import Changes, by_file, delete_lines, link
from detres.data.check.run import SplitSummary
from detres.data.dataset import SPLITS
from detres.data.images import ImageError, read_size
from detres.data.kinds import severity
from detres.data.problems import Problem

ENTRIES = tuple(name for names in SPLITS.values() for name in names)


def copy(path: Path, splits: Sequence[SplitSummary], images: Path | None, out: Path) -> Path:
    """Text files, and a link to each image, at the same places below the folder that has all of them; the YAML file
    with a list of images for each split. Returns what stands for `path`."""
    file = path if path.is_file() else yolo.find_yaml(path)
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    root = yolo.root_of(content, file)
    root = Path(os.path.abspath(root))
    listed = {name: list(dict.fromkeys(Path(os.path.abspath(image)) for entry in yolo.as_list(content[name])
                                       for image in yolo.images_of(entry, root, file)))
              for name in ENTRIES if content.get(name)}
    everything = [image for own in listed.values() for image in own]
    base = Path(os.path.commonpath([root, *(image.parent for image in everything)]))
    for image in everything:
        link(out / image.relative_to(base), image)
        labels = yolo.labels_of(image)
        if labels.is_file():
            target = yolo.labels_of(out / image.relative_to(base))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(labels, target)
    for name, own in listed.items():
        (out / f"{name}.txt").write_text("".join(f"./{image.relative_to(base).as_posix()}\n" for image in own),
                                         encoding="utf-8")
    content = content | {"path": ".", **{name: f"{name}.txt" for name in listed}}
    target = out / file.name
    target.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return out if path.is_dir() else target


def apply(problems: Sequence[Problem], changes: Changes) -> None:
    """Mends the files in place; adds to `changes` what was done."""
    for file, found in by_file(problems).items():
        rows = [problem for problem in found if problem.annotation_id is not None]
        if rows and file.suffix == ".txt" and file.is_file():
            _mend_rows(file, rows, changes)
    for problem in problems:
        if problem.kind in LAYOUTS:
            _convert(problem, changes)
        elif problem.annotation_id is None and problem.image is not None and severity(problem.kind) == "error":
            _take_out(problem, changes)


def _take_out(problem: Problem, changes: Changes) -> None:
    """The image, of all lists."""
    for name in ENTRIES:
        if (file := changes.root / f"{name}.txt").is_file():
            delete_lines(problem, file, lambda line: line == f"./{problem.image}", changes)


def _mend_rows(file: Path, problems: Sequence[Problem], changes: Changes) -> None:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    dropped = set()
    for problem in problems:
        i = problem.annotation_id - 1
        mend = MENDS.get(problem.kind)
        if i in dropped or mend is None and severity(problem.kind) != "error":
            continue
        new = mend(lines[i]) if mend else None
        if new != lines[i]:
            changes.add(problem, "row", lines[i], new)
        if new is None:
            dropped.add(i)
        else:
            lines[i] = new
    file.write_text("".join(f"{line}\n" for i, line in enumerate(lines) if i not in dropped), encoding="utf-8")


def _row(label: str, values: Sequence[float]) -> str:
    return " ".join([label, *(f"{value:.9g}" for value in values)])


def _clip(line: str) -> str | None:
    """A box to the image; a polygon's points likewise."""
    label, *values = line.split()
    values = [float(value) for value in values]
    if len(values) != 4:
        return _row(label, [min(max(value, 0.0), 1.0) for value in values])
    x, y, w, h = values
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return _row(label, [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def _turn(line: str) -> str | None:
    label, x, y, w, h = line.split()
    return _row(label, [float(x), float(y), abs(float(w)), abs(float(h))]) if float(w) and float(h) else None


MENDS: dict[str, Callable[[str], str | None]] = {"box_past_edge": _clip, "box_negative": _turn}


# What concerns all rows


def _convert(problem: Problem, changes: Changes) -> None:
    for image in dict.fromkeys(_all_images(changes.root)):
        file = yolo.labels_of(image)
        if not file.is_file():
            continue
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        new = [_converted(line, image, problem.kind) for line in lines]
        for i, (old, row) in enumerate(zip(lines, new), 1):
            if row != old:
                changes.add(problem, "row", old, row, file, annotation=i,
                            image=image.relative_to(changes.root).as_posix())
        file.write_text("".join(f"{row}\n" for row in new), encoding="utf-8")


def _all_images(root: Path) -> list[Path]:
    lists = [root / f"{name}.txt" for name in ENTRIES if (root / f"{name}.txt").is_file()]
    return [root / line for file in lists for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]


def _converted(line: str, image: Path, kind: str) -> str:
    try:
        label, *values = line.split()
        return _row(label, LAYOUTS[kind]([float(value) for value in values], image))
    except (ValueError, ImageError):
        return line


def _from_corners(values: list[float], image: Path) -> list[float]:
    if len(values) != 4:
        return values
    x1, y1, x2, y2 = values
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def _from_pixels(values: list[float], image: Path) -> list[float]:
    height, width = read_size(image)
    return [value / (width, height)[i % 2] for i, value in enumerate(values)]


LAYOUTS = {"boxes_xyxy": _from_corners, "boxes_in_pixels": _from_pixels}
