"""Random instances: bits that depend on (key, index) alone, and laws that SciPy knows.

Seeds are fixed. `--slow` draws ten times as many numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp
from jax.extend.random import threefry_2x32 as jax_threefry
from scipy import stats

from jaxsim import Components, Family, Instance, Rewards, Scalar, sample_instances
from jaxsim.families import samplers
from jaxsim.families.counter import Stream, key_words, threefry_2x32
from jaxsim.families.draw import draw_masses
from jaxsim.instance import Masses
from jaxsim.sources import block_size, draw_tile, index_words, stream_at, tile_size

KEY = jax.random.key(20)
SMALL = Family(outputs=1024)  # 256 instances to a tile
FEW, MANY = 131_072, 1_048_576
N = 4
FAMILIES = {
    "flat": Family(outputs=N),
    "peaked": Family(
        outputs=N,
        components=Components(concentration_aligned=0.1, concentration_unaligned=5.0),
        reward=Rewards(kind="student_t", degrees_of_freedom=3.0),
        alpha=Scalar(kind="grid", values=(0.2, 0.5, 0.9)),
        beta=Scalar(kind="uniform", low=0.0, high=2.0),
    ),
    "bounded": Family(
        outputs=N,
        reward=Rewards(kind="bounded", scale=3.0),
        alpha=Scalar(kind="uniform", low=0.25, high=0.5),
        beta=Scalar(kind="fixed", value=0.7),
    ),
    "bradley_terry": Family(
        outputs=N,
        reward=Rewards(kind="bradley_terry"),
        alpha=Scalar(kind="log_uniform", low=0.01, high=1.0),
        beta=Scalar(kind="grid", values=(0.1, 1.0)),
    ),
    "binary": Family(outputs=N, reward=Rewards(kind="binary", probability=0.3, scale=2.0)),
}


@pytest.fixture(scope="module")
def wide(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--slow"))


@cache
def drawn(name: str, dtype: str, num: int) -> dict[str, np.ndarray]:
    """Draw a family once, as NumPy arrays in float64."""
    with jax.enable_x64(dtype == "float64"):
        batch = sample_instances(KEY, replace(FAMILIES[name], dtype=dtype), num)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(batch))
        return {k: np.asarray(v, np.float64) for k, v in vars(jax.device_get(batch)).items()}


def accept(values: np.ndarray, cdf: Any) -> None:
    """Refuse a sample that is from another law, by Kolmogorov and Smirnov's test."""
    result = stats.kstest(np.ravel(values), cdf)
    assert result.pvalue > 1e-3, f"KS statistic {result.statistic:.2e}, p {result.pvalue:.1e}"


def log_beta_cdf(log_p: np.ndarray, a: float, b: float) -> np.ndarray:
    """P(p ≤ e^log_p) for p ~ Beta(a, b), also where e^log_p underflows."""
    near_zero = np.exp(a * log_p - np.log(a) - sp.betaln(a, b))
    return np.where(log_p < -40, near_zero, sp.betainc(a, b, np.exp(log_p)))


def log_gamma_cdf(log_g: np.ndarray, a: float) -> np.ndarray:
    near_zero = np.exp(a * log_g - sp.gammaln(a + 1))
    return np.where(log_g < -40, near_zero, sp.gammainc(a, np.exp(log_g)))


# The generator.


def test_blocks_are_those_of_jax() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (4, 1000), np.uint32)
    words[:, :4] = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    for column in range(8):
        k = jnp.asarray(words[:2, column])
        counter = jnp.asarray(words[2:])
        expected = jax_threefry(k, counter.reshape(-1)).reshape(2, -1)
        found = threefry_2x32((k[0], k[1]), (counter[0], counter[1]))
        np.testing.assert_array_equal(np.stack(found), expected)


STARTS = [0, 1, 255, 256, 257, 2**32 - 300, 2**32 - 1, 2**32, 2**33, 2**64 - 600]
WINDOW = 600  # more than two tiles


