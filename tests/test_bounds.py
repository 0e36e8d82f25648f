"""Bounds: the depth that no failure reaches, how far tuning can move mass, and a β that is safe."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import logsumexp

import jaxsim
from jaxsim import Instance, Outcome, worst_case_shift

Vector = NDArray[np.float64]

OUTPUTS = (3, 4, 8, 32)
RANGES = (0.5, 1.0, 2.0, 4.0, 7.0, 10.0)


def reference_depth(outputs: int, spread: float) -> mpf:
    """Return V(n, R) in another form: log(1 + ρ(e^R-1)/R) - ρ, ρ = max(1 - R/(e^R-1), R/(n-1))."""
    with mp.workdps(60):
        r = mpf(spread)
        rho = max(1 - r / mp.expm1(r), r / (outputs - 1))
        return mp.log1p(rho * mp.expm1(r) / r) - rho


def linear_programmes(t: Vector) -> float:
    """Return the largest -Δ that any p_A and p_U have with these t = r/β, hypotheses not strict.

    A minimises E_A[e^t] with E_A[t] ≥ mean t; U maximises E_U[e^t] with E_U[t] ≤ mean t.
    """
    mean = t.mean()
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}

    def extreme(sign: int, scale: float) -> float:
        found = linprog(
            sign * np.exp(t - scale),
            A_ub=-sign * t[None],
            b_ub=[-sign * mean],
            A_eq=np.ones((1, t.size)),
            b_eq=[1.0],
            bounds=(0, None),
            method="highs",
            options=options,
        )
        assert found.status == 0
        assert abs(found.x.sum() - 1) < 1e-12 and sign * (found.x @ t - mean) > -1e-11
        return scale + math.log(found.x @ np.exp(t - scale))

    return extreme(-1, t.max()) - extreme(1, mean)


def deepest_rewards(outputs: int, spread: float) -> Vector:
    """Return r/β with one output on the mean, at λR: the others on both ends and in between."""
    share = max(1 / spread - 1 / math.expm1(spread), 1 / (outputs - 1))
    rest = outputs - 3
    between = [((outputs - 1) * share - 1) / rest] * rest if rest else []
    return spread * np.array([0.0, *between, share, 1.0])


@pytest.mark.parametrize("outputs", [3, 4, 5, 8, 32, 128, 10**6])
def test_worst_case_shift_to_the_last_digits(outputs: int) -> None:
    for spread in np.geomspace(1e-8, 1e4, 61):
        expected = reference_depth(outputs, spread)
        found = worst_case_shift(outputs, spread)
        assert abs(found / expected - 1) < 2e-14, spread


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("spread", RANGES)
def test_linear_programmes_stay_below_it_and_reach_it(outputs: int, spread: float) -> None:
    rng = np.random.default_rng(outputs)
    bound = worst_case_shift(outputs, spread)
    shapes = (0.3, 1.0, 3.0, 10.0)  # of the rewards in between: all about, or all near one end
    for a, b in itertools.product(shapes, shapes):
        inner = rng.beta(a, b, outputs - 2)
        depth = linear_programmes(spread * np.array([0.0, *inner, 1.0]))
        assert depth <= bound * (1 + 1e-9)
    deepest = deepest_rewards(outputs, spread)
    assert np.ptp(deepest) == pytest.approx(spread)
    assert linear_programmes(deepest) == pytest.approx(bound, rel=1e-6)


def test_with_three_outputs_it_is_log_cosh() -> None:
    spread = np.geomspace(1e-3, 600, 200)
    assert worst_case_shift(3, spread) == pytest.approx(np.log(np.cosh(spread / 2)), rel=1e-9)


def test_with_very_many_outputs() -> None:
    r = np.geomspace(0.01, 600, 200)
    limit = np.log(np.expm1(r) / r) + r / np.expm1(r) - 1
    found = worst_case_shift(10**9, r)
    assert found == pytest.approx(limit, rel=1e-9, abs=1e-13)


def test_it_grows_with_outputs_and_range() -> None:
    outputs, spread = np.array([3, 4, 5, 8, 16, 32, 1000]), np.geomspace(1e-6, 1e3, 400)
    table = worst_case_shift(outputs[:, None], spread[None, :])
    assert table.shape == (7, 400)
    assert np.all(np.diff(table, axis=0) >= 0)
    assert np.all(np.diff(table, axis=1) > 0)
    assert np.all(table < spread)


def test_it_is_zero_where_the_theorem_holds() -> None:
    assert np.all(worst_case_shift(np.array([1, 2]), 5.0) == 0)
    assert worst_case_shift(8, 0.0) == 0


def test_it_is_numpy_or_jax_as_its_arguments_are() -> None:
    assert worst_case_shift(3, 4.0).dtype == np.float64
    assert worst_case_shift(3, 4).dtype == np.float64
    assert not isinstance(worst_case_shift(3, 4.0), jax.Array)
    spread = jnp.geomspace(1e-3, 100, 32)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: worst_case_shift(3, x))))(spread)
    assert value.dtype == jnp.float32
    assert np.asarray(value) == pytest.approx(
        worst_case_shift(3, np.asarray(spread, float)), rel=1e-5
    )
    assert np.asarray(slope) == pytest.approx(np.tanh(np.asarray(spread) / 2) / 2, rel=1e-5)
    eager = worst_case_shift(8, spread)
    assert isinstance(eager, jax.Array)
    exact = worst_case_shift(8, np.asarray(spread, np.float64))
    assert np.asarray(eager) == pytest.approx(exact, rel=1e-5)


def instances(seed: int, num: int) -> dict[str, Vector]:
    """Draw instances of eight outputs: dense, sparse and near-degenerate components, any scale."""
    rng, shape = np.random.default_rng(seed), (num, 8)
    masses = []
    for _ in range(2):
        concentration = 10.0 ** rng.uniform(-1.5, 1.5, (num, 1))
        raw = rng.gamma(np.broadcast_to(concentration, shape)) + 1e-300
        kept = rng.random(shape) < rng.choice([0.3, 0.7, 1.0], (num, 1))
        kept[np.arange(num), rng.integers(0, 8, num)] = True
        raw = np.where(kept, raw, 0.0)
        masses.append(raw / raw.sum(axis=1, keepdims=True))
    reward = rng.normal(size=shape)
    levels = rng.random((num, 1)) < 0.3  # a few rewards only, so that components sit on the ends
    reward = np.where(levels, np.sign(reward) * (abs(reward) > 0.7), reward)
    return {
        "p_aligned": masses[0],
        "p_unaligned": masses[1],
        "reward": reward * 10.0 ** rng.uniform(-3, 3, (num, 1)) + rng.normal(size=(num, 1)),
        "alpha": rng.uniform(0.001, 0.999, num),
        "beta": 10.0 ** rng.uniform(-2, 2, num),
    }


def shift_of(x: dict[str, Vector]) -> Vector:
    """Return Δ in float64, by SciPy."""
    t = (x["reward"] - x["reward"].mean(axis=1, keepdims=True)) / x["beta"][:, None]
    return logsumexp(t, b=x["p_aligned"], axis=1) - logsumexp(t, b=x["p_unaligned"], axis=1)


def bounds_of(row: dict[str, Any]) -> dict[str, mpf]:
    """Return the three bounds of Δ from the formulas of the docstring, to 40 digits."""
    with mp.workdps(40):
        a, u, r = ([mpf(float(v)) for v in row[k]] for k in ("p_aligned", "p_unaligned", "reward"))
        a, u = ([x / mp.fsum(p) for x in p] for p in (a, u))
        beta = mpf(float(row["beta"]))
        inside = [i for i in range(len(r)) if a[i] + u[i] > 0]
        low, high = min(r[i] for i in inside), max(r[i] for i in inside)
        mean_a, mean_u = mp.fdot(a, r), mp.fdot(u, r)
        spread = (high - low) / beta
        x_a, x_u = ((m - low) / (high - low) if high > low else mpf(0) for m in (mean_a, mean_u))
        tilted = [p * mp.exp((x - high) / beta) for p, x in zip(a, r, strict=True)]
        best = max(r[i] for i in inside if a[i] > 0)
        worst = min(r[i] for i in inside if u[i] > 0)
        return {
            "by_range": (best - worst) / beta,
            "by_means": mp.log1p(x_a * mp.expm1(spread)) - spread * x_u,
            "by_tilted_means": (mp.fdot(tilted, r) / mp.fsum(tilted) - mean_u) / beta,
        }


KINDS = ("by_range", "by_means", "by_tilted_means")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_bound_holds(dtype: Any) -> None:
    x = instances(1, 20_000)
    if dtype == np.float32:
        x = {k: v.astype(dtype) for k, v in x.items()}
    with jax.enable_x64(dtype == np.float64):
        batch = Instance.from_probs(**x)
        bounds = jax.device_get(jaxsim.tpm_bounds(batch))
    assert batch.reward.dtype == dtype
    shift = shift_of({k: v.astype(np.float64) for k, v in x.items()})
    logit = np.log(x["alpha"].astype(np.float64)) - np.log1p(-x["alpha"].astype(np.float64))
    log_tpm_a, log_tpm_u = (-np.logaddexp(0, -z) for z in (logit + shift, -logit - shift))
    size = 1 + np.ptp(x["reward"], axis=1) / x["beta"] + abs(x["reward"]).max(axis=1) / x["beta"]
    slack = 32 * np.finfo(dtype).eps * size  # some bounds are attained, and SciPy rounds too
    for kind in KINDS:
        bound = getattr(bounds, kind)
        assert np.all(np.isfinite(bound.log_odds_shift))
        assert np.all(shift <= bound.log_odds_shift + slack), kind
        assert np.all(log_tpm_a <= bound.log_tpm_aligned + slack), kind
        assert np.all(log_tpm_u >= bound.log_tpm_unaligned - slack), kind
    # And the later ones are worth having.
    assert np.mean(bounds.by_means.log_odds_shift < bounds.by_range.log_odds_shift) > 0.5
    tilted = bounds.by_tilted_means.log_odds_shift
    assert np.mean(tilted < bounds.by_range.log_odds_shift) > 0.9


def test_bounds_are_those_of_the_formulas() -> None:
    x = instances(2, 300)
    with jax.enable_x64(True):
        bounds = jax.device_get(jaxsim.tpm_bounds(Instance.from_probs(**x)))
    for i in range(300):
        expected = bounds_of({k: v[i] for k, v in x.items()})
        size = 1 + abs(x["reward"][i]).max() / x["beta"][i]
        for kind, value in expected.items():
            found = getattr(bounds, kind).log_odds_shift[i]
            assert abs(found - float(value)) < 1e-14 * size, (i, kind)


@pytest.mark.parametrize("spread", [1e-6, 0.3, 4.0, 30.0, 1e3, 1e5])
def test_where_bounds_are_attained(spread: float) -> None:
    with jax.enable_x64(True):
        reward = spread * np.array([0.0, 0.2, 0.7, 1.0])

        def of(p_aligned: list[float], p_unaligned: list[float]) -> tuple[Any, float]:
            instance = Instance.from_probs(p_aligned, p_unaligned, reward, 0.3, 1.0)
            shift = float(jaxsim.evaluate(instance).log_odds_shift)
            return jax.device_get(jaxsim.tpm_bounds(instance)), shift

        # A on its best output, U on its worst: the range.
        bounds, shift = of([0, 0, 0, 1], [1, 0, 0, 0])
        assert bounds.by_range.log_odds_shift == pytest.approx(shift, rel=1e-14)
        # A on both ends, U on one output: the means.
        for share in (1e-6, 0.25, 0.9):
            for u in range(4):
                bounds, shift = of([1 - share, 0, 0, share], [float(i == u) for i in range(4)])
                close = pytest.approx(shift, rel=1e-13, abs=1e-13 * spread)
                assert bounds.by_means.log_odds_shift == close
        # Each component on one output: the tilted means too.
        bounds, shift = of([0, 0, 1, 0], [0, 1, 0, 0])
        assert bounds.by_tilted_means.log_odds_shift == pytest.approx(shift, rel=1e-14)


def test_a_bound_holds_where_a_has_next_to_nothing_above_the_least_reward() -> None:
    """The tilt raises 1e-10 of mass by e^60: its share must not drown in a difference of means."""
    rare = np.array([1e-6, 1e-8, 1e-10, 1e-20])
    spread = np.array([20.0, 30.0, 60.0, 100.0])
    none = np.full(4, -np.inf)
    batch = Instance.from_log_probs(
        np.stack([np.log1p(-rare), none, np.log(rare)], axis=1).astype(np.float32),
        np.stack([none, 0 * rare, none], axis=1).astype(np.float32),
        (spread[:, None] * np.array([[0.0, 0.7, 1.0]])).astype(np.float32),
        beta=1.0,
        logit_alpha=0.0,
    )
    bound = np.asarray(jaxsim.tpm_bounds(batch).by_means.log_odds_shift)
    # U on one output, A on both ends: attained.
    assert bound == pytest.approx(np.log1p(rare * np.expm1(spread)) - 0.7 * spread, rel=1e-5)


def test_bounds_under_jit_and_grad() -> None:
    def by_means(reward: jax.Array) -> jax.Array:
        instance = Instance.from_probs([0.2, 0.3, 0.5], [0.5, 0.3, 0.2], reward, 0.5, 1.0)
        return jaxsim.tpm_bounds(instance).by_means.log_odds_shift

    reward = jnp.array([0.0, 1.0, 3.0])
    value, slope = jax.jit(jax.value_and_grad(by_means))(reward)
    assert float(value) == pytest.approx(math.log1p(0.6 * math.expm1(3.0)) - 0.9, rel=1e-6)
    assert np.all(np.isfinite(slope))


def test_equal_rewards_leave_nothing_to_move() -> None:
    instance = Instance.from_probs([0.2, 0.8], [0.6, 0.4], [3.0, 3.0], 0.4, 0.1)
    bounds = jaxsim.tpm_bounds(instance)
    for kind in KINDS:
        assert float(getattr(bounds, kind).log_odds_shift) == 0
        assert float(getattr(bounds, kind).log_tpm_aligned) == pytest.approx(math.log(0.4))


def test_padding_changes_no_bound() -> None:
    one = Instance.from_probs([0.2, 0.8], [0.6, 0.4], [1.0, 3.0], 0.4, 0.7)
    two = Instance.from_probs([0.2, 0.8, 0.0], [0.6, 0.4, 0.0], [1.0, 3.0, -9e9], 0.4, 0.7)
    for a, b in zip(*(jax.tree.leaves(jaxsim.tpm_bounds(x)) for x in (one, two)), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)
    assert float(jaxsim.sufficient_beta(one)) == pytest.approx(
        float(jaxsim.sufficient_beta(two)), rel=1e-6
    )


def test_from_the_sufficient_beta_on_the_conclusion_holds() -> None:
    x = instances(4, 4000)
    with jax.enable_x64(True):
        batch = Instance.from_probs(**x)
        found = np.asarray(jaxsim.sufficient_beta(batch))
        p_a, p_u, r = x["p_aligned"], x["p_unaligned"], x["reward"]
        lead = ((p_a - p_u) * r).sum(axis=1)
        inside = np.where((p_a > 0) | (p_u > 0), r, np.nan)
        width = np.nanmax(inside, axis=1) - np.nanmin(inside, axis=1)
        clear = abs(lead) > 1e-9 * abs(r).max(axis=1)
        leads = clear & (lead > 0)
        assert leads.sum() > 1000 and (clear & ~leads).sum() > 1000
        assert np.all(np.isinf(found[clear & ~leads]))
        expected = width[leads] ** 2 / (8 * lead[leads])
        assert found[leads] == pytest.approx(expected, rel=1e-5)
        for factor in (1.0, 1.5, 10.0, 1e3):
            at = np.where(leads, found * factor, 1.0)
            held = jaxsim.certify(Instance.from_probs(**x | {"beta": at})).conclusion
            assert np.all(held[leads] == Outcome.HOLDS)


def test_the_sufficient_beta_is_rounded_up() -> None:
    """In float32, where the means may cancel: certain at the β itself, or inf."""
    x = {k: np.asarray(v, np.float32) for k, v in instances(5, 4000).items()}
    stored = Instance.from_probs(**x)
    beta = np.asarray(jaxsim.sufficient_beta(stored))
    certain = np.isfinite(beta) & (beta > 0)
    assert 0.3 < certain.mean() < 0.7
    at = Instance(**{**vars(stored), "beta": np.where(certain, beta, 1)})
    assert np.all(jaxsim.certify(at).conclusion[certain] == Outcome.HOLDS)


def test_the_sufficient_beta_is_close_to_necessary_where_a_leads_by_little() -> None:
    """A on one output, U on both ends: Hoeffding's lemma is sharp as the lead goes to zero."""
    with jax.enable_x64(True):
        for lead in (1e-2, 1e-3):
            instance = Instance.from_probs([0, 1, 0], [0.5, 0, 0.5], [0, 1 + lead, 2], 0.5, 1.0)
            beta = float(jaxsim.sufficient_beta(instance))
            assert beta == pytest.approx(4 / (8 * lead))
            for factor, outcome in ((1.0, Outcome.HOLDS), (1 - lead**2, Outcome.FAILS)):
                at = Instance.from_probs(
                    [0, 1, 0], [0.5, 0, 0.5], [0, 1 + lead, 2], 0.5, beta * factor
                )
                assert jaxsim.certify(at).conclusion == outcome


def test_sufficient_beta_at_the_edges() -> None:
    def of(p_aligned: list[float], p_unaligned: list[float], reward: list[float]) -> float:
        instance = Instance.from_probs(p_aligned, p_unaligned, reward, 0.5, 1.0)
        return float(jaxsim.sufficient_beta(instance))

    assert of([0.3, 0.7], [0.6, 0.4], [2.0, 2.0]) == 0.0
    assert of([0.3, 0.7], [0.3, 0.7], [1.0, 2.0]) == math.inf
    assert of([0.7, 0.3], [0.3, 0.7], [1.0, 2.0]) == math.inf
    assert 2 < of([0, 1, 0], [0.5, 0, 0.5], [0, 3, 4]) < 2 * (1 + 1e-5)
    # The square of the range is not representable.
    assert of([0, 1], [1, 0], [0, 9e29]) == pytest.approx(9e29 / 8, rel=1e-5)
    assert of([0, 1], [1, 0], [0, 1e-30]) == pytest.approx(1.25e-31, rel=1e-5)
