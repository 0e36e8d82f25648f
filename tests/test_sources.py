"""Reading instances from files: all forms, padding, and what a malformed file is told."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxsim import Instance, evaluate
from jaxsim.sources import ArraySource, one, read, sample

RNG = np.random.default_rng(7)
A, U = RNG.dirichlet(np.ones(4), size=(2, 3))
R, OTHER = RNG.normal(size=(2, 3, 4))
ALPHA, BETA = np.array([0.2, 0.5, 0.9]), np.array([0.5, 1.0, 2.0])
SPLIT = RNG.uniform(size=(3, 4))
NAMED = {
    "prompt": np.array(["why", "how", "who"]),
    "output": np.array([[f"{p}{i}" for i in range(4)] for p in "abc"]),
}
FORMS: dict[str, dict[str, np.ndarray]] = {
    "probs": {"p_aligned": A, "p_unaligned": U, "alpha": ALPHA},
    "log probs": {
        "log_p_aligned": np.log(A),
        "log_p_unaligned": np.log(U),
        "logit_alpha": np.log(ALPHA) - np.log1p(-ALPHA),
    },
    "reference": {"log_p_ref": np.log(A), "aligned_given_output": SPLIT},
}
GOOD = FORMS["probs"] | {"reward": R}


def npz(path: Path, arrays: dict[str, Any]) -> str:
    np.savez(path / "x.npz", **arrays)
    return str(path / "x.npz")


def parquet(path: Path, arrays: dict[str, Any]) -> str:
    columns = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
    pq.write_table(pa.table(columns), path / "x.parquet")
    return str(path / "x.parquet")


def single(source: ArraySource, index: int) -> Instance:
    return jax.tree.map(lambda x: x[index], source.instance)


def assert_equal(left: Any, right: Any, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("write", [npz, parquet])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_its_constructor_builds(
    tmp_path: Path, form: str, write: Callable[[Path, dict[str, Any]], str]
) -> None:
    path = write(tmp_path, FORMS[form] | NAMED | {"reward": R, "beta": BETA})
    source = read(path)
    constructor = {
        "probs": Instance.from_probs,
        "log probs": Instance.from_log_probs,
        "reference": Instance.from_reference,
    }[form]
    expected = constructor(**FORMS[form], reward=R, beta=BETA)
    assert_equal(source.instance, expected, rtol=2e-6, atol=1e-6)
    assert (source.num, source.outputs, source.has_beta) == (3, 4, True)
    assert source.names(1) == ("how", ["b0", "b1", "b2", "b3"])
    assert {x.dtype for x in jax.tree.leaves(source.instance)} == {np.dtype(np.float32)}


def test_float64_is_kept_in_64_bit_mode(tmp_path: Path) -> None:
    path = npz(tmp_path, GOOD)
    with jax.enable_x64(True):
        wide, narrow = read(path, dtype="float64"), read(path)
        assert wide.instance.reward.dtype == np.float64
        np.testing.assert_array_equal(wide.instance.reward, R)
        assert narrow.instance.reward.dtype == np.float32
        narrow_leaves = [np.asarray(x) for x in jax.tree.leaves(narrow.instance)]
    for here, there in zip(narrow_leaves, jax.tree.leaves(read(path).instance), strict=True):
        np.testing.assert_array_equal(here, there)


def test_one_instance_and_scalars_for_all(tmp_path: Path) -> None:
    texts = {"prompt": np.array("why"), "output": np.array(list("abcd"))}
    row = {"p_aligned": A[0], "p_unaligned": U[0], "reward": R[0], "alpha": np.array(0.25)}
    source = read(npz(tmp_path, row | texts | {"beta": np.array(3.0)}))
    assert (source.num, source.outputs) == (1, 4)
    assert source.names(0) == ("why", list("abcd"))
    np.testing.assert_array_equal(source.instance.beta, [3.0])
    np.testing.assert_allclose(source.instance.alpha, [0.25], rtol=1e-6)


def test_without_names_and_beta(tmp_path: Path) -> None:
    source = read(npz(tmp_path, GOOD))
    assert source.names(2) == ("instance 2", None)
    assert not source.has_beta
    np.testing.assert_array_equal(source.instance.beta, 1.0)


def test_the_reward_is_chosen_by_name(tmp_path: Path) -> None:
    path = npz(tmp_path, GOOD | {"reward_other": OTHER})
    np.testing.assert_allclose(read(path).instance.reward, R, rtol=1e-6)
    other = read(path, reward="reward_other").instance.reward
    np.testing.assert_allclose(other, OTHER, rtol=1e-6)
    bad = npz(tmp_path, GOOD | {"reward_other": cell(np.nan)})
    read(bad)  # what is not asked for is not looked at
    with pytest.raises(ValueError, match=r"reward_other\[1, 2\] is nan; rewards are finite"):
        read(bad, reward="reward_other")


def test_columns_that_are_not_asked_for_may_hold_anything(tmp_path: Path) -> None:
    read(parquet(tmp_path, GOOD | {"note": [None, "x", None], "deep": [[[1], []], [], None]}))
    read(npz(tmp_path, GOOD | {"note": np.array([None, {}, 1], object)}))


def ragged() -> dict[str, Any]:
    widths, rng = (2, 4, 3), np.random.default_rng(3)
    p_a, p_u = ([rng.dirichlet(np.ones(n)).tolist() for n in widths] for _ in range(2))
    return {
        "p_aligned": p_a,
        "p_unaligned": p_u,
        "reward": [rng.normal(size=n).tolist() for n in widths],
        "output": [[f"t{i}" for i in range(n)] for n in widths],
        "alpha": ALPHA.tolist(),
        "beta": BETA.tolist(),
    }


@pytest.mark.parametrize("form", FORMS)
def test_ragged_rows_are_padded_without_changing_results(tmp_path: Path, form: str) -> None:
    rows = ragged()
    if form == "log probs":
        for name in ("p_aligned", "p_unaligned"):
            rows["log_" + name] = [np.log(p).tolist() for p in rows.pop(name)]
    if form == "reference":
        rows["log_p_ref"] = [np.log(p).tolist() for p in rows.pop("p_aligned")]
        rows["aligned_given_output"] = rows.pop("p_unaligned")
        del rows["alpha"]
    source = read(parquet(tmp_path, rows))
    assert source.outputs == 4
    assert source.texts is not None
    assert source.texts[0] == ["t0", "t1", "", ""]
    padded = evaluate(source.instance)
    for at, reward in enumerate(rows["reward"]):
        alone = {
            name: [row[at]] if isinstance(row[at], list) else row[at : at + 1]
            for name, row in rows.items()
        }
        shorter = read(parquet(tmp_path, alone))
        assert shorter.outputs == len(reward)
        result = jax.tree.map(lambda x: x[0], evaluate(shorter.instance))
        assert_equal(jax.tree.map(lambda x, i=at: x[i], padded), result, rtol=1e-5, atol=1e-6)


def test_tiles_hold_the_instances_in_order(tmp_path: Path) -> None:
    path = npz(tmp_path, GOOD | {"beta": BETA})
    source = read(path)
    tile = source.tile(0)
    assert tile.reward.shape == (4, source.size) and source.size >= 3
    np.testing.assert_array_equal(np.moveaxis(tile.reward, -1, 0)[:3], source.instance.reward)
    for index in range(3):
        assert_equal(one(source, index, None), single(source, index))
    assert one(source, 1, 0.25).beta == 0.25
    batch = sample(source, 10, (2.0, 4.0))
    np.testing.assert_array_equal(batch.beta, [2.0, 4.0, 2.0])
    assert_equal(sample(source, 10, ()), source.instance)


def test_ngram_is_built_in() -> None:
    source = read("ngram", reward="reward_toxicity")
    assert source.num >= 100 and source.texts is not None
    assert not source.has_beta


def wrong(**changed: Any) -> dict[str, Any]:
    return {name: array for name, array in (GOOD | changed).items() if array is not None}


def cell(value: float) -> np.ndarray:
    array = R.copy()
    array[1, 2] = value
    return array


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("objects", wrong(reward=R.astype(object)), "reward cannot be read: it holds Python objects"),
    ("text", wrong(reward=np.full((3, 4), "a")), "reward has dtype <U1; expected numbers"),
    ("complex", wrong(reward=R + 1j), "reward has dtype complex128; expected numbers"),
    ("dates", wrong(reward=R.astype("datetime64[s]")), "reward has dtype datetime64[s]; expected"),
    ("alpha text", wrong(alpha=np.array(list("abc"))), "alpha has dtype <U1; expected numbers"),
    ("no reward", wrong(reward=None, reward_b=R), "there is no array 'reward' to take as the rewa"),
    ("one component", wrong(p_unaligned=None), "found alpha, p_aligned, reward"),
    ("no arrays", {}, "expected the arrays log_p_ref and aligned_given_output; or "),
    ("no alpha", wrong(alpha=None), "alpha is missing; expected alpha or logit_alpha"),
    ("two alphas", wrong(logit_alpha=np.zeros(3)), "alpha and logit_alpha are both given"),
    (
        "alpha of a reference",
        FORMS["reference"] | {"reward": R, "alpha": ALPHA},
        "alpha is settled by log_p_ref and aligned_given_output; leave it out",
    ),
    ("widths", wrong(reward=R[:, :3]), "p_unaligned (3, 4), reward (3, 3); expected one number"),
    ("heights", wrong(p_aligned=A[:2]), "shapes do not agree: p_aligned (2, 4)"),
    ("rank 3", wrong(p_aligned=A[None]), "p_aligned has shape (1, 3, 4); expected"),
    ("rank 0", wrong(reward=np.array(1.0)), "reward has shape (); expected"),
    ("alpha shape", wrong(alpha=ALPHA[:2]), "alpha has shape (2,); expected a scalar or [3]"),
    ("beta shape", wrong(beta=BETA[:2]), "beta has shape (2,); expected a scalar or [3]"),
    ("beta 0", wrong(beta=np.array([1, 1, 0])), "beta[2] is 0.0; beta is finite and > 0"),
    ("alpha 0", wrong(alpha=np.array([0.5, 0, 1])), "alpha[1] is 0.0; alpha lies strictly"),
    ("no outputs", {n: np.ones((3, 0)) for n in GOOD}, "p_aligned has shape (3, 0): there is no"),
    ("unnormalised", wrong(p_aligned=2 * A), "the sum of p_aligned[0] is 2.0"),
    ("negative", wrong(p_unaligned=-U), "p_unaligned[0, 0] is -"),
    ("nan", wrong(reward=cell(np.nan)), "reward[1, 2] is nan; rewards are finite"),
    ("too large", wrong(reward=cell(1e300)), "reward[1, 2] is 1e+300; too large for float32"),
    ("too large for beta", wrong(reward=cell(1e32)), "reward[1, 2] is 1e+32; |reward| / beta sta"),
    ("prompts", wrong(prompt=np.array(["a"])), "prompt has shape (1,); expected (3,)"),
    ("outputs", wrong(output=np.array(list("abcd"))), "output has shape (4,); expected (3, 4)"),
]


@pytest.mark.parametrize(
    ("arrays", "said"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED]
)
def test_malformed_npz_is_told_what_is_wrong(
    tmp_path: Path, arrays: dict[str, Any], said: str
) -> None:
    path = npz(tmp_path, arrays)
    assert said in refused(path)


def refused(path: str, **options: Any) -> str:
    """Return the sentence that reading `path` is refused with."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


