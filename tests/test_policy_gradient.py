"""Policy-gradient objectives against formulas in loops, and their gradients' exact expectations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsim

Numbers = np.ndarray
BETA = 0.7


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def k_of(s: float, kl: str) -> float:
    return {"k1": s, "k2": s * s / 2, "k3": math.exp(-s) - 1 + s}[kl]


def clipped(ratio: float, advantage: float, clip: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def advantages(
    scores: list[float], *, normalize_std: bool, std_epsilon: float, leave_one_out: bool
) -> list[float]:
    size = len(scores)
    mean = sum(scores) / size
    std = math.sqrt(sum((x - mean) ** 2 for x in scores) / size)
    out = []
    for i, x in enumerate(scores):
        others = [scores[j] for j in range(size) if j != i]
        a = x - (sum(others) / (size - 1) if leave_one_out else mean)
        out.append(a / (std + std_epsilon) if normalize_std else a)
    return out


def group_by_hand(
    p: Numbers,
    old: Numbers,
    q: Numbers,
    r: Numbers,
    *,
    beta: float = BETA,
    clip: float = 0.2,
    normalize_std: bool = True,
    std_epsilon: float = 0.0,
    leave_one_out: bool = False,
    kl: str = "k3",
    kl_place: str = "loss",
    importance_corrected: bool = False,
) -> list[float]:
    """GRPO's objective of one group."""
    places = range(len(r))
    in_reward = kl_place == "reward"
    scores = [r[i] - (beta * k_of(old[i] - q[i], kl) if in_reward else 0) for i in places]
    a = advantages(
        scores, normalize_std=normalize_std, std_epsilon=std_epsilon, leave_one_out=leave_one_out
    )
    out = []
    for i in places:
        ratio = math.exp(p[i] - old[i])
        penalty = k_of(p[i] - q[i], kl) * (ratio if importance_corrected else 1)
        out.append(clipped(ratio, a[i], clip) - (0 if in_reward else beta * penalty))
    return out


def groups(num: int, size: int, seed: int = 0) -> list[Numbers]:
    """Log-probabilities of the policy, of one that it left behind, of the reference; rewards."""
    rng = np.random.default_rng(seed)
    p = -rng.exponential(3.0, (num, size))
    old, q = (p + rng.normal(scale=scale, size=(num, size)) for scale in (0.3, 1.0))
    return [p, old, q, rng.normal(size=(num, size))]


def slope(value: Callable[[Numbers], Numbers], p: Numbers, h: float = 1e-6) -> Numbers:
    """Central differences of a sum of terms, each of which depends on its own p alone."""
    return (value(p + h) - value(p - h)) / (2 * h)


SETTINGS = [
    {
        "normalize_std": std,
        "leave_one_out": leave_one_out,
        "kl": kl,
        "kl_place": place,
        "importance_corrected": corrected,
    }
    for std in (False, True)
    for leave_one_out in (False, True)
    for kl in ("k1", "k2", "k3")
    for place in ("loss", "reward")
    for corrected in (False, True)
]


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_place", ["loss", "reward"])
def test_grpo_is_the_formula(kl: str, kl_place: str) -> None:
    """Values, and slopes in log π with π_old held fixed: advantages carry none."""
    given = groups(12, 4)
    for options in SETTINGS:
        if (options["kl"], options["kl_place"]) != (kl, kl_place):
            continue
        options = options | {"clip": 0.1 if options["leave_one_out"] else 0.3}
        if options["normalize_std"]:
            options["std_epsilon"] = 0.05

        def by_hand(p: Numbers, options: dict[str, Any] = options) -> Numbers:
            return np.array([group_by_hand(*x, **options) for x in zip(p, *given[1:], strict=True)])

        def by_jaxsim(p: Any, options: dict[str, Any] = options) -> jax.Array:
            return jaxsim.grpo(p, *given[1:], beta=BETA, **options)

        found = by_jaxsim(given[0])
        assert found.shape == (12, 4) and found.dtype == np.float64
        np.testing.assert_allclose(found, by_hand(given[0]), rtol=1e-11, atol=1e-12)
        gradient = jax.grad(lambda p, f=by_jaxsim: jnp.sum(f(p)))(jnp.asarray(given[0]))
        np.testing.assert_allclose(gradient, slope(by_hand, given[0]), rtol=1e-6, atol=1e-7)
        if not options["normalize_std"]:
            del options["normalize_std"]
            dr = jaxsim.dr_grpo(*given, beta=BETA, **options)
            np.testing.assert_array_equal(dr, found)


