"""Figures: each draws from small and from awkward data, says what it shows, and is reproducible."""

import hashlib
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

import jaxsim.figures as figures
from jaxsim.figures.labels import name, number
from jaxsim.figures.style import ALIGNED, Columns, rendered
from jaxsim.runs.directory import RunDirectory

BETAS = [0.1, 1.0, 10.0]
BETA_LABEL = "KL penalty β (reward per nat)"
QUANTILES = {"q05": 0.1, "q25": 0.3, "q50": 0.5, "q75": 0.7, "q95": 0.9}
AWKWARD = "It's $5_000 & 3% of <b>x^2</b> -- naïve \\alpha{ 漢字 \t\n 😀 " + "very " * 60


def table(rows: int, **columns: Any) -> Columns:
    """Make columns of so many rows; what is no list is repeated."""
    return {k: v if isinstance(v, list) else [v] * rows for k, v in columns.items()}


def tpm(betas: list[float]) -> Columns:
    return table(len(betas), beta=betas, alpha_mean=0.4, tpm_mean=0.52, instances=9.0, **QUANTILES)


def alphas(betas: list[float]) -> Columns:
    at = [0.1, 0.5, 0.9]
    beta = [b for b in betas for _ in at]
    return table(len(beta), beta=beta, alpha=at * len(betas), **QUANTILES)


def shares(outputs: list[float], betas: list[float], share: float = 0.12) -> Columns:
    n = [k for k in outputs for _ in betas]
    return table(
        len(n),
        outputs=n,
        beta=betas * len(outputs),
        hypotheses_hold=0.0 if math.isnan(share) else 100.0,
        violations=12.0,
        share=share,
        low=share * 0.9,
        high=share * 1.1,
    )


def descent(optimizers: list[Any], steps: list[float], worst: float = 1.0) -> Columns:
    which = [o for o in optimizers for _ in steps]
    return table(
        len(which),
        optimizer=which,
        step=steps * len(optimizers),
        q05=0.0,
        q50=1e-6,
        q95=1e-3,
        worst=worst,
    )


def steps(optimizers: list[Any], betas: list[float], taken: float = 40.0) -> Columns:
    which = [o for o in optimizers for _ in betas]
    return table(
        len(which),
        optimizer=which,
        beta=betas * len(optimizers),
        certified=0.0 if math.isnan(taken) else 0.9,
        q05=taken,
        q50=taken,
        q95=10 * taken,
    )


def courses(optimizers: list[Any], last_kl: float) -> Columns:
    """TPM(A) that overshoots."""
    which = [o for o in optimizers for _ in range(4)]
    return table(
        len(which),
        optimizer=which,
        step=[0.0, 1.0, 2.0, 3.0] * len(optimizers),
        tpm_aligned=[0.3, 0.6, 0.45, 0.5] * len(optimizers),
        kl=[1.0, 0.1, 1e-3, last_kl] * len(optimizers),
    )


SOLVED = {"tolerance": 1e-6, "shown_name": "instance 7", "shown_beta": 0.5}


def outputs(count: int, label: str = "yes") -> Columns:
    """Components that put weight on even and on odd outputs."""
    even = [1.0 * (i % 2 == 0) for i in range(count)]
    odd = [1 - e for e in even]
    p, q = [e / sum(even) for e in even], [o / max(sum(odd), 1) for o in odd]
    half = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    index = [float(i) for i in range(count)]
    masses = {"p_aligned": p, "p_unaligned": q, "p_ref": half, "p_star": half}
    return table(count, output=index, name=label, reward=index, **masses)


FACTS = {
    "alpha": 0.5,
    "beta": 1.0,
    "tpm_aligned": 0.419,
    "log_odds_shift": -0.325,
    "covariance_aligned": 0.222,
    "covariance_unaligned": -0.111,
    "name": "",
}


