"""Where methods go: against closed forms, certificates and expectations written out in NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from scipy.optimize import brentq, linprog, minimize
from scipy.special import expit, logit, logsumexp

import jaxsim
from jaxsim import Feedback, Instance, Optimum, OptimumStatus, population_optimum

Numbers = np.ndarray
FOUND, NOT_UNIQUE, NOT_ATTAINED, UNBOUNDED, NOT_FOUND = OptimumStatus


@dataclass(frozen=True)
class Prompts:
    """Random instances, and their arrays."""

    instance: Instance
    p: Numbers
    r: Numbers
    beta: Numbers


@cache
def prompts(
    num: int,
    outputs: int = 5,
    *,
    seed: int = 0,
    widest: float = 20.0,
    beta: tuple[float, float] = (0.05, 10.0),
) -> Prompts:
    """Dirichlet components, rewards of range up to `widest`, log-uniform β."""
    rng = np.random.default_rng(seed)
    aligned, unaligned = rng.dirichlet(np.ones(outputs), (2, num))
    r = rng.uniform(size=(num, outputs))
    r = (r - r.min(axis=1, keepdims=True)) / np.ptp(r, axis=1, keepdims=True)
    r = r * rng.uniform(0.2, widest, (num, 1)) + rng.normal(size=(num, 1))
    alpha = rng.uniform(0.05, 0.95, num)
    price = np.exp(rng.uniform(*np.log(beta), num))
    with jax.enable_x64(True):
        instance = Instance.from_probs(aligned, unaligned, r, alpha, price)
    p = alpha[:, None] * aligned + (1 - alpha[:, None]) * unaligned
    return Prompts(instance=instance, p=p, r=r, beta=price)


@cache
def thousand() -> tuple[Prompts, Numbers]:
    """A thousand instances, and their p*."""
    given = prompts(1000, seed=1)
    with jax.enable_x64(True):
        return given, np.exp(np.asarray(jaxsim.optimal_policy(given.instance)))


@cache
def shown(num: int, outputs: int = 5, seed: int = 1) -> Numbers:
    """A sampling distribution for each instance, of full support."""
    return np.random.default_rng(seed).dirichlet(np.ones(outputs), num)


def single(p: Any, r: Any, beta: float = 1.0) -> Instance:
    with jax.enable_x64(True):
        return Instance.from_probs(np.array(p), np.array(p), np.array(r, float), 0.5, beta)


def with_empty(instance: Instance, outputs: int, r: Numbers, before: int = 0) -> Instance:
    """Add outputs without mass, up to so many, some of them in front."""
    width = ((0, 0), (before, outputs - before - r.shape[1]))
    with jax.enable_x64(True):
        return Instance.from_log_probs(
            np.pad(instance.log_p_aligned, width, constant_values=-np.inf),
            np.pad(instance.log_p_unaligned, width, constant_values=-np.inf),
            np.pad(r, width, constant_values=50.0),
            beta=instance.beta,
            logit_alpha=instance.logit_alpha,
        )


def softmax(x: Numbers) -> Numbers:
    return np.exp(x - logsumexp(x, axis=-1, keepdims=True))


def total_variation(found: Optimum, policy: Numbers) -> float:
    return float(np.max(np.abs(np.exp(found.log_policy) - policy).sum(axis=-1)) / 2)


def assert_found(found: Optimum) -> None:
    assert np.bincount(np.ravel(found.status), minlength=5).tolist()[1:] == [0] * 4
    assert np.all(found.last_step <= 1e-9)


def pairs(r: Numbers, mu: Numbers, flip: float = 0.0) -> Numbers:
    """Bradley and Terry's model, [outputs, outputs]."""
    wins = expit(r[:, None] - r)
    drawn = np.outer(mu, mu) * (1 - np.eye(len(r)))
    return drawn * ((1 - flip) * wins + flip * wins.T) / np.sum(drawn * wins)


# Methods that reach eq. (1).

REACHING: dict[str, tuple[str, dict[str, Any], Feedback | None]] = {
    "dpo": ("dpo", {}, None),
    "robust_dpo": ("robust_dpo", {"label_smoothing": 0.2}, Feedback(flip=0.2)),
    "plackett_luce_dpo": ("plackett_luce_dpo", {}, None),
    "reward_model": ("reward_model", {}, None),
    "reinforce": ("reinforce", {"baseline": 1.0}, None),
    "rloo": ("rloo", {}, None),
    "ppo_clip": ("ppo_clip", {}, None),
    "grpo, k2, no std": ("grpo", {"normalize_std": False, "kl": "k2"}, None),
    "dr_grpo": ("dr_grpo", {}, None),
    "dr_grpo of 2": ("dr_grpo", {"group_size": 2, "leave_one_out": True}, None),
    "dr_grpo of 3": ("dr_grpo", {"group_size": 3, "leave_one_out": True}, None),
    "dpo, uniform": ("dpo", {}, Feedback(sampling="uniform")),
    "dpo, on-policy": ("dpo", {}, Feedback(sampling="policy")),
}


@pytest.mark.parametrize("name", REACHING)
def test_methods_that_reach_equation_1(name: str) -> None:
    method, settings, feedback = REACHING[name]
    given, optimal = thousand()
    found = population_optimum(method, given.instance, feedback, **settings)
    assert_found(found)
    assert found.log_policy.dtype == np.float64 and found.log_policy.shape == (1000, 5)
    assert total_variation(found, optimal) <= 1e-6
    apart = found.log_policy - np.log(given.p)
    for bound in (found.low, found.high):
        np.testing.assert_allclose(bound, apart - apart[:, :1], rtol=1e-9, atol=1e-9)


def test_a_product_distribution_of_any_kind_leads_to_equation_1() -> None:
    given, optimal = thousand()
    for mu in (shown(1000), 5 * shown(1000)[0]):
        found = population_optimum("dpo", given.instance, Feedback(sampling=mu))
        assert_found(found)
        assert total_variation(found, optimal) <= 1e-6


# Methods with a closed form of their own.


def test_ipo() -> None:
    """p_ref exp(P(y ≻ μ)/β), the output compared to itself too, which wins half the time."""
    given, mu = prompts(256), shown(256)
    flipped = np.array([pairs(*x, 0.3) for x in zip(given.r, mu, strict=True)])
    for flip, feedback in ((0.0, Feedback(sampling=mu)), (0.3, flipped)):
        wins = (1 - 2 * flip) * expit(given.r[:, :, None] - given.r[:, None]) + flip
        share = np.einsum("kij,kj->ki", wins, mu)
        found = population_optimum("ipo", given.instance, feedback)
        assert_found(found)
        wanted = softmax(np.log(given.p) + share / given.beta[:, None])
        assert total_variation(found, wanted) <= 1e-6
        np.testing.assert_allclose(found.log_policy, np.log(wanted), atol=1e-8)