def test_defaults_are_those_of_the_papers() -> None:
    given = groups(12, 4, seed=1)
    by_hand = [group_by_hand(*x) for x in zip(*given, strict=True)]
    np.testing.assert_allclose(jaxsim.grpo(*given, beta=BETA), by_hand, rtol=1e-11)
    dr = {"normalize_std": False, "kl": "k1", "importance_corrected": True}
    by_hand = [group_by_hand(*x, **dr) for x in zip(*given, strict=True)]
    np.testing.assert_allclose(jaxsim.dr_grpo(*given, beta=BETA), by_hand, rtol=1e-11, atol=1e-12)


def test_the_others_are_the_formulas() -> None:
    p, old, q, r = groups(12, 4, seed=2)
    advantage = r - BETA * (p - q) - 0.3
    found = jaxsim.reinforce(p, q, r, beta=BETA, baseline=0.3)
    np.testing.assert_allclose(found, advantage * p, rtol=1e-12)
    gradient = jax.grad(lambda p: jnp.sum(jaxsim.reinforce(p, q, r, beta=BETA, baseline=0.3)))(p)
    np.testing.assert_allclose(gradient, advantage, rtol=1e-12)

    scores = r - BETA * (p - q)
    others = np.array([[np.delete(row, i).mean() for i in range(4)] for row in scores])
    np.testing.assert_allclose(jaxsim.rloo(p, q, r, beta=BETA), (scores - others) * p, rtol=1e-11)
    gradient = jax.grad(lambda p: jnp.sum(jaxsim.rloo(p, q, r, beta=BETA)))(p)
    np.testing.assert_allclose(gradient, scores - others, rtol=1e-11)

    def ppo(p: Numbers) -> Numbers:
        a = r - BETA * (old - q) - 0.3
        cells = zip(np.exp(p - old).ravel(), a.ravel(), strict=True)
        return np.array([clipped(ratio, x, 0.2) for ratio, x in cells]).reshape(p.shape)

    settings = {"beta": BETA, "clip": 0.2, "baseline": 0.3}
    np.testing.assert_allclose(jaxsim.ppo_clip(p, old, q, r, **settings), ppo(p), rtol=1e-12)
    gradient = jax.grad(lambda p: jnp.sum(jaxsim.ppo_clip(p, old, q, r, **settings)))(p)
    np.testing.assert_allclose(gradient, slope(ppo, p), rtol=1e-6, atol=1e-8)
    assert np.any(gradient == 0)  # where it was clipped


