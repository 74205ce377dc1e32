"""YAML files, bases, overrides, origins, and what is said of everything wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from detres.config import AugmentConfig, Config, DataConfig, SourceConfig, TrainConfig
from detres.config_file import ConfigError, dump_yaml, format_config, json_schema, load_config


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def _problems(path: str | None, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def _problem(text: str, *overrides: str) -> str:
    """The only problem of a file `a.yaml`."""
    (problem,) = _problems(_write("a.yaml", text), *overrides)
    return problem


# ---- resolving


def test_defaults_alone():
    resolved = load_config()
    assert resolved.config == Config() and set(resolved.origins.values()) == {"default"}


def test_chain_of_bases_and_overrides_with_origins(folder):
    _write("configs/_base/root.yaml", "train:\n  lr: 0.1\n  steps: 5\nmodel: {backbone: {depth: 18, norm: gn}}\n")
    _write("configs/_base/middle.yaml", "base: root.yaml\ntrain: {lr: 0.2, milestones: [3, 4]}\n")
    path = _write("configs/leaf.yaml", "# comment\nbase: _base/middle.yaml\ntrain:\n  lr: 0.3\n  milestones: [2]\n")
    resolved = load_config(path, ["train.lr=0.4", "model.backbone.depth=34"])
    config, origins = resolved.config, resolved.origins
    assert (config.train.lr, config.train.steps, config.train.milestones) == (0.4, 5, (2,))
    assert (config.model.backbone.depth, config.model.backbone.norm) == (34, "gn")
    assert origins["train.lr"] == origins["model.backbone.depth"] == "command line"
    assert origins["train.milestones"] == "configs/leaf.yaml:5"
    assert origins["train.steps"] == "configs/_base/root.yaml:3"
    assert origins["model.backbone.norm"] == "configs/_base/root.yaml:4"
    assert origins["train.seed"] == "default"


def test_later_overrides_win_and_take_any_yaml():
    config = load_config(None, ["train.lr=1", "train.lr=2", "train.milestones=[1_000, 2e3]",
                                "data.val={path: a, split: b}", "model.backbone.weights=", "output=runs/a=b c",
                                "data.augment.albumentations=[{Blur: {p: 0.5}}]"]).config
    assert config.train.lr == 2 and config.train.milestones == (1000, 2000)
    assert config.data.val == SourceConfig(path="a", split="b")
    assert config.model.backbone.weights is None and config.output == "runs/a=b c"
    assert config.data.augment.albumentations == ({"Blur": {"p": 0.5}},)


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("1E3", 1e3), ("+.5", 0.5), ("5.", 5.0), ("90_000", 9e4),
                                         ("2.5e+1", 25.0), ("0x10", 16.0)])
def test_numbers(folder, text, value):
    """YAML 1.1 takes some of these for strings."""
    assert load_config(None, [f"train.lr={text}"]).config.train.lr == value
    assert load_config(_write("a.yaml", f"train: {{lr: {text}}}")).config.train.lr == value
    config = load_config(None, [f"data.augment.albumentations=[{{a: {text}}}]"]).config
    assert config.data.augment.albumentations == ({"a": value},)  # where pydantic does not convert


@pytest.mark.parametrize("text", ["off", "no", "2024-01-01", "12:30", "1.2.3", "e5", "truely", "010"])
def test_what_stays_a_string(text):
    """YAML 1.1 makes booleans, dates and base-60 numbers of some of these."""
    assert load_config(None, [f"output={text}"]).config.output == text


def test_a_path_alone_is_a_source(folder):
    path = _write("a.yaml", "data:\n  train: datasets/a\n  val:\n    path: datasets/b\n    split: c\n")
    resolved = load_config(path, ["data.train.split=d"])
    assert resolved.config.data.train == SourceConfig(path="datasets/a", split="d")
    assert resolved.origins["data.train.path"] == "a.yaml:2" and resolved.origins["data.val.images"] == "default"
    # a path alone replaces the whole source, its field `path` only itself; null takes the source away
    assert load_config(path, ["data.val=e"]).config.data.val == SourceConfig(path="e")
    assert load_config(path, ["data.val.path=e"]).config.data.val == SourceConfig(path="e", split="c")
    removed = load_config(path, ["data.val=null"])
    assert removed.config.data.val is None and removed.origins["data.val"] == "command line"


def test_a_run_folder_stands_for_its_config(folder):
    _write("runs/a/config.yaml", "train: {lr: 0.5}")
    assert load_config("runs/a").config.train.lr == 0.5


def test_empty_file_and_absolute_base(folder):
    base = _write("elsewhere/b.yaml", "train: {lr: 0.5}")
    assert load_config(_write("a.yaml", "# nothing yet\n")).config == Config()
    assert load_config(_write("a.yaml", f"base: {folder / base}")).config.train.lr == 0.5


# ---- writing


def test_what_is_printed_can_be_loaded(folder):
    path = _write("a.yaml", "data: {train: 'a # b', augment: {albumentations: [{Blur: {p: 1e-5, on: 'no: x'}}]}}\n")
    resolved = load_config(path, ["model.backbone.weights=null", "train.lr=1e-7"])
    printed = format_config(resolved)
    assert load_config(_write("b.yaml", printed)).config == resolved.config
    assert load_config(_write("c.yaml", dump_yaml(resolved.config))).config == resolved.config
    lines = {line.split(":")[0].strip(): line for line in printed.splitlines()}
    assert lines["lr"].endswith("  # command line") and lines["norm_eps"].endswith("  # default")
    assert lines["albumentations"].endswith("  # a.yaml:1")
    comments = [line.rindex("# ") for line in printed.splitlines() if line.endswith("# default")]
    assert len(set(comments)) == 1, "comments are aligned"


texts = st.text(st.characters(codec="utf-8"))
names = st.sampled_from(["1e-3", "null", "~", "true", "off", "1_0", ".5", "<<", "=", "2024-01-01", "0x1", "a: b",
                         "- a", "", "\x85", "a\u2028", "caf\xe9"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names | texts, inner, max_size=2), max_leaves=4)


@settings(max_examples=40, deadline=None)
@given(output=names | texts, albumentations=st.lists(st.dictionaries(names | texts, values, max_size=2), max_size=2),
       lr=st.floats(1e-300, 1e300), source=st.none() | st.builds(SourceConfig, path=names | texts))
def test_dump_and_load_are_inverse(tmp_path_factory, output, albumentations, lr, source):
    config = Config(output=output, train=TrainConfig(lr=lr),
                    data=DataConfig(train=source, augment=AugmentConfig(albumentations=albumentations)))
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path).config == config


def test_schema_is_for_files():
    schema = json_schema()
    assert {"base", "train", "model"} <= set(schema["properties"]) and schema["additionalProperties"] is False
    source = schema["$defs"]["SourceConfig"]["anyOf"]
    assert source[0] == {"type": "string"} and "path" in source[1]["properties"]
    json.dumps(schema)


# ---- errors


def test_all_problems_at_once(folder):
    _write("base.yaml", "train:\n  larning_rate: 1\n")
    path = _write("a.yaml", "base: base.yaml\nmodel:\n  backbone:\n    depth: 51\ntrain:\n  lr: -1\n  lr: -2\nfoo: 1\n")
    problems = _problems(path, "train.steps=x", "nonsense", "eval.metrics=[coco, vocc]")
    assert len(problems) == 8
    for start in ("train.lr must be given once, got it twice (a.yaml:6 and a.yaml:7)", "foo is not",
                  "train.larning_rate is not a known", "override must be key=value",
                  "model.backbone: depth must be 18, 34, 50, 101 or 152 with stem=imagenet, got 51 (depth: a.yaml:4",
                  "train.lr must be a number > 0, got -2 (a.yaml:7)",
                  "eval.metrics[1] must be coco, voc or ilsvrc, got vocc",
                  "train.steps must be an integer >= 1, got x (command line)"):
        assert any(problem.startswith(start) for problem in problems), start


def test_unknown_key_names_place_nearest_and_accepted(folder):
    problem = _problem("model:\n  box_head:\n    resolutoin: 7\n")
    assert problem.startswith("model.box_head.resolutoin is not a known key (a.yaml:3). "
                              "Did you mean model.box_head.resolution? Keys of model.box_head: batch_per_image, ")
    told = _problem("lr: 1")
    assert "Did you mean train.lr? Top-level keys: output, device, model, data, train, eval, weights." in told
    assert "Did you mean model.backbone?" in _problem("backbone: {depth: 18}")
    assert "Did you mean" not in _problem("xyzzy: 1")
    assert _problem("", "trian.lr=1").startswith("trian is not a known key (command line). Did you mean train?")
    assert "pth is not a known key (a.yaml:1)" in _problem("data: {train: {path: a, pth: b}}")


@pytest.mark.parametrize("text, expected", [
    ("train: {momentum: 1}", "train.momentum must be a number >= 0 and < 1, got 1 (a.yaml:1)."),
    ("train: {steps: 1.5}", "train.steps must be an integer >= 1, got 1.5 (a.yaml:1)."),
    ("train: {steps: true}", "train.steps must be an integer >= 1, got true (a.yaml:1)."),
    ("train: {ema: false}", "train.ema must be a number > 0 and < 1 or null, got false (a.yaml:1)."),
    ("train: {lr: .inf}", "train.lr must be a number > 0, got .inf (a.yaml:1)."),
    ("train: {compile: maybe}", "train.compile must be true or false, got maybe (a.yaml:1)."),
    ("train: {optimizer: adam}", "train.optimizer must be sgd or adamw, got adam (a.yaml:1). Did you mean adamw?"),
    ("train: {milestones: 5}", "train.milestones must be a list of entries (each an integer >= 1), got 5 (a.yaml:1). "
                               "Write a list: [5]."),
    ("train: {milestones: [5, x]}", "train.milestones[1] must be an integer >= 1, got x (a.yaml:1)."),
    ("model: {input: {mean: [1, 2]}}",
     "model.input.mean must be a list of 3 entries (each a number), got [1, 2] (a.yaml:1)."),
    ("model: {backbone: {width: 12}}",
     "model.backbone.width must be an integer >= 8 and a multiple of 8, got 12 (a.yaml:1)."),
    ("train:\n", "train must be a mapping, got null (a.yaml:1)."),
    ("train: 3", "train must be a mapping, got 3 (a.yaml:1)."),
    ("data: {train: 3}", "data.train must be a path, or a mapping with one, or null, got 3 (a.yaml:1)."),
    ("data: {train: {split: a}}", "data.train.path must be given (a.yaml:1)."),
    ("data:\n  train: {}", "data.train.path must be given."),
    ("data: {augment: {albumentations: [Blur]}}",
     "data.augment.albumentations[0] must be a mapping, got Blur (a.yaml:1)."),
    ("data: {augment: {albumentations: [{Blur: 1, 2: 3}]}}",
     "data.augment.albumentations[0] must have strings as keys, got 2 (a.yaml:1)."),
    ("data: {augment: {policy: [[{op: rotate, magnitude: 11}]]}}",
     "data.augment.policy[0][0].magnitude must be a number >= 0 and <= 10, got 11 (a.yaml:1)."),
    ("data: {augment: {policy: [[{op: rotate, magnitud: 1}]]}}",
     "data.augment.policy[0][0].magnitud is not a known key (a.yaml:1). Did you mean magnitude?"),
    ("data: {augment: {policy: [{op: rotate}]}}",
     "data.augment.policy[0] must be a list of entries (each a mapping), got {op: rotate} (a.yaml:1)."),
    ("data: {augment: {mosaic: true}}", "data.augment.mosaic must be a mapping or null, got true (a.yaml:1)."),
    ("train: {batch_size: 6}\n", "train: batch_size must be a multiple of accumulate, got 6 and 4 "
                                 "(batch_size: a.yaml:1, accumulate: command line)."),
])
def test_bad_values(folder, text, expected):
    overrides = ["train.accumulate=4"] if "batch_size" in text else []
    assert _problem(text, *overrides) == expected


def test_relation_between_sections_says_where_both_came_from(folder):
    assert _problem("model:\n  backbone:\n    layout: c4\n") == (
        "model: anchors.sizes must have one tuple per feature level: 1 for layout 'c4', got 5 (layout: a.yaml:3).")


@pytest.mark.parametrize("text, expected", [
    ("a: b: c", "a.yaml:1:5 must be valid YAML: mapping values are not allowed here."),
    ("train:\n\tlr: 1", "a.yaml:2:1 must be valid YAML: "),
    ("[1, 2]", "a.yaml must hold a mapping of keys to values, got [1, 2]."),
    ("just words", "a.yaml must hold a mapping of keys to values, got just words."),
    ("train: {lr: &a [*a]}", "must be valid YAML: found unconstructable recursive node."),
    ("? [a, b]\n: 1", "must be valid YAML: found unhashable key."),
    ("base: [b.yaml]", "base must be one path, got [b.yaml] (a.yaml:1)."),
    ("base:\n", "base must be one path, got null (a.yaml:1)."),
    ("train: {}\nbase: nowhere.yaml", "config file must exist, got nowhere.yaml (a.yaml:2). Files there: a.yaml."),
    ("base: ./a.yaml", "base must not lead back to its own chain, got a.yaml -> a.yaml (a.yaml:1)."),
    ("data: {augment: {albumentations: [{a: 1, a: 2}]}}", "data.augment.albumentations.a must be given once, "),
])
def test_bad_files(folder, text, expected):
    assert expected in _problem(text)


def test_cycle_over_two_files(folder):
    _write("b/c.yaml", "base: ../a.yaml\n")
    assert _problem("base: b/c.yaml") == (
        "base must not lead back to its own chain, got a.yaml -> b/c.yaml -> a.yaml (b/c.yaml:1).")


def test_missing_file_offers_the_nearest(folder):
    _write("configs/demo.yaml", "")
    assert _problems("configs/dmo.yaml") == (
        "config file must exist, got configs/dmo.yaml (command line). Did you mean configs/demo.yaml?",)
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "must be readable UTF-8 text" in _problems("binary.yaml")[0]
    assert "must be readable" in _problems("configs")[0]


def test_problems_before_a_broken_base_are_told_too(folder):
    problems = _problems(_write("a.yaml", "base: no.yaml\nfoo: 1\n"))
    assert [problem.split()[0] for problem in problems] == ["foo", "config"]


@pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=1", "--lr=3", "train.lr={a", "train.lr=a: b: c"])
def test_bad_overrides(override):
    (problem,) = _problems(None, override)
    assert override in problem and ("must be key=value" in problem or "must be valid YAML" in problem)


def test_reading_yaml_elsewhere_is_unchanged():
    assert yaml.safe_load("on: 1") == {True: 1}, "the rules of YAML 1.2 are for our loader only"
