"""How far tuning can move mass: bounds on TPM, a β that is safe, the worst case of Theorem 2.

All rest on one function, C(x, R) = log(1 - x + x e^R) - x R: the log of E[e^{R(X - x)}] for X in
{0, 1} with mean x. Of all reward distributions on an interval with a given mean, the one on the
interval's two ends has the largest E[e^{r/β}] (its chord), and a point mass the smallest (Jensen).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxsim.instance import Instance
from jaxsim.logspace import LOG_ZERO, AnyArray, total, unit_roundoff
from jaxsim.rounding import EXP, QUOTIENT, sum_depth
from jaxsim.theorem.verdict import allowed
from jaxsim.tilting import Centered, Component, center, tilt


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TpmBound:
    """One bound on where tuning can lead, per instance.

    Attributes:
        log_odds_shift: Δ is at most this.
        log_tpm_aligned: log TPM(A) is at most this.
        log_tpm_unaligned: log TPM(U) is at least this: what is never expunged.
    """

    log_odds_shift: Float[AnyArray, "..."]
    log_tpm_aligned: Float[AnyArray, "..."]
    log_tpm_unaligned: Float[AnyArray, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TpmBounds:
    """Bounds by what is known of the reward; the later ones need more and are mostly sharper.

    Attributes:
        by_range: from the best reward in A's support and the worst in U's.
        by_means: from the range of the reward and its means under A and U.
        by_tilted_means: from the mean under A after tuning and the mean under U before.
    """

    by_range: TpmBound
    by_means: TpmBound
    by_tilted_means: TpmBound


def tpm_bounds(instance: Instance) -> TpmBounds:
    """Bound TPM(A) from above and TPM(U) from below, in three ways.

    With R = (max r - min r)/β, x = (mean - min r)/(max r - min r) and C(x, R) as above,

        Δ ≤ (max over supp A of r - min over supp U of r)/β
        Δ ≤ (E_A[r] - E_U[r])/β + C(x_A, R) = log(1 + x_A(e^R - 1)) - R x_U
        Δ ≤ (E_{A,s}[r] - E_U[r])/β, E_{A,s} being A tilted by e^{r/β},

    and logit TPM(A) = logit α + Δ. The first two are attained.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        `TpmBounds`, one number per instance in each field.

    Numerics:
        Rounded to nearest, not outwards: where a bound is attained, a computed TPM may pass it by
        its own rounding error.

    Example:
        >>> from jaxsim import Instance, tpm_bounds
        >>> instance = Instance.from_probs([0., 1.], [1., 0.], [0., 2.], .5, 1.)
        >>> print(f"{tpm_bounds(instance).by_range.log_odds_shift:.4f}")
        2.0000
    """
    base = center(instance)
    x = tilt(base, instance.beta)

    def among(part: Component, limit: float) -> Array:
        inside = part.log_p > LOG_ZERO
        return jnp.where(inside, base.above_center, limit)

    best = jnp.max(among(base.aligned, -jnp.inf), axis=0, keepdims=True)
    worst = jnp.min(among(base.unaligned, jnp.inf), axis=0, keepdims=True)
    mean_a, mean_u = (total(part.p * base.above_center) for part in (base.aligned, base.unaligned))
    tuned_a = total(x.aligned.p * base.above_center)
    apart = (mean_a - mean_u) / x.beta
    excess = two_point_cumulant(_share(base), x.spread)

    def bound(shift: Array) -> TpmBound:
        logit = (base.logit_alpha + shift)[0]
        return TpmBound(
            log_odds_shift=shift[0],
            log_tpm_aligned=jax.nn.log_sigmoid(logit),
            log_tpm_unaligned=jax.nn.log_sigmoid(-logit),
        )

    return TpmBounds(
        by_range=bound((best - worst) / x.beta),
        by_means=bound(apart + excess),
        by_tilted_means=bound((tuned_a - mean_u) / x.beta),
    )


def sufficient_beta(instance: Instance) -> Float[Array, " *tile"]:
    """Return a β from which on TPM(A) ≥ α is certain: (max r - min r)² / (8 (E_A[r] - E_U[r])).

    By Hoeffding's lemma Δ ≥ (E_A[r] - E_U[r])/β - (max r - min r)²/(8β²). It is sufficient, not
    necessary; the instance's own β plays no part.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        A β in units of reward; `inf` where E_A[r] ≤ E_U[r], 0 where all rewards are equal.

    Numerics:
        Rounded up: the difference of the means is lessened by its error bound (docs/verdicts.md),
        and where nothing certain is left of it β is `inf`.

    Example:
        >>> from jaxsim import Instance, sufficient_beta
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> print(f"{sufficient_beta(instance):.4f}")
        2.0000
    """
    base = center(instance)
    unit, outputs = unit_roundoff(base.reward.dtype), base.reward.shape[0]
    means, sizes = (
        [total(part.p * x) for part in (base.aligned, base.unaligned)]
        for x in (base.above_center, jnp.abs(base.above_center))
    )
    lead = means[0] - means[1]
    units = (2 + 2 * EXP + QUOTIENT + 2 * sum_depth(outputs)) * sum(sizes) + jnp.abs(lead)
    flushed = 8 * outputs * float(jnp.finfo(base.reward.dtype).tiny) * (1 + base.span)
    certain = lead - allowed(unit * units + flushed)
    leads = certain > 0
    # Not span², which may overflow.
    enough = base.span / 8 * (base.span / jnp.where(leads, certain, 1.0))
    enough = enough * (1 + (6 + QUOTIENT) * unit)
    return jnp.where(base.span == 0, 0.0, jnp.where(leads, enough, jnp.inf))[0]


def _share(base: Centered) -> Array:
    """Return where E_A[r] lies between the least reward (0) and the greatest (1).

    Summed from the least: a difference of means would lose small shares, which e^R magnifies.
    """
    lowest = jnp.min(jnp.where(base.support, base.reward, jnp.inf), axis=0, keepdims=True)
    above = jnp.where(base.support, base.reward - lowest, 0.0)
    span = jnp.where(base.span > 0, base.span, 1.0)
    return jnp.clip(total(base.aligned.p * (above / span)), 0.0, 1.0)


def worst_case_shift(outputs: ArrayLike, range_over_beta: ArrayLike) -> Any:
    """Return V(n, R), the depth that a failure of Theorem 2 approaches and never reaches.

    Over all instances of n outputs with (max r - min r)/β = R that meet the paper's hypotheses
    Cov(r, p_A) > 0 > Cov(r, p_U), the supremum of -Δ is

        V(n, R) = C(λ, R) = log(1 - λ + λ e^R) - λR,  λ = max(1/R - 1/(e^R - 1), 1/(n - 1)).

    V(3, R) = log cosh(R/2). Proved in docs/theorem2.md. TPM(A) falls below α by less than
    tanh(V/4), which is approached at logit α = V/2.

    Args:
        outputs: n ≥ 1, a number or an array.
        range_over_beta: R ≥ 0, a number or an array; the two broadcast.

    Returns:
        V in nats, 0 for n ≤ 2, where the theorem holds. In float64 (NumPy) unless one argument is a
        JAX array, then in its dtype, also under `jit`.

    Example:
        >>> from jaxsim import worst_case_shift
        >>> print(f"{worst_case_shift(3, 4.0):.6f}")
        1.325003
    """
    given = (outputs, range_over_beta)
    xp: Any = jnp if any(isinstance(x, jax.Array) for x in given) else np
    n, spread = (xp.asarray(x, None if hasattr(x, "dtype") else float) for x in given)
    spread = spread * xp.ones_like(spread, dtype=xp.result_type(spread, xp.float32))
    positive = xp.where(spread > 0, spread, 1.0)
    near = xp.where(positive < 1, positive, 1.0)
    flat = _exp_less_line(near, xp) / (near * xp.expm1(near))
    steep = 1 / positive - 1 / xp.expm1(xp.clip(positive, 1.0, 80.0))
    mean = xp.maximum(xp.where(positive < 1, flat, steep), 1 / xp.maximum(n - 1, 2))
    depth = two_point_cumulant(mean, positive, xp)
    return xp.where((n > 2) & (spread > 0), depth, 0.0)


def two_point_cumulant(x: Any, spread: Any, xp: Any = jnp) -> Any:
    """Return C(x, R) = log(1 - x + x e^R) - xR ≥ 0, with relative accuracy also as R → 0.

    As the log of a mean of e^{R(X - x)}, whose exponents have mean zero, it is log1p of the mean of
    e^t - 1 - t; for large R there is nothing to cancel.
    """
    near = xp.where(spread < 8, spread, 0.0)
    rise = (1 - x) * _exp_less_line(-x * near, xp) + x * _exp_less_line((1 - x) * near, xp)
    inside = (x > 0) & (x < 1)  # at 0 and 1 there is nothing to average: C = 0
    y, far = xp.where(inside, x, 0.5), xp.where(spread < 8, 8.0, spread)
    steep = xp.logaddexp(xp.log1p(-y), xp.log(y) + far) - y * far
    return xp.where(spread < 8, xp.log1p(rise), xp.where(inside, steep, 0.0))


def _exp_less_line(t: Any, xp: Any) -> Any:
    """Return e^t - 1 - t."""
    near = xp.where(abs(t) < 0.5, t, 0.0)
    series = xp.zeros_like(near)
    for k in range(16, 1, -1):
        series = (1 + series) * near / k  # Σ_{j≥k} (k-1)! t^{j-k+1}/j!
    return xp.where(abs(t) < 0.5, series * near, xp.expm1(t) - t)
