"""The command line: what a run leaves behind, and what a clumsy user is told."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxsim import evaluate
from jaxsim.runs.config import DEFAULT_BETAS, load
from jaxsim.sources import read
from tests.commandline import call
from tests.faults import contents

pytestmark = pytest.mark.usefixtures("host_arrays")

BETAS = (0.05, 0.5)
SMALL = [
    *("run", "--instances", "4000", "--confirm", "16", "--audit", "16"),
    *("--betas", *map(str, BETAS), "--atlas", "64", "--atlas-outputs", "2", "32"),
]
ALWAYS = {
    "config.toml",
    "manifest.json",
    "shards/shard-000000.json",
    "shards/shard-000000.npz",
    "summary.parquet",
    "claims.json",
    "claims.md",
    "solve.json",
    "counterexample.json",
    *(
        f"data/{name}.csv"
        for name in ("tpm_by_beta", "alpha_to_tpm", "violations", "convergence", "counterexample")
    ),
}


def claims(run: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((run / "claims.json").read_text())}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with its figures."""
    out = tmp_path_factory.mktemp("full") / "run"
    assert call(*SMALL, "--out", out) == 0
    return out


def test_complete_lists_every_file_with_its_hash(full: Path) -> None:
    files = contents(full)
    listed = json.loads(files.pop("COMPLETE.json"))["sha256"]
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    figures = {name for name in files if name.startswith("figures/")}
    assert set(files) - figures == ALWAYS
    drawn = {Path(name).stem for name in ALWAYS if name.startswith("data/")}
    assert figures == {f"figures/{d}.{e}" for d in drawn for e in ("pdf", "svg", "png")}


def test_configuration_reads_back(full: Path) -> None:
    config = load(full / "config.toml")
    assert (config.instances, config.betas, config.seed) == (4000, BETAS, 0)
    assert (config.atlas, config.atlas_outputs, config.family.outputs) == (64, (2, 32), 32)


def test_summary_has_a_row_per_beta(full: Path) -> None:
    table = pq.read_table(full / "summary.parquet").to_pydict()
    assert table["beta"] == list(BETAS)
    assert table["instances"] == [4000, 4000]
    assert table["invalid"] == [0, 0]
    quantiles = np.array([table[f"tpm_aligned_q{q}"] for q in ("05", "25", "50", "75", "95")])
    assert (np.diff(quantiles, axis=0) > 0).all()
    assert (np.array(table["violations"]) > 0).all()
    assert np.less_equal(table["violations"], table["hypotheses_hold"]).all()
    for name in ("alpha_mean", "tpm_aligned_mean", "kl_mean", "reward_gain_mean"):
        assert (np.array(table[name]) > 0).all()


def test_verdicts_on_the_claims(full: Path) -> None:
    rows = claims(full)
    failing = {name for name, row in rows.items() if row["verdict"] == "FAILS"}
    assert failing == {"theorem_2", "correlation_kept", "shrunk_by_exp_reward"}
    assert {r["verdict"] for n, r in rows.items() if n not in failing} == {"HOLDS"}
    theorem = rows["theorem_2"]
    table = pq.read_table(full / "summary.parquet").to_pydict()
    assert theorem["tried"] == sum(table["hypotheses_hold"])
    assert theorem["failed"] == sum(table["violations"])
    assert rows["lemma_1"]["tried"] == 16 * len(BETAS)
    assert rows["descent_reaches_optimum"]["tried"] == 16
    example = json.loads((full / "counterexample.json").read_text())
    assert example["covariance_aligned"] > 0 > example["covariance_unaligned"]
    assert example["tpm_aligned"] < example["alpha"]
    assert len(example["names"]) < example["found"]["outputs"] == 32


