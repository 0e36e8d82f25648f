"""Critical β, against mpmath: polynomials in e^s, bisection with 50 digits, certified signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import jaxsim
from jaxsim import Components, Family, Instance, Outcome, Rewards

# 1/log x for the tribonacci constant x, the root of x^3 = x^2 + x + 1: 1.64101792992848832…
CRITICAL = 1.6410179299284884


def uniform_on(in_a: Sequence[int], in_u: Sequence[int], reward: Sequence[int]) -> Instance:
    """Components uniform over as many outputs of each reward as the counts say."""
    rows = [(1, 0, r) for r, k in zip(reward, in_a, strict=True) for _ in range(k)]
    rows += [(0, 1, r) for r, k in zip(reward, in_u, strict=True) for _ in range(k)]
    a, u, r = np.array(rows, float).T
    return Instance.from_probs(a / a.sum(), u / u.sum(), r, 0.5, 1.0)


def difference(instance: Instance, s: Any) -> Any:
    """E_A[e^{s(r - max r)}] - E_U[the same] of the stored instance; call with mp's digits set."""
    stored = (instance.log_p_aligned, instance.log_p_unaligned, instance.reward)
    log_a, log_u, r = (np.asarray(x, np.float64).tolist() for x in stored)
    tilt = [mp.exp(s * (mpf(x) - max(r))) for x in r]
    a, u = ([mp.exp(mpf(x)) if x > -1e30 else mpf(0) for x in log_p] for log_p in (log_a, log_u))
    return mp.fdot(a, tilt) / mp.fsum(a) - mp.fdot(u, tilt) / mp.fsum(u)


def assert_crossing(instance: Instance, beta: float) -> None:
    """The sign changes within two units in the last place."""
    with mp.workdps(60):
        step = mpf(2) ** -52 * 2
        sides = [difference(instance, 1 / (mpf(beta) * (1 + e))) for e in (-step, step)]
        assert sides[0] * sides[1] < 0


def test_the_three_output_example() -> None:
    instance = Instance.from_probs([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], 0.5, 1.0)
    found = jaxsim.critical_betas(instance)
    assert found.betas.tolist() == [CRITICAL]
    assert found.betas.dtype == np.float64
    assert found.count == 1
    assert bool(found.complete)
    assert math.exp(1 / found.betas[0]) == pytest.approx(1.839286755214161, abs=1e-15)


@st.composite
def counts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    size = draw(st.integers(3, 6))
    count = st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any)
    return draw(count), draw(count)


@settings(max_examples=80, deadline=None)
@given(counts())
def test_all_crossings_of_polynomials_are_found(x: tuple[list[int], list[int]]) -> None:
    """With rewards 0, 1, 2, … they are the real roots beyond 1 of odd multiplicity."""
    in_a, in_u = x
    found = jaxsim.critical_betas(uniform_on(in_a, in_u, range(len(in_a))))
    coefficients = [a * sum(in_u) - u * sum(in_a) for a, u in zip(in_a, in_u, strict=True)]
    while coefficients and not coefficients[-1]:
        coefficients.pop()
    if len(coefficients) < 2:
        assert found.count == 0
        assert bool(found.complete)
        return
    with mp.workdps(80):
        if mpmath.__version__ < "1.4":  # which knows one order only
            roots = mp.polyroots(coefficients[::-1], maxsteps=2000, extraprec=2000)
        else:
            roots = mp.polyroots(coefficients, maxsteps=2000, extraprec=2000, asc=True)
        real = sorted(mp.re(z) for z in roots if abs(mp.im(z)) < 1e-20 and mp.re(z) > 1 + 1e-12)

        def polynomial(x: Any) -> Any:
            return mp.fsum(c * x**k for k, c in enumerate(coefficients))

        step = mpf(10) ** -9
        crossings = [z for z in real if polynomial(z * (1 - step)) * polynomial(z * (1 + step)) < 0]
        expected = sorted({round(float(1 / mp.log(z)), 12) for z in crossings})
    assert bool(found.complete)
    np.testing.assert_allclose(found.betas, expected, rtol=1e-11)


