"""Descent on eq. (1): it converges where it says so, and says so nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsim import (
    Components,
    Family,
    Instance,
    Rewards,
    Scalar,
    Solution,
    Status,
    natural_gradient,
    objective,
    optimal_policy,
    sample_instances,
    solve,
    tpm,
)
from jaxsim.descent import look, problem
from jaxsim.engine import loop, mesh

ROWS = 64
FAMILIES = {
    "dirichlet": Family(outputs=8),
    "peaked": Family(
        outputs=8,
        components=Components(concentration_aligned=0.3, concentration_unaligned=3.0),
        reward=Rewards(kind="student_t"),
    ),
    "sparse": Family(outputs=8, components=Components(kind="sparse"), reward=Rewards(scale=2.0)),
    "disjoint": Family(
        outputs=8, components=Components(kind="disjoint"), reward=Rewards(kind="binary")
    ),
    "zipf": Family(
        outputs=8, components=Components(kind="zipf"), reward=Rewards(kind="correlated")
    ),
    "bounded": Family(outputs=8, reward=Rewards(kind="bounded")),
    "bradley_terry": Family(outputs=8, reward=Rewards(kind="bradley_terry")),
}
COUNTEREXAMPLE = ([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], 0.5, 1.0)
SGD, ADAM = optax.sgd(1.0), optax.adam(0.05)


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@cache
def _drawn(name: str, num: int) -> Instance:
    family = replace(FAMILIES[name], beta=Scalar(kind="log_uniform", low=0.2, high=10.0))
    with jax.enable_x64(False):
        return jax.device_get(sample_instances(jax.random.key(11), family, num))


def draw(name: str, dtype: str = "float32", num: int = ROWS) -> Instance:
    """Return instances drawn in float32, in the precision asked for: one compilation for both."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), _drawn(name, num))


def one(p_a, p_u, r, alpha: float, beta: float, dtype: str = "float32") -> Instance:
    """Return an instance padded to eight outputs: one shape, compiled once, serves all tests."""
    fill = [0.0] * (8 - len(r))
    p_a, p_u, r = (np.array([*x, *fill], dtype) for x in (p_a, p_u, r))
    return Instance.from_probs(p_a, p_u, r, alpha, beta)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def exact_log_policy(instance: Instance) -> np.ndarray:
    """Log p* in float64 from eq. (1)'s solution, p* ∝ p_ref e^{r/β}."""
    a, u, r, logit, beta = (
        np.asarray(getattr(instance, name), np.float64)
        for name in ("log_p_aligned", "log_p_unaligned", "reward", "logit_alpha", "beta")
    )
    a, u = log_softmax(a), log_softmax(u)
    log_ref = np.logaddexp(
        a - np.logaddexp(0, -logit)[..., None], u - np.logaddexp(0, logit)[..., None]
    )
    return log_softmax(log_ref + r / beta[..., None])


def exact_kl(log_policy: np.ndarray, log_optimum: np.ndarray) -> np.ndarray:
    """KL(π‖p*) in float64 with π renormalised, from terms that are never negative."""
    inside = np.isfinite(log_policy)
    log_pi = log_softmax(np.asarray(log_policy, np.float64))
    u = np.where(inside, log_pi, 0) - np.where(inside, log_optimum, 0)
    q = np.where(inside, np.exp(log_optimum), 0.0)
    near = np.minimum(u, 1.0)  # elsewhere p u - p + q, lest e^u overflow
    far = np.exp(log_pi, where=inside, out=np.zeros_like(log_pi)) * (u - 1) + q
    return np.sum(np.where(u > 1, far, q * (near * np.exp(near) - np.expm1(near))), axis=-1)


