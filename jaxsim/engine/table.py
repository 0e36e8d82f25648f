"""Every result for every instance, as tables: of a run on a file, and of runs that save them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim.claims import case
from jaxsim.instance import Instance
from jaxsim.sources import ArraySource, Source, columns
from jaxsim.theorem.certify import certify
from jaxsim.theorem.verdict import Outcome, Verdict, covariances
from jaxsim.tilting import center

_CODES = ("hypothesis_aligned", "hypothesis_unaligned", "conclusion")


def per_instance(source: ArraySource, betas: tuple[float, ...]) -> dict[str, Any]:
    """Return columns with a row per β and instance; an empty `betas` is each instance's own."""
    starts = range(0, source.num, source.size)
    blocks = [block(source, at, source.num, beta) for beta in betas or (None,) for at in starts]
    return {name: np.concatenate([np.asarray(b[name]) for b in blocks]) for name in blocks[0]}


def blocks(
    source: Source, betas: tuple[float, ...], start: int, stop: int
) -> Iterator[dict[str, Any]]:
    """Yield tables of a tile at one β each, of the instances from `start`, where one starts."""
    for at in range(start, stop, source.size):
        for beta in betas or (None,):
            yield block(source, at, stop, beta)


def block(source: Source, at: int, stop: int, beta: float | None) -> dict[str, Any]:
    """Return columns with a row for each instance of the tile at `at` that comes before `stop`.

    Args:
        source: where the instances come from.
        at: where the tile starts.
        stop: the first instance that is left out.
        beta: for all of them; None: each its own.
    """
    rows = min(source.size, stop - at)
    tile = source.tile(at)
    if beta is not None:
        tile = replace(tile, beta=jnp.full_like(tile.beta, beta))
    evaluation, verdict, alpha, own_beta = jax.device_get(_results(tile))
    verdict = _settled(tile, verdict, rows)
    table: dict[str, Any] = {"instance": np.arange(at, at + rows)}
    if isinstance(source, ArraySource):
        table = {"name": source.prompts[at : at + rows]}
    table["beta"] = np.full(rows, beta) if beta is not None else own_beta[:rows]
    table["alpha"] = alpha[:rows]
    table |= {name: value[:rows] for name, value in vars(evaluation).items()}
    table["tpm_aligned"] = np.exp(table["log_tpm_aligned"])
    table |= {name: value[:rows] for name, value in vars(verdict).items()}
    hold = (table["hypothesis_aligned"] == 1) & (table["hypothesis_unaligned"] == 1)
    table["hypotheses_hold"] = hold.astype(np.int8)
    return table


@jax.jit
def _results(tile: Instance) -> Any:
    base = center(tile)
    judged = case(base, covariances(base), tile.beta, jnp.ones(tile.beta.shape, bool))
    return judged.evaluation, judged.verdict, tile.alpha, tile.beta


def _settled(tile: Instance, verdict: Verdict, rows: int) -> Verdict:
    """Decide on the host what rounding has left open."""
    open_ = np.zeros(verdict.conclusion.shape, bool)
    for code in _CODES:
        open_[:rows] |= np.asarray(getattr(verdict, code))[:rows] == Outcome.UNDECIDED
    which = np.flatnonzero(open_)
    if not len(which):
        return verdict
    exact = certify(columns(tile, which))
    codes: dict[str, Any] = {code: np.array(getattr(verdict, code)) for code in _CODES}
    for code, values in codes.items():
        values[which] = getattr(exact, code)
    return replace(verdict, **codes)