def test_ipo_on_policy() -> None:
    """A fixed point, unique: the equilibrium of a game that is symmetric and regularised."""
    given, _ = thousand()
    found = population_optimum("ipo", given.instance, Feedback(sampling="policy"))
    assert_found(found)
    pi = np.exp(found.log_policy)
    share = np.einsum("kij,kj->ki", expit(given.r[:, :, None] - given.r[:, None]), pi)
    wanted = np.log(given.p) + share / given.beta[:, None]
    wanted -= logsumexp(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found.log_policy, wanted, atol=1e-8)


def reverse_tilt(p: Numbers, r: Numbers, beta: float) -> Numbers:
    """β p_ref/(λ - r), λ above every reward: the optimum of E_π r - β KL(p_ref‖π)."""
    gap = r.max() - r

    def excess(x: float) -> float:  # x = λ - max r
        return float(np.sum(beta * p / (x + gap)) - 1)

    x = brentq(excess, beta * p[gap == 0].sum() / 2, 2 * beta, xtol=1e-300, rtol=1e-14)
    return beta * p / (x + gap)


def test_grpo_with_k3() -> None:
    given, _ = thousand()
    found = population_optimum("grpo", given.instance, normalize_std=False, kl="k3")
    assert_found(found)
    wanted = np.array([reverse_tilt(*x) for x in zip(given.p, given.r, given.beta, strict=True)])
    np.testing.assert_allclose(wanted.sum(axis=1), 1, rtol=1e-10)
    assert total_variation(found, wanted) <= 1e-6
    np.testing.assert_allclose(found.log_policy, np.log(wanted), atol=1e-6)


def spread(pi: Numbers, r: Numbers) -> Numbers:
    mean = np.sum(pi * r, axis=-1, keepdims=True)
    return np.sqrt(np.sum(pi * (r - mean) ** 2, axis=-1))


def test_grpo_with_std_and_an_unbiased_kl() -> None:
    """β σ_π in β's place: s β σ_s = 1, the least such s; where there is none, all on the best."""
    given = prompts(128, seed=3)
    found = population_optimum("grpo", given.instance, kl="k1", importance_corrected=True)
    kinds = {FOUND: 0, NOT_ATTAINED: 0}
    for p, r, beta, log_pi, status in zip(
        given.p, given.r, given.beta, found.log_policy, found.status, strict=True
    ):

        def excess(s: Any, p: Numbers = p, r: Numbers = r, beta: float = beta) -> Numbers:
            s = np.asarray(s)
            return s * beta * spread(softmax(np.log(p) + s[..., None] * (r - r.max())), r) - 1

        gaps = np.sort(r.max() - r)[1:]
        grid = np.geomspace(1e-4 / gaps[-1], 100 / gaps[0], 1500)
        values = excess(grid)
        if abs(values.max()) < 0.02:  # near where the solutions begin
            continue
        kinds[OptimumStatus(status)] += 1
        if values.max() < 0:
            assert status == NOT_ATTAINED
            assert log_pi.tolist() == np.where(r == r.max(), 0.0, -np.inf).tolist()
        else:
            at = np.flatnonzero(values > 0)[0]
            s = brentq(excess, grid[at - 1], grid[at], xtol=1e-15, rtol=1e-14)
            assert status == FOUND
            wanted = softmax(np.log(p) + s * r)
            np.testing.assert_allclose(np.exp(log_pi), wanted, atol=1e-7)
    assert min(kinds.values()) > 30


def test_grpo_with_std_and_k3() -> None:
    """Always one solution: the reverse tilt at β σ_π, which is β² (E_π r - E_ref r)."""
    given = prompts(128)
    found = population_optimum("grpo", given.instance)
    assert_found(found)
    for p, r, beta, log_pi in zip(given.p, given.r, given.beta, found.log_policy, strict=True):

        def excess(log_b: float, p: Numbers = p, r: Numbers = r, beta: float = beta) -> float:
            b = math.exp(log_b)
            return float(beta * spread(reverse_tilt(p, r, b), r) / b - 1)

        widest = math.log(beta * np.ptp(r))
        b = math.exp(brentq(excess, widest - 60, widest + 1, xtol=1e-13, rtol=1e-14))
        wanted = reverse_tilt(p, r, b)
        np.testing.assert_allclose(np.exp(log_pi), wanted, atol=1e-7)
        assert beta**2 * ((np.exp(log_pi) - p) @ r) == pytest.approx(b, rel=1e-6)


def test_dr_grpo_with_the_own_sample_in_the_mean() -> None:
    """The advantage shrinks by 1 - 1/G: p* at βG/(G-1)."""
    given = prompts(256)
    found = population_optimum("dr_grpo", given.instance, group_size=2)
    assert_found(found)
    tilt = given.r / (2 * given.beta[:, None])
    assert total_variation(found, softmax(np.log(given.p) + tilt)) <= 1e-6


def test_sampled_k1_in_the_loss_is_no_penalty() -> None:
    given = prompts(256)
    found = population_optimum("dr_grpo", given.instance, importance_corrected=False)
    done = found.status == NOT_ATTAINED
    assert np.mean(done) > 0.99 and np.all(found.status[~done] == NOT_FOUND)
    best = given.r == given.r.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(found.log_policy[done], np.where(best, 0.0, -np.inf)[done])


def test_groups_with_std_come_to_rest_where_the_expected_gradient_is_zero() -> None:
    """By all groups of three, in loops."""
    given = prompts(128, seed=4)
    found = population_optimum("grpo", given.instance, group_size=3)
    assert_found(found)
    for at in range(12):
        p, r, beta = given.p[at], given.r[at], given.beta[at]
        pi = np.exp(found.log_policy[at])
        pull = -beta * (1 - p / pi)  # of k3 in the loss
        for group in itertools.product(range(5), repeat=3):
            rewards = r[list(group)]
            if np.ptp(rewards) > 0:
                a = (rewards[0] - rewards.mean()) / rewards.std()
                pull[group[0]] += a * pi[group[1]] * pi[group[2]]
        assert np.ptp(pull) <= 1e-7 * max(1, beta)


def test_simpo() -> None:
    """Of the reference nothing is left, however far from it and however steep the loss is there."""
    given = prompts(256)
    wanted = softmax(given.r / given.beta[:, None])
    rare = np.linspace(1, 40, 5) * np.random.default_rng(0).uniform(size=(256, 1))
    with jax.enable_x64(True):
        p = softmax(-rare)
        skewed = Instance.from_probs(p, p, given.r, 0.5, given.beta)
    for instance in (given.instance, skewed):
        found = population_optimum("simpo", instance, Feedback(sampling=shown(256)))
        assert_found(found)
        assert total_variation(found, wanted) <= 1e-6


