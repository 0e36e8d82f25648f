"""Losses on lists of outputs and on single ones.

Log-probabilities are of whole outputs, in nats; lists lie on the last axis, [..., outputs]; a loss
has the shape that is left, and is never averaged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxsim.methods.pairwise import require_positive

Losses = Float[Array, "..."]


def plackett_luce_dpo_loss(
    policy_logps: ArrayLike, reference_logps: ArrayLike, *, beta: ArrayLike
) -> Losses:
    """Return -Σ_k log softmax(β log(π/p_ref))_k over the outputs from place k on: DPO on rankings.

    Args:
        policy_logps: log π, the best output first, [..., outputs].
        reference_logps: log p_ref, likewise.
        beta: the KL penalty of eq. (1).

    Source:
        Rafailov et al. 2023, eq. (20). For two outputs it is `dpo_loss`.

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> from jaxsim import plackett_luce_dpo_loss
        >>> print(f"{plackett_luce_dpo_loss([-1., -1., -1.], [-1., -1., -1.], beta=1.0):.4f}")
        1.7918
    """
    require_positive(beta)
    score = _places_first(beta * (jnp.asarray(policy_logps) - jnp.asarray(reference_logps)))
    later = _compared(score, jnp.greater)[:-1]
    rest = jax.nn.logsumexp(jnp.where(later, score[None], -jnp.inf), axis=1)
    # As log(1 + e^(rest - score)), which does not cancel where the best output is far ahead.
    return jnp.sum(-jax.nn.log_sigmoid(score[:-1] - rest), axis=0)


def _places_first(lists: Any) -> Array:
    """Return lists with their places on the first axis: lists are many and short."""
    return jnp.moveaxis(jnp.asarray(lists), -1, 0)


def _compared(lists: Array, compare: Callable[[Any, Any], Array]) -> Array:
    """Return how the second axis's place compares to the first's, of the rank of lists + 1."""
    place = jnp.arange(lists.shape[0])
    return compare(place[None], place[:, None]).reshape((place.size,) * 2 + (1,) * (lists.ndim - 1))


def lipo_loss(
    policy_logps: ArrayLike, reference_logps: ArrayLike, labels: ArrayLike, *, beta: ArrayLike
) -> Losses:
    """Return Σ over pairs with ψ_i > ψ_j of Δ_ij log(1 + e^-(s_i - s_j)): LiPO-λ.

    With s = β log(π/p_ref), Δ_ij = |2^ψ_i - 2^ψ_j| · |1/log2(1 + τ_i) - 1/log2(1 + τ_j)|, and τ the
    rank by s, from 1 for the largest, ties broken by place. The weights carry no gradient, and
    jump where two scores are equal.

    Args:
        policy_logps: log π, [..., outputs].
        reference_logps: log p_ref, likewise.
        labels: ψ, how good each output is, likewise.
        beta: the scale of the scores.

    Source:
        Liu et al. 2024, eqs. (10) and (11), with the usual base 2.

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> from jaxsim import lipo_loss
        >>> print(f"{lipo_loss([-1., -1.], [-1., -1.], [1., 0.], beta=1.0):.4f}")
        0.2558
    """
    require_positive(beta)
    score = _places_first(beta * (jnp.asarray(policy_logps) - jnp.asarray(reference_logps)))
    better = _places_first(labels)

    def apart(x: Any) -> Array:
        return x[:, None] - x[None]

    # Compared, not subtracted: a fused multiply-add would tell apart what is equal.
    mine, theirs = lax.stop_gradient((score[:, None], score[None]))
    ahead = (theirs > mine) | ((theirs == mine) & _compared(score, jnp.less))
    rank = 1 + jnp.sum(ahead, axis=1)
    discount = 1 / jnp.log2(1.0 + rank.astype(score.dtype))
    gain = jnp.exp2(better.astype(score.dtype))
    weight = jnp.abs(apart(gain)) * jnp.abs(apart(discount))
    counts = apart(better) > 0
    terms = -jax.nn.log_sigmoid(apart(score)) * weight
    return jnp.sum(jnp.where(counts, terms, 0.0), axis=(0, 1))


def kto_loss(
    policy_logps: ArrayLike,
    reference_logps: ArrayLike,
    desirable: ArrayLike,
    *,
    beta: ArrayLike,
    reference_point: ArrayLike = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Losses:
    """Return λ_D (1 - σ(β(s - z₀))) or λ_U (1 - σ(β(z₀ - s))), s = log(π/p_ref): KTO.

    Args:
        policy_logps: log π.
        reference_logps: log p_ref.
        desirable: whether each output was marked desirable, true or false.
        beta: the KL penalty, the value function's scale.
        reference_point: z₀ ≥ 0, KL(π‖p_ref) or an estimate of it, nats; carries no gradient.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Source:
        Ethayarajh et al. 2024, eq. (8), as λ_y minus the value.

    Raises:
        ValueError: for a beta or a weight that is not positive.

    Example:
        >>> from jaxsim import kto_loss
        >>> float(kto_loss(-1.0, -1.0, True, beta=0.5))
        0.5
    """
    require_positive(beta)
    for name, weight in (
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        if not weight > 0:
            raise ValueError(f"{name} is {weight}; expected a number > 0")
    s = jnp.asarray(policy_logps) - jnp.asarray(reference_logps)
    above = beta * (s - lax.stop_gradient(jnp.asarray(reference_point)))
    good, bad = jax.nn.sigmoid(-above), jax.nn.sigmoid(above)
    return jnp.where(jnp.asarray(desirable), desirable_weight * good, undesirable_weight * bad)
