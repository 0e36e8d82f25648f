"""The run directory: every file appears whole or not at all, and `COMPLETE.json` comes last.

config.toml          what was run, fully resolved
manifest.json        what decides about every byte: configuration's hash, shards, tile, versions
provenance/*.json    of each attempt: versions, devices, command, times
shards/              totals of each range of instances, and their hashes
summary.parquet      one row per value of β
instances.parquet    one row per instance and β (runs on a file only)
claims.json, claims.md, counterexample.json, solve.json
data/*.csv           what each figure shows
instances/*.parquet  a row per instance and β, where these are saved
figures/*.pdf, .svg, .png
COMPLETE.json        names of all files but those of provenance/, with their SHA-256

Hashes catch damage, not forgery: whoever can write here can also write the hashes.
"""

import csv
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

_PARTIAL = ".partial-"
_LOCK = ".lock-"


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
        found = cls(path)
        found.make()
        return found

    def make(self) -> None:
        """Make the directory where there is none.

        Raises:
            ValueError: where the path is something else.
            OSError: where it cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: expected a directory, found a file")
        self.path.mkdir(parents=True, exist_ok=True)

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
        with self.writing(name) as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Open a file that is there, whole, once the block has ended without an error."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self.path.resolve()):
            raise OSError(errno.EPERM, "a link leads out of the run directory", str(target.parent))
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=_PARTIAL)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
            _sync_folder(target.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON with sorted keys and a final newline."""
        self.write(name, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this run, or None where there is none."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (ValueError, RecursionError):
            raise ValueError(f"{self.path}: {name} is not JSON") from None

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

    @contextmanager
    def locked(self, worker: str = "") -> Iterator[None]:
        """Keep other processes out while this one works: all of them, or those as the same worker.

        Raises:
            ValueError: where another is at work.
        """
        mine = self.path / f"{_LOCK}{worker or 'run'}"
        held: list[filelock.BaseFileLock] = []

        def hold(path: Path) -> None:
            lock = filelock.FileLock(path)
            lock.acquire(blocking=False)
            held.append(lock)

        try:
            hold(mine)  # before the others are looked at: who comes now finds it
            others = [self.path / f"{_LOCK}run"] if worker else sorted(self.path.glob(f"{_LOCK}*"))
            for path in others:
                if path != mine:
                    hold(path)
            if worker:
                _release(held.pop())
            yield
        except filelock.Timeout:
            raise ValueError(f"{self.path}: another process is at work in this directory") from None
        finally:
            for lock in held:
                _release(lock)

    def remove_partial(self) -> None:
        """Delete what processes that were killed left half-written."""
        for path in self.path.rglob(f"{_PARTIAL}*"):
            path.unlink(missing_ok=True)

    def record_attempt(self, facts: dict[str, Any]) -> str:
        """Write `provenance/attempt-N.json` under the next free number; return its name."""
        folder = self.path / "provenance"
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            try:
                (folder / f"attempt-{number}.json").touch(exist_ok=False)
                break
            except FileExistsError:
                number += 1
        self.write_json(f"provenance/attempt-{number}.json", facts)
        return f"provenance/attempt-{number}.json"

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file that a result consists of, by name."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            skipped = name == "COMPLETE.json" or name.startswith("provenance/")
            if path.is_file() and not path.name.startswith(".") and not skipped:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def complete(self, only: str = "") -> None:
        """Record the hash of every file, last of all; or only of those in a folder, anew."""
        found = self.hashes()
        if only:
            kept = {name: h for name, h in self.listed().items() if not name.startswith(only)}
            found = kept | {name: h for name, h in found.items() if name.startswith(only)}
        self.write_json("COMPLETE.json", {"schema": 1, "sha256": dict(sorted(found.items()))})

    def reopen(self) -> None:
        """Take back that everything has been written, before some of it is written again."""
        (self.path / "COMPLETE.json").unlink(missing_ok=True)

    def listed(self) -> dict[str, str]:
        """Return the hashes in COMPLETE.json, by name of the file.

        Raises:
            ValueError: where it is not as it was written.
        """
        stored = self.read_json("COMPLETE.json")
        hashes = stored.get("sha256") if isinstance(stored, dict) else None
        if not isinstance(hashes, dict):
            raise ValueError(f"{self.path}: COMPLETE.json is damaged")
        return hashes

    @property
    def is_complete(self) -> bool:
        """Whether everything has been written."""
        return (self.path / "COMPLETE.json").is_file()


def _release(lock: filelock.BaseFileLock) -> None:
    """Release a lock that is held, and delete its file while nobody else can hold it."""
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _sync_folder(path: Path) -> None:
    """Make a rename last, where the system lets a folder be opened."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_if_used(path: Path) -> None:
    """Raise a ValueError where `path` is not free to take a run's results."""
    if path.is_dir():
        if (path / "manifest.json").is_file() and not (path / "COMPLETE.json").exists():
            raise ValueError(
                f"{path}: there is an unfinished run in it; go on with: jaxsim run --resume {path}"
            )
        if any(not child.name.startswith(".") for child in path.iterdir()):
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
