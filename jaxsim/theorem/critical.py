"""The β at which TPM(A) crosses α: the positive zeros of f(s) = E_A[e^{sr}] - E_U[e^{sr}], s = 1/β.

On the host. Zeros are isolated by numbers whose rounding errors are bounded, in float64 and, where
that is not enough, with 60 digits: an interval holds no zero where |f| at its middle exceeds what
f' and f'' can undo, and at most one where |f'| exceeds what f'' can. How many there can be at all
is the number of sign changes of T(t) = E_A[(r - t)₊] - E_U[(r - t)₊] (docs/theorem2.md).

Everywhere below the unit of s is one over the range of the reward, and the reward is at most zero.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from mpmath import mp
from scipy.optimize import brentq

from jaxsim.instance import Instance, require_concrete, validate
from jaxsim.logspace import AnyArray
from jaxsim.theorem.certify import exp_by_ieee, expm1_by_ieee
from jaxsim.theorem.exact import ExactInstance
from jaxsim.theorem.polynomial import odd_zeros_beyond_one

_DIGITS = 60
_FLUSHED = 1e-280  # far above what underflow may cost in float64


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CriticalBetas:
    """All β at which TPM(A) crosses α, of one instance or of a batch (NumPy arrays).

    Attributes:
        betas: in units of reward, ascending, float64: [count] for one instance; for a batch
            [instances, maximum], padded with nan.
        count: how many were found.
        complete: whether these are certainly all. Otherwise Δ comes so close to zero without
            crossing, or so it seems, that 60 digits do not tell; or there are more than `maximum`.
    """

    betas: Float[AnyArray, "..."]
    count: Int[AnyArray, "..."]
    complete: Bool[AnyArray, "..."]


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """The sign of f on (0, ∞) of one instance.

    Attributes:
        brackets: intervals of s, in units of 1/(max r - min r), ascending, with one crossing each.
        near_zero: the sign of f for small s (large β); 0 if f is zero everywhere.
        complete: whether no crossing lies outside the brackets.
    """

    brackets: list[tuple[Any, Any]]
    near_zero: int
    complete: bool


def critical_betas(instance: Instance, *, maximum: int = 8) -> CriticalBetas:
    """Find every β at which TPM(A) crosses α, certified to be all of them.

    Host-only. The instance's own β and α play no part.

    Args:
        instance: one instance, or a batch with one leading axis.
        maximum: columns kept for a batch; the largest β where there are more.

    Returns:
        `CriticalBetas`. A β at which Δ touches zero and turns back is no crossing. Where both
        components give the reward the same distribution every β is a tie, and none is a crossing.

    Raises:
        TypeError: under `jit`, `vmap` or `grad`.
        ValueError: for values that no constructor lets pass, or maximum < 1.

    Numerics:
        Each β is correct to within a unit or two in the last place of float64, for the stored
        instance: refined with 60 digits. A few milliseconds per instance.

    Example:
        >>> from jaxsim import Instance, critical_betas
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> print(critical_betas(instance).betas)
        [1.64101793]
    """
    if maximum < 1:
        raise ValueError(f"maximum is {maximum}; expected at least 1")
    require_concrete("critical_betas", instance)
    validate(instance)
    stored = instance.log_p_aligned, instance.log_p_unaligned, instance.reward
    log_a, log_u, reward = (np.asarray(x, np.float64) for x in stored)
    if reward.ndim == 1:
        betas, complete = _critical_betas(ExactInstance(log_a, log_u, reward))
        return _result(np.asarray(betas, np.float64), len(betas), complete)
    rows = zip(log_a, log_u, reward, strict=True)
    found = [_critical_betas(ExactInstance(*row)) for row in rows]
    table = np.full((len(found), maximum), np.nan)
    for row, (betas, _) in enumerate(found):
        kept = betas[-maximum:]
        table[row, : len(kept)] = kept
    counts = [len(betas) for betas, _ in found]
    return _result(table, counts, [whole and len(betas) <= maximum for betas, whole in found])


def _result(betas: Any, count: Any, complete: Any) -> CriticalBetas:
    count, complete = np.asarray(count), np.asarray(complete)
    return CriticalBetas(betas=betas, count=count, complete=complete)


def _critical_betas(exact: ExactInstance) -> tuple[list[float], bool]:
    crossings = find_crossings(exact)
    span = max(exact.reward) - min(exact.reward)
    betas = []
    if crossings.brackets:
        rough = _Shift(exact, np.float64)
        with mp.workdps(_DIGITS):
            fine, width = _Shift(exact, mp.mpf), mp.mpf(span.numerator) / span.denominator
            betas = [float(width / _zero(rough, fine, *b)) for b in crossings.brackets]
    return sorted(betas), crossings.complete


def find_crossings(exact: ExactInstance) -> Crossings:
    """Isolate the crossings of one instance."""
    rough = _Shift(exact, np.float64)
    if rough.vanishes:
        return Crossings(brackets=[], near_zero=0, complete=True)
    near_zero, start = rough.near_zero()
    most, least = _sign_changes(exact, rough), int(near_zero != rough.far_sign)
    if most < least + 2:  # crossings beyond the least number would come in pairs
        whole = [(start, rough.ruled_from())] if least else []
        return Crossings(brackets=whole, near_zero=near_zero, complete=True)
    brackets, doubtful = rough.isolate([(start, rough.ruled_from())], most)
    if doubtful and odd_zeros_beyond_one(exact) == len(brackets):
        doubtful = []
    if doubtful:
        with mp.workdps(_DIGITS):
            more, doubtful = _Shift(exact, mp.mpf).isolate(doubtful, most - len(brackets))
        brackets += more
    return Crossings(brackets=sorted(brackets), near_zero=near_zero, complete=not doubtful)


class _Shift:
    """f, its derivative and bounds of their errors, in float64 or in mpmath's current precision.

    f(s) = Σ_k c_k e^{s ρ_k} over the levels k of equal reward up to the highest on which p_A and
    p_U differ, with c_k = p_A(k) - p_U(k) and ρ_k ∈ [-1, 0] the reward relative to that level.
    """

    def __init__(self, exact: ExactInstance, kind: Any) -> None:
        self._exact = exact
        floating = kind is np.float64
        self._dtype: Any = np.float64 if floating else object
        self._unit = kind(2) ** -53 if floating else mp.mpf(10) ** (2 - _DIGITS)
        self._exp = exp_by_ieee if floating else np.frompyfunc(mp.exp, 1, 1)
        self._expm1 = _small_expm1 if floating else np.frompyfunc(mp.expm1, 1, 1)

        def number(x: Fraction) -> Any:
            return kind(float(x)) if floating else kind(x.numerator) / x.denominator

        def masses(log_p: list[Fraction | None]) -> Any:
            stored = np.array([number(x or Fraction(0)) for x in log_p], self._dtype)
            p = np.where([x is None for x in log_p], kind(0), self._exp(stored))
            return np.array([p[level].sum() for level in exact.levels], self._dtype) / p.sum()

        of_a, of_u = masses(exact.log_a), masses(exact.log_u)
        # Units of error: two sums for a mass and one for f, and single operations and exponentials.
        self.rounding = 3 * len(exact.reward) + 60
        self.c, self.size = of_a - of_u, of_a + of_u
        self._c_error = self._unit * self.rounding * self.size + (_FLUSHED if floating else 0)
        top, self.far_sign = self._highest_difference()
        self.vanishes = self.far_sign == 0
        span = max(exact.reward) - min(exact.reward) or Fraction(1)
        values = [exact.reward[level[0]] for level in exact.levels[: top + 1]]
        self.scaled = [(r - values[-1]) / span for r in values]
        self.rho = np.array([number(x) for x in self.scaled], self._dtype)
        self.c, self.size = self.c[: top + 1], self.size[: top + 1]
        self._c_error = self._c_error[: top + 1]
        self._c_most = abs(self.c) + self._c_error

    def _highest_difference(self) -> tuple[int, int]:
        """Return the highest level on which the components differ, and which leads there."""
        for k in range(len(self.c) - 1, -1, -1):
            if abs(self.c[k]) > self._c_error[k]:
                return k, 1 if self.c[k] > 0 else -1
            if sign := self._exact.compare(self._exact.on(self._exact.levels[k])):
                return k, sign
        return 0, 0

    def at(self, s: Any) -> tuple[Any, Any, Any, Any]:
        """Return f, its error, f' and its error at points s."""
        exponent = s[:, None] * self.rho
        weight = self._exp(exponent)
        # Σ c = 0: for small s the smaller terms.
        small = (s < 1)[:, None]
        term = np.where(small, self._expm1(np.where(small, exponent, 0 * exponent)), weight)
        of_weight = self._unit * 4 * abs(exponent) * self.size
        f_error = abs(term) * (self._c_error + np.where(small, 0, of_weight))
        slope_error = weight * abs(self.rho) * (self._c_error + of_weight)
        f, slope = (term * self.c).sum(axis=1), (weight * self.c * self.rho).sum(axis=1)
        return f, f_error.sum(axis=1), slope, slope_error.sum(axis=1)

    def bend(self, s: Any) -> Any:
        """Return a bound of |f''| from s on."""
        return (self._exp(s[:, None] * self.rho) * self._c_most * self.rho**2).sum(axis=1)

    def near_zero(self) -> tuple[int, float]:
        """Return the sign of f for small s, and an s up to which it is certain."""
        moment, power = (self.c * self.rho).sum(), 1
        if abs(moment) > (self._c_error * abs(self.rho)).sum():
            sign = 1 if moment > 0 else -1
        else:
            while True:  # of K levels one of the first K - 1 moments differs
                exponents = self._level_weights([x**power for x in self.scaled])
                sign, moment = self._exact.difference(exponents)
                if sign:
                    break
                power += 1
        rest = (self._c_most * abs(self.rho) ** (power + 1)).sum()
        return sign, float(0.9 * (power + 1) * abs(moment) / rest)

    def _level_weights(self, by_level: list[Fraction]) -> list[Fraction]:
        """Give each output the weight of its level; zero above the highest that differs."""
        weights = [Fraction(0)] * len(self._exact.reward)
        for level, w in zip(self._exact.levels, by_level, strict=False):
            for i in level:
                weights[i] = w
        return weights

    def ruled_from(self) -> float:
        """Return an s from which on the highest level rules: f keeps its sign."""
        level = self._exact.levels[len(self.c) - 1]
        lead = abs(self._exact.difference(self._exact.on(level))[1])
        # All below the top together are at most Σ |c_k| e^{s ρ}, ρ that of the level next to it.
        return float(1.01 * mp.log(2 * self._c_most[:-1].sum() / lead) / -self.rho[-2] + 1)

    def isolate(self, within: list[tuple[Any, Any]], most: int) -> tuple[list[Any], list[Any]]:
        """Find intervals with one crossing each, given how many zeros there can be at most.

        Returns:
            These intervals, and others that may hold further zeros.
        """
        limit = 1e-13 if self._dtype is np.float64 else mp.mpf(10) ** -27
        found: list[tuple[Any, Any]] = []
        ends = np.array(within, self._dtype)
        low, high = ends[:, 0], ends[:, 1]
        sign_low, sign_high = self._signs(low), self._signs(high)
        for _ in range(200):
            # Certainly an odd number lies between opposite signs; any others come in pairs.
            odd = sign_low * sign_high == -1
            if most < len(found) + odd.sum() + 2:
                return found + list(zip(low[odd], high[odd], strict=True)), []
            middle = np.where(high > 1.5 * low, _root(low * high), 0.55 * low + 0.45 * high)
            f, f_error, slope, slope_error = self.at(middle)
            half, bend = np.maximum(middle - low, high - middle), self.bend(low)
            empty = abs(f) - f_error > half * (abs(slope) + slope_error) + half**2 / 2 * bend
            steady = (abs(slope) - slope_error > half * bend) & (sign_low * sign_high != 0)
            one = steady & odd & ~empty
            found += list(zip(low[one], high[one], strict=True))
            rest = ~(empty | steady)
            if not rest.any():
                return found, []
            sign = np.where(abs(f) > f_error, np.where(f > 0, 1, -1), 0)
            narrow = (high - low < limit * high) & rest
            if narrow.any() or rest.sum() > 4096:
                return found, list(zip(low[rest], high[rest], strict=True))
            low, high, sign_low, sign_high = (
                np.concatenate([x[rest], y[rest]])
                for x, y in ((low, middle), (middle, high), (sign_low, sign), (sign, sign_high))
            )
        return found, list(zip(low, high, strict=True))

    def _signs(self, s: Any) -> Any:
        f, error, _, _ = self.at(s)
        return np.where(abs(f) > error, np.where(f > 0, 1, -1), 0)