EPSILON = 0.1


@pytest.mark.parametrize("method", ["dpo", "exo"])
def test_two_outputs(method: str) -> None:
    """β times the difference of log-ratios: where the slopes of winning and losing cancel."""
    given = prompts(128, 2, seed=5)
    wide = with_empty(given.instance, 5, given.r)
    found = population_optimum(method, wide, label_smoothing=EPSILON)
    assert_found(found)
    wins = expit(given.r[:, 0] - given.r[:, 1])
    wanted = {
        "dpo": logit(EPSILON + (1 - 2 * EPSILON) * wins),
        "exo": (2 * wins - 1) * logit(1 - EPSILON),
    }[method]
    s = found.log_policy[:, :2] - np.log(given.p)
    np.testing.assert_allclose(given.beta * (s[:, 0] - s[:, 1]), wanted, atol=1e-6)


# Methods without one: the expected loss's gradient, by hand.


def losses_of_pairs(z: Numbers, method: str) -> tuple[Numbers, Numbers]:
    """ℓ and ℓ' of z, β times a difference."""
    if method == "dpo":
        epsilon = EPSILON
        value = (1 - epsilon) * np.logaddexp(0, -z) + epsilon * np.logaddexp(0, z)
        return value, epsilon * expit(z) - (1 - epsilon) * expit(-z)
    if method == "exo":
        p, c = expit(z), logit(1 - EPSILON)
        value = -p * np.logaddexp(0, -z) - (1 - p) * np.logaddexp(0, z) - p * c
        return value, p * (1 - p) * (z - c)
    gamma = 0.5
    return np.logaddexp(0, gamma - z), -expit(gamma - z)


@pytest.mark.parametrize("method", ["dpo", "exo", "simpo"])
@pytest.mark.parametrize("sampling", ["reference", "uniform"])
def test_losses_of_pairs_are_at_rest(method: str, sampling: str) -> None:
    """The first is cDPO: its target is not Bradley and Terry's, so that μ matters."""
    given = prompts(128)
    settings = {"gamma": 0.5} if method == "simpo" else {"label_smoothing": EPSILON}
    found = population_optimum(method, given.instance, Feedback(sampling=sampling), **settings)
    assert_found(found)
    rng = np.random.default_rng(0)
    for at in range(128):
        p, beta = given.p[at], given.beta[at]
        weights = pairs(given.r[at], p if sampling == "reference" else np.full(5, 0.2))
        s = beta * (found.log_policy[at] - (0 if method == "simpo" else np.log(p)))
        z = s[:, None] - s

        value, slope = losses_of_pairs(z, method)
        pull = weights * slope
        pull = (pull.sum(axis=1) - pull.sum(axis=0)) / (weights.sum(axis=1) + weights.sum(axis=0))
        assert np.abs(pull).max() <= 1e-9
        rest = np.sum(weights * value)
        for step in (1e-3, 0.1):
            for moved in s + step * rng.normal(size=(20, 5)):
                there = losses_of_pairs(moved[:, None] - moved, method)[0]
                assert np.sum(weights * there) >= rest - 1e-14
    if sampling == "uniform" and method == "dpo":
        other = population_optimum(method, given.instance, **settings)
        apart = np.exp(found.log_policy) - np.exp(other.log_policy)
        assert np.abs(apart).sum(axis=1).max() / 2 > 0.02


def test_orpo_is_at_rest() -> None:
    given = prompts(128, widest=6.0, beta=(0.05, 2.0))
    found = population_optimum("orpo", given.instance)
    assert_found(found)
    rng = np.random.default_rng(0)

    def loss(log_pi: Numbers, weights: Numbers, beta: float) -> float:
        odds = log_pi - np.log(-np.expm1(log_pi))
        ratio = np.logaddexp(0, odds - odds[:, None])
        return float(np.sum(weights * (-log_pi[:, None] + beta * ratio)))

    for at in range(128):
        weights, beta = pairs(given.r[at], given.p[at]), given.beta[at]
        log_pi = found.log_policy[at]
        pi = np.exp(log_pi)
        odds = log_pi - np.log(-np.expm1(log_pi))
        lost = beta * weights * expit(odds - odds[:, None])
        slope = -weights.sum(axis=1) - (lost.sum(axis=1) - lost.sum(axis=0)) / (1 - pi)
        slope -= pi * slope.sum()
        assert np.abs(slope / (weights.sum(axis=1) + weights.sum(axis=0))).max() <= 1e-8
        rest = loss(log_pi, weights, beta)
        for moved in log_pi + 1e-2 * rng.normal(size=(20, 5)):
            assert loss(moved - logsumexp(moved), weights, beta) >= rest - 1e-14


def test_lipo_on_pairs_is_dpo() -> None:
    given = prompts(256)
    found = population_optimum("lipo", given.instance, Feedback(list_size=2))
    assert_found(found)
    assert total_variation(found, softmax(np.log(given.p) + given.r / given.beta[:, None])) <= 1e-6


def test_lipo_is_at_rest() -> None:
    """On rankings of three, where no two scores are equal: weights are constant around there."""
    given = prompts(128, widest=5.0)
    found = population_optimum("lipo", given.instance, Feedback(sampling="uniform"))
    assert_found(found)
    away = 0.0
    for at in range(128):
        r, s = given.r[at], given.beta[at] * (found.log_policy[at] - np.log(given.p[at]))
        order = np.argsort(s)
        assert np.diff(s[order]).min() > 1e-7
        pull, met = np.zeros(5), np.zeros(5)
        for ranking in itertools.permutations(range(5), 3):
            x = np.exp(r[list(ranking)])
            chance = x[0] / x.sum() * x[1] / (x[1] + x[2])
            by_score = sorted(ranking, key=lambda y, s=s: -s[y])
            for better in range(3):
                met[ranking[better]] += chance
                for worse in range(better + 1, 3):
                    i, j = ranking[better], ranking[worse]
                    gain = 2.0 ** (2 - better) - 2.0 ** (2 - worse)
                    discount = [1 / math.log2(2 + by_score.index(y)) for y in (i, j)]
                    push = chance * gain * abs(discount[0] - discount[1]) * expit(s[j] - s[i])
                    pull[i] += push
                    pull[j] -= push
        assert np.abs(pull / met).max() <= 1e-9
        tilt = softmax(np.log(given.p[at]) + r / given.beta[at])
        away = max(away, np.abs(tilt - np.exp(found.log_policy[at])).sum() / 2)
    assert away > 0.02  # it is not p*


