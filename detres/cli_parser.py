"""Parts of the command line: a parser that says what was probably meant, and kinds of numbers."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what was probably meant."""

    def __init__(self, description: str, **options):
        super().__init__(description="\n\n".join(textwrap.fill(part, 80) for part in description.split("\n\n")),
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            message += self._inner(choice[1]) or nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(2, f"{self.prog}: error: {message}\nSee {self.prog} --help.\n")

    def _inner(self, name: str) -> str:
        """The command of a command that is called so: `detres check` means `detres data check`."""
        found = [f"{parser.prog} {name}" for parser in self._commands().values() if name in parser._commands()]
        return f". Did you mean {found[0]}?" if found else ""

    def _commands(self) -> dict[str, Parser]:
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return groups[0].choices if groups else {}

    def check_rest(self, rest: Sequence[str]) -> None:
        """Refuses what is left over if it begins with a dash."""
        for option in rest:
            if option.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings]
                self.error(f"unknown option {option}{nearest(option.partition('=')[0], known)}")


def nearest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f". Did you mean {close[0]}?" if close else ""


def command(commands: argparse._SubParsersAction, name: str, examples: Mapping[str, str],
            run: Callable[[argparse.Namespace], object], summary: str, more: str = "",
            rest: str | None = None) -> Parser:
    """A subcommand; `run` may return an exit status. `rest` names the list that takes positional arguments which follow
    an option."""
    epilog = f"examples:{examples[name]}"
    parser = commands.add_parser(name.split()[-1], help=summary, epilog=epilog,
                                 description=f"{summary[0].upper()}{summary[1:]}. {more}".strip())
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    parser.set_defaults(run=run, parser=parser, rest=rest)
    return parser


def number(kind: type, low: float, high: float, words: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {words}, got '{text}'")

    return parse


def size(text: str) -> int:
    """Bytes: 500MB is 500 * 10^6."""
    match = re.fullmatch(r"(\d+)\s*([kMGT]?)B?", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 500MB, got '{text}'")
    return int(match[1]) * 1000 ** " kMGT".index(match[2] or " ")


count = number(int, 0, float("inf"), "an integer >= 0")
positive = number(int, 1, float("inf"), "an integer >= 1")
probability = number(float, 0, 1, "a number from 0 to 1")


def add_source(parser: Parser) -> None:
    """A data set that detres reads."""
    parser.add_argument("data", metavar="DATA", help="data set in COCO, LVIS, VOC, YOLO, Cityscapes, labelme, CVAT or "
                                                     "OpenImages format: a folder, a YAML file or an annotation file")
    parser.add_argument("--images", metavar="DIR", help="folder of the images, where it is not found by itself")
