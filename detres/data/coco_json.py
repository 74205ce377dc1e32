"""A COCO file's JSON, read fast and into little memory."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec


def parse(file: Path) -> dict[str, Any]:
    """The JSON, with polygons packed. Raises ValueError, of which the cause tells line and column."""
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        content = _parse_fast(data)
    except (msgspec.MsgspecError, RecursionError):
        content = _parse_any(data, file)
    required = ["images", "categories"] + ["annotations"] * (not file.stem.startswith("image_info"))
    missing = [key for key in required if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        found = sorted(content)[:10] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"COCO annotation file must have lists of images, annotations and categories, got no "
                         f"{', '.join(missing)} but {found} ({file}). Is it a file of instances?")
    return content


def read_json(file: Path) -> tuple[Any, Callable[[Any], bytes]]:
    """All of it, as it is; and what writes it so again. Raises ValueError."""
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return msgspec.json.decode(data), msgspec.json.encode
    except (msgspec.MsgspecError, RecursionError):
        return json.loads(data), lambda content: json.dumps(content).encode()  # msgspec writes NaN as null


def _parse_fast(data: bytes) -> dict[str, Any]:
    """Annotations one by one, each packed at once: a third of the time and memory of all together."""
    decode = msgspec.json.decode
    parts = decode(data, type=dict[str, msgspec.Raw])
    annotations = decode(parts.pop("annotations"), type=list[msgspec.Raw]) if "annotations" in parts else None
    content = {key: decode(part) for key, part in parts.items()}
    return content | ({} if annotations is None else {"annotations": [pack(decode(entry)) for entry in annotations]})


def _parse_any(data: bytes, file: Path) -> Any:
    """As Python reads JSON, which takes NaN and Infinity, too; each annotation is packed as it comes by."""
    try:
        return json.loads(data, object_hook=pack)
    except (ValueError, RecursionError) as error:  # ValueError: also a whole number of thousands of digits
        raise ValueError(f"annotation file must be JSON, got {error} ({file}). Is it complete?") from error


def pack(entry: Any) -> Any:
    polygons = entry.get("segmentation") if isinstance(entry, dict) else None
    if type(polygons) is list:
        try:
            entry["segmentation"] = [array("d", polygon) for polygon in polygons]
        except (TypeError, OverflowError):  # not numbers: kept as it is for the message
            pass
    return entry


def is_panoptic(content: dict[str, Any]) -> bool:
    first = next(iter(content.get("annotations", ())), None)
    return isinstance(first, dict) and "segments_info" in first


def is_lvis(content: dict[str, Any]) -> bool:
    """Whether the first category and image have LVIS' keys: how frequent it is, and which classes it does not have."""
    first = [next(iter(content[key]), None) for key in ("categories", "images")]
    return all(isinstance(entry, dict) and key in entry for entry, key in zip(first, ("frequency", "neg_category_ids")))


def rest(entry: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """What has other keys than the known."""
    return {key: value for key, value in entry.items() if key not in known}


def file_names(entry: Any) -> list[str]:
    """What the file of an image may be called: LVIS gives the address, whose last folder is that of a split."""
    entry = entry if isinstance(entry, dict) else {}
    names = [entry["file_name"]] if isinstance(entry.get("file_name"), str) else []
    if isinstance(url := entry.get("coco_url"), str):
        names += ["/".join(url.split("/")[-2:]), url.rpartition("/")[2]]
    return names