# The hinge: kinks, hence cuts in place of derivatives.


def cut_slopes(x: Numbers, weights: Numbers, close: float = 1e-6) -> Numbers:
    """How fast Σ W max(0, 1 - (x_i - x_j)) changes as a subset of the outputs rises, all subsets.

    A sum of functions of differences, each with at most one kink, is at a minimum where no subset
    can rise; and nowhere else where the loss grows for each (Murota: L-convex functions).
    """
    apart = x[:, None] - x
    out = []
    for bits in itertools.product([False, True], repeat=len(x)):
        inside = np.array(bits)
        if inside.any() and not inside.all():
            up, down = np.outer(inside, ~inside), np.outer(~inside, inside)
            falls = weights[up & (apart < 1 - close)].sum()
            out.append(weights[down & (apart < 1 + close)].sum() - falls)
    return np.array(out)


def hinge_value(x: Numbers, weights: Numbers) -> float:
    return float(np.sum(weights * np.maximum(0, 1 - (x[:, None] - x))))


def extremes(weights: Numbers) -> tuple[Numbers, Numbers, float]:
    """The least and the greatest x_j - x_0 among minima, and the minimum, by linear programmes."""
    n = len(weights)
    i, j = np.nonzero(weights)
    m, rows = len(i), np.arange(len(i))
    # (x, ξ), ξ ≥ 1 - (x_i - x_j), within a box that no minimum needs.
    at_least = np.zeros((m, n + m))
    at_least[rows, i], at_least[rows, j], at_least[rows, n + rows] = -1, 1, -1
    cost = np.concatenate([np.zeros(n), weights[i, j] / weights.max()])
    bounds = [(0, 0)] + [(-99, 99)] * (n - 1) + [(0, None)] * m
    best = linprog(cost, A_ub=at_least, b_ub=-np.ones(m), bounds=bounds).fun
    rows_2, most = np.vstack([at_least, cost]), np.append(-np.ones(m), best + 1e-8)
    ends = np.zeros((2, n))
    for y in range(1, n):
        for side, sign in enumerate((1, -1)):
            goal = sign * np.eye(n + m)[y]
            solved = linprog(goal, A_ub=rows_2, b_ub=most, bounds=bounds)
            ends[side, y] = sign * solved.fun
    ends[np.abs(ends) > 90] *= np.inf
    return ends[0], ends[1], best * weights.max()


def test_hinge_is_optimal_by_all_cuts() -> None:
    given = prompts(200, widest=6.0)
    found = population_optimum("hinge", given.instance)
    assert np.all(found.status <= NOT_UNIQUE) and np.mean(found.status == FOUND) > 0.9
    for at in range(200):
        weights = pairs(given.r[at], given.p[at])
        x = given.beta[at] * (found.log_policy[at] - np.log(given.p[at]))
        slopes = cut_slopes(x, weights) / weights.max()
        assert slopes.min() >= -1e-9
        assert (slopes.min() > 1e-6) == (found.status[at] == FOUND)
        if found.status[at] == FOUND:  # differences of whole margins
            np.testing.assert_allclose(x - x[0], np.round(x - x[0]), atol=1e-6)
            np.testing.assert_allclose(found.low[at], found.high[at], atol=1e-6)


TIED = np.array([1.0, 1.0, 0.0, 3.0])
HINGES = {
    "generic": pairs(np.array([0.0, 0.3, -1.2, 2.0]), np.array([0.1, 0.2, 0.3, 0.4])),
    "ties": pairs(TIED, np.full(4, 0.25)),
    "all alike": pairs(np.zeros(4), np.full(4, 0.25)),
    "deterministic": np.triu(np.ones((4, 4)), 1) / 6,
    "a chain": np.diag([1.0, 2.0, 3.0], 1) / 6,
    "partly deterministic": np.array([[0, 2, 1, 1], [1, 0, 2, 1], [0, 0, 0, 3], [0, 0, 1, 0.0]]),
    "disconnected": np.array([[0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 2, 0.0]]),
    "never compared": np.array([[0, 3, 1, 0], [1, 0, 2, 0], [2, 1, 0, 0], [0, 0, 0, 0.0]]),
    "a cycle": np.array([[0, 2, 0, 1], [0, 0, 2, 0], [2, 0, 0, 1], [0, 2, 0, 0.0]]),
    "nothing": np.zeros((4, 4)),
}