def test_a_touch_is_no_crossing_and_a_near_touch_is_settled() -> None:
    """(x - 1)(x - 2)^2: Δ = 0 at β = 1/log 2 without a change of sign."""
    touching = jaxsim.critical_betas(uniform_on([0, 8, 0, 1], [4, 0, 5, 0], range(4)))
    assert touching.count == 0
    assert bool(touching.complete)
    # As stored log-probabilities of one output per level, the coefficients are off by rounding.
    a, u = np.array([0, 8, 0, 1]) / 9, np.array([4, 0, 5, 0]) / 9
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            near = Instance.from_probs(a.astype(dtype), u.astype(dtype), np.arange(4, dtype=dtype),
                                       0.5, 1.0)  # fmt: skip
        found = jaxsim.critical_betas(near)
        assert bool(found.complete)
        with mp.workdps(60):
            lowest = min(difference(near, mp.log(2) + mpf(k) * mpf(10) ** -e)
                         for e in range(4, 13) for k in range(-9, 10))  # fmt: skip
        assert found.count == (2 if lowest < 0 else 0)
        for beta in found.betas:
            assert_crossing(near, beta)


def test_equal_components_have_no_crossing() -> None:
    permuted = Instance.from_probs([0.2, 0.3, 0.5], [0.3, 0.2, 0.5], [1.0, 1.0, 2.0], 0.5, 1.0)
    constant = Instance.from_probs([0.2, 0.8], [0.5, 0.5], [3.0, 3.0], 0.5, 1.0)
    for instance in (permuted, constant):
        found = jaxsim.critical_betas(instance)
        assert found.betas.shape == (0,)
        assert bool(found.complete)


def test_equal_means_and_higher_moments() -> None:
    """Where f starts at zero to a higher order, no crossing may be invented."""
    spread = uniform_on([1, 0, 1], [0, 2, 0], [0, 1, 2])
    assert jaxsim.critical_betas(spread).count == 0
    thue_morse = uniform_on([1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1], range(8))
    found = jaxsim.critical_betas(thue_morse)
    assert found.count == 0
    assert bool(found.complete)


FAMILIES = [
    Family(outputs=3),
    Family(outputs=8),
    Family(outputs=32),
    Family(outputs=8, components=Components(kind="sparse"), reward=Rewards(kind="student_t")),
    Family(outputs=6, components=Components(concentration_aligned=0.05)),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.components.kind}-{f.outputs}")
def test_random_instances(family: Family) -> None:
    batch = jax.device_get(jaxsim.sample_instances(jax.random.key(4), family, 120))
    found = jaxsim.critical_betas(batch)
    assert found.betas.shape == (120, 8)
    assert found.complete.all()
    grid = np.geomspace(1e-3, 1e3, 97)
    repeated = jax.tree.map(lambda x: np.repeat(x, grid.size, axis=0), batch)
    repeated = Instance(**{**vars(repeated), "beta": np.tile(grid, 120).astype(np.float32)})
    signs = jaxsim.certify(repeated).conclusion.reshape(120, grid.size)
    for row in range(120):
        betas = found.betas[row][~np.isnan(found.betas[row])]
        assert len(betas) == found.count[row]
        assert (np.diff(betas) > 0).all()
        instance = jax.tree.map(lambda x, row=row: x[row], batch)
        for beta in betas:
            assert_crossing(instance, beta)
        # Between critical values the sign is constant, and it alternates.
        place = np.searchsorted(betas, np.float32(grid))
        changes = np.array([(signs[row][i] * signs[row][i + 1]) for i in range(grid.size - 1)])
        np.testing.assert_array_equal(changes == -1, np.diff(place) % 2 == 1)


@pytest.mark.parametrize("depth", [-600.0, -800.0, -5000.0])
def test_a_best_output_of_next_to_no_mass(depth: float) -> None:
    """Its mass is no float64, and yet it decides what happens at small β."""
    log_a, log_u = [math.log(0.6), math.log(0.4), depth], [math.log(0.5), math.log(0.5), -math.inf]
    near = Instance(
        log_p_aligned=np.asarray(log_a, np.float32),
        log_p_unaligned=np.asarray(log_u, np.float32),
        reward=np.asarray([0, 1, 2], np.float32),
        logit_alpha=np.float32(0),
        beta=np.float32(1),
    )
    found = jaxsim.critical_betas(near)
    assert bool(found.complete)
    assert found.betas.shape == (1,)
    assert_crossing(near, found.betas[0])
    assert jaxsim.conditions(near).mgf_order == Outcome.FAILS


