"""Where preference-tuning methods go: a row per method, against eq. (1)'s optimum p*."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxsim.figures.bands import OUTER, where
from jaxsim.figures.labels import decade, name, number
from jaxsim.figures.scales import ticks
from jaxsim.figures.style import (
    ALIGNED,
    FAILING,
    FAINT,
    INK,
    MUTED,
    PAGE,
    Columns,
    key,
    note,
    panel,
    styled,
)

_LEFT, _GAP, _TOP, _FOOT, _ROW = 1.92, 0.3, 0.36, 0.42, 0.145
_FLOOR = 1e-17  # a smaller distance is none
_REACHES = 1e-6
_DRAWN = "random"  # the source that is drawn in full; others get a hollow mark


@styled
def methods(columns: Columns) -> Figure:
    """Draw how far from p* each method ends, which β its policy stands for, and what that costs.

    Args:
        columns: method, source ("random" and others), reaches, and quantiles q05, q50, q95 of
            tv (with tv_max), beta_ratio and regret; a row per method and source.
    """
    rows = _methods(columns)
    figure, axes = _panels(rows, 3)
    _marks(axes[0], columns, rows, "tv", lambda x: max(x, _FLOOR), most=True)
    axes[0].set_xscale("log")
    axes[0].set_xlim(_FLOOR / 2, 2)
    axes[0].axvline(_REACHES, color=MUTED, linewidth=0.6, linestyle=(0, (3, 2)))
    ticks(
        axes[0].xaxis,
        [1e-16, 1e-11, _REACHES, 1e-3, 1.0],
        [decade(x) for x in (1e-16, 1e-11, _REACHES, 1e-3, 1.0)],
    )
    axes[0].set_xlabel("total variation to p*")
    _marks(axes[1], columns, rows, "beta_ratio", lambda x: min(max(x, 0.011), 90.0))
    axes[1].set_xscale("log")
    axes[1].set_xlim(0.01, 100)
    axes[1].axvline(1, color=MUTED, linewidth=0.6, linestyle=(0, (3, 2)))
    ticks(axes[1].xaxis, [0.01, 0.1, 1, 10, 100], ["≤0.01", "0.1", "1", "10", "≥100"])
    axes[1].set_xlabel("implied β over β")
    _marks(axes[2], columns, rows, "regret", lambda x: min(max(x, 1e-6), 10.0))
    axes[2].set_xscale("log")
    axes[2].set_xlim(0.8e-6, 10)
    places = [1e-6, 1e-4, 1e-2, 1.0]
    ticks(axes[2].xaxis, places, ["≤10⁻⁶", *(decade(x) for x in places[1:])])
    axes[2].set_xlabel("regret at equal KL (reward)")
    _key(figure)
    return figure


@styled
def methods_tpm(columns: Columns) -> Figure:
    """Draw how each method moves TPM(A), and how often it ends at α or above, beside p*.

    Args:
        columns: method, source, quantiles of tpm_gain and tpm_gain_optimum,
            share_at_least_alpha_hold and share_at_least_alpha_hold_optimum.
    """
    rows = _methods(columns)
    figure, axes = _panels(rows, 2)
    own = where(columns, [s == _DRAWN for s in columns["source"]])
    axes[0].axvspan(
        own["tpm_gain_optimum_q05"][0], own["tpm_gain_optimum_q95"][0], color=OUTER, linewidth=0
    )
    axes[0].axvline(own["tpm_gain_optimum_q50"][0], color=ALIGNED, linewidth=0.8)
    _marks(axes[0], columns, rows, "tpm_gain", lambda x: x)
    axes[0].axvline(0, color=MUTED, linewidth=0.6, linestyle=(0, (3, 2)))
    axes[0].set_xlabel("TPM(A) − α")
    for source in dict.fromkeys(columns["source"]):
        part = where(columns, [s == source for s in columns["source"]])
        for label, share in zip(part["method"], part["share_at_least_alpha_hold"], strict=True):
            style = _mark(source == _DRAWN)
            axes[1].plot([100 * share], [rows.index(label)], linestyle="", zorder=3, **style)
    axes[1].axvline(100 * own["share_at_least_alpha_hold_optimum"][0], color=ALIGNED, linewidth=0.8)
    axes[1].set_xlabel("TPM(A) ≥ α where hypotheses hold (%)")
    axes[1].set_xlim(None, 101)
    _key(figure, p_star=True)
    return figure


def _methods(columns: Columns) -> list[str]:
    """Return the methods, those that reach p* on top, else in the order of the table."""
    own = where(columns, [s == _DRAWN for s in columns["source"]])
    reaches = {m: str(x) == "True" for m, x in zip(own["method"], own["reaches"], strict=True)}
    return sorted(dict.fromkeys(columns["method"]), key=lambda m: not reaches[m])[::-1]


def _panels(rows: Sequence[str], across: int) -> tuple[Figure, list[Axes]]:
    tall = _ROW * len(rows)
    figure = Figure((PAGE, _TOP + tall + _FOOT))
    wide = (PAGE - _LEFT - 0.1 - (across - 1) * _GAP) / across
    out = []
    for at in range(across):
        axes = panel(figure, _LEFT + at * (wide + _GAP), _FOOT, wide, tall)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        ticks(axes.yaxis, range(len(rows)), [name(m, 34) for m in rows] if at == 0 else None)
        if at:
            axes.set_yticklabels([])
        axes.tick_params(axis="y", length=0)
        for y in range(len(rows)):
            axes.axhline(y, color=FAINT, linewidth=0.3, zorder=0)
        out.append(axes)
    return figure, out


def _mark(drawn: bool) -> dict[str, Any]:
    if drawn:
        return {"color": INK, "marker": "o", "markersize": 3.2}
    return {"color": FAILING, "marker": "D", "markersize": 3.2, "markerfacecolor": "none"}


def _marks(
    axes: Axes,
    columns: Columns,
    rows: Sequence[str],
    what: str,
    shown: Callable[[float], float],
    most: bool = False,
) -> None:
    """Draw the median of each method as a mark, and 5–95% as a line; the greatest as a tick."""
    for source in dict.fromkeys(columns["source"]):
        part = where(columns, [s == source for s in columns["source"]])
        for at, label in enumerate(part["method"]):
            y, style = rows.index(label), _mark(source == _DRAWN)
            low, middle, high = (part[f"{what}_{q}"][at] for q in ("q05", "q50", "q95"))
            if any(math.isnan(x) for x in (low, middle, high)):
                continue
            if source == _DRAWN:
                axes.plot([shown(low), shown(high)], [y, y], color=INK, linewidth=1.0)
                if most:
                    axes.plot([shown(part[f"{what}_max"][at])], [y], "|", color=INK, markersize=5)
            axes.plot([shown(middle)], [y], linestyle="", zorder=3, **style)


def _key(figure: Figure, p_star: bool = False) -> None:
    handles: list[Any] = [
        Line2D([], [], linewidth=1.0, label="random instances: median, 5–95%", **_mark(True)),
        Line2D([], [], linestyle="", label="real prompts: median", **_mark(False)),
    ]
    if p_star:
        handles[1].set_label("real prompts")
        handles.append(Patch(color=OUTER, linewidth=0, label="p*: 5–95%"))
        handles.append(Line2D([], [], color=ALIGNED, linewidth=0.8, label="p*"))
    else:
        handles.insert(1, Line2D([], [], color=INK, marker="|", linestyle="", label="greatest"))
    key(figure, _LEFT, 0.08, handles, ncols=len(handles))
    note(figure, 0.06, 0.08, "A row per method", fontweight="bold")


_ACROSS, _SMALL, _HIGH = 4, 1.5, 1.0


@styled
def frontier(columns: Columns) -> Figure:
    """Draw, a panel per method, mean reward gained against mean KL(π‖p_ref) as β goes.

    Methods that lie on the frontier everywhere share one panel with it.

    Args:
        columns: method ("p*", "best of n" and others), beta, share, kl (nats), gain (reward).
    """
    best = _line(columns, "p*")
    names = [m for m in dict.fromkeys(columns["method"]) if m != "p*"]
    off = [m for m in names if _lost(_line(columns, m), best) > 1e-3]
    down = math.ceil(len(off) / _ACROSS)
    head, title, foot, left = 0.3, 0.5, 0.44, 0.46
    figure = Figure((PAGE, head + down * (_HIGH + title) + foot))
    wide = (PAGE - left - 0.08 - (_ACROSS - 1) * 0.14) / _ACROSS
    top = 1.05 * max(best[1])
    for at, method in enumerate(off):
        row, column = divmod(at, _ACROSS)
        bottom = foot + (down - 1 - row) * (_HIGH + title)
        axes = panel(figure, left + column * (wide + 0.14), bottom, wide, _HIGH)
        axes.plot(*best, color=OUTER, linewidth=3)
        mine = _line(columns, method)
        axes.plot(*mine, color=INK, linewidth=0.9, marker="o", markersize=2.2)
        axes.set_xscale("log")
        axes.set_xlim(0.003, 6)
        axes.set_ylim(0, top)
        ticks(axes.xaxis, [0.01, 0.1, 1], ["0.01", "0.1", "1"])
        axes.set_xlabel("" if row < down - 1 and at + _ACROSS < len(off) else "KL(π‖p_ref), nats")
        if column:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("reward gained")
        lost = 100 * _lost(mine, best)
        place = left + column * (wide + 0.14)
        note(figure, place, head + row * (_HIGH + title) + 0.18, name(method, 27), fontsize=7)
        note(
            figure,
            place + 0.05,
            head + row * (_HIGH + title) + 0.33,
            f"loses up to {number(lost, 2)}%",
            fontsize=6.5,
            color=MUTED,
        )
    on = [m for m in names if m not in off]
    handles = [
        Line2D([], [], color=OUTER, linewidth=3, label=f"p*, and {len(on)} methods that lie on it"),
        Line2D([], [], color=INK, linewidth=0.9, marker="o", markersize=2.2, label="a method"),
    ]
    key(figure, left, 0.08, handles, ncols=2)
    return figure


def _line(columns: Columns, method: str) -> tuple[list[float], list[float]]:
    """Return KL and gain in order, where nearly all instances have an optimum."""
    part = where(
        columns,
        [
            m == method and s > 0.95
            for m, s in zip(columns["method"], columns["share"], strict=True)
        ],
    )
    pairs = sorted(zip(part["kl"], part["gain"], strict=True))
    pairs = [(x, y) for x, y in pairs if x > 1e-4]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _lost(line: tuple[list[float], list[float]], best: tuple[list[float], list[float]]) -> float:
    """Return the largest share of the frontier's gain, at equal KL, that a method does not get."""
    lost = 0.0
    for kl, gain in zip(*line, strict=True):
        after = next((k for k, x in enumerate(best[0]) if x >= kl), None)
        if not after or kl < 1e-3:
            continue
        (x0, x1), (y0, y1) = best[0][after - 1 : after + 1], best[1][after - 1 : after + 1]
        reachable = y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
        lost = max(lost, 1 - gain / reachable)
    return lost
