"""The closed form: identities of the paper, transformations, gradients, batches.

Accuracy against 50 digits is the business of `test_accuracy.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import jaxsim
from jaxsim import Components, Family, Instance, Scalar
from tests import reference

N = 6  # one shape for all of hypothesis's examples, so that each function compiles once
FUNCTIONS = (jaxsim.evaluate, jaxsim.optimal_policy, jaxsim.mixture_weights, jaxsim.theorem2)


def families() -> list[Family]:
    kinds = ("dirichlet", "sparse", "disjoint", "zipf")
    return [Family(outputs=N, components=Components(kind=kind)) for kind in kinds]


def batch(kind: int = 0, num: int = 64) -> Instance:
    return jaxsim.sample_instances(jax.random.key(7), families()[kind], num)


def row(instance: Instance, i: int) -> Instance:
    return jax.tree.map(lambda x: x[i], instance)


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    numbers = st.floats(0.01, 1.0)
    masses = [draw(st.lists(numbers | st.just(0.0), min_size=N, max_size=N)) for _ in range(2)]
    for mass in masses:
        mass[draw(st.integers(0, N - 1))] = 1.0
    p_a, p_u = (np.asarray(mass) / np.sum(mass) for mass in masses)
    reward = draw(st.lists(st.floats(-5, 5, width=32), min_size=N, max_size=N))
    alpha = draw(st.floats(0.001, 0.999))
    beta = draw(st.floats(0.05, 100))
    return Instance.from_probs(p_a, p_u, np.asarray(reward), alpha, beta)


@settings(deadline=None, max_examples=100)
@given(instances())
def test_policy_is_a_distribution_on_the_support(instance: Instance) -> None:
    log_p = np.asarray(jaxsim.optimal_policy(instance), np.float64)
    support = np.isfinite(np.maximum(instance.log_p_aligned, instance.log_p_unaligned))
    np.testing.assert_array_equal(np.isfinite(log_p), support)
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(instances(), st.floats(-50, 50, width=16))
def test_adding_a_constant_to_the_reward_moves_log_z_alone(instance: Instance, c: float) -> None:
    moved = Instance(**(vars(instance) | {"reward": instance.reward + np.float32(c)}))
    # The sum is rounded; what is left of it is the instance that must be compared.
    before = Instance(**(vars(moved) | {"reward": moved.reward - np.float32(c)}))
    one, two = jaxsim.evaluate(before), jaxsim.evaluate(moved)
    size = 1 + (abs(c) + 5) / float(instance.beta)
    assert float(two.log_z - one.log_z) == pytest.approx(c / float(instance.beta), abs=4e-6 * size)
    assert float(two.log_odds_shift) == pytest.approx(float(one.log_odds_shift), abs=4e-6 * size)
    assert float(two.kl) == pytest.approx(float(one.kl), abs=4e-6 * size)


@settings(deadline=None, max_examples=100)
@given(instances(), instances())
def test_no_policy_beats_the_optimum(instance: Instance, other: Instance) -> None:
    """Eq. (1): L(p) = β log Z - β KL(p‖p*), for the policy p* of another instance."""
    best = jaxsim.evaluate(instance).objective
    rival = jnp.where(
        jnp.isfinite(jaxsim.optimal_policy(instance)), jaxsim.optimal_policy(other), -jnp.inf
    )
    rival = jax.nn.log_softmax(jnp.where(jnp.any(jnp.isfinite(rival)), rival, 0.0))
    value = jaxsim.objective(rival, instance)
    kl = jaxsim.kl_divergence(rival, jaxsim.optimal_policy(instance))
    if np.isinf(kl):
        assert value == -np.inf
        return
    size = 1 + 10 / float(instance.beta) + float(kl)
    gap = float(best - value) / float(instance.beta)
    assert gap >= -4e-6 * size
    assert gap == pytest.approx(float(kl), abs=8e-6 * size)


@pytest.mark.parametrize("kind", range(4))
def test_against_numpy(kind: int) -> None:
    b = batch(kind)
    found, expected = jaxsim.evaluate(b), reference.tilt_numpy(**vars(b))
    for name, value in vars(found).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", range(4))
def test_lemma_1_and_tpm(kind: int) -> None:
    b = batch(kind)
    weights, log_p = jaxsim.mixture_weights(b), jaxsim.optimal_policy(b)
    parts = [
        np.exp(np.where(np.isfinite(p), np.asarray(w, np.float64) + np.asarray(p), -np.inf))
        for w, p in ((weights.aligned, b.log_p_aligned), (weights.unaligned, b.log_p_unaligned))
    ]
    np.testing.assert_allclose(parts[0] + parts[1], np.exp(log_p), rtol=2e-4, atol=1e-30)
    e = jaxsim.evaluate(b)
    np.testing.assert_allclose(parts[0].sum(axis=1), np.exp(e.log_tpm_aligned), rtol=1e-4)
    np.testing.assert_allclose(parts[1].sum(axis=1), np.exp(e.log_tpm_unaligned), rtol=1e-4)
    np.testing.assert_allclose(jaxsim.tpm(log_p, b), np.exp(e.log_tpm_aligned), rtol=1e-4)


def test_tpm_of_the_reference_is_alpha() -> None:
    b = batch()
    log_ref = np.log(
        np.asarray(b.alpha)[:, None] * np.exp(b.log_p_aligned)
        + (1 - np.asarray(b.alpha)[:, None]) * np.exp(b.log_p_unaligned)
    )
    np.testing.assert_allclose(jaxsim.tpm(jnp.asarray(log_ref), b), b.alpha, rtol=1e-5)


def test_large_beta_gives_the_reference() -> None:
    b = Instance(**(vars(batch()) | {"beta": jnp.full(64, 1e8)}))
    e = jaxsim.evaluate(b)
    assert np.max(np.abs(e.log_odds_shift)) < 1e-7
    assert np.max(e.kl) < 1e-14
    np.testing.assert_allclose(np.exp(e.log_tpm_aligned), b.alpha, rtol=1e-5)


def test_small_beta_goes_to_the_top_reward() -> None:
    """As β → 0, TPM(A) → α p_A(T)/p_ref(T) on the outputs T of the highest reward."""
    instance = Instance.from_probs([0.2, 0.3, 0.5], [0.5, 0.4, 0.1], [1.0, 3.0, 3.0], 0.3, 1e-4)
    mass = 0.3 * 0.8, 0.7 * 0.5
    expected = mass[0] / sum(mass)
    assert math.exp(float(jaxsim.evaluate(instance).log_tpm_aligned)) == pytest.approx(expected)


def test_reward_gain_is_the_symmetrised_divergence() -> None:
    """E_{p*}[r] - E_ref[r] = β (KL(p*‖p_ref) + KL(p_ref‖p*))."""
    b = batch()
    p_ref = jaxsim.optimal_policy(Instance(**(vars(b) | {"beta": jnp.full(64, 1e20)})))
    best = jaxsim.optimal_policy(b)
    both = jaxsim.kl_divergence(best, p_ref) + jaxsim.kl_divergence(p_ref, best)
    gain = jaxsim.evaluate(b).expected_reward - jnp.sum(jnp.exp(p_ref) * b.reward, axis=1)
    np.testing.assert_allclose(gain, b.beta * both, rtol=1e-3, atol=1e-5)


def test_take_back_logits() -> None:
    b = batch()
    log_p = jaxsim.optimal_policy(b)
    log_ref = jaxsim.optimal_policy(Instance(**(vars(b) | {"beta": jnp.full(64, 1e20)})))

    def softmax(x: jax.Array) -> jax.Array:
        return jax.nn.softmax(x, axis=-1)

    back = jaxsim.take_back_logits(log_p, log_ref, a=0, b=-1)
    np.testing.assert_allclose(softmax(back), np.exp(log_ref), atol=1e-6)
    further = jaxsim.take_back_logits(log_p, log_ref, a=3, b=2)
    stronger = Instance(**(vars(b) | {"beta": b.beta / 3}))
    np.testing.assert_allclose(softmax(further), np.exp(jaxsim.optimal_policy(stronger)), atol=2e-4)


def test_take_back_logits_stays_off_what_the_reference_lacks() -> None:
    tuned, ref = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([0.5, -jnp.inf, 0.0])
    for a, b in ((0.0, -1.0), (2.0, 1.0), (-1.0, -2.0), (1.0, 1.0)):
        result = jaxsim.take_back_logits(tuned, ref, a=a, b=b)
        np.testing.assert_allclose(result, [-b * 0.5, -np.inf, a])
    with pytest.raises(ValueError, match=r"logits_tuned has shape \(2,\)"):
        jaxsim.take_back_logits(tuned[:2], ref, a=1.0, b=0.0)


def assert_close(one: object, two: object) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_batch_equals_rows_vmap_and_jit(function: Any) -> None:
    for kind in range(4):
        b = batch(kind, 5)
        whole = function(b)
        assert_close(whole, jax.vmap(function)(b))
        assert_close(whole, jax.jit(function)(b))
        for i in range(5):
            assert_close([x[i] for x in jax.tree.leaves(whole)], function(row(b, i)))


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    b = batch(0, 5)
    spoilt = jax.tree.map(lambda x: x.at[2].set(jnp.nan), b)
    before, after = jaxsim.evaluate(b), jaxsim.evaluate(spoilt)
    for name, value in vars(before).items():
        kept = np.delete(np.asarray(value), 2)
        np.testing.assert_array_equal(kept, np.delete(np.asarray(getattr(after, name)), 2))


def test_padding_changes_nothing() -> None:
    b = batch(1, 5)
    fills = {"log_p_aligned": -jnp.inf, "log_p_unaligned": -jnp.inf, "reward": 9e9}
    wide = {
        name: jnp.pad(getattr(b, name), ((0, 0), (0, 3)), constant_values=fill)
        for name, fill in fills.items()
    }
    padded = Instance(**(vars(b) | wide))
    for function in (jaxsim.evaluate, jaxsim.theorem2):
        assert_close(function(b), function(padded))


@pytest.mark.parametrize("beta", [0.3, 30.0])  # both regimes of the log-odds shift
def test_gradients_in_float64(beta: float) -> None:
    def fields(*values: jax.Array) -> jax.Array:
        e = jaxsim.evaluate(Instance(**dict(zip(names, values, strict=True))))
        return jnp.stack([e.log_z, e.log_odds_shift, e.kl, e.expected_reward, e.log_tpm_aligned])

    with jax.enable_x64(True):
        family = Family(outputs=4, dtype="float64", beta=Scalar(value=beta))
        instance = row(jaxsim.sample_instances(jax.random.key(3), family, 1), 0)
        names, values = vars(instance).keys(), tuple(vars(instance).values())
        check_grads(fields, values, order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


def test_gradient_of_log_z_is_the_optimal_policy() -> None:
    b = batch(2)

    def log_z(reward: jax.Array) -> jax.Array:
        return jnp.sum(jaxsim.evaluate(Instance(**(vars(b) | {"reward": reward}))).log_z)

    gradient = jax.grad(log_z)(b.reward) * b.beta[:, None]
    np.testing.assert_allclose(gradient, np.exp(jaxsim.optimal_policy(b)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", range(4))
def test_gradients_are_finite_at_zero_mass(kind: int) -> None:
    b = batch(kind)

    def everything(instance: Instance) -> jax.Array:
        e, log_p = jaxsim.evaluate(instance), jaxsim.optimal_policy(instance)
        verdict, weights = jaxsim.theorem2(instance), jaxsim.mixture_weights(instance)
        logs = [jnp.where(jnp.isfinite(x), x, 0.0) for x in (log_p, weights.aligned)]
        numbers = [*jax.tree.leaves(e), verdict.covariance_aligned, jaxsim.tpm(log_p, instance)]
        return sum((jnp.sum(x) for x in [*numbers, *logs]), jnp.float32(0))

    for leaf in jax.tree.leaves(jax.grad(everything)(b)):
        assert np.all(np.isfinite(leaf))


def test_enormous_tilts_stay_finite() -> None:
    """At |r|/β of 1e7 and more, rounding of log p + r/β exceeds what its correction may add."""
    for scale in (1e6, 1e9, 1e20):
        b = Instance(**(vars(batch()) | {"beta": jnp.full(64, 1 / scale)}))
        for leaf in jax.tree.leaves(jaxsim.evaluate(b)):
            assert np.all(np.isfinite(leaf))


def test_shapes_are_checked() -> None:
    b = batch(0, 5)
    with pytest.raises(ValueError, match=r"beta has shape \(4,\)"):
        jaxsim.evaluate(Instance(**(vars(b) | {"beta": b.beta[:4]})))
    with pytest.raises(ValueError, match="log_policy has shape"):
        jaxsim.objective(jnp.zeros(N), b)
    with pytest.raises(TypeError, match="expected an Instance"):
        jaxsim.evaluate(b.reward)