def shifts(count: int, betas: list[float], label: Any = "prompt", scale: float = 1.0) -> Columns:
    """Prompts of which the first meets the hypotheses and falls below 0 at the smallest β."""
    rows = [(p, b) for p in range(count) for b in betas]
    shift = [scale * ((p - 0.5) if b == betas[0] else 0.1) for p, b in rows]
    return table(
        len(rows),
        name=[f"{label} {p}" if isinstance(label, str) else label for p, _ in rows],
        beta=[b for _, b in rows],
        alpha=0.5,
        log_odds_shift=shift,
        tpm_aligned=0.5,
        hypotheses_hold=[1.0 * (p < 2) for p, _ in rows],
        conclusion=[math.copysign(1.0, d) if d else 0.0 for d in shift],
    )


def cells(families: list[str], betas: list[float], share: float = 0.1) -> Columns:
    """A map of two sizes for each family but the last, which has one."""
    sizes = [(f, n) for f in families[:-1] for n in (2.0, 8.0)] + [(families[-1], 512.0)]
    rows = [(f, n, b) for f, n in sizes for b in betas]
    shares = [0.0 if n == 2 else share for _, n, _ in rows]
    return table(
        len(rows),
        family=[f for f, _, _ in rows],
        outputs=[n for _, n, _ in rows],
        beta=[b for _, _, b in rows],
        hypotheses_hold=100.0,
        share=shares,
        low=[s * 0.9 for s in shares],
        high=[s * 1.1 for s in shares],
    )


def depths(outputs: list[float], found: float = 0.9) -> Columns:
    rows = [(n, r) for n in outputs for r in (0.5, 2.0, 8.0)]
    bound = [r / 4 for _, r in rows]
    return table(
        len(rows),
        outputs=[n for n, _ in rows],
        range_over_beta=[r for _, r in rows],
        bound=bound,
        found=[found * b for b in bound],
    )


def ends(methods: list[str], tv: float = 1e-3) -> Columns:
    """Where methods end; the first one reaches p*."""
    rows = [(m, s) for m in methods for s in ("random", "real prompts")]
    spread = {"q05": 0.5, "q50": 1.0, "q95": 2.0}
    one = {
        f"{what}_{q}": [size * factor] * len(rows)
        for what, size in (("beta_ratio", 1.0), ("regret", 0.1), ("tpm_gain", 0.1))
        for q, factor in spread.items()
    }
    one |= {f"tpm_gain_optimum_{q}": [0.2 * x] * len(rows) for q, x in spread.items()}
    distance = [1e-16 if m == methods[0] else tv for m, _ in rows]
    one |= {f"tv_{q}": [d * x for d in distance] for q, x in spread.items()}
    return table(
        len(rows),
        method=[m for m, _ in rows],
        source=[s for _, s in rows],
        reaches=[m == methods[0] for m, _ in rows],
        tv_max=[3 * d for d in distance],
        share_at_least_alpha_hold=[0.8] * len(rows),
        share_at_least_alpha_hold_optimum=[0.9] * len(rows),
        **one,
    )


def frontiers(methods: list[str]) -> Columns:
    rows = [(m, b) for m in ["p*", "best of n", *methods] for b in (0.1, 1.0, 10.0)]
    return table(
        len(rows),
        method=[m for m, _ in rows],
        beta=[b for _, b in rows],
        share=[1.0] * len(rows),
        kl=[1 / (1 + b) for _, b in rows],
        gain=[(0.8 if m in methods[1:] else 1.0) / (1 + b) ** 0.5 for m, b in rows],
    )


def learning(methods: list[str], without: float = 0.5) -> Columns:
    rows = [(m, n) for m in methods for n in (10, 100, 1000)]
    errors = {
        f"{what}_{q}": [factor / n**0.5 for _, n in rows]
        for what in ("to_optimum", "to_limit")
        for q, factor in (("q05", 0.5), ("q50", 1.0), ("q95", 2.0))
    }
    return table(
        len(rows),
        method=[m for m, _ in rows],
        number=[n for _, n in rows],
        rate=[-0.5] * len(rows),
        share_without_optimum=[without] * len(rows),
        **errors,
    )


