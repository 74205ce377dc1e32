"""The built-in data set must be exact: everything else is tested on it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detres.data import shapes_draw
from detres.data.shapes import (KEYPOINT_NAMES, STUFF_IDS, THING_IDS, Scene, ShapesOptions, render, segmentation,
                                write_shapes)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
SMALL = ShapesOptions(size=(96, 128), min_size=0.1, crowd=0.3, empty=0.1)


def digest(scene: Scene) -> str:
    code = hashlib.sha256(scene.image.tobytes() + scene.owner.tobytes() + scene.stuff.tobytes())
    for thing in scene.objects:
        code.update(repr((thing.name, thing.box, thing.crowd, thing.keypoints)).encode())
    return code.hexdigest()


def decode(code: list | dict, height: int, width: int) -> np.ndarray:
    """A COCO segmentation as pycocotools reads it."""
    packed = isinstance(code, dict) and isinstance(code["counts"], str)
    rles = code if packed else coco_mask.frPyObjects(code, height, width)
    return coco_mask.decode(coco_mask.merge(rles) if isinstance(rles, list) else rles).astype(bool)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render(i, 7, SMALL) for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", 16, 7, options=SMALL, val_images=6, progress=False)


def load(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


# --- determinism


def test_pixels_are_those_of_every_other_machine():
    """Known hashes: they change only with the drawing itself, and then `_VERSION` must be raised."""
    assert digest(render(3, 5))[:16] == "dd8efecddb5e40e6"
    assert digest(render(3, 5, ShapesOptions(preset="easy")))[:16] == "074d73890dc45df4"


def test_vector_instructions_do_not_matter():
    fast = [digest(render(i, 1, SMALL)) for i in range(6)]
    cv2.setUseOptimized(False)
    try:
        assert [digest(render(i, 1, SMALL)) for i in range(6)] == fast
    finally:
        cv2.setUseOptimized(True)


def test_scene_depends_on_index_seed_and_options_alone(scenes):
    assert digest(render(5, 7, SMALL)) == digest(scenes[5])  # whatever was drawn before
    others = [scenes[6], render(5, 8, SMALL), render(5, 7, ShapesOptions(size=(96, 128))), render(7, 5, SMALL)]
    assert len({digest(scene) for scene in [scenes[5], *others]}) == 5


def test_image_is_the_same_in_a_larger_set(folder, tmp_path):
    other = write_shapes(tmp_path / "few", 3, 7, options=SMALL, val_images=1, progress=False)
    for part in ("train/000000000003.jpg", "val/000001000001.jpg", "annotations/panoptic_train/000000000002.png",
                 "annotations/semantic_val/000001000001.png", "voc/Annotations/000000000001.xml"):
        assert (other / part).read_bytes() == (folder / part).read_bytes()
    few, many = (json.loads((f / "annotations/instances_train.json").read_text()) for f in (other, folder))
    assert few["annotations"] == [a for a in many["annotations"] if a["image_id"] <= 3] != []


# --- exactness of a scene


def test_masks_partition_what_is_not_background(scenes):
    for scene in scenes:
        count = sum((thing.mask.astype(int) for thing in scene.objects), np.zeros(SMALL.size, int))
        np.testing.assert_array_equal(count, scene.owner > 0)


def test_boxes_are_the_extent_of_the_masks(scenes):
    for thing in (t for s in scenes for t in s.objects):
        y, x = np.nonzero(thing.mask)
        assert thing.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def test_picture_changes_where_the_mask_is():
    """A lone disc: pixels well inside take its colour, those well outside keep the ground's."""
    options = ShapesOptions(preset="easy", classes=("disc",), max_objects=1, empty=0, crowd=0)
    for index in range(8):
        scene = render(index, 0, options)
        image, mask = scene.image.astype(int), scene.objects[0].mask.astype(np.uint8)
        inside, outside = cv2.erode(mask, np.ones((5, 5))) > 0, cv2.dilate(mask, np.ones((5, 5))) == 0
        near = outside & (cv2.dilate(mask, np.ones((21, 21))) > 0)
        assert np.abs(image[inside].mean(0) - image[near].mean(0)).sum() > 60


