"""docs/evaluation.md: its commands and Python run as written, and print what the page says."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from detres.cli import main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evaluation.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLE = ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json")
# A network and a training too small to learn anything: the page prints no number of it.
SHORT = ["train.steps=1", "train.batch_size=2", "train.reference_batch_size=2", "train.warmup_steps=0",
         "model.input.min_size=64", "model.input.max_size=64", "model.backbone.width=8", "model.fpn.channels=8",
         "model.rpn.post_nms_topk_test=2"]


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    printed: str | None  # None where the page does not say
    line: int

    @property
    def needs(self) -> str:
        """Packages, and after a semicolon files; empty for none."""
        match = re.match(r"# needs: (.*)", self.code)
        return match[1] if match else ""


def name_of(block: Block) -> str:
    return f"line {block.line}"


def blocks() -> list[Block]:
    fences = re.finditer(r"```(sh|python)\n(.*?)```\n(?:```text\n(.*?)```\n)?", TEXT, re.DOTALL)
    return [Block(match[1], match[2], match[3], TEXT[:match.start()].count("\n") + 1) for match in fences]


BLOCKS = blocks()
PLAIN = [block for block in BLOCKS if not block.needs]


@contextlib.contextmanager
def everything() -> Iterator[io.StringIO]:
    """What is printed, and what goes to the log."""
    buffer = io.StringIO()
    handler, log = logging.StreamHandler(buffer), logging.getLogger("detres")
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(buffer), contextlib.redirect_stderr(buffer):
            yield buffer
    finally:
        log.removeHandler(handler)


def execute(block: Block, names: dict) -> str:
    """What a block prints; `names` are the variables of all Python blocks."""
    with everything() as buffer:
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, PAGE.name, "exec"), names)
            return buffer.getvalue()
        for line in block.code.splitlines():
            words = shlex.split(line)
            status = main(words[1:] + (SHORT if words[1] == "train" else []))
            assert words[0] == "detres" and status == ("detres: error:" in buffer.getvalue()), line
    return buffer.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[tuple[dict, dict[int, str]]]:
    """The variables of the page after its plain blocks, and what these printed; in the folder with their files."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names: dict = {}
        yield names, {block.line: execute(block, names) for block in PLAIN}


@pytest.mark.parametrize("block", [block for block in PLAIN if block.printed is not None], ids=name_of)
def test_prints_what_the_page_says(page, block):
    assert page[1][block.line] == block.printed


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs], ids=name_of)
def test_beside_other_packages(page, block, request):
    packages, _, files = block.needs.partition("; ")
    for package, wanted in (word.split("==") for word in packages.split()):
        if installed(package) != wanted:
            pytest.skip(f"{package} {wanted} is needed, installed is {installed(package)}")
    if files:
        for name in EXAMPLE:
            shutil.copy(request.getfixturevalue("shared_data") / "detection_results" / "cocoapi_fake100" / name, name)
    assert execute(block, page[0]) == block.printed


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def test_what_it_writes(page):
    names, _ = page
    for file in ("numbers.json", "detections.json", "errors/errors.json", "errors/errors.png",
                 "errors_of_coco/confusion.png", "runs/mine/results.json"):
        assert Path(file).stat().st_size > 0, file
    assert set(json.loads(Path("numbers.json").read_text())) >= {"bbox/AP", "segm/ARl", "voc/AP50_11point"}
    assert names["evaluation"].stats[0] == names["quiet"](names["GT"], "found.json").metrics["bbox/AP"]


def test_lenient_and_error_analysis_tell(page):
    """Of commands whose output the page does not show, what it says of them."""
    said = {block.code: page[1][block.line] for block in PLAIN if block.language == "sh"}
    lenient, = (text for code, text in said.items() if "--lenient" in code)
    assert "Left out" in lenient and " = 0.454" in lenient
    errors, = (text for code, text in said.items() if "--errors" in code)
    assert "dAP50" in errors and "best F1" in errors


def test_every_block_is_seen():
    """A fence that the pattern does not match would be run by nobody."""
    assert len(re.findall("^```", TEXT, re.MULTILINE)) == sum(2 if block.printed is None else 4 for block in BLOCKS)
    assert all(block.printed for block in BLOCKS if block.needs)


def test_links_lead_somewhere():
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
             for head in re.findall(r"^#+ (.*)", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= heads
    for file in re.findall(r"`((?:detres|tests)/[\w/]+\.py)`", TEXT):
        assert (ROOT / file).is_file(), file
