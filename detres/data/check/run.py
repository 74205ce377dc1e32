"""The check of a data set: every split is read, and everything that is wrong with it is collected.

A broken file, category table, image or split hides nothing of the others.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detres.data.check.detections import check_against
from detres.data.check.geometry import check_geometry
from detres.data.check.images import check_images
from detres.data.check.labels import check_labels
from detres.data.coco import no_garbage_collection
from detres.data.dataset import SPLITS, Annotation, Dataset, read_all, without_images
from detres.data.formats import recognise
from detres.data.kinds import severity
from detres.data.problems import InvalidDataError, Locate, Problem, Problems, source_words
from detres.data.splits import Split, find_splits

ROLES = [*SPLITS]  # in the order in which splits are told
LARGE = 50e6  # bytes that take long enough to say so
LAYOUTS = frozenset({"boxes_xyxy", "boxes_xywh", "boxes_normalised", "boxes_in_pixels"})
FOLLOWING = frozenset({"box_mask_differs", "area_differs", "mask_empty", "box_under_pixel", "box_speck", "object_twice",
                       "object_two_classes", "class_fills_images", "class_exchanged"})  # where boxes are no such boxes
IMAGE_KINDS = frozenset({"image_missing", "images_nowhere"})  # not looked for with read_images=False


@dataclass(frozen=True)
class SplitSummary:
    name: str
    file: str  # or folder
    format: str  # "" if it could not be read
    images: int = 0
    annotations: int = 0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the check found; the problems of a split and kind are in the order of the file."""

    path: str
    splits: tuple[SplitSummary, ...]
    problems: list[Problem]
    mendable: bool = True  # by `--fix`, as far as the format goes
    images: str | None = None  # the folder of images that was given

    @property
    def source(self) -> str:
        """The data set as commands take it."""
        return source_words(self.path, self.images)

    @property
    def exit_status(self) -> int:
        """0: training would be safe; 1: it would not; 2: nothing could be read."""
        if not any(split.format for split in self.splits):
            return 2
        return int(self.counts()["error"] > 0)

    def counts(self) -> dict[str, int]:
        """Problems of each severity."""
        found = Counter(severity(problem.kind) for problem in self.problems)
        return {name: found[name] for name in ("error", "warning", "note")}


def check_data(path: str | Path, images: str | Path | None = None, *, read_images: bool = True,
               workers: int | None = None, detections: str | Path | None = None) -> Report:
    """Everything that is wrong with the data set at a path.

    `images` is the folder of images where it is not found by itself. With `read_images=False` only annotations are
    looked at: no image needs to be there. `workers` is the number of processes, by default one for each core.
    `detections` is a file of COCO results that labels are compared with; ValueError if it is of other data.
    """
    report, datasets, located = check_annotations(path, images, images_needed=read_images, workers=workers)
    labels = [*check_labels(datasets), *(check_against(detections, datasets) if detections else ())]
    mistaken = {problem.split for problem in report.problems if problem.kind in LAYOUTS}
    labels = [problem for problem in labels if problem.split not in mistaken or problem.kind not in FOLLOWING]
    found = [*(check_images(datasets, workers) if read_images else ()), *in_files(labels, located)]
    broken = {(problem.split, problem.image) for problem in report.problems if severity(problem.kind) == "error"}
    found = [problem for problem in found  # an image is not empty if it is that its objects cannot be read
             if problem.kind != "image_empty" or (problem.split, problem.image) not in broken]
    return replace(report, problems=report.problems + found)


def check_annotations(path: str | Path, images: str | Path | None = None, *, images_needed: bool = True,
                      workers: int | None = None
                      ) -> tuple[Report, list[tuple[str, Dataset]], dict[str, Locate]]:
    """The part of the check for which no image is read, nor one split compared with another; what could be read, by
    split, without images that have no file; and what says, by split, where its annotations are in the files."""
    problems: list[Problem] = []
    summaries, datasets, located = [], [], {}
    try:
        splits = find_splits(path, None if images is None else str(images))
        splits = sorted(splits, key=lambda split: ROLES.index(split.role))
    except (OSError, ValueError) as error:
        return Report(str(path), (), [unreadable(str(path), error)]), [], {}
    with no_garbage_collection():
        for split in splits:
            dataset, found, locate = _read(split, workers)
            summaries.append(_summary(split, dataset))
            mistaken = any(problem.kind in LAYOUTS for problem in found)
            found = found if images_needed else _without_files(found, dataset)
            problems += [replace(problem, split=split.name) for problem in found
                         if not (mistaken and problem.kind in FOLLOWING)]
            located |= {split.name: locate} if locate else {}
            if dataset is not None:
                missing = {problem.image for problem in found if problem.kind == "image_missing" and images_needed}
                nowhere = images_needed and any(problem.kind == "images_nowhere" for problem in found)
                datasets += [] if nowhere else [(split.name, without_images(dataset, missing))]
    report = Report(str(path), tuple(summaries), problems, recognise(path)[0].mendable, images and str(images))
    return report, datasets, located


def _without_files(problems: Sequence[Problem], dataset: Dataset | None) -> list[Problem]:
    """Without those of image files, but where the image could not be read for it."""
    told = any(problem.kind in IMAGE_KINDS for problem in problems)
    read = {None, *(dataset.records.ids() if dataset and told else ())}
    return [problem for problem in problems if problem.kind not in IMAGE_KINDS or problem.image not in read]


def in_files(problems: Iterable[Problem], located: Mapping[str, Locate]) -> list[Problem]:
    """Those of annotations with the file, number and place that these are at, instead of the image and the id in
    memory."""
    return [problem if problem.annotation_id is None else _in_file(problem, located.get(problem.split))
            for problem in problems]


def _in_file(problem: Problem, locate: Locate | None) -> Problem:
    if locate is None:
        return replace(problem, annotation_id=None)
    file, number, place = locate(Annotation(problem.annotation_id, 0, (0.0, 0.0, 0.0, 0.0)))  # only the id counts
    return replace(problem, file=file, annotation_id=number, place=place)


def _read(split: Split, workers: int | None) -> tuple[Dataset | None, list[Problem], Locate | None]:
    problems, file = Problems(split.name), Path(split.source.path).expanduser()
    if file.is_file() and file.stat().st_size > LARGE:
        print(f"Reading {file.name}, {file.stat().st_size / 1e6:.0f} MB", file=sys.stderr, flush=True)
    try:
        dataset = read_all(split.source, split.role, problems)
        check_geometry(problems, workers)
        told = any(severity(problem.kind) == "error" for problem in problems.found)  # that would be why
        if not told and not dataset.records.counts().any():
            problems.add(split.source.path, None, None, "annotations", 0, "must be one or more", "no_annotations")
        return dataset, problems.found, next((locate for _, locate in problems.located), None)
    except InvalidDataError as error:
        return None, [*problems.found, *error.problems], None
    except (OSError, ValueError) as error:
        return None, [*problems.found, unreadable(split.source.path, error)], None


def unreadable(file: str, error: Exception) -> Problem:
    return Problem(file, None, None, "file", str(error), "must be readable", "unreadable")


def _summary(split: Split, dataset: Dataset | None) -> SplitSummary:
    if dataset is None:
        return SplitSummary(split.name, split.source.path, "")
    return SplitSummary(split.name, split.source.path, dataset.format, len(dataset.records),
                        int(dataset.records.counts().sum()), dataset.classes)
