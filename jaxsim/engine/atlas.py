"""How often Theorem 2 fails, among the instances of a source that meet its hypotheses, over β.

The hypotheses do not depend on β and most instances do not meet them. So those that do are gathered
into full tiles first, and only these are evaluated at every β. What the kernels leave open is
settled on the host, so that nothing remains undecided.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsim.instance import Instance
from jaxsim.logspace import LOG_ZERO, total, unit_roundoff
from jaxsim.rounding import EXP, EXPM1, QUOTIENT, sum_depth
from jaxsim.sources import Source, columns
from jaxsim.theorem.certify import certify
from jaxsim.theorem.exact import ExactInstance
from jaxsim.theorem.verdict import Outcome, allowed, covariances, decide
from jaxsim.tilting import Centered, center


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Counts over the instances of a source.

    Attributes:
        drawn: instances looked at.
        hold: of these, how many meet both hypotheses.
        violations: by β, how many of `hold` have TPM(A) < α.
        settled: how many signs rounding left open, and the host decided.
    """

    drawn: int
    hold: int
    violations: np.ndarray
    settled: int


def survey(source: Source, betas: tuple[float, ...], *, wanted: int) -> Survey:
    """Count failures of Theorem 2 at every β until `wanted` instances meet its hypotheses.

    Args:
        source: where the instances come from; its number of instances is the most to look at.
        betas: values of β; 0 stands for the limit β → 0, where the best reward level decides.
        wanted: how many instances that meet the hypotheses are enough; whole tiles are counted, so
            that there may be some more.
    """
    drawn = hold = settled = 0
    violations = np.zeros(len(betas), np.int64)
    for tile, rows, seen, unclear in _meeting(source, wanted):
        base = _center(tile)
        codes = [_conclusion(base, jnp.asarray(beta, tile.beta.dtype)) for beta in betas]
        for at, beta in enumerate(betas):
            code = np.array(codes[at])[:rows]
            open_ = np.flatnonzero(code == Outcome.UNDECIDED)
            code[open_] = _settled(tile, open_, beta)
            violations[at] += (code == Outcome.FAILS).sum()
            settled += len(open_)
        hold += rows
        drawn, settled = seen, settled + unclear
    return Survey(drawn=drawn, hold=hold, violations=violations, settled=settled)


def _meeting(source: Source, wanted: int) -> Iterator[tuple[Instance, int, int, int]]:
    """Yield tiles of instances that meet the hypotheses.

    With each: how many of its instances are real, how many were looked at so far, and how many
    hypotheses the host had to decide since the last.
    """
    waiting: list[Instance] = []
    gathered = found = unclear = 0
    for start in range(0, source.num, source.size):
        tile, rows = source.tile(start), min(source.size, source.num - start)
        held, open_ = (np.array(x)[:rows] for x in _hypotheses(tile))
        unsure = np.flatnonzero(open_)
        if len(unsure):
            held[unsure] = certify(columns(tile, unsure, None)).hypotheses_hold
        unclear += int(open_.sum())
        found += int(held.sum())
        gathered += int(held.sum())
        waiting.append(jax.tree.map(lambda x: np.asarray(x)[..., :rows][..., held], tile))  # noqa: B023
        last = start + rows == source.num or found >= wanted
        if gathered < source.size and not last:
            continue
        full = jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *waiting)
        while gathered >= source.size or (last and gathered):
            count = min(gathered, source.size)
            yield _padded(full, source.size), count, start + rows, unclear
            full = jax.tree.map(lambda x: x[..., count:], full)  # noqa: B023
            gathered, unclear = gathered - count, 0
        if last:
            return
        waiting = [full]


def _padded(instance: Instance, size: int) -> Instance:
    """Cut a tile to `size` instances, or repeat its last one up to that."""

    def fit(x: np.ndarray) -> np.ndarray:
        x = x[..., :size]
        fill = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
        return np.pad(x, fill, mode="edge")

    return jax.tree.map(fit, instance)


