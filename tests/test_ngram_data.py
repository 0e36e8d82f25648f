"""The shipped data set jaxsim/data/ngram.npz keeps what its data card promises."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "jaxsim" / "data" / "ngram.npz"
NUMBERS = ("log_p_ref", "aligned_given_output", "reward", "reward_toxicity")


@pytest.fixture(scope="module")
def data() -> Mapping[str, np.ndarray]:
    with np.load(FILE, allow_pickle=False) as file:  # fails on any object array
        return {name: file[name] for name in file.files}


def test_size_and_reproducible_dates() -> None:
    assert FILE.stat().st_size < 2_000_000
    with zipfile.ZipFile(FILE) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_names_shapes_and_types(data: Mapping[str, np.ndarray]) -> None:
    assert set(data) == {"prompt", "output", *NUMBERS}
    prompts, outputs = data["output"].shape
    assert prompts >= 100 and outputs >= 500
    assert data["prompt"].shape == (prompts,)
    assert data["prompt"].dtype.kind == data["output"].dtype.kind == "U"
    for name in NUMBERS:
        assert data[name].shape == (prompts, outputs)
        assert data[name].dtype == np.float32
        assert np.isfinite(data[name]).all()  # no padding: every prompt has as many outputs


def test_prompts_and_completions_are_distinct(data: Mapping[str, np.ndarray]) -> None:
    assert len(set(data["prompt"].tolist())) == len(data["prompt"])
    # The trigram model sees the last two words: they are what must differ.
    assert len({tuple(p.split()[-2:]) for p in data["prompt"].tolist()}) == len(data["prompt"])
    for row in data["output"].tolist():
        assert len(set(row)) == len(row)
        assert all(1 <= len(text.split()) <= 3 for text in row)


def test_reference_is_normalised_and_sorted(data: Mapping[str, np.ndarray]) -> None:
    log_p = data["log_p_ref"].astype(np.float64)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1.0, rtol=0, atol=1e-6)
    assert (np.diff(log_p, axis=1) <= 0).all()


def test_probabilities_and_rewards_are_in_range(data: Mapping[str, np.ndarray]) -> None:
    aligned = data["aligned_given_output"]
    assert ((aligned > 0) & (aligned < 1)).all()
    assert (np.abs(data["reward"]) <= 1).all()
    assert (np.ptp(data["reward"], axis=1) > 0).all()


def test_control_reward_is_the_log_odds(data: Mapping[str, np.ndarray]) -> None:
    aligned = data["aligned_given_output"].astype(np.float64)
    control = data["reward_toxicity"]
    np.testing.assert_allclose(control, np.log(aligned) - np.log1p(-aligned), rtol=1e-6, atol=1e-7)
    order = np.argsort(aligned, axis=None, kind="stable")
    assert (np.diff(control.ravel()[order]) >= 0).all()


def test_texts_are_varied(data: Mapping[str, np.ndarray]) -> None:
    share = (data["aligned_given_output"] < 0.5).mean()
    assert 0 < share < 0.5
    assert (data["reward"] > 0.3).any() and (data["reward"] < -0.3).any()
