"""Signs of exponential sums over stored numbers, by interval arithmetic of rising precision.

On the host, one instance at a time. Stored floats are taken as the exact binary fractions they are,
r/β as an exact quotient. Every question here is the sign of

    Σ_i Σ_j x_i y_j (e^{a_i + u_j} - e^{u_i + a_j}) e^{s_i},   s_i = r_i/β or 0,

with a = log p_A, u = log p_U and rational weights x, y: dividing by Σe^a Σe^u normalises both
components. It is zero iff the rational coefficients of equal exponents cancel, since exponentials
of distinct algebraic numbers are linearly independent over the rationals (Lindemann–Weierstrass).
So first some digits, then the test for zero, then digits without end: that always ends.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, cached_property
from typing import Any

import numpy as np
from mpmath import mp
from mpmath.ctx_iv import MPIntervalContext

from jaxsim.logspace import LOG_ZERO

Weights = Sequence[Fraction | int]

_FIRST_BITS = 120


class ExactInstance:
    """One instance as exact numbers, on its support.

    Args:
        log_p_aligned: stored log p_A, [outputs].
        log_p_unaligned: stored log p_U, [outputs].
        reward: r, [outputs].
        beta: β; 1 where no question is about a tilt.
    """

    def __init__(
        self, log_p_aligned: Any, log_p_unaligned: Any, reward: Any, beta: float = 1.0
    ) -> None:
        stored = [np.asarray(x, np.float64) for x in (log_p_aligned, log_p_unaligned, reward)]
        kept = np.maximum(stored[0], stored[1]) > LOG_ZERO
        log_a, log_u, rewards = (x[kept].tolist() for x in stored)
        self.log_a = [Fraction(x) if x > LOG_ZERO else None for x in log_a]
        self.log_u = [Fraction(x) if x > LOG_ZERO else None for x in log_u]
        self.reward = [Fraction(x) for x in rewards]
        best, price = max(self.reward), Fraction(beta)
        self.tilt = [(r - best) / price for r in self.reward]
        self._intervals: dict[int, tuple[Any, ...]] = {}

    @cached_property
    def levels(self) -> list[list[int]]:
        """Return the outputs of each distinct reward, from the lowest reward to the highest."""
        by_reward: dict[Fraction, list[int]] = {}
        for i, r in enumerate(self.reward):
            by_reward.setdefault(r, []).append(i)
        return [by_reward[r] for r in sorted(by_reward)]

    def on(self, outputs: Sequence[int]) -> list[int]:
        """Return weights that are one on some outputs and zero elsewhere."""
        chosen = set(outputs)
        return [int(i in chosen) for i in range(len(self.reward))]

    @property
    def everywhere(self) -> list[int]:
        """Return weights of one."""
        return [1] * len(self.reward)

    def compare(self, x: Weights, y: Weights | None = None) -> int:
        """Return the sign of the sum above without a tilt; `y` is one everywhere unless given.

        With y = 1 it is the sign of E_A[x] - E_U[x].
        """
        y = self.everywhere if y is None else y

        def difference(bits: int) -> Any:
            more, less = self._products(bits, x, y, tilted=False)
            return more - less

        return self._resolve(difference, lambda: self._cancels(x, y, tilted=False))[0]

    def difference(self, x: Weights) -> tuple[int, Any]:
        """Return E_A[x] - E_U[x]: its sign, and its value to 64 bits or more."""
        one = self.everywhere

        def value(bits: int) -> Any:
            more, less = self._products(bits, x, one, tilted=False)
            _, a, u, _ = self._at(bits)
            return (more - less) / (_dot(one, a) * _dot(one, u))

        return self._resolve(value, lambda: self._cancels(x, one, tilted=False))

    def log_odds_shift(self) -> tuple[int, float]:
        """Return Δ: its sign, and its value rounded to float64."""
        one = self.everywhere

        def ratio_above_one(bits: int) -> Any:
            more, less = self._products(bits, one, one, tilted=True)
            return (more - less) / less

        sign, value = self._resolve(ratio_above_one, lambda: self._cancels(one, one, tilted=True))
        return sign, float(mp.log1p(value)) if sign else 0.0

    def covariance(self, *, aligned: bool) -> tuple[int, float]:
        """Return Cov(r, p) under the uniform distribution: its sign and its value."""
        log_p, size = self.log_a if aligned else self.log_u, len(self.reward)
        mean = sum(self.reward, Fraction(0)) / size
        above = [(r - mean) / size for r in self.reward]

        def value(bits: int) -> Any:
            context, a, u, _ = self._at(bits)
            p = a if aligned else u
            return _dot([enclose(context, d) for d in above], p) / sum(p, start=context.zero)

        none = [Fraction(0)] * size
        sign, found = self._resolve(value, lambda: not _collect(log_p, none, above))
        return sign, float(found)

    def _resolve(self, value: Callable[[int], Any], is_zero: Callable[[], bool]) -> tuple[int, Any]:
        """Return a number's sign, and the number to more than 64 bits, by as many as that takes."""
        bits, tested = _FIRST_BITS, False
        while True:
            found = value(bits)
            sign = _sign(found)
            if sign is not None and found.delta <= abs(found.mid) * 2.0**-64:
                return sign, mp.mpf(found.mid)
            if sign is None and not tested:
                if is_zero():
                    return 0, mp.zero
                tested = True
            bits *= 2

    def _products(self, bits: int, x: Weights, y: Weights, tilted: bool) -> tuple[Any, Any]:
        """Return the two products of sums whose difference is asked about."""
        context, a, u, tilt = self._at(bits)
        left = [enclose(context, w) for w in x]
        if tilted:
            left = [w * t for w, t in zip(left, tilt, strict=True)]
        right = [enclose(context, w) for w in y]
        return _dot(left, a) * _dot(right, u), _dot(left, u) * _dot(right, a)

    def _at(self, bits: int) -> tuple[Any, ...]:
        """Return enclosures of e^a, e^u and e^{(r - max r)/β} at a precision, and their context."""
        if bits not in self._intervals:
            context = intervals(bits)

            def exp(x: Fraction | None) -> Any:
                return context.zero if x is None else context.exp(enclose(context, x))

            parts = ([exp(x) for x in xs] for xs in (self.log_a, self.log_u, self.tilt))
            self._intervals[bits] = (context, *parts)
        return self._intervals[bits]

    def _cancels(self, x: Weights, y: Weights, tilted: bool) -> bool:
        """Whether all coefficients of the exponential sum are zero."""
        # Of outputs that agree in log p and exponent only the summed weight counts.
        shift = self.tilt if tilted else [Fraction(0)] * len(self.tilt)
        left_a, left_u = (_collect(log_p, shift, x) for log_p in (self.log_a, self.log_u))
        none = [Fraction(0)] * len(self.tilt)
        right_a, right_u = (_collect(log_p, none, y) for log_p in (self.log_a, self.log_u))
        if left_a == left_u and right_a == right_u:
            return True
        coefficients: Counter[Fraction] = Counter()
        for left, right, sign in ((left_a, right_u, 1), (left_u, right_a, -1)):
            for (log_p, t), w in left.items():
                for (log_q, _), v in right.items():
                    coefficients[log_p + t + log_q] += sign * w * v  # type: ignore[assignment]
        return not any(coefficients.values())


