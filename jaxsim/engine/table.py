"""Every result for every instance of an array source: the table of a run on a file."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim.claims import case
from jaxsim.instance import Instance
from jaxsim.sources import ArraySource, columns
from jaxsim.theorem.certify import certify
from jaxsim.theorem.verdict import Outcome, Verdict, covariances
from jaxsim.tilting import center

_CODES = ("hypothesis_aligned", "hypothesis_unaligned", "conclusion")


def per_instance(source: ArraySource, betas: tuple[float, ...]) -> dict[str, Any]:
    """Return columns with a row per β and instance; an empty `betas` is each instance's own."""

    @jax.jit
    def results(tile: Any) -> Any:
        base = center(tile)
        judged = case(base, covariances(base), tile.beta, jnp.ones(tile.beta.shape, bool))
        return judged.evaluation, judged.verdict, tile.alpha, tile.beta

    blocks: list[dict[str, Any]] = []
    for beta in betas or (None,):
        for start in range(0, source.num, source.size):
            rows = min(source.size, source.num - start)
            tile = source.tile(start)
            if beta is not None:
                tile = replace(tile, beta=jnp.full_like(tile.beta, beta))
            evaluation, verdict, alpha, own_beta = jax.device_get(results(tile))
            verdict = _settled(tile, verdict, rows)
            table: dict[str, Any] = {"name": source.prompts[start : start + rows]}
            table["beta"] = np.full(rows, beta) if beta is not None else own_beta[:rows]
            table["alpha"] = alpha[:rows]
            table |= {name: value[:rows] for name, value in vars(evaluation).items()}
            table["tpm_aligned"] = np.exp(table["log_tpm_aligned"])
            table |= {name: value[:rows] for name, value in vars(verdict).items()}
            hold = (table["hypothesis_aligned"] == 1) & (table["hypothesis_unaligned"] == 1)
            table["hypotheses_hold"] = hold.astype(np.int8)
            blocks.append(table)
    return {name: np.concatenate([np.asarray(b[name]) for b in blocks]) for name in blocks[0]}


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
