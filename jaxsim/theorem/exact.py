"""Signs of exponential sums over stored numbers, by interval arithmetic of rising precision.

On the host, one instance at a time. Stored floats are taken as the exact binary fractions they are,
r/β as an exact quotient. Every question here is the sign of

    Σ_i Σ_j x_i y_j (e^{a_i + u_j} - e^{u_i + a_j}) e^{s_i},   s_i = r_i/β or 0,

with a = log p_A, u = log p_U and rational weights x, y: dividing by Σe^a Σe^u normalises both
components. It is zero iff the rational coefficients of equal exponents cancel, since exponentials
of distinct algebraic numbers are linearly independent over the rationals (Lindemann–Weierstrass).
So first some digits, then the test for zero, then digits without end: that always ends.
"""

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
        return self._resolve(x, y, False, lambda difference, more, less: difference)[0]

    def difference(self, x: Weights) -> tuple[int, Any]:
        """Return E_A[x] - E_U[x]: its sign, and its value to 64 bits or more."""
        one = self.everywhere
        return self._resolve(x, one, False, None)

    def log_odds_shift(self) -> tuple[int, float]:
        """Return Δ: its sign, and its value rounded to float64."""
        one = self.everywhere

        def ratio(difference: Any, more: Any, less: Any) -> Any:
            """Relative to the smaller of the two, so that log1p has a positive argument."""
            return difference / (less if difference.a > 0 else more)

        sign, value = self._resolve(one, one, True, ratio)
        return sign, sign * float(mp.log1p(abs(value))) if sign else 0.0

    def covariance(self, *, aligned: bool) -> tuple[int, float]:
        """Return Cov(r, p) under the uniform distribution: its sign and its value."""
        log_p, size = self.log_a if aligned else self.log_u, len(self.reward)
        mean = sum(self.reward, Fraction(0)) / size
        above = [(r - mean) / size for r in self.reward]
        # Classes of equal log p that cancel are left out, so that they cost no digits.
        classes = _collect(log_p, [Fraction(0)] * size, above)
        if not classes:
            return 0, 0.0
        bits = _FIRST_BITS
        while True:
            context, a, u, _ = self._at(bits)
            terms = (enclose(context, d) * context.exp(enclose(context, x))
                     for (x, _), d in classes.items())  # fmt: skip
            value = sum(terms, start=context.zero) / sum(a if aligned else u, start=context.zero)
            if (sign := _known(value)) is not None:
                return sign, float(mp.mpf(value.mid))
            bits *= 2

    def _resolve(
        self, x: Weights, y: Weights, tilted: bool, finish: Callable[..., Any] | None
    ) -> tuple[int, Any]:
        """Return the sign of the sum above, and what `finish` makes of it, to 64 bits or more.

        `finish` gets the sum and the two products of which it is the difference; without it the sum
        is divided by the totals of both components. Where the first bits do not tell the sign, what
        cancels exactly is taken out, so that it costs no digits.
        """
        bits, terms = _FIRST_BITS, None
        while True:
            context, a, u, _ = self._at(bits)
            more, less = self._products(bits, x, y, tilted)
            difference = more - less
            if terms is not None:
                difference = sum(
                    (enclose(context, c) * context.exp(enclose(context, e)) for e, c in terms),
                    start=context.zero,
                )
            if _sign(difference) is None:
                if terms is None:
                    terms = self._terms(x, y, tilted)
                    if not terms:
                        return 0, mp.zero
                    continue
            else:
                one = self.everywhere
                value = (
                    finish(difference, more, less)
                    if finish
                    else difference / (_dot(one, a) * _dot(one, u))
                )
                if (sign := _known(value)) is not None:
                    return sign, mp.mpf(value.mid)
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

    def _terms(self, x: Weights, y: Weights, tilted: bool) -> list[tuple[Fraction, Fraction]]:
        """Return exponents and coefficients of the exponential sum, without those that cancel."""
        # Of outputs that agree in log p and exponent only the summed weight counts.
        shift = self.tilt if tilted else [Fraction(0)] * len(self.tilt)
        left_a, left_u = (_collect(log_p, shift, x) for log_p in (self.log_a, self.log_u))
        none = [Fraction(0)] * len(self.tilt)
        right_a, right_u = (_collect(log_p, none, y) for log_p in (self.log_a, self.log_u))
        if left_a == left_u and right_a == right_u:
            return []
        coefficients: dict[Fraction, Fraction] = {}
        for left, right, sign in ((left_a, right_u, 1), (left_u, right_a, -1)):
            for (log_p, t), w in left.items():
                for (log_q, _), v in right.items():
                    exponent = log_p + t + log_q
                    coefficients[exponent] = coefficients.get(exponent, Fraction(0)) + sign * w * v
        return [(exponent, c) for exponent, c in coefficients.items() if c]


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


def _known(x: Any) -> int | None:
    """Return the sign of an interval that is narrow enough to stand for a number, else None."""
    sign = _sign(x)
    return sign if sign is not None and x.delta <= abs(x.mid) * 2.0**-64 else None


def _sign(x: Any) -> int | None:
    """Return the sign of everything in an interval, or None where it is not the same."""
    if x.a > 0:
        return 1
    if x.b < 0:
        return -1
    return 0 if x.a == 0 and x.b == 0 else None