@pytest.mark.parametrize("radius", [5.0, 17.3, 60.0])
def test_disc_covers_its_area(radius):
    outline = shapes_draw.OUTLINES["disc"](np.random.RandomState(0), 0)
    patch, _ = shapes_draw.place(outline, radius, 0.3, 1.0, (100.2, 90.7))
    y, x = np.mgrid[:patch.cover.shape[0], :patch.cover.shape[1]]
    near = (x + 0.5 + patch.left - 100.2) ** 2 + (y + 0.5 + patch.top - 90.7) ** 2 <= radius ** 2
    assert patch.cover.sum() / 16 == pytest.approx(np.pi * radius ** 2, rel=0.01)
    assert (near != patch.mask).sum() <= 0.02 * near.sum() + 2


def test_hole_is_a_hole():
    outline = shapes_draw.OUTLINES["ring"](np.random.RandomState(0), 0)
    patch, _ = shapes_draw.place(outline, 20, 0, 1.0, (50.0, 50.0))
    assert patch.cover[50 - patch.top, 50 - patch.left] == 0 and patch.cover[50 - patch.top, 50 - 17 - patch.left] == 16


@settings(max_examples=150, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_polygons_rasterise_to_the_mask(mask):
    if not mask.any():
        return
    code = segmentation(mask)
    np.testing.assert_array_equal(decode(code, *mask.shape), mask)
    if isinstance(code, list):
        assert all(len(polygon) >= 8 for polygon in code)
        shoelace = sum(abs(np.dot(p[::2], np.roll(p[1::2], 1)) - np.dot(p[1::2], np.roll(p[::2], 1))) / 2 for p in code)
        assert shoelace == mask.sum()
    np.testing.assert_array_equal(decode(segmentation(mask, crowd=True), *mask.shape), mask)


def test_keypoints_follow_the_rules(scenes):
    seen = {0: 0, 1: 0, 2: 0}
    for scene in scenes:
        for number, thing in enumerate(scene.objects, 1):
            assert (thing.keypoints is not None) == (thing.name in ("arrow", "figure"))
            for x, y, v in [] if thing.keypoints is None else thing.keypoints:
                seen[int(v)] += 1
                assert v or (x, y) == (0, 0)
                if v:
                    owner = scene.owner[int(y), int(x)]
                    assert owner == number if v == 2 else owner not in (0, number)
    assert min(seen.values()) >= 5, seen


def test_left_and_right_survive_a_flip():
    """Seen from the front, left is clockwise of the head; a mirrored scene with the two swapped obeys it too."""
    index = {name: j for j, name in enumerate(KEYPOINT_NAMES)}
    checked = 0
    for scene in (render(i, 2, ShapesOptions(classes=("figure", "arrow"), min_size=0.2)) for i in range(6)):
        for thing in scene.objects:
            left, right, neck, hip = (thing.keypoints[index[n]] for n in ("left_hand", "right_hand", "neck", "hip"))
            if min(left[2], right[2], neck[2], hip[2]) > 0:
                up, across = (neck - hip)[:2], (left - right)[:2]
                assert up[0] * across[1] - up[1] * across[0] > 0
                checked += 1
    assert checked > 5


def test_full_preset_is_varied():
    many = [render(i, 0) for i in range(45)]
    things = [t for s in many for t in s.objects if not t.crowd]
    whole = [max(t.box[2] - t.box[0], t.box[3] - t.box[1]) for t in things if t.visible == 1]
    assert max(whole) >= 10 * min(whole)
    assert {t.name for t in things} == set(THING_IDS)
    assert {int(id_) for s in many for id_ in np.unique(s.stuff)} == set(STUFF_IDS.values())
    assert any(t.crowd for s in many for t in s.objects)
    assert any(not s.objects for s in many)
    assert any(t.visible < 0.7 * t.in_frame for t in things) and any(t.in_frame < 0.9 for t in things)


def test_objects_touch_without_hiding_each_other():
    options = ShapesOptions(preset="easy", max_objects=4, touching=1, occlusion=0, empty=0, crowd=0)
    many = [render(i, 0, options) for i in range(12)]
    assert sum(_pairs_that_touch(s) for s in many) > 0.3 * sum(len(s.objects) - 1 for s in many)


def _pairs_that_touch(scene: Scene) -> int:
    owner = scene.owner
    pairs = [*zip(owner[:, :-1].ravel(), owner[:, 1:].ravel()), *zip(owner[:-1].ravel(), owner[1:].ravel())]
    return len({frozenset(pair) for pair in pairs if 0 not in pair and pair[0] != pair[1]})


@pytest.mark.parametrize("occlusion", [0.0, 0.35])
def test_no_more_is_hidden_than_allowed(occlusion):
    options = ShapesOptions(preset="easy", max_objects=9, occlusion=occlusion, crowd=0.5)
    shares = [t.visible for i in range(15) for t in render(i, 0, options).objects]
    assert min(shares) >= 1 - occlusion
    assert min(shares) < 1 or occlusion == 0


def test_unlikely_sizes():
    for size in ((32, 200), (33, 32), (300, 40)):
        options = ShapesOptions(size=size, min_size=0.3, max_objects=3)
        assert all(render(i, 0, options).image.shape == (*size, 3) for i in range(4))


@pytest.mark.parametrize("bad", [{"size": (16, 64)}, {"size": (64, 64, 3)}, {"classes": ("disk",)}, {"classes": ()},
                                 {"max_objects": 0}, {"min_size": 0.01}, {"max_size": 0.01}, {"occlusion": 1.0},
                                 {"crowd": 1.5}, {"empty": -0.1}, {"preset": "hard"}])
def test_bad_options_are_refused_by_name(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} must") as error:
        ShapesOptions(**bad)
    assert repr(value) in str(error.value)


# --- what is written


@pytest.mark.parametrize("split", ["train", "val"])
def test_ground_truth_as_detections_scores_one(folder, split):
    truth = load(folder / f"annotations/instances_{split}.json")
    assert len(truth.getImgIds()) == {"train": 16, "val": 6}[split]
    plain = [a for a in truth.dataset["annotations"] if not a["iscrowd"]]
    results = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0,
                "segmentation": truth.annToRLE(a)} for a in plain]
    for kind in ("bbox", "segm"):
        with contextlib.redirect_stdout(io.StringIO()):
            run = COCOeval(truth, truth.loadRes(results), kind)
            run.evaluate(), run.accumulate(), run.summarize()
        assert run.stats[0] == run.stats[1] == 1.0


