"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["DETRES_CACHE"] = ""  # no index is kept but where a test asks for it
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before any import: no network from the tests
if "PYTEST_XDIST_WORKER" in os.environ:  # one of two that share two cores; before torch reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def located_shapes(tmp_path_factory) -> Path:
    """Images of one bright shape each on noise, as a table of boxes: 240 to train and 30 to validate on, three classes."""
    folder, rng = tmp_path_factory.mktemp("located_shapes"), np.random.default_rng(0)
    (folder / "images").mkdir()
    lines = ["file,wnid,label,split,xmin,ymin,xmax,ymax"]
    for number in range(270):
        label, split = number % 3, "train" if number < 240 else "val"
        pixels = rng.integers(0, 120, (64, 64, 3), np.uint8)
        height, width = rng.integers(18, 44, 2)
        top, left = rng.integers(0, 64 - height), rng.integers(0, 64 - width)
        y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
        shape = (x ** 2 + y ** 2 <= 1, np.ones_like(x, bool), (abs(x) < 0.35) | (abs(y) < 0.35))[label]
        pixels[top:top + height, left:left + width][shape] = rng.integers(170, 256, 3)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        lines.append(f"{number}.png,n{label},{label},{split},{left},{top},{left + width - 1},{top + height - 1}")
    (folder / "boxes.csv").write_text("\n".join(lines))
    (folder / "classes.txt").write_text("n0\tdisc, circle\nn1\tbox\nn2\tcross\n")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets (coco_mini, bccd, nuts ...); the test is skipped where they are absent."""
    folder = Path(os.environ.get("DETRES_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set DETRES_TEST_DATA to the folder that holds coco_mini, bccd ...")
    return folder


@pytest.fixture
def run_guide(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """Runs the `detres` commands of a page's sh blocks in an empty folder with the configs, one after another, and
    returns them. `train` gets the overrides `short`; `status` has the exit statuses that are not 0, by command. With
    `python`, its Python runs, too, between them."""
    from detres.cli import main

    def run(page: str, short: Sequence[str] = (), status: dict[str, int] = {}, python: bool = False) -> list[str]:
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
        monkeypatch.chdir(tmp_path)
        commands = []
        text = (ROOT / page).read_text(encoding="utf-8")
        for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
            if language == "python" and python:
                exec(block, {})
            lines = block.replace("\\\n", " ").splitlines() if language == "sh" else []
            for _, *words in (shlex.split(line, comments=True) for line in lines if line.startswith("detres ")):
                command = " ".join(["detres", *words])
                assert main([*words, *(short if words[0] == "train" else ())]) == status.get(command, 0), command
                commands.append(command)
        return commands

    return run
