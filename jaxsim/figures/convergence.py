"""How far gradient descent on eq. (1) is from the closed form, step by step."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxsim.figures.bands import OUTER, ordered, where
from jaxsim.figures.labels import decade, number
from jaxsim.figures.multiples import Multiples
from jaxsim.figures.scales import decades, even_ticks, ticks
from jaxsim.figures.style import ALIGNED, FAILING, INK, Columns, styled

_DOTTED, _DASHED = (0, (1, 1)), (0, (5, 2))


@styled
def convergence(columns: Columns, facts: Mapping[str, Any] | None = None) -> Figure:
    """Draw KL(π‖p*) against the optimiser's steps: a panel per optimiser, on common axes.

    Values of exactly 0 and of infinity get a line of their own at the axis' end.

    Args:
        columns: optimizer, step, q05, q50, q95, worst (nats); a row per optimiser and step.
        facts: `tolerance` (nats), where the solves had one.
    """
    tolerance = (facts or {}).get("tolerance")
    optimizers = list(dict.fromkeys(columns["optimizer"]))
    handles = [
        Line2D([], [], color=ALIGNED, label="median instance"),
        Patch(color=OUTER, linewidth=0, label="5–95% of instances"),
        Line2D([], [], color=INK, linestyle=_DOTTED, label="worst instance"),
    ]
    if tolerance:
        text = f"tolerance, {number(tolerance)} nats"
        handles.append(Line2D([], [], color=FAILING, linestyle=_DASHED, linewidth=0.9, label=text))
    sheet = Multiples(optimizers, keys=len(handles))
    scale = _Scale(columns, tolerance)
    first, last = min(columns["step"]), max(columns["step"])
    for optimizer, axes in zip(optimizers, sheet.axes, strict=True):
        rows = ordered(where(columns, [o == optimizer for o in columns["optimizer"]]), "step")
        step, q05, q50, q95, worst = (
            rows["step"],
            *(scale.placed(rows[c]) for c in ("q05", "q50", "q95", "worst")),
        )
        if len(step) == 1:
            axes.vlines(step, q05, q95, color=OUTER, linewidth=6)
        axes.fill_between(step, q05, q95, color=OUTER, linewidth=0)
        axes.plot(step, worst, color=INK, linestyle=_DOTTED, marker="v" if len(step) == 1 else "")
        axes.plot(step, q50, color=ALIGNED, marker="o" if len(step) == 1 else "")
        if tolerance:
            axes.axhline(tolerance, color=FAILING, linestyle=_DASHED, linewidth=0.9)
        axes.set_xlim((first, last) if last > first else (first - 0.5, first + 0.5))
        ticks(axes.xaxis, even_ticks(first, last, 4))
        scale.apply(axes)
    return sheet.finish("optimiser steps", "smallest KL(π ‖ p*) so far (nats)", handles)


class _Scale:
    """A logarithmic y axis with a place for 0 below and one for ∞ above, where they occur."""

    def __init__(self, columns: Columns, tolerance: float | None) -> None:
        values = [v for c in ("q05", "q50", "q95", "worst") for v in columns[c]]
        shown = [v for v in [*values, tolerance or math.nan] if 0 < v < math.inf] or [1.0]
        self.low = 10.0 ** math.floor(math.log10(min(shown)))
        self.high = 10.0 ** math.ceil(math.log10(max(shown)))
        if self.high <= self.low:
            self.high = 10 * self.low
        self.at = decades(self.low, self.high)
        self.names = [decade(v) for v in self.at]
        room = max(10.0, (self.high / self.low) ** 0.1)
        self.zero, self.infinity = self.low / room, self.high * room
        pad = (self.high / self.low) ** 0.03
        self.bottom, self.top = self.low / pad, self.high * pad
        if any(v <= 0 for v in values):
            self.bottom = self.zero / pad
            self.at, self.names = [self.zero, *self.at], ["0", *self.names]
        if math.inf in values:
            self.top = self.infinity * pad
            self.at, self.names = [*self.at, self.infinity], [*self.names, "∞"]

    def placed(self, values: list[float]) -> list[float]:
        """Move 0 and ∞ to their places."""
        return [self.zero if v <= 0 else self.infinity if v == math.inf else v for v in values]

    def apply(self, axes: Axes) -> None:
        axes.set_yscale("log")
        axes.set_ylim(self.bottom, self.top)
        ticks(axes.yaxis, self.at, self.names)
