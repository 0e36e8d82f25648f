"""One instance at many values of β, and from that at any α: a sweep over α costs nothing.

Everything that eq. (1)'s optimum does is read off the two components' cumulant generating functions
of the reward, K_A(s) = log E_A[e^{s r}] and K_U(s), at s = 1/β; α only mixes them.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxsim.instance import Instance
from jaxsim.logspace import AnyArray, bregman_kl_term, total
from jaxsim.tilting import (
    Centered,
    Component,
    Evaluation,
    TiltedComponent,
    center,
    tilt,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Both components under the tilt e^{r/β} at every β; fields are [betas] or [instances, betas].

    Attributes:
        betas: the values of β, [betas].
        cumulant_aligned: K_A(1/β) = log E_A[e^{r/β}].
        cumulant_unaligned: K_U(1/β).
        log_odds_shift: Δ = K_A - K_U, not formed as that difference.
        kl_aligned: KL(p_{A,β}‖p_A) of the tilted component p_{A,β} ∝ p_A e^{r/β}, nats.
        kl_unaligned: KL(p_{U,β}‖p_U).
        mean_aligned: E[r] under p_{A,β}, in units of reward.
        mean_unaligned: E[r] under p_{U,β}.
    """

    betas: Float[AnyArray, " betas"]
    cumulant_aligned: Float[AnyArray, "..."]
    cumulant_unaligned: Float[AnyArray, "..."]
    log_odds_shift: Float[AnyArray, "..."]
    kl_aligned: Float[AnyArray, "..."]
    kl_unaligned: Float[AnyArray, "..."]
    mean_aligned: Float[AnyArray, "..."]
    mean_unaligned: Float[AnyArray, "..."]

    def at(self, logit_alpha: ArrayLike) -> Evaluation:
        """Return all fields of `evaluate` at any α, with no further exponentials of rewards.

        Args:
            logit_alpha: log α/(1-α); it broadcasts against [betas] or [instances, betas], so that
                `logit_alpha[:, None]` gives each instance its own and `logit_alpha[:, None, None]`
                adds a leading axis of α.

        Example:
            >>> import jax.numpy as jnp
            >>> from jaxsim import Instance, evaluate_grid
            >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
            >>> grid = evaluate_grid(instance, [1.0, 2.0])
            >>> alpha = jnp.array([0.1, 0.5, 0.9])
            >>> grid.at(jnp.log(alpha / (1 - alpha))[:, None]).log_tpm_aligned.shape
            (3, 2)
        """
        return _at(self, jnp.asarray(logit_alpha))


@jax.jit
def _at(grid: Grid, logit_alpha: Array) -> Evaluation:
    shape = jnp.broadcast_shapes(jnp.shape(logit_alpha), grid.log_odds_shift.shape)
    logit = jnp.broadcast_to(jnp.asarray(logit_alpha, grid.log_odds_shift.dtype), shape)
    k_a, k_u, shift, kl_a, kl_u, mean_a, mean_u, beta = (
        jnp.broadcast_to(x, shape)
        for x in (
            grid.cumulant_aligned,
            grid.cumulant_unaligned,
            grid.log_odds_shift,
            grid.kl_aligned,
            grid.kl_unaligned,
            grid.mean_aligned,
            grid.mean_unaligned,
            grid.betas,
        )
    )
    log_alpha, log_not_alpha = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    log_tpm_a, log_tpm_u = jax.nn.log_sigmoid(logit + shift), jax.nn.log_sigmoid(-logit - shift)
    tpm_a, tpm_u = jnp.exp(log_tpm_a), jnp.exp(log_tpm_u)
    above_a = _log_mean_exp(log_not_alpha, log_alpha, -shift)  # log Z - K_A
    above_u = _log_mean_exp(log_alpha, log_not_alpha, shift)
    # p* and p_ref as laws of the output and of the component it is from: the chain rule of KL.
    chosen = bregman_kl_term(-above_a, tpm_a, jax.nn.sigmoid(logit))
    chosen += bregman_kl_term(-above_u, tpm_u, jax.nn.sigmoid(-logit))
    log_z = jnp.where(jnp.abs(k_u) < jnp.abs(k_a), k_u + above_u, k_a + above_a)
    return Evaluation(
        log_z=log_z,
        log_tpm_aligned=log_tpm_a,
        log_tpm_unaligned=log_tpm_u,
        log_odds_shift=shift,
        kl=tpm_a * kl_a + tpm_u * kl_u + chosen,
        expected_reward=tpm_a * mean_a + tpm_u * mean_u,
        objective=beta * log_z,
    )


