"""A check of losses: correct ones pass in every library, each fault is named, notes are true."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax

import jaxsim
from jaxsim import LossReport, OptimumStatus, check_loss
from tests.commandline import call

Numbers = Any


def dpo(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return np.logaddexp(0, -beta * ((pc - pr) - (rc - rr)))


def jax_dpo(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return jnp.logaddexp(0.0, -beta * ((pc - pr) - (rc - rr)))


def float_dpo(pc: float, pr: float, rc: float, rr: float, beta: float) -> float:
    z = beta * ((pc - pr) - (rc - rr))
    return math.log1p(math.exp(-abs(z))) + max(-z, 0.0)


def torch_dpo(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    import torch

    return -torch.nn.functional.logsigmoid(beta * ((pc - pr) - (rc - rr)))


def names(report: LossReport, level: str) -> list[str]:
    return [finding.name for finding in report.findings if finding.level == level]


@pytest.mark.parametrize(
    ("loss", "beta"),
    [
        *((loss, beta) for loss in (dpo, jax_dpo) for beta in (0.02, 0.1, 1.0, 5.0)),
        *((loss, 0.2) for loss in (jaxsim.dpo_loss, torch_dpo, float_dpo)),
    ],
)
def test_correct_dpo_passes_in_every_library(loss: Callable[..., Any], beta: float) -> None:
    if loss is torch_dpo:
        pytest.importorskip("torch")
    report = check_loss(loss, beta=beta)
    assert report.findings == () and report.passed and report.reaches_optimum and report.is_tilt
    assert report.kind == {dpo: "numpy", float_dpo: "float", torch_dpo: "torch"}.get(loss, "jax")
    assert (report.status == OptimumStatus.FOUND).all()
    assert report.total_variation.max() < 1e-9 and report.kl.max() < 1e-9
    assert report.gradient_bias.max() < 1e-9
    np.testing.assert_allclose(report.implied_beta, beta, rtol=1e-9)
    np.testing.assert_allclose(
        report.log_optimal, log_softmax(report.log_reference + report.reward / beta, axis=1)
    )
    # p* has some spread on half of the instances.
    assert (np.exp(report.log_optimal).max(axis=1) < 0.9).sum() >= 2
    assert set(report.deviations) == {"neighbours", "shift", "ratio", "swap"}
    assert max(report.deviations.values()) < 1e-9


# Each of them would be DPO, but for one thing.


def beta_twice(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    chosen_rewards, rejected_rewards = beta * (pc - rc), beta * (pr - rr)
    return np.logaddexp(0, -beta * (chosen_rewards - rejected_rewards))


def beta_squared_margin(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return ((pc - pr) - (rc - rr) - 1 / (2 * beta * beta)) ** 2


def beta_twice_in_hinge(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return np.maximum(0, 1 - beta * (beta * ((pc - pr) - (rc - rr))))


def beta_ignored(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return dpo(pc, pr, rc, rr, 0.1)


def beta_outside(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return beta * dpo(pc, pr, rc, rr, 1.0)


def swapped(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return dpo(pr, pc, rr, rc, beta)


def swapped_ipo(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return ((pr - pc) - (rr - rc) - 1 / (2 * beta)) ** 2


def swapped_hinge(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return np.maximum(0, 1 + beta * ((pc - pr) - (rc - rr)))


def wrong_sign(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return -dpo(pc, pr, rc, rr, beta)


def reference_swapped(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return dpo(pc, pr, rr, rc, beta)


def no_reference(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return np.logaddexp(0, -beta * (pc - pr))


def half_a_reference(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return np.logaddexp(0, -beta * (pc - rc - pr))


def mean(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return dpo(pc, pr, rc, rr, beta).mean()


def jax_mean(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return jax_dpo(pc, pr, rc, rr, beta).mean()


def mean_in_shape(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return np.full_like(pc, dpo(pc, pr, rc, rr, beta).mean())


def mean_subtracted(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    z = beta * ((pc - pr) - (rc - rr))
    return jnp.logaddexp(0.0, -(z - 0.5 * z.mean()))


def crossed(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return dpo(pc[:, None], pr, rc[:, None], rr, beta)


def constant(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return np.ones_like(pc)


def overflows(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return -np.log(1 / (1 + np.exp(-beta * ((pc - pr) - (rc - rr)))))


def gradient_overflows(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    z = beta * ((pc - pr) - (rc - rr))
    return jnp.where(z > -30, jnp.log1p(jnp.exp(-z)), -z)


def stopped(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return jax_dpo(jax.lax.stop_gradient(pc), pr, rc, rr, beta)


def random(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
    return dpo(pc, pr, rc, rr, beta) * np.random.default_rng().uniform(0.9, 1.1, pc.shape)


FAULTY = [
    (beta_twice, "beta_twice", "beta is applied twice"),
    (beta_squared_margin, "beta_twice", "beta is applied twice"),
    (beta_twice_in_hinge, "beta_twice", "beta is applied twice"),
    (beta_ignored, "beta_unused", "beta is ignored"),
    (beta_outside, "beta_outside", "beta does not scale the difference"),
    (swapped, "swapped", "chosen and rejected are swapped"),
    (swapped_ipo, "swapped", "chosen and rejected are swapped"),
    (swapped_hinge, "swapped", "chosen and rejected are swapped"),
    (wrong_sign, "swapped", "or its sign is wrong"),
    (reference_swapped, "reference_sign", "the reference enters with the wrong sign"),
    (no_reference, "missing_reference", "the reference is missing"),
    (half_a_reference, "unused", "reference_rejected_logps changes nothing"),
    (mean, "mean_inside", "a mean or sum is hidden inside"),
    (jax_mean, "mean_inside", "a mean or sum is hidden inside"),
    (mean_in_shape, "mean_inside", "a mean is hidden inside"),
    (mean_subtracted, "mean_inside", "a mean is hidden inside"),
    (crossed, "shape", "it returns shape (24, 24) for 24 examples"),
    (constant, "constant", "it is constant"),
    (overflows, "not_finite", "its value is inf where the log-ratios differ by -9999 nats"),
    (gradient_overflows, "not_finite", "its gradient is nan"),
    (stopped, "detached", "no gradient reaches policy_chosen_logps"),
    (random, "not_repeatable", "called twice it gives two answers"),
]


@pytest.mark.parametrize(("loss", "name", "said"), FAULTY, ids=[f[0].__name__ for f in FAULTY])
def test_a_fault_is_named_in_one_sentence(loss: Callable[..., Any], name: str, said: str) -> None:
    report = check_loss(loss, beta=0.2)
    assert names(report, "fault") == [name] and not report.passed
    [fault] = report.faults
    assert said in fault.text and "\n" not in fault.text
    assert str(fault) in str(report) and str(report).endswith("\n1 fault found")


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0, 4.0])
def test_beta_twice_and_swapped_are_found_at_any_beta(beta: float) -> None:
    twice = check_loss(beta_twice, beta=beta)
    assert names(twice, "fault") == ["beta_twice"] and twice.is_tilt
    np.testing.assert_allclose(twice.implied_beta, beta**2, rtol=1e-6)
    turned = check_loss(swapped, beta=beta)
    assert names(turned, "fault") == ["swapped"] and turned.is_tilt
    np.testing.assert_allclose(turned.implied_beta, -beta, rtol=1e-6)
    assert names(check_loss(beta_twice_in_hinge, beta=beta), "fault") == ["beta_twice"]


def test_beta_twice_within_a_loss_that_takes_none() -> None:
    report = check_loss(lambda pc, pr, rc, rr: beta_twice(pc, pr, rc, rr, 0.3), beta=0.3)
    assert names(report, "fault") == ["beta_twice"]
    assert "p* at 0.09 = beta²" in report.faults[0].text


def test_faults_that_leave_single_examples_alone_leave_the_optimum() -> None:
    for loss in (jax_mean, crossed, overflows):
        assert check_loss(loss).reaches_optimum


def test_p_star_at_another_beta_is_told_from_no_tilt() -> None:
    double = check_loss(lambda pc, pr, rc, rr, beta: dpo(pc, pr, rc, rr, 2 * beta), beta=0.3)
    assert double.passed and names(double, "note") == ["other_beta"] and double.is_tilt
    np.testing.assert_allclose(double.implied_beta, 0.6, rtol=1e-9)
    assert not double.reaches_optimum
    assert "p* at beta = 0.6, 2 times the beta given" in double.findings[0].text
    ipo = check_loss(jaxsim.ipo_loss, beta=0.3)
    assert not ipo.is_tilt and ipo.tilt_residual.max() > 0.01


def test_torch_losses_are_followed_by_autograd() -> None:
    pytest.importorskip("torch")

    def detached(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
        return torch_dpo(pc, pr, rc, rr, beta).detach()

    def half(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
        return torch_dpo(pc, pr.detach(), rc, rr, beta)

    def trl(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
        losses = torch_dpo(pc, pr, rc, rr, beta)
        return losses.mean(), beta * (pc - rc).detach(), beta * (pr - rr).detach()

    assert "autograd finds no way" in check_loss(detached).faults[0].text
    assert "no gradient reaches policy_rejected_logps" in check_loss(half).faults[0].text
    assert names(check_loss(trl), "fault") == ["mean_inside"]
    assert check_loss(trl, reduction="mean").findings == ()
    float32 = check_loss(lambda *x, beta: torch_dpo(*(y.float() for y in x), beta=beta), beta=0.5)
    assert float32.passed and float32.reaches_optimum and names(float32, "note") == ["dtype"]


# Where losses go that are no faults, from their own formulas.


def test_ipo_goes_to_win_rates() -> None:
    report = check_loss(jaxsim.ipo_loss, beta=0.1)
    assert report.passed and names(report, "note") == ["not_optimal"]
    for r, log_ref, found in zip(
        report.reward, report.log_reference, report.log_policy, strict=True
    ):
        wins = expit(r[:, None] - r) @ np.exp(log_ref)
        np.testing.assert_allclose(found, log_softmax(log_ref + wins / 0.1), atol=1e-8)


@pytest.mark.parametrize("loss", [jaxsim.hinge_loss, swapped_hinge])
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_hinge_goes_to_whole_margins(loss: Callable[..., Any], beta: float) -> None:
    """As the linear programme of `population_optimum` says; swapped, for rewards turned around."""
    report = check_loss(loss, beta=beta)
    sign = -1 if loss is swapped_hinge else 1
    instance = jaxsim.Instance.from_reference(
        report.log_reference,
        np.full(report.reward.shape, 0.5),
        sign * report.reward,
        np.full(len(report.reward), beta),
    )
    margins = jaxsim.population_optimum("hinge", instance)
    assert (margins.status == report.status).all() and (report.status == 0).all()
    np.testing.assert_allclose(report.log_policy, margins.log_policy, atol=1e-5 / beta)
    if sign > 0:
        assert report.passed and names(report, "note") == ["not_optimal"]


def test_simpo_goes_to_a_tilt_of_nothing() -> None:
    report = check_loss(jaxsim.simpo_loss, beta=0.5)
    assert report.passed and names(report, "note") == ["no_reference", "not_optimal"]
    assert "e^(r/0.5)/Z, whatever the reference" in report.findings[-1].text
    np.testing.assert_allclose(
        report.log_policy, log_softmax(report.reward / 0.5, axis=1), atol=1e-7
    )
    margin = check_loss(jaxsim.simpo_loss, beta=0.5, options={"gamma": 1.0})
    assert margin.passed and "no tilt" in margin.findings[-1].text


def test_orpo_goes_to_the_minimum_of_its_expectation() -> None:
    report = check_loss(jaxsim.orpo_loss, beta=0.4)
    assert report.passed
    assert names(report, "note") == ["not_of_differences", "no_reference", "not_optimal"]
    for r, log_ref, found in zip(
        report.reward, report.log_reference, report.log_policy, strict=True
    ):
        mu = np.exp(log_ref)
        wins = expit(r[:, None] - r) * mu[:, None] * mu * (1 - np.eye(4))
        wins = wins / wins.sum()

        def expected(logits: np.ndarray, wins: np.ndarray = wins) -> float:
            log_pi = log_softmax(logits)
            odds = log_pi - np.log(-np.expm1(log_pi))
            losses = -log_pi[:, None] - 0.4 * log_expit(odds[:, None] - odds)
            return float(np.sum(wins * losses))

        best = minimize(expected, log_ref, tol=1e-12)
        assert expected(found) <= best.fun + 1e-12
        np.testing.assert_allclose(found, log_softmax(best.x), atol=1e-4)


def test_losses_without_a_minimum_are_told() -> None:
    linear = check_loss(lambda pc, pr, rc, rr, beta: -beta * ((pc - pr) - (rc - rr)))
    assert linear.passed and (linear.status == OptimumStatus.UNBOUNDED).all()
    assert "no lower bound" in str(linear) and np.isnan(linear.log_policy).all()
    robust = check_loss(jaxsim.robust_dpo_loss, options={"label_smoothing": 0.1})
    # Unbounded where an output loses more rarely than labels are assumed to be flipped.
    rarest = expit(robust.reward.min(axis=1) - robust.reward.max(axis=1))
    assert (robust.status[rarest > 0.1] == OptimumStatus.FOUND).all()
    assert (robust.status == OptimumStatus.UNBOUNDED).any() and robust.passed


def test_properties_are_notes() -> None:
    slic = check_loss(jaxsim.slic_loss, options={"margin": 1.0})
    assert slic.passed and names(slic, "note") == ["no_reference", "no_beta", "not_optimal"]
    exo = check_loss(jaxsim.exo_loss)
    assert exo.passed and names(exo, "note") == ["not_optimal"]
    smoothed = check_loss(jaxsim.dpo_loss, options={"label_smoothing": [0.2, 0.1]})
    assert smoothed.passed and names(smoothed, "note") == ["not_optimal"]
    single = check_loss(lambda *x, beta: dpo(*x, beta).astype(np.float32), beta=0.5)
    assert single.passed and single.reaches_optimum and names(single, "note") == ["dtype"]
    both = check_loss(lambda *x, beta: jax_dpo(*x, beta) - x[0])  # a supervised term too
    assert both.passed and names(both, "note")[:2] == ["not_of_differences", "not_of_ratios"]


# How losses are called.


def by_trl_names(
    self: Any,
    chosen_logps: Numbers,
    rejected_logps: Numbers,
    ref_chosen_logps: Numbers,
    ref_rejected_logps: Numbers,
    loss_type: str = "sigmoid",
) -> Numbers:
    if loss_type not in ("sigmoid", "hinge"):
        raise ValueError(f"Unknown loss type: {loss_type}")
    z = self.beta * ((chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps))
    losses = np.logaddexp(0, -z) if loss_type == "sigmoid" else np.maximum(0, 1 - z)
    return losses, self.beta * (chosen_logps - ref_chosen_logps), rejected_logps


class Trainer:
    beta = 0.1
    dpo_loss = by_trl_names


def by_other_order(
    reference_rejected_logps: Numbers,
    policy_rejected_logps: Numbers,
    reference_chosen_logps: Numbers,
    policy_chosen_logps: Numbers,
    *args: Any,
    beta: float,
) -> Numbers:
    return dpo(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )


def with_reduction(
    pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float = 0.5, reduction: str = "mean"
) -> Numbers:
    losses = dpo(pc, pr, rc, rr, beta)
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]


class Module:
    """As a torch module: what is called says nothing of its arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        policy_chosen_logps: Numbers,
        policy_rejected_logps: Numbers,
        ref_chosen_logps: Numbers,
        ref_rejected_logps: Numbers,
        beta: float,
    ) -> Numbers:
        return dpo(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        )


