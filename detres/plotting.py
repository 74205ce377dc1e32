"""What the pages of plots have in common."""

from __future__ import annotations


def clean_axes(axes, title: str, grid: str = "both") -> None:
    """A title, a pale grid behind the data, and no frame above and at the right."""
    axes.set_title(title, fontsize=10)
    axes.grid(axis=grid, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def axis_name(name: str, limit: int = 18) -> str:
    """Short enough for an axis; dollars would be read as formulas."""
    name = name if len(name) <= limit else name[:limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return name.replace("$", r"\$")
