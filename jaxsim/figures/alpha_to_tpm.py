"""From α to TPM(A): how much of the aligned component tuning leaves, for each β."""

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxsim.figures.bands import bands_key, draw_bands, ordered, where
from jaxsim.figures.labels import beta_name
from jaxsim.figures.scales import distinct_betas, hide_labels, same_beta, unit_ticks
from jaxsim.figures.style import COLUMN, INK, PAGE, Columns, key, panel, styled

MOST = 8
_GAP = 0.16
_LEFT, _RIGHT, _BOTTOM = 0.52, 0.14, 0.42


@styled
def alpha_to_tpm(columns: Columns) -> Figure:
    """Draw a panel per β (at most eight, evenly chosen) of TPM(A) against α, with the diagonal.

    Args:
        columns: beta, alpha, q05, q25, q50, q75, q95; a row per β and α.
    """
    betas = distinct_betas(columns["beta"], MOST)
    across = len(betas) if len(betas) < 4 else 4
    down = math.ceil(len(betas) / across)
    gaps = (across - 1) * _GAP
    side = min(2.4, (PAGE - _LEFT - _RIGHT - gaps) / across)
    width = max(COLUMN, _LEFT + _RIGHT + across * side + gaps)
    top = 0.42 if across > 2 else 0.58  # the legend takes two lines over one or two panels
    height = top + _BOTTOM + down * side + (down - 1) * (_GAP + 0.14)
    figure = Figure((width, height))
    for at, beta in enumerate(betas):
        row, column = divmod(at, across)
        bottom = height - top - side - row * (side + _GAP + 0.14)
        axes = panel(figure, _LEFT + column * (side + _GAP), bottom, side, side)
        rows = where(columns, [same_beta(beta, b) for b in columns["beta"]])
        rows = ordered(rows, "alpha")
        draw_bands(axes, rows["alpha"], rows)
        axes.plot((0, 1), (0, 1), color=INK, linestyle=(0, (4, 2)), linewidth=0.9)
        parts = 4 if across < 4 else 2
        unit_ticks(axes.xaxis, parts)
        unit_ticks(axes.yaxis, parts)
        if at + across < len(betas):
            hide_labels(axes.xaxis)
        if column:
            hide_labels(axes.yaxis)
        own = "each instance its own β" if math.isnan(beta) else f"β = {beta_name(beta)}"
        axes.set_title(own, pad=3)
    low = (_BOTTOM + height - top) / 2 / height
    center = (_LEFT + (across * side + gaps) / 2) / width
    figure.text(0.04 / width, low, "TPM(A) (probability mass)", rotation=90, va="center", ha="left")
    figure.text(
        center,
        0.05 / height,
        "α before tuning (the shift Δ does not depend on α)",
        va="bottom",
        ha="center",
    )
    diagonal = Line2D([], [], color=INK, linestyle=(0, (4, 2)), linewidth=0.9, label="TPM(A) = α")
    median, inner, outer = bands_key()
    key(figure, _LEFT, 0.06, [median, inner, outer, diagonal], ncols=4 if across > 2 else 2)
    return figure
