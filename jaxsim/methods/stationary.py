"""The population optimum of a loss of pairs that is known by its values and gradients alone.

`population_optimum` needs a loss that JAX can trace; this asks a `ForeignLoss` about every pair of
outputs of a few small instances. NumPy and SciPy, on the host, in float64.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.special import log_softmax

from jaxsim.methods.existence import OptimumStatus
from jaxsim.methods.foreign import ForeignLoss

_TOLERANCE = 1e-9
_CLOSE = 1e-3  # a last step by which a solve is over, where rounding allows no smaller one
_FLAT = 1e-8  # a curvature, per appearance of an output and in units of (1/β)², that is none
_STEPS = 100
_CUTS = 60
_BOX = 200.0  # in units of 1/β², or nats: a minimum further out is at infinity
_AWAY = 20.0  # in units of 1/β: a solve that got so far without an end may have none
_ROUNDING = 1e-9

Bounds = list[tuple[float | None, float | None]]


@dataclass(frozen=True, kw_only=True)
class Stationary:
    """Where a loss comes to rest, a row per instance.

    Attributes:
        log_policy: log π, [instances, outputs]; nan where there is no optimum.
        status: `OptimumStatus` as int8, [instances].
        last_step: how far the last step moved a log-ratio, at most, nats.
    """

    log_policy: np.ndarray
    status: np.ndarray
    last_step: np.ndarray


def unknown(log_ref: np.ndarray) -> Stationary:
    """Return that nothing was found."""
    return Stationary(
        log_policy=np.full(log_ref.shape, np.nan),
        status=np.full(len(log_ref), OptimumStatus.NOT_FOUND, np.int8),
        last_step=np.full(len(log_ref), np.inf),
    )


def minimise(
    loss: ForeignLoss, weights: np.ndarray, log_ref: np.ndarray, beta: float, *, differences: bool
) -> Stationary:
    """Find where the expected loss has its minimum, from p_ref on.

    By Newton's method; where that fails on a loss that is convex in the difference of the policy's
    log-probabilities, such as one with kinks, by cutting planes.

    Args:
        loss: the loss.
        weights: exact feedback on pairs, [instances, outputs, outputs].
        log_ref: log p_ref, [instances, outputs].
        beta: the loss changes over log-ratios of 1/β.
        differences: whether it depends on that difference and the reference alone.

    Returns:
        A `Stationary`.
    """
    found, s = _newton(loss, weights, log_ref, beta)
    if not loss.has_gradient:
        step = loss.step
        smooth = _smooth(loss, weights, log_ref, found.log_policy)
        if loss.step < step:
            found, s = _newton(loss, weights, log_ref, beta)
            smooth = _smooth(loss, weights, log_ref, found.log_policy)
        found.status[~smooth] = OptimumStatus.NOT_FOUND
    for at in np.flatnonzero(found.status == OptimumStatus.NOT_FOUND):
        found.log_policy[at], found.last_step[at] = np.nan, np.inf
        cut = _cutting_planes(loss, weights[at], log_ref[at], beta) if differences else None
        if cut is not None:
            found.log_policy[at], found.status[at], found.last_step[at], s[at] = cut
        if found.status[at] == OptimumStatus.NOT_FOUND and np.abs(s[at]).max() >= _AWAY / beta:
            found.status[at] = _beyond(loss, weights[[at]], log_ref[[at]], s[[at]])
    return found


def expected_gradient(
    loss: ForeignLoss, weights: np.ndarray, log_ref: np.ndarray, log_policy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected loss's gradient in the policy's logits, and a pair's root mean square.

    Args:
        loss: the loss.
        weights: exact feedback on pairs, [instances, outputs, outputs].
        log_ref: log p_ref, [instances, outputs].
        log_policy: log π, likewise.

    Returns:
        Gradients, [instances, outputs], and lengths, [instances].
    """
    pairs = _Pairs(weights)
    one = _in_logits(pairs.each(loss.gradients(pairs.arguments(log_policy, log_ref))), log_policy)
    length = np.sqrt(np.sum(pairs.weights * np.sum(one**2, axis=-1), axis=1))
    return np.einsum("kp,kpn->kn", pairs.weights, one), length


class _Pairs:
    """All pairs of different outputs of a few instances."""

    def __init__(self, weights: np.ndarray) -> None:
        self.num, n = weights.shape[:2]
        self.first, self.second = np.nonzero(~np.eye(n, dtype=bool))
        self.weights = weights[:, self.first, self.second]
        self.places = np.eye(n)[np.stack([self.first, self.second])]  # [2, pairs, outputs]

    def arguments(self, log_policy: np.ndarray, log_ref: np.ndarray) -> np.ndarray:
        """Return the loss's four arguments, [4, instances * pairs]."""
        columns = [x[:, at] for x in (log_policy, log_ref) for at in (self.first, self.second)]
        return np.stack(columns).reshape(4, -1)

    def each(self, gradients: np.ndarray) -> np.ndarray:
        """Return each pair's gradient in log π, [instances, pairs, outputs]."""
        return np.einsum("akp,apn->kpn", gradients.reshape(2, self.num, -1), self.places)


