"""What raters say about a prompt's outputs, exactly or by sample, and rewards fitted to it.

Feedback is an array of probabilities or of counts: on pairs [outputs, outputs], how often the
output of the row was preferred to that of the column; on rankings of k outputs [outputs] * k, how
often that list came out, the best first; on single outputs [outputs, 2], how often each was found
desirable and undesirable. Exact expectations and samples are the same kind of thing.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from scipy.sparse.csgraph import connected_components
from scipy.special import expit


def expected_pairs(
    reward: ArrayLike,
    sampling: ArrayLike,
    *,
    flip: float = 0.0,
    compared: ArrayLike | None = None,
) -> Float[Array, "outputs outputs"]:
    """Return the probability of each (chosen, rejected) pair under Bradley and Terry's model.

    Two outputs are drawn independently from μ (normalised here), again and again until they differ
    and are comparable; the first wins with probability (1-ε) σ(r - r') + ε σ(r' - r).

    Args:
        reward: r, [outputs].
        sampling: μ, a probability for each output, [outputs].
        flip: ε, the chance that a label is flipped, 0 ≤ ε ≤ ½.
        compared: which pairs may be drawn, [outputs, outputs], true or false; by default all.

    Returns:
        A matrix that sums to one, with a diagonal of zeros: row chosen, column rejected.

    Raises:
        ValueError: for an ε outside [0, ½], shapes that do not fit, a negative probability, or
            where no pair can be drawn.

    Source:
        Bradley and Terry 1952.

    Example:
        >>> from jaxsim import expected_pairs
        >>> print(expected_pairs([0., 0.], [.5, .5]))
        [[0.  0.5]
         [0.5 0. ]]
    """
    r, mu = _checked(reward, sampling)
    _check_flip(flip)
    wins = jax.nn.sigmoid(r[:, None] - r[None])
    wins = (1 - flip) * wins + flip * wins.T
    drawn = mu[:, None] * mu[None] * (1 - jnp.eye(r.size, dtype=mu.dtype))
    if compared is not None:
        allowed = jnp.asarray(compared, bool)
        drawn = jnp.where(allowed | allowed.T, drawn, 0.0)
    total = jnp.sum(drawn * wins)
    # Shares first: on-policy this is differentiated, and total² may underflow.
    unit = lax.stop_gradient(jnp.where(total > 0, total, 1.0))
    if not isinstance(total, jax.core.Tracer) and not total > 0:
        raise ValueError("no pair can be drawn: sampling or compared leave none")
    return drawn / unit * wins / jnp.where(total > 0, total / unit, 1.0)


def expected_rankings(reward: ArrayLike, sampling: ArrayLike, *, size: int) -> Float[Array, "..."]:
    """Return the probability of each ranking of so many outputs under Plackett and Luce's model.

    The outputs are drawn independently from μ (normalised here), again and again until all differ;
    the best is chosen with probabilities softmax(r), then the best of the rest, and so on.

    Args:
        reward: r, [outputs].
        sampling: μ, a probability for each output, [outputs].
        size: k, how many outputs are ranked, from 2 to the number of outputs.

    Returns:
        An array [outputs] * k that sums to one, indexed by the best output first; zero where an
        index is repeated. For k = 2 it is `expected_pairs`.

    Raises:
        ValueError: for a size out of range, shapes that do not fit, a negative probability, or
            where no list can be drawn.

    Source:
        Plackett 1975; Luce 1959.

    Example:
        >>> from jaxsim import expected_rankings
        >>> print(expected_rankings([0., 0.], [.5, .5], size=2))
        [[0.  0.5]
         [0.5 0. ]]
    """
    r, mu = _checked(reward, sampling)
    if not 2 <= size <= r.size:
        raise ValueError(f"size is {size}; expected 2 to the number of outputs, {r.size}")
    index = np.indices((r.size,) * size).reshape(size, -1).T
    ranked = r[index]
    rest = lax.cumlogsumexp(ranked, axis=1, reverse=True)
    distinct = np.all(np.diff(np.sort(index, axis=1), axis=1) > 0, axis=1)
    drawn = jnp.where(distinct, jnp.prod(mu[index], axis=1), 0.0)
    total = jnp.sum(drawn)
    if not isinstance(total, jax.core.Tracer) and not total > 0:
        raise ValueError("no list can be drawn: sampling leaves too few outputs")
    # Each set is counted in k! orders, whose probabilities sum to one.
    unit = lax.stop_gradient(jnp.where(total > 0, total, 1.0))
    chance = drawn / unit * jnp.exp(jnp.sum(ranked - rest, axis=1))
    chance = chance * (math.factorial(size) / jnp.where(total > 0, total / unit, 1.0))
    return chance.reshape((r.size,) * size)


def expected_thumbs(
    reward: ArrayLike, sampling: ArrayLike, *, threshold: float | None = None, flip: float = 0.0
) -> Float[Array, "outputs 2"]:
    """Return the probability that each output is drawn and found desirable, or undesirable.

    An output is drawn from μ (normalised here) and found desirable with probability
    (1-ε) σ(r - c) + ε σ(c - r).

    Args:
        reward: r, [outputs].
        sampling: μ, a probability for each output, [outputs].
        threshold: c; by default the mean reward under μ, so that a constant added to r changes
            nothing (with a c of your own it does).
        flip: ε, the chance that a label is flipped, 0 ≤ ε ≤ ½.

    Returns:
        A matrix that sums to one: column 0 desirable, column 1 undesirable.

    Raises:
        ValueError: for an ε outside [0, ½], shapes that do not fit, or a negative probability.

    Source:
        Ethayarajh et al. 2024 leave open who is desirable; this is Bradley and Terry's model
        against an output of reward c.

    Example:
        >>> from jaxsim import expected_thumbs
        >>> print(expected_thumbs([1., 1.], [.5, .5]))
        [[0.25 0.25]
         [0.25 0.25]]
    """
    r, mu = _checked(reward, sampling)
    _check_flip(flip)
    mu = mu / jnp.sum(mu)
    above = r - (jnp.sum(mu * r) if threshold is None else threshold)
    good, bad = jax.nn.sigmoid(above), jax.nn.sigmoid(-above)
    return mu[:, None] * jnp.stack(
        [(1 - flip) * good + flip * bad, (1 - flip) * bad + flip * good], axis=1
    )


def _checked(reward: ArrayLike, sampling: ArrayLike) -> tuple[Array, Array]:
    r, mu = jnp.asarray(reward), jnp.asarray(sampling)
    if r.ndim != 1 or mu.shape != r.shape:
        raise ValueError(
            f"reward has shape {r.shape} and sampling {mu.shape}; expected [outputs] both"
        )
    if not isinstance(mu, jax.core.Tracer) and not np.all(np.asarray(mu) >= 0):
        raise ValueError("sampling holds a negative number or nan; expected probabilities")
    return r, mu


def _check_flip(flip: float) -> None:
    if not 0 <= flip <= 0.5:
        raise ValueError(f"flip is {flip}; expected 0 to 0.5")


def sample_feedback(key: jax.Array, expected: ArrayLike, num: int) -> Int[Array, "..."]:
    """Draw so many preferences, rankings or thumbs; return how often each came out.

    Args:
        key: a typed key.
        expected: the probability of each (`expected_pairs`, `expected_rankings`,
            `expected_thumbs`).
        num: how many, at least 1.

    Returns:
        Counts in the shape of `expected`, that sum to `num`.

    Raises:
        ValueError: for num < 1, or probabilities that are all zero.

    Example:
        >>> import jax
        >>> from jaxsim import expected_pairs, sample_feedback
        >>> int(sample_feedback(jax.random.key(0), expected_pairs([0., 1.], [.5, .5]), 10).sum())
        10
    """
    if num < 1:
        raise ValueError(f"num is {num}; expected at least 1")
    flat = jnp.asarray(expected).reshape(-1)
    if not isinstance(flat, jax.core.Tracer) and not jnp.sum(flat) > 0:
        raise ValueError("expected holds nothing of positive probability, or nan")
    up_to = jnp.cumsum(flat * 1.0)  # whole numbers too
    points = up_to[-1] * jax.random.uniform(key, (num,), up_to.dtype)
    # What rounds up to the whole belongs to the last one of positive probability.
    points = jnp.minimum(points, jnp.nextafter(up_to[-1], jnp.zeros_like(up_to[-1])))
    drawn = jnp.searchsorted(up_to, points, side="right")
    return jnp.bincount(drawn, length=flat.size).reshape(jnp.shape(expected))


SAMPLING = ("reference", "uniform", "policy")


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How raters are asked; a method takes from it the kind of feedback that it learns from.

    Attributes:
        sampling: μ, which outputs they see: "reference" (p_ref), "uniform" (over its support),
            "policy" (the policy being tuned, on-policy), or probabilities, [outputs] or
            [instances, outputs].
        flip: the chance that a label of a pair or of a single output is flipped, 0 to ½.
        compared: which pairs may be drawn, [outputs, outputs], true or false; by default all.
        list_size: how many outputs are ranked, where a method learns from rankings.
        threshold: the reward that counts as desirable with chance ½; by default the mean under μ.

    Raises:
        ValueError: for an unknown name of a sampling, or a flip outside [0, ½].
    """

    sampling: str | ArrayLike = "reference"
    flip: float = 0.0
    compared: ArrayLike | None = None
    list_size: int = 3
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_flip(self.flip)
        if isinstance(self.sampling, str) and self.sampling not in SAMPLING:
            raise ValueError(
                f"sampling is {self.sampling!r}; expected {', '.join(SAMPLING)} or probabilities"
            )

    def expected(self, kind: str, reward: ArrayLike, sampling: ArrayLike) -> Array:
        """Return exact feedback of a kind, "pairs", "rankings" or "thumbs", given μ itself."""
        if kind == "pairs":
            return expected_pairs(reward, sampling, flip=self.flip, compared=self.compared)
        if kind == "rankings":
            return expected_rankings(reward, sampling, size=self.list_size)
        return expected_thumbs(reward, sampling, threshold=self.threshold, flip=self.flip)