CALLED: list[tuple[Callable[..., Any], str]] = [
    (Trainer().dpo_loss, "chosen_logps=…, rejected_logps=…, ref_chosen_logps=…, ref_rejected"),
    (by_other_order, "policy_chosen_logps=…, policy_rejected_logps=…, reference_chosen_logps=…"),
    (with_reduction, "(…, …, …, …, beta=0.1, reduction='none')"),
    (Module(), "Module(policy_chosen_logps=…"),
    (functools.partial(jaxsim.dpo_loss, beta=7.0), "dpo_loss(policy_chosen_logps=…"),
    (lambda *arrays: dpo(*arrays, beta=0.1), "(…, …, …, …)"),
    (lambda a, b, c, d, **settings: dpo(a, b, c, d, settings["beta"]), "(…, …, …, …, beta=0.1)"),
    (lambda a, b, c, d, /, beta: {"loss": dpo(a, b, c, d, beta)}, "(…, …, …, …, beta=0.1)"),
    (lambda a, b, c, d, beta: SimpleNamespace(losses=dpo(a, b, c, d, beta)), "beta=0.1"),
    (lambda a, b, c, d, beta: SimpleNamespace(loss=jax_dpo(a, b, c, d, beta)), "beta=0.1"),
]


@pytest.mark.parametrize(("loss", "said"), CALLED)
def test_losses_are_called_in_their_own_way(loss: Callable[..., Any], said: str) -> None:
    report = check_loss(loss, beta=0.1)
    assert report.passed and report.reaches_optimum, report
    assert said in report.called_as


