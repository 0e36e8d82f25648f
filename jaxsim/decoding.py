"""What decoding makes of a policy: take-back logits, and the best of several samples."""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxsim.instance import Instance
from jaxsim.logspace import total
from jaxsim.tilting import center, log_reference


def best_of_n(instance: Instance, *, n: Float[Array, ""]) -> Float[Array, " outputs *tile"]:
    """Return log π of the best of n samples from p_ref: π(y) = p_ref(y)/P(L) (F(L)ⁿ - F(<L)ⁿ).

    L is the level of y, the outputs of the same reward, P(L) its mass, F(L) that of it and all
    below, F(<L) that of all below. Documented where it is made public, in `jaxsim.engine.lift`.
    """
    base = center(instance)
    log_ref = log_reference(base)
    mass = jnp.where(base.support, jnp.exp(log_ref), 0.0)
    reward = instance.reward

    def log_share(mine: Array) -> Array:
        """Return log (F(L)ⁿ - F(<L)ⁿ)/P(L) of the level of a reward."""
        below, level, above = (
            total(jnp.where(where, mass, 0.0))
            for where in (reward < mine, reward == mine, reward > mine)
        )
        some = level > 0
        level = jnp.where(some, level, 1.0)
        up_to = below + level
        # Each logarithm in the form that does not cancel.
        rare = above < up_to
        log_up_to = jnp.where(rare, jnp.log1p(-jnp.where(rare, above, 0.0)), jnp.log(up_to))
        small = level < below
        log_left = jnp.where(
            small,
            jnp.log1p(-jnp.where(small, level, 0.0) / up_to),
            jnp.log(jnp.where(below > 0, below, 1.0) / up_to),
        )
        gone = jnp.where(below > 0, -jnp.expm1(n * log_left), 1.0)
        return jnp.where(some, n * log_up_to + jnp.log(gone) - jnp.log(level), 0.0)

    shares = lax.map(lambda mine: log_share(mine[None])[0], reward)
    return jnp.where(base.support, log_ref + shares, -jnp.inf)


def take_back_logits(
    logits_tuned: ArrayLike,
    logits_reference: ArrayLike,
    *,
    a: ArrayLike,
    b: ArrayLike,
) -> Float[Array, " *batch outputs"]:
    """Return the paper's take-back logits, a·logits_tuned - b·logits_reference (section 1.4).

    With p_tuned = p*, the softmax of the result is p_ref^{a-b} e^{a r/β} up to scale: a - b = 1
    gives the optimum at β/a, and (a, b) = (0, -1) the reference back. The paper writes α and β for
    a and b; here those letters mean the mixture weight and the KL price, and nothing else.

    Args:
        logits_tuned: logits or log-probabilities of the tuned policy, over the last axis.
        logits_reference: likewise of the reference; `-inf` is outside its support.
        a: factor of the tuned logits.
        b: factor of the reference logits.

    Returns:
        Logits, unnormalised; `-inf` exactly outside the support of the reference, also at a = 0.

    Numerics:
        Exact for distributions over whole outputs; token by token it is an approximation.
    """
    tuned, reference = jnp.asarray(logits_tuned), jnp.asarray(logits_reference)
    if tuned.shape != reference.shape:
        raise ValueError(
            f"take_back_logits: logits_tuned has shape {tuned.shape} and logits_reference "
            f"{reference.shape}; they must be equal"
        )
    inside = reference > -jnp.inf
    kept = a * jnp.where(inside & (jnp.asarray(a) != 0), tuned, 0.0)
    return jnp.where(inside, kept - b * jnp.where(inside, reference, 0.0), -jnp.inf)