MALFORMED_PARQUET: list[tuple[str, dict[str, Any], str]] = [
    ("null row", {"reward": [[1.0] * 4, None, [1.0] * 4]}, "reward[1] is missing (null)"),
    (
        "null in a row",
        {"reward": [[1.0] * 4, [1.0, 2.0, None, 4.0], [1.0] * 4]},
        "reward[1, 2] is missing (null)",
    ),
    ("null alpha", {"alpha": [0.5, None, 0.5]}, "alpha[1] is missing (null)"),
    ("null text", {"output": [["a", None, "b", "c"]] * 3}, "output[0, 1] is missing (null)"),
    ("text", {"reward": [["a"] * 4] * 3}, "reward has dtype <U1; expected numbers"),
    ("no list", {"reward": [1.0, 2.0, 3.0]}, "reward holds single values; expected a list in"),
    (
        "lengths",  # no padding may make up for a missing reward
        {"reward": [[1.0] * 4, [1.0] * 3, [1.0] * 4]},
        "reward[1] has 3 outputs, but p_aligned[1] has 4",
    ),
    (
        "lengths of texts",
        {"output": [list("abcd"), list("abcd"), list("abcde")]},
        "p_aligned[2] has 4 outputs, but output[2] has 5",
    ),
    ("no rows", {name: [] for name in GOOD}, "there are no rows in it"),
    (
        "empty rows",
        {n: [[]] * 3 for n in ("p_aligned", "p_unaligned", "reward")},
        "no output in it",
    ),
    ("one column", {"p_unaligned": None}, "found alpha, p_aligned, reward"),
]


