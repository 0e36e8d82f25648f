"""Run directories: shards that are committed, checked, resumed, shared, and refused."""

import io
import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import jaxsim
from jaxsim.engine.stream import Totals, stream
from jaxsim.runs import manage, shards
from jaxsim.runs.config import RunConfig, load
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.job import open_source
from jaxsim.runs.share import Share
from tests import faults
from tests.commandline import call

pytestmark = pytest.mark.usefixtures("host_arrays")

CONFIG = RunConfig(instances=40_000, shard=8192, betas=(0.1, 1.0), audit=100, confirm=8, atlas=0)
SETTINGS = [
    *("run", "--instances", "40000", "--shard", "8192", "--betas", "0.1", "1", "--audit", "100"),
    *("--confirm", "8", "--atlas", "0", "--no-figures"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five shards."""
    out = tmp_path_factory.mktemp("done") / "run"
    assert call(*SETTINGS, "--out", out) == 0
    return out


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """The same run without its end, to be broken."""
    faults.write(tmp_path / "copy", faults.contents(done))
    (tmp_path / "copy" / "COMPLETE.json").unlink()
    return tmp_path / "copy"


def totals(start: int = 0, stop: int | None = None) -> Totals:
    source = open_source(CONFIG)
    return stream(source, CONFIG.betas, audit=CONFIG.audit, start=start, stop=stop)


@pytest.mark.parametrize(("instances", "rows"), [(1, 8), (8, 8), (9, 8), (1000, 64), (7, 1)])
def test_a_plan_covers_every_instance_once(instances: int, rows: int) -> None:
    plan = shards.Plan(instances=instances, rows=rows, betas=1, run="")
    covered = [i for k in range(plan.count) for i in range(*plan.range(k))]
    assert covered == list(range(instances))


def test_a_shard_is_whole_tiles() -> None:
    source = open_source(CONFIG)
    assert source.size == 8192
    for wanted, rows in ((0, 16 * 8192), (1, 8192), (8192, 8192), (20_000, 16_384)):
        config = RunConfig(instances=10**6, shard=wanted)
        assert shards.plan(config, source).rows == rows


def test_totals_come_back_as_they_were(tmp_path: Path) -> None:
    place, plan = RunDirectory(tmp_path), shards.plan(CONFIG, open_source(CONFIG))
    written = totals(8192, 16_384)
    assert shards.committed(place, plan, 1) is None
    shards.commit(place, plan, 1, written)
    back = shards.committed(place, plan, 1)
    assert back is not None and back.claims == written.claims and back.betas == written.betas
    jax.tree.map(np.testing.assert_array_equal, vars(back.sums), vars(written.sums))
    assert shards.archive(back) == shards.archive(written)
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [
        "shard-000001.json",
        "shard-000001.npz",
    ]


def test_shards_add_up_to_the_whole(done: Path) -> None:
    whole = totals()
    added = shards.combined(RunDirectory(done), manage.plan_of(RunDirectory(done)))
    for name, expected in vars(whole.sums).items():
        found = getattr(added.sums, name)
        if np.issubdtype(expected.dtype, np.integer):
            np.testing.assert_array_equal(found, expected, err_msg=name)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=name)
    assert added.claims == whole.claims


def rewritten(run: Path, change: Callable[[dict[str, np.ndarray]], dict[str, Any]]) -> None:
    """Change a shard's arrays, and its hash with them."""
    path = run / "shards" / "shard-000002.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **change(arrays))
    rehashed(path, buffer.getvalue())


def rehashed(path: Path, data: bytes) -> None:
    import hashlib

    path.write_bytes(data)
    side = json.loads(path.with_suffix(".json").read_text())
    side["sha256"] = hashlib.sha256(data).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(side))


def bomb() -> bytes:
    """A small archive whose first array claims to be large, and is."""
    buffer = io.BytesIO()
    names = [f"{name}.npy" for name in shards._expected(2)]
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, bytes(10**7))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: {**x, "more": np.zeros(1)}, "holds other arrays"),
        (lambda x: {k: v for k, v in x.items() if k != "betas"}, "holds other arrays"),
        (lambda x: {**x, "betas": x["betas"][:1]}, "betas has another type or shape"),
        (lambda x: {**x, "betas": x["betas"].astype("f4")}, "betas has another type or shape"),
        (lambda x: {**x, "betas": np.zeros((2, 999))}, "betas is larger than it should be"),
        (lambda x: {**x, "betas": np.array([None, 1])}, "betas has another type or shape"),
    ],
)
def test_a_shard_of_another_form_does_not_count(
    copy: Path, change: Callable[[dict[str, np.ndarray]], dict[str, Any]], said: str
) -> None:
    rewritten(copy, change)
    place = RunDirectory(copy)
    with pytest.raises(shards.Damaged, match=said):
        shards.committed(place, manage.plan_of(place), 2)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "cannot be read"), (b"PK\x03\x04 and so on", "cannot be read"), (bomb(), "is larger")],
)
def test_a_shard_that_is_no_archive_does_not_count(copy: Path, data: bytes, said: str) -> None:
    rehashed(copy / "shards" / "shard-000002.npz", data)
    place = RunDirectory(copy)
    with pytest.raises(shards.Damaged, match=said):
        shards.committed(place, manage.plan_of(place), 2)


