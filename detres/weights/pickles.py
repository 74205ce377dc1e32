"""Weights that others wrote, read without running anything: pickles of numpy arrays, torch files, safetensors.

A pickle is a program, and loading one the ordinary way runs it. Detectron2's and Caffe2's model files (.pkl) need few
of its instructions. `read_pickle` interprets those itself, so that there is nothing to run: a global is a name in a
table here, never an import, and "calling" it makes an array, a dtype, a number, bytes or a dict.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ZIP = b"PK\x03\x04"
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's own magic number, itself pickled
PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5))
SECTIONS = ("model", "blobs", "state_dict")  # Detectron2 and torchvision, Caffe2, MMDetection: where tensors are
# What comes before all names in a model that was wrapped: by DataParallel and averages, Lightning, torch.compile.
WRAPPERS = re.compile(r"((module|model|_orig_mod)\.)+")
OPTIMIZER = re.compile(r".*_momentum$")  # Caffe2 keeps the momentum of each blob beside it
# What stands beside the weights of a run: MMEngine's records of losses, the options of torchvision's scripts.
RECORDS = ("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", "numpy.ndarray", "numpy.dtype",
           "argparse.Namespace",
           *(f"pathlib{module}.{system}Path" for module in ("", "._local") for system in ("Posix", "Windows")),
           *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")))
HINT = "Get the file from its publisher again, or save its tensors alone where it can be loaded: " \
       "torch.save(model.state_dict(), 'weights.pth')."


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and whatever else the file says (`__author__`, `iteration` ...), of a file of any kind.

    The kind is told from its content: safetensors, a torch file (zip or legacy), or a pickle of numpy arrays. Raises
    FileNotFoundError, or ValueError that names the file and what of it was refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file must exist, got '{path}'. Check the path.")
    with path.open("rb") as file:
        start = file.read(len(LEGACY_TORCH))
    if not start:
        raise _refused(path, "an empty file", "tensors")
    if start.startswith(ZIP) or start == LEGACY_TORCH:
        found = read_torch(path)
    elif start.startswith(PICKLE):
        found = read_pickle(path)
    elif start[8:9] == b"{":
        found = _read_safetensors(path)
    else:
        raise _refused(path, f"a file that begins with {start[:8]!r}", "a safetensors, torch or pickle file")
    section = _section(path, found)
    inside = found if section is None else found[section]
    outside = {} if section is None else {name: value for name, value in found.items()
                                          if name != section and not isinstance(value, _Record)}
    _check_values(path, inside)
    tensors = {name: _tensor(value) for name, value in inside.items() if isinstance(value, (Tensor, np.ndarray))
               and isinstance(name, str) and not OPTIMIZER.match(name)}
    if not tensors:
        raise _refused(path, f"none in its keys {[str(name)[:40] for name in found][:6]}", "a dict of tensors")
    rest = {name: value for name, value in inside.items() if not isinstance(value, (Tensor, np.ndarray))}
    return _unwrapped(tensors), {**outside, **rest}


def holds_tensors(value: Any) -> bool:
    """Whether it is a dict of tensors, as a state dict is, which that of an optimizer is not."""
    return isinstance(value, dict) and any(isinstance(each, (Tensor, np.ndarray)) for each in value.values())


def _section(path: Path, found: dict[str, Any]) -> str | None:
    """The key of the state dict, where others stand beside it; None where `found` is one."""
    inner = [name for name, value in found.items() if holds_tensors(value)]
    if known := [name for name in SECTIONS if name in inner]:
        return known[0]
    if not inner or holds_tensors(found):
        return None
    if len(inner) > 1:
        raise _refused(path, f"several: {', '.join(map(str, inner))}", "one dict of tensors")
    return inner[0]


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what a wrapper put before the names; an average has one tensor more, that counts."""
    starts = {match[0] if (match := WRAPPERS.match(name)) else "" for name in tensors if name != "n_averaged"}
    if len(starts) != 1 or starts == {""}:
        return tensors
    start = starts.pop()
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


