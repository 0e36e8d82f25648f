"""Stream tiles through the kernels: draw or read, evaluate at every β, keep sums alone.

Memory does not grow with the number of instances: a tile leaves counts, sums, worst cases and
histograms, which the host adds up in the order of the tiles, in float64 and Python integers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxsim import claims
from jaxsim.instance import Instance
from jaxsim.logspace import total
from jaxsim.sources import Source
from jaxsim.theorem import Outcome, covariances, verdict
from jaxsim.tilting import center, tilt

# Histogram of log-odds: 800 bins of 0.05 from -20 to 20, and one for all beyond on either side.
BIN_EDGES = np.linspace(-20.0, 20.0, 801)
_BINS = len(BIN_EDGES) + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sums:
    """What a run leaves behind, with one leading axis: the values of β.

    A tile leaves the same, but the number of each instance's bin in place of a histogram.
    """

    counted: Any  # instances with all results finite
    invalid: Any  # instances without
    hypotheses_hold: Any
    violations: Any  # hypotheses hold, and TPM(A) < α
    undecided: Any  # hypotheses or conclusion left open by rounding
    below_alpha: Any  # TPM(A) < α, whatever the hypotheses
    tpm_aligned: Any  # sums over the counted instances
    alpha: Any
    kl: Any
    reward_gain: Any  # E_{p*}[r] - E_ref[r]
    logit_tpm: Any  # histogram over BIN_EDGES of logit TPM(A)
    log_odds_shift: Any  # and of Δ


@dataclass(frozen=True, kw_only=True)
class ClaimTotal:
    """A claim over all instances and all β: how often it was tried, and its worst case."""

    tried: int = 0
    failed: int = 0
    undecided: int = 0
    worst_margin: float = np.inf
    worst_index: int | None = None
    worst_beta: float | None = None

    def plus(self, other: "ClaimTotal") -> "ClaimTotal":
        """Add the counts and keep the worse case, the first of two that are equal."""
        worse = other if other.worst_margin < self.worst_margin else self
        return replace(
            worse,
            tried=self.tried + other.tried,
            failed=self.failed + other.failed,
            undecided=self.undecided + other.undecided,
        )


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The result of a stream: sums by β, and claims by name."""

    betas: tuple[float, ...]  # nan: each instance at its own β
    sums: Sums
    claims: dict[str, ClaimTotal]