def test_coco_annotations_are_those_of_the_scenes(folder):
    truth = load(folder / "annotations/instances_train.json")
    for image in truth.dataset["images"]:
        scene = render(image["id"] - 1, 7, SMALL)
        assert (image["height"], image["width"]) == scene.image.shape[:2] == SMALL.size
        picture = cv2.imread(str(folder / "train" / image["file_name"]))[..., ::-1]
        assert np.abs(picture.astype(int) - scene.image).mean() < 6  # JPEG
        for annotation, thing in zip(truth.imgToAnns[image["id"]], scene.objects, strict=True):
            np.testing.assert_array_equal(decode(annotation["segmentation"], *SMALL.size), thing.mask)
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == thing.box and annotation["area"] == thing.mask.sum()
            assert annotation["category_id"] == THING_IDS[thing.name]


def test_category_ids_have_gaps_and_crowds_are_rle_lists(folder):
    truth = load(folder / "annotations/instances_train.json")
    ids = [c["id"] for c in truth.dataset["categories"]]
    assert ids == [THING_IDS[name] for name in SMALL.classes] and max(ids) > len(ids)
    crowds = [a for a in truth.dataset["annotations"] if a["iscrowd"]]
    assert crowds and all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    kinds = {type(a["segmentation"]) for a in truth.dataset["annotations"] if not a["iscrowd"]}
    assert kinds == {list, dict}


def test_splits_share_no_image(folder):
    train, val = (load(folder / f"annotations/instances_{split}.json").getImgIds() for split in ("train", "val"))
    assert not set(train) & set(val)
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for s in ("train", "val") for p in (folder / s).glob("*.jpg")]
    assert len(set(hashes)) == len(hashes) == 22


