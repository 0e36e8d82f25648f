"""Hard single instances and policies, named: what an evaluation of the paper has to survive.

Everything is drawn in float64, normalised there and rounded to the dtype asked for; the rounded
numbers are the instance. Shapes are ragged; `padded` fills an instance up with outputs outside the
support that carry a wild reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Vector = NDArray[np.floating[Any]]
Scalar = np.floating[Any]
Rng = np.random.Generator

# (max r - min r)/beta, on both sides of the switch at one.
RANGES = (
    *(1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.7, 0.99, 1.0, 1.01),
    *(1.5, 3.0, 10.0, 30.0, 88.0, 110.0, 300.0, 1e3, 3e3, 1e4),
)
SIZES = (1, 2, 3, 5, 8, 32, 127, 128, 129)
BETAS = (1.0, 1e-3, 0.03, 0.5, 7.0, 1e3, 1e6)
LOGITS = (0.0, 0.4, -2.0, 5.0, -12.0, 28.0, -28.0)
SHAPES = (8, 129, 4096)  # what tests pad to: one compilation each


@dataclass(frozen=True, kw_only=True)
class Case:
    """One instance as stored arrays of one dtype; scalars are NumPy scalars of that dtype."""

    name: str
    log_p_aligned: Vector
    log_p_unaligned: Vector
    reward: Vector
    logit_alpha: Scalar
    beta: Scalar

    @property
    def size(self) -> int:
        """Number of outputs, those outside the support included."""
        return self.reward.shape[0]

    @property
    def arrays(self) -> dict[str, Any]:
        """The five fields, by the names of `jaxsim.Instance`."""
        return {
            "log_p_aligned": self.log_p_aligned,
            "log_p_unaligned": self.log_p_unaligned,
            "reward": self.reward,
            "logit_alpha": self.logit_alpha,
            "beta": self.beta,
        }


@dataclass(kw_only=True)
class _Draft:
    """What a family fills in: unnormalised log-masses, and rewards in units of beta."""

    a: NDArray[np.float64]
    u: NDArray[np.float64]
    x: NDArray[np.float64]
    offset: float = 0.0  # in units of reward
    logit: float | None = None
    after: Callable[[Case], Case] | None = None  # acts on the stored arrays


Family = Callable[[Rng, int, float], _Draft]


def padded(case: Case, size: int) -> Case:
    """Fill up to `size` outputs with zero mass in both components and an extreme reward."""
    extra = size - case.size
    dtype = case.reward.dtype
    void = np.full(extra, -np.inf, dtype)
    wild = np.where(np.arange(extra) % 2, dtype.type(3e30), dtype.type(-3e30))
    return replace(
        case,
        log_p_aligned=np.concatenate([case.log_p_aligned, void]),
        log_p_unaligned=np.concatenate([case.log_p_unaligned, void]),
        reward=np.concatenate([case.reward, wild]),
    )


def _spread(rng: Rng, n: int, span: float) -> NDArray[np.float64]:
    """Normal rewards, scaled to exactly this range."""
    x = rng.standard_normal(n)
    if n == 1:
        return np.array([span])
    x = (x - x.min()) / (x.max() - x.min())
    return x * span - span * rng.choice([0.0, 0.5, 1.0])


def _dirichlet(rng: Rng, n: int) -> NDArray[np.float64]:
    return np.log(rng.standard_exponential(n))


def _deep(rng: Rng, n: int, depth: float = 700.0) -> NDArray[np.float64]:
    """Log-masses from 0 down to -depth, the largest 0."""
    log_p = -depth * rng.random(n)
    log_p[rng.integers(n)] = 0.0
    return log_p


def _plain(rng: Rng, n: int, span: float) -> _Draft:
    return _Draft(a=_dirichlet(rng, n), u=_dirichlet(rng, n), x=_spread(rng, n, span))


def _deep_masses(rng: Rng, n: int, span: float) -> _Draft:
    return _Draft(a=_deep(rng, n), u=_deep(rng, n), x=_spread(rng, n, span))


def _moderate_masses(rng: Rng, n: int, span: float) -> _Draft:
    """Masses on the scale of the tilt, so that many outputs compete."""
    depth = min(700.0, span)
    return _Draft(a=_deep(rng, n, depth), u=_deep(rng, n, depth), x=_spread(rng, n, span))


def _tilt_cancels_mass(rng: Rng, n: int, span: float) -> _Draft:
    """Log p + r/beta nearly constant: every output is a mode."""
    span = min(span, 700.0)
    x = _spread(rng, n, span)
    noise = 0.3 * rng.standard_normal((2, n))
    return _Draft(a=-x + noise[0], u=-x + noise[1], x=x)


def _zeros(rng: Rng, n: int, span: float) -> _Draft:
    """Holes in each component, and some outputs in neither."""
    d = _plain(rng, n, span)
    d.a[rng.random(n) < 0.4], d.u[rng.random(n) < 0.4] = -np.inf, -np.inf
    d.a[rng.integers(n)] = d.u[rng.integers(n)] = 0.0
    d.x[np.isneginf(d.a) & np.isneginf(d.u)] = 1e3 * rng.choice([-1, 1])
    return d


def _disjoint(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    if n > 1:
        in_a = rng.permutation(n) < rng.integers(1, n)
        d.a[~in_a], d.u[in_a] = -np.inf, -np.inf
    return d


def _extremes(rng: Rng, n: int, span: float) -> _Draft:
    """A on the best output, U on the worst (or the reverse): the bound of never-expunged."""
    d = _Draft(a=np.full(n, -np.inf), u=np.full(n, -np.inf), x=_spread(rng, n, span))
    ends = int(np.argmax(d.x)), int(np.argmin(d.x))
    best, worst = ends if rng.random() < 0.5 else ends[::-1]
    d.a[best] = d.u[worst] = 0.0
    return d


def _single_against_many(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    d.a[:] = -np.inf
    d.a[rng.integers(n)] = 0.0
    return d


def _ties(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    d.x = span * rng.integers(0, 3, n) / 2
    return d


def _binary(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    d.x = span * rng.integers(0, 2, n).astype(np.float64)
    return d


def _equal_rewards(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    d.x = np.full(n, span)
    return d


def _large_offset(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    d.offset = 1e4
    return d


def _negative_offset(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    d.offset = -1e6
    return d


def _top_at_zero(rng: Rng, n: int, span: float) -> _Draft:
    """E_*[r] near zero while E_ref[r] is far below."""
    d = _plain(rng, n, span)
    d.x -= d.x.max()
    return d


def _faint_outlier(rng: Rng, n: int, span: float) -> _Draft:
    """All of the reward's range on an output of mass e^-700."""
    d = _plain(rng, n, span)
    i = rng.integers(n)
    d.x[:] = 0.0
    d.x[i] = span
    d.a[i], d.u[i] = -700.0, rng.choice([-700.0, -690.0, -np.inf])
    if n == 1:
        d.a[:] = d.u[:] = 0.0
    return d


