"""A single instance on which Theorem 2 fails, output by output."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from jaxsim.figures.labels import name, number
from jaxsim.figures.scales import even_ticks, ticks
from jaxsim.figures.style import (
    ALIGNED,
    FAINT,
    INK,
    PAGE,
    UNALIGNED,
    Columns,
    key,
    note,
    panel,
    styled,
)

MOST = 12
"""Outputs with a row of their own; the others share one."""
_PALE_ALIGNED, _PALE_UNALIGNED = "#A9CDE4", "#F9E3B8"
_REWARD, _GAP, _RIGHT, _BOTTOM = 1.0, 0.2, 0.06, 0.42


@dataclass(frozen=True)
class _Row:
    """An output, or several that share a row."""

    label: str
    rewards: tuple[float, float]  # lowest, highest
    aligned: float
    unaligned: float
    reference: tuple[float, float]  # the parts owed to A and to U
    optimum: tuple[float, float]


@styled
def counterexample(columns: Columns, facts: Mapping[str, Any]) -> Figure:
    """Draw a row per output, best reward on top: reward, components, and the mixture p_ref → p*.

    The bars of the mixture are split by the component that the mass is owed to, so that the dark
    parts add up to α before tuning and to TPM(A) after it.

    Args:
        columns: output, name, reward, p_aligned, p_unaligned, p_ref, p_star; a row per output.
        facts: alpha, beta, tpm_aligned, log_odds_shift, covariance_aligned,
            covariance_unaligned, name.
    """
    rows = _rows(columns, facts["alpha"])
    title = name(facts.get("name") or "", 100)
    tall = max(0.36 * len(rows), 0.9)
    top = 0.84 if title else 0.68
    figure = Figure((PAGE, top + tall + _BOTTOM))
    first = 0.16 + 0.062 * max(len(part) for row in rows for part in row.label.split("\n"))
    second = first + _REWARD + _GAP
    wide = (PAGE - second - _GAP - _RIGHT) / 2
    third = second + wide + _GAP
    reward = panel(figure, first, _BOTTOM, _REWARD, tall)
    parts = panel(figure, second, _BOTTOM, wide, tall)
    mixture = panel(figure, third, _BOTTOM, wide, tall)
    _draw_rewards(reward, rows)
    _draw_components(parts, rows)
    _draw_mixture(mixture, rows)
    for axes in (reward, parts, mixture):
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        ticks(axes.yaxis, range(len(rows)), [""] * len(rows))
        axes.hlines(
            [y - 0.5 for y in range(len(rows))],
            0,
            1,
            color=FAINT,
            linewidth=0.4,
            transform=axes.get_yaxis_transform(),
        )
    reward.set_yticklabels([row.label for row in rows], linespacing=1.0)
    if title:
        note(figure, 0.06, 0.06, f"“{title}”")
    for line, text in enumerate(_story(facts)):
        note(figure, 0.06, top - 0.62 + 0.16 * line, text, parse_math=True)
    full = [
        Patch(facecolor=ALIGNED, label="A, aligned"),
        Patch(facecolor=UNALIGNED, label="U, unaligned"),
    ]
    pale = [Patch(facecolor=_PALE_ALIGNED), Patch(facecolor=_PALE_UNALIGNED)]
    key(figure, second, top - 0.2, full, ncols=2, handlelength=1.0)
    key(
        figure,
        third,
        top - 0.2,
        [tuple(pale), tuple(full)],
        math=True,
        ncols=2,
        handlelength=1.4,
        labels=["before tuning, $p_{ref}$", "after, $p$*"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )
    return figure


def _rows(columns: Columns, alpha: float) -> list[_Row]:
    """Return the rows, best reward on top; of many outputs, those that matter most."""
    rewards, aligned, unaligned = columns["reward"], columns["p_aligned"], columns["p_unaligned"]
    before, after = columns["p_ref"], columns["p_star"]

    def row(label: str, at: Sequence[int]) -> _Row:
        weight = [min(alpha * aligned[i] / before[i], 1.0) if before[i] > 0 else 0.0 for i in at]
        shares = list(zip(at, weight, strict=True))
        return _Row(
            label,
            (min(rewards[i] for i in at), max(rewards[i] for i in at)),
            math.fsum(aligned[i] for i in at),
            math.fsum(unaligned[i] for i in at),
            (
                math.fsum(w * before[i] for i, w in shares),
                math.fsum((1 - w) * before[i] for i, w in shares),
            ),
            (
                math.fsum(w * after[i] for i, w in shares),
                math.fsum((1 - w) * after[i] for i, w in shares),
            ),
        )

    masses = (aligned, unaligned, before, after)
    matter = sorted(range(len(rewards)), key=lambda i: (-max(mass[i] for mass in masses), i))
    kept = matter if len(matter) <= MOST + 1 else matter[:MOST]
    rows = [
        row(name(columns["name"][i], 25, 2) or f"output {columns['output'][i]:.0f}", [i])
        for i in sorted(kept, key=lambda i: (-rewards[i], i))
    ]
    if rest := matter[len(kept) :]:
        rows.append(row(f"{len(rest)} other outputs", rest))
    return rows


def _story(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Say in words what the figure shows, in two lines."""
    alpha, tpm, beta = facts["alpha"], facts["tpm_aligned"], facts["beta"]
    shift = facts["log_odds_shift"]
    aligned, unaligned = facts["covariance_aligned"], facts["covariance_unaligned"]
    result = (
        f"Probability owed to component A: α = {number(alpha)} before tuning, TPM(A) = "
        f"{number(tpm)} after (β = {number(beta)}; log-odds shift Δ = {number(shift)} nats)."
    )
    if aligned > 0 > unaligned:
        premise = (
            f"Cov(r, $p_A$) = {number(aligned)} > 0 > Cov(r, $p_U$) = {number(unaligned)}, "
            "the hypotheses of Theorem 2, which promises TPM(A) ≥ α."
        )
    else:
        premise = f"Cov(r, $p_A$) = {number(aligned)}, Cov(r, $p_U$) = {number(unaligned)}."
    return result, premise


