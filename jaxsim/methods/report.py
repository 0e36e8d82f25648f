"""What a check of a loss found out, as data and for a person to read."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxsim.methods.existence import OptimumStatus

_TV = 1e-6  # an optimum is p* up to this total variation
SAME_BETA = 1e-5
"""Two values of β are one up to this share."""

Level = Literal["fault", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that was found out about a loss.

    Attributes:
        level: "fault" for what is surely a bug, "note" for a property that a user should know.
        name: of what was found, such as "beta_twice".
        text: one sentence for a person.
    """

    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """What `check_loss` found out; NumPy arrays in float64, one row per instance that was tried.

    Attributes:
        called_as: how the loss was called.
        kind: "jax", "numpy", "torch", or "float" for a loss of single numbers.
        beta: β.
        findings: faults first.
        log_reference: log p_ref, [instances, outputs].
        reward: r, likewise.
        log_optimal: log p* of eq. (1), likewise.
        log_policy: log π where the loss has its optimum under exact Bradley–Terry feedback on pairs
            from p_ref, likewise; nan where there is none.
        status: `OptimumStatus` as int8, [instances].
        last_step: how far the solver's last step moved a log-ratio, at most, nats.
        total_variation: TV(π, p*).
        kl: KL(π‖p*), nats.
        implied_beta: β' of the best fit log(π/p_ref) = r/β' + c.
        tilt_residual: how far that fit is off, at most, nats.
        gradient_bias: of the expected gradient at p*, the length in units of one pair's (root mean
            square): 0 where they balance, 1 where they all agree.
        deviations: by how much each invariance is missed, relative to the loss: "neighbours" (an
            example's value does not depend on the rest of the batch), "shift" (nor on a constant
            added to both of the policy's log-probabilities), "ratio" (nor on one added to an
            output's policy and reference), "swap" (with chosen and rejected swapped it is the value
            at minus the difference of log-ratios).

    Example:
        >>> import jaxsim
        >>> report = jaxsim.check_loss(jaxsim.dpo_loss, beta=0.5)
        >>> report.reaches_optimum, report.passed
        (True, True)
    """

    called_as: str
    kind: str
    beta: float
    findings: tuple[Finding, ...]
    log_reference: np.ndarray
    reward: np.ndarray
    log_optimal: np.ndarray
    log_policy: np.ndarray
    status: np.ndarray
    last_step: np.ndarray
    total_variation: np.ndarray
    kl: np.ndarray
    implied_beta: np.ndarray
    tilt_residual: np.ndarray
    gradient_bias: np.ndarray
    deviations: dict[str, float]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What is surely a bug."""
        return tuple(finding for finding in self.findings if finding.level == "fault")

    @property
    def passed(self) -> bool:
        """Whether no fault was found; the optimum may still be another than p*."""
        return not self.faults

    @property
    def reaches_optimum(self) -> bool:
        """Whether the optimum is p* on every instance, to 1e-6 in TV."""
        found = self.status == OptimumStatus.FOUND
        return bool(np.all(found & (self.total_variation <= _slack(self.last_step))))

    @property
    def is_tilt(self) -> bool:
        """Whether the optimum is p_ref e^{r/β'}/Z with one β' on every instance."""
        return one_tilt(self.implied_beta, self.tilt_residual, self.last_step)

    def __str__(self) -> str:
        rows = [("loss", f"{self.called_as}, {_KINDS[self.kind]}")]
        rows.append(("optimum", self._where()))
        if np.any(np.isfinite(self.tilt_residual)):
            rows.append(("implied beta", self._implied()))
        if np.any(np.isfinite(self.gradient_bias)):
            bias = f"at most {np.nanmax(self.gradient_bias):.1e} of one pair's gradient, at p*"
            rows.append(("gradient bias", bias))
        if self.deviations:
            held = [f"{name} {value:.0e}" for name, value in self.deviations.items()]
            rows.append(("invariances", "missed by: " + ", ".join(held)))
        lines = [f"{name:15}{text}" for name, text in rows]
        lines += self._example()
        lines += [str(finding) for finding in self.findings]
        faults = len(self.faults)
        lines.append(f"{faults or 'no'} fault{'' if faults == 1 else 's'} found")
        return "\n".join(lines)

    def _where(self) -> str:
        lost = np.flatnonzero(self.status > OptimumStatus.NOT_UNIQUE)
        if len(lost):
            status = OptimumStatus(self.status[lost[0]])
            return f"none on {len(lost)} of {len(self.status)} instances: {status.message}"
        text = "p* of eq. (1)" if self.reaches_optimum else "not p*"
        if self.is_tilt and not self.reaches_optimum:
            text = f"p* at beta = {self.implied_beta[0]:.6g}, not {self.beta:g}"
        return (
            f"{text}: TV to p* at most {self.total_variation.max():.1e}, "
            f"KL at most {self.kl.max():.1e} nats"
        )

    def _implied(self) -> str:
        low, high = np.nanmin(self.implied_beta), np.nanmax(self.implied_beta)
        off = f"off by up to {np.nanmax(self.tilt_residual):.1e} nats"
        if self.is_tilt:
            return f"{self.implied_beta[0]:.6g} ({off})"
        return f"none: the best fits have {low:.3g} to {high:.3g} and are {off}"

    def _example(self) -> list[str]:
        """Return a table of the instance where the optimum is furthest from p*."""
        there = np.isfinite(self.total_variation)
        if self.reaches_optimum or not there.any():
            return []
        at = int(np.argmax(np.where(there, self.total_variation, -1)))
        columns = {
            "p_ref": np.exp(self.log_reference[at]),
            "reward": self.reward[at],
            "p*": np.exp(self.log_optimal[at]),
            "policy": np.exp(self.log_policy[at]),
            "log-ratio": self.log_policy[at] - self.log_reference[at],
        }
        rows = [f"{name:15}" + "".join(f"{x:9.4f}" for x in row) for name, row in columns.items()]
        return [f"for example, instance {at}:", *(f"  {row}" for row in rows)]


_KINDS = {
    "jax": "a JAX loss",
    "numpy": "a loss of arrays, differentiated by finite differences",
    "torch": "a torch loss, differentiated by autograd",
    "float": "a loss of single numbers, differentiated by finite differences",
}


def fit_tilt(log_ratio: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the slope of the best fit log_ratio = slope r + c, and how far it is off at most."""
    with np.errstate(invalid="ignore"):
        s = log_ratio - log_ratio.mean(axis=1, keepdims=True)
    r = reward - reward.mean(axis=1, keepdims=True)
    slope = np.sum(s * r, axis=1) / np.sum(r * r, axis=1)
    return slope, np.abs(s - slope[:, None] * r).max(axis=1)


def one_tilt(implied_beta: np.ndarray, residual: np.ndarray, last_step: np.ndarray) -> bool:
    """Return whether all instances fit, with one β'."""
    fits = residual <= 4 * _slack(last_step)  # on up to tens of nats
    with np.errstate(invalid="ignore"):
        agree = np.abs(implied_beta / implied_beta[0] - 1) <= SAME_BETA
    return bool(np.all(fits & agree))


def _slack(last_step: np.ndarray) -> np.ndarray:
    return np.maximum(_TV, 10 * last_step)
