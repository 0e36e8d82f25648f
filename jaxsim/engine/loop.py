"""Drive the descent of `jaxsim.descent` over one instance or millions, and record its course.

A batch is cut into slabs. Within a slab a fixed number of lanes descend side by side, in arrays
that fit a core's cache; a lane whose descent has ended hands over its policy and takes the next
instance of the slab. What a lane computes does not depend on its neighbours, and all that rounds is
compiled for arrays of as many instances as there are lanes, however large the slab.
"""

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxsim import descent
from jaxsim.engine.mesh import on_each_device
from jaxsim.instance import Instance
from jaxsim.logspace import finite_log, total, unit_roundoff
from jaxsim.sources import block_size
from jaxsim.tilting import center, tilt

_SLAB = 16  # instances per lane, in a full slab
_REFILL = 8  # one lane in so many has to wait before the waiting ones are refilled
_WIDER = 64  # a GPU or TPU descends on so many times as many lanes as a core, whose cache is small
_CAUTION = 0.9  # of the tolerance: lest rounding have the closed form refute the stopping rule
DEFAULT_OPTIMIZER = descent.default_optimizer()  # one object, so that compiled loops are reused


def solve(
    instance: Instance,
    *,
    optimizer: optax.GradientTransformation | None = None,
    max_steps: int = 1000,
    tolerance: float | None = None,
    start: str | ArrayLike = "reference",
) -> descent.Solution:
    """Optimise eq. (1) by gradient descent on the logits, without the closed form.

    Args:
        instance: one instance, or a batch with one leading axis.
        optimizer: any `optax.GradientTransformation`, also `optax.lbfgs()`. It descends on
            -L(π)/β, in nats. By default Rprop, which goes on by natural-gradient steps in log
            space where the gradient underflows or stalls; the status says where it did.
        max_steps: at most so many steps per instance.
        tolerance: stop once KL(π‖p*) ≤ tolerance, nats, by a certificate that does not need p*;
            by default 1e-6 in float32 and 1e-12 in float64.
        start: the first policy: "reference" (p_ref), "uniform" (on its support), "worst" (nearly
            all mass on an output of the least reward), or logits shaped as the rewards, finite on
            the support; outside it they are ignored.

    Returns:
        A `Solution`; its `status` says, per instance, how it ended. An instance that does not
        converge raises nothing. Differentiable: the derivative of `log_policy` is that of the
        optimum, by the implicit function theorem. Bits do not depend on how a batch is divided, on
        the number of devices, or on the order in which instances are finished (one instance alone,
        jit and vmap compile other programs, which may differ in the last bits).

    Raises:
        TypeError: for an instance or an optimizer that is none.
        ValueError: for max_steps < 1, a tolerance that is not positive, an empty batch, or a start
            of an unknown name or of another shape. A start or an instance that holds nan is no
            error: its status is NON_FINITE.

    Example:
        >>> from jaxsim import Instance, Status, solve
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> solution = solve(instance)
        >>> Status(int(solution.status)).name, bool(solution.kl < 1e-6)
        ('CONVERGED', True)
    """
    if not isinstance(instance, Instance):
        raise TypeError(f"solve: expected an Instance, got {type(instance).__name__}")
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer is {optimizer!r}; expected an optax.GradientTransformation")
    if instance.reward.ndim not in (1, 2) or not instance.reward.size:
        raise ValueError(
            f"solve: reward has shape {instance.reward.shape}; expected [outputs] or "
            "[instances, outputs], with at least one of each"
        )
    if operator.index(max_steps) < 1:
        raise ValueError(f"max_steps is {max_steps}; expected at least 1")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; expected a number > 0")
    dtype = instance.reward.dtype
    target = jnp.asarray(tolerance or default_tolerance(dtype), dtype)
    name, logits = _start(start, instance)
    method = _method(optimizer, max_steps, name)
    if instance.reward.ndim == 1:
        return _solve_one(method, (instance, logits), target)
    return _solve_batch(method, instance, logits, target)


def default_tolerance(dtype: jnp.dtype) -> float:
    """Return the KL, in nats, at which `solve` stops unless told otherwise."""
    return 1e-6 if jnp.finfo(dtype).bits <= 32 else 1e-12


def _method(
    optimizer: optax.GradientTransformation | None, max_steps: int, start: str
) -> descent.Method:
    return descent.Method(
        optimizer=DEFAULT_OPTIMIZER if optimizer is None else optimizer,
        max_steps=max_steps,
        log_space=optimizer is None,
        start=start,
    )


def _start(start: str | ArrayLike, instance: Instance) -> tuple[str, Array | None]:
    """Return a start's name, and its logits where these are given."""
    if isinstance(start, str):
        if start not in descent.STARTS:
            raise ValueError(
                f"start is {start!r}; expected {', '.join(descent.STARTS)}, or an array of logits"
            )
        return start, None
    logits = jnp.asarray(start, instance.reward.dtype)
    if logits.shape != instance.reward.shape:
        raise ValueError(
            f"start has shape {logits.shape}; expected that of the rewards, {instance.reward.shape}"
        )
    return "given", logits


