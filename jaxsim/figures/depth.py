"""How deeply Theorem 2 can fail, by the range of the reward and the number of outputs."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxsim.figures.bands import ordered, where
from jaxsim.figures.labels import number
from jaxsim.figures.scales import even_ticks, ticks
from jaxsim.figures.style import (
    ALIGNED,
    COLUMN,
    FAILING,
    INK,
    MUTED,
    UNALIGNED,
    Columns,
    key,
    note,
    panel,
    styled,
)

# The curves of large n coincide up to some R: each lies on the wider one of the next n, and the
# markers can be told apart where they lie on each other.
_LINES: list[dict[str, Any]] = [
    {"color": INK, "linestyle": "-", "marker": "o", "markersize": 3.0},
    {"color": ALIGNED, "linestyle": (0, (4, 1.5)), "marker": "s", "markersize": 4.5},
    {"color": FAILING, "linestyle": (0, (1, 1)), "marker": "x", "markersize": 4.0},
    {"color": UNALIGNED, "linestyle": "-", "marker": "+", "markersize": 7.0},
    {"color": MUTED, "linestyle": (0, (6, 1, 1, 1)), "marker": "D", "markersize": 7.0},
]
_HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 0.8, "markeredgecolor": INK}
_FALLS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_BOTTOM, _RIGHT, _TOP = 0.42, 0.56, 0.38


@styled
def depth(columns: Columns) -> Figure:
    """Draw the bound V(n, R) as lines, and the deepest failures found as markers on them.

    The axis on the right tells how far TPM(A) falls: by tanh(-Δ/4) at the worst α.

    Args:
        columns: outputs, range_over_beta, bound, found (nats); a row per n and R. A row whose
            `found` is NaN only traces the bound.
    """
    most = max(columns["range_over_beta"]) or 1.0
    top = max(x for x in [*columns["bound"], *columns["found"]] if not math.isnan(x)) * 1.06 or 1.0
    depths = even_ticks(0, top)
    left = 0.34 + 0.06 * max(len(number(x)) for x in depths)
    figure = Figure((COLUMN, 2.84))
    axes = panel(figure, left, _BOTTOM, COLUMN - left - _RIGHT, 2.84 - _BOTTOM - _TOP)
    outputs = sorted(set(columns["outputs"]))
    handles = []
    for at, n in reversed(list(enumerate(outputs))):
        style = _LINES[at % len(_LINES)]
        rows = ordered(where(columns, [m == n for m in columns["outputs"]]), "range_over_beta")
        line = {name: style[name] for name in ("color", "linestyle")} | {"linewidth": 1 + 0.7 * at}
        marker = {name: style[name] for name in ("marker", "markersize")} | _HOLLOW
        axes.plot(rows["range_over_beta"], rows["bound"], **line)
        found = where(rows, [not math.isnan(x) for x in rows["found"]])
        # Above all lines, whichever is drawn last.
        axes.plot(found["range_over_beta"], found["found"], linestyle="", zorder=3, **marker)
        handles.append(Line2D([], [], label=f"n = {number(n)}", **line, **marker))
    axes.set_xlim(0, most * 1.03)
    axes.set_ylim(0, top)
    ticks(axes.xaxis, even_ticks(0, most))
    ticks(axes.yaxis, depths)
    axes.set_xlabel("range of the reward R = (max r − min r)/β (nats)")
    axes.set_ylabel("depth of a failure, −Δ (nats)")
    _falls(axes, top)
    text = "lines: the bound V(n, R); markers: the deepest failures of\nTheorem 2 found by descent"
    note(figure, 0.46, 0.06, text, fontsize=7)
    key(figure, left + 0.1, _TOP + 0.04, handles[::-1])
    return figure


def _falls(axes: Axes, top: float) -> None:
    """Mark on the right how far TPM(A) falls at the α that is worst for each depth."""
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.set_ylim(0, top)
    shown, last = [], -math.inf
    for fall in _FALLS:
        at = 4 * math.atanh(fall)
        if last + 0.05 * top < at <= top:
            shown.append(fall)
            last = at
    ticks(right.yaxis, [4 * math.atanh(f) for f in shown], [number(f) for f in shown])
    right.set_ylabel("fall of TPM(A) at the worst α")
