"""Prediction of files, folders and globs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from detres.config import InputConfig
from detres.inference import run
from detres.inference.predictor import Predictor
from detres.inference.run import UnreadableImages, find_images, picture_names, predict_files


@pytest.fixture
def weights(monkeypatch, red_finder):
    """A weights file is not needed: the model is the one that finds red."""
    predictor = Predictor(red_finder, ("red", "dull"), (7, 30), InputConfig(min_size=60, max_size=300))
    monkeypatch.setattr(run, "load_predictor", lambda path, device, overrides: predictor)
    return "weights.safetensors"


def save(path, box=(10, 10, 30, 40)):
    image = np.full((60, 80, 3), 60, np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = (255, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def test_pictures_and_json(weights, tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "deep" / "b.jpg", (40, 20, 70, 50))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    path = predict_files(weights, [tmp_path / "in"], tmp_path / "out", batch_size=1)
    entries = json.loads(path.read_text())
    assert [entry["picture"] for entry in entries] == ["a.png", "b.jpg"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.jpg", "predictions.json"]
    first = entries[0]
    assert (first["file"], first["height"], first["width"]) == (str(tmp_path / "in" / "a.png"), 60, 80)
    found, = first["detections"]
    assert (found["name"], found["category_id"]) == ("red", 7) and found["score"] == pytest.approx(0.9)
    assert found["box"] == pytest.approx([10, 10, 30, 40], abs=2)
    assert rle.decode(found["segmentation"]).shape == (60, 80)
    assert Image.open(tmp_path / "out" / "a.png").size == (480, 360)


def test_unreadable_images_are_named_at_the_end_and_the_others_done(weights, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"broken")
    save(tmp_path / "c.png")
    with pytest.raises(UnreadableImages, match="1 image.s. could not be read(.|\n)*b.jpg") as error:
        predict_files(weights, [tmp_path / "*.*g"], tmp_path / "out")
    assert error.value.paths == (tmp_path / "b.jpg",)
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["picture"] for entry in entries] == ["a.png", "c.png"]


def test_inputs_are_found_once_and_in_order(tmp_path):
    for name in ("b.jpg", "a.png", "sub/c.JPG", "out/old.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    inputs = [tmp_path / "b.jpg", tmp_path, str(tmp_path / "**" / "*.JPG")]
    assert [p.name for p in find_images(inputs, skip=tmp_path / "out")] == ["b.jpg", "a.png", "c.JPG"]
    for wrong in ("absent.jpg", "*.gif"):
        with pytest.raises(FileNotFoundError, match="matches none"):
            find_images([tmp_path / wrong])


def test_files_that_share_a_stem_get_pictures_of_their_own(tmp_path):
    files = [tmp_path / name for name in ("x/a.jpg", "y/a.jpg", "a.png", "a_2.jpg", "b.bmp")]
    names = list(picture_names(files).values())
    assert names[0] == "a.jpg" and names[3:] == ["a_2.jpg", "b.jpg"]
    assert len({name.rpartition(".")[0] for name in names}) == 5


def test_inputs_are_never_overwritten(weights, tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="pictures must not replace"):
        predict_files(weights, [tmp_path / "a.png"], tmp_path)
