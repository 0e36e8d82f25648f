"""One run by two processes that find each other over loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import faults

SETTINGS = [
    *("--instances", "160000", "--shard", "8192", "--betas", "0.1", "1", "--audit", "100"),
    *("--confirm", "8", "--atlas", "0", "--no-figures"),
]


def start(run: Path, coordinator: str, *more: str) -> list[subprocess.Popen[str]]:
    """Start both processes of a run, each in a session of its own."""
    argv = ["run", *SETTINGS, *more, "--out", str(run), "--distributed"]
    argv += ["--coordinator", coordinator, "--processes", "2", "--process"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "jaxsim", *argv, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for process in (0, 1)
    ]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    run, coordinator = tmp_path / "two", f"127.0.0.1:{free_port()}"
    both = start(run, coordinator)
    faults.call("run", *SETTINGS, "--out", tmp_path / "one")
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    faults.same(run, faults.contents(tmp_path / "one"))
    assert f"Written to {run}" in ends[0][0]
    assert f"The shards of process 1 of 2 are in {run}" in ends[1][0]


def test_eight_devices_give_the_bytes_of_one(tmp_path: Path) -> None:
    more = ["--instances", "40000", "--atlas", "64", "--atlas-outputs", "3"]
    for count in (1, 8):
        cpus = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
        argv = ["run", *SETTINGS, *more, "--out", str(tmp_path / str(count))]
        subprocess.run(
            [sys.executable, "-m", "jaxsim", *argv],
            env={**os.environ, **cpus},
            check=True,
            capture_output=True,
        )
    faults.same(tmp_path / "8", faults.contents(tmp_path / "1"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_in_one_sentence(tmp_path: Path, victim: int) -> None:
    run = tmp_path / "run"
    more = ["--instances", "8000000", "--shard", "65536"]
    both = start(run, f"127.0.0.1:{free_port()}", *more)
    while len(list(run.glob("shards/*.json"))) < 4:
        assert both[0].poll() is None and both[1].poll() is None
        time.sleep(0.05)
    os.killpg(both[victim].pid, signal.SIGKILL)
    _, error = both[1 - victim].communicate(timeout=60)
    both[victim].communicate(timeout=10)
    assert both[1 - victim].returncode == 1
    last = error.splitlines()[-1]
    assert last.startswith("jaxsim: a process of this run has ended")
    assert last.endswith(f"committed shards are kept; go on with: jaxsim run --resume {run}")
    status = faults.call("status", run).stdout
    assert "not complete" in status and "damaged" not in status


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "--distributed needs --out or --resume"),
        (
            ["--out", "x", "--coordinator", "nowhere"],
            "coordinator is 'nowhere'; expected HOST:PORT",
        ),
        (
            ["--out", "x", "--coordinator", "h:99999"],
            "coordinator is 'h:99999'; expected HOST:PORT",
        ),
        (["--out", "x", "--coordinator", "h:1"], "process is 0 of 0; expected 0 <= process < proc"),
        (
            ["--out", "x", "--coordinator", "h:1", "--processes", "2", "--process", "2"],
            "process is 2 of 2; expected 0 <= process < processes",
        ),
        (["--out", "x", "--worker", "1/2"], "--distributed needs --out or --resume"),
    ],
)
def test_bad_options_are_told_in_one_sentence(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxsim.cli import main

    assert main(["run", "--distributed", *more]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("jaxsim: ") and shown.err.count("\n") == 1
    assert said in shown.err
