"""Each number that jaxsim returns stays within 8 u (kappa + |x|) of the exact value.

The reference is `tests/reference.py` (mpmath, from the paper); the instances and policies are
`tests/adversarial.py`; kappa is derived in `reference.condition_numbers` and its neighbours.
`--slow` widens the set.
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
from tests.reference import Known

FUNCTIONS = (jaxsim.evaluate, jaxsim.theorem2, jaxsim.optimal_policy)
PROMISE = 8.0
MODES = ("float32", "float64")
QUICK, WIDE = (0, 360), (1, 3000)  # (seed, size)

# The outputs compared, `function` or `function.field`, with their names in the reference.
SCALARS = {
    **{f"evaluate.{field}": field for field in reference.SCALAR_FIELDS},
    **{f"theorem2.{field}": field for field in (*reference.COVARIANCE_FIELDS, "log_odds_shift")},
}
PER_OUTPUT = {
    "optimal_policy": "log_p_star",
    "mixture_weights.aligned": "log_weight_aligned",
    "mixture_weights.unaligned": "log_weight_unaligned",
}
OF_POLICY = {x: f"policy_{x}" for x in ("objective", "tpm", "kl_divergence")}
OUTPUTS = (*SCALARS, *PER_OUTPUT, *OF_POLICY, "take_back_logits")
TAKE_BACK = ((0.0, -1.0), (3.0, 2.0), (1.1, 0.1), (-0.3, -1.3))

# Where the regimes of R = (max r - min r)/beta on the support, and of n, begin.
RANGES, SIZES = (1e-3, 1.0, 30.0), (9, 129)


@dataclass(frozen=True, kw_only=True)
class List:
    """A number per output: the finite ones rounded, what that leaves of them, and the others."""

    finite: np.ndarray  # their places
    values: np.ndarray
    rest: np.ndarray
    kappa: np.ndarray
    others: np.ndarray  # infinite, or zero where finite

    @classmethod
    def of(cls, finite: list[int], values: list[mpf], kappa: list[mpf], others: Any) -> List:
        rounded = [float(x) for x in values]
        rest = [float(x - y) for x, y in zip(values, rounded, strict=True)]
        return cls(
            finite=np.array(finite, int),
            values=np.array(rounded),
            rest=np.array(rest),
            kappa=np.array([float(x) for x in kappa]),
            others=np.asarray(others),
        )

    def error_ratio(self, found: np.ndarray, unit: float, tiny: float) -> float:
        """Return the ratio at the worst place; padding must hold -inf."""
        others = np.where(np.isfinite(found), 0.0, found)
        padding = found.size - self.others.size
        if not np.array_equal(others, _padded(self.others, self.others.size + padding)):
            return float("inf")
        error = np.abs((found[self.finite].astype(np.float64) - self.values) - self.rest) - tiny
        size = unit * (self.kappa + np.abs(self.values))
        return float(np.max(np.maximum(error, 0.0) / (size + tiny), initial=0.0))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One case and two policies, with all that is exactly known of them."""

    case: Case
    name: str
    policy: np.ndarray
    other: np.ndarray
    take_back: tuple[np.floating[Any], np.floating[Any]]
    scalars: dict[str, Known]
    lists: dict[str, List]
    support: list[int]
    signs: dict[str, int | None]
    range_over_beta: float


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
    cases = enumerate(adversarial.instances(dtype, seed, size))
    return tuple(_expected(case, (seed, i)) for i, case in cases)


def _expected(case: Case, seed: tuple[int, int]) -> Expected:
    info = np.finfo(case.reward.dtype)
    unit, tiny = float(info.eps) / 2, float(info.tiny)
    e = reference.exact(**case.arrays)
    kappa = reference.condition_numbers(e, unit)
    floors = reference.underflow_floors(e, tiny)
    scalars = {
        field: Known(value=getattr(e, field), kappa=kappa[field], floor=floors[field])
        for field in (*reference.SCALAR_FIELDS, *reference.COVARIANCE_FIELDS)
    }
    outside = np.full(case.size, -np.inf)
    outside[e.support] = 0.0
    lists = {
        field: List.of(e.support, getattr(e, field), kappa[field], outside)
        for field in PER_OUTPUT.values()
    }
    star, ref = np.full((2, case.size), -np.inf)
    star[e.support] = lists["log_p_star"].values
    ref[e.support] = [float(x) for x in e.log_p_ref]
    names, policy, other = adversarial.policies(case, star, ref, seed)
    scalars |= {
        "policy_objective": reference.exact_objective(e, policy, unit, tiny),
        "policy_tpm": reference.exact_tpm(e, policy, tiny),
        "policy_kl_divergence": reference.exact_kl(policy, other, tiny),
    }
    a, b = (policy.dtype.type(x) for x in TAKE_BACK[seed[1] % len(TAKE_BACK)])
    lists["take_back_logits"] = _take_back(policy, other, float(a), float(b))
    stored = {k: v for k, v in case.arrays.items() if k != "logit_alpha"}
    return Expected(
        case=case,
        name=f"{case.name}; {names}",
        policy=policy,
        other=other,
        take_back=(a, b),
        scalars=scalars,
        lists=lists,
        support=e.support,
        signs=reference.exact_signs(e, **stored),
        range_over_beta=float(e.range_over_beta),
    )