def test_weights_are_shares_of_a_group() -> None:
    """Whole-number shares are repeats."""
    (p,), (old,), (q,), (r,) = groups(1, 3, seed=3)
    repeats = np.array([1, 3, 2])
    for options in ({}, {"normalize_std": False}, {"kl_place": "reward", "kl": "k1"}):
        shared = jaxsim.grpo(p, old, q, r, beta=BETA, weights=repeats / 6, **options)
        written_out = group_by_hand(*(np.repeat(x, repeats) for x in (p, old, q, r)), **options)
        first = np.cumsum(repeats) - repeats
        np.testing.assert_allclose(shared, np.array(written_out)[first], rtol=1e-12)
    # Of shares, the others' mean is that of all.
    scores = r - BETA * (p - q)
    mean = scores @ repeats / 6
    found = jaxsim.rloo(p, q, r, beta=BETA, weights=repeats / 6)
    np.testing.assert_allclose(found, (scores - mean) * p, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_equal_rewards_have_no_advantage(dtype: str, size: int) -> None:
    p = jnp.linspace(-3, -1, size, dtype=dtype)
    r = jnp.full(size, 0.1, dtype)
    rounding = 10 * np.finfo(dtype).eps
    for leave_one_out in (False, True):
        options = {"beta": 1e-30, "leave_one_out": leave_one_out, "kl": "k1"}
        assert np.abs(jaxsim.grpo(p, p, p, r, **options)).max() == 0
        assert np.abs(jaxsim.dr_grpo(p, p, p, r, **options)).max() <= rounding
    assert np.abs(jaxsim.rloo(p, p, r, beta=1.0)).max() <= 3 * rounding
    shares = jnp.arange(1, size + 1, dtype=dtype) / (size * (size + 1) / 2)
    assert np.abs(jaxsim.grpo(p, p, p, r, beta=1e-30, weights=shares)).max() == 0


def test_outputs_without_a_share_do_not_count() -> None:
    """Equal rewards have no advantage, whatever is that of an output that is never drawn."""
    p = np.full((20, 4), -1.0)
    weights = np.zeros((20, 4))
    weights[:, :3] = np.random.default_rng(0).dirichlet(np.ones(3), 20)
    r = np.tile([0.1, 0.1, 0.1, 5.0], (20, 1))
    found = jaxsim.grpo(p, p, p, r, beta=1.0, weights=weights)
    np.testing.assert_allclose(found[:, :3], 0, atol=1e-12)


def test_nothing_is_clipped_where_the_policy_is_the_old_one() -> None:
    p, _, q, r = groups(12, 4, seed=4)
    for clip in (1e-6, 0.2, np.inf):
        for objective in (jaxsim.grpo, jaxsim.dr_grpo, jaxsim.ppo_clip):
            value, gradient = jax.value_and_grad(
                lambda x, f=objective, c=clip: jnp.sum(f(x, p, q, r, beta=BETA, clip=c))
            )(jnp.asarray(p))
            wide = jax.grad(lambda x, f=objective: jnp.sum(f(x, p, q, r, beta=BETA, clip=1e3)))(p)
            assert np.isfinite(value)
            np.testing.assert_allclose(gradient, wide, rtol=1e-12)


def test_only_the_policy_carries_a_gradient() -> None:
    """Advantages and the sampling policy are constants."""
    p, old, q, r = (jnp.asarray(x) for x in groups(12, 4, seed=5))

    def total(objective: Any, *given: Any, **options: Any) -> jax.Array:
        return jnp.sum(objective(*given, beta=BETA, **options))

    for objective in (jaxsim.grpo, jaxsim.dr_grpo, jaxsim.ppo_clip):
        of_old, of_rewards = jax.grad(
            lambda old, r, f=objective: total(f, p, old, q, r), argnums=(0, 1)
        )(old, r)
        assert not np.any(of_old) and not np.any(of_rewards)
        place = {} if objective is jaxsim.ppo_clip else {"kl_place": "reward"}
        of_reference = jax.grad(lambda q, f=objective, o=place: total(f, p, old, q, r, **o))(q)
        assert not np.any(of_reference)
    for objective in (jaxsim.reinforce, jaxsim.rloo):
        of_others = jax.grad(lambda q, r, f=objective: total(f, p, q, r), argnums=(0, 1))(q, r)
        assert not any(np.any(x) for x in of_others)


FAR = 1e4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_ratios_of_new_to_old_are_clipped(dtype: str) -> None:
    """Values by the formula; no slope where the clipped branch is the smaller one."""
    old = jnp.asarray([-FAR, -1.0, -FAR, -1.0, -FAR], dtype)
    p = jnp.asarray([-1.0, -FAR, -1.0, -FAR, -1.0], dtype)  # ρ = ∞, 0, ∞, 0, ∞
    r = jnp.asarray([1.0, -1.0, 0.0, 1.0, 2.0], dtype)
    value, gradient = jax.value_and_grad(
        lambda x: jnp.sum(jaxsim.ppo_clip(x, old, old, r, beta=1.0, clip=0.2))
    )(p)
    np.testing.assert_allclose(value, 1.2 - 0.8 + 0 + 0 + 2.4, rtol=1e-5)
    np.testing.assert_array_equal(gradient, 0)
    plain = {"beta": 1.0, "importance_corrected": False}
    found = jaxsim.dr_grpo(p, old, p, jnp.ones(5, dtype), **plain)  # k1 = 0, advantages too
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_extreme_ratios_to_the_reference(dtype: str, kl: str) -> None:
    """The penalty alone; k3 is e^10000 on one side."""
    r = jnp.zeros(1, dtype)
    for s in (FAR, -FAR):
        if kl == "k3" and s < 0:
            continue
        p = jnp.asarray([-1.0 if s > 0 else -1 - FAR], dtype)
        q = p - jnp.asarray(s, dtype)
        for corrected in (False, True):
            options = {"beta": 1.0, "kl": kl, "importance_corrected": corrected}
            value, gradient = jax.value_and_grad(
                lambda x, p=p, q=q, o=options: jnp.sum(jaxsim.dr_grpo(x, p, q, r, **o))
            )(p)
            k = s * s / 2 if kl == "k2" else s - (kl == "k3")
            by_hand = {"k1": 1, "k2": s, "k3": 1}[kl] + (k if corrected else 0)
            np.testing.assert_allclose([value, gradient[0]], [-k, -by_hand], rtol=1e-6)
        scores = jaxsim.dr_grpo(p, p, q, r, beta=1.0, kl=kl, kl_place="reward")
        assert np.all(np.isfinite(scores))
    far = jnp.asarray([-1 - FAR], dtype)
    assert np.isfinite(jaxsim.reinforce(far, jnp.zeros_like(far), r, beta=1.0))


def test_whole_numbers_and_lists() -> None:
    assert float(jaxsim.ppo_clip(-1, -2, -2, 1, beta=1)) == pytest.approx(1.2)
    assert np.asarray(jaxsim.rloo([-1, -1], [-1, -1], [1, 0], beta=1)).tolist() == [-1, 1]
    assert np.asarray(jaxsim.grpo([-1, -2], [-1, -2], [-1, -2], [3, 1], beta=1)).tolist() == [1, -1]


# Exact expectations: all groups of a policy on three outputs.

REFERENCE = np.array([0.5, 0.2, 0.3])
REWARD = np.array([0.3, 2.0, -1.0])
LOGITS = np.array([0.4, -0.5, 0.9])
POLICY = np.exp(LOGITS) / np.exp(LOGITS).sum()
RATIO = np.log(POLICY / REFERENCE)


def expected_gradient(objective: Callable[..., Any], size: int, old: Numbers = POLICY) -> Numbers:
    """The gradient in the logits of a group's mean objective, groups drawn from the old policy."""
    index = np.array(list(itertools.product(range(3), repeat=size)))
    chance = np.prod(old[index], axis=1)

    def mean(logits: jax.Array) -> jax.Array:
        p = jax.nn.log_softmax(logits)[index]
        values = objective(p, np.log(old)[index], np.log(REFERENCE)[index], REWARD[index])
        return jnp.sum(chance * jnp.mean(values, axis=1))

    return np.asarray(jax.grad(mean)(jnp.asarray(LOGITS)))


def of_mean(h: Numbers) -> Numbers:
    """The gradient in the logits of E_π[h], h fixed."""
    return POLICY * (h - POLICY @ h)


TO_REFERENCE = of_mean(RATIO)  # of KL(π‖p_ref)
FROM_REFERENCE = POLICY - REFERENCE  # of KL(p_ref‖π)


def test_the_gradients_by_hand() -> None:
    def kl(a: Numbers, b: Numbers) -> float:
        return float(np.sum(a * np.log(a / b)))

    def softmax(x: Numbers) -> Numbers:
        return np.exp(x) / np.exp(x).sum()

    for direction, step in enumerate(1e-6 * np.eye(3)):
        ends = softmax(LOGITS + step), softmax(LOGITS - step)
        for by_hand, value in (
            (TO_REFERENCE, lambda p: kl(p, REFERENCE)),
            (FROM_REFERENCE, lambda p: kl(REFERENCE, p)),
            (of_mean(REWARD), lambda p: p @ REWARD),
        ):
            found = (value(ends[0]) - value(ends[1])) / 2e-6
            assert by_hand[direction] == pytest.approx(found, abs=1e-9)


def group_objective(name: str, **options: Any) -> Callable[..., Any]:
    return lambda *x: getattr(jaxsim, name)(*x, beta=BETA, **options)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(
    ("kl", "corrected", "penalty"),
    [
        ("k1", False, np.zeros(3)),  # sampled k1 in the loss pulls nowhere
        ("k2", False, TO_REFERENCE),
        ("k3", False, FROM_REFERENCE),
        ("k1", True, TO_REFERENCE),
        ("k3", True, TO_REFERENCE),
        ("k2", True, of_mean(RATIO**2 / 2) + TO_REFERENCE),
    ],
)
def test_penalties_in_the_loss(
    kl: str, corrected: bool, penalty: Numbers, leave_one_out: bool, size: int
) -> None:
    """And the advantage: unbiased without the own sample, shrunk by 1 - 1/G with it."""
    found = expected_gradient(
        group_objective(
            "dr_grpo", kl=kl, importance_corrected=corrected, leave_one_out=leave_one_out
        ),
        size,
    )
    share = 1 if leave_one_out else 1 - 1 / size
    np.testing.assert_allclose(found, share * of_mean(REWARD) - BETA * penalty, atol=1e-13)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("kl", "k"), [("k1", RATIO), ("k2", RATIO**2 / 2), ("k3", np.expm1(-RATIO) + RATIO)]
)
def test_penalties_in_the_reward(kl: str, k: Numbers, size: int) -> None:
    for leave_one_out, share in ((False, 1 - 1 / size), (True, 1)):
        options = {"kl": kl, "kl_place": "reward", "leave_one_out": leave_one_out}
        found = expected_gradient(group_objective("dr_grpo", **options), size)
        np.testing.assert_allclose(found, share * of_mean(REWARD - BETA * k), atol=1e-13)


