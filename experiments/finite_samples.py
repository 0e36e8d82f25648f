"""How many preferences does a method need? python experiments/finite_samples.py --out DIR [CONFIG].

For each method and number of preferences, the policy that is optimal for a sample of that size,
beside p* and beside the method's own limit, the population optimum: over random instances and
independent samples.

Expected: the error to the own limit falls as the square root of the number; to p* it does so for
DPO, the reward model with eq. (1) (the same policy) and robust DPO, and stays above a floor for
IPO, KTO, flipped labels and pairs that never cross two halves. With few preferences DPO has no
optimum on most samples, and robust DPO a loss without lower bound. A few minutes on two cores.

DIR/data/finite_samples.csv has a row per method and number.
"""

import argparse
import math
import sys
import time
import tomllib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxsim
from jaxsim import Family, Feedback, Instance, OptimumStatus
from jaxsim.figures import draw_all
from jaxsim.methods.population import METHODS
from jaxsim.runs.config import from_dict
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.job import versions

FEW = 1000
NEARLY_ALL = 0.9
"""The rate is fitted to numbers from here on at which so many samples have an optimum."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method with its settings; `halves` allows only pairs within each half of the outputs."""

    method: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    feedback: dict[str, Any] = field(default_factory=dict)
    halves: bool = False

    def asked(self, outputs: int) -> Feedback:
        """Return how raters are asked."""
        half = np.arange(outputs) < outputs // 2
        compared = half[:, None] == half if self.halves else None
        return Feedback(**self.feedback, compared=compared)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration but for the methods, one to one with the TOML file."""

    seed: int
    instances: int
    seeds: int
    numbers: tuple[int, ...]
    family: Family


def load(path: Path) -> tuple[Settings, dict[str, Entry]]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    methods = {name: Entry(**entry) for name, entry in table.pop("methods").items()}
    return from_dict(Settings, table), methods


def expected(entry: Entry, instance: Instance) -> np.ndarray:
    """Return exact feedback on each instance, outputs drawn from p_ref."""
    asked, kind = entry.asked(instance.reward.shape[1]), METHODS[entry.method].kind
    with jax.enable_x64(True):
        mu = jax.numpy.exp(jaxsim.best_of_n(jax.tree.map(jax.numpy.asarray, instance), 1))
        return np.asarray(jax.vmap(partial(asked.expected, kind))(instance.reward, mu))


def sampled(key: jax.Array, exact: np.ndarray, number: int, seeds: int) -> np.ndarray:
    """Return the shares in so many samples for each instance, [instances * seeds, ...]."""
    with jax.enable_x64(True):
        draw = jax.vmap(
            jax.vmap(partial(jaxsim.sample_feedback, num=number), in_axes=(0, None)),
        )
        keys = jax.random.split(key, (len(exact), seeds))
        counts = np.asarray(draw(keys, jax.numpy.asarray(exact)))
    return counts.reshape(-1, *exact.shape[1:]) / number


def distances(log_policy: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(np.exp(log_policy) - np.exp(other)).sum(axis=1) / 2


def study(settings: Settings, entry: Entry, key: jax.Array) -> list[dict[str, Any]]:
    """Return a row for each number of preferences."""
    with jax.enable_x64(True):
        instance = jaxsim.sample_instances(
            jax.random.key(settings.seed), settings.family, settings.instances
        )
        star = np.asarray(jaxsim.optimal_policy(instance))
    instance = jax.tree.map(np.asarray, instance)
    exact = expected(entry, instance)
    limit = jaxsim.population_optimum(entry.method, instance, exact, **entry.hyperparameters)
    copies = jax.tree.map(lambda x: np.repeat(x, settings.seeds, axis=0), (instance, star))
    own = np.repeat(limit.log_policy, settings.seeds, axis=0)
    rows = []
    for at, number in enumerate(settings.numbers):
        shares = sampled(jax.random.fold_in(key, at), exact, number, settings.seeds)
        found = jaxsim.population_optimum(entry.method, copies[0], shares, **entry.hyperparameters)
        known = np.isfinite(found.log_policy).any(axis=1)
        row: dict[str, Any] = {
            "number": number,
            "samples": len(known),
            "share_without_optimum": float(1 - known.mean()),
            "share_unbounded": float(np.mean(found.status == OptimumStatus.UNBOUNDED)),
        }
        for name, other in (("to_optimum", copies[1]), ("to_limit", own)):
            apart = distances(found.log_policy, other)[known]
            for quantile in (5, 50, 95):
                row[f"{name}_q{quantile:02d}"] = (
                    float(np.quantile(apart, quantile / 100)) if known.any() else math.nan
                )
        rows.append(row)
    return rows


def rate(rows: list[dict[str, Any]]) -> float:
    """Return the slope of log median error to the limit by log number, where nearly all exist."""
    used = [r for r in rows if r["number"] >= FEW and r["share_without_optimum"] < 1 - NEARLY_ALL]
    if len(used) < 2:
        return math.nan
    number, error = (np.log([r[k] for r in used]) for k in ("number", "to_limit_q50"))
    return float(np.polyfit(number, error, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--numbers", type=int, nargs="+", help="in place of the configuration's")
    options = parser.parse_args()
    started = time.time()
    try:
        settings, methods = load(options.config)
        run = RunDirectory.create(options.out)
    except (ValueError, TypeError, OSError) as error:
        print(f"finite_samples.py: {error}", file=sys.stderr)
        sys.exit(2)
    if options.numbers:
        settings = replace(settings, numbers=tuple(options.numbers))
    table = []
    for at, (name, entry) in enumerate(methods.items()):
        rows = study(settings, entry, jax.random.fold_in(jax.random.key(settings.seed), at))
        slope = rate(rows)
        table += [{"method": name, "rate": slope, **row} for row in rows]
        last = rows[-1]
        print(
            f"{name}: {last['to_optimum_q50']:.4f} from p* and {last['to_limit_q50']:.4f} from its "
            f"limit at {last['number']}, rate {slope:.2f}; without optimum "
            f"{rows[0]['share_without_optimum']:.0%} at {rows[0]['number']}  "
            f"({time.time() - started:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
    run.write_csv("finite_samples", {key: [row[key] for row in table] for key in table[0]})
    seconds = time.time() - started
    run.write_json(
        "provenance.json", {"argv": sys.argv, "versions": versions(), "seconds": seconds}
    )
    draw_all(run)
    run.complete()
    print(f"Written to {options.out} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
