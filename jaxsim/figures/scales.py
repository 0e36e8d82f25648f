"""Axes whose ticks are chosen here: quicker than matplotlib's locators, and without mathtext."""

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from jaxsim.figures.labels import beta_name, number

BETA = "KL penalty β (reward per nat)"


def beta_axis(axes: Axes, betas: Sequence[float], label: str = BETA) -> list[float]:
    """Set up the x axis for β and return where each row goes.

    The axis is logarithmic. A single value, or NaN (each instance has its own β), becomes a
    category, at a whole number.
    """
    finite = sorted({b for b in betas if not math.isnan(b)})
    own = len(finite) < len(set(betas))
    if len(finite) > 1 and not own:
        low, high = finite[0], finite[-1]
        pad = (high / low) ** 0.03
        axes.set_xscale("log")
        axes.set_xlim(low / pad, high * pad)
        candidates = _round_numbers(low, high) if len(finite) > 12 else finite
        ticks(axes.xaxis, _legible(candidates, _inches(axes), low, high))
        axes.set_xlabel(label)
        return list(betas)
    categories(axes, [beta_name(b) for b in finite] + ["own β"] * own)
    axes.set_xlabel(label)
    return [float(len(finite) if math.isnan(b) else finite.index(b)) for b in betas]


def distinct_betas(betas: Iterable[float], most: int) -> list[float]:
    """Return the values of β in order, NaN last; of more than `most`, as many, evenly chosen."""
    known = {None if math.isnan(b) else b for b in betas}
    found = sorted(b for b in known if b is not None) + [math.nan] * (None in known)
    if len(found) <= most:
        return found
    return [found[round(k * (len(found) - 1) / (most - 1))] for k in range(most)]


def same_beta(one: float, other: float) -> bool:
    """Whether two values of β are the same one; NaN is."""
    return one == other or (math.isnan(one) and math.isnan(other))


def categories(axes: Axes, names: Sequence[str]) -> None:
    """Set up the x axis for categories at 0, 1, 2, …."""
    axes.set_xlim(-0.6, len(names) - 0.4)
    ticks(axes.xaxis, range(len(names)), names)


def ticks(axis: Axis, at: Iterable[float], names: Sequence[str] | None = None) -> None:
    """Put ticks exactly there, and no others."""
    places = list(at)
    axis.set_ticks(places, labels=[number(x) for x in places] if names is None else names)
    axis.set_minor_locator(NullLocator())


def unit_ticks(axis: Axis, parts: int) -> None:
    """Have an axis go from 0 to 1, with ticks at so many equal parts."""
    axis.set_view_interval(0, 1, ignore=True)
    ticks(axis, [k / parts for k in range(parts + 1)])


def hide_labels(axis: Axis) -> None:
    """Leave out the tick labels of an axis that a neighbour shows."""
    axis.set_tick_params(labelbottom=False, labelleft=False)


def decades(low: float, high: float, most: int = 6) -> list[float]:
    """Return powers of ten from `low` to `high`, at most about so many, evenly spaced."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first) / most))
    return [10.0**k for k in range(first, last + 1) if k % step == 0]


def even_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, at most about so many, evenly spaced."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _inches(axes: Axes) -> float:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return float(axes.get_position().width * figure.get_size_inches()[0])


def _round_numbers(low: float, high: float) -> list[float]:
    """Return powers of ten; where these are few, 2 and 5 times them too, or else the ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps, enough in (((1,), 4), ((1, 2, 5), 2)):
        every = [m * 10.0**k for k in powers for m in steps]
        found = [x for x in every if low <= x * 1.000001 and x <= high * 1.000001]
        if len(found) >= enough:
            return found
    return [low, high]


def _legible(values: Sequence[float], inches: float, low: float, high: float) -> list[float]:
    """Keep those values whose labels do not touch: powers of ten first, then 2 and 5."""
    chosen: list[float] = []
    per_inch = (math.log(high) - math.log(low)) / inches

    def rank(x: float) -> int:
        return {"1": 0, "2": 1, "5": 1}.get(f"{x:.2e}"[:4].rstrip("0").rstrip("."), 2)

    def apart(x: float, y: float) -> bool:
        room = 0.03 * (len(number(x)) + len(number(y))) + 0.06
        return abs(math.log(x) - math.log(y)) > room * per_inch

    for value in sorted(values, key=lambda x: (rank(x), x)):
        if all(apart(value, other) for other in chosen):
            chosen.append(value)
    return sorted(chosen)
