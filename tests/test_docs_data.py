"""docs/data.md: its commands run as written, and its pictures are there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "data.md"


def test_commands_run_as_written(run_guide):
    commands = run_guide("docs/data.md")
    assert sum("data view" in command for command in commands) == 4 and sum("stats" in command for command in commands)
    assert all(Path(name).is_file() for name in ("stats.png", "look.png", "small.png", "look.html", "seen.png"))


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.+\]\((.+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) >= 4 and all((PAGE.parent / picture).stat().st_size < 150_000 for picture in pictures)
