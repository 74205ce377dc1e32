"""Figures 6 and 7: what is measured, against naive computation; what is written."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from detres.build import build_model
from detres.config import ModelConfig
from detres.paper_figures import Network, error_table, layer_responses, plot_errors, plot_responses
from detres.structures import Batch, ClassTargets, ImageBatch


def write_run(folder, error: float, shift: float = 0.0) -> None:
    folder.mkdir(parents=True)
    rows = [{"step": step, "loss": 1.0, "error": error + 0.01 * (40 - step)} for step in range(1, 41)]
    rows += [{"step": step, "cls/top1_error": error + shift} for step in (20, 40)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def networks(tmp_path) -> list[Network]:
    for seed, shift in enumerate((0.0, 0.02)):
        write_run(tmp_path / f"plain20_{seed}", 0.3, shift)
        write_run(tmp_path / f"resnet20_{seed}", 0.2, shift)
    return [Network(name, (tmp_path / f"{name}_0", tmp_path / f"{name}_1")) for name in ("plain20", "resnet20")]


def test_table_has_mean_and_spread(networks):
    lines = error_table(networks, last=5).splitlines()
    # training: rows of steps 36 to 40 are 4, 3, 2, 1, 0 points above the last; test: 30 and 32
    assert lines[2] == "| plain20 | 2 | 32.00 ± 0.00 | 31.00 ± 1.41 |"
    assert lines[3] == "| resnet20 | 2 | 22.00 ± 0.00 | 21.00 ± 1.41 |"


def test_pictures_are_written(networks, tmp_path):
    plot_errors(networks, tmp_path / "errors.png", "title")
    plot_responses({"plain20": [1.0, 0.5], "resnet20": [0.4, 0.2]}, tmp_path / "responses.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("errors", "responses"))


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        error_table([Network("plain20", (tmp_path,))])


def test_responses_are_standard_deviations_after_bn():
    """Against the layers called one by one, by the statistics of the batch: before the addition, before ReLU."""
    config = ModelConfig.model_validate({"name": "classifier", "backbone": {
        "depth": 8, "stem": "cifar", "shortcut": "A", "width": 8, "weights": None, "norm": "bn", "freeze_stages": 0}})
    model = build_model(config, 4)
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    sizes = torch.tensor([[16, 16]] * 3)
    batches = [Batch(ImageBatch(part, sizes), ClassTargets(torch.zeros(3, dtype=torch.int64)), (), (), sizes)
               for part in pixels.split(3)]
    with torch.no_grad():
        model.backbone.body.bn1.running_var.fill_(1e-4)  # an image unlike those of training would explode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = layer_responses(model.eval(), batches, torch.device("cpu"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def norm(x, layer):
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)

    body, wanted = model.backbone.body, []
    with torch.no_grad():
        for batch in batches:
            outputs = [norm(body.conv1(model.normalize(batch.images)), body.bn1)]
            x = F.relu(outputs[0])
            for stage in (body.layer1, body.layer2, body.layer3):
                first = norm(stage[0].conv1(x), stage[0].bn1)
                second = norm(stage[0].conv2(F.relu(first)), stage[0].bn2)
                outputs += [first, second]
                x = F.relu(second + (x if stage[0].downsample is None else stage[0].downsample(x)))
            wanted.append(outputs)
        wanted = [torch.cat(parts).std(correction=0) for parts in zip(*wanted)]
    assert list(found) == ["conv1", *(f"layer{i}.0.conv{k}" for i in (1, 2, 3) for k in (1, 2))]
    assert list(found.values()) == pytest.approx([float(value) for value in wanted], rel=1e-5)
    assert model.training is False


def test_responses_need_batch_norm():
    config = ModelConfig.model_validate({"name": "classifier", "backbone": {
        "depth": 18, "width": 8, "weights": None, "norm": "gn", "freeze_stages": 0}})
    with pytest.raises(ValueError, match="GroupNorm32"):
        layer_responses(build_model(config, 4), [], torch.device("cpu"))
