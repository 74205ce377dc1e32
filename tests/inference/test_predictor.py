"""Images in any form, detections in their own pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from detres.build import build_model
from detres.config import Config, InputConfig
from detres.engine.checkpoint import WeightsMeta, load_weights, save_weights
from detres.inference import predictor as predictor_module
from detres.inference.predictor import Predictor, load_predictor

RED = (255, 0, 0)
BOX = (20, 30, 80, 90)


def picture(height=120, width=160, box=BOX) -> np.ndarray:
    image = np.full((height, width, 3), 60, np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = RED
    return image


@pytest.fixture
def predictor(red_finder):
    return Predictor(red_finder, ("red", "dull"), (7, 30), InputConfig(min_size=60, max_size=300))


def test_boxes_and_masks_are_in_pixels_of_the_image(predictor):
    out = predictor.predict(picture())
    assert len(out) == 1 and out.names == ["red"] and out.category_ids == [7] and out.labels.tolist() == [0]
    assert out.boxes[0].tolist() == pytest.approx(BOX, abs=2) and out.boxes.dtype == torch.float32
    assert out.masks.shape == (1, 120, 160) and out.masks.dtype == torch.bool
    inside = np.zeros((120, 160), bool)
    inside[30:90, 20:80] = True
    mask = out.masks[0].numpy()
    assert (mask & inside).sum() / (mask | inside).sum() > 0.85


@pytest.mark.parametrize("cause", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_and_what_to_do(predictor, monkeypatch, tmp_path, cause):
    def greedy(*_, **options):
        raise cause

    Image.fromarray(picture()).save(tmp_path / "image.png")
    for module, name in ((predictor.model, "forward"), (predictor_module, "paste_masks")):  # each alone
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as error:
            patch.setattr(module, name, greedy)
            predictor.predict([tmp_path / "image.png", picture(300, 90), picture()], batch_size=2)
        told = str(error.value)
        assert "ran out with 2 images on a canvas of 224x96 pixels" in told and "originals up to 300x90" in told
        assert "image.png\n  an array\n" in told and "batch_size=1 (--batch-size 1)" in told and "max_size" in told
        assert "device" not in told and error.value.__cause__ is cause  # it is on the CPU already
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as error:
        patch.setattr(predictor.model, "forward", greedy)
        predictor.predict([picture()], paths=["a.jpg"])
    assert "a.jpg" in str(error.value) and "batch_size" not in str(error.value)


def test_every_form_of_an_image_gives_the_same(predictor, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "image.png")
    forms = [tmp_path / "image.png", str(tmp_path / "image.png"), Image.open(tmp_path / "image.png"), picture()]
    outs = [predictor.predict(form) for form in forms]
    for out in outs[1:]:
        assert torch.equal(out.boxes, outs[0].boxes) and torch.equal(out.masks, outs[0].masks)
    assert outs[0].path == str(tmp_path / "image.png") and outs[3].path is None
    assert np.array_equal(outs[0].image, picture())


def test_a_list_is_run_in_padded_batches(predictor):
    images = [picture(), picture(200, 90, (5, 100, 50, 180)), picture(50, 300, (10, 10, 200, 40))]
    together = predictor.predict(images, batch_size=2)
    assert predictor.model.batches == [2, 1]
    for out, image in zip(together, images):
        assert out.image.shape == image.shape and out.masks.shape[1:] == image.shape[:2]
        assert out.boxes[0].tolist() == pytest.approx(predictor.predict(image).boxes[0].tolist(), abs=1e-3)
    assert predictor.predict([]) == [] and isinstance(predictor.predict([picture()]), list)


def test_thresholds_and_sizes(predictor):
    assert len(predictor.predict(picture(), score_thresh=0.0)) == 2  # the second one has 0.3
    assert predictor.predict(picture(), 0.0).above(0.5).names == ["red"]
    predictor.predict(picture(), min_size=30)
    assert predictor.model.sizes[-1] == [30, 40]
    predictor.predict(picture(), max_size=40)
    assert predictor.model.sizes[-1] == [30, 40]
    with pytest.raises(ValueError, match="min_size"):
        predictor.predict(picture(), min_size=0)


def test_nothing_found_and_odd_images(predictor):
    out = predictor.predict(np.zeros((40, 60, 3), np.uint8), 0.4)
    assert len(out) == 0 and out.boxes.shape == (0, 4) and out.masks.shape == (0, 40, 60)
    assert out.to_coco(1) == [] and out.draw().size == (480, 320) and "nothing" in repr(out)
    for size in ((1, 200), (200, 1)):
        assert predictor.predict(np.zeros((*size, 3), np.uint8)).image.shape[:2] == size


def test_coco_and_numpy(predictor):
    out = predictor.predict(picture(), score_thresh=0.0)
    first, second = out.to_coco("some image")
    assert (first["image_id"], first["category_id"], second["category_id"]) == ("some image", 7, 30)
    assert first["bbox"][2] == pytest.approx(60, abs=2) and first["score"] == pytest.approx(0.9)
    assert np.array_equal(rle.decode(first["segmentation"]), out.masks[0].numpy())
    arrays = out.numpy()
    assert arrays["boxes"].shape == (2, 4) and arrays["labels"].tolist() == [0, 1] and arrays["masks"].dtype == bool
    assert repr(out) == "Prediction(image, 120x160 pixels: 1 red, 1 dull)"
    assert out[1:].names == ["dull"] and out[[1, 0]].scores.tolist() == out.scores.flip(0).tolist()


def test_a_model_without_masks(predictor):
    predictor.model.with_masks = False
    out = predictor.predict(picture())
    assert out.masks is None and out.numpy()["masks"] is None and "segmentation" not in out.to_coco(1)[0]
    assert out.draw().size == (480, 360)


def test_what_is_no_image_is_refused(predictor, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for wrong in (tmp_path / "broken.jpg", tmp_path / "absent.jpg"):
        with pytest.raises((ValueError, OSError), match=wrong.name):
            predictor.predict(wrong)
    for wrong in (np.zeros((5, 5, 7), np.uint8), np.zeros((5, 5, 3), np.float32), 3):
        with pytest.raises((ValueError, TypeError), match="uint8|image"):
            predictor.predict(wrong)


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    """A weights file of a small Mask R-CNN, untrained."""
    config = Config.model_validate({"model": {
        "name": "mask_rcnn", "input": {"min_size": 64, "max_size": 128}, "fpn": {"channels": 16},
        "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "bn", "freeze_stages": 0},
        "box_head": {"fc_dim": 16, "score_thresh": 0.0, "detections_per_image": 5},
        "mask_head": {"channels": 16, "convs": 1}}})
    model = build_model(config.model, 2)
    meta = WeightsMeta(config.model_dump(mode="json"), ("cat", "dog"), (4, 9), step=3, metrics={})
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "best.safetensors"
    save_weights(path, model.state_dict(), meta)
    return path


def test_a_weights_file_or_a_run_folder_is_all_that_is_needed(small_weights):
    outs = [load_predictor(place, "cpu").predict(picture(), score_thresh=0.0)
            for place in (small_weights, small_weights.parent.parent)]
    assert 1 <= len(outs[0]) <= 5 and set(outs[0].category_ids) <= {4, 9} and set(outs[0].names) <= {"cat", "dog"}
    assert outs[0].masks.shape == (len(outs[0]), 120, 160) and torch.equal(outs[0].boxes, outs[1].boxes)
    assert (outs[0].boxes[:, 2:] <= torch.tensor([160, 120])).all() and outs[0].draw().size == (480, 360)


def test_weights_that_do_not_fit_are_named(small_weights, tmp_path):
    tensors, meta = load_weights(small_weights)
    save_weights(tmp_path / "old.safetensors", tensors, replace(meta, classes=("cat",), category_ids=(4,)))
    with pytest.raises(ValueError, match="old.safetensors.*(.|\n)*another version"):
        load_predictor(tmp_path / "old.safetensors", "cpu")