@cache
def intervals(bits: int) -> Any:
    """Return the interval arithmetic of one precision; to set up one takes 20 ms."""
    context = MPIntervalContext()
    context.prec = bits
    return context


def _collect(
    log_p: list[Fraction | None], shift: list[Fraction], weights: Weights
) -> dict[tuple[Fraction, Fraction], Fraction]:
    found: dict[tuple[Fraction, Fraction], Fraction] = {}
    for x, t, w in zip(log_p, shift, weights, strict=True):
        if x is not None and w:
            found[x, t] = found.get((x, t), Fraction(0)) + w
    return {key: w for key, w in found.items() if w}


def enclose(context: Any, x: Fraction | int) -> Any:
    """Return an interval of a context that holds a rational number."""
    if isinstance(x, int):
        return context.mpf(x)
    return context.mpf(x.numerator) / context.mpf(x.denominator)


def _dot(weights: Sequence[Any], values: Sequence[Any]) -> Any:
    products = (w * v for w, v in zip(weights, values, strict=True))
    return sum(products, start=0 * values[0])


def _sign(x: Any) -> int | None:
    """Return the sign of everything in an interval, or None where it is not the same."""
    if x.a > 0:
        return 1
    if x.b < 0:
        return -1
    return 0 if x.a == 0 and x.b == 0 else None
