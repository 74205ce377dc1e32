"""Shards without an index: what is in them, from all their tar headers and JSON members."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import msgspec

from detres.data import coco, coco_json
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import IMAGE_SUFFIXES, ImageError, open_image
from detres.data.problems import Problems
from detres.data.shard_files import BLOCK, ShardImage, ShardStore, local_copy, system_of


@dataclass
class Scan:
    """Makes a COCO file's entries of the members of shards, and has them checked as such."""

    store: ShardStore
    name: str
    problems: Problems
    images: dict[Any, ImageRecord | None] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def read(self, shards: Sequence[str]) -> Dataset:
        for shard in shards:
            self._shard(shard)
        file = Path(self.store.root)
        categories = coco.parse_categories(self._categories(), file, self.problems)
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        names, pairs, skeleton = coco._keypoints(categories, file, self.problems)
        reader = coco._Reader(file, self.problems, self.images, label_of, frozenset(), len(names))
        found = reader.read(self.annotations)
        corners = {entry["id"]: entry for entry in self.annotations if "corners" in entry or "difficult" in entry}
        records = tuple(replace(image, annotations=tuple(_exact(item, corners.get(item.id, {}))
                                                         for item in found.get(image.id, ())))
                        for image in self.images.values())
        classes = [category for category in categories if category.get("keypoints")]
        return Dataset(self.name, "coco", tuple(category["name"] for category in categories),
                       tuple(category["id"] for category in categories), records, names, pairs, skeleton=skeleton,
                       keypoint_classes=tuple(category["name"] for category in classes))

    def _shard(self, shard: str) -> None:
        url, members = self.store.url(shard), {}
        try:
            system, path = system_of(url)
            with system.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    folder, _, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    members.setdefault(f"{folder}/{key}" if folder else key, {})[f".{kind.lower()}"] = (
                        member, tar.extractfile(member).read() if kind.lower() == "json" else None)
                _check_end(tar, stream)
                for key, files in members.items():
                    self._image(shard, key, files, tar)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"shard must be a whole tar archive, got {type(error).__name__}: {error} ({url}). "
                             "Restore it, or leave it out.") from None

    def _image(self, shard: str, key: str, files: dict[str, Any], tar: tarfile.TarFile) -> None:
        images = [kind for kind in files if kind in IMAGE_SUFFIXES]
        if not images:
            return
        member, place = files[images[0]][0], self.store.url(shard)
        try:
            content = msgspec.json.decode(files[".json"][1]) if ".json" in files else None
        except msgspec.DecodeError as error:
            content = str(error)
        content = {"annotations": content} if isinstance(content, list) else content
        if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
            self.problems.add(place, key, None, "json", content, "must be an object with annotations, or a list of "
                              "them (as COCO's)", "bad_image", member.name)
            return
        path = ShardImage(shard, member.name, member.offset_data, member.size, self.store)
        image_id = content["id"] if coco.is_id(content.get("id")) or isinstance(content.get("id"), str) else key
        if image_id in self.images:
            self.problems.add(place, image_id, None, "id", image_id, "must differ from other images' (give it another)",
                              "duplicate_image", member.name)
            return
        try:
            self.images[image_id] = ImageRecord(image_id, path, *_size(content, path, tar.extractfile(member)))
        except ImageError as error:
            self.problems.add(place, image_id, None, "image", str(error), "must be readable, as no size is stated",
                              "image_missing", member.name)
            return
        for entry in content["annotations"]:
            entry = dict(entry) if isinstance(entry, dict) else {}
            entry.setdefault("id", len(self.annotations) + 1)
            self.annotations.append(coco_json.pack(entry | {"image_id": image_id}))

    def _categories(self) -> list[dict[str, Any]]:
        """Of the JSON file beside the shards; else those that annotations name, whose ids go by their names where
        there are none."""
        with suppress(FileNotFoundError):
            return json.loads(local_copy(self.store, f"{self.name}.json").read_bytes())["categories"]
        names = {entry["category"] for entry in self.annotations if isinstance(entry.get("category"), str)}
        number = {name: place for place, name in enumerate(sorted(names), 1)}
        for entry in self.annotations:
            entry.setdefault("category_id", number.get(entry.get("category")))
        named = {(entry["category_id"], entry["category"]) for entry in self.annotations
                 if coco.is_id(entry["category_id"]) and entry.get("category") in names}
        if not named:
            raise ValueError(f"annotations in shards must have a category, its name, got none ({self.store.root}). Add "
                             f"it, or {self.name}.json with COCO's categories beside the shards.")
        for values in zip(*named):
            if twice := {value for value in values if values.count(value) > 1}:
                raise ValueError(f"category and category_id must go together in all annotations, got {twice} with "
                                 f"several of the other ({self.store.root}). Correct them, or give {self.name}.json "
                                 "with COCO's categories beside the shards, whose ids then count.")
        return [{"id": number, "name": name} for number, name in sorted(named)]


def _size(content: dict[str, Any], path: ShardImage, file: IO[bytes]) -> Sequence[int]:
    """Height and width, as stated, else from the file. Raises ImageError."""
    size = content.get("height"), content.get("width")
    if all(type(side) is int and side > 0 for side in size):
        return size
    return open_image(file.read(), str(path)).shape[:2]


def _check_end(tar: tarfile.TarFile, stream: Any) -> None:
    """`tarfile` takes a damaged header, or a file that ends between two members, for the end. Raises ReadError."""
    stream.seek(tar.offset)
    if stream.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"neither a member nor the end of an archive at byte {tar.offset}")


def _exact(item: Annotation, entry: dict[str, Any]) -> Annotation:
    corners = entry.get("corners")
    box = {"box": tuple(corners), "size": None} if isinstance(corners, list) and len(corners) == 4 else {}
    return replace(item, difficult=entry.get("difficult") is True, **box)
