"""`jaxsim solve`: what the comparison of optimisers leaves behind, and what it says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxsim.runs.config import OPTIMIZERS, SolveConfig, load, to_toml
from jaxsim.runs.directory import RunDirectory
from tests.commandline import call

pytestmark = pytest.mark.usefixtures("host_arrays")

FEW = ["--optimizers", "default", "sgd", "natural_half", "natural"]
SMALL = ["solve", *FEW, "--instances", "300", "--max-steps", "100", "--trace-steps", "30"]


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("solved") / "run"
    assert call(*SMALL, "--out", out) == 0
    return out


def rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def test_a_row_per_optimizer_and_tenth(solved: Path) -> None:
    table = rows(solved / "solve.parquet")
    assert len(table) == 4 * 10
    for name in ("default", "natural_half", "natural"):
        own = [row for row in table if row["optimizer"] == name]
        assert sum(row["instances"] for row in own) == 300
        assert all(row["certified"] == row["instances"] == 30 for row in own)
        assert all(0 < row["kl_worst"] <= 1e-6 and row["seconds"] > 0 for row in own)
        lows, highs = ([row[k] for row in own] for k in ("beta_low", "beta_high"))
        assert lows == sorted(lows) and all(a <= b for a, b in zip(highs, lows[1:], strict=False))
    assert all(row["steps_most"] == 1 for row in table if row["optimizer"] == "natural")
    assert all(row["steps_median"] > 5 for row in table if row["optimizer"] == "default")


def test_misses_are_listed_with_their_seeds(solved: Path) -> None:
    table, missed = rows(solved / "solve.parquet"), rows(solved / "missed.parquet")
    assert {row["optimizer"] for row in missed} == {"sgd"}
    expected = sum(row["instances"] - row["certified"] for row in table)
    assert len(missed) == expected > 100
    assert {row["status"] for row in missed} == {"OUT_OF_STEPS"}
    assert all(row["kl"] > 1e-6 and row["steps"] == 100 and row["seed"] == 0 for row in missed)
    worst = max(missed, key=lambda row: row["kl"])
    again = solve_again(worst["seed"], worst["index"])
    assert float(again.beta) == worst["beta"]


def solve_again(seed: int, index: int) -> Any:
    import jax

    import jaxsim

    drawn = jaxsim.sample_instances(jax.random.key(seed), SolveConfig().family, 1, start=index)
    return jax.tree.map(lambda x: x[0], drawn)


def test_courses_and_facts(solved: Path) -> None:
    facts = json.loads((solved / "solve.json").read_text())
    assert facts["tolerance"] == 1e-6 and facts["traced"] == 256
    assert all(0 < size <= facts["identity_allowed"] for size in facts["identity"].values())
    assert facts["not_monotone"]["natural"] == 0 < facts["not_monotone"]["default"]
    run = RunDirectory(solved)
    courses = run.read_csv("descent_tpm")
    assert courses is not None and len(courses["step"]) == 4 * 31
    convergence = run.read_csv("convergence")
    assert convergence is not None
    last = [q for s, q in zip(convergence["step"], convergence["q50"], strict=True) if s == 30]
    assert len(last) == 4 and last[2] < 1e-6  # ½/β
    steps = run.read_csv("steps_by_beta")
    assert steps is not None and len(steps["beta"]) == 4 * 20
    listed = json.loads((solved / "COMPLETE.json").read_text())["sha256"]
    for name in ("convergence", "steps_by_beta", "descent_tpm"):
        assert f"figures/{name}.png" in listed
    text = (solved / "solve.md").read_text()
    assert "| Rprop (default) |" in text and "By β:" in text


def test_a_configuration_file_and_the_built_in_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "c.toml", tmp_path / "out"
    path.write_text(
        'input = "ngram"\nbetas = [0.5, 2.0]\noptimizers = ["default"]\ntrace_steps = 5'
    )
    assert call("solve", path, "--no-figures", "--out", out) == 0
    assert "| Rprop (default) | 0.5 to 2 | 138 | 100.0% |" in capsys.readouterr().out
    assert load(out / "config.toml", SolveConfig) == load(path, SolveConfig)
    assert [row["beta_low"] for row in rows(out / "solve.parquet")] == [0.5, 2.0]
    assert not (out / "figures").exists()


def test_float64(tmp_path: Path) -> None:
    import jax

    try:
        argv = ["--optimizers", "default", "--instances", "64", "--family.dtype", "float64"]
        assert (
            call("solve", *argv, "--trace-steps", "3", "--no-figures", "--out", tmp_path / "x") == 0
        )
    finally:
        jax.config.update("jax_enable_x64", False)
    assert all(0 < row["kl_worst"] <= 1e-12 for row in rows(tmp_path / "x" / "solve.parquet"))


def test_the_configuration_reads_back(tmp_path: Path) -> None:
    config = SolveConfig(betas=(1.0,), start="worst", optimizers=("adam",), tolerance=1e-3)
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load(tmp_path / "c.toml", SolveConfig) == config
    from jaxsim.descent import optimizers
    from jaxsim.runs.solving import LABELS

    assert set(OPTIMIZERS) == set(optimizers(10)) == set(LABELS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["none.toml"], "none.toml: there is no such configuration file"),
        (["--instances", "0"], "instances is 0; expected 1 to"),
        (["--max-steps", "0"], "max_steps is 0; expected 1 to"),
        (["--tolerance", "-1"], "tolerance is -1.0; expected 0 to 1"),
        (["--traced", "5000"], "traced is 5000; expected 1 to 4096"),
        (["--betas", "0"], "betas[0] is 0.0; expected a finite number > 0"),
        (["--input", "ngram"], "ngram: there is no beta in it; give --betas"),
        (["--input", "ngram", "--family.outputs", "3"], "family is set, but the input"),
        (["--input", "x.csv"], "x.csv: expected a file that ends in .npz or .parquet"),
    ],
)
def test_bad_values_are_told_in_one_sentence(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("solve", *argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("jaxsim: ") and shown.err.count("\n") == 1
    assert said in shown.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--optimizers", "adm"], "natural_half"),
        (["--start", "best"], "worst"),
        (["--instnces", "3"], "--instances"),
    ],
)
def test_bad_options_are_told_with_a_hint(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("solve", *argv) == 2
    assert said in capsys.readouterr().err


def test_a_misspelt_key_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text('optimizers = ["adm"]')
    assert call("solve", path) == 2
    assert "optimizers[0] is 'adm'; expected one of default, sgd" in capsys.readouterr().err
    np.testing.assert_equal(list(tmp_path.iterdir()), [path])
