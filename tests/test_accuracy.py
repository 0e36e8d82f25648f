"""Each field of the closed form stays within 8 u (kappa + |x|) of the exact value.

The reference is `tests/reference.py` (mpmath, from the paper); the instances are
`tests/adversarial.py`; kappa is derived in `reference.condition_numbers`. `--slow` widens the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf

import jaxsim
from tests import adversarial, reference
from tests.adversarial import Case

FUNCTIONS = (jaxsim.evaluate, jaxsim.theorem2, jaxsim.optimal_policy)
PROMISE = 8.0
MODES = ("float32", "float64")
QUICK, WIDE = (0, 360), (1, 3000)  # (seed, size)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The exact values of one case, their condition numbers and the signs behind the verdicts."""

    case: Case
    values: dict[str, Any]
    kappa: dict[str, Any]
    floors: dict[str, Any]
    log_p_star: tuple[np.ndarray, np.ndarray]  # float64, and what is left of the exact value
    kappa_log_p_star: np.ndarray
    support: list[int]
    signs: dict[str, int | None]


def _dtype(mode: str) -> np.dtype[Any]:
    return np.dtype(mode.split("-")[0])


@contextmanager
def precision(mode: str) -> Iterator[None]:
    """Run with 64-bit types enabled or not, as the mode says."""
    with jax.enable_x64(mode != "float32"):
        yield


@cache
def expected(dtype: np.dtype[Any], seed: int, size: int) -> tuple[Expected, ...]:
    """Evaluate the adversarial set exactly, once per dtype."""
    info = np.finfo(dtype)
    results = []
    for case in adversarial.instances(dtype, seed, size):
        e = reference.exact(**case.arrays)
        kappa = reference.condition_numbers(e, float(info.eps) / 2)
        policy_kappa = kappa.pop("log_p_star")
        stored = {k: v for k, v in case.arrays.items() if k != "logit_alpha"}
        log_p_star = np.array([float(x) for x in e.log_p_star])
        rest = np.array([float(x - y) for x, y in zip(e.log_p_star, log_p_star, strict=True)])
        results.append(
            Expected(
                case=case,
                values={field: getattr(e, field) for field in kappa},
                kappa=kappa,
                floors=reference.underflow_floors(e, float(info.tiny)),
                log_p_star=(log_p_star, rest),
                kappa_log_p_star=np.array([float(x) for x in policy_kappa]),
                support=e.support,
                signs=reference.exact_signs(e, **stored),
            )
        )
    return tuple(results)


def as_instance(case: Case, size: int) -> jaxsim.Instance:
    """Store the case's arrays as they are, padded to `size` outputs."""
    filled = adversarial.padded(case, size)
    return jaxsim.Instance(**{k: jnp.asarray(v) for k, v in filled.arrays.items()})


def shape_for(case: Case) -> int:
    return next(n for n in adversarial.SHAPES if n >= case.size)


