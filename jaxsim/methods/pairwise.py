"""Losses on pairs of a chosen and a rejected output.

Log-probabilities are of whole outputs, in nats, of any shape, alike for all; a loss has that shape
and is never averaged. Below, Δ = log(π/p_ref)(chosen) - log(π/p_ref)(rejected).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Losses = Float[Array, "..."]


def reward_model_loss(chosen_rewards: ArrayLike, rejected_rewards: ArrayLike) -> Losses:
    """Return -log σ(r_w - r_l): Bradley and Terry's likelihood of a preference.

    Args:
        chosen_rewards: the model's rewards of the chosen outputs.
        rejected_rewards: of the rejected ones.

    Source:
        Ouyang et al. 2022, eq. (1), for pairs.

    Example:
        >>> from jaxsim import reward_model_loss
        >>> print(f"{reward_model_loss(1.0, 1.0):.4f}")
        0.6931
    """
    return -jax.nn.log_sigmoid(jnp.asarray(chosen_rewards) - jnp.asarray(rejected_rewards))


def dpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: float = 0.0,
) -> Losses:
    """Return -(1-ε) log σ(βΔ) - ε log σ(-βΔ): DPO, with ε conservative DPO.

    Args:
        policy_chosen_logps: log π of the chosen outputs.
        policy_rejected_logps: of the rejected ones.
        reference_chosen_logps: log p_ref of the chosen outputs.
        reference_rejected_logps: of the rejected ones.
        beta: the KL penalty of eq. (1).
        label_smoothing: ε, the chance that labels are assumed to be flipped with, 0 ≤ ε ≤ ½.

    Source:
        Rafailov et al. 2023, eq. (7); ε: Mitchell 2023.

    Raises:
        ValueError: for a beta that is not positive, or an ε outside [0, ½].

    Example:
        >>> from jaxsim import dpo_loss
        >>> print(f"{dpo_loss(-1.0, -2.0, -1.5, -1.5, beta=1.0):.4f}")
        0.3133
    """
    require_positive(beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 0.5")
    z = beta * _log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    kept, flipped = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def robust_dpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: float,
) -> Losses:
    """Return (-(1-ε) log σ(βΔ) + ε log σ(-βΔ))/(1-2ε): DPO's loss, without bias from flips.

    Its mean over labels flipped with chance ε is that of `dpo_loss` over true ones. It is unbounded
    below.

    Args:
        policy_chosen_logps: log π of the chosen outputs.
        policy_rejected_logps: of the rejected ones.
        reference_chosen_logps: log p_ref of the chosen outputs.
        reference_rejected_logps: of the rejected ones.
        beta: the KL penalty of eq. (1).
        label_smoothing: ε, the chance that a label is flipped, 0 ≤ ε < ½.

    Source:
        Chowdhury, Kini and Natarajan 2024, eq. (12).

    Raises:
        ValueError: for a beta that is not positive, or an ε outside [0, ½).

    Example:
        >>> from jaxsim import robust_dpo_loss
        >>> print(f"{robust_dpo_loss(-1.0, -2.0, -1.5, -1.5, beta=1.0, label_smoothing=0.1):.4f}")
        0.1883
    """
    require_positive(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 <= ε < 0.5")
    z = beta * _log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    kept, flipped = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    return (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
) -> Losses:
    """Return (Δ - 1/(2β))²: IPO, whose τ is `beta`.

    Args:
        policy_chosen_logps: log π of the chosen outputs.
        policy_rejected_logps: of the rejected ones.
        reference_chosen_logps: log p_ref of the chosen outputs.
        reference_rejected_logps: of the rejected ones.
        beta: τ.

    Source:
        Azar et al. 2023, eq. (17). Implementations that divide log-probabilities by an output's
        length compute another loss.

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> from jaxsim import ipo_loss
        >>> float(ipo_loss(-1.0, -2.0, -1.5, -1.5, beta=0.5))
        0.0
    """
    require_positive(beta)
    difference = _log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (difference - 1 / (2 * beta)) ** 2


def hinge_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
) -> Losses:
    """Return max(0, 1 - βΔ): the hinge on the log-ratio.

    Args:
        policy_chosen_logps: log π of the chosen outputs.
        policy_rejected_logps: of the rejected ones.
        reference_chosen_logps: log p_ref of the chosen outputs.
        reference_rejected_logps: of the rejected ones.
        beta: one over the margin of Δ.

    Source:
        Liu et al. 2023 (RSO), eq. (11), δ = 1/β.

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> from jaxsim import hinge_loss
        >>> float(hinge_loss(-1.0, -2.0, -1.5, -1.5, beta=0.5))
        0.5
    """
    require_positive(beta)
    difference = _log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return jax.nn.relu(1 - beta * difference)


def slic_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    policy_target_logps: ArrayLike = 0.0,
    *,
    margin: float,
    regularization: float = 0.0,
) -> Losses:
    """Return max(0, δ - log π(w) + log π(l)) - λ log π(target): SLiC-HF.

    Unlike `hinge_loss` it has no reference but the targets, which are drawn from it.

    Args:
        policy_chosen_logps: log π of the chosen outputs.
        policy_rejected_logps: of the rejected ones.
        policy_target_logps: of the outputs of the cross-entropy term.
        margin: δ, nats.
        regularization: λ.

    Source:
        Zhao et al. 2023, eq. (1).

    Raises:
        ValueError: for a margin that is not positive, or a negative regularization.

    Example:
        >>> from jaxsim import slic_loss
        >>> float(slic_loss(-1.0, -1.5, -2.0, margin=1.0, regularization=0.25))
        1.0
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; expected a number > 0")
    if not regularization >= 0:
        raise ValueError(f"regularization is {regularization}; expected a number >= 0")
    difference = jnp.asarray(policy_chosen_logps) - jnp.asarray(policy_rejected_logps)
    return jax.nn.relu(margin - difference) - regularization * jnp.asarray(policy_target_logps)