def _one_high(rng: Rng, n: int, span: float) -> _Draft:
    """Equal rewards but for one output: the mode of p* is far from its mean."""
    d = _plain(rng, n, span)
    d.x[:] = 0.0
    d.x[rng.integers(n)] = span
    return d


def _atypical_mode(rng: Rng, n: int, span: float) -> _Draft:
    """Many equal outputs, and one of mass e^-(span) whose tilted mass matches one of them."""
    depth = min(span, 690.0)
    a = np.zeros(n) + 0.01 * rng.standard_normal(n)
    u = np.zeros(n) + 0.01 * rng.standard_normal(n)
    x = np.zeros(n)
    i = rng.integers(n)
    a[i], x[i] = -depth, depth + rng.choice([0.0, 0.5, np.log(n)])
    u[i] = -np.inf if n > 1 and rng.random() < 0.5 else -depth
    return _Draft(a=a, u=u, x=x)


def _two_modes(rng: Rng, n: int, span: float) -> _Draft:
    """Half of p* at either end of the reward's range."""
    depth = min(span, 690.0)
    high = np.arange(n) % 2 == 1
    noise = 0.1 * rng.standard_normal((2, n))
    return _Draft(a=noise[0] - depth * high, u=noise[1] - depth * high, x=depth * high)


def _identical(rng: Rng, n: int, span: float) -> _Draft:
    d = _plain(rng, n, span)
    d.u = d.a.copy()
    return d