def row(instance: Instance, at: int) -> Instance:
    return jax.tree.map(lambda x: x[at], instance)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_converges(name: str, dtype: str) -> None:
    batch = draw(name, dtype)
    solution = solve(batch)
    tolerance = loop.default_tolerance(np.dtype(dtype))
    assert np.all(solution.status == Status.CONVERGED)
    assert solution.log_policy.dtype == dtype and solution.kl.dtype == dtype
    assert solution.status.dtype == np.int8 and solution.steps.dtype == np.int32
    kl = exact_kl(np.asarray(solution.log_policy), exact_log_policy(batch))
    # The policy is given in the instance's dtype: rounding adds (u log π)² to the divergence.
    assert np.max(kl) <= 1.01 * tolerance
    assert np.all(solution.kl <= tolerance)
    rounding = 1e-10 if dtype == "float32" else 1e-20
    np.testing.assert_allclose(solution.kl, kl, rtol=1e-2, atol=rounding)
    np.testing.assert_array_equal(solution.gap, batch.beta * solution.kl)
    outside = (np.asarray(batch.log_p_aligned) == -np.inf) & (
        np.asarray(batch.log_p_unaligned) == -np.inf
    )
    np.testing.assert_array_equal(np.asarray(solution.log_policy) == -np.inf, outside)


def test_default_instances_converge(request: pytest.FixtureRequest) -> None:
    num = 20_000 if request.config.getoption("--slow") else 1000
    batch = sample_instances(jax.random.key(0), Family(), num)
    solution = solve(batch)
    assert np.all(solution.status == Status.CONVERGED)
    kl = exact_kl(np.asarray(solution.log_policy), exact_log_policy(batch))
    assert np.max(kl) <= 1.01e-6
    assert np.median(solution.steps) > 5  # nothing converges by starting at the optimum


def test_rows_of_a_batch_equal_each_row_alone(dtype: str) -> None:
    batch = draw("dirichlet", dtype)
    together, tolerance = solve(batch), loop.default_tolerance(np.dtype(dtype))
    for at in range(8):
        alone = solve(row(batch, at))
        assert int(alone.status) == int(together.status[at]) == Status.CONVERGED
        assert alone.kl.shape == () and alone.log_policy.shape == (8,)
        # Both are within the tolerance of p*: Pinsker bounds each one's total variation.
        apart = np.abs(np.exp(alone.log_policy) - np.exp(together.log_policy[at])).sum()
        assert apart <= 2 * np.sqrt(2 * tolerance) + 1e-6


def test_bits_do_not_depend_on_how_a_batch_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another division, another slab, other neighbours in other lanes, another refilling."""
    monkeypatch.setattr(loop, "block_size", lambda outputs: 64)
    batch = draw("dirichlet", num=640)
    whole = solve(batch)
    assert whole.kl.shape == (640,) and whole.log_policy.shape == (640, 8)
    assert np.all(whole.status == Status.CONVERGED)
    assert len(np.unique(np.asarray(whole.steps))) > 20  # lanes end at different times
    kl = exact_kl(np.asarray(whole.log_policy), exact_log_policy(batch))
    assert np.max(kl) <= 1.01e-6

    def same(part: Solution, rows: slice) -> None:
        for name, values in vars(part).items():
            np.testing.assert_array_equal(np.asarray(getattr(whole, name))[rows], values)

    for rows in (slice(0, 100), slice(100, 613), slice(613, 640), slice(None, None, -1)):
        same(solve(jax.tree.map(lambda x, rows=rows: x[rows], batch)), rows)
    monkeypatch.setattr(loop, "_SLAB", 1)
    same(solve(batch), slice(None))
    monkeypatch.setattr(loop, "_SLAB", 16)
    monkeypatch.setattr(loop.os, "cpu_count", lambda: 1)
    for refill in (1, 3, 64):
        monkeypatch.setattr(loop, "_REFILL", refill)
        jax.clear_caches()
        mesh._compiled.cache_clear()
        same(solve(batch), slice(None))


def test_parts_of_a_large_batch_have_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of 4,096 and 512 instances, which are programs of their own."""
    monkeypatch.setattr(loop.os, "cpu_count", lambda: 1)
    batch = sample_instances(jax.random.key(7), Family(outputs=32), 9000)
    whole = jax.device_get(solve(batch))
    for rows in (slice(0, 700), slice(8990, 9000)):
        part = solve(jax.tree.map(lambda x, rows=rows: x[rows], batch))
        for name, values in vars(part).items():
            np.testing.assert_array_equal(getattr(whole, name)[rows], values, err_msg=name)


