"""Random variables from random words, in either dtype, by array operations that XLA vectorises."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from jaxsim.families.counter import Stream
from jaxsim.logspace import total

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
    # 31 bits: a signed conversion is one instruction, an unsigned one is not.
    u = ((word >> 1).astype(jnp.int32).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-31)
    return jnp.minimum(u, jnp.float32(1 - 2.0**-24))


def _signed_unit32(word: UInt32[Array, " *shape"]) -> Float[Array, " *shape"]:
    return lax.bitcast_convert_type(word, jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-32)


# cos(2πx) = Σ c_k x^{2k}, for |x| ≤ 1/4. In float32 those up to x^12 serve, in float64 all.
_COSINE = [(-1) ** k * (2 * math.pi) ** (2 * k) / math.factorial(2 * k) for k in range(13)]


def normal(
    stream: Stream, purpose: int, count: int, dtype: jnp.dtype, attempt: Array | int = 0
) -> Array:
    """Return standard normals [count] (or [count, instances]), two from each block (Box–Muller).

    Outputs i and i + ⌈count/2⌉ are cosine and sine of one block's angle times its radius. The
    radius resolves the tail to 6.6 standard deviations in float32 and 9.4 in float64, which takes
    a block for the radius and one, of the next purpose, for the angle.
    """
    half = -(-count // 2)
    row = jnp.arange(count, dtype=jnp.uint32)
    is_sine = (row >= half).reshape((count,) + (1,) * stream.index.ndim)
    block = jnp.where(row >= half, row - half, row)
    words = stream.words(purpose, block, attempt)
    if dtype == jnp.float32:
        tail, turn = _unit32(words[0]), _signed_unit32(words[1])
    else:
        tail, _ = uniform(words, dtype)
        turn = uniform(stream.words(purpose + 1, block, attempt), dtype)[0] - 0.5
    shift = jnp.where(is_sine, 0.25, 0.0).astype(dtype)
    return jnp.sqrt(-2 * jnp.log(tail)) * cosine(turn - shift)


def normal_pair(stream: Stream, purpose: int, count: int) -> tuple[Array, Array]:
    """Return two arrays of float32 standard normals, cosine and sine of the same blocks."""
    words = stream.words(purpose, count)
    radius, turn = jnp.sqrt(-2 * jnp.log(_unit32(words[0]))), _signed_unit32(words[1])
    return radius * cosine(turn), radius * cosine(turn - jnp.float32(0.25))


def cosine(turn: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Return cos(2π turn) for |turn| ≤ 1."""
    halves = jnp.round(2 * turn)
    x = turn - 0.5 * halves  # exact, |x| ≤ 1/4
    needed = 7 if turn.dtype == jnp.float32 else len(_COSINE)
    value = _horner(_COSINE[:needed], x * x)
    return jnp.where(jnp.abs(halves) == 1, -value, value)


