"""Check Theorem 2's verdicts against 60 digits and more: `python -m tests.certified`.

Every code of `jaxsim.theorem2` that is decided, and every code of `jaxsim.certify`, is compared
with the sign that arithmetic of at least 200 bits gives to the same stored numbers; exact ties are
told by the coefficients of the exponentials. None of the package's own exact arithmetic is used.

* Random instances: many families, 2 to 32 outputs.
* Adversarial ones: one stored number (a reward, a log p or β) is solved for, so that one of the
  three quantities vanishes, rounded to the dtype, and moved by up to 100 ulp; and exact ties of
  each kind, as they are or moved.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from operator import mul
from typing import Any

import gmpy2
import jax
import numpy as np
from gmpy2 import exp, fsum, mpfr
from numpy.typing import NDArray

import jaxsim
from jaxsim import Instance, Outcome

Array = NDArray[Any]
Rng = np.random.Generator
Reals = Sequence[float]

CODES = ("hypothesis_aligned", "hypothesis_unaligned", "conclusion")
NUMBERS = ("covariance_aligned", "covariance_unaligned", "log_odds_shift")
FUNCTIONS: dict[str, Callable[[Instance], Any]] = {
    "theorem2": jaxsim.theorem2,
    "certify": jaxsim.certify,
}

BITS = 200  # 60 digits
_SPARE = 50  # bits that rounding may cost: tilts below 2^40, sums of 2^9 terms
_LEAST = mpfr("1e-250000000")  # gmpy2 takes e^x for zero below x = -7.4e8


# Exact signs


def exact_signs(log_a: Reals, log_u: Reals, reward: Reals, beta: float) -> tuple[int, ...]:
    """Return the signs of Cov(r, p_A), Cov(r, p_U) and Δ for stored floats; all on the support."""
    with gmpy2.context(precision=BITS):
        numbers = _numbers(log_a, log_u, reward, beta)
        signs = [_sign(number, size, BITS) for number, size in numbers]
    if signs[0] is None:
        signs[0] = _sign_of_terms(_covariance_terms(log_a, reward))
    if signs[1] is None:
        signs[1] = _sign_of_terms(_covariance_terms(log_u, reward))
    if signs[2] is None:
        signs[2] = _sign_of_terms(_shift_terms(log_a, log_u, reward, beta))
    return tuple(signs)


def _sign(number: Any, size: Any, bits: int) -> int | None:
    """Return a number's sign, or None where rounding to so many bits of `size` may have made it."""
    if abs(number) > size * mpfr(2) ** (_SPARE - bits):
        return 1 if number > 0 else -1
    return None


def _sign_of_terms(terms: dict[Fraction, Fraction]) -> int:
    """Return the sign of Σ c e^x over {x: c}, zero iff all c are, by as many bits as it takes."""
    kept = {x: c for x, c in terms.items() if c}
    if not kept:
        return 0
    top, bits, sign = max(kept), BITS, None
    while sign is None:
        bits *= 2
        with gmpy2.context(precision=bits):
            pairs = ((mpfr(gmpy2.mpq(c)), exp(mpfr(gmpy2.mpq(x - top)))) for x, c in kept.items())
            values = [c * e for c, e in pairs]
            sign = _sign(fsum(values), fsum(map(abs, values)), bits)
    return sign


def exact_numbers(log_a: Reals, log_u: Reals, reward: Reals, beta: float) -> tuple[Any, ...]:
    """Return Cov(r, p_A), Cov(r, p_U) and Δ with errors below 2^-350 of the sums they come from."""
    with gmpy2.context(precision=2 * BITS):
        above = [x - mpfr(max(reward)) for x in reward]
        mean = fsum(above) / len(above)
        w = [exp(x / beta) for x in above]
        found = []
        for log_p in (log_a, log_u):
            p = list(map(exp, log_p))
            covariance = fsum(v * (x - mean) for v, x in zip(p, above, strict=True))
            found.append((covariance / fsum(p) / len(p), fsum(map(mul, p, w)) / fsum(p)))
        (covariance_a, tilted_a), (covariance_u, tilted_u) = found
        return covariance_a, covariance_u, gmpy2.log(tilted_a / tilted_u)


def _numbers(log_a: Reals, log_u: Reals, reward: Reals, beta: float) -> tuple[Any, ...]:
    """Return three numbers of the signs asked for, each with a size that its error is relative to.

    These are Σ e^a (r - mean r), the same of u, and Σ e^{a + t} Σ e^u - Σ e^{u + t} Σ e^a.
    """
    top, scale = mpfr(max(reward)), 1 / mpfr(beta)
    below = [x - top for x in reward]
    mean = fsum(below) / len(below)
    above = [x - mean for x in below]
    a, u, w = list(map(exp, log_a)), list(map(exp, log_u)), [exp(x * scale) for x in below]
    total_a, total_u = fsum(a), fsum(u)
    left, right = fsum(map(mul, a, w)) * total_u, fsum(map(mul, u, w)) * total_a
    span, size = -min(below), left + right
    assert span * scale < 2.0**40
    return (
        (fsum(map(mul, a, above)), span * total_a),
        (fsum(map(mul, u, above)), span * total_u),
        (left - right, size if size > _LEAST else math.inf),
    )


