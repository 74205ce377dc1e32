"""What training does with label maps: parts of a batch, weights files, the best checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detres.engine.checkpoint import TrainState, WeightsMeta, load_weights, save_weights
from detres.engine.step import split
from detres.engine.tasks import TASKS
from detres.structures import SemanticTargets


def test_split_keeps_every_map_with_its_image(batch):
    whole = batch(0, images=6)
    maps = torch.arange(6, dtype=torch.uint8)[:, None, None].expand(-1, 8, 12)
    for targets in (SemanticTargets(maps), replace(whole.targets, semantic=maps)):
        parts = split(replace(whole, targets=targets), 3)
        assert [type(part.targets) for part in parts] == [type(targets)] * 3
        own = [part.targets.labels if isinstance(targets, SemanticTargets) else part.targets.semantic for part in parts]
        assert [each[:, 0, 0].tolist() for each in own] == [[0, 1], [2, 3], [4, 5]]
        assert [len(part.images.pixels) for part in parts] == [2, 2, 2]


def test_weights_say_what_stuff_they_know(tmp_path):
    meta = WeightsMeta({}, ("cat",), (3,), 1, {}, semantic_classes=("things", "sky"), semantic_ids=(0, 187))
    save_weights(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, meta)
    assert load_weights(tmp_path / "a.safetensors")[1] == meta
    save_weights(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, WeightsMeta({}, ("cat",), (3,), 1, {}))
    assert load_weights(tmp_path / "b.safetensors")[1].semantic_classes == ()


@pytest.mark.parametrize("name, others", [("panoptic/PQ", {"segm/AP": 9.0, "sem_seg/mIoU": 9.0}), ("sem_seg/mIoU", {})])
def test_auto_keeps_the_best_by(name, others):
    state = TrainState(torch.nn.Linear(1, 1), None)
    assert state.is_best({name: 0.5, **others}, "auto")
    assert not state.is_best({name: 0.4, **{key: 10 * value for key, value in others.items()}}, "auto")
    assert state.is_best({name: 0.6, **others}, "auto")


def test_every_kind_has_a_task():
    from detres.build import MODELS

    assert set(TASKS) == set(MODELS)
