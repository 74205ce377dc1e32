"""docs/augmentation.md: commands and Python run, YAML loads, fields and operations are all told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from detres.config import AugmentConfig, DataConfig, InputConfig, SamplingConfig
from detres.config_file import format_config, load_config
from detres.data.dataset import Dataset
from detres.data.records import Records
from detres.data.transforms import build_train_transforms

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/augmentation.md").read_text(encoding="utf-8")
NO_DATA = Dataset("none", "coco", ("a",), (1,), Records.of(()))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_loads_and_builds(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    resolved = load_config(tmp_path / "mine.yaml")
    (tmp_path / "written.yaml").write_text(format_config(resolved))
    data = resolved.config.data
    assert load_config(tmp_path / "written.yaml").config.data == data
    assert data != DataConfig()
    build_train_transforms(data.augment, InputConfig(), NO_DATA)


def test_commands_and_python_run(run_guide, capsys):
    assert len(run_guide("docs/augmentation.md")) == 3
    (code,) = blocks("python")
    exec(code, {})
    assert re.search(r"\(240, 320, 3\) \(\d+, 4\)", capsys.readouterr().out)


def test_every_field_is_told():
    rows = " ".join(re.findall(r"^\|([^|]+)\|", PAGE, re.M))
    told = set(re.findall(r"`(\w+)`", rows))
    assert told >= set(AugmentConfig.model_fields) - {"min_visible", "mix_until"}
    assert told >= set(SamplingConfig.model_fields["name"].annotation.__args__)
    assert "`min_visible`" in PAGE and "`mix_until: 0.9`" in PAGE


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
