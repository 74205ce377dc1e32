"""Pictures and JSON for many image files."""

from __future__ import annotations

import glob
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from detres.data.images import IMAGE_SUFFIXES, ImageError, read_image
from detres.inference.classify import Classification, ClassPredictor
from detres.inference.predictor import Prediction, Predictor, load_predictor
from detres.inference.segment import SemanticPrediction, SemanticPredictor
from detres.progress import track


class UnreadableImages(ValueError):
    """Some images could not be read; the others were predicted. `paths` names them."""

    def __init__(self, problems: dict[Path, str], out: Path):
        self.paths = tuple(problems)
        lines = "\n".join(f"  {problem}" for problem in problems.values())
        super().__init__(f"{len(problems)} image(s) could not be read; all others were predicted (see {out}):\n{lines}")


def predict_files(weights: str | Path | Sequence[str | Path], inputs: Sequence[str | Path], out: str | Path, *,
                  score_thresh: float | None = None, device: str = "auto", batch_size: int = 8,
                  overrides: Sequence[str] = ()) -> Path:
    """Predict on files, folders (searched through) and globs. Writes a picture of each image and `predictions.json`.

    Several weights are an ensemble; `overrides` change the config that they carry (`predictor.load_model`).

    The JSON is a list with, for each image, "file", "picture", "height", "width" and "detections", each of which has
    "name", "category_id", "score", "box" (xyxy in pixels) and, from a model with masks, "segmentation" (COCO's RLE),
    from a model with keypoints, "keypoints" (x, y, score one after another, in the order of the image's
    "keypoint_names"); from a classifier with "classes" instead, the five likeliest, each of which has "name" and
    "probability"; from a model of semantic segmentation with "labels", a PNG of the class of each pixel, and "classes",
    each of which has "name", "label" and "share" of the pixels; from a panoptic model besides with "panoptic", a PNG of
    segment ids, R + 256 G + 65536 B, and "segments". `score_thresh` (None: 0.5) is of detections.

    Returns the path of the JSON. Raises FileNotFoundError for an input that matches no image, and, after all others
    are done, UnreadableImages.
    """
    out = Path(out)
    files = find_images(inputs, skip=out)
    pictures = picture_names(files)
    _spare_inputs(pictures, out)
    predictor = load_predictor(weights, device, overrides)
    options = _options(predictor, score_thresh)
    out.mkdir(parents=True, exist_ok=True)
    problems: dict[Path, str] = {}
    entries = []
    parts = [files[i:i + batch_size] for i in range(0, len(files), batch_size)]
    for part in track(parts, len(files), "predict", len):
        images = dict(_readable(part, problems))
        found = predictor.predict(list(images.values()), batch_size=batch_size, paths=[str(file) for file in images],
                                  **options)
        for file, prediction in zip(images, found):
            _save_picture(prediction.draw(), out / pictures[file])
            entries.append(_entry(prediction, file, pictures[file], out))
    path = out / "predictions.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")  # an image a line
    print(f"{len(entries)} pictures and predictions.json in {out}", file=sys.stderr)
    if problems:
        raise UnreadableImages(problems, out)
    return path


def find_images(inputs: Sequence[str | Path], skip: Path | None = None) -> list[Path]:
    """Every image once, in the order of the inputs, sorted within folders and globs.

    Folders are searched through, but for the folder `skip`: a second run does not predict on the pictures of the first.
    """
    found: dict[Path, None] = {}
    for text in map(str, inputs):
        path = Path(text)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
                             and skip not in p.parents)
        else:
            matches = sorted(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())
        if not matches:
            raise FileNotFoundError(f"inputs must be image files, folders with images or globs, got {text}, which "
                                    f"matches none. Check the path; in folders, {', '.join(sorted(IMAGE_SUFFIXES))} "
                                    "count as images.")
        found.update(dict.fromkeys(matches))
    return list(found)