@dataclass(frozen=True, kw_only=True)
class FittedReward:
    """A Bradley–Terry reward by maximum likelihood.

    Attributes:
        reward: of mean zero within each component; nan where the likelihood has no maximum,
            [outputs].
        component: which outputs are connected by comparisons, numbered from 0, [outputs]. Rewards
            of different components cannot be compared.
        exists: whether each output's component has a maximum, [outputs]: just where its graph of
            wins is strongly connected (Ford 1957).
        newton_steps: taken.
    """

    reward: np.ndarray
    component: np.ndarray
    exists: np.ndarray
    newton_steps: int


def fit_reward(wins: ArrayLike, *, max_steps: int = 1000) -> FittedReward:
    """Fit a Bradley–Terry reward by maximum likelihood, on the host, in float64.

    Newton's method, a step moving no reward by more than one, until a whole step moves none by more
    than 1e-10; the likelihood is concave. It takes a step or so per unit of the rewards' range.

    Args:
        wins: how often (or with which probability) the row's output beat the column's,
            [outputs, outputs], none negative; the diagonal is ignored.
        max_steps: at most so many.

    Returns:
        A `FittedReward`.

    Raises:
        ValueError: for wins of another shape, negative or not finite.
        RuntimeError: where max_steps do not suffice, or float64 cannot hold the likelihood's
            curvature, as where one output beats another 10^16 times as often as the reverse.

    Source:
        Bradley and Terry 1952; Ford 1957 for existence.

    Example:
        >>> from jaxsim import fit_reward
        >>> print(fit_reward([[0, 3], [1, 0]]).reward.round(4))  # ± log(3)/2
        [ 0.5493 -0.5493]
    """
    counts = np.array(wins, np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"wins has shape {counts.shape}; expected [outputs, outputs]")
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise ValueError("wins holds a negative number, nan or infinity")
    np.fill_diagonal(counts, 0)
    _, component = connected_components(counts > 0, connection="weak")
    _, strong = connected_components(counts > 0, connection="strong")
    reward, exists, steps = np.full(len(counts), np.nan), np.zeros(len(counts), bool), 0
    for number in np.unique(component):
        mine = np.flatnonzero(component == number)
        if len(np.unique(strong[mine])) == 1:
            exists[mine] = True
            reward[mine], taken = _newton(counts[np.ix_(mine, mine)], max_steps)
            steps = max(steps, taken)
    return FittedReward(reward=reward, component=component, exists=exists, newton_steps=steps)


def _newton(wins: np.ndarray, max_steps: int) -> tuple[np.ndarray, int]:
    """Return the rewards, of mean zero, of outputs that are strongly connected by wins."""
    if len(wins) == 1:
        return np.zeros(1), 0
    wins = wins / wins.max()
    games, reward = wins + wins.T, np.zeros(len(wins))
    for step in range(1, max_steps + 1):
        ahead = reward[:, None] - reward[None]
        chance, upset = expit(ahead), expit(-ahead)
        # Won against the odds, less lost: no sum that cancels where wins are lopsided.
        gradient = (wins * upset - wins.T * chance).sum(axis=1)
        curvature = games * chance * upset
        hessian = np.diag(curvature.sum(axis=1)) - curvature
        # The constant direction is free: fixing it makes the matrix invertible.
        try:
            move = np.linalg.solve(hessian + hessian.trace() / len(wins) ** 2, gradient)
        except np.linalg.LinAlgError:
            break
        move -= move.mean()
        most = np.max(np.abs(move))
        reward = reward + move / max(1.0, most)
        if most <= 1e-10:
            return reward - reward.mean(), step
    raise RuntimeError(
        f"fit_reward: no maximum found in {max_steps} Newton steps; "
        "wins may be too lopsided for float64"
    )
