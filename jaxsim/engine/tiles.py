"""Draw instances of a family as a batch: whole tiles, of which what was asked for is kept."""

import jax
import jax.numpy as jnp

from jaxsim.families.counter import key_words
from jaxsim.families.spec import Family
from jaxsim.instance import Instance
from jaxsim.sources import draw_tile, index_words, tile_size


def sample_instances(key: jax.Array, family: Family, num: int, *, start: int = 0) -> Instance:
    """Draw instances start … start + num - 1 of a family; instance i depends on (key, i) alone.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        family: the family's description.
        num: how many, at least 1.
        start: index of the first; 0 ≤ start and start + num ≤ 2^64, in 32-bit mode too.

    Returns:
        A batch with leading axis `num`.

    Raises:
        ValueError: where num or start is out of range, or float64 is asked for in 32-bit mode.
        TypeError: where the key is not a typed threefry key.

    Example:
        >>> import jax
        >>> from jaxsim import Family, sample_instances
        >>> batch = sample_instances(jax.random.key(0), Family(outputs=4), 3, start=2**33)
        >>> batch.reward.shape
        (3, 4)
    """
    if num < 1:
        raise ValueError(f"num is {num}; expected at least 1")
    if not 0 <= start <= 2**64 - num:
        raise ValueError(f"start is {start}; expected 0 <= start and start + num <= 2**64")
    require_dtype(family.dtype)
    words, size = key_words(key), tile_size(family.outputs)
    skipped = start % size
    begins = range(start - skipped, start + num, size)
    tiles = [draw_tile(family, words, index_words(begin)) for begin in begins]
    return jax.tree.map(
        lambda *parts: jnp.concatenate([jnp.moveaxis(p, -1, 0) for p in parts])[
            skipped : skipped + num
        ],
        *tiles,
    )


def require_dtype(dtype: str) -> None:
    """Refuse float64 where JAX's 64-bit mode is off, instead of silently computing in float32."""
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "dtype is float64, but JAX's 64-bit mode is off; set JAX_ENABLE_X64=1 or call "
            "jax.config.update('jax_enable_x64', True)"
        )
