"""The survey of violations, against NumPy on the same instances and against known shares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsim
from jaxsim import Components, Family, Instance, Rewards
from jaxsim.engine.simulate import survey
from jaxsim.engine.table import per_instance
from jaxsim.families.counter import key_words
from jaxsim.sources import ArraySource, FamilySource, tile_size

ROOT = Path(__file__).parents[1]


def source(family: Family, num: int, seed: int = 0) -> FamilySource:
    return FamilySource(family=family, words=key_words(jax.random.key(seed)), num=num)


@pytest.mark.parametrize(
    "family",
    [
        Family(outputs=3),
        Family(outputs=16, components=Components(kind="sparse")),
        Family(outputs=16, reward=Rewards(kind="binary")),
    ],
    ids=["dirichlet", "sparse", "binary"],
)
def test_counts_are_those_of_certified_verdicts(family: Family) -> None:
    num, betas = 3000, (0.0, 0.05, 1.0, 20.0)
    batch = jax.device_get(jaxsim.sample_instances(jax.random.key(0), family, num))
    found = survey(source(family, num), betas, wanted=num)
    assert found.drawn == num
    hold = np.asarray(jaxsim.certify(batch).hypotheses_hold)
    assert found.hold == hold.sum()
    for at, beta in enumerate(betas):
        if beta:
            values = {**vars(batch), "beta": np.full(num, beta, np.float32)}
            violated = np.asarray(jaxsim.certify(Instance(**values)).violated).sum()
        else:
            p_a, p_u = np.exp(batch.log_p_aligned), np.exp(batch.log_p_unaligned)
            support = p_a + p_u > 0
            best = np.where(support, batch.reward, -np.inf).max(axis=1, keepdims=True)
            top = support & (batch.reward == best)
            violated = (hold & ((p_a * top).sum(axis=1) < (p_u * top).sum(axis=1))).sum()
        assert found.violations[at] == violated


def test_it_stops_at_the_first_tile_with_enough() -> None:
    family = Family(outputs=64)
    size = tile_size(64)
    found = survey(source(family, 10 * size), (1.0,), wanted=100)
    assert found.drawn == size
    assert 100 <= found.hold < size
    assert survey(source(family, 7), (1.0,), wanted=100).drawn == 7


def test_what_rounding_leaves_open_is_settled() -> None:
    """Copies of the three-output example next to its critical β, which no float32 decides."""
    row = Instance.from_probs([0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 3.0, 4.0], 0.5, 1.0)
    batch = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 5), row)
    held = ArraySource(instance=batch, prompts=list("abcde"), texts=None, has_beta=False)
    critical = np.float32(1.6410179)
    betas = (float(np.nextafter(critical, 0)), float(critical), float(np.nextafter(critical, 9)))
    found = survey(held, betas, wanted=5)
    exact = [
        int(jaxsim.certify(Instance(**{**vars(row), "beta": np.float32(b)})).conclusion)
        for b in betas
    ]
    assert found.settled == 15
    assert found.violations.tolist() == [5 * (code == -1) for code in exact]
    assert set(exact) == {-1, 1}
    table = per_instance(held, betas)
    assert table["conclusion"].tolist() == [code for code in exact for _ in range(5)]


# From 0.1 to 6 million instances each; the last digit may be off by one or two.
KNOWN = {3: (0.103, 0.088, 0.010), 8: (0.24, 0.22, 0.042), 32: (0.34, 0.33, 0.080)}


@pytest.mark.parametrize("outputs", KNOWN)
def test_known_shares(outputs: int) -> None:
    found = survey(source(Family(outputs=outputs), 1 << 40), (0.0, 0.05, 1.0), wanted=40_000)
    shares = found.violations / found.hold
    for share, known in zip(shares, KNOWN[outputs], strict=True):
        digit = 10.0 ** np.floor(np.log10(known) - 1)
        sampling = 4 * (known * (1 - known) / found.hold) ** 0.5
        assert abs(share - known) < sampling + digit


def test_the_experiment_resumes_and_refuses_another_configuration(tmp_path: Path) -> None:
    config = tmp_path / "atlas.toml"
    text = """seed = 1
outputs = [2, 3]
betas = [0.0, 1.0]
wanted = 50
most = 40000
[families.plain]
"""
    config.write_text(text)
    command = [sys.executable, str(ROOT / "experiments" / "atlas.py"), str(config)]
    out = tmp_path / "out"
    first = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True)
    assert first.stdout.count("\n") == 3
    assert (out / "COMPLETE.json").is_file()
    assert (out / "figures" / "atlas.png").is_file()
    cell = json.loads((out / "cells" / "plain-2.json").read_text())
    assert cell["violations"] == [0, 0]
    again = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True)
    assert again.stdout == ""
    config.write_text(text.replace("wanted = 50", "wanted = 60"))
    other = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "another configuration" in other.stderr
