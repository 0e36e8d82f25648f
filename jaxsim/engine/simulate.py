"""Draw, evaluate, judge and count: millions of instances a second, none of them kept.

A tile is drawn and evaluated in blocks that fit a core's cache; it leaves sums and a byte per
instance and β. What the kernels leave open is settled on the host, so that nothing is undecided.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxsim.engine.mesh import on_all_devices
from jaxsim.engine.tiles import require_dtype
from jaxsim.families.counter import key_words
from jaxsim.families.draw import draw_masses
from jaxsim.families.spec import Family
from jaxsim.instance import Instance
from jaxsim.logspace import total
from jaxsim.sources import FamilySource, Source, at_beta, block_size, stream_at, tile_size
from jaxsim.theorem.certify import certify
from jaxsim.theorem.exact import ExactInstance
from jaxsim.theorem.sign import Growth, best_level, growth
from jaxsim.theorem.verdict import Outcome, covariances, verdict
from jaxsim.tilting import Centered, center, center_masses, tilt

_SETTLE_AT_ONCE = 256  # instances: exact arithmetic has a fixed cost per call


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Counts and means over the instances of a simulation; arrays are by β.

    Attributes:
        betas: the values of β; 0 is the limit β → 0, nan stands for each instance's own.
        drawn: instances looked at.
        hold: of these, how many meet both hypotheses of Theorem 2.
        violations: how many of `hold` have TPM(A) < α.
        below_alpha: how many of all have TPM(A) < α.
        settled: how many hypotheses and conclusions rounding left open, and the host decided.
        mean_alpha: mean of α.
        mean_tpm_aligned: mean of TPM(A); nan at β = 0.
        mean_log_z: mean of log Z; nan at β = 0.
    """

    betas: tuple[float, ...]
    drawn: int
    hold: int
    violations: np.ndarray
    below_alpha: np.ndarray
    settled: int
    mean_alpha: float
    mean_tpm_aligned: np.ndarray
    mean_log_z: np.ndarray


def simulate(
    key: jax.Array,
    family: Family,
    num: int,
    *,
    betas: tuple[float, ...] | None = None,
    start: int = 0,
) -> Simulation:
    """Draw instances of a family, evaluate and judge each at every β, and return counts and means.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        family: the family's description.
        num: how many instances, at least 1.
        betas: values of β, ≥ 0; None for each instance's own.
        start: index of the first; the instances are those of `sample_instances`.

    Returns:
        A `Simulation`. No verdict is undecided; memory does not grow with `num`.

    Raises:
        ValueError: where num, start or a β is out of range, or float64 is asked for in 32-bit mode.

    Numerics:
        The counts are exact: those that `certify` gives for the instances of `sample_instances`.
        They and the means have the same bits for any number of devices and threads.

    Example:
        >>> import jax
        >>> from jaxsim import Family, simulate
        >>> found = simulate(jax.random.key(0), Family(outputs=3), 10_000, betas=(1.0,))
        >>> print(0 < found.violations[0] < 0.02 * found.hold)
        True
    """
    if num < 1:
        raise ValueError(f"num is {num}; expected at least 1")
    if not 0 <= start <= 2**64 - num:
        raise ValueError(f"start is {start}; expected 0 <= start and start + num <= 2**64")
    if betas is not None and not betas:
        raise ValueError("betas is empty; expected values of β, or None for each instance's own")
    for at, beta in enumerate(betas or ()):
        if not (beta == 0 or 1e-30 < beta < 1e30):
            raise ValueError(f"betas[{at}] is {beta}; expected 0, or a number in (1e-30, 1e30)")
    require_dtype(family.dtype)
    skipped = start % tile_size(family.outputs)
    source = FamilySource(
        family=family, words=key_words(key), num=skipped + num, start=start - skipped
    )
    return survey(source, betas, skipped=skipped)