def _nearly_identical(rng: Rng, n: int, span: float) -> _Draft:
    """Components a few units in the last place apart."""
    d = _identical(rng, n, span)
    steps = rng.integers(-2, 3, n)

    def nudge(case: Case) -> Case:
        log_p = case.log_p_aligned.copy()
        for _ in range(2):
            log_p = np.where(steps > 0, np.nextafter(log_p, log_p.dtype.type(0)), log_p)
        log_p = np.where(steps < 0, np.nextafter(log_p, log_p.dtype.type(-np.inf)), log_p)
        return replace(case, log_p_aligned=np.minimum(log_p, 0))

    d.after = nudge
    return d


def _swapped_ties(rng: Rng, n: int, span: float) -> _Draft:
    """U is A permuted within levels of equal reward: an exact tie that is not visible."""
    d = _ties(rng, n, span)
    d.u = d.a.copy()
    for level in np.unique(d.x):
        where = np.flatnonzero(d.x == level)
        d.u[where] = d.a[rng.permutation(where)]
    return d


def _uniform(rng: Rng, n: int, span: float) -> _Draft:
    """U uniform on the support: its covariance with any reward is exactly zero."""
    d = _plain(rng, n, span)
    d.u = np.zeros(n)
    return d


def _cancelling_logit(rng: Rng, n: int, span: float) -> _Draft:
    """Logit alpha = -Delta to the last place, so that TPM(A) = 1/2 comes out of two large terms."""
    d = _plain(rng, n, span)

    def cancel(case: Case) -> Case:
        lpa, lpu, r = (
            np.asarray(v, np.float64)
            for v in (case.log_p_aligned, case.log_p_unaligned, case.reward)
        )
        x = r / float(case.beta)
        shift = _logsumexp(lpa + x) - _logsumexp(lpa) - _logsumexp(lpu + x) + _logsumexp(lpu)
        return replace(case, logit_alpha=case.beta.dtype.type(-shift))

    d.after = cancel
    return d


def _near_critical(rng: Rng, n: int, span: float) -> _Draft:
    """The three-output counterexample to Theorem 2 within 1e-6 of where its order flips."""
    inf = np.inf
    step = rng.choice([0.0, 1e-8, -1e-8, 1e-6, -1e-6, 1e-3, -1e-3])
    s = np.log(1.8392867552141612) * (1 + step)
    half = np.log(0.5)
    return _Draft(
        a=np.array([-inf, 0.0, -inf]), u=np.array([half, -inf, half]), x=np.array([0.0, 3, 4]) * s
    )


def _logsumexp(x: NDArray[np.float64]) -> float:
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()))


FAMILIES: dict[str, Family] = {
    f.__name__[1:].replace("_", "-"): f
    for f in (
        _plain,
        _deep_masses,
        _moderate_masses,
        _tilt_cancels_mass,
        _zeros,
        _disjoint,
        _extremes,
        _single_against_many,
        _ties,
        _binary,
        _equal_rewards,
        _large_offset,
        _negative_offset,
        _top_at_zero,
        _faint_outlier,
        _one_high,
        _atypical_mode,
        _two_modes,
        _identical,
        _nearly_identical,
        _swapped_ties,
        _uniform,
        _cancelling_logit,
        _near_critical,
    )
}
LARGE = (
    ("atypical-mode", 4096, 700.0),
    ("deep-masses", 4096, 1e3),
    ("nearly-identical", 1000, 1e-3),
    ("uniform", 1000, 3.0),
    ("large-offset", 1000, 0.99),
    ("tilt-cancels-mass", 1000, 300.0),
    ("one-high", 1000, 2.0),
    ("zeros", 1000, 1e4),
)


def _log_normalised(log_p: NDArray[np.float64], dtype: np.dtype[Any]) -> Vector:
    return (log_p - _logsumexp(log_p)).astype(dtype)


def _store(draft: _Draft, name: str, logit: float, beta: float, dtype: np.dtype[Any]) -> Case:
    case = Case(
        name=name,
        log_p_aligned=_log_normalised(draft.a, dtype),
        log_p_unaligned=_log_normalised(draft.u, dtype),
        reward=(draft.offset + beta * draft.x).astype(dtype),
        logit_alpha=dtype.type(logit if draft.logit is None else draft.logit),
        beta=dtype.type(beta),
    )
    return case if draft.after is None else draft.after(case)