SMALL: dict[str, tuple[Callable[[], Figure], set[str]]] = {
    "methods": (
        lambda: figures.methods(ends(["one", "other"])),
        {"one", "other", "total variation to p*", "implied β over β", "real prompts: median"},
    ),
    "methods_tpm": (
        lambda: figures.methods_tpm(ends(["one", "other"])),
        {"one", "other", "TPM(A) − α", "p*", "real prompts"},
    ),
    "frontier": (
        lambda: figures.frontier(frontiers(["on it", "off it"])),
        {"off it", "loses up to 20%", "p*, and 2 methods that lie on it", "reward gained"},
    ),
    "finite_samples": (
        lambda: figures.finite_samples(learning(["one", "other"])),
        {"one", "other", "rate −0.5", "preferences", "to the method's own limit"},
    ),
    "tpm_by_beta": (
        lambda: figures.tpm_by_beta(tpm(BETAS)),
        {BETA_LABEL, "TPM(A) (probability mass)", "5–95% of instances", "mean α, before tuning"},
    ),
    "alpha_to_tpm": (
        lambda: figures.alpha_to_tpm(alphas(BETAS)),
        {
            "TPM(A) (probability mass)",
            "α before tuning (the shift Δ does not depend on α)",
            "TPM(A) = α",
            "β = 10",
        },
    ),
    "violations": (
        lambda: figures.violations(shares([2.0, 8.0], BETAS)),
        {BETA_LABEL, "number of outputs n", "12"},
    ),
    "convergence": (
        lambda: figures.convergence(descent(["adam"], [0.0, 9.0]), {"tolerance": 1e-6}),
        {
            "smallest KL(π ‖ p*) so far (nats)",
            "optimiser steps",
            "adam",
            "tolerance, 10⁻⁶ nats",
            "0",
        },
    ),
    "counterexample": (
        lambda: figures.counterexample(outputs(3), FACTS),
        {"reward r", "$p_A$ and $p_U$ (probability)", "$p_{ref}$ and $p$* (probability)"},
    ),
    "atlas": (
        lambda: figures.atlas(cells(["one", "other", "real"], [0.0, *BETAS])),
        {BETA_LABEL, "number of outputs n", "one", "at most 10%", "→0", "none"},
    ),
    "depth": (
        lambda: figures.depth(depths([3.0, 32.0])),
        {"n = 3", "n = 32"},
    ),
    "steps_by_beta": (
        lambda: figures.steps_by_beta(steps(["adam", "other"], BETAS)),
        {BETA_LABEL, "steps", "adam", "other", "share certified (right)"},
    ),
    "descent_tpm": (
        lambda: figures.descent_tpm(courses(["adam", "other"], 1e-7), SOLVED),
        {"optimiser steps (instance 7, β = 0.5)", "TPM(A) (probability mass)", "adam", "of p*"},
    ),
    "prompts": (
        lambda: figures.prompts(shifts(3, BETAS)),
        {BETA_LABEL, "log-odds shift Δ (nats)", "hypotheses hold, yet Δ < 0 (1)", "prompt 0"},
    ),
}


def test_an_atlas_of_one_family_of_nothing_or_of_nan() -> None:
    for share in (0.0, math.nan, 1.0):
        for families in (["only"], ["one", "two", "three", "four"]):
            figure = figures.atlas(cells(families, BETAS, share))
            assert set(families) <= set(words(figure))
            assert rendered(figure)["png"]


def words(figure: Figure) -> list[str]:
    found = figure.findobj(Text)
    return [text.get_text() for text in found if isinstance(text, Text) and text.get_visible()]


def test_every_figure_is_tested() -> None:
    assert set(SMALL) == set(figures.FIGURES)


@pytest.mark.parametrize("which", SMALL)
def test_says_what_it_shows_and_repeats_itself(which: str) -> None:
    draw, expected = SMALL[which]
    figure = draw()
    assert expected <= set(words(figure))
    files = rendered(figure)
    assert rendered(draw()) == files
    assert files["pdf"].startswith(b"%PDF") and files["png"].startswith(b"\x89PNG")
    assert ElementTree.fromstring(files["svg"]).tag.endswith("svg")
    dated = re.compile(rb"CreationDate|ModDate|dc:date|tIME|Software|Matplotlib v")
    assert not [format_ for format_, content in files.items() if dated.search(content[:4096])]
    assert not re.search(rb"20\d\d-\d\d-\d\d|D:20\d{6}", files["svg"] + files["pdf"][-1024:])
    assert b"/Type3" not in files["pdf"]


