"""`detres data convert`, `split`, `merge` and `subset`: data sets read, changed, and written in a format."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from detres.data.convert.classes import ClassChange, changed, unified
from detres.data.convert.lost import Losses
from detres.data.convert.parts import ImageMode, Images, Part, load_parts
from detres.data.convert.sets import merged
from detres.data.convert.to_coco import write_coco, write_lvis
from detres.data.convert.to_png import write_panoptic, write_semantic
from detres.data.convert.to_voc import write_voc
from detres.data.convert.to_yolo import write_yolo
from detres.data.problems import OnInvalid

Writer = Callable[[Sequence[Part], Path, Images, Losses, str], list[int]]  # objects written, of each part

# Each with what `masks` may be, the first by default: "keep" as they are.
TARGETS: dict[str, tuple[Writer, tuple[str, ...]]] = {
    "coco": (write_coco, ("keep", "polygon", "rle", "none")),
    "lvis": (write_lvis, ("keep", "polygon", "rle", "none")),
    "voc": (write_voc, ("none", "png")),
    "yolo": (write_yolo, ("polygon", "none")),
    "panoptic": (write_panoptic, ("png",)),
}
REPORT = "conversion.json"


@dataclass(frozen=True)
class Options:
    """`to` and `masks` are of TARGETS, None by default: the format of the data where it can be written, else COCO."""

    to: str | None = None
    masks: str | None = None
    images: ImageMode = "reference"
    classes: ClassChange = field(default_factory=ClassChange)
    strict: bool = False  # refuse to lose anything
    on_invalid: OnInvalid = "error"


@dataclass(frozen=True)
class Result:
    parts: list[Part]
    written: list[int]  # objects of each part
    losses: Losses
    to: str
    out: Path

    def __str__(self) -> str:
        classes = len(self.parts[0].dataset.classes)
        lines = [f"{self.out}: {self.to}, {classes} class{'es'[:2 * (classes != 1)]}"]
        width = max(len(part.name) for part in self.parts)
        lines += [f"  {part.name:{width}}  {count:,} objects in {len(part.dataset.records):,} images"
                  for part, count in zip(self.parts, self.written)]
        return "\n".join([*lines, *self.losses.lines()])


def convert(paths: Sequence[str | Path], out: str | Path, options: Options = Options(), *, images: str | None = None,
            semantic: str | None = None, change: Callable[[list[Part], Losses], list[Part]] | None = None
            ) -> Result:
    """Reads data sets, merges them if they are several, applies the change of classes and `change`, and writes the
    result to `out`, which appears at once when it is complete.

    Raises:
        FileNotFoundError, InvalidDataError: as `load_dataset`.
        ValueError: `out` holds something; options that do not go together; with `strict`, what would be lost.
    """
    out, losses = Path(out).expanduser(), Losses()
    _check_out(out)
    data_sets = [load_parts(path, losses, images, semantic, options.on_invalid) for path in paths]
    parts = merged(data_sets, losses) if len(data_sets) > 1 else unified(data_sets[0])
    to = options.to or _format_of(parts)
    writer, allowed = TARGETS[to]
    if options.masks and options.masks not in allowed:
        raise ValueError(f"--masks must be {' or '.join(allowed)} for {to}, got {options.masks}. Change it, or leave "
                         "it out.")
    masks = options.masks or allowed[0]
    parts = changed(parts, options.classes)
    parts = change(parts, losses) if change else parts
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"splits must differ in name, got {[part.name for part in parts]}. Rename their files.")
    written = _write(parts, out, writer, to, masks, options, losses, [str(path) for path in paths])
    return Result(parts, written, losses, to, out)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be a new or empty folder, got {out}. Give another, or delete this one.")


def _format_of(parts: Sequence[Part]) -> str:
    found = parts[0].dataset.format
    return found if found in TARGETS else "coco"


def _write(parts: Sequence[Part], out: Path, writer: Writer, to: str, masks: str, options: Options, losses: Losses,
           sources: Sequence[str]) -> list[int]:
    """Into a folder beside `out`, which then takes its name. Returns what the writer does."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        images = Images(folder, options.images)
        shown = [_without_masks(part) for part in parts] if masks == "none" and to in ("coco", "lvis") else parts
        written = writer(shown, folder, images, losses, masks)
        if any(part.semantic for part in parts) and to not in ("voc", "panoptic"):
            write_semantic(parts, folder, images)
        losses.change("{} images have a number after their name, as others are called so", images.renamed)
        if options.strict:
            losses.refuse()
        _report(parts, written, folder, to, losses, sources)
        folder.chmod(0o777 & ~_umask())
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
        return written
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _without_masks(part: Part) -> Part:
    return part.with_records(replace(record, annotations=tuple(
        replace(item, segmentation=None) for item in record.annotations)) for record in part.dataset.records)


def _report(parts: Sequence[Part], written: Sequence[int], out: Path, to: str, losses: Losses,
            sources: Sequence[str]) -> None:
    content = {"sources": list(sources), "to": to, "classes": list(parts[0].dataset.classes),
               "splits": {part.name: {"images": len(part.dataset.records), "objects": count}
                          for part, count in zip(parts, written)}, **losses.as_json()}
    (out / REPORT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
