"""Which methods reach eq. (1)'s optimum? python experiments/atlas_methods.py --out DIR [CONFIG].

Each method's population optimum (`jaxsim.population_optimum`) on random instances and on the real
prompts, measured against p* (`jaxsim.measure_policy`); the frontier of reward against KL(π‖p_ref);
and one small instance worked through all methods.

Expected: within 1e-6 of p* in total variation are the reward model with eq. (1), RLHF with the
penalty in the reward, DPO on true labels, robust DPO with the true flip rate, Plackett–Luce DPO, k2
in the loss, and Dr. GRPO with an unbiased KL; all others are not. It took 25 minutes on two cores
that others used too.

DIR/data/methods.csv has a row per method and source, DIR/instances.parquet a row per instance.
"""

import argparse
import sys
import time
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxsim
from jaxsim import Family, Feedback, Instance, OptimumStatus
from jaxsim.figures import draw_all
from jaxsim.runs.config import from_dict
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.job import versions
from jaxsim.sources import read

REACHES = 1e-6
"""Total variation to p* up to which a method counts as reaching it, on every instance."""
RANDOM, REAL = "random", "real prompts"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method with its settings."""

    method: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    feedback: dict[str, Any] = field(default_factory=dict)

    def optimum(self, instance: Instance, **replaced: Any) -> jaxsim.Optimum:
        """Return where the method goes, with some of its hyperparameters replaced."""
        asked = Feedback(**self.feedback) if self.feedback else None
        settings = self.hyperparameters | replaced
        return jaxsim.population_optimum(self.method, instance, asked, **settings)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration but for the methods, one to one with the TOML file."""

    seed: int
    instances: int
    prompt_outputs: int
    prompt_betas: tuple[float, ...]
    frontier_instances: int
    frontier_betas: tuple[float, ...]
    family: Family


def load(path: Path) -> tuple[Settings, dict[str, Entry]]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    methods = {name: Entry(**entry) for name, entry in table.pop("methods").items()}
    return from_dict(Settings, table), methods


def drawn(settings: Settings) -> Instance:
    key = jax.random.key(settings.seed)
    with jax.enable_x64(True):
        batch = jaxsim.sample_instances(key, settings.family, settings.instances)
    return jax.tree.map(np.asarray, batch)


