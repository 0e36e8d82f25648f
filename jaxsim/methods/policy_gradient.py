"""Objectives of policy-gradient methods, on outputs that the policy itself was sampled from.

Log-probabilities are of whole outputs, in nats. Groups (outputs of one prompt) lie on the last
axis, [..., group]; an objective has that shape, one value per output, to be maximised, and is never
averaged. Advantages, baselines and the sampling policy carry no gradient.

With `old_logps` equal to `policy_logps` (one step per sample, no clipping at work), its gradient is
what the method follows. Below, s = log(π/p_ref) and ρ = π/π_old.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxsim.methods.pairwise import require_positive

Objectives = Float[Array, "..."]

KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")


def reinforce(
    policy_logps: ArrayLike,
    reference_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike,
    baseline: ArrayLike = 0.0,
) -> Objectives:
    """Return (r - β s - b) log π, its first factor without gradient: REINFORCE on eq. (1).

    Args:
        policy_logps: log π of outputs sampled from π.
        reference_logps: log p_ref of these outputs.
        rewards: r.
        beta: the KL penalty of eq. (1), which enters through the reward.
        baseline: b, anything that does not depend on the output.

    Source:
        Williams 1992; Ouyang et al. 2022, eq. (2), for the penalty in the reward.

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> from jaxsim import reinforce
        >>> float(reinforce(-2.0, -2.0, 1.0, beta=0.5))
        -2.0
    """
    policy = jnp.asarray(policy_logps)
    penalised = _penalised(policy, policy, reference_logps, rewards, beta, "k1")
    return lax.stop_gradient(penalised - jnp.asarray(baseline)) * policy


def rloo(
    policy_logps: ArrayLike,
    reference_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike,
    weights: ArrayLike | None = None,
) -> Objectives:
    """Return `reinforce` with the mean of the group's other outputs as the baseline: RLOO.

    Args:
        policy_logps: log π of outputs sampled from π, [..., group], two or more.
        reference_logps: log p_ref of these outputs.
        rewards: r.
        beta: the KL penalty of eq. (1), which enters through the reward.
        weights: as in `grpo`; the others' mean is then that of all.

    Source:
        Ahmadian et al. 2024, eq. (9); Kool, van Hoof and Welling 2019.

    Raises:
        ValueError: for a beta that is not positive, or a group of one.

    Example:
        >>> from jaxsim import rloo
        >>> print(rloo([-1., -1.], [-1., -1.], [1., 0.], beta=1.0))
        [-1.  1.]
    """
    policy = jnp.asarray(policy_logps)
    penalised = _penalised(policy, policy, reference_logps, rewards, beta, "k1")
    return lax.stop_gradient(_less_others(penalised, weights)) * policy


def ppo_clip(
    policy_logps: ArrayLike,
    old_logps: ArrayLike,
    reference_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike,
    clip: float = 0.2,
    baseline: ArrayLike = 0.0,
) -> Objectives:
    """Return min(ρ A, clip(ρ, 1-ε, 1+ε) A), A = r - β s_old - b: PPO, the penalty in the reward.

    Args:
        policy_logps: log π of outputs sampled from π_old.
        old_logps: log π_old.
        reference_logps: log p_ref.
        rewards: r.
        beta: the KL penalty of eq. (1).
        clip: ε; infinity clips nothing.
        baseline: b, a critic's value of the prompt.

    Source:
        Schulman et al. 2017, eq. (7), on whole outputs (no value per token).

    Raises:
        ValueError: for a beta or a clip that is not positive.

    Example:
        >>> from jaxsim import ppo_clip
        >>> print(f"{ppo_clip(-1.0, -2.0, -2.0, 1.0, beta=0.5):.4f}")  # e clipped to 1.2
        1.2000
    """
    policy, old = jnp.asarray(policy_logps), lax.stop_gradient(jnp.asarray(old_logps))
    penalised = _penalised(policy, old, reference_logps, rewards, beta, "k1")
    return _clipped(policy, old, penalised - jnp.asarray(baseline), clip)


def grpo(
    policy_logps: ArrayLike,
    old_logps: ArrayLike,
    reference_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike,
    clip: float = 0.2,
    normalize_std: bool = True,
    std_epsilon: float = 0.0,
    leave_one_out: bool = False,
    kl: str = "k3",
    kl_place: str = "loss",
    importance_corrected: bool = False,
    weights: ArrayLike | None = None,
) -> Objectives:
    """Return min(ρ A, clip(ρ, 1-ε, 1+ε) A) - β k, A = (r - mean r)/std r in the group: GRPO.

    k is an estimate of KL(π‖p_ref) from one output: k1 = s, k2 = s²/2, k3 = e^-s + s - 1. In the
    loss its gradient is taken through log π alone, as implementations do; importance corrected, ρ k
    is in its place, whose gradient for k1 and k3 is that of the KL.

    Args:
        policy_logps: log π of outputs sampled from π_old, [..., group].
        old_logps: log π_old.
        reference_logps: log p_ref.
        rewards: r.
        beta: the KL penalty.
        clip: ε; infinity clips nothing.
        normalize_std: whether advantages are divided by the group's standard deviation (with
            1/G, not 1/(G-1)); a group of equal rewards has advantages of zero.
        std_epsilon: added to the standard deviation (implementations: 1e-4).
        leave_one_out: whether the mean is that of the group's other outputs.
        kl: the estimate, "k1", "k2" or "k3".
        kl_place: where it enters, the "loss" or the "reward".
        importance_corrected: whether ρ k replaces k in the loss.
        weights: the share of each output in the group; by default all alike. With π over all
            outputs it is the group of infinite size.

    Source:
        Shao et al. 2024, eqs. (3) and (4), on whole outputs: no average over tokens.

    Raises:
        ValueError: for a beta or a clip that is not positive, an unknown kl or kl_place, or a
            group of one where it has no others.

    Example:
        >>> from jaxsim import grpo
        >>> print(grpo([-1., -1.], [-1., -1.], [-1., -1.], [1., 0.], beta=1.0))
        [ 1. -1.]
    """
    require_positive(beta)
    if kl_place not in KL_PLACES:
        raise ValueError(f"kl_place is {kl_place!r}; expected one of {', '.join(KL_PLACES)}")
    policy, old = jnp.asarray(policy_logps), lax.stop_gradient(jnp.asarray(old_logps))
    in_reward = kl_place == "reward"
    score = (
        _penalised(policy, old, reference_logps, rewards, beta, kl)
        if in_reward
        else jnp.asarray(rewards)
    )
    advantage = (
        _less_others(score, weights) if leave_one_out else score - _group_mean(score, weights)
    )
    if normalize_std:
        std = jnp.sqrt(_group_mean((score - _group_mean(score, weights)) ** 2, weights))
        # Judged by the scores: the mean of equal ones may differ from them by rounding.
        counts = True if weights is None else jnp.asarray(weights) > 0
        most = jnp.max(jnp.where(counts, score, -jnp.inf), axis=-1, keepdims=True)
        least = jnp.min(jnp.where(counts, score, jnp.inf), axis=-1, keepdims=True)
        differ = (most > least) & (std > 0)
        advantage = jnp.where(differ, advantage / jnp.where(differ, std + std_epsilon, 1.0), 0.0)
    gain = _clipped(policy, old, advantage, clip)
    if in_reward:
        return gain
    penalty = kl_estimate(policy - jnp.asarray(reference_logps), kl)
    if importance_corrected:
        penalty = jnp.exp(policy - old) * penalty
    return gain - beta * penalty


def dr_grpo(
    policy_logps: ArrayLike,
    old_logps: ArrayLike,
    reference_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike,
    clip: float = 0.2,
    leave_one_out: bool = False,
    kl: str = "k1",
    kl_place: str = "loss",
    importance_corrected: bool = True,
    weights: ArrayLike | None = None,
) -> Objectives:
    """Return `grpo` without the division by the standard deviation: Dr. GRPO.

    By default with the unbiased gradient of the KL: k1, importance corrected. (Corrected k3 has the
    same gradient, by a difference of terms that overflow where π is far below p_ref.) The group's
    mean holds the output's own reward, which shrinks advantages by 1 - 1/G; `leave_one_out` avoids
    that.

    Args:
        policy_logps: log π of outputs sampled from π_old, [..., group].
        old_logps: log π_old.
        reference_logps: log p_ref.
        rewards: r.
        beta: the KL penalty.
        clip: ε; infinity clips nothing.
        leave_one_out: whether the mean is that of the group's other outputs.
        kl: the estimate, "k1", "k2" or "k3".
        kl_place: where it enters, the "loss" or the "reward".
        importance_corrected: whether ρ k replaces k in the loss.
        weights: as in `grpo`.

    Source:
        Liu et al. 2025, on whole outputs; the paper itself trains with β = 0.

    Raises:
        ValueError: as `grpo`.

    Example:
        >>> from jaxsim import dr_grpo
        >>> print(dr_grpo([-1., -1.], [-1., -1.], [-1., -1.], [1., 0.], beta=1.0))
        [ 0.5 -0.5]
    """
    return grpo(
        policy_logps,
        old_logps,
        reference_logps,
        rewards,
        beta=beta,
        clip=clip,
        normalize_std=False,
        leave_one_out=leave_one_out,
        kl=kl,
        kl_place=kl_place,
        importance_corrected=importance_corrected,
        weights=weights,
    )


def kl_estimate(log_ratio: Array, kl: str) -> Array:
    """Return the estimate k1, k2 or k3 of KL(π‖p_ref) from s = log(π/p_ref) of one output."""
    if kl == "k1":
        return log_ratio
    if kl == "k2":
        return log_ratio**2 / 2
    if kl == "k3":
        return jnp.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl is {kl!r}; expected one of {', '.join(KL_ESTIMATORS)}")


def _penalised(
    policy: Array, old: Array, reference: ArrayLike, rewards: ArrayLike, beta: ArrayLike, kl: str
) -> Array:
    """Return r - β k, k at the sampling policy."""
    require_positive(beta)
    s = lax.stop_gradient(old - jnp.asarray(reference)).astype(policy.dtype)
    return jnp.asarray(rewards) - beta * kl_estimate(s, kl)


def _group_mean(x: Array, weights: ArrayLike | None) -> Array:
    return jnp.average(x, axis=-1, weights=_shares(x, weights), keepdims=True)


def _less_others(x: Array, weights: ArrayLike | None) -> Array:
    """Return x less the mean of the others in its group; of shares, less the mean of all."""
    size = x.shape[-1] if x.ndim else 1
    if weights is not None:
        return x - _group_mean(x, weights)
    if size < 2:
        raise ValueError("rewards hold a group of one, which has no others; expected two or more")
    return (x - _group_mean(x, None)) * (size / (size - 1))


def _shares(x: Array, weights: ArrayLike | None) -> Array | None:
    return None if weights is None else jnp.broadcast_to(jnp.asarray(weights), x.shape)


def _clipped(policy: Array, old: Array, advantage: Array, clip: float) -> Array:
    if not clip > 0:
        raise ValueError(f"clip is {clip}; expected a number > 0")
    advantage = lax.stop_gradient(advantage)
    # The smaller of both branches, chosen before the exponential, which may overflow in the other.
    most, least = math.log1p(clip), math.log1p(-clip) if clip < 1 else -math.inf
    change = policy - old
    gaining = advantage >= 0
    return advantage * jnp.exp(
        jnp.where(gaining, jnp.minimum(change, most), jnp.maximum(change, least))
    )
