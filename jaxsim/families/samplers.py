"""Random variables from random words, in either dtype, by array operations that XLA vectorises."""

import math

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


def _unit32(word: UInt32[Array, " *shape"]) -> Float[Array, " *shape"]:
    u = (word.astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-32)
    return jnp.minimum(u, jnp.float32(1 - 2.0**-24))


# Inverse normal distribution function, Wichura (1988), Algorithm AS 241: numerators and
# denominators for the centre and the tail (PPND7, single precision), and the far tail too (PPND16,
# double).
_PPND7 = (
    (
        (3.3871327179, 50.434271938, 159.29113202, 59.109374720),
        (1.0, 17.895169469, 78.757757664, 67.187563600),
    ),
    (
        (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103),
        (1.0, 0.73700164250, 0.12021132975),
    ),
)
_PPND16 = (
    ((3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
      45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727),
     (1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
      21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610)),
    ((1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550,
      3.64784832476320460504, 1.27045825245236838258, 0.241780725177450611770,
      0.0227238449892691845833, 7.74545014278341407640e-4),
     (1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
      0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4,
      1.05075007164441684324e-9)),
    ((6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580,
      0.296560571828504891230, 0.0265321895265761230930, 1.24266094738807843860e-3,
      2.71155556874348757815e-5, 2.01033439929228813265e-7),
     (1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525,
      7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
      2.04426310338993978564e-15)),
)  # fmt: skip


def inverse_normal(tail: Float[Array, " *shape"], negative: Array) -> Float[Array, " *shape"]:
    """Return the standard normal deviate whose smaller tail has probability `tail` in (0, 1/2]."""
    pieces = _PPND7 if tail.dtype == jnp.float32 else _PPND16
    q = 0.5 - tail
    depth = jnp.sqrt(-jnp.log(tail))
    arguments = (0.180625 - q * q, depth - 1.6, depth - 5.0)
    chosen, parts = q <= 0.425, []
    for side in (0, 1):
        value = _horner(pieces[0][side], arguments[0])
        outer = _horner(pieces[1][side], arguments[1])
        if len(pieces) == 3:
            outer = jnp.where(depth <= 5.0, outer, _horner(pieces[2][side], arguments[2]))
        parts.append(jnp.where(chosen, value, outer))
    z = jnp.where(chosen, q, 1.0) * parts[0] / parts[1]
    return jnp.where(negative, -z, z)


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + x * value
    return value


def normal(words: tuple[Array, Array], dtype: jnp.dtype) -> Array:
    """Return standard normals by inversion, one per block: float32 uses the first word alone.

    The word's top bit is the sign; the others, folded towards zero, are the tail's probability.
    """
    negative = words[0] >= jnp.uint32(1 << 31)
    high, low = (jnp.where(negative, ~word, word).astype(dtype) for word in words)
    if dtype == jnp.float32:
        return inverse_normal((high + 0.5) * jnp.float32(2.0**-32), negative)
    return inverse_normal((high + (low + 0.5) * 2.0**-32) * 2.0**-32, negative)


def log_exponential(u: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
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
        x = normal(stream.words(purpose, count, number), dtype)
        u, _ = uniform(stream.words(purpose + 1, count, number), dtype)
        v = (1 + c * x) ** 3
        log_v = jnp.log(jnp.where(v > 0, v, 1.0))
        ok = (v > 0) & (jnp.log(u) < 0.5 * x * x + d * (1 - v + log_v))
        log_g = jnp.where(ok & ~accepted, math.log(d) + log_v, log_g)
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


def log_normalise(log_mass: Float[Array, " outputs *tile"]) -> Float[Array, " outputs *tile"]:
    """Return log-probabilities proportional to e^log_mass."""
    peak = jnp.max(log_mass, axis=0, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(log_mass - peak), axis=0, keepdims=True))
    return log_mass - peak - log_total


def standardise(x: Float[Array, " outputs *tile"]) -> Float[Array, " outputs *tile"]:
    """Return x less its mean over outputs, divided by its standard deviation (0 where constant)."""
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centered * centered, axis=0, keepdims=True))
    return centered / jnp.where(deviation > 0, deviation, 1.0)


def student_t(stream: Stream, purpose: int, count: int, degrees: float, dtype: jnp.dtype) -> Array:
    """Return Student's t as a normal over the root of a gamma variable."""
    z = normal(stream.words(purpose, count), dtype)
    log_g = log_gamma_variate(stream, purpose + 1, count, degrees / 2, dtype)
    return z * jnp.exp(-0.5 * (log_g - jnp.log(jnp.asarray(degrees / 2, dtype))))