def _in_logits(gradient: np.ndarray, log_policy: np.ndarray) -> np.ndarray:
    """Return a gradient in log π as one in logits, [instances, pairs, outputs]."""
    return gradient - np.exp(log_policy)[:, None] * gradient.sum(axis=-1, keepdims=True)


def _smooth(
    loss: ForeignLoss, weights: np.ndarray, log_ref: np.ndarray, log_policy: np.ndarray
) -> np.ndarray:
    """Return whether no pair of an instance, where it came to rest, is at a kink."""
    pairs = _Pairs(weights)
    there = np.where(np.isnan(log_policy), log_ref, log_policy)
    smooth = loss.smooth(pairs.arguments(there, log_ref)).reshape(pairs.num, -1)
    return np.asarray(smooth.all(axis=1))


def _beyond(
    loss: ForeignLoss, weights: np.ndarray, log_ref: np.ndarray, s: np.ndarray
) -> OptimumStatus:
    """Tell what lies at the end of a way on which no minimum was found."""
    start, here, far, farther = (
        _expected(loss, weights, log_ref, log_ref + t * s)[0] for t in (0, 1, 1e4, 2e4)
    )
    if not farther <= far <= here < start:
        return OptimumStatus.NOT_FOUND
    falls = here - far > start - here  # on and on, though slower
    return OptimumStatus.UNBOUNDED if falls else OptimumStatus.NOT_ATTAINED


