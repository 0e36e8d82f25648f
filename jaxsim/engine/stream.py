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
from jaxtyping import Array

from jaxsim import claims
from jaxsim.instance import Instance
from jaxsim.logspace import total
from jaxsim.sources import Source, at_beta, columns
from jaxsim.theorem.certify import certify
from jaxsim.theorem.verdict import Covariances, Outcome, covariances
from jaxsim.tilting import Centered, center

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
    undecided: Any  # hypotheses or conclusion left open
    settled: Any  # left open by rounding, and decided on the host by `certify`
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

    def plus(self, other: "Totals") -> "Totals":
        """Add the totals of the instances that come next."""
        return replace(
            self,
            sums=jax.tree.map(np.add, self.sums, other.sums),
            claims={name: found.plus(other.claims[name]) for name, found in self.claims.items()},
        )


def stream(
    source: Source,
    betas: tuple[float, ...],
    *,
    audit: int,
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Totals:
    """Evaluate instances of a source at every β and add up.

    Args:
        source: where the instances come from.
        betas: the values of β; empty for each instance's own.
        audit: how many instances of the source are also audited, on the claims that are not judged
            everywhere.
        start: the first instance, where a tile starts.
        stop: the one after the last; by default the source's end.
        progress: called with the number of instances done.
    """
    screened = tuple(c for c in claims.CLAIMS if c.judge and c.everywhere)
    audited = tuple(c for c in claims.CLAIMS if c.judge and not c.everywhere)
    values = betas or (None,)
    sums: list[Sums | None] = [None for _ in values]
    totals = {c.name: ClaimTotal() for c in claims.CLAIMS if c.judge}

    def collect(start: int, column: int, tile: Instance, pending: Any) -> None:
        tile_sums, codes, tallies = jax.tree.map(np.asarray, pending)
        for name, tally in tallies.items():
            totals[name] = totals[name].plus(_claim_total(tally, start, values[column]))
        if tile_sums is not None:
            if tile_sums.undecided:
                tile_sums, found = _settle(tile, start, values[column], codes, tile_sums)
                totals["theorem_2"] = totals["theorem_2"].plus(found)
            sums[column] = _plus(sums[column], tile_sums)

    waiting: list[tuple[int, int, Instance, Any]] = []
    end = source.num if stop is None else stop
    for at in range(start, end, source.size):
        tile, rows = source.tile(at), min(source.size, end - at)
        base, hypotheses = _prepare(tile)
        for column, beta in enumerate(values):
            values_of_beta = tile.beta if beta is None else jnp.full_like(tile.beta, beta)
            real = np.arange(source.size) < rows
            pending = _judge(screened, base, hypotheses, values_of_beta, real, with_sums=True)
            waiting.append((at, column, tile, pending))
            if at < audit:
                real = np.arange(source.size) < min(rows, audit - at)
                pending = _judge(audited, base, hypotheses, values_of_beta, real, with_sums=False)
                waiting.append((at, column, tile, pending))
        while len(waiting) > 2 * len(values):  # the device works while the host adds up
            collect(*waiting.pop(0))
        progress(min(at + source.size, end))
    for item in waiting:
        collect(*item)
    filled = [x for x in sums if x is not None]
    stacked = jax.tree.map(lambda *x: np.stack(x), *filled)
    shown = tuple(float("nan") if beta is None else beta for beta in values)
    return Totals(betas=shown, sums=stacked, claims=totals)


def _plus(so_far: Sums | None, tile: Sums) -> Sums:
    """Add a tile's sums in 64 bits, its bins as histograms."""
    counts = replace(
        tile,
        logit_tpm=_histogram(tile.logit_tpm),
        log_odds_shift=_histogram(tile.log_odds_shift),
    )
    wide = jax.tree.map(_widen, counts)
    return wide if so_far is None else jax.tree.map(np.add, so_far, wide)


def _widen(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def _claim_total(tally: claims.Tally, start: int, beta: float | None) -> ClaimTotal:
    if not tally.tried:
        return ClaimTotal()
    return ClaimTotal(
        tried=int(tally.tried),
        failed=int(tally.failed),
        undecided=int(tally.undecided),
        worst_margin=float(tally.worst_margin),
        worst_index=start + int(tally.worst_row),
        worst_beta=beta,
    )


@jax.jit
def _prepare(instance: Instance) -> tuple[Centered, Covariances]:
    """Do once per tile what does not depend on β."""
    base = center(instance)
    return base, covariances(base)


@partial(jax.jit, static_argnums=0, static_argnames="with_sums")
def _judge(
    judged: tuple[claims.Claim, ...],
    base: Centered,
    hypotheses: Covariances,
    beta: Array,
    real: Array,
    *,
    with_sums: bool,
) -> tuple[Sums | None, Array | None, dict[str, claims.Tally]]:
    """Judge a tile at one β: its sums, the codes of its verdicts [3, instances], its claims."""
    case = claims.case(base, hypotheses, beta, real)
    tallies = {c.name: claims.tally(c.judge(case)) for c in judged if c.judge}
    if not with_sums:
        return None, None, tallies
    verdict = case.verdict
    codes = [verdict.hypothesis_aligned, verdict.hypothesis_unaligned, verdict.conclusion]
    codes = [jnp.where(case.counted, code, jnp.int8(Outcome.TIE)) for code in codes]
    return _sums(case, real), jnp.stack(codes), tallies


def _settle(
    tile: Instance, start: int, beta: float | None, codes: np.ndarray, sums: Sums
) -> tuple[Sums, ClaimTotal]:
    """Decide on the host what rounding left open; return the sums, and what that adds to a claim.

    Args:
        tile: the instances, [outputs, instances].
        start: index of the first.
        beta: β for all of them; None: each its own.
        codes: of both hypotheses and the conclusion, [3, instances].
        sums: the tile's.
    """
    rows = np.flatnonzero(_is_open(codes))
    exact = certify(at_beta(columns(tile, rows), beta))
    before = codes[:, rows]
    after = np.stack([exact.hypothesis_aligned, exact.hypothesis_unaligned, exact.conclusion])
    hold, violations, below = _counts(after) - _counts(before)
    open_before = (before[0] == Outcome.HOLDS) & (before[1] == Outcome.HOLDS)
    margin = np.where(np.asarray(exact.hypotheses_hold), exact.log_odds_shift, np.inf)
    found = ClaimTotal(
        tried=int(hold),
        failed=int(violations),
        undecided=-int((open_before & (before[2] == Outcome.UNDECIDED)).sum()),
        worst_margin=float(margin.min()),
        worst_index=start + int(rows[margin.argmin()]),
        worst_beta=beta,
    )
    settled = replace(
        sums,
        hypotheses_hold=sums.hypotheses_hold + hold,
        violations=sums.violations + violations,
        below_alpha=sums.below_alpha + below,
        undecided=sums.undecided - len(rows),
        settled=sums.settled + len(rows),
    )
    return settled, found


def _is_open(codes: Any) -> Any:
    """Whether rounding leaves open if the hypotheses hold or, where they do, the conclusion."""
    first, second, conclusion = codes
    may_hold = ((first == Outcome.HOLDS) | (first == Outcome.UNDECIDED)) & (
        (second == Outcome.HOLDS) | (second == Outcome.UNDECIDED)
    )
    return may_hold & (
        (first == Outcome.UNDECIDED)
        | (second == Outcome.UNDECIDED)
        | (conclusion == Outcome.UNDECIDED)
    )


def _counts(codes: np.ndarray) -> np.ndarray:
    """Count instances that meet the hypotheses, that violate the theorem, and with Δ < 0."""
    hold = (codes[0] == Outcome.HOLDS) & (codes[1] == Outcome.HOLDS)
    fails = codes[2] == Outcome.FAILS
    return np.asarray([hold.sum(), (hold & fails).sum(), fails.sum()])


def _sums(case: claims.Case, real: Array) -> Sums:
    results, verdict, counted = case.evaluation, case.verdict, case.counted
    gain = results.expected_reward - case.tilt.base.center[0]
    logit = case.tilt.base.logit_alpha[0] + results.log_odds_shift

    def count(which: Array) -> Array:
        return jnp.sum(which & counted)

    def add(x: Array) -> Array:
        return total(jnp.where(counted, x, 0.0))[0]

    codes = verdict.hypothesis_aligned, verdict.hypothesis_unaligned, verdict.conclusion
    return Sums(
        counted=count(counted),
        invalid=jnp.sum(real & ~counted),
        hypotheses_hold=count(verdict.hypotheses_hold),
        violations=count(verdict.violated),
        undecided=count(_is_open(codes)),
        settled=jnp.zeros((), jnp.int32),
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
    return np.bincount(place, minlength=_BINS + 1)[:_BINS]


def quantiles(histogram: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Return quantiles of what a histogram over BIN_EDGES counted, linear within a bin.

    What lies beyond the edges is placed on them: as log-odds of ±20, two parts in 10^9. Of nothing
    the quantiles are nan.
    """
    left = np.concatenate([[BIN_EDGES[0]], BIN_EDGES])
    right = np.concatenate([BIN_EDGES, [BIN_EDGES[-1]]])
    cumulative = np.cumsum(histogram)
    if not cumulative[-1]:
        return np.full(len(levels), np.nan)
    result = []
    for level in levels:
        target = level * cumulative[-1]
        at = int(np.searchsorted(cumulative, max(target, 0.5), side="left"))  # no empty first bin
        before = cumulative[at - 1] if at else 0
        share = (target - before) / max(histogram[at], 1)
        result.append(left[at] + share * (right[at] - left[at]))
    return np.asarray(result)
