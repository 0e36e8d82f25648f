"""The violation atlas: how often Theorem 2 fails, by family, number of outputs and β."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxsim.figures.bands import where
from jaxsim.figures.labels import number
from jaxsim.figures.scales import BETA, ticks
from jaxsim.figures.style import MUTED, PAGE, Columns, note, panel, styled
from jaxsim.figures.violations import OUTPUTS, SHADES, percent

_ACROSS = 3
_LEFT, _GAP, _HEAD, _FOOT = 0.5, 0.2, 0.42, 0.42
_WIDE, _TITLE, _ROW = (PAGE - _LEFT - 2 * _GAP - 0.06) / _ACROSS, 0.4, 0.128
_SHOWN = (0.0, 0.1, 1.0, 10.0, 100.0)
_KEY = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@styled
def atlas(columns: Columns) -> Figure:
    """Draw a map for each family: number of outputs against β, darker where more fail.

    Each map says how much its darkest cell is, so that no colour need be read exactly.

    Args:
        columns: family, outputs, beta (0 is the limit), hypotheses_hold, share, low, high; a row
            per cell.
    """
    families = list(dict.fromkeys(columns["family"]))
    parts = [where(columns, [f == family for f in columns["family"]]) for family in families]
    parts.sort(key=lambda part: len(set(part["outputs"])) == 1)  # maps of one row come last
    betas = sorted(set(columns["beta"]))
    outputs = sorted({n for part in parts for n in part["outputs"]})
    tall = _ROW * len(outputs)
    down = math.ceil(len(parts) / _ACROSS)
    figure = Figure((PAGE, _HEAD + down * (tall + _TITLE) + _FOOT))
    top = max([0.05, *(s for s in columns["share"] if not math.isnan(s))])
    for at, part in enumerate(parts):
        row, column = divmod(at, _ACROSS)
        left = _LEFT + column * (_WIDE + _GAP)
        height = figure.get_figheight()
        bottom = height - _HEAD - (row + 1) * (tall + _TITLE) + 0.06
        rows = sorted(set(part["outputs"]))
        own = tall if len(rows) > 1 or len(outputs) == 1 else 2 * _ROW
        axes = panel(figure, left, bottom + tall - own, _WIDE, own)
        _map(axes, part, betas, rows, top)
        shares = [_or_zero(x) for x in part["share"]]
        most = shares.index(max(shares))
        worst = percent(shares[most], _or_zero(part["low"][most]), _or_zero(part["high"][most]))
        label = f"at most {worst}%" if shares[most] > 0 else "none"
        head = height - bottom - tall
        note(figure, left, head - 0.29, str(part["family"][0]), fontweight="bold")
        note(figure, left, head - 0.15, label, color=MUTED, fontsize=7)
        last = at + _ACROSS >= len(parts) or own < tall
        names = ["→0" if b == 0 else number(b) for b in _SHOWN if b in betas]
        places = [betas.index(b) for b in _SHOWN if b in betas]
        ticks(axes.xaxis, places, names if last else [""] * len(names))
        ticks(axes.yaxis, range(len(rows)), [number(n) for n in rows] if column == 0 else None)
        if column and len(rows) > 1:
            axes.set_yticklabels([])
        elif column:
            ticks(axes.yaxis, range(len(rows)), [number(n) for n in rows])
        if last:
            axes.set_xlabel(BETA)
        if column == 0 and len(rows) > 1:
            axes.set_ylabel(OUTPUTS)
    _key(figure, top)
    return figure


def _or_zero(x: float) -> float:
    return 0.0 if math.isnan(x) else x


def _shade(share: float, top: float) -> Any:
    return "#E9E9E9" if math.isnan(share) else SHADES(math.sqrt(share / top))[:3]


def _map(axes: Axes, part: Columns, betas: list[float], rows: list[float], top: float) -> None:
    for n, b, share in zip(part["outputs"], part["beta"], part["share"], strict=True):
        x, y = betas.index(b), rows.index(n)
        corners = [x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5]
        shade = "white" if share == 0 else _shade(share, top)
        axes.fill(*corners, facecolor=shade, edgecolor="white", linewidth=0.4)
        if share == 0:
            axes.plot([x], [y], ".", color=MUTED, markersize=1.2)
    axes.set_xlim(-0.5, len(betas) - 0.5)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.tick_params(length=1.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _key(figure: Figure, top: float) -> None:
    """Draw patches of colour with their shares, from none to the most."""
    shares = [s for s in _KEY if s < top] + [top]
    note(figure, _LEFT, 0.06, "Share with TPM(A) < α of those that meet the hypotheses:")
    wide = PAGE - _LEFT - 3.3
    axes = panel(figure, PAGE - 0.06 - wide, figure.get_figheight() - 0.2, wide, 0.13)
    for x, share in enumerate(shares):
        corners = [x - 0.5, x + 0.5, x + 0.5, x - 0.5], [0, 0, 1, 1]
        shade = "white" if share == 0 else _shade(share, top)
        axes.fill(*corners, facecolor=shade, edgecolor="white", linewidth=0.4)
    axes.plot([0], [0.5], ".", color=MUTED, markersize=1.2)
    axes.set_xlim(-0.5, len(shares) - 0.5)
    axes.set_ylim(0, 1)
    ticks(axes.yaxis, [])
    ticks(axes.xaxis, range(len(shares)), ["none"] + [f"{100 * s:.2g}%" for s in shares[1:]])
    axes.tick_params(length=0, pad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