@pytest.mark.parametrize(
    ("changed", "said"), [m[1:] for m in MALFORMED_PARQUET], ids=[m[0] for m in MALFORMED_PARQUET]
)
def test_malformed_parquet_is_told_what_is_wrong(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    assert said in refused(parquet(tmp_path, wrong(**changed)))


def file_bytes(path: Path, kind: str) -> bytes:
    np.savez_compressed(path / "whole.npz", **GOOD)
    np.save(path / "array.npy", A)
    whole = (path / "whole.npz").read_bytes()
    return {
        "pickle": pickle.dumps(GOOD),
        "array": (path / "array.npy").read_bytes(),
        "cut short": whole[: len(whole) // 2],
        "bad bytes": whole[:150] + bytes(b ^ 255 for b in whole[150:160]) + whole[160:],
        "empty": b"",
        "text": b"hello\n" * 100,
    }[kind]


@pytest.mark.parametrize("kind", ["pickle", "array", "cut short", "empty", "text"])
def test_what_is_no_npz_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(file_bytes(tmp_path, kind))
    assert "not an .npz file" in refused(str(path))


def test_damaged_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(file_bytes(tmp_path, "bad bytes"))
    assert "p_aligned cannot be read: " in refused(str(path))


@pytest.mark.parametrize("kind", ["pickle", "cut short", "empty", "text"])
def test_what_is_no_parquet_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.parquet"
    content = file_bytes(tmp_path, kind)
    if kind == "cut short":
        content = Path(parquet(tmp_path, GOOD)).read_bytes()[:-20]
    path.write_bytes(content)
    assert "cannot be read as Parquet: " in refused(str(path))


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.npz").mkdir()
    (tmp_path / "x.csv").write_text("1,2\n")
    assert "found a directory" in refused(str(tmp_path / "d.npz"))
    assert "no such file (built-in data sets: ngram)" in refused(str(tmp_path / "none.npz"))
    for name in ("x.csv", "none", "."):
        assert "ends in .npz or .parquet" in refused(str(tmp_path / name))


def test_reward_names_that_cannot_be(tmp_path: Path) -> None:
    path = npz(tmp_path, GOOD | {"reward_b": R})
    assert "'rewrd' to take as the reward (there is: reward, reward_b)" in refused(
        path, reward="rewrd"
    )
    for name in ("p_aligned", "alpha", "prompt"):
        assert f"{name} cannot be the reward" in refused(path, reward=name)
