"""`jaxsim solve`: descend by several optimisers on the same instances, and compare.

Instances are put in the order of β and solved tenth by tenth, so that a row of the table is one
timed batch. The courses of some are recorded on the side.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsim import sources
from jaxsim.descent import Solution, Status, optimizers
from jaxsim.engine.loop import Trace, default_tolerance, solve, trace
from jaxsim.instance import Instance
from jaxsim.runs.config import SolveConfig, to_toml
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.job import Report, convergence_columns

LABELS = {
    "default": "Rprop (default)",
    "sgd": "gradient descent",
    "momentum": "Nesterov momentum",
    "adam": "Adam",
    "adam_cosine": "Adam, cosine decay",
    "lbfgs": "L-BFGS",
    "natural_half": "natural gradient, ½/β",
    "natural": "natural gradient, 1/β",
}
_GROUPS = 10
# TPM(A) that rises and falls by as much is not monotone; rounding moves it by a thousandth of that.
_TURN = 1e-3
_ALLOWED = 16.0  # units of rounding that the identity of eq. (1) may be off


@dataclass(frozen=True, kw_only=True)
class Row:
    """One optimiser on the instances of one range of β, or on all of them.

    Attributes:
        instances: how many were tried.
        certified: how many ended with KL(π‖p*) within the tolerance.
        in_log_space: how many of these by the default's steps in log space.
        stuck, non_finite: how many ended so.
        kl_median, kl_worst: KL(π‖p*), nats.
        steps_median, steps_most: of all instances, those that were missed included.
        seconds: to solve them, without compilation.
    """

    optimizer: str
    beta_low: float
    beta_high: float
    instances: int
    certified: int
    in_log_space: int
    stuck: int
    non_finite: int
    kl_median: float
    kl_worst: float
    steps_median: float
    steps_most: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `jaxsim solve` found: rows by optimiser and range of β, and by optimiser alone."""

    rows: list[Row]
    wholes: list[Row]
    facts: dict[str, Any]


def compare(
    config: SolveConfig,
    source: sources.Source,
    directory: RunDirectory,
    report: Report | None = None,
) -> Comparison:
    """Solve and write everything but the figures and the last file.

    Args:
        config: what to compute.
        source: where the instances come from (`open_source`).
        directory: where the results go.
        report: where to tell how far it is.
    """
    report = report or Report()
    directory.write("config.toml", to_toml(config))
    report.stage("drawing", 0)
    drawn = sources.sample(source, config.instances, config.betas)
    order = np.argsort(np.asarray(drawn.beta), kind="stable")
    groups = _groups(np.asarray(drawn.beta)[order])
    dtype = drawn.reward.dtype
    tolerance = config.tolerance or default_tolerance(dtype)
    every = optimizers(config.max_steps)
    chosen: dict[str, optax.GradientTransformation | None] = {
        name: every[name] for name in config.optimizers
    }

    rows, wholes = [], []
    missed: dict[str, list[Any]] = {
        name: [] for name in ("optimizer", "seed", "index", "name", "beta", "status", "kl", "steps")
    }
    steps: dict[str, list[Any]] = {
        name: [] for name in ("optimizer", "beta", "certified", "q05", "q50", "q95", "tolerance")
    }
    for name, optimizer in chosen.items():
        report.stage(f"{LABELS[name]}:", len(order))
        own: list[Row] = []
        ends: list[Solution] = []
        _compile(drawn, order[groups[0]], optimizer, config, tolerance)
        for group in groups:
            part = _some(drawn, order[group])
            before = time.perf_counter()
            found = jax.block_until_ready(_solve(part, optimizer, config, tolerance))
            seconds = time.perf_counter() - before
            found = jax.device_get(replace(found, log_policy=jnp.zeros(0, dtype)))
            ends.append(found)
            own.append(_row(name, np.asarray(part.beta), found, seconds))
            done, certified = (sum(getattr(r, k) for r in own) for k in ("instances", "certified"))
            report.progress(done, f"{certified / done:.2%} certified")
        rows += own
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *ends)
        wholes.append(_row(name, np.asarray(drawn.beta)[order], whole, sum(r.seconds for r in own)))
        _add_missed(missed, name, config.seed, source, order, drawn, whole)
        _add_steps(steps, name, np.asarray(drawn.beta)[order], whole, tolerance)

    report.stage("recording courses", 0)
    traced = jax.tree.map(lambda x: x[: config.traced], drawn)
    traces = {
        name: trace(traced, optimizer, config.trace_steps, config.start)
        for name, optimizer in chosen.items()
    }
    turning, shown = _turning(traces, tolerance)
    facts = {
        "tolerance": tolerance,
        "traced": int(traced.beta.shape[0]),
        "turn": _TURN,
        "not_monotone": {name: int(turns.sum()) for name, turns in turning.items()},
        "shown": shown,
        "shown_name": source.names(shown)[0],
        "shown_beta": float(drawn.beta[shown]),
        "identity": {name: _largest(x.residual) for name, x in traces.items()},
        "identity_allowed": _ALLOWED,
    }
    comparison = Comparison(rows=rows, wholes=wholes, facts=facts)
    directory.write_csv(
        "convergence", convergence_columns({LABELS[n]: x.kl for n, x in traces.items()})
    )
    directory.write_csv("steps_by_beta", steps)
    directory.write_csv("descent_tpm", _courses(traces, shown))
    directory.write_parquet("solve.parquet", _columns(rows))
    directory.write_parquet("missed.parquet", missed)
    directory.write_json("solve.json", facts)
    directory.write("solve.md", markdown(comparison, by_beta=True))
    return comparison


