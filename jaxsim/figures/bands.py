"""What the instances of a family do, as quantile bands around a median."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxsim.figures.style import ALIGNED, Columns

OUTER = "#BBD8EA"
INNER = "#74B1D6"


def draw_bands(axes: Axes, x: Sequence[float], columns: Columns) -> None:
    """Draw the 5–95% and 25–75% bands and the median over x, which must be increasing."""
    axes.fill_between(x, columns["q05"], columns["q95"], color=OUTER, linewidth=0)
    axes.fill_between(x, columns["q25"], columns["q75"], color=INNER, linewidth=0)
    axes.plot(x, columns["q50"], color=ALIGNED, solid_capstyle="butt")


def bands_key() -> list[Any]:
    """Return the legend entries of the bands."""
    return [
        Line2D([], [], color=ALIGNED, label="median instance"),
        Patch(color=INNER, linewidth=0, label="25–75% of instances"),
        Patch(color=OUTER, linewidth=0, label="5–95% of instances"),
    ]


def ordered(columns: Columns, by: str) -> Columns:
    """Sort rows by a column; NaN goes last."""
    rows = sorted(
        range(len(columns[by])), key=lambda i: (columns[by][i] != columns[by][i], columns[by][i])
    )
    return {name: [column[i] for i in rows] for name, column in columns.items()}


def where(columns: Columns, keep: Sequence[bool]) -> Columns:
    """Keep some of the rows."""
    return {
        name: [cell for cell, kept in zip(column, keep, strict=True) if kept]
        for name, column in columns.items()
    }


def widened(x: Sequence[float], columns: Columns) -> tuple[list[float], Columns]:
    """Turn a single row into a box one can see: the same row at both ends of a short stretch."""
    if len(x) != 1:
        return list(x), columns
    return [x[0] - 0.25, x[0] + 0.25], {name: column * 2 for name, column in columns.items()}