def test_a_declared_reduction_is_no_fault() -> None:
    assert check_loss(with_reduction, reduction="sum").findings == ()
    assert check_loss(jax_mean, reduction="mean").findings == ()
    assert names(check_loss(jax_mean, reduction="sum"), "fault") == ["reduction"]
    assert names(check_loss(jax_dpo, reduction="mean"), "fault") == ["reduction"]


def test_options_must_each_make_a_difference() -> None:
    good = check_loss(Trainer().dpo_loss, options={"loss_type": ["sigmoid", "hinge"]})
    assert good.passed and good.reaches_optimum and names(good, "note") == ["no_beta"]
    hinge = check_loss(Trainer().dpo_loss, options={"loss_type": "hinge"})
    assert hinge.passed and not hinge.reaches_optimum

    def ignores(pc, pr, rc, rr, beta, loss_type="sigmoid", gamma=0.0):  # type: ignore[no-untyped-def]
        return dpo(pc, pr, rc, rr, beta)

    bad = check_loss(ignores, options={"loss_type": ["sigmoid", "ipo"], "gamma": [0.0, 1.0]})
    assert names(bad, "fault") == ["option_ignored"] * 2
    assert "loss_type='ipo' gives what loss_type='sigmoid' gives" in bad.faults[0].text
    assert "'no such value' is not refused, and taken for 'sigmoid'" in str(bad)
    assert names(check_loss(ignores), "note") == ["unknown_value"]
    raising = check_loss(Trainer().dpo_loss, options={"loss_type": ["sigmoid", "ipo"]})
    assert names(raising, "fault") == ["raises"]
    assert raising.faults[0].text.endswith(
        "for loss_type='ipo' it raises ValueError: Unknown loss type: ipo"
    )