@pytest.mark.parametrize("start", STARTS)
def test_an_instance_depends_on_its_index_alone(start: int) -> None:
    def draw(first: int, num: int) -> Instance:
        return jax.device_get(sample_instances(KEY, SMALL, num, start=first))

    assert tile_size(SMALL.outputs) == 256
    window = draw(start, WINDOW)
    with jax.enable_x64(True):
        other_mode = draw(start, WINDOW)
    jax.tree.map(np.testing.assert_array_equal, vars(window), vars(other_mode))
    for k in (1, 7, 255, 256, 257, 299, 300, 301, 511, 512, 599):
        alone = draw(start + k, 1)
        for name, values in vars(alone).items():
            np.testing.assert_array_equal(values[0], getattr(window, name)[k])


@pytest.mark.parametrize(
    "family",
    [
        Family(outputs=8, components=Components(concentration_aligned=0.1), reward=Rewards(
            kind="student_t"), alpha=Scalar(kind="log_uniform", low=0.1, high=1.0)),
        Family(outputs=8, components=Components(kind="zipf"), reward=Rewards(kind="correlated")),
        Family(outputs=8, components=Components(kind="sparse", concentration_unaligned=3.0)),
    ],
    ids=["rejection", "zipf", "sparse"],
)  # fmt: skip
def test_bits_are_the_same_with_64_bit_mode_on(family: Family) -> None:
    start = 2**33 - 5
    narrow = jax.device_get(sample_instances(KEY, family, 10, start=start))
    shifted = jax.device_get(sample_instances(KEY, family, 1, start=start + 7))
    with jax.enable_x64(True):
        wide = jax.device_get(sample_instances(KEY, family, 10, start=start))
    for name, values in vars(narrow).items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, getattr(wide, name))
        np.testing.assert_array_equal(values[7], getattr(shifted, name)[0])


@pytest.mark.parametrize(
    "family",
    [
        Family(outputs=31),
        Family(outputs=8, components=Components(concentration_aligned=5.0), reward=Rewards(
            kind="student_t")),
        Family(outputs=2**15),
    ],
    ids=["flat", "gamma", "large"],
)  # fmt: skip
def test_masses_are_those_of_the_instances(family: Family) -> None:
    words, size = key_words(KEY), block_size(family.outputs)
    whole = jax.device_get(draw_tile(family, words, index_words(2**40)))
    start = jnp.asarray(index_words(2**40))

    def masses_of(num: int) -> Masses:
        drawn = jax.jit(lambda: draw_masses(family, stream_at(words, start, 0, num)))
        return jax.device_get(drawn())

    masses, more = masses_of(size), masses_of(tile_size(family.outputs))
    for name, value in vars(masses).items():  # of any shape the same bits
        np.testing.assert_array_equal(value, getattr(more, name)[..., :size])
    for name in ("reward", "logit_alpha", "beta"):
        np.testing.assert_array_equal(getattr(masses, name), getattr(whole, name)[..., :size])
    for side in ("aligned", "unaligned"):
        mass = getattr(masses, side).astype(float)
        log_p, u = getattr(whole, f"log_p_{side}")[..., :size], 2.0**-24
        exact = np.log(mass) - np.log(mass.sum(axis=0))
        assert np.all(np.abs(log_p - exact) < 8 * u * (1 + np.abs(exact)))


def test_other_indices_and_keys_give_other_instances() -> None:
    starts = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    rewards = [np.asarray(sample_instances(KEY, SMALL, 1, start=s).reward[0]) for s in starts]
    rewards += [
        np.asarray(sample_instances(jax.random.key(seed), SMALL, 1).reward[0])
        for seed in (0, 1, 2**31 - 1)
    ]
    # Ranks of independent rewards agree in few places; equal words would agree in all.
    for i, one in enumerate(rewards):
        for other in rewards[:i]:
            assert np.mean(one == other) < 0.01
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(one.size)


