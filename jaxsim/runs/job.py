"""The main job: stream instances, judge the claims, confirm by descent, write it all down."""

import math
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import Any

import jax
import numpy as np
from scipy.special import betaincinv

from jaxsim import claims, shrink, sources
from jaxsim.descent import Status
from jaxsim.engine.loop import default_tolerance, solve, trace
from jaxsim.engine.simulate import survey
from jaxsim.engine.stream import ClaimTotal, Totals, quantiles, stream
from jaxsim.engine.table import blocks, per_instance
from jaxsim.engine.tiles import require_dtype
from jaxsim.families.counter import key_words
from jaxsim.families.spec import Scalar
from jaxsim.instance import Instance
from jaxsim.runs import shards
from jaxsim.runs.config import RunConfig, SolveConfig, to_toml
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.share import Share

LEVELS = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
_TRACED = 256  # instances whose descent is drawn
_TRACE_STEPS = 120


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where a run tells how far it is: nothing by default."""

    stage: Callable[..., None] = lambda name, total, unit="instances": None
    progress: Callable[..., None] = lambda done, note="": None
    say: Callable[[str], None] = lambda text: None
    stopping: Callable[[], bool] = lambda: False  # whether the user asked to
    uninterrupted: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class ClaimRow:
    """A line of the claims table."""

    name: str
    statement: str
    verdict: str
    tried: int
    failed: int
    undecided: int
    worst_margin: float | None
    margin_is: str
    worst_case: str | None
    counterexample: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a run found, before it is written."""

    totals: Totals
    rows: list[ClaimRow]
    tables: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    solve: dict[str, Any] = field(default_factory=dict)


def open_source(config: RunConfig | SolveConfig) -> sources.Source:
    """Return the family, or the file, that a configuration names.

    Raises:
        ValueError, OSError: where the file is not there or not as it should be.
    """
    require_dtype(config.family.dtype)
    if config.input:
        return sources.read(config.input, reward=config.reward, dtype=config.family.dtype)
    family = config.family
    if config.betas:  # the family's own β is never used: spare its draw
        family = replace(family, beta=Scalar(kind="fixed", value=config.betas[0]))
    words = key_words(jax.random.key(config.seed))
    return sources.FamilySource(family=family, words=words, num=config.instances)


def begin(
    config: RunConfig, source: sources.Source, directory: RunDirectory, *, allow_mixed: bool = False
) -> list[str]:
    """Start a run in a directory, or go on with the one that is there.

    Args:
        config: what to compute.
        source: where the instances come from (`open_source`).
        directory: where the results go.
        allow_mixed: whether to go on although versions, type or tile are others.

    Returns:
        What is mixed.

    Raises:
        ValueError: where the directory holds another run.
    """
    wanted = shards.manifest(config, source)
    stored = directory.read_json("manifest.json")
    if stored is None:
        directory.write("config.toml", to_toml(config))
        directory.write_json("manifest.json", wanted)
        return []
    found = shards.differences(stored, wanted)
    divided = not isinstance(stored, dict) or stored.get("shards") != wanted["shards"]
    if found and (divided or not allow_mixed):
        hint = "" if divided else "; --allow-mixed goes on all the same, and records it"
        raise ValueError(f"{directory.path}: begun with other {'; '.join(found)}{hint}")
    return found


class Stopped(Exception):
    """The user asked to stop, and what was in hand has been committed."""


def compute(
    config: RunConfig,
    source: sources.Source,
    directory: RunDirectory,
    share: Share,
    report: Report,
) -> None:
    """Compute and commit every shard of a share that is not there yet.

    Raises:
        Stopped: where the user asked for it, after the shard in hand.
    """
    divided = shards.plan(config, source)
    mine = [index for index in range(divided.count) if index in share]
    todo = []
    for index in mine:
        try:
            if shards.committed(directory, divided, index) is None:
                todo.append(index)
        except shards.Damaged as error:
            report.say(f"{error}: computing it again")
            todo.append(index)
    sizes = {index: stop - start for index in todo for start, stop in [divided.range(index)]}
    report.stage("evaluating", sum(sizes.values()))
    done = 0
    with report.uninterrupted():
        for position, index in enumerate(todo, start=1):
            start, stop = divided.range(index)
            totals = stream(
                source,
                config.betas,
                audit=config.audit,
                start=start,
                stop=stop,
                progress=partial(_forward, report, done - start),
            )
            if config.save == "instances":
                tables = blocks(source, config.betas, start, stop)
                shards.save_instances(directory, index, tables)
            shards.commit(directory, divided, index, totals)
            done += sizes[index]
            if report.stopping():
                there = len(mine) - len(todo) + position
                raise Stopped(f"stopped with {there} of {len(mine)} shards done")


