"""Conditions on (p_A, p_U, r) under which TPM(A) ≥ α is certain, each stronger than the next.

Outputs of equal reward count as one. Then each of these implies the one below it:

    monotone likelihood ratio     p_A/p_U does not fall as r rises
    single crossing               p_A - p_U changes sign once at most, from - to +, as r rises
    first-order dominance         P_A(r ≥ t) ≥ P_U(r ≥ t) for all t
    increasing convex order       E_A[(r - t)₊] ≥ E_U[(r - t)₊] for all t
    order of the MGFs             E_A[e^{sr}] ≥ E_U[e^{sr}] for all s > 0: TPM(A) ≥ α at every β
    at this β                     E_A[e^{r/β}] ≥ E_U[e^{r/β}]

None but the last two is necessary, and the paper's hypotheses are on none of these rungs.
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8

from jaxsim.instance import Instance
from jaxsim.logspace import LOG_ZERO, AnyArray, any_output, bits, stored_alike, unit_roundoff
from jaxsim.rounding import EXP, LOG, LOG1P, QUOTIENT, sum_depth
from jaxsim.theorem.verdict import Outcome, allowed, covariances, stored_equal, verdict
from jaxsim.tilting import center, tilt


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The ladder, from its strongest condition to the conclusion itself.

    Each is an `Outcome` (int8) per instance; TIE says that both components give the reward one and
    the same distribution, or, at this β, that TPM(A) = α. If one HOLDS, none below it FAILS.

    Attributes:
        monotone_likelihood_ratio: p_A/p_U does not fall as the reward rises.
        single_crossing: p_A - p_U crosses zero at most once, from below.
        first_order_dominance: P_A(r ≥ t) ≥ P_U(r ≥ t) for all t.
        increasing_convex_order: E_A[(r - t)₊] ≥ E_U[(r - t)₊] for all t.
        mgf_order: Δ ≥ 0 at every β.
        at_this_beta: Δ ≥ 0 at the instance's β.
    """

    monotone_likelihood_ratio: Int8[AnyArray, "..."]
    single_crossing: Int8[AnyArray, "..."]
    first_order_dominance: Int8[AnyArray, "..."]
    increasing_convex_order: Int8[AnyArray, "..."]
    mgf_order: Int8[AnyArray, "..."]
    at_this_beta: Int8[AnyArray, "..."]


RUNGS = tuple(field.name for field in fields(Conditions))


def conditions(instance: Instance) -> Conditions:
    """Decide each rung as far as rounding lets it; `mgf_order` only by its neighbours.

    Sorting takes O(n log n). `jaxsim.conditions` is this, settled exactly where there are values.
    """
    base = center(instance)
    outputs, dtype = base.reward.shape[0], base.reward.dtype
    unit, flushed = unit_roundoff(dtype), 4 * outputs * float(jnp.finfo(dtype).tiny)
    scan_depth = 2 * max(1, (outputs - 1).bit_length())  # additions that a term may go through

    # From the best output down; what lies outside the support comes last.
    key = jnp.where(base.support, -base.reward, jnp.inf)
    columns = (key, base.aligned.log_p, base.unaligned.log_p, base.aligned.p, base.unaligned.p)
    key, log_a, log_u, p_a, p_u = lax.sort(columns, dimension=0, num_keys=1)
    after = jnp.concatenate([key[1:], jnp.full_like(key[:1], jnp.inf)])
    starts = jnp.concatenate([jnp.ones_like(key[:1], bool), key[1:] != key[:-1]])
    ends = (key < jnp.inf) & (key != after)  # the last output of each level of equal rewards
    inner = ends & (after < jnp.inf)  # of each level but the lowest

    # Log-ratio of the masses of each level, where it ends.
    level_a, level_u = _log_mass_of_level(jnp.stack([log_a, log_u]), starts)
    ratio = jnp.where(level_u > LOG_ZERO, level_a - level_u, jnp.inf)
    ratio = jnp.where(level_a > LOG_ZERO, ratio, -jnp.inf)
    size = jnp.abs(level_a) + jnp.abs(level_u)
    merging = jnp.where(starts & ends, 0.0, scan_depth * (2 * size + 2 * (EXP + LOG1P + 1)))
    off = jnp.where(jnp.isinf(ratio), 0.0, allowed(unit * (jnp.abs(ratio) + merging)))
    log_totals = jnp.log(base.unaligned.total / base.aligned.total)
    units = 2 * (EXP + sum_depth(outputs)) + QUOTIENT + LOG * jnp.abs(log_totals)
    lead = ratio + log_totals  # log p_A/p_U, normalised
    lead_off = jnp.where(jnp.isinf(lead), 0.0, off + allowed(unit * (units + jnp.abs(lead))))

    # Of the levels above each: the least ratio, certainly and perhaps, and whether U leads on one.
    bands = jnp.where(ends[None], jnp.stack([ratio + off, ratio - off]), jnp.inf)
    least, perhaps_least = _above(bands, jnp.minimum, jnp.inf)
    led = jnp.stack([ends & (lead < -lead_off), ends & (lead < lead_off), inner])
    u_led, u_perhaps_led, not_top = _above(led, jnp.logical_or, False)

    # P_A(r ≥ t) - P_U(r ≥ t) down to each level but the lowest, and its integral from the top.
    above_a, above_u = _running(jnp.stack([p_a, p_u]), jnp.add)
    survival = above_a - above_u
    p_units = 2 * EXP + sum_depth(outputs) + QUOTIENT
    survival_off = allowed(unit * (p_units + scan_depth + 1) * (above_a + above_u) + flushed)
    gap = jnp.where(inner, after - key, 0.0)
    steps = jnp.stack([survival, survival_off, jnp.abs(survival)]) * gap[None]
    excess, excess_off, excess_size = _running(steps, jnp.add)
    excess_off = excess_off + allowed(unit * (3 + scan_depth) * excess_size + flushed)
    fails_somewhere = (  # for β → 0 the highest level decides, for β → ∞ the means
        any_output(inner & ~not_top & (survival < -survival_off))[0]
        | (excess < -excess_off)[-1]
    )  # fmt: skip

    judged = verdict(covariances(base), tilt(base, instance.beta))
    found = [
        _rung(ends & (ratio - off > least), ends & (ratio + off > perhaps_least)),
        _rung(ends & (lead > lead_off) & u_led, ends & (lead > -lead_off) & u_perhaps_led),
        _rung(inner & (survival < -survival_off), inner & ~(survival >= survival_off)),
        _rung(inner & (excess < -excess_off), inner & ~(excess >= excess_off)),
        jnp.where(fails_somewhere, Outcome.FAILS, Outcome.UNDECIDED),
        judged.conclusion,
    ]
    # A device may take subnormal rewards for equal ones: then nothing is certain but ties.
    subnormal = (jnp.abs(base.reward) < jnp.finfo(dtype).tiny) & (bits(base.reward) != 0)
    hidden = any_output(subnormal)[0]
    codes = [jnp.where(hidden, Outcome.UNDECIDED, code) for code in implied(found, jnp)]
    same = (stored_alike(base.reward, base.support) | stored_equal(base))[0]
    codes = [jnp.where(same, Outcome.TIE, code).astype(jnp.int8) for code in codes]
    return Conditions(**dict(zip(RUNGS, codes, strict=True)))


