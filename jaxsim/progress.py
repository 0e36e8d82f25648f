"""How far a run is: a bar with instances per second and time left, or plain lines."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxsim.runs.job import Report

_interrupted = False
_finishing = False  # what is in hand, before an interrupt is followed


def remember_interrupts() -> None:
    """Have Ctrl-C raise again at the next step, in case the first time fell into a callback.

    Python drops an exception that is raised within one (a weak reference's, a compiler's).
    """

    def interrupt(number: int, frame: Any) -> None:
        global _interrupted
        again, _interrupted = _interrupted, True
        if _finishing and not again:
            print(
                "\njaxsim: finishing the shard in hand (Ctrl-C again stops at once)",
                file=sys.stderr,
                flush=True,
            )
            return
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def _stop_if_interrupted() -> None:
    if _interrupted and not _finishing:
        raise KeyboardInterrupt


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let the first Ctrl-C wait for whoever asks `_stopping`."""
    global _finishing
    _finishing = True
    try:
        yield
    finally:
        _finishing = False


def _stopping() -> bool:
    return _interrupted


def _say(text: str) -> None:
    print(f"jaxsim: {text}", file=sys.stderr, flush=True)


_COMMON: dict[str, Any] = {
    "say": _say,
    "stopping": _stopping,
    "uninterrupted": _uninterrupted,
}


@contextmanager
def bar() -> Iterator[Report]:
    """Draw a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None, rate="")
        clock = _Clock()

        def stage(name: str, total: int, unit: str = "instances") -> None:
            clock.start(total, unit)
            progress.reset(task, description=name, total=total or None, rate="")

        def step(done: int, note: str = "") -> None:
            _stop_if_interrupted()
            rate = clock.rate(done)
            shown = ", ".join([f"{rate:,.0f} {clock.unit}/s"] * bool(rate) + [note] * bool(note))
            progress.update(task, completed=done, rate=shown)

        yield Report(stage=stage, progress=step, **_COMMON)


@contextmanager
def lines() -> Iterator[Report]:
    """Print a line per stage, and one every two seconds in between, on standard error."""
    clock = _Clock()
    last = [0.0]

    def stage(name: str, total: int, unit: str = "instances") -> None:
        clock.start(total, unit)
        last[0] = time.monotonic()
        print(f"{name}{f' {total:,} {unit}' if total else ''} …", file=sys.stderr, flush=True)

    def step(done: int, note: str = "") -> None:
        _stop_if_interrupted()
        now = time.monotonic()
        if now - last[0] >= 2:
            last[0] = now
            text = f"  {done:,} of {clock.total:,}"
            rate = clock.rate(done)
            if rate:
                text += f", {rate:,.3g} {clock.unit}/s, {(clock.total - done) / rate:.0f} s left"
            print(text + f", {note}" * bool(note), file=sys.stderr, flush=True)

    yield Report(stage=stage, progress=step, **_COMMON)


class _Clock:
    """Rate of a stage, counted from its first report so that compilation does not distort it."""

    def __init__(self) -> None:
        self.start(0, "")

    def start(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float | None:
        """Return instances per second; None at the first report."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
            return None
        return max(done - self._first[1], 1) / max(now - self._first[0], 1e-9)
