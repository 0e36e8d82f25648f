"""A conformance harness: where someone else's loss of pairs goes, and what is wrong with it."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any, Literal

import jax
import numpy as np
from scipy.special import log_softmax

from jaxsim.feedback import expected_pairs
from jaxsim.methods.existence import OptimumStatus
from jaxsim.methods.foreign import ROLES, ForeignLoss, LossRaisedError
from jaxsim.methods.report import SAME_BETA, Finding, LossReport, fit_tilt, one_tilt
from jaxsim.methods.stationary import expected_gradient, minimise, unknown

# Two references, of four outputs, and for each a reward of range 4 or less.
_REFERENCE = np.array([[0.43, 0.28, 0.18, 0.11], [0.07, 0.34, 0.21, 0.38]])
_REWARD = np.array([[0.0, 1.7, -1.1, 2.9], [2.3, -0.4, 3.6, 1.1]])
_FAR = 1e4  # an extreme log-ratio, nats
_NO_VALUE = "no such value"


def check_loss(
    loss_fn: Callable[..., Any],
    *,
    beta: float = 0.1,
    reduction: Literal["none", "mean", "sum"] = "none",
    options: dict[str, Any] | None = None,
) -> LossReport:
    """Find out where a loss of pairs goes, and whether something is wrong with it.

    It runs on the host, in float64, on small instances that never change. A correct loss passes
    whatever its optimum is: what is not p* but no bug is a note.

    Args:
        loss_fn: takes log-probabilities of a batch of pairs: policy chosen, policy rejected,
            reference chosen, reference rejected (or the first two alone); by keyword where its
            parameters are named like those of `dpo_loss` or of TRL, else by place. It returns the
            loss, or a tuple, dictionary or object that holds it first, or as `loss` or `losses`.
            It may be written in JAX, in torch (its own autograd is used), or in NumPy or for
            Python floats (finite differences are).
        beta: β, given to the loss where it has a parameter of that name; else the β that it is
            meant to have.
        reduction: what the loss says that it does to a batch, given to it where it has a parameter
            of that name. With "none" a mean is a fault.
        options: other settings by name: one value, or a list of values that must each make a
            difference, of which the first is used for all other checks.

    Returns:
        A `LossReport`; print it.

    Raises:
        TypeError: for a loss that cannot be called.
        ValueError: for a loss that fails on ordinary log-probabilities (its own exception is the
            cause) or is none of pairs, an unknown option, or a beta that is not positive.

    Example:
        >>> import jax, jaxsim
        >>> def loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
        ...          ref_rejected_logps, beta):
        ...     chosen_reward = beta * (policy_chosen_logps - ref_chosen_logps)
        ...     rejected_reward = beta * (policy_rejected_logps - ref_rejected_logps)
        ...     return -jax.nn.log_sigmoid(beta * (chosen_reward - rejected_reward))
        >>> for fault in jaxsim.check_loss(loss, beta=0.1).faults:
        ...     print(fault)
        fault: beta is applied twice: the loss at twice the beta is the loss of 4, not 2, times the
        difference of log-ratios
    """
    if not callable(loss_fn):
        raise TypeError(f"check_loss: expected a function, got {type(loss_fn).__name__}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta is {beta}; expected a number > 0")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected none, mean or sum")
    if "beta" in (options or {}):
        raise ValueError("options: beta has an argument of its own")
    several = {k: list(v) for k, v in (options or {}).items() if isinstance(v, (list, tuple))}
    empty = [name for name, values in several.items() if not values]
    if empty:
        raise ValueError(f"options: there is no value of {empty[0]!r}")
    used = {k: several[k][0] if k in several else v for k, v in (options or {}).items()}
    # What the loss warns of, such as an overflow, shows in its values.
    with jax.enable_x64(True), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = ForeignLoss(loss_fn, beta=beta, reduction=reduction, options=used)
        return _Check(loss, beta, reduction, several).report()


class _Check:
    """The checks of one loss, and what they found so far."""

    def __init__(
        self, loss: ForeignLoss, beta: float, reduction: str, several: dict[str, list[Any]]
    ) -> None:
        self.loss, self.beta, self.reduction, self.several = loss, beta, reduction, several
        self.findings: list[Finding] = []
        self.deviations: dict[str, float] = {}
        # Rounding, of differences of log-probabilities too.
        self.tolerance = loss.unit_roundoff**0.6
        self.probes = _probes(beta)

    def report(self) -> LossReport:
        """Run all checks."""
        self._guarded("for a single example", self._batches)
        if not self.has("not_repeatable"):  # with which the rest would be noise
            self._guarded("for a batch", self._invariances)
            self._guarded("for a batch", self._arguments)
            self._guarded("with another beta", self._beta)
            self._guarded("for a batch", self._direction)
            for name, values in self.several.items():
                self._option(name, values)
            self._unknown_values()
            for dtype in ("float64",) if self.loss.kind == "float" else ("float32", "float64"):
                when = f"at log-ratios of {_FAR:g} nats, in {dtype}"
                self._guarded(when, partial(self._extremes, dtype))
            self._guarded("in differentiation", self._derivatives)
        return self._at_optimum()

    def fault(self, name: str, text: str) -> None:
        self.findings.append(Finding(level="fault", name=name, text=text))

    def note(self, name: str, text: str) -> None:
        self.findings.append(Finding(level="note", name=name, text=text))

    def has(self, *names: str) -> bool:
        """Return whether one of these was found."""
        return any(finding.name in names for finding in self.findings)

    def _guarded(self, when: str, check: Callable[[], None]) -> None:
        """Run a check; an exception that the loss raises is a finding."""
        try:
            check()
        except LossRaisedError as error:
            self.fault("raises", f"{when} it raises {error}")

    def _same(self, a: np.ndarray, b: np.ndarray) -> bool:
        return _deviation(a, b) <= self.tolerance

    def _batches(self) -> None:
        """Whether an example's value is its own."""
        loss, x = self.loss, self.probes
        whole = loss.batch(x)
        if not self._same(whole, loss.batch(x)):
            self.fault(
                "not_repeatable", "called twice it gives two answers: it is random or keeps state"
            )
            return
        num = x.shape[1]
        shape, loss.apart = whole.shape, True
        singles = loss.values(x)
        if self.reduction != "none":
            reduced = singles.mean() if self.reduction == "mean" else singles.sum()
            if not self._same(whole, reduced):
                self.fault(
                    "reduction",
                    f"it is not the {self.reduction} of its values of single examples, as declared",
                )
            return
        if shape == ():
            self.fault(
                "mean_inside",
                f"a mean or sum is hidden inside: it returns one number for {num} examples (where "
                "that is meant, pass reduction)",
            )
        elif shape != (num,):
            self.fault("shape", f"it returns shape {shape} for {num} examples, not ({num},)")
        else:
            self.deviations["neighbours"] = _deviation(whole, singles)
            loss.apart = not self._same(whole, singles) or loss.kind == "float"
            if not self._same(whole, singles):
                self.fault(
                    "mean_inside",
                    "the value of an example changes with its neighbours in the batch, as where a "
                    "mean is hidden inside",
                )

    def _invariances(self) -> None:
        """What it is a function of: differences of log-ratios, or more."""
        loss, x = self.loss, self.probes
        value = loss.batch(x)
        if not np.isfinite(value).all():
            return
        moved = {"shift": np.array([1.0, 1.0, 0.0, 0.0])}
        if loss.takes_reference:
            moved["ratio"] = np.array([1.0, 0.5, 1.0, 0.5])
        for name, by in moved.items():
            self.deviations[name] = _deviation(value, loss.batch(x - by[:, None]))
        # Minus the difference, by a lower log-probability.
        far = 2 * self._difference(x)
        turned = x.copy()
        turned[0] -= np.maximum(far, 0)
        turned[1] -= np.maximum(-far, 0)
        swapped = loss.batch(x[[1, 0, 3, 2]])
        self.deviations["swap"] = _deviation(swapped, loss.batch(turned))
        loss.below_zero = not self._held("shift")
        if not self._held("shift"):
            self.note(
                "not_of_differences",
                "it depends on more than the difference of the policy's log-probabilities",
            )

    def _held(self, *names: str) -> bool:
        return all(self.deviations.get(name, math.inf) <= self.tolerance for name in names)

    def _difference(self, x: np.ndarray) -> np.ndarray:
        return x[0] - x[1] - (x[2] - x[3] if self.loss.takes_reference else 0)

    def _arguments(self) -> None:
        """Whether each argument counts, and the reference with the right sign."""
        loss, x = self.loss, self.probes
        value = loss.batch(x)
        if not loss.takes_reference:
            self.note("no_reference", "it takes no reference: nothing holds the policy to one")
        taken = range(4 if loss.takes_reference else 2)
        unused = [
            at
            for at in taken
            if self._same(value, loss.batch(x - np.outer(np.arange(4) == at, np.abs(x[at]))))
        ]
        if len(unused) == len(taken):
            self.fault("constant", "it is constant: no log-probability changes it")
        elif unused == [2, 3]:
            self.fault(
                "missing_reference",
                "the reference is missing: the reference's log-probabilities change nothing",
            )
        elif unused:
            names = " and ".join(ROLES[at] for at in unused)
            self.fault("unused", f"an argument is ignored: {names} changes nothing")
        elif loss.takes_reference and not self._held("ratio"):
            half = np.abs(x[2:]) / 2
            against = x + np.concatenate([-half, half])
            if self._same(value, loss.batch(against)):
                self.fault(
                    "reference_sign",
                    "the reference enters with the wrong sign, as where only its chosen and "
                    "rejected are swapped",
                )
            else:
                self.note("not_of_ratios", "it depends on more than log-ratios to the reference")

    def _beta(self) -> None:
        """Whether beta is used, and scales the difference of log-ratios once."""
        loss, beta = self.loss, self.beta
        if "beta" not in loss.settings:
            self.note("no_beta", f"it takes no beta: {beta:g} is what its optimum is compared with")
            return
        x = self.probes
        if self.has("constant"):
            return
        if self._same(loss.batch(x), loss.batch(x, beta=2 * beta)):
            self.fault("beta_unused", "beta is ignored: twice the beta changes nothing")
            return
        if not self._held(*({"shift", "ratio"} & set(self.deviations))):
            return
        power = self._power()
        if power == 2:
            self.fault(
                "beta_twice",
                "beta is applied twice: the loss at twice the beta is the loss of 4, not 2, times "
                "the difference of log-ratios",
            )
        elif power == 0:
            self.fault(
                "beta_outside",
                "beta does not scale the difference of log-ratios but the loss, whose optimum does "
                "not depend on it",
            )
        elif power is None:
            self.note(
                "beta_otherwise",
                "beta does more, or other, than scale the difference of log-ratios",
            )

    def _power(self) -> int | None:
        """Return k where the loss of Δ at 2β is that of 2^k Δ at β, up to scale and a constant."""
        grid = np.outer([1 / self.beta, 1 / self.beta**2], np.linspace(-6, 6, 13)).ravel()

        def loss_of(difference: np.ndarray, beta: float) -> np.ndarray:
            middle = -np.abs(difference) - 1
            x = np.stack([middle + difference / 2, middle - difference / 2, middle, middle])
            return self.loss.values(x, beta=beta)

        target = loss_of(grid, 2 * self.beta)
        for power in (1, 2, 0):
            base = np.stack([loss_of(2**power * grid, self.beta), np.ones_like(grid)], axis=1)
            finite = np.isfinite(base).all(axis=1) & np.isfinite(target)
            base, wanted = base[finite], target[finite]
            if not wanted.size or np.ptp(wanted) == 0:
                return 1  # there is nothing to scale
            scale = np.abs(base).max(axis=0)
            fit = np.linalg.lstsq(base / scale, wanted, rcond=None)[0]
            off = np.abs(base / scale @ fit - wanted).max()
            if fit[0] > 0 and off <= self.loss.unit_roundoff**0.5 * np.ptp(wanted):
                return power
        return None

    def _direction(self) -> None:
        """Whether it raises the chosen output, on the whole, at differences of either sign."""
        gain = np.concatenate([self._gain(self.probes), self._gain(self.probes[[1, 0, 3, 2]])])
        if np.isfinite(gain).all() and gain.sum() > 1e-6 * np.abs(gain).sum() > 0:
            self.fault(
                "swapped",
                "chosen and rejected are swapped, or its sign is wrong: it falls as the rejected "
                "output gains on the chosen one",
            )

    def _gain(self, x: np.ndarray) -> np.ndarray:
        """Return by how much the loss rises as the chosen output gains on the rejected one."""
        step = np.minimum(1 / self.beta, np.abs(x[:2])) / 100
        up = np.concatenate([step[:1], -step[1:], 0 * step])
        return np.atleast_1d(self.loss.batch(x + up) - self.loss.batch(x - up))

    def _option(self, name: str, values: list[Any]) -> None:
        """Whether each value of an option makes a difference."""
        found: list[tuple[Any, np.ndarray]] = []
        for value in values:
            try:
                found.append((value, self.loss.batch(self.probes, **{name: value})))
            except LossRaisedError as error:
                self.fault("raises", f"for {name}={value!r} it raises {error}")
        same = [(a, b) for (a, x), (b, y) in combinations(found, 2) if self._same(x, y)]
        if same:
            self.fault(
                "option_ignored",
                f"{name} is silently ignored: {name}={same[0][1]!r} gives what "
                f"{name}={same[0][0]!r} gives",
            )

    def _unknown_values(self) -> None:
        """Whether a text that no one has thought of is refused."""
        named = {n: p.default for n, p in self.loss.parameters.items() if n != "reduction"}
        texts = {n: v for n, v in (named | self.loss.settings).items() if isinstance(v, str)}
        for name, value in texts.items():
            try:
                answer = self.loss.batch(self.probes, **{name: _NO_VALUE})
            except LossRaisedError:
                continue  # as it should
            taken = f", and taken for {value!r}" if self._same(answer, self._usual()) else ""
            self.note("unknown_value", f"{name}={_NO_VALUE!r} is not refused{taken}")

    def _usual(self) -> np.ndarray:
        return self.loss.batch(self.probes)

    def _extremes(self, dtype: str) -> None:
        """Whether values and gradients stay finite, and the type is kept."""
        ends = [-_FAR, -1.0, -1e-3]
        x = np.stack(np.meshgrid(*[ends] * 4), axis=-1).reshape(-1, 4).T.astype(dtype)
        answer = self.loss.dtype(x)
        if answer != dtype and not self.has("dtype"):
            self.note("dtype", f"{dtype} log-probabilities come back as {answer}")
        if self.has("not_finite"):
            return
        what = {"value": self.loss.values(x)}
        if self.loss.has_gradient:
            what["gradient"] = self.loss.gradients(x)
        for of, numbers in what.items():
            bad = ~np.isfinite(np.atleast_2d(numbers)).all(axis=0)
            if bad.any():
                at = int(np.argmax(bad))
                first = np.atleast_2d(numbers)[:, at]
                value = first[~np.isfinite(first)][0]
                self.fault(
                    "not_finite",
                    f"its {of} is {value} where the log-ratios differ by "
                    f"{self._difference(x)[at]:.0f} nats, in {dtype}",
                )
                return

    def _derivatives(self) -> None:
        """Whether the gradient that training follows is that of the value."""
        loss, x = self.loss, self.probes
        if loss.detached:
            self.fault("detached", "torch's autograd finds no way from its value to the policy")
        sound = loss.smooth(x)
        if not loss.has_gradient or loss.unit_roundoff > 1e-6:
            return
        own, true = loss.gradients(x), loss.differences(x)
        if _deviation(own[:, sound], true[:, sound]) <= max(1e-3, self.tolerance):
            return
        lost = [ROLES[at] for at in range(2) if not own[at].any() and true[at].any()]
        if lost:
            self.fault("detached", f"no gradient reaches {' or '.join(lost)}, which it depends on")
        else:
            self.note("stopped_gradient", "its gradient is not that of its value")

    def _at_optimum(self) -> LossReport:
        """Find the optimum, say what it is, and put all together."""
        loss, beta = self.loss, self.beta
        log_ref = np.log(np.concatenate([_REFERENCE] * 2))
        # A reward of natural range; and, where β is small, one that leaves p* with some spread.
        reward = np.concatenate([_REWARD, _REWARD * min(beta, 1.0)])
        log_optimal = log_softmax(log_ref + reward / beta, axis=1)
        weights = np.stack(
            [expected_pairs(r, np.exp(q)) for r, q in zip(reward, log_ref, strict=True)]
        )
        bias, found = np.full(len(reward), np.nan), unknown(log_ref)

        def solve() -> None:
            nonlocal found, bias
            slope, length = expected_gradient(loss, weights, log_ref, log_optimal)
            bias = np.linalg.norm(slope, axis=1) / np.where(length > 0, length, 1.0)
            # Tangents are of its values, and so of use where training follows these.
            tangible = not (loss.has_gradient and self.has("detached", "stopped_gradient"))
            convex = tangible and self._held("shift")
            found = minimise(loss, weights, log_ref, beta, differences=convex)

        if not self.has("not_repeatable"):
            self._guarded("at its optimum", solve)
        pi = np.exp(found.log_policy)
        apart = np.where(pi > 0, pi * (found.log_policy - log_optimal), 0.0 * pi)
        slope, residual = fit_tilt(found.log_policy - log_ref, reward)
        report = LossReport(
            called_as=loss.called_as,
            kind=loss.kind,
            beta=beta,
            findings=(),
            log_reference=log_ref,
            reward=reward,
            log_optimal=log_optimal,
            log_policy=found.log_policy,
            status=found.status,
            last_step=found.last_step,
            total_variation=np.abs(pi - np.exp(log_optimal)).sum(axis=1) / 2,
            kl=np.maximum(apart.sum(axis=1), 0.0),
            implied_beta=1 / slope,
            tilt_residual=residual,
            gradient_bias=bias,
            deviations=self.deviations,
        )
        if not (report.reaches_optimum or self.has("not_repeatable")):
            self._otherwise(report)
        return replace(report, findings=tuple(sorted(self.findings, key=lambda f: f.level)))

    def _otherwise(self, report: LossReport) -> None:
        """Say what an optimum is that is not p*."""
        if np.any(report.status == OptimumStatus.NOT_UNIQUE):
            self.note("not_unique", "a set of policies is optimal, of which one is shown")
        if np.any(report.status > OptimumStatus.NOT_UNIQUE):
            worst = OptimumStatus(report.status.max())
            self.note("no_optimum", f"no optimum was found: {worst.message}")
            return
        if not report.is_tilt:
            slope, residual = fit_tilt(report.log_policy, report.reward)
            where = "no tilt of the reference by the reward, whatever the beta"
            if one_tilt(1 / slope, residual, report.last_step):
                where = f"e^(r/{1 / slope[0]:.6g})/Z, whatever the reference"
            self.note("not_optimal", f"its optimum is not p*: it is {where}")
            return
        beta, implied = self.beta, report.implied_beta[0]
        squared = abs(implied / beta**2 - 1) <= SAME_BETA
        if squared and "beta" not in self.loss.settings:
            self.fault(
                "beta_twice", f"beta is applied twice: its optimum is p* at {implied:.6g} = beta²"
            )
        elif not self.has("beta_twice", "swapped"):
            self.note(
                "other_beta",
                f"its optimum is p* at beta = {implied:.6g}, {implied / beta:.6g} times the beta "
                "given",
            )


def _probes(beta: float) -> np.ndarray:
    """Return ordinary log-probabilities, with differences of the order of 1, 1/β and 10/β."""
    x = -np.random.default_rng(0).uniform(0.05, 3, (4, 24))
    return x * np.resize([1.0, 1 / beta, 10 / beta], 24)


def _deviation(a: np.ndarray, b: np.ndarray) -> float:
    """Return by how much two arrays differ at most, relative to them."""
    if np.shape(a) != np.shape(b):
        return math.inf
    a, b = np.ravel(a), np.ravel(b)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    a, b = a[finite], b[finite]
    # Small values next to larger ones may be rounding.
    scale = np.maximum(np.abs(a), np.abs(b)) + 1e-3 * np.median(np.abs(a)) if a.size else a
    return float(np.max(np.abs(a - b) / np.where(scale > 0, scale, 1.0), initial=0.0))
