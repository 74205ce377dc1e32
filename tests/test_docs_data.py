"""docs/data.md: its commands run as written, and its pictures are there."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from detres.data.kinds import table

PAGE = Path(__file__).parents[1] / "docs" / "data.md"


def test_commands_run_as_written(run_guide, capsys, monkeypatch):
    """And the report is the one that the page shows."""
    monkeypatch.setenv("COLUMNS", "80")
    commands = run_guide("docs/data.md", python=True, status={"detres data check datasets/broken": 1})
    report = re.search(r"```text\n(split.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert report in capsys.readouterr().out
    assert len(list(csv.DictReader(Path("datasets/clean/changes.csv").open(newline="")))) == 17
    assert sum("data view" in command for command in commands) == 4 and sum("stats" in command for command in commands)
    assert all(Path(name).is_file() for name in ("stats.png", "look.png", "small.png", "look.html", "seen.png"))


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.+\]\((.+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) >= 4 and all((PAGE.parent / picture).stat().st_size < 150_000 for picture in pictures)


def test_the_table_of_problems_is_current():
    """If not: put what `detres.data.kinds.table()` gives into docs/data.md."""
    assert table() in PAGE.read_text(encoding="utf-8")
