"""Where training on unlimited feedback comes to rest: each method's equations over all outputs.

Functions of one prompt with n outputs. A policy is log π = log p_ref + s, up to a constant. For a
loss the equations are that its expectation has no gradient; for a policy-gradient method, whose
expectation is over the policy itself, that the expected gradient is zero. Either is written as a
rate R(s) at which s would move, which is zero at rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsim.feedback import Feedback
from jaxsim.methods import listwise, pairwise, policy_gradient

Vector = Float[Array, " outputs"]
Residual = Callable[[Vector], Vector]

_PADDING = -1.0  # log π and log p_ref outside the support: any number whose loss is finite


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt in float64, or a batch of them in NumPy arrays with one leading axis.

    Attributes:
        log_ref: log p_ref on the support, [outputs].
        support: where p_ref has mass.
        reward: r.
        beta: β.
        sampling: μ; where it is the policy itself, where that starts: p_ref.
        compared: which pairs may be drawn.
        weights: the feedback as an array, given or exact; None for methods that take none.
    """

    log_ref: Any
    support: Any
    reward: Any
    beta: Any
    sampling: Any
    compared: Any
    weights: Any

    def policy(self, s: Vector) -> Vector:
        """Return log π, normalised, on the support."""
        return self.normalised(self.log_ref + s)

    def normalised(self, logits: Vector) -> Vector:
        """Return log probabilities from logits on the support."""
        shown = jnp.where(self.support, logits, -jnp.inf)
        return jnp.where(self.support, logits - jax.nn.logsumexp(shown), _PADDING)

    def probabilities(self, log_p: Vector) -> Vector:
        """Return probabilities, zero outside the support."""
        return jnp.where(self.support, jnp.exp(log_p), 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A preference-tuning method.

    Attributes:
        kind: of feedback it learns from: "pairs", "rankings", "thumbs", or "samples" of the policy
            with their rewards.
        function: a loss of (policy, reference) log-probabilities [..., k] of each list of outputs;
            of "samples" an objective of (policy, old, reference, rewards, weights) [..., group].
        solver: "newton", or another where that fails: "margin" for kinks, "saturating".
        ratios: whether the loss depends on differences of log-ratios alone.
        convex: whether the expected loss is convex in s.
        attained: when a minimum is attained: "always", when wins are strongly "connected", or when
            every output "wins".
        scaled: whether it is β s that the feedback fixes; steps are taken in that.
        net: the weight with which each pair pulls its outputs apart, of (weights, hyperparameters);
            None where it is the weight itself.
        defaults: of hyperparameters, and the names of all there are.
    """

    kind: str
    function: Callable[..., Array]
    solver: str = "newton"
    ratios: bool = True
    convex: bool = True
    attained: str = "always"
    scaled: bool = True
    net: Callable[[Any, dict[str, Any]], Any] = lambda weights, hyper: None
    defaults: dict[str, Any] = field(default_factory=dict)


def of_pairs(loss: Callable[..., Any]) -> Callable[..., Array]:
    """Return a loss of lists of two from one of chosen and rejected, with the reference."""
    return lambda p, q, **h: loss(p[..., 0], p[..., 1], q[..., 0], q[..., 1], **h)


def _without_reference(loss: Callable[..., Any]) -> Callable[..., Array]:
    return lambda p, q, **h: loss(p[..., 0], p[..., 1], **h)


def _reward_model(p: Array, q: Array, *, beta: Any) -> Array:
    scores = beta * (p - q)  # the reward whose optimum of eq. (1) is the policy
    return pairwise.reward_model_loss(scores[..., 0], scores[..., 1])


def _lipo(p: Array, q: Array, *, beta: Any) -> Array:
    places = jnp.arange(p.shape[-1])[::-1]  # the last of a ranking is graded 0
    return listwise.lipo_loss(p, q, jnp.broadcast_to(places, p.shape), beta=beta)


def _kto(p: Array, q: Array, **h: Any) -> Array:
    return listwise.kto_loss(p[..., 0], q[..., 0], jnp.array([True, False]), **h)


def _reinforce(p: Array, old: Array, q: Array, r: Array, weights: Any, **h: Any) -> Array:
    return policy_gradient.reinforce(p, q, r, **h)


def _rloo(p: Array, old: Array, q: Array, r: Array, weights: Any, **h: Any) -> Array:
    return policy_gradient.rloo(p, q, r, weights=weights, **h)


def _ppo_clip(p: Array, old: Array, q: Array, r: Array, weights: Any, **h: Any) -> Array:
    return policy_gradient.ppo_clip(p, old, q, r, **h)


def _grpo(p: Array, old: Array, q: Array, r: Array, weights: Any, **h: Any) -> Array:
    return policy_gradient.grpo(p, old, q, r, weights=weights, **h)


def _dr_grpo(p: Array, old: Array, q: Array, r: Array, weights: Any, **h: Any) -> Array:
    return policy_gradient.dr_grpo(p, old, q, r, weights=weights, **h)


_GROUP: dict[str, Any] = {"group_size": None, "leave_one_out": False, "kl": "k3"}
METHODS: dict[str, Method] = {
    "reward_model": Method(kind="pairs", function=_reward_model, attained="connected"),
    "dpo": Method(
        kind="pairs",
        function=of_pairs(pairwise.dpo_loss),
        attained="connected",
        net=lambda w, h: (1 - h["label_smoothing"]) * w + h["label_smoothing"] * w.swapaxes(-1, -2),
        defaults={"label_smoothing": 0.0},
    ),
    "robust_dpo": Method(
        kind="pairs",
        function=of_pairs(pairwise.robust_dpo_loss),
        attained="connected",
        net=lambda w, h: (
            ((1 - h["label_smoothing"]) * w - h["label_smoothing"] * w.swapaxes(-1, -2))
            / (1 - 2 * h["label_smoothing"])
        ),
        defaults={"label_smoothing": 0.1},
    ),
    "ipo": Method(kind="pairs", function=of_pairs(pairwise.ipo_loss)),
    "hinge": Method(kind="pairs", function=of_pairs(pairwise.hinge_loss), solver="margin"),
    "slic": Method(
        kind="pairs",
        function=_without_reference(pairwise.slic_loss),
        solver="margin",
        scaled=False,
        defaults={"margin": 1.0, "regularization": 0.1},
    ),
    "orpo": Method(
        kind="pairs",
        function=_without_reference(pairwise.orpo_loss),
        ratios=False,
        convex=False,
        attained="wins",
        scaled=False,
    ),
    "simpo": Method(
        kind="pairs",
        function=_without_reference(pairwise.simpo_loss),
        attained="connected",
        defaults={"gamma": 0.0},
    ),
    "exo": Method(
        kind="pairs",
        function=of_pairs(pairwise.exo_loss),
        convex=False,
        defaults={"label_smoothing": 1e-3},
    ),
    "plackett_luce_dpo": Method(
        kind="rankings", function=listwise.plackett_luce_dpo_loss, attained="connected"
    ),
    "lipo": Method(kind="rankings", function=_lipo, convex=False, attained="connected"),
    "kto": Method(
        kind="thumbs",
        function=_kto,
        solver="saturating",
        defaults={
            "reference_point": None,
            "desirable_weight": 1.0,
            "undesirable_weight": 1.0,
        },
    ),
    "reinforce": Method(
        kind="samples", convex=False, function=_reinforce, defaults={"baseline": 0.0}
    ),
    "rloo": Method(kind="samples", convex=False, function=_rloo, defaults={"group_size": None}),
    "ppo_clip": Method(
        kind="samples", convex=False, function=_ppo_clip, defaults={"baseline": 0.0, "clip": 0.2}
    ),
    "grpo": Method(
        kind="samples",
        convex=False,
        function=_grpo,
        defaults=_GROUP
        | {
            "normalize_std": True,
            "std_epsilon": 0.0,
            "kl_place": "loss",
            "importance_corrected": False,
            "clip": 0.2,
        },
    ),
    "dr_grpo": Method(
        kind="samples",
        convex=False,
        function=_dr_grpo,
        defaults=_GROUP
        | {"kl": "k1", "kl_place": "loss", "importance_corrected": True, "clip": 0.2},
    ),
}


def weights_of(method: Method, feedback: Feedback, prompt: Prompt, mu: Vector) -> Array:
    """Return exact feedback as an array, of outputs drawn from μ."""
    asked = replace(feedback, compared=prompt.compared)
    return asked.expected(method.kind, prompt.reward, mu)


def residual(
    method: Method, feedback: Feedback, prompt: Prompt, hyper: dict[str, Any]
) -> tuple[Residual, Array]:
    """Return the rate R(u), and β where u = β s, or 1 where u = s."""
    scale = prompt.beta if method.scaled else jnp.ones_like(prompt.beta)
    settings = {"beta": prompt.beta} | hyper
    if method.kind == "samples":
        return _residual_of_samples(method, prompt, settings), scale
    return _residual_of_loss(method, feedback, prompt, settings, scale), scale


def _residual_of_loss(
    method: Method, feedback: Feedback, prompt: Prompt, hyper: dict[str, Any], scale: Array
) -> Residual:
    """Return minus the expected loss's gradient.

    It is taken per output and per appearance of the output in the feedback, so that rare outputs
    are solved for as well as frequent ones.
    """
    on_policy = feedback.sampling == "policy"

    def expected(log_policy: Vector, weights: Array) -> Array:
        lists = weights.ndim if method.kind != "thumbs" else 1
        losses = method.function(_lists(log_policy, lists), _lists(prompt.log_ref, lists), **hyper)
        return jnp.sum(jnp.where(weights != 0, weights * losses, 0.0))

    def residual(u: Vector) -> Vector:
        logits = prompt.log_ref + u / scale
        # Without the constant, which a loss of differences does not see and rounding would.
        log_policy = (
            jnp.where(prompt.support, logits, _PADDING)
            if method.ratios
            else prompt.normalised(logits)
        )
        weights = prompt.weights
        if on_policy:
            mu = prompt.probabilities(prompt.normalised(logits))
            weights = weights_of(method, feedback, prompt, mu)
        slope = jax.grad(expected)(log_policy, weights) / scale
        if not method.ratios:
            slope = slope - prompt.probabilities(log_policy) * jnp.sum(slope)
        met = jnp.sum(weights, axis=1) if method.kind == "thumbs" else appearances(weights)
        return jnp.where(met > 0, -slope / jnp.where(met > 0, met, 1.0), 0.0)

    return residual


def _residual_of_samples(method: Method, prompt: Prompt, hyper: dict[str, Any]) -> Residual:
    """Return the natural policy gradient, from the exact expectation over groups.

    With o(y) the derivative of an output's objective in log π(y), averaged over the rest of its
    group, the expected gradient in log π(y) is π(y) o(y); natural is o less its mean under π.
    """
    hyper = dict(hyper)
    size = hyper.pop("group_size", None)

    def residual(u: Vector) -> Vector:
        old = prompt.policy(u / prompt.beta)
        pi = prompt.probabilities(old)

        def summed(log_policy: Vector) -> Array:
            if size is None:  # all outputs are the group, each with its probability as its share
                values = method.function(
                    log_policy, old, prompt.log_ref, prompt.reward, pi, **hyper
                )
                return jnp.sum(jnp.where(prompt.support, values, 0.0))
            others = [old] * (size - 1)
            values = method.function(
                jnp.stack(jnp.meshgrid(log_policy, *others, indexing="ij"), axis=-1),
                _lists(old, size),
                _lists(prompt.log_ref, size),
                _lists(prompt.reward, size),
                None,
                **hyper,
            )[..., 0]
            chance = jnp.prod(_lists(pi, size)[..., 1:], axis=-1)
            return jnp.sum(jnp.where(chance > 0, chance * values, 0.0))

        o = jax.grad(summed)(old)
        return jnp.where(prompt.support, o - jnp.sum(pi * o), 0.0)

    return residual


def _lists(x: Vector, size: int) -> Array:
    """Return x at the outputs of every list of so many, [outputs] * size + [size]."""
    return jnp.stack(jnp.meshgrid(*[x] * size, indexing="ij"), axis=-1)


def appearances(weights: Array) -> Vector:
    """Return how often each output appears in pairs or rankings."""
    axes = range(weights.ndim)
    places = [jnp.sum(weights, axis=tuple(a for a in axes if a != place)) for place in axes]
    return jnp.sum(jnp.stack(places), axis=0)