def test_sets_of_the_hinge() -> None:
    """Their extent against linear programmes, ties, infinite directions and all."""
    p, beta = np.array([0.4, 0.3, 0.2, 0.1]), 0.5
    weights = np.array(list(HINGES.values()))
    batch = jax.tree.map(lambda x: np.stack([x] * len(weights)), single(p, np.zeros(4), beta))
    found = population_optimum("hinge", batch, weights)
    unique = []
    for at, name in enumerate(HINGES):
        x = beta * (found.log_policy[at] - np.log(p))
        x -= x[0]
        if name == "nothing":
            low = np.array([0, -np.inf, -np.inf, -np.inf])
            high = -low
        else:
            low, high, best = extremes(weights[at])
            assert hinge_value(x, weights[at]) == pytest.approx(best, rel=1e-9, abs=1e-12), name
            assert cut_slopes(x, weights[at]).min() >= -1e-9, name
        np.testing.assert_allclose(beta * found.low[at], low, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(beta * found.high[at], high, atol=1e-6, err_msg=name)
        assert np.all((found.low[at] <= x / beta + 1e-9) & (x / beta <= found.high[at] + 1e-9))
        unique.append(bool(np.all(high - low < 1e-6)))
    np.testing.assert_array_equal(found.status == FOUND, unique)
    assert np.all(found.status <= NOT_UNIQUE) and 0 < sum(unique) < len(HINGES)


def test_random_sets_of_the_hinge() -> None:
    """Whole-number wins, some of them none: many ties between cuts."""
    rng = np.random.default_rng(0)
    weights = rng.poisson(1.5, (25, 4, 4)) * (1 - np.eye(4))
    batch = jax.tree.map(lambda x: np.stack([x] * 25), single(np.full(4, 0.25), np.zeros(4)))
    found = population_optimum("hinge", batch, weights)
    assert 0 < np.sum(found.status == FOUND) < 25
    for at in range(25):
        low, high, best = extremes(weights[at])
        np.testing.assert_allclose(found.low[at], low, atol=1e-6)
        np.testing.assert_allclose(found.high[at], high, atol=1e-6)
        assert hinge_value(found.log_policy[at], weights[at]) == pytest.approx(best, abs=1e-9)
        assert (found.status[at] == FOUND) == (
            cut_slopes(found.log_policy[at], weights[at]) > 0
        ).all()


def test_slic_without_cross_entropy_forgets_the_reference() -> None:
    """The hinge on log π itself: differences of whole margins."""
    given = prompts(200, widest=6.0)
    found = population_optimum("slic", given.instance, margin=2.0, regularization=0.0)
    assert np.all(found.status <= NOT_UNIQUE) and np.mean(found.status == FOUND) > 0.9
    for at in range(200):
        weights = pairs(given.r[at], given.p[at])
        x = found.log_policy[at] / 2
        assert cut_slopes(x, weights).min() / weights.max() >= -1e-9
        if found.status[at] == FOUND:
            np.testing.assert_allclose(x - x[0], np.round(x - x[0]), atol=1e-6)


def slic_residue(
    x: Numbers, weights: Numbers, target: Numbers, margin: float, weight: float
) -> float:
    """How far zero is from the subgradients of the expected loss: least largest component.

    Σ_j z_ij - z_ji = λ (π_i - q_i), z = W where the margin is missed, 0 where it is exceeded, and
    anything between at the kink.
    """
    n = len(x)
    apart = x[:, None] - x - margin
    i, j = np.nonzero(weights)
    low = np.where(apart < -1e-6, weights, 0.0)[i, j]
    high = np.where(apart > 1e-6, 0.0, weights)[i, j]
    flow = np.zeros((n, len(i)))
    flow[i, np.arange(len(i))] += 1
    flow[j, np.arange(len(i))] -= 1
    wanted = weight * (softmax(x) - target)
    rows = np.vstack([np.hstack([s * flow, -np.ones((n, 1))]) for s in (1, -1)])
    solved = linprog(
        np.eye(len(i) + 1)[-1],
        A_ub=rows,
        b_ub=np.concatenate([wanted, -wanted]),
        bounds=[*zip(low, high, strict=True), (0, None)],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return float(solved.fun)


@pytest.mark.parametrize("weight", [0.01, 0.1, 3.0])
def test_slic_by_its_subgradients(weight: float) -> None:
    given = prompts(40, widest=6.0)
    found = population_optimum("slic", given.instance, margin=0.7, regularization=weight)
    assert_found(found)
    rng = np.random.default_rng(0)
    kinks = 0
    for at in range(40):
        weights, q, x = pairs(given.r[at], given.p[at]), given.p[at], found.log_policy[at]
        assert slic_residue(x, weights, q, 0.7, weight) <= 1e-8
        kinks += np.sum(np.abs(x[:, None] - x - 0.7) < 1e-6)

        def loss(x: Numbers, weights: Numbers = weights, q: Numbers = q) -> float:
            value = np.sum(weights * np.maximum(0, 0.7 - (x[:, None] - x)))
            return float(value - weight * q @ (x - logsumexp(x)))

        rest = loss(x)
        for step in (1e-5, 1e-2, 1.0):
            assert all(loss(x + step * v) >= rest - 1e-12 for v in rng.normal(size=(20, 5)))
    assert kinks > 0
    # And by a smooth programme with slacks, from elsewhere.
    weights, q, x = pairs(given.r[0], given.p[0]), given.p[0], found.log_policy[0]
    i, j = np.nonzero(weights)
    solved = minimize(
        lambda v: weights[i, j] @ v[5:] - weight * q @ (v[:5] - logsumexp(v[:5])),
        np.concatenate([np.zeros(5), np.full(len(i), 2.0)]),
        constraints={"type": "ineq", "fun": lambda v: v[5:] - 0.7 + v[i] - v[j]},
        bounds=[(None, None)] * 5 + [(0, None)] * len(i),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(softmax(solved.x[:5]), np.exp(x), atol=2e-4)


def test_slic_with_little_cross_entropy_nears_the_hinge() -> None:
    given = prompts(40, widest=6.0)
    bare = population_optimum("slic", given.instance, regularization=0.0)
    little = population_optimum("slic", given.instance, regularization=1e-7)
    assert_found(little)
    alone = bare.status == FOUND
    assert alone.sum() > 30
    np.testing.assert_allclose(little.log_policy[alone], bare.log_policy[alone], atol=1e-5)
    much = population_optimum("slic", given.instance, regularization=1e6)
    np.testing.assert_allclose(np.exp(much.log_policy), given.p, atol=1e-5)


def test_slic_with_outputs_that_are_all_but_never_seen() -> None:
    """Their share of π over their share of p_ref has a limit."""
    rare = np.array([1e-6, 1e-8, 1e-10, 1e-12])
    p = np.stack([np.full(4, 0.4), 0.6 - rare, rare], axis=1)
    with jax.enable_x64(True):
        instance = Instance.from_probs(p, p, np.array([0.0, 1.0, 2.0]), 0.5, 1.0)
    for weight in (1e-3, 0.1, 1.0):
        found = population_optimum("slic", instance, regularization=weight)
        assert_found(found)
        apart = found.log_policy[:, 2] - np.log(rare)
        np.testing.assert_allclose(apart[1:], apart[-1], atol=1e-4)
    rng = np.random.default_rng(0)
    p = np.maximum(rng.dirichlet(np.full(5, 0.3), 200), 1e-10)
    p /= p.sum(axis=1, keepdims=True)
    with jax.enable_x64(True):
        instance = Instance.from_probs(p, p, rng.normal(size=(200, 5)), 0.5, 1.0)
    assert_found(population_optimum("slic", instance))


# KTO.


def kto_parts(
    given: Prompts, at: int, desirable: float = 1.0, undesirable: float = 1.0
) -> tuple[Numbers, float]:
    """What an output's σ(β(s - z₀)) costs, with μ = p_ref and the mean reward as the threshold."""
    p, r = given.p[at], given.r[at]
    above = r - p @ r
    return p * (undesirable * expit(-above) - desirable * expit(above)), given.beta[at]


def kto_value(pi: Numbers, p: Numbers, cost: Numbers, beta: float, z0: float) -> Numbers:
    """The expected loss less a constant, for a fixed z₀."""
    with np.errstate(divide="ignore"):
        return np.sum(cost * expit(beta * (np.log(pi / p) - z0)), axis=-1)


def divergence(pi: Numbers, p: Numbers) -> float:
    inside = pi > 0
    return float(np.sum(pi[inside] * np.log(pi[inside] / p[inside])))


def kto_is_at_rest(pi: Numbers, p: Numbers, cost: Numbers, beta: float, z0: float) -> None:
    """Mass is worth the same wherever there is some, and less where there is none."""
    alive = pi > 0
    assert alive.any() and pi.sum() == pytest.approx(1, abs=1e-12)
    a = beta * (np.log(pi[alive] / p[alive]) - z0)
    worth = -cost[alive] * beta * expit(a) * expit(-a) / pi[alive]
    np.testing.assert_allclose(worth, worth[0], rtol=1e-7)
    gone = ~alive & (cost < 0)
    if beta < 1:
        assert not gone.any()
    elif beta == 1:
        assert np.all(-cost[gone] * math.exp(-z0) / p[gone] <= worth[0] * (1 + 1e-9))


def test_kto_drops_an_output_that_most_find_desirable() -> None:
    p, share = np.array([0.4, 0.3, 0.3]), np.array([0.9, 0.55, 0.2])
    found = population_optimum("kto", single(p, logit(share)), Feedback(threshold=0.0))
    assert found.status == NOT_ATTAINED and np.exp(found.log_policy).tolist() == [1, 0, 0]
    kto_is_at_rest(np.array([1.0, 0, 0]), p, p * (1 - 2 * share), 1.0, -math.log(0.4))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"reference_point": 0.0},
        {"reference_point": 0.8},
    ],
    ids=str,
)
def test_kto_is_optimal_for_its_reference_point(settings: dict[str, float]) -> None:
    """β ≤ 1: among all policies, for z₀ = KL(π‖p_ref) unless it is given."""
    given = prompts(128, widest=6.0, beta=(0.05, 1.0))
    found = population_optimum("kto", given.instance, **settings)
    rng = np.random.default_rng(0)
    others = np.concatenate([rng.dirichlet(np.full(5, a), 1500) for a in (0.1, 0.5, 2.0)])
    others = np.concatenate([others, np.eye(5), np.eye(5) * 0.98 + 0.02 / 5])
    weights = settings.get("desirable_weight", 1.0), settings.get("undesirable_weight", 1.0)
    for at in range(0, 128, 2):
        cost, beta = kto_parts(given, at, *weights)
        pi, p = np.exp(found.log_policy[at]), given.p[at]
        assert np.all((pi == 0) == (cost > 0))
        assert found.status[at] == (NOT_ATTAINED if np.any(cost > 0) else FOUND)
        z0 = settings.get("reference_point", divergence(pi, p))
        kto_is_at_rest(pi, p, cost, beta, z0)
        rest = kto_value(pi, p, cost, beta, z0)
        for step in (1.0, 0.1, 1e-3):
            moved = (1 - step) * pi + step * others
            assert np.all(kto_value(moved, p, cost, beta, z0) >= rest - 1e-14)


