"""Drive the descent of `jaxsim.descent` over one instance or a batch, and record its course."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxsim import descent
from jaxsim.instance import Instance

_TILE = 4096
_CAUTION = 0.9  # of the tolerance: lest rounding have the closed form refute the stopping rule
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
        return _solve_tile(instance, target, optimizer, max_steps)
    num = instance.reward.shape[0]
    tiles = _tiles(instance, min(_TILE, num))
    solved = [_solve_tile(tile, target, optimizer, max_steps) for tile in tiles]
    return _joined(solved, num)


@partial(jax.jit, static_argnums=1)
def _tiles(instance: Instance, size: int) -> list[Instance]:
    """Cut a batch into tiles [outputs, size], the last filled up with the last instance."""
    num = instance.reward.shape[0]
    fill = -num % size

    def cut(x: Array) -> list[Array]:
        padded = jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return [jnp.moveaxis(part, 0, -1) for part in jnp.split(padded, (num + fill) // size)]

    leaves, structure = jax.tree.flatten(instance)
    columns = zip(*(cut(leaf) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, column) for column in columns]


@partial(jax.jit, static_argnums=1)
def _joined(solved: list[descent.Solution], num: int) -> descent.Solution:
    """Put tiles of solutions together as a batch of `num`."""
    return jax.tree.map(
        lambda *parts: jnp.concatenate([jnp.moveaxis(p, -1, 0) for p in parts])[:num], *solved
    )


def default_tolerance(dtype: jnp.dtype) -> float:
    """Return the KL, in nats, at which `solve` stops unless told otherwise."""
    return 1e-6 if jnp.finfo(dtype).bits <= 32 else 1e-12


@partial(jax.jit, static_argnums=(2, 3))
def _solve_tile(
    instance: Instance, tolerance: Array, optimizer: optax.GradientTransformation, max_steps: int
) -> descent.Solution:
    """Run a tile until each instance has ended; those that have are left as they are."""
    task = descent.problem(lax.stop_gradient(instance))
    target = _CAUTION * tolerance

    def unfinished(state: descent.State) -> Array:
        return jnp.any(descent.running(state) & (state.steps < max_steps))

    def step(state: descent.State) -> descent.State:
        return descent.advance(state, task, optimizer, target)

    state = lax.while_loop(unfinished, step, descent.init(task, optimizer, target))
    return descent.certificate(state, instance, tolerance)


@partial(jax.jit, static_argnums=(1, 2))
def descent_trace(
    instance: Instance, optimizer: optax.GradientTransformation, steps: int
) -> Float[Array, "steps instances"]:
    """Record KL(π‖p*) after each of `steps` steps on a tile, whether or not it has converged."""
    task = descent.problem(instance)
    never = jnp.asarray(-1.0, instance.reward.dtype)

    def step(state: descent.State, _: None) -> tuple[descent.State, Array]:
        state = descent.advance(state, task, optimizer, never)
        return state, state.kl

    return lax.scan(step, descent.init(task, optimizer, never), None, length=steps)[1]


def traces(instance: Instance, steps: int) -> dict[str, np.ndarray]:
    """Record descent on a batch, by name of the optimiser; arrays [steps, instances]."""
    tile = _tiles(instance, instance.reward.shape[0])[0]
    optimizers = {"Rprop (default)": DEFAULT_OPTIMIZER}
    return {
        name: np.asarray(descent_trace(tile, optimizer, steps))
        for name, optimizer in optimizers.items()
    }
