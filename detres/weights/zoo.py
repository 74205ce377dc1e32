"""Published weights by name: Detectron2's model zoo and torchvision's, downloaded once into torch hub's cache.

Names of torchvision and their checksums come from torchvision itself. Those of Detectron2 are its model zoo's, which
says of itself that "any model on this page contains its md5 prefix in its file name" (its MODEL_ZOO.md); its
ImageNet backbones have no checksum.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import torch
from torchvision import models

DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
CAFFE2 = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/"

# Config of Detectron2's model zoo -> model id and the md5 that its file name has (detectron2/model_zoo/model_zoo.py).
# A name without its folder means the first with it.
MODELS = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x": "137257644/721ade",
    "COCO-Detection/faster_rcnn_R_50_DC5_1x": "137847829/51d356",
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": "137257794/b275ba",
    "COCO-Detection/faster_rcnn_R_50_C4_3x": "137849393/f97cb7",
    "COCO-Detection/faster_rcnn_R_50_DC5_3x": "137849425/68d202",
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": "137849458/280758",
    "COCO-Detection/faster_rcnn_R_101_C4_3x": "138204752/298dad",
    "COCO-Detection/faster_rcnn_R_101_DC5_3x": "138204841/3e0943",
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": "137851257/f6e8b1",
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x": "139173657/68b088",
    "COCO-Detection/retinanet_R_50_FPN_1x": "190397773/bfca0b",
    "COCO-Detection/retinanet_R_50_FPN_3x": "190397829/5bd44e",
    "COCO-Detection/retinanet_R_101_FPN_3x": "190397697/971ab9",
    "COCO-Detection/rpn_R_50_C4_1x": "137258005/450694",
    "COCO-Detection/rpn_R_50_FPN_1x": "137258492/02ce48",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x": "137259246/9243eb",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x": "137260150/4f86c3",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": "137260431/a54504",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x": "137849525/4ce675",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_3x": "137849551/84107b",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": "137849600/f10217",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_C4_3x": "138363239/a2914c",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_DC5_3x": "138363294/0464b7",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x": "138205316/a3ec72",
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x": "139653917/2d9806",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": "137261548/04e291",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x": "137849621/a6e10b",
    "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x": "138363331/997cc7",
    "COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x": "139686956/5ad38f",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": "139514544/dbfeb4",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x": "139514569/c10459",
    "COCO-PanopticSegmentation/panoptic_fpn_R_101_3x": "139514519/cafdb1",
    "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": "144219072/571f7c",
    "LVISv0.5-InstanceSegmentation/mask_rcnn_R_101_FPN_1x": "144219035/824ab5",
    "LVISv0.5-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_1x": "144219108/5e3439",
    "Cityscapes/mask_rcnn_R_50_FPN": "142423278/af9cf5",
    "PascalVOC-Detection/faster_rcnn_R_50_C4": "142202221/b1acc2",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5": "138602867/65c703",
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5": "144998336/821d0b",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": "138602847/e9d89b",
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": "144998488/480dd8",
    "Misc/mask_rcnn_R_50_FPN_3x_syncbn": "169527823/3b3c51",
    "Misc/mask_rcnn_R_50_FPN_3x_gn": "138602888/dc5d9e",
    "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn": "138602908/01ca85",
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_gn": "183808979/da7b4c",
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn": "184226666/5ce33e",
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x": "139797668/be35db",
    "Detectron1-Comparisons/faster_rcnn_R_50_FPN_noaug_1x": "137781054/7ab50c",
    "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x": "137781281/62ca52",
    "Detectron1-Comparisons/keypoint_rcnn_R_50_FPN_1x": "137781195/cce136",
}
# ImageNet backbones, by what Detectron2's configs write in MODEL.WEIGHTS (MODEL_ZOO.md; checkpoint/catalog.py).
BACKBONES = {
    "detectron2://ImageNetPretrained/MSRA/R-50.pkl": DETECTRON2 + "ImageNetPretrained/MSRA/R-50.pkl",
    "detectron2://ImageNetPretrained/MSRA/R-101.pkl": DETECTRON2 + "ImageNetPretrained/MSRA/R-101.pkl",
    "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl": DETECTRON2 + "ImageNetPretrained/FAIR/X-101-32x8d.pkl",
    "detectron2://ImageNetPretrained/torchvision/R-50.pkl": DETECTRON2 + "ImageNetPretrained/torchvision/R-50.pkl",
    "detectron2://ImageNetPretrained/torchvision/R-101.pkl": DETECTRON2 + "ImageNetPretrained/torchvision/R-101.pkl",
    "catalog://ImageNetPretrained/MSRA/R-50": CAFFE2 + "MSRA/R-50.pkl",
    "catalog://ImageNetPretrained/MSRA/R-101": CAFFE2 + "MSRA/R-101.pkl",
    "catalog://ImageNetPretrained/FAIR/R-50-GN": CAFFE2 + "47261647/R-50-GN.pkl",
    "catalog://ImageNetPretrained/FAIR/R-101-GN": CAFFE2 + "47592356/R-101-GN.pkl",
    "catalog://ImageNetPretrained/FAIR/X-101-32x8d": CAFFE2 + "20171220/X-101-32x8d.pkl",
    "catalog://ImageNetPretrained/FAIR/X-101-64x4d": CAFFE2 + "FBResNeXt/X-101-64x4d.pkl",
    "catalog://ImageNetPretrained/FAIR/X-152-32x8d-IN5k": CAFFE2 + "25093814/X-152-32x8d-IN5k.pkl",
}


@dataclass(frozen=True)
class Source:
    """name: in full, such as 'COCO-Detection/faster_rcnn_R_50_FPN_1x' or 'resnet50.IMAGENET1K_V2'; a URL is its own.
    file: its place under torch hub's `checkpoints`; without a checksum, which would tell it from others of its name, in
    a folder of its own. checksum: algorithm and first hex digits, None if unknown."""

    name: str
    url: str
    file: str
    checksum: tuple[str, str] | None

    @property
    def path(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file


def resolve(name: str) -> Source:
    """Where the weights of that name are: a model of Detectron2's zoo (with or without its folder), of torchvision
    ('maskrcnn_resnet50_fpn', 'resnet50.IMAGENET1K_V1'), a backbone ('detectron2://ImageNetPretrained/MSRA/R-50.pkl'),
    or a URL. Raises ValueError for any other, with names that are near."""
    if name in BACKBONES:
        return _source(name, BACKBONES[name])
    url = re.sub("^detectron2://", DETECTRON2, name)
    config = url.removeprefix(DETECTRON2).removesuffix(".yaml")
    full = next((known for known in MODELS if config in (known, known.rpartition("/")[2], _file(known))), None)
    if full is not None:
        return _source(full, DETECTRON2 + _file(full))
    if re.match(r"(https?|file)://", url):
        return _source(url, url)
    model, _, version = name.partition(".")
    if model in _torchvision():
        members = models.get_model_weights(model).__members__
        if not version or version in members:
            weights = members[version or "DEFAULT"]
            return _source(f"{model}.{weights.name}", weights.url)
    raise _unknown(name)


def _file(config: str) -> str:
    model, md5 = MODELS[config].split("/")
    return f"{config}/{model}/model_final_{md5}.pkl"


def _torchvision() -> list[str]:
    """Names of torchvision's models on ResNets."""
    every = [name for module in (models, models.detection, models.segmentation) for name in models.list_models(module)]
    return [name for name in every if re.search(r"resnet\d|resnext\d", name)]


