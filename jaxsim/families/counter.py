"""Random numbers by counter: word w of instance i is a function of (key, i, w) and nothing else.

Threefry-2x32 (Salmon et al. 2011), written as array operations so that XLA fuses it with what
consumes the words. The block cipher is that of `jax.extend.random.threefry_2x32`. An instance has a
64-bit index in two uint32, whether or not JAX's 64-bit mode is on: the high word is folded into the
key, the low word and the number of the block are the counter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

T = TypeVar("T")

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_PURPOSE_BLOCKS = 1 << 24  # blocks set apart per purpose: 2^20 outputs, 16 attempts each


def threefry_2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Encrypt a two-word counter with a two-word key: 20 rounds, all arrays uint32."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for step in range(5):
        for bits in _ROTATIONS[step % 2]:
            x = x + y
            y = ((y << jnp.uint32(bits)) | (y >> jnp.uint32(32 - bits))) ^ x
        x = x + schedule[(step + 1) % 3]
        y = y + schedule[(step + 2) % 3] + jnp.uint32(step + 1)
    return x, y


def key_words(key: jax.Array) -> UInt32[Array, "2"]:
    """Return the two words of a typed threefry key.

    Raises:
        TypeError: for a raw uint32 key or another implementation's.
    """
    if not jnp.issubdtype(getattr(key, "dtype", np.dtype(bool)), jax.dtypes.prng_key):
        raise TypeError("key: expected a typed key, as jax.random.key(0) makes")
    words = jax.random.key_data(key)
    if words.shape != (2,):
        raise TypeError(f"key: expected one threefry2x32 key, got {jax.random.key_impl(key)!r}")
    return words


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Stream:
    """The random words of one instance, or of a tile of them.

    Attributes:
        key: two words: the key with the high word of the index folded in. One for the whole tile,
            which makes a third of the cipher's work disappear.
        index: the low word of the instance's index, [] or [instances].
    """

    key: tuple[Array, Array]
    index: Array

    @classmethod
    def of(cls, words: UInt32[Array, "2"], high: UInt32[Array, ""], low: Array) -> "Stream":
        """Return the stream of instances high·2^32 + low under a key."""
        key = threefry_2x32((words[0], words[1]), (high, jnp.uint32(0xFFFFFFFF)))
        return cls(key=key, index=low)

    def words(
        self, purpose: int, block: UInt32[Array, " count"] | int, attempt: Array | int = 0
    ) -> tuple[Array, Array]:
        """Return both words of some blocks set apart for `purpose`, [count] or [count, instances].

        Args:
            purpose: what the words are for; no two uses of a stream share one.
            block: numbers of blocks, below 2^20; an int for the first so many.
            attempt: 0, 1, … of a rejection sampler lie 2^20 blocks apart.
        """
        if isinstance(block, int):
            block = jnp.arange(block, dtype=jnp.uint32)
        row = block.reshape(block.shape + (1,) * self.index.ndim)
        row = row + jnp.uint32(purpose * _PURPOSE_BLOCKS)
        row = row + jnp.asarray(attempt, jnp.uint32) * jnp.uint32(1 << 20)
        shape = (*block.shape, *self.index.shape)
        return threefry_2x32(
            self.key, (jnp.broadcast_to(self.index, shape), jnp.broadcast_to(row, shape))
        )

    def once(self, drawn: Callable[[], T]) -> T:
        """Return what `drawn` draws from this stream, stored before anything uses it.

        XLA draws anew for each consumer of a draw, which costs more than all else, and may round
        differently in each. It cannot look into a branch; which one is taken is known only at run
        time.
        """
        shapes = jax.eval_shape(drawn)
        nothing = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return lax.cond((self.key[0] | jnp.uint32(1)) > 0, drawn, nothing)
