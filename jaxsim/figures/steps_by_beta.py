"""How many steps descent takes to the closed form, by β."""

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxsim.figures.bands import OUTER, ordered, where
from jaxsim.figures.multiples import Multiples
from jaxsim.figures.scales import BETA, beta_axis, decades, ticks, unit_ticks
from jaxsim.figures.style import ALIGNED, INK, Columns, styled

_SHARE: dict[str, Any] = {"color": INK, "linestyle": (0, (1, 1)), "linewidth": 1.0}


@styled
def steps_by_beta(columns: Columns) -> Figure:
    """Draw quantile bands of the steps of certified instances against β, and their share.

    Args:
        columns: optimizer, beta, certified (share), q05, q50, q95 (steps; NaN where none was
            certified); a row per optimiser and range of β.
    """
    optimizers = list(dict.fromkeys(columns["optimizer"]))
    sheet = Multiples(optimizers, keys=3, right=0.34)
    most = max((x for x in columns["q95"] if not math.isnan(x)), default=1.0)
    top = 10.0 ** math.ceil(math.log10(max(most, 10.0)))
    for at, (optimizer, axes) in enumerate(zip(optimizers, sheet.axes, strict=True)):
        rows = ordered(where(columns, [o == optimizer for o in columns["optimizer"]]), "beta")
        x = beta_axis(axes, rows["beta"], "")
        low, mid, high = ([max(v, 0.7) for v in rows[c]] for c in ("q05", "q50", "q95"))
        axes.fill_between(x, low, high, color=OUTER, linewidth=0)
        axes.plot(x, mid, color=ALIGNED, marker="o" if len(x) < 3 else "")
        axes.set_yscale("log")
        axes.set_ylim(0.7, top * 1.3)
        ticks(axes.yaxis, decades(1.0, top))
        share = axes.twinx()
        share.plot(x, rows["certified"], **_SHARE)
        unit_ticks(share.yaxis, 2)
        share.set_ylim(-0.03, 1.06)
        share.tick_params(right=False, labelright=at % 4 == 3 or at == len(optimizers) - 1, pad=1)
    handles = [
        Line2D([], [], color=ALIGNED, label="median, if certified"),
        Patch(color=OUTER, linewidth=0, label="5–95%"),
        Line2D([], [], label="share certified (right)", **_SHARE),
    ]
    return sheet.finish(BETA, "steps", handles)
