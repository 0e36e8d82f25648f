"""A policy measured against eq. (1)'s optima, by SciPy's root finder and optimiser."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.optimize import brentq

from jaxsim import Instance, best_of_n, measure_policy, optimal_policy


def tilted(p: np.ndarray, r: np.ndarray, s: float) -> np.ndarray:
    w = np.log(p) + s * (r - r.max())
    w = np.exp(w - w.max())
    return w / w.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.fixture
def batch():
    rng = np.random.default_rng(4)
    a, u = rng.dirichlet(np.ones(6), (2, 30))
    r, alpha = rng.normal(size=(30, 6)), rng.uniform(0.1, 0.9, 30)
    with jax.enable_x64(True):
        instance = Instance.from_probs(a, u, r, alpha, np.exp(rng.uniform(-2, 2, 30)))
    reference = alpha[:, None] * a + (1 - alpha[:, None]) * u
    return instance, reference, alpha[:, None] * a / reference, rng.dirichlet(np.ones(6), 30)


def test_measures_of_any_policy(batch) -> None:
    instance, reference, share, policy = batch
    r, beta = np.asarray(instance.reward), np.asarray(instance.beta)
    found = measure_policy(np.log(policy), instance)
    for at in range(30):
        p, pi = reference[at], policy[at]
        star = tilted(p, r[at], 1 / beta[at])
        assert found.tv[at] == pytest.approx(np.abs(pi - star).sum() / 2, rel=1e-9)
        assert found.kl[at] == pytest.approx(kl(pi, star), rel=1e-9)
        cost = kl(pi, p)
        assert found.kl_reference[at] == pytest.approx(cost, rel=1e-9)
        assert found.expected_reward[at] == pytest.approx(pi @ r[at], rel=1e-9)
        assert found.tpm_aligned[at] == pytest.approx(pi @ share[at], rel=1e-9)
        assert found.tpm_aligned_optimum[at] == pytest.approx(star @ share[at], rel=1e-9)
        furthest = -np.log(p[r[at].argmax()])
        if cost >= furthest:
            assert found.implied_beta[at] == 0
            assert found.regret[at] == pytest.approx(r[at].max() - pi @ r[at], rel=1e-9)
            continue
        s = brentq(
            lambda s, p=p, at=at, cost=cost: kl(tilted(p, r[at], s), p) - cost, 0, 1e4, xtol=1e-14
        )
        assert found.implied_beta[at] == pytest.approx(1 / s, rel=1e-6)
        regret = tilted(p, r[at], s) @ r[at] - pi @ r[at]
        assert regret > 0 and found.regret[at] == pytest.approx(regret, rel=1e-6)
    assert np.sum(found.implied_beta > 0) > 20


def test_the_optimum_itself_and_the_reference(batch) -> None:
    instance, reference, *_ = batch
    with jax.enable_x64(True):
        star = np.asarray(optimal_policy(instance))
    found = measure_policy(star, instance)
    assert found.tv.max() < 1e-14 and found.kl.max() < 1e-14 and found.regret.max() < 1e-12
    np.testing.assert_allclose(found.implied_beta, instance.beta, rtol=1e-6)
    start = measure_policy(np.log(reference), instance)
    np.testing.assert_allclose(start.tpm_aligned, np.asarray(instance.alpha), rtol=1e-12)
    assert np.all(start.implied_beta > 1e5)


def test_best_of_n_earns_no_more_than_the_frontier(batch) -> None:
    instance = batch[0]
    with jax.enable_x64(True):
        for n in (2, 8, 64):
            found = measure_policy(np.asarray(best_of_n(instance, n)), instance)
            assert np.all(found.regret >= 0) and found.regret.max() > 0


def test_no_mass_outside_and_nan_rows() -> None:
    instance = Instance.from_probs(
        [[1.0, 0.0, 0.0]] * 2, [[0.5, 0.5, 0.0]] * 2, [[0.0, 1.0, 5.0]] * 2, 0.5, 1.0
    )
    with np.errstate(divide="ignore"):
        policy = np.log([[0.0, 1.0, 0.0], [np.nan] * 3])
    found = measure_policy(policy, instance)
    assert found.implied_beta[0] == 0 and found.tpm_aligned[0] == 0 and found.regret[0] == 0
    assert found.kl_reference[0] == pytest.approx(np.log(4))
    for values in vars(found).values():
        assert np.isfinite(values[0])
    assert np.isnan(found.tv[1]) and np.isnan(found.regret[1]) and np.isnan(found.kl[1])
    outside = measure_policy(np.log([[0.3, 0.3, 0.4]] * 2), instance)
    assert np.isposinf(outside.kl[0]) and outside.tpm_aligned[0] < 0.6


def test_shapes_are_checked() -> None:
    instance = Instance.from_probs([0.5, 0.5], [0.5, 0.5], [0.0, 1.0], 0.5, 1.0)
    with pytest.raises(ValueError, match=r"log_policy has shape \(3,\)"):
        measure_policy(np.zeros(3), instance)