@pytest.mark.parametrize(
    ("num", "start", "message"),
    [(0, 0, "num is 0"), (1, -1, "start is -1"), (2, 2**64 - 1, "start is 18446744073709551615")],
)
def test_indices_beyond_64_bits_are_refused(num: int, start: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_instances(KEY, SMALL, num, start=start)


def test_keys_that_are_no_keys_are_refused() -> None:
    for key in (jnp.zeros(2, jnp.uint32), jax.random.key(0, impl="rbg")):
        with pytest.raises(TypeError, match="key: expected"):
            sample_instances(key, SMALL, 1)


def test_float64_needs_the_64_bit_mode() -> None:
    with pytest.raises(ValueError, match="64-bit mode is off"):
        sample_instances(KEY, replace(SMALL, dtype="float64"), 1)


# The variables.


@pytest.mark.parametrize(("dtype", "units"), [(np.float32, 2.5), (np.float64, 8)])
def test_the_cosine_is_numpys(dtype: Any, units: float) -> None:
    with jax.enable_x64(True):
        turn = jnp.asarray(np.linspace(-0.75, 0.5, 1_000_001), dtype)
        found = np.asarray(jax.jit(samplers.cosine)(turn), np.float64)
    expected = np.cos(2 * np.pi * np.asarray(turn, np.float64))
    assert np.max(np.abs(found - expected)) < units * np.finfo(dtype).eps / 2


@pytest.mark.parametrize("concentration", [0.01, 0.1, 0.99, 1.1, 2.0, 5.0, 100.0, 1e4])
def test_the_gamma_quantile_is_scipys(concentration: float) -> None:
    z = np.linspace(-6.7, 6.7, 100_001).astype(np.float32)
    found = jax.jit(partial(samplers.log_gamma_quantile, concentration=concentration))(z)
    a, z = concentration + (concentration < 1), z.astype(np.float64)
    lower, upper = sp.gammaincinv(a, sp.ndtr(z)), sp.gammainccinv(a, sp.ndtr(-z))
    expected = np.log(np.where(z < 0, lower, upper))
    np.testing.assert_array_less(np.abs(found - expected), 5 * 2.0**-24 * (1 + np.abs(expected)))


class ExtremeStream(Stream):
    """All words are the same."""

    def __init__(self, word: int) -> None:
        zero = jnp.zeros(1, jnp.uint32)
        super().__init__(key=(zero, zero), index=zero)
        object.__setattr__(self, "word", word)

    def words(self, purpose: int, block: Any, attempt: Any = 0) -> tuple[jax.Array, jax.Array]:
        words = jnp.full((2, 1), self.word, jnp.uint32)  # type: ignore[attr-defined]
        return words, words


def test_uniforms_stay_inside_the_unit_interval() -> None:
    ends = (jnp.asarray([0, 2**32 - 1, 2**31], jnp.uint32),) * 2
    with jax.enable_x64(True):
        for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
            for u in samplers.uniform(ends, dtype):
                assert u.dtype == dtype and np.all((u > 0) & (u < 1))
                assert np.all(np.isfinite(samplers.log_exponential(u)))
            for word in (0, 2**31, 2**32 - 1):  # the least and greatest radius, every way
                extremes = ExtremeStream(word)
                z = samplers.normal(extremes, 0, 2, dtype)
                assert np.all(np.isfinite(z)) and np.max(np.abs(z)) > 6 * (word == 0)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gammas(concentration: float, dtype: str, num: int) -> jax.Array:
    stream = Stream.of(key_words(KEY), jnp.uint32(0), jnp.arange(num, dtype=jnp.uint32))
    return samplers.log_gamma_variate(stream, 8, 1, concentration, np.dtype(dtype))[0]


@pytest.mark.parametrize(
    ("concentration", "dtype"),
    [(0.01, "float32"), (0.3, "float64"), (1.0, "float32"), (2.5, "float64"), (100.0, "float32")],
)
def test_gamma_variables(concentration: float, dtype: str, wide: bool) -> None:
    with jax.enable_x64(dtype == "float64"):
        log_g = np.asarray(_gammas(concentration, dtype, MANY if wide else FEW), np.float64)
    assert np.all(np.isfinite(log_g))
    accept(log_g, lambda x: log_gamma_cdf(x, concentration))
    # E log g = ψ(a), with variance ψ'(a).
    error = np.mean(log_g) - sp.digamma(concentration)
    assert abs(error) < 4 * math.sqrt(sp.polygamma(1, concentration) / log_g.size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["flat", "peaked"])
def test_components_are_dirichlet(name: str, dtype: str, wide: bool) -> None:
    arrays, spec = drawn(name, dtype, MANY if wide else FEW), FAMILIES[name].components
    unit = np.finfo(dtype).eps / 2
    for side, a in (
        ("aligned", spec.concentration_aligned),
        ("unaligned", spec.concentration_unaligned),
    ):
        log_p = arrays[f"log_p_{side}"]
        assert np.all(np.isfinite(log_p))
        assert np.max(np.abs(np.exp(log_p).sum(axis=1) - 1)) <= 8 * N * unit
        # Near 1 the stored log loses its digits; what lies there is seen in the other outputs.
        cut = -1e-2
        share = log_beta_cdf(np.array(cut), a, (N - 1) * a)
        for output in (0, N - 1):
            below = log_p[:, output][log_p[:, output] < cut]
            assert abs(below.size / len(log_p) - share) < 4 / math.sqrt(len(log_p))
            accept(below, lambda x, a=a, s=share: log_beta_cdf(x, a, (N - 1) * a) / s)
        p = np.exp(log_p)
        deviation = math.sqrt((N - 1) / N**2 / (N * a + 1))
        assert np.max(np.abs(p.mean(axis=0) - 1 / N)) < 4 * deviation / math.sqrt(len(p))
        assert p.std(axis=0) == pytest.approx(np.full(N, deviation), rel=0.02)
        off_diagonal = np.cov(p.T)[np.triu_indices(N, 1)]
        np.testing.assert_allclose(off_diagonal, -(1 / N**2) / (N * a + 1), rtol=0.08)


@pytest.mark.parametrize(
    ("name", "dtype", "law"),
    [
        ("flat", "float32", stats.norm()),
        ("flat", "float64", stats.norm()),
        ("peaked", "float32", stats.t(3)),
        ("peaked", "float64", stats.t(3)),
        ("bounded", "float32", stats.uniform(-3, 6)),
        ("bradley_terry", "float32", stats.gumbel_l()),
    ],
)
def test_rewards(name: str, dtype: str, law: Any, wide: bool) -> None:
    r = drawn(name, dtype, MANY if wide else FEW)["reward"]
    accept(r, law.cdf)
    assert abs(r.mean() - law.mean()) < 4 * law.std() / math.sqrt(r.size)
    if name != "peaked":  # the variance of t(3) has no error of finite size
        kurtosis = float(law.stats(moments="k"))
        error = 4 * law.var() * math.sqrt((kurtosis + 2) / r.size)
        assert abs(r.var() - law.var()) < error


def test_binary_rewards(wide: bool) -> None:
    r = drawn("binary", "float32", MANY if wide else FEW)["reward"]
    assert set(np.unique(r)) == {0.0, 2.0}
    share = np.mean(r > 0)
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / r.size)