def _sign_changes(exact: ExactInstance, shift: _Shift) -> int:
    """Return how often T(t) changes sign over the rewards t: f has no more zeros than that."""
    signs = []
    for k in range(len(shift.rho) - 1):
        weights = np.maximum(shift.rho - shift.rho[k], 0)
        value, size = (weights * shift.c).sum(), (weights * shift.size).sum()
        cancelled = 4 * abs(shift.rho[k]) * shift.size[k:].sum()  # each ρ is rounded
        if abs(value) > 2.0**-53 * (shift.rounding * size + cancelled) + _FLUSHED:
            sign = 1 if value > 0 else -1
        else:
            t = exact.reward[exact.levels[k][0]]
            sign = exact.compare([max(r - t, Fraction(0)) for r in exact.reward])
        if sign:
            signs.append(sign)
    return sum(a != b for a, b in pairwise(signs))


def _zero(rough: _Shift, fine: _Shift, low: Any, high: Any) -> Any:
    """Return the zero of f in a bracket, to the digits of `fine`."""
    low, high = mp.mpf(low), mp.mpf(high)

    def value(shift: _Shift, s: Any) -> Any:
        return shift.at(np.array([s], shift._dtype))

    ends = float(low), float(high)
    if value(rough, ends[0])[0] * value(rough, ends[1])[0] < 0:
        s = mp.mpf(brentq(lambda x: value(rough, x)[0][0], *ends, rtol=1e-14, xtol=1e-300))
        for _ in range(4):  # each doubles the digits, if the zero is a simple one
            f, _, slope, _ = value(fine, s)
            step = f[0] / slope[0]
            s -= step
            if abs(step) < mp.mpf(10) ** -20 * s and low <= s <= high:
                return s
    sign = mp.sign(value(fine, low)[0][0])
    while high - low > mp.mpf(10) ** -25 * high:
        middle = (low + high) / 2
        if mp.sign(value(fine, middle)[0][0]) == sign:
            low = middle
        else:
            high = middle
    return low


def _small_expm1(x: Any) -> Any:
    return expm1_by_ieee(np.maximum(x, -1.0))


def _root(x: Any) -> Any:
    return x**0.5
