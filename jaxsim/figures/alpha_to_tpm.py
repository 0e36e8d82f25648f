"""From α to TPM(A): how much of the aligned component tuning leaves, for each β."""

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxsim.figures.bands import bands_key, draw_bands, ordered, where
from jaxsim.figures.labels import beta_name
from jaxsim.figures.scales import inner, unit_ticks
from jaxsim.figures.style import COLUMN, INK, PAGE, Columns, key, panel, styled

MOST = 8
_GAP = 0.16
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.52, 0.14, 0.42, 0.42


@styled
def alpha_to_tpm(columns: Columns) -> Figure:
    """Draw a panel per β (at most eight, evenly chosen) of TPM(A) against α, with the diagonal.

    Args:
        columns: beta, alpha, q05, q25, q50, q75, q95; a row per β and α.
    """
    betas = sorted({b for b in columns["beta"] if not math.isnan(b)})
    if any(math.isnan(b) for b in columns["beta"]):
        betas.append(math.nan)
    if len(betas) > MOST:
        betas = [betas[round(k * (len(betas) - 1) / (MOST - 1))] for k in range(MOST)]
    across = len(betas) if len(betas) <= 4 else (len(betas) + 1) // 2
    down = math.ceil(len(betas) / across)
    width = COLUMN if len(betas) == 1 else PAGE
    side = min(2.2, (width - _LEFT - _RIGHT - (across - 1) * _GAP) / across)
    width = min(width, _LEFT + _RIGHT + across * side + (across - 1) * _GAP)
    height = _TOP + _BOTTOM + down * side + (down - 1) * (_GAP + 0.14)
    figure = Figure((width, height))
    for at, beta in enumerate(betas):
        row, column = divmod(at, across)
        bottom = height - _TOP - side - row * (side + _GAP + 0.14)
        axes = panel(figure, _LEFT + column * (side + _GAP), bottom, side, side)
        same = [b == beta or (b != b and beta != beta) for b in columns["beta"]]
        rows = ordered(where(columns, same), "alpha")
        draw_bands(axes, rows["alpha"], rows)
        axes.plot((0, 1), (0, 1), color=INK, linestyle=(0, (4, 2)), linewidth=0.9)
        unit_ticks(axes.xaxis)
        unit_ticks(axes.yaxis)
        if at + across < len(betas):
            inner(axes.xaxis)
        if column:
            inner(axes.yaxis)
        own = "each instance its own β" if math.isnan(beta) else f"β = {beta_name(beta)}"
        axes.set_title(own, pad=3)
    low = (_BOTTOM + (height - _TOP)) / 2 / height
    center = (_LEFT + width - _RIGHT) / 2 / width
    figure.text(0.04 / width, low, "TPM(A) (probability mass)", rotation=90, va="center", ha="left")
    figure.text(
        center, 0.05 / height, "α (probability mass before tuning)", va="bottom", ha="center"
    )
    diagonal = Line2D([], [], color=INK, linestyle=(0, (4, 2)), linewidth=0.9, label="TPM(A) = α")
    median, inner, outer = bands_key()
    # Four entries do not fit over one or two panels.
    key(figure, _LEFT, 0.06, [median, inner, outer, diagonal], ncols=4 if across > 2 else 2)
    return figure