def _settled(tile: Instance, rows: np.ndarray, beta: float) -> np.ndarray:
    """Decide the conclusion of some instances of a tile exactly."""
    if not len(rows):
        return np.zeros(0, np.int8)
    batch = columns(tile, rows, beta or None)
    if beta > 0:
        return np.asarray(certify(batch).conclusion)
    stored = zip(batch.log_p_aligned, batch.log_p_unaligned, batch.reward, strict=True)
    codes = []
    for log_a, log_u, reward in stored:
        exact = ExactInstance(log_a, log_u, reward)
        signs = (exact.compare(exact.on(level)) for level in reversed(exact.levels))
        codes.append(next((sign for sign in signs if sign), 0))
    return np.asarray(codes, np.int8)


_center = jax.jit(center)  # what does not depend on β, once per tile


@jax.jit
def _hypotheses(instance: Instance) -> tuple[Array, Array]:
    """Return which instances of a tile meet the hypotheses, and which may or may not."""
    judged = covariances(center(instance))
    codes = jnp.concatenate([judged.hypothesis_aligned, judged.hypothesis_unaligned])
    hold = jnp.all(codes == Outcome.HOLDS, axis=0)
    never = jnp.any((codes == Outcome.FAILS) | (codes == Outcome.TIE), axis=0)
    return hold, ~hold & ~never


@jax.jit
def _conclusion(base: Centered, beta: Array) -> Array:
    """Return the `Outcome` of Δ > 0 at one β; at 0, of the limit."""
    return jnp.where(beta > 0, shift_sign(base, jnp.where(beta > 0, beta, 1.0)), best_level(base))


def shift_sign(base: Centered, beta: Array) -> Array:
    """Return the `Outcome` of Δ > 0 and nothing else, by the sign of Σ (p_A - p_U) e^{r/β}.

    One exponential per output, of the reward relative to the best; or expm1, relative to the mean,
    where the rewards span less than one β. The error bound is proven in docs/verdicts.md.
    """
    outputs, info = base.reward.shape[0], jnp.finfo(base.reward.dtype)
    best = jnp.max(jnp.where(base.support, base.reward, -jnp.inf), axis=0, keepdims=True)
    narrow = base.span < beta
    t = jnp.where(base.support, base.reward - jnp.where(narrow, base.center, best), 0.0) / beta
    growth = jnp.expm1(jnp.where(narrow, t, 0.0))
    growth = jnp.where(narrow, growth, jnp.exp(jnp.where(narrow, 0.0, t)))
    value = total((base.aligned.p - base.unaligned.p) * growth)
    depth = sum_depth(outputs)
    units = 2 * EXP + depth + QUOTIENT + 2 + depth  # p, the difference, the product, the sum
    of_t = jnp.where(narrow, EXPM1 + 1.6 * (1 + QUOTIENT), EXP + (1 + QUOTIENT) * jnp.abs(t))
    size = (base.aligned.p + base.unaligned.p) * jnp.abs(growth) * (units + of_t)
    flushed = 4 * outputs * float(info.tiny) * (1 + 1 / beta)
    bound = allowed(unit_roundoff(info.dtype) * total(size) + flushed)
    return decide(value, bound, jnp.zeros_like(bound, bool))[0]


def best_level(base: Centered) -> Array:
    """Return the `Outcome` of p_A(T) > p_U(T), T the outputs of greatest reward: Δ > 0 as β → 0.

    Where both have equal mass on T the next level decides; that is left UNDECIDED.
    """
    outputs, unit = base.reward.shape[0], unit_roundoff(base.reward.dtype)
    best = jnp.max(jnp.where(base.support, base.reward, -jnp.inf), axis=0, keepdims=True)
    # About the larger of the two, since both masses may be below the least normal number.
    top = base.support & (base.reward == best)
    logs = [jnp.where(top, part.log_p, LOG_ZERO) for part in (base.aligned, base.unaligned)]
    peak = jnp.max(jnp.maximum(*logs), axis=0, keepdims=True)
    mass_a, mass_u = (
        total(jnp.where(top, jnp.exp(log_p - peak), 0.0)) / part.total
        for log_p, part in zip(logs, (base.aligned, base.unaligned), strict=True)
    )
    units = 2 * (EXP + sum_depth(outputs)) + QUOTIENT + 1 + math.log(outputs)
    bound = allowed(unit * units * (mass_a + mass_u))
    return decide(mass_a - mass_u, bound, jnp.zeros_like(bound, bool))[0]
