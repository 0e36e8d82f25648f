"""Preferences and the rewards fitted to them."""

from __future__ import annotations

import choix
import jax
import numpy as np
import pytest

from jaxsim import expected_pairs, fit_reward, sample_feedback


def rewards(outputs: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=outputs)


def uniform(outputs: int) -> np.ndarray:
    return np.full(outputs, 1 / outputs)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_expected_pairs_are_bradley_terry(x64: None) -> None:
    r, mu = rewards(5), np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    found = np.asarray(expected_pairs(r, mu, flip=0.1))
    total = 1 - np.sum(mu**2)
    for i in range(5):
        for j in range(5):
            p = 1 / (1 + np.exp(r[j] - r[i]))
            # Drawn in either order.
            expected = 0 if i == j else 2 * mu[i] * mu[j] * (0.9 * p + 0.1 * (1 - p)) / total
            assert found[i, j] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert found.sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("mu", ["uniform", "skewed"])
def test_exact_preferences_give_the_reward_back(scale: float, mu: str, x64: None) -> None:
    r = rewards(8, scale=scale)
    sampling = uniform(8) if mu == "uniform" else np.random.default_rng(1).dirichlet(np.ones(8))
    fitted = fit_reward(expected_pairs(r, sampling))
    assert fitted.exists.all() and set(fitted.component) == {0}
    np.testing.assert_allclose(fitted.reward, r - r.mean(), atol=1e-9)


def test_flipped_labels_shrink_it(x64: None) -> None:
    r = rewards(6)
    fitted = fit_reward(expected_pairs(r, uniform(6), flip=0.2))
    assert np.ptp(fitted.reward) < 0.8 * np.ptp(r)


@pytest.mark.parametrize("num", [60, 5000])
def test_samples_agree_with_choix(num: int) -> None:
    r = rewards(6)
    wins = np.asarray(sample_feedback(jax.random.key(3), expected_pairs(r, uniform(6)), num))
    assert wins.sum() == num and np.all(np.diag(wins) == 0)
    fitted = fit_reward(wins)
    assert fitted.exists.all()
    pairs = [(i, j) for i in range(6) for j in range(6) for _ in range(wins[i, j])]
    expected = choix.opt_pairwise(6, pairs, alpha=0, tol=1e-12)
    np.testing.assert_allclose(fitted.reward, expected - expected.mean(), atol=1e-5)


def test_samples_follow_the_law() -> None:
    expected = expected_pairs(rewards(4), uniform(4))
    wins = np.asarray(sample_feedback(jax.random.key(1), expected, 200_000))
    p = np.asarray(expected)
    assert np.max(np.abs(wins / 200_000 - p) / np.sqrt(p / 200_000 + 1e-12)) < 5


def test_components_that_were_never_compared(x64: None) -> None:
    compared = np.zeros((5, 5), bool)
    compared[:2, :2] = compared[2:, 2:] = True
    r = rewards(5)
    fitted = fit_reward(expected_pairs(r, uniform(5), compared=compared))
    assert fitted.component.tolist() == [0, 0, 1, 1, 1] and fitted.exists.all()
    for part in (slice(0, 2), slice(2, 5)):
        np.testing.assert_allclose(fitted.reward[part], r[part] - r[part].mean(), atol=1e-9)


@pytest.mark.parametrize(
    ("wins", "exists"),
    [
        ([[0, 1], [0, 0]], [False, False]),  # one never loses
        ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], [True, True, True]),
        ([[0, 1, 0], [1, 0, 1], [0, 0, 0]], [False, False, False]),
        ([[0, 2, 0], [1, 0, 0], [0, 0, 0]], [True, True, True]),  # the third alone
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], [True, True, False, False]),
    ],
)
def test_where_the_maximum_does_not_exist(wins: list[list[int]], exists: list[bool]) -> None:
    fitted = fit_reward(wins)
    assert fitted.exists.tolist() == exists
    np.testing.assert_array_equal(np.isnan(fitted.reward), ~np.array(exists))


def test_a_wide_range_of_rewards(x64: None) -> None:
    r = np.linspace(0, 20, 6)
    fitted = fit_reward(expected_pairs(r, uniform(6)))
    np.testing.assert_allclose(fitted.reward, r - r.mean(), atol=1e-5)


def test_lopsided_wins() -> None:
    """A chain, in which each gap is the log of its own ratio, whatever the ratio."""
    for ratio in (1e6, 1e12, 1e20):
        wins = np.zeros((4, 4))
        for k in range(3):
            wins[k, k + 1], wins[k + 1, k] = 1, 1 / ratio
        gaps = -np.diff(fit_reward(wins).reward)
        np.testing.assert_allclose(gaps, np.log(ratio), rtol=1e-9)
    pair = fit_reward([[0, 1e9], [1, 0]]).reward
    assert pair[0] - pair[1] == pytest.approx(np.log(1e9), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit_reward([[0, 1]]), r"wins has shape \(1, 2\)"),
        (lambda: fit_reward([[0, -1], [1, 0]]), "negative"),
        (lambda: fit_reward([[0, np.nan], [1, 0]]), "nan"),
        (lambda: expected_pairs([0.0, 1.0], [1.0]), r"sampling \(1,\)"),
        (lambda: expected_pairs([0.0, 1.0], [0.5, 0.5], flip=0.7), "flip is 0.7"),
        (lambda: sample_feedback(jax.random.key(0), np.ones((2, 2)), 0), "num is 0"),
        (lambda: sample_feedback(jax.random.key(0), np.zeros((2, 2)), 1), "nothing of positive"),
        (lambda: expected_pairs([0.0, 1.0], [1.0, 0.0]), "no pair can be drawn"),
        (lambda: expected_pairs([0.0, 1.0], [-0.5, 1.5]), "sampling holds a negative number"),
    ],
)
def test_bad_input_is_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
