"""The benchmarks' peers do the same work: their results agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxsim
from benchmarks import descents, limit, peers
from benchmarks.__main__ import BETA, KEY, instances, main, problem
from benchmarks.timing import in_turns
from jaxsim.families.counter import key_words

NUM = 65_536


def ours() -> jaxsim.Simulation:
    return jaxsim.simulate(KEY, jaxsim.Family(outputs=32), NUM, betas=(BETA,))


def check(found: dict[str, float], sampling: float) -> None:
    """Compare counts and means, within `sampling` of their standard deviations."""
    expected = ours()
    share = expected.hold / NUM
    assert abs(found["hold"] - expected.hold) <= sampling * (share * NUM) ** 0.5
    violations = float(expected.violations[0])
    assert abs(found["violations"] - violations) <= sampling * violations**0.5
    assert found["mean_tpm_aligned"] == pytest.approx(
        expected.mean_tpm_aligned[0], abs=1e-6 + sampling * 0.35 / NUM**0.5
    )
    assert found["mean_log_z"] == pytest.approx(
        expected.mean_log_z[0], rel=1e-6, abs=sampling * 1.5 / NUM**0.5
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
@pytest.mark.parametrize("name", ["numpy", "torch", "torch.compile", "numba"])
def test_peers_draw_from_the_same_law(name: str) -> None:
    if name == "numpy":
        found = peers.numpy_simulate(0, NUM, BETA, 1.0)
    elif name == "numba":
        pytest.importorskip("numba")
        found = peers.numba_simulate()(0, NUM, BETA, 1.0)
    else:
        pytest.importorskip("torch")
        found = peers.torch_simulate(name == "torch.compile")(0, NUM, BETA, 1.0)
    check(found, sampling=5)  # of the difference of two samples: 3.5 standard deviations


@pytest.mark.skipif(limit.library() is None, reason="there is no C++ compiler")
def test_the_loop_in_cpp_draws_the_same_instances() -> None:
    found = limit.simulate(np.asarray(key_words(KEY)), NUM, BETA)
    expected = ours()
    assert abs(found["hold"] - expected.hold) <= found["undecided"]
    assert abs(found["violations"] - expected.violations[0]) <= found["undecided"]
    assert found["undecided"] < 1e-3 * NUM
    check(found, sampling=0.05)


@pytest.mark.skipif(limit.library() is None, reason="there is no C++ compiler")
def test_the_loop_in_cpp_leaves_subnormal_numbers_to_the_process() -> None:
    assert sys.float_info.min / 2 > 0
    assert np.finfo(np.float32).tiny / np.float32(2) > 0


@pytest.mark.parametrize("rows", [True, False])
def test_all_evaluate_the_same(rows: bool) -> None:
    batch, by_row, by_column = instances(4096)
    arrays, axis = (by_row, 1) if rows else (by_column, 0)
    expected = np.stack(list(vars(jax.device_get(jaxsim.evaluate(batch))).values()))
    from scipy.special import log_expit, logsumexp

    plain = peers.plain_evaluate(np, logsumexp, log_expit, axis)
    order = ("log_p_aligned", "log_p_unaligned", "reward", "logit_alpha", "beta")
    found = np.stack(plain(*(arrays[name] for name in order)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=3e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
@pytest.mark.parametrize("name", ["C++", "torch"])
def test_adam_takes_the_same_way(name: str) -> None:
    batch, log_ref, t = problem(512)
    ours = jaxsim.solve(batch, optimizer=optax.adam(descents.RATE), max_steps=20, tolerance=1e-30)
    if name == "C++":
        if limit.library() is None:
            pytest.skip("there is no C++ compiler")
        logits, kl = limit.adam(log_ref, t, 20, descents.RATE)
    else:
        pytest.importorskip("torch")
        logits, kl = descents.torch_adam(20, compiled=False)(log_ref, t)
    np.testing.assert_allclose(kl, ours.kl, rtol=2e-3, atol=1e-9)
    log_policy = logits - np.logaddexp.reduce(logits, axis=0)
    np.testing.assert_allclose(np.exp(log_policy.T), np.exp(ours.log_policy), atol=1e-4)


def test_scipy_and_numpy_descend_to_the_same_optimum() -> None:
    batch, log_ref, t = problem(64)
    ours = jaxsim.solve(batch)
    kl, looks = descents.numpy_rprop(log_ref, t, 0.9e-6)
    assert np.all(kl <= 0.9e-6) and looks == pytest.approx(int(ours.steps.sum()) + 64, rel=0.02)
    kl, looks = descents.scipy_lbfgs(log_ref, t, 0.9e-6)
    assert np.mean(kl <= 0.9e-6) > 0.9 and looks < 64 * 200


def test_turns_are_taken_and_the_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    found = in_turns({k: (lambda k=k: calls.append(k), 10) for k in "ab"}, rounds=2)
    assert "".join(calls) == "abababab"
    assert found["a"].least <= found["a"].median <= found["a"].most
    assert main(["--quick", "--only", "simulate_5", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert set(report["works"]["simulate_5"]) == {"jaxsim", "NumPy"}
    assert report["machine"]["cores"] >= 1
    assert "| NumPy |" in (tmp_path / "benchmarks.md").read_text()
    assert "Dirichlet(5)" in capsys.readouterr().out
