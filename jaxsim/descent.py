"""Eq. (1) optimised by descent alone: an optax loop on the logits that never sees the closed form.

Functions of one instance, or of a tile with outputs on the first axis; `jaxsim.engine.loop` drives
them. The loop stops by a certificate that needs no p*: with h = r/β - log(π/p_ref) and
X = h - E_π[h], KL(π‖p*) = log E_π[e^X] exactly, since p* ∝ π e^h.
"""

import enum
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from jaxsim.instance import Instance
from jaxsim.logspace import LOG_ZERO, AnyArray, bregman_kl_term, finite_log, kl_over_outputs, total
from jaxsim.tilting import center, log_optimum, log_reference, optimum, tilt


class Status(enum.IntEnum):
    """How a solve ended."""

    CONVERGED = 0
    OUT_OF_STEPS = 1
    STUCK = 2
    NON_FINITE = 3

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "KL(policy‖p*) is within the tolerance.",
    Status.OUT_OF_STEPS: "The steps ran out before the tolerance was met.",
    Status.STUCK: "The gradient is exactly zero away from the optimum: probabilities underflow.",
    Status.NON_FINITE: "A logit or the gradient became infinite or nan.",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Solution:
    """Where descent on eq. (1) ended, for one instance or a batch.

    Attributes:
        log_policy: log π, nats, [outputs] or [instances, outputs]; `-inf` outside the support.
        gap: L(p*) - L(π) = β KL(π‖p*), in units of reward.
        kl: KL(π‖p*), nats: the certificate, from the closed form.
        steps: optimiser steps taken.
        status: `Status` as int8.
    """

    log_policy: Float[AnyArray, "..."]
    gap: Float[AnyArray, "..."]
    kl: Float[AnyArray, "..."]
    steps: Int32[AnyArray, "..."]
    status: Int8[AnyArray, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Problem:
    """What descent may see of an instance: the reference and the scaled rewards, not p*."""

    log_p_ref: Array  # zero mass made finite
    t: Array  # (r - E_ref[r])/β
    support: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """A descent under way."""

    logits: Array
    optimizer_state: Any
    steps: Array
    status: Array
    kl: Array  # KL(π‖p*) by the certificate that needs no p*


def default_optimizer() -> optax.GradientTransformation:
    """Return the default: resilient backpropagation (Riedmiller and Braun 1993) on the logits.

    The gradient of eq. (1) in a logit is proportional to that output's probability, so that any
    step proportional to it starves rare outputs. Rprop uses its sign alone, with a step per output
    that grows while the sign stays and halves when it flips.
    """
    # Longer steps may overshoot to where rounding gives the gradient its sign.
    return optax.rprop(0.1, min_step_size=1e-9, max_step_size=2.0)


def problem(instance: Instance) -> Problem:
    """Return what descent may see."""
    base = center(instance)
    return Problem(
        log_p_ref=finite_log(log_reference(base)),
        t=base.above_center / instance.beta[None],
        support=base.support,
    )


def init(
    task: Problem, optimizer: optax.GradientTransformation, tolerance: Float[Array, ""]
) -> State:
    """Return the start, π = p_ref, with an optimiser state for each instance."""
    make = jax.vmap(optimizer.init, in_axes=-1, out_axes=-1)
    kl = _kl_without_optimum(task.log_p_ref, task)
    status = jnp.where(kl <= tolerance, Status.CONVERGED, Status.OUT_OF_STEPS)
    return State(
        logits=task.log_p_ref,
        optimizer_state=(make if kl.ndim else optimizer.init)(task.log_p_ref),
        steps=jnp.zeros_like(kl, jnp.int32),
        status=status.astype(jnp.int8),
        kl=kl,
    )


def loss(logits: Float[Array, " outputs *tile"], task: Problem) -> Float[Array, " *tile"]:
    """Return -(L(π) - E_ref[r])/β for π = softmax(logits): eq. (1), in nats."""
    log_policy = jax.nn.log_softmax(logits, axis=0)
    advantage = jnp.where(task.support, task.t - (log_policy - task.log_p_ref), 0.0)
    return -total(jnp.exp(log_policy) * advantage)[0]


def advance(
    state: State,
    task: Problem,
    optimizer: optax.GradientTransformation,
    tolerance: Float[Array, ""],
) -> State:
    """Take one optimiser step on every instance whose descent has not ended."""
    step = optax.with_extra_args_support(optimizer)

    def total_loss(logits: Array) -> tuple[Array, Array]:
        values = loss(logits, task)
        return jnp.sum(values), values

    (_, value), gradient = jax.value_and_grad(total_loss, has_aux=True)(state.logits)

    def update(
        gradient: Array, optimizer_state: Any, logits: Array, value: Array, task: Problem
    ) -> tuple[Array, Any]:
        return step.update(
            gradient,
            optimizer_state,
            logits,
            value=value,
            grad=gradient,
            value_fn=lambda logits: loss(logits, task),
        )

    each = jax.vmap(update, in_axes=-1, out_axes=-1) if state.kl.ndim else update
    updates, optimizer_state = each(gradient, state.optimizer_state, state.logits, value, task)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, state.logits)
    # Softmax ignores a common shift: keeping the largest logit at zero keeps the others precise.
    logits = state.logits + updates
    logits = jnp.where(task.support, logits - jnp.max(logits, axis=0, keepdims=True), LOG_ZERO)
    # Sums are finite just where all terms are, and plain reductions are fast.
    finite = jnp.isfinite(jnp.sum(logits, axis=0) + jnp.sum(gradient, axis=0))
    kl = _kl_without_optimum(logits, task)
    flat = jnp.max(jnp.abs(gradient), axis=0) == 0
    status = jnp.where(flat, Status.STUCK, Status.OUT_OF_STEPS)
    status = jnp.where(kl <= tolerance, Status.CONVERGED, status)
    stepped = State(
        logits=jnp.where(finite, logits, state.logits),
        optimizer_state=optimizer_state,
        steps=state.steps + 1,
        status=jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int8),
        kl=jnp.where(finite, kl, state.kl),
    )
    return jax.tree.map(lambda new, old: jnp.where(running(state), new, old), stepped, state)