def implied(codes: list[Any], xp: Any) -> list[Any]:
    """Complete the ladder's codes: what holds implies what is below it, what fails what is above.

    At one β "holds" is strict, and a strict inequality does follow from the fourth rung, as
    e^{r/β} is strictly convex; from the fifth it would not.
    """
    codes = list(codes)
    for at in range(len(codes) - 2, -1, -1):
        codes[at] = xp.where(codes[at + 1] == Outcome.FAILS, Outcome.FAILS, codes[at])
    for at in range(1, len(codes)):
        above = codes[min(at - 1, 3)]
        follows = (above == Outcome.HOLDS) & (codes[at] == Outcome.UNDECIDED)
        codes[at] = xp.where(follows, Outcome.HOLDS, codes[at])
    return codes


def safe_for_any_components(reward: Any) -> Any:
    """Return whether Theorem 2 holds for this reward whatever p_A and p_U are, at every β.

    That is so if and only if the reward takes at most two distinct values: e^{r/β} is then an
    affine function of r. With three there are counterexamples at every β (docs/theorem2.md).

    Args:
        reward: r over the support, [outputs] or [instances, outputs].

    Returns:
        A boolean per instance.

    Example:
        >>> from jaxsim import safe_for_any_components
        >>> print(safe_for_any_components([[0.0, 1.0, 1.0], [0.0, 1.0, 2.0]]))
        [ True False]
    """
    reward = reward if isinstance(reward, jax.Array) else np.asarray(reward)
    if reward.ndim == 0 or reward.shape[-1] == 0:
        raise ValueError(f"reward has shape {reward.shape}; expected [outputs] or more, not empty")
    least, most = reward.min(axis=-1, keepdims=True), reward.max(axis=-1, keepdims=True)
    return ((reward == least) | (reward == most)).all(axis=-1)


def _rung(broken: Array, perhaps_broken: Array) -> Array:
    """Return the code of a condition from where it is broken, and where it may be."""
    code = jnp.where(any_output(broken)[0], Outcome.FAILS, Outcome.UNDECIDED)
    return jnp.where(any_output(perhaps_broken)[0], code, Outcome.HOLDS)


def _running(x: Array, join: Any) -> Array:
    """Return the running sum, or other join, of each array of a stack [arrays, outputs, *tile]."""
    return lax.associative_scan(join, x, axis=1)


def _above(x: Array, join: Any, none: Any) -> Array:
    """Return the join over the rows above each; `none` for the first row."""
    return jnp.concatenate([jnp.full_like(x[:, :1], none), _running(x, join)[:, :-1]], axis=1)


def _log_mass_of_level(log_p: Array, starts: Array) -> Array:
    """Return the log of the sum of p over the rows from the last start on; exact for one row."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        starts, summed = right[0], jnp.logaddexp(left[1], right[1])
        return left[0] | starts, jnp.where(starts, right[1], summed)

    both = jnp.broadcast_to(starts[None], log_p.shape)
    return lax.associative_scan(join, (both, log_p), axis=1)[1]
