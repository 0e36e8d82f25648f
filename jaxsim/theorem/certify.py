"""Settle Theorem 2 on the host, beyond doubt: float64 first, then intervals, then exact ties.

Nothing here is taken from the device or from a mathematical library: the float64 pass uses NumPy's
+, -, ×, / alone (IEEE 754, rounded to nearest) with an exponential of its own, so that its error
bounds need no assumption; what it leaves open goes to `jaxsim.theorem.exact`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxsim.instance import Instance, require_concrete, validate
from jaxsim.logspace import LOG_ZERO
from jaxsim.theorem.exact import ExactInstance
from jaxsim.theorem.verdict import Verdict

_U = 2.0**-53
_EXP, _EXPM1 = 6, 12  # relative errors of the two functions below, in units of u
_FLUSHED = 1e-290  # far above what underflow may cost
_ELEMENTS = 1 << 15  # of a block, so that its temporaries stay in the cache


def certify(instance: Instance) -> Verdict:
    """Decide Theorem 2's hypotheses and conclusion, leaving nothing UNDECIDED.

    Host-only: it takes concrete values, and uses no accelerator and no compiled code.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        A `Verdict` of NumPy arrays. The codes HOLDS, FAILS and TIE are those of the exact numbers
        that the stored ones define: components normalised exactly, r/β an exact quotient. The three
        numbers are in float64, zero where the code is TIE, or where they underflow.

    Raises:
        TypeError: under `jit`, `vmap` or `grad`, where there are no values.
        ValueError: for values that no constructor lets pass.

    Numerics:
        A running error bound in float64 decides all but about one random instance in 10^11; these
        are decided by interval arithmetic, at 120 bits and then twice as many each time, unless an
        exact test shows a tie (docs/verdicts.md). About 1 µs per output; an interval 10 ms.

    Example:
        >>> from jaxsim import Instance, Outcome, certify
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> Outcome(int(certify(instance).conclusion)).name
        'FAILS'
    """
    require_concrete("certify", instance)
    validate(instance)
    stored = instance.log_p_aligned, instance.log_p_unaligned, instance.reward, instance.beta
    rows = [np.asarray(x, np.float64) for x in stored]
    single = rows[2].ndim == 1
    if single:
        rows = [x[None] for x in rows]
    size = max(1, _ELEMENTS // rows[2].shape[1])
    cuts = range(0, len(rows[2]), size)
    blocks = [_certify_rows(*(x[at : at + size].T for x in rows)) for at in cuts]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
    return jax.tree.map(lambda x: x[0, ...], joined) if single else joined


def _certify_rows(
    log_a: np.ndarray, log_u: np.ndarray, reward: np.ndarray, beta: np.ndarray
) -> Verdict:
    """Certify a block [outputs, rows]."""
    support = np.maximum(log_a, log_u) > LOG_ZERO
    with np.errstate(all="ignore"):  # what overflows or is nan has no certain sign
        masked = np.where(support, reward, 0.0)
        parts = [_Component.of(x) for x in (log_a, log_u)]
        covariance_a, covariance_u = (_covariance(part, masked, support) for part in parts)
        shift = _shift(parts[0], parts[1], masked, support, beta)
    is_open = covariance_a.sign * covariance_u.sign * shift.sign == 0
    for row in map(int, np.flatnonzero(is_open)):
        exact = ExactInstance(log_a[:, row], log_u[:, row], reward[:, row], beta[row])
        covariance_a.settle(row, lambda: exact.covariance(aligned=True))  # noqa: B023
        covariance_u.settle(row, lambda: exact.covariance(aligned=False))  # noqa: B023
        shift.settle(row, exact.log_odds_shift)
    return Verdict(
        covariance_aligned=covariance_a.value,
        covariance_unaligned=covariance_u.value,
        log_odds_shift=shift.value,
        hypothesis_aligned=covariance_a.sign,
        hypothesis_unaligned=-covariance_u.sign,
        conclusion=shift.sign,
    )


class _Number:
    """A number per row, and its sign where that is certain, else 0: the codes of `Outcome`.

    Args:
        value: the number.
        deciding: a quantity of the same sign,
        error: and how far it may be from the truth.
    """

    def __init__(self, value: np.ndarray, deciding: np.ndarray, error: np.ndarray) -> None:
        certain = np.abs(deciding) > error * (1 + 1e-6)  # the error is itself a computed number
        self.value: Any = value
        self.sign: Any = np.where(certain, np.sign(deciding), 0).astype(np.int8)

    def settle(self, row: int, exactly: Callable[[], tuple[int, float]]) -> None:
        """Where the sign is not certain, take it and the value from exact arithmetic."""
        if self.sign[row] == 0:
            self.sign[row], self.value[row] = exactly()


@dataclass(frozen=True, kw_only=True)
class _Component:
    """A component, A or U, unnormalised."""

    log_p: np.ndarray
    mass: np.ndarray  # e^{log p}, off by _EXP u
    total: np.ndarray  # its sum, off by (_EXP + outputs) u

    @classmethod
    def of(cls, log_p: np.ndarray) -> "_Component":
        mass = np.where(log_p > LOG_ZERO, exp_by_ieee(log_p), 0.0)
        return cls(log_p=log_p, mass=mass, total=mass.sum(axis=0))


def _covariance(part: _Component, reward: np.ndarray, support: np.ndarray) -> _Number:
    """Return Cov(r, p) = (E_p[r - c] - mean[r - c]) / count, about a mean c as computed."""
    outputs, count = len(reward), support.sum(axis=0)
    above = np.where(support, reward - reward.sum(axis=0) / count, 0.0)
    size = np.abs(above)
    value = (part.mass * above).sum(axis=0) / part.total - above.sum(axis=0) / count
    # r - c, the product and the quotient one each, both exponentials, both sums.
    units = (3 + 2 * _EXP + 2 * outputs) * (part.mass * size).sum(axis=0) / part.total
    units += (2 + outputs) * size.sum(axis=0) / count + np.abs(value)
    return _Number(value / count, value, _U * units + _FLUSHED)


def _shift(
    a: _Component, u: _Component, reward: np.ndarray, support: np.ndarray, beta: np.ndarray
) -> _Number:
    """Return Δ in the two forms of `jaxsim.tilting`, by the span of the rewards in units of β."""
    top = np.where(support, reward, -np.inf).max(axis=0)
    bottom = np.where(support, reward, np.inf).min(axis=0)
    t = np.where(support, (reward - (0.5 * top + 0.5 * bottom)) / beta, 0.0)
    narrow, wide = _narrow_shift(a, u, t), _wide_shift(a, u, t)
    is_narrow = (top - bottom) / beta < 1
    return _Number(*(np.where(is_narrow, x, y) for x, y in zip(narrow, wide, strict=True)))


def _narrow_shift(a: _Component, u: _Component, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return Δ by the sign of E_A[g] - E_U[g], g = e^t - 1, both sides times both totals."""
    outputs, growth = len(t), expm1_by_ieee(np.clip(t, -1.0, 1.0))
    size = np.abs(growth)

    def sums(terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return u.total * (a.mass * terms).sum(axis=0), a.total * (u.mass * terms).sum(axis=0)

    plus, minus = sums(growth)
    gap, both = plus - minus, sum(sums(size))
    # t, off by 2 u, costs 1.6 times as much in g; two products; exponentials and sums.
    units = (4 + _EXPM1 + 2 + 2 * _EXP + 2 * outputs) * both + np.abs(gap)
    return np.log1p(gap / (a.total * u.total + minus)), gap, _U * units + _FLUSHED


def _wide_shift(a: _Component, u: _Component, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return Δ by the sign of ρ - 1, ρ = E_A[e^t] / E_U[e^t], each sum about its largest term."""
    outputs = len(t)
    parts, units = [], np.zeros(t.shape[1])
    for part in (a, u):
        exponent = np.where(part.log_p > LOG_ZERO, part.log_p + t, -np.inf)
        peak = exponent.max(axis=0)
        weight = exp_by_ieee(exponent - peak)
        total = weight.sum(axis=0)
        # Of t two roundings, of the exponent one, and one of its distance from the peak, whose
        # mean is at most log n. What stays negligible whatever its rounding takes no part.
        size = 2 * np.abs(t) + np.abs(exponent)
        size = np.where(exponent + 4 * _U * size > peak - 740, size, 0.0)
        small = _U * size.max(axis=0) < 0.01
        units += np.where(small, (weight * size).sum(axis=0) / total * 1.05, np.inf)
        units += 2 * (_EXP + outputs) + math.log(outputs)
        parts.append((total / part.total, peak))
    apart = parts[0][1] - parts[1][1]
    ratio = parts[0][0] / parts[1][0]
    units += np.abs(apart) + _EXP + 5
    error = np.where(_U * units < 1e-3, _U * units * 1.01, np.inf)
    rho = ratio * exp_by_ieee(np.clip(apart, -600.0, 600.0))  # beyond, its sign is that of `apart`
    return apart + np.log(ratio), rho - 1, error * rho + _U


_LOG2_E = math.log2(math.e)
_LN2_HIGH = float.fromhex("0x1.62e42ffp-1")  # 33 bits: its multiples by |k| ≤ 1075 are exact
_LN2_LOW = -4.2009150726810846e-11  # ln 2 less that
_TAYLOR = [1 / math.factorial(k) for k in range(22)]


def exp_by_ieee(x: np.ndarray) -> np.ndarray:
    """Return e^x from +, -, × alone, within 6 u, or below 1e-300 where that is less.

    x = k ln 2 + r with |r| ≤ 0.35. In Horner's scheme the term r^k/k! takes 2k + 1 roundings and
    one of its coefficient, together 3.5 u of e^r; the reduction costs 0.7 u, the remainder of the
    series 10^-19.
    """
    x = np.clip(x, -745.0, 709.0)
    k = np.rint(x * _LOG2_E)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    return np.ldexp(_horner(r, _TAYLOR[:15]), k.astype(np.int32))


def expm1_by_ieee(x: np.ndarray) -> np.ndarray:
    """Return e^x - 1 for |x| ≤ 1 from + and × alone, within 12 u: x times its series over x."""
    return x * _horner(x, _TAYLOR[1:])


def _horner(x: np.ndarray, coefficients: list[float]) -> np.ndarray:
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value *= x
        value += coefficient
    return value
