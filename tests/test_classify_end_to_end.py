"""Classification as a user does it: folders of images, training, tests of the paper, ensemble, prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import functional as TF

import detres
from detres.cli import main
from detres.config_file import load_config
from detres.engine.interrupt import Interrupt
from detres.engine.tasks import classification
from detres.engine.train import train
from detres.evaluation.base import EvalResult
from detres.evaluation.class_tests import predict_views
from detres.evaluation.run import evaluate_weights
from detres.structures import ImageBatch

CLASSES = {"blue_disc": ("#3355cc", 1.0), "red_disc": ("#cc4433", 1.0), "red_bar": ("#cc4433", 0.25)}  # width : height
OPTIONS = ["model.name=classifier", "model.input.min_size=36", "model.input.crop=32", "model.backbone.depth=8",
           "model.backbone.stem=cifar", "model.backbone.width=8", "model.backbone.shortcut=A",
           "model.backbone.weights=null", "model.backbone.norm=bn", "model.backbone.freeze_stages=0",
           "data.classification.scales=[34,42]", "data.classification.pca_colour=0.1",
           "data.workers=0", "train.batch_size=16", "train.reference_batch_size=16", "train.lr=0.05",
           "train.warmup_steps=5", "train.schedule=cosine", "train.precision=fp32", "eval.batch_size=8"]


def write_shapes(folder: Path) -> Path:
    """Discs and bars on noise, of two colours: neither colour nor shape tells the class alone."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 12)):
        for name, (color, ratio) in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 60, 2)
                picture = Image.fromarray(rng.integers(60, 200, (height, width, 3), np.uint8))
                side, (y, x) = int(rng.integers(18, 26)), rng.integers(6, 14, 2)
                ImageDraw.Draw(picture).ellipse((x, y, x + ratio * side, y + side), fill=color)
                picture.save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    data, config = write_shapes(folder / "data"), folder / "config.yaml"
    config.write_text("train: {steps: 40}\n")
    paths = [f"data.train={data}", f"data.val={data}", f"output={folder / 'run'}"]
    assert main(["train", str(config), *OPTIONS, *paths]) == 0
    return folder / "run"


def test_reaches_its_accuracy(run):
    results = json.loads((run / "results.json").read_text())
    assert results["cls/top1"] >= 0.9 and results["cls/top1_error"] == pytest.approx(1 - results["cls/top1"])
    assert {"cls/top5", "val/loss_cls"} <= set(results)


@pytest.mark.parametrize("overrides", [
    [], ["eval.crops=10"], ["eval.crops=dense", "eval.test_scales=[32,36,48]", "eval.batch_size=4"]])
def test_tests_of_the_paper(run, tmp_path, capsys, overrides):
    assert main(["eval", str(run), *overrides, "--json", str(tmp_path / "numbers.json")]) == 0
    printed = capsys.readouterr().out
    assert "data val: 36 images" in printed and "top1_error" in printed and "red_bar" in printed
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["cls/top1"] >= 0.9
    if not overrides:
        assert numbers["cls/top1"] == json.loads((run / "results.json").read_text())["cls/top1"]
        assert evaluate_weights([run, run]) == pytest.approx(numbers)  # an ensemble of twins