def _expected(
    loss: ForeignLoss, weights: np.ndarray, log_ref: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    pairs = _Pairs(weights)
    x = pairs.arguments(log_softmax(logits, axis=1), log_ref)
    return np.sum(pairs.weights * loss.values(x).reshape(pairs.num, -1), axis=1)


def _newton(
    loss: ForeignLoss, weights: np.ndarray, log_ref: np.ndarray, beta: float
) -> tuple[Stationary, np.ndarray]:
    """Follow the expected loss's flow, as `population_optimum` does, in u = β log(π/p_ref).

    Implicit Euler steps that grow as the rate falls become Newton's; explicit ones where the flow
    diverges, and an implicit step would go backwards.
    """
    num, n = log_ref.shape
    met = weights.sum(axis=1) + weights.sum(axis=2)
    nudge = loss.unit_roundoff ** (1 / 3)

    def rate(u: np.ndarray) -> np.ndarray:
        log_policy = log_softmax(log_ref + u / beta, axis=1)
        return -expected_gradient(loss, weights, log_ref, log_policy)[0] / beta / met

    u, last, matrix = np.zeros((num, n)), np.full(num, np.inf), np.zeros((num, n, n))
    first = np.maximum(np.abs(rate(u)).max(axis=1), 1e-300)
    coarse, ended = loss.unit_roundoff > 1e-12, np.zeros(num, bool)
    for _ in range(_STEPS):
        going = ~((last <= _TOLERANCE) | ended) & np.isfinite(u).all(axis=1)
        if not going.any():
            break
        r = rate(u)
        columns = [(r - rate(u + h)) / nudge for h in nudge * np.eye(n)[1:]]
        columns.insert(0, -sum(columns))  # a constant changes nothing
        # Free as it is, it is filled in to make the matrix invertible.
        matrix[going] = (np.stack(columns, axis=-1) + 1 / n)[going]
        size = np.abs(matrix - 1 / n).max(axis=(1, 2))
        damping = size * np.minimum(1.0, np.abs(r).max(axis=1) / first)
        move = _solved(matrix + damping[:, None, None] * np.eye(n), r)
        move = np.where(np.sum(move * r, axis=1, keepdims=True) > 0, move, r)
        most = np.abs(move).max(axis=1)
        leap = beta + np.abs(u).max(axis=1) / 4
        u[going] += (move / np.maximum(1.0, most / leap)[:, None])[going]
        # Coarse arithmetic may allow no smaller step than the last one.
        over = coarse & (last <= _CLOSE) & (most / beta > last / 2)
        last[going] = np.where(over, last, most / beta)[going]
        ended |= over
    status = np.full(num, OptimumStatus.NOT_FOUND, np.int8)
    at_rest = last <= _CLOSE
    least = np.zeros(num)
    least[at_rest] = np.linalg.eigvals(matrix[at_rest]).real.min(axis=1)
    status[least > _FLAT] = OptimumStatus.FOUND
    status[(last <= _TOLERANCE) & (np.abs(least) <= _FLAT)] = OptimumStatus.NOT_UNIQUE
    log_policy = log_softmax(log_ref + u / beta, axis=1)
    log_policy[status == OptimumStatus.NOT_FOUND] = np.nan
    return Stationary(log_policy=log_policy, status=status, last_step=last), u / beta


def _solved(matrix: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Solve, singular matrices by the smallest solution; nan for what is not finite."""
    sound = np.isfinite(matrix).all(axis=(1, 2)) & np.isfinite(r).all(axis=1)
    move = np.full_like(r, np.nan)
    move[sound] = (np.linalg.pinv(matrix[sound]) @ r[sound, :, None])[..., 0]
    return move


def _cutting_planes(
    loss: ForeignLoss, weights: np.ndarray, log_ref: np.ndarray, beta: float
) -> tuple[np.ndarray, OptimumStatus, float, np.ndarray] | None:
    """Minimise Σ W_ij φ_ij(s_i - s_j) for convex φ_ij, as linear programmes over its tangents.

    Exact where φ is piecewise linear, after a few rounds.

    Returns:
        log π, the status, the last step and s; None where a φ is not convex.
    """
    pairs = _Pairs(weights[None])
    i, j, w = pairs.first, pairs.second, pairs.weights[0] / pairs.weights.sum()
    n, m = len(log_ref), len(w)
    unit = max(1.0, 1 / beta)
    box = _BOX * unit
    difference = pairs.places[0] - pairs.places[1]

    def tangents(apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return φ and its slope, from values alone: at a kink, one of its subgradients."""
        h = 1e-5
        moved = np.concatenate([apart, apart - h, apart + h]) * unit
        rest = [np.tile(x, 3) for x in (log_ref[j], log_ref[i], log_ref[j])]
        value, low, high = loss.values(np.stack([moved + np.tile(log_ref[i], 3), *rest])).reshape(
            3, m
        )
        return value, (high - low) / (2 * h)

    def cut(apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of slope (v_i - v_j) - t <= slope apart - φ, over (v, t)."""
        value, slope = tangents(apart)
        return np.hstack([slope[:, None] * difference, -np.eye(m)]), slope * apart - value

    grid = np.linspace(-8, 8, 9)
    if not _rises(np.array([tangents(np.full(m, d))[1] for d in grid])):
        return None
    rows, most = map(np.concatenate, zip(*[cut(np.full(m, d)) for d in grid], strict=True))
    bounds: Bounds = [(0.0, 0.0)] + [(-box, box)] * (n - 1) + [(None, None)] * m
    cost = np.concatenate([np.zeros(n), w])
    lost, s = (np.full(n, np.nan), OptimumStatus.NOT_FOUND, np.inf), np.zeros(n)
    for _ in range(_CUTS):
        x = _linear_programme(cost, rows, most, bounds)
        if x is None:
            return *lost, s
        s, apart = unit * x[:n], difference @ x[:n]
        if w @ (tangents(apart)[0] - x[n:]) <= _ROUNDING * (1 + abs(cost @ x)):
            break
        more, at_most = cut(apart)
        rows, most = np.concatenate([rows, more]), np.concatenate([most, at_most])
    else:
        return *lost, s
    if np.abs(x[:n]).max() > 0.99 * box:
        return *lost, s
    # Is there another minimum, in one of two directions that nothing is likely to be orthogonal to?
    rows, most = np.concatenate([rows, cost[None]]), np.append(most, cost @ x + _ROUNDING)
    away = np.concatenate([np.sqrt(np.arange(n)), np.zeros(m)])
    others = (_linear_programme(sign * away, rows, most, bounds) for sign in (1, -1))
    spread = max((np.abs(y - x)[:n].max() for y in others if y is not None), default=0.0)
    status = OptimumStatus.NOT_UNIQUE if spread > 1e-3 else OptimumStatus.FOUND
    return log_softmax(log_ref + s), status, _TOLERANCE, s


def _rises(slopes: np.ndarray) -> bool:
    """Return whether slopes rise along the first axis, up to rounding: whether φ is convex."""
    return bool(np.diff(slopes, axis=0).min() >= -1e-6 * np.abs(slopes).max())


def _linear_programme(
    cost: np.ndarray, rows: np.ndarray, most: np.ndarray, bounds: Bounds
) -> np.ndarray | None:
    """Return a vector of least cost; None where the solver gives up."""
    solved = linprog(
        cost,
        A_ub=rows,
        b_ub=most,
        bounds=bounds,
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return np.asarray(solved.x) if solved.status == 0 else None
