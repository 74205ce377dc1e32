"""Four-step alternating training: what each step trains, its losses, a kill in step 3, and what it reaches."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detres.build import build_model
from detres.config import Config
from detres.data.dataset import load_dataset
from detres.data.loader import build_loader
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.alternate import FastRCNNStep, FirstSteps, RPNStep, of_rpn, training_proposals
from detres.engine.checkpoint import load_weights
from detres.engine.train import seed_everything, train
from detres.inference.predictor import load_model
from detres.structures import Batch

KILL_IN_STEP_3 = """
import os, signal
from detres.engine.optim import Schedule
at, calls = Schedule.at, []
def killing(self, step, rows):
    calls.append(step)
    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 + 4 + 3 else at(self, step, rows)
Schedule.at = killing
"""


@pytest.fixture(scope="module", autouse=True)
def _no_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detres.engine.train.plot_curves", lambda rows, path, title: None)
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("scenes"), 4, options=ShapesOptions(preset="easy", size=(64, 64)),
                        val_images=1, formats=("coco",), progress=False)


@pytest.fixture(scope="module")
def make_config(scenes, tmp_path_factory) -> Callable[..., Config]:
    """A C4 detector that validates on its four training images; keyword arguments go into `train`."""
    def make(norm: str = "gn", freeze_stages: int = 0, name: str = "faster_rcnn", **options: Any) -> Config:
        return Config.model_validate({
            "output": str(tmp_path_factory.mktemp("runs") / "run"), "device": "cpu",
            "model": {
                "name": name, "input": {"min_size": 64, "max_size": 64, "crop": 64},
                "backbone": {"depth": 18, "width": 8, "weights": None, "norm": norm, "freeze_stages": freeze_stages,
                             "layout": "c4"},
                "anchors": {"sizes": [[12, 24, 48]], "aspect_ratios": [1.0]},
                "rpn": {"pre_nms_topk_train": 100, "pre_nms_topk_test": 100, "post_nms_topk_train": 30,
                        "post_nms_topk_test": 20, "batch_per_image": 64},
                "box_head": {"batch_per_image": 32, "resolution": 6}},
            "data": {"train": str(scenes), "val": {"path": str(scenes), "split": "train"}, "workers": 0,
                     "augment": {"flip": 0}},
            "train": {"alternate": True, "batch_size": 4, "reference_batch_size": 4, "lr": 0.03, "schedule": "cosine",
                      "warmup_steps": 10, "precision": "fp32", "weight_decay": 0, **options},
            "eval": {"batch_size": 4}})

    return make


def weights_of(config: Config) -> dict[str, dict[str, torch.Tensor]]:
    """Of the four steps, and before them ("0")."""
    seed_everything(config.train.seed)
    found = {"0": build_model(config.model, 3).state_dict()}
    for step, folder in enumerate(("1_rpn", "2_fast_rcnn", "3_rpn", "."), 1):
        found[str(step)] = load_weights(Path(config.output) / folder / "checkpoints/final.safetensors")[0]
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], part: str) -> bool:
    """Whether all tensors of a part are equal; if not, most must differ."""
    names = [name for name in a if name.startswith(f"{part}.")]
    equal = sum(torch.equal(a[name], b[name]) for name in names)
    assert equal == len(names) or equal < len(names) / 4, (part, equal, len(names))
    return equal == len(names)


@pytest.fixture(scope="module")
def trained(make_config, one_thread) -> tuple[Config, dict[str, float]]:
    config = make_config(steps=60)
    return config, train(config)


def test_it_learns_four_images(trained):
    config, results = trained
    assert results["bbox/AP50"] >= 0.7
    model, meta, _ = load_model(config.output, "cpu")
    assert meta.metrics["bbox/AP50"] == results["bbox/AP50"] and type(model).__name__ == "FasterRCNN"
    rows = [json.loads(line) for line in (Path(config.output) / "3_rpn/log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60 and {name for name in rows[-1] if name.startswith("loss_")} == {
        "loss_rpn_cls", "loss_rpn_box"}


def test_what_each_step_trains(trained):
    """Shown by the weights that each leaves."""
    weights = weights_of(trained[0])
    changed = {("0", "1"): "backbone rpn", ("0", "2"): "backbone roi_heads", ("2", "3"): "rpn",
               ("3", "4"): "roi_heads", ("0", "3"): "backbone rpn roi_heads"}
    for (before, after), parts in changed.items():
        for part in ("backbone", "rpn", "roi_heads"):
            assert same(weights[before], weights[after], part) == (part not in parts.split()), (before, after, part)
    assert not same(weights["1"], weights["2"], "backbone")  # step 2 does not go on with step 1
    assert not same(weights["1"], weights["3"], "rpn")


def test_killed_in_step_3_and_resumed_gives_the_same_bits(make_config, run_cli, one_thread):
    options = {"steps": 4, "warmup_steps": 1, "checkpoint_every": 2, "ema": 0.9}
    whole, killed = make_config(**options), make_config(**options)
    train(whole)
    _, told = (process := run_cli(killed, prelude=KILL_IN_STEP_3)).communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, told
    folder = Path(killed.output)
    assert sorted(path.name for path in folder.iterdir()) == ["1_rpn", "2_fast_rcnn", "3_rpn", "config.yaml"]
    assert (folder / "3_rpn/checkpoints/last.pt").is_file() and not (folder / "3_rpn/results.json").exists()
    done = (folder / "2_fast_rcnn/checkpoints/final.safetensors").stat().st_mtime_ns

    other = killed.model_copy(update={"train": killed.train.model_copy(update={"lr": 0.5})})
    with pytest.raises(ValueError, match=r"must keep its config.*1_rpn.*\n  train.lr"):
        train(other, resume=True)
    train(killed, resume=True)
    assert (folder / "2_fast_rcnn/checkpoints/final.safetensors").stat().st_mtime_ns == done
    expected, found = weights_of(whole), weights_of(killed)
    for step in expected:
        assert all(torch.equal(found[step][name], value) for name, value in expected[step].items()), step
    train(killed, resume=True)  # of a run that is done: nothing changes
    assert all(torch.equal(weights_of(killed)["4"][name], value) for name, value in expected["4"].items())


# ---- losses, against the detector's own


@pytest.fixture(scope="module")
def batch(make_config) -> Batch:
    config = make_config()
    dataset = load_dataset(config.data.train, "train")
    return next(iter(build_loader(dataset, config.model.input, config.data, batch_size=4, training=True,
                                  with_masks=True)))


def losses(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    return model.train()(batch.images, batch.targets)


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_losses_of_the_parts_are_those_of_the_whole(make_config, batch, name):
    model = build_model(make_config(name=name).model, 3)
    whole = losses(model, batch)
    rpn, heads = RPNStep(model, ("rpn",)), FastRCNNStep(model, ("roi_heads",))
    assert rpn.loss_names == ("loss_rpn_cls", "loss_rpn_box") and {*rpn.loss_names, *heads.loss_names} == set(whole)
    for part in (rpn, heads):
        found = losses(part, batch)
        assert tuple(found) == part.loss_names and all(torch.equal(found[key], whole[key]) for key in found)
    assert torch.equal(heads.eval()(batch.images).boxes, model.eval()(batch.images).boxes)
    assert list(heads.state_dict()) == list(model.state_dict())


def test_proposals_of_another_model(make_config, batch):
    model, other = (build_model(make_config().model, 3) for _ in range(2))
    step = FastRCNNStep(model, ("backbone", "roi_heads"), lambda images: training_proposals(other, images))
    found = losses(step, batch)
    assert not torch.equal(found["loss_cls"], losses(model, batch)["loss_cls"])
    canvas, sizes = batch.images.pixels.shape[-2:], batch.images.sizes
    proposals, _ = other.rpn(other.features(batch.images), canvas, sizes, batch.targets)
    regions = partial(model.pool, model.features(batch.images))
    expected = model.roi_heads.losses(regions, proposals, batch.targets, sizes)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(list(copy.deepcopy(step).parameters())) == len(list(model.parameters()))  # its copies do not hold it


def test_fixed_parts_keep_their_running_statistics(make_config, batch):
    model = build_model(make_config(norm="bn", freeze_stages=1).model, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = FastRCNNStep(model, ("roi_heads",))
    sum(losses(step, batch).values()).backward()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"roi_heads"}  # conv5's norms, which are trained
    with_gradient = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert with_gradient == {"roi_heads"}


# ---- options


def test_the_rpns_steps_have_options_of_their_own(make_config, monkeypatch):
    """RPN batches of 8, Fast R-CNN batches of 16: arXiv 1512.03385, appendix A. Here of 4 and 2."""
    seen: list[tuple[str, int]] = []
    proposers: list[dict[str, torch.Tensor]] = []
    for kind in (RPNStep, FastRCNNStep):
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, images, targets=None, forward=forward: seen.append(
            (type(self).__name__, len(images.pixels))) or forward(self, images, targets))
    proposer = FirstSteps._proposer
    monkeypatch.setattr(FirstSteps, "_proposer", lambda self, weights: proposers.append(weights) or proposer(
        self, weights))
    config = make_config(batch_size=2, steps=3, rpn_steps={"batch_size": 4, "steps": 2, "lr": 0.001}, log_every=1)
    options = of_rpn(config).train
    assert (options.batch_size, options.reference_batch_size, options.steps, options.lr) == (4, 4, 2, 0.001)
    assert options.warmup_steps == config.train.warmup_steps and of_rpn(make_config()) is not None
    train(config)
    fast = [("FastRCNNStep", 2)] * 6
    assert seen[:16] == [("RPNStep", 4)] * 2 + fast + [("RPNStep", 4)] * 2 + fast
    first = weights_of(config)["1"]
    assert len(proposers) == 1 and all(torch.equal(proposers[0][name], first[name]) for name in first)
    for folder, steps, lr in (("1_rpn", 2, 1e-6), ("2_fast_rcnn", 6, 1.5e-5), (".", 6, 1.5e-5)):
        rows = [json.loads(line) for line in Path(config.output, folder, "log.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "lr" in row]
        assert len(rows) == steps and rows[0]["lr"] == pytest.approx(lr)


def test_what_cannot_alternate(make_config):
    for changes, message in (({"name": "classifier"}, "faster_rcnn or mask_rcnn, got classifier"),
                             ({"schedule": "plateau", "eval_every": 1}, "multistep or cosine, got plateau"),
                             ({"rpn_steps": {"batch_size": 3}, "accumulate": 2}, "multiple of accumulate, got 3")):
        config = make_config(**changes)
        with pytest.raises(ValueError, match=message):
            train(config)
        assert not Path(config.output).exists()
