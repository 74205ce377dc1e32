"""Four-step alternating training of Faster R-CNN (arXiv 1506.01497, section 3.2), as in arXiv 1512.03385, appendix A.

    1  RPN           from ImageNet's weights                              trains the backbone and the RPN
    2  Fast R-CNN    from ImageNet's weights, on proposals of step 1      trains the backbone and the heads
    3  RPN           a new one on the backbone of step 2, which is fixed  trains the RPN
    4  Fast R-CNN    heads of step 2, on proposals of step 3              trains the heads: one backbone for both

Each step is the one loop, `train.fit`: steps 1 to 3 in folders of their own, `1_rpn`, `2_fast_rcnn` and `3_rpn`, step 4
in the run's folder, whose weights are those of an ordinary Faster R-CNN. A step that is done is not done again.

Proposals are made on the fly, by the trained RPN of the step before, for each image as it is flipped and resized: the
authors' program stored them once, for each image at one scale. They are as many as `rpn.post_nms_topk_train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detres.build import build_model
from detres.config import Config, RPNStepsConfig, TrainConfig
from detres.engine.checkpoint import load_state, load_weights
from detres.engine.distributed import barrier
from detres.engine.interrupt import Interrupt
from detres.engine.run_folder import check_same, write_config
from detres.engine.tasks import TASKS, Task
from detres.engine.train import fit, seed_everything
from detres.models.faster_rcnn import FasterRCNN
from detres.models.roi_heads.regions import Regions
from detres.structures import Detections, ImageBatch, Proposals, Targets

Propose = Callable[[ImageBatch], Proposals]


class Step(FasterRCNN):
    """A detector of which some parts are trained, of "backbone", "rpn" and "roi_heads"; the others stay as they are,
    running statistics of batch norms included. Its weights have the names of the whole."""

    def __init__(self, model: FasterRCNN, trained: tuple[str, ...]):
        super().__init__(model.normalize, model.backbone, model.rpn, model.pool, model.roi_heads, model.canonical_side)
        self.fixed = tuple(name for name in ("backbone", "rpn", "roi_heads") if name not in trained)
        for name in self.fixed:
            getattr(self, name).requires_grad_(False)

    def train(self, mode: bool = True) -> Step:
        super().train(mode)
        for name in self.fixed:
            getattr(self, name).eval()
        return self


class RPNStep(Step):
    """With targets, the losses of the RPN."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        return super().loss_names[:2]

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        if targets is None:
            return super().forward(images)
        logits, deltas, anchors = self.rpn.predict(self.features(images), images.pixels.shape[-2:])
        return self.rpn.losses(logits, deltas, anchors, images.sizes, targets)


class FastRCNNStep(Step):
    """With targets, the losses of the heads, on regions that `propose` gives, or else the model's own RPN."""

    def __init__(self, model: FasterRCNN, trained: tuple[str, ...], propose: Propose | None = None):
        super().__init__(model, trained)
        self.propose_apart = propose

    @property
    def loss_names(self) -> tuple[str, ...]:
        return super().loss_names[2:]

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        if targets is None:
            return super().forward(images)
        features = self.features(images)
        proposals = self.propose_apart(images) if self.propose_apart else training_proposals(self, images, features)
        return self.roi_heads.losses(Regions(self.pool, features), proposals, targets, images.sizes)


@torch.no_grad()
def training_proposals(model: FasterRCNN, images: ImageBatch, features: list[Tensor] | None = None) -> Proposals:
    features = model.features(images) if features is None else features
    logits, deltas, anchors = model.rpn.predict(features, images.pixels.shape[-2:])
    return model.rpn.select(logits, deltas, anchors, images.sizes, model.rpn.pre_nms_topk[0],
                            model.rpn.post_nms_topk[0])


@dataclass(frozen=True)
class FirstSteps:
    """Steps 1 to 3; `run` gives the weights that step 4 begins from."""

    config: Config
    load_initial: Callable[[nn.Module], None]  # the weights that training begins from
    task: Task
    device: torch.device
    interrupt: Interrupt
    about: dict[str, Any]

    def run(self) -> dict[str, Tensor]:
        write_config(self.config)
        rpn_config = of_rpn(self.config)
        first = self._weights("1_rpn", rpn_config, lambda: RPNStep(self._model(), ("backbone", "rpn")))
        second = self._weights("2_fast_rcnn", self.config, lambda: FastRCNNStep(
            self._model(), ("backbone", "roi_heads"), self._proposer(first)))
        return self._weights("3_rpn", rpn_config, lambda: RPNStep(self._model(second), ("rpn",)))  # its RPN is new

    def _weights(self, name: str, config: Config, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
        """Of a step that is done; if it is not, it is done first."""
        folder = Path(self.config.output) / name
        final, last = folder / "checkpoints" / "final.safetensors", folder / "checkpoints" / "last.pt"
        if not final.is_file():
            saved = load_state(last) if last.is_file() else None
            if saved:
                check_same(saved["config"], config, last)
            is_same = config.train.batch_size == self.config.train.batch_size
            task = self.task if is_same else TASKS[config.model.name](config, self.device, self.interrupt)
            fit(config, build(), task.loader, None, self.device, self.interrupt, self.about, saved, name)
            barrier()  # until the first rank has written
        tensors, meta = load_weights(final)
        check_same(meta.config, config, final)
        return tensors

    def _model(self, weights: dict[str, Tensor] | None = None) -> FasterRCNN:
        """With these weights; None: with those that training begins from."""
        seed_everything(self.config.train.seed)
        model = build_model(self.config.model, len(self.about["classes"]))
        if weights is None:
            self.load_initial(model)
        else:
            model.load_state_dict(weights)
        return model

    def _proposer(self, weights: dict[str, Tensor]) -> Propose:
        """A function, which no model that holds it copies or saves."""
        model = self._model(weights).to(self.device).eval().requires_grad_(False)
        return lambda images: training_proposals(model, images)


def of_rpn(config: Config) -> Config:
    """The config of steps 1 and 3: what `train.rpn_steps` says comes before `train`."""
    options = config.train.rpn_steps
    changes = {name: value for name in RPNStepsConfig.model_fields if (value := getattr(options, name)) is not None}
    return config.model_copy(update={"train": TrainConfig.model_validate({**config.train.model_dump(), **changes})})


def check_alternate(config: Config) -> None:
    """Refuses what cannot be trained in four steps."""
    if config.model.name not in ("faster_rcnn", "mask_rcnn"):
        raise ValueError("train.alternate must go with a model that has an RPN and heads, faster_rcnn or mask_rcnn, "
                         f"got {config.model.name}. Set train.alternate=false.")
    if config.train.schedule == "plateau":
        raise ValueError("train.alternate must go with a schedule that needs no evaluation, multistep or cosine, got "
                         "plateau: only step 4 is evaluated.")
