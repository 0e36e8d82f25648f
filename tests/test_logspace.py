"""The numerics that every module builds on, against mpmath, fractions and `math.fsum`."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf

from jaxsim import kl_divergence
from jaxsim.logspace import bregman_kl_term, first_where, total, two_sum, unit_roundoff

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
WIDTH = 16
divergence = jax.jit(kl_divergence)


def exact_kl(log_p: np.ndarray, log_q: np.ndarray) -> mpf:
    """KL of the stored numbers, unnormalised as they are: Σ p log(p/q) - p + q."""
    with mp.workdps(60):
        terms = []
        for a, b in zip(log_p, log_q, strict=True):
            p, q = mp.exp(mpf(float(a))), mp.exp(mpf(float(b)))
            terms.append((p * (mpf(float(a)) - mpf(float(b))) if p else mpf(0)) - p + q)
        return mp.fsum(terms)


def dirichlet(seed: int, concentration: float = 1.0) -> np.ndarray:
    p = np.random.default_rng(seed).dirichlet(np.full(WIDTH, concentration))
    return np.log(np.maximum(p, 1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [3.0, 0.9, 0.1, 1e-3, 1e-5, 1e-7])
def test_kl_divergence_is_accurate_at_any_distance(dtype: np.dtype, apart: float) -> None:
    with jax.enable_x64(dtype.itemsize == 8):
        for seed in range(8):
            rng = np.random.default_rng(100 + seed)
            log_p = dirichlet(seed).astype(dtype)
            log_q = (log_p + apart * rng.uniform(-1, 1, WIDTH)).astype(dtype)
            found = divergence(jnp.asarray(log_p), jnp.asarray(log_q))
            assert found.dtype == dtype
            expected = exact_kl(log_p, log_q)
            size = float(np.sum(np.exp(log_p.astype(float)) * np.abs(log_p)))
            # exp of a log-probability l is off by u|l|, relatively.
            allowed = 16 * unit_roundoff(dtype) * (float(expected) * (1 + size) + 1e-30)
            if apart >= 0.9:
                masses = np.exp(log_p.astype(float)) + np.exp(log_q.astype(float))
                allowed += 16 * unit_roundoff(dtype) * float(np.sum(masses * (1 + np.abs(log_p))))
            assert abs(float(mpf(float(found)) - expected)) <= allowed


def test_kl_divergence_of_nearly_equal_distributions_is_1e_14_not_noise() -> None:
    with jax.enable_x64(True):
        log_p = dirichlet(0)
        bump = np.where(np.arange(WIDTH) % 2, 1.0, -1.0) * 1.4e-7
        log_q = log_p + bump
        log_q -= np.log(np.sum(np.exp(log_q)))
        found, expected = float(kl_divergence(log_p, log_q)), float(exact_kl(log_p, log_q))
        assert 5e-15 < expected < 2e-14
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_divergence_is_never_negative(dtype: np.dtype) -> None:
    with jax.enable_x64(dtype.itemsize == 8):
        rng = np.random.default_rng(7)
        rows = 4096
        log_p = np.log(rng.dirichlet(np.full(WIDTH, 0.3), rows) + 1e-30)
        steps = 10.0 ** rng.uniform(-9, 1, (rows, 1))
        log_q = log_p + steps * rng.normal(size=(rows, WIDTH))
        log_q -= np.log(np.sum(np.exp(log_q), axis=-1, keepdims=True))
        found = divergence(jnp.asarray(log_p, dtype), jnp.asarray(log_q, dtype))
        assert found.shape == (rows,) and bool(jnp.all(found >= 0))
        same = divergence(jnp.asarray(log_p, dtype), jnp.asarray(log_p, dtype))
        np.testing.assert_array_equal(same, np.zeros(rows))


def test_zero_masses() -> None:
    log = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    nothing = -np.inf
    p = jnp.array([log[0], log[0], nothing])
    wider = jnp.array([log[0], log[1], log[2]])
    assert float(kl_divergence(p, wider)) == pytest.approx(0.5 * math.log(2), rel=1e-6)
    assert float(kl_divergence(wider, p)) == np.inf
    both = kl_divergence(p, jnp.array([log[1], math.log(0.75), nothing]))
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(both) == pytest.approx(expected, rel=1e-6)
    point = jnp.array([0.0, nothing, nothing])
    assert float(kl_divergence(point, point)) == 0.0
    assert float(kl_divergence(point, jnp.array([nothing, 0.0, nothing]))) == np.inf


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_error_in_normalisation_counts_only_squared(sign: int) -> None:
    with jax.enable_x64(True):
        log_p, log_q = dirichlet(1), dirichlet(2)
        exact = float(kl_divergence(log_p, log_q))
        shift = sign * 1e-7
        assert float(kl_divergence(log_p, log_p + shift)) == pytest.approx(shift**2 / 2, rel=1e-5)
        # Of two different distributions, the first order left is that of Σ p log(p/q) itself.
        moved = float(kl_divergence(log_p + shift, log_q + shift))
        assert moved == pytest.approx(exact * (1 + shift), rel=1e-12)


def test_kl_divergence_takes_the_last_axis_and_refuses_unequal_shapes() -> None:
    rows = jnp.asarray(np.stack([dirichlet(3), dirichlet(4)]), jnp.float32)
    apart = divergence(rows, rows[::-1])
    alone = jnp.stack([divergence(rows[0], rows[1]), divergence(rows[1], rows[0])])
    np.testing.assert_allclose(apart, alone, rtol=1e-6)
    with pytest.raises(ValueError, match=r"log_p has shape \(2, 16\) and log_q \(16,\)"):
        kl_divergence(rows, rows[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_finite_at_zero_mass(dtype: np.dtype) -> None:
    with jax.enable_x64(dtype.itemsize == 8):
        log_p = jnp.asarray([math.log(0.5), math.log(0.5), -np.inf, -np.inf], dtype)
        log_q = jnp.asarray([math.log(0.25), math.log(0.5), math.log(0.25), -np.inf], dtype)
        value, grads = jax.jit(jax.value_and_grad(kl_divergence, argnums=(0, 1)))(log_p, log_q)
        assert value.dtype == dtype
        p, q = np.exp(log_p), np.exp(log_q)
        u = np.array([math.log(2), 0, 0, 0])
        np.testing.assert_allclose(grads[0], p * u, atol=1e-6)
        np.testing.assert_allclose(grads[1], np.where(q > 0, q - p, 0), atol=1e-6)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 256, 257, 4096])
def test_total_is_accurate(n: int) -> None:
    x = np.random.default_rng(n).uniform(0.5, 1.5, n).astype(np.float32)
    found = jax.jit(total)(jnp.asarray(x))
    exact = math.fsum(map(float, x))
    assert found.shape == (1,)
    # Three levels of 16 terms: each adds at most 15 roundings, in practice a few.
    assert abs(float(found[0]) - exact) <= 8 * unit_roundoff(np.dtype(np.float32)) * exact


def test_total_of_signed_terms_and_of_tiles() -> None:
    x = np.random.default_rng(0).normal(size=(4096, 3)).astype(np.float32)
    found = np.asarray(jax.jit(total)(jnp.asarray(x)))
    assert found.shape == (1, 3)
    for column in range(3):
        terms = [float(v) for v in x[:, column]]
        error = abs(float(found[0, column]) - math.fsum(terms))
        assert error <= 8 * unit_roundoff(np.dtype(np.float32)) * math.fsum(map(abs, terms))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_sum_is_exact_also_compiled(dtype: np.dtype) -> None:
    with jax.enable_x64(dtype.itemsize == 8):
        rng = np.random.default_rng(5)
        signs = rng.choice([-1.0, 1.0], (2, 512))
        a, b = (signs * 10.0 ** rng.uniform(-12, 12, (2, 512))).astype(dtype)
        b[:64] = -a[:64] * dtype.type(1 + 1e-5)  # cancellation
        for function in (two_sum, jax.jit(two_sum)):
            s, error = (np.asarray(x) for x in function(jnp.asarray(a), jnp.asarray(b)))
            assert s.dtype == dtype
            np.testing.assert_array_equal(s, a + b)
            for x, y, z, e in zip(a, b, s, error, strict=True):
                assert Fraction(float(x)) + Fraction(float(y)) == Fraction(float(z)) + Fraction(
                    float(e)
                )
        assert np.any(error != 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_bregman_term_joins_at_one(dtype: np.dtype, sign: int) -> None:
    with jax.enable_x64(dtype.itemsize == 8):
        u = np.array([np.nextafter(1.0, 0, dtype=dtype), 1.0, np.nextafter(1.0, 2, dtype=dtype)])
        u = (sign * u).astype(dtype)
        q = np.full(3, 0.25, dtype)
        p = (q * np.exp(u)).astype(dtype)
        found = np.asarray(jax.jit(bregman_kl_term)(*map(jnp.asarray, (u, p, q))), np.float64)
        exact = 0.25 * (u.astype(float) * np.exp(u.astype(float)) - np.expm1(u.astype(float)))
        np.testing.assert_allclose(found, exact, rtol=16 * unit_roundoff(dtype))
        slope = jax.vmap(jax.grad(lambda u: bregman_kl_term(u, 0.25 * jnp.exp(u), u * 0 + 0.25)))
        np.testing.assert_allclose(slope(jnp.asarray(u)), 0.25 * u * np.exp(u), rtol=1e-5)


def test_bregman_term_at_the_ends() -> None:
    zero, one = jnp.array(0, jnp.float32), jnp.array(1, jnp.float32)
    assert float(bregman_kl_term(zero, one, one)) == 0.0
    assert float(bregman_kl_term(jnp.array(-1e30, jnp.float32), zero, one)) == 1.0
    tiny = float(bregman_kl_term(jnp.array(1e-6, jnp.float32), one, one))
    assert tiny == pytest.approx(0.5e-12, rel=1e-5)


def test_first_where() -> None:
    mask = jnp.array([[False, True, False], [True, True, False], [True, False, False]])
    expected = np.array([[False, True, False], [True, False, False], [False, False, False]])
    np.testing.assert_array_equal(first_where(mask), expected)
