"""Evaluation loop with a model that answers from a list."""

from __future__ import annotations

import json
import multiprocessing as mp
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from detres import progress
from detres.build import build_model
from detres.config import Config, SourceConfig
from detres.data.dataset import load_dataset
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.checkpoint import WeightsMeta, load_weights, save_weights
from detres.engine.failures import of_evaluation
from detres.evaluation.coco_files import results_columns, truth_columns
from detres.evaluation.coco_results import evaluate_columns
from detres.evaluation.run import align_classes, build_evaluators, evaluate, evaluate_weights, save_results
from detres.structures import Targets

TRUTHS = {i: [(0, (10, 10, 60, 60)), (1, (5, 5, 30, 90))] for i in (4, 2, 7)}
FOUND = {i: [(0, (10 + i, 10, 60, 60), 0.9), (1, (5, 5, 30, 90), 0.8)] for i in TRUTHS}


class Answers(nn.Module):
    """Gives prepared detections for each batch, and a loss that is the number of images in it."""

    def __init__(self, detections: list):
        super().__init__()
        self.detections, self.weight, self.modes = list(detections), nn.Parameter(torch.zeros(1)), []

    def forward(self, images, targets=None):
        self.modes.append((self.training, torch.is_grad_enabled()))
        if targets is not None:
            return {"loss_cls": self.weight.sum() + len(targets.boxes), "loss_box": torch.tensor(0.5)}
        return self.detections.pop(0)


def model_and_loader(dataset, make_batch, groups):
    pairs = [make_batch(dataset, {i: FOUND[i] for i in group}, masks=True) for group in groups]
    return Answers([found for found, _ in pairs]), [batch for _, batch in pairs]


def with_targets(batch):
    n = len(batch.image_ids)
    empty = Targets(torch.zeros(n, 1, 4), torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.bool),
                    torch.zeros(n, dtype=torch.int64))
    return replace(batch, targets=empty)


def test_all_protocols_and_losses_in_one_result(make_dataset, make_batch):
    dataset = make_dataset(TRUTHS)
    model, loader = model_and_loader(dataset, make_batch, [(4, 2), (7,)])
    model.train()
    evaluators = build_evaluators(dataset, ("coco", "voc"), with_masks=True)
    result = evaluate(model, map(with_targets, loader), evaluators, "cpu", losses=True, progress=False)
    assert {"bbox/AP", "segm/AP", "voc/AP50"} < set(result.metrics)
    assert [name for evaluator in evaluators for name in evaluator.metric_names] == list(result.metrics)[:-2]
    assert result.metrics["val/loss_cls"] == pytest.approx((2 * 2 + 1 * 1) / 3)
    assert result.metrics["val/loss_box"] == 0.5
    assert set(result.per_class["dog"]) > {"bbox/AP", "voc/AP50"} and "loss_cls" in result.table()
    assert set(model.modes) == {(False, False)} and model.training


def test_masks_are_evaluated_where_model_and_data_have_them(make_dataset):
    dataset = make_dataset(TRUTHS)
    boxes_only = make_dataset({1: [(0, (0, 0, 9, 9), {"segmentation": None})]})
    assert build_evaluators(dataset, ("coco",), with_masks=True)[0].iou_types == ("bbox", "segm")
    assert build_evaluators(dataset, ("coco",), with_masks=False)[0].iou_types == ("bbox",)
    assert build_evaluators(boxes_only, ("coco",), with_masks=True)[0].iou_types == ("bbox",)


def test_plain_lines_tell_the_progress(make_dataset, make_batch, capsys, monkeypatch):
    dataset = make_dataset(TRUTHS)
    model, loader = model_and_loader(dataset, make_batch, [(4, 2), (7,)])
    monkeypatch.setattr(progress, "EVERY", 0.0)
    evaluate(model, loader, build_evaluators(dataset, ("voc",), False), "cpu")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("evaluate 2/3 images, ") and lines[-1].endswith("0:00:00 left")


def test_a_terminal_gets_one_live_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track([2, 1], 3, "evaluate", lambda n: n)) == [2, 1]
    assert "evaluate" in capsys.readouterr().err


