"""The run directory: every file appears whole or not at all, and `COMPLETE.json` comes last.

config.toml          what was run, fully resolved
provenance.json      versions, devices, command, times
summary.parquet      one row per value of β
instances.parquet    one row per instance and β (runs on a file only)
claims.json, claims.md, counterexample.json, solve.json
data/*.csv           what each figure shows
figures/*.pdf, .svg, .png
COMPLETE.json        names of all files, with their SHA-256
"""

import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class RunDirectory:
    """A directory that receives the results of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> "RunDirectory":
        """Make the directory.

        Raises:
            ValueError: where the path is something else than an empty directory.
            OSError: where it cannot be made.
        """
        refuse_if_used(path)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open a finished run.

        Raises:
            ValueError: where the path is no finished run of jaxsim.
        """
        if not (path / "COMPLETE.json").is_file():
            raise ValueError(f"{path}: not a finished run (there is no COMPLETE.json in it)")
        return cls(path)

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file so that it is there whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode("utf-8") if isinstance(content, str) else content
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON with sorted keys and a final newline."""
        self.write(name, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this run, or None where there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_parquet(self, name: str, columns: dict[str, Any]) -> None:
        """Write a table given as columns."""
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
        self.write(name, sink.getvalue().to_pybytes())

    def write_csv(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the data of a figure; numbers with all their digits."""
        rows = zip(*columns.values(), strict=True)
        lines = [",".join(columns)] + [",".join(_cell(cell) for cell in row) for row in rows]
        self.write(f"data/{name}.csv", "\n".join(lines) + "\n")

    def read_csv(self, name: str) -> dict[str, list[Any]] | None:
        """Read the data of a figure back, or None where this run has none."""
        path = self.path / "data" / f"{name}.csv"
        if not path.is_file():
            return None
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        return {h: [_parsed(row[i]) for row in rows] for i, h in enumerate(header)}

    def complete(self) -> None:
        """Record the hash of every file, last of all."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name != "COMPLETE.json")
        hashes = {
            p.relative_to(self.path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
        }
        self.write_json("COMPLETE.json", {"schema": 1, "sha256": hashes})


def refuse_if_used(path: Path) -> None:
    """Raise a ValueError where `path` is not free to take a run's results."""
    if path.is_dir():
        if any(path.iterdir()):
            raise ValueError(f"{path}: the output directory is not empty")
    elif path.exists():
        raise ValueError(f"{path}: expected a directory, found a file")


def _cell(value: Any) -> str:
    if isinstance(value, str):
        quoted = value.replace('"', '""')
        return f'"{quoted}"'
    return repr(value.item() if hasattr(value, "item") else value)


def _parsed(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell
