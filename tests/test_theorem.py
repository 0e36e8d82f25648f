"""Theorem 2: the counterexample, where it flips, and where the theorem is safe."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import jaxsim
from jaxsim import Family, Instance, Outcome, Rewards

TRIBONACCI = 1.8392867552141612  # e^{1/β} where the three-output example is a tie


def counterexample(beta: float) -> Instance:
    return Instance.from_probs([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], 0.5, beta)


def test_the_counterexample() -> None:
    """Mean reward 7/3; E_A r = 3 > 7/3 > E_U r = 2, yet e^3 < (1 + e^4)/2."""
    verdict = jaxsim.theorem2(counterexample(1.0))
    assert verdict.hypothesis_aligned == Outcome.HOLDS
    assert verdict.hypothesis_unaligned == Outcome.HOLDS
    assert verdict.conclusion == Outcome.FAILS
    assert bool(verdict.violated)
    shift = 3 - math.log((1 + math.exp(4)) / 2)
    assert float(verdict.log_odds_shift) == pytest.approx(shift, abs=1e-6)
    assert float(verdict.covariance_aligned) == pytest.approx((3 - 7 / 3) / 3, rel=1e-6)
    assert float(verdict.covariance_unaligned) == pytest.approx((2 - 7 / 3) / 3, rel=1e-6)


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 0.5, 0.999])
def test_it_fails_for_every_alpha(alpha: float) -> None:
    instance = Instance.from_probs([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], alpha, 1.0)
    e = jaxsim.evaluate(instance)
    odds = e.log_tpm_aligned - e.log_tpm_unaligned
    assert float(odds) < math.log(alpha / (1 - alpha))


def test_it_flips_at_the_tribonacci_constant() -> None:
    x = TRIBONACCI
    assert 1 + x**4 - 2 * x**3 == pytest.approx(0, abs=1e-13)
    crossing = 1 / math.log(x)
    assert crossing == pytest.approx(1.641017929928488, abs=1e-12)
    with jax.enable_x64(True):
        below, above = (jaxsim.theorem2(counterexample(crossing * (1 + s * 1e-9))) for s in (-1, 1))
        at = jaxsim.theorem2(counterexample(crossing))
    assert below.conclusion == Outcome.FAILS
    assert above.conclusion == Outcome.HOLDS
    assert abs(float(at.log_odds_shift)) < 1e-15
    assert at.conclusion == Outcome.UNDECIDED


@pytest.mark.parametrize("outputs", [2, 3, 32])
def test_binary_rewards_never_violate(outputs: int) -> None:
    family = Family(outputs=outputs, reward=Rewards(kind="binary"))
    verdict = jaxsim.theorem2(jaxsim.sample_instances(jax.random.key(1), family, 20_000))
    assert np.sum(verdict.hypotheses_hold) > 1000
    assert not np.any(verdict.violated)


def test_two_outputs_never_violate() -> None:
    verdict = jaxsim.theorem2(jaxsim.sample_instances(jax.random.key(1), Family(outputs=2), 20_000))
    assert np.sum(verdict.hypotheses_hold) > 1000
    assert not np.any(verdict.violated)


def test_ties() -> None:
    third = np.full(3, 1 / 3)
    constant = Instance.from_probs([0.2, 0.3, 0.5], [0.5, 0.4, 0.1], [2.0, 2.0, 2.0], 0.5, 1.0)
    uniform = Instance.from_probs(third, [0.5, 0.4, 0.1], [1.0, 2.0, 4.0], 0.5, 1.0)
    same = Instance.from_probs([0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [1.0, 2.0, 4.0], 0.5, 1.0)
    assert jaxsim.theorem2(constant).conclusion == Outcome.TIE
    assert jaxsim.theorem2(constant).hypothesis_aligned == Outcome.TIE
    assert jaxsim.theorem2(uniform).hypothesis_aligned == Outcome.TIE
    assert jaxsim.theorem2(uniform).hypothesis_unaligned == Outcome.HOLDS
    assert jaxsim.theorem2(same).conclusion == Outcome.TIE


def test_codes_are_int8() -> None:
    verdict = jaxsim.theorem2(counterexample(1.0))
    for code in (verdict.hypothesis_aligned, verdict.hypothesis_unaligned, verdict.conclusion):
        assert code.dtype == np.int8


def test_the_ladder_example_meets_the_conclusion_without_the_hypotheses() -> None:
    """Monotone likelihood ratio implies TPM(A) ≥ α, but not the paper's hypotheses."""
    instance = Instance.from_probs([0.05, 0.25, 0.7], [0.1, 0.3, 0.6], [0.0, 1.0, 2.0], 0.5, 0.7)
    verdict = jaxsim.theorem2(instance)
    assert verdict.conclusion == Outcome.HOLDS
    assert verdict.hypothesis_unaligned == Outcome.FAILS