def orpo_loss(
    policy_chosen_logps: ArrayLike, policy_rejected_logps: ArrayLike, *, beta: ArrayLike
) -> Losses:
    """Return -log π(w) - λ log σ(log odds(w) - log odds(l)), odds(y) = π(y)/(1 - π(y)): ORPO.

    Args:
        policy_chosen_logps: log π of the chosen outputs, below 0; per token, as the paper has it,
            where outputs are long.
        policy_rejected_logps: of the rejected ones.
        beta: λ, the weight of the odds ratio.

    Source:
        Hong, Lee and Thorne 2024, eqs. (6) and (7).

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> from jax.numpy import log
        >>> from jaxsim import orpo_loss
        >>> print(f"{orpo_loss(log(0.5), log(0.5), beta=1.0):.4f}")
        1.3863
    """
    require_positive(beta)
    chosen, rejected = jnp.asarray(policy_chosen_logps), jnp.asarray(policy_rejected_logps)
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -chosen - beta * jax.nn.log_sigmoid(log_odds)


def simpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    gamma: float = 0.0,
) -> Losses:
    """Return -log σ(β (log π(w) - log π(l)) - γ): SimPO, without a reference.

    Args:
        policy_chosen_logps: log π of the chosen outputs, divided by their lengths.
        policy_rejected_logps: of the rejected ones.
        beta: the scale.
        gamma: the margin γ, itself (TRL's `simpo_gamma` and the ratio γ/β are other numbers).

    Source:
        Meng, Xia and Chen 2024, eq. (6).

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> from jaxsim import simpo_loss
        >>> print(f"{simpo_loss(-1.0, -2.0, beta=2.0, gamma=2.0):.4f}")
        0.6931
    """
    require_positive(beta)
    difference = jnp.asarray(policy_chosen_logps) - jnp.asarray(policy_rejected_logps)
    return -jax.nn.log_sigmoid(beta * difference - gamma)


def exo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: float = 1e-3,
) -> Losses:
    """Return KL((σ(βΔ), σ(-βΔ)) ‖ (1-ε, ε)): EXO on pairs, the reverse KL of cDPO's forward one.

    Args:
        policy_chosen_logps: log π of the chosen outputs.
        policy_rejected_logps: of the rejected ones.
        reference_chosen_logps: log p_ref of the chosen outputs.
        reference_rejected_logps: of the rejected ones.
        beta: the KL penalty of eq. (1).
        label_smoothing: ε, 0 < ε < 1.

    Source:
        Ji et al. 2024, eq. (18).

    Raises:
        ValueError: for a beta that is not positive, or an ε outside (0, 1).

    Example:
        >>> from jaxsim import exo_loss
        >>> print(f"{exo_loss(-1.0, -1.0, -1.5, -1.5, beta=1.0, label_smoothing=0.5):.4f}")
        0.0000
    """
    require_positive(beta)
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 < ε < 1")
    z = beta * _log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    log_w, log_l = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    epsilon = jnp.asarray(label_smoothing, z.dtype)
    return jnp.exp(log_w) * (log_w - jnp.log1p(-epsilon)) + jnp.exp(log_l) * (
        log_l - jnp.log(epsilon)
    )


def _log_ratios(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
) -> Losses:
    """Return Δ."""
    chosen = jnp.asarray(policy_chosen) - jnp.asarray(reference_chosen)
    return chosen - (jnp.asarray(policy_rejected) - jnp.asarray(reference_rejected))


def _log1mexp(x: Array) -> Array:
    """Return log(1 - e^x) for x < 0, without cancellation (Mächler 2012)."""
    near = x > -0.6931472
    small = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, small, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def require_positive(beta: ArrayLike) -> None:
    """Refuse a beta that is not a positive number; a traced one is taken as it is."""
    if not isinstance(beta, jax.core.Tracer) and not np.all(np.asarray(beta) > 0):
        raise ValueError(f"beta is {beta}; expected a number > 0")
