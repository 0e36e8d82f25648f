"""How far from p*, and from its own limit, a method is after so many preferences."""

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxsim.figures.bands import OUTER, ordered, where
from jaxsim.figures.labels import decade, name, number
from jaxsim.figures.scales import ticks
from jaxsim.figures.style import (
    ALIGNED,
    FAILING,
    MUTED,
    PAGE,
    Columns,
    key,
    note,
    panel,
    styled,
)

_ACROSS, _HIGH, _STRIP, _BETWEEN, _APART = 4, 1.05, 0.26, 0.08, 0.24
_HEAD, _TITLE, _FOOT, _LEFT, _GAP = 0.36, 0.34, 0.42, 0.52, 0.24


@styled
def finite_samples(columns: Columns) -> Figure:
    """Draw a panel per method: error by number of preferences, with the share without optimum.

    Args:
        columns: method, number, rate, share_without_optimum, and quantiles q05, q50, q95 of
            to_optimum and to_limit (total variation); a row per method and number.
    """
    names = list(dict.fromkeys(columns["method"]))
    down = math.ceil(len(names) / _ACROSS)
    tall = _TITLE + _HIGH + _BETWEEN + _STRIP
    figure = Figure((PAGE, _HEAD + down * tall + _FOOT + (down - 1) * _APART))
    wide = (PAGE - _LEFT - 0.08 - (_ACROSS - 1) * _GAP) / _ACROSS
    low = min(x for x in columns["to_limit_q50"] if not math.isnan(x))
    numbers = sorted(set(columns["number"]))
    for at, method in enumerate(names):
        row, column = divmod(at, _ACROSS)
        left = _LEFT + column * (wide + _GAP)
        bottom = _FOOT + (down - 1 - row) * (tall + _APART)
        part = ordered(where(columns, [m == method for m in columns["method"]]), "number")
        axes = panel(figure, left, bottom + _STRIP + _BETWEEN, wide, _HIGH)
        axes.fill_between(
            part["number"], part["to_optimum_q05"], part["to_optimum_q95"], color=OUTER, linewidth=0
        )
        axes.plot(part["number"], part["to_optimum_q50"], color=ALIGNED)
        axes.plot(part["number"], part["to_limit_q50"], color=FAILING, linestyle=(0, (3, 1.5)))
        strip = panel(figure, left, bottom, wide, _STRIP)
        strip.fill_between(
            part["number"],
            [100 * x for x in part["share_without_optimum"]],
            color=MUTED,
            linewidth=0,
        )
        strip.set_ylim(0, 100)
        axes.set_yscale("log")
        axes.set_ylim(10 ** math.floor(math.log10(low)), 1.2)
        places = [10.0**k for k in range(math.floor(math.log10(low)) + 1, 1)]
        ticks(axes.yaxis, places, [decade(x) for x in places] if not column else [""] * len(places))
        ticks(strip.yaxis, [0, 100], ["0", "100%"] if not column else ["", ""])
        for which in (axes, strip):
            which.set_xscale("log")
            which.set_xlim(numbers[0], numbers[-1])
            powers = [x for x in numbers if math.log10(x) == round(math.log10(x))]
            last = which is strip
            ticks(which.xaxis, powers, [decade(x) for x in powers] if last else [""] * len(powers))
        if column == 0:
            axes.set_ylabel("total variation")
        if at + _ACROSS >= len(names):
            strip.set_xlabel("preferences")
        head = _HEAD + row * (tall + _APART)
        note(figure, left, head + 0.02, name(method, 28), fontsize=7)
        slope = part["rate"][0]
        fitted = "no rate" if math.isnan(slope) else f"rate {number(slope, 2)}"
        note(figure, left, head + 0.16, fitted, fontsize=6.5, color=MUTED)
    handles = [
        Line2D([], [], color=ALIGNED, label="to p*, median"),
        Patch(color=OUTER, linewidth=0, label="to p*, 5–95%"),
        Line2D([], [], color=FAILING, linestyle=(0, (3, 1.5)), label="to the method's own limit"),
        Patch(color=MUTED, linewidth=0, label="samples without an optimum"),
    ]
    key(figure, _LEFT, 0.08, handles, ncols=4)
    return figure
