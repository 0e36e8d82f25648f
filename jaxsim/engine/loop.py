"""Drive the descent of `jaxsim.descent` over one instance or a batch, and record its course."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxsim import descent
from jaxsim.instance import Instance

_TILE = 4096
DEFAULT_OPTIMIZER = descent.default_optimizer()  # one object, so that compiled loops are reused


def solve(
    instance: Instance,
    *,
    optimizer: optax.GradientTransformation | None = None,
    max_steps: int = 1000,
    tolerance: float | None = None,
) -> descent.Solution:
    """Optimise eq. (1) by gradient descent on the logits, from p_ref, without the closed form.

    Args:
        instance: one instance, or a batch with one leading axis.
        optimizer: any `optax.GradientTransformation`, also `optax.lbfgs()`; by default Rprop.
        max_steps: at most so many steps per instance.
        tolerance: stop once KL(π‖p*) ≤ tolerance, nats, by a certificate that does not need p*;
            by default 1e-6 in float32 and 1e-12 in float64.

    Returns:
        A `Solution`; its `status` says, per instance, how it ended. An instance that does not
        converge raises nothing. Differentiable: the derivative of `log_policy` is that of the
        optimum, by the implicit function theorem.

    Raises:
        ValueError: for max_steps < 1 or a tolerance that is not positive.

    Example:
        >>> from jaxsim import Instance, Status, solve
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> solution = solve(instance)
        >>> Status(int(solution.status)).name, bool(solution.kl < 1e-6)
        ('CONVERGED', True)
    """
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; expected at least 1")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; expected a number > 0")
    optimizer = DEFAULT_OPTIMIZER if optimizer is None else optimizer
    dtype = instance.reward.dtype
    target = jnp.asarray(tolerance or default_tolerance(dtype), dtype)
    if instance.reward.ndim == 1:
        one = jax.tree.map(lambda x: x[None], instance)
        solution = _solve_tile(one, target, optimizer, max_steps)
        return jax.tree.map(lambda x: x[0], solution)
    num = instance.reward.shape[0]
    if num <= _TILE:
        return _solve_tile(instance, target, optimizer, max_steps)
    parts = []
    for at in range(0, num, _TILE):
        rows = jnp.minimum(jnp.arange(at, at + _TILE), num - 1)
        tile = jax.tree.map(lambda x, i=rows: x[i], instance)
        parts.append(_solve_tile(tile, target, optimizer, max_steps))
    return jax.tree.map(lambda *part: jnp.concatenate(part)[:num], *parts)


def default_tolerance(dtype: jnp.dtype) -> float:
    """Return the KL, in nats, at which `solve` stops unless told otherwise."""
    return 1e-6 if jnp.finfo(dtype).bits <= 32 else 1e-12


@partial(jax.jit, static_argnums=(2, 3))
def _solve_tile(
    instance: Instance, tolerance: Array, optimizer: optax.GradientTransformation, max_steps: int
) -> descent.Solution:
    """Run all instances of a batch until each has ended; those that have are left as they are."""
    tasks = jax.vmap(descent.problem)(lax.stop_gradient(instance))
    states = jax.vmap(lambda task: descent.init(task, optimizer, tolerance))(tasks)

    def unfinished(states: descent.State) -> Array:
        return jnp.any(descent.running(states) & (states.steps < max_steps))

    def step(states: descent.State) -> descent.State:
        return jax.vmap(lambda s, t: descent.advance(s, t, optimizer, tolerance))(states, tasks)

    states = lax.while_loop(unfinished, step, states)
    return jax.vmap(lambda s, i: descent.certificate(s, i, tolerance))(states, instance)


@partial(jax.jit, static_argnums=(1, 2))
def descent_trace(
    instance: Instance, optimizer: optax.GradientTransformation, steps: int
) -> Float[Array, " steps instances"]:
    """Record KL(π‖p*) after each of `steps` steps on a batch, whether or not it has converged."""
    tasks = jax.vmap(descent.problem)(instance)
    never = jnp.asarray(-1.0, instance.reward.dtype)
    states = jax.vmap(lambda task: descent.init(task, optimizer, never))(tasks)

    def step(states: descent.State, _: None) -> tuple[descent.State, Array]:
        states = jax.vmap(lambda s, t: descent.advance(s, t, optimizer, never))(states, tasks)
        return states, states.kl

    return lax.scan(step, states, None, length=steps)[1]