@pytest.mark.parametrize(
    ("optimizer", "batched"),
    [(SGD, False), (ADAM, False), (optax.lbfgs(), True)],
    ids=["sgd", "adam", "lbfgs"],
)
def test_any_optimizer(optimizer: optax.GradientTransformation, batched: bool) -> None:
    instance = one([0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.0, 1.0, 0.5], 0.4, 0.7)
    if batched:
        second = one([0.3, 0.3, 0.4], [0.2, 0.2, 0.6], [1.0, 0.0, 0.2], 0.5, 1.3)
        instance = jax.tree.map(lambda *x: jnp.stack(x), instance, second)
    solution = solve(instance, optimizer=optimizer, max_steps=2000)
    assert np.all(solution.status == Status.CONVERGED), solution
    kl = exact_kl(np.asarray(solution.log_policy), exact_log_policy(instance))
    assert np.max(kl) <= 1.01e-6
    assert np.all(solution.log_policy[..., 3:] == -np.inf)


def test_running_out_of_steps_is_said() -> None:
    solution = solve(one(*COUNTEREXAMPLE), max_steps=1)
    assert int(solution.status) == Status.OUT_OF_STEPS and int(solution.steps) == 1
    assert float(solution.kl) > 1e-3


def test_a_descent_that_blows_up_is_said() -> None:
    wild = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (updates * jnp.inf, state),
    )
    solution = solve(one(*COUNTEREXAMPLE), optimizer=wild)
    assert int(solution.status) == Status.NON_FINITE
    np.testing.assert_allclose(np.exp(solution.log_policy[:3]), [0.25, 0.5, 0.25], rtol=1e-6)


def _hidden(first: float, second: float, dtype: str) -> Instance:
    log_p = np.array([first, second, *[-np.inf] * 6], dtype)
    return Instance.from_log_probs(
        log_p, log_p, np.array([0.0, 200.0, *[0.0] * 6], dtype), 0.5, 1.0
    )


@pytest.mark.parametrize("second", [-120.0, -100.0])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, loop.DEFAULT_OPTIMIZER])
def test_what_underflow_hides_is_stuck_not_converged(
    second: float, optimizer: optax.GradientTransformation
) -> None:
    solution = solve(_hidden(0.0, second, "float32"), optimizer=optimizer, max_steps=2000)
    assert int(solution.status) == Status.STUCK and not bool(solution.converged)
    assert float(solution.kl) == pytest.approx(200 + second, rel=1e-4)


@pytest.mark.parametrize("second", [-120.0, -100.0])
def test_the_default_goes_on_in_log_space_and_says_so(second: float) -> None:
    solution = solve(_hidden(0.0, second, "float32"))
    assert int(solution.status) == Status.CONVERGED_IN_LOG_SPACE and bool(solution.converged)
    assert float(solution.kl) <= 1e-6
    np.testing.assert_allclose(np.exp(solution.log_policy[:2]), [0.0, 1.0], atol=1e-3)


def test_a_tiny_gradient_is_no_proof(x64: None) -> None:
    """In float64 the gradient is 1e-41 and the variance of the advantage 1e-39, but KL is 100."""
    solution = solve(_hidden(0.0, -100.0, "float64"), optimizer=SGD, max_steps=50)
    assert int(solution.status) == Status.OUT_OF_STEPS
    assert float(solution.kl) == pytest.approx(100, rel=1e-6)


def test_the_default_optimizer_finds_what_float64_can_see(x64: None) -> None:
    solution = solve(_hidden(0.0, -100.0, "float64"))
    assert int(solution.status) == Status.CONVERGED