class _Record:
    """In place of an object of `RECORDS`, of which nothing is made: it forgets what it is given."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch(path: str | Path) -> dict[str, Any]:
    """What `torch.save` wrote, through `torch.load(weights_only=True)`. Raises ValueError with what it refused."""
    path = Path(path)
    _check_zip(path)
    try:
        with torch.serialization.safe_globals([(_Record, name) for name in RECORDS]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        if name := re.search(r"GLOBAL (\S*\w)", text):
            raise _refused(path, f"the global {name[1]}", "tensors, numbers and containers alone") from None
        what = f"a damaged one: {type(error).__name__}: {text.partition('. This is')[0][:200]}"
        raise _refused(path, what, "what torch.save wrote, whole") from None
    if not isinstance(found, dict):
        raise _refused(path, f"a {type(found).__name__}", "a dict of tensors")
    return found


def _check_values(path: Path, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, _Record):
            raise _refused(path, f"{name}, an array of numpy or another object",
                           "tensors, numbers and containers alone")
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.device.type != "cpu" \
                or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise _refused(path, f"{name} {tuple(value.shape)}, {value.layout}, without numbers of its own",
                           "dense tensors")


def _check_zip(path: Path) -> None:
    """`torch.save` compresses nothing: what unpacks to more than there is was made by someone else."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type for entry in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
        raise _refused(path, "compressed or overlapping entries", "a zip as torch.save writes it, not compressed")


def _read_safetensors(path: Path) -> dict[str, Tensor | str]:
    """Tensors, and the strings that describe them."""
    try:
        with safe_open(path, "pt") as file:
            return {**(file.metadata() or {}), **{name: file.get_tensor(name) for name in file.keys()}}
    except SafetensorError as error:
        raise _refused(path, f"{type(error).__name__}: {error}", "a whole safetensors file") from None


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(value)


def _refused(path: Path, got: str, wanted: str) -> ValueError:
    return ValueError(f"weights file must hold {wanted}, got {got} ({path}). Nothing of it was run. {HINT}")


# ---- pickles -------------------------------------------------------------------------------------------------------


class _Refusal(Exception):
    """What is in a pickle and may not be."""


class _Global(str):
    """The name of a function or class, 'module.name': a key of `CALLS` or an argument of these."""


class _Built:
    """What a call made and BUILD completes. value: an array (None until then) or a dtype."""

    def __init__(self, value: Any, build: Callable[[Any, Any], Any]):
        self.value, self.build = value, build


def read_pickle(path: str | Path) -> dict[Any, Any]:
    """A pickle of protocol 2 to 5, by Python 2 or 3, that holds a dict of numpy arrays of numbers, containers, strings
    and numbers. Strings of Python 2 are read as latin-1. Raises ValueError that names the file and what it refused."""
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _run(data)
    except _Refusal as refusal:
        raise _refused(path, str(refusal), "arrays, numbers, strings and containers alone") from None
    except Exception as error:  # a damaged pickle: no bytes left, an empty stack, arguments of other types
        what = f"a damaged pickle: {type(error).__name__}: {str(error)[:200]}"
        raise _refused(path, what, "a whole pickle") from None
    if not isinstance(found, dict):
        raise _refused(path, f"a {type(found).__name__}", "a dict of arrays")
    return found