def _draw_rewards(axes: Axes, rows: Sequence[_Row]) -> None:
    low = min(row.rewards[0] for row in rows)
    high = max(row.rewards[1] for row in rows)
    span = high - low or 1.0
    for y, row in enumerate(rows):
        first, last = row.rewards
        axes.plot((first, last), (y, y), color=INK, marker="o", linewidth=1.0)
        if first < last:
            text, place, shift, align = (
                f"{number(first)} to {number(last)}",
                ((low + high) / 2, y),
                (0, 3),
                "center",
            )
        elif last > low + 0.6 * span:
            text, place, shift, align = number(last), (last, y), (-5, 0), "right"
        else:
            text, place, shift, align = number(last), (last, y), (5, 0), "left"
        axes.annotate(
            text,
            place,
            shift,
            textcoords="offset points",
            fontsize=7,
            ha=align,
            va="bottom" if first < last else "center_baseline",
        )
    axes.set_xlim(low - 0.12 * span, high + 0.12 * span)
    ticks(axes.xaxis, even_ticks(low, high, 3))
    axes.set_xlabel("reward r")


def _draw_components(axes: Axes, rows: Sequence[_Row]) -> None:
    for masses, offset, color in (
        ([row.aligned for row in rows], -0.17, ALIGNED),
        ([row.unaligned for row in rows], 0.17, UNALIGNED),
    ):
        _bars(axes, masses, offset, color)
        _values(axes, masses, offset)
    _finish_bars(axes, max(max(row.aligned, row.unaligned) for row in rows))
    axes.set_xlabel("$p_A$ and $p_U$ (probability)", parse_math=True)


def _draw_mixture(axes: Axes, rows: Sequence[_Row]) -> None:
    for parts, offset, aligned_color, unaligned_color in (
        ([row.reference for row in rows], -0.17, _PALE_ALIGNED, _PALE_UNALIGNED),
        ([row.optimum for row in rows], 0.17, ALIGNED, UNALIGNED),
    ):
        aligned = [part for part, _ in parts]
        _bars(axes, aligned, offset, aligned_color)
        _bars(axes, [part for _, part in parts], offset, unaligned_color, aligned)
        _values(axes, [a + u for a, u in parts], offset)
    _finish_bars(axes, max(sum(part) for row in rows for part in (row.reference, row.optimum)))
    axes.set_xlabel("$p_{ref}$ and $p$* (probability)", parse_math=True)


def _bars(
    axes: Axes,
    widths: Sequence[float],
    offset: float,
    color: str,
    starts: Sequence[float] | None = None,
) -> None:
    """Draw a bar in each row; none where it is empty, as some viewers show that as a hairline."""
    bars = [
        (y + offset, width, starts[y] if starts else 0.0) for y, width in enumerate(widths) if width
    ]
    if bars:
        places, lengths, left = zip(*bars, strict=True)
        axes.barh(places, lengths, 0.3, left=left, color=color)


def _values(axes: Axes, values: Sequence[float], offset: float) -> None:
    for y, value in enumerate(values):
        axes.annotate(
            number(value, 2) if value >= 0.001 or value == 0 else "<0.001",
            (value, y + offset),
            (2, 0),
            fontsize=6,
            textcoords="offset points",
            va="center_baseline",
        )


def _finish_bars(axes: Axes, highest: float) -> None:
    axes.set_xlim(0, 1.2 * highest)
    ticks(axes.xaxis, even_ticks(0, highest, 4))
