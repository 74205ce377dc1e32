"""Every family trains, in parts of a batch, is evaluated, and goes on from a checkpoint to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detres.build import build_model
from detres.config import Config
from detres.data.shapes import ShapesOptions, write_shapes
from detres.engine.checkpoint import TrainState, load_state, load_weights
from detres.engine.optim import EMA, Schedule, build_optimizer
from detres.engine.train import train

SEMANTIC = {"loss_semantic"}
RCNN = {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"}
CASCADE = {"loss_rpn_cls", "loss_rpn_box", *(f"{name}_stage{k}" for name in ("loss_cls", "loss_box") for k in range(3))}
LOSSES = {"faster_rcnn": RCNN, "mask_rcnn": RCNN | {"loss_mask"}, "keypoint_rcnn": RCNN | {"loss_keypoint"},
          "cascade_rcnn": CASCADE, "cascade_mask_rcnn": CASCADE | {"loss_mask"}, "retinanet": {"loss_cls", "loss_box"},
          "fcos": {"loss_cls", "loss_box", "loss_centerness"}, "rpn": {"loss_rpn_cls", "loss_rpn_box"},
          "fcn": SEMANTIC | {"loss_aux"}, "deeplabv3": SEMANTIC | {"loss_aux"},
          "deeplabv3_plus": SEMANTIC | {"loss_aux"},
          "semantic_fpn": SEMANTIC, "panoptic_fpn": RCNN | {"loss_mask", "loss_semantic"},
          "point_rend": RCNN | {"loss_mask", "loss_mask_point"}}
METRIC = {"rpn": "box_proposals/AR@1000", "keypoint_rcnn": "keypoints/AP", "panoptic_fpn": "panoptic/PQ",
          **dict.fromkeys(("mask_rcnn", "cascade_mask_rcnn", "point_rend"), "segm/AP"),
          **dict.fromkeys(("fcn", "deeplabv3", "deeplabv3_plus", "semantic_fpn"), "sem_seg/mIoU")}
SMALL = {"fpn": {"channels": 16}, "semantic_head": {"channels": 16}, "dense_head": {"convs": 1},
         "keypoint_head": {"num_keypoints": 11, "channels": 16, "convs": 1}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Scenes with boxes, masks and keypoints."""
    return write_shapes(tmp_path_factory.mktemp("drawn") / "data", 8, val_images=2, formats=("coco",), progress=False,
                        options=ShapesOptions("full", size=(96, 96)))


def config_of(name: str, base: Config, drawn: Path, folder: Path) -> Config:
    values = base.model_dump(mode="json")
    model, mask_head = values["model"], {}
    for section, fields in SMALL.items():
        model[section].update(fields)
    if name.startswith(("fcn", "deeplab")):
        model["backbone"]["layout"] = "dc5"
    if name == "fcos":
        model["fpn"]["top"], model["dense_head"]["box_loss"] = "p5", "giou"
    if name == "point_rend":
        mask_head = {"type": "point_rend", "points": {"coarse_fc_dim": 16, "fc_dim": 16, "steps": 2}}
    model["mask_head"].update(mask_head)
    model["name"] = "mask_rcnn" if name == "point_rend" else name
    data = {**values["data"], "train": str(drawn), "workers": 0}
    return Config.model_validate({**values, "output": str(folder), "model": model, "data": {**data, "val": None}})


@pytest.mark.parametrize("name", LOSSES)
def test_trains_and_resumes(name, drawn, detector_config, tmp_path, monkeypatch, one_thread):
    base = detector_config(steps=2, milestones=[1], warmup_steps=0, accumulate=2, checkpoint_every=1, lr=0.002)
    whole = config_of(name, base, drawn, tmp_path / "whole")
    whole = Config.model_validate({**whole.model_dump(mode="json"),
                                   "data": {**whole.data.model_dump(mode="json"), "val": {"path": str(drawn)}}})
    results = train(whole)
    assert {f"val/{loss}" for loss in LOSSES[name]} | {METRIC.get(name, "bbox/AP")} <= set(results)
    assert {key for key in results if key.startswith("val/loss_")} == {f"val/{loss}" for loss in LOSSES[name]}

    broken = config_of(name, base, drawn, tmp_path / "broken")
    at = Schedule.at

    def stop(self, step, rows):
        if step == 1:
            raise KeyboardInterrupt
        return at(self, step, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Schedule, "at", stop)
        train(broken)
    last = tmp_path / "broken" / "checkpoints" / "last.pt"
    assert load_state(last)["step"] == 1
    restores_all(broken, load_state(last))
    train(broken, resume=True)
    found, expected = (load_weights(tmp_path / run / "checkpoints" / "final.safetensors")[0]
                       for run in ("broken", "whole"))
    assert found.keys() == expected.keys() and not [key for key in found if not torch.equal(found[key], expected[key])]


def restores_all(config: Config, saved: dict) -> None:
    """A new model takes up weights, averages and momentum of every parameter that trains."""
    model = build_model(config.model, len(saved["classes"]), len(saved["semantic_classes"]))
    state = TrainState(model, build_optimizer(model, config.train), EMA(model, config.train.ema))
    state.restore(dict(saved))
    assert all(torch.equal(tensor, saved["model"][key]) for key, tensor in model.state_dict().items())
    moving = [state.optimizer.state[p]["momentum_buffer"] for p in model.parameters() if p.requires_grad]
    assert all(buffer.isfinite().all() for buffer in moving) and any(buffer.any() for buffer in moving)
