"""The ladder of conditions, against the same conditions in exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import jaxsim
from jaxsim import Components, Family, Instance, Outcome, Rewards
from jaxsim.engine.lift import lift
from jaxsim.theorem import ladder
from tests import adversarial

RUNGS = (
    "monotone_likelihood_ratio",
    "single_crossing",
    "first_order_dominance",
    "increasing_convex_order",
    "mgf_order",
    "at_this_beta",
)
kernel = lift(ladder.conditions)


def codes(found: Any) -> list[str]:
    return [Outcome(int(getattr(found, rung))).name for rung in RUNGS]


def instance_of(
    a: Sequence[Any], u: Sequence[Any], r: Sequence[Any], beta: float = 1.0
) -> Instance:
    return Instance.from_probs([float(x) for x in a], [float(x) for x in u], r, 0.5, beta)


class Levels:
    """Counts of outputs by reward level: both components uniform, so that all is rational."""

    def __init__(self, in_a: Sequence[int], in_u: Sequence[int], reward: Sequence[int]) -> None:
        self.a = [Fraction(x, sum(in_a)) for x in in_a]
        self.u = [Fraction(x, sum(in_u)) for x in in_u]
        self.reward = list(reward)
        self._counts = in_a, in_u

    def instance(self, beta: float) -> Instance:
        """An output per count, those of A apart from those of U or shared, in mixed order."""
        rows = []
        for a, u, r in zip(*self._counts, self.reward, strict=True):
            shared = min(a, u) // 2
            rows += [(1, 1, r)] * shared + [(1, 0, r)] * (a - shared) + [(0, 1, r)] * (u - shared)
        rng = np.random.default_rng(len(rows))
        in_a, in_u, r = np.array(rows)[rng.permutation(len(rows))].T
        return Instance.from_probs(in_a / in_a.sum(), in_u / in_u.sum(), r * 1.0, 0.5, beta)

    def expected(self) -> list[str] | None:
        """The first four rungs by their definitions; None where both are the same."""
        kept = [k for k in range(len(self.a)) if self.a[k] or self.u[k]]
        a, u = [self.a[k] for k in kept], [self.u[k] for k in kept]
        r = [self.reward[k] for k in kept]
        if a == u:
            return None
        pairs = [(i, j) for j in range(len(a)) for i in range(j)]
        rising = all(a[i] * u[j] <= a[j] * u[i] for i, j in pairs)
        crossing = not any(a[i] > u[i] and a[j] < u[j] for i, j in pairs)
        dominance = all(sum(a[k:]) >= sum(u[k:]) for k in range(len(a)))
        convex = all(
            sum((p - q) * max(x - t, 0) for p, q, x in zip(a, u, r, strict=True)) >= 0 for t in r
        )
        return ["HOLDS" if x else "FAILS" for x in (rising, crossing, dominance, convex)]

    def difference(self, s: Any) -> Any:
        """E_A[e^{sr}] - E_U[e^{sr}] with 50 digits."""
        with mp.workdps(50):
            terms = zip(self.a, self.u, self.reward, strict=True)
            return mp.fsum(mpf((a - u).numerator) / (a - u).denominator * mp.exp(s * r)
                           for a, u, r in terms)  # fmt: skip


@st.composite
def levels(draw: st.DrawFn) -> Levels:
    size = draw(st.integers(2, 5))
    counts = st.lists(st.integers(0, 4), min_size=size, max_size=size).filter(any)
    rewards = draw(st.lists(st.integers(-3, 6), min_size=size, max_size=size, unique=True))
    return Levels(draw(counts), draw(counts), sorted(rewards))


PADDED = 48


@settings(max_examples=120, deadline=None)
@given(levels(), st.sampled_from([0.25, 1.0, 4.0]))
def test_every_rung_is_exact_for_rational_instances(x: Levels, beta: float) -> None:
    """Tied rewards, zero masses and exact equalities included; nothing stays undecided."""
    instance = x.instance(beta)
    fill = PADDED - instance.reward.size
    padded = Instance(
        log_p_aligned=np.pad(instance.log_p_aligned, (0, fill), constant_values=-np.inf),
        log_p_unaligned=np.pad(instance.log_p_unaligned, (0, fill), constant_values=-np.inf),
        reward=np.pad(instance.reward, (0, fill), constant_values=7.0),
        logit_alpha=instance.logit_alpha,
        beta=instance.beta,
    )
    found, expected = codes(jaxsim.conditions(padded)), x.expected()
    if expected is None:
        assert found == ["TIE"] * 6
        return
    assert found[:4] == expected
    shift = x.difference(mpf(1) / mpf(beta))
    assert found[5] == ("TIE" if abs(shift) < 1e-40 else "HOLDS" if shift > 0 else "FAILS")
    grid = [x.difference(mpf(10) ** (mpf(k) / 8 - 3)) for k in range(49)]
    assert found[4] in ("HOLDS", "FAILS")
    if found[4] == "HOLDS":
        assert min(grid) >= 0
    if min(grid) < 0:
        assert found[4] == "FAILS"


def test_examples_worked_by_hand() -> None:
    rising = instance_of([0.05, 0.25, 0.7], [0.1, 0.3, 0.6], [0.0, 1.0, 2.0])
    assert codes(jaxsim.conditions(rising)) == ["HOLDS"] * 6
    counterexample = instance_of([0, 1, 0], [0.5, 0, 0.5], [0.0, 3.0, 4.0])
    assert codes(jaxsim.conditions(counterexample)) == ["FAILS"] * 6
    dominated = instance_of([0, 0.5, 0.5], [0.5, 0, 0.5], [0.0, 1.0, 10.0])
    assert codes(jaxsim.conditions(dominated)) == ["FAILS"] + ["HOLDS"] * 5
    permuted = instance_of([0.2, 0.3, 0.5], [0.3, 0.2, 0.5], [1.0, 1.0, 2.0])
    assert codes(jaxsim.conditions(permuted)) == ["TIE"] * 6
    # A is a mean-preserving spread of U: convex order without dominance.
    spread = instance_of([0.5, 0, 0.5], [0, 1, 0], [0.0, 1.0, 2.0])
    assert codes(jaxsim.conditions(spread)) == ["FAILS"] * 3 + ["HOLDS"] * 3


def test_mgf_order_is_weaker_than_the_convex_order() -> None:
    """(x - 1)(x - 1.5)^2 + …: E_A[e^{sr}] leads everywhere though T changes sign twice."""
    x = Levels([0, 9, 0, 2], [4, 0, 6, 0], [0, 1, 2, 3])
    assert x.expected() is not None
    grid = [x.difference(mpf(k) / 50) for k in range(1, 400)]
    found = codes(jaxsim.conditions(x.instance(1.0)))
    assert found[4] == ("HOLDS" if min(grid) > 0 else "FAILS")


def test_a_shift_that_touches_zero_is_decided_for_rational_rewards() -> None:
    """(x-1)(x-2)^2 = x^3 - 5x^2 + 8x - 4: Δ touches zero at β = 1/log 2 and turns back."""
    touching = Levels([0, 8, 0, 1], [4, 0, 5, 0], [0, 1, 2, 3])
    found = codes(jaxsim.conditions(touching.instance(1.0)))
    assert found[3:] == ["FAILS", "HOLDS", "HOLDS"]
    # The same, but by one output in 90 no touch any more: two crossings.
    crossing = Levels([0, 80, 0, 10], [39, 0, 51, 0], [0, 1, 2, 3])
    assert min(crossing.difference(mpf(k) / 1000) for k in range(600, 800)) < 0
    assert codes(jaxsim.conditions(crossing.instance(1.0)))[4] == "FAILS"


FAMILIES = [  # of one size, so that the kernel is compiled once
    Family(outputs=5),
    Family(outputs=5, reward=Rewards(kind="binary")),
    Family(outputs=5, components=Components(kind="sparse"), reward=Rewards(kind="student_t")),
    Family(outputs=5, reward=Rewards(kind="correlated", strength=0.9)),
]


def check_ladder(found: Any) -> None:
    """What holds has only what holds below it; mgf_order may stand above a tie."""
    table = np.stack([np.atleast_1d(getattr(found, rung)) for rung in RUNGS])
    for upper in range(5):
        for lower in range(upper + 1, 6):
            holds = table[upper] == Outcome.HOLDS
            below = table[lower][holds]
            assert np.isin(below, (Outcome.HOLDS, Outcome.TIE)).all(), (RUNGS[upper], RUNGS[lower])
            ties = table[upper] == Outcome.TIE
            assert (table[lower][ties] == Outcome.TIE).all()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.reward.kind)
def test_no_random_instance_climbs_a_rung_and_misses_a_lower_one(family: Family) -> None:
    batch = jaxsim.sample_instances(jax.random.key(3), family, 2000)
    rough, found = jax.device_get(kernel(batch)), jaxsim.conditions(batch)
    check_ladder(found)
    for rung in RUNGS:
        settled, before = getattr(found, rung), getattr(rough, rung)
        decided = before != Outcome.UNDECIDED
        assert (settled[decided] == before[decided]).all()
        assert (settled != Outcome.UNDECIDED).all()
    conclusion = jaxsim.certify(batch).conclusion
    np.testing.assert_array_equal(found.at_this_beta, conclusion)


def test_no_adversarial_instance_climbs_a_rung_and_misses_a_lower_one() -> None:
    held = 0
    for case in adversarial.instances(np.dtype(np.float32), seed=5, size=240):
        if case.size > 129:
            continue
        filled = adversarial.padded(case, next(n for n in adversarial.SHAPES if n >= case.size))
        found = jaxsim.conditions(Instance(**filled.arrays))
        check_ladder(found)
        held += found.increasing_convex_order == Outcome.HOLDS
    assert held > 20


def test_chance_of_a_monotone_ratio() -> None:
    """Of independent continuous draws one order of n! is the rising one."""
    batch = jaxsim.sample_instances(jax.random.key(0), Family(outputs=3), 60_000)
    share = np.mean(np.asarray(kernel(batch).monotone_likelihood_ratio) == Outcome.HOLDS)
    assert share == pytest.approx(1 / 6, abs=5 * (1 / 6 / 60_000) ** 0.5)


def test_traced_calls_give_the_kernel_alone() -> None:
    batch = jaxsim.sample_instances(jax.random.key(0), Family(outputs=4), 16)
    jitted = jax.jit(jaxsim.conditions)(batch)
    mapped = jax.vmap(jaxsim.conditions)(batch)
    for rung in RUNGS:
        expected = np.asarray(getattr(kernel(batch), rung))
        np.testing.assert_array_equal(getattr(jitted, rung), expected)
        np.testing.assert_array_equal(getattr(mapped, rung), expected)


def test_safe_for_any_components() -> None:
    safe = jaxsim.safe_for_any_components
    assert bool(safe([2.0, 2.0, 2.0]))
    assert bool(safe([0.0, 5.0, 0.0, 5.0]))
    assert not bool(safe([0.0, 5.0, 5.0, 1.0]))
    assert not bool(safe(np.array([0.0, 1.0, 1.0 + 1e-15])))  # float64, whatever JAX's mode is
    assert safe(np.array([[0.0, 1.0, 1.0], [0.0, 1.0, 2.0]])).tolist() == [True, False]
    assert bool(jax.jit(safe)(np.float32([1.0, 2.0])))
    with pytest.raises(ValueError, match="reward has shape"):
        safe(1.0)


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("reward", [[0.0, 1.0, 2.0], [0.0, 0.1, 2.0], [5.0, -1.0, 5.0, 4.5]])
def test_three_values_have_a_counterexample_at_every_beta(reward: list[float], beta: float) -> None:
    """A on the levels next to the mean, U on the two extremes: the proof's construction."""
    r = np.array(reward)
    mean, step = r.mean(), 1e-6 * np.ptp(r) * min(1.0, np.ptp(r) / beta)
    low, high = r[r <= mean].max(), r[r > mean].min()

    def between(lower: float, upper: float, target: float) -> np.ndarray:
        weight = (target - lower) / (upper - lower)
        p = np.where(r == lower, (1 - weight) / (r == lower).sum(), 0.0)
        return p + np.where(r == upper, weight / (r == upper).sum(), 0.0)

    p_a, p_u = between(low, high, mean + step), between(r.min(), r.max(), mean - step)
    with jax.enable_x64(True):
        verdict = jaxsim.certify(Instance.from_probs(p_a, p_u, r, 0.5, beta))
    assert bool(verdict.violated)


def test_binary_rewards_put_the_hypotheses_on_the_ladder() -> None:
    """With two values the hypotheses imply single crossing, and so all below it."""
    batch = jaxsim.sample_instances(jax.random.key(2), FAMILIES[1], 2000)
    hold = np.asarray(jaxsim.theorem2(batch).hypotheses_hold)
    found = jaxsim.conditions(batch)
    assert hold.sum() > 200
    assert (found.single_crossing[hold] == Outcome.HOLDS).all()
    assert (found.at_this_beta[hold] == Outcome.HOLDS).all()


def test_consecutive_levels_suffice_for_the_ratio() -> None:
    """The settled rung compares neighbours only; ratios of ∞ and 0 included."""
    for a, u in (([1, 0, 1], [1, 1, 0]), ([0, 1, 1], [1, 0, 1]), ([0, 0, 1], [1, 1, 0])):
        x = Levels(a, u, [0, 1, 2])
        expected = x.expected()
        assert expected is not None
        assert codes(jaxsim.conditions(x.instance(1.0)))[0] == expected[0]
        ratios = [mp.inf if not q else p / q for p, q in zip(x.a, x.u, strict=True)]
        assert (expected[0] == "HOLDS") == all(m <= n for m, n in pairwise(ratios))