def test_panoptic_and_semantic_maps_agree_with_their_json(folder):
    panoptic = json.loads((folder / "annotations/panoptic_train.json").read_text())
    names = {c["id"]: (c["name"], c["isthing"]) for c in panoptic["categories"]}
    assert all(names[id_] == (name, 0) for name, id_ in STUFF_IDS.items())
    for annotation in panoptic["annotations"]:
        pixels = cv2.imread(str(folder / "annotations/panoptic_train" / annotation["file_name"]))[..., ::-1].astype(int)
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        path = folder / "annotations/semantic_train" / annotation["file_name"]
        semantic = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        areas = dict(zip(*(v.tolist() for v in np.unique(ids, return_counts=True))))
        assert areas == {s["id"]: s["area"] for s in annotation["segments_info"]} and 0 not in areas
        for segment in annotation["segments_info"]:
            y, x = np.nonzero(ids == segment["id"])
            assert segment["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert set(semantic[y, x]) == {segment["category_id"]} and segment["category_id"] in names


def test_voc_agrees_with_coco(folder):
    truth = load(folder / "annotations/instances_train.json")
    stems = (folder / "voc/ImageSets/Main/train.txt").read_text().split()
    assert len(stems) == 16
    flags = set()
    for stem in stems:
        assert (folder / f"voc/JPEGImages/{stem}.jpg").read_bytes() == (folder / f"train/{stem}.jpg").read_bytes()
        root = ElementTree.parse(folder / f"voc/Annotations/{stem}.xml").getroot()
        assert [root.findtext(f) for f in ("filename", "size/height", "size/width")] == [f"{stem}.jpg", "96", "128"]
        for node, annotation in zip(root.iter("object"), truth.imgToAnns[int(stem)], strict=True):
            x, y, w, h = annotation["bbox"]
            corners = [int(node.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            assert corners == [x + 1, y + 1, x + w, y + h]
            assert node.findtext("name") == truth.cats[annotation["category_id"]]["name"]
            flags |= {(tag, node.findtext(tag)) for tag in ("difficult", "truncated", "occluded")}
            assert node.findtext("difficult") == "1" or not annotation["iscrowd"]
    assert flags == {(tag, value) for tag in ("difficult", "truncated", "occluded") for value in "01"}


def test_second_run_does_nothing_and_says_so(folder, capsys):
    before = (folder / "train/000000000001.jpg").stat().st_mtime_ns
    write_shapes(folder, 16, 7, options=SMALL, val_images=6)
    assert "already holds" in capsys.readouterr().out
    assert (folder / "train/000000000001.jpg").stat().st_mtime_ns == before


def test_interrupted_run_is_written_anew(tmp_path, monkeypatch):
    from detres.data import shapes

    whole = write_shapes(tmp_path / "whole", 4, options=SMALL, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "render", lambda index, *rest: render(index, *rest) if index < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_shapes(tmp_path / "cut", 4, options=SMALL, progress=False)
    (tmp_path / "cut/train/000000000002.jpg").write_bytes(b"half a fi")
    cut = write_shapes(tmp_path / "cut", 4, options=SMALL, progress=False)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(cut) for p in cut.rglob("*") if p.is_file())
    assert all((cut / f).read_bytes() == (whole / f).read_bytes() for f in files)


def test_other_contents_are_never_overwritten(folder, tmp_path):
    with pytest.raises(ValueError, match=r"images=16 \(asked: 17\)"):
        write_shapes(folder, 17, 7, options=SMALL, val_images=6, progress=False)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder"):
        write_shapes(tmp_path, 2, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_formats_are_written_as_asked(tmp_path):
    coco = write_shapes(tmp_path / "coco", 1, options=SMALL, val_images=0, formats=("coco",), progress=False)
    voc = write_shapes(tmp_path / "voc", 1, options=SMALL, val_images=0, formats=("voc",), progress=False)
    assert not (coco / "voc").exists() and not (voc / "annotations").exists()


@pytest.mark.parametrize("bad", [{"images": 0}, {"seed": -1}, {"val_images": -1}, {"formats": ("yolo",)},
                                 {"formats": ()}])
def test_bad_requests_are_refused_by_name(bad, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        write_shapes(tmp_path / "bad", **{"images": 1, **bad}, progress=False)
    assert not (tmp_path / "bad").exists()