def test_saved_results_are_a_coco_file(make_dataset, make_batch, tmp_path):
    dataset = make_dataset(TRUTHS)
    model, loader = model_and_loader(dataset, make_batch, [(4, 2, 7)])
    evaluator, = build_evaluators(dataset, ("coco",), with_masks=True)
    evaluate(model, loader, [evaluator], "cpu", progress=False)
    save_results(evaluator, tmp_path / "new" / "results.json")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == evaluator.results()


def test_classes_are_matched_by_name(make_dataset):
    dataset = make_dataset({1: [(0, (0, 0, 9, 9)), (1, (0, 0, 5, 5))]}, classes=("cat", "dog"), category_ids=(3, 8))
    aligned = align_classes(dataset, ("dog", "owl", "cat", "emu"), (1, 3, 8, 5))
    assert aligned.classes == ("dog", "owl", "cat", "emu")
    assert aligned.category_ids == (8, 9, 3, 5)  # its own; 3 is taken, so a new one; its own; the model's
    assert [item.label for item in aligned.records[0].annotations] == [2, 0]
    assert align_classes(dataset, ("cat", "dog"), (1, 2)) is dataset
    with pytest.raises(ValueError, match="got cat in 'tiny'. The weights know dog, owl"):
        align_classes(dataset, ("dog", "owl"), (1, 2))