def running(state: State) -> Array:
    """Whether a descent has still to go on."""
    return state.status == Status.OUT_OF_STEPS


def certificate(state: State, instance: Instance, tolerance: Float[Array, ""]) -> Solution:
    """Compare with the closed form, for the first time: nothing is called converged that is not.

    The policy's derivative is that of the optimum by the implicit function theorem: where
    r/β - log(π/p_ref) is constant, log π moves as log p_ref + r/β does, up to normalisation.
    """
    base = center(instance)
    x = tilt(base, instance.beta)
    moving = jnp.where(base.support, finite_log(log_reference(base)) + x.t, 0.0)
    log_policy = jax.nn.log_softmax(
        lax.stop_gradient(state.logits) + (moving - lax.stop_gradient(moving)), axis=0
    )
    log_policy = jnp.where(base.support, log_policy, -jnp.inf)
    kl = kl_over_outputs(log_policy, log_optimum(x, optimum(x)))
    refuted = (state.status == Status.CONVERGED) & ~(kl <= tolerance)
    return Solution(
        log_policy=log_policy,
        gap=instance.beta * kl,
        kl=kl,
        steps=state.steps,
        status=jnp.where(refuted, Status.OUT_OF_STEPS, state.status).astype(jnp.int8),
    )


def _kl_without_optimum(logits: Float[Array, " outputs *tile"], task: Problem) -> Array:
    """Return KL(softmax(logits)‖p*) = log E_π[e^X], accurate to second order as it goes to zero.

    E[X] = 0, so E[e^X] = 1 + E[e^X - 1 - X]: a sum of Bregman terms, none of them negative.
    Infinite where e^X overflows, far from the optimum.
    """
    log_policy = jax.nn.log_softmax(logits, axis=0)
    policy = jnp.exp(log_policy)
    advantage = jnp.where(task.support, task.t - (log_policy - task.log_p_ref), 0.0)
    x = jnp.where(task.support, advantage - total(policy * advantage), 0.0)
    return jnp.log1p(total(bregman_kl_term(-x, policy, jnp.exp(log_policy + x)))[0])
