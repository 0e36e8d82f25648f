"""Eq. (1) optimised by descent alone: an optax loop on the logits that never sees the closed form.

Functions of one instance, or of a tile with outputs on the first axis; `jaxsim.engine.loop` drives
them. The loop stops by a certificate that needs no p*: with h = r/β - log(π/p_ref) and
X = h - E_π[h], KL(π‖p*) = log E_π[e^X] exactly, since p* ∝ π e^h.
"""

import enum
import math
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int8, Int32

from jaxsim.instance import Instance
from jaxsim.logspace import (
    LOG_ZERO,
    AnyArray,
    finite_log,
    first_where,
    kl_over_outputs,
    total,
)
from jaxsim.tilting import center, log_optimum, log_reference, optimum, tilt


class Status(enum.IntEnum):
    """How a solve ended."""

    CONVERGED = 0
    OUT_OF_STEPS = 1
    STUCK = 2
    NON_FINITE = 3
    CONVERGED_IN_LOG_SPACE = 4

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "KL(policy‖p*) is within the tolerance.",
    Status.OUT_OF_STEPS: "The steps ran out before the tolerance was met.",
    Status.STUCK: "The gradient is exactly zero away from the optimum: probabilities underflow.",
    Status.NON_FINITE: "A logit or the gradient became infinite or nan.",
    Status.CONVERGED_IN_LOG_SPACE: "KL(policy‖p*) is within the tolerance, but the gradient of "
    "eq. (1) stalled: damped natural-gradient steps in log space finished the descent.",
}
_RUNNING = -1  # a status inside the loop only

# A descent by the default optimiser goes on in log space where it has not got closer for so many
# steps, or has but so many left of at least ten times as many.
_PATIENCE = 64
_RESERVE = 64


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

    @property
    def converged(self) -> Bool[AnyArray, "..."]:
        """Whether KL(π‖p*) is certified to be within the tolerance, by whatever steps."""
        return (self.status == Status.CONVERGED) | (self.status == Status.CONVERGED_IN_LOG_SPACE)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Problem:
    """What descent may see of an instance: the reference, the scaled rewards and β, not p*."""

    log_p_ref: Array  # zero mass made finite
    # (r - max r)/β. Eq. (1) does not mind the constant, and near the optimum, where the advantages
    # all but vanish, h is then no larger than the log of the best output's mass.
    t: Array
    beta: Array

    @property
    def support(self) -> Array:
        """Where p_ref has mass."""
        return self.log_p_ref > LOG_ZERO


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a descent that has ended leaves."""

    logits: Array
    steps: Array
    status: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """A descent under way."""

    logits: Array
    optimizer_state: Any
    steps: Array
    status: Array
    kl: Array  # KL(π‖p*) by the certificate that needs no p*, at the last step that was looked at
    least: Array  # loss so far
    since_least: Array  # steps
    in_log_space: Array

    @property
    def ended(self) -> Ended:
        """What it would leave if it ended here."""
        return Ended(logits=self.logits, steps=self.steps, status=self.status)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to descend.

    Attributes:
        optimizer: any of optax's.
        max_steps: at most so many.
        log_space: whether a descent that stalls goes on by natural-gradient steps of ½/β in log
            space, which the underflow of a probability does not stop.
        start: one of `STARTS`, or "given".
    """

    optimizer: optax.GradientTransformation
    max_steps: int
    log_space: bool
    start: str