def _horner(coefficients: Sequence[float], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + x * value
    return value


def exponential(u: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Return a standard exponential variable, -log(1-u), from a uniform; in float32 ≥ 2^-32."""
    return -jnp.log1p(-u)


def log_exponential(u: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Return log of a standard exponential variable."""
    return jnp.log(exponential(u))


def log_gamma_variate(
    stream: Stream, purpose: int, count: int, concentration: float, dtype: jnp.dtype
) -> Array:
    """Return log of `count` Gamma(concentration, 1) variables, finite down to concentration 0.01.

    In float32 by inversion, in float64 by rejection. Takes four purposes.
    """
    if dtype == jnp.float32:
        log_g = log_gamma_quantile(normal(stream, purpose, count, dtype), concentration)
    else:
        log_g = _log_gamma_by_rejection(stream, purpose, count, concentration, dtype)
    u, _ = uniform(stream.words(purpose + 3, count), dtype)
    return log_g + gamma_boost(u, concentration)


def gamma_boost(u: Float[Array, " *shape"], concentration: float) -> Array:
    """Return log(u)/a, which takes the log of a Gamma(a+1) variable to one of Gamma(a), if a < 1.

    Zero else. The product itself would underflow for small a.
    """
    return jnp.log(u) / concentration if concentration < 1 else jnp.zeros_like(u)


# Where the quantile function of a log-gamma variable is split, in standard deviations of the
# normal variable that it is a function of; beyond float32's last normal variable at the ends.
_CUTS = (-6.8, -2.0, 2.0, 6.8)
_DEGREE = 12


def log_gamma_quantile(z: Float[Array, " *shape"], concentration: float) -> Float[Array, " *shape"]:
    """Return log of Gamma(a)'s quantile at the probability Φ(z), a = concentration, plus 1 if < 1.

    Three polynomials, fitted to SciPy's inverse of the incomplete gamma function: within 1e-7 of
    it, less than float32 resolves. |z| ≤ 6.8.
    """
    low, high = z < _CUTS[1], z > _CUTS[2]

    def of_piece(values: Sequence[float]) -> Array:
        first, middle, last = (jnp.asarray(value, z.dtype) for value in values)
        return jnp.where(low, first, jnp.where(high, last, middle))

    ends = list(pairwise(_CUTS))
    x = (z - of_piece([(a + b) / 2 for a, b in ends])) * of_piece([2 / (b - a) for a, b in ends])
    coefficients = list(zip(*_log_gamma_polynomials(concentration), strict=True))
    value = of_piece(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = of_piece(coefficient) + x * value
    return value


@cache
def _log_gamma_polynomials(concentration: float) -> list[list[float]]:
    """Fit each piece by interpolation at Chebyshev's points."""
    from numpy.polynomial import chebyshev
    from scipy.special import gammainccinv, gammaincinv, ndtr

    shape = concentration + 1 if concentration < 1 else concentration

    def quantile(z: np.ndarray) -> np.ndarray:
        lower, upper = gammaincinv(shape, ndtr(z)), gammainccinv(shape, ndtr(-z))
        return np.log(np.where(z < 0, lower, upper))

    pieces = []
    nodes = chebyshev.chebpts1(_DEGREE + 1)
    for a, b in pairwise(_CUTS):
        values = quantile((a + b) / 2 + (b - a) / 2 * nodes)
        fit = chebyshev.chebfit(nodes, values, _DEGREE)
        pieces.append(chebyshev.cheb2poly(fit).tolist())
    return pieces


def _log_gamma_by_rejection(
    stream: Stream, purpose: int, count: int, concentration: float, dtype: jnp.dtype
) -> Array:
    """Draw log of Gamma(a) variables, a = concentration, plus 1 if < 1: Marsaglia and Tsang (2000).

    An output that is rejected draws again from blocks of its own, so that no output depends on
    another.
    """
    d = concentration + 1 - 1 / 3 if concentration < 1 else concentration - 1 / 3
    c = 1 / (9 * d) ** 0.5
    shape = (count, *stream.index.shape)

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, log_g, accepted = state
        x = normal(stream, purpose, count, dtype, number)
        u, _ = uniform(stream.words(purpose + 2, count, number), dtype)
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
    return log_g


def log_softmax(log_mass: Float[Array, " outputs *tile"]) -> Float[Array, " outputs *tile"]:
    """Return log-probabilities proportional to e^log_mass."""
    peak = jnp.max(log_mass, axis=0, keepdims=True)
    return log_mass - peak - jnp.log(total(jnp.exp(log_mass - peak)))


def log_normalise(mass: Float[Array, " outputs *tile"]) -> Float[Array, " outputs *tile"]:
    """Return log-probabilities proportional to positive masses."""
    return jnp.log(mass) - jnp.log(total(mass))


def standardise(x: Float[Array, " outputs *tile"]) -> Float[Array, " outputs *tile"]:
    """Return x less its mean over outputs, divided by its standard deviation (0 where constant)."""
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centered * centered, axis=0, keepdims=True))
    return centered / jnp.where(deviation > 0, deviation, 1.0)


def student_t(stream: Stream, purpose: int, count: int, degrees: float, dtype: jnp.dtype) -> Array:
    """Return Student's t as a normal over the root of a gamma variable. Takes six purposes."""
    z = normal(stream, purpose, count, dtype)
    log_g = log_gamma_variate(stream, purpose + 2, count, degrees / 2, dtype)
    return z * jnp.exp(-0.5 * (log_g - jnp.log(jnp.asarray(degrees / 2, dtype))))