def instances(dtype: DTypeLike, seed: int = 0, size: int = 360) -> Iterator[Case]:
    """Yield `size` named instances: all families over all ranges, sizes, beta and logit alpha.

    The same seed draws the same instances for every dtype, up to rounding. One in sixty has 1000
    or 4096 outputs (at least the eight of `LARGE`).
    """
    kind = np.dtype(dtype)
    names = list(FAMILIES)
    large = max(len(LARGE), size // 60)
    # Balanced decks, shuffled apart, so that every value of each factor is used equally often.
    decks = np.random.default_rng([seed, 1])
    ranges, sizes, betas, logits = (
        decks.permutation(np.resize(np.arange(len(v)), size))
        for v in (RANGES, SIZES, BETAS, LOGITS)
    )
    for i in range(size):
        rng = np.random.default_rng([seed, 2, i])
        if i < large:
            name, n, span = LARGE[i % len(LARGE)]
        else:
            name, n, span = names[i % len(names)], SIZES[sizes[i]], RANGES[ranges[i]]
        beta, logit = BETAS[betas[i]], LOGITS[logits[i]]
        draft = FAMILIES[name](rng, n, span)
        n = draft.x.shape[0]
        label = f"{i}:{name} n={n} range/beta={span:g} beta={beta:g} logit={logit:g}"
        yield _store(draft, label, logit, beta, kind)


# Policies, as unnormalised log-masses, from log p* and log p_ref (-inf outside the support).


def _jitter(rng: Rng, log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move every log-probability a little, by 1e-8 to 1."""
    return log_p + 10.0 ** rng.uniform(-8, 0) * rng.standard_normal(log_p.shape)


def _on(support: NDArray[np.bool_], log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(support, log_p, -np.inf)


def _holes(rng: Rng, star: NDArray[np.float64], ref: NDArray[np.float64]) -> NDArray[np.float64]:
    kept = np.isfinite(ref) & (rng.random(ref.shape) < 0.5)
    kept[rng.choice(np.flatnonzero(np.isfinite(ref)))] = True
    return _on(kept, rng.choice([star, ref]))


def _one_output(
    rng: Rng, star: NDArray[np.float64], ref: NDArray[np.float64]
) -> NDArray[np.float64]:
    return _on(np.arange(ref.size) == rng.choice(np.flatnonzero(np.isfinite(ref))), ref)


PolicyFamily = Callable[[Rng, NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
POLICIES: dict[str, PolicyFamily] = {
    "optimum": lambda rng, star, ref: star,
    "near-optimum": lambda rng, star, ref: _jitter(rng, star),
    "reference": lambda rng, star, ref: ref,
    "near-reference": lambda rng, star, ref: _jitter(rng, ref),
    "between": lambda rng, star, ref: _on(
        np.isfinite(ref), 0.5 * np.where(np.isfinite(ref), star + ref, 0.0)
    ),
    "unrelated": lambda rng, star, ref: _on(np.isfinite(ref), _dirichlet(rng, ref.size)),
    "deep": lambda rng, star, ref: _on(np.isfinite(ref), _deep(rng, ref.size)),
    "uniform": lambda rng, star, ref: _on(np.isfinite(ref), np.zeros(ref.size)),
    "holes": _holes,
    "one-output": _one_output,
    "everywhere": lambda rng, star, ref: _dirichlet(rng, ref.size),
}


def policies(
    case: Case,
    log_p_star: NDArray[np.float64],
    log_p_ref: NDArray[np.float64],
    seed: tuple[int, ...],
) -> tuple[str, Vector, Vector]:
    """Draw two policies for an instance, stored in its dtype: their names, and both.

    One pair in eight is a policy and itself, a few units in the last place apart.
    """
    rng = np.random.default_rng([*seed, 3])
    drawn: list[tuple[str, Vector]] = []
    for _ in range(2):
        name = str(rng.choice(list(POLICIES)))
        log_p = POLICIES[name](rng, log_p_star, log_p_ref)
        drawn.append((name, _log_normalised(log_p, case.reward.dtype)))
    (one, first), (two, second) = drawn
    if rng.random() < 0.125:
        toward = np.where(rng.random(first.shape) < 0.5, 0, -np.inf).astype(first.dtype)
        two, second = "itself", np.nextafter(first, np.where(np.isfinite(first), toward, first))
    return f"{one} and {two}", first, second
