"""Names of other toolkits, there and back."""

from __future__ import annotations

import torch

from detres.weights.keymap import BACKGROUND_LAST, KeyMap, without_background

RULES = KeyMap([
    ("top.res{i+2}.{j}.conv{k}.norm.", "body.layer{i+1}.{j}.bn{k}."),
    ("top.res{i+2}.{j}.conv{k}.", "body.layer{i+1}.{j}.conv{k}."),
    ("tower.{2i}.", "tower.{i}."),
    ("score.", "cls.", BACKGROUND_LAST),
    ("mask.", "predict.", without_background()),
    ("new.{i}.0.", "fpn.{i}."),
    ("old.{i}.", "fpn.{i}."),
], ignored="anchors")


def test_there_and_back():
    theirs = {"top.res2.0.conv1.norm.bias": torch.rand(3), "top.res5.11.conv3.weight": torch.rand(3),
              "tower.0.weight": torch.rand(2), "tower.6.weight": torch.rand(2), "score.bias": torch.rand(4),
              "mask.weight": torch.cat([torch.zeros(1, 2), torch.rand(3, 2)]), "new.1.0.bias": torch.rand(2)}
    ours, unknown = RULES.to_ours(theirs)
    assert not unknown
    assert list(ours) == ["body.layer1.0.bn1.bias", "body.layer4.11.conv3.weight", "tower.0.weight", "tower.3.weight",
                          "cls.bias", "predict.weight", "fpn.1.bias"]
    assert ours["cls.bias"].equal(theirs["score.bias"].roll(-1)) and len(ours["predict.weight"]) == 3
    back, unknown = RULES.to_theirs(ours)
    assert not unknown and list(back) == list(theirs)
    assert all(back[name].equal(tensor) for name, tensor in theirs.items())


def test_older_names_are_read_and_not_written():
    ours, _ = RULES.to_ours({"old.0.weight": torch.ones(1)})
    assert list(ours) == ["fpn.0.weight"] and list(RULES.to_theirs(ours)[0]) == ["new.0.0.weight"]


def test_names_that_no_rule_fits():
    state = {name: torch.ones(1) for name in ("tower.1.weight", "top.res1.0.conv1.weight", "other", "anchors.0",
                                              "top.res2.0.conv1.norm.num_batches_tracked")}
    assert RULES.to_ours(state) == ({}, ["tower.1.weight", "top.res1.0.conv1.weight", "other"])


def test_a_number_that_stands_twice_must_agree():
    twice = KeyMap([("a{i}.b{i}.", "c{i}.")])
    state = {"a1.b1.x": torch.ones(1), "a1.b2.x": torch.ones(1)}
    assert twice.to_ours(state)[1] == ["a1.b2.x"] and "c1.x" in twice.to_ours(state)[0]
