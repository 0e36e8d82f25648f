"""Look for the deepest failure of Theorem 2 by gradient descent on Δ, and certify what is found.

The search knows nothing of the bound that it is compared with (`worst_case_shift`). Rewards and
both components are free; the hypotheses are met by construction: where a component's mean reward is
on the wrong side of the plain mean, just enough of its mass moves to the highest reward (for A) or
to the lowest (for U). Every instance that meets them stays as it is, so nothing is lost.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float
from mpmath import mp

from jaxsim.families.counter import key_words
from jaxsim.instance import Instance
from jaxsim.logspace import LOG_ZERO, unit_roundoff
from jaxsim.theorem.bounds import two_point_cumulant, worst_case_shift
from jaxsim.theorem.certify import certify
from jaxsim.theorem.exact import enclose, intervals
from jaxsim.tilting import center, tilt

# A step that does not shrink: of each ascent the deepest point is kept, not the last.
DEFAULT_OPTIMIZER = optax.adam(0.3)

_DENOMINATOR = 20  # the greatest in a rational instance
_UP_TO = range(1, _DENOMINATOR + 1)


@dataclass(frozen=True, kw_only=True)
class RationalInstance:
    """An instance in fractions: every question about it has an exact answer.

    Attributes:
        reward: r.
        p_aligned: p_A; sums to exactly one.
        p_unaligned: p_U, likewise.
        beta: β > 0.
    """

    reward: tuple[Fraction, ...]
    p_aligned: tuple[Fraction, ...]
    p_unaligned: tuple[Fraction, ...]
    beta: Fraction

    def __post_init__(self) -> None:
        for name in ("p_aligned", "p_unaligned"):
            p = getattr(self, name)
            if len(p) != len(self.reward):
                raise ValueError(f"{name} has {len(p)} outputs; reward has {len(self.reward)}")
            if min(p) < 0 or sum(p) != 1:
                raise ValueError(f"{name} is {p}; probabilities are >= 0 and sum to 1")
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; expected a number > 0")

    @property
    def range_over_beta(self) -> Fraction:
        """Return (max r - min r)/β over the support."""
        rewards = [r for r, _, _ in self._support()]
        return (max(rewards) - min(rewards)) / self.beta

    @property
    def bound(self) -> float:
        """Return V(n, R) for the number of outputs and the range of this instance."""
        return float(worst_case_shift(len(self._support()), float(self.range_over_beta)))

    @property
    def depth(self) -> float:
        """Return -Δ."""
        return -self.log_odds_shift

    @property
    def log_odds_shift(self) -> float:
        """Return Δ rounded to float64; its sign is exact, and it is 0 only where TPM(A) = α.

        The sign is that of Σ (p_A - p_U) e^{r/β}: zero iff the coefficients of equal exponents
        cancel (Lindemann–Weierstrass), and else settled by intervals of rising precision.
        """
        coefficients: Counter[Fraction] = Counter()
        top = max(self.reward)
        exponents = [(r - top) / self.beta for r in self.reward]
        for x, a, u in zip(exponents, self.p_aligned, self.p_unaligned, strict=True):
            coefficients[x] += a - u  # type: ignore[assignment]
        if not any(coefficients.values()):
            return 0.0
        bits = 128
        while True:
            context = intervals(bits)
            growth = [context.exp(enclose(context, x)) for x in exponents]
            log_a, log_u = (
                context.log(sum(enclose(context, w) * e for w, e in zip(p, growth, strict=True)))
                for p in (self.p_aligned, self.p_unaligned)
            )
            shift = log_a - log_u
            if (shift.a > 0 or shift.b < 0) and shift.delta <= abs(shift.mid) * 2.0**-60:
                return float(mp.mpf(shift.mid))
            bits *= 2

    def hypotheses_hold(self) -> bool:
        """Whether Cov(r, p_A) > 0 > Cov(r, p_U): E_A[r] > mean r > E_U[r], over the support."""
        support = self._support()
        mean = sum(r for r, _, _ in support) / Fraction(len(support))
        mean_a, mean_u = sum(a * r for r, a, _ in support), sum(u * r for r, _, u in support)
        return mean_a > mean > mean_u

    def violates(self) -> bool:
        """Whether Theorem 2 fails here: its hypotheses hold, and yet TPM(A) < α."""
        return self.hypotheses_hold() and self.log_odds_shift < 0

    def to_instance(self, alpha: float = 0.5) -> Instance:
        """Return the instance in floating point: rounded, so no longer exactly this one."""
        p_a, p_u, reward = (
            np.array(row, np.float64) for row in (self.p_aligned, self.p_unaligned, self.reward)
        )
        return Instance.from_probs(p_a, p_u, reward, alpha, float(self.beta))

    def _support(self) -> list[tuple[Fraction, Fraction, Fraction]]:
        rows = zip(self.reward, self.p_aligned, self.p_unaligned, strict=True)
        return [row for row in rows if row[1] or row[2]]


@dataclass(frozen=True, kw_only=True)
class Counterexample:
    """An instance on which Theorem 2 fails, certified.

    Attributes:
        instance: the deepest found. Its α is the one at which TPM(A) falls furthest below α.
        depth: -Δ > 0, nats; TPM(A) is below α by tanh(depth/4).
        bound: V(n, R), which no depth reaches (`worst_case_shift`).
        rational: one in small fractions, to check by hand; it has a `depth` and a `bound` too.
    """

    instance: Instance
    depth: float
    bound: float
    rational: RationalInstance


def find_counterexample(
    key: jax.Array,
    *,
    outputs: int,
    beta: float,
    range_over_beta: float = 4.0,
    restarts: int = 64,
    steps: int = 1000,
    optimizer: optax.GradientTransformation | None = None,
) -> Counterexample:
    """Find an instance that meets Theorem 2's hypotheses and has TPM(A) as far below α as can be.

    Descends on Δ = log E_A[e^{r/β}] - log E_U[e^{r/β}] over r, p_A and p_U, subject to
    Cov(r, p_A) > 0 > Cov(r, p_U), from many random starts at once. The least reward is 0 and the
    greatest range_over_beta · β.

    Args:
        key: a typed key, `jax.random.key(seed)`; the same key finds the same instance.
        outputs: n ≥ 3. With fewer there is nothing to find.
        beta: β > 0, in units of reward.
        range_over_beta: R = (max r - min r)/β > 0.
        restarts: how many random starts.
        steps: optimiser steps from each.
        optimizer: any `optax.GradientTransformation`; by default Adam.

    Returns:
        A `Counterexample`. `instance` meets the hypotheses and fails the conclusion exactly as it
        is stored (`certify`); its dtype is JAX's default one, and its range is R rounded down.
        `rational` depends on `outputs` and `range_over_beta` alone: with all denominators at most
        20 and a range of at most R, the deepest of three reward levels, A on the middle one and U
        on the others. Since only r/β matters, its β is what makes its fractions small. It has at
        most 40 outputs: no more can have a twentieth of A or of U each.

    Raises:
        ValueError: for an argument out of its range, or where the dtype cannot store R · β.
        TypeError: for a key that is not typed, or a count that is no integer.
        RuntimeError: where no start led to a failure, as with very few steps, or to none that the
            dtype can store (R < 1e-5 in float32).

    Numerics:
        With the defaults `depth` was above 0.999 `bound` for R from 0.5 to 100 and up to 32
        outputs, with each of eight keys; for small R it is less, 0.94 at R = 0.1 and 0.86 at 0.01
        with 32. A few seconds, most of them compilation, done once per number of outputs.

    Example:
        >>> import jax
        >>> from jaxsim import find_counterexample
        >>> found = find_counterexample(jax.random.key(0), outputs=3, beta=1.0, range_over_beta=4.0)
        >>> print(f"{found.bound:.4f}", 0.998 < found.depth / found.bound < 1)
        1.3250 True
        >>> print(*found.rational.reward, "β =", found.rational.beta, found.rational.violates())
        0 181/19 19 β = 19/4 True
    """
    for name, count in (("outputs", outputs), ("restarts", restarts), ("steps", steps)):
        if not isinstance(count, int | np.integer):
            raise TypeError(f"{name} is {count!r}; expected an integer")
    if outputs < 3:
        raise ValueError(
            f"outputs is {outputs}; expected at least 3: with fewer, e^(r/beta) is affine in r and "
            "Theorem 2 has no counterexample"
        )
    for name, count in (("restarts", restarts), ("steps", steps)):
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")
    beta, range_over_beta = float(beta), float(range_over_beta)
    for name, number in (("beta", beta), ("range_over_beta", range_over_beta)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} is {number}; expected a finite number > 0")
    key_words(key)  # refuses what is no typed key
    scale = _Scale.of(beta, range_over_beta)
    optimizer = DEFAULT_OPTIMIZER if optimizer is None else optimizer
    spread = jnp.asarray(range_over_beta, scale.top.dtype)
    found = _descend(key, spread, outputs, restarts, steps, optimizer)
    shift, points = jax.tree.map(np.asarray, found)
    instance = _first_violation(shift, points, scale)
    depth = -float(certify(instance).log_odds_shift)
    return Counterexample(
        instance=replace(instance, logit_alpha=jnp.full_like(instance.logit_alpha, depth / 2)),
        depth=depth,
        bound=float(worst_case_shift(outputs, range_over_beta)),
        rational=deepest_rational(int(outputs), Fraction(range_over_beta)),
    )


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """β and the greatest reward as they are stored, NumPy scalars: top/β ≤ R exactly."""

    beta: Any
    top: Any

    @classmethod
    def of(cls, beta: float, range_over_beta: float) -> "_Scale":
        kind = jax.dtypes.canonicalize_dtype(float).type
        asked = {"beta": beta, "range_over_beta * beta": range_over_beta * beta}
        with np.errstate(over="ignore", under="ignore"):
            stored, top = (kind(x) for x in asked.values())
        for (name, value), held in zip(asked.items(), (stored, top), strict=True):
            if not np.finfo(kind).tiny <= held < np.inf:
                raise ValueError(f"{name} is {value}; out of the range of {np.dtype(kind)}")
        while Fraction(float(top)) > Fraction(range_over_beta) * Fraction(float(stored)):
            top = np.nextafter(top, kind(0))
        return cls(beta=stored, top=top)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Point:
    """A point of the search: rewards from 0 (first) to 1 (last), and two log-probabilities."""

    reward: Any
    log_p_aligned: Any
    log_p_unaligned: Any

    def feasible(self, margin: float, xp: Any = jnp) -> "_Point":
        """Have E_A[r] ≥ mean r + margin and E_U[r] ≤ mean r - margin.

        As much mass as it takes moves to the last output, or to the first.
        """
        x, place = self.reward, np.arange(len(self.reward))
        mean = xp.mean(x)

        def moved(log_p: Any, wanted: Any, end: float, at_end: np.ndarray) -> Any:
            found = xp.sum(xp.exp(log_p) * x)
            short = (wanted - found) * (end - 0.5) > 0
            share = (wanted - found) / xp.where(short, end - found, 1.0)
            share = xp.where(short, share, 0.5)
            arriving = xp.where(at_end, xp.log(share), LOG_ZERO)
            return xp.where(short, xp.logaddexp(log_p + xp.log1p(-share), arriving), log_p)

        return replace(
            self,
            log_p_aligned=moved(self.log_p_aligned, mean + margin, 1.0, place == place[-1]),
            log_p_unaligned=moved(self.log_p_unaligned, mean - margin, 0.0, place == 0),
        )


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _descend(
    key: jax.Array,
    spread: Float[Array, ""],
    outputs: int,
    restarts: int,
    steps: int,
    optimizer: optax.GradientTransformation,
) -> tuple[Float[Array, " restarts"], _Point]:
    """Return the least Δ on the way from each start, and where it was."""
    update = optax.with_extra_args_support(optimizer).update
    # So that the gradient is of order one where Δ is of order R², and logits of order R in reach.
    steep, far = jnp.minimum(spread, 1.0) ** -2, jnp.maximum(spread / 10, 1.0)

    def point(free: Array) -> _Point:
        inner, aligned, unaligned = jnp.split(free, [outputs - 2, 2 * outputs - 2])
        between = jax.nn.sigmoid(inner)
        return _Point(
            reward=jnp.pad(between, 1, constant_values=(0.0, 1.0)),
            log_p_aligned=jax.nn.log_softmax(far * aligned),
            log_p_unaligned=jax.nn.log_softmax(far * unaligned),
        ).feasible(0.0)

    def loss(free: Array) -> Array:
        at = point(free)
        instance = Instance(
            log_p_aligned=at.log_p_aligned,
            log_p_unaligned=at.log_p_unaligned,
            reward=spread * at.reward,
            logit_alpha=jnp.zeros_like(spread),
            beta=jnp.ones_like(spread),
        )
        return steep * tilt(center(instance), instance.beta).log_odds_shift[0]

    def descend(start: Array) -> tuple[Array, _Point]:
        def step(state: Any, _: None) -> tuple[Any, None]:
            free, optimizer_state, least, best = state
            value, gradient = jax.value_and_grad(loss)(free)
            best = jnp.where(value < least, free, best)
            updates, optimizer_state = update(
                gradient, optimizer_state, free, value=value, grad=gradient, value_fn=loss
            )
            return (free + updates, optimizer_state, jnp.fmin(value, least), best), None

        state = start, optimizer.init(start), jnp.full_like(spread, jnp.inf), start
        _, _, least, best = lax.scan(step, state, None, length=steps)[0]
        return least / steep, point(best)

    return jax.vmap(descend)(jax.random.normal(key, (restarts, 3 * outputs - 2), spread.dtype))


def _first_violation(shift: np.ndarray, points: _Point, scale: _Scale) -> Instance:
    """Store the deepest point that is a counterexample exactly as it is stored.

    The search meets the hypotheses to within its rounding; here a margin, as small as it may be,
    makes the stored numbers meet them strictly.
    """
    dtype = scale.top.dtype
    for row in map(int, np.argsort(shift)[:8]):
        if not shift[row] < 0:
            break
        found = jax.tree.map(lambda x: x[row].astype(np.float64), points)  # noqa: B023
        for power in range(1, 15, 2):
            strict = _strictly(found, unit_roundoff(dtype) * 2**power, scale)
            instance = Instance.from_log_probs(
                strict.log_p_aligned,
                strict.log_p_unaligned,
                strict.reward * float(scale.top),
                beta=scale.beta,
                logit_alpha=0.0,
            )
            if certify(instance).violated:
                return instance
    raise RuntimeError(
        f"no failure found that {dtype} can store; more steps or restarts may find one, and a "
        "small range_over_beta may take float64 (JAX_ENABLE_X64=1)"
    )


def _strictly(found: _Point, margin: float, scale: _Scale) -> _Point:
    """Return a point, with rewards as they are stored, that meets the hypotheses by a margin."""
    x = found.reward.copy()
    log_a, log_u = (
        log_p - np.logaddexp.reduce(log_p) for log_p in (found.log_p_aligned, found.log_p_unaligned)
    )
    # The reward on which most of A lies is cheaper to raise than e^{r/β} by mass on the highest.
    most = 1 + int(np.argmax(log_a[1:-1]))
    lead, lacking = np.exp(log_a[most]) - 1 / len(x), np.mean(x) + 2 * margin - np.exp(log_a) @ x
    if lead > 0.1 and lacking > 0:
        x[most] += lacking / lead
    top = float(scale.top)
    stored = (np.minimum(x, 1.0) * top).astype(scale.top.dtype).astype(np.float64) / top
    return _Point(reward=stored, log_p_aligned=log_a, log_p_unaligned=log_u).feasible(margin, np)


@lru_cache(maxsize=256)
def deepest_rational(outputs: int, range_over_beta: Fraction) -> RationalInstance:
    """Return the deepest instance of three reward levels with denominators up to 20.

    A lies on the middle level, U on the two others. Then Δ is decided by three numbers, each best
    taken as close to its limit as the denominators allow: the highest reward over β, up to R; the
    middle reward, above the mean; U's mass on the highest level, which puts its mean below.
    """
    outputs = min(outputs, 2 * _DENOMINATOR)
    found = [x for top, beta in _tops(range_over_beta) for x in _levels(outputs, top, beta)]
    high, spread, lead = np.array([x.numbers for x in found]).T
    # C is the depth where A and U have the same mean reward.
    depth = two_point_cumulant(high, spread, np) - lead
    ranked = (found[i].instance() for i in np.argsort(-depth, kind="stable"))
    return next(x for x in ranked if x.violates())


@dataclass(frozen=True, kw_only=True)
class _Levels:
    """Three reward levels, 0 < middle < top: how many outputs on each, and U's masses."""

    sizes: tuple[int, int, int]
    middle: Fraction
    top: int
    beta: Fraction
    units: tuple[int, int]  # U's mass on the lowest and on the highest level, of sum(units)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Return U's mass on the highest level, (max r - min r)/β and (E_A[r] - E_U[r])/β."""
        high = Fraction(self.units[1], sum(self.units))
        return (
            float(high),
            float(self.top / self.beta),
            float((self.middle - high * self.top) / self.beta),
        )

    def instance(self) -> RationalInstance:
        """Spread the masses over the outputs of their levels, as evenly as whole units go."""
        low, middle, high = self.sizes

        def unaligned(mass: int, size: int) -> list[Fraction]:
            even, left = divmod(mass, size)
            return [Fraction(even + (i < left), sum(self.units)) for i in range(size)]

        return RationalInstance(
            reward=(Fraction(0),) * low + (self.middle,) * middle + (Fraction(self.top),) * high,
            p_aligned=(Fraction(0),) * low
            + (Fraction(1, middle),) * middle
            + (Fraction(0),) * high,
            p_unaligned=(
                *unaligned(self.units[0], low),
                *(Fraction(0),) * middle,
                *unaligned(self.units[1], high),
            ),
            beta=self.beta,
        )