def _take_back(tuned: np.ndarray, ref: np.ndarray, a: float, b: float) -> List:
    """At a = 0 the tuned logits do not matter; outside the reference all is -inf."""
    tuned = tuned.astype(np.float64) if a else np.zeros(tuned.shape)
    inside = ref > -np.inf
    others = np.where(inside, np.where(tuned > -np.inf, 0.0, -a * np.inf if a else 0.0), -np.inf)
    finite = np.flatnonzero(others == 0).tolist()
    known = [reference.exact_take_back(float(tuned[i]), float(ref[i]), a, b) for i in finite]
    return List.of(finite, [x.value for x in known], [x.kappa for x in known], others)


def as_instance(case: Case, size: int) -> jaxsim.Instance:
    """Store the case's arrays as they are, padded to `size` outputs."""
    filled = adversarial.padded(case, size)
    return jaxsim.Instance(**{k: jnp.asarray(v) for k, v in filled.arrays.items()})


def shape_for(case: Case) -> int:
    return next(n for n in adversarial.SHAPES if n >= case.size)


def _padded(policy: np.ndarray, size: int) -> np.ndarray:
    return np.pad(policy, (0, size - policy.size), constant_values=-np.inf)


_kl_divergence = jax.jit(jaxsim.kl_divergence)
_take_back_logits = jax.jit(lambda x, y, a, b: jaxsim.take_back_logits(x, y, a=a, b=b))


def results(
    instance: jaxsim.Instance, policy: Any, other: Any, a: Any, b: Any
) -> dict[str, np.ndarray]:
    """Return all outputs, by the names of OUTPUTS, and the verdicts' codes."""
    verdict, weights = jaxsim.theorem2(instance), jaxsim.mixture_weights(instance)
    found = {f"evaluate.{k}": v for k, v in vars(jaxsim.evaluate(instance)).items()}
    found |= {f"theorem2.{k}": v for k, v in vars(verdict).items()}
    found |= {f"mixture_weights.{k}": v for k, v in vars(weights).items()}
    found["optimal_policy"] = jaxsim.optimal_policy(instance)
    found["objective"] = jaxsim.objective(policy, instance)
    found["tpm"] = jaxsim.tpm(policy, instance)
    found["kl_divergence"] = _kl_divergence(policy, other)
    found["take_back_logits"] = _take_back_logits(policy, other, a, b)
    return jax.device_get(found)