# r/β up to 1e4, β down to 0.02, masses far below e^-120.
HARD = {
    "small beta": Family(outputs=8, beta=Scalar(kind="log_uniform", low=0.02, high=0.1)),
    "large rewards": Family(
        outputs=8, reward=Rewards(scale=60.0), beta=Scalar(kind="fixed", value=0.02)
    ),
    "tiny masses": Family(
        outputs=8,
        components=Components(concentration_aligned=0.01, concentration_unaligned=0.01),
        reward=Rewards(scale=60.0),
        beta=Scalar(kind="fixed", value=0.02),
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_the_default_converges_where_probabilities_underflow(name: str, dtype: str) -> None:
    family = replace(HARD[name], dtype=dtype)
    batch = sample_instances(jax.random.key(5), family, 512)
    solution = solve(batch)
    tolerance = loop.default_tolerance(np.dtype(dtype))
    assert np.all(solution.converged)
    kl = exact_kl(np.asarray(solution.log_policy), exact_log_policy(batch))
    if dtype == "float64":
        assert np.max(kl) <= 1.01 * tolerance
    else:
        # r/β = 1e4 itself is rounded by 1e-3 in float32: as far as that moves p*, no further.
        assert np.max(kl) <= tolerance + 1e-6
    if name == "tiny masses" and dtype == "float32":
        assert np.sum(solution.status == Status.CONVERGED_IN_LOG_SPACE) > 1
        alone = solve(batch, optimizer=loop.DEFAULT_OPTIMIZER)
        assert np.any(~alone.converged)
        assert np.all(alone.kl[~np.asarray(alone.converged)] > tolerance)


@pytest.mark.parametrize("alpha", [1e-12, 1e-7, 1 - 1e-7])
@pytest.mark.parametrize("start", ["reference", "worst"])
def test_mixture_weights_near_zero_and_one(alpha: float, start: str) -> None:
    family = Family(
        outputs=8,
        components=Components(kind="disjoint"),
        alpha=Scalar(kind="fixed", value=alpha),
        beta=Scalar(kind="log_uniform", low=0.1, high=10.0),
    )
    batch = sample_instances(jax.random.key(3), family, ROWS)
    solution = solve(batch, start=start)
    assert np.all(solution.status == Status.CONVERGED)
    kl = exact_kl(np.asarray(solution.log_policy), exact_log_policy(batch))
    assert np.max(kl) <= 1.01e-6


@pytest.mark.parametrize(("outputs", "num"), [(2, 500), (4096, 16)])
def test_few_and_many_outputs(outputs: int, num: int) -> None:
    family = Family(outputs=outputs, beta=Scalar(kind="log_uniform", low=0.1, high=10.0))
    batch = sample_instances(jax.random.key(4), family, num)
    solution = solve(batch)
    assert np.all(solution.status == Status.CONVERGED)
    kl = exact_kl(np.asarray(solution.log_policy), exact_log_policy(batch))
    assert np.max(kl) <= 1.01e-6


def test_another_number_of_lanes_ends_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw("zipf")
    expected = solve(batch)
    monkeypatch.setattr(loop, "block_size", lambda outputs: 24)
    found = solve(batch)
    np.testing.assert_array_equal(found.status, expected.status)
    kl = exact_kl(np.asarray(found.log_policy), exact_log_policy(batch))
    assert np.max(kl) <= 1.01e-6


STARTS = ["reference", "uniform", "worst"]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["dirichlet", "sparse", "disjoint"])
def test_every_start_leads_to_the_optimum(name: str, start: str, dtype: str) -> None:
    batch = draw(name, dtype)
    solution = solve(batch, start=start)
    assert np.all(solution.status == Status.CONVERGED)
    kl = exact_kl(np.asarray(solution.log_policy), exact_log_policy(batch))
    assert np.max(kl) <= 1.01 * loop.default_tolerance(np.dtype(dtype))


def test_starts_are_what_they_say() -> None:
    still = optax.sgd(1e-30)
    batch = draw("sparse")
    first = {
        s: np.exp(solve(batch, optimizer=still, max_steps=1, start=s).log_policy) for s in STARTS
    }
    support = np.exp(exact_log_policy(batch)) > 0
    uniform = support / support.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(first["uniform"], uniform, 1e-5)
    reference = replace(batch, beta=jnp.full_like(batch.beta, 1e12))
    np.testing.assert_allclose(
        first["reference"], np.exp(exact_log_policy(reference)), rtol=1e-5, atol=1e-30
    )
    least = np.min(np.where(support, batch.reward, np.inf), axis=1)
    on_worst = np.where(np.asarray(batch.reward) == least[:, None], first["worst"], 0).sum(axis=1)
    np.testing.assert_allclose(on_worst, 1 - np.exp(-14), atol=1e-6)
    assert np.all((first["worst"] > 0) == support)


def test_a_start_given_as_logits() -> None:
    batch = draw("sparse")
    logits = np.random.default_rng(2).normal(size=batch.reward.shape).astype(np.float32) * 5
    logits[np.asarray(exact_log_policy(batch)) == -np.inf] = np.nan  # ignored there
    first = solve(batch, optimizer=optax.sgd(1e-30), max_steps=1, start=logits)
    expected = log_softmax(np.where(np.isfinite(exact_log_policy(batch)), logits, -np.inf))
    np.testing.assert_allclose(first.log_policy, expected, rtol=1e-5, atol=1e-5)
    assert np.all(solve(batch, start=logits).status == Status.CONVERGED)
    alone = solve(row(batch, 3), start=logits[3])
    assert int(alone.status) == Status.CONVERGED
    with pytest.raises(ValueError, match=r"start has shape \(8,\); expected .* \(64, 8\)"):
        solve(batch, start=logits[0])
    with pytest.raises(ValueError, match="start is 'best'; expected reference, uniform, worst"):
        solve(batch, start="best")


def test_the_natural_gradient_reaches_the_optimum_in_one_step(x64: None) -> None:
    """Step 1/β: log π + (r/β - log π/p_ref) = log p_ref + r/β, whatever π is."""
    batch = draw("zipf", "float64")
    for start in ("reference", "uniform"):
        solution = solve(batch, optimizer=natural_gradient(1.0, per_beta=True), start=start)
        assert np.all(solution.steps == 1) and np.all(solution.status == Status.CONVERGED)
        assert np.max(exact_kl(np.asarray(solution.log_policy), exact_log_policy(batch))) < 1e-20
    same = replace(batch, beta=jnp.full_like(batch.beta, 0.4))
    solution = solve(same, optimizer=natural_gradient(1 / 0.4))
    assert np.all(solution.steps == 1)
    assert np.max(exact_kl(np.asarray(solution.log_policy), exact_log_policy(same))) < 1e-20


@pytest.mark.parametrize("step", [0.5, 1.5])
def test_the_natural_gradient_contracts_the_log_ratio(step: float, x64: None) -> None:
    """Log(π/p*), up to a constant, shrinks by 1 - ηβ in each step, for 0 < ηβ < 2."""
    batch = draw("dirichlet", "float64")
    optimizer = natural_gradient(step, per_beta=True)
    best = exact_log_policy(batch)

    def error(steps: int) -> np.ndarray:
        at = np.asarray(
            solve(batch, optimizer=optimizer, max_steps=steps, tolerance=1e-300).log_policy
        )
        return (at - best) - (at - best)[:, :1]

    np.testing.assert_allclose(error(4), (1 - step) ** 3 * error(1), atol=1e-12)


def test_too_long_natural_steps_diverge() -> None:
    solution = solve(draw("dirichlet"), optimizer=natural_gradient(2.5, per_beta=True))
    assert not np.any(solution.converged)


def test_the_natural_gradient_in_a_loop_of_ones_own(x64: None) -> None:
    """For the gradient of -L(π), in units of reward, step 1/β too."""
    instance = one([0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.0, 1.0, 0.5], 0.4, 0.7, "float64")
    instance = jax.tree.map(lambda x: x[..., :3] if x.ndim else x, instance)
    optimizer = natural_gradient(1 / 0.7)
    logits = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    gradient = jax.grad(lambda x: -objective(jax.nn.log_softmax(x), instance))(logits)
    updates, _ = optimizer.update(gradient, optimizer.init(logits), logits)
    moved = jax.nn.softmax(optax.apply_updates(logits, updates))
    np.testing.assert_allclose(moved, np.exp(exact_log_policy(instance)), rtol=1e-12)
    with pytest.raises(ValueError, match="needs the params"):
        optimizer.update(gradient, optimizer.init(logits))


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_a_bad_natural_step(step: float) -> None:
    with pytest.raises(ValueError, match="step is"):
        natural_gradient(step)


def test_the_gradient_is_that_of_finite_differences(x64: None) -> None:
    """Of -L(π)/β written out in NumPy, where `look` takes rewards from their mean."""
    instance = row(draw("dirichlet", "float64"), 5)
    best, beta = exact_log_policy(instance), float(instance.beta)
    log_ref = exact_log_policy(replace(instance, beta=jnp.asarray(1e300)))
    logits = np.random.default_rng(4).normal(size=8)

    def minus_l(logits: np.ndarray) -> float:
        log_pi = log_softmax(logits)
        pi = np.exp(log_pi)
        return -float(pi @ np.asarray(instance.reward) - beta * pi @ (log_pi - log_ref)) / beta

    expected = []
    for at in range(8):
        h = np.eye(8)[at] * 1e-6
        expected.append((minus_l(logits + h) - minus_l(logits - h)) / 2e-6)
    view = look(jnp.asarray(logits), problem(instance))
    np.testing.assert_allclose(view.gradient, expected, atol=1e-9)
    assert np.max(np.abs(expected)) > 1e-2
    assert float(view.kl) == pytest.approx(exact_kl(log_softmax(logits), best), rel=1e-10)


@pytest.mark.parametrize("name", [*FAMILIES, *HARD])
def test_the_gap_identity_holds_at_every_step(name: str, dtype: str) -> None:
    """L(p*) - L(π) = β KL(π‖p*), to within 16 units of rounding of what it is added up from."""
    if name in FAMILIES:
        batch = draw(name, dtype)
    else:
        batch = sample_instances(jax.random.key(5), replace(HARD[name], dtype=dtype), ROWS)
    course = loop.trace(batch, None, 60)
    assert course.residual.shape == (61, ROWS) and np.all(np.isfinite(course.residual))
    assert np.max(np.abs(course.residual)) <= 16
    assert np.max(np.abs(course.residual)) > 0.01  # it is not identically zero


def test_a_trace_shows_the_policies_of_solve(x64: None) -> None:
    batch = draw("dirichlet", "float64")
    course = loop.trace(batch, ADAM, 12)
    for steps in (1, 7, 12):
        at = np.asarray(solve(batch, optimizer=ADAM, max_steps=steps, tolerance=1e-300).log_policy)
        kl = exact_kl(at, exact_log_policy(batch))
        np.testing.assert_allclose(course.kl[steps], kl, rtol=1e-9)
        np.testing.assert_allclose(
            course.tpm_aligned[steps], tpm(jnp.asarray(at), batch), rtol=1e-9
        )
    np.testing.assert_allclose(course.tpm_aligned[0], jax.nn.sigmoid(batch.logit_alpha), rtol=1e-9)


def test_tpm_may_turn_on_the_way(x64: None) -> None:
    """First-order dominance keeps TPM(A) ≥ α at every β, and yet the way there is not monotone."""
    r, p_u, p_a = [0.0, 1.0, 10.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]
    instance = jax.tree.map(lambda x: x[None], one(p_a, p_u, r, 0.5, 0.5, "float64"))
    course = loop.trace(instance, natural_gradient(0.02, per_beta=True), 200).tpm_aligned[:, 0]
    assert np.all(course >= 0.5 - 1e-12) and np.max(course) > course[-1] + 0.005
    assert course[0] == pytest.approx(0.5)


def test_an_optimal_start_takes_no_step(dtype: str) -> None:
    p_a, p_u = [0.5, 0.2, 0.3], [0.1, 0.8, 0.1]
    level = one(p_a, p_u, [7.0, 7.0, 7.0], 0.3, 0.5, dtype)
    far = one(p_a, p_u, [0.0, 1.0, 2.0], 0.3, 1e9, dtype)
    for solution in (solve(level), solve(far)):
        assert int(solution.steps) == 0 and int(solution.status) == Status.CONVERGED


@pytest.mark.parametrize("width", [1, 8])
def test_a_single_output(width: int) -> None:
    p = np.eye(1, width, dtype=np.float32)[0]
    solution = solve(Instance.from_probs(p, p, np.arange(width, dtype=np.float32), 0.5, 0.1))
    assert int(solution.steps) == 0 and int(solution.status) == Status.CONVERGED
    np.testing.assert_array_equal(np.exp(solution.log_policy), p)
    assert float(solution.gap) == 0


def test_padding_never_gains_mass() -> None:
    p_a, p_u, r, alpha, beta = COUNTEREXAMPLE
    expected = np.exp(exact_log_policy(one(*COUNTEREXAMPLE)))
    for beyond in (0.0, 99.0, -1e6):
        reward = [*r, *[beyond] * 5]
        solution = solve(one([*p_a, *[0.0] * 5], [*p_u, *[0.0] * 5], reward, alpha, beta))
        assert int(solution.status) == Status.CONVERGED
        assert np.all(solution.log_policy[3:] == -np.inf)
        np.testing.assert_allclose(np.exp(solution.log_policy), expected, atol=3e-3)


def test_the_certificate_is_the_divergence_to_high_accuracy(x64: None) -> None:
    """Log E_π e^X, which sees no p*, against KL(π‖p*) from 1 down to 1e-12 nats."""
    instance = row(draw("dirichlet", "float64", 8), 3)
    log_optimum = exact_log_policy(instance)
    task = problem(instance)
    direction = np.random.default_rng(0).normal(size=8)

    @jax.jit
    def measure(logits: jax.Array) -> jax.Array:
        return look(logits, task).kl

    for size in 10.0 ** np.arange(0.0, -6.5, -0.5):
        logits = log_softmax(log_optimum + size * direction)
        exact = exact_kl(logits, log_optimum)
        rough = 1e-14 / size
        assert float(measure(jnp.asarray(logits))) == pytest.approx(exact, rel=max(1e-9, rough))
    assert exact < 1e-11


def test_the_gradient_is_that_of_the_optimum(x64: None) -> None:
    batch = draw("dirichlet", "float64")
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 8)))

    def gradient(policy: Callable[[Instance], jax.Array]) -> Instance:
        return jax.jit(jax.grad(lambda x: jnp.sum(weights * jnp.exp(policy(x)))))(batch)

    found, expected = gradient(lambda x: solve(x).log_policy), gradient(optimal_policy)
    # The derivative at π in place of p*: apart by their total variation.
    for name in ("reward", "beta", "logit_alpha", "log_p_aligned", "log_p_unaligned"):
        got, wanted = np.asarray(getattr(found, name)), np.asarray(getattr(expected, name))
        assert np.max(np.abs(wanted)) > 1e-3
        np.testing.assert_allclose(got, wanted, atol=1e-5 * max(1, np.max(np.abs(wanted))))