def survey(
    source: Source,
    betas: tuple[float, ...] | None,
    *,
    skipped: int = 0,
    wanted: int | None = None,
    means: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> Simulation:
    """Do `simulate` for any source.

    Args:
        source: where the instances come from.
        betas: values of β; 0 stands for the limit β → 0; None for each instance's own.
        skipped: leave out so many of the source's first instances, less than a tile.
        wanted: stop at the end of the tile in which so many instances meet the hypotheses.
        means: whether TPM(A) and log Z are wanted (else nan), which costs more than their sign
            where masses may underflow.
        progress: called with the number of instances done.
    """
    positive = None if betas is None else tuple(beta for beta in betas if beta > 0)
    with_limit = betas is not None and len(positive or ()) < len(betas)
    order = [0.0] * with_limit + list(positive or ()) if betas is not None else [float("nan")]
    counts = _Counts(len(order))
    sums, alpha, drawn, settled = np.zeros((2, len(order))), 0.0, 0, 0
    open_: list[tuple[np.ndarray, np.ndarray]] = []  # instances left open, and their codes

    def settle() -> int:
        which, codes = np.concatenate([w for w, _ in open_]), np.hstack([c for _, c in open_])
        counts.add(_settled(source, which, codes, order))
        open_.clear()
        return int((codes == Outcome.UNDECIDED).sum())

    for start, real, tile in _tiles(source, positive, with_limit, means, skipped):
        codes = tile.codes[:, real]
        is_open = (codes == Outcome.UNDECIDED).any(axis=0)
        counts.add(codes[:, ~is_open] if is_open.any() else codes)
        if is_open.any():
            open_.append((start + real.start + np.flatnonzero(is_open), codes[:, is_open]))
        if sum(len(which) for which, _ in open_) >= _SETTLE_AT_ONCE:
            settled += settle()
        drawn += codes.shape[1]
        sums[:, with_limit:] += np.sum(tile.sums, axis=0, dtype=np.float64)
        alpha += float(np.sum(tile.alpha, dtype=np.float64))
        progress(drawn)
        if wanted is not None and counts.hold >= wanted:
            break
    if open_:
        settled += settle()
    place = [order.index(beta) for beta in betas] if betas is not None else [0]
    averages = sums / drawn if means else np.full_like(sums, np.nan)
    averages[:, :with_limit] = np.nan
    return Simulation(
        betas=tuple(order[at] for at in place),
        drawn=drawn,
        hold=counts.hold,
        violations=counts.violations[place],
        below_alpha=counts.below_alpha[place],
        settled=settled,
        mean_alpha=alpha / drawn,
        mean_tpm_aligned=averages[0, place],
        mean_log_z=averages[1, place],
    )


class _Counts:
    """Counts of decided codes."""

    def __init__(self, betas: int) -> None:
        self.hold = 0
        self.violations, self.below_alpha = np.zeros((2, betas), np.int64)

    def add(self, codes: np.ndarray) -> None:
        """Add codes of both hypotheses and of the conclusion at every β, [2 + betas, instances]."""
        meets = (codes[0] == Outcome.HOLDS) & (codes[1] == Outcome.HOLDS)
        fails = codes[2:] == Outcome.FAILS
        self.hold += int(np.count_nonzero(meets))
        self.below_alpha += np.count_nonzero(fails, axis=1)
        self.violations += np.count_nonzero(fails & meets, axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Tile:
    """What a tile leaves.

    Attributes:
        codes: `Outcome` of both hypotheses and of the conclusion at every β, [2 + betas, tile].
        sums: of TPM(A) and log Z over a block, [blocks, 2, betas]; the limit β → 0 left out.
        alpha: of α over a block, [blocks].
    """

    codes: Any
    sums: Any
    alpha: Any


def _tiles(
    source: Source,
    betas: tuple[float, ...] | None,
    with_limit: bool,
    means: bool,
    skipped: int,
) -> Iterator[tuple[int, slice, _Tile]]:
    """Yield index, the instances that count, and the results of each tile of a source."""
    # Masses are drawn where they are judged. Logs are taken from the source: drawn in another shape
    # their last bits may differ, and the error bounds take the stored ones as exact.
    drawn = source if isinstance(source, FamilySource) and source.family.has_masses else None
    starts = range(0, source.num, source.size)

    def real(start: int) -> slice:
        return slice(skipped if start == 0 else 0, min(source.size, source.num - start))

    def inputs() -> Iterator[Any]:
        for start in starts:
            ends = np.asarray([real(start).start, real(start).stop], np.int32)
            yield ends, drawn.start_words(start) if drawn else source.tile(start)

    form = _Form(
        family=drawn.family if drawn else None,
        outputs=source.outputs,
        size=source.size,
        own_beta=betas is None,
        with_limit=with_limit,
        means=means,
    )
    dtype = drawn.family.dtype if drawn else source.tile(0).reward.dtype
    shared = drawn.words if drawn else np.zeros(2, np.uint32), np.asarray(betas or (), dtype)
    for start, tile in zip(starts, on_all_devices(_tile, (form,), inputs(), shared), strict=False):
        yield start, real(start), tile


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What a tile's program depends on."""

    family: Family | None  # whose masses are drawn; None: the instances are given
    outputs: int
    size: int  # of a tile
    own_beta: bool
    with_limit: bool
    means: bool


def _tile(form: _Form, tile: tuple[Array, Any], shared: tuple[Array, Array]) -> _Tile:
    """Judge a tile, block by block."""
    (ends, given), (words, betas) = tile, shared
    size = min(form.size, block_size(form.outputs))

    def block(_: None, at: Array) -> tuple[None, _Tile]:
        place = (at * size).astype(jnp.int32) + jnp.arange(size, dtype=jnp.int32)
        real = (ends[0] <= place) & (place < ends[1])
        if form.family is None:
            part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at * size, size, -1), given)
            return None, _judged(form, center(part), part.beta, betas, real)
        stream = stream_at(words, given, at * size, size)
        masses = stream.once(partial(draw_masses, form.family, stream))
        return None, _judged(form, center_masses(masses), masses.beta, betas, real)

    blocks = jnp.arange(form.size // size, dtype=jnp.uint32)
    _, judged = lax.scan(block, None, blocks)
    codes = jnp.moveaxis(judged.codes, 0, 1).reshape(judged.codes.shape[1], form.size)
    return replace(judged, codes=codes)


def _judged(form: _Form, base: Centered, own: Array, betas: Array, real: Array) -> _Tile:
    """Judge a block at every β."""
    hypotheses = covariances(base)

    def conclusion(_: None, beta: Array) -> tuple[None, tuple[Array, Array]]:
        beta = jnp.broadcast_to(beta, own.shape)
        if form.means and form.family is None:
            x = tilt(base, beta)
            outcome = verdict(hypotheses, x).conclusion
            log_z, shift = base.center / beta[None] + x.log_z_centered, x.log_odds_shift
            tpm = jax.nn.sigmoid(base.logit_alpha + shift)
        else:
            grown = growth(base, beta)
            outcome = grown.outcome
            log_z, tpm = _mixed(base, grown, beta)
        return None, (outcome, jnp.stack([add(tpm), add(log_z)]))

    def add(x: Array) -> Array:
        return total(jnp.where(real, x[0], 0.0))[0]

    if form.own_beta:
        _, (outcome, sums) = conclusion(None, own)
        outcomes, sums = outcome[None], sums[None]
    else:
        _, (outcomes, sums) = lax.scan(conclusion, None, betas)
    codes = [hypotheses.hypothesis_aligned, hypotheses.hypothesis_unaligned]
    codes += [best_level(base)[None]] * form.with_limit + [outcomes]
    return _Tile(
        codes=jnp.concatenate(codes), sums=sums.T, alpha=add(jax.nn.sigmoid(base.logit_alpha))
    )


def _mixed(base: Centered, grown: Growth, beta: Array) -> tuple[Array, Array]:
    """Return log Z and TPM(A), [1, instances] each, where nothing underflows."""
    alpha, not_alpha = jax.nn.sigmoid(base.logit_alpha), jax.nn.sigmoid(-base.logit_alpha)
    mixed = alpha * grown.aligned + not_alpha * grown.unaligned
    log_mixed = jnp.where(grown.narrow, jnp.log1p(mixed), jnp.log(mixed))
    one = grown.narrow.astype(mixed.dtype)
    tpm = alpha * (one + grown.aligned) / (one + mixed)
    return grown.center / beta[None] + log_mixed, tpm


def _settled(
    source: Source, which: np.ndarray, codes: np.ndarray, betas: list[float]
) -> np.ndarray:
    """Decide exactly what is open among the codes of some instances, [2 + betas, instances]."""
    codes, batch = codes.copy(), source.pick(which)

    def some(mask: np.ndarray) -> Instance:
        return jax.tree.map(lambda x: x[mask], batch)

    unclear = (codes[:2] == Outcome.UNDECIDED).any(axis=0)
    if unclear.any():
        exact = certify(some(unclear))
        codes[:2, unclear] = exact.hypothesis_aligned, exact.hypothesis_unaligned
    for at, beta in enumerate(betas, start=2):
        unclear = codes[at] == Outcome.UNDECIDED
        if unclear.any() and beta == 0:
            codes[at, unclear] = _limits(some(unclear))
        elif unclear.any():
            own = None if np.isnan(beta) else beta
            codes[at, unclear] = certify(at_beta(some(unclear), own)).conclusion
    return codes


def _limits(batch: Instance) -> list[int]:
    """Return the sign of Δ as β → 0: that of p_A - p_U on the best level where they differ."""
    stored = zip(batch.log_p_aligned, batch.log_p_unaligned, batch.reward, strict=True)
    found = []
    for log_a, log_u, reward in stored:
        exact = ExactInstance(log_a, log_u, reward)
        signs = (exact.compare(exact.on(level)) for level in reversed(exact.levels))
        found.append(next((sign for sign in signs if sign), 0))
    return found
