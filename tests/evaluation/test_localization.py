"""Localization error of models, from tensors and from weights, through the command line."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import detres
from detres.cli import main
from detres.config import Config
from detres.data.dataset import Annotation, Dataset, ImageRecord, load_dataset
from detres.engine.interrupt import Interrupt
from detres.engine.tasks import localization
from detres.engine.train import train
from detres.evaluation.base import EvalResult
from detres.evaluation.localization import (LocTruths, Pictures, evaluate_localizer, first_boxes, guess_classes,
                                            localize_weights)
from detres.models.localizer import Localizer
from detres.structures import Batch, ImageBatch, Proposals


def record(name: str, label: int | None, *boxes, other: int | None = None) -> ImageRecord:
    items = tuple(Annotation(i, label if other is None else other, box) for i, box in enumerate(boxes))
    return ImageRecord(name, Path(f"{name}.jpg"), 100, 200, items, label)


def test_errors_by_hand():
    """Images at a quarter of their width and half their height; c is on the blacklist, d has no box: both count for
    classification only."""
    dataset = Dataset("hand", "table", ("x", "y"), (0, 1), (
        record("a", 0, (0, 0, 100, 100)), record("b", 1, (10, 10, 50, 50), (100, 0, 200, 100)),
        record("c", 1, (0, 0, 10, 10)), record("d", 0)), blacklist=(("c", "y"),))
    truths = LocTruths.of(dataset, torch.device("cpu"))
    assert truths.counted.tolist() == [True, True, False, False] and truths.valid.sum(1).tolist() == [1, 2, 1, 0]
    guesses = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])
    boxes = {"a": {0: (0, 0, 25, 26), 1: (0, 0, 9, 9)}, "b": {1: (25, 0, 50, 50), 0: (2.5, 5, 12.5, 25)},
             "c": {1: (0, 0, 1, 1), 0: (0, 0, 1, 1)}, "d": {0: (0, 0, 1, 1), 1: (0, 0, 1, 1)}}

    def locate(images: ImageBatch, labels: torch.Tensor) -> Proposals:
        found = torch.tensor([[boxes[name][label] for label in row] for name, row in zip(names, labels.tolist())])
        return Proposals(found[:, :, None].float(), torch.ones(*labels.shape, 1),
                         torch.ones(*labels.shape, 1, dtype=torch.bool))

    seen = []
    names = ("b", "a", "d", "c")  # in any order
    batch = Batch(ImageBatch(torch.zeros(4, 3, 50, 50, dtype=torch.uint8), torch.tensor([[50, 50]] * 4)), None, names,
                  names, torch.tensor([[100, 200]] * 4))
    result = evaluate_localizer(locate, [batch], truths, dataset.classes, guesses,
                                losses=lambda batch: {"loss_x": torch.tensor(2.0)},
                                seen=lambda *each: seen.append(each))
    assert result.metrics == {"loc/top1_error": 0.5, "loc/top5_error": 0.0, "loc/gt_class_error": 0.0,
                              "loc/cls_top1_error": 0.5, "loc/cls_top5_error": 0.0, "val/loss_x": 2.0}
    assert seen[0][1].tolist() == [[1, 0, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0]]
    assert seen[0][2][0].tolist() == [[100, 0, 200, 100], [10, 10, 50, 50], [100, 0, 200, 100]]
    alone = evaluate_localizer(locate, [batch], truths, dataset.classes)
    assert alone.metrics == {"loc/gt_class_error": 0.0} and alone.per_class["y"] == {"loc/gt_class_error": 0.0}


def test_difficult_objects_count_as_in_the_kit():
    easy, hard = record("a", 0, (0, 0, 9, 9)), record("b", 0, (0, 0, 9, 9), (50, 50, 90, 90))
    hard = replace(hard, annotations=tuple(replace(item, difficult=True) for item in hard.annotations))
    truths = LocTruths.of(Dataset("hand", "ilsvrc", ("x",), (0,), (easy, hard)), torch.device("cpu"))
    assert truths.counted.all() and truths.valid.sum(1).tolist() == [1, 2]


def test_without_a_candidate_the_box_is_all_of_the_image():
    """The image of 100 x 200 pixels is seen at a quarter of its height and half its width."""
    batch = Batch(ImageBatch(torch.zeros(1, 3, 32, 128), torch.tensor([[25, 100]])), None, ("a",), ("a",),
                  torch.tensor([[100, 200]]))
    found = Proposals(torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8]], [[0, 0, 0, 0], [5, 6, 7, 8]]]]),
                      torch.tensor([[[0.9, 0.8], [0.0, 0.0]]]), torch.tensor([[[True, True], [False, False]]]))
    assert first_boxes(found, batch).tolist() == [[[2, 8, 6, 16], [0, 0, 200, 100]]]


def test_images_must_be_of_one_class():
    for bad in (replace(record("a", 0, (0, 0, 9, 9)), label=None), record("a", 0, (0, 0, 9, 9), other=1)):
        with pytest.raises(ValueError, match="of one class each .* for a.jpg"):
            LocTruths.of(Dataset("bad", "coco", ("x", "y"), (0, 1), (bad,)), torch.device("cpu"))


# From training to error and pictures


@pytest.fixture(scope="module")
def configs(located_shapes, tmp_path_factory) -> dict[str, Config]:
    folder, source = tmp_path_factory.mktemp("runs"), {"path": str(located_shapes)}
    backbone = {"depth": 18, "width": 8, "weights": None, "norm": "bn", "freeze_stages": 0, "layout": "c5"}

    def config(name: str, **data) -> Config:
        model = {"name": name, "input": {"min_size": 64, "max_size": 64, "crop": 32 if "region" in name else 64},
                 "backbone": backbone, "anchors": {"sizes": [[32]]}, "rpn": {"post_nms_topk_test": 4},
                 "box_head": {"batch_per_image": 4, "context": 4}}
        return Config.model_validate({
            "output": str(folder / name), "device": "cpu", "model": model,
            "data": {"train": source, "val": source, "workers": 0, **data}, "eval": {"batch_size": 15},
            "train": {"batch_size": 4, "reference_batch_size": 4, "steps": 4, "precision": "fp32", "accumulate": 2,
                      "checkpoint_every": 2, "log_every": 2}})

    made = {name: config(name) for name in ("localizer", "classifier")}
    made["region_classifier"] = config("region_classifier", proposals=made["localizer"].output)
    for each in made.values():
        train(each)
    return made


def test_command_line(configs, tmp_path, capsys, monkeypatch):
    """Everything at once, ensembles of two, other views; pictures of the first images, also of the second batch."""
    monkeypatch.setattr("detres.evaluation.localization.PICTURES", 20)
    runs = {name: config.output for name, config in configs.items()}
    assert main(["localize", runs["localizer"], "--json", str(tmp_path / "alone.json")]) == 0
    assert list(json.loads((tmp_path / "alone.json").read_text())) == ["loc/gt_class_error"]
    capsys.readouterr()
    assert main(["localize", runs["localizer"], runs["localizer"], "model.rpn.nms_thresh=0.5", "--classifier",
                 runs["classifier"], runs["classifier"], "--regions", runs["region_classifier"], "--crops", "dense",
                 "--class-crops", "10", "--draw", str(tmp_path / "pictures"),
                 "--json", str(tmp_path / "all.json")]) == 0
    metrics = json.loads((tmp_path / "all.json").read_text())
    assert set(metrics) == {"loc/top1_error", "loc/top5_error", "loc/gt_class_error", "loc/cls_top1_error",
                            "loc/cls_top5_error"}
    assert metrics["loc/cls_top5_error"] == 0 and metrics["loc/top5_error"] == metrics["loc/gt_class_error"]
    assert "30 images, 30 with boxes that count, crops dense" in capsys.readouterr().out
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 20


def test_training_reports_what_the_command_measures(configs):
    runs = {name: Path(config.output) for name, config in configs.items()}
    told = {name: json.loads((run / "results.json").read_text()) for name, run in runs.items()}
    for regions in ([], [runs["region_classifier"]]):
        (error,) = localize_weights([runs["localizer"]], regions=regions, device="cpu").values()
        assert error == told["region_classifier" if regions else "localizer"]["loc/gt_class_error"]


def test_a_region_classifier_is_validated_on_its_localizers_boxes(configs, monkeypatch):
    asked, model = [], torch.nn.Identity()
    monkeypatch.setattr("detres.engine.tasks.evaluate_localizer", lambda locate, *_, **__: asked.append(locate) or
                        EvalResult({}))
    localization(configs["region_classifier"], torch.device("cpu"), Interrupt()).validate(model)
    (locate,) = asked
    assert isinstance(locate.args[0], Localizer) and locate.keywords["regions"] is model
    assert locate.keywords["crop"] == 64, "the localizer's; the regions' is 32"


def test_images_without_a_box_do_not_train(tmp_path, located_shapes):
    """A quarter of the rows are boxes a pixel wide, which `on_invalid: drop` leaves out."""
    lines = (located_shapes / "boxes.csv").read_text().splitlines()
    rows = [line.rsplit(",", 2)[0] + f",{line.split(',')[4]},{line.split(',')[-1]}" if i % 4 == 1 else line
            for i, line in enumerate(lines)]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    (tmp_path / "classes.txt").write_text((located_shapes / "classes.txt").read_text())
    (tmp_path / "images").symlink_to(located_shapes / "images")
    config = Config.model_validate({
        "model": {"name": "localizer", "backbone": {"layout": "c5"}, "anchors": {"sizes": [[32]]},
                  "input": {"min_size": 64, "max_size": 64}},
        "data": {"train": str(tmp_path), "workers": 0, "on_invalid": "drop"}, "train": {"batch_size": 60}})
    task = localization(config, torch.device("cpu"), Interrupt())
    batches = list(itertools.islice(task.loader(0), 3))
    assert all(batch.targets.valid.any(1).all() for batch in batches)
    assert len({name for batch in batches for name in batch.image_ids}) == 180


def test_guesses_are_what_the_classifier_predicts(configs):
    """By another way: image by image, by the classes' names."""
    config = configs["classifier"]
    dataset = load_dataset(config.data.val, "val")
    found = guess_classes([config.output], dataset, 7, "cpu", [])
    model = detres.load(config.output, device="cpu")
    for guesses, record in zip(found.tolist(), dataset.records, strict=True):
        assert [dataset.classes[label] for label in guesses] == model.predict(record.path).names