def _run(data: mmap.mmap) -> Any:
    """The object that the instructions in `data` make."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        return _value(stack.pop())

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        values = [_value(value) for value in stack[start:]]
        del stack[start:]
        return values

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([pop() for _ in range(int(name[-1]))])))
        elif name in ("TUPLE", "LIST"):
            stack.append((tuple if name == "TUPLE" else list)(pop_to_mark()))
        elif name in ("APPEND", "APPENDS"):
            values = [pop()] if name == "APPEND" else pop_to_mark()
            _expect(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [pop(), pop()][::-1] if name == "SETITEM" else pop_to_mark()
            _expect(stack[-1], dict).update(_pairs(zip(values[::2], values[1::2], strict=True)))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_allowed(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = _expect(pop(), str), _expect(pop(), str)
            stack.append(_allowed(f"{module}.{attribute}"))
        elif name == "REDUCE":
            arguments, function = _expect(pop(), tuple), _expect(stack.pop(), _Global)
            stack.append(_called(function, arguments))
        elif name == "BUILD":
            state, built = _expect(pop(), tuple), _expect(stack[-1], _Built)
            built.value = built.build(built.value, state)
        elif name == "STOP":
            return pop()
        elif name not in ("PROTO", "FRAME"):
            raise _Refusal(f"the pickle instruction {name}")
    raise _Refusal("no end")


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE",
            "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}


def _value(value: Any) -> Any:
    if not isinstance(value, _Built):
        return value
    if value.value is None:
        raise _Refusal("an array without numbers")
    return value.value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        name = f"'{value:.60}'" if isinstance(value, str) else f"a {type(value).__name__}"
        raise _Refusal(f"an instruction on {name} in place of a {kind.__name__.strip('_').lower()}")
    return value


def _pairs(pairs: Any) -> dict[Any, Any]:
    found = {}
    for key, value in pairs:
        if not isinstance(key, (str, int, bytes)):  # to hash a deep tuple overflows the stack
            raise _Refusal(f"a {type(key).__name__} as key of a dict")
        found[key] = value
    return found


def _allowed(name: str) -> _Global:
    if name not in CALLS and name != "numpy.ndarray":
        raise _Refusal(f"the global {name[:100]}")
    return _Global(name)


def _called(function: str, arguments: tuple[Any, ...]) -> Any:
    if function not in CALLS:
        raise _Refusal(f"a call of {function}")
    return CALLS[function](*arguments)


# What the calls in such a pickle make. Signatures are those of numpy's functions of these names.


def _dtype(name: str, align: Any = False, copy: Any = True) -> _Built:
    if not isinstance(name, str) or not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", name):
        raise _Refusal(f"an array of dtype {name!s:.20}")
    return _Built(np.dtype(name), _build_dtype)


def _build_dtype(dtype: np.dtype, state: tuple[Any, ...]) -> np.dtype:
    _, order, *fields = state  # fields: subarray, names, fields, sizes, flags: none for numbers
    if order not in ("<", ">", "|", "=") or any(field is not None for field in fields[:3]):
        raise _Refusal("an array of records")
    return dtype.newbyteorder(order)


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> _Built:
    if kind != "numpy.ndarray":
        raise _Refusal(f"an array of type {kind!s:.60}")
    return _Built(None, _build_array)


def _build_array(_: None, state: tuple[Any, ...]) -> np.ndarray:
    _version, shape, dtype, fortran, data = state
    return _frombuffer(data, dtype, shape, "F" if fortran else "C")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, bytearray, str)):
        raise _Refusal(f"an array of {type(data).__name__} in place of numbers")
    if not isinstance(shape, tuple) or any(type(side) is not int or side < 0 for side in shape):
        raise _Refusal(f"an array of shape {shape!s:.60}")
    data = data.encode("latin-1") if isinstance(data, str) else data
    if math.prod(shape) * dtype.itemsize != len(data):
        raise _Refusal(f"an array of shape {shape!s:.60} with {len(data)} bytes of {dtype}")
    flat = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))  # a copy: writable, in the machine's order
    return flat.reshape(shape, order=order).copy("C")


def _scalar(dtype: Any, data: Any) -> Any:
    return _frombuffer(data, dtype, (), "C").item()


def _encode(text: str, encoding: str = "latin1") -> bytes:  # how protocol 2 of Python 3 writes bytes
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refusal(f"a call of _codecs.encode with {encoding!s:.20}")
    return text.encode("latin-1")


def _bytes() -> bytes:
    return b""


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return _pairs(_expect(tuple(pair), tuple) for pair in pairs)


CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype, "_codecs.encode": _encode, "collections.OrderedDict": _ordered_dict,
    "builtins.bytes": _bytes, "__builtin__.bytes": _bytes,
    **{f"numpy.{core}.multiarray.{name}": call for core in ("core", "_core")
       for name, call in (("_reconstruct", _reconstruct), ("scalar", _scalar))},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
}
