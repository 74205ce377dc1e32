"""YAML files and `key=value` overrides into a `Config`, and back.

A file may name one parent, `base: _base/coco.yaml`, relative to itself; mappings merge key by key, everything else is
replaced. `weights: NAME` begins with the model of these weights, of any toolkit (`weights.importers`): the section
`model` is theirs but for what the config itself says, and training begins from them. Overrides come last:
`train.lr=0.02 model.backbone.depth=101 train.milestones=[6000,8000]`. Values follow the core schema of YAML 1.2: `1e-3`
is a number, `off` and `2024-01-01` are strings. Relative paths inside a config (data, weights, output) start at the
working directory.

All that is wrong is reported at once, with the dotted path, the file and line, and what would be accepted. For
completion and checks in an editor write the schema once, `detres config --schema > detres.schema.json`, and put
`# yaml-language-server: $schema=detres.schema.json` at the top of a YAML file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .config import SAME_BOXES, Config, SourceConfig

COMMAND_LINE = "command line"
DEFAULT = "default"
WEIGHTS = "weights"  # a key of files and overrides that is no field: it stands for a section `model`
_MAP = "tag:yaml.org,2002:map"


class ConfigError(ValueError):
    """What is wrong with a configuration, all of it; `problems` holds one message each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(dict.fromkeys(problems))
        lines = "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(self.problems[0] if len(self.problems) == 1
                         else f"{len(self.problems)} problems in the configuration:{lines}")


@dataclass(frozen=True)
class ResolvedConfig:
    """`origins` maps each dotted path to "default", "file.yaml:12" or "command line"."""

    config: Config
    origins: dict[str, str]


@dataclass(frozen=True)
class _Leaf:
    value: Any
    origin: str


_Tree = dict[str, Any]  # str -> _Leaf | _Tree
_Leaves = dict[tuple[str, ...], _Leaf]


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Read `path` with its chain of bases (None: the defaults alone), apply `overrides`, validate.

    Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    return _resolve(_files(path, problems), overrides, problems)


def override(config: Config, overrides: Sequence[str], origin: str) -> Config:
    """`config`, which comes from `origin`, with `overrides`. Raises ConfigError with every problem found."""
    problems: list[str] = []
    loader, node = _parse(dump_yaml(config), origin, problems)
    layer = _layer(node, loader, Config, "", lambda _: origin, problems)
    return _resolve([layer], overrides, problems).config


def dump_yaml(config: Config) -> str:
    """Every field as YAML; loading it gives an equal Config."""
    return "\n".join(text for text, _ in _lines(config)) + "\n"


def format_config(resolved: ResolvedConfig) -> str:
    """Every field as YAML, each with a comment that says where its value came from."""
    lines = list(_lines(resolved.config))
    width = min(60, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}  # {resolved.origins[name]}" if name else text for text, name in lines) + "\n"


def shipped_configs() -> Path:
    """configs/ of an installed package, or else of the checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.exists() else package.parent / "configs"


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors."""
    schema = Config.model_json_schema()
    schema["properties"] = {"base": {"type": "string", "description": "parent file, relative to this one"},
                            "weights": {"type": "string", "description": "whose model to train, beginning from them: a "
                                                                         "run, a file, or a published name"},
                            **schema["properties"]}
    source = schema["$defs"]["SourceConfig"]
    schema["$defs"]["SourceConfig"] = {"anyOf": [{"type": "string"}, source]}  # a path alone will do
    return schema


def _resolve(layers: Sequence[_Tree], overrides: Sequence[str], problems: list[str]) -> ResolvedConfig:
    tree: _Tree = {}
    for layer in (*layers, *_overrides(overrides, problems)):
        tree = _merge(tree, layer)
    tree = _with_weights(tree, problems)
    leaves = dict(_leaves(tree))
    config = _validate(tree, leaves, problems)
    if config is None or problems:
        raise ConfigError(problems)
    origins = {".".join(p): leaf.origin for p, leaf in leaves.items()}
    return ResolvedConfig(config, {name: origins.get(name, DEFAULT) for name, _ in _fields(config)})


