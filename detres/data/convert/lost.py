"""What a conversion loses and what it changes: counted, told, and refused if asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Losses:
    """Texts with the number of cases; a text has {} where the number goes.

    `lost` does not come back when the result is read; `changed` is there, in another form or under another number.
    """

    lost: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def lose(self, text: str, count: int = 1) -> None:
        self.lost.update({text: int(count)} if count else {})

    def change(self, text: str, count: int = 1) -> None:
        self.changed.update({text: int(count)} if count else {})

    def lines(self) -> list[str]:
        both = (("lost", self.lost), ("changed", self.changed))
        return [f"{title}: {text.format(f'{count:,}')}" for title, found in both for text, count in found.items()]

    def as_json(self) -> dict[str, list[dict[str, str | int]]]:
        return {title: [{"what": text.format(count), "count": count} for text, count in found.items()]
                for title, found in (("lost", self.lost), ("changed", self.changed))}

    def refuse(self) -> None:
        """Raises ValueError if anything is lost."""
        if self.lost:
            told = "; ".join(text.format(f"{count:,}") for text, count in self.lost.items())
            raise ValueError(f"--strict conversion must lose nothing, got: {told}. Choose another format, or leave out "
                             "--strict.")
