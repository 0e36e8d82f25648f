"""The grid over β, against `evaluate` in float64 and against mpmath."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp

import jaxsim
from jaxsim import Components, Evaluation, Family, Instance, Rewards, evaluate_grid

BETAS = (0.02, 0.3, 1.0, 7.0, 1e3, 1e6)
FAMILIES = (
    Family(outputs=32),
    Family(outputs=7, components=Components(kind="sparse"), reward=Rewards(kind="student_t")),
    Family(outputs=32, components=Components(concentration_aligned=0.05)),
)


@pytest.mark.parametrize("family", FAMILIES, ids=["dirichlet", "sparse", "peaked"])
def test_every_field_is_that_of_evaluate(family: Family) -> None:
    batch = jaxsim.sample_instances(jax.random.key(3), family, 40)
    found = jax.device_get(evaluate_grid(batch, BETAS).at(batch.logit_alpha[:, None]))
    with jax.enable_x64(True):
        wide = Instance(**{k: jnp.asarray(np.float64(v)) for k, v in vars(batch).items()})
        for column, beta in enumerate(BETAS):
            at_beta = replace(wide, beta=jnp.full(40, np.float64(np.float32(beta))))
            exact = jax.device_get(jaxsim.evaluate(at_beta))
            spread = np.ptp(np.asarray(wide.reward), axis=1) / beta
            scale = np.abs(np.asarray(wide.reward)).max(axis=1) / beta
            for name, value in vars(exact).items():
                size = {"log_z": scale, "objective": scale * beta, "expected_reward": scale * beta}
                room = np.minimum(spread, 1) + spread + size.get(name, 0)
                if name == "kl":  # of second order where the spread is small
                    room = np.where(spread < 1, np.abs(value) + 1e-3 * spread**2, room)
                error = np.abs(getattr(found, name)[:, column] - value)
                assert np.all(error <= 24 * 2.0**-24 * (room + np.abs(value))), (name, beta)


def test_cumulants_of_the_three_output_example() -> None:
    instance = Instance.from_probs([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], 0.5, 1.0)
    betas = [0.1, 1.0, 1.641, 20.0]
    grid = evaluate_grid(instance, betas)
    for at, beta in enumerate(np.float32(betas)):
        with mp.workdps(30):
            s = 1 / mp.mpf(float(beta))
            k_a, k_u = 3 * s, mp.log((1 + mp.exp(4 * s)) / 2)
            assert float(grid.cumulant_aligned[at]) == pytest.approx(float(k_a), rel=1e-6)
            assert float(grid.cumulant_unaligned[at]) == pytest.approx(float(k_u), rel=1e-6)
            assert float(grid.log_odds_shift[at]) == pytest.approx(
                float(k_a - k_u), rel=1e-6, abs=1e-6
            )
            mean = 4 * mp.exp(4 * s) / (1 + mp.exp(4 * s))
            assert float(grid.mean_unaligned[at]) == pytest.approx(float(mean), rel=1e-6)
            assert float(grid.kl_unaligned[at]) == pytest.approx(float(s * mean - k_u), rel=1e-5)
        assert float(grid.kl_aligned[at]) == pytest.approx(0, abs=1e-7)
        assert float(grid.mean_aligned[at]) == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
def test_components_at_opposite_ends(alpha: float) -> None:
    """One exponential for both components would underflow for one of them, at one of the α."""
    batch = Instance.from_probs([1.0, 0.0], [0.0, 1.0], [0.0, 60.0], alpha, 1.0)
    grid = evaluate_grid(batch, [1.0])
    assert float(grid.cumulant_aligned[0]) == pytest.approx(0, abs=1e-5)
    assert float(grid.cumulant_unaligned[0]) == pytest.approx(60, rel=1e-6)
    assert float(grid.log_odds_shift[0]) == pytest.approx(-60, rel=1e-6)


def test_shapes_and_other_alphas() -> None:
    batch = jaxsim.sample_instances(jax.random.key(0), Family(outputs=5), 6)
    grid = evaluate_grid(batch, jnp.array([0.5, 2.0]))
    assert grid.betas.shape == (2,) and grid.kl_aligned.shape == (6, 2)
    logits = jnp.log(jnp.array([0.01, 0.5, 0.99]) / jnp.array([0.99, 0.5, 0.01]))
    swept = grid.at(logits[:, None, None])
    assert isinstance(swept, Evaluation) and swept.kl.shape == (3, 6, 2)
    for at, logit in enumerate(logits):
        other = replace(batch, logit_alpha=jnp.full(6, logit), beta=jnp.full(6, 2.0))
        for name, value in vars(jaxsim.evaluate(other)).items():
            np.testing.assert_allclose(getattr(swept, name)[at, :, 1], value, rtol=2e-5, atol=2e-6)
    single = Instance(**{k: v[0] for k, v in vars(batch).items()})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-6),
        vars(replace(evaluate_grid(single, [0.5, 2.0]), betas=jnp.zeros(1))),
        vars(replace(grid, betas=jnp.zeros((1, 1)))),
    )


def test_gradients_are_finite_at_zero_mass() -> None:
    instance = Instance.from_probs([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], 0.5, 1.0)

    def worth(reward: jax.Array) -> jax.Array:
        grid = evaluate_grid(replace(instance, reward=reward), jnp.array([0.01, 1.0, 100.0]))
        return sum(jnp.sum(x) for x in vars(grid.at(0.0)).values())

    assert np.all(np.isfinite(jax.grad(worth)(instance.reward)))


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], r"betas has shape \(0,\)"),
        (1.0, r"betas has shape \(\)"),
        ([1.0, 0.0], r"betas\[1\] is 0.0"),
        ([1.0, -2.0], r"betas\[1\] is -2.0"),
        ([math.nan], r"betas\[0\] is nan"),
        ([math.inf], r"betas\[0\] is inf"),
        ([1e-50], r"betas\[0\] is 1e-50; expected a number > 0 that float32 can hold"),
    ],
)
def test_bad_betas_are_named(betas: object, message: str) -> None:
    instance = Instance.from_probs([0.0, 1.0], [0.5, 0.5], [0.0, 3.0], 0.5, 1.0)
    with pytest.raises(ValueError, match=message):
        evaluate_grid(instance, betas)  # type: ignore[arg-type]