def _covariance_terms(log_p: Reals, reward: Reals) -> dict[Fraction, Fraction]:
    """Return Σ (r - mean r) e^{log p}, gathered by log p."""
    mean = sum(map(Fraction, reward), Fraction(0)) / len(reward)
    terms: dict[Fraction, Fraction] = {}
    for x, r in zip(log_p, reward, strict=True):
        if x > -math.inf:
            terms[Fraction(x)] = terms.get(Fraction(x), Fraction(0)) + Fraction(r) - mean
    return terms


def _shift_terms(
    log_a: Reals, log_u: Reals, reward: Reals, beta: float
) -> dict[Fraction, Fraction]:
    """Return Σ e^{a_i + r_i/β + u_j} - Σ e^{u_i + r_i/β + a_j}, gathered by exponent."""
    tilt = [Fraction(r) / Fraction(beta) for r in reward]
    a, u = (
        Counter((Fraction(x), t) for x, t in zip(log_p, tilt, strict=True) if x > -math.inf)
        for log_p in (log_a, log_u)
    )
    if a == u:
        return {}
    terms: dict[Fraction, Fraction] = {}
    for tilted, plain, sign in ((a, u, 1), (u, a, -1)):
        offsets: Counter[Fraction] = Counter()
        for (x, _), times in plain.items():
            offsets[x] += times
        for (x, t), times in tilted.items():
            for y, more in offsets.items():
                terms[x + t + y] = terms.get(x + t + y, Fraction(0)) + sign * times * more
    return terms


# Instances


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch of stored instances, [rows, outputs] and [rows], and what each of them is."""

    log_a: Array
    log_u: Array
    reward: Array
    beta: Array
    logit_alpha: Array
    kind: list[str]

    @property
    def dtype(self) -> str:
        """Of all arrays."""
        return str(self.reward.dtype)

    @property
    def instance(self) -> Instance:
        """The batch as the package takes it."""
        return Instance(
            log_p_aligned=self.log_a,
            log_p_unaligned=self.log_u,
            reward=self.reward,
            logit_alpha=self.logit_alpha,
            beta=self.beta,
        )

    def stored(self, row: int) -> tuple[list[float], list[float], list[float], float]:
        """One instance's numbers on its support, as Python floats."""
        kept = np.maximum(self.log_a[row], self.log_u[row]) > -np.inf
        arrays = (x[row][kept].tolist() for x in (self.log_a, self.log_u, self.reward))
        return (*arrays, float(self.beta[row]))  # type: ignore[return-value]


def _rows(
    log_a: Array, log_u: Array, reward: Array, beta: Array, rng: Rng, dtype: str, kind: list[str]
) -> Rows:
    logit = rng.choice([0.0, 0.4, -2.0, 5.0, -28.0, 28.0], len(beta))
    arrays = (x.astype(dtype) for x in (log_a, log_u, reward, beta, logit))
    names = ("log_a", "log_u", "reward", "beta", "logit_alpha")
    return Rows(**dict(zip(names, arrays, strict=True)), kind=kind)


def _log_sum(log_p: Array) -> Array:
    top = log_p.max(axis=-1, keepdims=True)
    with np.errstate(under="ignore"):
        return top + np.log(np.exp(log_p - top).sum(axis=-1, keepdims=True))


def _normalised(log_p: Array) -> Array:
    return log_p - _log_sum(log_p)


def _log_gamma(rng: Rng, concentration: Array | float, shape: tuple[int, ...]) -> Array:
    """Log of gamma variables, which do not underflow: a gamma of one more times u^(1/c)."""
    gamma = np.log(rng.standard_gamma(np.broadcast_to(concentration, shape) + 1.0))
    return gamma - rng.standard_exponential(shape) / concentration


# Random instances: (outputs, of 20 chunks); every seventh chunk is float64.
_OUTPUTS = (2, 3, 4, 32, 8, 16, 2, 3, 4, 8, 2, 3, 4, 16, 8, 2, 3, 4, 32, 16)
CHUNK, _BLOCK = 4096, 128