def test_kto_of_little_mass_by_slsqp() -> None:
    """The same optimum from a general solver, for z₀ as found."""
    given = prompts(128, widest=6.0, beta=(0.05, 1.0))
    found = population_optimum("kto", given.instance)
    for at in range(6):
        cost, beta = kto_parts(given, at)
        pi, p = np.exp(found.log_policy[at]), given.p[at]
        z0, wanted = divergence(pi, p), cost < 0
        solved = minimize(
            lambda v, p=p, c=cost, b=beta, z=z0, w=wanted: kto_value(v, p[w], c[w], b, z),
            np.full(wanted.sum(), 1 / wanted.sum()),
            constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
            bounds=[(1e-12, 1)] * wanted.sum(),
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        np.testing.assert_allclose(solved.x, pi[wanted], atol=1e-4)


def test_kto_above_one_is_at_rest() -> None:
    """β > 1, where the loss is not convex: no direction leads down from there."""
    given = prompts(128, widest=3.0, beta=(1.05, 8.0))
    found = population_optimum("kto", given.instance)
    assert np.all(found.status == NOT_ATTAINED)
    rng = np.random.default_rng(0)
    others = np.concatenate([np.eye(5), rng.dirichlet(np.full(5, 0.5), 200)])
    for at in range(128):
        cost, beta = kto_parts(given, at)
        pi, p = np.exp(found.log_policy[at]), given.p[at]
        z0 = divergence(pi, p)
        kto_is_at_rest(pi, p, cost, beta, z0)
        rest = kto_value(pi, p, cost, beta, z0)
        moved = (1 - 1e-4) * pi + 1e-4 * others
        assert np.all(kto_value(moved, p, cost, beta, z0) >= rest - 1e-10)


# What kind of optimum there is.

KINDS = {
    "a cycle": [[0, 2, 1], [1, 0, 2], [2, 1, 0]],
    "one apart": [[0, 3, 0], [1, 0, 0], [0, 0, 0]],
    "deterministic": [[0, 1, 1], [0, 0, 1], [0, 0, 0]],
    "one never wins": [[0, 2, 1], [1, 0, 1], [0, 0, 0]],
    "rare upsets": [[0, 98, 0], [2, 0, 0], [0, 0, 0]],
    "a robust cycle": [[0, 95, 1], [5, 0, 99], [99, 1, 0]],
}


@pytest.mark.parametrize(
    ("method", "settings", "statuses"),
    [
        ("dpo", {}, [FOUND, NOT_UNIQUE, NOT_ATTAINED, NOT_ATTAINED, NOT_UNIQUE, FOUND]),
        ("dpo", {"label_smoothing": 0.1}, [FOUND, NOT_UNIQUE, FOUND, FOUND, NOT_UNIQUE, FOUND]),
        ("reward_model", {}, [FOUND, NOT_UNIQUE, NOT_ATTAINED, NOT_ATTAINED, NOT_UNIQUE, FOUND]),
        ("simpo", {}, [FOUND, NOT_UNIQUE, NOT_ATTAINED, NOT_ATTAINED, NOT_UNIQUE, FOUND]),
        (
            "robust_dpo",
            {"label_smoothing": 0.1},
            [FOUND, NOT_UNIQUE, UNBOUNDED, UNBOUNDED, UNBOUNDED, FOUND],
        ),
        ("ipo", {}, [FOUND, NOT_UNIQUE, FOUND, FOUND, NOT_UNIQUE, FOUND]),
        ("orpo", {}, [FOUND, NOT_ATTAINED, NOT_ATTAINED, NOT_ATTAINED, NOT_ATTAINED, FOUND]),
    ],
)
def test_kinds_of_optima(
    method: str, settings: dict[str, Any], statuses: list[OptimumStatus]
) -> None:
    """Of wins among three outputs; two more have no mass."""
    wins = np.zeros((128, 5, 5))
    wins[:, :3, :3] = np.resize(np.array(list(KINDS.values())), (128, 3, 3))
    instance = single([0.5, 0.3, 0.2, 0, 0], [0, 1, 2, 0, 0], 0.5)
    batch = jax.tree.map(lambda x: np.stack([x] * 128), instance)
    found = population_optimum(method, batch, wins, **settings)
    assert dict(zip(KINDS, found.status, strict=False)) == dict(zip(KINDS, statuses, strict=True))
    for at, status in enumerate(statuses):
        if status in (FOUND, NOT_UNIQUE):
            assert np.exp(found.log_policy[at]).sum() == pytest.approx(1, rel=1e-12)
            assert found.last_step[at] <= 1e-9
        else:
            assert np.all(np.isnan(found.log_policy[at, :3])) and np.all(np.isnan(found.low[at]))
        if status == NOT_UNIQUE:  # the third was compared to none
            assert found.low[at, 2] == -np.inf and found.high[at, 2] == np.inf
            assert found.low[at, 1] == found.high[at, 1] < 0
        assert OptimumStatus(status).message


def test_a_robust_loss_is_unbounded_where_too_many_flips_are_assumed() -> None:
    """Of two outputs: above the share of upsets, 1 - q."""
    upsets = np.linspace(0.02, 0.48, 128)
    wins = np.zeros((128, 5, 5))
    wins[:, 0, 1], wins[:, 1, 0] = upsets, 1 - upsets
    instance = single([0.5, 0.5, 0, 0, 0], np.zeros(5))
    batch = jax.tree.map(lambda x: np.stack([x] * 128), instance)
    found = population_optimum("robust_dpo", batch, wins, label_smoothing=0.1)
    np.testing.assert_array_equal(found.status, np.where(upsets < 0.1, UNBOUNDED, FOUND))
    q = (0.9 - upsets[upsets > 0.1]) / 0.8
    np.testing.assert_allclose(found.low[upsets > 0.1, 1], logit(q), rtol=1e-9)


def test_a_graph_of_pairs_that_falls_apart() -> None:
    """Each component keeps the mass that it had, and is p* within itself."""
    given = prompts(128)
    compared = np.zeros((5, 5), bool)
    compared[:2, :2] = compared[2:, 2:] = True
    found = population_optimum("dpo", given.instance, Feedback(compared=compared))
    assert np.all(found.status == NOT_UNIQUE)
    shift = (given.r - given.r[:, :1]) / given.beta[:, None]
    np.testing.assert_allclose(found.low[:, 1], shift[:, 1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.high[:, 1], shift[:, 1], rtol=1e-6, atol=1e-6)
    assert np.all(found.low[:, 2:] == -np.inf) and np.all(found.high[:, 2:] == np.inf)
    s = found.log_policy - np.log(given.p)
    tilt = (given.r - given.r[:, 2:3]) / given.beta[:, None]
    np.testing.assert_allclose((s - s[:, 2:3])[:, 2:], tilt[:, 2:], rtol=1e-6, atol=1e-6)


# Batches, padding, dtypes, other people's losses.

ROW = single([0.5, 0.3, 0.2], [0.0, 1.0, 2.0], 0.5)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dpo", {}),
        ("hinge", {}),
        ("slic", {}),
        ("orpo", {}),
        ("kto", {}),
        ("grpo", {}),
        ("dr_grpo", {"group_size": 2}),
    ],
)
def test_outputs_without_mass_change_nothing(method: str, settings: dict[str, Any]) -> None:
    given = prompts(128, 3, seed=6, widest=5.0, beta=(0.2, 2.0))
    wide = with_empty(given.instance, 5, given.r, before=1)
    for sampling in ("reference", "uniform"):
        feedback = None if method.endswith("grpo") else Feedback(sampling=sampling)
        one = population_optimum(method, given.instance, feedback, **settings)
        other = population_optimum(method, wide, feedback, **settings)
        np.testing.assert_array_equal(one.status, other.status)
        np.testing.assert_allclose(other.log_policy[:, 1:4], one.log_policy, atol=1e-7)
        np.testing.assert_allclose(other.low[:, 1:4], one.low, atol=1e-6)
        assert np.all(np.isneginf(other.log_policy[:, [0, 4]]))
        assert np.all(np.isnan(other.low[:, [0, 4]])) and np.all(np.isnan(other.high[:, [0, 4]]))