def test_parity_under_the_hypotheses() -> None:
    """Odd exactly when U leads on the best output: Δ > 0 for large β, and < 0 as β → 0."""
    batch = jax.device_get(jaxsim.sample_instances(jax.random.key(9), Family(outputs=4), 400))
    hold = np.asarray(jaxsim.certify(batch).hypotheses_hold)
    found = jaxsim.critical_betas(jax.tree.map(lambda x: x[hold], batch))
    best = batch.reward[hold].argmax(axis=1)[:, None]
    lead = np.take_along_axis(batch.log_p_aligned - batch.log_p_unaligned, np.argmax(
        batch.reward, axis=1)[:, None], axis=1)[hold][:, 0]  # fmt: skip
    assert best.shape[0] > 50
    np.testing.assert_array_equal(found.count % 2 == 1, lead < 0)


def test_offsets_and_scales_of_the_reward() -> None:
    """A shift of r changes nothing; a factor multiplies β, over hundreds of decades."""
    for factor in (2.0**-60, 2.0**60):
        scaled = Instance.from_probs([0, 1, 0], [0.5, 0, 0.5], [0.0, 3 * factor, 4 * factor],
                                     0.5, factor)  # fmt: skip
        found = jaxsim.critical_betas(scaled)
        assert found.betas[0] == CRITICAL * factor
    shifted = Instance.from_probs([0, 1, 0], [0.5, 0, 0.5], [4096.0, 4099.0, 4100.0], 0.5, 1.0)
    assert jaxsim.critical_betas(shifted).betas.tolist() == [CRITICAL]


def test_a_batch_with_too_few_columns_says_so() -> None:
    rows = [([0, 1, 0], [0.5, 0, 0.5]), ([0.5, 0, 0.5], [0, 1, 0])]
    batch = Instance.from_probs(
        *np.array(rows, float).transpose(1, 0, 2), [0.0, 3.0, 4.0], 0.5, 1.0
    )
    found = jaxsim.critical_betas(batch, maximum=1)
    assert found.count.tolist() == [1, 1]
    assert found.complete.tolist() == [True, True]
    three = uniform_on([0, 6, 0, 5], [1, 0, 10, 0], range(4))
    single = jaxsim.critical_betas(three)
    doubled = jax.tree.map(lambda x: np.stack([x, x]), three)
    if single.count > 1:
        cut = jaxsim.critical_betas(doubled, maximum=1)
        assert cut.betas[:, 0].tolist() == [single.betas[-1]] * 2
        assert not cut.complete.any()


def test_errors() -> None:
    instance = Instance.from_probs([0.5, 0.5], [0.5, 0.5], [0.0, 1.0], 0.5, 1.0)
    with pytest.raises(TypeError, match="concrete"):
        jax.jit(lambda x: jaxsim.critical_betas(x).count)(instance)
    with pytest.raises(ValueError, match="maximum is 0"):
        jaxsim.critical_betas(instance, maximum=0)
    bad = Instance(**{**vars(instance), "reward": np.array([0.0, np.nan], np.float32)})
    with pytest.raises(ValueError, match="reward"):
        jaxsim.critical_betas(bad)


def test_the_sign_at_a_critical_beta_is_certified_either_way() -> None:
    """float64 next to the critical value: no error bound decides it, exact arithmetic does."""
    betas = [CRITICAL, np.nextafter(CRITICAL, 0), np.nextafter(CRITICAL, 9)]
    with jax.enable_x64(True):
        instances = [
            Instance.from_probs([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], 0.5, b)
            for b in betas
        ]
        codes = [Outcome(int(jaxsim.certify(x).conclusion)) for x in instances]
    with mp.workdps(50):
        signs = [mp.sign(difference(x, 1 / mpf(b))) for x, b in zip(instances, betas, strict=True)]
    assert [int(code) for code in codes] == [int(sign) for sign in signs]
    assert Outcome.TIE not in codes
