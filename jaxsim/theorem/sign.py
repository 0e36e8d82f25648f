"""The sign of the log-odds shift and no more: one exponential per output, with its error bound.

For streams of instances, where a verdict is counted and its number is not kept. Both components
share the exponential of the reward relative to the best, which may underflow for one of them; the
bound then leaves the sign undecided. The proof is in docs/verdicts.md.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from jaxsim.logspace import expm1_narrow, total, unit_roundoff
from jaxsim.rounding import EXP, EXPM1, QUOTIENT, sum_depth
from jaxsim.theorem.verdict import allowed, decide
from jaxsim.tilting import Centered, Component


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How much each component's mass grows under e^{(r - c)/β}; all [1, *tile].

    Attributes:
        center: c, the mean of the reward where it spans less than one β, else the best.
        aligned: E_A[e^t - 1] where narrow, else E_A[e^t].
        unaligned: of U, likewise.
        narrow: whether the rewards span less than one β.
        outcome: `Outcome` (int8) of Δ > 0, [*tile].
    """

    center: Array
    aligned: Array
    unaligned: Array
    narrow: Array
    outcome: Array


def growth(base: Centered, beta: Array) -> Growth:
    """Return E_A[e^t] and E_U[e^t], and with them the `Outcome` of Δ > 0."""
    outputs, info = base.reward.shape[0], jnp.finfo(base.reward.dtype)
    depth, beta = sum_depth(outputs), beta[None]
    best = jnp.max(jnp.where(base.support, base.reward, -jnp.inf), axis=0, keepdims=True)
    narrow = base.span < beta
    origin = jnp.where(narrow, base.center, best)
    t = jnp.where(base.support, base.reward - origin, 0.0) * (1 / beta)
    grown = expm1_narrow(jnp.where(narrow, t, 0.0))
    grown = jnp.where(narrow, grown, jnp.exp(jnp.where(narrow, 0.0, t)))
    mean_a, mean_u = (total(part.p * grown) for part in (base.aligned, base.unaligned))
    # Of each term: p, e^t or expm1, the product, the sum; then the difference of both sums.
    units = jnp.where(narrow, EXPM1 + 1.6 * (2 + QUOTIENT), EXP) + 2 + depth

    def share(part: Component) -> Array:
        return (part.share + units) * part.p + part.floor

    size = total((share(base.aligned) + share(base.unaligned)) * jnp.abs(grown))
    # Of e^t also that of t: E[e^t |t|] ≤ -S log S with S = E[e^t], for t ≤ 0 (Jensen).
    of_t = jnp.where(narrow, 0.0, 2 + QUOTIENT) * (_entropy(mean_a) + _entropy(mean_u))
    flushed = 4 * outputs * float(info.tiny) * (1 + 1 / beta)
    bound = allowed(unit_roundoff(info.dtype) * (size + of_t) + flushed)
    difference = mean_a - mean_u
    return Growth(
        center=origin,
        aligned=mean_a,
        unaligned=mean_u,
        narrow=narrow,
        outcome=decide(difference, bound, jnp.zeros_like(bound, bool))[0],
    )


def _entropy(x: Array) -> Array:
    """Return -x log x for 0 ≤ x ≤ 1, and a little more, so as to bound it despite rounding."""
    inside = jnp.where((x > 0) & (x < 1), x, 1.0)
    return -inside * jnp.log(inside) + x / 64


def best_level(base: Centered) -> Array:
    """Return the `Outcome` of p_A(T) > p_U(T), T the outputs of greatest reward: Δ > 0 as β → 0.

    Where both have equal mass on T the next level decides; that is left UNDECIDED, and so is mass
    that underflows.
    """
    outputs, info = base.reward.shape[0], jnp.finfo(base.reward.dtype)
    best = jnp.max(jnp.where(base.support, base.reward, -jnp.inf), axis=0, keepdims=True)
    top = base.support & (base.reward == best)
    sizes, masses = [], []
    for part in (base.aligned, base.unaligned):
        masses.append(total(jnp.where(top, part.p, 0.0)))
        error = (part.share + 1 + sum_depth(outputs)) * part.p + part.floor
        sizes.append(total(jnp.where(top, error, 0.0)))
    flushed = 4 * outputs * float(info.tiny)
    bound = allowed(unit_roundoff(info.dtype) * (sizes[0] + sizes[1]) + flushed)
    return decide(masses[0] - masses[1], bound, jnp.zeros_like(bound, bool))[0]
