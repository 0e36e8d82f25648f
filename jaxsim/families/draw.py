"""Draw the instance, or the tile of them, that a family assigns to a stream of random words."""

import math

import jax.numpy as jnp
from jaxtyping import Array

from jaxsim.families import samplers
from jaxsim.families.counter import Stream
from jaxsim.families.spec import Components, Family, Rewards, Scalar
from jaxsim.instance import Instance, Masses
from jaxsim.logspace import LOG_ZERO

# What each part of the words is for: the first of eight numbers that a sampler may use.
_MASS, _ALIGNED, _UNALIGNED, _MEMBERS, _REWARD, _ALPHA, _BETA = range(0, 56, 8)


def draw(family: Family, stream: Stream) -> Instance:
    """Return one instance, or a tile [outputs, instances]; all leaves in the family's dtype."""
    dtype = jnp.dtype(family.dtype)
    log_p_a, log_p_u, logit_alpha = _components(family, stream, dtype)
    return Instance(
        log_p_aligned=log_p_a,
        log_p_unaligned=log_p_u,
        reward=_reward(family.reward, family.outputs, stream, dtype, log_p_a, log_p_u),
        logit_alpha=_logit_alpha(family, stream, dtype) if logit_alpha is None else logit_alpha,
        beta=_scalar(family.beta, stream, _BETA, dtype),
    )


def draw_masses(family: Family, stream: Stream) -> Masses:
    """Return what `draw` does, with masses in place of their logs, for `family.has_masses`.

    The reward, logit α and β are the same to the last bit. The log-probabilities that `draw`
    returns are log w - log Σw of these masses, as rounded by the device.
    """
    dtype, n = jnp.dtype(family.dtype), family.outputs
    mass_a, mass_u = _masses(family.components, n, stream)
    return Masses(
        aligned=mass_a,
        unaligned=mass_u,
        reward=_reward(family.reward, n, stream, dtype),
        logit_alpha=_logit_alpha(family, stream, dtype),
        beta=_scalar(family.beta, stream, _BETA, dtype),
    )


def _components(
    family: Family, stream: Stream, dtype: jnp.dtype
) -> tuple[Array, Array, Array | None]:
    """Return log p_A, log p_U, and logit α where the components settle it."""
    spec, n = family.components, family.outputs
    if spec.kind == "zipf":
        return _zipf(spec, n, stream, dtype)
    if family.has_masses:
        mass_a, mass_u = stream.once(lambda: _masses(spec, n, stream))
        return samplers.log_normalise(mass_a), samplers.log_normalise(mass_u), None
    log_a, log_u = stream.once(lambda: _log_masses(spec, n, stream, dtype))
    if spec.kind != "dirichlet":
        u, v = samplers.uniform(stream.words(_MEMBERS, n), jnp.dtype(jnp.float32))
        row = jnp.arange(n).reshape((n,) + (1,) * stream.index.ndim)
        if spec.kind == "sparse":
            in_a, in_u = (u < spec.support) | (row == 0), (v < spec.support) | (row == 1)
        else:
            in_a = ((u < 0.5) | (row == 0)) & (row != 1)
            in_u = ~in_a
        log_a = jnp.where(in_a, log_a, -jnp.inf)
        log_u = jnp.where(in_u, log_u, -jnp.inf)
    return samplers.log_softmax(log_a), samplers.log_softmax(log_u), None


def _masses(spec: Components, n: int, stream: Stream) -> tuple[Array, Array]:
    """Return unnormalised Dirichlet masses of A and U in float32, of concentrations ≥ 1."""
    concentrations = spec.concentration_aligned, spec.concentration_unaligned
    uniforms = samplers.uniform(stream.words(_MASS, n), jnp.dtype(jnp.float32))
    normals = samplers.normal_pair(stream, _ALIGNED, n)
    a, u = (
        samplers.exponential(u) if c == 1 else jnp.exp(samplers.log_gamma_quantile(z, c))
        for c, u, z in zip(concentrations, uniforms, normals, strict=True)
    )
    return a, u


def _log_masses(spec: Components, n: int, stream: Stream, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return unnormalised Dirichlet masses of A and U, in logs: finite for any concentration."""
    concentrations = spec.concentration_aligned, spec.concentration_unaligned
    if dtype == jnp.float32:  # one block serves both components
        uniforms = samplers.uniform(stream.words(_MASS, n), dtype)
        normals = samplers.normal_pair(stream, _ALIGNED, n)
        a, u = (
            samplers.log_exponential(u)
            if c == 1
            else samplers.log_gamma_quantile(z, c) + samplers.gamma_boost(u, c)
            for c, u, z in zip(concentrations, uniforms, normals, strict=True)
        )
        return a, u
    a, u = (
        samplers.log_exponential(samplers.uniform(stream.words(purpose, n), dtype)[0])
        if c == 1
        else samplers.log_gamma_variate(stream, purpose, n, c, dtype)
        for purpose, c in zip((_ALIGNED, _UNALIGNED), concentrations, strict=True)
    )
    return a, u


def _zipf(
    spec: Components, n: int, stream: Stream, dtype: jnp.dtype
) -> tuple[Array, Array, Array | None]:
    """Split a Zipf reference by a random classifier a(y): p_A ∝ p_ref a, α = E_ref[a]."""
    rank = jnp.arange(1, n + 1, dtype=dtype).reshape((n,) + (1,) * stream.index.ndim)
    log_ref = samplers.log_softmax(-spec.zipf_exponent * jnp.log(rank))
    noise = stream.once(lambda: samplers.normal(stream, _MEMBERS, n, dtype))
    score = spec.classifier_mean + spec.classifier_scale * noise
    log_joint_a = log_ref - jnp.logaddexp(0.0, -score)
    log_joint_u = log_ref - jnp.logaddexp(0.0, score)
    log_p_a, log_p_u = samplers.log_softmax(log_joint_a), samplers.log_softmax(log_joint_u)
    # log_joint - log_p is log α (or log(1-α)) on every output: read it off the first.
    return log_p_a, log_p_u, (log_joint_a - log_p_a)[0] - (log_joint_u - log_p_u)[0]


def _reward(spec: Rewards, n: int, stream: Stream, dtype: jnp.dtype, *log_p: Array) -> Array:
    """Return r; log p_A and log p_U are needed where it is correlated with them."""
    if spec.kind == "gaussian":
        r = samplers.normal(stream, _REWARD, n, dtype)
    elif spec.kind == "student_t":
        r = samplers.student_t(stream, _REWARD, n, spec.degrees_of_freedom, dtype)
    elif spec.kind == "bounded":
        r = 2 * samplers.uniform(stream.words(_REWARD, n), dtype)[0] - 1
    elif spec.kind == "binary":
        u = samplers.uniform(stream.words(_REWARD, n), dtype)[0]
        r = (u < spec.probability).astype(dtype)
    elif spec.kind == "correlated":
        log_p_a, log_p_u = log_p
        log_ratio = jnp.where(log_p_a > LOG_ZERO, log_p_a - log_p_u, 0.0)
        noise = samplers.normal(stream, _REWARD, n, dtype)
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


def _logit_alpha(family: Family, stream: Stream, dtype: jnp.dtype) -> Array:
    """Return the log-odds of a scalar in (0, 1): finite, also where that would round to 1."""
    spec, u = family.alpha, samplers.uniform(stream.words(_ALPHA, 1), dtype)[0][0]
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
