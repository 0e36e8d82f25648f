"""What a family of random instances is: plain, hashable descriptions. Imports no JAX.

A description is drawn from by `jaxsim.families.draw`, and is what a run's configuration holds, so
that every name here is also a key of the TOML file and an option of the command line.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

_LEAST, _GREATEST = 1e-30, 1e30

_UNUSED = {
    "dirichlet": {"support", "zipf_exponent", "classifier_mean", "classifier_scale"},
    "sparse": {"zipf_exponent", "classifier_mean", "classifier_scale"},
    "disjoint": {"support", "zipf_exponent", "classifier_mean", "classifier_scale"},
    "zipf": {"concentration_aligned", "concentration_unaligned", "support"},
    "gaussian": {"degrees_of_freedom", "probability", "strength"},
    "student_t": {"probability", "strength"},
    "bounded": {"degrees_of_freedom", "probability", "strength"},
    "binary": {"degrees_of_freedom", "strength"},
    "correlated": {"degrees_of_freedom", "probability"},
    "bradley_terry": {"degrees_of_freedom", "probability", "strength"},
    "fixed": {"low", "high", "values"},
    "uniform": {"value", "values"},
    "log_uniform": {"value", "values"},
    "grid": {"value", "low", "high"},
}


def _check_unused(section: Any, name: str, family_default: Any = None) -> None:
    """Refuse a setting that its kind ignores, rather than ignore it silently.

    What a family's own default sets (`family_default`) may stay when another kind is chosen.
    """
    if section.kind not in _UNUSED:
        raise ValueError(f"{name}.kind is {section.kind!r}; see the documentation for the kinds")
    for item in fields(section):
        value = getattr(section, item.name)
        kept = (item.default, getattr(family_default, item.name, item.default))
        if item.name in _UNUSED[section.kind] and value not in kept:
            raise ValueError(
                f"{name}.{item.name} is {value}, but {name}.kind = {section.kind!r} does not use it"
            )


def _check(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; expected {wanted}")


@dataclass(frozen=True, kw_only=True)
class Components:
    """How p_A and p_U are drawn."""

    kind: Literal["dirichlet", "sparse", "disjoint", "zipf"] = "dirichlet"
    """dirichlet: both on all outputs. sparse: each on a random subset. disjoint: on two parts of
    the outputs. zipf: a Zipf reference split by a random classifier, which also sets alpha."""
    concentration_aligned: float = 1.0
    """Dirichlet concentration of p_A, per output."""
    concentration_unaligned: float = 1.0
    """Dirichlet concentration of p_U, per output."""
    support: float = 0.5
    """sparse: the chance that an output is in a component's support."""
    zipf_exponent: float = 1.0
    """zipf: the reference is proportional to rank**-exponent."""
    classifier_mean: float = 0.0
    """zipf: mean of the classifier's log-odds of "aligned"."""
    classifier_scale: float = 2.0
    """zipf: standard deviation of the classifier's log-odds."""

    def __post_init__(self) -> None:
        _check_unused(self, "components")
        for name in ("concentration_aligned", "concentration_unaligned"):
            value = getattr(self, name)
            _check(0.01 <= value <= 1e4, f"components.{name}", value, "0.01 to 10000")
        _check(0 < self.support <= 1, "components.support", self.support, "0 < support <= 1")
        exponent, scale = self.zipf_exponent, self.classifier_scale
        _check(0 <= exponent <= 10, "components.zipf_exponent", exponent, "0 to 10")
        _check(0 < scale <= 20, "components.classifier_scale", scale, "a number in (0, 20]")
        mean = self.classifier_mean
        _check(abs(mean) <= 20, "components.classifier_mean", mean, "-20 to 20")


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """How r is drawn."""

    kind: Literal["gaussian", "student_t", "bounded", "binary", "correlated", "bradley_terry"] = (
        "gaussian"
    )
    """gaussian: N(0, 1). student_t: heavy tails. bounded: uniform on [-1, 1]. binary: 0 or 1.
    correlated: with log p_A/p_U. bradley_terry: log of exponentially distributed strengths."""
    scale: float = 1.0
    """All of these are multiplied by it."""
    degrees_of_freedom: float = 3.0
    """student_t: degrees of freedom."""
    probability: float = 0.5
    """binary: the chance of a one."""
    strength: float = 0.5
    """correlated: the correlation with log p_A/p_U across the outputs of an instance, -1 to 1."""

    def __post_init__(self) -> None:
        _check_unused(self, "reward")
        wanted = f"{_LEAST} < scale < {_GREATEST}"
        _check(_LEAST < self.scale < _GREATEST, "reward.scale", self.scale, wanted)
        degrees = self.degrees_of_freedom  # at 0.1 one draw in 10^4 would overflow float32
        _check(0.5 <= degrees <= 1e4, "reward.degrees_of_freedom", degrees, "0.5 to 10000")
        _check(0 < self.probability < 1, "reward.probability", self.probability, "0 < p < 1")
        _check(abs(self.strength) <= 1, "reward.strength", self.strength, "-1 to 1")


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """How α or β is drawn."""

    kind: Literal["fixed", "uniform", "log_uniform", "grid"] = "fixed"
    """fixed: `value`. uniform, log_uniform: from `low` to `high`. grid: one of `values`."""
    value: float = 0.5
    """fixed: the value."""
    low: float = 0.0
    """uniform, log_uniform: the lower end."""
    high: float = 1.0
    """uniform, log_uniform: the upper end."""
    values: tuple[float, ...] = ()
    """grid: the values, each as likely."""

    def check(self, name: str, upper: float, default: "Scalar") -> None:
        """Refuse values outside (10^-30, `upper`), which float32 might take for 0 or infinity."""
        _check_unused(self, name, default)
        if self.kind == "grid":
            _check(len(self.values) > 0, f"{name}.values", "empty", "at least one value")
            inside = [f"{name}.values[{i}]" for i in range(len(self.values))]
            pairs = list(zip(inside, self.values, strict=True))
        elif self.kind == "fixed":
            pairs = [(f"{name}.value", self.value)]
        else:
            _check(self.low < self.high, f"{name}.low", self.low, f"less than high ({self.high})")
            lowest_ok = self.low > _LEAST or (self.kind == "uniform" and self.low == 0)
            _check(lowest_ok, f"{name}.low", self.low, f"a number > {_LEAST}")
            wanted = f"{_LEAST} < high <= {upper}"
            _check(_LEAST < self.high <= upper, f"{name}.high", self.high, wanted)
            return
        for label, value in pairs:
            _check(_LEAST < value < upper, label, value, f"{_LEAST} < value < {upper}")


