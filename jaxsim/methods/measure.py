"""Where a policy stands beside eq. (1)'s optima: how far, at what cost, and on which side of α."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxsim.instance import Instance

_BISECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class PolicyMeasures:
    """What `measure_policy` finds, a number per instance; NumPy arrays in float64.

    Attributes:
        tv: total variation distance to p*, ½ Σ |π - p*|.
        kl: KL(π‖p*), nats; infinite where π has mass outside the support.
        kl_reference: KL(π‖p_ref), nats.
        expected_reward: E_π[r].
        regret: what eq. (1)'s optimum of the same KL(·‖p_ref), at another β, earns more, ≥ 0.
        implied_beta: that β: infinite for p_ref itself, 0 where no optimum is as far from p_ref.
        tpm_aligned: TPM(A; π) = E_π[α p_A/p_ref].
        tpm_aligned_optimum: TPM(A) of p*.
    """

    tv: Float[np.ndarray, "..."]
    kl: Float[np.ndarray, "..."]
    kl_reference: Float[np.ndarray, "..."]
    expected_reward: Float[np.ndarray, "..."]
    regret: Float[np.ndarray, "..."]
    implied_beta: Float[np.ndarray, "..."]
    tpm_aligned: Float[np.ndarray, "..."]
    tpm_aligned_optimum: Float[np.ndarray, "..."]


def measure_policy(log_policy: ArrayLike, instance: Instance) -> PolicyMeasures:
    """Measure any policy against eq. (1)'s optima, on the host, in float64.

    Args:
        log_policy: log π, nats, normalised, [outputs] or [instances, outputs]; rows that hold nan
            are measured as nan.
        instance: one instance, or a batch with one leading axis.

    Returns:
        `PolicyMeasures`.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> from jaxsim import Instance, measure_policy, optimal_policy
        >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
        >>> found = measure_policy(optimal_policy(instance), instance)
        >>> bool(found.tv < 1e-6), round(float(found.implied_beta), 4)
        (True, 1.0)
    """
    log_pi = np.asarray(log_policy, np.float64)
    if log_pi.shape != instance.reward.shape:
        raise ValueError(
            f"log_policy has shape {log_pi.shape}; the reward calls for {instance.reward.shape}"
        )
    wide: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), instance)
    if log_pi.ndim == 1:
        log_pi, wide = log_pi[None], jax.tree.map(lambda x: x[None], wide)
    found = _measure(log_pi, wide)
    if instance.reward.ndim == 1:
        found = {name: value[0] for name, value in found.items()}
    return PolicyMeasures(**found)


def _measure(log_pi: np.ndarray, instance: Any) -> dict[str, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        log_a = -np.logaddexp(0, -instance.logit_alpha)[:, None] + _normalised(
            instance.log_p_aligned
        )
        log_u = -np.logaddexp(0, instance.logit_alpha)[:, None] + _normalised(
            instance.log_p_unaligned
        )
        log_ref = np.logaddexp(log_a, log_u)
        share = np.where(np.isneginf(log_ref), 0.0, np.exp(log_a - log_ref))
        reward = np.where(np.isneginf(log_ref), 0.0, instance.reward)
        star = _tilted(log_ref, reward, 1 / instance.beta)
        pi = np.exp(log_pi)
        earned = np.sum(pi * reward, axis=1)
        cost = _kl(pi, log_pi, log_ref)
        inverse_beta = _inverse_beta_at(cost, log_ref, reward)
        # Where no optimum is as far away, the best there is: all mass on the best outputs.
        alike = np.exp(_tilted(log_ref, reward, np.where(np.isinf(inverse_beta), 0, inverse_beta)))
        best = np.max(np.where(np.isneginf(log_ref), -np.inf, reward), axis=1)
        at_most = np.where(np.isinf(inverse_beta), best, np.sum(alike * reward, axis=1))
        return {
            "tv": np.abs(pi - np.exp(star)).sum(axis=1) / 2,
            "kl": _kl(pi, log_pi, star),
            "kl_reference": cost,
            "expected_reward": earned,
            "regret": np.maximum(at_most - earned, np.where(np.isnan(earned), np.nan, 0.0)),
            "implied_beta": 1 / inverse_beta,
            "tpm_aligned": np.sum(pi * share, axis=1),
            "tpm_aligned_optimum": np.sum(np.exp(star) * share, axis=1),
        }


def _normalised(log_p: np.ndarray) -> np.ndarray:
    return log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)


def _tilted(log_ref: np.ndarray, reward: np.ndarray, inverse_beta: np.ndarray) -> np.ndarray:
    """Return log of p_ref e^{r/β}/Z."""
    return _normalised(log_ref + reward * inverse_beta[:, None])


def _kl(p: np.ndarray, log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    terms = np.where(p > 0, p * (log_p - log_q), p)  # p is 0, or nan
    return np.maximum(terms.sum(axis=1), np.where(np.isnan(terms.sum(axis=1)), np.nan, 0.0))


def _inverse_beta_at(kl: np.ndarray, log_ref: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Return 1/β of the optimum of eq. (1) with this KL(p*‖p_ref); infinite where there is none."""
    top = np.max(np.where(np.isneginf(log_ref), -np.inf, reward), axis=1, keepdims=True)
    bottom = np.min(np.where(np.isneginf(log_ref), np.inf, reward), axis=1, keepdims=True)
    spread = np.where(top > bottom, top - bottom, 1.0)[:, 0]
    furthest = -np.logaddexp.reduce(np.where(reward == top, log_ref, -np.inf), axis=1)
    low, high = np.full(len(kl), -40.0), np.full(len(kl), 40.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        there = _tilted(log_ref, reward, np.exp(middle) / spread)
        short = _kl(np.exp(there), there, log_ref) < kl
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    found = np.where(kl >= furthest, np.inf, np.exp((low + high) / 2) / spread)
    return np.where(kl <= 0, 0.0, np.where(np.isnan(kl), np.nan, found))