def test_ticks_are_for_guesses_with_class_and_place_right(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Pictures, "_save", lambda self, path, boxes, objects, names: drawn.append((boxes, names)))
    dataset = Dataset("hand", "table", ("x", "y"), (0, 1), (record("a", 1, (0, 0, 100, 100)),))
    pictures = Pictures(tmp_path, dataset, LocTruths.of(dataset, torch.device("cpu")))
    batch = Batch(ImageBatch(torch.zeros(1, 3, 8, 8), torch.tensor([[8, 8]])), None, ("a",), ("a.jpg",),
                  torch.tensor([[100, 200]]))
    right, wrong = [0.0, 0, 100, 90], [150.0, 0, 200, 90]
    pictures(batch, torch.tensor([[1, 0, 1, 1]]), torch.tensor([[wrong, right, right, wrong]]))
    ((boxes, names),) = drawn
    assert names == ["true: y", "1 x", "2 y ✓", "3 y"] and boxes.tolist() == [[0, 0, 100, 100], right, right, wrong]


def test_region_training_resumes_to_the_same_bits(configs, tmp_path, monkeypatch):
    """Proposals are found anew: nothing of them is in the checkpoint."""
    config = configs["region_classifier"].model_copy(update={"output": str(tmp_path / "run")})
    checks = iter([False, False, True])  # before the steps
    monkeypatch.setattr(Interrupt, "check", lambda self: next(checks) and _raise())
    with pytest.raises(SystemExit):
        train(config)
    monkeypatch.undo()
    train(config, resume=True)
    weights = [Path(folder, "checkpoints", "final.safetensors") for folder in (config.output,
                                                                               configs["region_classifier"].output)]
    first, second = (path.read_bytes()[-20000:] for path in weights)
    assert first == second


