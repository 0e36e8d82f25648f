"""A shrunk counterexample still fails by exact arithmetic, and nothing more can be taken away."""

import itertools
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from mpmath import mp, mpf

from jaxsim import Instance
from jaxsim.shrink import DEPTHS, Example, shrink, theorem_2_depth


def fails_exactly(x: Example) -> bool:
    """Decide by fractions and 50 digits whether the hypotheses hold while TPM(A) < α."""
    r = [Fraction(v) for v in x.reward.tolist()]
    centred = [v - sum(r) / len(r) for v in r]
    covariances = [
        sum(c * Fraction(v) for c, v in zip(centred, p.tolist(), strict=True))
        for p in (x.p_aligned, x.p_unaligned)
    ]
    with mp.workdps(50):
        aligned, unaligned = (
            mp.fsum(mpf(v) * mp.exp(mpf(t) / mpf(x.beta)) for v, t in zip(p, x.reward, strict=True))
            / mp.fsum(map(mpf, p))
            for p in (x.p_aligned.tolist(), x.p_unaligned.tolist())
        )
        return covariances[0] > 0 > covariances[1] and aligned < unaligned


def smaller_ones(x: Example) -> list[Example]:
    """Every instance with one output dropped, or two merged at their mean reward."""

    def renormalised(p_a: np.ndarray, p_u: np.ndarray, r: np.ndarray) -> list[Example]:
        if not (p_a.sum() > 0 and p_u.sum() > 0):
            return []
        names = tuple(f"y{i}" for i in range(r.size))
        p_a, p_u = p_a / p_a.sum(), p_u / p_u.sum()
        return [replace(x, p_aligned=p_a, p_unaligned=p_u, reward=r, names=names)]

    found: list[Example] = []
    for i in range(x.reward.size):
        found += renormalised(*(np.delete(v, i) for v in (x.p_aligned, x.p_unaligned, x.reward)))
    for i, j in itertools.combinations(range(x.reward.size), 2):
        p_a, p_u, r = x.p_aligned.copy(), x.p_unaligned.copy(), x.reward.copy()
        r[i] = (x.p_ref[i] * r[i] + x.p_ref[j] * r[j]) / (x.p_ref[i] + x.p_ref[j])
        p_a[i] += p_a[j]
        p_u[i] += p_u[j]
        found += renormalised(*(np.delete(v, j) for v in (p_a, p_u, r)))
    return found


def known(parts: int, seed: int) -> Example:
    """Split each output of p_A = (0, 1, 0), p_U = (1/2, 0, 1/2), r = (0, 3, 4) at β = 1."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(parts, 4.0), size=3)
    instance = Instance.from_probs(
        (shares * [[0.0], [1.0], [0.0]]).ravel(),
        (shares * [[0.5], [0.0], [0.5]]).ravel(),
        (np.array([[0.0], [3.0], [4.0]]) + 0.02 * rng.normal(size=(3, parts))).ravel(),
        alpha=0.3,
        beta=1.0,
    )
    return Example.of(instance, None)


def random_failures(outputs: int, count: int) -> list[Example]:
    rng = np.random.default_rng(outputs)
    found: list[Example] = []
    while len(found) < count:
        p_a, p_u = rng.dirichlet(np.ones(outputs), size=2)
        x = Example(
            p_aligned=p_a,
            p_unaligned=p_u,
            reward=rng.normal(size=outputs),
            alpha=float(rng.uniform(0.05, 0.95)),
            beta=0.1,
            names=tuple(f"y{i + 1}" for i in range(outputs)),
        )
        if theorem_2_depth(x) > 0.1 and fails_exactly(x):
            found.append(x)
    return found


@pytest.mark.parametrize(
    "example",
    [known(1, 0), known(4, 1), known(10, 2), *random_failures(8, 20), *random_failures(16, 20)],
    ids=lambda x: f"n={x.reward.size}",
)
def test_theorem_2_shrinks_to_a_minimal_exact_failure(example: Example) -> None:
    assert fails_exactly(example)
    small = shrink(example, DEPTHS["theorem_2"])
    assert fails_exactly(small)
    # Two outputs cannot fail: there the hypotheses order p_A above p_U (paper, n = 2).
    assert 3 <= small.reward.size <= min(6, example.reward.size)
    assert not [x for x in smaller_ones(small) if theorem_2_depth(x) > 1e-3]
    np.testing.assert_allclose([small.p_aligned.sum(), small.p_unaligned.sum()], 1, atol=1e-12)
    assert small.beta == example.beta
    assert (np.diff(small.reward) >= 0).all()


def test_names_say_which_outputs_were_merged_and_each_occurs_once() -> None:
    example = known(10, 2)
    small = shrink(example, DEPTHS["theorem_2"])
    merged = [part for name in small.names for part in name.split(" + ")]
    assert len(small.names) == small.reward.size
    assert len(set(merged)) == len(merged)
    assert set(merged) <= set(example.names)


def test_rounding_gives_short_decimals_that_still_fail() -> None:
    small = shrink(known(6, 5), DEPTHS["theorem_2"])
    assert small.alpha == 0.5
    for p in (small.p_aligned, small.p_unaligned, small.reward):
        np.testing.assert_array_equal(p, np.round(p, 3))
    assert fails_exactly(small)


@pytest.mark.parametrize("claim", sorted(DEPTHS))
def test_every_claim_that_can_fail_shrinks(claim: str) -> None:
    example = random_failures(16, 1)[0]
    small = shrink(example, DEPTHS[claim])
    assert DEPTHS[claim](small) > 1e-3
    assert not [x for x in smaller_ones(small) if DEPTHS[claim](x) > 1e-3]
    assert small.to_json()["names"] == list(small.names)


def test_an_instance_that_does_not_fail_is_refused() -> None:
    example = replace(known(1, 0), beta=100.0)
    assert not fails_exactly(example)
    with pytest.raises(ValueError, match="does not fail clearly"):
        shrink(example, DEPTHS["theorem_2"])


def test_outputs_outside_the_support_are_left_out() -> None:
    instance = Instance.from_probs(
        [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5], [0.0, 3.0, 9.0, 4.0], 0.5, 1.0
    )
    example = Example.of(instance, ["a", "b", "padding", "c"])
    assert example.names == ("a", "b", "c")
    assert example.reward.tolist() == [0.0, 3.0, 4.0]
    assert fails_exactly(example)


def test_512_outputs_take_less_than_two_seconds() -> None:
    example = random_failures(512, 1)[0]
    begun = time.perf_counter()
    small = shrink(example, DEPTHS["theorem_2"])
    assert time.perf_counter() - begun < 2.0
    assert fails_exactly(small)
    assert small.reward.size <= 6
