"""Theorem 2 of the paper: are its hypotheses met, and does its conclusion TPM(A) ≥ α follow?

It does not follow in general. The paper's proof takes e^{r/β} to be correlated with the components
because r is; Pearson correlation is not kept by a monotone map. The conclusion is equivalent to
Δ = log E_A[e^{r/β}] - log E_U[e^{r/β}] ≥ 0, which the hypotheses bound only for large β.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxsim.instance import Instance
from jaxsim.logspace import AnyArray, any_output, bits, stored_alike, total, unit_roundoff
from jaxsim.rounding import EXP, EXPM1, LOG, LOG1P, QUOTIENT, sum_depth, trust
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
    def hypotheses_hold(self) -> Any:
        """Whether both hypotheses are decided and hold."""
        return (self.hypothesis_aligned == Outcome.HOLDS) & (
            self.hypothesis_unaligned == Outcome.HOLDS
        )

    @property
    def violated(self) -> Any:
        """Whether both hypotheses hold and yet TPM(A) < α: a counterexample to Theorem 2."""
        return self.hypotheses_hold & (self.conclusion == Outcome.FAILS)


def theorem2(instance: Instance) -> Verdict:
    """Judge Theorem 2: Cov(r, p_A) > 0 > Cov(r, p_U) is said to imply TPM(A) ≥ α.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        A `Verdict`. A code is HOLDS or FAILS only where the number exceeds its error bound; TIE
        only where equality follows from equal stored numbers (all rewards on the support equal, a
        component uniform on it, or both components the same); else UNDECIDED, which `certify`
        settles.

    Numerics:
        What is judged is the stored instance: its components normalised exactly, r/β an exact
        quotient. The bounds are `shift_error` and the like, proven in docs/verdicts.md from the
        rounding model of `jaxsim.rounding`; on a platform whose functions have not been checked
        (any but CPU, before `jaxsim doctor --functions`) every code that needs one is UNDECIDED.
        In float64 the model's bounds for exp and the like are assumed.

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
    info, outputs = jnp.finfo(base.reward.dtype), base.reward.shape[0]
    depth = sum_depth(outputs)
    count = total(base.support.astype(base.reward.dtype))
    # From the plain mean, not the reference's, which an output of much mass may draw far away.
    top = jnp.max(jnp.where(base.support, base.reward, -jnp.inf), axis=0, keepdims=True)
    mean = top + total(jnp.where(base.support, base.reward - top, 0.0)) / count
    above_mean = jnp.where(base.support, base.reward - mean, 0.0)
    size = total(jnp.abs(above_mean)) / count
    flushed = 8 * float(info.tiny) * outputs * (1 + base.span)
    constant = stored_alike(base.reward, base.support)

    def covariance(part: Component, sign: int) -> tuple[Array, Array]:
        value = total((part.p - 1 / count) * above_mean) / count
        # Per term: r - m, p less 1/n, the product, the sum; then the division by n.
        units = (3 + part.share + depth) * total(part.p * jnp.abs(above_mean))
        units = (units + (3 + QUOTIENT + depth) * size) / count + part.floor * size
        units = units + QUOTIENT * jnp.abs(value)
        bound = allowed(unit_roundoff(info.dtype) * units + flushed / count)
        uniform = part.stored & stored_alike(part.log_p, base.support)
        return value, decide(sign * value, bound, constant | uniform)

    aligned, hypothesis_aligned = covariance(base.aligned, 1)
    unaligned, hypothesis_unaligned = covariance(base.unaligned, -1)
    return Covariances(
        aligned=aligned,
        unaligned=unaligned,
        hypothesis_aligned=hypothesis_aligned,
        hypothesis_unaligned=hypothesis_unaligned,
    )


