"""Figures, drawn from the CSV files of a run: the only importer of matplotlib.

Redrawing needs the run directory and no JAX, and equal data give equal bytes.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from matplotlib.figure import Figure

from jaxsim.figures.alpha_to_tpm import alpha_to_tpm
from jaxsim.figures.atlas import atlas
from jaxsim.figures.convergence import convergence
from jaxsim.figures.counterexample import counterexample
from jaxsim.figures.depth import depth
from jaxsim.figures.descent_tpm import descent_tpm
from jaxsim.figures.finite_samples import finite_samples
from jaxsim.figures.methods import frontier, methods, methods_tpm
from jaxsim.figures.prompts import prompts
from jaxsim.figures.steps_by_beta import steps_by_beta
from jaxsim.figures.style import Columns, rendered
from jaxsim.figures.tpm_by_beta import tpm_by_beta
from jaxsim.figures.violations import violations

__all__ = [
    "FIGURES",
    "alpha_to_tpm",
    "atlas",
    "convergence",
    "counterexample",
    "depth",
    "descent_tpm",
    "draw_all",
    "finite_samples",
    "frontier",
    "methods",
    "methods_tpm",
    "prompts",
    "steps_by_beta",
    "tpm_by_beta",
    "violations",
]


class Run(Protocol):
    """What the figures need of a `jaxsim.runs.directory.RunDirectory`."""

    def read_csv(self, name: str) -> Columns | None: ...
    def read_json(self, name: str) -> Any: ...
    def write(self, name: str, content: bytes) -> None: ...


def _draw_convergence(run: Run, columns: Columns) -> Figure | None:
    return convergence(columns, run.read_json("solve.json"))


def _draw_counterexample(run: Run, columns: Columns) -> Figure | None:
    facts = run.read_json("counterexample.json")
    return counterexample(columns, facts) if facts else None


def _draw_descent_tpm(run: Run, columns: Columns) -> Figure | None:
    facts = run.read_json("solve.json")
    return descent_tpm(columns, facts) if facts else None


FIGURES: dict[str, Callable[[Run, Columns], Figure | None]] = {
    "tpm_by_beta": lambda _, columns: tpm_by_beta(columns),
    "alpha_to_tpm": lambda _, columns: alpha_to_tpm(columns),
    "violations": lambda _, columns: violations(columns),
    "convergence": _draw_convergence,
    "counterexample": _draw_counterexample,
    "atlas": lambda _, columns: atlas(columns),
    "prompts": lambda _, columns: prompts(columns),
    "depth": lambda _, columns: depth(columns),
    "methods": lambda _, columns: methods(columns),
    "methods_tpm": lambda _, columns: methods_tpm(columns),
    "finite_samples": lambda _, columns: finite_samples(columns),
    "frontier": lambda _, columns: frontier(columns),
    "steps_by_beta": lambda _, columns: steps_by_beta(columns),
    "descent_tpm": _draw_descent_tpm,
}
"""The figures by name; the data of each are the CSV file of that name."""


def draw_all(run: Run) -> list[str]:
    """Draw every figure whose data the run has, as PDF, SVG and PNG under `figures/`.

    Returns:
        The names of the figures drawn; `figures/<name>.pdf`, `.svg` and `.png` are the files.
    """
    drawn = []
    with _no_garbage_collection():
        for name, draw in FIGURES.items():
            columns = run.read_csv(name)
            if not columns or not next(iter(columns.values())):
                continue
            figure = draw(run, columns)
            if figure is None:
                continue
            for extension, content in rendered(figure).items():
                run.write(f"figures/{name}.{extension}", content)
            drawn.append(name)
    return drawn


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the cycle collector, which would take an eighth of the time and find little."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
