"""Spread independent tiles over what there is: all devices, and all cores of a lone CPU device.

XLA on CPU runs a loop over small arrays on one core; there a thread per core keeps the others busy.
Results come back in the order of the tiles.
"""

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import cycle, islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

_AXIS = "tiles"


def on_all_devices(
    function: Callable[..., Any], static: tuple[Hashable, ...], tiles: Iterable[Any], shared: Any
) -> Iterator[Any]:
    """Yield function(*static, tile, shared) for each tile, in order, fetched to the host.

    Several devices share one program by `shard_map`, and take a tile each at a time.

    Args:
        function: traceable; compiled once for each `static`.
        static: its first arguments, hashable.
        tiles: pytrees of arrays, all of the same shapes; taken a few at a time.
        shared: a pytree of arrays for all tiles.
    """
    devices = tuple(jax.local_devices())
    if len(devices) > 1:
        yield from _sharded(_compiled(function, static, devices), len(devices), tiles, shared)
    else:
        yield from on_each_device(function, static, tiles, shared)


def on_each_device(
    function: Callable[..., Any], static: tuple[Hashable, ...], tiles: Iterable[Any], shared: Any
) -> Iterator[Any]:
    """Do as `on_all_devices` does, with a program of its own for each device.

    For loops whose length depends on the tile, so that no device waits for another. Bits are those
    of one device: what `shard_map` compiles for several may differ in the last ones.
    """
    devices = jax.local_devices()
    compiled = _compiled(function, static, tuple(devices[:1]))
    threads = len(devices) * 2
    if len(devices) == 1 and devices[0].platform == "cpu":
        threads = os.cpu_count() or 1
    waiting: deque[Future[Any]] = deque()

    wide = jax.config.read("jax_enable_x64")  # a thread of its own has a mode of its own

    def results(tile: Any, device: Any) -> Any:
        with jax.enable_x64(wide):
            return jax.device_get(compiled(*jax.device_put((tile, shared), device)))

    with ThreadPoolExecutor(threads) as pool:
        try:
            for tile, device in zip(tiles, cycle(devices), strict=False):
                waiting.append(pool.submit(results, tile, device))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the consumer has enough, or an error
            for future in waiting:
                future.cancel()


def _sharded(
    compiled: Callable[..., Any], width: int, tiles: Iterable[Any], shared: Any
) -> Iterator[Any]:
    """Run one tile per device at a time, the next ones while the last are fetched."""
    rest = iter(tiles)
    waiting: deque[tuple[int, Any]] = deque()

    def fetched() -> Iterator[Any]:
        count, results = waiting.popleft()
        results = jax.device_get(results)
        for at in range(count):
            yield jax.tree.map(lambda leaf, at=at: leaf[at], results)

    while some := list(islice(rest, width)):
        padded = some + some[-1:] * (width - len(some))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
        waiting.append((len(some), compiled(stacked, shared)))
        if len(waiting) > 1:
            yield from fetched()
    while waiting:
        yield from fetched()


@lru_cache(maxsize=64)  # a user may make an optimiser for each call
def _compiled(
    function: Callable[..., Any], static: tuple[Hashable, ...], devices: tuple[Any, ...]
) -> Callable[..., Any]:
    kernel = partial(function, *static)
    if len(devices) == 1:
        return jax.jit(kernel)

    def on_one(stacked: Any, shared: Any) -> Any:
        tile = jax.tree.map(lambda leaf: leaf[0], stacked)
        return jax.tree.map(lambda leaf: leaf[None], kernel(tile, shared))

    spread, same = PartitionSpec(_AXIS), PartitionSpec()
    mesh = Mesh(np.asarray(devices), (_AXIS,))
    return jax.jit(
        jax.shard_map(on_one, mesh=mesh, in_specs=(spread, same), out_specs=spread, check_vma=False)
    )
