"""The ladder in exact arithmetic, for what floating point leaves undecided. On the host."""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from jaxsim.instance import Instance
from jaxsim.theorem.critical import find_crossings
from jaxsim.theorem.exact import ExactInstance
from jaxsim.theorem.ladder import RUNGS, Conditions, implied
from jaxsim.theorem.verdict import Outcome


def settle(instance: Instance, found: Conditions) -> Conditions:
    """Decide every rung that is UNDECIDED, as far as that is possible.

    Only `mgf_order` may stay open: where Δ comes so close to zero at some β that 60 digits do not
    tell whether it crosses, and rewards and components are not simple enough for algebra.

    Args:
        instance: one instance, or a batch with one leading axis.
        found: its ladder, as the kernel decided it.

    Returns:
        The ladder, as NumPy arrays.
    """
    codes = np.stack([np.asarray(getattr(found, rung)) for rung in RUNGS])
    table = np.atleast_2d(codes.T).copy()
    stored = (instance.log_p_aligned, instance.log_p_unaligned, instance.reward, instance.beta)
    rows = [np.asarray(x, np.float64) for x in stored]
    if rows[2].ndim == 1:
        rows = [x[None] for x in rows]
    for row in np.flatnonzero((table == Outcome.UNDECIDED).any(axis=1)):
        log_p_a, log_p_u, reward, beta = (x[row] for x in rows)
        exact = ExactInstance(log_p_a, log_p_u, reward, float(beta))
        table[row] = _settled(exact, table[row].tolist())
    columns: Any = table.T.reshape(codes.shape)
    return Conditions(**{rung: columns[at, ...] for at, rung in enumerate(RUNGS)})


def _settled(exact: ExactInstance, codes: list[int]) -> list[int]:
    if not any(exact.compare(exact.on(level)) for level in exact.levels):
        return [int(Outcome.TIE)] * len(RUNGS)
    # The weakest rung first: if it fails, so do those above it.
    for at in range(len(RUNGS) - 1, -1, -1):
        if codes[at] == Outcome.UNDECIDED:
            codes[at] = int(_DECIDE[RUNGS[at]](exact))
            codes = [int(code) for code in implied(codes, np)]
    return codes


def _holds(signs: Any) -> Outcome:
    return Outcome.FAILS if any(sign < 0 for sign in signs) else Outcome.HOLDS


def _at_this_beta(exact: ExactInstance) -> Outcome:
    return Outcome(exact.log_odds_shift()[0])


def _mgf_order(exact: ExactInstance) -> Outcome:
    crossings = find_crossings(exact)
    if crossings.near_zero < 0 or crossings.brackets:
        return Outcome.FAILS
    return Outcome.HOLDS if crossings.complete else Outcome.UNDECIDED


def _increasing_convex_order(exact: ExactInstance) -> Outcome:
    thresholds = [exact.reward[level[0]] for level in exact.levels[::-1]]
    return _holds(
        exact.compare([max(r - t, Fraction(0)) for r in exact.reward]) for t in thresholds
    )


def _first_order_dominance(exact: ExactInstance) -> Outcome:
    least = [exact.reward[level[0]] for level in exact.levels[:0:-1]]
    return _holds(exact.compare([int(r >= t) for r in exact.reward]) for t in least)


def _single_crossing(exact: ExactInstance) -> Outcome:
    signs = [exact.compare(exact.on(level)) for level in exact.levels]
    a_leads = [k for k, sign in enumerate(signs) if sign > 0]
    u_leads = [k for k, sign in enumerate(signs) if sign < 0]
    return Outcome.HOLDS if max(u_leads) < min(a_leads) else Outcome.FAILS


def _monotone_likelihood_ratio(exact: ExactInstance) -> Outcome:
    return _holds(
        exact.compare(exact.on(upper), exact.on(lower)) for lower, upper in pairwise(exact.levels)
    )


_DECIDE: dict[str, Callable[[ExactInstance], Outcome]] = {
    "monotone_likelihood_ratio": _monotone_likelihood_ratio,
    "single_crossing": _single_crossing,
    "first_order_dominance": _first_order_dominance,
    "increasing_convex_order": _increasing_convex_order,
    "mgf_order": _mgf_order,
    "at_this_beta": _at_this_beta,
}
