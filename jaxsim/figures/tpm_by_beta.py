"""TPM(A) against β: what a whole family of instances does."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxsim.figures.bands import bands_key, draw_bands, ordered, widened
from jaxsim.figures.scales import beta_axis, unit_ticks
from jaxsim.figures.style import ALIGNED, COLUMN, INK, Columns, key, panel, styled

_MEAN: dict[str, Any] = {
    "color": ALIGNED,
    "linestyle": "",
    "marker": "D",
    "markerfacecolor": "white",
    "markeredgewidth": 1.0,
}
_START: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 0.9}


@styled
def tpm_by_beta(columns: Columns) -> Figure:
    """Draw quantile bands, median and mean of TPM(A) against β, and the mean α they start from.

    Args:
        columns: beta, alpha_mean, tpm_mean, q05, q25, q50, q75, q95; a row per β.
    """
    figure = Figure((COLUMN, 2.84))
    axes = panel(figure, 0.52, 0.42, COLUMN - 0.62, 1.88)
    columns = ordered(columns, "beta")
    at = beta_axis(axes, columns["beta"])
    x, wide = widened(at, columns)
    draw_bands(axes, x, wide)
    axes.plot(x, wide["alpha_mean"], **_START)
    axes.plot(at, columns["tpm_mean"], markevery=max(1, len(at) // 12), **_MEAN)
    unit_ticks(axes.yaxis, 4)
    axes.set_ylabel("TPM(A) (probability mass)")
    median, inner, outer = bands_key()
    mean = Line2D([], [], label="mean", **_MEAN)
    start = Line2D([], [], label="mean α, before tuning", **_START)
    key(figure, 0.52, 0.06, [median, mean, start, inner, outer], ncols=2)
    return figure
