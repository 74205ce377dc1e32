"""Ground truth and results files in COCO's and LVIS' format, read into columns.

Numbers are json.load's to the last bit. Only the fields that are evaluated become Python objects, and of a results
file only some hundred entries at a time: half a million boxes take some 70 MB at the peak.

Legend: G annotations, D detections, J keypoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from detres.evaluation.coco_columns import Categories, Id, Images, ResultsFile, Segmentation, TruthFile, joined
from detres.evaluation.mask_overlaps import decode_runs, rle_areas

PIECE = 1 << 17  # bytes of a results file decoded at a time: what fits the processor's cache is quickest

Box = tuple[float, float, float, float]  # x, y, width, height
Flag = int | float | bool  # 1, 1.0, true

class _Image(msgspec.Struct, gc=False):
    id: Id
    height: int | float = 0
    width: int | float = 0
    neg_category_ids: list[Id] | None = None
    not_exhaustive_category_ids: list[Id] | None = None


class _Category(msgspec.Struct, gc=False):
    id: Id
    name: str | None = None
    frequency: str | None = None


class _Annotation(msgspec.Struct, gc=False, kw_only=True):
    id: Id
    image_id: Id
    category_id: Id
    bbox: Box | None = None
    area: float | None = None
    iscrowd: Flag = 0
    ignore: Flag = 0
    num_keypoints: int | float | None = None


class _FullAnnotation(_Annotation, gc=False, kw_only=True):
    segmentation: Segmentation | None = None
    keypoints: list[float] | None = None


class _Detection(msgspec.Struct, gc=False, kw_only=True):
    image_id: Id
    category_id: Id
    score: float
    bbox: Box | None = None
    segmentation: Segmentation | None = None
    keypoints: list[float] | None = None


Row = TypeVar("Row")


class _Truth(msgspec.Struct, Generic[Row]):
    images: list[_Image]
    annotations: list[Row]
    categories: list[_Category]


def read_truth(path: str | Path, masks: bool = False, keypoints: bool = False) -> TruthFile:
    """Read an annotation file, with its segmentations and keypoints only where asked for.

    Raises ValueError naming the entry, the field and the value for what is not such a file, OSError if unreadable.
    """
    path = Path(path)
    return _truth_columns(str(path), _whole(path, _truth_kind(masks, keypoints)), masks, keypoints)


def truth_columns(data: dict[str, Any], masks: bool = False, keypoints: bool = False) -> TruthFile:
    """`read_truth` of what json.load gives."""
    source = "the ground truth"
    return _truth_columns(source, _converted(source, data, _truth_kind(masks, keypoints)), masks, keypoints)


def read_results(path: str | Path, masks: bool = False, keypoints: bool = False) -> ResultsFile:
    """Read a results file, a list of detections; see `read_truth`."""
    path, parts, boxes_from = Path(path), [], None
    try:
        for piece in _pieces(path):
            rows = _decode(piece, list[_Detection])
            boxes_from = boxes_from or _boxes_from(rows)
            parts.append(_results_columns(str(path), rows, boxes_from, masks, keypoints))
        return joined(parts)
    except ValueError:  # a piece ended within a string or a list of objects, or has a fault, whose place is to be told
        rows = _whole(path, list[_Detection])
        return _results_columns(str(path), rows, _boxes_from(rows), masks, keypoints)


def results_columns(data: list[dict[str, Any]], masks: bool = False, keypoints: bool = False) -> ResultsFile:
    """`read_results` of what json.load gives."""
    rows = _converted("the results", data, list[_Detection])
    return _results_columns("the results", rows, _boxes_from(rows), masks, keypoints)


def _truth_kind(masks: bool, keypoints: bool) -> type:
    return _Truth[_FullAnnotation] if masks or keypoints else _Truth[_Annotation]


# Files to rows.


def _pieces(path: Path) -> Iterator[bytes]:
    """A list of objects as shorter ones, cut where "}, {" stands.

    That may be within a string or an inner list. Then what is before the cut is no JSON, so that it does not pass
    unnoticed.
    """
    head = rest = b""
    with path.open("rb") as file:
        while new := file.read(PIECE):
            rest += new
            if cut := _LAST_CUT.match(rest):
                yield head + rest[:cut.start(1)] + b"]"
                head, rest = b"[", rest[cut.end(1):]
    yield head + rest


_LAST_CUT = re.compile(rb".*\}\s*(,)\s*\{", re.DOTALL)


def _decode(text: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError:  # json.load also takes NaN, Infinity and 1e999, which JSON does not know
        return msgspec.convert(json.loads(text), kind)


def _whole(path: Path, kind: Any) -> Any:
    text = path.read_bytes()
    try:
        return _decode(text, kind)
    except msgspec.ValidationError:
        return _converted(str(path), json.loads(text), kind)  # raises, with the value
    except json.JSONDecodeError as error:
        found = repr(error.doc[error.pos:error.pos + 20]) if error.pos < len(error.doc) else "its end"
        raise ValueError(f"a COCO file must be JSON, got {found} ({path}, line {error.lineno}, column {error.colno}: "
                         f"{error.msg}). Was it written to the end?") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a COCO file must be JSON in UTF-8, got byte {error.object[error.start]:#x} ({path}, byte "
                         f"{error.start}). Is it compressed?") from None


def _converted(source: str, data: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_explained(source, data, str(error))) from None


def _explained(source: str, data: Any, message: str) -> str:
    """Our error for msgspec's "Expected `float`, got `str` - at `$.annotations[3].bbox[1]`"."""
    message, _, place = message.partition(" - at `$")
    value = data
    for index, key in re.findall(r"\[(\d+)\]|\.(\w+)", place):
        value = value[int(index) if index else key]
    where = _place(source, place.rstrip("`"))
    missing = re.search("missing required field `(.*)`", message)
    if missing:
        what = "every entry" if where != source else "the file"
        return (f"{what} must have `{missing[1]}`, got only {', '.join(value) or 'nothing'} ({where}). "
                f"{_FIXES.get(missing[1], 'Add it.')}")
    field = (re.findall(r"\.(\w+)", place) or ["entry" if place else "file"])[-1]
    expected = re.search("Expected `(.*?)`( of length [0-9]+)?", message)
    kinds = dict.fromkeys(_TYPES[kind] for kind in expected[1].split(" | "))  # each once
    return (f"`{field}` must be {' or '.join(kinds)}{expected[2] or ''}, got {_short(value)} ({where}). "
            f"{_FIXES.get(field, 'Correct the file.')}")