def test_outputs_that_nobody_sees() -> None:
    found = population_optimum("dpo", ROW, Feedback(sampling=[0.4, 0.6, 0.0]))
    assert found.status == NOT_UNIQUE
    np.testing.assert_allclose(found.low, [0, 2, -np.inf], atol=1e-9)
    np.testing.assert_allclose(found.high, [0, 2, np.inf], atol=1e-9)


def test_feedback_on_outputs_without_mass_is_not_heard() -> None:
    row = single([0.5, 0.5, 0.0], [0, 1, 3], 0.5)
    wins = np.array([[0, 1, 9], [3, 0, 2], [1, 8, 0.0]])
    found = population_optimum("dpo", row, wins)
    assert found.status == FOUND
    np.testing.assert_allclose(found.low[:2], [0, np.log(3) / 0.5], atol=1e-9)


def test_equal_rewards_leave_the_reference() -> None:
    """Also beside an output without mass whose reward differs."""
    rng = np.random.default_rng(0)
    p = np.zeros((128, 5))
    p[:, :4] = rng.dirichlet(np.ones(4), 128)
    with jax.enable_x64(True):
        instance = Instance.from_probs(p, p, np.array([0.1, 0.1, 0.1, 0.1, 9.0]), 0.5, 0.3)
    for method in ("dpo", "grpo", "rloo"):
        found = population_optimum(method, instance)
        assert_found(found)
        np.testing.assert_allclose(np.exp(found.log_policy), p, atol=1e-9)


def test_numbers_of_numpy_are_numbers() -> None:
    row = single([0.5, 0.3, 0.2], [0, 1, 3], 0.5)
    plain = population_optimum("dpo", row, label_smoothing=0.1)
    for number in (np.float64(0.1), np.asarray(0.1), jax.numpy.asarray(0.1)):
        found = population_optimum("dpo", row, label_smoothing=number)
        np.testing.assert_allclose(found.log_policy, plain.log_policy, atol=1e-6)


@pytest.mark.parametrize("method", ["dpo", "ipo", "slic", "hinge", "orpo", "rloo"])
def test_an_only_output_keeps_all_mass(method: str) -> None:
    found = population_optimum(method, single([1.0, 0.0], [0, 1], 0.5))
    assert found.log_policy.tolist() == [0.0, -np.inf]


def test_one_instance_is_a_batch_of_one() -> None:
    given = prompts(128, 3, seed=6, widest=5.0, beta=(0.2, 2.0))
    row = jax.tree.map(lambda x: np.asarray(x)[7], given.instance)
    one = population_optimum("dpo", row)
    many = population_optimum("dpo", given.instance)
    assert one.log_policy.shape == one.low.shape == (3,) and one.status.shape == ()
    for name in ("log_policy", "status", "low", "high"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name)[7], atol=1e-9)
    weights = pairs(given.r[7], given.p[7])
    for scale in (1.0, 1e6):
        again = population_optimum("dpo", row, scale * weights)
        np.testing.assert_allclose(again.log_policy, one.log_policy, atol=1e-8)


