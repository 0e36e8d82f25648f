"""Where tiles of instances come from: drawn by a family, or read from a file. Both go the same way.

A source knows how many instances it has and hands them out in tiles of one fixed shape.
"""

import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsim.families.counter import Stream
from jaxsim.families.draw import draw
from jaxsim.families.spec import Family
from jaxsim.instance import Instance

_TILE_ELEMENTS = 1 << 18  # outputs × instances: an array of it takes 1 MiB in float32


def tile_size(outputs: int) -> int:
    """Return how many instances of `outputs` outputs make a tile: a power of two from 8 on.

    It depends on the number of outputs alone. Code compiled for another shape may round
    differently in the last bit, so one shape serves all draws and evaluations.
    """
    size = max(8, _TILE_ELEMENTS // max(outputs, 8))
    return 1 << (size.bit_length() - 1)


def block_size(outputs: int) -> int:
    """Return how many instances make a block, whose arrays a core's cache holds.

    A sixteenth of a tile; but 8, where a tile has fewer than 128.
    """
    return max(8, tile_size(outputs) // 16)


def index_words(start: int) -> np.ndarray:
    """Return a 64-bit instance index as two uint32 words, high and low."""
    return np.asarray([start >> 32, start & 0xFFFFFFFF], np.uint32)


def stream_at(words: jax.Array, start: jax.Array, offset: Any, size: int) -> Stream:
    """Return the random words of instances start + offset and the `size` - 1 that follow.

    start: two words; the low one leaves room for all of them, as at a tile's start.
    """
    steps = jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(offset)
    return Stream.of(words, jnp.asarray(start[0]), start[1] + steps)


@partial(jax.jit, static_argnums=0)
def draw_tile(family: Family, words: jax.Array, start: jax.Array) -> Instance:
    """Return instances start, start + 1, … of a family as one tile [outputs, instances].

    start: two words, a multiple of the tile's size.
    """
    return draw(family, stream_at(words, start, 0, tile_size(family.outputs)))


@runtime_checkable
class Source(Protocol):
    """A finite supply of instances, in tiles of one shape."""

    @property
    def num(self) -> int:
        """Number of instances."""

    @property
    def outputs(self) -> int:
        """Outputs per instance, padding included."""

    @property
    def size(self) -> int:
        """Instances per tile."""

    def tile(self, start: int) -> Instance:
        """Return the tile [outputs, instances] from instance `start` on; past the end, anything."""

    def pick(self, which: np.ndarray) -> Instance:
        """Return some instances as a batch on the host, the same bits as in their tiles."""

    def names(self, index: int) -> tuple[str, list[str] | None]:
        """Return an instance's name and, where there are any, its outputs' names."""


@dataclass(frozen=True, kw_only=True)
class FamilySource:
    """`num` instances of a family under a key, from index `start` on, where a tile starts."""

    family: Family
    words: jax.Array  # the key's two words
    num: int
    start: int = 0

    @property
    def outputs(self) -> int:
        """Outputs per instance."""
        return self.family.outputs

    @property
    def size(self) -> int:
        """Instances per tile."""
        return tile_size(self.family.outputs)

    def tile(self, start: int) -> Instance:
        """Draw the tile."""
        return draw_tile(self.family, self.words, self.start_words(start))

    def start_words(self, start: int) -> np.ndarray:
        """Return the index of the source's instance `start` as two words."""
        return index_words(self.start + start)

    def pick(self, which: np.ndarray) -> Instance:
        """Draw the tiles that the instances are in."""
        # Not less: of another shape the sums, and so the logs, may differ in their last bits.
        tiles, tile_of = np.unique(which // self.size, return_inverse=True)
        parts, order = [], []
        for at, tile in enumerate(tiles.tolist()):  # one at a time, since each takes megabytes
            mine = np.flatnonzero(tile_of == at)
            parts.append(columns(self.tile(tile * self.size), which[mine] % self.size))
            order.append(mine)
        place = np.argsort(np.concatenate(order))
        return jax.tree.map(lambda *x: np.concatenate(x)[place], *parts)

    def names(self, index: int) -> tuple[str, list[str] | None]:
        """Return the instance's index as its name."""
        return f"instance {self.start + index}", None


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """Instances held in memory, [instances, outputs], with their names where they have any."""

    instance: Instance
    prompts: list[str]
    texts: list[list[str]] | None  # of the outputs
    has_beta: bool

    @property
    def num(self) -> int:
        """Number of instances."""
        return int(self.instance.reward.shape[0])

    @property
    def outputs(self) -> int:
        """Outputs per instance, padding included."""
        return int(self.instance.reward.shape[1])

    @cached_property
    def size(self) -> int:
        """Instances per tile: no more than there are, up to a power of two."""
        wanted = 1 << max(3, (self.num - 1).bit_length())
        return min(wanted, tile_size(self.outputs))

    def tile(self, start: int) -> Instance:
        """Return the tile, padded with the last instance."""
        rows = np.minimum(np.arange(start, start + self.size), self.num - 1)
        return jax.tree.map(lambda x: jnp.moveaxis(x[rows], 0, -1), self.instance)

    def pick(self, which: np.ndarray) -> Instance:
        """Return some instances."""
        return jax.tree.map(lambda x: np.asarray(x)[which], self.instance)

    def names(self, index: int) -> tuple[str, list[str] | None]:
        """Return the instance's prompt and its outputs' texts."""
        return self.prompts[index], None if self.texts is None else self.texts[index]


_COMPONENTS: dict[tuple[str, str], Callable[..., Instance]] = {
    ("log_p_ref", "aligned_given_output"): Instance.from_reference,
    ("log_p_aligned", "log_p_unaligned"): Instance.from_log_probs,
    ("p_aligned", "p_unaligned"): Instance.from_probs,
}
_ZERO_MASS = {"log_p_ref": -np.inf, "log_p_aligned": -np.inf, "log_p_unaligned": -np.inf}
_PER_INSTANCE = ("alpha", "logit_alpha", "beta")
_RESERVED = {name for pair in _COMPONENTS for name in pair} | {*_PER_INSTANCE, "prompt", "output"}
BUILT_IN = {"ngram": "ngram.npz"}


def read(path: str, *, reward: str = "reward", dtype: str = "float32") -> ArraySource:
    """Read instances from an .npz or Parquet file, or a data set that comes with jaxsim.

    A file holds the arrays of one constructor of `Instance`, by the names of its arguments:
    `log_p_ref` and `aligned_given_output`, or `log_p_aligned` and `log_p_unaligned`, or `p_aligned`
    and `p_unaligned`, with `alpha` or `logit_alpha` (not for the first), a reward, and optionally
    `beta`, `prompt` and `output` (texts). In .npz the shapes are [instances, outputs] and
    [instances]; in Parquet a row is an instance and a per-output column holds lists, which may
    differ in length.

    Args:
        path: the file, or the name of a built-in data set ("ngram").
        reward: name of the array to take as r.
        dtype: float32 or float64.

    Raises:
        ValueError: naming the file and the array, for anything that is not as described.
        OSError: where the file cannot be read.
    """
    location: Any = Path(path)
    if path in BUILT_IN:
        location = resources.files("jaxsim") / "data" / BUILT_IN[path]
    reader = {".npz": _read_npz, ".parquet": _read_parquet}.get(Path(location.name).suffix.lower())
    if reader is None:
        known = ", ".join(BUILT_IN)
        raise ValueError(
            f"{path}: expected a file that ends in .npz or .parquet, "
            f"or a built-in data set: {known}"
        )
    if not location.is_file():
        if location.is_dir():
            raise IsADirectoryError(f"{path}: expected a file, found a directory")
        known = ", ".join(BUILT_IN)
        raise FileNotFoundError(f"{path}: there is no such file (built-in data sets: {known})")
    if reward in _RESERVED:
        raise ValueError(f"{path}: {reward} cannot be the reward: it has a meaning of its own")
    with location.open("rb") as stream:
        found, arrays = reader(path, stream, {*_RESERVED, reward})
    return _source(path, found, arrays, reward, dtype)


_Arrays = dict[str, np.ndarray]


def _read_npz(path: str, stream: Any, wanted: set[str]) -> tuple[list[str], _Arrays]:
    """Return the names of all arrays, and those of the arrays that are wanted."""
    try:
        archive = np.lib.npyio.NpzFile(stream, allow_pickle=False)
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path}: not an .npz file (a zip archive of arrays), or cut short"
        ) from None
    arrays = {}
    with archive:
        for name in sorted(wanted.intersection(archive.files)):
            try:
                arrays[name] = archive[name]
            except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                if "allow_pickle" in reason:
                    reason = "it holds Python objects (a pickle), which jaxsim never loads"
                raise ValueError(f"{path}: {name} cannot be read: {reason}") from None
        return archive.files, arrays


def _read_parquet(path: str, stream: Any, wanted: set[str]) -> tuple[list[str], _Arrays]:
    """Return the names of all columns, and as arrays those that are wanted."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(stream)
        found = file.schema_arrow.names
        names = sorted(wanted.intersection(found))
        columns = file.read(columns=names).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as Parquet: {reason}") from None
    if not file.metadata.num_rows:
        raise ValueError(f"{path}: there are no rows in it")
    lengths: tuple[str, list[int]] | None = None
    for name in names:
        rows = columns[name]
        _require_values(path, name, rows)
        if name in (*_PER_INSTANCE, "prompt"):
            continue
        if not isinstance(rows[0], list):
            raise ValueError(f"{path}: {name} holds single values; expected a list in each row")
        own = [len(row) for row in rows]
        first, expected = lengths = lengths or (name, own)
        for at, (length, other) in enumerate(zip(own, expected, strict=True)):
            if length != other:
                raise ValueError(
                    f"{path}: {name}[{at}] has {length} outputs, but {first}[{at}] has {other}"
                )
    return found, {name: _column(name, columns[name]) for name in names}


def _require_values(path: str, name: str, rows: list[Any]) -> None:
    for at, row in enumerate(rows):
        if row is None:
            raise ValueError(f"{path}: {name}[{at}] is missing (null)")
        if isinstance(row, list) and None in row:
            raise ValueError(f"{path}: {name}[{at}, {row.index(None)}] is missing (null)")


def _column(name: str, rows: list[Any]) -> np.ndarray:
    """Return a column as an array; lists of unequal length are padded, masses with zero."""
    if not isinstance(rows[0], list):
        return np.asarray(rows)
    width = max(len(row) for row in rows)
    text = any(row and isinstance(row[0], str) for row in rows)
    filler: Any = "" if text else _ZERO_MASS.get(name, 0.0)
    return np.asarray([row + [filler] * (width - len(row)) for row in rows])


def _source(path: str, found: list[str], arrays: _Arrays, reward: str, dtype: str) -> ArraySource:
    pair = next((pair for pair in _COMPONENTS if all(name in arrays for name in pair)), None)
    if pair is None:
        wanted = "; or ".join(" and ".join(pair) for pair in _COMPONENTS)
        listed = ", ".join(sorted(found)) or "nothing"
        raise ValueError(f"{path}: expected the arrays {wanted}; found {listed}")
    if reward not in arrays:
        rewards = ", ".join(name for name in sorted(found) if name.startswith("reward"))
        raise ValueError(
            f"{path}: there is no array {reward!r} to take as the reward"
            + (f" (there is: {rewards})" if rewards else "")
        )
    numeric = {name: arrays[name] for name in (*pair, reward, *_PER_INSTANCE) if name in arrays}
    for name, array in numeric.items():
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{path}: {name} has dtype {array.dtype}; expected numbers")
        if name in _PER_INSTANCE:
            numeric[name] = array.astype(np.float64)
        else:
            # A probability near 1 is not rounded to 1: the constructor takes its log-odds first.
            keep = name == "aligned_given_output" and array.dtype == np.float64
            numeric[name] = array if keep else _rounded(path, name, array, dtype)
            if array.ndim == 1:
                numeric[name] = numeric[name][None]
    r = numeric.pop(reward)
    components = [numeric.pop(name) for name in pair]
    beta = numeric.pop("beta", None)
    if pair[0] == "log_p_ref" and numeric:
        raise ValueError(
            f"{path}: {next(iter(numeric))} is settled by log_p_ref and "
            "aligned_given_output; leave it out"
        )
    try:
        instance = _COMPONENTS[pair](
            *components, r, beta=np.float32(1) if beta is None else beta, **numeric
        )
    except ValueError as error:
        message = re.sub(r"\breward\b", lambda _: reward, str(error))
        raise ValueError(f"{path}: {message}") from None
    instance = jax.tree.map(lambda x: jnp.asarray(x, dtype), instance)
    num, width = instance.reward.shape
    prompts = _texts(path, arrays, "prompt", (num,))
    texts = _texts(path, arrays, "output", (num, width))
    return ArraySource(
        instance=instance,
        prompts=prompts or [f"instance {i}" for i in range(num)],
        texts=texts,
        has_beta=beta is not None,
    )


def _rounded(path: str, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert to the precision asked for, refusing what it cannot hold."""
    with np.errstate(over="ignore", under="ignore"):
        cast = array.astype(dtype)
    lost = np.argwhere(np.isinf(cast) & np.isfinite(array))
    if len(lost):
        index = tuple(lost[0].tolist())
        raise ValueError(f"{path}: {name}{list(index)} is {array[index]}; too large for {dtype}")
    return cast


def _texts(path: str, arrays: _Arrays, name: str, shape: tuple[int, ...]) -> Any:
    """Return texts as nested lists, or None where the file has none."""
    if name not in arrays:
        return None
    array = arrays[name]
    if array.ndim == len(shape) - 1 and shape[0] == 1:
        array = array[None]
    if array.shape != shape:
        raise ValueError(f"{path}: {name} has shape {array.shape}; expected {shape}")
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    return array.astype(str).tolist()


def sample(source: Source, num: int, betas: tuple[float, ...]) -> Instance:
    """Return the first instances of a source as a batch, instance i at β number i mod |betas|."""
    num = min(num, source.num)
    tiles = [jax.device_get(source.tile(start)) for start in range(0, num, source.size)]
    batch = jax.tree.map(
        lambda *parts: np.concatenate([np.moveaxis(p, -1, 0) for p in parts])[:num], *tiles
    )
    if betas:
        batch = replace(batch, beta=np.resize(betas, num).astype(batch.beta.dtype))
    return jax.tree.map(jnp.asarray, batch)


def columns(tile: Instance, which: np.ndarray) -> Instance:
    """Return some instances of a tile as a batch on the host."""
    return jax.tree.map(lambda x: np.moveaxis(np.asarray(x)[..., which], -1, 0), tile)


def at_beta(batch: Instance, beta: float | None) -> Instance:
    """Return a batch on the host at another β, if one is given."""
    same: Any = None if beta is None else np.full_like(batch.beta, beta)
    return batch if beta is None else replace(batch, beta=same)


def one(source: Source, index: int, beta: float | None) -> Instance:
    """Return instance `index` of a source as it is in its tile, at another β if one is given."""
    batch = at_beta(source.pick(np.asarray([index])), beta)
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