def _solve(
    batch: Instance,
    optimizer: optax.GradientTransformation | None,
    config: SolveConfig,
    tolerance: float,
) -> Solution:
    return solve(
        batch,
        optimizer=optimizer,
        max_steps=config.max_steps,
        tolerance=tolerance,
        start=config.start,
    )


def _compile(
    drawn: Instance,
    rows: np.ndarray,
    optimizer: optax.GradientTransformation | None,
    config: SolveConfig,
    tolerance: float,
) -> None:
    """Compile what a group needs: solve it at a β so large that hardly a step is taken."""
    easy = _some(drawn, rows)
    easy = replace(easy, beta=jnp.full_like(easy.beta, 1e15))
    jax.block_until_ready(_solve(easy, optimizer, config, tolerance))


def _some(batch: Instance, rows: np.ndarray) -> Instance:
    return jax.tree.map(lambda x: np.asarray(x)[rows], batch)


def _groups(beta: np.ndarray) -> list[slice]:
    """Cut ascending β into tenths, or by value where there are no more than ten."""
    values, firsts = np.unique(beta, return_index=True)
    if len(values) > _GROUPS:
        firsts = np.unique(np.linspace(0, len(beta), _GROUPS + 1).astype(int)[:-1])
    return [slice(a, b) for a, b in zip(firsts, [*firsts[1:], len(beta)], strict=True)]


def _row(name: str, beta: np.ndarray, found: Solution, seconds: float) -> Row:
    def count(status: Status) -> int:
        return int(np.sum(found.status == status))

    return Row(
        optimizer=name,
        beta_low=float(beta.min()),
        beta_high=float(beta.max()),
        instances=len(beta),
        certified=int(np.sum(found.converged)),
        in_log_space=count(Status.CONVERGED_IN_LOG_SPACE),
        stuck=count(Status.STUCK),
        non_finite=count(Status.NON_FINITE),
        kl_median=float(np.median(found.kl)),
        kl_worst=float(np.max(found.kl)),
        steps_median=float(np.median(found.steps)),
        steps_most=int(np.max(found.steps)),
        seconds=seconds,
    )


def _add_missed(
    table: dict[str, list[Any]],
    name: str,
    seed: int,
    source: sources.Source,
    order: np.ndarray,
    drawn: Instance,
    found: Solution,
) -> None:
    for at in np.flatnonzero(~found.converged):
        index = int(order[at])
        row = (
            name,
            seed,
            index,
            source.names(index)[0],
            float(drawn.beta[index]),
            Status(int(found.status[at])).name,
            float(found.kl[at]),
            int(found.steps[at]),
        )
        for column, value in zip(table.values(), row, strict=True):
            column.append(value)


def _add_steps(
    table: dict[str, list[Any]], name: str, beta: np.ndarray, found: Solution, tolerance: float
) -> None:
    """Add quantiles of the steps that certified instances took, by β, twice as fine as the rows."""
    for some in np.array_split(np.arange(len(beta)), min(2 * _GROUPS, len(np.unique(beta)))):
        certified = np.asarray(found.converged)[some]
        taken = found.steps[some][certified]
        quantiles = np.quantile(taken, [0.05, 0.5, 0.95]) if len(taken) else [np.nan] * 3
        middle = float(np.exp(np.mean(np.log(beta[some]))))
        row = (LABELS[name], middle, float(certified.mean()), *map(float, quantiles), tolerance)
        for column, value in zip(table.values(), row, strict=True):
            column.append(value)


