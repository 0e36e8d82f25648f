"""The optional native kernel of `evaluate`: as accurate as XLA's, under jit, vmap and grad."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsim
from jaxsim import Components, Family, Instance, Scalar, tilting
from jaxsim.cli import BAD_INPUT, main
from jaxsim.engine import lift, native
from tests import adversarial, reference
from tests.test_accuracy import MODES, PROMISE, as_instance, precision, shape_for

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler",
)


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Build it into a cache of its own; what other tests find is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert main(["native"]) == 0
        assert native.load()
        yield
        assert main(["native", "--remove"]) == 0
        assert not native.remove()
    native.load.cache_clear()


@pytest.mark.parametrize("mode", MODES)
def test_every_field_is_as_accurate_as_promised(mode: str, pytestconfig: pytest.Config) -> None:
    """Against 60 digits, on the adversarial set of tests/test_accuracy.py."""
    dtype = np.dtype(mode)
    info = np.finfo(dtype)
    unit, tiny = float(info.eps) / 2, float(info.tiny)
    size = 3000 if pytestconfig.getoption("--slow") else 150
    worst = dict.fromkeys(reference.SCALAR_FIELDS, (0.0, ""))
    with precision(mode):
        for case in adversarial.instances(dtype, 3, size):
            found = jax.device_get(jaxsim.evaluate(as_instance(case, shape_for(case))))
            e = reference.exact(**case.arrays)
            kappa = reference.condition_numbers(e, unit)
            floors = reference.underflow_floors(e, tiny)
            for name in worst:
                value = getattr(found, name)
                ratio = reference.error_ratio(
                    value, getattr(e, name), kappa[name], unit, floors[name]
                )
                worst[name] = max(worst[name], (ratio, case.name))
    assert all(ratio <= PROMISE for ratio, _ in worst.values()), worst


def by_xla(batch: Instance) -> tilting.Evaluation:
    """Return the same numbers from the XLA kernel."""
    return jax.jit(jax.vmap(tilting.evaluate))(batch)


def family(outputs: int, dtype: str) -> Family:
    return Family(
        outputs=outputs,
        components=Components(kind="sparse"),
        beta=Scalar(kind="log_uniform", low=1e-3, high=1e3),
        dtype=dtype,
    )


def same_bits(a: tilting.Evaluation, b: tilting.Evaluation) -> bool:
    return all(np.array_equal(x, vars(b)[name]) for name, x in vars(a).items())


def assert_close(found: tilting.Evaluation, wanted: tilting.Evaluation, dtype: str) -> None:
    """Within what both promise of numbers of the size of the rewards over β."""
    unit = float(jnp.finfo(dtype).eps) / 2
    scale = np.maximum(1.0, np.abs(np.asarray(wanted.log_z)))
    scale = scale + np.abs(np.asarray(wanted.objective)) + np.asarray(wanted.kl)
    for name, value in vars(found).items():
        assert value.dtype == dtype
        error = np.abs(np.asarray(value) - np.asarray(getattr(wanted, name)))
        assert (error <= 64 * unit * scale).all(), name


@pytest.mark.parametrize("dtype", MODES)
@pytest.mark.parametrize(("outputs", "num"), [(2, 3), (9, 1), (16, 8), (17, 29), (300, 1000)])
def test_agrees_with_xla_for_any_shape(outputs: int, num: int, dtype: str) -> None:
    """Rows and columns give the same bits; lanes beyond the last instance write nothing."""
    with precision(dtype):
        batch = jaxsim.sample_instances(jax.random.key(1), family(outputs, dtype), num)
        found = jaxsim.evaluate(batch)
        assert_close(found, by_xla(batch), dtype)
        tile = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), batch)
        columns = jax.jit(native.evaluate_tile)(tile)
        assert same_bits(found, columns)


def test_many_outputs_are_summed_in_levels() -> None:
    """70,000 terms, which one running sum would lose to some thousand units of roundoff."""
    batch = jaxsim.sample_instances(jax.random.key(2), Family(outputs=70_000), 9)
    assert_close(jaxsim.evaluate(batch), by_xla(batch), "float32")


def test_vmap_takes_any_axis() -> None:
    batch = jaxsim.sample_instances(jax.random.key(3), Family(outputs=5), 12)
    wanted = jaxsim.evaluate(batch)
    alone = jax.vmap(jaxsim.evaluate)(batch)
    assert same_bits(wanted, alone)
    betas = jnp.asarray([0.1, 1.0, 10.0])

    def at(beta: jax.Array) -> jax.Array:
        parts = {**vars(batch), "beta": jnp.full(12, beta)}
        return jaxsim.evaluate(Instance(**parts)).log_z

    nested = jax.jit(jax.vmap(at))(betas)
    assert nested.shape == (3, 12)
    for row, beta in zip(nested, betas, strict=True):
        assert (row == at(beta)).all()


def test_derivatives_are_those_of_xla() -> None:
    batch = jaxsim.sample_instances(jax.random.key(4), Family(outputs=6), 5)

    def total(evaluate: object, reward: jax.Array) -> jax.Array:
        return evaluate(Instance(**{**vars(batch), "reward": reward})).kl.sum()  # type: ignore[operator]

    wanted = jax.grad(lambda r: total(lift.lift(tilting.evaluate), r))(batch.reward)
    found = jax.jit(jax.grad(lambda r: total(jaxsim.evaluate, r)))(batch.reward)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    one = jax.tree.map(lambda x: x[0], batch)
    slope = jax.vmap(
        jax.grad(lambda b: jaxsim.evaluate(one.__class__(**{**vars(one), "beta": b})).log_z)
    )(jnp.asarray([0.5, 2.0]))
    assert (slope < 0).any()
    assert np.isfinite(slope).all()


def test_nan_stays_nan() -> None:
    batch = jaxsim.sample_instances(jax.random.key(5), Family(outputs=4), 20)
    spoilt = Instance(**{**vars(batch), "reward": batch.reward.at[3, 1].set(jnp.nan)})
    found = jaxsim.evaluate(spoilt)
    for value in vars(found).values():
        assert np.isnan(value[3])
        assert np.isfinite(np.delete(np.asarray(value), 3)).all()


def test_without_it_xla_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = jaxsim.sample_instances(jax.random.key(6), Family(outputs=4), 20)
    monkeypatch.setattr(native, "load", lambda: False)
    found = jaxsim.evaluate(batch)
    assert same_bits(found, lift.lift(tilting.evaluate)(batch))


def test_built_anew_it_is_used_on() -> None:
    """JAX takes a target's name once per process."""
    batch = jaxsim.sample_instances(jax.random.key(7), Family(outputs=4), 20)
    before = jaxsim.evaluate(batch)
    native.build()
    assert native.load()
    assert same_bits(jaxsim.evaluate(batch), before)


def test_a_failing_compiler_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "c++"
    bad.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="no such option"):
        native.build()
    bad.unlink()
    assert main(["native"]) == BAD_INPUT
    assert "jaxsim: there is no C++ compiler" in capsys.readouterr().err
