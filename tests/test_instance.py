"""The constructors of an instance: what they compute, which dtype, and what they refuse."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsim import Instance, evaluate
from jaxsim.instance import validate

A = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
U = np.array([[0.25, 0.25, 0.5], [0.6, 0.1, 0.3]])
R = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
REF = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
SPLIT = np.array([[0.9, 0.5, 0.0], [1.0, 0.25, 0.5]])


def log(p: Any) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(p, np.float64))


def put(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    changed = np.array(array)
    changed[index] = value
    return changed


def probs(*args: Any, **changed: Any) -> Instance:
    given = {"p_aligned": A, "p_unaligned": U, "reward": R, "alpha": 0.5, "beta": 1.0}
    return Instance.from_probs(*args, **(given | changed))


def log_probs(**changed: Any) -> Instance:
    given = {"log_p_aligned": log(A), "log_p_unaligned": log(U), "reward": R, "beta": 1.0}
    return Instance.from_log_probs(**(given | {"alpha": 0.5} | changed))


def reference(**changed: Any) -> Instance:
    given = {"log_p_ref": log(REF), "aligned_given_output": SPLIT, "reward": R, "beta": 1.0}
    return Instance.from_reference(**(given | changed))


def assert_same(left: Instance, right: Instance, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.fixture(params=[False, True], ids=["32-bit mode", "64-bit mode"])
def x64(request: pytest.FixtureRequest) -> Any:
    with jax.enable_x64(request.param):
        yield request.param


def test_constructors_agree_with_each_other_and_with_numpy(x64: bool) -> None:
    tolerance = {"rtol": 1e-14, "atol": 1e-14} if x64 else {"rtol": 3e-7, "atol": 3e-7}
    one, other = probs(alpha=0.3, beta=2.0), log_probs(alpha=0.3, beta=2.0)
    assert_same(one, other, **tolerance)
    np.testing.assert_allclose(one.log_p_aligned, log(A), **tolerance)
    np.testing.assert_allclose(one.log_p_unaligned, log(U), **tolerance)
    np.testing.assert_allclose(one.logit_alpha, np.full(2, np.log(0.3 / 0.7)), **tolerance)
    mixture = 0.3 * A + 0.7 * U
    split = reference(log_p_ref=log(mixture), aligned_given_output=0.3 * A / mixture, beta=2.0)
    assert_same(one, split, **tolerance)


def test_reference_is_split_without_loss(x64: bool) -> None:
    instance = reference()
    tolerance = {"rtol": 1e-14} if x64 else {"rtol": 1e-6}
    p_a, p_u, logit = (
        np.asarray(x, np.float64)
        for x in (
            np.exp(instance.log_p_aligned),
            np.exp(instance.log_p_unaligned),
            instance.logit_alpha,
        )
    )
    alpha = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(alpha, (REF * SPLIT).sum(1), **tolerance)
    mixture = alpha[:, None] * p_a + (1 - alpha)[:, None] * p_u
    np.testing.assert_allclose(mixture, REF, **tolerance)
    np.testing.assert_allclose(alpha[:, None] * p_a / mixture, SPLIT, **tolerance)
    assert p_a[0, 2] == 0.0  # where a = 0
    assert p_u[1, 0] == 0.0  # where a = 1


def test_small_deviations_are_renormalised(x64: bool) -> None:
    dtype = np.float64 if x64 else np.float32
    off = np.asarray([0.5, 0.25, 0.25], dtype) * dtype(1 + 8e-7)
    for instance in (probs(p_aligned=off), log_probs(log_p_aligned=np.log(off))):
        total = np.exp(np.asarray(instance.log_p_aligned, np.float64)).sum(1)
        np.testing.assert_allclose(total, 1, rtol=0, atol=1e-15 if x64 else 1e-7)


def test_scalars_and_shared_rows_are_broadcast() -> None:
    instance = probs(p_aligned=A[1], reward=R[0], alpha=[0.1, 0.9], beta=3.0)
    assert instance.log_p_aligned.shape == instance.reward.shape == (2, 3)
    np.testing.assert_array_equal(instance.reward, [R[0], R[0]])
    np.testing.assert_array_equal(instance.log_p_aligned[0], instance.log_p_aligned[1])
    np.testing.assert_allclose(instance.alpha, [0.1, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(instance.beta, [3.0, 3.0])
    single = Instance.from_probs(A[0], U[0], R[0], 0.5, 1.0)
    assert single.beta.shape == single.logit_alpha.shape == ()


def test_logit_alpha_replaces_alpha() -> None:
    far = probs(alpha=None, logit_alpha=[-40.0, 40.0])
    np.testing.assert_array_equal(far.logit_alpha, [-40.0, 40.0])
    assert np.isfinite(jax.tree.leaves(evaluate(far))).all()
    near = probs(alpha=None, logit_alpha=np.log(0.3 / 0.7))
    assert_same(near, probs(alpha=0.3), rtol=1e-7)


def test_alpha_near_its_ends_keeps_its_log_odds() -> None:
    # 1 - 1e-9 rounds to 1 in float32; the log-odds are formed in float64.
    instance = probs(alpha=[1e-60, 1 - 1e-9])
    np.testing.assert_allclose(instance.logit_alpha, [np.log(1e-60), np.log(1e9)], rtol=1e-6)


def test_float32_gives_the_same_bits_in_either_mode() -> None:
    given = [x.astype(np.float32) for x in (A, U, R)]
    results = []
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            instance = Instance.from_probs(*given, 0.3, 2.0)
            results.append([np.asarray(x) for x in jax.tree.leaves(instance)])
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype == np.float32
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("reward", "wide"),
    [
        (R, True),
        (R.tolist(), True),
        (R.astype(int), True),
        (R.astype(int).tolist(), True),
        (R > 2, True),
        (jnp.asarray(R, jnp.float32), False),
        (R.astype(np.float16), False),
        (jnp.asarray(R, jnp.bfloat16), False),
    ],
    ids=["float64", "list", "int", "int list", "bool", "float32 jax", "float16", "bfloat16"],
)
def test_dtype_is_that_of_the_arrays(x64: bool, reward: Any, wide: bool) -> None:
    aligned, unaligned = A.astype(np.float32), U.astype(np.float32)
    instance = probs(p_aligned=aligned, p_unaligned=unaligned, reward=reward)
    expected = np.float64 if x64 and wide else np.float32
    assert {x.dtype for x in jax.tree.leaves(instance)} == {np.dtype(expected)}


def test_lists_of_integers_will_do() -> None:
    instance = Instance.from_probs([0, 1, 0], [1, 0, 0], [0, 3, 4], 0.5, 1)
    np.testing.assert_array_equal(instance.log_p_aligned, [-np.inf, 0.0, -np.inf])
    np.testing.assert_array_equal(instance.reward, [0.0, 3.0, 4.0])


@pytest.mark.parametrize("build", ["from_probs", "from_log_probs", "from_reference"])
def test_constructors_under_jit_and_vmap(build: str) -> None:
    first, second = {
        "from_probs": (A, U),
        "from_log_probs": (log(A), log(U)),
        "from_reference": (log(REF), SPLIT),
    }[build]
    arrays = [jnp.asarray(x, jnp.float32) for x in (first, second, R)]
    alpha = jnp.asarray([0.3, 0.6], jnp.float32)
    beta = jnp.asarray([1.0, 2.0], jnp.float32)

    def construct(x: Any, y: Any, r: Any, alpha: Any, beta: Any) -> Instance:
        constructor = getattr(Instance, build)
        if build == "from_reference":
            return constructor(x, y, r, beta=beta)
        return constructor(x, y, r, alpha=alpha, beta=beta)

    eager = construct(*arrays, alpha, beta)
    assert_same(eager, jax.jit(construct)(*arrays, alpha, beta), rtol=1e-6, atol=1e-6)
    assert_same(eager, jax.vmap(construct)(*arrays, alpha, beta), rtol=1e-6, atol=1e-6)


def assert_finite(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


def test_gradients_are_finite_at_zero_mass() -> None:
    def shift(p_a: Any, p_u: Any, r: Any, alpha: Any, beta: Any) -> Any:
        return evaluate(Instance.from_probs(p_a, p_u, r, alpha, beta)).log_odds_shift

    p_a, p_u = jnp.asarray([0.0, 1.0, 0.0]), jnp.asarray([0.5, 0.0, 0.5])
    r = jnp.asarray([0.0, 3.0, 4.0])
    gradient = jax.grad(shift, argnums=(0, 1, 2, 3, 4))(p_a, p_u, r, 0.5, 1.0)
    assert_finite(gradient)
    np.testing.assert_allclose(gradient[2][1], 1.0, rtol=1e-6)  # E_A[e^r] is e^{r_2} alone

    def log_shift(log_p: Any) -> Any:
        half = jnp.log(jnp.asarray([0.5, 0.5, 0.0]))
        return evaluate(Instance.from_log_probs(log_p, half, r, 0.5, 1.0)).log_odds_shift

    assert_finite(jax.grad(log_shift)(jnp.asarray([-jnp.inf, 0.0, -jnp.inf])))


def test_gradients_are_finite_where_the_classifier_is_certain() -> None:
    def tpm(a: Any, log_p: Any) -> Any:
        instance = Instance.from_reference(log_p, a, jnp.asarray([0.0, 1.0, 2.0, 9.0]), 1.0)
        return evaluate(instance).log_tpm_aligned

    log_p = jnp.asarray([*np.log([0.25, 0.5, 0.25]), -np.inf], jnp.float32)
    assert_finite(jax.grad(tpm, argnums=(0, 1))(jnp.asarray([0.0, 0.5, 1.0, 0.5]), log_p))


def test_instance_is_a_frozen_pytree() -> None:
    instance = probs()
    with pytest.raises(dataclasses.FrozenInstanceError):
        instance.beta = jnp.ones(2)  # type: ignore[misc]
    leaves, structure = jax.tree.flatten(instance)
    assert len(leaves) == len(dataclasses.fields(Instance)) == 5
    assert_same(jax.tree.unflatten(structure, leaves), instance)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(instance)]
    assert paths == [f".{f.name}" for f in dataclasses.fields(Instance)]
    assert jax.tree.map(lambda x: x[0], instance).reward.shape == (3,)


UNIT = "the probabilities of an instance sum to 1 within 1e-06"
BAD: list[tuple[str, Callable[..., Instance], dict[str, Any], str]] = [
    ("nan", probs, {"p_aligned": put(A, (1, 2), np.nan)}, "p_aligned[1, 2] is nan"),
    ("inf", probs, {"p_unaligned": put(U, (0, 1), np.inf)}, "p_unaligned[0, 1] is inf"),
    ("negative", probs, {"p_aligned": put(A, (1, 2), -0.1)}, "p_aligned[1, 2] is -0.1;"),
    (
        "negative float32",
        probs,
        {"p_aligned": put(A, (1, 2), -0.1).astype(np.float32)},
        "p_aligned[1, 2] is -0.1;",
    ),
    ("sum", probs, {"p_aligned": put(A, (1, 2), 0.75)}, "the sum of p_aligned[1] is 1.25; " + UNIT),
    ("above 1", probs, {"p_aligned": put(A, (1, 2), 1.5)}, "the sum of p_aligned[1] is 2.0; "),
    ("empty", probs, {"p_unaligned": put(U, (1,), 0.0)}, "the sum of p_unaligned[1] is 0.0; "),
    ("log nan", log_probs, {"log_p_aligned": put(log(U), (0, 2), np.nan)}, "log_p_aligned[0, 2]"),
    ("log inf", log_probs, {"log_p_aligned": put(log(U), (0, 2), np.inf)}, "is inf; "),
    (
        "log sum",
        log_probs,
        {"log_p_unaligned": [0.0, 0.0, 0.0]},
        "the sum of exp(log_p_unaligned[0]) is 3.0; " + UNIT,
    ),
    ("log huge", log_probs, {"log_p_aligned": [800.0, 0, 0]}, "exp(log_p_aligned[0]) is inf"),
    (
        "log empty",
        log_probs,
        {"log_p_aligned": [-np.inf] * 3},
        "the sum of exp(log_p_aligned[0]) is 0.0",
    ),
    ("reward nan", probs, {"reward": put(R, (1, 2), np.nan)}, "reward[1, 2] is nan; rewards are"),
    ("reward inf", probs, {"reward": put(R, (1, 0), np.inf)}, "reward[1, 0] is inf"),
    ("reward -inf", probs, {"reward": put(R, (0, 0), -np.inf)}, "reward[0, 0] is -inf"),
    (
        "reward nan outside the support",
        probs,
        {"p_unaligned": [0.5, 0.5, 0.0], "p_aligned": A[0], "reward": [0.0, 1.0, np.nan]},
        "reward[2] is nan",
    ),
    (
        "reward too large",
        probs,
        {"reward": put(R, (1, 2), 1e300)},
        "reward[1, 2] is 1e+300; out of",
    ),
    ("reward/beta", probs, {"reward": put(R, (1, 2), 1e31)}, "reward[1, 2] is 1e+31; |reward| / b"),
    ("beta too small for r", probs, {"beta": [1.0, 1e-31]}, "reward[1, 0] is 4.0; |reward| / beta"),
    ("alpha 0", probs, {"alpha": 0.0}, "alpha is 0.0; alpha lies strictly between 0 and 1"),
    ("alpha 1", probs, {"alpha": [0.5, 1.0]}, "alpha[1] is 1.0; alpha lies strictly"),
    ("alpha nan", probs, {"alpha": np.nan}, "alpha is nan; "),
    ("alpha rounds to 1", probs, {"alpha": np.float32(1 - 1e-9)}, "give logit_alpha= instead"),
    ("alpha text", probs, {"alpha": "half"}, "alpha has dtype <U4; expected real numbers"),
    (
        "alpha shape",
        probs,
        {"alpha": [0.1, 0.2, 0.3]},
        "alpha has shape (3,); expected a scalar or",
    ),
    ("no alpha", probs, {"alpha": None}, "alpha is missing; expected alpha or logit_alpha"),
    ("both alphas", probs, {"logit_alpha": 0.0}, "alpha and logit_alpha are both given"),
    ("logit inf", probs, {"alpha": None, "logit_alpha": [0, np.inf]}, "logit_alpha[1] is inf; "),
    ("logit nan", probs, {"alpha": None, "logit_alpha": np.nan}, "logit_alpha is nan; "),
    ("logit huge", probs, {"alpha": None, "logit_alpha": 1e60}, "logit_alpha is 1e+60; out of the"),
    ("logit text", probs, {"alpha": None, "logit_alpha": "0"}, "logit_alpha has dtype <U1"),
    ("logit shape", probs, {"alpha": None, "logit_alpha": [0.0] * 3}, "logit_alpha has shape (3,)"),
    ("beta 0", probs, {"beta": 0.0}, "beta is 0.0; beta is finite and > 0"),
    ("beta < 0", probs, {"beta": [1.0, -2.0]}, "beta[1] is -2.0; "),
    ("beta nan", probs, {"beta": np.nan}, "beta is nan; "),
    ("beta inf", probs, {"beta": np.inf}, "beta is inf; "),
    ("beta rounds to 0", probs, {"beta": 1e-60}, "beta is 1e-60; out of the range of float32"),
    ("beta too large", probs, {"beta": 1e60}, "beta is 1e+60; out of the range of float32"),
    ("beta text", probs, {"beta": "1"}, "beta has dtype <U1; expected real numbers"),
    ("beta complex", probs, {"beta": 1j}, "beta has dtype complex128; expected real numbers"),
    (
        "beta shape",
        probs,
        {"beta": [[1.0, 2.0]]},
        "beta has shape (1, 2); expected a scalar or [2]",
    ),
    ("no beta", probs, {"beta": None}, "beta is missing"),
    ("rank 0", probs, {"p_aligned": 1.0}, "p_aligned has shape (); expected [outputs] or"),
    ("rank 3", probs, {"reward": R[None]}, "reward has shape (1, 2, 3); expected [outputs] or"),
    ("widths", probs, {"reward": R[:, :2]}, "p_unaligned (2, 3), reward (2, 2); expected one numb"),
    ("width 1", probs, {"reward": [1.0]}, "p_unaligned (2, 3), reward (1,); expected one number"),
    ("heights", probs, {"reward": np.ones((4, 3))}, "shapes do not agree: p_aligned (2, 3)"),
    ("ragged", probs, {"reward": [[1.0, 2.0, 3.0], [1.0]]}, "reward is not a rectangular array"),
    ("text", probs, {"reward": [["a", "b", "c"]]}, "reward has dtype <U1; expected real numbers"),
    ("complex", probs, {"reward": R + 1j}, "reward has dtype complex128; expected real numbers"),
    (
        "objects",
        probs,
        {"p_aligned": A.astype(object)},
        "p_aligned has dtype object; expected real",
    ),
    ("None", probs, {"p_aligned": None}, "p_aligned has dtype object; expected real numbers"),
    (
        "no outputs",
        probs,
        dict.fromkeys(("p_aligned", "p_unaligned", "reward"), np.ones(0)),
        "p_aligned has shape (0,): there is no output in it",
    ),
    (
        "no instances",
        probs,
        dict.fromkeys(("p_aligned", "p_unaligned", "reward"), np.ones((0, 3))),
        "p_aligned has shape (0, 3)",
    ),
    ("a > 1", reference, {"aligned_given_output": [0.5, 0.5, 1.25]}, "output[0, 2] is 1.25; P(al"),
    ("a < 0", reference, {"aligned_given_output": [0.5, -0.5, 1]}, "output[0, 1] is -0.5; "),
    ("a nan", reference, {"aligned_given_output": [np.nan] * 3}, "given_output[0, 0] is nan; "),
    (
        "a = 0 throughout",
        reference,
        {"aligned_given_output": put(SPLIT, (1,), 0.0)},
        "the mean of aligned_given_output[1] is 0.0; neither component may be empty",
    ),
    (
        "a = 1 throughout",
        reference,
        {"aligned_given_output": put(SPLIT, (1,), 1.0)},
        "the mean of aligned_given_output[1] is 1.0; neither component may be empty",
    ),
    ("ref nan", reference, {"log_p_ref": put(log(REF), (1, 0), np.nan)}, "log_p_ref[1, 0] is nan"),
    (
        "ref sum",
        reference,
        {"log_p_ref": [0.0] * 3},
        "the sum of exp(log_p_ref[0]) is 3.0; " + UNIT,
    ),
    ("ref beta", reference, {"beta": [1.0, 0.0]}, "beta[1] is 0.0; "),
]


@pytest.mark.parametrize(
    ("build", "changed", "said"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_named(build: Callable[..., Instance], changed: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(**changed)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message


def test_concrete_values_are_checked_under_jit_too() -> None:
    with pytest.raises(ValueError, match=r"beta is 0\.0"):
        jax.jit(lambda r: probs(reward=r, beta=0.0).reward)(R)
    with pytest.raises(ValueError, match="shapes do not agree"):
        jax.jit(lambda r: probs(reward=r).reward)(R[:, :2])


@pytest.mark.parametrize(
    ("field", "index", "value", "said"),
    [
        ("log_p_aligned", (1, 2), np.nan, "log_p_aligned[1, 2] is nan"),
        ("log_p_unaligned", (1, 2), 0.0, "the sum of exp(log_p_unaligned[1]) is "),
        ("reward", (0, 1), np.inf, "reward[0, 1] is inf"),
        ("logit_alpha", (1,), np.inf, "logit_alpha[1] is inf"),
        ("beta", (0,), 0.0, "beta[0] is 0.0"),
        ("beta", (0,), 1e-35, "reward[0, 0] is 1.0; |reward| / beta"),
    ],
)
def test_validate_checks_what_no_constructor_has_seen(
    field: str, index: tuple[int, ...], value: float, said: str
) -> None:
    instance = probs()
    validate(instance)
    broken = dataclasses.replace(instance, **{field: getattr(instance, field).at[index].set(value)})
    with pytest.raises(ValueError) as caught:
        validate(broken)
    assert said in str(caught.value)