def random_rows(seed: int, chunk: int, rows: int = CHUNK) -> Rows:
    """Draw a chunk of random instances, of one shape and dtype and many families."""
    rng = np.random.default_rng([seed, 1, chunk])
    outputs = _OUTPUTS[chunk % len(_OUTPUTS)]
    dtype = "float64" if chunk % 7 == 3 else "float32"
    blocks, kind = [], []
    for _ in range(-(-rows // _BLOCK)):
        component = rng.choice(list(_COMPONENTS))
        prize = rng.choice(list(_REWARDS))
        log_a, log_u = _COMPONENTS[component](rng, (_BLOCK, outputs))
        reward = _REWARDS[prize](rng, log_a, log_u)
        reward = rng.choice([1.0, 1.0, 1e-3, 300.0]) * reward + rng.choice([0.0, 0.0, 10.0, -1e4])
        beta = 10 ** rng.uniform(-3, 3, _BLOCK)
        blocks.append((_normalised(log_a), _normalised(log_u), reward, beta))
        kind += [f"random {component} {prize}"] * _BLOCK
    joined = (np.concatenate(x)[:rows] for x in zip(*blocks, strict=True))
    return _rows(*joined, rng, dtype, kind[:rows])


def _dirichlet(rng: Rng, shape: tuple[int, int]) -> tuple[Array, Array]:
    values = [0.05, 0.3, 1.0, 1.0, 5.0, 1e3]
    log_a, log_u = (_log_gamma(rng, rng.choice(values), shape) for _ in range(2))
    return log_a, log_u


def _sparse(rng: Rng, shape: tuple[int, int]) -> tuple[Array, Array]:
    parts = _dirichlet(rng, shape)
    for part in parts:
        hole = rng.random(shape) < 0.5
        hole[np.arange(shape[0]), rng.integers(shape[1], size=shape[0])] = False
        part[hole] = -np.inf
    return parts


def _disjoint(rng: Rng, shape: tuple[int, int]) -> tuple[Array, Array]:
    log_a, log_u = _dirichlet(rng, shape)
    rank = rng.random(shape).argsort(axis=1).argsort(axis=1)
    in_a = rank < rng.integers(1, shape[1], (shape[0], 1))
    return np.where(in_a, log_a, -np.inf), np.where(in_a, -np.inf, log_u)


def _alike(rng: Rng, shape: tuple[int, int]) -> tuple[Array, Array]:
    log_a, _ = _dirichlet(rng, shape)
    return log_a, log_a + 10 ** rng.uniform(-6, 0) * rng.standard_normal(shape)


def _counted(rng: Rng, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Small whole numbers over their sum: many equal probabilities."""
    with np.errstate(divide="ignore"):
        log_a, log_u = (np.log(rng.integers(0, 4, shape)) for _ in range(2))
    log_a[:, 0], log_u[:, -1] = 0.0, 0.0
    return log_a, log_u


def _deep(rng: Rng, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Log p down to -90; the masses of the outputs differ by much."""
    log_a, log_u = (-rng.choice([5.0, 30.0, 90.0]) * rng.random(shape) for _ in range(2))
    return log_a, log_u


_COMPONENTS = {
    "dirichlet": _dirichlet,
    "sparse": _sparse,
    "disjoint": _disjoint,
    "alike": _alike,
    "counted": _counted,
    "deep": _deep,
}


def _correlated(rng: Rng, log_a: Array, log_u: Array) -> Array:
    ratio = np.maximum(log_a, -50) - np.maximum(log_u, -50)
    return 0.3 * ratio + rng.uniform(0, 2) * rng.standard_normal(log_a.shape)


_REWARDS: dict[str, Callable[[Rng, Array, Array], Array]] = {
    "gaussian": lambda rng, a, u: rng.standard_normal(a.shape),
    "uniform": lambda rng, a, u: rng.random(a.shape),
    "student": lambda rng, a, u: np.clip(rng.standard_t(1.5, a.shape), -1e6, 1e6),
    "lognormal": lambda rng, a, u: np.exp(np.minimum(3 * rng.standard_normal(a.shape), 14)),
    "binary": lambda rng, a, u: rng.integers(0, 2, a.shape) * 1.0,
    "levels": lambda rng, a, u: rng.integers(-1, 3, a.shape) / 3,
    "correlated": _correlated,
}

# Adversarial instances. Outputs are drawn between the two numbers, and padded to the second.
_SHAPES = (
    *((2, 4), (5, 16), (2, 4), (5, 16), (2, 4), (5, 16), (17, 64), (2, 4), (5, 16), (17, 64)),
    *((2, 4), (5, 16), (2, 4), (5, 16), (2, 4), (5, 16), (17, 64), (2, 4), (5, 16), (300, 512)),
)
ADVERSARIAL_CHUNK = 500


def adversarial_rows(seed: int, chunk: int, rows: int = ADVERSARIAL_CHUNK) -> Rows:
    """Draw a chunk of instances near a tie or on one, of one padded shape and dtype."""
    rng = np.random.default_rng([seed, 2, chunk])
    # A fifth is float64; of the shapes each in its turn.
    dtype = "float64" if (chunk + chunk // 20) % 5 == 4 else "float32"
    least, outputs = _SHAPES[chunk % len(_SHAPES)]
    if outputs == 512:
        rows = -(-rows // 10)
    count = rng.integers(least, outputs + 1, rows)
    drafts = _drafts(rng, count, outputs, dtype)
    log_a = np.full((rows, outputs), -np.inf)
    log_u, reward, beta = log_a.copy(), np.zeros((rows, outputs)), np.zeros(rows)
    reward[:] = rng.choice([-3e30, 3e30, 0.0], (rows, outputs))
    betas = _critical_betas(*drafts)
    kind = []
    for row in range(rows):
        draft = _Stored(
            *(x[row, : count[row]] for x in drafts[:3]), beta=drafts[3][row], dtype=np.dtype(dtype)
        )
        name, draft = _near_tie(rng, draft, betas[row])
        n = len(draft.reward)
        log_a[row, :n], log_u[row, :n], reward[row, :n] = draft.log_a, draft.log_u, draft.reward
        beta[row] = draft.beta
        kind.append(name)
    return _rows(log_a, log_u, reward, beta, rng, dtype, kind)


def _drafts(rng: Rng, count: Array, outputs: int, dtype: str) -> tuple[Array, ...]:
    """Draw log p_A, log p_U, r and β, rounded to the dtype, of every scale that is in scope."""
    shape, column = (len(count), outputs), (len(count), 1)
    single = dtype == "float32"
    outside = np.arange(outputs) >= count[:, None]
    deep = rng.random(column) < 0.2
    parts = []
    for _ in range(2):
        concentration = rng.choice([0.1, 0.5, 1.0, 1.0, 3.0, 100.0], column)
        log_p = _log_gamma(rng, concentration, shape)
        log_p = np.where(deep, -rng.choice([10.0, 100.0 if single else 700.0]) * rng.random(shape),
                         log_p)  # fmt: skip
        holes = (rng.random(shape) < 0.3) & (rng.random(column) < 0.25)
        holes[np.arange(len(count)), rng.integers(0, count)] = False
        parts.append(np.where(outside | holes, -np.inf, log_p))
    alike = rng.random(column) < 0.1
    parts[1] = np.where(alike, parts[0] + 1e-3 * rng.standard_normal(shape), parts[1])
    unused = outside | (np.maximum(*parts) == -np.inf)

    style = rng.integers(0, 5, column)
    ratio = np.maximum(parts[0], -99) - np.maximum(parts[1], -99)
    x = np.select(
        [style == 0, style == 1, style == 2, style == 3],
        [
            rng.standard_normal(shape),
            rng.integers(0, 3, shape) / 2,
            rng.standard_t(1.5, shape),
            0.3 * ratio + rng.standard_normal(shape),
        ],
        rng.random(shape),
    )
    low = np.where(unused, np.inf, x).min(axis=1, keepdims=True)
    high = np.where(unused, -np.inf, x).max(axis=1, keepdims=True)
    x = np.where(unused, 0.0, (x - low) / np.where(high > low, high - low, 1.0))
    # The range in units of β: ordinary, about the kernel's switch, narrow, wide.
    band = rng.choice(5, column, p=[0.35, 0.2, 0.15, 0.2, 0.1])
    spans = [
        10 ** rng.uniform(-1, 2, column),
        rng.uniform(0.9, 1.1, column),
        10 ** rng.uniform(-8, -1, column),
        10 ** rng.uniform(1, 3, column),
        10 ** rng.uniform(3, 7, column),
    ]
    span = np.choose(band, spans)
    tiny = 1e-37 if single else 1e-306
    size = rng.choice(4, column, p=[0.8, 0.06, 0.07, 0.07])
    beta = np.choose(
        size,
        [
            10 ** rng.uniform(-3, 3, column),
            tiny * 10 ** rng.uniform(0, 4, column),
            10 ** rng.uniform(-12, -3, column),
            10 ** rng.uniform(3, 12, column),
        ],
    )
    offset = rng.choice([0.0, -0.5, 1e4, -1e4], column)
    offset = np.where(rng.random(column) < 0.7, rng.uniform(-2, 1, column), offset)
    reward = np.where(unused, 0.0, beta * span * (x + offset))
    normal = (_normalised(part) for part in parts)
    return tuple(v.astype(dtype).astype(np.float64) for v in (*normal, reward, beta[:, 0]))


@dataclass(frozen=True)
class _Stored:
    """One instance in float64, of numbers that the dtype holds."""

    log_a: Array
    log_u: Array
    reward: Array
    beta: float
    dtype: np.dtype[Any]

    def round(self, x: Any) -> Any:
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(x).astype(self.dtype).astype(np.float64)

    def having(self, **fields: Any) -> _Stored:
        return _Stored(**{**vars(self), **fields})

    def moved(self, name: str, j: int, k: int) -> _Stored:
        """Move one stored number by k ulp, or as far as its component's sum may go."""
        while k:
            if name == "beta":
                return self.having(beta=_step(self.beta, k, self.dtype))
            values = getattr(self, name).copy()
            values[j] = _step(values[j], k, self.dtype)
            found = self.having(**{name: values})
            if found.is_valid():
                return found
            k = int(k / 2)
        return self

    def is_valid(self) -> bool:
        """Whether the package takes it: components that sum to one, finite rewards, β > 0."""
        allowed = max(1e-6, 4 * len(self.reward) * float(np.finfo(self.dtype).eps))
        for log_p in (self.log_a, self.log_u):
            total = np.exp(log_p).sum()
            if not abs(total - 1) <= 0.99 * allowed:
                return False
        with np.errstate(over="ignore"):
            scale = np.abs(self.reward).max() / self.beta if self.beta > 0 else np.inf
            span = np.ptp(self.reward) / self.beta if self.beta > 0 else np.inf
        return bool(np.isfinite(self.reward).all() and scale < 1e29 and span < 1e8)


def _step(x: float, k: int, dtype: np.dtype[Any]) -> float:
    """Return the k-th number of the dtype above x, which is one of them."""
    kind = np.int32 if dtype == np.float32 else np.int64
    bits = int(np.asarray(x, dtype).view(kind)) & int(np.iinfo(kind).max)
    place = (-bits if math.copysign(1.0, x) < 0 else bits) + k
    size = np.asarray(abs(place), kind).view(dtype)
    return math.copysign(float(size), place)


def _near_tie(rng: Rng, draft: _Stored, critical_beta: float) -> tuple[str, _Stored]:
    """Put an instance on a tie, exactly or as the dtype allows, and move it off by some ulp."""
    k = 0 if rng.random() < 0.1 else int(np.exp(rng.uniform(0, np.log(101))))
    k = k if rng.random() < 0.5 else int(rng.integers(-100, 101))
    k *= int(rng.choice([-1, 1]))
    if rng.random() < 0.15:
        name = rng.choice(list(TIES))
        tie = TIES[name](rng, draft)
        if tie is not None and tie.is_valid():
            if rng.random() < 0.5:
                return f"tie: {name}", tie
            where = ("log_a", "log_u", "reward", "beta")[rng.integers(4)]
            finite = np.flatnonzero(np.isfinite(getattr(tie, where))) if where != "beta" else [0]
            return f"tie: {name}, {where} moved by {k} ulp", tie.moved(where, rng.choice(finite), k)
    target = NUMBERS[rng.choice(3, p=[0.2, 0.2, 0.6])]
    if target == "log_odds_shift" and critical_beta > 0 and rng.random() < 0.6:
        with gmpy2.context(precision=BITS):
            solved = draft.having(beta=float(draft.round(_newton_beta(draft, critical_beta))))
        if solved.is_valid():
            return f"{target} by beta {k:+} ulp", solved.moved("beta", 0, k)
    ways = ["reward", "log_a" if target != "covariance_unaligned" else "log_u"]
    if target == "log_odds_shift":
        ways.append("log_u")
    for way in rng.permutation(ways):
        for j in rng.permutation(len(draft.reward))[:6]:
            with gmpy2.context(precision=BITS):
                found = _solve(draft, target, way, int(j))
            if found is not None and found.is_valid():
                return f"{target} by {way} {k:+} ulp", found.moved(way, int(j), k)
    return "unsolved", draft


def _solve(x: _Stored, target: str, way: str, j: int) -> _Stored | None:
    """Solve for one number; a log p twice, since its component must be normalised in between."""
    if way == "reward":
        r = _solve_reward(x, target, j)
        if r is None or not abs(r) < float(np.finfo(x.dtype).max) / 4:
            return None
        reward = x.reward.copy()
        reward[j] = x.round(float(r))
        return x.having(reward=reward)
    for _ in range(2):
        log_p = _solve_log_p(x, target, way, j)
        if log_p is None or not -100 < log_p < 100:
            return None
        values = getattr(x, way).copy()
        values[j] = float(log_p)
        before = x.having(**{way: x.round(values)})
        x = x.having(**{way: x.round(_normalised(values))})
    return before


def _solve_reward(x: _Stored, target: str, j: int) -> Any:
    """Solve for r_j: Σ (p_i - 1/n) r_i = 0, or Σ (p_A,i - p_U,i) e^{r_i/β} = 0."""
    a, u = ([exp(v) for v in log_p.tolist()] for log_p in (x.log_a, x.log_u))
    a, u = ([v / fsum(p) for v in p] for p in (a, u))
    top = mpfr(float(x.reward.max()))
    r = [v - top for v in x.reward.tolist()]
    if target == "log_odds_shift":
        weights = [v - w for v, w in zip(a, u, strict=True)]
        terms = [w * exp(v / x.beta) for w, v in zip(weights, r, strict=True)]
    else:
        share = mpfr(1) / len(r)
        weights = [v - share for v in (a if target == "covariance_aligned" else u)]
        terms = [w * v for w, v in zip(weights, r, strict=True)]
    if not abs(weights[j]) > 1e-6:
        return None
    wanted = -fsum([*terms[:j], *terms[j + 1 :]]) / weights[j]
    if target != "log_odds_shift":
        return wanted + top
    return gmpy2.log(wanted) * mpfr(x.beta) + top if wanted > 0 else None


def _solve_log_p(x: _Stored, target: str, way: str, j: int) -> Any:
    """Solve for log p_j: Σ e^{log p_i} (y_i - c) = 0, c a mean of y = r or e^{r/β}."""
    top = mpfr(float(x.reward.max()))
    y = [v - top for v in x.reward.tolist()]
    if target == "log_odds_shift":
        y = [exp(v / x.beta) for v in y]
        other = [exp(v) for v in (x.log_u if way == "log_a" else x.log_a).tolist()]
        center = fsum(map(mul, other, y)) / fsum(other)
    else:
        center = fsum(y) / len(y)
    above = [v - center for v in y]
    if above[j] == 0:
        return None
    terms = [exp(v) * w for v, w in zip(getattr(x, way).tolist(), above, strict=True)]
    wanted = -fsum([*terms[:j], *terms[j + 1 :]]) / above[j]
    return gmpy2.log(wanted) if wanted > 0 else None


def _critical_betas(log_a: Array, log_u: Array, reward: Array, beta: Array) -> Array:
    """Return, per row, a β where Δ changes sign, by bisection in float64, or nan."""
    top = np.where(np.maximum(log_a, log_u) > -np.inf, reward, -np.inf).max(axis=1, keepdims=True)
    below = reward - top

    def shift(log_beta: Array) -> Array:
        with np.errstate(all="ignore"):
            t = below / np.exp(log_beta)[:, None]
            return (_log_sum(log_a + t) - _log_sum(log_u + t))[:, 0]

    grid = np.log(beta)[:, None] + np.linspace(-7, 4, 34)
    values = np.sign(np.stack([shift(x) for x in grid.T], axis=1))
    changes = values[:, :-1] * values[:, 1:] < 0
    at = changes.argmax(axis=1)
    low, high = (np.take_along_axis(grid, (at + i)[:, None], 1)[:, 0] for i in (0, 1))
    sign = np.take_along_axis(values, at[:, None], 1)[:, 0]
    for _ in range(50):
        middle = (low + high) / 2
        same = np.sign(shift(middle)) == sign
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return np.where(changes.any(axis=1), np.exp((low + high) / 2), np.nan)


def _newton_beta(x: _Stored, beta: float) -> float:
    """Improve a root of Δ in s = 1/β: dΔ/ds = E_{A,s}[r] - E_{U,s}[r]."""
    top = mpfr(float(x.reward.max()))
    r = [v - top for v in x.reward.tolist()]
    plain = [fsum(map(exp, log_p.tolist())) for log_p in (x.log_a, x.log_u)]
    s = 1 / mpfr(beta)
    for _ in range(3):
        tilted = [
            [exp(v + s * w) for v, w in zip(log_p.tolist(), r, strict=True)]
            for log_p in (x.log_a, x.log_u)
        ]
        totals = [fsum(w) for w in tilted]
        means = [fsum(map(mul, w, r)) / total for w, total in zip(tilted, totals, strict=True)]
        if means[0] == means[1]:
            break
        value = gmpy2.log(totals[0] * plain[1] / (totals[1] * plain[0]))
        step = value / (means[0] - means[1])
        if not abs(step) < 0.1 * s:
            break
        s -= step
    return float(1 / s)


# Exact ties of each kind; some on a grid so coarse that sums of its numbers are in either dtype.

_GRID = 2.0**-20


def _on_grid(x: Array) -> Array:
    return np.round(x / _GRID) * _GRID


def _grid_component(rng: Rng, count: int) -> Array:
    """Log-probabilities on the grid, above -6, whose exponentials sum to one within 1e-6."""
    return _on_grid(_normalised(np.clip(np.log(rng.standard_exponential(count)), -2, 1)))


def _equal_rewards(rng: Rng, x: _Stored) -> _Stored:
    return x.having(reward=np.full_like(x.reward, x.reward[rng.integers(len(x.reward))]))


def _uniform(rng: Rng, x: _Stored) -> _Stored:
    flat = x.round(np.full(len(x.reward), -math.log(len(x.reward))))
    return x.having(**{rng.choice(["log_a", "log_u"]): flat})


def _same(rng: Rng, x: _Stored) -> _Stored:
    return x.having(log_u=x.log_a)


def _permuted(rng: Rng, x: _Stored) -> _Stored:
    """U is A with its masses permuted among outputs of equal reward."""
    levels = rng.integers(0, 2, len(x.reward))
    log_u = x.log_a.copy()
    for level in (0, 1):
        where = np.flatnonzero(levels == level)
        log_u[where] = x.log_a[rng.permutation(where)]
    reward = np.where(levels > 0, np.nanmax(x.reward), np.nanmin(x.reward))
    return x.having(log_u=log_u, reward=reward)


def _mirrored(rng: Rng, x: _Stored) -> _Stored:
    """Pairs of equal log p_A, whose rewards lie symmetrically about the mean: Cov(r, p_A) = 0."""
    n = len(x.reward)
    pair = np.arange(n) // 2
    side = np.where(np.arange(n) == 2 * (n // 2), 0, 1 - 2 * (np.arange(n) % 2))
    masses = _log_gamma(rng, 1.0, (n,))[pair]
    reward = rng.integers(-99, 99) + side * rng.integers(1, 1 << 10, n)[pair] / 64
    order = rng.permutation(n)
    return x.having(
        log_a=x.round(_normalised(masses))[order], reward=reward[order], beta=abs(x.beta)
    )


def _product(rng: Rng, x: _Stored) -> _Stored | None:
    """Outputs (i, j): log p_A = x_i + y_j, log p_U = x_i + z_j, and a reward of i alone: Δ = 0."""
    n = len(x.reward)
    if n < 4 or n > 64:
        return None
    second = 2 if n < 9 else 3
    first = n // second
    i, j = np.divmod(np.arange(first * second), second)
    shared = _grid_component(rng, first)
    log_a, log_u = (shared[i] + _grid_component(rng, second)[j] for _ in range(2))
    reward = x.reward[:first][i]
    order = rng.permutation(len(i))
    return x.having(log_a=log_a[order], log_u=log_u[order], reward=reward[order])


def _reflected(rng: Rng, x: _Stored) -> _Stored | None:
    """Pairs of log p = (y, y - d) with r/β = (-d, d), so that E_A[e^{r/β}] = E_U[e^{r/β}] = 1."""
    pairs = len(x.reward) // 2
    if pairs < 2 or pairs > 16:
        return None
    d = rng.integers(1, 96, pairs) / 32
    beta = float(rng.choice([1.0, 3.0, 5.0, 0.75]) * 2.0 ** rng.integers(-8, 8))

    def component() -> Array:
        masses = np.clip(np.log(rng.standard_exponential(pairs)), -2, 1)
        total = float(_log_sum(np.concatenate([masses, masses - d]))[0])
        high = _on_grid(masses - total)
        return np.concatenate([high, high - d])

    reward = np.concatenate([-d, d]) * beta
    return x.having(log_a=component(), log_u=component(), reward=reward, beta=beta)


TIES: dict[str, Callable[[Rng, _Stored], _Stored | None]] = {
    "equal rewards": _equal_rewards,
    "uniform": _uniform,
    "same": _same,
    "permuted": _permuted,
    "mirrored": _mirrored,
    "product": _product,
    "reflected": _reflected,
}


# The comparison


@dataclass
class Tally:
    """What was found; `+` joins two."""

    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.counts + other.counts, self.wrong + other.wrong)

    def number(self, *key: str) -> int:
        """Sum the counts whose keys begin like this."""
        return sum(v for k, v in self.counts.items() if k[: len(key)] == key)


def check(rows: Rows, first: int | None = None) -> Tally:
    """Compare both functions' codes on the first rows of a batch with the exact signs."""
    num = len(rows.beta) if first is None else first
    with jax.enable_x64(rows.dtype == "float64"):
        found = {name: jax.device_get(f(rows.instance)) for name, f in FUNCTIONS.items()}
    signs = np.asarray([exact_signs(*rows.stored(row)) for row in range(num)]).reshape(num, 3)
    exact = signs * [1, -1, 1]
    tally = Tally()
    kinds = Counter(("kind", _short(kind)) for kind in rows.kind[:num])
    tally.counts.update(kinds)
    tally.counts["instances", rows.dtype] += num
    for place, code in enumerate(CODES):
        tally.counts["exact ties", code] += int((exact[:, place] == 0).sum())
        for name, verdict in found.items():
            codes = np.asarray(getattr(verdict, code))[:num]
            undecided = codes == Outcome.UNDECIDED
            tally.counts["compared", name, rows.dtype, code] += int((~undecided).sum())
            tally.counts["undecided", name, rows.dtype, code] += int(undecided.sum())
            tied = undecided & (exact[:, place] == 0)
            tally.counts["undecided tie", name, rows.dtype, code] += int(tied.sum())
            bad = codes != exact[:, place]
            if name == "theorem2":
                bad &= ~undecided
            else:
                # Its numbers have the signs of the codes, unless they underflow.
                numbers = np.asarray(getattr(verdict, NUMBERS[place]))[:num]
                side = signs[:, place]
                bad |= (numbers * side < 0) | ((side == 0) & (numbers != 0)) | ~np.isfinite(numbers)
            tally.wrong += [
                f"{name}: {code} is {codes[row]}, exactly {exact[row, place]}; "
                f"{rows.dtype}, {rows.kind[row]}\n{_hex(rows, row)}"
                for row in map(int, np.flatnonzero(bad))
            ]
    return tally


def _short(kind: str) -> str:
    """Leave out how far an instance was moved."""
    return kind.split(" moved")[0].split(" +")[0].split(" -")[0]


def _hex(rows: Rows, row: int) -> str:
    log_a, log_u, reward, beta = rows.stored(row)
    named = {"log_p_aligned": log_a, "log_p_unaligned": log_u, "reward": reward}
    lines = [f"  {name} = [{', '.join(x.hex() for x in values)}]" for name, values in named.items()]
    return "\n".join([*lines, f"  beta = {beta.hex()}"])


# The command


@dataclass(frozen=True)
class Task:
    """A chunk of one of the two sets: what is drawn depends on the seed and the chunk alone."""

    adversarial: bool
    seed: int
    chunk: int
    size: int
    num: int

    def run(self) -> Tally:
        """Draw the chunk and check its first `num` instances."""
        draw = adversarial_rows if self.adversarial else random_rows
        return check(draw(self.seed, self.chunk, self.size), self.num)


def tasks(
    seed: int,
    random: int,
    adversarial: int,
    *,
    size: int = CHUNK,
    adversarial_size: int = ADVERSARIAL_CHUNK,
) -> Iterator[Task]:
    """Yield the chunks of both sets, the adversarial first."""
    for is_adversarial, left, rows in (
        (True, adversarial, adversarial_size),
        (False, random, size),
    ):
        chunk = 0
        while left > 0:
            large = is_adversarial and _SHAPES[chunk % len(_SHAPES)][1] == 512
            num = min(left, -(-rows // 10) if large else rows)
            yield Task(is_adversarial, seed, chunk, rows, num)
            left, chunk = left - num, chunk + 1


def run(todo: Sequence[Task], workers: int) -> Iterator[tuple[Task, Tally]]:
    """Run tasks in order, in this process or in a pool."""
    if workers <= 1:
        for task in todo:
            yield task, task.run()
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from zip(todo, pool.map(Task.run, todo), strict=True)


def report(tally: Tally) -> str:
    """Return the counts as text."""
    dtypes = ("float32", "float64")
    lines = [f"instances       {tally.number('instances'):>12,}"]
    lines += [f"  {dtype:<13} {tally.number('instances', dtype):>12,}" for dtype in dtypes]
    kinds = {k[1]: v for k, v in tally.counts.items() if k[0] == "kind"}
    near = {k: v for k, v in kinds.items() if not k.startswith("random")}
    lines += [f"adversarial     {sum(near.values()):>12,}"]
    lines += [f"  {v:>8,}  {k}" for k, v in sorted(near.items())]
    for name in FUNCTIONS:
        compared, undecided = tally.number("compared", name), tally.number("undecided", name)
        lines.append(f"{name}: {compared:,} codes compared, {undecided:,} undecided")
        for dtype in dtypes:
            for code in CODES:
                some = tally.number("undecided", name, dtype, code)
                of = some + tally.number("compared", name, dtype, code)
                share = f"{some / of:.2e}" if of else "-"
                ties = tally.number("undecided tie", name, dtype, code)
                lines.append(
                    f"  {dtype} {code:<21} undecided {some:>9,} of {of:>11,}  {share}"
                    f", exact ties {ties:,}"
                )
    ties = ", ".join(f"{code} {tally.number('exact ties', code):,}" for code in CODES)
    lines.append(f"exact ties: {ties}")
    lines.append(f"wrong: {len(tally.wrong)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; 1 if any verdict is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.certified", description=__doc__)
    parser.add_argument("--random", type=int, default=10_000_000, help="random instances")
    parser.add_argument("--adversarial", type=int, default=100_000, help="instances near a tie")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    todo = list(tasks(options.seed, options.random, options.adversarial))
    whole = sum(task.num for task in todo)
    sets = {True: Tally(), False: Tally()}
    start, done, shown = time.monotonic(), 0, 0.0
    for task, found in run(todo, options.workers):
        sets[task.adversarial] += found
        done += task.num
        spent = time.monotonic() - start
        if spent - shown > 5 or done == whole:
            shown, wrong = spent, sum(len(tally.wrong) for tally in sets.values())
            print(
                f"{done:,} of {whole:,} in {spent:.0f} s, {done / spent:,.0f}/s, wrong {wrong}",
                file=sys.stderr,
                flush=True,
            )
    for adversarial, tally in sets.items():
        if tally.counts:
            print(f"== {'adversarial' if adversarial else 'random'}\n{report(tally)}")
    wrong = [text for tally in sets.values() for text in tally.wrong]
    for text in wrong[:10]:
        print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
