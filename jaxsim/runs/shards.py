"""Shards: ranges of instances whose totals are committed one by one, so that a run can go on.

A shard is two files: `shards/shard-000000.npz` with its totals, and beside it a .json with the
range, counts and the SHA-256 of the first, written after it. A shard counts only where both are
there and fit. The plan depends on the configuration alone, and totals are added in the order of the
shards, so that it does not matter which process computed which, or when.
"""

import hashlib
import io
import json
import math
import stat
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsim import claims, sources
from jaxsim.engine.stream import BIN_EDGES, ClaimTotal, Sums, Totals
from jaxsim.runs.config import RunConfig, to_toml
from jaxsim.runs.directory import RunDirectory

SCHEMA = 1
_TILES = 16  # in a shard
_LARGEST = 1 << 28  # bytes of a shard's file; what is larger is none of ours
_COUNTS = ("tried", "failed", "undecided")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is divided.

    Attributes:
        instances: of the run.
        rows: instances per shard; the last may have fewer.
        betas: values of β at which each is evaluated, at least one.
        run: a hash of the configuration and the input, which each shard carries.
    """

    instances: int
    rows: int
    betas: int
    run: str

    @property
    def count(self) -> int:
        """Number of shards."""
        return math.ceil(self.instances / self.rows)

    def range(self, index: int) -> tuple[int, int]:
        """Return the first instance of a shard, and the one after its last."""
        return index * self.rows, min((index + 1) * self.rows, self.instances)


def plan(config: RunConfig, source: sources.Source) -> Plan:
    """Divide a run: sixteen tiles to a shard, or fewer where the configuration asks for it."""
    tiles = max(1, config.shard // source.size) if config.shard else _TILES
    return Plan(
        instances=source.num,
        rows=tiles * source.size,
        betas=max(1, len(config.betas)),
        run=hashlib.sha256((_config_hash(config) + _input_hash(source)).encode()).hexdigest(),
    )


def _config_hash(config: RunConfig) -> str:
    return hashlib.sha256(to_toml(config).encode()).hexdigest()


def _input_hash(source: sources.Source) -> str:
    """Return a hash of the instances of a file; of a family's, the configuration tells."""
    if not isinstance(source, sources.ArraySource):
        return ""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(source.instance):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def manifest(config: RunConfig, source: sources.Source) -> dict[str, Any]:
    """Return what decides about every byte of a run's totals."""
    divided = plan(config, source)
    return {
        "schema": SCHEMA,
        "config_sha256": _config_hash(config),
        "input_sha256": _input_hash(source),
        "shards": {
            "instances": divided.instances,
            "rows": divided.rows,
            "count": divided.count,
            "betas": divided.betas,
            "run": divided.run,
        },
        "tile": source.size,
        "dtype": config.family.dtype,
        "prng": "threefry2x32, counter (instance, word)",
        "seed": config.seed,
        "jax": jax.__version__,
        "platform": jax.devices()[0].platform,
    }


