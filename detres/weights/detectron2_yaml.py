"""Files of Detectron2's YAML configs, read without running anything, and settings that remember who read them.

What a file sets and no translation has read is named, so that nothing gets lost.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detres.weights.detectron2_defaults import BASES, DEFAULTS, SECTIONS


@dataclass(frozen=True)
class Untranslated:
    """A setting that is not in the translation, or not as it was."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.why}"


def read(source: str | Path | Mapping[str, Any], notes: list[Untranslated]) -> Settings:
    """The settings of a file, or of a mapping, over its bases. What was not read goes to `notes`."""
    if isinstance(source, Mapping):
        given, where = _merged(source, Path(), notes, ()), "config"
    else:
        given, where = _read(Path(source), notes, ()), str(source)
    return Settings(dict(_flat(given, where)), where, notes)


class _Loader(yaml.SafeLoader):
    """YAML without objects. Of Python's tags it knows the two that Detectron2's configs use: tuples, and arithmetic."""


def _tuple(loader: _Loader, node: yaml.Node) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _arithmetic(loader: _Loader, node: yaml.Node) -> Any:
    try:
        (text,) = loader.construct_sequence(node, deep=True)
        if len(text) > 200:  # lists within lists grow fast
            raise ValueError
        return _value(ast.parse(text, mode="eval").body, {})
    except (ArithmeticError, KeyError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        raise yaml.constructor.ConstructorError(problem="only arithmetic is computed, such as [[x, x * 2 ** (1.0 / 3)] "
                                                "for x in [32, 64]]", problem_mark=node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _arithmetic)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: operator.pow}


def _value(node: ast.expr, names: dict[str, float]) -> Any:
    """Numbers, lists, + - * / **, and [... for x in ...]. Raises KeyError, TypeError or ValueError for all else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = (float(_value(side, names)) for side in (node.left, node.right))  # floats cannot grow for long
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.ListComp) and len(node.generators) == 1 and not node.generators[0].ifs:
        (each,) = node.generators
        return [_value(node.elt, {**names, each.target.id: item}) for item in _value(each.iter, names)]
    raise TypeError(type(node).__name__)


def _read(path: Path, notes: list[Untranslated], chain: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of a file and of its bases."""
    if path.resolve() in chain:
        raise ValueError(f"_BASE_ must not lead back to its own chain, got {path} ({chain[-1]}).")
    if not path.is_file():
        named_by = f" (_BASE_ of {chain[-1]})" if chain else ""
        raise FileNotFoundError(f"config of Detectron2 must exist, got '{path}'{named_by}. Check the path.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"config of Detectron2 must be YAML without Python objects, got {told} ({path}). Write what "
                         "these make as plain values.") from None
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"config of Detectron2 must be a mapping of sections, got a {kind} ({path}).")
    return _merged(content, path, notes, (*chain, path.resolve()))


def _merged(content: Mapping[str, Any], path: Path, notes: list[Untranslated],
            chain: tuple[Path, ...]) -> dict[str, Any]:
    """`content` over its base. path: of the file that it is of."""
    content = dict(content)
    base = content.pop("_BASE_", None)
    if base is None:
        return content
    if not isinstance(base, str) or "://" in base:
        raise ValueError(f"_BASE_ must be one path, got {base!r} ({path}). Put the file beside this one.")
    file = path.parent / Path(base).expanduser()
    if file.is_file() or file.name not in BASES:
        below = _read(file, notes, chain)
    else:
        below = _merged(BASES[file.name], file, [], chain)
        notes.append(Untranslated("_BASE_", base, f"no such file; taken for Detectron2's own {file.name}"))
    return _over(content, below)


def _over(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _over(value, old[key]) for key, value in new.items()
            if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)}
    return {**old, **new, **both}


