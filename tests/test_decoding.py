"""Best of n samples, against exact counting and sampling in plain Python."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf

from jaxsim import Instance, best_of_n, evaluate, kl_divergence


def reference_of(instance: Instance) -> np.ndarray:
    a, u = np.exp(instance.log_p_aligned), np.exp(instance.log_p_unaligned)
    alpha = 1 / (1 + np.exp(-np.asarray(instance.logit_alpha, np.float64)))[..., None]
    return alpha * a + (1 - alpha) * u


def counted(p: list[Fraction], r: list[float], n: int) -> list[Fraction]:
    """Draw all lists of n outputs; a tie for the best goes by shares of draws."""
    out = [Fraction(0)] * len(p)
    for drawn in product(range(len(p)), repeat=n):
        chance = Fraction(1)
        for y in drawn:
            chance *= p[y]
        best = max(r[y] for y in drawn)
        winners = [y for y in drawn if r[y] == best]
        for y in winners:
            out[y] += chance / len(winners)
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("r", [[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
def test_it_is_what_counting_gives(n: int, r: list[float]) -> None:
    p = [Fraction(k, 10) for k in (1, 2, 3, 4)]
    instance = Instance.from_probs([float(x) for x in p], [float(x) for x in p], r, 0.5, 1.0)
    found = np.exp(np.asarray(best_of_n(instance, n), np.float64))
    expected = [float(x) for x in counted(p, r, n)]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def exactly(p: np.ndarray, r: np.ndarray, n: float) -> list[Any]:
    mp.dps = 60
    mass = [mpf(float(x)) for x in p]
    whole = sum(mass)
    out = []
    for y in range(len(p)):
        below = sum((m for m, x in zip(mass, r, strict=True) if x < r[y]), mpf(0)) / whole
        level = sum((m for m, x in zip(mass, r, strict=True) if x == r[y]), mpf(0)) / whole
        out.append(mass[y] / whole / level * ((below + level) ** n - below**n))
    return out


@pytest.mark.parametrize("n", [1, 4, 1000, 2.5])
def test_it_is_accurate_in_float64(n: float) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, u = rng.dirichlet(np.full(9, 0.3), (2, 20))
        r = rng.integers(0, 6, (20, 9)).astype(float)
        instance = Instance.from_probs(a, u, r, np.full(20, 0.4), np.ones(20))
        found = np.asarray(best_of_n(instance, n))
        p = reference_of(instance)
    for row in range(20):
        for y, true in enumerate(exactly(p[row], r[row], n)):
            if true > 0:
                error = abs(mp.log(true) - mpf(float(found[row, y])))
                assert error <= 1e-14 * (n + abs(mp.log(true)))


def test_its_divergence_is_bounded_and_more_samples_gain() -> None:
    rng = np.random.default_rng(1)
    a, u = rng.dirichlet(np.ones(16), (2, 200)).astype(np.float32)
    r = rng.normal(size=(200, 16)).astype(np.float32)
    alpha, beta = np.full(200, 0.5, np.float32), np.ones(200, np.float32)
    instance = Instance.from_probs(a, u, r, alpha, beta)
    log_ref = np.log(reference_of(instance))
    gained = np.full(200, -np.inf)
    for n in (1, 2, 8, 64):
        log_policy = best_of_n(instance, n)
        kl = np.asarray(kl_divergence(log_policy, jnp.asarray(log_ref, jnp.float32)))
        assert np.all(kl <= np.log(n) - (n - 1) / n + 1e-5)
        mean = np.sum(np.exp(log_policy) * r, axis=1)
        assert np.all(mean > gained - 1e-6)
        gained = mean
        np.testing.assert_allclose(np.exp(log_policy).sum(axis=1), 1, rtol=1e-5)
    # No policy gains more at its divergence than eq. (1)'s optima do.
    assert np.all(gained <= r.max(axis=1) + 1e-6)


def test_padding_is_no_output_and_a_batch_is_its_rows() -> None:
    wide = Instance.from_probs([[0.5, 0.5, 0.0]], [[0.25, 0.75, 0.0]], [[0.0, 1.0, 9.0]], 0.5, 1.0)
    one = Instance.from_probs([0.5, 0.5], [0.25, 0.75], [0.0, 1.0], 0.5, 1.0)
    found = best_of_n(wide, 3)[0]
    assert float(found[2]) == -np.inf
    np.testing.assert_allclose(found[:2], best_of_n(one, 3), rtol=1e-6)
    np.testing.assert_allclose(best_of_n(one, 1), np.log(reference_of(one)), rtol=1e-6)


def test_under_jit_and_grad() -> None:
    instance = Instance.from_probs([0.5, 0.5], [0.25, 0.75], [0.0, 1.0], 0.5, 1.0)
    assert float(evaluate(instance).kl) > 0
    eager = best_of_n(instance, 4)
    np.testing.assert_array_equal(jax.jit(best_of_n)(instance, 4), eager)
    slope = jax.grad(lambda n: jnp.exp(best_of_n(instance, n))[1])(4.0)
    p = reference_of(instance)[0]
    assert float(slope) == pytest.approx(-(p**4) * np.log(p), rel=1e-5)


@pytest.mark.parametrize("n", [0, -1, float("nan"), float("inf"), [2, 3]])
def test_a_bad_n_is_named(n: Any) -> None:
    instance = Instance.from_probs([0.5, 0.5], [0.25, 0.75], [0.0, 1.0], 0.5, 1.0)
    with pytest.raises(ValueError, match="expected one number >= 1"):
        best_of_n(instance, n)