def test_same_seed_gives_the_same_bytes(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    assert call(*SMALL, "--no-figures", "--out", out) == 0
    shown = capsys.readouterr()
    mine, theirs = contents(out), contents(full)
    assert set(mine) == ALWAYS | {"COMPLETE.json"}
    for name in ALWAYS:
        assert mine[name] == theirs[name], name
    # The claims table goes to standard output, and progress in plain lines to standard error.
    assert mine["claims.md"].decode() in shown.out
    assert shown.out.endswith(f"Written to {out}\n")
    lines = shown.err.splitlines()
    assert lines[0] == "evaluating 4,000 instances …"
    assert "confirming by descent …" in lines
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_binary_rewards_never_violate_theorem_2(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--no-figures", "--confirm", "0", "--audit", "0", "--atlas", "0"]
    binary = ["--family.reward.kind", "binary", "--seed", "3"]
    assert call(*SMALL, *options, *binary, "--out", out) == 0
    rows = claims(out)
    assert rows["theorem_2"]["verdict"] == "HOLDS"
    assert rows["theorem_2"]["tried"] > 1000
    assert rows["lemma_1"]["verdict"] == rows["descent_reaches_optimum"]["verdict"] == "NOT TRIED"
    assert not (out / "solve.json").exists()
    assert not (out / "counterexample.json").exists()


def test_configuration_file_gives_way_to_options(tmp_path: Path) -> None:
    path, out = tmp_path / "c.toml", tmp_path / "run"
    path.write_text(
        "seed = 5\ninstances = 100\nbetas = [0.05, 0.5]\nconfirm = 0\naudit = 0\natlas = 0\n"
        '[family.reward]\nkind = "binary"\n'
    )
    assert call("run", path, "--instances", "64", "--no-figures", "--out", out) == 0
    config = load(out / "config.toml")
    assert (config.seed, config.instances, config.family.reward.kind) == (5, 64, "binary")
    assert pq.read_table(out / "summary.parquet")["instances"].to_pylist() == [64, 64]


def test_configuration_after_an_option_is_not_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "c.toml", tmp_path / "run"
    path.write_text("seed = 5\n")
    assert call("run", "--no-figures", path, "--out", out) == 2
    assert "the configuration file comes right after 'run'" in capsys.readouterr().err
    assert not out.exists()


def test_evaluate_ngram_writes_what_evaluate_says(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("evaluate", "ngram", "--beta", "0.5", "--no-figures", "--out", out) == 0
    table = pq.read_table(out / "instances.parquet").to_pydict()
    source = read("ngram")
    instance = source.instance
    assert table["name"] == source.prompts
    assert set(table["beta"]) == {0.5}
    assert load(out / "config.toml").betas == (0.5,)
    halved = replace(instance, beta=0.5 * instance.beta)
    for name, expected in vars(evaluate(halved)).items():
        np.testing.assert_allclose(table[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(table["alpha"], instance.alpha, rtol=1e-6)
    assert {"hypotheses_hold", "conclusion", "tpm_aligned"} <= set(table)


def test_figures_are_redrawn_in_the_same_bytes(
    full: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(full)
    assert call("figures", full) == 0
    assert capsys.readouterr().out == f"5 figures in {full / 'figures'}\n"
    assert contents(full) == before


def test_float64_runs_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--confirm", "0", "--audit", "0", "--atlas", "0", "--no-figures"]
    argv = [*SMALL, *options, "--family.dtype", "float64", "--betas", "0.5", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "jaxsim", *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert load(out / "config.toml").family.dtype == "float64"
    assert pq.read_table(out / "summary.parquet")["invalid"].to_pylist() == [0]


@pytest.mark.parametrize("code", ["import jaxsim", "from jaxsim.cli import main; main(['--help'])"])
def test_import_and_help_load_no_jax(code: str) -> None:
    check = (
        "import sys, atexit; "
        "atexit.register(lambda: print('LOADED', sorted({'jax', 'matplotlib', 'pyarrow'} "
        "& set(sys.modules)))); "
    )
    done = subprocess.run(
        [sys.executable, "-c", check + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("argv", [["--help"], [], ["run", "--help"], ["evaluate", "-h"]])
def test_help_exits_zero(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: jaxsim")
    assert "None" not in shown.out
    assert shown.err == ""


def test_doctor_reports_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor") == 0
    shown = capsys.readouterr().out
    assert "jaxlib" in shown and "64-bit mode" in shown and "name clash   none" in shown


CONFIGURATIONS = [
    ("typo", "instnces = 3", "unknown key instnces; did you mean instances?"),
    ("nested typo", "[family.reward]\nkynd = 'binary'", "unknown key family.reward.kynd; did you"),
    ("unknown", "zzzzzz = 1", "unknown key zzzzzz; known: seed, instances, betas"),
    ("text for a number", "instances = 'many'", "instances is 'many'; expected a whole number"),
    ("fraction", "instances = 1.5", "instances is 1.5; expected a whole number"),
    ("truth", "seed = true", "seed is True; expected a whole number"),
    ("number for a list", "betas = 1.0", "betas is 1.0; expected a list"),
    ("text in a list", "betas = [1.0, 'x']", "betas[1] is 'x'; expected a number"),
    ("number for a table", "family = 3", "family is 3; expected a table"),
    ("choice", "[family]\ndtype = 'float16'", "family.dtype is 'float16'; expected one of float32"),
    ("range", "instances = 0", "instances is 0; expected 1 to"),
    ("beta", "betas = [1.0, 0.0]", "betas[1] is 0.0; expected a finite number > 0"),
    ("nan", "betas = [nan]", "betas[0] is nan; expected a finite number > 0"),
    ("syntax", "instances = ", "not a TOML file: "),
    (
        "unused",
        "[family.components]\nkind = 'zipf'\nsupport = 0.25",
        "components.support is 0.25, but components.kind = 'zipf' does not use it",
    ),
]


def assert_one_sentence(shown: Any) -> str:
    assert shown.out == ""
    assert shown.err.startswith("jaxsim: ")
    assert shown.err.count("\n") == 1
    return str(shown.err)


@pytest.mark.parametrize(
    ("text", "said"), [c[1:] for c in CONFIGURATIONS], ids=[c[0] for c in CONFIGURATIONS]
)
def test_bad_configuration_is_told_in_one_sentence(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "c.toml", tmp_path / "out"
    path.write_text(text)
    assert call("run", path, "--out", out) == 2
    error = assert_one_sentence(capsys.readouterr())
    assert str(path) in error and said in error
    assert not out.exists()


def test_binary_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe\x00")
    assert call("run", tmp_path / "c.toml") == 2
    assert "not a TOML file" in assert_one_sentence(capsys.readouterr())


COMMANDS = [
    ("no configuration", ["run", "none.toml"], "none.toml: there is no such configuration file"),
    ("no input", ["run", "--input", "none.npz"], "none.npz: there is no such file"),
    ("no file", ["evaluate", "none.parquet"], "none.parquet: there is no such file"),
    ("suffix", ["evaluate", "x.csv"], "x.csv: expected a file that ends in .npz or .parquet"),
    (
        "reward",
        ["evaluate", "ngram", "--reward", "x"],
        "there is no array 'x' to take as the rewar",
    ),
    ("beta 0", ["run", "--betas", "1", "0"], "betas[1] is 0.0; expected a finite number > 0"),
    ("beta inf", ["evaluate", "ngram", "--beta", "inf"], "betas[0] is inf; expected a finite numb"),
    ("seed", ["run", "--seed", "-1"], "seed is -1; expected 0 to 4294967295"),
    (
        "unused",
        ["run", "--family.components.support", "0.25"],
        "components.support is 0.25, but components.kind = 'dirichlet' does not use it",
    ),
    ("outputs", ["run", "--family.outputs", "0"], "family.outputs is 0; expected 1 to 1048576"),
]


@pytest.mark.parametrize(("argv", "said"), [c[1:] for c in COMMANDS], ids=[c[0] for c in COMMANDS])
def test_bad_values_are_told_in_one_sentence(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    assert said in assert_one_sentence(capsys.readouterr())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run", "--instnces", "3"], "--instances"),
        (["runn"], "run, solve, plan, merge, status"),
        (["run", "--betas", "x"], "--betas"),
        (["run", "--instances", "many"], "'many'"),
        (["run", "--family.dtype", "float16"], "'float32', 'float64'"),
        (["evaluate"], "FILE"),
        (["figures"], "RUN"),
    ],
)
def test_bad_options_are_told_with_a_hint(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert "__tyro" not in shown.err and "Traceback" not in shown.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["run"], ["evaluate", "ngram"]])
def test_output_is_never_overwritten(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert call(*command, "--out", tmp_path) == 2
    assert "the output directory is not empty" in assert_one_sentence(capsys.readouterr())
    assert call(*command, "--out", tmp_path / "file") == 2
    assert "expected a directory, found a file" in assert_one_sentence(capsys.readouterr())
    assert contents(tmp_path) == {"file": b"mine"}


def test_figures_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert call("figures", path) == 2
        assert "not a finished run" in assert_one_sentence(capsys.readouterr())
    assert os.listdir(tmp_path) == []


def test_default_betas_and_texts_survive_the_configuration_file(tmp_path: Path) -> None:
    from jaxsim.runs.config import RunConfig, to_toml

    config = RunConfig(input='odd "name"\n\\ é.npz')
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(tmp_path / "c.toml") == config
    assert config.betas == DEFAULT_BETAS