def differences(stored: Any, wanted: dict[str, Any]) -> list[str]:
    """Name what two manifests do not agree in."""
    if not isinstance(stored, dict):
        return ["everything: it is not a manifest"]
    keys = sorted({*stored, *wanted})
    other = [key for key in keys if stored.get(key) != wanted.get(key)]
    if len(other) > 1 and "shards" in other:
        other.remove("shards")  # which follows from the rest
    return [
        f"{key} ({_short(stored.get(key))} there, {_short(wanted.get(key))} here)" for key in other
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "…"


def name(index: int) -> str:
    """Return a shard's file name, without its ending."""
    return f"shards/shard-{index:06d}"


def save_instances(directory: RunDirectory, index: int, tables: Iterable[dict[str, Any]]) -> None:
    """Write the rows of a shard's instances, a row group for each table."""
    import pyarrow
    import pyarrow.parquet

    with directory.writing(instances_name(index)) as stream:
        writer = None
        for columns in tables:
            table = pyarrow.table(columns)
            writer = writer or pyarrow.parquet.ParquetWriter(stream, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()


def instances_name(index: int) -> str:
    """Return the name of the file with the rows of a shard's instances."""
    return f"instances/instances-{index:06d}.parquet"


def commit(directory: RunDirectory, divided: Plan, index: int, totals: Totals) -> None:
    """Write a shard: its totals, then the file that makes them count.

    What `save_instances` wrote for it counts from then on too.
    """
    data = archive(totals)
    rows = directory.path / instances_name(index)
    start, stop = divided.range(index)
    directory.write(f"{name(index)}.npz", data)
    directory.write_json(
        f"{name(index)}.json",
        {
            "index": index,
            "start": start,
            "stop": stop,
            "run": divided.run,
            "counted": totals.sums.counted.tolist(),
            "invalid": totals.sums.invalid.tolist(),
            "sha256": hashlib.sha256(data).hexdigest(),
            "jax": jax.__version__,
        }
        | ({"instances_sha256": _file_hash(rows)} if rows.exists() else {}),
    )


def archive(totals: Totals) -> bytes:
    """Return totals as the bytes of an .npz file: the same for the same totals."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = _arrays(totals)
    np.savez_compressed(buffer, **arrays)  # which dates its members at 1980
    return buffer.getvalue()


class Damaged(Exception):
    """A shard's files are there, but are not what was committed; the message says how."""


def committed(directory: RunDirectory, divided: Plan, index: int) -> Totals | None:
    """Return a shard's totals, or None where it has not been committed.

    Raises:
        Damaged: where it does not fit its hash or its plan.
    """
    data_path, side_path = (directory.path / f"{name(index)}{end}" for end in (".npz", ".json"))
    if not side_path.exists() or not data_path.exists():
        return None
    side = _sidecar(side_path)
    if [side.get("index"), side.get("start"), side.get("stop")] != [index, *divided.range(index)]:
        raise Damaged(f"{side_path.name} is of another range of instances")
    if side.get("run") != divided.run:
        raise Damaged(f"{side_path.name} is of another run")
    data = _regular(data_path)
    if hashlib.sha256(data).hexdigest() != side.get("sha256"):
        raise Damaged(f"{data_path.name} does not fit its hash")
    if "instances_sha256" in side:
        rows = directory.path / instances_name(index)
        if not rows.is_file() or rows.is_symlink():
            raise Damaged(f"{rows.name} is missing")
        if _file_hash(rows) != side["instances_sha256"]:
            raise Damaged(f"{rows.name} does not fit its hash")
    return _totals(data_path.name, data, divided)


def combined(directory: RunDirectory, divided: Plan) -> Totals:
    """Add up all shards, in their order.

    Raises:
        ValueError: where shards are missing or damaged, naming the first of them.
    """
    whole: Totals | None = None
    missing = []
    for index in range(divided.count):
        try:
            part = committed(directory, divided, index)
        except Damaged:
            part = None
        if part is None:
            missing.append(index)
        elif not missing:
            whole = part if whole is None else whole.plus(part)
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"{directory.path}: {len(missing)} of {divided.count} shards are not there yet ({some})"
        )
    assert whole is not None
    return whole


def states(directory: RunDirectory, divided: Plan) -> Iterator[tuple[int, str]]:
    """Yield every shard's index, and "" where it is committed, or what is wrong with it."""
    for index in range(divided.count):
        try:
            yield index, "" if committed(directory, divided, index) else "missing"
        except Damaged as error:
            yield index, str(error)


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _regular(path: Path) -> bytes:
    """Read a file that must be a plain one of bounded size."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path.name} is not a plain file")
    if found.st_size > _LARGEST:
        raise Damaged(f"{path.name} is larger than any shard")
    return path.read_bytes()


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        side = json.loads(_regular(path))
    except (ValueError, RecursionError):
        raise Damaged(f"{path.name} is not JSON") from None
    if not isinstance(side, dict):
        raise Damaged(f"{path.name} is not a table")
    return side


def _arrays(totals: Totals) -> dict[str, np.ndarray]:
    """Return totals as arrays by name."""
    found = {f"sums_{key}": np.asarray(value) for key, value in vars(totals.sums).items()}
    rows = [totals.claims[key] for key in _claim_names()]
    none = [-1, math.nan]
    return found | {
        "betas": np.asarray(totals.betas, np.float64),
        "claim_counts": np.asarray([[getattr(row, k) for k in _COUNTS] for row in rows], np.int64),
        "claim_margin": np.asarray([row.worst_margin for row in rows], np.float64),
        "claim_index": np.asarray(
            [none[0] if row.worst_index is None else row.worst_index for row in rows], np.int64
        ),
        "claim_beta": np.asarray(
            [none[1] if row.worst_beta is None else row.worst_beta for row in rows], np.float64
        ),
    }


def _expected(betas: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each array of a shard."""
    claim_count = len(_claim_names())
    real = {"tpm_aligned", "alpha", "kl", "reward_gain"}
    histograms = {"logit_tpm", "log_odds_shift"}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"sums_{item.name}": (
            "<f8" if item.name in real else "<i8",
            (betas, len(BIN_EDGES) + 1) if item.name in histograms else (betas,),
        )
        for item in fields(Sums)
    }
    return shapes | {
        "betas": ("<f8", (betas,)),
        "claim_counts": ("<i8", (claim_count, len(_COUNTS))),
        "claim_margin": ("<f8", (claim_count,)),
        "claim_index": ("<i8", (claim_count,)),
        "claim_beta": ("<f8", (claim_count,)),
    }


def _claim_names() -> list[str]:
    return [claim.name for claim in claims.CLAIMS if claim.judge]


def _totals(label: str, data: bytes, divided: Plan) -> Totals:
    """Read totals, after checking names, types, shapes and sizes of all arrays."""
    expected = _expected(divided.betas)
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sorted(archive.namelist()) != sorted(f"{key}.npy" for key in expected):
                raise Damaged(f"{label} holds other arrays")
            for key, (dtype, shape) in expected.items():
                size = math.prod(shape) * np.dtype(dtype).itemsize
                if archive.getinfo(f"{key}.npy").file_size > size + 1024:
                    raise Damaged(f"{label}: {key} is larger than it should be")
                with archive.open(f"{key}.npy") as member:
                    np.lib.format.read_magic(member)
                    found = np.lib.format.read_array_header_1_0(member)
                    if found != (shape, False, np.dtype(dtype)):
                        raise Damaged(f"{label}: {key} has another type or shape")
                    arrays[key] = np.frombuffer(member.read(), dtype).reshape(shape)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise Damaged(f"{label} cannot be read: {error}") from None
    return Totals(
        betas=tuple(arrays["betas"].tolist()),
        sums=Sums(**{item.name: arrays[f"sums_{item.name}"] for item in fields(Sums)}),
        claims={
            key: ClaimTotal(
                **dict(zip(_COUNTS, arrays["claim_counts"][at].tolist(), strict=True)),
                worst_margin=float(arrays["claim_margin"][at]),
                worst_index=_optional(arrays["claim_index"][at]),
                worst_beta=_optional(arrays["claim_beta"][at]),
            )
            for at, key in enumerate(_claim_names())
        },
    )


def _optional(value: Any) -> Any:
    """Return a number, or None for the one that stands for none."""
    return None if value == -1 or math.isnan(value) else value.item()
