"""The loop, with a model that is only a model by its interface."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from detres.config import Config, TrainConfig
from detres.config_file import override
from detres.engine.checkpoint import load_state, load_weights
from detres.engine.interrupt import Interrupt
from detres.engine.plots import plot_curves
from detres.engine.run_folder import check_same, open_run, write_config
from detres.engine.step import backward, split
from detres.engine.train import train

CPU = torch.device("cpu")


@pytest.fixture
def initial(dot) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in dot.state_dict().items()}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def gradients(model, batch, **options) -> list[torch.Tensor]:
    model.zero_grad()
    losses = backward(model, batch, CPU, TrainConfig(**options))
    return [*losses.values(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_parts_of_a_batch_give_the_gradient_of_the_whole(dot, batch):
    whole = gradients(dot, batch(0), accumulate=1, precision="fp32")
    for options in ({"accumulate": 2}, {"accumulate": 4}, {"accumulate": 4, "channels_last": False}):
        for part, expected in zip(gradients(dot, batch(0), precision="fp32", **options), whole, strict=True):
            torch.testing.assert_close(part, expected)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(dot, batch):
    low, full = gradients(dot, batch(0), precision="bf16"), gradients(dot, batch(0), precision="fp32")
    assert all(value.dtype == torch.float32 for value in low)
    assert not torch.equal(low[0], full[0])
    torch.testing.assert_close(low[0], full[0], rtol=0.02, atol=0)


def test_split_keeps_every_instance_with_its_image(batch):
    whole = batch(0, images=6)  # 0 1 2 0 1 2 instances
    parts = split(whole, 3)
    assert [part.paths for part in parts] == [whole.paths[i:i + 2] for i in (0, 2, 4)]
    assert [part.targets.masks[:, 0, 0].tolist() for part in parts] == [[0], [1, 2], [3, 4, 5]]
    assert [int(part.targets.valid.sum()) for part in parts] == [1, 2, 3]
    assert torch.equal(torch.cat([part.targets.boxes for part in parts]), whole.targets.boxes)
    assert torch.equal(torch.cat([part.images.pixels for part in parts]), whole.images.pixels)


def test_a_run_folder_holds_everything(fit_dot, initial, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("detres.engine.train.plot_curves", plot_curves)
    results = fit_dot(lambda model: {"bbox/AP": 0.25, "bbox/AP50": 0.5, "val/loss": 1.5}, eval_every=4, ema=0.5)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "log.jsonl", "metrics.csv", "results.json", "curves.png", "checkpoints", "tensorboard"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "last.pt", "best.safetensors", "final.safetensors"}
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "curves.png").read_bytes()[1:4] == b"PNG"
    assert results == json.loads((folder / "results.json").read_text())
    assert results == {"bbox/AP": 0.25, "bbox/AP50": 0.5, "val/loss": 1.5, "step": 4}
    weights, meta = load_weights(folder / "checkpoints" / "final.safetensors")
    assert (meta.step, meta.classes, meta.category_ids, meta.metrics["bbox/AP"]) == (10, ("a",), (7,), 0.25)
    assert Config.model_validate(meta.config).train.ema == 0.5
    saved = load_state(folder / "checkpoints" / "last.pt")
    assert all(torch.equal(weights[name], saved["ema"][name]) for name in weights)  # the averaged ones are kept
    states = (saved["ema"], saved["model"], initial)
    assert len({tuple(state["backbone.weight"].flatten().tolist()) for state in states}) == 3
    training = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 11))
    assert training[-1]["loss"] == pytest.approx(training[-1]["loss_cls"] + training[-1]["loss_box"])
    assert training[-1]["loss"] < 0.5 * training[0]["loss"]
    assert training[7]["lr"] == pytest.approx(0.1) and training[8]["lr"] == pytest.approx(0.01)
    table = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [line["step"] for line in table if line["bbox/AP"] == "0.25"] == ["4", "8", "10"]
    told = capsys.readouterr()
    assert "best.safetensors" in told.out and "0.250" in told.out
    assert "multistep: lr 0.1, 10 steps" in told.err
    assert "images/s" in told.err and "GiB" in told.err and "left" in told.err  # plain lines, as this is no terminal


def test_rows_hold_means_since_the_last_row(fit_dot, tmp_path, dot, initial):
    fit_dot()
    single = rows(tmp_path)
    dot.load_state_dict(initial)
    fit_dot(log_every=4)
    grouped = rows(tmp_path)
    assert [row["step"] for row in grouped] == [4, 8, 10]
    assert grouped[1]["loss_cls"] == pytest.approx(sum(row["loss_cls"] for row in single[4:8]) / 4)


def stopping(batch, at: int, error: BaseException):
    """A loader that raises when the batch of update `at` + 1 is asked for."""
    def loader(step: int):
        for number in range(step, at):
            yield batch(number)
        raise error

    return loader


def with_chance(dot, state: dict[str, torch.Tensor]):
    """A model that draws random numbers in each step, as dropout does."""
    class WithChance(type(dot)):
        def forward(self, images, targets):
            return {name: loss * torch.rand(()) for name, loss in super().forward(images, targets).items()}

    model = WithChance()
    model.load_state_dict(state)
    return model


def test_a_resumed_run_tells_nothing_twice(fit_dot, tmp_path, dot, initial, batch):
    options = {"validate": lambda model: {"bbox/AP": 0.5}, "eval_every": 4, "ema": 0.5, "optimizer": "adamw"}
    straight, broken = with_chance(dot, initial), with_chance(dot, initial)
    fit_dot(model=straight, **options)
    whole, kept = rows(tmp_path), tmp_path / "run" / "checkpoints" / "final.safetensors"
    averaged = load_weights(kept)[0]["backbone.weight"]
    with pytest.raises(RuntimeError, match="crash"):
        fit_dot(model=broken, loader=stopping(batch, 7, RuntimeError("crash")), **options)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 7]  # the checkpoint is of step 4
    fit_dot(model=broken, resume=True, **options)
    again = rows(tmp_path)
    assert [(row["step"], row.get("loss")) for row in again] == [(row["step"], row.get("loss")) for row in whole]
    assert torch.equal(broken.backbone.weight, straight.backbone.weight)
    assert torch.equal(load_weights(kept)[0]["backbone.weight"], averaged)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [line["step"] for line in csv.DictReader(file)] == [str(step) for step in range(1, 11)]


def test_a_finished_run_resumed_changes_nothing(fit_dot, tmp_path):
    first = fit_dot(lambda model: {"bbox/AP": 0.5})
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert fit_dot(lambda model: pytest.fail("evaluated again"), resume=True) == first
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_evaluating_does_not_change_the_training(fit_dot, dot, initial):
    weights = []
    for options in ({}, {"eval_every": 3}):
        model = with_chance(dot, initial)
        fit_dot(lambda model: {"bbox/AP": float(torch.rand(()))}, model=model, **options)
        weights.append(model.backbone.weight.clone())
    assert torch.equal(*weights)


def test_stopping_early(fit_dot, tmp_path, dot):
    values = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    results = fit_dot(lambda model: {"bbox/AP": next(values)}, eval_every=1, patience=2)
    assert results == {"bbox/AP": 0.3, "step": 2}
    assert len([row for row in rows(tmp_path) if "loss" in row]) == 4
    best, final = (load_weights(tmp_path / "run" / "checkpoints" / f"{name}.safetensors") for name in ("best", "final"))
    assert (best[1].step, final[1].step) == (2, 4)
    assert torch.equal(final[0]["backbone.weight"], dot.backbone.weight)
    assert not torch.equal(best[0]["backbone.weight"], dot.backbone.weight)
    assert fit_dot(lambda model: pytest.fail("went on"), eval_every=1, patience=2, resume=True) == results


def test_stopping_early_without_any_best(fit_dot, tmp_path, capsys):
    results = fit_dot(lambda model: {"bbox/AP": math.nan}, eval_every=1, patience=3)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3]
    assert results == {"step": 3, "train/loss": rows(tmp_path)[-2]["loss"]}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.pt", "final.safetensors"}
    told = capsys.readouterr()
    assert "no best yet" in told.err and "final.safetensors" in told.out


def test_without_validation_the_loss_is_the_result(fit_dot, tmp_path):
    results = fit_dot()
    assert results == {"step": 10, "train/loss": rows(tmp_path)[-1]["loss"]}
    assert not (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()


def test_what_compiles_is_compiled(fit_dot, dot, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **options: compiled.append(self))
    fit_dot(steps=1)
    assert not compiled
    fit_dot(steps=1, compile=True)
    assert compiled == [dot.backbone]


# ---- what stops a run ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(fit_dot, tmp_path, dot):
    class Diverging(type(dot)):
        steps = 0

        def forward(self, images, targets):
            self.steps += 1
            losses = super().forward(images, targets)
            return {**losses, "loss_box": losses["loss_box"] * (math.nan if self.steps == 7 else 1)}

    model = Diverging()
    with pytest.raises(FloatingPointError) as error:
        fit_dot(model=model, log_every=5)
    assert model.backbone.weight.isfinite().all()  # on the CPU not even those in memory are spoilt
    told = str(error.value)
    assert "loss_box=nan" in told and "loss_cls" not in told and "step 7" in told and "train.lr" in told
    assert [f"image_6_{i}.jpg" in told for i in range(4)] == [True] * 4 and "image_5" not in told
    saved = load_state(tmp_path / "run" / "checkpoints" / "last.pt")
    assert saved["step"] == 4 and all(value.isfinite().all() for value in saved["model"].values())


def test_a_gradient_that_is_not_finite_stops_the_run(fit_dot, dot):
    class Infinite(type(dot)):
        def forward(self, images, targets):
            losses = super().forward(images, targets)
            return {**losses, "loss_box": losses["loss_box"] + (self.backbone.bias - self.backbone.bias).sum().sqrt()}

    with pytest.raises(FloatingPointError, match="grad_norm=nan in step 1"):
        fit_dot(model=Infinite())


def test_no_checkpoint_of_weights_that_are_not_finite(fit_dot, tmp_path, dot, monkeypatch):
    """As on a GPU, where losses are looked at only when they are logged or a checkpoint is due."""
    from detres.engine.log import LossWindow

    class Diverging(type(dot)):
        steps = 0

        def forward(self, images, targets):
            self.steps += 1
            factor = math.inf if self.steps == 6 else 1
            return {name: loss * factor for name, loss in super().forward(images, targets).items()}

    monkeypatch.setattr("detres.engine.train.LossWindow", lambda eager: LossWindow(eager=False))
    with pytest.raises(FloatingPointError, match="loss_cls=inf, loss_box=inf, grad_norm=.* in step 6") as error:
        fit_dot(model=Diverging(), log_every=100)
    assert "image_5_0.jpg" in str(error.value) and "image_6_0.jpg" not in str(error.value)
    assert load_state(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 4


@pytest.mark.parametrize("cause", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_and_what_to_do(fit_dot, dot, cause):
    class Greedy(type(dot)):
        def forward(self, images, targets):
            raise cause

    with pytest.raises(torch.OutOfMemoryError) as error:
        fit_dot(model=Greedy(), accumulate=2, precision="fp32")
    told = str(error.value)
    assert "step 1: 4 images in 2 parts on a canvas of 8x12 pixels" in told and "3 boxes, at most 2" in told
    assert all(f"image_0_{i}.jpg" in told for i in range(4))
    assert all(name in told for name in ("train.accumulate=4", "train.precision=bf16", "activation_checkpointing=true",
                                         "max_size", "train.batch_size"))
    assert error.value.__cause__ is cause


def test_other_errors_stay_what_they_are(fit_dot, batch):
    with pytest.raises(RuntimeError, match="^a bug$"):
        fit_dot(loader=stopping(batch, 2, RuntimeError("a bug")))


def test_ctrl_c_while_evaluating_saves_and_evaluates_again(fit_dot, tmp_path, dot):
    evaluations = []

    def validate(model):
        evaluations.append(dot.backbone.weight.sum().item())
        if len(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"bbox/AP": float(sum(interrupt.watch([1, 2])))}

    interrupt = Interrupt()
    with pytest.raises(SystemExit) as stopped:
        fit_dot(validate, interrupt=interrupt, eval_every=3)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert load_state(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 6
    interrupt = Interrupt()
    assert fit_dot(validate, interrupt=interrupt, eval_every=3, resume=True)["step"] == 3
    assert evaluations[2] == evaluations[1] and len(evaluations) == 5
    assert [row["step"] for row in rows(tmp_path) if "bbox/AP" in row] == [3, 6, 9, 10]


# ---- the folder of a run -------------------------------------------------------------------------------------------


def config_in(folder, **sections) -> Config:
    return Config.model_validate({"output": str(folder), **sections})


def test_a_run_is_never_overwritten(tmp_path):
    config = config_in(tmp_path / "run")
    assert open_run(config, resume=False) is None
    assert not (tmp_path / "run").exists()  # looking leaves no trace
    write_config(config)
    with pytest.raises(FileExistsError, match="--resume.*output="):
        open_run(config, resume=False)
    assert open_run(config, resume=True) is None  # killed before its first checkpoint
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="other files"):
            open_run(config_in(tmp_path / "photos"), resume)
        with pytest.raises(FileExistsError, match="is a file"):
            open_run(config_in(tmp_path / "photos" / "a.jpg"), resume)
    (tmp_path / "empty").mkdir()
    assert open_run(config_in(tmp_path / "empty"), resume=False) is None


def test_only_the_same_training_is_resumed(tmp_path):
    before = config_in("a", train={"lr": 0.1}, data={"train": "x", "val": "y"})
    saved = json.loads(before.model_dump_json())
    check_same(saved, before, tmp_path)
    check_same(saved, config_in("b", device="cpu", train={"lr": 0.1, "log_every": 3, "patience": 2},
                                data={"train": "x", "workers": 9}, eval={"batch_size": 3}), tmp_path)
    with pytest.raises(ValueError) as error:
        check_same(saved, config_in("a", train={"lr": 0.2}, data={"train": "z", "val": "y"},
                                    model={"backbone": {"depth": 18}}), tmp_path)
    told = str(error.value)
    assert "3 differences" in told and "output=" in told
    assert "train.lr: 0.1 in the run, 0.2 now" in told and "model.backbone.depth: 50 in the run, 18 now" in told
    assert "data.train.path: 'x' in the run, 'z' now" in told


@pytest.mark.parametrize("schedule, change", [
    ({"schedule": "plateau"}, "data.val.path"), ({"schedule": "plateau"}, "train.eval_every"),
    ({"schedule": "plateau"}, "train.keep_best"), ({"schedule": "plateau"}, "eval.crops"),
    ({"warmup_until_error": 0.8}, "train.log_every")])
def test_what_steers_the_schedule_is_not_changed(tmp_path, schedule, change):
    values = {"data.val.path": "z", "train.eval_every": 7, "train.keep_best": "val/loss", "eval.crops": 10,
              "train.log_every": 7}
    before = config_in("a", train={"eval_every": 5, **schedule}, data={"train": "x", "val": "y"})
    now = override(before, [f"{change}={values[change]}"], "the test")
    with pytest.raises(ValueError, match=f"1 differences to .*\n  {change}: "):
        check_same(json.loads(before.model_dump_json()), now, tmp_path)
    free = override(before, ["train.schedule=multistep", "train.warmup_until_error=null"], "the test")
    check_same(json.loads(free.model_dump_json()), override(free, [f"{change}={values[change]}"], "the test"), tmp_path)


def test_a_mistake_does_not_occupy_the_folder(detector_config):
    config = detector_config()
    without_data = config.model_copy(update={"data": config.data.model_copy(update={"train": None})})
    without_val = config.model_copy(update={"data": config.data.model_copy(update={"val": None}),
                                            "train": config.train.model_copy(update={"patience": 5, "eval_every": 5})})
    for wrong, message in ((without_data, "data.train must be given"), (without_val, "data.val must be given"),
                           (detector_config(patience=3), "eval_every must be given"),
                           (detector_config(schedule="plateau"), "eval_every must be given for train.schedule=plateau"),
                           (detector_config(warmup_until_error=0.8), "for a classifier.*got 0.8 for a mask_rcnn"),
                           (detector_config(keep_best="bbox/AP5O"), "keep_best must be one of auto.*segm/AP.*, got "
                            "'bbox/AP5O'[.] Did you mean bbox/AP"),
                           (detector_config(keep_best="val/loss_clss"), "auto, val/loss, val/loss_rpn_cls, .*val/loss_"
                            "mask.*, got 'val/loss_clss'. Did you mean val/loss_cls[?]"),
                           (detector_config(keep_best="nonsense"), "got 'nonsense'[.]$")):
        with pytest.raises(ValueError, match=message):
            train(wrong)
        assert not Path(wrong.output).exists()
