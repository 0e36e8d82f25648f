"""KTO's optimum: a sum of saturating functions of each output's probability, over the simplex.

For a given z₀ the expected loss is a constant plus Σ_y c(y) σ(a(y)), with a = β(s - z₀),
s = log(π/p_ref) and c = μ (λ_U P(U) - λ_D P(D)). Outputs with c ≥ 0 get no mass: they only cost.
Among the others mass is worth the same everywhere, -c β σ(a) σ(-a)/π = ν, which says

    f(a) = log σ(a) + log σ(-a) - a/β = κ - log(-c β) + log p_ref,  κ = log ν + z₀.

f is concave; where it falls, the second-order condition holds too, and for β < 1 it falls
everywhere. So κ gives every a, Σ π = 1 then gives z₀ = -log Σ p_ref e^{a/β}, and
z₀ = KL(π‖p_ref) = z₀ + E_π[a]/β is one equation in κ: E_π[a] = 0.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsim.methods.population import Prompt

_BISECTIONS = 80
_NEWTON = 12
_FAR = 1e4  # from any κ of interest, for a given z₀


@lru_cache(maxsize=16)
def solver(
    hyper: tuple[tuple[str, Any], ...],
) -> Callable[[Prompt], tuple[Array, Array]]:
    """Return the compiled solver of a tile of prompts.

    It returns s = log(π/p_ref), -inf where π has no mass, and what is left of the last equation.
    """
    settings = dict(hyper)

    def solve_one(prompt: Prompt) -> tuple[Array, Array]:
        beta, log_ref, point = prompt.beta, prompt.log_ref, settings["reference_point"]
        cost = (
            settings["undesirable_weight"] * prompt.weights[:, 1]
            - settings["desirable_weight"] * prompt.weights[:, 0]
        )
        wanted = prompt.support & (cost < 0)
        offset = log_ref - jnp.log(jnp.where(wanted, -cost, 1.0) * beta)
        # f's peak, tanh(a/2) = -1/β, where there is one; at β = 1 it is approached at -inf.
        peaked = beta > 1
        peak = -2 * jnp.arctanh(1 / jnp.where(peaked, beta, 2.0))
        height = jnp.where(peaked, _f(peak, beta), jnp.where(beta < 1, jnp.inf, 0.0))

        def at(kappa: Array) -> tuple[Array, Array, Array]:
            """Return s, z₀ and E_π[a]."""
            value = kappa + offset
            alive = wanted & (value < height)
            a = _beyond_peak(jnp.where(alive, value, jnp.minimum(height, 0.0) - 1.0), beta)
            log_mass = jnp.where(alive, log_ref + a / beta, -jnp.inf)
            z0 = -jax.nn.logsumexp(log_mass)
            pi = jnp.where(alive, jnp.exp(log_mass + z0), 0.0)
            return jnp.where(alive, z0 + a / beta, -jnp.inf), z0, jnp.sum(pi * a)

        def too_low(kappa: Array) -> Array:
            _, z0, mean = at(kappa)
            return mean > 0 if point is None else z0 < point

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            up = too_low(middle)
            return jnp.where(up, middle, low), jnp.where(up, high, middle)

        level = _f(jnp.zeros_like(beta), beta) - offset  # where an output's a is zero
        low = jnp.min(jnp.where(wanted, level, jnp.inf))
        high = jnp.max(jnp.where(wanted, level, -jnp.inf))
        spread = 0.0 if point is None else _FAR
        low, high = lax.fori_loop(0, _BISECTIONS, halve, (low - spread, high + spread))
        s, z0, mean = at((low + high) / 2)
        return s, jnp.abs(mean) if point is None else jnp.abs(z0 - point)

    return jax.jit(jax.vmap(solve_one))


def _beyond_peak(value: Array, beta: Array) -> Array:
    """Return the a with f(a) = value where f falls, by Newton's method from its right."""
    # f lies below -|a| - a/β, so the root of that is to the right of f's; f is concave, so that
    # Newton's steps from there come down to the root and never pass it.
    left = -value / jnp.where(beta < 1, 1 / beta - 1, 1.0)
    start = jnp.where(value > 0, left, -value / (1 + 1 / beta))

    def newton(_: int, a: Array) -> Array:
        return a + (_f(a, beta) - value) / (jnp.tanh(a / 2) + 1 / beta)

    return lax.fori_loop(0, _NEWTON, newton, start)


def _f(a: Array, beta: Array) -> Array:
    return jax.nn.log_sigmoid(a) + jax.nn.log_sigmoid(-a) - a / beta