def real_prompts(settings: Settings) -> Instance:
    """Return the head of each real prompt's outputs, at each β: as many as lists can be made of."""
    with jax.enable_x64(True):
        whole = read("ngram", reward="reward", dtype="float64").instance
    likely = np.argsort(-np.asarray(log_reference_of(whole)), axis=1, kind="stable")
    head = likely[:, : settings.prompt_outputs]
    log_a, log_u, reward = (
        np.take_along_axis(np.asarray(x, np.float64), head, axis=1)
        for x in (whole.log_p_aligned, whole.log_p_unaligned, whole.reward)
    )
    lost = [np.logaddexp.reduce(x, axis=1) for x in (log_a, log_u)]
    # α is the share of A in the mass that is left.
    logit_alpha = np.asarray(whole.logit_alpha, np.float64) + lost[0] - lost[1]
    with jax.enable_x64(True):
        parts = [
            Instance.from_log_probs(
                log_a - lost[0][:, None],
                log_u - lost[1][:, None],
                reward,
                logit_alpha=logit_alpha,
                beta=np.full(len(reward), beta),
            )
            for beta in settings.prompt_betas
        ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def log_reference_of(instance: Instance) -> np.ndarray:
    """Return log p_ref, NumPy."""
    alpha = np.asarray(instance.logit_alpha, np.float64)[:, None]
    return np.logaddexp(
        np.asarray(instance.log_p_aligned, np.float64) - np.logaddexp(0, -alpha),
        np.asarray(instance.log_p_unaligned, np.float64) - np.logaddexp(0, alpha),
    )


def measured(entry: Entry, instance: Instance) -> dict[str, np.ndarray]:
    """Return a method's optimum on every instance, measured."""
    found = entry.optimum(instance)
    measures = vars(jaxsim.measure_policy(found.log_policy, instance))
    alpha = 1 / (1 + np.exp(-np.asarray(instance.logit_alpha, np.float64)))
    return {
        "status": found.status,
        "steps": found.steps,
        "beta": np.asarray(instance.beta, np.float64),
        "alpha": alpha,
        **measures,
    }


def summary(columns: dict[str, np.ndarray], hold: np.ndarray) -> dict[str, Any]:
    """Return a row of the table."""
    status, alpha = columns["status"], columns["alpha"]
    known = np.isfinite(columns["tv"])
    row: dict[str, Any] = {"instances": len(status), "hypotheses_hold": int(hold.sum())}
    for kind in OptimumStatus:
        row[kind.name.lower()] = int(np.sum(status == kind))
    row |= _spread("tv", columns["tv"][known], most=True)
    row |= _spread("kl", columns["kl"][known], most=True)
    row |= _spread("regret", columns["regret"][known])
    row |= _spread("beta_ratio", (columns["implied_beta"] / columns["beta"])[known])
    row |= _spread("tpm_gain", (columns["tpm_aligned"] - alpha)[known])
    star = columns["tpm_aligned_optimum"]
    row |= _spread("tpm_gain_optimum", star - alpha)
    row["tpm_gap_max"] = float(np.abs(columns["tpm_aligned"] - star)[known].max(initial=0))
    for name, tpm in (("", columns["tpm_aligned"]), ("_optimum", star)):
        # A tie, as where nothing moves, is none below.
        kept = tpm >= alpha - 1e-12
        row["share_at_least_alpha" + name] = float(kept[known].mean())
        row["share_at_least_alpha_hold" + name] = float(kept[known & hold].mean())
    moved = (np.abs(columns["tpm_aligned"] - alpha) > 1e-9) & (np.abs(star - alpha) > 1e-9)
    other_side = moved & ((columns["tpm_aligned"] >= alpha) != (star >= alpha))
    row["share_other_side"] = float(other_side[known].mean())
    certain = np.isin(status, [OptimumStatus.FOUND])
    row["reaches"] = bool(certain.all() and columns["tv"].max() <= REACHES)
    return row


def _spread(name: str, values: np.ndarray, most: bool = False) -> dict[str, float]:
    shares = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
    row = {
        f"{name}_{key}": float(np.quantile(values, share, method="inverted_cdf"))
        for key, share in shares.items()
    }
    return row | ({f"{name}_max": float(values.max())} if most else {})


def frontier(
    settings: Settings, methods: dict[str, Entry], instance: Instance
) -> list[dict[str, Any]]:
    """Return mean KL(π‖p_ref) and mean E_π[r] - E_ref[r] over instances, for each method and β."""
    some = jax.tree.map(lambda x: x[: settings.frontier_instances], instance)
    baseline = np.sum(np.exp(log_reference_of(some)) * some.reward, axis=1)
    rows = []

    def add(name: str, beta: float, log_policy: Any) -> None:
        found = jaxsim.measure_policy(log_policy, some)
        # Means over the instances that have an optimum; a mean over few says little.
        known = np.isfinite(found.kl_reference)
        rows.append(
            {
                "method": name,
                "beta": beta,
                "share": float(known.mean()),
                "kl": float(found.kl_reference[known].mean()) if known.any() else float("nan"),
                "gain": float((found.expected_reward - baseline)[known].mean())
                if known.any()
                else float("nan"),
            }
        )

    with jax.enable_x64(True):
        for n in (1, 1.3, 1.7, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 1024, 4096):
            add("best of n", n, jaxsim.best_of_n(jax.tree.map(jax.numpy.asarray, some), n))
        for beta in sorted({*settings.frontier_betas, *np.geomspace(0.01, 30, 40)}):
            at = replace(some, beta=np.full(len(some.beta), beta))
            add("p*", beta, jaxsim.optimal_policy(jax.tree.map(jax.numpy.asarray, at)))
    for name, entry in methods.items():
        if entry.method == "slic":  # has no β: its λ takes the same values
            for beta in settings.frontier_betas:
                add(name, beta, entry.optimum(some, regularization=beta).log_policy)
            continue
        for beta in settings.frontier_betas:
            add(name, beta, entry.optimum(some, beta=beta).log_policy)
    return rows


def worked(methods: dict[str, Entry]) -> list[dict[str, Any]]:
    """Return where each method goes on an instance small enough to follow by hand.

    A lies on the good outputs (p_A/p_U rises with r), so that TPM(A) of p* is above α at every β.
    """
    with jax.enable_x64(True):
        instance = Instance.from_probs([0.2, 0.2, 0.6], [0.5, 0.3, 0.2], [0.0, 1.0, 2.0], 0.5, 1.0)
        star = np.exp(np.asarray(jaxsim.optimal_policy(instance)))
    rows = [{"method": "p*", "status": "FOUND", "policy": star}]
    for name, entry in methods.items():
        found = entry.optimum(instance)
        rows.append(
            {
                "method": name,
                "status": OptimumStatus(int(found.status)).name,
                "policy": np.exp(found.log_policy),
            }
        )
    share = 0.5 * np.array([0.2, 0.2, 0.6]) / np.exp(log_reference_of(_batch(instance))[0])
    return [
        {
            "method": row["method"],
            "status": row["status"],
            **{f"output_{k + 1}": float(row["policy"][k]) for k in range(3)},
            "tpm_aligned": float(row["policy"] @ share),
        }
        for row in rows
    ]


def _batch(instance: Instance) -> Instance:
    return jax.tree.map(lambda x: np.asarray(x)[None], instance)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--instances", type=int, help="in place of the configuration's")
    options = parser.parse_args()
    started = time.time()
    try:
        settings, methods = load(options.config)
        run = RunDirectory.create(options.out)
    except (ValueError, TypeError, OSError) as error:
        print(f"atlas_methods.py: {error}", file=sys.stderr)
        sys.exit(2)
    if options.instances:
        settings = replace(settings, instances=options.instances)
    batches = {RANDOM: drawn(settings)}
    if settings.prompt_outputs:
        batches[REAL] = real_prompts(settings)
    holds = {name: np.asarray(jaxsim.certify(b).hypotheses_hold) for name, b in batches.items()}
    table, rows = [], []
    for source, batch in batches.items():
        for name, entry in methods.items():
            columns = measured(entry, batch)
            table.append({"method": name, "source": source, **summary(columns, holds[source])})
            labels = {
                "method": [name] * len(holds[source]),
                "source": [source] * len(holds[source]),
            }
            rows.append(labels | columns | {"hypotheses_hold": holds[source]})
            print(
                f"{source}, {name}: {'reaches p*' if table[-1]['reaches'] else 'goes elsewhere'}, "
                f"TV to p* {table[-1]['tv_q50']:.1e} in the median, {table[-1]['tv_max']:.1e} at "
                f"most  ({time.time() - started:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    for name in ("methods", "methods_tpm"):  # one table, two figures
        run.write_csv(name, {key: [row[key] for row in table] for key in table[0]})
    run.write_parquet(
        "instances.parquet", {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    )
    for name, part in (
        ("frontier", frontier(settings, methods, batches[RANDOM])),
        ("worked", worked(methods)),
    ):
        run.write_csv(name, {key: [row[key] for row in part] for key in part[0]})
    seconds = time.time() - started
    run.write_json(
        "provenance.json", {"argv": sys.argv, "versions": versions(), "seconds": seconds}
    )
    draw_all(run)
    run.complete()
    print(f"Written to {options.out} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