def _forward(report: Report, offset: int, at: int) -> None:
    report.progress(at + offset)


def run(
    config: RunConfig,
    source: sources.Source,
    directory: RunDirectory,
    report: Report | None = None,
) -> Results:
    """Do the main job and write everything but the figures and the last file.

    What shards are there already is not computed again.

    Args:
        config: what to compute.
        source: where the instances come from (`open_source`).
        directory: where the results go; `begin` has been called on it.
        report: where to tell how far it is.

    Raises:
        Stopped: where the user asked for it; the run can go on later.
    """
    report = report or Report()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        # Beside the stream, since compiling these takes longer than running them.
        confirming = pool.submit(_confirmation, config, source)
        mapping = pool.submit(_atlas, config, source)
        compute(config, source, directory, Share(), report)
        report.stage("confirming by descent", 0)
        solved, convergence = confirming.result()
        cells = mapping.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    directory.remove_partial()
    totals = shards.combined(directory, shards.plan(config, source))
    tables: dict[str, dict[str, list[Any]]] = {}
    tables["tpm_by_beta"], tables["alpha_to_tpm"] = _bands(totals)
    cells[source.outputs] = totals.sums.hypotheses_hold, totals.sums.violations
    tables["violations"] = _violations(totals.betas, cells)
    if convergence:
        tables["convergence"] = convergence
    report.stage("shrinking counterexamples", 0)
    rows = _claim_rows(totals, source, solved)
    worst = next((r for r in rows if r.name == "theorem_2" and r.counterexample), None)
    if worst and worst.counterexample:
        tables["counterexample"] = _counterexample_table(worst.counterexample)
        directory.write_json("counterexample.json", worst.counterexample)
    if isinstance(source, sources.ArraySource):
        columns = per_instance(source, config.betas)
        directory.write_parquet("instances.parquet", columns)
        tables["prompts"] = {
            name: list(columns[name])
            for name in (
                "name",
                "beta",
                "alpha",
                "log_odds_shift",
                "tpm_aligned",
                "hypotheses_hold",
                "conclusion",
            )
        }

    results = Results(totals=totals, rows=rows, tables=tables, solve=solved)
    _write(directory, results)
    return results


@contextmanager
def attempt(directory: RunDirectory, argv: list[str], mixed: list[str]) -> Iterator[None]:
    """Record an attempt at a run in its provenance, and in the end how it ended."""
    started, clock = time.time(), time.monotonic()
    facts = provenance(argv, started) | {"mixed": mixed, "ended": "it did not: killed"}
    name = directory.record_attempt(facts)
    ended = "failed"
    try:
        yield
        ended = "done"
    except (Stopped, KeyboardInterrupt):
        ended = "interrupted"
        raise
    finally:
        facts |= {"ended": ended, "seconds": time.monotonic() - clock}
        with suppress(OSError):  # a full disk must not hide why it failed
            directory.write_json(name, facts)