def test_what_a_loss_raises_is_told() -> None:
    def careless(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
        if np.abs(pc).max() > 9999:
            raise ArithmeticError("too far")
        return dpo(pc, pr, rc, rr, beta)

    report = check_loss(careless)
    assert names(report, "fault") == ["raises", "raises"]  # in float32 and in float64
    assert "log-ratios of 10000 nats, in float32 it raises ArithmeticError: too far" in str(report)
    assert report.reaches_optimum

    def broken(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers, beta: float) -> Numbers:
        return {}["weights"]

    with pytest.raises(ValueError, match=r"broken fails, called as .*: KeyError: 'weights'") as e:
        check_loss(broken)
    assert isinstance(e.value.__cause__, KeyError)


def three(a: Numbers, b: Numbers, c: Numbers) -> Numbers:
    return a - b - c


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss_fn": three}, r"three takes \(a, b, c\); expected a loss of pairs"),
        ({"loss_fn": jaxsim.kto_loss}, "kto_loss takes .* expected a loss of pairs"),
        ({"loss_fn": jaxsim.slic_loss}, "slic_loss needs 'margin'"),
        ({"loss_fn": dpo, "options": {"gamma": 1}}, "dpo has no parameter 'gamma'"),
        ({"loss_fn": dpo, "options": {"gamma": []}}, "no value of 'gamma'"),
        ({"loss_fn": dpo, "options": {"beta": 1}}, "beta has an argument of its own"),
        ({"loss_fn": dpo, "beta": 0.0}, "beta is 0.0; expected a number > 0"),
        ({"loss_fn": dpo, "beta": math.nan}, "beta is nan"),
        ({"loss_fn": dpo, "reduction": "max"}, "reduction is 'max'"),
        ({"loss_fn": lambda a, b, c, d: None}, "fails, called as"),
        ({"loss_fn": lambda a, b, c, d: "text"}, "fails, called as"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_loss(**arguments)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a function, got int"):
        check_loss(3)  # type: ignore[arg-type]


def test_the_report_reads() -> None:
    lines = str(check_loss(jaxsim.ipo_loss)).splitlines()
    first = [line.split("  ")[0] for line in lines]
    assert first[:5] == ["loss", "optimum", "implied beta", "gradient bias", "invariances"]
    assert lines[1].split("  ")[-1].startswith("not p*: TV to p* at most ")
    assert lines[5].startswith("for example, instance")
    assert [line.split()[0] for line in lines[6:11]] == [
        *("p_ref", "reward", "p*", "policy", "log-ratio"),
    ]
    assert lines[11].startswith("note: its optimum is not p*")
    assert lines[12] == "no faults found"


# The command line.


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of losses in the current directory, which leaves a trace of being imported."""
    (tmp_path / "some_losses.py").write_text(
        "import pathlib\n"
        "import numpy as np\n"
        "pathlib.Path('imported').touch()\n"
        "number = 3\n"
        "def dpo(pc, pr, rc, rr, beta=0.1, loss_type='sigmoid', label_smoothing=0.0):\n"
        "    z = beta * ((pc - pr) - (rc - rr))\n"
        "    e = label_smoothing\n"
        "    return (1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)\n"
        "class Losses:\n"
        "    dpo = staticmethod(dpo)\n"
    )
    (tmp_path / "broken_losses.py").write_text("import sys\nsys.exit('not\\nnow')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("some_losses", "broken_losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_nothing_is_imported_unless_allowed(
    losses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("check-loss", "some_losses:dpo") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == (
        "jaxsim: to check some_losses:dpo imports some_losses, which runs its code; allow it with "
        "--allow-import\n"
    )
    assert not (losses / "imported").exists()


def test_exit_codes_tell_faults(losses: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check-loss", "some_losses:Losses.dpo", "--allow-import", "--beta", "0.5"]
    assert call(*command) == 0
    assert (losses / "imported").exists()
    shown = capsys.readouterr()
    assert "beta=0.5" in shown.out and shown.out.endswith("no faults found\n") and shown.err == ""
    assert call(*command, "--option", "label_smoothing=0.2", "--reduction", "none") == 0
    assert "not p*" in capsys.readouterr().out
    assert call(*command, "--option", "loss_type=sigmoid", "--option", "loss_type=ipo") == 1
    assert "fault: loss_type is silently ignored" in capsys.readouterr().out
    assert call(*command, "--reduction", "mean") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["some_losses"], "'some_losses' is no function; expected MODULE:FUNCTION"),
        (["some_losses:"], "'some_losses:' is no function"),
        (["some losses:dpo"], "'some losses:dpo' is no function"),
        (["no_such:dpo"], "no_such cannot be imported: ModuleNotFoundError: No module named"),
        (["broken_losses:dpo"], "broken_losses cannot be imported: SystemExit: not now"),
        (["some_losses:ipo"], "some_losses:ipo: there is no ipo in some_losses"),
        (["some_losses:number"], "some_losses:number cannot be called"),
        (["some_losses:dpo", "--beta", "0"], "beta is 0.0; expected a number > 0"),
        (["some_losses:dpo", "--option", "x"], "option is 'x'; expected NAME=VALUE"),
        (["some_losses:dpo", "--option", "x=1"], "dpo has no parameter 'x'"),
    ],
)
def test_bad_commands_are_told_in_one_sentence(
    arguments: list[str], said: str, losses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("check-loss", *arguments, "--allow-import") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("jaxsim: ") and shown.err.count("\n") == 1
    assert said in shown.err


def test_help_and_refusals_load_no_jax() -> None:
    code = (
        "import sys; from jaxsim.cli import main\n"
        "main(['check-loss', 'a:b'])\n"
        "try: main(['check-loss', '--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.endswith("LOADED False\n") and "--allow-import" in done.stdout
