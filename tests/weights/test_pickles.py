"""Files of weights from elsewhere: what they hold is read, and nothing that they ask for is run."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import pickletools
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from detres.weights.pickles import read_pickle, read_tensors, read_torch

ARRAYS = {
    "conv1_w": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "fortran": np.asfortranarray(np.eye(3, 2)),
    "big_endian": np.arange(3, dtype=">f4"), "half": np.ones((), np.float16), "empty": np.zeros((0, 4), np.float32),
    "long": np.array([1, -2]), "flags": np.array([True, False]), "byte": np.arange(3, dtype=np.uint8),
}


def same(got, wanted):
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype.newbyteorder("=") and got[name].shape == array.shape
        np.testing.assert_array_equal(got[name], array)
        assert got[name].flags.writeable


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_pickle_wrote(tmp_path, protocol):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": collections.OrderedDict(ARRAYS), "__author__": "Detectron2 Model Zoo",
                                   "numbers": [1, -70000, 2 ** 40, 0.5, True, None, b"raw", b"", (1, (2, 3, 4))],
                                   "scalar": np.float64(0.25)}, protocol))
    found = read_pickle(path)
    same(found["model"], ARRAYS)
    assert found["numbers"] == [1, -70000, 2 ** 40, 0.5, True, None, b"raw", b"", (1, (2, 3, 4))]
    assert (found["__author__"], found["scalar"]) == ("Detectron2 Model Zoo", 0.25)


def python2(arrays) -> bytes:
    """As Python 2's pickle, protocol 2, writes {"blobs": arrays}: byte strings, the old numpy.core."""
    def string(data):
        return b"T" + struct.pack("<I", len(data)) + data

    out = b"\x80\x02}" + string(b"blobs") + b"}("
    for name, array in arrays.items():
        shape = b"(" + b"".join(b"J" + struct.pack("<i", side) for side in array.shape) + b"t"
        out += string(name.encode()) + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        out += b"(K\x01" + shape + b"cnumpy\ndtype\n" + string(array.dtype.str[1:].encode()) + b"K\x00K\x01\x87R"
        out += b"(K\x03U\x01<NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb\x89" + string(array.tobytes()) + b"tb"
    return out + b"us."


def test_reads_what_python_2_wrote(tmp_path):
    arrays = {name: ARRAYS[name] for name in ("conv1_w", "long")}
    (tmp_path / "R-50.pkl").write_bytes(python2({**arrays, "conv1_w_momentum": ARRAYS["conv1_w"]}))
    np.testing.assert_equal(pickle.loads(python2(arrays), encoding="latin1")["blobs"], arrays)  # Python agrees
    tensors, _ = read_tensors(tmp_path / "R-50.pkl")
    assert list(tensors) == ["conv1_w", "long"]
    same({name: tensor.numpy() for name, tensor in tensors.items()}, arrays)


# ---- the kinds of files --------------------------------------------------------------------------------------------


def write_torch(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}


@pytest.mark.parametrize("write, extra", [
    (lambda path: save_file(STATE, path, {"author": "me"}), {"author": "me"}),
    (lambda path: write_torch(path, STATE), {}), (lambda path: write_torch(path, STATE, legacy=True), {}),
    (lambda path: write_torch(path, {"model": STATE, "iteration": 9}), {"iteration": 9}),
    (lambda path: write_torch(path, {"state_dict": STATE, "meta": {"epoch": 3}}), {"meta": {"epoch": 3}}),
    (lambda path: path.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in STATE.items()},
                                                 "matching_heuristics": True})), {"matching_heuristics": True}),
    (lambda path: path.write_bytes(pickle.dumps({**{k: v.numpy() for k, v in STATE.items()}, "note": "flat"})),
     {"note": "flat"}),
], ids=["safetensors", "torch", "torch-legacy", "detectron2-pth", "mmdetection", "detectron2-pkl", "flat-pkl"])
def test_the_content_says_what_a_file_is(tmp_path, write, extra):
    path = tmp_path / "named.wrongly"
    write(path)
    tensors, found = read_tensors(path)
    assert list(tensors) == list(STATE) and all(torch.equal(tensors[name], STATE[name]) for name in STATE)
    assert found == extra


# ---- hostile files -------------------------------------------------------------------------------------------------

