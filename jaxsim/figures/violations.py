"""How often Theorem 2 fails, by number of outputs and β."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from jaxsim.figures.bands import ordered, where
from jaxsim.figures.labels import beta_name, number
from jaxsim.figures.scales import (
    BETA,
    beta_axis,
    categories,
    distinct_betas,
    even_ticks,
    same_beta,
    ticks,
)
from jaxsim.figures.style import COLUMN, FAILING, FAINT, Columns, note, panel, styled

OUTPUTS = "number of outputs n"
MOST = 17
"""Columns of the map; of more values of β, as many are chosen evenly."""
_LEFT = 0.56
SHADES = LinearSegmentedColormap.from_list(
    "violations", ["#FFF6EC", "#F4A15C", "#A63603", "#4A1500"]
)


@styled
def violations(columns: Columns) -> Figure:
    """Draw the share of instances that meet Theorem 2's hypotheses and have TPM(A) < α.

    A map of percentages where there are several n and several β, and otherwise points with
    their 95% Clopper–Pearson intervals.

    Args:
        columns: outputs, beta, share, low, high; a row per n and β. A share that is NaN says that
            no instance met the hypotheses.
    """
    several = len(set(columns["outputs"])) > 1
    if several and len(distinct_betas(columns["beta"], MOST)) > 1:
        return _map(columns)
    return _points(ordered(columns, "outputs" if several else "beta"), over_outputs=several)


def _map(columns: Columns) -> Figure:
    outputs = sorted(set(columns["outputs"]))
    betas = distinct_betas(columns["beta"], MOST)
    rows = [number(n) for n in outputs]
    left = 0.4 + 0.06 * max(len(row) for row in rows)
    wide = max(COLUMN - left - 0.06, 0.355 * len(betas))
    tall = max(0.26 * len(outputs), 0.8)
    figure = Figure((left + wide + 0.06, tall + 0.82))
    axes = panel(figure, left, 0.42, wide, tall)
    top = max([0.5, *(share for share in columns["share"] if not math.isnan(share))])
    for n, b, share, low, high in zip(
        *(columns[c] for c in ("outputs", "beta", "share", "low", "high")), strict=True
    ):
        for x in (j for j, beta in enumerate(betas) if same_beta(b, beta)):
            _cell(axes, x, outputs.index(n), share, low, high, top)
    axes.set_ylim(-0.5, len(outputs) - 0.5)
    categories(axes, [beta_name(b, 3 if len(betas) <= 8 else 2) for b in betas])
    axes.set_xlim(-0.5, len(betas) - 0.5)
    ticks(axes.yaxis, range(len(outputs)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(BETA)
    axes.set_ylabel(OUTPUTS)
    _heading(figure, left, columns["share"])
    return figure


def _cell(axes: Axes, x: int, y: int, share: float, low: float, high: float, top: float) -> None:
    missing = math.isnan(share)
    shade = to_rgb("#E9E9E9") if missing else SHADES(math.sqrt(share / top))[:3]
    axes.fill(
        [x - 0.5, x + 0.5, x + 0.5, x - 0.5],
        [y - 0.5, y - 0.5, y + 0.5, y + 0.5],
        facecolor=shade,
        edgecolor="white",
        linewidth=0.8,
    )
    axes.text(
        x,
        y,
        "–" if missing else percent(share, low, high),
        ha="center",
        va="center_baseline",
        fontsize=7,
        color="black" if _lightness(shade) > 0.18 else "white",
    )


def _lightness(rgb: Sequence[float]) -> float:
    linear: list[float] = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def percent(share: float, low: float, high: float) -> str:
    """Write a share in percent, with no more digits than its interval supports."""
    if share == 0:
        return "0"
    half = 50 * (high - low)
    most = 1 if share >= 0.1 else 2
    digits = min(max(math.ceil(-math.log10(half)), 0), most) if half > 0 else most
    return f"{100 * share:.{digits}f}"


def _points(columns: Columns, *, over_outputs: bool) -> Figure:
    figure = Figure((COLUMN, 2.5))
    axes = panel(figure, _LEFT, 0.42, COLUMN - _LEFT - 0.1, 1.68)
    if over_outputs:
        names = [number(n) for n in columns["outputs"]]
        categories(axes, names)
        x = [float(i) for i in range(len(names))]
        axes.set_xlabel(OUTPUTS)
    else:
        x = beta_axis(axes, columns["beta"])
    _heading(figure, _LEFT, columns["share"])
    for at, s in zip(x, columns["share"], strict=True):
        if math.isnan(s):
            axes.annotate("–", (at, 0), (0, 2.5), textcoords="offset points", ha="center")
    columns = where({**columns, "x": x}, [not math.isnan(s) for s in columns["share"]])
    share, x = columns["share"], columns["x"]
    highest = max([*columns["high"], 1e-4])
    axes.vlines(
        x,
        [100 * v for v in columns["low"]],
        [100 * v for v in columns["high"]],
        color=FAILING,
        linewidth=1.2,
    )
    axes.plot(
        x, [100 * s for s in share], color=FAILING, marker="o", linewidth=0.7, linestyle=(0, (1, 2))
    )
    for at, s, low, high in zip(x, share, columns["low"], columns["high"], strict=True):
        axes.annotate(
            percent(s, low, high),
            (at, 100 * high),
            (0, 2.5),
            fontsize=7,
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
    axes.set_ylim(0, 115 * highest)
    ticks(axes.yaxis, even_ticks(0, 115 * highest))
    axes.grid(axis="y", color=FAINT, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_ylabel("share of violations (%)")
    return figure


def _heading(figure: Figure, left: float, shares: Sequence[float]) -> None:
    text = "violations: instances with TPM(A) < α, in % of\nthose that meet Theorem 2's hypotheses"
    missing = any(math.isnan(share) for share in shares)
    note(figure, left, 0.06, f"{text} (–: none does)" if missing else text, fontsize=7)