def default_optimizer() -> optax.GradientTransformation:
    """Return the default: resilient backpropagation (Riedmiller and Braun 1993) on the logits.

    The gradient of eq. (1) in a logit is proportional to that output's probability, so that any
    step proportional to it starves rare outputs. Rprop uses its sign alone, with a step per output
    that grows while the sign stays and halves when it flips; the step after a flip is left out
    (iRprop⁻, Igel and Hüsken 2000). Not `optax.rprop`, which up to 0.2.8 at least lags by one step.
    """
    # Longer steps may overshoot to where rounding gives the gradient its sign.
    first, least, most = 0.1, 1e-9, 2.0

    def init(params: optax.Params) -> tuple[optax.Params, optax.Params]:
        size = jax.tree.map(lambda x: jnp.full_like(x, first), params)
        return size, jax.tree.map(jnp.zeros_like, params)

    def resized(gradient: Array, size: Array, direction: Array) -> Array:
        agreed = jnp.sign(gradient) * direction
        factor = jnp.where(agreed > 0, 1.2, jnp.where(agreed < 0, 0.5, 1.0))
        return jnp.clip(size * factor, least, most)

    def turned(gradient: Array, direction: Array) -> Array:
        sign = jnp.sign(gradient)
        return jnp.where(sign * direction < 0, 0.0, sign)

    def update(
        updates: optax.Updates, state: tuple[optax.Params, optax.Params], params: Any = None
    ) -> tuple[optax.Updates, tuple[optax.Params, optax.Params]]:
        size, direction = state
        size = jax.tree.map(resized, updates, size, direction)
        direction = jax.tree.map(turned, updates, direction)
        return jax.tree.map(lambda s, d: -s * d, size, direction), (size, direction)

    return optax.GradientTransformation(init, update)