def _begin(
    start: str, instance: Instance, logits: Array | None
) -> tuple[descent.Problem, Float[Array, " outputs *tile"]]:
    instance, logits = lax.stop_gradient((instance, logits))
    task = descent.problem(instance)
    if logits is None:
        return task, descent.starting_logits(start, task)
    return task, jnp.where(task.support, logits, finite_log(jnp.full_like(logits, -jnp.inf)))


@partial(jax.jit, static_argnums=0)
def _solve_one(
    method: descent.Method,
    given: tuple[Instance, Array | None],
    tolerance: Array,
) -> descent.Solution:
    """Solve one instance, [outputs]."""
    task, logits = _begin(method.start, *given)
    state = lax.while_loop(
        descent.running,
        lambda state: descent.advance(state, task, method, _CAUTION * tolerance),
        descent.init(task, logits, method),
    )
    return descent.certificate(state.ended, given[0], tolerance)


def _solve_batch(
    method: descent.Method, instance: Instance, logits: Array | None, tolerance: Array
) -> descent.Solution:
    num, outputs = instance.reward.shape
    lanes = block_size(outputs)
    if jax.default_backend() != "cpu":
        lanes *= _WIDER
    # Two slabs per core where there is enough; a power of two of lanes' worth, so that few sizes
    # are compiled.
    share = num // (2 * (os.cpu_count() or 1) * lanes)
    size = lanes * max(1, min(_SLAB, 1 << (share.bit_length() - 1) if share else 1))
    given = instance, logits

    def cut(x: Any, begin: int) -> Any:
        part = x[begin : begin + size]
        return np.pad(part, [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1), mode="edge")

    leaves = jax.tree.leaves(given)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in [*leaves, tolerance]):
        fill = -num % size
        slabs = jax.tree.map(
            lambda x: jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1), mode="edge").reshape(
                -1, size, *x.shape[1:]
            ),
            given,
        )
        solved = lax.map(lambda slab: _solve_slab(method, lanes, (slab, size), tolerance), slabs)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], solved)
    on_host = jax.tree.map(np.asarray, given)
    slabs = (
        (jax.tree.map(partial(cut, begin=begin), on_host), np.int32(min(size, num - begin)))
        for begin in range(0, num, size)
    )
    parts = on_each_device(_solve_slab, (method, lanes), slabs, tolerance)
    return jax.tree.map(lambda *x: jnp.concatenate(x)[:num], *parts)