@dataclass(frozen=True)
class Worst:
    """The largest error ratio of one field, and all names that break the promise."""

    ratio: float = 0.0
    name: str = ""
    broken: tuple[str, ...] = ()

    def add(self, ratio: float, name: str) -> Worst:
        broken = (*self.broken, f"{ratio:8.2f}  {name}") if ratio > PROMISE else self.broken
        return Worst(ratio, name, broken) if ratio > self.ratio else Worst(
            self.ratio, self.name, broken
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything measured in one mode."""

    worst: dict[str, Worst]
    contradictions: list[str]
    wrong_support: list[str]
    wrong_dtype: list[str]
    decided: int
    codes: int


@cache
def report(mode: str, seed: int, size: int) -> Report:
    """Run the code under test over the set."""
    dtype = _dtype(mode)
    unit = float(np.finfo(dtype).eps) / 2
    worst = {f: Worst() for f in (*reference.SCALAR_FIELDS, *reference.COVARIANCE_FIELDS)}
    worst |= {"verdict_log_odds_shift": Worst(), "log_p_star": Worst()}
    contradictions, wrong_support, wrong_dtype, decided, codes = [], [], [], 0, 0
    with precision(mode):
        for item in expected(dtype, seed, size):
            case, name = item.case, item.case.name
            instance = as_instance(case, shape_for(case))
            found = jax.device_get(jaxsim.evaluate(instance))
            verdict = jax.device_get(jaxsim.theorem2(instance))
            policy = np.asarray(jaxsim.optimal_policy(instance))
            estimates = {f: (getattr(found, f), f) for f in reference.SCALAR_FIELDS}
            estimates |= {f: (getattr(verdict, f), f) for f in reference.COVARIANCE_FIELDS}
            estimates["verdict_log_odds_shift"] = (verdict.log_odds_shift, "log_odds_shift")
            for key, (x_hat, f) in estimates.items():
                ratio = reference.error_ratio(
                    x_hat, item.values[f], item.kappa[f], unit, item.floors[f]
                )
                worst[key] = worst[key].add(ratio, name)
                if x_hat.dtype != dtype:
                    wrong_dtype.append(f"{key} {x_hat.dtype} {name}")
            inside = np.zeros(policy.shape, bool)
            inside[item.support] = True
            if not np.array_equal(np.isfinite(policy), inside) or np.isnan(policy).any():
                wrong_support.append(name)
            exact, rest = item.log_p_star
            error = np.abs((policy[item.support].astype(np.float64) - exact) - rest)
            ratio = float(np.max(error / (unit * (item.kappa_log_p_star + np.abs(exact)))))
            worst["log_p_star"] = worst["log_p_star"].add(ratio, name)
            for code_name, field, sense in (
                ("hypothesis_aligned", "covariance_aligned", 1),
                ("hypothesis_unaligned", "covariance_unaligned", -1),
                ("conclusion", "log_odds_shift", 1),
            ):
                raw = getattr(verdict, code_name)
                code, sign = jaxsim.Outcome(int(raw)), item.signs[field]
                codes += 1
                if code is jaxsim.Outcome.UNDECIDED:
                    continue
                decided += 1
                claimed = {"HOLDS": 1, "FAILS": -1, "TIE": 0}[code.name]
                if sign is not None and claimed != sense * sign:
                    contradictions.append(f"{code_name}={code.name}, exact sign {sign}: {name}")
                if raw.dtype != np.int8:
                    wrong_dtype.append(f"{code_name} {raw.dtype} {name}")
    return Report(
        worst=worst,
        contradictions=contradictions,
        wrong_support=wrong_support,
        wrong_dtype=wrong_dtype,
        decided=decided,
        codes=codes,
    )


@pytest.fixture(params=MODES, scope="module")
def measured(request: pytest.FixtureRequest) -> Report:
    wide = request.config.getoption("--slow", default=False)
    return report(request.param, *(WIDE if wide else QUICK))


FIELDS = (
    *reference.SCALAR_FIELDS,
    *reference.COVARIANCE_FIELDS,
    "verdict_log_odds_shift",
    "log_p_star",
)


@pytest.mark.parametrize("field", FIELDS)
def test_error_is_within_the_promise(measured: Report, field: str) -> None:
    worst = measured.worst[field]
    listing = "\n  ".join(worst.broken[:20])
    assert worst.ratio <= PROMISE, (
        f"{field}: |x_hat - x| reaches {worst.ratio:.3g} u (kappa + |x|) at {worst.name}; "
        f"{len(worst.broken)} instances exceed {PROMISE:g}:\n  {listing}"
    )


def test_verdicts_never_contradict_the_exact_sign(measured: Report) -> None:
    assert not measured.contradictions, "\n".join(measured.contradictions)


def test_most_verdicts_are_decided(measured: Report) -> None:
    """An error bound that left everything undecided would be right and useless."""
    assert measured.decided >= 0.7 * measured.codes


def test_policy_has_the_support_of_the_reference(measured: Report) -> None:
    assert not measured.wrong_support, "\n".join(measured.wrong_support)


def test_results_keep_the_dtype(measured: Report) -> None:
    assert not measured.wrong_dtype, "\n".join(measured.wrong_dtype[:20])


def test_float32_bits_do_not_depend_on_x64() -> None:
    """So that what holds for float32 with x64 off holds with x64 on."""
    for item in expected(np.dtype(np.float32), *QUICK):
        if item.case.size > 129:
            continue
        found = []
        for mode in ("float32", "float32-x64"):
            with precision(mode):
                instance = as_instance(item.case, shape_for(item.case))
                results = [f(instance) for f in FUNCTIONS]
            found.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results)])
        assert found[0] == found[1], item.case.name


@pytest.mark.parametrize("mode", MODES)
def test_batches_keep_the_promise(mode: str, request: pytest.FixtureRequest) -> None:
    """Rows of one padded batch, whose bits may differ from those of single instances."""
    dtype, size = _dtype(mode), 129
    unit = float(np.finfo(dtype).eps) / 2
    wide = request.config.getoption("--slow", default=False)
    chosen = [x for x in expected(dtype, *(WIDE if wide else QUICK)) if x.case.size <= size]
    rows = [adversarial.padded(x.case, size).arrays for x in chosen]
    with precision(mode):
        batch = jaxsim.Instance(**{k: jnp.stack([row[k] for row in rows]) for k in rows[0]})
        found = jax.device_get(jaxsim.evaluate(batch))
    for field in reference.SCALAR_FIELDS:
        worst = Worst()
        for x_hat, item in zip(getattr(found, field), chosen, strict=True):
            ratio = reference.error_ratio(
                x_hat, item.values[field], item.kappa[field], unit, item.floors[field]
            )
            worst = worst.add(ratio, item.case.name)
        listing = "\n  ".join(worst.broken[:20])
        assert worst.ratio <= PROMISE, f"{field}: {worst.ratio:.3g} at {worst.name}\n  {listing}"


# The reference itself: against plain float64 where that is accurate, and against arithmetic.

BENIGN = ("plain", "zeros", "ties", "disjoint")


def test_exact_matches_numpy_on_benign_instances() -> None:
    """Two independent arrangements of the paper's formulas agree where neither is delicate."""
    checked = 0
    for case in adversarial.instances(np.float64, seed=3, size=300):
        if case.name.split(":")[1].split()[0] not in BENIGN:
            continue
        e = reference.exact(**case.arrays)
        if not 0.1 < e.range_over_beta < 40:
            continue
        checked += 1
        plain = reference.tilt_numpy(**case.arrays)
        for field in (*reference.SCALAR_FIELDS, *reference.COVARIANCE_FIELDS):
            expected = float(getattr(e, field))
            scale = float(e.beta) if field in ("expected_reward", "objective") else 0.0
            assert plain[field] == pytest.approx(expected, rel=1e-9, abs=1e-11 * (1 + scale)), (
                case.name, field
            )  # fmt: skip
        policy = [float(x) for x in e.log_p_star]
        np.testing.assert_allclose(plain["log_p_star"][e.support], policy, rtol=1e-11, atol=1e-11)
    assert checked >= 10


def test_digits_suffice() -> None:
    """50 digits and 800 agree to 25, relative to the condition number."""
    for case in adversarial.instances(np.float64, seed=4, size=60):
        if case.size > 40:
            continue
        few, many = reference.exact(**case.arrays), reference.exact(**case.arrays, digits=800)
        kappa = reference.condition_numbers(many, 2.0**-53)
        for field in reference.SCALAR_FIELDS:
            x, y = getattr(few, field), getattr(many, field)
            with mp.workdps(60):
                assert abs(x - y) <= mpf(10) ** -25 * (kappa[field] + abs(y)), (case.name, field)


def test_counterexample() -> None:
    """Both hypotheses of Theorem 2 hold, and TPM(A) falls below alpha."""
    p_aligned, p_unaligned, reward = reference.COUNTEREXAMPLE.values()
    assert (
        reference.exact_covariance(p_aligned, reward)
        > 0
        > reference.exact_covariance(p_unaligned, reward)
    )
    shift = reference.exact_log_odds_shift(p_aligned, p_unaligned, reward)
    with mp.workdps(30):
        assert abs(shift - (3 - mp.log((1 + mp.exp(4)) / 2))) < mpf(10) ** -28
    half = np.log(0.5)
    e = reference.exact([-np.inf, 0.0, -np.inf], [half, -np.inf, half], [0.0, 3.0, 4.0], 0.3, 1.0)
    assert float(e.log_odds_shift) == pytest.approx(float(shift), rel=1e-15)
    assert e.covariance_aligned > 0 > e.covariance_unaligned


def test_counterexample_flips_at_the_tribonacci_constant() -> None:
    p_aligned, p_unaligned, reward = reference.COUNTEREXAMPLE.values()
    critical = Fraction("0.60937786343")  # log 1.839286755...
    step = Fraction(1, 10**10)
    assert reference.exact_log_odds_shift(p_aligned, p_unaligned, reward, critical - step) > 0
    assert reference.exact_log_odds_shift(p_aligned, p_unaligned, reward, critical + step) < 0


def test_rational_ties_are_exact() -> None:
    """A tie is seen from the coefficients of equal exponentials, without a tolerance."""
    third = Fraction(1, 3)
    a, u = (third, third, third), (Fraction(1, 2), Fraction(1, 6), third)
    assert reference.exact_log_odds_shift(a, u, (2, 2, 5)) == 0
    assert reference.exact_log_odds_shift(a, u, (2, 3, 5)) != 0
    assert reference.exact_covariance(a, (2, 3, 5)) == 0


def test_signs_of_hidden_ties() -> None:
    """Masses permuted among equal rewards tie; a uniform component has covariance zero."""
    log_p = np.log([0.1, 0.2, 0.3, 0.4]).astype(np.float32)
    case = (log_p, log_p[[1, 0, 3, 2]], np.array([1.0, 1.0, 2.0, 2.0], np.float32))
    e = reference.exact(*case, 0.5, 0.3)
    signs = reference.exact_signs(e, *case, 0.3)
    assert signs["log_odds_shift"] == 0
    assert signs["covariance_aligned"] == 1
    uniform = (np.log(np.full(3, 1 / 3)), np.log([0.2, 0.2, 0.6]), np.array([1.0, 5.0, 0.0]))
    signs = reference.exact_signs(reference.exact(*uniform, 0.0, 1.0), *uniform, 1.0)
    assert signs["covariance_aligned"] == 0
    assert signs["covariance_unaligned"] == -1