def picture_names(files: Sequence[Path]) -> dict[Path, str]:
    """Names for the pictures: the stem of each file, with a number where several files share it.

    PNG where the file is one, else JPEG.
    """
    taken = {file.stem for file in files}
    free = {stem: _numbered(stem, taken) for stem in taken}
    return {file: next(free[file.stem]) + (".png" if file.suffix.lower() == ".png" else ".jpg") for file in files}


def _numbered(stem: str, taken: set[str]) -> Iterator[str]:
    yield stem
    yield from (name for number in itertools.count(2) if (name := f"{stem}_{number}") not in taken)


def _spare_inputs(pictures: dict[Path, str], out: Path) -> None:
    for file, name in pictures.items():
        if (out / name).resolve() == file.resolve():
            raise ValueError(f"pictures must not replace the images that they are made of, got {file} as both. "
                             "Choose another output folder.")


def _readable(files: Sequence[Path], problems: dict[Path, str]) -> Iterator[tuple[Path, object]]:
    for file in files:
        try:
            yield file, read_image(file)
        except ImageError as error:
            problems[file] = str(error)


def _save_picture(picture: Image.Image, path: Path) -> None:
    picture.save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))


def _options(predictor: Predictor | ClassPredictor | SemanticPredictor, score_thresh: float | None) -> dict[str, float]:
    if not isinstance(predictor, Predictor) and score_thresh is not None:
        raise ValueError("score_thresh must be left out for a model without detections, a classifier or one of "
                         f"semantic segmentation, got {score_thresh}.")
    return {} if score_thresh is None else {"score_thresh": score_thresh}


def _entry(prediction: Prediction | Classification | SemanticPrediction, file: Path, picture: str, out: Path) -> dict:
    height, width = prediction.image.shape[:2]
    if isinstance(prediction, Classification):
        found = _classes(prediction)
    elif isinstance(prediction, SemanticPrediction):
        found = _semantic(prediction, picture, out)
    else:
        found = _detections(prediction, file) | _panoptic(prediction, picture, out)
    return {"file": str(file), "picture": picture, "height": height, "width": width, **found}


def _classes(prediction: Classification) -> dict:
    rows = zip(prediction.names, prediction.probabilities.tolist())
    return {"classes": [{"name": name, "probability": value} for name, value in rows]}


def _detections(prediction: Prediction, file: Path) -> dict:
    detections = []
    for name, box, coco in zip(prediction.names, prediction.boxes.tolist(), prediction.to_coco(str(file))):
        kept = {key: coco[key] for key in ("category_id", "score", "segmentation", "keypoints") if key in coco}
        detections.append({"name": name, "box": box, **kept})
    names = {} if prediction.keypoints is None else {"keypoint_names": list(prediction.keypoint_names)}
    return {**names, "detections": detections}


def _semantic(prediction: SemanticPrediction, picture: str, out: Path) -> dict:
    classes = [{"name": name, "label": prediction.classes.index(name), "share": share}
               for name, share in prediction.shares().items()]
    return {"labels": _save_png(prediction.label_image(), "labels", picture, out), "classes": classes}


def _panoptic(prediction: Prediction, picture: str, out: Path) -> dict:
    if prediction.panoptic is None:
        return {}
    segments = [{key: value for key, value in segment.items() if key != "label"} for segment in prediction.segments]
    return {"panoptic": _save_png(segment_image(prediction.panoptic), "panoptic", picture, out), "segments": segments}


def segment_image(panoptic: Tensor) -> Image.Image:
    """A map (H, W) of segment ids as COCO's panoptic format has it."""
    ids = panoptic.numpy()
    return Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8))


def _save_png(image: Image.Image, kind: str, picture: str, out: Path) -> str:
    """In a folder of its own, called as the picture; returns the path within `out`."""
    path = out / kind / f"{Path(picture).stem}.png"
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return path.relative_to(out).as_posix()
