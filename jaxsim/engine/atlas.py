"""How often Theorem 2 fails, among the instances of a source that meet its hypotheses, over β.

The hypotheses do not depend on β and most instances do not meet them. So those that do are gathered
into full tiles first, and only these are evaluated at every β.
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
from jaxsim.rounding import EXP, QUOTIENT, sum_depth
from jaxsim.sources import Source
from jaxsim.theorem.verdict import Outcome, allowed, covariances, decide, verdict
from jaxsim.tilting import Centered, center, tilt


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Counts over the instances of a source.

    Attributes:
        drawn: instances looked at.
        hold: of these, how many certainly meet both hypotheses.
        open_hypotheses: how many may or may not, within rounding; they are in no other count.
        violations: by β, how many of `hold` certainly have TPM(A) < α.
        undecided: by β, how many of `hold` are within rounding of TPM(A) = α.
    """

    drawn: int
    hold: int
    open_hypotheses: int
    violations: np.ndarray
    undecided: np.ndarray


def survey(source: Source, betas: tuple[float, ...], *, wanted: int) -> Survey:
    """Count failures of Theorem 2 at every β until `wanted` instances meet its hypotheses.

    Args:
        source: where the instances come from; its number of instances is the most to look at.
        betas: values of β; 0 stands for the limit β → 0, where the best reward level decides.
        wanted: how many instances that meet the hypotheses are enough; whole tiles are counted, so
            that there may be some more.
    """
    drawn = hold = open_hypotheses = 0
    counts = np.zeros((len(betas), 2), np.int64)
    for tile, real, seen, unclear in _meeting(source, wanted):
        base = _center(tile)
        pending = [_judge(base, jnp.asarray(beta, tile.beta.dtype), real) for beta in betas]
        counts += np.stack([np.asarray(x) for x in pending])
        hold += int(real.sum())
        drawn, open_hypotheses = seen, unclear
    return Survey(
        drawn=drawn,
        hold=hold,
        open_hypotheses=open_hypotheses,
        violations=counts[:, 0],
        undecided=counts[:, 1],
    )


def _meeting(source: Source, wanted: int) -> Iterator[tuple[Instance, np.ndarray, int, int]]:
    """Yield tiles of instances that meet the hypotheses, and how many were looked at so far."""
    waiting: list[list[np.ndarray]] = []
    structure = jax.tree.structure(source.tile(0))
    found = given = unclear = 0
    for start in range(0, source.num, source.size):
        tile, rows = source.tile(start), min(source.size, source.num - start)
        held, open_ = (np.asarray(x)[:rows] for x in _hypotheses(tile))
        unclear += int(open_.sum())
        found += int(held.sum())
        waiting.append([np.asarray(leaf)[..., :rows][..., held] for leaf in jax.tree.leaves(tile)])
        last = start + rows == source.num or found >= wanted
        if found - given < source.size and not last:
            continue
        leaves = [np.concatenate(parts, axis=-1) for parts in zip(*waiting, strict=True)]
        while leaves[-1].shape[-1] >= source.size or (last and leaves[-1].shape[-1]):
            part = [leaf[..., : source.size] for leaf in leaves]
            leaves = [leaf[..., source.size :] for leaf in leaves]
            count = part[-1].shape[-1]
            fill = source.size - count
            padded = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)], mode="edge") for x in part]
            given += count
            instance = jax.tree.unflatten(structure, padded)
            yield instance, np.arange(source.size) < count, start + rows, unclear
        waiting = [leaves]
        if last:
            return


@jax.jit
def _hypotheses(instance: Instance) -> tuple[Array, Array]:
    """Return which instances of a tile meet the hypotheses, and which may or may not."""
    judged = covariances(center(instance))
    codes = jnp.concatenate([judged.hypothesis_aligned, judged.hypothesis_unaligned])
    hold = jnp.all(codes == Outcome.HOLDS, axis=0)
    never = jnp.any((codes == Outcome.FAILS) | (codes == Outcome.TIE), axis=0)
    return hold, ~hold & ~never


_center = jax.jit(center)  # what does not depend on β, once per tile


@jax.jit
def _judge(base: Centered, beta: Array, real: Array) -> Array:
    """Return the numbers of violations and of undecided instances at one β."""
    at = jnp.broadcast_to(jnp.where(beta > 0, beta, 1.0), base.center.shape[1:])
    code = verdict(covariances(base), tilt(base, at)).conclusion
    code = jnp.where(beta > 0, code, best_level(base))
    return jnp.stack([jnp.sum((code == c) & real) for c in (Outcome.FAILS, Outcome.UNDECIDED)])


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