def _log_mean_exp(log_weight: Array, log_rest: Array, x: Array) -> Array:
    """Return log(w e^x + 1 - w), accurate relative to |x| where that is small."""
    small = jnp.abs(x) < 0.5
    near = jnp.log1p(jnp.exp(log_weight) * jnp.expm1(jnp.where(small, x, 0.0)))
    return jnp.where(small, near, jnp.logaddexp(log_weight + x, log_rest))


# Where all rewards of a tile span from 1 to _REACH β, both components share the exponential of
# t = (r - m)/β. If both means of it are at least _LEAST, what underflows is below e^-47 of a mean.
_REACH, _LEAST = 80.0, math.exp(-40)


def evaluate_grid(instance: Instance, *, betas: Array) -> Grid:
    """Return the `Grid` of one instance, or of a tile of them: fields [betas, *tile]."""
    base = center(instance)

    def at(beta: Array) -> tuple[Array, ...]:
        own = jnp.broadcast_to(beta, instance.beta.shape)
        between = (base.span >= beta) & (base.span < _REACH * beta)
        return lax.cond(jnp.all(between), _shared, _separate, base, own)

    k_a, k_u, shift, kl_a, kl_u, mean_a, mean_u = lax.map(at, betas)
    return Grid(
        betas=jnp.broadcast_to(
            betas.reshape((-1,) + (1,) * instance.beta.ndim), (len(betas), *instance.beta.shape)
        ),
        cumulant_aligned=k_a,
        cumulant_unaligned=k_u,
        log_odds_shift=shift,
        kl_aligned=kl_a,
        kl_unaligned=kl_u,
        mean_aligned=mean_a,
        mean_unaligned=mean_u,
    )


def _separate(base: Centered, beta: Array) -> tuple[Array, ...]:
    """Return a grid's numbers at one β, each component about its own largest term."""
    x = tilt(base, beta)

    def component(tilted: TiltedComponent, p: Array) -> tuple[Array, Array, Array]:
        terms = bregman_kl_term(x.t - tilted.cumulant, tilted.p, p)
        mean_t = total(tilted.p * x.t)
        wide = jnp.maximum(mean_t - tilted.cumulant, 0.0)
        kl = jnp.where(x.narrow, total(jnp.where(base.support, terms, 0.0)), wide)
        return tilted.cumulant, kl, mean_t

    aligned = component(x.aligned, base.aligned.p)
    unaligned = component(x.unaligned, base.unaligned.p)
    return _numbers(base, x.beta, x.log_odds_shift, aligned, unaligned)


def _shared(base: Centered, beta: Array) -> tuple[Array, ...]:
    """Return the same from one exponential per output for both components, if that is safe."""
    t = base.above_center / beta[None]
    weight = jnp.exp(t)

    def component(part: Component) -> tuple[Array, tuple[Array, Array, Array]]:
        mean_weight = total(part.p * weight)
        cumulant, mean_t = jnp.log(mean_weight), total(part.p * weight * t) / mean_weight
        return mean_weight, (cumulant, jnp.maximum(mean_t - cumulant, 0.0), mean_t)

    weight_a, aligned = component(base.aligned)
    weight_u, unaligned = component(base.unaligned)
    numbers = _numbers(base, beta[None], jnp.log(weight_a / weight_u), aligned, unaligned)
    safe = jnp.all(jnp.minimum(weight_a, weight_u) > _LEAST)
    return lax.cond(safe, lambda: numbers, lambda: _separate(base, beta))


def _numbers(
    base: Centered,
    beta: Array,
    shift: Array,
    aligned: tuple[Array, Array, Array],
    unaligned: tuple[Array, Array, Array],
) -> tuple[Array, ...]:
    """Return the fields of a `Grid` at one β from log E[e^t], KL and E[t] of both components."""

    def uncentered(cumulant: Array, kl: Array, mean_t: Array) -> tuple[Array, Array, Array]:
        return base.center / beta + cumulant, kl, base.center + beta * mean_t

    k_a, kl_a, mean_a = uncentered(*aligned)
    k_u, kl_u, mean_u = uncentered(*unaligned)
    return tuple(x[0] for x in (k_a, k_u, shift, kl_a, kl_u, mean_a, mean_u))
