"""One run on several processes that know of each other, by `jax.distributed`.

Shards are dealt out in rounds, one to each process. After a round the processes tell each other
whether to go on, by an all-gather over one mesh of all devices, so that all stop together and none
goes on for long without a peer that died. They share the run's directory, and what is in it does
not depend on their number.
"""

import ipaddress
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsim import sources
from jaxsim.runs import job, shards
from jaxsim.runs.config import RunConfig
from jaxsim.runs.directory import RunDirectory
from jaxsim.runs.share import Share

_AXIS = "processes"
_GOES_ON, _STOPS, _FAILED = range(3)


class PeerLost(Exception):
    """Another process of the run has ended, or cannot be reached."""


_SUPERVISED = "JAXSIM_SUPERVISED"


def supervise(argv: list[str], end: str) -> int | None:
    """Run the command line again in a process below this one; None where this is that process.

    JAX aborts a process whose coordinator is gone, from a thread of its own, before anything can be
    said. Somebody has to be left to say it.

    Args:
        argv: the command line.
        end: the sentence for that case.

    Returns:
        The exit code.
    """
    if os.environ.get(_SUPERVISED):
        return None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells the other one too

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = [sys.executable, "-m", "jaxsim", *argv]
    below = subprocess.Popen(command, env={**os.environ, _SUPERVISED: "1"}, preexec_fn=listen)
    signal.signal(signal.SIGTERM, lambda *_: below.terminate())
    code = below.wait()
    if code < 0:
        print(f"jaxsim: {end}", file=sys.stderr)
        return 1
    return code


def leave(code: int) -> NoReturn:
    """End the process at once: a farewell to peers that are gone would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def join(coordinator: str, processes: int, process: int) -> None:
    """Join the processes of a run; must come before anything else is asked of JAX.

    Args:
        coordinator: HOST:PORT of process 0, which alone listens, and only there; "" where a
            scheduler that JAX knows (Slurm, for one) tells.
        processes: how many there are.
        process: which this one is, from 0 on.

    Raises:
        ValueError: where no scheduler tells.
        PeerLost: where the others are not there in time.
    """
    if not coordinator:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "no scheduler tells the processes of each other; give --coordinator, --processes "
                f"and --process ({str(error).splitlines()[0]})"
            ) from None
        return
    host = coordinator.rpartition(":")[0]
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            coordinator_bind_address=coordinator if _is_address(host) else None,
            initialization_timeout=60,
            heartbeat_timeout_seconds=30,
        )
    except RuntimeError as error:
        raise PeerLost(f"the processes did not find each other: {_first(error)}") from None


def check(coordinator: str, processes: int, process: int) -> None:
    """Refuse what does not say who this process is.

    Raises:
        ValueError: naming it.
    """
    if not coordinator:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator is {coordinator!r}; expected HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}; expected 0 <= process < processes")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return True


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]


def exchange(word: int) -> list[int]:
    """Return the words of all processes, each of which gives its own.

    Raises:
        PeerLost: where one of them has ended.
    """
    mesh = Mesh(np.asarray(jax.devices()), (_AXIS,))
    spread = NamedSharding(mesh, PartitionSpec(_AXIS))
    mine = np.full(len(jax.local_devices()), word, np.uint32)
    gather = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.all_gather(x, _AXIS, tiled=True),
            mesh=mesh,
            in_specs=PartitionSpec(_AXIS),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    try:
        given = jax.make_array_from_process_local_data(spread, mine)
        found = np.asarray(gather(given).addressable_data(0))
    except Exception as error:  # whatever the transport raises
        raise PeerLost(f"a process of this run has ended: {_first(error)}") from None
    owner = [device.process_index for device in mesh.devices.flat]
    return [int(found[owner.index(process)]) for process in range(jax.process_count())]


def begin(
    config: RunConfig, source: sources.Source, directory: RunDirectory, *, allow_mixed: bool
) -> list[str]:
    """Do as `job.begin` does, process 0 first, so that the others find what it has written.

    Raises:
        PeerLost: where a process has ended.
        ValueError: where the directory holds another run.
    """
    mixed: list[str] = []
    for turn in (jax.process_index() == 0, jax.process_index() > 0):
        try:
            if turn:
                mixed = job.begin(config, source, directory, allow_mixed=allow_mixed)
        except BaseException:
            exchange(_FAILED)
            raise
        if _FAILED in exchange(_GOES_ON):
            raise ValueError("another process of this run refuses it; see what that one says")
    return mixed


def run(
    config: RunConfig, source: sources.Source, directory: RunDirectory, report: job.Report
) -> job.Results | None:
    """Do the main job together; return the results to process 0, which finishes it.

    Raises:
        PeerLost: where a process has ended.
        job.Stopped: where the user asked for it, in any process.
    """
    number, of = jax.process_index(), jax.process_count()
    divided = shards.plan(config, source)
    for first in range(0, divided.count, of):
        if first + number < divided.count:
            share = Share(number=first + number + 1, of=divided.count)
            with suppress(job.Stopped):  # once all know
                job.compute(config, source, directory, share, report)
        if _STOPS in exchange(_STOPS if report.stopping() else _GOES_ON):
            done = min(first + of, divided.count)
            raise job.Stopped(f"stopped with {done} of {divided.count} shards done")
    if number:
        return None
    return job.run(config, source, directory, report)