def _with_weights(tree: _Tree, problems: list[str]) -> _Tree:
    """`weights: NAME` as sections of the model that they are of, below all that the config says itself."""
    start = tree.pop(WEIGHTS, None)
    if start is None or start.value is None:
        return tree
    from detres.weights.importers import read_weights  # it imports this module

    if not isinstance(start.value, str):
        problems.append(f"weights must be a run, a file or a published name, got {_flow(start.value)} "
                        f"({start.origin}).")
        return tree
    model = tree.get("model", {})
    if not isinstance(model, dict):
        return tree  # told by `_validate`
    try:
        theirs = _tree_of(Config.model_validate(read_weights(start.value).meta.config).model, f"weights {start.value}")
    except (ValueError, OSError) as error:
        problems.append(f"{error} (weights, {start.origin})")
        return tree
    name, wanted, other = theirs["name"].value, model.get("name"), model.get("weights")
    if wanted is not None and wanted.value != name and not _share_boxes(wanted.value, name):
        problems.append(f"weights must be of a {wanted.value}, which model.name asks for ({wanted.origin}), got those of "
                        f"a {name} ({start.origin}). Leave model.name out; weights of a backbone belong in "
                        "model.backbone.weights.")
    if other is not None and other.value not in (None, start.value):
        problems.append(f"model.weights must be null or left out beside weights, got {_flow(other.value)} "
                        f"({other.origin}) and {start.value} ({start.origin}). Keep one of them.")
    return _merge(_merge({"model": theirs}, tree), {"model": {"weights": start}})


def _share_boxes(a: Any, b: Any) -> bool:
    """Whether these are names of models that differ in heads beside the boxes' alone (`weights.finetune`)."""
    return isinstance(a, str) and any({a, b} <= kinds for kinds in SAME_BOXES)


def _tree_of(section: BaseModel, origin: str) -> _Tree:
    values = ((name, getattr(section, name)) for name in type(section).model_fields)
    return {name: _tree_of(value, origin) if isinstance(value, BaseModel) else _Leaf(value, origin)
            for name, value in values}


