"""Random variables from random words, in either dtype, by array operations that XLA vectorises."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from jaxsim.families.counter import Stream

MAX_ATTEMPTS = 16


def uniform(words: tuple[Array, Array], dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return uniforms in (0, 1), resolved finely near zero: two in float32, one, twice, in float64.

    They are below 1 by at least the dtype's epsilon/2, so that log1p(-u) is finite.
    """
    if dtype == jnp.float32:
        return _unit32(words[0]), _unit32(words[1])
    high, low = (word.astype(jnp.float64) for word in words)
    u = jnp.minimum((high + (low + 0.5) * 2.0**-32) * 2.0**-32, 1 - 2.0**-53)
    return u, u


def _unit32(word: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    u = (word.astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-32)
    return jnp.minimum(u, jnp.float32(1 - 2.0**-24))


def normal_pair(words: tuple[Array, Array], dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return two independent standard normals per block (Box and Muller 1958)."""
    if dtype == jnp.float32:
        u, v = _unit32(words[0]), _unit32(words[1])
    else:
        u, v = ((word.astype(dtype) + 0.5) * 2.0**-32 for word in words)
    radius = jnp.sqrt(-2 * jnp.log(u))
    angle = jnp.asarray(2 * jnp.pi, dtype) * v
    return radius * jnp.cos(angle), radius * jnp.sin(angle)


def normal(stream: Stream, purpose: int, count: int, dtype: jnp.dtype) -> Array:
    """Return `count` standard normals, [count] or [count, instances]."""
    half = -(-count // 2)
    first, second = normal_pair(stream.words(purpose, half), dtype)
    return jnp.concatenate([first, second])[:count]


def log_exponential(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return log of a standard exponential variable, -log(1-u), from a uniform."""
    return jnp.log(-jnp.log1p(-u))


def log_gamma_variate(
    stream: Stream, purpose: int, count: int, concentration: float, dtype: jnp.dtype
) -> Array:
    """Return log of `count` Gamma(concentration, 1) variables; exact, and finite down to 0.01.

    Marsaglia and Tsang (2000) at concentration + 1, then log g + log(u)/concentration, which never
    underflows. An output that is rejected draws again from blocks of its own, so that no output
    depends on another.
    """
    d = concentration + 1 - 1 / 3 if concentration < 1 else concentration - 1 / 3
    c = 1 / (9 * d) ** 0.5
    shape = (count, *stream.index.shape)

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, log_g, accepted = state
        x, _ = normal_pair(stream.words(purpose, count, number), dtype)
        u, _ = uniform(stream.words(purpose + 1, count, number), dtype)
        v = (1 + c * x) ** 3
        log_v = jnp.log(jnp.where(v > 0, v, 1.0))
        ok = (v > 0) & (jnp.log(u) < 0.5 * x * x + d * (1 - v + log_v))
        log_g = jnp.where(ok & ~accepted, jnp.log(d) + log_v, log_g)
        return number + 1, log_g, accepted | ok

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        number, _, accepted = state
        return (number < MAX_ATTEMPTS) & ~jnp.all(accepted)

    # Each attempt accepts with probability > 0.95: 16 of them fail once in 10^20 outputs.
    start = (jnp.uint32(0), jnp.zeros(shape, dtype), jnp.zeros(shape, bool))
    _, log_g, _ = lax.while_loop(unfinished, attempt, start)
    if concentration < 1:
        boost, _ = uniform(stream.words(purpose + 2, count), dtype)
        log_g = log_g + jnp.log(boost) / concentration
    return log_g


def log_normalise(log_mass: Float[Array, "outputs *tile"]) -> Float[Array, "outputs *tile"]:
    """Return log-probabilities proportional to e^log_mass."""
    peak = jnp.max(log_mass, axis=0, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(log_mass - peak), axis=0, keepdims=True))
    return log_mass - peak - log_total


def standardise(x: Float[Array, "outputs *tile"]) -> Float[Array, "outputs *tile"]:
    """Return x less its mean over outputs, divided by its standard deviation (0 where constant)."""
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centered * centered, axis=0, keepdims=True))
    return centered / jnp.where(deviation > 0, deviation, 1.0)


def logit(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return log u/(1-u)."""
    return jnp.log(u) - jnp.log1p(-u)


def student_t(
    stream: Stream, purpose: int, count: int, degrees: float, dtype: jnp.dtype
) -> Array:
    """Return Student's t as a normal over the root of a gamma variable."""
    z = normal(stream, purpose, count, dtype)
    log_g = log_gamma_variate(stream, purpose + 1, count, degrees / 2, dtype)
    return z * jnp.exp(-0.5 * (log_g - jnp.log(jnp.asarray(degrees / 2, dtype))))

