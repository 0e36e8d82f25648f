"""Every result for every instance of an array source: the table of a run on a file."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim.claims import case
from jaxsim.sources import ArraySource
from jaxsim.theorem.verdict import covariances
from jaxsim.tilting import center


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
            columns: dict[str, Any] = {"name": source.prompts[start : start + rows]}
            columns["beta"] = np.full(rows, beta) if beta is not None else own_beta[:rows]
            columns["alpha"] = alpha[:rows]
            columns |= {name: value[:rows] for name, value in vars(evaluation).items()}
            columns["tpm_aligned"] = np.exp(columns["log_tpm_aligned"])
            columns |= {name: value[:rows] for name, value in vars(verdict).items()}
            hold = (columns["hypothesis_aligned"] == 1) & (columns["hypothesis_unaligned"] == 1)
            columns["hypotheses_hold"] = hold.astype(np.int8)
            blocks.append(columns)
    return {name: np.concatenate([np.asarray(b[name]) for b in blocks]) for name in blocks[0]}
