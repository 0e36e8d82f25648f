"""Look after run directories: how far one is, whether it is whole, and what one would cost."""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsim import sources
from jaxsim.engine.stream import Totals, stream
from jaxsim.runs import shards
from jaxsim.runs.config import RunConfig, SolveConfig, load
from jaxsim.runs.directory import RunDirectory

_CALIBRATION = 2.0  # seconds
_ROW = 70  # bytes that an instance takes at one β in Parquet, about
_MOST = 10**8  # shards of a run


def settings(directory: RunDirectory) -> RunConfig:
    """Return the configuration of the run in a directory.

    Raises:
        ValueError: where there is none.
    """
    path = directory.path / "config.toml"
    if not path.is_file():
        raise ValueError(f"{directory.path}: there is no run in it (no config.toml)")
    try:
        config: RunConfig = load(path)
    except ValueError:
        with suppress(ValueError):
            load(path, SolveConfig)
            raise ValueError(
                f"{directory.path}: it holds a comparison of optimisers (jaxsim solve), which is "
                "done as a whole"
            ) from None
        raise
    return config


def plan_of(directory: RunDirectory) -> shards.Plan:
    """Return how the run in a directory is divided, from its manifest.

    Raises:
        ValueError: where there is none.
    """
    stored = directory.read_json("manifest.json")
    if stored is None:
        raise ValueError(f"{directory.path}: there is no run in it (no manifest.json)")
    try:
        part = stored["shards"]
        found = shards.Plan(
            instances=int(part["instances"]),
            rows=int(part["rows"]),
            betas=int(part["betas"]),
            run=str(part["run"]),
        )
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError(f"{directory.path}: manifest.json is damaged") from None
    if not (
        found.rows > 0
        and found.instances > 0
        and 0 < found.betas <= 1 << 20
        and found.count <= _MOST
    ):
        raise ValueError(f"{directory.path}: manifest.json is damaged")
    return found


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        shards, done: how many there are, and are committed.
        instances: in the committed ones.
        damaged: what is wrong with those that are there and do not count.
        complete: whether the run is finished.
    """

    shards: int
    done: int
    instances: int
    total: int
    damaged: list[str]
    complete: bool


def progress(directory: RunDirectory) -> Progress:
    """Tell how far a run is, checking every shard's hash."""
    divided = plan_of(directory)
    states = list(shards.states(directory, divided))
    done = [index for index, wrong in states if not wrong]
    return Progress(
        shards=divided.count,
        done=len(done),
        instances=sum(stop - start for start, stop in map(divided.range, done)),
        total=divided.instances,
        damaged=[wrong for _, wrong in states if wrong not in ("", "missing")],
        complete=directory.is_complete,
    )


def faults(directory: RunDirectory, source: sources.Source, sample: int) -> list[str]:
    """Return what is wrong with a run: hashes, missing shards, shards that come out otherwise.

    Args:
        directory: the run.
        source: its instances.
        sample: how many shards to compute again, evenly chosen.
    """
    config, divided = settings(directory), plan_of(directory)
    found = []
    if directory.is_complete:
        stored = directory.listed()
        actual = directory.hashes()
        found += [f"{name} is missing" for name in sorted(stored.keys() - actual.keys())]
        found += [f"{name} is not of the run" for name in sorted(actual.keys() - stored.keys())]
        common = sorted(stored.keys() & actual.keys())
        found += [f"{n} does not fit its hash" for n in common if stored[n] != actual[n]]
    states = list(shards.states(directory, divided))
    found += [f"shard {i}: {wrong}" for i, wrong in states if wrong]
    good = [index for index, wrong in states if not wrong]
    chosen = np.linspace(0, len(good) - 1, min(sample, len(good)), dtype=int)
    for index in (good[at] for at in chosen.tolist()):
        start, stop = divided.range(index)
        again = stream(source, config.betas, audit=config.audit, start=start, stop=stop)
        there = shards.committed(directory, divided, index)
        if there is None or shards.archive(there) != shards.archive(again):
            found.append(f"shard {index} comes out otherwise when it is computed again")
    return found


def estimate(config: RunConfig, source: sources.Source) -> dict[str, Any]:
    """Return what a run would take, from two seconds of it."""
    divided = shards.plan(config, source)
    once: Totals = stream(source, config.betas, audit=0, stop=min(source.size, source.num))
    done, started = 0, time.monotonic()
    while time.monotonic() - started < _CALIBRATION:
        stream(source, config.betas, audit=0, stop=min(source.size, source.num))
        done += min(source.size, source.num)
    rate = done / (time.monotonic() - started)
    rows = divided.instances * divided.betas
    return {
        "instances": divided.instances,
        "betas": divided.betas,
        "tile": source.size,
        "tiles": -(-divided.instances // source.size),
        "shards": divided.count,
        "instances per shard": divided.rows,
        "bytes in memory, at most": _peak_memory(),
        "bytes of shards on disk": divided.count * (len(shards.archive(once)) + 500),
        "bytes of saved instances": rows * _ROW if config.save == "instances" else 0,
        "instances per second": rate,
        "hours to evaluate": divided.instances / rate / 3600,
    }


def _peak_memory() -> int:
    """Return the largest amount of memory that this process has held, in bytes."""
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def explicit(given: RunConfig, stored: RunConfig, path: Path) -> None:
    """Refuse settings given together with a directory whose run has others.

    Raises:
        ValueError: naming the first.
    """
    default = RunConfig()
    for name in default.__dataclass_fields__:
        here, there = getattr(given, name), getattr(stored, name)
        if here not in (getattr(default, name), there):
            raise ValueError(f"{path}: {name} is {here} here, but the run there has {there}")