def test_counterexample_states_its_numbers() -> None:
    text = "\n".join(words(figures.counterexample(outputs(3), FACTS)))
    for part in ("α = 0.5 ", "TPM(A) = 0.419 ", "β = 1;", "Δ = −0.325 nats"):
        assert part in text
    assert "$p_A$) = 0.222 > 0 > Cov(r, $p_U$) = −0.111" in text
    other = "\n".join(words(figures.counterexample(outputs(3), FACTS | {"covariance_aligned": -1})))
    assert "promises" not in other


def test_counterexample_splits_p_star_by_component() -> None:
    r, p, q = [0.0, 3.0, 4.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]
    before = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    raw = [b * math.exp(x) for b, x in zip(before, r, strict=True)]
    after = [x / sum(raw) for x in raw]
    columns = outputs(3) | {
        "reward": r, "p_aligned": p, "p_unaligned": q, "p_ref": before, "p_star": after
    }  # fmt: skip
    mixture = figures.counterexample(columns, FACTS).axes[2]
    bars = [bar for bar in mixture.patches if isinstance(bar, Rectangle)]
    owed = [bar.get_width() for bar in bars if to_hex(bar.get_facecolor()) == ALIGNED.lower()]
    assert math.isclose(sum(owed), after[1])


def test_many_outputs_share_a_row() -> None:
    texts = words(figures.counterexample(outputs(40), FACTS))
    assert "28 other outputs" in texts


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(lambda: figures.tpm_by_beta(tpm([1.0])), id="one-beta"),
        pytest.param(lambda: figures.tpm_by_beta(tpm([math.nan])), id="own-beta"),
        pytest.param(lambda: figures.alpha_to_tpm(alphas([math.nan])), id="alpha-own-beta"),
        pytest.param(
            lambda: figures.alpha_to_tpm(alphas([float(k) for k in range(1, 30)])), id="many-betas"
        ),
        pytest.param(lambda: figures.violations(shares([32.0], BETAS, 0.0)), id="one-n"),
        pytest.param(lambda: figures.violations(shares([2.0, 3.0], [1.0])), id="one-beta-two-n"),
        pytest.param(lambda: figures.violations(shares([2.0, 3.0], BETAS, math.nan)), id="nan-map"),
        pytest.param(lambda: figures.violations(shares([2.0], BETAS, math.nan)), id="nan-points"),
        pytest.param(lambda: figures.violations(shares([2.0, 3.0], BETAS, 1.0)), id="all-violate"),
        pytest.param(lambda: figures.convergence(descent([7.0, AWKWARD], [3.0])), id="one-step"),
        pytest.param(
            lambda: figures.convergence(descent(list("abcde"), [0.0, 1.0], math.inf)), id="infinite"
        ),
        pytest.param(lambda: figures.steps_by_beta(steps(["a"], [1.0])), id="steps-one-beta"),
        pytest.param(
            lambda: figures.steps_by_beta(steps(list("abcde"), BETAS, math.nan)), id="none"
        ),
        pytest.param(lambda: figures.steps_by_beta(steps([AWKWARD], BETAS, 0.0)), id="no-step"),
        pytest.param(lambda: figures.descent_tpm(courses(["a"], 1.0), SOLVED), id="never-ends"),
        pytest.param(
            lambda: figures.counterexample(outputs(2, AWKWARD), FACTS | {"name": AWKWARD}),
            id="awkward-outputs",
        ),
        pytest.param(lambda: figures.prompts(shifts(2, BETAS, AWKWARD)), id="awkward-prompts"),
        pytest.param(lambda: figures.prompts(shifts(1, BETAS, 12.0)), id="one-prompt"),
        pytest.param(lambda: figures.prompts(shifts(300, [math.nan])), id="many-prompts-own-beta"),
        pytest.param(lambda: figures.prompts(shifts(3, BETAS, scale=0.0)), id="all-ties"),
        pytest.param(lambda: figures.prompts(shifts(3, BETAS, scale=math.nan)), id="nan-shifts"),
    ],
)
def test_awkward_data(figure: Callable[[], Figure]) -> None:
    drawn = figure()
    svg = io.BytesIO()
    drawn.savefig(svg, format="svg")
    ElementTree.fromstring(svg.getvalue())
    width, height = drawn.get_size_inches()
    box = drawn.get_tightbbox()
    assert box.x0 > -0.02 and box.y0 > -0.02, "something is cut off at the left or the bottom"
    assert box.x1 < width + 0.02 and box.y1 < height + 0.02, "something is cut off"


