"""Draw the instance, or the tile of them, that a family assigns to a stream of random words."""

import math

import jax.numpy as jnp
from jaxtyping import Array

from jaxsim.families import samplers
from jaxsim.families.counter import Stream
from jaxsim.families.spec import Components, Family, Rewards, Scalar
from jaxsim.instance import Instance
from jaxsim.logspace import LOG_ZERO

# What each part of the words is for; a gamma sampler uses three numbers from its own on.
_MASS, _ALIGNED, _UNALIGNED, _MEMBERS, _REWARD, _ALPHA, _BETA = 0, 8, 16, 24, 32, 40, 48


def draw(family: Family, stream: Stream) -> Instance:
    """Return one instance, or a tile [outputs, instances]; all leaves in the family's dtype."""
    dtype = jnp.dtype(family.dtype)
    log_p_a, log_p_u, logit_alpha = _components(family, stream, dtype)
    if logit_alpha is None:
        logit_alpha = _logit(family.alpha, stream, _ALPHA, dtype)
    return Instance(
        log_p_aligned=log_p_a,
        log_p_unaligned=log_p_u,
        reward=_reward(family.reward, family.outputs, stream, log_p_a, log_p_u),
        logit_alpha=logit_alpha,
        beta=_scalar(family.beta, stream, _BETA, dtype),
    )


def _components(
    family: Family, stream: Stream, dtype: jnp.dtype
) -> tuple[Array, Array, Array | None]:
    """Return log p_A, log p_U, and logit α where the components settle it."""
    spec, n = family.components, family.outputs
    if spec.kind == "zipf":
        return _zipf(spec, n, stream, dtype)
    mass_a, mass_u = _log_masses(spec, n, stream, dtype)
    if spec.kind != "dirichlet":
        u, v = samplers.uniform(stream.words(_MEMBERS, n), jnp.dtype(jnp.float32))
        row = jnp.arange(n).reshape((n,) + (1,) * stream.index.ndim)
        if spec.kind == "sparse":
            in_a, in_u = (u < spec.support) | (row == 0), (v < spec.support) | (row == 1)
        else:
            in_a = ((u < 0.5) | (row == 0)) & (row != 1)
            in_u = ~in_a
        mass_a = jnp.where(in_a, mass_a, -jnp.inf)
        mass_u = jnp.where(in_u, mass_u, -jnp.inf)
    return samplers.log_normalise(mass_a), samplers.log_normalise(mass_u), None


def _log_masses(spec: Components, n: int, stream: Stream, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return unnormalised Dirichlet masses of A and U, in logs."""
    if spec.concentration_aligned == spec.concentration_unaligned == 1 and dtype == jnp.float32:
        u, v = samplers.uniform(stream.words(_MASS, n), dtype)  # one block serves both components
        return samplers.log_exponential(u), samplers.log_exponential(v)

    def masses(purpose: int, concentration: float) -> Array:
        if concentration == 1:
            u, _ = samplers.uniform(stream.words(purpose, n), dtype)
            return samplers.log_exponential(u)
        return samplers.log_gamma_variate(stream, purpose, n, concentration, dtype)

    return (
        masses(_ALIGNED, spec.concentration_aligned),
        masses(_UNALIGNED, spec.concentration_unaligned),
    )


def _zipf(
    spec: Components, n: int, stream: Stream, dtype: jnp.dtype
) -> tuple[Array, Array, Array | None]:
    """Split a Zipf reference by a random classifier a(y): p_A ∝ p_ref a, α = E_ref[a]."""
    rank = jnp.arange(1, n + 1, dtype=dtype).reshape((n,) + (1,) * stream.index.ndim)
    log_ref = samplers.log_normalise(-spec.zipf_exponent * jnp.log(rank))
    score = spec.classifier_mean + spec.classifier_scale * samplers.normal(
        stream.words(_MEMBERS, n), dtype
    )
    log_joint_a = log_ref - jnp.logaddexp(0.0, -score)
    log_joint_u = log_ref - jnp.logaddexp(0.0, score)
    log_p_a, log_p_u = samplers.log_normalise(log_joint_a), samplers.log_normalise(log_joint_u)
    # log_joint - log_p is log α (or log(1-α)) on every output: read it off the first.
    return log_p_a, log_p_u, (log_joint_a - log_p_a)[0] - (log_joint_u - log_p_u)[0]


def _reward(spec: Rewards, n: int, stream: Stream, log_p_a: Array, log_p_u: Array) -> Array:
    dtype = log_p_a.dtype
    if spec.kind == "gaussian":
        r = samplers.normal(stream.words(_REWARD, n), dtype)
    elif spec.kind == "student_t":
        r = samplers.student_t(stream, _REWARD, n, spec.degrees_of_freedom, dtype)
    elif spec.kind == "bounded":
        r = 2 * samplers.uniform(stream.words(_REWARD, n), dtype)[0] - 1
    elif spec.kind == "binary":
        u = samplers.uniform(stream.words(_REWARD, n), dtype)[0]
        r = (u < spec.probability).astype(dtype)
    elif spec.kind == "correlated":
        log_ratio = jnp.where(log_p_a > LOG_ZERO, log_p_a - log_p_u, 0.0)
        noise = samplers.normal(stream.words(_REWARD, n), dtype)
        rest = (1 - spec.strength**2) ** 0.5
        r = spec.strength * samplers.standardise(log_ratio) + rest * noise
    else:  # bradley_terry: strengths are exponential variables, utilities their logs
        r = samplers.log_exponential(samplers.uniform(stream.words(_REWARD, n), dtype)[0])
    return spec.scale * r


def _scalar(spec: Scalar, stream: Stream, purpose: int, dtype: jnp.dtype) -> Array:
    u = samplers.uniform(stream.words(purpose, 1), dtype)[0][0]
    if spec.kind == "uniform":
        return spec.low + (spec.high - spec.low) * u
    if spec.kind == "log_uniform":
        low, high = math.log(spec.low), math.log(spec.high)
        return jnp.exp(low + (high - low) * u)
    return _choice((spec.value,) if spec.kind == "fixed" else spec.values, u)


def _logit(spec: Scalar, stream: Stream, purpose: int, dtype: jnp.dtype) -> Array:
    """Return the log-odds of a scalar in (0, 1): finite, also where that would round to 1."""
    u = samplers.uniform(stream.words(purpose, 1), dtype)[0][0]
    if spec.kind == "uniform":
        width = spec.high - spec.low
        return jnp.log(spec.low + width * u) - jnp.log((1 - spec.high) + width * (1 - u))
    if spec.kind == "log_uniform":
        low, high = math.log(spec.low), math.log(spec.high)
        log_p = high - (high - low) * (1 - u)
        return log_p - jnp.log(-jnp.expm1(log_p))
    values = (spec.value,) if spec.kind == "fixed" else spec.values
    return _choice(tuple(math.log(p) - math.log1p(-p) for p in values), u)


def _choice(values: tuple[float, ...], u: Array) -> Array:
    """Return one of `values`, each as likely, by a uniform."""
    # Selects, not a gather: XLA on CPU takes seconds to compile a gather fused with Threefry.
    chosen = jnp.full_like(u, values[0])
    for at, value in enumerate(values[1:], start=1):
        chosen = jnp.where(u * len(values) >= at, jnp.asarray(value, u.dtype), chosen)
    return chosen
