"""Theorem 2 of the paper: are its hypotheses met, and does its conclusion TPM(A) ≥ α follow?

It does not follow in general. The paper's proof takes e^{r/β} to be correlated with the components
because r is; Pearson correlation is not kept by a monotone map. The conclusion is equivalent to
Δ = log E_A[e^{r/β}] - log E_U[e^{r/β}] ≥ 0, which the hypotheses bound only for large β.
"""

import enum
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxsim.instance import Instance
from jaxsim.logspace import LOG_ZERO, AnyArray, total, unit_roundoff
from jaxsim.tilting import Centered, Component, Tilt, TiltedComponent, center, tilt


class Outcome(enum.IntEnum):
    """What a comparison with zero came to, once its rounding error is accounted for."""

    FAILS = -1
    TIE = 0
    HOLDS = 1
    UNDECIDED = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Theorem 2 on one instance, or on a batch.

    Attributes:
        covariance_aligned: Cov(r, p_A) under the uniform distribution on the support of p_ref.
        covariance_unaligned: Cov(r, p_U), likewise.
        log_odds_shift: Δ; TPM(A) > α iff Δ > 0.
        hypothesis_aligned: `Outcome` (int8) of Cov(r, p_A) > 0.
        hypothesis_unaligned: `Outcome` (int8) of Cov(r, p_U) < 0.
        conclusion: `Outcome` (int8) of Δ > 0; TIE where TPM(A) = α exactly.
    """

    covariance_aligned: Float[AnyArray, "..."]
    covariance_unaligned: Float[AnyArray, "..."]
    log_odds_shift: Float[AnyArray, "..."]
    hypothesis_aligned: Int8[AnyArray, "..."]
    hypothesis_unaligned: Int8[AnyArray, "..."]
    conclusion: Int8[AnyArray, "..."]

    @property
    def hypotheses_hold(self) -> Array:
        """Whether both hypotheses are decided and hold."""
        return (self.hypothesis_aligned == Outcome.HOLDS) & (
            self.hypothesis_unaligned == Outcome.HOLDS
        )

    @property
    def violated(self) -> Array:
        """Whether both hypotheses hold and yet TPM(A) < α: a counterexample to Theorem 2."""
        return self.hypotheses_hold & (self.conclusion == Outcome.FAILS)


def theorem2(instance: Instance) -> Verdict:
    """Judge Theorem 2: Cov(r, p_A) > 0 > Cov(r, p_U) is said to imply TPM(A) ≥ α.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        A `Verdict`. A code is HOLDS or FAILS only where the number exceeds its rounding bound;
        TIE only where equality follows from equal stored numbers (all rewards on the support
        equal, a component uniform on it, or both components the same); else UNDECIDED.

    Numerics:
        The bound is 8u(κ + |x|) with, for Δ, κ = (E_A,s|r-m| + E_U,s|r-m|)/β
        + Σ|p_A,s - p_A||log p_A| + Σ|p_U,s - p_U||log p_U| + min(1, (max r - min r)/β), and for a
        covariance κ = (E_p|r - r̄| + mean|r - r̄|)/outputs, r̄ the plain mean; p_{A,s} is A tilted by
        e^{r/β}.

    Example:
        >>> from jaxsim import Instance, Outcome, theorem2
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> verdict = theorem2(instance)
        >>> bool(verdict.hypotheses_hold), Outcome(int(verdict.conclusion)).name
        (True, 'FAILS')
    """
    base = center(instance)
    return verdict(covariances(base), tilt(base, instance.beta))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Covariances:
    """The hypotheses of Theorem 2, which do not depend on β."""

    aligned: Array
    unaligned: Array
    hypothesis_aligned: Array
    hypothesis_unaligned: Array


def covariances(base: Centered) -> Covariances:
    """Judge Cov(r, p_A) > 0 > Cov(r, p_U) under the uniform distribution on the support."""
    roundoff = unit_roundoff(base.reward.dtype)
    count = total(base.support.astype(base.reward.dtype))
    top = jnp.max(jnp.where(base.support, base.reward, -jnp.inf), axis=0, keepdims=True)
    mean = top + total(jnp.where(base.support, base.reward - top, 0.0)) / count
    above_mean = jnp.where(base.support, base.reward - mean, 0.0)
    rest, size = total(above_mean) / count, total(jnp.abs(above_mean)) / count

    def covariance(part: Component, sign: int) -> tuple[Array, Array]:
        value = (total(part.p * above_mean) - rest) / count
        kappa = (total(part.p * jnp.abs(above_mean)) + size) / count
        highest = jnp.max(part.log_p, axis=0, keepdims=True)
        lowest = jnp.min(jnp.where(base.support, part.log_p, jnp.inf), axis=0, keepdims=True)
        uniform = highest == lowest
        bound = 8 * roundoff * (kappa + jnp.abs(value))
        return value, decide(sign * value, bound, (base.span == 0) | uniform)

    aligned, hypothesis_aligned = covariance(base.aligned, 1)
    unaligned, hypothesis_unaligned = covariance(base.unaligned, -1)
    return Covariances(
        aligned=aligned,
        unaligned=unaligned,
        hypothesis_aligned=hypothesis_aligned,
        hypothesis_unaligned=hypothesis_unaligned,
    )


def verdict(hypotheses: Covariances, x: Tilt) -> Verdict:
    """Judge the conclusion on an instance already tilted, and join it to the hypotheses."""

    def conditioning(part: Component, tilted: TiltedComponent) -> Array:
        information = jnp.where(part.log_p > LOG_ZERO, jnp.abs(part.log_p), 0.0)
        return total(tilted.p * jnp.abs(x.t) + jnp.abs(tilted.p - part.p) * information)

    base, shift = x.base, x.log_odds_shift
    kappa = (
        conditioning(base.aligned, x.aligned)
        + conditioning(base.unaligned, x.unaligned)
        + jnp.minimum(1.0, x.spread)
    )
    bound = 8 * unit_roundoff(shift.dtype) * (kappa + jnp.abs(shift))
    apart = jnp.abs(base.aligned.log_p - base.unaligned.log_p)
    same = jnp.max(apart, axis=0, keepdims=True) == 0
    fields = Verdict(
        covariance_aligned=hypotheses.aligned,
        covariance_unaligned=hypotheses.unaligned,
        log_odds_shift=shift,
        hypothesis_aligned=hypotheses.hypothesis_aligned,
        hypothesis_unaligned=hypotheses.hypothesis_unaligned,
        conclusion=decide(shift, bound, (base.span == 0) | same),
    )
    return jax.tree.map(lambda field: field[0], fields)


def decide(value: Array, bound: Array, tie: Array) -> Int8[Array, "..."]:
    """Return the `Outcome` of value > 0 for a number known to within `bound`, or known equal."""
    sign = jnp.where(value > bound, Outcome.HOLDS, Outcome.UNDECIDED)
    sign = jnp.where(value < -bound, Outcome.FAILS, sign)
    return jnp.where(tie, Outcome.TIE, sign).astype(jnp.int8)
