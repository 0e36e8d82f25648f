"""The benchmarks' peers do the same work: their results agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsim
from benchmarks import limit, peers
from benchmarks.__main__ import BETA, KEY, instances, main
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