def _turning(traces: dict[str, Trace], tolerance: float) -> tuple[dict[str, np.ndarray], int]:
    """Return, by optimiser, which courses of TPM(A) are not monotone, and the one that turns most.

    Courses are taken up to the first step within the tolerance. The one that turns most is that of
    the first optimiser with any.
    """
    turning, shown = {}, None
    for name, course in traces.items():
        done = np.minimum.accumulate(course.kl, axis=0) <= tolerance
        before = np.concatenate([np.zeros_like(done[:1]), done[:-1]])
        change = np.where(before[1:], 0.0, np.diff(np.asarray(course.tpm_aligned, float), axis=0))
        turn = np.fmin(np.fmax(change, 0).sum(axis=0), np.fmax(-change, 0).sum(axis=0))
        turning[name] = turn > _TURN
        if shown is None and turning[name].any():
            shown = int(np.argmax(turn))
    return turning, shown or 0


def _largest(residual: Any) -> float:
    """Return the largest deviation at a finite policy, in units of rounding."""
    size = np.abs(np.asarray(residual, float))
    return float(np.max(size[np.isfinite(size)], initial=0.0))


def _courses(traces: dict[str, Trace], shown: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"optimizer": [], "step": [], "tpm_aligned": [], "kl": []}
    for name, course in traces.items():
        columns["optimizer"] += [LABELS[name]] * len(course.kl)
        columns["step"] += list(range(len(course.kl)))
        columns["tpm_aligned"] += course.tpm_aligned[:, shown].tolist()
        columns["kl"] += course.kl[:, shown].tolist()
    return columns


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__}


def markdown(comparison: Comparison, *, by_beta: bool) -> str:
    """Return the tables: each optimiser as a whole, the shares by β, and if wanted all by β."""
    facts = comparison.facts
    head = (
        "| optimiser | β | instances | certified | in log space | median KL | worst KL "
        "| median steps | most | seconds |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    lines = [
        f"Certified: KL(π‖p*) ≤ {facts['tolerance']:g} nats. KL and steps are of all instances, "
        "the missed included; missed.parquet lists these.",
        "",
        head,
        *(_line(row) for row in comparison.wholes),
        "",
        *_shares(comparison.rows),
        "",
        "| optimiser | TPM(A) not monotone | L(p*) - L(π) - β KL(π‖p*), units of rounding |",
        "|---|---:|---:|",
    ]
    for name, count in facts["not_monotone"].items():
        off = facts["identity"][name]
        lines.append(f"| {LABELS[name]} | {count:,} of {facts['traced']:,} | {off:.2g} |")
    lines += [
        "",
        f"Not monotone: TPM(A) rises and falls by more than {facts['turn']:g} on its way. The "
        f"identity of eq. (1) is granted {facts['identity_allowed']:g} units at each of the "
        "recorded steps.",
    ]
    if by_beta:
        lines += ["", "By β:", "", head, *(_line(row) for row in comparison.rows)]
    return "\n".join(lines) + "\n"


def _shares(rows: list[Row]) -> list[str]:
    """Return the shares certified: a line per optimiser, a column per range of β."""
    ranges = list(dict.fromkeys((row.beta_low, row.beta_high) for row in rows))
    names = [_range(low, high) for low, high in ranges]
    lines = [
        "| certified at β = | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for optimizer in dict.fromkeys(row.optimizer for row in rows):
        cells = [_share(row) for row in rows if row.optimizer == optimizer]
        lines.append(f"| {LABELS[optimizer]} | " + " | ".join(cells) + " |")
    return lines


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.2g} to {high:.2g}"


def _share(row: Row) -> str:
    share = f"{row.certified / row.instances:.1%}"
    return share if row.certified == row.instances or share != "100.0%" else "< 100%"


def _line(row: Row) -> str:
    return (
        f"| {LABELS[row.optimizer]} | {_range(row.beta_low, row.beta_high)} "
        f"| {row.instances:,} | {_share(row)} | {row.in_log_space:,} | {row.kl_median:.2g} "
        f"| {row.kl_worst:.2g} | {row.steps_median:g} | {row.steps_most:,} | {row.seconds:.2f} |"
    )
