"""Map how often Theorem 2 fails: python experiments/atlas.py --out DIR [CONFIG.toml].

Expected: of Dirichlet(1) instances with Gaussian rewards that meet the hypotheses, 10.3%, 24%,
34.5% and 41% fail as β → 0 for n = 3, 8, 32 and 128, and under 0.2% at β = 10; with binary rewards,
or two outputs, none at any β; of 88 real prompts that meet them, a few. An hour on two cores.

Each cell is written as it is done, and one that is there is not done again: a stopped run goes on
with the same command, and several may share the work (`--only` a family).
"""

import argparse
import hashlib
import json
import sys
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxsim.engine.simulate import Simulation, survey
from jaxsim.families.counter import key_words
from jaxsim.families.spec import Family, Scalar
from jaxsim.figures import draw_all
from jaxsim.runs.config import from_dict
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.job import clopper_pearson
from jaxsim.sources import FamilySource, Source, read


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """The configuration, one to one with the TOML file."""

    seed: int
    outputs: tuple[int, ...]
    betas: tuple[float, ...]
    wanted: int
    most: int
    families: dict[str, Family]


REAL = "real prompts (ngram)"


def load(path: Path) -> Atlas:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    families = table.pop("families")
    return Atlas(
        seed=table.pop("seed"),
        outputs=tuple(table.pop("outputs")),
        betas=tuple(table.pop("betas")),
        wanted=table.pop("wanted"),
        most=table.pop("most"),
        families={name: from_dict(Family, f, name + ".") for name, f in families.items()},
        **table,
    )


def cells(atlas: Atlas) -> list[tuple[str, int]]:
    """Family and number of outputs of every cell, the quick ones first."""
    drawn = [(name, n) for n in atlas.outputs for name in atlas.families]
    return [(REAL, 0), *drawn]


def source_of(atlas: Atlas, name: str, outputs: int) -> Source:
    if name == REAL:
        return read("ngram", reward="reward", dtype="float32")
    family = replace(atlas.families[name], outputs=outputs, beta=Scalar(kind="fixed", value=1.0))
    # Each cell its own key, so that no two share their draws.
    cell = hashlib.sha256(f"{name}/{outputs}".encode()).digest()
    key = jax.random.fold_in(jax.random.key(atlas.seed), int.from_bytes(cell[:4], "big"))
    return FamilySource(family=family, words=key_words(key), num=atlas.most)


def cell_file(name: str, outputs: int) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return f"cells/{plain}-{outputs}.json"


def done(directory: RunDirectory, atlas: Atlas, name: str, outputs: int) -> dict[str, Any] | None:
    found = directory.read_json(cell_file(name, outputs))
    if found and found["asked"] != asked(atlas, name):
        sys.exit(f"{directory.path}: holds cells of another configuration; give another --out")
    return found


def asked(atlas: Atlas, name: str) -> dict[str, Any]:
    family = asdict(atlas.families[name]) if name != REAL else {}
    limits = {"seed": atlas.seed, "wanted": atlas.wanted, "most": atlas.most}
    return json.loads(json.dumps(limits | {"betas": atlas.betas, "family": family}))


def write_cell(directory: RunDirectory, atlas: Atlas, name: str, n: int, found: Simulation) -> None:
    counts = {name: getattr(found, name) for name in ("drawn", "hold", "settled")}
    counts["violations"] = found.violations.tolist()
    content = {"asked": asked(atlas, name), "family": name, "outputs": n, **counts}
    directory.write_json(cell_file(name, n), content)


def table(directory: RunDirectory, atlas: Atlas) -> dict[str, list[Any]]:
    """One row per cell and β, with a 95% Clopper–Pearson interval of the share."""
    rows = []
    for name, n in cells(atlas):
        cell = done(directory, atlas, name, n)
        assert cell is not None
        for beta, failed in zip(atlas.betas, cell["violations"], strict=True):
            low, high = clopper_pearson(failed, cell["hold"])
            rows.append(
                {
                    "family": name,
                    "outputs": n or 512,
                    "beta": beta,
                    "drawn": cell["drawn"],
                    "hypotheses_hold": cell["hold"],
                    "violations": failed,
                    "share": failed / cell["hold"] if cell["hold"] else float("nan"),
                    "low": low,
                    "high": high,
                }
            )
    return {key: [row[key] for row in rows] for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="survey this family alone, and draw nothing")
    options = parser.parse_args()
    atlas = load(options.config)
    options.out.mkdir(parents=True, exist_ok=True)
    directory = RunDirectory(options.out)
    for name, n in cells(atlas):
        if (options.only in (None, name)) and done(directory, atlas, name, n) is None:
            found = survey(source_of(atlas, name, n), atlas.betas, wanted=atlas.wanted, means=False)
            write_cell(directory, atlas, name, n, found)
            print(f"{name}, n = {n or 512}: {found.hold} of {found.drawn}", flush=True)
    if options.only is None:
        columns = table(directory, atlas)
        directory.write_parquet("atlas.parquet", columns)
        directory.write_csv("atlas", columns)
        draw_all(directory)
        directory.complete()


if __name__ == "__main__":
    main()