MARKER = "ran"  # a file in the working directory that every attack would make


class Calls:
    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def make(instructions: bytes) -> bytes:
    return b"\x80\x04" + instructions


def stack_global(module: str, name: str) -> bytes:
    return make(b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93.")


TOUCH = f"touch {MARKER}"
SHELL = b"X" + struct.pack("<I", len(TOUCH)) + TOUCH.encode()
F4 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00<NNN" + 2 * b"J\xff\xff\xff\xff" + \
    b"K\x00tb"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tX\x01\x00\x00\x00btR"
HOSTILE = {
    "os.system": (pickle.dumps({"model": Calls(os.system, TOUCH)}), "the global posix.system"),
    "nested": (pickle.dumps({"model": {"a": [np.ones(2), (Calls(eval, f"open('{MARKER}', 'w')"),)]}}), "builtins.eval"),
    "as argument": (pickle.dumps({"a": Calls(collections.OrderedDict, [Calls(os.system, TOUCH)])}), "posix.system"),
    "exec": (pickle.dumps(Calls(exec, f"open('{MARKER}', 'w')")), "the global builtins.exec"),
    "getattr": (pickle.dumps(Calls(getattr, "", "join")), "the global builtins.getattr"),
    "dotted": (stack_global("collections", "OrderedDict.__init__.__globals__"), "OrderedDict.__init__.__globals__"),
    "dotted module": (stack_global("numpy", "ndarray.tofile"), "numpy.ndarray.tofile"),
    "module path": (stack_global("numpy.core.multiarray", "os.system"), "numpy.core.multiarray.os.system"),
    "numpy.load": (pickle.dumps(Calls(np.load, "x.npy", None, True)), "the global numpy.load"),
    "numpy.memmap": (make(b"cnumpy\nmemmap\n(X\x03\x00\x00\x00rantR."), "numpy.memmap"),
    "runstring": (make(b"cnumpy.testing._private.utils\nrunstring\n(" + SHELL + b"}tR."), "runstring"),
    "stack global of a global": (make(b"cnumpy\ndtype\n\x8c\x06system\x93."), "numpy.dtype.system"),
    "stack global of a list": (make(b"]\x8c\x06system\x93."), "an instruction on a list"),
    "INST": (make(b"(" + SHELL + b"ios\nsystem\n."), "instruction INST"),
    "OBJ": (make(b"(cos\nsystem\n" + SHELL + b"o."), "the global os.system"),
    "OBJ of allowed": (make(b"(ccollections\nOrderedDict\no."), "instruction OBJ"),
    "NEWOBJ": (make(b"ccollections\nOrderedDict\n)\x81."), "instruction NEWOBJ"),
    "EXT1": (make(b"\x82\x01."), "instruction EXT1"), "EXT4": (make(b"\x84\x01\x00\x00\x00."), "instruction EXT4"),
    "PERSID": (make(b"Pos.system\n."), "instruction PERSID"),
    "BINPERSID": (make(SHELL + b"Q."), "instruction BINPERSID"),
    "NEXT_BUFFER": (make(b"\x97."), "instruction NEXT_BUFFER"),
    "BUILD on a class": (make(b"ccollections\nOrderedDict\nN}X\x04\x00\x00\x00itemK\x01s\x86b."),
                         "an instruction on 'collections.OrderedDict'"),
    "BUILD on a dict": (make(b"}N}X\x08\x00\x00\x00__dict__K\x01s\x86b."), "an instruction on a dict"),
    "BUILD of a dict": (make(EMPTY + b"}b."), "an instruction on a dict"),
    "call of a string": (make(SHELL + b")R."), f"an instruction on '{TOUCH}' in place of a global"),
    "call of ndarray": (make(b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R."), "a call of numpy.ndarray"),
    "arguments in a list": (make(b"cnumpy\ndtype\n]R."), "an instruction on a list"),
    "object array": (pickle.dumps({"a": np.array([Calls(os.system, TOUCH)], object)}), "dtype O8"),
    "plain object array": (pickle.dumps({"a": np.array([None, 1], object)}), "dtype O8"),
    "objects as numbers": (make(EMPTY + b"(K\x01(K\x01t" + F4 + b"\x89]tb."), "an array of list in place of numbers"),
    "records": (pickle.dumps({"a": np.zeros(2, [("x", "f4"), ("y", "O")])}), "dtype V"),
    "dates": (pickle.dumps({"a": np.zeros(2, "M8[s]")}), "dtype M8"),
    "matrix": (make(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tX\x01\x00\x00\x00btR."),
               "an array of type numpy.dtype"),
    "encode to a file": (make(b"c_codecs\nencode\n" + SHELL + b"\x8c\x03zip\x86R."), "_codecs.encode with zip"),
    "decode": (make(b"c_codecs\ndecode\n" + SHELL + b"\x85R."), "_codecs.decode"),
    "huge array": (make(EMPTY + b"(K\x01(\x8a\x06\x00\x00\x00\x00\x00\x7ft" + F4 + b"\x89C\x00tb."), "with 0 bytes"),
    "negative": (make(EMPTY + b"(K\x01(J\xff\xff\xff\xffJ\xff\xff\xff\xfft" + F4 + b"\x89C\x04abcdtb."),
                 "of shape (-1, -1)"),
    "never built": (make(b"}X\x01\x00\x00\x00a" + EMPTY + b"s."), "an array without numbers"),
    "deep key": (make(b"})" + b"\x85" * 100_000 + b"K\x01s."), "a tuple as key"),
    "unknown": (make(b"\xff."), "a damaged pickle"), "no stack": (make(b"R."), "a damaged pickle"),
    "huge string": (make(b"\x8d" + struct.pack("<Q", 1 << 60) + b"a."), "a damaged pickle"),
    "huge bytes": (make(b"B\xff\xff\xff\xffa."), "a damaged pickle"),
    "huge memo": (make(b"j\xff\xff\xff\x7f."), "a damaged pickle"),
    "no end": (make(b"}"), "a damaged pickle"), "a list": (pickle.dumps([np.ones(2)]), "got a list"),
    "a number": (pickle.dumps(1), "got a int"), "no tensor": (pickle.dumps({"lr": 0.1}), "none in its keys ['lr']"),
}


@pytest.mark.parametrize("content, told", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch, content, told):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tensors(path)
    assert "model.pkl" in str(error.value) and told in str(error.value)
    assert not (tmp_path / MARKER).exists()


def test_the_attacks_are_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "nested", "exec", "object array", "INST", "OBJ"):
        pickle.loads(HOSTILE[name][0])
        assert (tmp_path / MARKER).exists(), name
        (tmp_path / MARKER).unlink()


@pytest.mark.parametrize("end", [0, 1, 2, 3, 40, 200, 400])
def test_truncated_pickle(tmp_path, end):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": ARRAYS})[:end])
    with pytest.raises(ValueError, match="model.pkl"):
        read_tensors(path)
    with pytest.raises(ValueError, match="model.pkl"):
        read_pickle(path)


def test_any_byte_may_be_wrong(tmp_path):
    """Nothing but ValueError leaves the reader, whatever is in the file."""
    rng, good = np.random.default_rng(0), pickle.dumps({"model": {"a": np.arange(4.0), "b": [1, "x", (2,)]}}, 4)
    path = tmp_path / "model.pkl"
    for _ in range(300):
        bad = bytearray(good)
        for position in rng.integers(2, len(bad), 3):
            bad[position] = rng.integers(256)
        path.write_bytes(bad)
        try:
            read_pickle(path)
        except ValueError:
            pass


def archive(data: bytes, compression=zipfile.ZIP_STORED) -> bytes:
    """A torch file around other content than torch.save's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/version", "3\n")
    return buffer.getvalue()


def legacy(data: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    head = buffer.getvalue()
    ends = [position for opcode, _, position in pickletools.genops(head) if opcode.name == "STOP"]
    rest = head[ends[0] + 1:]
    for _ in range(2):  # magic number, protocol, then sizes of types
        rest = rest[[p for o, _, p in pickletools.genops(rest) if o.name == "STOP"][0] + 1:]
    return head[:len(head) - len(rest)] + data


def bytes_of(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


HOSTILE_TORCH = {
    "zip": (archive(pickle.dumps({"a": Calls(os.system, TOUCH)}, 2)), "the global posix.system"),
    "legacy": (legacy(pickle.dumps({"a": Calls(os.system, TOUCH)}, 2)), "the global posix.system"),
    "eval": (archive(pickle.dumps(Calls(eval, f"open('{MARKER}', 'w')"), 2)), "the global eval"),
    "model": (bytes_of(torch.nn.Linear(2, 2)), "the global torch.nn.modules.linear.Linear"),
    "compressed": (archive(bytes(10_000_000), zipfile.ZIP_DEFLATED), "compressed or overlapping"),
    "expanded": (bytes_of({"model": {"a": torch.ones(1).expand(1 << 40)}}), "a (1099511627776,)"),
    "sparse": (bytes_of({"a": torch.ones(2, 2).to_sparse()}), "torch.sparse_coo"),
    "meta": (bytes_of({"a": torch.ones(2, device="meta")}), "without numbers of its own"),
    "tensor": (bytes_of(torch.ones(2)), "got a Tensor"), "text": (b"not a model at all", "begins with b'not a mo'"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version '"),
    "html": (b"<!DOCTYPE html><html>", "begins with"), "empty": (b"", "an empty file"),
    "short zip": (bytes_of(STATE)[:300], "model.pth"), "short legacy": (bytes_of(
        STATE, _use_new_zipfile_serialization=False)[:-20], "model.pth"),
    "huge safetensors": (struct.pack("<Q", 1 << 60) + b"{}", "safetensors"),
    "short safetensors": (struct.pack("<Q", 90) + b'{"a": {"dtype": "F32"', "safetensors"),
    "safetensors past its end": (
        struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[999],"data_offsets":[0,3996]}}   ', "safetensors"),
}


@pytest.mark.parametrize("content, told", HOSTILE_TORCH.values(), ids=list(HOSTILE_TORCH))
def test_hostile_torch_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, content, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tensors(tmp_path / "model.pth")
    assert "model.pth" in str(error.value) and told in str(error.value)
    assert not (tmp_path / MARKER).exists()


def test_views_of_one_storage_are_fine(tmp_path):
    both = torch.arange(6.0)
    torch.save({"model": {"a": both[:3], "b": both[2:].flip(0), "c": both.view(2, 3).T}}, tmp_path / "model.pth")
    assert read_torch(tmp_path / "model.pth")["model"]["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("content", [
    {"model": STATE, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "epoch": 3,
     "args": argparse.Namespace(lr=1, device="cuda", output=pathlib.PosixPath("/out"))},  # torchvision's scripts
    {"state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()}, "epoch": 3},  # Lightning
    {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},  # DataParallel
    {"model": STATE, "model_ema": {f"module.{name}": tensor + 1 for name, tensor in STATE.items()}},
    {"n_averaged": torch.ones(()), **{f"module.{name}": tensor for name, tensor in STATE.items()}},
    {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
    {"model_state_dict": STATE, "optimizer_state_dict": {"state": {}}, "loss": 0.5, "best": np.float64(3)},
])
def test_where_people_put_weights(content, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    found, about = read_tensors(tmp_path / "model.pth")
    assert found.keys() == STATE.keys() and all(found[name].equal(STATE[name]) for name in STATE)
    assert "args" not in about and ("model_ema" in about) == ("model_ema" in content)


def test_several_state_dicts_are_named(tmp_path):
    torch.save({"student": STATE, "teacher": STATE}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="one dict of tensors, got several: student, teacher"):
        read_tensors(tmp_path / "model.pth")


class History:
    """As MMEngine's records of losses: arrays, and a method of its class."""

    __module__, __qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"

    def __init__(self):
        self.values, self.mean = np.ones(2), getattr


def test_records_beside_weights_are_passed_over(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = History
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"state_dict": STATE, "message_hub": {"loss": History()}, "meta": {"epoch": 3}}, tmp_path / "model.pth")
    monkeypatch.undo()
    found, about = read_tensors(tmp_path / "model.pth")
    assert found.keys() == STATE.keys() and about["meta"] == {"epoch": 3} and not vars(about["message_hub"]["loss"])
    torch.save({"model": {**STATE, "c": np.ones(2)}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="got c, an array of numpy"):
        read_tensors(tmp_path / "model.pth")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights file must exist"):
        read_tensors(tmp_path / "none.pkl")