_TYPES = {"int": "a number", "float": "a number", "str": "a string", "array": "a list", "object": "an object",
          "bool": "true or false", "null": "null"}
_FIXES = {
    "file": "Were ground truth and results exchanged?",
    "annotations": "Test sets come without; evaluate on a set that has them.",
    "score": "Is this the ground truth instead of results?",
    "bbox": "A box is [x, y, width, height], four numbers without quotes.",
    "segmentation": "It is a list of polygons [x1, y1, x2, y2 ...], or an RLE with `size` and `counts`.",
}


def _place(source: str, place: str) -> str:
    """".annotations[3].bbox[1]" as words; entries count from 0."""
    entry = re.match(r"\.?(\w*)\[(\d+)\](.*)", place)
    if not entry:
        return source
    return f"{source}, entry {entry[2]}" + (f" of {entry[1]}" if entry[1] else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


# Rows to columns.


def _truth_columns(source: str, truth: _Truth, masks: bool, keypoints: bool) -> TruthFile:
    rows = truth.annotations
    points = _keypoints(source, rows, "annotations") if keypoints else None
    counts = np.array([-1 if row.num_keypoints is None else row.num_keypoints for row in rows], np.int64)
    if points is not None:
        counts = np.where(counts < 0, (points[:, 2::3] > 0).sum(1), counts)
    return TruthFile(
        source, _images(source, truth.images), _categories(source, truth.categories),
        ids=_ids(source, "id", [row.id for row in rows], "annotations"),
        image_ids=_ids(source, "image_id", [row.image_id for row in rows], "annotations"),
        category_ids=_ids(source, "category_id", [row.category_id for row in rows], "annotations"),
        boxes_xywh=_boxes([row.bbox or _NO_BOX for row in rows]),
        area=_floats([np.nan if row.area is None else row.area for row in rows]),
        crowd=np.array([bool(row.iscrowd) for row in rows], bool),
        ignore=np.array([bool(row.ignore) for row in rows], bool),
        num_keypoints=counts, keypoints=points,
        segmentation=[row.segmentation or None for row in rows] if masks else None)


def _images(source: str, rows: list[_Image]) -> Images:
    negative, partial = ([getattr(row, name) or [] for row in rows]
                         for name in ("neg_category_ids", "not_exhaustive_category_ids"))
    federated = any(row.neg_category_ids is not None for row in rows)
    return Images(_ids(source, "id", [row.id for row in rows], "images"),
                  np.array([row.height for row in rows], np.int64), np.array([row.width for row in rows], np.int64),
                  negative if federated else None, partial if federated else None)


def _categories(source: str, rows: list[_Category]) -> Categories:
    frequency = [row.frequency or "" for row in rows]
    return Categories(_ids(source, "id", [row.id for row in rows], "categories"),
                      [str(row.id) if row.name is None else row.name for row in rows],
                      frequency if any(frequency) else None)


def _boxes_from(rows: list[_Detection]) -> str:
    """The field that `loadRes` derives boxes from: the first entry's."""
    if not rows:
        return "bbox"
    present = [name for name in ("bbox", "segmentation", "keypoints") if getattr(rows[0], name)]
    return present[0] if present else "bbox"


def _results_columns(source: str, rows: list[_Detection], boxes_from: str, masks: bool, keypoints: bool) -> ResultsFile:
    points = _keypoints(source, rows) if keypoints or boxes_from == "keypoints" else None
    if boxes_from == "bbox":
        boxes = _boxes(_present(source, rows, "bbox"))
        with np.errstate(invalid="ignore", over="ignore"):  # `trust` tells of boxes that are not finite
            area = boxes[:, 2] * boxes[:, 3]
    elif boxes_from == "segmentation":
        boxes, area = _mask_boxes(source, rows)
    else:
        _present(source, rows, "keypoints")
        boxes, area = _keypoint_boxes(points)
    return ResultsFile(
        source, image_ids=_ids(source, "image_id", [row.image_id for row in rows]),
        category_ids=_ids(source, "category_id", [row.category_id for row in rows]), boxes_xywh=boxes, area=area,
        scores=_floats([row.score for row in rows]), keypoints=points if keypoints else None,
        segmentation=[row.segmentation or None for row in rows] if masks else None)


def _ids(source: str, field: str, values: list[Id], part: str = "") -> np.ndarray:
    """(len(values),) int64, or strings."""
    array = np.array(values) if values else np.zeros(0, np.int64)
    if array.dtype.kind == "i":
        return array
    if array.dtype.kind == "U" and all(isinstance(value, str) for value in values):
        return array
    for i, value in enumerate(values):
        if isinstance(value, str) != isinstance(values[0], str):
            raise _fault(source, part, i, field, "be numbers in all entries or strings in all", value,
                         "Numbers are written without quotes.")
        if not isinstance(value, str) and not (value == value // 1 and -2**63 <= value < 2**63):
            raise _fault(source, part, i, field, "be a whole number of 64 bits", value, "Number them anew.")
    return np.array([int(value) for value in values], np.int64)


def _floats(values: list[float]) -> np.ndarray:
    return np.fromiter(values, np.float64, len(values))


_NO_BOX = (np.nan,) * 4


def _boxes(values: list[Box]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(values), np.float64, 4 * len(values)).reshape(-1, 4)


def _keypoints(source: str, rows: list[Any], part: str = "") -> np.ndarray | None:
    """(len(rows), 3J) float64, NaN for a row without; None if all are."""
    lengths = [len(row.keypoints or ()) for row in rows]
    longest = max(lengths, default=0)
    if longest == 0:
        return None
    for i, length in enumerate(lengths):
        if length not in (0, longest) or length % 3:
            raise _fault(source, part, i, "keypoints", f"be triples x, y, v or score, here {longest // 3} of them",
                         rows[i].keypoints, "Evaluate classes with other keypoints on their own.")
    missing = [np.nan] * longest
    flat = chain.from_iterable(row.keypoints or missing for row in rows)
    return np.fromiter(flat, np.float64, len(rows) * longest).reshape(len(rows), longest)


def _keypoint_boxes(keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (D, 4) and areas (D,) around all keypoints, found or not."""
    corners = [pick(keypoints[:, axis::3], axis=1) for pick in (np.min, np.max) for axis in (0, 1)]
    x0, y0, x1, y1 = corners
    return np.stack([x0, y0, x1 - x0, y1 - y0], 1), (x1 - x0) * (y1 - y0)


def _mask_boxes(source: str, rows: list[_Detection]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (D, 4) and areas (D,) of masks; a box that is given stays."""
    masks = _present(source, rows, "segmentation")
    for i, mask in enumerate(masks):
        if isinstance(mask, list) or isinstance(mask["counts"], list):
            raise _fault(source, "", i, "segmentation", "be a compressed RLE", mask,
                         "pycocotools.mask.encode makes one; or give boxes as well.")
    decode_runs(masks, f"{source}, entry")  # raises for damaged ones, of which pycocotools reads beyond the end
    boxes = coco_mask.toBbox(masks).reshape(-1, 4)
    given = [i for i, row in enumerate(rows) if row.bbox is not None]
    boxes[given] = _boxes([rows[i].bbox for i in given])
    return boxes, rle_areas(masks).astype(np.float64)


def _present(source: str, rows: list[_Detection], field: str) -> list[Any]:
    values = [getattr(row, field) or None for row in rows]
    if None in values:
        raise _fault(source, "", values.index(None), field, "be in every entry if it is in the first, or if none has "
                     "segmentation or keypoints", None, "Add it.")
    return values


def _fault(source: str, part: str, entry: int, field: str, must: str, value: Any, fix: str) -> ValueError:
    return ValueError(f"`{field}` must {must}, got {_short(value)} ({_place(source, f'{part}[{entry}]')}). {fix}")
