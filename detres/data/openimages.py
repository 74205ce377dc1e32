"""OpenImages: a CSV file of boxes in fractions of the image; groups are crowds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from detres.data import coco
from detres.data.dataset import Dataset
from detres.data.loose import Builder, ImageFinder, Item
from detres.data.problems import OnInvalid

COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")


def find(path: Path) -> list[Path]:
    """The file given, or those of a folder, that have the columns."""
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path] * (path.suffix == ".csv")
    return [file for file in files if _has_columns(file)]


def _has_columns(file: Path) -> bool:
    with open(file, encoding="utf-8", errors="replace") as stream:
        return set(COLUMNS) <= set(stream.readline().strip().split(","))


def splits(files: Sequence[Path]) -> list[str]:
    return [file.stem for file in files] if len(files) > 1 else []


def read_openimages(files: Sequence[Path], role: str, split: str | None = None, images: str | None = None,
                    on_invalid: OnInvalid = "error") -> Dataset:
    """Images that have boxes, from beside the file or below, or from `images`. Classes are those of all files, sorted,
    by the names in class-descriptions*.csv beside them where that is. Raises as `load_dataset`."""
    kept = files if len(files) == 1 else [file for file in files if coco.names_split(file, role, split)]
    if not kept:
        raise FileNotFoundError(f"OpenImages must have a CSV file for '{split or role}', got "
                                f"{[file.name for file in files]}. Give the file itself as path.")
    folder = files[0].parent
    builder = Builder(kept[0].stem, "openimages", ImageFinder(Path(images).expanduser() if images else folder))
    names = {row[0]: row[1] for file in sorted(folder.glob("class-descriptions*.csv")) for row in _rows(file) if
             len(row) == 2}
    found = {file: list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) for file in files}
    classes = sorted({names.get(row["LabelName"], row["LabelName"]) for rows in found.values() for row in rows})
    for file in kept:
        rows: dict[str, int | None] = {}
        for number, row in enumerate(found[file], 2):
            if row["ImageID"] not in rows:
                rows[row["ImageID"]] = builder.image(file, row["ImageID"])
            if (image := rows[row["ImageID"]]) is not None:
                _add(builder, image, file, number, row, names.get(row["LabelName"], row["LabelName"]))
    return builder.dataset(classes, on_invalid)


def _rows(file: Path) -> list[list[str]]:
    return list(csv.reader(file.read_text(encoding="utf-8").splitlines()))


def _add(builder: Builder, image: int, file: Path, line: int, row: dict[str, str], name: str) -> None:
    record = builder.records[image]
    try:
        x1, x2, y1, y2 = (float(row[key].replace(",", ".")) for key in COLUMNS[2:])  # some tools write 0,5
    except (ValueError, AttributeError):
        builder.problems.add(file, record.id, line, "XMin", [row[key] for key in COLUMNS[2:]],
                             "must be numbers, as XMax, YMin and YMax (correct them)", "bad_box")
        return
    box = [x1 * record.width, y1 * record.height, x2 * record.width, y2 * record.height]
    builder.items.append(Item(image, file, line, name, box, crowd=row.get("IsGroupOf") == "1"))
