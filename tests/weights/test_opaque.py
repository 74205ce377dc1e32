"""Files with objects that must not come to life."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from detres.weights.opaque import Opaque, load_opaque


class History:
    """As MMEngine's records of losses: an object with a state, and a function in it."""

    def __init__(self):
        self.values, self.mean = [1.0, 2.0], getattr(torch, "mean")


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_tensors_are_read_beside_unknown_objects(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "message_hub": {"loss": History()}, "meta": {"epoch": 3}},
               tmp_path / "w.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=True)
    found = load_opaque(tmp_path / "w.pth")
    assert found["state_dict"]["a"].tolist() == [1, 1] and found["meta"] == {"epoch": 3}
    assert isinstance(found["message_hub"]["loss"], Opaque) and not vars(found["message_hub"]["loss"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("make", [lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), lambda mark: Call(open, str(mark), "w"),
                                  lambda mark: Call(os.system, f"touch {mark}"), lambda mark: Call(Path.touch, mark)])
def test_nothing_is_called(tmp_path, make, zipped):
    torch.save({"a": make(tmp_path / "mark")}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    try:
        assert isinstance(load_opaque(tmp_path / "w.pth")["a"], Opaque)
    except pickle.UnpicklingError:
        pass  # refused is as good
    assert not (tmp_path / "mark").exists()


def test_plain_files_are_read_as_ever(tmp_path):
    for zipped in (True, False):
        torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert load_opaque(tmp_path / "w.pth")["state_dict"]["a"].tolist() == [1, 1]
