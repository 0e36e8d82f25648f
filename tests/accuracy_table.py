"""Measure the tables of docs/accuracy.md: `python -m tests.accuracy_table [--write]`.

Without `--write` they are printed. Five to ten minutes on two cores.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests.test_accuracy import MODES, OUTPUTS, RANGES, SIZES, WIDE, Report, report

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
BEGIN = "<!-- begin: python -m tests.accuracy_table --write -->"
END = "<!-- end -->"


def table(measured: Report) -> str:
    """One dtype: a row per output, a column per regime of R and of n, the largest error in each."""
    regimes = {"all": np.ones(len(measured.names), bool)}
    regimes |= {x: measured.ranges == i for i, x in enumerate(_intervals("R", RANGES))}
    regimes |= {x: measured.sizes == i for i, x in enumerate(_intervals("n", SIZES))}
    rows = [["output", *regimes], ["---", *["---:"] * len(regimes)]]
    rows.append(["instances", *(f"{np.sum(where):,}" for where in regimes.values())])
    for name in OUTPUTS:
        errors = measured.ratios[name]
        rows.append([_label(name), *(f"{np.max(errors[where]):.1f}" for where in regimes.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _label(name: str) -> str:
    function, _, field = name.partition(".")
    return f"`{function}`: `{field}`" if field else f"`{function}`"


def _intervals(name: str, starts: tuple[float, ...]) -> list[str]:
    """Name the intervals between the starts; whole numbers by their first and last."""
    if isinstance(starts[0], int):
        ends = [1, *starts]
        inner = [f"{name} = {a}–{b - 1}" for a, b in pairwise(ends)]
        return [*inner, f"{name} ≥ {starts[-1]}"]
    inner = [f"{a:g} ≤ {name} < {b:g}" for a, b in pairwise(starts)]
    return [f"{name} < {starts[0]:g}", *inner, f"{name} ≥ {starts[-1]:g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/accuracy.md")
    write = parser.parse_args().write
    tables = "\n\n".join(f"{mode}:\n\n{table(report(mode, *WIDE))}" for mode in MODES)
    if not write:
        print(tables)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
