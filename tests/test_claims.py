"""The stream's sums against NumPy, and claims that fail when they are given something false."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxsim
from jaxsim import Family, Rewards, claims
from jaxsim.engine.stream import BIN_EDGES, ClaimTotal, count_violations, quantiles, stream
from jaxsim.families.counter import key_words
from jaxsim.runs.job import clopper_pearson
from jaxsim.sources import ArraySource, FamilySource, sample, tile_size
from jaxsim.theorem import covariances
from jaxsim.tilting import center
from tests import reference

KEY = jax.random.key(5)
BETAS = (0.1, 2.0)
FAMILY = Family(outputs=1024)  # tiles of 256 instances
NUM = 600  # two whole tiles and a part


def source(num: int = NUM, family: Family = FAMILY) -> FamilySource:
    return FamilySource(family=family, words=key_words(KEY), num=num)


def expected(beta: float, num: int = NUM) -> dict[str, np.ndarray]:
    """Every instance's results in NumPy float64."""
    batch = jax.device_get(jaxsim.sample_instances(KEY, FAMILY, num))
    batch = replace(batch, beta=np.full(num, beta))
    found = dict(reference.tilt_numpy(**vars(batch)))
    reward = batch.reward.astype(np.float64)
    above = reward - reward.mean(axis=1, keepdims=True)
    covariance = [
        (above * np.exp(p.astype(np.float64))).mean(axis=1)
        for p in (batch.log_p_aligned, batch.log_p_unaligned)
    ]
    found["hold"] = (covariance[0] > 0) & (covariance[1] < 0)
    found["logit"] = batch.logit_alpha + found["log_odds_shift"]
    return found


def test_sums_are_those_of_numpy() -> None:
    totals = stream(source(), BETAS, audit=NUM)
    for at, beta in enumerate(BETAS):
        e, sums = expected(beta), jax.tree.map(lambda x, at=at: x[at], totals.sums)
        assert sums.counted == NUM
        assert sums.invalid == 0
        assert sums.hypotheses_hold == e["hold"].sum()
        assert sums.violations == (e["hold"] & (e["log_odds_shift"] < 0)).sum()
        assert sums.below_alpha == (e["log_odds_shift"] < 0).sum()
        assert sums.tpm_aligned == pytest.approx(np.exp(e["log_tpm_aligned"]).sum(), rel=1e-5)
        assert sums.kl == pytest.approx(e["kl"].sum(), rel=1e-5)
        for name in ("logit", "log_odds_shift"):
            histogram = sums.logit_tpm if name == "logit" else sums.log_odds_shift
            assert histogram.sum() == NUM
            levels = (0.05, 0.5, 0.95)
            found = quantiles(histogram, levels)
            width = BIN_EDGES[1] - BIN_EDGES[0]
            low = np.quantile(e[name], levels, method="lower") - width
            high = np.quantile(e[name], levels, method="higher") + width
            assert np.all((low <= found) & (found <= high))


def test_claims_count_what_they_should() -> None:
    totals = stream(source(), BETAS, audit=300)
    e = [expected(beta) for beta in BETAS]
    theorem = totals.claims["theorem_2"]
    hold = [x["hold"] for x in e]
    assert theorem.tried == sum(h.sum() for h in hold)
    assert theorem.failed == sum(
        (h & (x["log_odds_shift"] < 0)).sum() for h, x in zip(hold, e, strict=True)
    )
    worst = [np.where(h, x["log_odds_shift"], np.inf) for h, x in zip(hold, e, strict=True)]
    at = int(np.argmin([w.min() for w in worst]))
    assert theorem.worst_beta == BETAS[at]
    assert theorem.worst_index == int(np.argmin(worst[at]))
    assert theorem.worst_margin == pytest.approx(worst[at].min(), rel=1e-5)
    assert totals.claims["lemma_1"].tried == 300 * len(BETAS)
    failing = {name for name, total in totals.claims.items() if total.failed}
    assert failing == {"theorem_2", "correlation_kept", "shrunk_by_exp_reward"}