def _raise() -> None:
    from detres.engine.interrupt import Interrupted

    raise Interrupted


@pytest.mark.parametrize("command, told", [
    (["localize", "{classifier}"], "must be of a localizer, got a classifier"),
    (["localize", "{localizer}", "--regions", "{localizer}"], "must be of a region_classifier, got a localizer"),
    (["localize", "{localizer}", "--classifier", "{localizer}"], "must be of a classifier, got a localizer"),
    (["eval", "{localizer}"], "got a localizer"),
    (["predict", "{region_classifier}", "{data}"], "got a region_classifier")])
def test_weights_of_another_kind_are_refused(configs, located_shapes, capsys, command, told):
    runs = {name: config.output for name, config in configs.items()}
    assert main([part.format(**runs, data=located_shapes / "images") for part in command]) == 1
    assert told in capsys.readouterr().err


def test_region_classifier_needs_a_localizer(configs):
    config = configs["region_classifier"]
    data = config.data.model_copy(update={"proposals": None})
    with pytest.raises(ValueError, match="data.proposals must be given"):
        train(config.model_copy(update={"data": data, "output": config.output + "_none"}))
    model = config.model.model_copy(update={"input": config.model.input.model_copy(update={"min_size": 48})})
    with pytest.raises(ValueError, match="must have model.input.min_size 48 to work with the others, got 64"):
        train(config.model_copy(update={"model": model, "output": config.output + "_small"}))