def test_counts_are_feedback() -> None:
    """The maximum-likelihood reward of a sample, then eq. (1): DPO on that sample."""
    counts = np.array([[0, 30, 12], [41, 0, 25], [70, 66, 0]])
    solved = minimize(
        lambda x: np.sum(counts * np.logaddexp(0, x - x[:, None])),
        np.zeros(3),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    wanted = softmax(np.log([0.5, 0.3, 0.2]) + solved.x / 0.5)
    found = population_optimum("dpo", ROW, counts)
    np.testing.assert_allclose(np.exp(found.log_policy), wanted, atol=1e-6)


def test_rankings_and_thumbs_are_feedback() -> None:
    given = prompts(128)
    rankings, thumbs = np.zeros((128, 5, 5, 5)), np.zeros((128, 5, 2))
    for at, (p, r) in enumerate(zip(given.p, given.r, strict=True)):
        for ranking in itertools.permutations(range(5), 3):
            x = np.exp(r[list(ranking)])
            rankings[(at, *ranking)] = 100 * x[0] / x.sum() * x[1] / (x[1] + x[2])
        good = expit(r - p @ r)
        thumbs[at] = 100 * p[:, None] * np.stack([good, 1 - good], axis=1)
    found = population_optimum("plackett_luce_dpo", given.instance, rankings)
    wanted = softmax(np.log(given.p) + given.r / given.beta[:, None])
    assert total_variation(found, wanted) <= 1e-6
    found = population_optimum("kto", given.instance, thumbs)
    exact = population_optimum("kto", given.instance)
    np.testing.assert_allclose(np.exp(found.log_policy), np.exp(exact.log_policy), atol=1e-9)


def test_float32_instances_are_solved_in_float64() -> None:
    row = Instance.from_probs([0.2, 0.5, 0.3], [0.5, 0.1, 0.4], [0.0, 3.0, 4.0], 0.5, 0.7)
    assert row.beta.dtype == np.float32
    found = population_optimum("dpo", row)
    assert found.log_policy.dtype == found.low.dtype == np.float64
    stored = [np.asarray(x, float) for x in (row.log_p_aligned, row.log_p_unaligned, row.reward)]
    alpha = expit(float(row.logit_alpha))
    p = alpha * softmax(stored[0]) + (1 - alpha) * softmax(stored[1])
    wanted = softmax(np.log(p) + stored[2] / float(row.beta))
    np.testing.assert_allclose(np.exp(found.log_policy), wanted, atol=1e-9)


def test_beta_may_be_replaced() -> None:
    given = prompts(256)
    for beta in (0.7, np.geomspace(0.5, 2, 256)):
        found = population_optimum("dpo", given.instance, beta=beta)
        tilt = given.r / np.broadcast_to(beta, 256)[:, None]
        assert total_variation(found, softmax(np.log(given.p) + tilt)) <= 1e-6


def test_a_loss_of_ones_own() -> None:
    given = prompts(256, widest=5.0, beta=(0.3, 3.0))
    named = population_optimum("dpo", given.instance)
    own = population_optimum(jaxsim.dpo_loss, given.instance)
    assert_found(own)
    np.testing.assert_allclose(np.exp(own.log_policy), np.exp(named.log_policy), atol=1e-9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: population_optimum("ppo", ROW), "method is 'ppo'; expected one of reward_model"),
        (
            lambda: population_optimum("dpo", ROW, gamma=1.0),
            "dpo: unknown hyperparameter 'gamma'; expected beta, label_smoothing",
        ),
        (
            lambda: population_optimum("dpo", ROW, np.ones((2, 2))),
            r"feedback has shape .*2, 2\); expected \[outputs, outputs\]",
        ),
        (
            lambda: population_optimum("plackett_luce_dpo", ROW, np.ones((3, 2))),
            r"expected \[outputs\] \* k",
        ),
        (lambda: population_optimum("kto", ROW, np.ones((3, 3))), r"expected \[outputs, 2\]"),
        (lambda: population_optimum("dpo", ROW, -np.ones((3, 3))), "feedback holds a negative"),
        (lambda: population_optimum("dpo", ROW, np.full((3, 3), np.nan)), "nan"),
        (lambda: population_optimum("rloo", ROW, Feedback()), "expected no feedback"),
        (lambda: population_optimum("grpo", ROW, np.ones((3, 3))), "expected no feedback"),
        (
            lambda: population_optimum("dpo", ROW, Feedback(sampling=[0.5, 0.5])),
            r"sampling has shape \(2,\)",
        ),
        (
            lambda: population_optimum("dpo", ROW, Feedback(sampling=[-0.5, 0.5, 1.0])),
            "sampling holds a negative",
        ),
        (
            lambda: population_optimum("dpo", ROW, Feedback(compared=np.ones((2, 2)))),
            r"compared has shape \(2, 2\); expected \(3, 3\)",
        ),
        (lambda: population_optimum("lipo", ROW, Feedback(list_size=4)), "size is 4"),
        (lambda: population_optimum("kto", ROW, Feedback(sampling="policy")), "on-policy"),
        (lambda: population_optimum("grpo", ROW, kl="k4"), "kl is 'k4'"),
        (lambda: population_optimum("dpo", ROW, label_smoothing=0.7), "label_smoothing is 0.7"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: population_optimum("dpo", ROW, beta=-1.0), "beta"),
        (lambda: population_optimum("hinge", ROW, beta=0.0), "beta"),
        (lambda: population_optimum("reinforce", ROW, beta=np.nan), "beta"),
        (lambda: population_optimum("dpo", ROW, beta=np.ones(2)), "beta"),
        (lambda: population_optimum("kto", ROW, desirable_weight=-1.0), "desirable_weight"),
        (lambda: population_optimum("kto", ROW, reference_point=-1.0), "reference_point"),
        (lambda: population_optimum("slic", ROW, margin=-1.0), "margin"),
        (lambda: population_optimum("slic", ROW, regularization=-0.1), "regularization"),
        (lambda: population_optimum("robust_dpo", ROW, label_smoothing=0.5), "label_smoothing"),
        (lambda: population_optimum("dr_grpo", ROW, group_size=0), "group_size"),
        (lambda: population_optimum("hinge", ROW, Feedback(sampling="policy")), "on-policy"),
        (lambda: population_optimum("slic", ROW, Feedback(sampling="policy")), "on-policy"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_what_is_no_instance_is_named() -> None:
    with pytest.raises(TypeError, match="expected an Instance, got list"):
        population_optimum("dpo", [0.5, 0.5])