def test_the_same_name_twice_is_two_prompts() -> None:
    columns = shifts(2, BETAS)
    columns["name"] = ["same"] * len(columns["name"])
    assert "hypotheses hold, otherwise (1)" in words(figures.prompts(columns))


def test_an_undecided_prompt_is_not_counted_as_failing() -> None:
    columns = shifts(1, BETAS)
    columns["conclusion"] = [2.0] * 3
    assert "hypotheses hold, yet Δ < 0 (0)" in words(figures.prompts(columns))


def test_users_settings_change_nothing() -> None:
    draw = SMALL["tpm_by_beta"][0]
    expected = rendered(draw())
    with matplotlib.rc_context({"lines.linewidth": 9.0, "savefig.bbox": "tight", "font.size": 20}):
        assert rendered(draw()) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.5, "−0.5"),
        (20000.0, "20000"),
        (0.00012345, "0.000123"),
        (-1e-6, "−10⁻⁶"),
        (2.5e7, "2.5·10⁷"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_names() -> None:
    assert name(3.0, 10) == "3"
    assert name("a\n\tb", 10) == "a b"
    assert name("漢字", 10) == "□□"
    assert all(len(line) <= 20 for line in name("x" * 300 + " " + AWKWARD, 20, 2).split("\n"))
    assert name("", 10) == ""


def test_draw_all_writes_what_has_data(tmp_path: Path) -> None:
    def fill(path: Path) -> RunDirectory:
        run = RunDirectory.create(path)
        run.write_csv("tpm_by_beta", tpm(BETAS))
        run.write_csv("violations", {k: [] for k in shares([2.0], BETAS)})  # no rows
        run.write_csv("convergence", descent(["adam"], [0.0, 5.0]))  # without solve.json
        run.write_csv("counterexample", outputs(3))  # without its JSON
        return run

    run = fill(tmp_path / "one")
    assert figures.draw_all(run) == ["tpm_by_beta", "convergence"]
    files = sorted(p.name for p in (tmp_path / "one" / "figures").iterdir())
    assert files == sorted(
        f"{n}.{e}" for n in ("tpm_by_beta", "convergence") for e in ("pdf", "svg", "png")
    )
    again = fill(tmp_path / "two")
    again.write_json("counterexample.json", FACTS)
    assert figures.draw_all(again) == ["tpm_by_beta", "convergence", "counterexample"]
    for file in files:
        one, two = (tmp_path / d / "figures" / file for d in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), file


def test_another_process_draws_the_same_bytes_and_needs_no_jax() -> None:
    columns = tpm(BETAS)
    code = (
        "import hashlib, sys, jaxsim.figures as f; from jaxsim.figures.style import rendered;"
        f"files = rendered(f.tpm_by_beta({columns!r}));"
        "print(*(hashlib.sha256(b).hexdigest() for b in files.values()));"
        "print(sorted({'jax', 'matplotlib.pyplot', 'tkinter'} & set(sys.modules)))"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "SOURCE_DATE_EPOCH": "7",
    }
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.splitlines()
    here = rendered(figures.tpm_by_beta(columns)).values()
    assert lines == [" ".join(hashlib.sha256(content).hexdigest() for content in here), "[]"]
