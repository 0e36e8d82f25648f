"""Preferences and the rewards fitted to them."""

from __future__ import annotations

import itertools
import math

import choix
import jax
import numpy as np
import pytest

from jaxsim import (
    Feedback,
    expected_pairs,
    expected_rankings,
    expected_thumbs,
    fit_reward,
    sample_feedback,
)


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


@pytest.mark.parametrize(
    "expected",
    [
        expected_pairs(rewards(4), uniform(4)),
        expected_rankings(rewards(4), np.array([0.5, 0.3, 0.2, 0.0]), size=3),
        expected_thumbs(rewards(4), np.array([0.5, 0.5, 0.0, 0.0]), flip=0.1),
    ],
    ids=["pairs", "rankings", "thumbs"],
)
def test_samples_follow_the_law(expected: jax.Array) -> None:
    num, p = 200_000, np.asarray(expected)
    counts = np.asarray(sample_feedback(jax.random.key(1), expected, num))
    assert counts.shape == p.shape and counts.sum() == num
    assert np.all(counts[p == 0] == 0) and np.any(p == 0)
    assert np.max(np.abs(counts / num - p) / np.sqrt(p / num + 1e-12)) < 5


def plackett_luce(r: np.ndarray, mu: np.ndarray, size: int) -> np.ndarray:
    """Lists drawn i.i.d., those with repeats thrown away, each then ranked."""
    found = np.zeros((len(r),) * size)
    for drawn in itertools.product(range(len(r)), repeat=size):
        if len(set(drawn)) < size:
            continue
        for ranking in itertools.permutations(drawn):
            chance = math.prod(mu[i] for i in drawn)
            for place, best in enumerate(ranking):
                chance *= math.exp(r[best]) / sum(math.exp(r[i]) for i in ranking[place:])
            found[ranking] += chance
    return found / found.sum()


@pytest.mark.parametrize(("outputs", "size"), [(4, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_expected_rankings_by_enumeration(outputs: int, size: int, scale: float, x64: None) -> None:
    r = rewards(outputs, scale=scale)
    mu = np.random.default_rng(1).dirichlet(np.ones(outputs))
    found = np.asarray(expected_rankings(r, 7 * mu, size=size))  # normalised there
    np.testing.assert_allclose(found, plackett_luce(r, mu, size), rtol=1e-12, atol=1e-300)
    assert found.sum() == pytest.approx(1, rel=1e-12)


def test_rankings_of_two_are_pairs(x64: None) -> None:
    r, mu = rewards(4, scale=3.0), np.array([0.5, 0.3, 0.2, 0.0])
    pairs = expected_pairs(r, mu)
    np.testing.assert_allclose(expected_rankings(r, mu, size=2), pairs, rtol=1e-13)


def test_outputs_that_are_never_drawn_are_not_ranked(x64: None) -> None:
    r, mu = rewards(4), np.array([0.4, 0.0, 0.3, 0.3])
    found = np.asarray(expected_rankings(r, mu, size=3))
    kept = [0, 2, 3]
    within = plackett_luce(r[kept], mu[kept], 3)
    np.testing.assert_allclose(found[np.ix_(kept, kept, kept)], within, rtol=1e-12)
    assert found.sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("threshold", [None, 0.3, 0.0])
@pytest.mark.parametrize("flip", [0.0, 0.2, 0.5])
def test_expected_thumbs(threshold: float | None, flip: float, x64: None) -> None:
    r, mu = rewards(4, scale=2.0), np.array([0.5, 0.3, 0.2, 0.0])
    found = np.asarray(expected_thumbs(r, 3 * mu, threshold=threshold, flip=flip))
    middle = sum(mu * r) if threshold is None else threshold
    for y in range(4):
        good = 1 / (1 + math.exp(middle - r[y]))
        marked = (1 - flip) * good + flip * (1 - good)
        assert found[y, 0] == pytest.approx(mu[y] * marked, rel=1e-12, abs=1e-300)
        assert found[y, 1] == pytest.approx(mu[y] * (1 - marked), rel=1e-12, abs=1e-300)
    assert found.sum() == pytest.approx(1, rel=1e-12)


def test_a_constant_matters_to_thumbs_only_beside_a_threshold_of_ones_own(x64: None) -> None:
    r, mu = rewards(4), uniform(4)
    np.testing.assert_allclose(expected_thumbs(r + 5, mu), expected_thumbs(r, mu), rtol=1e-12)
    own = [np.asarray(expected_thumbs(x, mu, threshold=0.0)) for x in (r, r + 5)]
    assert np.all(own[1][:, 0] > 1.05 * own[0][:, 0])


def test_extreme_rewards_keep_rare_opinions(x64: None) -> None:
    """Columns are as accurate where an opinion is rare: no 1 - p."""
    thumbs = np.asarray(expected_thumbs([0.0, 200.0], [0.5, 0.5]))
    assert thumbs[1, 1] == pytest.approx(0.5 * math.exp(-100), rel=1e-12)
    rankings = np.asarray(expected_rankings([0.0, 50.0, 200.0], uniform(3), size=3))
    assert rankings[0, 1, 2] == pytest.approx(math.exp(-350), rel=1e-12)


def test_a_feedback_makes_each_kind(x64: None) -> None:
    r, mu = rewards(4), np.array([0.4, 0.3, 0.2, 0.1])
    compared = np.ones((4, 4), bool)
    compared[0, 1] = compared[1, 0] = False
    asked = Feedback(flip=0.1, compared=compared, list_size=4, threshold=0.2)
    pairs = expected_pairs(r, mu, flip=0.1, compared=compared)
    np.testing.assert_array_equal(asked.expected("pairs", r, mu), pairs)
    assert pairs[0, 1] == 0 < pairs[0, 2]
    ranked = asked.expected("rankings", r, mu)
    np.testing.assert_array_equal(ranked, expected_rankings(r, mu, size=4))
    thumbs = expected_thumbs(r, mu, threshold=0.2, flip=0.1)
    np.testing.assert_array_equal(asked.expected("thumbs", r, mu), thumbs)


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
        (lambda: expected_pairs([0.0, 1.0], [np.nan, 1.0]), "sampling holds a negative number"),
        (lambda: expected_rankings([0.0, 1.0], [0.5, 0.5], size=3), "size is 3; expected 2 to"),
        (lambda: expected_rankings([0.0, 1.0], [0.5, 0.5], size=1), "size is 1"),
        (lambda: expected_rankings([0.0, 1.0, 2.0], [0.5, 0.5, 0.0], size=3), "no list can be"),
        (lambda: expected_rankings([0.0, 1.0], [1.0], size=2), r"sampling \(1,\)"),
        (lambda: expected_thumbs([0.0, 1.0], [0.5, 0.5], flip=-0.1), "flip is -0.1"),
        (lambda: expected_thumbs([[0.0, 1.0]], [[0.5, 0.5]]), r"reward has shape \(1, 2\)"),
        (lambda: Feedback(flip=0.6), "flip is 0.6; expected 0 to 0.5"),
        (lambda: Feedback(flip=np.nan), "flip is nan"),
        (lambda: Feedback(sampling="p_ref"), "sampling is 'p_ref'; expected reference, uniform"),
    ],
)
def test_bad_input_is_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
