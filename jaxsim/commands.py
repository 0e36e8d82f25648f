"""What the command line takes: a dataclass per command, its fields the options. Imports no JAX.

Also how functions and settings that are named there are read.
"""

import sys
from ast import literal_eval
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsim.runs.config import RunConfig, SolveConfig

_NEXT = "jaxsim-runs/N, the next number"


def _shown_as(metavar: str, default: str | None = None) -> Any:
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Do the main job: draw or read instances, judge the paper's claims, write a run directory.

    Without arguments: 1,000,000 Dirichlet instances of 32 outputs at 8 values of beta.
    """

    config: Annotated[tyro.conf.Positional[Path | None], _shown_as("CONFIG.toml", "none")] = None
    """A TOML file with any of the settings below; it comes before all options."""
    out: Annotated[Path | None, _shown_as("DIR", _NEXT)] = None
    """The directory to write, which must be empty or absent."""
    resume: Annotated[Path | None, _shown_as("DIR", "none")] = None
    """Go on with the unfinished run in this directory, with its settings."""
    worker: Annotated[str, _shown_as("I/N", "1/1, and finish the run")] = ""
    """Compute every N-th shard, from the I-th on, into a directory that N workers share; then
    jaxsim merge DIR."""
    distributed: bool = False
    """One of several processes that know of each other and share the directory: those of a Slurm
    job, or as the next three options say."""
    coordinator: Annotated[str, _shown_as("HOST:PORT", "as the scheduler says")] = ""
    """Where process 0 listens for the others."""
    processes: int = 0
    """How many there are."""
    process: int = 0
    """Which this one is, from 0 on."""
    allow_mixed: bool = False
    """Go on although the run was begun with another version of JAX, device, type or tile."""
    no_figures: bool = False
    """Leave out the figures."""
    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate the instances of a file: the tables and figures of a run, and a row per instance."""

    file: Annotated[tyro.conf.Positional[str], _shown_as("FILE")]
    """An .npz or .parquet file, or a built-in data set: ngram."""
    beta: Annotated[
        tuple[float, ...], tyro.conf.arg(help_behavior_hint="(default: the file's, or 0.05 to 10)")
    ] = ()
    """Values of beta for all instances."""
    reward: str = "reward"
    """Which array of the file is the reward."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of all arrays."""
    out: Annotated[Path | None, _shown_as("DIR", _NEXT)] = None
    """The directory to write, which must be empty or absent."""
    no_figures: bool = False
    """Leave out the figures."""


@dataclass(frozen=True, kw_only=True)
class Solve:
    """Optimise eq. (1) by gradient descent with several optimisers, and compare them.

    Without arguments: 10,000 Dirichlet instances of 32 outputs, beta from 0.1 to 10.
    """

    config: Annotated[tyro.conf.Positional[Path | None], _shown_as("CONFIG.toml", "none")] = None
    """A TOML file with any of the settings below; it comes before all options."""
    out: Annotated[Path | None, _shown_as("DIR", _NEXT)] = None
    """The directory to write, which must be empty or absent."""
    no_figures: bool = False
    """Leave out the figures."""
    settings: Annotated[SolveConfig, tyro.conf.arg(name="")] = field(default_factory=SolveConfig)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Redraw the figures of a finished run from its saved data."""

    run: Annotated[tyro.conf.Positional[Path], _shown_as("RUN")]
    """The run directory."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Finish a run whose shards were computed by workers."""

    run: Annotated[tyro.conf.Positional[Path], _shown_as("RUN")]
    """The run directory."""
    allow_mixed: bool = False
    """Finish although shards were computed with another version of JAX, device, type or tile."""
    no_figures: bool = False
    """Leave out the figures."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Tell how far a run is."""

    run: Annotated[tyro.conf.Positional[Path], _shown_as("RUN")]
    """The run directory."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a run: every file's hash, and some shards by computing them again."""

    run: Annotated[tyro.conf.Positional[Path], _shown_as("RUN")]
    """The run directory."""
    sample: int = 2
    """How many shards to compute again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tell what a run would take, from two seconds of it, without doing it."""

    config: Annotated[tyro.conf.Positional[Path | None], _shown_as("CONFIG.toml", "none")] = None
    """A TOML file with any of the settings below; it comes before all options."""
    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Report versions, devices, and whether another package named jaxsim is in the way."""

    functions: bool = False
    """Check exp, log and log1p on this device over every float32, up to half an hour.
    Verdicts rest on it. Needed once on a GPU or TPU; shipped as checked for CPU."""


@dataclass(frozen=True, kw_only=True)
class Native:
    """Build the optional native kernel of evaluate for this machine's CPU; needs a C++ compiler."""

    remove: bool = False
    """Delete it instead: evaluate is then compiled by XLA again."""


@dataclass(frozen=True, kw_only=True)
class CheckLoss:
    """Find out where a loss of pairs goes, and whether something is wrong with it.

    Exits with 1 where a fault is found.
    """

    loss: Annotated[tyro.conf.Positional[str], _shown_as("MODULE:FUNCTION")]
    """The loss, of a module that Python can import from here."""
    allow_import: bool = False
    """Import the module, which runs its code; nothing is done without this."""
    beta: float = 0.1
    """β, given to the loss where it has a parameter of that name."""
    reduction: Literal["none", "mean", "sum"] = "none"
    """What the loss says that it does to a batch."""
    option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], _shown_as("NAME=VALUE", "none")
    ] = ()
    """Another setting of the loss. Of several values of one name, each must make a difference."""


def imported(text: str, *, allowed: bool) -> Any:
    """Import a function given as module:function; the module may lie in the current directory."""
    module, _, path = text.partition(":")
    if not all(name.isidentifier() for name in [*module.split("."), *path.split(".")]):
        raise ValueError(f"{text!r} is no function; expected MODULE:FUNCTION, such as losses:dpo")
    if not allowed:
        raise ValueError(
            f"to check {text} imports {module}, which runs its code; allow it with --allow-import"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{text}: there is no {name} in {module}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{text} cannot be called; expected a function")
    return found


def options_of(given: tuple[str, ...]) -> dict[str, Any]:
    """Return settings by name; where a name is given several times, a list of its values."""
    values: dict[str, list[Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"option is {text!r}; expected NAME=VALUE")
        try:
            values.setdefault(name, []).append(literal_eval(value))
        except (ValueError, SyntaxError):
            values[name].append(value)
    return {name: x[0] if len(x) == 1 else x for name, x in values.items()}
