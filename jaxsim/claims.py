"""The paper's claims, each judged on tiles of instances and summed, and the shrinking of a failure.

A claim is a function of a `Case` that says, per instance, whether it applies, by how much it holds
(`margin`, negative where it fails) and whether rounding leaves it open. Sums over tiles are plain
numbers, so that they can be combined in any order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsim.decoding import take_back_logits
from jaxsim.logspace import LOG_ZERO, AnyArray, finite_log, first_where, total, unit_roundoff
from jaxsim.theorem.verdict import Covariances, Outcome, Verdict, verdict
from jaxsim.tilting import (
    Centered,
    Evaluation,
    Optimum,
    Tilt,
    evaluation,
    log_optimum,
    log_reference,
    objective_at,
    optimum,
    tilt,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Case:
    """A tile of instances with everything that claims are judged by."""

    tilt: Tilt
    optimum: Optimum
    evaluation: Evaluation
    verdict: Verdict
    counted: Bool[Array, " instances"]  # not padding, and all results finite


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A claim on each instance of a tile."""

    applies: Bool[Array, " instances"]
    margin: Float[Array, " instances"]
    failed: Bool[Array, " instances"]
    undecided: Bool[Array, " instances"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Tally:
    """A claim's sums over a tile."""

    tried: Int[AnyArray, ""]
    failed: Int[AnyArray, ""]
    undecided: Int[AnyArray, ""]
    worst_margin: Float[AnyArray, ""]
    worst_row: Int[AnyArray, ""]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper and how it is judged.

    Attributes:
        name: its key in tables and files.
        statement: what the paper says, in the paper's symbols.
        margin_is: what the margin measures, with its unit; below zero the claim fails.
        judge: the judgement on a tile; None for the one that needs descent.
        everywhere: judged on all instances rather than on the audited part.
    """

    name: str
    statement: str
    margin_is: str
    judge: Callable[[Case], Judgement] | None
    everywhere: bool


def case(
    base: Centered, hypotheses: Covariances, beta: Float[Array, " instances"], real: Array
) -> Case:
    """Evaluate a tile at one β for all claims; `real` marks the rows that are not padding."""
    x = tilt(base, beta)
    best = optimum(x)
    results = evaluation(x, best)
    finite = jnp.all(jnp.stack([jnp.isfinite(f) for f in jax.tree.leaves(results)]), axis=0)
    return Case(
        tilt=x,
        optimum=best,
        evaluation=results,
        verdict=verdict(hypotheses, x),
        counted=real & finite,
    )


def tally(judgement: Judgement) -> Tally:
    """Sum a judgement over its tile; a margin that is nan is the worst there is."""
    margin = jnp.where(jnp.isnan(judgement.margin), -jnp.inf, judgement.margin)
    margin = jnp.where(judgement.applies, margin, jnp.inf)
    worst = jnp.min(margin)
    return Tally(
        tried=jnp.sum(judgement.applies),
        failed=jnp.sum(judgement.applies & judgement.failed),
        undecided=jnp.sum(judgement.applies & judgement.undecided),
        worst_margin=worst,
        worst_row=jnp.sum(jnp.where(first_where(margin == worst), jnp.arange(margin.size), 0)),
    )


def _within(c: Case, error: Array, allowed: Array) -> Judgement:
    """Judge an identity: it fails where the error exceeds what rounding allows."""
    margin = allowed - error
    return Judgement(
        applies=c.counted,
        margin=margin,
        failed=~(margin >= 0),
        undecided=jnp.zeros_like(c.counted),
    )


def _rounding(c: Case) -> Array:
    """What rounding may do to a log-probability of p*, and so to a sum of relative errors."""
    size = jnp.max(jnp.abs(c.tilt.t), axis=0) + jnp.abs(c.tilt.log_z_centered[0])
    for part in (c.tilt.base.aligned, c.tilt.base.unaligned):
        information = jnp.where(part.log_p > LOG_ZERO, jnp.abs(part.log_p), 0.0)
        size = jnp.maximum(size, jnp.max(information, axis=0))
    return 32 * unit_roundoff(c.tilt.t.dtype) * (1.0 + size + jnp.abs(c.tilt.base.logit_alpha[0]))


def _total_variation(c: Case, log_p: Array, log_q: Array) -> Array:
    difference = jnp.abs(jnp.exp(finite_log(log_p)) - jnp.exp(finite_log(log_q)))
    return 0.5 * total(jnp.where(c.tilt.base.support, difference, 0.0))[0]


def _softmax_log(logits: Array) -> Array:
    return jax.nn.log_softmax(finite_log(logits), axis=0)


def _optimum_at(c: Case, factor: float) -> Array:
    """Return log of the optimum at β/factor, by a plain softmax of log p_ref + factor·r/β."""
    return _softmax_log(finite_log(log_reference(c.tilt.base)) + factor * c.tilt.t)


def _closed_form(c: Case) -> Judgement:
    """L(p*) by its definition, against the reference and the optima at 2β and β/2.

    And p* is stationary: r/β - log(p*/p_ref) is log Z on every output, by eq. (1)'s gradient.
    """
    log_p, log_ref = log_optimum(c.tilt, c.optimum), log_reference(c.tilt.base)
    best = objective_at(c.tilt.base, c.tilt.beta, log_p)[0]
    rivals = [log_ref, _optimum_at(c, 0.5), _optimum_at(c, 2.0)]
    values = [objective_at(c.tilt.base, c.tilt.beta, q)[0] for q in rivals]
    lead = jnp.stack([best - value for value in values]).min(axis=0) / c.tilt.beta[0]
    slope = c.tilt.t - (finite_log(log_p) - finite_log(log_ref)) - c.tilt.log_z_centered
    slope = jnp.where(c.tilt.base.support, jnp.abs(slope), 0.0)
    error = total(jnp.exp(finite_log(log_p)) * slope)[0]
    return _within(c, jnp.maximum(error, -lead), _rounding(c))


def _lemma_1(c: Case) -> Judgement:
    """The mixture with Lemma 1's weights against a plain softmax of log p_ref + r/β."""
    base, ratio = c.tilt.base, c.optimum.log_ratio
    mixed = jnp.logaddexp(
        base.log_alpha + ratio + base.aligned.log_p - jnp.log(base.aligned.total),
        base.log_not_alpha + ratio + base.unaligned.log_p - jnp.log(base.unaligned.total),
    )
    return _within(c, _total_variation(c, mixed, _optimum_at(c, 1.0)), _rounding(c))


def _supports(c: Case) -> Judgement:
    base, log_p = c.tilt.base, log_optimum(c.tilt, c.optimum)
    in_reference = jnp.maximum(base.aligned.log_p, base.unaligned.log_p) > LOG_ZERO
    changed = (jnp.isfinite(log_p) != in_reference).astype(log_p.dtype)
    margin = -total(changed)[0]
    return Judgement(
        applies=c.counted,
        margin=margin,
        failed=margin < 0,
        undecided=jnp.zeros_like(c.counted),
    )


def _strict(c: Case) -> Judgement:
    """Both logs are finite, the smaller below zero, and the masses sum to one."""
    log_tpm_a, log_tpm_u = c.evaluation.log_tpm_aligned, c.evaluation.log_tpm_unaligned
    smaller = jnp.minimum(log_tpm_a, log_tpm_u)
    excess = jnp.abs((jnp.exp(log_tpm_a) - 0.5) + (jnp.exp(log_tpm_u) - 0.5))
    return Judgement(
        applies=c.counted,
        margin=jnp.exp(smaller),
        failed=~(jnp.isfinite(smaller) & (smaller < 0) & (excess <= _rounding(c))),
        undecided=jnp.zeros_like(c.counted),
    )


def _theorem_2(c: Case) -> Judgement:
    return Judgement(
        applies=c.counted & c.verdict.hypotheses_hold,
        margin=c.verdict.log_odds_shift,
        failed=c.verdict.conclusion == Outcome.FAILS,
        undecided=c.verdict.conclusion == Outcome.UNDECIDED,
    )


def _correlation(c: Case) -> Judgement:
    """Cov(e^{r/β}, p_A) > 0 > Cov(e^{r/β}, p_U): E_A e^t > mean e^t > E_U e^t, in logs."""
    x = c.tilt
    count = total(x.base.support.astype(x.t.dtype))[0]
    masked = jnp.where(x.base.support, x.t, LOG_ZERO)
    log_mean = jax.nn.logsumexp(masked, axis=0) - jnp.log(count)
    margin = jnp.minimum(x.aligned.cumulant[0] - log_mean, log_mean - x.unaligned.cumulant[0])
    slack = _rounding(c)
    return Judgement(
        applies=c.counted & c.verdict.hypotheses_hold,
        margin=margin,
        failed=margin < -slack,
        undecided=jnp.abs(margin) <= slack,
    )


def _shrinkage(c: Case) -> Judgement:
    """The factor p*/p_ref is e^{r/β}/Z, not e^{r/β}: they differ by |log Z| on every output."""
    margin = -jnp.abs(c.evaluation.log_z)
    slack = _rounding(c) - 8 * unit_roundoff(margin.dtype) * margin
    return Judgement(
        applies=c.counted,
        margin=margin,
        failed=margin < -slack,
        undecided=jnp.zeros_like(c.counted),
    )


def _take_back(c: Case) -> Judgement:
    """Take-back logits recover the reference at (0, -1) and the optimum at β/2 at (2, 1)."""
    log_p, log_ref = log_optimum(c.tilt, c.optimum), log_reference(c.tilt.base)
    back = _softmax_log(take_back_logits(log_p, log_ref, a=0.0, b=-1.0))
    further = _softmax_log(take_back_logits(log_p, log_ref, a=2.0, b=1.0))
    error = jnp.maximum(
        _total_variation(c, back, log_ref),
        _total_variation(c, further, _optimum_at(c, 2.0)),
    )
    return _within(c, error, 4 * _rounding(c))


def _not_expunged(c: Case) -> Judgement:
    """Log TPM(U) against its sharp lower bound (1-α)/(1-α+α e^R), R = (max r - min r)/β."""
    bound = jax.nn.log_sigmoid(-(c.tilt.base.logit_alpha[0] + c.tilt.spread[0]))
    margin = c.evaluation.log_tpm_unaligned - bound + _rounding(c)
    kept = jnp.all(jnp.isfinite(c.optimum.log_ratio) | ~c.tilt.base.support, axis=0)
    return Judgement(
        applies=c.counted,
        margin=margin,
        failed=~(margin >= 0) | ~kept,
        undecided=jnp.zeros_like(c.counted),
    )


CLAIMS = (
    Claim(
        name="closed_form_optimal",
        statement="p* = p_ref e^{r/β} / Z maximises eq. (1)",
        margin_is="rounding allowance less E|log(p*/p_ref) - r/β + log Z| or a rival's lead, nats",
        judge=_closed_form,
        everywhere=False,
    ),
    Claim(
        name="lemma_1",
        statement="p* = α_A(y) p_A + α_U(y) p_U (Lemma 1)",
        margin_is="rounding allowance less total variation",
        judge=_lemma_1,
        everywhere=False,
    ),
    Claim(
        name="equal_supports",
        statement="p* and p_ref have the same support",
        margin_is="less the outputs gained or lost",
        judge=_supports,
        everywhere=False,
    ),
    Claim(
        name="tpm_strictly_inside",
        statement="TPM(A) < 1 and TPM(U) > 0 (Theorem 2, strict part)",
        margin_is="least TPM of either part",
        judge=_strict,
        everywhere=True,
    ),
    Claim(
        name="theorem_2",
        statement="Cov(r, p_A) > 0 > Cov(r, p_U) implies TPM(A) ≥ α (Theorem 2)",
        margin_is="least log-odds shift Δ, nats",
        judge=_theorem_2,
        everywhere=True,
    ),
    Claim(
        name="correlation_kept",
        statement="the correlations keep their signs under e^{r/β} (proof of Theorem 2)",
        margin_is="least log ratio of means of e^{r/β}, nats",
        judge=_correlation,
        everywhere=False,
    ),
    Claim(
        name="shrunk_by_exp_reward",
        statement="p*(y)/p_ref(y) = e^{r/β} (section 1.4)",
        margin_is="-|log Z|, nats",
        judge=_shrinkage,
        everywhere=False,
    ),
    Claim(
        name="take_back_logits",
        statement="a·log p* - b·log p_ref undoes or repeats the tuning (section 1.4)",
        margin_is="rounding allowance less total variation",
        judge=_take_back,
        everywhere=False,
    ),
    Claim(
        name="descent_reaches_optimum",
        statement="optimising eq. (1) directly reaches the closed form",
        margin_is="tolerance less KL(π‖p*), nats",
        judge=None,
        everywhere=False,
    ),
    Claim(
        name="unaligned_stays_possible",
        statement="outputs of U are never expunged: TPM(U) ≥ (1-α)/(1-α+α e^{range r/β})",
        margin_is="log TPM(U) less its bound, plus rounding allowance, nats",
        judge=_not_expunged,
        everywhere=False,
    ),
)