def test_alpha_and_beta(wide: bool) -> None:
    num = MANY if wide else FEW
    for dtype in ("float32", "float64"):
        arrays = drawn("flat", dtype, num)
        accept(arrays["logit_alpha"], stats.logistic.cdf)  # of a uniform α
        accept(arrays["beta"], stats.loguniform(0.05, 10).cdf)
    arrays = drawn("peaked", "float32", num)
    accept(arrays["beta"], stats.uniform(0, 2).cdf)
    _evenly(arrays["logit_alpha"], sp.logit([0.2, 0.5, 0.9]))
    arrays = drawn("bounded", "float32", num)
    accept(sp.expit(arrays["logit_alpha"]), stats.uniform(0.25, 0.25).cdf)
    np.testing.assert_array_equal(arrays["beta"], np.float32(0.7))
    arrays = drawn("bradley_terry", "float32", num)
    accept(sp.expit(arrays["logit_alpha"]), stats.loguniform(0.01, 1).cdf)
    _evenly(arrays["beta"], [0.1, 1.0])


def _evenly(x: np.ndarray, values: Any) -> None:
    found, counts = np.unique(x, return_counts=True)
    np.testing.assert_allclose(found, values, rtol=1e-6, atol=1e-7)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    "spec",
    [
        Scalar(kind="uniform", low=0.999999, high=1.0),
        Scalar(kind="log_uniform", low=0.999999, high=1.0),
        Scalar(kind="fixed", value=1 - 1e-9),
    ],
    ids=lambda spec: spec.kind,
)
def test_log_odds_are_finite_where_alpha_would_round_to_one(spec: Scalar) -> None:
    logit = np.asarray(sample_instances(KEY, Family(outputs=2, alpha=spec), 32_768).logit_alpha)
    assert np.all(np.isfinite(logit))
    if spec.kind in ("uniform", "log_uniform"):  # 1-α is uniform on (0, 1e-6)
        accept(np.exp(-logit.astype(np.float64)), stats.uniform(0, 1e-6).cdf)
    else:
        np.testing.assert_allclose(logit, -math.log(1e-9), rtol=1e-6)


