"""Simulations: the counts of certified verdicts, the means of evaluations, the bits on any mesh."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import jaxsim
from jaxsim import Components, Family, Instance, Rewards, Scalar, simulate

KEY = jax.random.key(5)
FAMILIES = {
    "flat": Family(outputs=32),
    "gamma": Family(
        outputs=9,
        components=Components(concentration_aligned=5.0),
        alpha=Scalar(kind="fixed", value=0.2),
    ),
    "small gamma": Family(
        outputs=9,
        components=Components(concentration_aligned=0.1, concentration_unaligned=0.1),
        reward=Rewards(kind="student_t"),
    ),
    "zipf": Family(outputs=40, components=Components(kind="zipf")),
}


def at(batch: Instance, beta: float) -> Instance:
    return replace(batch, beta=np.full_like(batch.beta, beta))


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_certified_and_means_are_those_of_evaluate(name: str) -> None:
    num, start, betas = 6000, 2**33 - 1000, (0.0, 0.07, 1.0, 30.0)
    family = FAMILIES[name]
    batch = jax.device_get(jaxsim.sample_instances(KEY, family, num, start=start))
    found = simulate(KEY, family, num, betas=betas, start=start)
    assert found.betas == betas and found.drawn == num
    hold = np.asarray(jaxsim.certify(batch).hypotheses_hold)
    assert found.hold == hold.sum()
    assert found.mean_alpha == pytest.approx(
        np.mean(1 / (1 + np.exp(-batch.logit_alpha))), rel=1e-6
    )
    assert math.isnan(found.mean_log_z[0]) and math.isnan(found.mean_tpm_aligned[0])
    for column, beta in enumerate(betas[1:], start=1):
        verdict = jaxsim.certify(at(batch, beta))
        fails = np.asarray(verdict.conclusion) == jaxsim.Outcome.FAILS
        assert found.below_alpha[column] == fails.sum()
        assert found.violations[column] == (fails & hold).sum()
        exact = jax.device_get(jaxsim.evaluate(at(batch, beta)))
        tpm = np.exp(exact.log_tpm_aligned.astype(float)).mean()
        assert found.mean_tpm_aligned[column] == pytest.approx(tpm, rel=1e-6)
        log_z = exact.log_z.astype(float)
        room = 1e-6 * np.abs(log_z).mean()
        assert found.mean_log_z[column] == pytest.approx(log_z.mean(), abs=room)


def test_each_instance_at_its_own_beta() -> None:
    found = simulate(KEY, FAMILIES["flat"], 3000)
    verdict = jaxsim.certify(jaxsim.sample_instances(KEY, FAMILIES["flat"], 3000))
    assert found.hold == np.asarray(verdict.hypotheses_hold).sum()
    assert found.violations.tolist() == [np.asarray(verdict.violated).sum()]
    assert math.isnan(found.betas[0])


def test_float64() -> None:
    family = Family(outputs=16, dtype="float64")
    with pytest.raises(ValueError, match="64-bit mode is off"):
        simulate(KEY, family, 10)
    with jax.enable_x64(True):
        found = simulate(KEY, family, 2000, betas=(0.3,))
        verdict = jaxsim.certify(
            at(jax.device_get(jaxsim.sample_instances(KEY, family, 2000)), 0.3)
        )
    assert found.violations.tolist() == [np.asarray(verdict.violated).sum()]


def test_parts_add_up_to_the_whole() -> None:
    family, betas = FAMILIES["flat"], (0.1, 2.0)
    whole = simulate(KEY, family, 30_000, betas=betas)
    parts = [
        simulate(KEY, family, num, betas=betas, start=start)
        for start, num in ((0, 5), (5, 12_345), (12_350, 17_650))
    ]
    assert sum(part.hold for part in parts) == whole.hold
    np.testing.assert_array_equal(sum(part.violations for part in parts), whole.violations)


SCRIPT = """
import json, zlib, jax, jaxsim
import numpy as np
from jaxsim import Components, Family, simulate
found = []
for family in (Family(outputs=32), Family(outputs=8, components=Components(kind="sparse"))):
    x = simulate(jax.random.key(1), family, 100_000, betas=(0.1, 1.0))
    found.append({k: getattr(x, k) if k == "hold" else [float(v).hex() for v in getattr(x, k)]
                  for k in ("hold", "violations", "mean_log_z", "mean_tpm_aligned")})
solved = jaxsim.solve(jaxsim.sample_instances(jax.random.key(1), Family(outputs=64), 3000))
found.append([zlib.crc32(np.asarray(v).tobytes()) for v in jax.tree.leaves(solved)])
print(json.dumps([jax.device_count(), found]))
"""


def on_devices(count: int) -> tuple[int, Any]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))  # type: ignore[return-value]


def test_eight_devices_give_the_bits_of_one() -> None:
    one, few, many = on_devices(1), on_devices(2), on_devices(8)
    assert (one[0], few[0], many[0]) == (1, 2, 8)
    assert one[1] == few[1] == many[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num is 0"),
        ({"num": 5, "start": -1}, "start is -1"),
        ({"num": 5, "start": 2**64 - 4}, "start is 18446744073709551612"),
        ({"num": 5, "betas": (1.0, -1.0)}, r"betas\[1\] is -1.0"),
        ({"num": 5, "betas": (math.nan,)}, r"betas\[0\] is nan"),
        ({"num": 5, "betas": (1e-31,)}, r"betas\[0\] is 1e-31"),
        ({"num": 5, "betas": ()}, "betas is empty"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(KEY, FAMILIES["flat"], **arguments)