def test_ten_crops_by_torchvision(run):
    """Five crops and their mirror images, one at a time through the network, whose probabilities are averaged."""
    files = sorted((run.parent / "data" / "val").glob("*/*.png"))
    model, losses = detres.load(run, overrides=["eval.crops=10"]), []
    for file in files:
        crops = TF.five_crop(TF.resize(Image.open(file), 36), 32)
        views = [*crops, *map(TF.hflip, crops)]  # of a mirrored image its ten_crop takes another centre, a pixel away
        pixels = [torch.from_numpy(np.array(view)).permute(2, 0, 1)[None] for view in views]
        with torch.no_grad():
            logits = [model.model(ImageBatch(view, torch.tensor([[32, 32]]))) for view in pixels]
        mean = torch.cat(logits).softmax(1).mean(0)
        losses.append(-mean[model.classes.index(file.parent.name)].log().item())
        found = model.predict(file)
        torch.testing.assert_close(found.probabilities, mean[found.labels], atol=1e-5, rtol=1e-4)
    numbers = evaluate_weights(run, overrides=["eval.crops=10"])
    assert numbers["val/loss_cls"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_training_validates_by_the_test_of_the_config(run, monkeypatch):
    asked, data = [], run.parent / "data"
    monkeypatch.setattr("detres.engine.tasks.evaluate_classifier", lambda *_, test, **__: asked.append(test) or
                        EvalResult({}))
    config = load_config(None, [*OPTIONS, f"data.train={data}", f"data.val={data}", "eval.crops=10"]).config
    classification(config, torch.device("cpu"), Interrupt()).validate(torch.nn.Identity())
    assert asked[0].func is predict_views


def test_whole_images_do_not_depend_on_their_batch(run):
    dense = ["eval.crops=dense", "eval.test_scales=[32,48]"]
    assert evaluate_weights(run, overrides=dense, batch_size=1) == pytest.approx(
        evaluate_weights(run, overrides=dense, batch_size=16), abs=1e-6)


@pytest.mark.parametrize("overrides", [[], ["eval.crops=dense"]])
def test_prediction(run, overrides):
    files = sorted((run.parent / "data" / "val" / "red_bar").glob("*.png"))[:3]
    model = detres.load(run, overrides=overrides)
    outs = model.predict(files)
    assert sum(out.names[0] == "red_bar" for out in outs) >= 2
    assert sorted(outs[0].names) == sorted(CLASSES) and outs[0].probabilities.sum().item() == pytest.approx(1)
    assert outs[0].probabilities.tolist() == sorted(outs[0].probabilities.tolist(), reverse=True)
    assert outs[0].path == str(files[0]) and f"{outs[0].names[0]} {outs[0].probabilities[0]:.2f}" in repr(outs[0])
    one = model.predict(Image.open(files[1]), top=1)
    assert one.names == outs[1].names[:1] and one.path is None
    assert one.probabilities.item() == pytest.approx(outs[1].probabilities[0].item(), abs=1e-5)
    picture, plain = np.asarray(one.draw()), np.asarray(Image.open(files[1]))
    assert picture.shape[0] % plain.shape[0] == 0 and max(picture.shape) >= 480


def test_predicted_files(run, tmp_path, capsys):
    images = run.parent / "data" / "val" / "blue_disc"
    assert main(["predict", str(run), str(images), "--out", str(tmp_path / "found")]) == 0
    entries = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert len(entries) == 12 and all((tmp_path / "found" / entry["picture"]).is_file() for entry in entries)
    best = [entry["classes"][0] for entry in entries]
    assert sum(row["name"] == "blue_disc" and row["probability"] > 0.5 for row in best) >= 10
    assert main(["predict", str(run), str(images), "--out", str(tmp_path / "found"), "--score-thresh", "0.3"]) != 0
    assert "score_thresh must be left out for a model without detections, a classifier" in capsys.readouterr().err


def test_what_a_classifier_does_not_have(run, tmp_path, capsys):
    assert main(["eval", str(run), "--save", str(tmp_path / "found.json")]) != 0
    assert "got save=" in capsys.readouterr().err
    (tmp_path / "other" / "green_disc").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "other" / "green_disc" / "0.png")
    assert main(["eval", str(run), "--data", str(tmp_path / "other")]) != 0
    assert "got green_disc in" in capsys.readouterr().err


@pytest.mark.data
def test_imagenette_trains(shared_data, tmp_path):
    """A few steps at small scale."""
    data = shared_data / "imagenette224_mini"
    results = train(load_config(None, [
        *OPTIONS, f"data.train={data}", f"data.val={data}", f"output={tmp_path / 'run'}", "train.steps=3",
        "data.classification.scales=[48,64]", "model.input.min_size=48", "model.input.crop=40"]).config)
    assert 0 <= results["cls/top1"] <= results["cls/top5"] <= 1 and 1 < results["val/loss_cls"] < 10