def test_solve_under_jit_equals_solve() -> None:
    batch = draw("dirichlet")
    plain, compiled = solve(batch), jax.jit(solve)(batch)
    assert isinstance(compiled, Solution)
    assert np.all(plain.status == compiled.status)
    np.testing.assert_allclose(np.exp(plain.log_policy), np.exp(compiled.log_policy), atol=3e-3)


def test_the_same_shapes_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh._compiled.cache_clear()
    counted = chex.assert_max_traces(loop._solve_slab, n=1)
    monkeypatch.setattr(loop, "_solve_slab", counted)
    for name in ("dirichlet", "zipf", "bounded"):
        solve(draw(name), tolerance=3e-6)
        solve(draw(name, num=ROWS // 2))
    with pytest.raises(AssertionError, match="traced"):
        solve(draw("zipf"), max_steps=7)


@pytest.mark.parametrize("steps", [0, -3])
def test_bad_max_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"max_steps is {steps}"):
        solve(one(*COUNTEREXAMPLE), max_steps=steps)


@pytest.mark.parametrize("tolerance", [0.0, -1e-6, float("nan")])
def test_bad_tolerance(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance is"):
        solve(one(*COUNTEREXAMPLE), tolerance=tolerance)


def test_the_tolerance_is_kept() -> None:
    batch = draw("dirichlet")
    loose, tight = solve(batch, tolerance=1e-2), solve(batch, tolerance=1e-5)
    assert np.all(loose.kl <= 1e-2) and np.all(tight.kl <= 1e-5)
    assert np.all(loose.steps <= tight.steps) and np.any(loose.kl > 1e-5)


def test_the_gap_is_beta_times_the_divergence(x64: None) -> None:
    """L(p*) - L(p) = β KL(p‖p*) for any policy p."""
    batch = draw("dirichlet", "float64")
    random = np.random.default_rng(3).dirichlet(np.full(8, 0.5), ROWS)
    log_policy = jnp.asarray(np.log(random + 1e-300))
    log_policy = jax.nn.log_softmax(log_policy, axis=-1)
    gap = objective(optimal_policy(batch), batch) - objective(log_policy, batch)
    kl = exact_kl(np.asarray(log_policy), exact_log_policy(batch))
    np.testing.assert_allclose(gap, np.asarray(batch.beta) * kl, rtol=1e-9, atol=1e-12)


def test_float32_instances_in_64_bit_mode(x64: None) -> None:
    batch = draw("sparse")
    for start in ("reference", "uniform", "worst"):
        assert np.all(solve(batch, start=start).status == Status.CONVERGED)


def test_padding_weighs_nothing_in_an_optimizers_norms() -> None:
    decayed = optax.chain(
        optax.add_decayed_weights(1e-6), optax.clip_by_global_norm(1.0), optax.sgd(1.0)
    )
    p_a, p_u, r, alpha, beta = [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.0, 1.0, 0.5], 0.4, 0.7
    padded = one(p_a, p_u, r, alpha, beta)
    plain = Instance.from_probs(
        *(np.array(x, np.float32) for x in (p_a, p_u, r)), alpha=alpha, beta=beta
    )
    found, expected = (
        solve(x, optimizer=decayed, tolerance=1e-5, max_steps=500) for x in (padded, plain)
    )
    assert int(found.status) == int(expected.status) == Status.CONVERGED
    assert int(found.steps) == int(expected.steps)
    np.testing.assert_allclose(found.log_policy[:3], expected.log_policy, rtol=1e-4)


def test_what_is_no_instance_optimizer_or_batch_is_named() -> None:
    batch = draw("dirichlet")
    with pytest.raises(TypeError, match="expected an Instance, got"):
        solve(jnp.ones(3))
    for wrong in ("adam", 0.1):
        with pytest.raises(TypeError, match="expected an optax"):
            solve(batch, optimizer=wrong)
    with pytest.raises(ValueError, match=r"reward has shape \(0, 8\)"):
        solve(jax.tree.map(lambda x: x[:0], batch))
    with pytest.raises(TypeError, match="integer"):
        solve(batch, max_steps=1.5)


def test_a_message_for_every_status() -> None:
    assert len({status.message for status in Status}) == len(Status)