@pytest.mark.parametrize("size", [2, 3])
def test_rlhf_has_the_gradient_of_equation_1(size: int) -> None:
    """REINFORCE and PPO whatever the baseline, RLOO, PPO however tightly clipped."""
    wanted = of_mean(REWARD) - BETA * TO_REFERENCE
    for objective in (
        lambda p, old, q, r: jaxsim.reinforce(p, q, r, beta=BETA, baseline=0.0),
        lambda p, old, q, r: jaxsim.reinforce(p, q, r, beta=BETA, baseline=-5.0),
        lambda p, old, q, r: jaxsim.rloo(p, q, r, beta=BETA),
        group_objective("ppo_clip"),
        group_objective("ppo_clip", baseline=3.0, clip=1e-3),
    ):
        np.testing.assert_allclose(expected_gradient(objective, size), wanted, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_std_normalised_groups(size: int, leave_one_out: bool) -> None:
    wanted = np.zeros(3)
    for group in itertools.product(range(3), repeat=size):
        chance = math.prod(POLICY[y] for y in group)
        scores = [REWARD[y] for y in group]
        if len(set(scores)) > 1:
            a = advantages(scores, normalize_std=True, std_epsilon=0.1, leave_one_out=leave_one_out)
            for y, x in zip(group, a, strict=True):
                wanted += chance * x * (np.eye(3)[y] - POLICY) / size
    options = {"std_epsilon": 0.1, "leave_one_out": leave_one_out}
    found = expected_gradient(group_objective("grpo", **options), size)
    np.testing.assert_allclose(found, wanted - BETA * FROM_REFERENCE, atol=1e-13)


def test_samples_of_another_policy() -> None:
    """Unclipped ratios make up for it: PPO has the gradient of E_π[r - β s_old], k1 the KL's."""
    old = np.array([0.3, 0.3, 0.4])
    found = expected_gradient(group_objective("ppo_clip", clip=np.inf), 2, old)
    wanted = of_mean(REWARD - BETA * np.log(old / REFERENCE))
    np.testing.assert_allclose(found, wanted, atol=1e-13)
    for kl in ("k1", "k3"):
        options = {"clip": np.inf, "leave_one_out": True, "kl": kl}
        found = expected_gradient(group_objective("dr_grpo", **options), 2, old)
        np.testing.assert_allclose(found, of_mean(REWARD) - BETA * TO_REFERENCE, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jaxsim.reinforce(-1.0, -1.0, 1.0, beta=0.0), "beta is 0"),
        (lambda: jaxsim.rloo([-1.0, -2.0], [-1.0, -2.0], [1.0, 0.0], beta=-1), "beta is -1"),
        (lambda: jaxsim.rloo([-1.0], [-1.0], [1.0], beta=1.0), "group of one"),
        (lambda: jaxsim.rloo(-1.0, -1.0, 1.0, beta=1.0), "group of one"),
        (lambda: jaxsim.ppo_clip(-1.0, -1.0, -1.0, 1.0, beta=1.0, clip=0.0), "clip is 0"),
        (lambda: jaxsim.ppo_clip(-1.0, -1.0, -1.0, 1.0, beta=math.nan), "beta is nan"),
        (lambda: jaxsim.grpo(*[[-1.0, -2.0]] * 4, beta=0), "beta is 0"),
        (lambda: jaxsim.grpo(*[[-1.0, -2.0]] * 4, beta=1.0, clip=math.nan), "clip is nan"),
        (
            lambda: jaxsim.grpo(*[[-1.0, -2.0]] * 4, beta=1.0, kl="k4"),
            "kl is 'k4'; expected one of k1, k2, k3",
        ),
        (
            lambda: jaxsim.dr_grpo(*[[-1.0, -2.0]] * 4, beta=1.0, kl="k4", kl_place="reward"),
            "kl is 'k4'",
        ),
        (
            lambda: jaxsim.dr_grpo(*[[-1.0, -2.0]] * 4, beta=1.0, kl_place="advantage"),
            "kl_place is 'advantage'; expected one of loss, reward",
        ),
        (lambda: jaxsim.grpo(*[[-1.0]] * 4, beta=1.0, leave_one_out=True), "group of one"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
