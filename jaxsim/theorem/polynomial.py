"""How often a polynomial with rational coefficients changes sign beyond x = 1, exactly.

Where all rewards are multiples of one rational 1/q and both components are uniform on their
supports, f(s) = E_A[e^{sr}] - E_U[e^{sr}] is a polynomial in x = e^{s/q} with rational
coefficients. Its zeros of odd multiplicity are then counted by Sturm's theorem, also where floating
point cannot tell two zeros from one that is double.
"""

from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm

from jaxsim.theorem.exact import ExactInstance

Polynomial = list[Fraction]  # from the constant on; no leading zero; [] is zero

_GREATEST_DEGREE = 200


def odd_zeros_beyond_one(exact: ExactInstance) -> int | None:
    """Return how often f changes sign on s > 0; None where it is no such polynomial."""
    masses = []
    for log_p in (exact.log_a, exact.log_u):
        stored = {x for x in log_p if x is not None}
        if len(stored) != 1:
            return None
        share = Fraction(1, sum(x is not None for x in log_p))
        masses.append([share if x is not None else Fraction(0) for x in log_p])
    least = min(exact.reward)
    steps = [r - least for r in exact.reward]
    scale = lcm(*(x.denominator for x in steps))
    powers = [int(x * scale) for x in steps]
    common = gcd(*powers) or 1
    powers = [k // common for k in powers]
    if max(powers) > _GREATEST_DEGREE:
        return None
    f = [Fraction(0)] * (max(powers) + 1)
    for k, a, u in zip(powers, *masses, strict=True):
        f[k] += a - u
    return _odd_zeros(_trimmed(f))


def _odd_zeros(f: Polynomial) -> int:
    """Count the zeros of odd multiplicity in (1, ∞), each once."""
    # Yun: f is the product of g_k^k with square-free g_k.
    count, power = 0, 1
    if len(f) < 2:
        return 0
    rest = _gcd(f, _derivative(f))
    simple = _divide(f, rest)[0]
    while len(simple) > 1:
        shared = _gcd(simple, rest)
        if power % 2:
            count += _zeros_beyond_one(_divide(simple, shared)[0])
        simple, rest, power = shared, _divide(rest, shared)[0], power + 1
    return count


def _zeros_beyond_one(f: Polynomial) -> int:
    """Count the zeros of a square-free polynomial in (1, ∞) by Sturm's theorem."""
    if len(f) < 2:
        return 0
    chain = [f, _derivative(f)]
    while chain[-1]:
        chain.append([-x for x in _divide(chain[-2], chain[-1])[1]])
    at_one = _changes([sum(p, Fraction(0)) for p in chain[:-1]])
    at_infinity = _changes([p[-1] for p in chain[:-1]])
    return at_one - at_infinity


def _changes(values: list[Fraction]) -> int:
    signs = [x > 0 for x in values if x]
    return sum(a != b for a, b in pairwise(signs))


def _trimmed(f: Polynomial) -> Polynomial:
    while f and not f[-1]:
        f = f[:-1]
    return f


def _derivative(f: Polynomial) -> Polynomial:
    return [k * x for k, x in enumerate(f)][1:]


def _divide(f: Polynomial, g: Polynomial) -> tuple[Polynomial, Polynomial]:
    """Return quotient and remainder."""
    rest, quotient = list(f), [Fraction(0)] * max(0, len(f) - len(g) + 1)
    for shift in range(len(f) - len(g), -1, -1):
        factor = rest[shift + len(g) - 1] / g[-1]
        quotient[shift] = factor
        for k, x in enumerate(g):
            rest[shift + k] -= factor * x
    return quotient, _trimmed(rest)


def _gcd(f: Polynomial, g: Polynomial) -> Polynomial:
    while g:
        f, g = g, _divide(f, g)[1]
    return [x / f[-1] for x in f]
