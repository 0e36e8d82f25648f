"""Whether a method's expected loss has a minimum, and how many: before anything is solved for.

Losses that fall without end as a log-ratio grows have a minimum only where the feedback contradicts
itself enough: along no direction may the loss be lost to infinity. NumPy and SciPy, on the host.
"""

import enum
from typing import Any

import numpy as np
from scipy.optimize import linprog

from jaxsim.methods.population import Method, Prompt


class OptimumStatus(enum.IntEnum):
    """What kind of optimum a method has."""

    FOUND = 0
    NOT_UNIQUE = 1
    NOT_ATTAINED = 2
    UNBOUNDED = 3
    NOT_FOUND = 4

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return _MESSAGES[self]


_MESSAGES = {
    OptimumStatus.FOUND: "Training comes to rest at this policy.",
    OptimumStatus.NOT_UNIQUE: "A set of policies is optimal; this is one of them.",
    OptimumStatus.NOT_ATTAINED: "No finite logits are optimal: probabilities go to zero. The "
    "policy is the limit, where it is known.",
    OptimumStatus.UNBOUNDED: "The expected loss has no lower bound.",
    OptimumStatus.NOT_FOUND: "The solver did not converge; the policy is where it stopped.",
}
_ROUNDING = 1e-12  # of the largest weight: a sum of weights that is more negative is negative


def judge(how: Method, prompts: Prompt, hyper: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the status of each prompt's optimum, and the outputs that feedback ties to each other.

    Args:
        how: the method.
        prompts: a batch, with its feedback.
        hyper: the method's hyperparameters.

    Returns:
        `OptimumStatus` as far as the feedback alone decides it, [instances]; and whether two
        outputs' log-ratios are tied, [instances, outputs, outputs].
    """
    support = np.asarray(prompts.support)
    pairs = support[:, :, None] & support[:, None, :]
    own = np.eye(support.shape[1], dtype=bool)
    status = np.zeros(len(support), np.int8)
    if how.kind not in ("pairs", "rankings"):
        return status, pairs | own
    before = precedes(np.asarray(prompts.weights))
    groups = reachable(before | before.swapaxes(1, 2)) if how.ratios else pairs | own
    status[np.any(pairs & ~groups, axis=(1, 2))] = OptimumStatus.NOT_UNIQUE
    if how.attained == "wins":
        never = np.any(support & ~before.any(axis=2), axis=1)
        status[never & before.any(axis=(1, 2))] = OptimumStatus.NOT_ATTAINED
    if how.attained == "connected":
        net = how.net(np.asarray(prompts.weights), hyper)
        edges = before if net is None else net > 0
        strong = reachable(edges)
        status[np.any(groups != (strong & strong.swapaxes(1, 2)), axis=(1, 2))] = (
            OptimumStatus.NOT_ATTAINED
        )
        for at in np.flatnonzero([] if net is None else np.any(net < 0, axis=(1, 2))):
            status[at] = _with_negative_weights(net[at], bool(status[at]))
    return status, groups


def precedes(weights: np.ndarray) -> np.ndarray:
    """Return whether the row's output came before the column's in any pair or ranking."""
    places = range(1, weights.ndim)
    before = np.zeros(weights.shape[:2] + weights.shape[1:2], bool)
    for first in places:
        for later in range(first + 1, weights.ndim):
            before |= np.any(weights > 0, axis=tuple(a for a in places if a not in (first, later)))
    return before


def reachable(edges: np.ndarray) -> np.ndarray:
    """Return which outputs can be reached from which, each from itself, along directed edges."""
    reach = edges | np.eye(edges.shape[1], dtype=bool)
    for _ in range(max(1, (edges.shape[1] - 1).bit_length())):
        hops = reach.astype(np.float32)
        reach = hops @ hops > 0
    return reach


def _with_negative_weights(net: np.ndarray, free: bool) -> OptimumStatus:
    """Return whether Σ net_ij log(1 + e^-(s_i - s_j)), with net_ij + net_ji ≥ 0, has a minimum.

    Far out it is Σ net_ij max(0, s_j - s_i), convex and linear along rays: a linear programme.
    """
    n = len(net)
    i, j = np.triu_indices(n, 1)
    used = (net[i, j] != 0) | (net[j, i] != 0)
    i, j = i[used], j[used]
    m, rows = len(i), np.arange(len(i))
    # x = (v, ξ): Σ net_ij (v_j - v_i) + (net_ij + net_ji) ξ_ij, ξ ≥ v_i - v_j, ξ ≥ 0, 0 ≤ v ≤ 1.
    cost = np.zeros(n + m)
    np.add.at(cost, j, net[i, j])
    np.add.at(cost, i, -net[i, j])
    cost[n:] = net[i, j] + net[j, i]
    at_least = np.zeros((m, n + m))
    at_least[rows, i], at_least[rows, j], at_least[rows, n + rows] = 1, -1, -1
    scale = np.abs(net).max()
    solved = linprog(
        cost / scale, A_ub=at_least, b_ub=np.zeros(m), bounds=[(0, 1)] * n + [(0, None)] * m
    )
    if solved.status == 3 or solved.fun < -_ROUNDING:
        return OptimumStatus.UNBOUNDED
    return OptimumStatus.NOT_UNIQUE if free else OptimumStatus.FOUND
