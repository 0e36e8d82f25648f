"""The heart: the optimum of eq. (1), log Z, Lemma 1, and the mass of each component after tuning.

Pure, differentiable functions of one instance, or of a tile of them with outputs on the first axis
(see `jaxsim.logspace`); the public functions are those of `jaxsim.engine.lift`. Equation numbers
are those of Huang, "Characterizing Output Distribution Shift under Preference Tuning under the
Bradley-Terry Model".

How the numbers stay accurate. All sums use t = (r - m)/β with m = E_ref[r], so that a common offset
of the reward costs nothing. Where the rewards span less than one β, the cumulants are
log1p(Σ p expm1(t)), which keeps relative accuracy as t → 0. Elsewhere each component has a
log-sum-exp about its own largest term; adding log p to t there is error-free (two-sum), since what
rounds away would be as large as the answer when log p and t cancel. Two large numbers are never
subtracted to give a log-probability: log p*/p_ref is taken relative to the mode of p*, and the
logarithm of a product of moderate size is taken once, of the product.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsim.instance import Instance, Masses
from jaxsim.logspace import (
    LOG_ZERO,
    AnyArray,
    any_output,
    bregman_kl_term,
    expm1_narrow,
    finite_log,
    first_where,
    total,
    two_sum,
)
from jaxsim.rounding import EXP, LOG, QUOTIENT, sum_depth


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What preference tuning does to one instance, or to a batch of them.

    Attributes:
        log_z: log Z = log E_ref[e^{r/β}].
        log_tpm_aligned: log TPM(A), the mass that p* owes to the aligned component; < 0.
        log_tpm_unaligned: log TPM(U).
        log_odds_shift: Δ = logit TPM(A) - logit α = log E_A[e^{r/β}] - log E_U[e^{r/β}].
        kl: KL(p*‖p_ref), nats.
        expected_reward: E_{p*}[r], in units of reward.
        objective: L(p*) = β log Z, the maximum of eq. (1), in units of reward.
    """

    log_z: Float[AnyArray, "..."]
    log_tpm_aligned: Float[AnyArray, "..."]
    log_tpm_unaligned: Float[AnyArray, "..."]
    log_odds_shift: Float[AnyArray, "..."]
    kl: Float[AnyArray, "..."]
    expected_reward: Float[AnyArray, "..."]
    objective: Float[AnyArray, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MixtureWeights:
    """Lemma 1: p* = α_A(y) p_A + α_U(y) p_U. Logs; `-inf` outside the support of p_ref.

    Attributes:
        aligned: log α_A(y) = log α + r/β - log Z, [outputs].
        unaligned: log α_U(y) = log(1-α) + r/β - log Z, [outputs].
    """

    aligned: Float[AnyArray, "..."]
    unaligned: Float[AnyArray, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Component:
    """One component, A or U, as it is in the reference."""

    log_p: Array  # as stored, zero mass made finite
    total: Array  # Σ e^{log p} of the stored log-probabilities, 1 but for rounding; or Σ masses
    p: Array  # probabilities, normalised
    # |p - p of the stored log-probabilities, normalised exactly| ≤ u (share·p + floor)
    share: Array
    floor: Array
    stored: bool = field(default=True, metadata={"static": True})  # else log_p is not as stored


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Centered:
    """All of an instance that does not depend on β, with the reward taken from its mean."""

    support: Array  # where p_ref > 0
    reward: Array  # 0 outside the support
    center: Array  # m = E_ref[r]; where masses are held, the plain mean of r
    above_center: Array  # r - m, 0 outside the support
    span: Array  # max r - min r over the support
    logit_alpha: Array
    log_alpha: Array
    log_not_alpha: Array  # log(1-α)
    aligned: Component
    unaligned: Component
    p_ref: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TiltedComponent:
    """A component under its own tilt, p e^t / E_p[e^t] with t = (r - m)/β."""

    p: Array
    peak: Array  # max of log p + t
    mean_weight: Array  # E_p[e^{t - peak}]
    mean_growth: Array  # E_p[e^t - 1] where the rewards span less than one β, else 0
    cumulant: Array  # log E_p[e^t]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tilt:
    """An instance with both components tilted and compared: what every result is read from."""

    base: Centered
    beta: Array
    t: Array  # (r - m)/β, 0 outside the support
    spread: Array  # (max r - min r)/β over the support
    narrow: Array  # spread < 1
    aligned: TiltedComponent
    unaligned: TiltedComponent
    log_odds_shift: Array  # Δ
    log_z_centered: Array  # log Z - m/β


def center(instance: Instance) -> Centered:
    """Normalise the components and take the reward from its mean under the reference.

    The mean carries no gradient, for no result depends on it.
    """
    logit_alpha = instance.logit_alpha[None]
    log_p_a, log_p_u = finite_log(instance.log_p_aligned), finite_log(instance.log_p_unaligned)
    support = jnp.maximum(log_p_a, log_p_u) > LOG_ZERO
    # Masked before any arithmetic, since padding may hold any reward.
    reward = jnp.where(support, instance.reward, 0.0)

    def component(log_p: Array) -> Component:
        mass = jnp.exp(log_p)
        mass_total = total(mass)
        return Component(
            log_p=log_p,
            total=mass_total,
            p=mass / mass_total,
            share=jnp.asarray(2 * EXP + QUOTIENT + sum_depth(log_p.shape[0]), log_p.dtype),
            floor=jnp.zeros((), log_p.dtype),
        )

    aligned, unaligned = component(log_p_a), component(log_p_u)
    p_ref = jax.nn.sigmoid(logit_alpha) * aligned.p + jax.nn.sigmoid(-logit_alpha) * unaligned.p
    fixed = lax.stop_gradient(reward)
    top = jnp.max(jnp.where(support, fixed, -jnp.inf), axis=0, keepdims=True)
    bottom = jnp.min(jnp.where(support, fixed, jnp.inf), axis=0, keepdims=True)
    below_top = jnp.where(support, fixed - top, 0.0)
    mean = jnp.clip(top + total(lax.stop_gradient(p_ref) * below_top), bottom, top)
    return Centered(
        support=support,
        reward=reward,
        center=mean,
        above_center=jnp.where(support, reward - mean, 0.0),
        span=top - bottom,
        logit_alpha=logit_alpha,
        log_alpha=jax.nn.log_sigmoid(logit_alpha),
        log_not_alpha=jax.nn.log_sigmoid(-logit_alpha),
        aligned=aligned,
        unaligned=unaligned,
        p_ref=p_ref,
    )


def center_masses(masses: Masses) -> Centered:
    """Return the same for a tile of masses, as far as judging Theorem 2 needs it; not for `tilt`.

    What is judged is the instance as it would be stored, log w - log Σw rounded: each component's
    `share` and `floor` account for that (docs/verdicts.md).
    """
    outputs, reward = masses.reward.shape[0], masses.reward
    top, bottom = (f(reward, axis=0, keepdims=True) for f in (jnp.max, jnp.min))
    mean = top + total(reward - top) / outputs
    logit_alpha = masses.logit_alpha[None]

    def component(mass: Array) -> Component:
        mass_total = total(mass)
        log_total = jnp.log(mass_total)
        of_log = (LOG + 1) / math.e / mass_total  # w |log w| ≤ 1/e + w log⁺ Σw
        above_one = (LOG + 1) * jnp.maximum(log_total, 0.0) + jnp.abs(log_total)
        share = QUOTIENT + sum_depth(outputs) + 2 * above_one + outputs * of_log
        p = mass / mass_total
        return Component(
            log_p=jnp.log(p), total=mass_total, p=p, share=share, floor=of_log, stored=False
        )

    aligned, unaligned = component(masses.aligned), component(masses.unaligned)
    return Centered(
        support=jnp.ones_like(reward, bool),
        reward=reward,
        center=mean,
        above_center=reward - mean,
        span=top - bottom,
        logit_alpha=logit_alpha,
        log_alpha=jax.nn.log_sigmoid(logit_alpha),
        log_not_alpha=jax.nn.log_sigmoid(-logit_alpha),
        aligned=aligned,
        unaligned=unaligned,
        p_ref=jax.nn.sigmoid(logit_alpha) * aligned.p + jax.nn.sigmoid(-logit_alpha) * unaligned.p,
    )


def tilt(base: Centered, beta: Float[Array, " *tile"]) -> Tilt:
    """Tilt both components by e^{r/β} and compare them: the one pass behind every result.

    The peaks carry no gradient, for no result depends on them.
    """
    beta = beta[None]
    t = base.above_center / beta
    spread = base.span / lax.stop_gradient(beta)
    narrow = spread < 1.0
    growth = expm1_narrow(jnp.where(narrow, t, 0.0))

    def tilted(part: Component) -> TiltedComponent:
        exponent, rounding = two_sum(part.log_p, t)
        peak = lax.stop_gradient(jnp.max(exponent, axis=0, keepdims=True))
        weight = jnp.exp(exponent - peak)
        # e^{rounding} to first order. Where |t| is so large that it exceeds ½, all is rounding.
        rest = jnp.where(part.log_p > LOG_ZERO, jnp.clip(rounding, -0.5, 0.5), 0.0)
        weight = weight + weight * rest
        weight_total = total(weight)
        mean_weight, mean_growth = weight_total / part.total, total(part.p * growth)
        wide_cumulant = _log_scaled(mean_weight, peak)
        return TiltedComponent(
            p=weight / weight_total,
            peak=peak,
            mean_weight=mean_weight,
            mean_growth=mean_growth,
            cumulant=jnp.where(narrow, jnp.log1p(mean_growth), wide_cumulant),
        )

    aligned, unaligned = tilted(base.aligned), tilted(base.unaligned)
    narrow_log_z = jnp.log1p(
        jax.nn.sigmoid(base.logit_alpha) * aligned.mean_growth
        + jax.nn.sigmoid(-base.logit_alpha) * unaligned.mean_growth
    )
    wide_log_z = jnp.logaddexp(
        base.log_alpha + aligned.cumulant, base.log_not_alpha + unaligned.cumulant
    )
    return Tilt(
        base=base,
        beta=beta,
        t=t,
        spread=spread,
        narrow=narrow,
        aligned=aligned,
        unaligned=unaligned,
        log_odds_shift=_log_odds_shift(aligned, unaligned, narrow),
        log_z_centered=jnp.where(narrow, narrow_log_z, wide_log_z),
    )


def _log_scaled(x: Array, shift: Array) -> Array:
    """Return log(x e^shift), as one logarithm where that loses less: log x may cancel shift."""
    near = jnp.abs(shift) < 30.0
    return jnp.where(near, jnp.log(x * jnp.exp(jnp.where(near, shift, 0.0))), shift + jnp.log(x))


def _log_odds_shift(aligned: TiltedComponent, unaligned: TiltedComponent, narrow: Array) -> Array:
    """Return Δ = log E_A[e^t] - log E_U[e^t] without subtracting the logarithms."""
    # Only positive arguments: XLA's float64 log1p on CPU loses 240u between -0.41 and -0.3.
    gap = aligned.mean_growth - unaligned.mean_growth
    rises = gap >= 0
    up = jnp.log1p(jnp.where(rises, gap, 0.0) / (1.0 + unaligned.mean_growth))
    down = jnp.log1p(jnp.where(rises, 0.0, -gap) / (1.0 + aligned.mean_growth))
    narrow_shift = jnp.where(rises, up, -down)
    ratio = aligned.mean_weight / unaligned.mean_weight
    return jnp.where(narrow, narrow_shift, _log_scaled(ratio, aligned.peak - unaligned.peak))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Optimum:
    """p* of one instance, in the forms that results need."""

    log_tpm_aligned: Array
    log_tpm_unaligned: Array
    p_star: Array
    log_ratio: Array  # log p*/p_ref = r/β - log Z, on the support
    expected_reward: Array


def optimum(x: Tilt) -> Optimum:
    """Mix the tilted components into p*: TPM(A) of one and TPM(U) of the other."""
    base = x.base
    logit = base.logit_alpha + x.log_odds_shift
    log_tpm_a, log_tpm_u = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    p_star = jnp.exp(log_tpm_a) * x.aligned.p + jnp.exp(log_tpm_u) * x.unaligned.p

    is_mode = first_where(p_star == jnp.max(p_star, axis=0, keepdims=True))

    def at_mode(values: Array) -> Array:
        return jnp.sum(jnp.where(is_mode, values, 0.0), axis=0, keepdims=True)

    log_ref_at_mode = _log_mixture(base, at_mode(base.aligned.log_p), at_mode(base.unaligned.log_p))
    above_mode = jnp.where(base.support, base.reward - at_mode(base.reward), 0.0)
    wide_ratio = above_mode / x.beta + (jnp.log(at_mode(p_star)) - log_ref_at_mode)
    # Twice, the second time about the first: else a mean near zero keeps the error of the rewards.
    mean = at_mode(base.reward) + total(p_star * above_mode)
    mean = mean + total(p_star * jnp.where(base.support, base.reward - mean, 0.0))
    return Optimum(
        log_tpm_aligned=log_tpm_a,
        log_tpm_unaligned=log_tpm_u,
        p_star=p_star,
        log_ratio=jnp.where(x.narrow, x.t - x.log_z_centered, wide_ratio),
        expected_reward=mean,
    )


def _log_mixture(base: Centered, log_p_a: Array, log_p_u: Array) -> Array:
    """Return log(α p_A + (1-α) p_U) from stored log-probabilities."""
    return jnp.logaddexp(
        base.log_alpha + log_p_a - jnp.log(base.aligned.total),
        base.log_not_alpha + log_p_u - jnp.log(base.unaligned.total),
    )


def evaluate(instance: Instance) -> Evaluation:
    """Evaluate the closed-form optimum of eq. (1): log Z, both total probability masses, KL, value.

    With K_A(s) = log E_A[e^{s r}] and K_U likewise, logit TPM(A) = logit α + K_A(1/β) - K_U(1/β).

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        An `Evaluation` with one number per instance in each field; `log_tpm_aligned` and
        `log_tpm_unaligned` are logs of two numbers that sum to one.

    Numerics:
        For each field |x̂ - x| ≤ 8u(κ + |x|), u the unit roundoff, κ the condition number that
        docs/accuracy.md gives; tested from r/β = 1e-8 to 1e4 in both dtypes. As β → ∞ all of
        `log_odds_shift` and `kl` go to 0 with relative accuracy; as β → 0 nothing overflows while
        |r|/β < 1e30.

    Example:
        >>> from jaxsim import Instance, evaluate
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> print(f"{evaluate(instance).log_odds_shift:.4f}")
        -0.3250
    """
    x = tilt(center(instance), instance.beta)
    return evaluation(x, optimum(x))


def evaluation(x: Tilt, best: Optimum) -> Evaluation:
    """Read an `Evaluation` off an instance already tilted."""
    kl_terms = bregman_kl_term(best.log_ratio, best.p_star, x.base.p_ref)
    fields = Evaluation(
        log_z=x.base.center / x.beta + x.log_z_centered,
        log_tpm_aligned=best.log_tpm_aligned,
        log_tpm_unaligned=best.log_tpm_unaligned,
        log_odds_shift=x.log_odds_shift,
        kl=total(jnp.where(x.base.support, kl_terms, 0.0)),
        expected_reward=best.expected_reward,
        objective=x.base.center + x.beta * x.log_z_centered,
    )
    return jax.tree.map(lambda field: field[0], fields)


def log_reference(base: Centered) -> Float[Array, " outputs *tile"]:
    """Return log p_ref of eq. (2), normalised; `-inf` outside the support."""
    log_p = _log_mixture(base, base.aligned.log_p, base.unaligned.log_p)
    return jnp.where(base.support, log_p, -jnp.inf)


def optimal_policy(instance: Instance) -> Float[Array, " outputs *tile"]:
    """Return log p*, the optimum of eq. (1): p* ∝ p_ref e^{r/β}.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        Log-probabilities (nats), [outputs] or [instances, outputs]; `-inf` exactly outside the
        support of p_ref.

    Numerics:
        Never formed as r/β - log Z: where these are large, a log-softmax about E_{p*}[r] keeps the
        likely outputs exact. Finite on the whole support, even where a probability underflows.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsim import Instance, optimal_policy
        >>> instance = Instance.from_probs([.5, .5], [.5, .5], [0., jnp.log(3.)], .5, 1.)
        >>> print(jnp.exp(optimal_policy(instance)))
        [0.25 0.75]
    """
    x = tilt(center(instance), instance.beta)
    return log_optimum(x, optimum(x))


def mixture_weights(instance: Instance) -> MixtureWeights:
    """Return Lemma 1's weights, log α_A(y) and log α_U(y), of p* = α_A(y) p_A + α_U(y) p_U.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        `MixtureWeights`, in logs, `-inf` outside the support. A weight may exceed one (its log be
        positive): only its product with the component is a probability.

    Example:
        >>> from jaxsim import Instance, mixture_weights
        >>> instance = Instance.from_probs([.5, .5], [.5, .5], [2., 2.], .25, 1.)
        >>> print(jnp.exp(mixture_weights(instance).aligned))
        [0.25 0.25]
    """
    x = tilt(center(instance), instance.beta)
    log_ratio = jnp.where(x.base.support, _log_ratio(x, optimum(x)), -jnp.inf)
    return MixtureWeights(
        aligned=x.base.log_alpha + log_ratio, unaligned=x.base.log_not_alpha + log_ratio
    )


def _log_ratio(x: Tilt, best: Optimum) -> Float[Array, " outputs *tile"]:
    """Return log p*/p_ref, accurate on every output, likely or not.

    Relative to the mode it would carry the rounding error of the mode's own t, which may be large
    although the mode holds little of p*. Tilted about E_{p*}[r] instead, no likely t is large.
    """
    mean = lax.stop_gradient(best.expected_reward)
    about = jnp.where(x.base.support, x.base.reward - mean, 0.0)
    wide = tilt(replace(x.base, above_center=about), x.beta[0])
    return jnp.where(x.narrow, best.log_ratio, wide.t - wide.log_z_centered)


def objective(
    log_policy: Float[Array, " outputs *tile"], instance: Instance
) -> Float[Array, " *tile"]:
    """Return eq. (1) for any policy: L(π) = E_π[r] - β KL(π‖p_ref).

    Args:
        log_policy: log π (nats), normalised, [outputs] or [instances, outputs].
        instance: one instance, or a batch with one leading axis.

    Returns:
        L(π) in units of reward; `-inf` where π has mass outside the support of p_ref. Always
        L(π) = β log Z - β KL(π‖p*).

    Numerics:
        π is divided by its sum, and the KL taken in Bregman form (`kl_divergence`), so that an
        error ε in the normalisation of π enters only as β ε²: within 8u(κ + |L|), also as β → ∞.
    """
    return objective_at(center(instance), instance.beta[None], log_policy)[0]


def objective_at(
    base: Centered, beta: Float[Array, " 1 *tile"], log_policy: Float[Array, " outputs *tile"]
) -> Float[Array, " 1 *tile"]:
    """Return eq. (1) for a policy, on an instance already centered."""
    used = log_policy > LOG_ZERO
    inside = used & base.support
    log_pi = jnp.where(inside, log_policy, 0.0)
    log_ratio = jnp.where(inside, log_pi - jnp.where(inside, log_reference(base), 0.0), LOG_ZERO)
    policy = jnp.where(inside, jnp.exp(log_pi), 0.0)
    terms = bregman_kl_term(log_ratio, policy, base.p_ref)
    kl = total(jnp.where(base.support, terms, 0.0))
    # Divided by the sum of π, which rounding keeps from being one: else that error is multiplied by
    # the size of the reward.
    gain = (total(policy * base.above_center) - beta * kl) / total(policy)
    return jnp.where(any_output(used & ~base.support), -jnp.inf, base.center + gain)


def log_optimum(x: Tilt, best: Optimum) -> Float[Array, " outputs *tile"]:
    """Return log p*, on an instance already tilted."""
    base, log_ref = x.base, log_reference(x.base)
    t = jnp.where(base.support, base.reward - best.expected_reward, 0.0) / x.beta
    exponent, rounding = two_sum(finite_log(log_ref), t)
    peak = lax.stop_gradient(jnp.max(exponent, axis=0, keepdims=True))
    above = jnp.where(base.support, (exponent - peak) + rounding, LOG_ZERO)
    wide = above - jnp.log(total(jnp.exp(above)))
    return jnp.where(base.support, jnp.where(x.narrow, log_ref + best.log_ratio, wide), -jnp.inf)


def tpm(log_policy: Float[Array, " outputs *tile"], instance: Instance) -> Float[Array, " *tile"]:
    """Return the total probability mass that any policy π owes to A: E_π[α p_A / p_ref].

    For π = p* this is Theorem 2's TPM(A); for π = p_ref it is α.

    Args:
        log_policy: log π (nats), normalised, [outputs] or [instances, outputs].
        instance: one instance, or a batch with one leading axis.

    Returns:
        A probability. The mass of U is one minus it. Mass of π outside the support of p_ref
        belongs to neither component and counts as zero.
    """
    base = center(instance)
    log_total_ratio = jnp.log(base.aligned.total / base.unaligned.total)
    log_odds = base.logit_alpha + (base.aligned.log_p - base.unaligned.log_p) - log_total_ratio
    share = jax.nn.sigmoid(jnp.where(base.support, log_odds, 0.0))
    policy = jnp.exp(finite_log(log_policy))
    return total(jnp.where(base.support, policy * share, 0.0))[0]
