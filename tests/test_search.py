"""The search for deep failures: what it returns is one, exactly, near the bound and below it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import numpy as np
import optax
import pytest
from mpmath import mp, mpf

import jaxsim
from jaxsim import Counterexample, Instance
from jaxsim.engine.search import RationalInstance, deepest_rational

KEY = jax.random.key(0)


def exact_depth(p_a: list[mpf], p_u: list[mpf], reward: list[Any], beta: Any) -> mpf:
    """Return -Δ of a counterexample to 50 digits, after checking that it meets the hypotheses."""
    with mp.workdps(50):
        p_a, p_u = ([x / mp.fsum(p) for x in p] for p in (p_a, p_u))
        kept = [i for i in range(len(reward)) if p_a[i] + p_u[i] > 0]
        r = [mpf(x.numerator) / x.denominator for x in map(Fraction, reward)]
        beta = mpf(Fraction(beta).numerator) / Fraction(beta).denominator
        mean = mp.fsum(r[i] for i in kept) / len(kept)
        margin = abs(max(r)) * mpf(10) ** -40
        assert mp.fdot(p_a, r) > mean + margin
        assert mp.fdot(p_u, r) < mean - margin
        growth = [mp.exp(x / beta) for x in r]
        return mp.log(mp.fdot(p_u, growth)) - mp.log(mp.fdot(p_a, growth))


def stored_depth(instance: Instance) -> mpf:
    with mp.workdps(50):
        p_a, p_u = (
            [mp.exp(mpf(float(x))) for x in log_p]
            for log_p in (instance.log_p_aligned, instance.log_p_unaligned)
        )
        return exact_depth(p_a, p_u, np.asarray(instance.reward).tolist(), float(instance.beta))


def rational_depth(x: RationalInstance) -> mpf:
    with mp.workdps(50):
        p_a, p_u = (
            [mpf(w.numerator) / w.denominator for w in p] for p in (x.p_aligned, x.p_unaligned)
        )
        return exact_depth(p_a, p_u, list(x.reward), x.beta)


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, float], Counterexample]:
    """Two numbers of outputs, one compilation each."""
    return {
        (n, spread): jaxsim.find_counterexample(
            KEY, outputs=n, beta=0.3, range_over_beta=spread, restarts=16, steps=500
        )
        for n in (3, 8)
        for spread in (0.5, 4.0, 10.0)
    }


def test_what_is_found_is_a_counterexample_as_it_is_stored(
    found: dict[tuple[int, float], Counterexample],
) -> None:
    for x in found.values():
        verdict = jaxsim.certify(x.instance)
        assert bool(verdict.violated)
        assert x.depth == -float(verdict.log_odds_shift) > 0
        assert x.depth == pytest.approx(float(stored_depth(x.instance)), rel=1e-12)


def test_it_is_deep_and_never_below_the_bound(
    found: dict[tuple[int, float], Counterexample],
) -> None:
    for (n, spread), x in found.items():
        assert x.bound == jaxsim.worst_case_shift(n, spread)
        assert 0.98 * x.bound < x.depth < x.bound
        # The stored range is R, to one rounding, and not above it.
        reward, beta = np.asarray(x.instance.reward), Fraction(float(x.instance.beta))
        stored = Fraction(float(np.ptp(reward))) / beta
        assert spread * (1 - 3e-7) < stored <= Fraction(spread)
        assert x.instance.reward.shape == (n,) and reward.min() == 0


def test_alpha_is_where_tpm_falls_furthest(
    found: dict[tuple[int, float], Counterexample],
) -> None:
    x = found[3, 4.0]
    assert float(x.instance.logit_alpha) == pytest.approx(x.depth / 2)

    def fall(logit: Any) -> Any:
        before, after = (1 / (1 + np.exp(-z)) for z in (logit, logit - x.depth))
        return before - after

    assert fall(x.depth / 2) == pytest.approx(np.tanh(x.depth / 4))
    assert fall(x.depth / 2) >= fall(np.linspace(-5, 5, 1001)).max()


def test_the_key_decides(found: dict[tuple[int, float], Counterexample]) -> None:
    def again(seed: int) -> Instance:
        return jaxsim.find_counterexample(
            jax.random.key(seed),
            outputs=3,
            beta=0.3,
            range_over_beta=4.0,
            restarts=16,
            steps=500,
        ).instance

    first = found[3, 4.0].instance
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again(0), first)))
    assert not np.array_equal(again(1).log_p_aligned, first.log_p_aligned)


def test_in_64_bits_with_another_optimizer() -> None:
    with jax.enable_x64(True):
        x = jaxsim.find_counterexample(
            KEY, outputs=4, beta=2, restarts=8, steps=200, optimizer=optax.sgd(0.5)
        )
        assert x.instance.reward.dtype == np.float64
        assert x.depth == pytest.approx(float(stored_depth(x.instance)), rel=1e-12)
        assert 0.8 * x.bound < x.depth < x.bound


@pytest.mark.parametrize("outputs", [3, 4, 8, 32, 40, 50])
@pytest.mark.parametrize("spread", [1e-3, 0.5, 0.7, 4.0, 10.0, 300.0])
def test_rational(outputs: int, spread: float) -> None:
    x = deepest_rational(outputs, Fraction(spread))
    assert len(x.reward) == min(outputs, 40)
    assert min(a + u for a, u in zip(x.p_aligned, x.p_unaligned, strict=True)) > 0
    assert max(w.denominator for w in (*x.reward, *x.p_aligned, *x.p_unaligned, x.beta)) <= 20
    assert x.violates()
    assert x.depth == pytest.approx(float(rational_depth(x)), rel=1e-14)
    assert 0.95 * jaxsim.worst_case_shift(len(x.reward), spread) < x.depth < x.bound
    assert x.range_over_beta <= Fraction(spread)


def test_the_rational_one_comes_with_what_is_found(
    found: dict[tuple[int, float], Counterexample],
) -> None:
    x = found[3, 4.0].rational
    assert x == deepest_rational(3, Fraction(4))
    assert (x.reward, x.beta) == ((0, Fraction(181, 19), 19), Fraction(19, 4))
    rounded = jaxsim.certify(x.to_instance())
    assert bool(rounded.violated)
    assert float(rounded.log_odds_shift) == pytest.approx(-x.depth, abs=1e-5)


def test_rational_instances_know_ties_and_near_ties() -> None:
    half, none = Fraction(1, 2), Fraction(0)
    tie = RationalInstance(  # equal rewards merged, A and U are the same
        reward=(none, Fraction(1), Fraction(1)),
        p_aligned=(half, half, none),
        p_unaligned=(half, none, half),
        beta=Fraction(3),
    )
    assert tie.log_odds_shift == 0.0
    assert not tie.violates()
    # e^{1/β} within 1e-40 of the tribonacci constant, where the counterexample of the README flips.
    with mp.workdps(80):
        x = mp.findroot(lambda x: x**4 - 2 * x**3 + 1, 1.84)
        crossing = 1 / mp.log(x)
        for sign in (1, -1):
            beta = crossing * (1 + sign * mpf(10) ** -40)
            near = RationalInstance(
                reward=(none, Fraction(3), Fraction(4)),
                p_aligned=(none, Fraction(1), none),
                p_unaligned=(half, none, half),
                beta=Fraction(int(mp.nint(beta * 10**70)), 10**70),
            )
            assert near.hypotheses_hold()
            assert near.violates() == (sign < 0)
            assert 0 < sign * near.log_odds_shift < 1e-38


def test_rational_instances_are_checked() -> None:
    good: dict[str, Any] = {
        "reward": (Fraction(0), Fraction(1)),
        "p_aligned": (Fraction(0), Fraction(1)),
        "p_unaligned": (Fraction(1, 3), Fraction(2, 3)),
        "beta": Fraction(1),
    }
    RationalInstance(**good)
    third = Fraction(1, 3)
    for field, value in (
        ("p_aligned", (third, third)),
        ("p_unaligned", (-third, 4 * third)),
        ("p_unaligned", (Fraction(1),)),
        ("beta", Fraction(0)),
    ):
        with pytest.raises(ValueError, match=field):
            RationalInstance(**good | {field: value})


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, "outputs is 2; expected at least 3.*affine in r", {"outputs": 2}),
        (ValueError, "outputs is 0", {"outputs": 0}),
        (TypeError, "outputs is 3.0; expected an integer", {"outputs": 3.0}),
        (ValueError, "beta is 0.0; expected a finite number > 0", {"beta": 0}),
        (ValueError, "beta is nan", {"beta": float("nan")}),
        (ValueError, "range_over_beta is -1.0", {"range_over_beta": -1}),
        (ValueError, "range_over_beta is inf", {"range_over_beta": float("inf")}),
        (ValueError, "beta is 1e-45; out of the range of float32", {"beta": 1e-45}),
        (
            ValueError,
            "range_over_beta . beta is 1e.41; out of",
            {"beta": 1e38, "range_over_beta": 1e3},
        ),
        (ValueError, "restarts is 0; expected at least 1", {"restarts": 0}),
        (ValueError, "steps is 0; expected at least 1", {"steps": 0}),
        (TypeError, "key: expected a typed key", {"key": jax.random.PRNGKey(0)}),
        (
            RuntimeError,
            "no failure found that float32 can store",
            {"range_over_beta": 1e-7, "restarts": 16, "steps": 500},
        ),
    ],
)
def test_errors(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    arguments = {"outputs": 3, "beta": 1.0} | changed
    key = arguments.pop("key", KEY)
    with pytest.raises(error, match=message):
        jaxsim.find_counterexample(key, **arguments)
