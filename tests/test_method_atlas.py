"""The experiments on methods, run small."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
ATLAS = """seed = 1
instances = 40
prompt_outputs = 8
prompt_betas = [0.5]
frontier_instances = 10
frontier_betas = [0.5, 2.0]
[family]
outputs = 8
dtype = "float64"
[methods.DPO]
method = "dpo"
[methods.IPO]
method = "ipo"
[methods.KTO]
method = "kto"
"""
SAMPLES = """seed = 1
instances = 3
seeds = 10
numbers = [10, 3000]
[family]
outputs = 5
dtype = "float64"
beta = { kind = "fixed", value = 0.5 }
[methods.DPO]
method = "dpo"
[methods."two halves"]
method = "dpo"
halves = true
"""


def run(script: str, config: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "config.toml"
    path.write_text(config)
    command = [sys.executable, str(ROOT / "experiments" / script), str(path)]
    return subprocess.run(
        [*command, "--out", str(folder / "out")], capture_output=True, text=True, check=False
    )


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "out" / "data" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_method_atlas(tmp_path: Path) -> None:
    done = run("atlas_methods.py", ATLAS, tmp_path)
    assert done.returncode == 0, done.stderr
    table = {(r["method"], r["source"]): r for r in rows(tmp_path, "methods")}
    assert len(table) == 6
    for (method, source), row in table.items():
        assert row["reaches"].lower() == ("true" if method == "DPO" else "false")
        assert int(row["instances"]) == (40 if source == "random" else 138)
        if method == "KTO":
            assert row["not_attained"] == row["instances"]
    each = pq.read_table(tmp_path / "out" / "instances.parquet").to_pydict()
    assert len(each["tv"]) == 3 * (40 + 138)
    assert max(t for t, m in zip(each["tv"], each["method"], strict=True) if m == "DPO") < 1e-9
    frontier = rows(tmp_path, "frontier")
    assert {r["method"] for r in frontier} == {"p*", "best of n", "DPO", "IPO", "KTO"}
    worked = {r["method"]: float(r["tpm_aligned"]) for r in rows(tmp_path, "worked")}
    assert worked["p*"] > 0.5 and worked["DPO"] == pytest.approx(worked["p*"], abs=1e-9)
    for name in ("methods", "methods_tpm", "frontier"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").is_file()
    assert (tmp_path / "out" / "COMPLETE.json").is_file()


def test_finite_samples(tmp_path: Path) -> None:
    done = run("finite_samples.py", SAMPLES, tmp_path)
    assert done.returncode == 0, done.stderr
    table = {(r["method"], int(r["number"])): r for r in rows(tmp_path, "finite_samples")}
    few, many = table["DPO", 10], table["DPO", 3000]
    assert float(few["share_without_optimum"]) > 0.5 > float(many["share_without_optimum"])
    assert float(many["to_optimum_q50"]) < 0.1
    # What never crosses the halves cannot tell how much mass each has.
    halves = table["two halves", 3000]
    assert float(halves["to_limit_q50"]) < 0.5 * float(halves["to_optimum_q50"])


@pytest.mark.parametrize("script", ["atlas_methods.py", "finite_samples.py"])
def test_a_faulty_configuration_is_named(script: str, tmp_path: Path) -> None:
    config = ATLAS if script == "atlas_methods.py" else SAMPLES
    done = run(script, config.replace("seed = 1", "sead = 1"), tmp_path)
    assert done.returncode == 2 and "sead" in done.stderr and "Traceback" not in done.stderr
    done = run(script, config + "surprise = 1\n", tmp_path)
    assert done.returncode == 2 and "surprise" in done.stderr and "Traceback" not in done.stderr