@pytest.mark.parametrize("name", ["flat", "peaked"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_correlated_that_should_not_be(name: str, dtype: str, wide: bool) -> None:
    arrays = drawn(name, dtype, MANY if wide else FEW)
    # Ranks: a heavy tail would hide a correlation of the rest.
    ranks = {
        "A": arrays["log_p_aligned"][:, 0],
        "U": arrays["log_p_unaligned"][:, 0],
        "r0": arrays["reward"][:, 0],
        "r1": arrays["reward"][:, 1],
        "alpha": arrays["logit_alpha"],
        "beta": arrays["beta"],
    }
    table = np.stack([stats.rankdata(x) for x in ranks.values()])
    num = table.shape[1]
    pairs = np.corrcoef(table)[np.triu_indices(len(table), 1)]
    assert np.max(np.abs(pairs)) < 4.5 / math.sqrt(num)
    for lag in (1, 2, 64):  # neighbouring instances, each variable with every other
        next_to = np.corrcoef(table[:, :-lag], table[:, lag:])[: len(table), len(table) :]
        assert np.max(np.abs(next_to)) < 4.5 / math.sqrt(num)
    # The same in squares: dependence without correlation.
    squares = (table - table.mean(axis=1, keepdims=True)) ** 2
    pairs = np.corrcoef(squares)[np.triu_indices(len(table), 1)]
    if name == "flat":
        assert np.max(np.abs(pairs)) < 4.5 / math.sqrt(num)


# Kinds of components.


def test_sparse_supports() -> None:
    spec = Components(kind="sparse", support=0.3, concentration_aligned=2.0)
    batch = jax.device_get(sample_instances(KEY, Family(outputs=16, components=spec), 16_384))
    in_a, in_u = np.isfinite(batch.log_p_aligned), np.isfinite(batch.log_p_unaligned)
    assert np.all(in_a[:, 0]) and np.all(in_u[:, 1])
    for inside, always in ((in_a, 0), (in_u, 1)):
        free = np.delete(inside, always, axis=1)
        assert abs(free.mean() - 0.3) < 4 * math.sqrt(0.21 / free.size)
    both = (in_a & in_u)[:, 2:].mean()
    assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / in_a[:, 2:].size)
    for log_p in (batch.log_p_aligned, batch.log_p_unaligned):
        assert np.max(np.abs(np.exp(log_p.astype(float)).sum(axis=1) - 1)) < 16 * 8 * 6e-8


@pytest.mark.parametrize("outputs", [2, 8])
def test_disjoint_supports(outputs: int) -> None:
    family = Family(outputs=outputs, components=Components(kind="disjoint"))
    batch = jax.device_get(sample_instances(KEY, family, 16_384))
    in_a, in_u = np.isfinite(batch.log_p_aligned), np.isfinite(batch.log_p_unaligned)
    np.testing.assert_array_equal(in_a, ~in_u)
    assert np.all(in_a.any(axis=1)) and np.all(in_u.any(axis=1))
    if outputs > 2:
        assert abs(in_a[:, 2:].mean() - 0.5) < 2 / math.sqrt(in_a[:, 2:].size)


@pytest.mark.parametrize("exponent", [1.5])
def test_zipf_splits_a_zipf_reference(exponent: float) -> None:
    n, scale = 64, 2.0
    spec = Components(
        kind="zipf", zipf_exponent=exponent, classifier_scale=scale, classifier_mean=-1.0
    )
    batch = jax.device_get(sample_instances(KEY, Family(outputs=n, components=spec), 4096))
    a, u, logit = (
        x.astype(float) for x in (batch.log_p_aligned, batch.log_p_unaligned, batch.logit_alpha)
    )
    law = np.arange(1, n + 1) ** -exponent
    mixture = sp.expit(logit)[:, None] * np.exp(a) + sp.expit(-logit)[:, None] * np.exp(u)
    np.testing.assert_allclose(mixture, np.tile(law / law.sum(), (4096, 1)), rtol=3e-5)
    # The classifier's log-odds, a(y) = α p_A/p_ref: independent normals.
    accept(logit[:, None] + a - u, stats.norm(-1.0, scale).cdf)


@pytest.mark.parametrize("strength", [-0.6, 1.0])
def test_correlated_rewards_reach_the_set_strength(strength: float) -> None:
    n = 256
    family = Family(outputs=n, reward=Rewards(kind="correlated", strength=strength))
    batch = jax.device_get(sample_instances(KEY, family, 1024))
    log_ratio = batch.log_p_aligned.astype(float) - batch.log_p_unaligned
    found = [np.corrcoef(x, r)[0, 1] for x, r in zip(log_ratio, batch.reward, strict=True)]
    # Of n pairs the sample correlation varies by (1-ρ²)/√n and is biased by -ρ(1-ρ²)/(2n).
    spread = (1 - strength**2) / math.sqrt(n)
    bias = abs(strength) * spread**2 / 2
    assert abs(np.mean(found) - strength) <= 4 * spread / math.sqrt(len(found)) + bias + 1e-5
    assert batch.reward.var() == pytest.approx(1, abs=0.05)


# The descriptions.

BAD = [
    (lambda: Components(kind="dirichlet", support=0.3), "components.support is 0.3"),
    (lambda: Components(kind="disjoint", support=0.3), "components.support is 0.3"),
    (lambda: Components(kind="sparse", zipf_exponent=2.0), "components.zipf_exponent is 2.0"),
    (lambda: Components(kind="zipf", concentration_aligned=2.0), "components.concentration_al"),
    (lambda: Components(kind="zipf", concentration_unaligned=2.0), "components.concentration_un"),
    (lambda: Components(classifier_scale=1.0), "components.classifier_scale is 1.0"),
    (lambda: Components(classifier_mean=1.0), "components.classifier_mean is 1.0"),
    (lambda: Components(concentration_aligned=0.001), "components.concentration_aligned is 0.001"),
    (lambda: Components(concentration_unaligned=2e4), "components.concentration_unaligned is 2"),
    (lambda: Components(concentration_aligned=math.nan), "components.concentration_aligned is nan"),
    (lambda: Components(kind="sparse", support=0.0), "components.support is 0.0"),
    (lambda: Components(kind="sparse", support=1.5), "components.support is 1.5"),
    (lambda: Components(kind="zipf", zipf_exponent=-1.0), "components.zipf_exponent is -1.0"),
    (lambda: Components(kind="zipf", classifier_scale=0.0), "components.classifier_scale is 0.0"),
    (lambda: Components(kind="zipf", classifier_mean=-99.0), "components.classifier_mean is -99"),
    (lambda: Rewards(probability=0.3), "reward.probability is 0.3"),
    (lambda: Rewards(degrees_of_freedom=5.0), "reward.degrees_of_freedom is 5.0"),
    (lambda: Rewards(kind="binary", strength=0.1), "reward.strength is 0.1"),
    (lambda: Rewards(kind="student_t", degrees_of_freedom=0.1), "reward.degrees_of_freedom is 0.1"),
    (lambda: Rewards(kind="binary", probability=1.0), "reward.probability is 1.0"),
    (lambda: Rewards(kind="correlated", strength=-1.5), "reward.strength is -1.5"),
    (lambda: Rewards(scale=0.0), "reward.scale is 0.0"),
    (lambda: Rewards(scale=math.inf), "reward.scale is inf"),
    (lambda: Family(outputs=0), "family.outputs is 0"),
    (lambda: Family(outputs=2**21), "family.outputs is 2097152"),
    (lambda: Family(alpha=Scalar(value=0.0)), "alpha.value is 0.0"),
    (lambda: Family(alpha=Scalar(value=1.0)), "alpha.value is 1.0"),
    (lambda: Family(alpha=Scalar(kind="uniform", low=-0.1)), "alpha.low is -0.1"),
    (lambda: Family(alpha=Scalar(kind="uniform", high=1.1)), "alpha.high is 1.1"),
    (lambda: Family(alpha=Scalar(kind="log_uniform")), "alpha.low is 0.0"),
    (lambda: Family(alpha=Scalar(kind="grid")), "alpha.values is empty"),
    (lambda: Family(alpha=Scalar(kind="grid", values=(0.5, 1.0))), r"alpha.values\[1\] is 1.0"),
    (lambda: Family(beta=Scalar(value=0.0)), "beta.value is 0.0"),
    (lambda: Family(beta=Scalar(value=1e-40)), "beta.value is 1e-40"),
    (lambda: Family(beta=Scalar(value=math.inf)), "beta.value is inf"),
    (lambda: Family(beta=Scalar(value=math.nan)), "beta.value is nan"),
    (lambda: Family(beta=Scalar(kind="uniform", low=1.0, high=math.inf)), "beta.high is inf"),
    (lambda: Family(beta=Scalar(kind="uniform", low=2.0, high=1.0)), "beta.low is 2.0"),
    (lambda: Family(beta=Scalar(kind="grid", values=(1.0,), high=2.0)), "beta.high is 2.0"),
    (lambda: Family(beta=Scalar(kind="uniform", value=2.0)), "beta.value is 2.0"),
    (
        lambda: Family(components=Components(kind="zipf"), alpha=Scalar(value=0.3)),
        "alpha is set, but components.kind = 'zipf'",
    ),
    (lambda: Family(outputs=1, components=Components(kind="disjoint")), "family.outputs is 1"),
    (
        lambda: Family(components=Components(kind="sparse"), reward=Rewards(kind="correlated")),
        "reward.kind = 'correlated'",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_setting_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_kind_can_be_drawn_at_its_smallest() -> None:
    for family in (
        Family(outputs=1),
        Family(outputs=1, components=Components(kind="zipf"), reward=Rewards(kind="correlated")),
    ):
        batch = sample_instances(KEY, family, 3)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(batch))
        np.testing.assert_allclose(np.exp(batch.log_p_aligned), 1, rtol=1e-6)
