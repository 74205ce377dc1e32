"""Training: one loop that reads from top to bottom.

    train   from a config: data, model, evaluators
    fit     the loop; the gradients of a step are in `step.backward`

The state of a run is in `checkpoint.TrainState`; the batch of a step, its learning rate and its sampling depend on
nothing but the seed and the step. So a run that was killed and resumed gives the weights of one that was not: bit for
bit on the CPU, and on a GPU as far as its kernels are deterministic.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detres.build import build_model
from detres.config import Config
from detres.engine import distributed
from detres.engine.checkpoint import TrainState, WeightsMeta, atomic_write, preserved_rng, restore_rng, save_weights
from detres.engine.failures import explain_out_of_memory, of_training
from detres.engine.interrupt import Interrupt, Interrupted, start
from detres.engine.log import LossWindow, RunLog, tell
from detres.engine.optim import EMA, Schedule, build_optimizer, clip_gradients, set_lr
from detres.engine.plots import plot_curves
from detres.engine.run_folder import open_run, resume_command, write_config
from detres.engine.step import backward
from detres.engine.tasks import TASKS, Metrics, Task
from detres.evaluation.base import EvalResult
from detres.structures import Batch
from detres.weights.finetune import load_start
from detres.weights.backbone import load_backbone


OF_CLASSES = ("classes", "category_ids", "semantic_classes", "semantic_ids")  # what weights say of theirs


def train(config: Config, *, resume: bool = False) -> Metrics:
    """Trains what the config describes in the folder `config.output`; returns the metrics of its best weights.

    With `resume`, goes on from the last checkpoint in the folder, or from the beginning if there is none. Raises
    FileExistsError if the folder is in use, ValueError for data or a config that is wrong, FloatingPointError for a
    loss that is not finite, torch.OutOfMemoryError; SystemExit(128 + signal) after Ctrl-C or SIGTERM, saved.
    """
    with distributed.process_group(config.device) as device:
        _check(config)
        alternates = config.train.alternate
        if alternates:
            from detres.engine import alternate  # it imports this module

            alternate.check_alternate(config)
            _check(alternate.of_rpn(config))
        saved = open_run(config, resume)
        if resume and saved is None:
            tell(f"No checkpoint to resume from in {config.output}: from the beginning.")
        seed_everything(config.train.seed)
        interrupt = Interrupt()
        task = TASKS[config.model.name](config, device, interrupt)
        tell(f"Training on {task.about}, {len(task.classes)} classes")
        if task.validate is None and config.train.eval_every:
            tell("data.val is not given: nothing is evaluated, and the last weights are kept")
        model = build_model(config.model, len(task.classes), len(task.semantic_classes))
        if alternates:
            model = alternate.FastRCNNStep(model, ("roi_heads",))
        if task.validate:
            _check_keep_best(config.train.keep_best, task.metric_names, model.loss_names)
        about = {**{name: list(getattr(task, name)) for name in OF_CLASSES}, "keypoints": task.keypoints}
        load_initial = partial(_load_initial, config, task)
        if alternates and saved is None:
            steps = alternate.FirstSteps(config, load_initial, task, device, interrupt, about)
            model.load_state_dict(steps.run())
        elif saved is None:
            load_initial(model)
        return fit(config, model, task.loader, task.validate, device, interrupt, about, saved)


def _load_initial(config: Config, task: Task, model: nn.Module) -> None:
    with distributed.first_on_each_machine():
        if config.model.weights is None:
            load_backbone(model, config.model)
        else:
            told = load_start(model, config.model.weights, task.classes, task.semantic_classes, config.model)
            tell(f"Weights {config.model.weights}: {told}")


def fit(config: Config, model: nn.Module, loader: Callable[[int], Iterable[Batch]],
        validate: Callable[[nn.Module], Metrics] | None, device: torch.device, interrupt: Interrupt,
        about: dict[str, Any], saved: dict[str, Any] | None = None, part: str = "") -> Metrics:
    """The loop. `loader(step)` gives the batches from a step on; `about` is kept with the weights: classes, ids. `part`
    is the folder in the run's of a training that is a part of it."""
    options, folder = config.train, Path(config.output, part)
    schedule = Schedule.scaled(options)
    model.train().to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
    state = TrainState(model, build_optimizer(model, options), EMA(model, options.ema) if options.ema else None)
    if saved:
        state.restore(saved)
    if options.compile:
        model.backbone.compile()
    forward = distributed.wrap(model)
    window = LossWindow(eager=device.type == "cpu")
    about = {**about, "config": config.model_dump(mode="json")}

    def save() -> None:
        window.check()  # weights that are not finite must never replace those that are
        state.save(folder / "checkpoints" / "last.pt", **about)

    def is_due(every: int | None) -> bool:
        return state.step == schedule.steps or every is not None and state.step > 0 and state.step % every == 0

    if part:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        write_config(config)
    with interrupt, RunLog(folder, state.rows, state.step, schedule.steps, options.batch_size) as log:
        log.say(schedule.describe(options))
        log.say(f"{'Resuming' if saved else 'Starting'} at step {state.step} on {device}, in {folder}")
        if options.precision == "bf16" and not distributed.runs_bf16(device):
            log.say("This processor emulates bf16, at a fraction of the speed of fp32: set train.precision=fp32")
        batches = start(loader(state.step)) if state.step < schedule.steps else iter(())
        _seed_rank(options.seed, saved)
        try:
            while True:
                interrupt.check()
                if validate and is_due(options.eval_every) and state.evaluated < state.step:
                    with log.paused(), preserved_rng():
                        distributed.share_buffers(state.averaged)
                        metrics = _with_loss(validate(state.averaged))
                    if state.is_best(metrics, options.keep_best):
                        _write_weights(folder, "best", state, about)
                    log.evaluation({**metrics, "stale": state.stale})
                    log.say(_evaluated(state, metrics))
                    save()
                if state.step >= schedule.steps or options.patience and state.stale >= options.patience:
                    break

                batch = log.next(batches)
                lr = schedule.at(state.step, state.rows)
                set_lr(state.optimizer, lr)
                with explain_out_of_memory(of_training, config, batch, state.step + 1):
                    losses = backward(forward, batch, device, options)
                    norm = clip_gradients(state.optimizer, options.grad_clip)
                    window.add(state.step + 1, {**losses, "grad_norm": norm}, batch)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                if state.ema:
                    state.ema.update(state.step)
                state.step += 1

                log.advance(state.step)
                if is_due(options.log_every):
                    log.train(window.means(), lr)
                if is_due(options.checkpoint_every) or validate and is_due(options.eval_every):
                    save()
        except Interrupted:
            save()
            log.say(f"Saved at step {state.step} of {schedule.steps}. Resume with:\n  {resume_command(config)}")
            raise SystemExit(interrupt.exit_code) from None
    return _finish(folder, state, about)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _seed_rank(seed: int, saved: dict[str, Any] | None) -> None:
    """Random numbers of the steps: own ones on each rank. After the loader's processes, whose start draws some."""
    rank = distributed.rank()
    seed_everything(seed + 1 + rank)
    if saved and rank < len(saved["rng"]):
        restore_rng(saved["rng"][rank])