def test_status_verify_and_resume(
    copy: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("verify", done) == 0
    assert call("status", done) == 0
    shown = capsys.readouterr().out
    assert "nothing is wrong" in shown
    assert "complete; 5 of 5 shards, 40,000 of 40,000 instances" in shown
    (copy / "shards" / "shard-000003.json").unlink()
    path = copy / "shards" / "shard-000004.npz"
    path.write_bytes(path.read_bytes()[:-7])
    assert call("status", copy) == 0
    shown = capsys.readouterr().out
    assert "not complete; 3 of 5 shards, 24,576 of 40,000 instances" in shown
    assert "shard-000004.npz does not fit its hash" in shown
    assert call("verify", copy, "--sample", "0") == 1
    assert "shard 3: missing" in capsys.readouterr().err
    assert call("merge", copy) == 2
    assert "2 of 5 shards are not there yet" in capsys.readouterr().err
    assert call("run", "--resume", copy, "--no-figures") == 0
    assert "shard-000004.npz does not fit its hash: computing it again" in capsys.readouterr().err
    faults.same(copy, faults.contents(done))
    assert call("run", "--resume", copy) == 0
    assert "there is nothing left to do" in capsys.readouterr().out


def test_verify_computes_shards_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def more(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        return {**arrays, "sums_violations": arrays["sums_violations"] + 1}

    rewritten(copy, more)  # and its hash: only computing it again tells
    assert call("verify", copy, "--sample", "5") == 1
    assert "shard 2 comes out otherwise when it is computed again" in capsys.readouterr().err


def test_verify_tells_what_a_finished_run_lacks(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    faults.write(run, faults.contents(done))
    (run / "claims.md").write_text("all is well")
    (run / "summary.parquet").unlink()
    (run / "extra.csv").write_text("1")
    assert call("verify", run, "--sample", "0") == 1
    said = capsys.readouterr().err
    assert "claims.md does not fit its hash" in said
    assert "summary.parquet is missing" in said and "extra.csv is not of the run" in said


def test_workers_share_a_run(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "shared"
    assert call(*SETTINGS, "--out", run, "--worker", "2/3") == 0
    assert sorted(p.name for p in run.glob("shards/*.npz")) == [
        "shard-000001.npz",
        "shard-000004.npz",
    ]
    assert call("merge", run) == 2
    for worker in ("1/3", "3/3"):
        assert call(*SETTINGS, "--out", run, "--worker", worker) == 0
    assert call("merge", run, "--no-figures") == 0
    faults.same(run, faults.contents(done))
    assert len(list(run.glob("provenance/attempt-*.json"))) == 4
    assert "shards are not there yet" in capsys.readouterr().err


def test_shares_divide_the_shards() -> None:
    for of in (1, 2, 7):
        owners = [[k for k in range(1, of + 1) if i in Share(number=k, of=of)] for i in range(30)]
        assert all(len(owner) == 1 for owner in owners)


def test_a_shard_of_another_run_does_not_count(
    copy: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert call(*SETTINGS, "--seed", "7", "--worker", "2/5", "--out", other) == 0
    for end in (".npz", ".json"):
        name = f"shards/shard-000001{end}"
        (copy / name).write_bytes((other / name).read_bytes())
    assert call("status", copy) == 0
    assert "shard-000001.json is of another run" in capsys.readouterr().out
    assert call("merge", copy) == 2
    assert call("run", "--resume", copy, "--no-figures") == 0
    faults.same(copy, faults.contents(done))
    (copy / "manifest.json").unlink()  # as if it were begun anew with another seed
    (copy / "COMPLETE.json").unlink()
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("seed = 0", "seed = 7"))
    capsys.readouterr()
    assert call("run", "--resume", copy, "--no-figures") == 0
    assert capsys.readouterr().err.count("is of another run: computing it again") == 5


def test_a_finished_run_that_was_damaged_is_written_again(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    faults.write(run, faults.contents(done))
    assert call("merge", run) == 0
    assert "there is nothing left to do" in capsys.readouterr().out
    path = run / "shards" / "shard-000002.npz"
    path.write_bytes(path.read_bytes() + b"x")
    (run / "claims.md").write_text("all is well")
    assert call("figures", run) == 0  # which has no say over what it did not write
    assert call("verify", run, "--sample", "0") == 1
    said = capsys.readouterr().err
    assert "claims.md does not fit its hash" in said and "shard 2" in said
    assert call("run", "--resume", run, "--no-figures") == 0
    assert "files do not fit COMPLETE.json: writing them again" in capsys.readouterr().err
    for path in sorted((run / "figures").iterdir()):
        path.unlink()
    (run / "figures").rmdir()
    RunDirectory(run).complete()
    faults.same(run, faults.contents(done))


@pytest.mark.parametrize(
    "text", ["[]", '{"sha256": []}', "{", "[" * 100_000], ids=["list", "no table", "cut", "deep"]
)
def test_a_damaged_list_of_files(
    done: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    faults.write(run, faults.contents(done))
    (run / "COMPLETE.json").write_text(text)
    assert call("verify", run, "--sample", "0") == 2
    said = capsys.readouterr().err
    assert "COMPLETE.json is" in said and said.count("\n") == 1


def test_another_version_is_refused_unless_asked_for(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(stored | {"jax": "0.1.2"}))
    assert call("run", "--resume", copy, "--no-figures") == 2
    said = capsys.readouterr().err
    assert "begun with other jax ('0.1.2' there" in said and "--allow-mixed" in said
    assert said.count("\n") == 1
    assert call("run", "--resume", copy, "--no-figures", "--allow-mixed") == 0
    attempts = [json.loads(p.read_text()) for p in copy.glob("provenance/*.json")]
    assert any("0.1.2" in str(attempt["mixed"]) for attempt in attempts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tile": 4096}, "tile (4096 there"),
        ({"dtype": "float64"}, "dtype ('float64' there"),
        ({"seed": 5}, "seed (5 there"),
        ({"input_sha256": "x"}, "input_sha256 ('x' there"),
        ({"config_sha256": "0"}, "config_sha256 ('0' there"),
        ({"schema": 0}, "schema (0 there"),
        ({"prng": "other"}, "prng ('other' there"),
    ],
)
def test_another_manifest_is_refused(
    copy: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(stored | change))
    before = faults.contents(copy)
    assert call("run", "--resume", copy) == 2
    assert said in capsys.readouterr().err
    assert faults.contents(copy) == before


@pytest.mark.parametrize("more", [[], ["--allow-mixed"]])
def test_a_changed_configuration_is_refused(
    copy: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("seed = 0", "seed = 1"))
    assert call("run", "--resume", copy, *more) == 2
    assert "begun with other config_sha256" in capsys.readouterr().err


MALFORMED = [
    (["run", "--resume", "none"], "none: there is no run in it (no config.toml)"),
    (["run", "--resume", "file"], "file: there is no run in it (no config.toml)"),
    (["run", "--resume", "empty"], "empty: there is no run in it (no config.toml)"),
    (["run", "--resume", "run", "--out", "x"], "--resume and --out both name a directory"),
    (["run", "--resume", "run", "--seed", "9"], "seed is 9 here, but the run there has 0"),
    (["run", "--resume", "run", "--betas", "3"], "betas is (3.0,) here, but the run there has"),
    (["run", "--resume", "run", "--family.outputs", "8"], "family is "),
    (["run", "--resume", "run", "--instances", "5"], "instances is 5 here, but the run there has"),
    (["run", "--out", "run"], "there is an unfinished run in it; go on with: jaxsim run --resume"),
    (["run", "--out", "full"], "full: the output directory is not empty"),
    (["run", "--out", "file"], "file: expected a directory, found a file"),
    (["run", "--worker", "1/2"], "--worker needs --out"),
    (["run", "--worker", "0/2", "--out", "x"], "worker is 0/2; expected i/n with 1 <= i <= n"),
    (["run", "--worker", "3/2", "--out", "x"], "worker is 3/2; expected i/n with 1 <= i <= n"),
    (["run", "--worker", "2", "--out", "x"], "worker is '2'; expected i/n, such as 2/8"),
    (["run", "--worker", "a/b", "--out", "x"], "worker is 'a/b'; expected i/n, such as 2/8"),
    (["run", "--worker", "1/2", "--out", "file"], "file: expected a directory, found a file"),
    (["run", "--worker", "1/2", "--out", "run"], "run: begun with other"),
    (["run", "--shard", "-1"], "shard is -1; expected 0 to"),
    (["merge", "none"], "none: there is no run in it (no config.toml)"),
    (["merge", "empty"], "empty: there is no run in it (no config.toml)"),
    (["status", "none"], "none: there is no run in it (no manifest.json)"),
    (["status", "empty"], "empty: there is no run in it (no manifest.json)"),
    (["status", "list"], "list: manifest.json is damaged"),
    (["status", "zero"], "zero: manifest.json is damaged"),
    (["status", "garbled"], "garbled: manifest.json is not JSON"),
    (["verify", "none"], "none: there is no run in it (no config.toml)"),
    (["verify", "run", "--sample", "-1"], "sample is -1; expected 0 or more"),
    (["verify", "typo"], "unknown key instnces"),
    (["plan", "none.toml"], "none.toml: there is no such configuration file"),
    (["plan", "--input", "x.npz"], "x.npz: there is no such file"),
    (["plan", "--instances", "0"], "instances is 0; expected 1 to"),
    (["figures", "run"], "run: not a finished run"),
]


@pytest.mark.parametrize(("argv", "said"), MALFORMED, ids=[" ".join(c[0]) for c in MALFORMED])
def test_malformed_input_is_told_in_one_sentence(
    argv: list[str],
    said: str,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy.rename(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, text in (("list", "[]"), ("garbled", "{"), ("zero", '{"shards": {"instances": 0}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    zero = {"shards": {"instances": 0, "rows": 0, "betas": 0}}
    (tmp_path / "zero" / "manifest.json").write_text(json.dumps(zero))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "typo").mkdir()
    (tmp_path / "typo" / "config.toml").write_text("instnces = 3")
    monkeypatch.chdir(tmp_path)
    before = faults.contents(tmp_path)
    assert call(*argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("jaxsim: ") and shown.err.count("\n") == 1
    assert said in shown.err
    assert faults.contents(tmp_path) == before


def test_two_processes_do_not_work_in_one_directory(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = RunDirectory(copy)
    with place.locked("worker-1-of-2"):
        assert call("run", "--resume", copy) == 2
        assert "another process is at work" in capsys.readouterr().err
        with place.locked("worker-2-of-2"), pytest.raises(ValueError, match="another process"):
            place.locked("worker-2-of-2").__enter__()
    with place.locked(), pytest.raises(ValueError, match="another process"):
        place.locked("worker-1-of-2").__enter__()
    assert not list(copy.glob(".lock-*"))


def test_an_interrupt_finishes_the_shard_in_hand(tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ["run", "--instances", "4000000", "--shard", "8192", "--betas", "0.1", "1"]
    argv += ["--confirm", "0", "--atlas", "0", "--audit", "0", "--no-figures", "--out", str(out)]
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = subprocess.Popen(
        [sys.executable, "-c", code + faults.PLAIN, *argv], stderr=subprocess.PIPE, text=True
    )
    while not list(out.glob("shards/*.json")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "finishing the shard in hand" in error
    last = error.splitlines()[-1]
    assert last.startswith("jaxsim: stopped with ")
    assert last.endswith(f" of 489 shards done; go on with: jaxsim run --resume {out}")
    assert "Traceback" not in error and not (out / "COMPLETE.json").exists()
    committed = manage.progress(RunDirectory(out))
    assert committed.done == int(last.split()[3]) and not committed.damaged
    attempts = [json.loads(p.read_text()) for p in out.glob("provenance/*.json")]
    assert [attempt["ended"] for attempt in attempts] == ["interrupted"]


def test_saved_instances_are_what_evaluate_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    saving = [*SETTINGS, "--instances", "10000", "--save", "instances", "--out", run]
    assert call(*saving) == 0
    files = sorted(run.glob("instances/*.parquet"))
    assert [path.name for path in files] == [f"instances-00000{i}.parquet" for i in range(2)]
    opened = [pq.ParquetFile(path) for path in files]
    assert [file.num_row_groups for file in opened] == [2, 2]  # one per tile and β
    table = {k: np.concatenate([f.read()[k].to_numpy() for f in opened]) for k in COLUMNS}
    batch = jax.device_get(jaxsim.sample_instances(jax.random.key(0), CONFIG.family, 10_000))
    for beta in CONFIG.betas:
        mine = table["beta"] == beta
        np.testing.assert_array_equal(np.sort(table["instance"][mine]), np.arange(10_000))
        order = np.argsort(table["instance"][mine])
        expected = jaxsim.evaluate(replace(batch, beta=np.full_like(batch.beta, beta)))
        for name in ("log_odds_shift", "kl"):
            np.testing.assert_allclose(
                table[name][mine][order], getattr(expected, name), rtol=1e-4, atol=1e-5
            )
    summary = pq.read_table(run / "summary.parquet").to_pydict()
    for at, beta in enumerate(CONFIG.betas):
        hold = (table["beta"] == beta) & (table["hypotheses_hold"] == 1)
        assert hold.sum() == summary["hypotheses_hold"][at]
        assert (hold & (table["conclusion"] == -1)).sum() == summary["violations"][at]
    (run / "COMPLETE.json").unlink()
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].unlink()
    assert call("status", run) == 0
    shown = capsys.readouterr().out
    assert "instances-000000.parquet does not fit its hash" in shown
    assert "instances-000001.parquet is missing" in shown


COLUMNS = ("instance", "beta", "log_odds_shift", "kl", "hypotheses_hold", "conclusion")


def test_a_summary_as_xarray(done: Path, tmp_path: Path) -> None:
    found = jaxsim.to_xarray(done)
    table = pq.read_table(done / "summary.parquet").to_pydict()
    for name, expected in table.items():
        np.testing.assert_array_equal(found[name], expected)
    assert found.share_by_outputs.sel(outputs=32, beta=0.1) == pytest.approx(
        table["violations"][0] / table["hypotheses_hold"][0]
    )
    assert "seed = 0" in found.attrs["config"]
    with pytest.raises(ValueError, match="not a finished run"):
        jaxsim.to_xarray(tmp_path)


def test_a_link_out_of_the_directory_is_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for path in sorted((copy / "data").iterdir()):
        path.unlink()
    (copy / "data").rmdir()
    (copy / "data").symlink_to(tmp_path / "elsewhere")
    assert call("run", "--resume", copy, "--no-figures") == 2
    assert "a link leads out of the run directory" in capsys.readouterr().err
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_plan_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--instances", "1000000000", "--betas", "1") == 0
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["instances"] == "1,000,000,000" and shown["shards"] == "7,630"
    assert float(shown["hours to evaluate"].replace(",", "")) > 0.02


def test_config_reads_back_with_its_shards(done: Path) -> None:
    assert load(done / "config.toml") == CONFIG
