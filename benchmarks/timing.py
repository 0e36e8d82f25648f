"""Time several ways of doing the same work, in turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one way of doing a work.

    Attributes:
        first: of the first call, compilation included.
        median: of the timed calls.
        least: of these.
        most: of these.
        instances: done in each call.
    """

    first: float
    median: float
    least: float
    most: float
    instances: int

    @property
    def rate(self) -> float:
        """Instances per second, by the median."""
        return self.instances / self.median


def in_turns(ways: dict[str, tuple[Callable[[], Any], int]], *, rounds: int) -> dict[str, Timing]:
    """Time each way once per round, A B C A B C …, so that a noisy machine is noisy to all.

    Args:
        ways: by name, a call that waits for its results, and how many instances it does.
        rounds: how many times; one more goes before, for compilation and caches.
    """
    first = {name: _seconds(call) for name, (call, _) in ways.items()}
    for call, _ in ways.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (call, _) in ways.items():
            spent[name].append(_seconds(call))
    return {
        name: Timing(
            first=first[name],
            median=statistics.median(spent[name]),
            least=min(spent[name]),
            most=max(spent[name]),
            instances=ways[name][1],
        )
        for name in ways
    }


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
