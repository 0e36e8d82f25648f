"""What the command line takes: a dataclass per command, its fields the options. Imports no JAX."""

from dataclasses import dataclass, field
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
