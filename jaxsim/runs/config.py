"""The configuration of a run: a dataclass, a TOML file and the command line, with the same names.

Imports no JAX, so that `jaxsim --help` is quick.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxsim.families.spec import Family, Scalar

DEFAULT_BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run computes. Every setting is a key of the TOML file and an option."""

    seed: int = 0
    """Seed of all random draws."""
    instances: int = 1_000_000
    """Number of instances drawn from the family."""
    betas: tuple[float, ...] = DEFAULT_BETAS
    """Each instance is evaluated at all of these; leave empty for each at its own beta."""
    input: str = ""
    """A file of instances (.npz or .parquet), or a built-in data set (ngram), instead of the
    family."""
    reward: str = "reward"
    """Which array of the input is the reward."""
    family: Family = field(default_factory=Family)
    shard: int = 0
    """Instances that are committed together; 0: sixteen tiles, 131,072 at 32 outputs."""
    save: Literal["totals", "instances"] = "totals"
    """totals: sums, counts and quantiles alone. instances: also a Parquet file per shard, with a
    row for each instance and beta."""
    audit: int = 8_000
    """How many of the instances are also audited: every claim judged, not only Theorem 2's."""
    confirm: int = 10_000
    """How many instances are solved by gradient descent, to confirm the closed form."""
    atlas: int = 20_000
    """Instances for each number of outputs in the map of violations; 0 leaves it out."""
    atlas_outputs: tuple[int, ...] = (3, 8, 32, 128)
    """Numbers of outputs in that map."""

    def __post_init__(self) -> None:
        limits = {
            "seed": (0, 2**32 - 1),
            "instances": (1, 2**63),
            "shard": (0, 2**40),
            "audit": (0, 2**63),
            "confirm": (0, 10**7),
            "atlas": (0, 10**9),
        }
        _check_limits(self, limits)
        if self.input:
            if self.save == "instances":
                raise ValueError("save is 'instances', but a run on a file always saves them")
            for name in ("instances", "family"):
                value, default = getattr(self, name), getattr(RunConfig, name, None)
                if name == "family":
                    default = Family(dtype=value.dtype)
                if value != default:
                    raise ValueError(f"{name} is set, but the input {self.input!r} settles it")
        _check_betas(self.betas)
        for at, outputs in enumerate(self.atlas_outputs):
            if not 2 <= outputs <= 4096:
                raise ValueError(f"atlas_outputs[{at}] is {outputs}; expected 2 to 4096")


_OptimizerName = Literal[
    "default", "sgd", "momentum", "adam", "adam_cosine", "lbfgs", "natural_half", "natural"
]
OPTIMIZERS: tuple[_OptimizerName, ...] = get_args(_OptimizerName)
_SOLVED = Family(beta=Scalar(kind="log_uniform", low=0.1, high=10.0))


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """What `jaxsim solve` computes. Every setting is a key of the TOML file and an option."""

    seed: int = 0
    """Seed of all random draws."""
    instances: int = 10_000
    """Number of instances drawn from the family, or at most so many of the input."""
    betas: tuple[float, ...] = ()
    """Instances take these in turn; empty: each its own beta."""
    input: str = ""
    """A file of instances (.npz or .parquet), or a built-in data set (ngram), instead of the
    family."""
    reward: str = "reward"
    """Which array of the input is the reward."""
    family: Family = _SOLVED
    optimizers: tuple[_OptimizerName, ...] = OPTIMIZERS
    """Which optimisers descend."""
    max_steps: int = 1000
    """At most so many steps for an instance."""
    tolerance: float = 0.0
    """KL(policy‖p*) at which an instance is done, nats; 0: 1e-6 in float32, 1e-12 in float64."""
    start: Literal["reference", "uniform", "worst"] = "reference"
    """The first policy: p_ref, uniform, or nearly all mass on an output of the least reward."""
    traced: int = 256
    """How many instances' courses are recorded, for the figures."""
    trace_steps: int = 200
    """How many steps of them."""

    def __post_init__(self) -> None:
        limits = {
            "seed": (0, 2**32 - 1),
            "instances": (1, 10**7),
            "max_steps": (1, 10**6),
            "tolerance": (0, 1),
            "traced": (1, 4096),
            "trace_steps": (1, 10_000),
        }
        _check_limits(self, limits)
        if not self.optimizers:
            raise ValueError("optimizers is empty; expected at least one name")
        if self.input and self.family != replace(_SOLVED, dtype=self.family.dtype):
            raise ValueError(f"family is set, but the input {self.input!r} settles it")
        _check_betas(self.betas)


def _check_limits(config: Any, limits: dict[str, tuple[int, int]]) -> None:
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; expected {low} to {high}")


def _check_betas(betas: tuple[float, ...]) -> None:
    for at, beta in enumerate(betas):
        if not 0 < beta < math.inf:
            raise ValueError(f"betas[{at}] is {beta}; expected a finite number > 0")


def load(path: Path, kind: type[Any] = RunConfig) -> Any:
    """Read a configuration, a `RunConfig` or one of another kind, from a TOML file.

    Raises:
        ValueError: naming the file and the key, for anything that is not a setting.
        OSError: where the file cannot be read.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    try:
        return from_dict(kind, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_dict(cls: type[Any], table: dict[str, Any], prefix: str = "") -> Any:
    """Build a configuration dataclass from nested tables, refusing what it does not know.

    Raises:
        ValueError: naming the key, and the nearest one that exists.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in table.items():
        name = prefix + key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else "known: " + ", ".join(known)
            raise ValueError(f"unknown key {name}; {hint}")
        values[key] = _convert(hints[key], value, name)
    return cls(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}; expected a table")
        return from_dict(hint, value, name + ".")  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r}; expected a list")
        return tuple(_convert(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin in (Union, types.UnionType):
        return _convert(args[0], value, name)
    accepted = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        kind = {float: "a number", int: "a whole number", str: "a string", bool: "true or false"}
        raise ValueError(f"{name} is {value!r}; expected {kind[hint]}")
    return hint(value)


def to_toml(config: Any) -> str:
    """Write a configuration, fully resolved, as TOML that `load` reads back equal."""
    scalars, tables = [], []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            tables.append((item.name, value))
        else:
            scalars.append(f"{item.name} = {_toml(value)}")
    lines = scalars
    for name, table in tables:
        body = to_toml(table).rstrip()
        head, *rest = body.split("\n[")
        lines.append(f"\n[{name}]\n{head}")
        lines.extend(f"[{name}.{part}" for part in rest)
    return "\n".join(lines).strip() + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