# ---- reading -------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):  # PyYAML's own rules are YAML 1.1: '1e-3' a string, 'off' false, '1:30' ninety
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in (
            ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
            ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
            ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
            ("float", r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
                      r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)", list("-+.0123456789"))):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)

# Sections in lists, as in data.augment.policy.
_Dumper.add_multi_representer(BaseModel, lambda dumper, section: dumper.represent_dict(section.model_dump()))


def _files(path: str | Path | None, problems: list[str]) -> list[_Tree]:
    """Layers of a file and its bases, the root first."""
    layers: list[_Tree] = []
    chain: list[Path] = []
    named_by = COMMAND_LINE
    if path is not None and (Path(path) / "config.yaml").is_file():
        path = Path(path) / "config.yaml"
    while path is not None:
        path = Path(path)
        if path.resolve() in (p.resolve() for p in chain):
            circle = " -> ".join(map(_shown, [*chain, path]))
            raise ConfigError([*problems, f"base must not lead back to its own chain, got {circle} ({named_by})."])
        chain.append(path)
        shown = _shown(path)
        try:
            loader, node = _parse(_read(path, named_by), shown, problems)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        base = _take_base(node)
        layers.insert(0, _layer(node, loader, Config, "", lambda n, f=shown: f"{f}:{_line(n)}", problems))
        if base is not None and not (isinstance(base, yaml.ScalarNode) and base.value):
            got = _flow(loader.construct_object(base, deep=True))
            raise ConfigError([*problems, f"base must be one path, got {got} ({shown}:{_line(base)})."])
        named_by = f"{shown}:{_line(base)}" if base else ""
        path = path.parent / base.value if base else None
    return layers


def _take_base(node: yaml.MappingNode) -> yaml.Node | None:
    bases = [value for key, value in node.value if key.value == "base"]
    node.value = [(key, value) for key, value in node.value if key.value != "base"]
    return bases[0] if bases else None


def _read(path: Path, named_by: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = sorted(map(_shown, path.parent.glob("*.y*ml")))
        hint = _nearest(_shown(path), there) or (f"Files there: {', '.join(there)}." if there else "")
        if "=" in str(path):
            hint = "A YAML file, or the folder of a run, comes before key=value."
        raise ConfigError([f"config file must exist, got {_shown(path)} ({named_by}). {hint}".rstrip()]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"config file must be readable UTF-8 text, got {path} ({named_by}): {error}."]) from None


def _parse(text: str, where: str, problems: list[str]) -> tuple[_Loader, yaml.Node]:
    """Loader and root node of YAML text; double keys go to `problems`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node() or yaml.MappingNode(_MAP, [])
        loader.construct_object(node, deep=True)  # deep: a node that holds itself is refused
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark and where != COMMAND_LINE else ""
        raise ConfigError([f"{where}{at} must be valid YAML: {error.problem or error.context}."]) from None
    if where != COMMAND_LINE and not isinstance(node, yaml.MappingNode):
        raise ConfigError([f"{where} must hold a mapping of keys to values, got {_flow(yaml.safe_load(text))}."])
    problems += _double_keys(node, where)
    return loader, node


def _double_keys(node: yaml.Node, where: str, prefix: str = "") -> Iterator[str]:
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _double_keys(entry, where, prefix)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.value in lines:
                yield (f"{prefix}{key.value} must be given once, got it twice ({where}:{lines[key.value]} and "
                       f"{where}:{_line(key)}).")
            lines[key.value] = _line(key)
            yield from _double_keys(value, where, f"{prefix}{key.value}.")


def _overrides(overrides: Sequence[str], problems: list[str]) -> Iterator[_Tree]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problems.append(f"override must be key=value with a dotted key, such as train.lr=0.02, got '{text}'.")
            continue
        try:
            loader, node = _parse(value or "null", COMMAND_LINE, problems)
        except ConfigError as error:
            problems += [f"{text}: {p}" for p in error.problems]
            continue
        for part in reversed(key.split(".")):
            node = yaml.MappingNode(_MAP, [(yaml.ScalarNode("tag:yaml.org,2002:str", part), node)])
        yield _layer(node, loader, Config, "", lambda _: COMMAND_LINE, problems)


def _layer(node: yaml.MappingNode, loader: _Loader, section: type[BaseModel], prefix: str,
           origin: Callable[[yaml.Node], str], problems: list[str]) -> _Tree:
    """The tree of a mapping node that stands for `section`; unknown keys go to `problems`."""
    tree: _Tree = {}
    for key, value in node.value:
        if key.value == WEIGHTS and section is Config:
            tree[WEIGHTS] = _Leaf(loader.construct_object(value, deep=True), origin(key))
            continue
        field = section.model_fields.get(key.value) if isinstance(key, yaml.ScalarNode) else None
        if field is None:
            problems.append(_unknown(str(key.value), section, prefix, origin(key)))
            continue
        inner = _section(field.annotation)
        if inner and isinstance(value, yaml.MappingNode):
            tree[key.value] = _layer(value, loader, inner, f"{prefix}{key.value}.", origin, problems)
            continue
        leaf = _Leaf(loader.construct_object(value, deep=True), origin(key))
        tree[key.value] = _source(leaf) if inner is SourceConfig and isinstance(leaf.value, str) else leaf
    return tree


def _source(path: _Leaf) -> _Tree:
    """`train: a/path` is all of a source: what a base says of another path, such as `split`, does not stay."""
    return {name: path if name == "path" else _Leaf(field.default, path.origin)
            for name, field in SourceConfig.model_fields.items()}


def _merge(old: _Tree, new: _Tree) -> _Tree:
    both = {k: _merge(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return {**old, **new, **both}


# ---- checking ------------------------------------------------------------------------------------------------------


def _validate(tree: _Tree, leaves: _Leaves, problems: list[str]) -> Config | None:
    problems += [f"{'.'.join(path)} must be {_accepts(schema)}, got {_flow(leaf.value)} ({leaf.origin})."
                 for path, leaf in leaves.items() if isinstance(leaf.value, bool)  # pydantic takes true for 1
                 and (schema := _schema_at(path)).get("type") in ("integer", "number")]
    try:
        return Config.model_validate(_plain(tree))
    except ValidationError as error:
        problems += [_invalid(e, leaves) for e in error.errors()]
        return None


def _plain(tree: _Tree) -> dict[str, Any]:
    return {k: _plain(v) if isinstance(v, dict) else v.value for k, v in tree.items()}


def _leaves(tree: _Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], _Leaf]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _unknown(key: str, section: type[BaseModel], prefix: str, origin: str) -> str:
    names = [*section.model_fields] if prefix else [*section.model_fields, WEIGHTS]
    nearest = _nearest(key, names, prefix) or _elsewhere(key)
    keys = f"Keys of {prefix[:-1]}" if prefix else "Top-level keys"
    return f"{prefix}{key} is not a known key ({origin}). {nearest}{keys}: {', '.join(names)}."


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"Did you mean {prefix}{close[0]}? " if close else ""


def _elsewhere(key: str) -> str:
    """Keys of that name in other sections, nearest the top: lr -> train.lr."""
    found = [path for path in _all_keys(Config) if path.rpartition(".")[2] == key]
    found = [path for path in found if path.count(".") == min(other.count(".") for other in found)]
    return f"Did you mean {' or '.join(found)}? " if found else ""


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if inner := _section(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def _invalid(error: dict[str, Any], leaves: _Leaves) -> str:
    """One of pydantic's errors in our words."""
    loc = error["loc"]
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    inside = {path: leaf.origin for path, leaf in leaves.items() if path[:len(loc)] == loc}
    if error["type"] == "value_error":  # of a validator that looks at several fields: say where each came from
        text = str(error["ctx"]["error"])
        told = [f"{p[-1]}: {origin}" for p, origin in inside.items() if re.search(rf"\b{p[-1]}\b", text)]
        return f"{name}: {text}{_where(', '.join(told))}."
    around = [leaf.origin for path, leaf in leaves.items() if path == loc[:len(path)] or path[:-1] == loc[:-1]]
    where = _where(next(iter([*inside.values(), *around]), ""))
    if error["type"] == "missing":
        if isinstance(loc[-1], str):
            return f"{name} must be given{where}."
        name, loc = name.rpartition("[")[0], loc[:-1]  # an entry of a list: speak of the list
    if loc[-1] == "[key]":
        name = name.rpartition("[")[0].rpartition("[")[0]
        return f"{name} must have strings as keys, got {_flow(error['input'])}{where}."
    if error["type"] == "extra_forbidden":  # in a list: elsewhere unknown keys were told before
        return f"{name} is not a known key{where}. {_nearest(loc[-1], _fields_at(loc))}".rstrip()
    schema, value = _schema_at(loc), error["input"]
    hint = ""
    if schema.get("type") == "array" and not isinstance(value, (list, dict)):
        hint = f" Write a list: [{value}]."
    elif "enum" in schema and isinstance(value, str):
        hint = " " + _nearest(str(value), map(str, schema["enum"]))
    return f"{name} must be {_accepts(schema)}, got {_flow(value)}{where}.{hint}".rstrip()


def _where(origin: str) -> str:
    return f" ({origin})" if origin else ""


# ---- the schema of the classes in config.py ------------------------------------------------------------------------


def _section(annotation: Any) -> type[BaseModel] | None:
    """The Section inside an annotation, through Optional and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for s in map(_section, get_args(annotation)) if s), None)


def _schema(field: FieldInfo) -> dict[str, Any]:
    schema = TypeAdapter(field.rebuild_annotation()).json_schema()
    options = [s for s in schema.get("anyOf", ()) if s.get("type") != "null"]
    return {**options[0], "nullable": True} if options else schema


def _schema_at(path: Sequence[str | int]) -> dict[str, Any]:
    """JSON schema of a field, or of one entry of it where the path ends in indices."""
    key = next(part for part in reversed(path) if isinstance(part, str))
    schema = _schema(_fields_at(path)[key])
    for index in path[len(path) - path[::-1].index(key):]:
        schema = schema["prefixItems"][index] if "prefixItems" in schema else schema["items"]
    return schema


def _fields_at(path: Sequence[str | int]) -> dict[str, FieldInfo]:
    """Fields of the section, here or in a list, that has the last name of a path."""
    *sections, _ = (part for part in path if isinstance(part, str))
    section = Config
    for name in sections:
        section = _section(section.model_fields[name].annotation)
    return section.model_fields


def _accepts(schema: dict[str, Any]) -> str:
    """A JSON schema in words: "an integer >= 1 or null"."""
    return _kind(schema) + (" or null" if schema.get("nullable") else "")


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        *others, last = map(str, schema["enum"])
        return f"{', '.join(others)} or {last}" if others else last
    if schema.get("type") == "array":
        entries = schema["prefixItems"][0] if "prefixItems" in schema else schema["items"]
        count = f"{schema['minItems']} entries" if schema.get("minItems") else "entries"
        return f"a list of {count} (each {_kind(entries)})"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    is_source = schema.get("$ref", "").endswith("SourceConfig")
    noun = "a path, or a mapping with one," if is_source else _NOUNS[schema.get("type", "object")]
    return " ".join([noun, " and ".join(bounds)]).rstrip()


_NOUNS = {"integer": "an integer", "number": "a number", "string": "a string", "boolean": "true or false",
          "object": "a mapping"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<",
           "multipleOf": "a multiple of"}


# ---- writing -------------------------------------------------------------------------------------------------------


def _fields(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field that is not a section."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lines(config: Config) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the dotted path whose value it gives, or "" for the heading of a section."""
    open_sections: list[str] = []
    for name, value in _fields(config):
        *sections, key = name.split(".")
        for depth, section in enumerate(sections):
            if open_sections[:depth + 1] != sections[:depth + 1]:
                yield f"{'  ' * depth}{section}:", ""
                open_sections = sections[:depth + 1]
        yield f"{'  ' * len(sections)}{key}: {_flow(value)}", name


def _flow(value: Any) -> str:
    rare_breaks = re.search(r"\\x85|\\u202[89]", repr(value))  # line breaks: PyYAML writes them as they are, reads \n
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=not rare_breaks)
    return text.removesuffix("\n").removesuffix("\n...")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _shown(path: Path) -> str:
    """Relative to the working directory where it lies inside."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(path)
