"""The public functions: each kernel, given its batch axis by the rank of the reward.

Users' arrays are [instances, outputs]; the kernels take tiles [outputs, instances].
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxsim import decoding, grid, tilting
from jaxsim.engine import native
from jaxsim.instance import Instance
from jaxsim.sources import tile_size
from jaxsim.theorem import bounds, ladder, verdict
from jaxsim.theorem.settle import settle


def lift(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a kernel accept one instance, or a batch with one leading axis.

    A large batch runs in tiles, one after another, so that what is in between stays in the cache.
    Keyword arguments are the same for all instances.
    """
    parameters = inspect.signature(function)
    single = jax.jit(function)

    @jax.jit
    def batched(*args: Any, **shared: Any) -> Any:
        num, outputs = args[-1].reward.shape
        size = min(tile_size(outputs), num)
        fill = -num % size

        def cut(x: Array) -> Array:
            padded = jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1), mode="edge")
            return jnp.moveaxis(padded.reshape(-1, size, *x.shape[1:]), 1, -1)

        def join(x: Array) -> Array:
            rows = jnp.moveaxis(x, -1, 1)
            return rows.reshape(-1, *rows.shape[2:])[:num]

        tiles = jax.tree.map(cut, args)
        return jax.tree.map(join, lax.map(lambda tile: function(*tile, **shared), tiles))

    @wraps(function)
    def public(*args: Any, **keywords: Any) -> Any:
        bound = parameters.bind(*args, **keywords)
        rank = _batch_rank(function.__name__, bound.args)
        return (batched if rank else single)(*bound.args, **bound.kwargs)

    return public


def _batch_rank(name: str, args: tuple[Any, ...]) -> int:
    """Return 0 for one instance, 1 for a batch, after checking that all shapes agree."""
    instance = args[-1]
    if not isinstance(instance, Instance):
        raise TypeError(f"{name}: expected an Instance, got {type(instance).__name__}")
    shape = jnp.shape(instance.reward)
    if len(shape) not in (1, 2):
        raise ValueError(
            f"{name}: reward has shape {shape}; expected [outputs] or [instances, outputs]"
        )
    expected = {
        "log_p_aligned": shape,
        "log_p_unaligned": shape,
        "logit_alpha": shape[:-1],
        "beta": shape[:-1],
    }
    for field, wanted in expected.items():
        found = jnp.shape(getattr(instance, field))
        if found != wanted:
            raise ValueError(f"{name}: {field} has shape {found}; the reward calls for {wanted}")
    for extra in args[:-1]:
        if jnp.shape(extra) != shape:
            raise ValueError(
                f"{name}: log_policy has shape {jnp.shape(extra)}; the reward calls for {shape}"
            )
    return len(shape) - 1


evaluate = native.where_built(lift(tilting.evaluate), rank_of=_batch_rank)
optimal_policy = lift(tilting.optimal_policy)
mixture_weights = lift(tilting.mixture_weights)
objective = lift(tilting.objective)
tpm = lift(tilting.tpm)
theorem2 = lift(verdict.theorem2)
tpm_bounds = lift(bounds.tpm_bounds)
sufficient_beta = lift(bounds.sufficient_beta)
_rungs = lift(ladder.conditions)
_grid = lift(grid.evaluate_grid)
_best_of_n = lift(decoding.best_of_n)


