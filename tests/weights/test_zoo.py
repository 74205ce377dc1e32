"""Names of published weights, and what a download may not do. Nothing here uses the network."""

from __future__ import annotations

import hashlib
import re
import urllib.error

import pytest
import torch
import torchvision

from detres.weights import zoo
from detres.weights.zoo import BACKBONES, MODELS, Source, fetch, resolve

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
URL = f"https://dl.fbaipublicfiles.com/detectron2/{MASK}/137849600/model_final_f10217.pkl"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name", [MASK, "mask_rcnn_R_50_FPN_3x", f"{MASK}.yaml", f"detectron2://{MASK}", URL,
                                  f"detectron2://{MASK}/137849600/model_final_f10217.pkl",
                                  f"{MASK}/137849600/model_final_f10217.pkl"])
def test_names_of_detectron2(name):
    source = resolve(name)
    assert source == Source(MASK, URL, f"detectron2/{MASK}/137849600/model_final_f10217.pkl", ("md5", "f10217"))


def test_a_short_name_is_that_of_coco():
    assert resolve("keypoint_rcnn_R_50_FPN_1x").name == "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x"
    assert resolve("mask_rcnn_R_50_FPN_1x").name == "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"


def test_every_entry_is_well_formed():
    assert all(re.fullmatch(r"\d{9}/[0-9a-f]{6}", model) for model in MODELS.values())
    assert len(set(MODELS.values())) == len(MODELS)
    files = [resolve(name).file for name in [*MODELS, *BACKBONES]]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("name, file", [
    ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "detectron2/ImageNetPretrained/MSRA/R-50.pkl"),
    ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", "detectron2/ImageNetPretrained/FAIR/X-101-32x8d.pkl"),
    ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", "detectron2/ImageNetPretrained/torchvision/R-50.pkl"),
    ("catalog://ImageNetPretrained/FAIR/R-50-GN", "detectron/ImageNetPretrained/47261647/R-50-GN.pkl"),
])
def test_backbones(name, file):
    source = resolve(name)
    assert source == Source(name, f"https://dl.fbaipublicfiles.com/{file}", file, None)


@pytest.mark.parametrize("name, full, digits", [
    ("resnet50", "resnet50.IMAGENET1K_V2", "11ad3fa6"),
    ("resnet50.IMAGENET1K_V1", "resnet50.IMAGENET1K_V1", "0676ba61"),
    ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn.COCO_V1", "bf2d0c1e"),
    ("fcn_resnet50.DEFAULT", "fcn_resnet50.COCO_WITH_VOC_LABELS_V1", "1167a1af"),
])
def test_names_of_torchvision(name, full, digits):
    source = resolve(name)
    model, _, version = full.partition(".")
    assert (source.name, source.checksum) == (full, ("sha256", digits))
    assert source.url == torchvision.models.get_model_weights(model)[version].url
    assert source.file == source.url.rpartition("/")[2]  # where torchvision itself caches it


@pytest.mark.parametrize("url, file, checksum", [
    ("https://example.org/a/faster_20200130-d4d42cab.pth?download=1", "faster_20200130-d4d42cab.pth",
     ("sha256", "d4d42cab")),
    ("https://example.org/R-50.pkl", "3814bc69c054af5f/R-50.pkl", None),
    ("https://example.org/x-20240131.pth", "e6515bf17ed961c7/x-20240131.pth", None),  # a date
    ("file:///tmp/x-12345678.safetensors", "x-12345678.safetensors", ("sha256", "12345678")),
    ("detectron2://other/model_final_abcdef.pkl", "detectron2/other/model_final_abcdef.pkl", ("md5", "abcdef")),
])
def test_urls(url, file, checksum):
    source = resolve(url)
    assert (source.file, source.checksum) == (file, checksum)


@pytest.mark.parametrize("url", ["detectron2://../../../etc/passwd", "https://example.org/",
                                 "https://example.org/%2e%2e", "detectron2://a/%2e%2e/%2e%2e/%2e%2e/b.pkl"])
def test_a_url_stays_within_the_cache(url):
    with pytest.raises(ValueError, match="must end in the name of a file"):
        resolve(url)


@pytest.mark.parametrize("name, hint", [
    ("mask_rcnn_R50_FPN_3x", "Did you mean 'mask_rcnn_R_50_FPN_3x'"), ("resnet_50", "Did you mean 'resnet50'"),
    ("resnet50.V1", "'resnet50.IMAGENET1K_V1'"),
    ("detectron://ImageNetPretrained/MSRA/R-50", "'detectron2://ImageNetPretr"),
    ("zzz", "Give a name of Detectron2's model zoo"), ("runs/mine/weights.pth", "or the path of a file"),
])
def test_unknown_names(name, hint):
    with pytest.raises(ValueError, match="weights must be a file that exists or a name that is known") as error:
        fetch(name)
    assert f"got '{name}'" in str(error.value) and hint in str(error.value)


def test_urls_without_a_checksum_do_not_share_a_file():
    paths = {resolve(f"https://example.org/{end}").path for end in ("a/model.pth", "b/model.pth", "a/model.pth?v=2")}
    assert len(paths) == 3 and {path.name for path in paths} == {"model.pth"}


# ---- downloads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A published file behind a local URL, opened as torch hub opens any."""
    from urllib.request import urlopen
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    content = b"weights" * 1000
    path = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    return path


def test_downloads_once_then_reads_the_cache(served, cache, monkeypatch):
    path = fetch(served.as_uri())
    assert path == cache / served.name and path.read_bytes() == served.read_bytes()
    assert list(cache.iterdir()) == [path]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert fetch(served.as_uri()) == path


def test_a_file_put_there_by_hand_is_used(cache):
    path = cache / "detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert fetch("detectron2://ImageNetPretrained/MSRA/R-50.pkl") == path
    assert fetch(path) == path and fetch(str(path)) == path


def test_a_corrupt_download_leaves_nothing(served, cache):
    served.write_bytes(b"other")
    with pytest.raises(ValueError, match=f"got sha256 {hashlib.sha256(b'other').hexdigest()[:8]}, not"):
        fetch(served.as_uri())
    assert not list(cache.iterdir())


def test_md5_of_detectron2(served, cache, monkeypatch):
    monkeypatch.setattr(zoo, "DETECTRON2", served.parent.as_uri() + "/")
    for digits, fits in ((hashlib.md5(served.read_bytes()).hexdigest()[:6], True), ("000000", False)):
        path = served.with_name(f"model_final_{digits}.pkl")
        path.write_bytes(served.read_bytes())
        if fits:
            assert fetch(path.as_uri()).read_bytes() == served.read_bytes()
        else:
            with pytest.raises(ValueError, match="not 000000"):
                fetch(path.as_uri())


def test_a_corrupt_cache_is_named(served, cache):
    path = fetch(served.as_uri())
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="Delete the file") as error:
        fetch(served.as_uri())
    assert str(path) in str(error.value)


def test_a_download_that_breaks_off_leaves_nothing(served, cache, monkeypatch):
    def breaks(url, target, **options):
        with open(target, "wb") as file:
            file.write(b"half")
        raise ConnectionResetError("peer")

    monkeypatch.setattr(torch.hub, "download_url_to_file", breaks)
    with pytest.raises(ConnectionError, match="got peer"):
        fetch(served.as_uri())
    assert not list(cache.iterdir())


def test_offline_says_what_to_fetch_and_where_to_put_it(cache):
    with pytest.raises(ConnectionError, match="must be downloaded once") as error:
        fetch("mask_rcnn_R_50_FPN_3x")
    assert URL in str(error.value) and str(cache / "detectron2" / MASK) in str(error.value)