def _check(config: Config) -> None:
    """Refuses what cannot be trained as it is stated."""
    options, data = config.train, config.data
    if data.train is None:
        raise ValueError("data.train must be given to train, got null. Say data.train.path=PATH.")
    if data.val is None and (options.patience or options.keep_best != "auto" or options.schedule == "plateau"):
        raise ValueError("data.val must be given for train.patience, keep_best and schedule=plateau, got null. "
                         "Say data.val.path=PATH.")
    if options.patience and not options.eval_every:
        raise ValueError("train.eval_every must be given for train.patience to stop early, got null.")
    if options.schedule == "plateau" and not options.eval_every:
        raise ValueError("train.eval_every must be given for train.schedule=plateau, which lowers lr by what "
                         "evaluations bring, got null. Say train.eval_every=STEPS.")
    if options.warmup_until_error is not None and config.model.name != "classifier":
        raise ValueError("train.warmup_until_error must be null but for a classifier, whose log has its error, got "
                         f"{options.warmup_until_error:g} for a {config.model.name}. Say train.warmup_steps=STEPS.")
    unit = options.accumulate * distributed.world_size()
    if options.batch_size % unit:
        raise ValueError(f"train.batch_size must be a multiple of processes x train.accumulate, got "
                         f"{options.batch_size} for {distributed.world_size()} x {options.accumulate}. "
                         f"Take a multiple of {unit}.")


def _with_loss(metrics: Metrics) -> Metrics:
    losses = [value for name, value in metrics.items() if name.startswith("val/loss_")]
    return {**metrics, "val/loss": sum(losses)} if losses else metrics


def _check_keep_best(name: str, metric_names: Sequence[str], loss_names: Sequence[str]) -> None:
    """Names the metrics before hours of training rather than after."""
    known = ["auto", "val/loss", *(f"val/{loss}" for loss in loss_names), *metric_names]
    if name not in known:
        nearest = "".join(f" Did you mean {close}?" for close in difflib.get_close_matches(name, known, n=1))
        raise ValueError(f"train.keep_best must be one of {', '.join(known)}, got '{name}'.{nearest}")


def _evaluated(state: TrainState, metrics: Metrics) -> str:
    shown = ("/PQ", "/AP", "/AP50", "/mIoU", "/AR@1000", "/top1", "/gt_class_error", "/loss")
    main = [f"{name} {value:.3f}" for name, value in metrics.items() if name.endswith(shown)]
    best = f"best: step {state.best['step']:.0f}" if state.best else "no best yet: not finite"
    stale = f"  ({best})" if state.stale else ""
    return f"evaluation at step {state.step}: {'  '.join(main)}{stale}"


def _write_weights(folder: Path, name: str, state: TrainState, about: dict[str, Any]) -> None:
    if distributed.rank() == 0:
        metrics = state.metrics if state.evaluated == state.step else {}
        classes = {name: tuple(about[name]) for name in OF_CLASSES if name in about}
        meta = WeightsMeta(about["config"], step=state.step, metrics=metrics, **classes,
                           keypoints=about.get("keypoints", {}))
        save_weights(folder / "checkpoints" / f"{name}.safetensors", state.averaged.state_dict(), meta)


def _finish(folder: Path, state: TrainState, about: dict[str, Any]) -> Metrics:
    """Writes the final weights, results and curves; prints the results. Repeating it changes nothing."""
    losses = [row["loss"] for row in state.rows if "loss" in row]
    results = state.best or {"step": state.step, **{"train/loss": loss for loss in losses[-1:]}}
    _write_weights(folder, "final", state, about)
    if distributed.rank() == 0:
        with atomic_write(folder / "results.json") as path:
            path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        plot_curves(state.rows, folder / "curves.png", title=str(folder))
        kept = "best" if state.best else "final"
        metrics = EvalResult({name: value for name, value in results.items() if name != "step"})
        print(f"{metrics.table()}\n\nThese are of step {results['step']:.0f}, weights "
              f"{folder}/checkpoints/{kept}.safetensors.\nLogs, results and curves are in {folder}.", flush=True)
    return results