def _flat(tree: Mapping[str, Any], where: str, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all settings; strings that hold Python literals become these, as in yacs."""
    for key, value in tree.items():
        if depth > 6 or not isinstance(key, str):
            raise ValueError(f"config of Detectron2 must have sections of named settings, got {key!r:.60} in "
                             f"{prefix[:-1]!r:.60} ({where}).")
        if isinstance(value, Mapping) and f"{prefix}{key}" in DEFAULTS:
            raise ValueError(f"{prefix}{key} must be a setting, got a section ({where}).")
        if not isinstance(value, Mapping) and f"{prefix}{key}" in SECTIONS:
            raise ValueError(f"{prefix}{key} must be a section, got {value!r:.60} ({where}).")
        if isinstance(value, Mapping):
            yield from _flat(value, where, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- settings that remember who was asked --------------------------------------------------------------------------

WHY = {  # of settings that nothing below reads, by the beginning of their names
    "CUDNN_BENCHMARK": "left to torch", "FLOAT32_PRECISION": "left to torch", "GLOBAL.": "nothing reads it",
    "VIS_PERIOD": "training draws no pictures",
    "DATALOADER.REPEAT": "images are drawn evenly", "DATALOADER.SAMPLER_TRAIN": "images are drawn evenly",
    "DATASETS.PR": "proposals are computed, not read from files",
    "INPUT.CROP.": "no crops of relative size; data.augment.crop_size and jitter are others",
    "INPUT.MASK_FORMAT": "polygons and bitmaps are both read",
    "MODEL.LOAD_PROPOSALS": "proposals are computed, not read from files",
    "MODEL.ROI_BOX_HEAD.FED_LOSS": "no federated loss", "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": "no federated loss",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": "classes compete in a softmax",
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS": "images without keypoints train boxes",
    "SOLVER.WEIGHT_DECAY_NORM": "no norm trains",
    "SOLVER.REFERENCE_WORLD_SIZE": "train.batch_size is over all processes",
    "SOLVER.RESCALE_INTERVAL": "one schedule that multiplies by 0.1 at milestones",
    "SOLVER.NUM_DECAYS": "one schedule that multiplies by 0.1 at milestones",
    "TEST.AUG.": "test-time augmentation is not in a translation; see eval.test_scales",
    "TEST.EXPECTED_RESULTS": "for Detectron2's own tests",
    "TEST.KEYPOINT_OKS_SIGMAS": "keypoints are judged by the constants of COCO",
    "TEST.PRECISE_BN.": "run `detres bn-stats` after training",
}


class Settings:
    """What the files set, over Detectron2's defaults. Reading marks a setting as translated."""

    def __init__(self, given: dict[str, Any], where: str, notes: list[Untranslated]):
        self.given, self.where, self.notes, self.read = given, where, notes, {"VERSION"}
        if given.get("VERSION", 2) != 2 or "MODEL.WEIGHT" in given or "TEST.AUG_ON" in given:
            got = given.get("VERSION", "none, and names of version 1")
            raise ValueError(f"VERSION must be 2, got {got} ({where}). Let Detectron2 upgrade the file: "
                             "config.upgrade_config.")
        for key, value in given.items():
            if key in DEFAULTS and not _alike(value, DEFAULTS[key]):
                kind = type(DEFAULTS[key]).__name__
                raise ValueError(f"{key} must be a {kind}, as in Detectron2, got {value!r:.80} ({where}).")

    def __call__(self, key: str, length: int | None = None) -> Any:
        """The setting; a list of `length` if given."""
        self.read.add(key)
        value = self.given.get(key, DEFAULTS[key])
        if length is not None and len(value) != length:
            raise ValueError(f"{key} must have {length} entries, got {value!r:.80} ({self.where}).")
        return value

    def name(self, key: str, why: str) -> None:
        """Read the setting, and name it as not translated."""
        self.notes.append(Untranslated(key, self(key), why))

    def expect(self, key: str, accepted: Any, why: str) -> None:
        """Name the setting as not translated, unless it has the value that detres stands for."""
        if self(key) != accepted:
            self.name(key, why)

    def choose(self, key: str, choices: Mapping[Any, Any]) -> Any:
        """What stands for the setting here. Raises ValueError for a value without a counterpart."""
        value = self(key)
        try:
            return choices[value]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{key} must be one of {known} to be translated, got {value!r:.80} ({self.where}). detres "
                             "has nothing like it.") from None

    def name_unread(self) -> None:
        """Name what is set, differs from the default, and was not read."""
        sections = {key.rpartition(".")[0] for key in self.read}
        for key, value in self.given.items():
            if key in self.read or (key in DEFAULTS and value == DEFAULTS[key]):
                continue
            reasons = [why for start, why in WHY.items() if key.startswith(start)]
            if key not in DEFAULTS:
                reasons = ["no setting of Detectron2 itself"]
            elif not any(section.startswith(key.rpartition(".")[0]) for section in sections):
                reasons = reasons or ["of a part that this model does not have"]
            self.notes.append(Untranslated(key, value, (reasons or ["nothing here corresponds to it"])[0]))


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of the kind that a default has, as yacs asks it."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float) or default is None:  # the only default that is None is a number otherwise
        return isinstance(value, (int, float)) or (value is None and default is None)
    if isinstance(default, list) and isinstance(value, list) and default and value:
        return all(_alike(item, default[0]) for item in value)
    return isinstance(value, (int, float) if isinstance(default, int) else type(default))