def provenance(argv: list[str], started: float) -> dict[str, Any]:
    """Return what a run was made by: command, versions, devices, times since the epoch."""
    return {
        "argv": argv,
        "versions": versions(),
        "devices": [str(d) for d in jax.devices()],
        "started_unix": started,
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("prefshift", "jax", "jaxlib", "optax", "chex", "numpy", "matplotlib", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _bands(totals: Totals) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return quantiles of TPM(A) by β, and by β and α: logit TPM(A) = logit α + Δ."""
    sums, levels = totals.sums, tuple(LEVELS.values())
    by_beta: dict[str, list[Any]] = {
        "beta": list(totals.betas),
        "instances": sums.counted.tolist(),
        "alpha_mean": (sums.alpha / np.maximum(sums.counted, 1)).tolist(),
        "tpm_mean": (sums.tpm_aligned / np.maximum(sums.counted, 1)).tolist(),
    } | {name: [] for name in LEVELS}
    by_alpha: dict[str, list[Any]] = {"beta": [], "alpha": []} | {name: [] for name in LEVELS}
    alphas = np.linspace(0.01, 0.99, 99)
    for at, beta in enumerate(totals.betas):
        tpm = _sigmoid(quantiles(sums.logit_tpm[at], levels))
        shift = quantiles(sums.log_odds_shift[at], levels)
        for name, value in zip(LEVELS, tpm, strict=True):
            by_beta[name].append(float(value))
        for alpha in alphas:
            by_alpha["beta"].append(beta)
            by_alpha["alpha"].append(round(float(alpha), 2))
            moved = _sigmoid(math.log(alpha / (1 - alpha)) + shift)
            for name, value in zip(LEVELS, moved, strict=True):
                by_alpha[name].append(float(value))
    return by_beta, by_alpha


def _sigmoid(x: Any) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.asarray(x, np.float64))))


def _atlas(config: RunConfig, source: sources.Source) -> dict[int, tuple[Any, Any]]:
    """Count violations, by β, for families alike but for the number of outputs."""
    if not (isinstance(source, sources.FamilySource) and config.atlas and config.betas):
        return {}
    cells = {}
    for outputs in config.atlas_outputs:
        if outputs != source.outputs:
            family = replace(source.family, outputs=outputs)
            part = replace(source, family=family, num=config.atlas)
            found = survey(part, config.betas, wanted=config.atlas, means=False)
            cells[outputs] = np.full(len(config.betas), found.hold), found.violations
    return cells


def _violations(
    betas: tuple[float, ...], cells: dict[int, tuple[Any, Any]]
) -> dict[str, list[Any]]:
    """Return the share of violations among instances that meet the hypotheses, by n and β."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("outputs", "beta", "hypotheses_hold", "violations", "share", "low", "high")
    }
    for outputs, (hold, violated) in sorted(cells.items()):
        for beta, n, k in zip(betas, hold.tolist(), violated.tolist(), strict=True):
            low, high = clopper_pearson(k, n)
            row = (outputs, beta, n, k, k / n if n else float("nan"), low, high)
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    return columns


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """Return the exact 95% confidence interval of a share (Clopper and Pearson 1934)."""
    low = betaincinv(successes, trials - successes + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, trials - successes, 0.975) if successes < trials else 1.0
    return float(low), float(high)


def _confirmation(
    config: RunConfig, source: sources.Source
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Solve a sample by descent; return how that went, and quantiles of its course."""
    tolerance = default_tolerance(np.dtype(config.family.dtype))
    if not config.confirm:
        return {"tried": 0, "tolerance": tolerance}, {}
    batch = sources.sample(source, config.confirm, config.betas)
    solution = jax.device_get(solve(batch))
    worst = int(np.argmax(solution.kl))
    solved = {
        "tried": int(solution.kl.size),
        "converged": int(np.sum(solution.converged)),
        "status": {s.name.lower(): int(np.sum(solution.status == s)) for s in Status},
        "tolerance": tolerance,
        "worst_kl": float(solution.kl[worst]),
        "worst_index": worst,
        "worst_beta": float(batch.beta[worst]),
        "median_steps": float(np.median(solution.steps)),
        "most_steps": int(solution.steps.max()),
    }
    return solved, _convergence(batch)


def _convergence(batch: Instance) -> dict[str, list[Any]]:
    """Return quantiles of KL(π‖p*) by optimiser and step, on the first instances of a batch."""
    traced = jax.tree.map(lambda x: np.asarray(x)[:_TRACED], batch)
    return convergence_columns({"Rprop (default)": trace(traced, None, _TRACE_STEPS).kl})


def convergence_columns(kl_by_optimizer: dict[str, Any]) -> dict[str, list[Any]]:
    """Return quantiles of the least KL(π‖p*) so far, from KL as [steps + 1, instances].

    `solve` stops at the first step that meets its tolerance; so does what is drawn.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("optimizer", "step", "q05", "q50", "q95", "worst")
    }
    for name, kl in kl_by_optimizer.items():
        for step, row in enumerate(np.fmin.accumulate(kl, axis=0)):
            q05, q50, q95 = np.quantile(row, [0.05, 0.5, 0.95], method="lower")
            values = (name, step, float(q05), float(q50), float(q95), float(row.max()))
            for key, value in zip(columns, values, strict=True):
                columns[key].append(value)
    return columns


def _claim_rows(totals: Totals, source: sources.Source, solved: dict[str, Any]) -> list[ClaimRow]:
    by_descent = ClaimTotal()
    if solved["tried"]:
        by_descent = ClaimTotal(
            tried=solved["tried"],
            failed=solved["tried"] - solved["converged"],
            worst_margin=solved["tolerance"] - solved["worst_kl"],
            worst_index=solved["worst_index"],
            worst_beta=solved["worst_beta"],
        )
    rows = []
    for claim in claims.CLAIMS:
        found = totals.claims[claim.name] if claim.judge else by_descent
        example = None
        if found.failed and claim.name in shrink.DEPTHS and found.worst_index is not None:
            example = _shrunk(source, claim.name, found)
        rows.append(
            ClaimRow(
                name=claim.name,
                statement=claim.statement,
                verdict="FAILS" if found.failed else "HOLDS" if found.tried else "NOT TRIED",
                tried=found.tried,
                failed=found.failed,
                undecided=found.undecided,
                worst_margin=found.worst_margin if math.isfinite(found.worst_margin) else None,
                margin_is=claim.margin_is,
                worst_case=_where(source, found),
                counterexample=example,
            )
        )
    return rows


def _where(source: sources.Source, found: ClaimTotal) -> str | None:
    if found.worst_index is None:
        return None
    name = source.names(found.worst_index)[0]
    return name if found.worst_beta is None else f"{name}, β = {found.worst_beta:g}"


def _shrunk(source: sources.Source, claim: str, found: ClaimTotal) -> dict[str, Any] | None:
    """Return the worst failure, shrunk; None where it fails too narrowly for float64's liking."""
    assert found.worst_index is not None
    instance = sources.one(source, found.worst_index, found.worst_beta)
    example = shrink.Example.of(instance, source.names(found.worst_index)[1])
    try:
        smaller = shrink.shrink(example, shrink.DEPTHS[claim])
    except ValueError:
        return None
    return smaller.to_json() | {
        "claim": claim,
        "name": f"simplified from {_where(source, found)}",
        "found": {
            "name": _where(source, found),
            "outputs": int(example.reward.size),
            "alpha": example.alpha,
            "log_odds_shift": example.log_odds_shift,
            "tpm_aligned": example.tpm_aligned,
            "log_z": example.log_z,
            "covariance_aligned": example.covariance(example.p_aligned),
            "covariance_unaligned": example.covariance(example.p_unaligned),
        },
    }


def _counterexample_table(example: dict[str, Any]) -> dict[str, list[Any]]:
    columns = ("reward", "p_aligned", "p_unaligned", "p_ref", "p_star")
    return {
        "output": list(range(len(example["names"]))),
        "name": example["names"],
    } | {name: example[name] for name in columns}


def _write(directory: RunDirectory, results: Results) -> None:
    sums = results.totals.sums
    counted = np.maximum(sums.counted, 1)
    bands = results.tables["tpm_by_beta"]
    directory.write_parquet(
        "summary.parquet",
        {
            "beta": list(results.totals.betas),
            "instances": sums.counted,
            "invalid": sums.invalid,
            "hypotheses_hold": sums.hypotheses_hold,
            "violations": sums.violations,
            "undecided": sums.undecided,
            "settled_exactly": sums.settled,
            "below_alpha": sums.below_alpha,
            "alpha_mean": sums.alpha / counted,
            "tpm_aligned_mean": sums.tpm_aligned / counted,
            "kl_mean": sums.kl / counted,
            "reward_gain_mean": sums.reward_gain / counted,
        }
        | {f"tpm_aligned_{name}": bands[name] for name in LEVELS},
    )
    for name, columns in results.tables.items():
        directory.write_csv(name, columns)
    if results.solve["tried"]:
        directory.write_json("solve.json", results.solve)
    directory.write_json("claims.json", [vars(row) for row in results.rows])
    directory.write("claims.md", claims_markdown(results.rows))


def claims_markdown(rows: list[ClaimRow]) -> str:
    """Return the claims table, and the counterexamples below it."""
    lines = [
        "| claim | verdict | tried | failed | undecided | worst margin | margin is |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        margin = "" if row.worst_margin is None else f"{row.worst_margin:.3g}"
        lines.append(
            f"| {row.statement} | **{row.verdict}** | {row.tried:,} | {row.failed:,} "
            f"| {row.undecided:,} | {margin} | {row.margin_is} |"
        )
    for row in rows:
        if row.counterexample:
            lines += ["", *counterexample_lines(row.statement, row.counterexample)]
    return "\n".join(lines) + "\n"


def counterexample_lines(statement: str, example: dict[str, Any]) -> list[str]:
    """Return a counterexample as Markdown: as it was found, and simplified to check by hand."""
    found = example["found"]
    lines = [
        f"Counterexample to: {statement}",
        "",
        f"Found: {found['name']}, {found['outputs']} outputs, α = {found['alpha']:.4g}: "
        f"{_numbers(found)}.",
        "",
        "Simplified from it, another instance that still fails (outputs dropped and merged, "
        f"rewards shifted, numbers rounded where it fails still): β = {example['beta']:g}, "
        f"α = {example['alpha']:.4g}: {_numbers(example)}.",
        "",
        "| output | r | p_A | p_U | p_ref | p* |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    columns = ("reward", "p_aligned", "p_unaligned", "p_ref", "p_star")
    for at, name in enumerate(example["names"]):
        cells = " | ".join(f"{example[c][at]:.4g}" for c in columns)
        lines.append(f"| {name.replace('|', '/')} | {cells} |")
    return lines


def _numbers(facts: dict[str, Any]) -> str:
    return (
        f"Cov(r, p_A) = {facts['covariance_aligned']:.4g}, "
        f"Cov(r, p_U) = {facts['covariance_unaligned']:.4g}, "
        f"Δ = {facts['log_odds_shift']:.4g}, TPM(A) = {facts['tpm_aligned']:.4g}, "
        f"log Z = {facts['log_z']:.4g}"
    )