def _source(name: str, url: str) -> Source:
    path = PurePosixPath(unquote(urlsplit(url).path))
    if not path.name or ".." in path.parts:  # it becomes a path in the cache
        raise ValueError(f"URL of weights must end in the name of a file, got '{url}'. Give that of the file itself.")
    if url.startswith((DETECTRON2, CAFFE2)):  # several files there are called R-50.pkl
        md5 = re.search(r"model_\w+_([0-9a-f]{6})\.pkl$", path.name)
        return Source(name, url, str(path).lstrip("/"), ("md5", md5[1]) if md5 else None)
    # torch hub's convention, which MMDetection follows; a date is none
    if sha256 := re.search(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w+$", path.name):
        return Source(name, url, path.name, ("sha256", sha256[1]))
    return Source(name, url, f"{hashlib.sha256(url.encode()).hexdigest()[:16]}/{path.name}", None)


def names() -> list[str]:
    """All that `resolve` knows, but for URLs and versions of torchvision's."""
    return [*MODELS, *(known.rpartition("/")[2] for known in MODELS), *BACKBONES, *_torchvision()]


def _unknown(name: str) -> ValueError:
    known = names()
    if (model := name.partition(".")[0]) in _torchvision():
        known = [f"{model}.{version}" for version in models.get_model_weights(model).__members__]
    near = difflib.get_close_matches(name, known, 3, 0.6) or [k for k in known if name.lower() in k.lower()][:3]
    hint = f"Did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else \
        "Give a name of Detectron2's model zoo or of torchvision's models on ResNets, a URL, or the path of a file."
    return ValueError(f"weights must be a file that exists or a name that is known, got '{name}'. {hint}")


def fetch(name: str | Path) -> Path:
    """The file of weights of that name or URL, downloaded if the cache lacks it, checksum verified; a path that exists
    is given back. Raises ValueError for unknown names and wrong checksums, ConnectionError where a download fails."""
    if Path(name).exists():
        return Path(name)
    source = resolve(str(name))
    if not source.path.is_file():
        _download(source)
    elif told := _wrong(source.path, source):
        raise ValueError(f"cached weights must have the checksum that their name says, got {told} ({source.path}). "
                         "Delete the file; it will be downloaded again.")
    return source.path


def _download(source: Source) -> None:
    """Into a file beside its place, which it takes only when all of it is there and right."""
    source.path.parent.mkdir(parents=True, exist_ok=True)
    partial = source.path.with_name(f"{source.path.name}.{os.getpid()}.partial")
    try:
        torch.hub.download_url_to_file(source.url, str(partial), progress=True)
        if told := _wrong(partial, source):
            raise ValueError(f"downloaded weights must have the checksum that their name says, got {told} "
                             f"({source.url}). Try again; if it stays so, the file was replaced.")
        os.replace(partial, source.path)
    except OSError as error:  # urllib's errors are of this kind
        raise ConnectionError(f"weights '{source.name}' must be downloaded once, got {error} ({source.url}). Without a "
                              f"network, download that URL elsewhere and put the file at {source.path}.") from None
    finally:
        partial.unlink(missing_ok=True)


def _wrong(path: Path, source: Source) -> str | None:
    """What is wrong with the file's checksum, if anything."""
    if source.checksum is None:
        return None
    algorithm, prefix = source.checksum
    digest = checksum(path, algorithm)
    return None if digest.startswith(prefix) else f"{algorithm} {digest[:len(prefix)]}, not {prefix}"


def checksum(path: Path, algorithm: str) -> str:
    """Of a file, in hex digits."""
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()