def test_arrays_and_draws_go_the_same_way() -> None:
    drawn = source()
    arrays = ArraySource(
        instance=sample(drawn, NUM, ()), prompts=[""] * NUM, texts=None, has_beta=False
    )
    one, two = stream(drawn, BETAS, audit=NUM), stream(arrays, BETAS, audit=NUM)
    for x, y in zip(jax.tree.leaves(one.sums), jax.tree.leaves(two.sums), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    counts = [{k: (v.tried, v.failed) for k, v in t.claims.items()} for t in (one, two)]
    assert counts[0] == counts[1]


def test_own_betas() -> None:
    totals = stream(source(300), (), audit=0)
    batch = jaxsim.sample_instances(KEY, FAMILY, 300)
    verdict = jaxsim.theorem2(batch)
    assert np.isnan(totals.betas[0])
    assert totals.sums.violations[0] == np.sum(verdict.violated)


def test_violations_alone_are_counted_alike() -> None:
    totals = stream(source(), BETAS, audit=0)
    hold, violated = count_violations(source(), BETAS)
    np.testing.assert_array_equal(hold, totals.sums.hypotheses_hold)
    np.testing.assert_array_equal(violated, totals.sums.violations)


def test_binary_rewards_never_violate() -> None:
    family = Family(outputs=8, reward=Rewards(kind="binary"))
    hold, violated = count_violations(source(4 * tile_size(8), family), (0.05, 1.0))
    assert hold.min() > 20_000
    assert violated.sum() == 0


@pytest.mark.parametrize(("outputs", "shares"), [(3, (0.088, 0.010)), (32, (0.33, 0.080))])
def test_shares_of_violations(outputs: int, shares: tuple[float, ...]) -> None:
    """Known to about one in the last digit, from millions of instances: at β = 0.05 and 1."""
    hold, violated = count_violations(source(50_000, Family(outputs=outputs)), (0.05, 1.0))
    for n, k, share in zip(hold, violated, shares, strict=True):
        low, high = clopper_pearson(int(k), int(n))
        assert low - 0.004 <= share <= high + 0.004


def case_of(beta: float = 0.5) -> claims.Case:
    tile = source(256).tile(0)
    base = center(tile)
    real = jnp.ones(256, bool)
    return claims.case(base, covariances(base), jnp.full(256, beta, jnp.float32), real)


def corrupted(name: str) -> claims.Case:
    """A case in which what the claim is about is wrong by about a thousandth, or lost."""
    c = case_of()
    if name == "equal_supports":
        lost = c.tilt.base.support.at[3].set(False)
        return replace(c, tilt=replace(c.tilt, base=replace(c.tilt.base, support=lost)))
    if name in ("tpm_strictly_inside", "unaligned_stays_possible"):
        gone = jnp.full_like(c.evaluation.log_tpm_unaligned, -jnp.inf)
        return replace(c, evaluation=replace(c.evaluation, log_tpm_unaligned=gone))
    if name == "theorem_2":
        return c
    off = c.optimum.log_ratio + 1e-3 * jnp.sin(jnp.arange(1024.0))[:, None]
    mean = c.optimum.expected_reward
    slope = replace(c.tilt, t=c.tilt.t * 1.01)  # what p* should be, no longer what it is
    return replace(c, tilt=slope, optimum=replace(c.optimum, log_ratio=off, expected_reward=mean))


IDENTITIES = [
    "closed_form_optimal",
    "lemma_1",
    "equal_supports",
    "tpm_strictly_inside",
    "take_back_logits",
    "unaligned_stays_possible",
]


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_claim_fails_on_what_is_false(name: str) -> None:
    judge: Any = next(c.judge for c in claims.CLAIMS if c.name == name)
    sound, spoilt = claims.tally(judge(case_of())), claims.tally(judge(corrupted(name)))
    assert sound.tried == 256
    assert sound.failed == 0
    assert spoilt.failed > 128


def test_padding_is_not_counted() -> None:
    tile = source(256).tile(0)
    base = center(tile)
    real = jnp.arange(256) < 3
    c = claims.case(base, covariances(base), tile.beta, real)
    for claim in claims.CLAIMS:
        if claim.judge:
            assert claims.tally(claim.judge(c)).tried <= 3


def test_claim_totals_add_up() -> None:
    parts = [
        ClaimTotal(tried=5, failed=1, worst_margin=-1.0, worst_index=3, worst_beta=0.5),
        ClaimTotal(tried=2, undecided=1, worst_margin=-1.0, worst_index=9, worst_beta=0.1),
        ClaimTotal(),
    ]
    total = ClaimTotal(
        tried=7, failed=1, undecided=1, worst_margin=-1.0, worst_index=3, worst_beta=0.5
    )
    assert parts[0].plus(parts[1]).plus(parts[2]) == total
    assert parts[0].plus(parts[1].plus(parts[2])) == total


def test_quantiles_at_the_edges() -> None:
    histogram = np.zeros(len(BIN_EDGES) + 1, int)
    histogram[0], histogram[-1] = 1, 1
    np.testing.assert_array_equal(quantiles(histogram, (0.1, 0.9)), [-20, 20])
    one = np.zeros_like(histogram)
    one[401] = 10  # the bin from 0 to 0.05
    np.testing.assert_allclose(quantiles(one, (0.5,)), [0.025])


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (0, 0), (250, 1000)])
def test_clopper_pearson(k: int, n: int) -> None:
    found = clopper_pearson(k, n)
    if n == 0:
        assert found == (0.0, 1.0)
        return
    interval = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert found == pytest.approx((interval.low, interval.high), abs=1e-9)
