"""TPM(A) on the way down: descent may turn, whatever the ends are."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxsim.figures.bands import ordered, where
from jaxsim.figures.labels import number
from jaxsim.figures.multiples import Multiples
from jaxsim.figures.scales import decades, ticks
from jaxsim.figures.style import ALIGNED, FAILING, INK, Columns, styled

_START: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 0.9}
_END: dict[str, Any] = {"color": FAILING, "linestyle": (0, (1, 1)), "linewidth": 1.1}


@styled
def descent_tpm(columns: Columns, facts: Mapping[str, Any]) -> Figure:
    """Draw TPM(A) of one instance against the step, an optimiser a panel, until it is certified.

    Args:
        columns: optimizer, step, tpm_aligned, kl (nats); a row per optimiser and step.
        facts: tolerance (nats), shown_name, shown_beta.
    """
    optimizers = list(dict.fromkeys(columns["optimizer"]))
    sheet = Multiples(optimizers, keys=4)
    courses = []
    for optimizer in optimizers:
        rows = ordered(where(columns, [o == optimizer for o in columns["optimizer"]]), "step")
        ends = [at for at, kl in enumerate(rows["kl"]) if kl <= facts["tolerance"]]
        last = ends[0] if ends else len(rows["kl"]) - 1
        courses.append((rows["tpm_aligned"][: last + 1], bool(ends)))
    start = courses[0][0][0]
    certified = [course[-1] for course, ended in courses if ended]
    seen = [x for course, _ in courses for x in course]
    low, high = min(seen), max(seen)
    pad = 0.06 * (high - low) or 0.05
    longest = max(len(course) for course, _ in courses)
    for axes, (course, ended) in zip(sheet.axes, courses, strict=True):
        axes.axhline(start, **_START)
        if certified:
            axes.axhline(certified[0], **_END)
        axes.plot(range(len(course)), course, color=ALIGNED)
        if ended:
            axes.plot([len(course) - 1], [course[-1]], color=ALIGNED, marker="o", markersize=3.5)
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xlim(-0.15, longest * 1.15)
        axes.set_ylim(low - pad, high + pad)
        ticks(axes.xaxis, [0.0, *decades(1.0, max(longest, 10.0))])
    handles = [
        Line2D([], [], color=ALIGNED, label="TPM(A) of the policy"),
        Line2D([], [], color=ALIGNED, linestyle="", marker="o", label="certified"),
        Line2D([], [], label="at the start", **_START),
        Line2D([], [], label="of p*", **_END),
    ]
    where_from = f"{facts['shown_name']}, β = {number(facts['shown_beta'])}"
    return sheet.finish(f"optimiser steps ({where_from})", "TPM(A) (probability mass)", handles)
