"""Kill runs, break their files, and see that nothing is lost: python -m tests.faults (5 minutes).

A run of forty shards is done once, undisturbed. Then it is begun again and again and killed, at
random instants and in the middle of commits, resumed until it is complete, and compared byte by
byte.
Other faults follow: files cut short, changed and deleted, two processes in one directory, a full
disk, a clock set back, a directory that cannot be written to.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHARDS = 40
TILE = 8192  # of 32 outputs
SETTINGS = [
    *("--instances", str(SHARDS * TILE - 1000), "--shard", str(TILE)),
    *("--betas", "0.1", "0.5", "1", "2", "--audit", "100", "--confirm", "16", "--atlas", "0"),
    "--no-figures",
]
Done = subprocess.CompletedProcess[str]
PLAIN = "import sys; from jaxsim.cli import main; sys.exit(main(sys.argv[1:]))"
# Kills itself at the n-th call of a function of os: before it, so in the middle of a commit.
SUICIDE = """
import os, signal, sys
from jaxsim.cli import main
left, real = [{count}], os.{function}
def call(*arguments, **keywords):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **keywords)
os.{function} = call
sys.exit(main(sys.argv[1:]))
"""
BACKWARDS = """
import sys, time
from jaxsim.cli import main
start = time.time()
time.time = lambda: start - 1e6
sys.exit(main(sys.argv[1:]))
"""
SMALL_FILES = """
import resource, sys
from jaxsim.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(sys.argv[1:]))
"""


def call(*argv: str | Path, code: str = PLAIN, check: int | None = 0) -> Done:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check is not None and done.returncode != check:
        raise AssertionError(f"{argv}: exit code {done.returncode}, not {check}\n{done.stderr}")
    return done


def contents(run: Path) -> dict[str, bytes]:
    """Return every file of a run but its provenance."""
    files = (path for path in run.rglob("*") if path.is_file())
    named = {path.relative_to(run).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in named.items() if not name.startswith("provenance/")}


def same(run: Path, expected: dict[str, bytes]) -> None:
    """Compare a finished run with the undisturbed one."""
    found = contents(run)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    changed = [name for name in expected if found[name] != expected[name]]
    assert not changed, changed


def finish(run: Path) -> None:
    """Resume a run, or begin it where it did not get so far as to say what it is."""
    if (run / "config.toml").exists():
        call("run", "--resume", run, "--no-figures")
    else:
        call("run", *SETTINGS, "--out", run)


def kill_at_random(run: Path, seconds: float) -> None:
    """Begin or resume a run, and kill it after a while."""
    begun = (run / "config.toml").exists()
    argv = ["run", "--resume", run, "--no-figures"] if begun else ["run", *SETTINGS, "--out", run]
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN, *map(str, argv)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def kills(folder: Path, expected: dict[str, bytes], count: int, usual: float) -> None:
    """Kill runs, each once or twice, and resume them."""
    generator = random.Random(0)
    for number in range(count):
        run = folder / f"killed-{number}"
        if number % 3 == 0:
            function = generator.choice(["replace", "fsync", "chmod"])
            code = SUICIDE.format(count=generator.randint(1, 3 * SHARDS), function=function)
            done = call("run", *SETTINGS, "--out", run, code=code, check=None)
            how = f"at a call of os.{function}: exit code {done.returncode}"
        else:
            seconds = [usual * generator.uniform(0.3, 1) for _ in range(number % 2 + 1)]
            for some in seconds:
                kill_at_random(run, some)
            how = "after " + ", ".join(f"{some:.2f} s" for some in seconds)
        committed = len(list(run.glob("shards/*.json")))
        finish(run)
        same(run, expected)
        print(f"killed {how}; {committed} of {SHARDS} shards committed; resumed: same bytes")


def damage(folder: Path, expected: dict[str, bytes], short: bool) -> None:
    """Break a shard's files in a run that is not complete."""

    def cut(path: Path) -> None:
        path.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes()[:100])

    def flip(path: Path) -> None:
        data = bytearray(path.with_suffix(".npz").read_bytes())
        data[len(data) // 2] ^= 1
        path.with_suffix(".npz").write_bytes(data)

    def delete(path: Path) -> None:
        path.with_suffix(".json").unlink()

    def garble(path: Path) -> None:
        path.with_suffix(".json").write_text("{")

    def swap(path: Path) -> None:
        for end in (".npz", ".json"):
            other = path.with_name("shard-000011").with_suffix(end)
            path.with_suffix(end).write_bytes(other.read_bytes())

    def link(path: Path) -> None:
        data = path.with_suffix(".npz")
        data.rename(folder / f"moved-{data.name}")
        data.symlink_to(folder / f"moved-{data.name}")

    breaks: list[Callable[[Path], None]] = [cut, flip, delete, garble, swap, link]
    for number, how in enumerate(breaks[:1] if short else breaks):
        run = folder / f"damaged-{number}"
        write(run, expected)
        (run / "COMPLETE.json").unlink()
        how(run / "shards" / "shard-000010")
        verified = call("verify", run, "--sample", "0", check=1)
        assert "shard 10: " in verified.stderr, verified.stderr
        assert "39 of 40 shards" in call("status", run).stdout
        merged = call("merge", run, check=2)
        assert "1 of 40 shards are not there yet" in merged.stderr, merged.stderr
        resumed = call("run", "--resume", run, "--no-figures")
        if how is not delete:
            assert "computing it again" in resumed.stderr, resumed.stderr
        same(run, expected)
        print(f"{how.__name__}: found, computed again: same bytes")


def write(run: Path, expected: dict[str, bytes]) -> None:
    """Write a run's files."""
    for name, data in expected.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(data)


def other_faults(folder: Path, expected: dict[str, bytes]) -> None:
    """Two processes, a full disk, a clock set back, no permission."""
    run = folder / "twice"
    first = subprocess.Popen(
        [sys.executable, "-c", PLAIN, "run", *SETTINGS, "--out", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (run / "shards").is_dir():
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    for second in (["run", "--resume", run], ["run", *SETTINGS, "--worker", "1/2", "--out", run]):
        refused = call(*second, check=2)
        assert "another process is at work" in refused.stderr, refused.stderr
    refused = call("run", *SETTINGS, "--out", run, check=2)
    assert "there is an unfinished run in it" in refused.stderr, refused.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    same(run, expected)
    print("two processes in one directory: the second is told so; same bytes")

    largest = max(len(data) for name, data in expected.items() if name.endswith(".npz"))
    for limit in (2000, largest - 1):  # of a file's size: a write fails in its middle
        run = folder / f"full-{limit}"
        full = call("run", *SETTINGS, "--out", run, code=SMALL_FILES.format(limit=limit), check=2)
        assert full.stderr.splitlines()[-1].startswith("jaxsim: "), full.stderr
        assert "File too large; committed shards are kept" in full.stderr, full.stderr
        assert not list(run.rglob(".partial-*")), "a half-written file is left"
        finish(run)
        same(run, expected)
    print("no room in the middle of a write: told in one sentence; same bytes")

    run = folder / "backwards"
    code = SUICIDE.format(count=60, function="replace")
    call("run", *SETTINGS, "--out", run, code=code, check=-signal.SIGKILL)
    call("run", "--resume", run, "--no-figures", code=BACKWARDS)
    same(run, expected)
    seconds = [json.loads(p.read_text()).get("seconds", 0) for p in run.glob("provenance/*")]
    assert min(seconds) >= 0
    print("a clock set back: same bytes")

    if os.getuid():
        run = folder / "closed"
        run.mkdir(mode=0o555)
        refused = call("run", *SETTINGS, "--out", run, check=2)
        assert "ermission denied" in refused.stderr and refused.stderr.count("\n") == 1
        print("a directory without permission: told in one sentence")
    else:
        print("left out: a directory without permission (root may write anywhere)")


def workers(folder: Path, expected: dict[str, bytes], short: bool) -> None:
    """Share a directory among one, two and four workers."""
    for count in (2,) if short else (1, 2, 4):
        run = folder / f"workers-{count}"
        start = [sys.executable, "-c", PLAIN, "run", *SETTINGS, "--out", str(run), "--worker"]
        own = [
            subprocess.Popen([*start, f"{number}/{count}"], stdout=subprocess.DEVNULL)
            for number in range(1, count + 1)
        ]
        assert [process.wait() for process in own] == [0] * count
        call("merge", run, "--no-figures")
        same(run, expected)
        print(f"{count} workers: same bytes")


def main(arguments: list[str] | None = None) -> int:
    """Run all faults, or as many kills of them as asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--short", action="store_true", help="one of each other fault")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="jaxsim-faults-") as name:
        folder = Path(name)
        call("run", *SETTINGS, "--out", folder / "warm")  # compiled programs are kept
        started = time.monotonic()
        call("run", *SETTINGS, "--out", folder / "calm")
        usual = time.monotonic() - started
        expected = contents(folder / "calm")
        assert len([n for n in expected if n.endswith(".npz")]) == SHARDS
        kills(folder, expected, options.kills, usual)
        damage(folder, expected, options.short)
        other_faults(folder, expected)
        workers(folder, expected, options.short)
    return 0


if __name__ == "__main__":
    sys.exit(main())
