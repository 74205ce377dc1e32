from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from detres.config import TrainConfig
from detres.engine.optim import EMA, Schedule, build_optimizer, clip_gradients, parameter_groups, set_lr


def test_multistep_by_hand():
    schedule = Schedule(lr=0.02, steps=100, kind="multistep", milestones=(60, 80), warmup_steps=10, warmup_factor=0.1)
    expected = {0: 0.002, 5: 0.02 * (0.1 + 0.9 * 0.5), 9: 0.02 * 0.91, 10: 0.02, 59: 0.02, 60: 0.002, 79: 0.002,
                80: 0.0002}
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected)


def test_cosine_by_hand():
    schedule = Schedule(lr=1.0, steps=100, kind="cosine", warmup_steps=50, warmup_factor=0.0)
    expected = {0: 0.0, 25: 0.5 * 0.5 * (1 + math.cos(math.pi / 4)), 50: 0.5, 75: 0.5 * (1 - math.cos(math.pi / 4))}
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected)
    assert 0 < schedule.at(99) < 1e-3


def test_linear_rule():
    train = TrainConfig(batch_size=4, reference_batch_size=16, lr=0.02, steps=90, milestones=(60, 80), warmup_steps=10)
    schedule = Schedule.scaled(train)
    assert (schedule.lr, schedule.steps, schedule.milestones, schedule.warmup_steps) == (0.005, 360, (240, 320), 40)
    told = schedule.describe(train)
    assert "\n" not in told and "x0.25" in told and "lr 0.005, 360 steps, warm-up 40, milestones 240, 320" in told
    same = TrainConfig()
    assert Schedule.scaled(same).at(50_000) == same.lr
    assert "no scaling" in Schedule.scaled(same).describe(same)
    assert Schedule.scaled(TrainConfig(batch_size=64, reference_batch_size=1, steps=10)).steps == 1


def small_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2))
    net[3].bias.requires_grad_(False)
    return net


def test_norms_and_biases_without_decay():
    net = small_net()
    [group] = parameter_groups(net, 0.1, decay_norm_and_bias=True)
    assert len(group["params"]) == 5 and group["weight_decay"] == 0.1
    decayed, free = parameter_groups(net, 0.1, decay_norm_and_bias=False)
    assert {id(p) for p in decayed["params"]} == {id(net[0].weight), id(net[3].weight)}
    assert {id(p) for p in free["params"]} == {id(net[0].bias), id(net[1].weight), id(net[1].bias)}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_steps_as_torch_documents_it(name):
    """The fused step equals the plain one, with weights in channels_last."""
    train = TrainConfig(optimizer=name, lr=0.1, momentum=0.8, weight_decay=0.01)
    nets = [small_net().to(memory_format=torch.channels_last) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    options = {"lr": 0.03, "weight_decay": 0.01, "fused": False, "foreach": False}
    trainable = [p for p in nets[1].parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trainable, **options)
    if name == "sgd":
        plain = torch.optim.SGD(trainable, momentum=0.8, **options)
    ours = build_optimizer(nets[0], train)
    set_lr(ours, 0.03)
    images = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        for net, optimizer in zip(nets, (ours, plain)):
            optimizer.zero_grad()
            net(images).square().sum().backward()
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="freeze_stages"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainConfig())


def test_clipping_bounds_the_global_norm():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters())

    def gradients() -> torch.Tensor:
        return torch.cat([net.weight.grad.flatten(), net.bias.grad])

    net.weight.grad, net.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert clip_gradients(optimizer, None) == 5 and gradients().tolist() == [3, 0, 4]
    assert clip_gradients(optimizer, 10.0) == 5 and gradients().tolist() == [3, 0, 4]
    assert clip_gradients(optimizer, 1.0) == 5
    torch.testing.assert_close(gradients(), torch.tensor([0.6, 0.0, 0.8]))


def test_ema_by_hand():
    net = nn.BatchNorm1d(1)
    net.weight.data.fill_(1.0)
    ema = EMA(net, decay=0.5)
    net.weight.data.fill_(2.0)
    net.running_mean.fill_(10.0)
    net.num_batches_tracked.fill_(3)
    ema.update(step=0)  # decay min(0.5, 1 / 10)
    assert ema.model.weight.item() == pytest.approx(1.9)
    assert ema.model.running_mean.item() == pytest.approx(9.0)
    assert ema.model.num_batches_tracked.item() == 3
    ema.update(step=100)  # decay 0.5
    assert ema.model.weight.item() == pytest.approx(1.95)
    assert net.weight.item() == 2.0 and net.weight.requires_grad and not ema.model.weight.requires_grad