def natural_gradient(
    step: float, *, per_beta: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Return natural-gradient steps for a softmax policy (mirror descent), as an optax optimiser.

    The Fisher metric of π = softmax(θ) is diag(π) - ππᵀ; g/π solves it, since the gradient g sums
    to zero. On eq. (1) log(π/p*) shrinks by 1 - step·β each time: any 0 < step·β < 2 converges, and
    step = 1/β reaches p* at once. That is the closed form in disguise.

    Args:
        step: the step in 1/reward, for the gradient of -L(π); `solve`, which descends on -L(π)/β,
            passes it β. With `per_beta`, a multiple of each instance's 1/β.
        per_beta: for use with `solve` alone.

    Returns:
        A transformation whose `update` needs the params (logits, outputs on the first axis).

    Raises:
        ValueError: for a step that is not a positive number.

    Example:
        >>> from jaxsim import Instance, natural_gradient, solve
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 2.)
        >>> int(solve(instance, optimizer=natural_gradient(1 / 2.)).steps)
        1
    """
    if not step > 0:
        raise ValueError(f"step is {step}; expected a number > 0")

    def update(
        updates: Any, state: optax.OptState, params: Any = None, *, beta: Any = None, **_: Any
    ) -> tuple[Any, optax.OptState]:
        if params is None:
            raise ValueError("natural_gradient: update needs the params, the policy's logits")
        scale = step if per_beta or beta is None else step * beta

        def precondition(gradient: Array, logits: Array) -> Array:
            policy = jax.nn.softmax(logits, axis=0)
            seen = policy > 0
            return jnp.where(seen, -scale * gradient / jnp.where(seen, policy, 1.0), 0.0)

        return jax.tree.map(precondition, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def optimizers(max_steps: int) -> dict[str, optax.GradientTransformation | None]:
    """Return optimisers to compare, by name: None for the default, with its steps in log space.

    Args:
        max_steps: over which schedules run out.
    """
    return {
        "default": None,
        "sgd": optax.sgd(1.0),
        "momentum": optax.sgd(1.0, momentum=0.9, nesterov=True),
        "adam": optax.adam(0.1),
        "adam_cosine": optax.adam(optax.cosine_decay_schedule(0.3, max_steps)),
        "lbfgs": optax.lbfgs(),
        "natural_half": natural_gradient(0.5, per_beta=True),
        "natural": natural_gradient(1.0, per_beta=True),
    }


def problem(instance: Instance) -> Problem:
    """Return what descent may see."""
    base = center(instance)
    top = jnp.max(jnp.where(base.support, base.reward, -jnp.inf), axis=0, keepdims=True)
    return Problem(
        log_p_ref=finite_log(log_reference(base)),
        t=jnp.where(base.support, base.reward - top, 0.0) / instance.beta[None],
        beta=instance.beta,
    )


STARTS = "reference", "uniform", "worst"


def starting_logits(start: str, task: Problem) -> Array:
    """Return the logits of one of STARTS.

    The worst has all but e^-14, a millionth, of its mass on an output of the least reward.
    """
    if start == "reference":
        return task.log_p_ref
    if start == "uniform":
        return jnp.where(task.support, jnp.zeros_like(task.t), LOG_ZERO)
    least = jnp.min(jnp.where(task.support, task.t, jnp.inf), axis=0, keepdims=True)
    worst = first_where(task.support & (task.t == least))
    rest = jnp.maximum(task.log_p_ref - 14.0, LOG_ZERO)
    return jnp.where(worst, jnp.zeros_like(rest), rest)


def init(task: Problem, logits: Array, method: Method) -> State:
    """Return a state at some logits, with an optimiser state for each instance."""
    make = method.optimizer.init
    if logits.ndim > 1:
        make = jax.vmap(make, in_axes=-1, out_axes=-1)
    logits = _largest_at_zero(logits, task)
    infinite = jnp.full_like(task.beta, jnp.inf)
    zero = jnp.zeros_like(task.beta, jnp.int32)
    return State(
        logits=logits,
        optimizer_state=make(_shown(logits, task)),
        steps=zero,
        status=jnp.full_like(task.beta, _RUNNING, jnp.int8),
        kl=infinite,
        least=infinite,
        since_least=zero,
        in_log_space=jnp.zeros_like(task.beta, bool),
    )


def loss(logits: Float[Array, " outputs *tile"], task: Problem) -> Float[Array, " *tile"]:
    """Return -(L(π) - max r)/β for π = softmax(logits): eq. (1), in nats."""
    return _loss(_largest_at_zero(logits, task), task)[0]


def _loss(logits: Array, task: Problem) -> tuple[Array, Any]:
    """Return the loss, and what it was added up from: log π, π and h - max r/β.

    Outputs outside the support need no mask: log π and log p_ref are the same there.
    """
    weight = jnp.exp(logits)
    weight_total = jnp.sum(weight, axis=0, keepdims=True)
    log_policy = logits - jnp.log(weight_total)
    policy = _exp(log_policy, lax.stop_gradient(weight / weight_total))
    h = task.t - (log_policy - task.log_p_ref)
    return -total(policy * h)[0], (log_policy, policy, h)


@jax.custom_jvp
def _exp(x: Array, value: Array) -> Array:
    """Return e^x where it is known."""
    return value


@_exp.defjvp
def _exp_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[1], primals[1] * tangents[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class View:
    """What one pass over a policy shows.

    Attributes:
        value: the loss, nats.
        gradient: its gradient in the logits, by `jax.grad`.
        x: h - E_π[h], nats, with h = r/β - log(π/p_ref): what the natural gradient follows.
        kl: KL(π‖p*) = log E_π[e^x]; about 60 stands for anything larger.
    """

    value: Array
    gradient: Array
    x: Array
    kl: Array


def look(logits: Float[Array, " outputs *tile"], task: Problem) -> View:
    """Look at a policy, given by logits of which the largest is 0, and how far the optimum is."""

    def total_loss(logits: Array) -> tuple[Array, Any]:
        value, seen = _loss(logits, task)
        return jnp.sum(value), (value, seen)

    gradient, found = jax.grad(total_loss, has_aux=True)(logits)
    value, (log_policy, policy, h) = lax.stop_gradient(found)
    x = h + value[None]
    return View(value=value, gradient=gradient, x=x, kl=_log_mean_exp(log_policy, policy, x))


def advance(state: State, task: Problem, method: Method, tolerance: Float[Array, ""]) -> State:
    """Look at every descent that has not ended; take one optimiser step unless it ends there."""
    step = optax.with_extra_args_support(method.optimizer)
    view = look(state.logits, task)

    def update(
        gradient: Array, optimizer_state: Any, logits: Array, value: Array, task: Problem
    ) -> tuple[Array, Any]:
        return step.update(
            gradient,
            optimizer_state,
            logits,
            value=value,
            grad=gradient,
            # optax's line search passes what it does not know on to this.
            value_fn=lambda logits, beta=None: loss(
                jnp.where(task.support, logits, LOG_ZERO), task
            ),
            beta=task.beta,
        )

    each = jax.vmap(update, in_axes=-1, out_axes=-1) if state.kl.ndim else update
    updates, optimizer_state = each(
        view.gradient, state.optimizer_state, _shown(state.logits, task), view.value, task
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, state.logits)
    closer = view.value < state.least
    since_least = jnp.where(closer, 0, state.since_least + 1)
    in_log_space, flat = state.in_log_space, jnp.asarray(False)
    if method.log_space:
        in_log_space |= since_least >= _PATIENCE
        if method.max_steps >= 10 * _RESERVE:
            in_log_space |= state.steps >= method.max_steps - _RESERVE
        updates = jnp.where(in_log_space[None], 0.5 * view.x, updates)
    else:
        # A sum of sizes is zero just where all are, and plain sums are fast.
        flat = jnp.sum(jnp.abs(view.gradient), axis=0) == 0
    logits = _largest_at_zero(state.logits + updates, task)
    # A sum is finite just where all terms are.
    finite = jnp.isfinite(view.kl + jnp.sum(logits, axis=0))
    done = jnp.where(state.in_log_space, int(Status.CONVERGED_IN_LOG_SPACE), int(Status.CONVERGED))
    status = jnp.where(flat, int(Status.STUCK), _RUNNING)
    status = jnp.where(state.steps >= method.max_steps, int(Status.OUT_OF_STEPS), status)
    status = jnp.where(finite, status, int(Status.NON_FINITE))
    status = jnp.where(view.kl <= tolerance, done, status).astype(jnp.int8)
    at_work = running(state)
    moves = at_work & (status == _RUNNING)

    def now(new: Array, old: Array) -> Array:
        return jnp.where(at_work, new, old)

    return State(
        logits=jnp.where(moves, logits, state.logits),
        optimizer_state=optimizer_state,  # of no use once a descent has ended
        steps=state.steps + moves,
        status=now(status, state.status),
        kl=now(view.kl, state.kl),
        least=now(jnp.where(closer, view.value, state.least), state.least),
        since_least=now(since_least, state.since_least),
        in_log_space=now(in_log_space, state.in_log_space),
    )


def _shown(logits: Array, task: Problem) -> Array:
    """Return the logits as an optimiser sees them: padding weighs nothing in a norm."""
    return jnp.where(task.support, logits, 0.0)


def _largest_at_zero(logits: Array, task: Problem) -> Array:
    """Shift logits, which softmax does not mind: what lies near zero is precise."""
    return jnp.where(task.support, logits - jnp.max(logits, axis=0, keepdims=True), LOG_ZERO)


def running(state: State) -> Array:
    """Whether a descent has still to go on."""
    return state.status == _RUNNING


def certificate(ended: Ended, instance: Instance, tolerance: Float[Array, ""]) -> Solution:
    """Compare with the closed form, for the first time: nothing is called converged that is not.

    The policy's derivative is that of the optimum by the implicit function theorem: where
    r/β - log(π/p_ref) is constant, log π moves as log p_ref + r/β does, up to normalisation.
    """
    base = center(instance)
    x = tilt(base, instance.beta)
    moving = jnp.where(base.support, finite_log(log_reference(base)) + x.t, 0.0)
    log_policy = jax.nn.log_softmax(
        lax.stop_gradient(ended.logits) + (moving - lax.stop_gradient(moving)), axis=0
    )
    log_policy = jnp.where(base.support, log_policy, -jnp.inf)
    kl = kl_over_outputs(log_policy, log_optimum(x, optimum(x)))
    solution = Solution(
        log_policy=log_policy,
        gap=instance.beta * kl,
        kl=kl,
        steps=ended.steps,
        status=ended.status,
    )
    refuted = solution.converged & ~(kl <= tolerance)
    status = jnp.where(refuted, int(Status.OUT_OF_STEPS), ended.status)
    return replace(solution, status=status.astype(jnp.int8))


def _log_mean_exp(log_policy: Array, policy: Array, x: Array) -> Array:
    """Return log E_π[e^x] for E_π[x] = 0, accurate to second order as it goes to zero.

    As log1p of E[e^x - 1 - x], whose terms are never negative: for small x by their series. Far
    from zero, where e^x may overflow, it is cut off: about 60 stands for anything larger.
    """
    far = jnp.exp(jnp.minimum(log_policy + x, 60.0)) - policy * (1 + x)
    series = jnp.zeros_like(x)
    for k in range(7 if x.dtype.itemsize == 4 else 12, 1, -1):  # to a part in 10^6, or 10^12
        series = series * x + 1 / math.factorial(k)
    terms = jnp.where(jnp.abs(x) < 0.25, policy * x * x * series, far)
    return jnp.log1p(total(terms))[0]