_DEFAULT_ALPHA = Scalar(kind="uniform", low=0.0, high=1.0)
_DEFAULT_BETA = Scalar(kind="log_uniform", low=0.05, high=10.0)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of random instances. Instance i of a family depends on (key, i) alone.

    Example:
        >>> from jaxsim import Family
        >>> Family(outputs=8).components.kind
        'dirichlet'
    """

    outputs: int = 32
    """Outputs per instance, n."""
    components: Components = field(default_factory=Components)
    reward: Rewards = field(default_factory=Rewards)
    alpha: Scalar = _DEFAULT_ALPHA
    beta: Scalar = _DEFAULT_BETA
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of all arrays; float64 needs JAX's 64-bit mode (the command line turns it on)."""

    def __post_init__(self) -> None:
        _check(1 <= self.outputs <= 2**20, "family.outputs", self.outputs, "1 to 1048576")
        self.alpha.check("alpha", 1.0, _DEFAULT_ALPHA)
        self.beta.check("beta", _GREATEST, _DEFAULT_BETA)
        _check(self.dtype in ("float32", "float64"), "dtype", self.dtype, "float32 or float64")
        kind = self.components.kind
        if kind == "zipf" and self.alpha != _DEFAULT_ALPHA:
            raise ValueError("alpha is set, but components.kind = 'zipf' settles it")
        if kind in ("sparse", "disjoint"):
            _check(self.outputs >= 2, "family.outputs", self.outputs, f"at least 2 for {kind!r}")
            if self.reward.kind == "correlated":
                raise ValueError(
                    f"reward.kind = 'correlated' needs log p_A/p_U finite everywhere; "
                    f"components.kind = {kind!r} has zero masses"
                )

    @property
    def has_masses(self) -> bool:
        """Whether float32 holds the component's masses themselves, not only their logs.

        So it does for Dirichlet components of concentration 1 and more, whose least mass is far
        above the underflow threshold.
        """
        spec = self.components
        return (
            self.dtype == "float32"
            and spec.kind == "dirichlet"
            and min(spec.concentration_aligned, spec.concentration_unaligned) >= 1
            and self.reward.kind != "correlated"  # with log p_A/p_U
        )