def _tops(spread: Fraction) -> Iterator[tuple[int, Fraction]]:
    """Yield the highest reward and β > 0, with top/β as large as may be but at most R."""
    long = math.ceil(_DENOMINATOR / spread)  # where R is small, so are the margins that it leaves
    for top in (*_UP_TO, *((long - 1, long) if spread < 1 else ())):
        beta = min(Fraction(math.ceil(top * q / spread), q) for q in _UP_TO)
        yield top, beta
    if spread >= 1:
        yield math.floor(spread), Fraction(1)


def _levels(outputs: int, top: int, beta: Fraction) -> Iterator[_Levels]:
    """Yield the best instance of each number of outputs per level."""
    for high in range(1, min(outputs - 2, _DENOMINATOR - 1) + 1):
        for middle in range(1, min(outputs - high - 1, _DENOMINATOR) + 1):
            low = outputs - high - middle
            # The middle level is above the mean iff it exceeds that of the outputs on the others.
            others = low + high
            q = min(_UP_TO, key=lambda q: (high * top * q // others + 1) / q)
            above = Fraction(high * top * q // others + 1, q)
            if not above < top:
                continue
            mean = (middle * above + high * top) / (outputs * top)
            part, whole = mean.as_integer_ratio()
            below = ((a, d) for d in _UP_TO if d - low >= (a := (part * d - 1) // whole) >= high)
            a, d = max(below, key=lambda x: x[0] / x[1], default=(0, 0))
            if d:
                yield _Levels(
                    sizes=(low, middle, high), middle=above, top=top, beta=beta, units=(d - a, a)
                )