def stream(
    source: Source,
    betas: tuple[float, ...],
    *,
    audit: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Totals:
    """Evaluate every instance of a source at every β and add up.

    Args:
        source: where the instances come from.
        betas: the values of β; empty for each instance's own.
        audit: how many instances also undergo the audit, the claims that are identities.
        progress: called with the number of instances done.
    """
    grid = np.asarray(betas, np.float64)
    screened = tuple(c for c in claims.CLAIMS if c.judge and c.everywhere)
    audited = tuple(c for c in claims.CLAIMS if c.judge and not c.everywhere)
    sums: Sums | None = None
    totals = {c.name: ClaimTotal() for c in claims.CLAIMS if c.judge}

    def collect(start: int, pending: Any) -> None:
        nonlocal sums
        tile_sums, tallies = jax.device_get(pending)
        if tile_sums is not None:
            counts = replace(
                tile_sums,
                logit_tpm=_histogram(tile_sums.logit_tpm),
                log_odds_shift=_histogram(tile_sums.log_odds_shift),
            )
            wide = jax.tree.map(_widen, counts)
            sums = wide if sums is None else jax.tree.map(np.add, sums, wide)
        for name, tally in tallies.items():
            for at in range(len(tally.tried)):
                totals[name] = totals[name].plus(_claim_total(tally, at, start, betas))

    waiting: list[tuple[int, Any]] = []
    for start in range(0, source.num, source.size):
        tile, rows = source.tile(start), min(source.size, source.num - start)
        waiting.append((start, _judge(screened, tile, jnp.int32(rows), grid, with_sums=True)))
        if start < audit:
            rows = min(rows, audit - start)
            waiting.append((start, _judge(audited, tile, jnp.int32(rows), grid, with_sums=False)))
        while len(waiting) > 2:  # one tile computes while the host adds up the one before
            collect(*waiting.pop(0))
        progress(min(start + source.size, source.num))
    for item in waiting:
        collect(*item)
    assert sums is not None
    return Totals(betas=betas or (float("nan"),), sums=sums, claims=totals)


def _widen(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def _claim_total(tally: Any, at: int, start: int, betas: tuple[float, ...]) -> ClaimTotal:
    tried = int(tally.tried[at])
    if tried == 0:
        return ClaimTotal()
    return ClaimTotal(
        tried=tried,
        failed=int(tally.failed[at]),
        undecided=int(tally.undecided[at]),
        worst_margin=float(tally.worst_margin[at]),
        worst_index=start + int(tally.worst_row[at]),
        worst_beta=betas[at] if betas else None,
    )


@partial(jax.jit, static_argnums=0, static_argnames="with_sums")
def _judge(
    judged: tuple[claims.Claim, ...],
    instance: Instance,
    rows: Array,
    grid: Array,
    *,
    with_sums: bool,
) -> tuple[Sums | None, dict[str, claims.Tally]]:
    """Judge a tile at each β in turn."""
    base = center(instance)
    hypotheses = covariances(base)
    real = jnp.arange(instance.beta.shape[-1]) < rows

    def at(beta: Array) -> tuple[Sums | None, dict[str, claims.Tally]]:
        case = claims.case(base, hypotheses, jnp.broadcast_to(beta, instance.beta.shape), real)
        tallies = {c.name: claims.tally(c.judge(case)) for c in judged if c.judge}
        return (_sums(case, real) if with_sums else None), tallies

    if grid.shape[0] == 0:
        return jax.tree.map(lambda x: x[None], at(instance.beta))
    return lax.map(at, grid.astype(instance.beta.dtype))


def count_violations(source: Source, betas: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return, by β, how many instances meet Theorem 2's hypotheses and how many of them fail it."""
    grid = np.asarray(betas, np.float64)
    counts = np.zeros((2, max(1, len(betas))), np.int64)
    for start in range(0, source.num, source.size):
        rows = jnp.int32(min(source.size, source.num - start))
        counts += np.asarray(_violations(source.tile(start), rows, grid)).T
    return counts[0], counts[1]


@jax.jit
def _violations(instance: Instance, rows: Array, grid: Array) -> Array:
    base = center(instance)
    hypotheses = covariances(base)
    real = jnp.arange(instance.beta.shape[-1]) < rows

    def at(beta: Array) -> Array:
        x = tilt(base, jnp.full_like(instance.beta, beta))
        judged = verdict(hypotheses, x)
        return jnp.stack([jnp.sum(judged.hypotheses_hold & real), jnp.sum(judged.violated & real)])

    return lax.map(at, grid.astype(instance.beta.dtype))


def _sums(case: claims.Case, real: Array) -> Sums:
    results, verdict, counted = case.evaluation, case.verdict, case.counted
    gain = results.expected_reward - case.tilt.base.center[0]
    logit = case.tilt.base.logit_alpha[0] + results.log_odds_shift

    def count(which: Array) -> Array:
        return jnp.sum(which & counted)

    def add(x: Array) -> Array:
        return total(jnp.where(counted, x, 0.0))[0]

    open_hypotheses = (verdict.hypothesis_aligned == Outcome.UNDECIDED) | (
        verdict.hypothesis_unaligned == Outcome.UNDECIDED
    )
    open_conclusion = verdict.hypotheses_hold & (verdict.conclusion == Outcome.UNDECIDED)
    return Sums(
        counted=count(counted),
        invalid=jnp.sum(real & ~counted),
        hypotheses_hold=count(verdict.hypotheses_hold),
        violations=count(verdict.violated),
        undecided=count(open_hypotheses | open_conclusion),
        below_alpha=count(verdict.conclusion == Outcome.FAILS),
        tpm_aligned=add(jnp.exp(results.log_tpm_aligned)),
        alpha=add(jax.nn.sigmoid(case.tilt.base.logit_alpha[0])),
        kl=add(results.kl),
        reward_gain=add(gain),
        logit_tpm=_bin(logit, counted),
        log_odds_shift=_bin(results.log_odds_shift, counted),
    )


def _bin(x: Array, counted: Array) -> Array:
    """Return the number of each value's bin; the last, beyond all bins, for what does not count."""
    width = BIN_EDGES[1] - BIN_EDGES[0]
    place = jnp.clip(jnp.floor((x - BIN_EDGES[0]) / width) + 1, 0, _BINS - 1)
    return jnp.where(counted, place, _BINS).astype(jnp.uint16)


def _histogram(place: np.ndarray) -> np.ndarray:
    """Count bins on the host: XLA on CPU takes a microsecond for each scattered increment."""
    return np.stack([np.bincount(row, minlength=_BINS + 1)[:_BINS] for row in place])


def quantiles(histogram: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Return quantiles of what a histogram over BIN_EDGES counted, linear within a bin.

    What lies beyond the edges is placed on them: as log-odds of ±20, two parts in 10^9.
    """
    left = np.concatenate([[BIN_EDGES[0]], BIN_EDGES])
    right = np.concatenate([BIN_EDGES, [BIN_EDGES[-1]]])
    cumulative = np.cumsum(histogram)
    result = []
    for level in levels:
        target = level * cumulative[-1]
        at = int(np.searchsorted(cumulative, target, side="left"))
        before = cumulative[at - 1] if at else 0
        share = (target - before) / max(histogram[at], 1)
        result.append(left[at] + share * (right[at] - left[at]))
    return np.asarray(result)