def shift_error(x: Tilt) -> Array:
    """Bound |Δ̂ - Δ|, the rounding error of the log-odds shift as `tilt` computes it.

    The terms are those of the proof in docs/verdicts.md, in its order. u times: the relative errors
    of t, under each tilted component; of exponentials, sums and quotients, a constant; of Δ itself.
    """
    info, outputs = jnp.finfo(x.t.dtype), x.t.shape[0]
    unit, depth, log_n = unit_roundoff(info.dtype), sum_depth(outputs), math.log(outputs)
    size, shift = jnp.abs(x.t), jnp.abs(x.log_odds_shift)

    def mean_size(part: Component, tilted: TiltedComponent) -> Array:
        """Return E_{p,s}|t|; where the rewards span little, a bound of E_p|e^t - 1| / E_p e^t."""
        both = 0.5 * (tilted.p + part.p / (1.0 + tilted.mean_growth))
        return total(jnp.where(x.narrow, both, tilted.p) * size)

    moved = mean_size(x.base.aligned, x.aligned) + mean_size(x.base.unaligned, x.unaligned)
    narrow = (
        (1.6 * (1 + QUOTIENT) + EXPM1 + 2 * EXP + QUOTIENT + 1 + 2 * depth) * moved
        + (2 + QUOTIENT + LOG1P) * shift
    )  # fmt: skip

    peaks = jnp.abs(x.aligned.peak) + jnp.abs(x.unaligned.peak)
    constant = 4 * depth + 5 * EXP + 3 * QUOTIENT + (2 + LOG) * log_n + 5
    wide = (
        (1 + QUOTIENT) * moved * (1 + 16 * unit * x.spread)  # the factor is for higher orders
        + jnp.abs(x.aligned.peak - x.unaligned.peak)
        + (1 + LOG) * shift
        + constant
    )
    linearised = 2 * (unit * (peaks + 128.0)) ** 2
    # Where t is so large that its error may exceed a unit, the worst output counts, not the mean.
    large = (x.spread + peaks) * unit > 1 / 16
    extreme = unit * (2 * (1 + QUOTIENT) * x.spread + 4 * peaks) + 3 + 2 * log_n
    out_of_reach = (x.spread + peaks) > 1e18
    wide = unit * wide + jnp.where(large, extreme, linearised)
    wide = jnp.where(out_of_reach, jnp.inf, wide)
    flushed = 8 * float(info.tiny) * (outputs + 1.0 / x.beta)
    return allowed(jnp.where(x.narrow, unit * narrow, wide) + flushed)


def stored_equal(base: Centered) -> Array:
    """Whether both components are stored alike, [1, *tile].

    Not where a log p is zero: a device may have flushed it to that.
    """
    differ = bits(base.aligned.log_p) != bits(base.unaligned.log_p)
    flushed = jnp.abs(base.aligned.log_p) < jnp.finfo(base.reward.dtype).tiny
    return ~any_output(differ | flushed)


def allowed(bound: Array) -> Array:
    """Widen an error bound for its own rounding, and without end on an unchecked platform."""
    return bound * (1 + 2.0**-8) * trust().astype(bound.dtype)


def verdict(hypotheses: Covariances, x: Tilt) -> Verdict:
    """Judge the conclusion on an instance already tilted, and join it to the hypotheses."""
    base, shift = x.base, x.log_odds_shift
    constant = stored_alike(base.reward, base.support)
    fields = Verdict(
        covariance_aligned=hypotheses.aligned,
        covariance_unaligned=hypotheses.unaligned,
        log_odds_shift=shift,
        hypothesis_aligned=hypotheses.hypothesis_aligned,
        hypothesis_unaligned=hypotheses.hypothesis_unaligned,
        conclusion=decide(shift, shift_error(x), constant | stored_equal(base)),
    )
    return jax.tree.map(lambda field: field[0], fields)


def decide(value: Array, bound: Array, tie: Array) -> Int8[Array, "..."]:
    """Return the `Outcome` of value > 0 for a number known to within `bound`, or known equal."""
    sign = jnp.where(value > bound, Outcome.HOLDS, Outcome.UNDECIDED)
    sign = jnp.where(value < -bound, Outcome.FAILS, sign)
    return jnp.where(tie, Outcome.TIE, sign).astype(jnp.int8)
