"""How deeply can Theorem 2 fail? python experiments/depth.py --out DIR.

For each number of outputs n and range R = (max r - min r)/β, the deepest failure that gradient
descent finds (`jaxsim.find_counterexample`), beside the bound V(n, R) that none can reach
(`jaxsim.worst_case_shift`), the optimum of two linear programmes over p_A and p_U for the rewards
that were found, and a failure in fractions with denominators up to 20.

Expected: found ≤ linear programme ≤ V everywhere, the first within 0.3% of V, the fractions within
4%. V(3, 4) = log cosh 2 = 1.3250: TPM(A) can fall by tanh(V/4) = 0.319. A minute on two cores, half
of it compilation.

DIR/data/depth.csv has a row per n and R; rows without `found` are only there to draw the bound.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.optimize import linprog

import jaxsim
from jaxsim.figures import draw_all
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.job import versions

COLUMNS = (
    "outputs",
    "range_over_beta",
    "bound",
    "found",
    "linear_programme",
    "rational",
    "rational_reward",
    "rational_p_aligned",
    "rational_p_unaligned",
    "rational_beta",
)


def linear_programme(t: np.ndarray) -> float:
    """Return the largest -Δ of any p_A and p_U with E_A[t] ≥ mean t ≥ E_U[t], for given t = r/β."""
    mean = t.mean()
    depth = 0.0
    # Each exponential scaled so that its expectation is of order one; A's is to be small.
    for sign, scale in ((1, mean), (-1, t.max())):
        growth = np.exp(t - scale)
        found = linprog(
            sign * growth,
            A_ub=-sign * t[None],
            b_ub=[-sign * mean],
            A_eq=np.ones((1, t.size)),
            b_eq=[1.0],
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if found.status != 0:
            raise RuntimeError(f"the linear programme was not solved: {found.message}")
        depth -= sign * (scale + math.log(growth @ found.x))
    return depth


def row(key: jax.Array, outputs: int, spread: float) -> dict[str, Any]:
    found = jaxsim.find_counterexample(key, outputs=outputs, beta=1.0, range_over_beta=spread)
    fractions = found.rational
    return {
        "outputs": outputs,
        "range_over_beta": spread,
        "bound": found.bound,
        "found": found.depth,
        "linear_programme": linear_programme(np.asarray(found.instance.reward, np.float64)),
        "rational": fractions.depth,
        "rational_reward": " ".join(map(str, fractions.reward)),
        "rational_p_aligned": " ".join(map(str, fractions.p_aligned)),
        "rational_p_unaligned": " ".join(map(str, fractions.p_unaligned)),
        "rational_beta": str(fractions.beta),
    }


def bound_rows(outputs: list[int], most: float) -> list[dict[str, Any]]:
    """Return rows that only trace the bound, from 0 to the greatest range."""
    return [
        {
            "outputs": n,
            "range_over_beta": float(spread),
            "bound": float(jaxsim.worst_case_shift(n, spread)),
            **dict.fromkeys(("found", "linear_programme", "rational"), math.nan),
            **dict.fromkeys(COLUMNS[6:], ""),
        }
        for n in outputs
        for spread in np.linspace(0, most, 81)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--outputs", type=int, nargs="+", default=[3, 4, 8, 32])
    parser.add_argument("--ranges", type=float, nargs="+", default=[0.5, 1, 2, 4, 7, 10, 16])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        run = RunDirectory.create(options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"depth.py: {error}")
    started = time.time()
    cells = [(n, spread) for n in options.outputs for spread in options.ranges]
    rows = bound_rows(options.outputs, max(options.ranges))
    agree = True
    for done, (n, spread) in enumerate(cells, start=1):
        key = jax.random.fold_in(jax.random.key(options.seed), done)
        rows.append(row(key, n, spread))
        bound, found, best, fractions = (
            rows[-1][name] for name in ("bound", "found", "linear_programme", "rational")
        )
        agree &= max(found, fractions) < bound and found <= best * (1 + 1e-9) <= bound * (1 + 2e-9)
        print(
            f"{done}/{len(cells)}  n = {n}, R = {spread:g}: V = {bound:.6f}, found "
            f"{found / bound:.3%}, programme {best / bound:.3%}, fractions {fractions / bound:.1%}"
            f"  ({time.time() - started:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
    run.write_csv("depth", {name: [r[name] for r in rows] for name in COLUMNS})
    run.write_json(
        "provenance.json",
        {"argv": sys.argv, "versions": versions(), "seconds": time.time() - started},
    )
    draw_all(run)
    run.complete()
    print(f"found ≤ linear programme ≤ V: {'everywhere' if agree else 'NOT EVERYWHERE'}")
    print(f"Written to {options.out}")
    if not agree:
        sys.exit(1)


if __name__ == "__main__":
    main()