def _solve_slab(
    method: descent.Method,
    lanes: int,
    slab: tuple[tuple[Instance, Array | None], int | Array],
    tolerance: Array,
) -> descent.Solution:
    """Solve a slab, [instances, outputs], on so many lanes; past its count it is padding."""
    given, count = slab
    size = given[0].reward.shape[0]

    def by_block(function: Callable[..., Any], rows: Any) -> Any:
        """Apply a function of tiles to rows, as many at a time as there are lanes.

        A loop of one turn would be fused with what surrounds it; the condition keeps it apart.
        """

        def apply(block: Any) -> Any:
            found = function(*jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), block))
            return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), found)

        def none(block: Any) -> Any:
            return jax.tree.map(jnp.zeros_like, apply(block))  # of which the shapes alone remain

        def one(at: tuple[Array, Any]) -> Any:
            begin, block = at
            return lax.cond(begin < count, apply, none, block)

        blocks = jax.tree.map(lambda x: x.reshape(-1, lanes, *x.shape[1:]), rows)
        found = lax.map(one, (jnp.arange(0, size, lanes), blocks))
        return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), found)

    queue = by_block(partial(_begin, method.start), given)

    def fetch(rows: Array) -> tuple[descent.Problem, Array]:
        return jax.tree.map(lambda x: jnp.moveaxis(x[rows], 0, -1), queue)

    def descend(at: _Lanes) -> _Lanes:
        """Step until enough lanes wait to be refilled, or none is left that could be."""
        enough = jnp.where(at.taken < count, lanes - lanes // _REFILL, 0)

        def go_on(state: descent.State) -> Array:
            return jnp.sum(descent.running(state).astype(jnp.float32)) > enough

        def step(state: descent.State) -> descent.State:
            return descent.advance(state, at.task, method, _CAUTION * tolerance)

        return replace(at, state=lax.while_loop(go_on, step, at.state))

    def refill(at: _Lanes) -> _Lanes:
        """Take down what has ended, and put the next instances in its place."""
        ended = ~descent.running(at.state)
        place = jnp.where(ended, at.rows, size)  # in the padding of no use, beyond it: dropped
        done = jax.tree.map(
            lambda all_, x: all_.at[place].set(jnp.moveaxis(x, -1, 0), mode="drop"),
            at.done,
            at.state.ended,
        )
        rows = at.taken + jnp.cumsum(ended.astype(jnp.int32)) - 1
        fresh_task, fresh_logits = fetch(jnp.minimum(rows, size - 1))
        fresh = descent.init(fresh_task, fresh_logits, method)
        takes = ended & (rows < count)

        def swap(new: Array, old: Array) -> Array:
            return jnp.where(takes, new, old)

        return _Lanes(
            rows=jnp.where(ended, rows, at.rows),
            taken=at.taken + jnp.sum(ended.astype(jnp.int32)),
            task=jax.tree.map(swap, fresh_task, at.task),
            state=jax.tree.map(swap, fresh, at.state),
            done=done,
        )

    task, logits = fetch(jnp.arange(lanes))
    first = _Lanes(
        rows=jnp.arange(lanes),
        taken=jnp.asarray(lanes),
        task=task,
        state=descent.init(task, logits, method),
        done=descent.Ended(
            logits=jnp.zeros_like(queue[1]),
            steps=jnp.zeros(size, jnp.int32),
            status=jnp.zeros(size, jnp.int8),
        ),
    )
    last = lax.while_loop(
        lambda at: jnp.any(descent.running(at.state)), lambda at: refill(descend(at)), first
    )

    return by_block(
        lambda instance, ended: descent.certificate(ended, instance, tolerance),
        (given[0], last.done),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Trace:
    """The course of descents, [steps + 1, instances] each: the start first.

    Attributes:
        kl: KL(π‖p*), nats.
        tpm_aligned: TPM(A; π) = E_π[α p_A/p_ref].
        residual: L(p*) - L(π) - β KL(π‖p*), which is zero but for rounding, over
            u (E|r - m| + β E|log π| + β E|log p_ref| + |L(p*) - m| + min(β, max r - min r)), where
            E is E_π + E_p*, m = E_ref[r], and u the unit roundoff.
    """

    kl: Array
    tpm_aligned: Array
    residual: Array


@partial(jax.jit, static_argnums=0)
def _trace(method: descent.Method, instance: Instance) -> Trace:
    """Record descents on a tile, [outputs, instances], whether or not they have converged."""
    task, logits = _begin(method.start, instance, None)
    base = center(instance)
    optimal = tilt(base, instance.beta)
    # The loss takes rewards from their maximum, the closed form from their mean.
    best = optimal.log_z_centered - jnp.max(optimal.t, axis=0, keepdims=True)
    floor = jnp.abs(optimal.log_z_centered) + jnp.minimum(optimal.spread, 1.0)
    shown = jnp.exp(
        base.log_alpha + base.aligned.log_p - jnp.log(base.aligned.total) - task.log_p_ref
    )
    shown = jnp.where(base.support, shown, 0.0)
    never = jnp.asarray(-1.0, instance.reward.dtype)

    def record(state: descent.State) -> Trace:
        view = descent.look(state.logits, task)
        log_policy = jax.nn.log_softmax(state.logits, axis=0)
        far = jax.nn.logsumexp(log_policy + view.x, axis=0)
        kl = jnp.where(far > 20.0, far, view.kl)
        policy = jnp.exp(log_policy)
        logs = jnp.where(base.support, jnp.abs(log_policy) + jnp.abs(task.log_p_ref), 0.0)
        both = policy + jnp.exp(jnp.minimum(log_policy + view.x - kl[None], 0.0))
        size = total(both * (jnp.abs(task.t) + logs)) + floor
        gap = (best[0] + view.value) - kl
        return Trace(
            kl=kl,
            tpm_aligned=total(policy * shown)[0],
            residual=gap / (unit_roundoff(gap.dtype) * size[0]),
        )

    def step(state: descent.State, _: None) -> tuple[descent.State, Trace]:
        moved = descent.advance(state, task, method, never)
        return moved, record(state)

    first = descent.init(task, logits, method)
    return lax.scan(step, first, None, length=method.max_steps)[1]


def trace(
    instance: Instance,
    optimizer: optax.GradientTransformation | None,
    steps: int,
    start: str = "reference",
) -> Trace:
    """Record so many steps of descent on a batch; by default as `solve` descends by default."""
    tile = jax.tree.map(lambda x: jnp.moveaxis(jnp.asarray(x), 0, -1), instance)
    return jax.tree.map(np.asarray, _trace(_method(optimizer, steps + 1, start), tile))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Lanes:
    """Descents side by side.

    Attributes:
        rows: which instance of the slab each lane descends on; beyond its count: none.
        taken: how many instances of the slab have been given to a lane.
        task: what the lanes see, [outputs, lanes].
        state: where they are.
        done: of the instances whose descent has ended, [instances, …].
    """

    rows: Array
    taken: Array
    task: descent.Problem
    state: descent.State
    done: descent.Ended