def ratios(item: Expected, found: dict[str, np.ndarray], dtype: np.dtype[Any]) -> dict[str, float]:
    """Return the error of every output in units of u (kappa + |x|), at its worst place."""
    info = np.finfo(dtype)
    unit, tiny = float(info.eps) / 2, float(info.tiny)
    errors = {}
    for name, field in (SCALARS | OF_POLICY).items():
        x = item.scalars[field]
        errors[name] = reference.error_ratio(found[name], x.value, x.kappa, unit, x.floor)
    for name, field in (PER_OUTPUT | {"take_back_logits": "take_back_logits"}).items():
        errors[name] = item.lists[field].error_ratio(found[name], unit, tiny)
    return errors


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything measured in one mode."""

    names: tuple[str, ...]  # of the instances, each with its policies
    ratios: dict[str, np.ndarray]
    ranges: np.ndarray  # regime of R of every instance
    sizes: np.ndarray  # and of n
    contradictions: list[str]
    wrong_dtype: list[str]
    decided: int
    codes: int

    def broken(self, output: str) -> str:
        """List what breaks the promise, the worst first; empty if nothing does."""
        errors = self.ratios[output]
        order = [i for i in np.argsort(-errors) if not errors[i] <= PROMISE]
        if not order:
            return ""
        lines = [f"{errors[i]:10.4g}  {self.names[i]}" for i in order[:20]]
        return f"{output}: {len(order)} exceed {PROMISE:g} u (kappa + |x|):\n" + "\n".join(lines)


VERDICTS = (
    ("hypothesis_aligned", "covariance_aligned", 1),
    ("hypothesis_unaligned", "covariance_unaligned", -1),
    ("conclusion", "log_odds_shift", 1),
)


@cache
def report(mode: str, seed: int, size: int) -> Report:
    """Run the code under test over the set."""
    dtype = _dtype(mode)
    items = expected(dtype, seed, size)
    errors: dict[str, list[float]] = {name: [] for name in OUTPUTS}
    contradictions, wrong_dtype, decided, codes = [], [], 0, 0
    with precision(mode):
        for item in items:
            n = shape_for(item.case)
            policy, other = _padded(item.policy, n), _padded(item.other, n)
            found = results(as_instance(item.case, n), policy, other, *item.take_back)
            for name, ratio in ratios(item, found, dtype).items():
                errors[name].append(ratio)
                if found[name].dtype != dtype:
                    wrong_dtype.append(f"{name} {found[name].dtype} {item.name}")
            for code_name, field, sense in VERDICTS:
                raw = found[f"theorem2.{code_name}"]
                code, sign = jaxsim.Outcome(int(raw)), item.signs[field]
                codes += 1
                if raw.dtype != np.int8:
                    wrong_dtype.append(f"{code_name} {raw.dtype} {item.name}")
                if code is jaxsim.Outcome.UNDECIDED:
                    continue
                decided += 1
                claimed = {"HOLDS": 1, "FAILS": -1, "TIE": 0}[code.name]
                if sign is not None and claimed != sense * sign:
                    contradictions.append(
                        f"{code_name}={code.name}, exact sign {sign}: {item.name}"
                    )
    return Report(
        names=tuple(item.name for item in items),
        ratios={name: np.array(values) for name, values in errors.items()},
        ranges=np.digitize([item.range_over_beta for item in items], RANGES),
        sizes=np.digitize([item.case.size for item in items], SIZES),
        contradictions=contradictions,
        wrong_dtype=wrong_dtype,
        decided=decided,
        codes=codes,
    )


@pytest.fixture(params=MODES, scope="module")
def measured(request: pytest.FixtureRequest) -> Report:
    wide = request.config.getoption("--slow", default=False)
    return report(request.param, *(WIDE if wide else QUICK))


@pytest.mark.parametrize("output", OUTPUTS)
def test_error_is_within_the_promise(measured: Report, output: str) -> None:
    assert not measured.broken(output), measured.broken(output)


def test_every_regime_is_tried(measured: Report) -> None:
    cells = np.zeros((len(RANGES) + 1, len(SIZES) + 1), int)
    np.add.at(cells, (measured.ranges, measured.sizes), 1)
    assert cells.min() >= 5, cells


def test_verdicts_never_contradict_the_exact_sign(measured: Report) -> None:
    assert not measured.contradictions, "\n".join(measured.contradictions)


def test_most_verdicts_are_decided(measured: Report) -> None:
    """An error bound that left everything undecided would be right and useless."""
    assert measured.decided >= 0.7 * measured.codes


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
                values = [f(instance) for f in FUNCTIONS]
            found.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(values)])
        assert found[0] == found[1], item.case.name


@pytest.mark.parametrize("mode", MODES)
def test_batches_keep_the_promise(mode: str, request: pytest.FixtureRequest) -> None:
    """Rows of one padded batch, whose bits may differ from those of single instances."""
    dtype, size = _dtype(mode), 129
    wide = request.config.getoption("--slow", default=False)
    chosen = [x for x in expected(dtype, *(WIDE if wide else QUICK)) if x.case.size <= size]
    rows = [adversarial.padded(x.case, size).arrays for x in chosen]
    policy, other = (
        np.stack([_padded(p, size) for p in ps])
        for ps in ([x.policy for x in chosen], [x.other for x in chosen])
    )
    a, b = np.array([x.take_back for x in chosen]).T[..., None]
    with precision(mode):
        batch = jaxsim.Instance(**{k: jnp.stack([row[k] for row in rows]) for k in rows[0]})
        found = results(batch, policy, other, a, b)
    broken = [
        f"{name}: {ratio:.4g} at {item.name}"
        for i, item in enumerate(chosen)
        for name, ratio in ratios(item, {k: v[i] for k, v in found.items()}, dtype).items()
        if not ratio <= PROMISE
    ]
    assert not broken, "\n".join(broken[:20])


def test_the_table_has_its_place() -> None:
    from tests import accuracy_table

    text = accuracy_table.PAGE.read_text(encoding="utf-8")
    assert text.count(accuracy_table.BEGIN) == text.count(accuracy_table.END) == 1
    assert text.index(accuracy_table.BEGIN) < text.index(accuracy_table.END)


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
