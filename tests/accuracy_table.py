"""Print the table of docs/accuracy.md: `python -m tests.accuracy_table`."""

from __future__ import annotations

from tests.test_accuracy import MODES, WIDE, report


def main() -> None:
    reports = [report(mode, *WIDE) for mode in MODES]
    print("| field | float32 | float64 |\n|---|---:|---:|")
    for field in reports[0].worst:
        ratios = " | ".join(f"{r.worst[field].ratio:.1f}" for r in reports)
        print(f"| `{field}` | {ratios} |")


if __name__ == "__main__":
    main()
