"""Shrink a failing instance to one that a person can check: fewer outputs, then simpler numbers.

On the host, in float64, on one instance at a time; independent of the kernels that found it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxsim.instance import Instance

_SMALL = 12  # from here on, every drop and every merge is tried


@dataclass(frozen=True, kw_only=True)
class Example:
    """An instance as plain probabilities in float64, with a name for each output."""

    p_aligned: np.ndarray
    p_unaligned: np.ndarray
    reward: np.ndarray
    alpha: float
    beta: float
    names: tuple[str, ...]

    @classmethod
    def of(cls, instance: Instance, names: list[str] | None) -> "Example":
        """Copy one instance to the host, leaving out what lies outside the support."""
        p_a, p_u = (
            np.exp(np.asarray(log_p, np.float64))
            for log_p in (instance.log_p_aligned, instance.log_p_unaligned)
        )
        reward = np.asarray(instance.reward, np.float64)
        names = names or [f"y{i + 1}" for i in range(reward.size)]
        kept = np.flatnonzero(p_a + p_u > 0)
        logit = float(instance.logit_alpha)
        example = cls(
            p_aligned=p_a,
            p_unaligned=p_u,
            reward=reward,
            alpha=1 / (1 + np.exp(-logit)),
            beta=float(instance.beta),
            names=tuple(names),
        )
        return _select(example, kept)

    @property
    def p_ref(self) -> np.ndarray:
        """Return eq. (2)."""
        return self.alpha * self.p_aligned + (1 - self.alpha) * self.p_unaligned

    @property
    def log_z(self) -> float:
        """Return log E_ref[e^{r/β}]."""
        return _log_mean_exp(self.p_ref, self.reward / self.beta)

    @property
    def p_star(self) -> np.ndarray:
        """Return the optimum of eq. (1)."""
        return self.p_ref * np.exp(self.reward / self.beta - self.log_z)

    @property
    def log_odds_shift(self) -> float:
        """Return Δ = log E_A[e^{r/β}] - log E_U[e^{r/β}]."""
        t = self.reward / self.beta
        return _log_mean_exp(self.p_aligned, t) - _log_mean_exp(self.p_unaligned, t)

    @property
    def tpm_aligned(self) -> float:
        """Return TPM(A)."""
        odds = np.log(self.alpha) - np.log1p(-self.alpha) + self.log_odds_shift
        return float(1 / (1 + np.exp(-odds)))

    def covariance(self, p: np.ndarray) -> float:
        """Return Cov(r, p) under the uniform distribution on the support."""
        return float(np.mean((self.reward - self.reward.mean()) * (p - p.mean())))

    def to_json(self) -> dict[str, Any]:
        """Return everything that a reader needs to check it by hand."""
        return {
            "alpha": self.alpha,
            "beta": self.beta,
            "names": list(self.names),
            "reward": self.reward.tolist(),
            "p_aligned": self.p_aligned.tolist(),
            "p_unaligned": self.p_unaligned.tolist(),
            "p_ref": self.p_ref.tolist(),
            "p_star": self.p_star.tolist(),
            "log_z": self.log_z,
            "tpm_aligned": self.tpm_aligned,
            "log_odds_shift": self.log_odds_shift,
            "covariance_aligned": self.covariance(self.p_aligned),
            "covariance_unaligned": self.covariance(self.p_unaligned),
        }


def _log_mean_exp(p: np.ndarray, t: np.ndarray) -> float:
    kept = p > 0
    exponent = np.log(p[kept]) + t[kept]
    top = exponent.max()
    return float(top + np.log(np.exp(exponent - top).sum()))


def _hypotheses_hold(x: Example) -> bool:
    """Whether Cov(r, p_A) > 0 > Cov(r, p_U), by more than rounding could feign."""
    scale = np.ptp(x.reward) * 1e-6
    return x.covariance(x.p_aligned) > scale and x.covariance(x.p_unaligned) < -scale


def theorem_2_depth(x: Example) -> float:
    """Return -Δ where the hypotheses of Theorem 2 hold, by a clear margin; else -1."""
    return -x.log_odds_shift if _hypotheses_hold(x) else -1.0


def correlation_depth(x: Example) -> float:
    """Return how far e^{r/β} has lost a correlation that r has; else -1."""
    if not _hypotheses_hold(x):
        return -1.0
    t = x.reward / x.beta
    mean = _log_mean_exp(np.full(t.size, 1 / t.size), t)
    kept = _log_mean_exp(x.p_aligned, t) - mean, mean - _log_mean_exp(x.p_unaligned, t)
    return -min(kept)


def factor_depth(x: Example) -> float:
    """Return |log Z|: how far the factor p*/p_ref is from e^{r/β}."""
    return abs(x.log_z)


# By the name of the claim that fails (`jaxsim.claims`).
DEPTHS = {
    "theorem_2": theorem_2_depth,
    "correlation_kept": correlation_depth,
    "shrunk_by_exp_reward": factor_depth,
}


def shrink(example: Example, depth: Callable[[Example], float]) -> Example:
    """Drop and merge outputs while `depth` stays positive, then round the numbers likewise.

    Args:
        example: an instance with depth > 0.
        depth: how deeply an instance fails; positive iff it does.

    Returns:
        An instance that fails, none of whose outputs can be dropped or merged with another.

    Raises:
        ValueError: where the example does not fail to begin with.
    """
    threshold = 1e-3
    if not depth(example) > threshold:
        raise ValueError(f"the instance does not fail clearly: its depth is {depth(example):.2g}")
    example = _drop_chunks(example, depth, threshold)
    while True:
        while smaller := [x for x in _smaller(example) if depth(x) > threshold]:
            example = max(smaller, key=depth)
        rounded = [x for digits in (1, 2, 3) if (x := _rounded(example, digits)) is not None]
        simple = next((x for x in rounded if depth(x) > threshold), None)
        if simple is None:
            break
        example = simple
        if not any(depth(x) > threshold for x in _smaller(example)):
            break  # else rounding has made room to drop or merge once more
    order = np.argsort(example.reward, kind="stable")
    return _select(example, order)


def _drop_chunks(example: Example, depth: Callable[[Example], float], threshold: float) -> Example:
    """Drop runs of outputs, long ones first, while more than a few are left."""
    chunk = example.reward.size // 2
    while chunk >= 1 and example.reward.size > _SMALL:
        at = 0
        while at < example.reward.size > _SMALL:
            keep = np.delete(np.arange(example.reward.size), slice(at, at + chunk))
            candidate = _select(example, keep)
            if candidate is not None and depth(candidate) > threshold:
                example = candidate
            else:
                at += chunk
        chunk //= 2
    return example


def _smaller(example: Example) -> Iterator[Example]:
    """Yield every instance with one output dropped or two merged."""
    n = example.reward.size
    if n == 1:
        return
    for i in range(n):
        dropped = _select(example, np.delete(np.arange(n), i))
        if dropped is not None:
            yield dropped
    for i in range(n):
        for j in range(i + 1, n):
            yield _merged(example, i, j)


def _select(example: Example, keep: np.ndarray) -> Any:
    """Return the instance on some of its outputs, renormalised; None if a component is empty."""
    p_a, p_u = example.p_aligned[keep], example.p_unaligned[keep]
    if p_a.sum() <= 0 or p_u.sum() <= 0:
        return None
    return replace(
        example,
        p_aligned=p_a / p_a.sum(),
        p_unaligned=p_u / p_u.sum(),
        reward=example.reward[keep],
        names=tuple(example.names[i] for i in keep),
    )


def _merged(example: Example, i: int, j: int) -> Example:
    """Return the instance with output j added to output i, at their mean reward under p_ref."""
    weights = example.p_ref[[i, j]]
    reward = example.reward.copy()
    reward[i] = np.average(reward[[i, j]], weights=weights)
    p_a, p_u = example.p_aligned.copy(), example.p_unaligned.copy()
    p_a[i] += p_a[j]
    p_u[i] += p_u[j]
    names = list(example.names)
    names[i] = _joined(names[i], names[j])
    joined = replace(example, p_aligned=p_a, p_unaligned=p_u, reward=reward, names=tuple(names))
    return _select(joined, np.delete(np.arange(reward.size), j))


def _rounded(example: Example, digits: int) -> Example | None:
    """Return the instance in decimals of `digits` places, at α = 1/2; None if it is none."""

    def component(p: np.ndarray) -> np.ndarray:
        q = np.round(p, digits)
        q[np.argmax(q)] += 1 - q.sum()
        return np.round(q, digits)

    p_a, p_u = component(example.p_aligned), component(example.p_unaligned)
    if min(p_a.min(), p_u.min()) < 0 or (p_a + p_u).min() <= 0:
        return None
    reward = np.round(example.reward - example.reward.min(), digits)
    return replace(example, p_aligned=p_a, p_unaligned=p_u, reward=reward, alpha=0.5)


def _joined(one: str, other: str) -> str:
    """Name a merged output by its first two parts and the number of the others."""
    parts: list[str] = []
    more = 0
    for part in f"{one} + {other}".split(" + "):
        if part.endswith(" more") and part[:-5].isdigit():
            more += int(part[:-5])
        else:
            parts.append(part)
    more += max(0, len(parts) - 2)
    return " + ".join(parts[:2]) + (f" + {more} more" if more else "")
