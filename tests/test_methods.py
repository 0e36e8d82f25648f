"""Losses of preference-tuning methods against their formulas, written out in NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxsim

Numbers = np.ndarray


def sigmoid(x: Numbers) -> Numbers:
    return np.where(
        x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
    )


def log_sigmoid(x: Numbers) -> Numbers:
    return -np.logaddexp(0, -x)


def delta(pc: Numbers, pr: Numbers, rc: Numbers, rr: Numbers) -> Numbers:
    return (pc - pr) - (rc - rr)


def lipo(p: Numbers, q: Numbers, labels: Numbers, beta: float) -> Numbers:
    """Pair by pair, in loops."""
    out = np.zeros(len(p))
    for at, (policy, reference, psi) in enumerate(zip(p, q, labels, strict=True)):
        s = beta * (policy - reference)
        order = sorted(range(len(s)), key=lambda i, s=s: (-s[i], i))
        rank = {i: place + 1 for place, i in enumerate(order)}
        for i in range(len(s)):
            for j in range(len(s)):
                if psi[i] > psi[j]:
                    gain = abs(2.0 ** psi[i] - 2.0 ** psi[j])
                    discount = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                    out[at] += gain * discount * math.log1p(math.exp(-(s[i] - s[j])))
    return out


def plackett_luce(p: Numbers, q: Numbers, beta: float) -> Numbers:
    out = np.zeros(len(p))
    for at, s in enumerate(beta * (p - q)):
        for k in range(len(s)):
            out[at] -= math.log(math.exp(s[k]) / sum(math.exp(x) for x in s[k:]))
    return out


PAIRED: dict[str, tuple[Callable[..., Any], Callable[..., Numbers]]] = {
    "dpo": (
        lambda *x: jaxsim.dpo_loss(*x, beta=0.3),
        lambda *x: -log_sigmoid(0.3 * delta(*x)),
    ),
    "cdpo": (
        lambda *x: jaxsim.dpo_loss(*x, beta=0.3, label_smoothing=0.2),
        lambda *x: -0.8 * log_sigmoid(0.3 * delta(*x)) - 0.2 * log_sigmoid(-0.3 * delta(*x)),
    ),
    "robust_dpo": (
        lambda *x: jaxsim.robust_dpo_loss(*x, beta=0.3, label_smoothing=0.2),
        lambda *x: (
            (-0.8 * log_sigmoid(0.3 * delta(*x)) + 0.2 * log_sigmoid(-0.3 * delta(*x))) / 0.6
        ),
    ),
    "ipo": (
        lambda *x: jaxsim.ipo_loss(*x, beta=0.3),
        lambda *x: (delta(*x) - 1 / 0.6) ** 2,
    ),
    "hinge": (
        lambda *x: jaxsim.hinge_loss(*x, beta=0.3),
        lambda *x: np.maximum(0, 1 - 0.3 * delta(*x)),
    ),
    "exo": (
        lambda *x: jaxsim.exo_loss(*x, beta=0.3, label_smoothing=0.01),
        lambda *x: (
            sigmoid(0.3 * delta(*x)) * (log_sigmoid(0.3 * delta(*x)) - np.log(0.99))
            + sigmoid(-0.3 * delta(*x)) * (log_sigmoid(-0.3 * delta(*x)) - np.log(0.01))
        ),
    ),
    "reward_model": (
        lambda pc, pr, rc, rr: jaxsim.reward_model_loss(pc, pr),
        lambda pc, pr, rc, rr: -log_sigmoid(pc - pr),
    ),
    "slic": (
        lambda pc, pr, rc, rr: jaxsim.slic_loss(pc, pr, rc, margin=2.0, regularization=0.1),
        lambda pc, pr, rc, rr: np.maximum(0, 2.0 - pc + pr) - 0.1 * rc,
    ),
    "orpo": (
        lambda pc, pr, rc, rr: jaxsim.orpo_loss(pc, pr, beta=0.1),
        lambda pc, pr, rc, rr: (
            -pc - 0.1 * log_sigmoid((pc - np.log1p(-np.exp(pc))) - (pr - np.log1p(-np.exp(pr))))
        ),
    ),
    "simpo": (
        lambda pc, pr, rc, rr: jaxsim.simpo_loss(pc, pr, beta=2.0, gamma=0.5),
        lambda pc, pr, rc, rr: -log_sigmoid(2.0 * (pc - pr) - 0.5),
    ),
    "kto": (
        lambda pc, pr, rc, rr: jaxsim.kto_loss(
            pc, rc, pr > -5, beta=0.3, reference_point=1.0, undesirable_weight=1.5
        ),
        lambda pc, pr, rc, rr: np.where(
            pr > -5,
            1 - sigmoid(0.3 * ((pc - rc) - 1.0)),
            1.5 * (1 - sigmoid(0.3 * (1.0 - (pc - rc)))),
        ),
    ),
}
LISTS: dict[str, tuple[Callable[..., Any], Callable[..., Numbers]]] = {
    "plackett_luce": (
        lambda p, q, labels: jaxsim.plackett_luce_dpo_loss(p, q, beta=0.7),
        lambda p, q, labels: plackett_luce(p, q, 0.7),
    ),
    "lipo": (
        lambda p, q, labels: jaxsim.lipo_loss(p, q, labels, beta=0.7),
        lambda p, q, labels: lipo(p, q, labels, 0.7),
    ),
}


def logps(shape: tuple[int, ...], seed: int) -> Numbers:
    """Log-probabilities from -20 to almost 0."""
    return -20 * np.random.default_rng(seed).uniform(0.001, 1, shape) ** 2


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_agree_with_the_formula(name: str) -> None:
    loss, formula = PAIRED[name]
    given = [logps((1000,), seed) for seed in range(4)]
    with jax.enable_x64(True):
        found = loss(*map(jnp.asarray, given))
        assert found.shape == (1000,) and found.dtype == np.float64
        np.testing.assert_allclose(found, formula(*given), rtol=1e-9, atol=1e-9)
        some = [jnp.asarray(x[:20] - 0.1) for x in given]  # finite differences of log(1 - p)
        if name not in ("hinge", "slic"):  # which have a corner
            check_grads(loss, some, order=1, modes=["rev"], rtol=1e-5, atol=1e-6)
    narrow = [jnp.asarray(x, jnp.float32) for x in given]
    wide = formula(*(np.asarray(x, float) for x in narrow))
    np.testing.assert_allclose(loss(*narrow), wide, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("name", LISTS)
def test_lists_agree_with_the_formula(name: str) -> None:
    loss, formula = LISTS[name]
    p, q = logps((200, 5), 0), logps((200, 5), 1)
    labels = np.random.default_rng(2).integers(0, 4, (200, 5)).astype(float)
    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in (p, q, labels)]
        found = loss(*given)
        assert found.shape == (200,)
        np.testing.assert_allclose(found, formula(p, q, labels), rtol=1e-9)
        check_grads(lambda x: loss(x, *given[1:]), (given[0],), 1, ["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_log_ratios_have_finite_values_and_gradients(name: str, dtype: str) -> None:
    loss = PAIRED[name][0]
    ends = [-1e4, -1.0, -1e-3]
    grid = np.stack(np.meshgrid(*[ends] * 4), axis=-1).reshape(-1, 4).T
    with jax.enable_x64(dtype == "float64"):
        given = [jnp.asarray(x, dtype) for x in grid]
        assert np.all(np.isfinite(loss(*given)))
        gradients = jax.grad(lambda x: jnp.sum(loss(*x)))(given)
        assert np.all(np.isfinite(gradients))


@pytest.mark.parametrize("name", LISTS)
def test_extreme_lists_have_finite_values_and_gradients(name: str) -> None:
    loss = LISTS[name][0]
    p = jnp.asarray([[-1e4, -1.0, -5e3], [-1e-3, -1e4, -1e4]])
    labels = jnp.asarray([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    for q in (jnp.zeros_like(p) - 1, p[::-1]):
        assert np.all(np.isfinite(loss(p, q, labels)))
        assert np.all(np.isfinite(jax.grad(lambda x, q=q: jnp.sum(loss(x, q, labels)))(p)))


def test_two_outputs_make_dpo() -> None:
    p, q = logps((50, 2), 0), logps((50, 2), 1)
    pair = jaxsim.dpo_loss(p[:, 0], p[:, 1], q[:, 0], q[:, 1], beta=0.4)
    np.testing.assert_allclose(jaxsim.plackett_luce_dpo_loss(p, q, beta=0.4), pair, rtol=1e-5)
    ranked = jaxsim.lipo_loss(p, q, np.tile([1.0, 0.0], (50, 1)), beta=0.4)
    np.testing.assert_allclose(ranked, (1 - 1 / math.log2(3)) * pair, rtol=1e-5)


def test_robust_dpo_is_unbiased_under_flips() -> None:
    """(1-ε) ℓ(labels) + ε ℓ(labels flipped) is the loss of clean labels."""
    pc, pr, rc, rr = (logps((100,), seed) for seed in range(4))
    robust = {"beta": 0.5, "label_smoothing": 0.3}
    mean = 0.7 * jaxsim.robust_dpo_loss(pc, pr, rc, rr, **robust) + 0.3 * jaxsim.robust_dpo_loss(
        pr, pc, rr, rc, **robust
    )
    np.testing.assert_allclose(
        mean, jaxsim.dpo_loss(pc, pr, rc, rr, beta=0.5), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jaxsim.dpo_loss(0, 0, 0, 0, beta=0), "beta is 0"),
        (lambda: jaxsim.ipo_loss(0, 0, 0, 0, beta=-1), "beta is -1"),
        (
            lambda: jaxsim.dpo_loss(0, 0, 0, 0, beta=1, label_smoothing=0.6),
            "label_smoothing is 0.6",
        ),
        (
            lambda: jaxsim.robust_dpo_loss(0, 0, 0, 0, beta=1, label_smoothing=0.5),
            "label_smoothing",
        ),
        (lambda: jaxsim.exo_loss(0, 0, 0, 0, beta=1, label_smoothing=0), "label_smoothing is 0"),
        (lambda: jaxsim.slic_loss(0, 0, margin=0), "margin is 0"),
        (lambda: jaxsim.slic_loss(0, 0, margin=1, regularization=-1), "regularization is -1"),
        (lambda: jaxsim.kto_loss(0, 0, True, beta=1, desirable_weight=0), "desirable_weight is 0"),
        (lambda: jaxsim.lipo_loss([0.0], [0.0], [0.0], beta=math.nan), "beta is nan"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