@pytest.mark.parametrize("where", ["detections", "losses", "evaluator"])
@pytest.mark.parametrize("cause", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_and_what_to_do(make_dataset, make_batch, monkeypatch, where, cause):
    def greedy(*_):
        raise cause

    dataset = make_dataset(TRUTHS, size=(90, 120))
    model, loader = model_and_loader(dataset, make_batch, [(4,), (2, 7)])
    evaluators, forward = build_evaluators(dataset, ("coco",), with_masks=False), model.forward
    if where == "evaluator":
        monkeypatch.setattr(evaluators[0], "update", greedy)
    else:
        monkeypatch.setattr(model, "forward", lambda images, targets=None: greedy() if len(images.sizes) == 2 and
                            (targets is None) == (where == "detections") else forward(images, targets))
    with pytest.raises(torch.OutOfMemoryError) as error:
        evaluate(model, map(with_targets, loader), evaluators, "cpu", losses=True, progress=False)
    told = str(error.value)
    images = ["4.jpg"] if where == "evaluator" else ["2.jpg", "7.jpg"]
    assert f"ran out with {len(images)} image" in told and "canvas of 90x120 pixels" in told
    assert "originals up to 90x120" in told and all(f"\n  {name}" in told for name in images)
    assert ("eval.batch_size=1" in told) == (len(images) > 1) and "model.input.max_size" in told
    assert "device=cpu" not in told and error.value.__cause__ is cause  # it is there already
    assert "device=cpu" in of_evaluation(loader[0], torch.device("cuda"))
    images = replace(loader[0].images, pyramid=(loader[0].images,))
    assert "smaller eval.test_scales" in of_evaluation(replace(loader[0], images=images), torch.device("cpu"))


def _rank(number, store, parts, dataset, out):
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    model, loader = Answers([found for found, _ in parts[number]]), [with_targets(batch) for _, batch in parts[number]]
    evaluators = build_evaluators(dataset, ("coco", "voc"), with_masks=True)
    nothing = Answers([replace(found, valid=torch.zeros_like(found.valid)) for found, _ in parts[number]])
    assert evaluate(nothing, loader, evaluators, "cpu", progress=False).metrics["bbox/AP"] == 0.0
    torch.save(evaluate(model, loader, evaluators, "cpu", losses=True, progress=False), out / f"{number}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(make_dataset, make_batch, tmp_path):
    """Also when one of them has no image at all."""
    dataset = make_dataset(TRUTHS)
    model, loader = model_and_loader(dataset, make_batch, [(4, 2, 7)])
    whole = evaluate(model, loader, build_evaluators(dataset, ("coco", "voc"), True), "cpu", progress=False)
    for name, groups in (("uneven", ([(4,), (7,)], [(2,)])), ("empty", ([(4, 7), (2,)], []))):
        parts = [[make_batch(dataset, {i: FOUND[i] for i in group}, masks=True) for group in own] for own in groups]
        out = tmp_path / name
        out.mkdir()
        context = mp.get_context("fork")
        ranks = [context.Process(target=_rank, args=(number, out / "store", parts, dataset, out)) for number in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
        for result in (torch.load(out / f"{number}.pt", weights_only=False) for number in (0, 1)):
            assert {key: result.metrics[key] for key in whole.metrics} == whole.metrics
            assert result.per_class == whole.per_class
            for kind, arrays in whole.curves.items():
                for field, values in vars(arrays).items():
                    assert torch.equal(getattr(result.curves[kind], field), values)
            assert result.metrics["val/loss_cls"] == pytest.approx(1.0 if name == "uneven" else 5 / 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The run folder of a small untrained Mask R-CNN, and the built-in data set that it would have been trained on."""
    folder = tmp_path_factory.mktemp("run")
    write_shapes(folder / "shapes", 3, val_images=3, options=ShapesOptions("easy", size=(64, 64)), progress=False)
    data = load_dataset(SourceConfig(path=str(folder / "shapes")), "val")
    config = Config.model_validate({
        "data": {"val": str(folder / "shapes"), "workers": 0},
        "model": {"name": "mask_rcnn", "input": {"min_size": 64, "max_size": 64}, "fpn": {"channels": 16},
                  "backbone": {"depth": 18, "width": 8, "weights": None, "norm": "bn", "freeze_stages": 0},
                  "box_head": {"fc_dim": 16, "score_thresh": 0.0}, "mask_head": {"channels": 16, "convs": 1}}})
    model = build_model(config.model, len(data.classes))
    meta = WeightsMeta(config.model_dump(mode="json"), data.classes, data.category_ids, step=3, metrics={})
    save_weights(folder / "checkpoints" / "best.safetensors", model.state_dict(), meta)
    return folder


def test_a_run_folder_is_evaluated_on_its_own_data(weights, tmp_path, capsys):
    metrics = evaluate_weights(weights, save=tmp_path / "found.json", metrics=("voc", "coco"), batch_size=2,
                               device="cpu")
    assert {"bbox/AP", "segm/APl", "voc/AP50_11point"} < set(metrics) and "val/loss_cls" not in metrics
    shown = capsys.readouterr().out
    assert "3 images" in shown and "step 3" in shown and all(name in shown for name in ("segm", "AR100", "triangle"))
    results = json.loads((tmp_path / "found.json").read_text())
    assert results and set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    truth = json.loads((weights / "shapes" / "annotations" / "instances_val.json").read_text())
    assert {result["image_id"] for result in results} <= {image["id"] for image in truth["images"]}
    columns = truth_columns(truth, masks=True), results_columns(results, masks=True)
    for name, value in evaluate_columns(*columns, "segm").metrics.items():
        assert metrics[name] == value


def test_other_data_can_be_named(weights):
    assert evaluate_weights(weights, split="train", device="cpu") != evaluate_weights(weights, device="cpu")
    voc = str(weights / "shapes" / "voc")
    metrics = evaluate_weights(weights, data=voc, split="val", metrics=("voc",), device="cpu")
    assert set(metrics) == {"voc/AP", "voc/AP50", "voc/AP50_11point"}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_weights(weights, data="nowhere", device="cpu")


def test_files_for_vocs_server(weights, tmp_path, capsys):
    """Of a test set without annotations nothing is measured, and all is written."""
    voc, out = tmp_path / "VOC2012", tmp_path / "results" / "VOC2012" / "Main"
    shutil.copytree(weights / "shapes" / "voc", voc)
    test = (voc / "ImageSets/Main/val.txt").rename(voc / "ImageSets/Main/test.txt").read_text().split()
    for image_id in test:
        (voc / f"Annotations/{image_id}.xml").unlink()
    options = {"split": "test", "metrics": ("voc",), "device": "cpu"}
    assert set(evaluate_weights(weights, data=str(voc), save=out, **options).values()) == {-1.0}
    assert "3 images" in capsys.readouterr().out
    lines = {file.name: [line.split() for line in file.read_text().splitlines()] for file in out.iterdir()}
    assert set(lines) == {f"comp4_det_test_{name}.txt" for name in load_weights(
        weights / "checkpoints" / "best.safetensors")[1].classes}
    found = [line for own in lines.values() for line in own]
    assert {line[0] for line in found} == set(test) and all(len(line) == 6 for line in found)
    corners = torch.tensor([[float(word) for word in line[2:]] for line in found])
    assert corners[:, :2].min() >= 1 and corners[:, 2:].max() <= 64
    with pytest.raises(ValueError, match="save must be a .json file, .* got .*Main. Say .*Main.json"):
        evaluate_weights(weights, save=out, device="cpu")
    with pytest.raises(ValueError, match="eval.crops must be 1 but for classifiers and localizers, got 10"):
        evaluate_weights(weights, device="cpu", overrides=["eval.crops=10"])


def test_weights_without_data_must_be_told_one(weights, tmp_path):
    tensors, meta = load_weights(weights / "checkpoints" / "best.safetensors")
    config = Config.model_validate({**meta.config, "data": {}})
    save_weights(tmp_path / "a.safetensors", tensors, replace(meta, config=config.model_dump(mode="json")))
    with pytest.raises(ValueError, match="a data set must be given.*--data"):
        evaluate_weights(tmp_path / "a.safetensors", device="cpu")


def test_overrides_change_how_weights_are_evaluated(weights):
    plain = evaluate_weights(weights, device="cpu")
    assert evaluate_weights(weights, device="cpu", overrides=["eval.batch_size=3", "data.workers=0"]) == \
        pytest.approx(plain, abs=1e-6)
    none = evaluate_weights(weights, overrides=["model.box_head.score_thresh=1", "device=cpu", "eval.metrics=[voc]"])
    assert none["voc/AP"] == 0 and set(none) == {"voc/AP", "voc/AP50", "voc/AP50_11point"}
    assert evaluate_weights(weights, device="cpu", overrides=["data.val.split=train"]) == \
        evaluate_weights(weights, device="cpu", split="train")


@pytest.mark.parametrize("overrides, message", [
    (["model.backbone.depth=34"], "overrides must keep the network.* got model.backbone.depth=34"),
    (["model.box_head.fc_dim=8"], "(?s)overrides must keep the network.*fc.*evaluated with other"),
    (["model.name=faster_rcnn"], "overrides must keep the network"),
    (["model.box_head.score_tresh=1"], "score_tresh is not a known key .*Did you mean model.box_head.score_thresh"),
    (["model.rpn.fg_iou=0.1"], "model.rpn: .*fg_iou=0.1 [(]fg_iou: command line, bg_iou: .*best.safetensors[)]"),
    (["eval.batch_size=0"], "eval.batch_size must be an integer >= 1, got 0"), (["device=gpu"], "device must be auto"),
    (["runs/b"], "override must be key=value")])
def test_overrides_that_cannot_be(weights, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate_weights(weights, overrides=overrides)
    assert len(str(error.value)) < 1000


def test_overrides_are_not_blamed_for_weights_that_are_wrong(weights, tmp_path):
    tensors, meta = load_weights(weights / "checkpoints" / "best.safetensors")
    tensors.popitem()
    save_weights(tmp_path / "a.safetensors", tensors, meta)
    with pytest.raises(ValueError, match="weights must fit the model that they describe"):
        evaluate_weights(tmp_path / "a.safetensors", overrides=["model.box_head.score_thresh=0.1"])


def test_numbers_and_errors_of_weights(weights, tmp_path, capsys):
    metrics = evaluate_weights(weights, numbers=tmp_path / "numbers.json", errors=tmp_path / "errors", device="cpu")
    assert json.loads((tmp_path / "numbers.json").read_text()) == metrics
    analysis = json.loads((tmp_path / "errors" / "errors.json").read_text())
    assert analysis["overall"]["ap50"] == metrics["bbox/AP50"]
    assert "kind of mistake" in capsys.readouterr().out