def best_of_n(instance: Instance, n: ArrayLike) -> Array:
    """Return log π of the best of n samples from p_ref, by the reward: best-of-N decoding.

    π(y) = p_ref(y)/P(L) (F(L)ⁿ - F(<L)ⁿ), where L holds the outputs of y's reward (ties are broken
    by p_ref), P(L) is its mass, and F(L), F(<L) are those of all outputs up to it and below it.

    Args:
        instance: one instance, or a batch with one leading axis; its β is not used.
        n: how many samples, ≥ 1; the formula has a meaning between whole numbers too.

    Returns:
        Log-probabilities (nats), [outputs] or [instances, outputs]; `-inf` outside the support.
        KL(π‖p_ref) ≤ log n - (n-1)/n.

    Raises:
        ValueError: for an n that is no number ≥ 1.

    Numerics:
        Every output is compared with every other: O(outputs²). Errors are of the order of
        n·u relative to each probability.

    Source:
        Beirami et al. 2024, lemma 1, with ties.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsim import Instance, best_of_n
        >>> instance = Instance.from_probs([.5, .5], [.5, .5], [0., 1.], .5, 1.)
        >>> print(jnp.exp(best_of_n(instance, 2)))  # both samples are the worse one in 1 of 4
        [0.25 0.75]
    """
    if not isinstance(n, jax.core.Tracer):
        given = np.asarray(n, np.float64)
        if given.ndim or not 1 <= given < np.inf:
            raise ValueError(f"best_of_n: n is {n}; expected one number >= 1")
    _batch_rank("best_of_n", (instance,))
    return _best_of_n(instance, n=jnp.asarray(n, jnp.asarray(instance.reward).dtype))


def evaluate_grid(instance: Instance, betas: ArrayLike | Sequence[float]) -> grid.Grid:
    """Evaluate an instance, or a batch, at every β of a grid: from that follows any α, for nothing.

    Args:
        instance: one instance, or a batch with one leading axis; its own β and α are not used.
        betas: values of β > 0, [betas].

    Returns:
        A `Grid`: both components' cumulants and what belongs to them, [betas] or
        [instances, betas]. `Grid.at(logit_alpha)` gives all fields of `evaluate`.

    Raises:
        ValueError: where `betas` is not one axis of positive, finite numbers.

    Example:
        >>> from jaxsim import Instance, evaluate_grid
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> print(evaluate_grid(instance, [1.0, 2.0]).log_odds_shift)
        [-0.32500276  0.06621913]
    """
    traced = isinstance(betas, jax.core.Tracer)
    values: Any = betas if traced else np.asarray(betas)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"evaluate_grid: betas has shape {values.shape}; expected [betas]")
    _batch_rank("evaluate_grid", (instance,))
    dtype = jnp.asarray(instance.reward).dtype
    for at, beta in enumerate(() if traced else values):
        if not float(jnp.finfo(dtype).tiny) <= beta <= float(jnp.finfo(dtype).max):
            raise ValueError(
                f"evaluate_grid: betas[{at}] is {beta}; expected a number > 0 that {dtype} can hold"
            )
    values = jnp.asarray(values, dtype)
    return replace(_grid(instance, betas=values), betas=values)


def conditions(instance: Instance) -> ladder.Conditions:
    """Decide a ladder of conditions, each implying the next, the last being TPM(A) ≥ α itself.

    Monotone likelihood ratio ⇒ single crossing ⇒ first-order dominance ⇒ increasing convex order
    ⇒ Δ ≥ 0 at every β ⇒ Δ ≥ 0 at this β; definitions in `Conditions`. Outputs of equal reward count
    as one.

    Args:
        instance: one instance, or a batch with one leading axis.

    Returns:
        `Conditions`, an `Outcome` per rung and instance. What HOLDS has only HOLDS or TIE below it
        (`mgf_order`, which is not strict, may stand above a TIE at this β). Codes are never wrong;
        with concrete values only `mgf_order` may be UNDECIDED, where Δ touches zero at some β.

    Numerics:
        A kernel in O(n log n), with error bounds as in `theorem2`; then, with concrete values,
        exact arithmetic on the host for what is left: 5 ms or more for each such instance, which
        for `mgf_order` may be one random instance in thirty. Under `jit`, `vmap` or `grad` only the
        kernel: it decides `mgf_order` where another rung, the means or the best reward do.

    Example:
        >>> from jaxsim import Instance, Outcome, conditions
        >>> instance = Instance.from_probs([0., .5, .5], [.5, 0., .5], [0., 1., 10.], .5, 1.)
        >>> found = conditions(instance)
        >>> Outcome(int(found.single_crossing)).name, Outcome(int(found.mgf_order)).name
        ('HOLDS', 'HOLDS')
    """
    found = _rungs(instance)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((instance, found)))
    return found if traced else settle(instance, found)
