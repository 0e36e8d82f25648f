"""Real prompts: the log-odds shift of each, against β."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxsim.figures.labels import beta_name, decade, name
from jaxsim.figures.scales import beta_axis, decades, distinct_betas, ticks
from jaxsim.figures.style import (
    ALIGNED,
    FAILING,
    FAINT,
    INK,
    PAGE,
    Columns,
    key,
    panel,
    styled,
)

_FAILS = -1  # theorem.Outcome.FAILS: Δ < 0 beyond rounding
_MARKERS = "osD^v"  # for the lowest of the failing prompts, which are named


@dataclass(frozen=True)
class _Prompt:
    """A prompt's line."""

    name: object
    x: list[float]
    shift: list[float]
    assumed: bool  # the theorem's hypotheses hold
    fails: bool  # and yet Δ < 0 at some β


@styled
def prompts(columns: Columns) -> Figure:
    """Draw each prompt's log-odds shift Δ against β, and name the worst that refute Theorem 2.

    At a single β, prompts are points in the order of Δ.

    Args:
        columns: name, beta, log_odds_shift, hypotheses_hold, conclusion; a row per prompt and β.
    """
    figure = Figure((PAGE, 3.1))
    axes = panel(figure, 0.62, 0.42, 3.9, 2.56)
    lines = _lines(columns, beta_axis(axes, columns["beta"]))
    single = len(distinct_betas(columns["beta"], 2)) == 1
    if single:
        lines = _side_by_side(lines)
        beta = columns["beta"][0]
        each = "each at its own β" if math.isnan(beta) else f"β = {beta_name(beta)}"
        axes.set_xlabel(f"prompts, in the order of Δ ({each})")
        ticks(axes.xaxis, ())
    failing = [line for line in lines if line.fails]
    holding = [line for line in lines if line.assumed and not line.fails]
    others = [line for line in lines if not line.assumed]
    handles = [
        _draw(axes, failing, "hypotheses hold, yet Δ < 0", FAILING, 1.0, "v", zorder=2.3),
        _draw(axes, holding, "hypotheses hold, otherwise", ALIGNED, 0.8, "^", dashes=(3, 1)),
        _draw(axes, others, "hypotheses do not hold", FAINT, 0.5, ".", zorder=1.9),
    ]
    axes.axhline(0, color=INK, linewidth=0.8, zorder=2.4)
    lowest = sorted(failing, key=lambda p: min(p.shift))[: len(_MARKERS)]
    if lowest:
        handles.append(Line2D([], [], linestyle="", label="Lowest of the failing:"))
    for marker, line in zip(_MARKERS, lowest, strict=False):
        shown: dict[str, Any] = {
            "color": FAILING,
            "marker": marker,
            "markeredgecolor": INK,
            "markeredgewidth": 0.6,
            "markersize": 4.5,
            "linewidth": 1.6,
            "linestyle": "" if single else "-",
        }
        axes.plot(line.x, line.shift, zorder=2.5, **shown)
        handles.append(Line2D([], [], label=name(line.name, 36, 2), **shown))
    _symlog(axes, [shift for line in lines for shift in line.shift])
    axes.set_ylabel("log-odds shift Δ (nats)")
    key(figure, 4.66, 0.12, handles, labelspacing=0.7)
    return figure


def _lines(columns: Columns, x: Sequence[float]) -> list[_Prompt]:
    """Gather the rows of each prompt; a name that comes again at the same β is another prompt."""
    seen: Counter[tuple[str, float]] = Counter()
    gathered: dict[tuple[str, int], list[int]] = {}
    for i, (label, at) in enumerate(zip(map(str, columns["name"]), x, strict=True)):
        if math.isfinite(columns["log_odds_shift"][i]):
            gathered.setdefault((label, seen[label, at]), []).append(i)
        seen[label, at] += 1
    lines = []
    for rows in gathered.values():
        rows.sort(key=lambda i: x[i])
        assumed = [columns["hypotheses_hold"][i] == 1 for i in rows]
        fails = [
            a and columns["conclusion"][i] == _FAILS for i, a in zip(rows, assumed, strict=True)
        ]
        shift = [columns["log_odds_shift"][i] for i in rows]
        lines.append(
            _Prompt(columns["name"][rows[0]], [x[i] for i in rows], shift, any(assumed), any(fails))
        )
    return lines


def _side_by_side(lines: list[_Prompt]) -> list[_Prompt]:
    """Spread the prompts of a single β along x."""
    lines = sorted(lines, key=lambda line: line.shift[0])
    step = 1 / max(len(lines), 1)
    return [replace(line, x=[(k + 0.5) * step - 0.5]) for k, line in enumerate(lines)]


def _draw(
    axes: Axes,
    lines: Sequence[_Prompt],
    label: str,
    color: str,
    width: float,
    marker: str,
    **kwargs: Any,
) -> Line2D:
    """Draw many lines as one path with gaps, small and quick in every format; return its key."""
    x = [v for line in lines for v in (*line.x, math.nan)]
    y = [v for line in lines for v in (*line.shift, math.nan)]
    if lines and all(len(line.x) == 1 for line in lines):
        kwargs = {"linestyle": "", "marker": marker, "markersize": 4, "markeredgewidth": 0}
    crowded = min(1.0, (40 / max(len(lines), 1)) ** 0.5)
    axes.plot(x, y, color=color, linewidth=crowded * width, **kwargs)
    label = f"{label} ({len(lines)})"
    return Line2D([], [], color=color, linewidth=2 * width, label=label, **kwargs)


def _symlog(axes: Axes, shifts: Sequence[float]) -> None:
    """Scale y logarithmically on both sides of 0, linearly near it."""
    sizes = sorted(abs(shift) for shift in shifts if shift) or [1.0]
    high = sizes[-1]
    low = max(sizes[len(sizes) // 10], high * 1e-4)
    threshold = 10.0 ** math.floor(math.log10(low))
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    low_end, high_end = 1.3 * min([*shifts, -threshold]), 1.3 * max([*shifts, threshold])
    axes.set_ylim(low_end, high_end)
    powers = decades(threshold, max(high, threshold), 4)
    at = [*(-p for p in reversed(powers)), 0.0, *powers]
    names = [*("−" + decade(p) for p in reversed(powers)), "0", *(decade(p) for p in powers)]
    shown = [(v, n) for v, n in zip(at, names, strict=True) if low_end <= v <= high_end]
    ticks(axes.yaxis, [v for v, _ in shown], [n for _, n in shown])
