"""Optima of losses that ask for a margin: the hinge, a linear programme, and SLiC-HF's.

Both minimise Σ W_ij max(0, δ - (x_i - x_j)), over x = log(π/p_ref) or x = log π. NumPy and SciPy,
on the host, in float64.
"""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

_BOUND = 1e-7  # of a pair's weight: a flow this near to one of its bounds is at it
_STEP = 1e-9
_MAX_STEPS = 200


def hinge(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Minimise Σ W_ij max(0, 1 - (x_i - x_j)): a linear programme.

    Its dual is a circulation along the pairs, at most W_ij on each, that is as large as possible.
    By complementary slackness with one such circulation, the set of all minima is given by bounds
    on differences (at least 1 where nothing flows, at most 1 where the weight is used up), whose
    tightest consequences are shortest paths. Corners of that set have integer differences.

    Args:
        weights: W, [outputs, outputs], with a diagonal of zeros.

    Returns:
        One minimum x, with x_0 = 0; the least and the greatest x over all minima, infinite where
        nothing ties an output to the first; iterations.

    Raises:
        RuntimeError: where the linear programme is not solved.
    """
    n = len(weights)
    winner, loser = np.nonzero(weights)
    m, pair = len(winner), np.arange(len(winner))
    if not m:
        free = np.full(n, np.inf)
        free[0] = 0
        return np.zeros(n), -free, free, 0
    bound = weights[winner, loser] / weights.max()
    into = csr_array((np.ones(m), (winner, pair)), (n, m))
    out = csr_array((np.ones(m), (loser, pair)), (n, m))
    solved = linprog(
        -np.ones(m),
        A_eq=into - out,
        b_eq=np.zeros(n),
        bounds=np.stack([np.zeros(m), bound], axis=1),
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if solved.status != 0:
        raise RuntimeError(f"hinge: the linear programme was not solved: {solved.message}")
    # most[i, j]: the largest x_j - x_i allowed.
    most = np.full((n, n), np.inf)
    for i, j, flow, limit in zip(winner, loser, solved.x, bound, strict=True):
        if flow <= limit * (1 - _BOUND):  # a pair whose weight is not used up keeps its margin
            most[i, j] = min(most[i, j], -1)
        if flow >= limit * _BOUND:  # and one that is used has no more than that
            most[j, i] = min(most[j, i], 1)
    np.fill_diagonal(most, 0)
    for via in range(n):  # Floyd and Warshall
        most = np.minimum(most, most[:, via, None] + most[None, via])
    low, high = -most[:, 0], most[0]
    bounded = np.isfinite(low).all() and np.isfinite(high).all()
    x = (low + high) / 2 if bounded else most.min(axis=0)
    return x - x[0], low, high, int(solved.nit)


def hinge_with_cross_entropy(
    weights: np.ndarray, target: np.ndarray, *, margin: float, regularization: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise Σ W_ij max(0, δ - (x_i - x_j)) - λ Σ q_i log softmax(x)_i, λ > 0, for a batch.

    A primal-dual interior-point method. With slacks ξ and a = ξ - δ + (x_i - x_j), both ≥ 0, and a
    dual z, W ≥ z ≥ 0, it takes Newton steps on z a = t, (W - z) ξ = t with t → 0.

    Args:
        weights: W, [instances, outputs, outputs], with a diagonal of zeros, summing to about one.
        target: q, [instances, outputs]; zero outside the support.
        margin: δ.
        regularization: λ.

    Returns:
        x of mean zero, [instances, outputs]; how far the last step moved it; steps.
    """
    num, n = target.shape
    support, used = target > 0, weights > 0
    w = np.where(used, weights, 1.0)
    x = np.where(support, np.log(np.where(support, target, 1.0)), 0.0)
    x -= x.sum(axis=1, keepdims=True) / support.sum(axis=1, keepdims=True)
    z, rest = w / 2, w / 2  # rest = W - z, kept apart lest it cancel
    slack = np.maximum(margin, margin - _apart(x)) + 1.0
    room = slack - margin + _apart(x)
    # Against the heaviest output, since x has a constant to spare.
    moves = support & (np.arange(n) != target.argmax(axis=1)[:, None])
    both_move = moves[:, :, None] & moves[:, None]
    last, steps = np.full(num, np.inf), np.zeros(num, np.int32)
    for _ in range(_MAX_STEPS):
        going = last > _STEP
        if not going.any():
            break
        gap = np.sum(np.where(used, z * room + rest * slack, 0.0), axis=(1, 2), keepdims=True)
        t = 0.1 * gap / np.maximum(2 * used.sum(axis=(1, 2), keepdims=True), 1)
        # From both complementarities, to first order: dz = stiff (gain - d(x_i - x_j)).
        stiff = 1 / (room / z + slack / rest)
        gain = (t / z - room) - (t / rest - slack)
        pi = np.where(support, np.exp(x - x.max(axis=1, keepdims=True)), 0.0)
        pi /= pi.sum(axis=1, keepdims=True)
        hessian = regularization * (_diagonal(pi) - pi[:, :, None] * pi[:, None])
        both = np.where(used, stiff, 0.0)
        both = both + both.swapaxes(1, 2)
        hessian += _diagonal(both.sum(axis=2)) - both
        pull = np.where(used, z + stiff * gain, 0.0)  # of winners up, of losers down
        slope = pull.sum(axis=2) - pull.sum(axis=1) + regularization * (target - pi)
        hessian = np.where(both_move, hessian, np.eye(n))
        # In units of its diagonal: a rare output's entries are as small as it is rare.
        unit = 1 / np.sqrt(np.diagonal(hessian, axis1=1, axis2=2))
        scaled = hessian * unit[:, :, None] * unit[:, None] + 1e-15 * np.eye(n)
        dx = unit * np.linalg.solve(scaled, (unit * np.where(moves, slope, 0.0))[..., None])[..., 0]
        dz = stiff * (gain - _apart(dx))
        dslack = t / rest - slack + dz * slack / rest
        droom = t / z - room - dz * room / z
        share = np.ones(num)
        for value, move in ((z, dz), (rest, -dz), (slack, dslack), (room, droom)):
            ratio = np.where(used & (move < 0), -value / np.where(move < 0, move, -1.0), np.inf)
            share = np.minimum(share, 0.99 * ratio.min(axis=(1, 2)))
        share = np.where(going, share, 0.0)[:, None, None]
        x = x + share[..., 0] * dx
        z, rest, slack, room = (
            np.where(used, value + share * move, value)
            for value, move in ((z, dz), (rest, -dz), (slack, dslack), (room, droom))
        )
        scale = weights.sum(axis=(1, 2)) + regularization
        moved = np.maximum(np.abs(dx).max(axis=1), gap[:, 0, 0] / scale)
        last = np.where(going, moved, last)
        steps += going
    return x, last, steps


def _diagonal(x: np.ndarray) -> np.ndarray:
    return x[:, :, None] * np.eye(x.shape[1])


def _apart(x: np.ndarray) -> np.ndarray:
    return x[:, :, None] - x[:, None, :]
