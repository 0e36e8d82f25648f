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
        reference: whether the loss depends on the reference.
        scaled: whether it is β s that the feedback fixes; steps are taken in that.
        net: the weight with which each pair pulls its outputs apart, of (weights, hyperparameters);
            None where it is the weight itself.
        most_steps: of the solver; a failure after so many.
        defaults: of hyperparameters, and the names of all there are.
    """

    kind: str
    function: Callable[..., Array]
    solver: str = "newton"
    ratios: bool = True
    convex: bool = True
    attained: str = "always"
    reference: bool = True
    scaled: bool = True
    most_steps: int = 200
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
        reference=False,
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
    "lipo": Method(
        kind="rankings",
        function=_lipo,  # convex between jumps of the weights
        attained="connected",
        most_steps=40,  # where two scores are held together by jumps of the weights, none suffice
    ),
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


@dataclass(frozen=True, kw_only=True)
class Equations:
    """A rate R(u) that is zero where a method comes to rest, with its Jacobian [rates, outputs].

    u is s times `scale`: β where the feedback fixes β s, or 1.
    """

    rate: Callable[[Vector], Vector]
    jacobian: Callable[[Vector], Array]
    scale: Array


def equations(
    method: Method, feedback: Feedback, prompt: Prompt, hyper: dict[str, Any]
) -> Equations:
    """Return a method's equations on one prompt."""
    scale = prompt.beta if method.scaled else jnp.ones_like(prompt.beta)
    settings = {"beta": prompt.beta} | hyper
    if method.kind == "samples":
        rate = _rate_of_samples(method, prompt, settings, scale)
        return Equations(rate=rate, jacobian=_by_differences(rate), scale=scale)
    return _equations_of_loss(method, feedback, prompt, settings, scale)


def _equations_of_loss(
    method: Method, feedback: Feedback, prompt: Prompt, hyper: dict[str, Any], scale: Array
) -> Equations:
    """Return minus the gradient of an expected loss.

    It is taken per output and per appearance of the output in the feedback, so that rare outputs
    are solved for as well as frequent ones.
    """
    on_policy = feedback.sampling == "policy"

    def log_policy_at(u: Vector) -> Vector:
        logits = prompt.log_ref + u / scale
        # A loss of differences is given no constant, which it would only see by rounding.
        if method.ratios:
            return jnp.where(prompt.support, logits, _PADDING)
        return prompt.normalised(logits)

    def weights_at(log_policy: Vector) -> Array:
        if not on_policy:
            return prompt.weights
        mu = prompt.probabilities(prompt.normalised(log_policy))
        return weights_of(method, feedback, prompt, mu)

    def slopes(lists: Array, weights: Array) -> Array:
        """Return the derivatives of the expected loss by every place of every list."""

        def expected(lists: Array) -> Array:
            losses = method.function(lists, _lists(prompt.log_ref, weights.ndim), **hyper)
            return jnp.sum(jnp.where(weights != 0, weights * losses, 0.0))

        return jax.grad(expected)(lists)

    def per_appearance(x: Array, weights: Array) -> Array:
        met = appearances(weights).reshape((-1,) + (1,) * (x.ndim - 1))
        # On-policy this is differentiated, and a quotient's derivative divides by met², which
        # underflows: of shares, by 1.
        unit = jax.lax.stop_gradient(jnp.where(met > 0, met, 1.0))
        return jnp.where(met > 0, (x / unit) / jnp.where(met > 0, met / unit, 1.0), 0.0)

    def rate(u: Vector) -> Vector:
        log_policy = log_policy_at(u)
        weights = weights_at(log_policy)
        slope = _over_places(slopes(_lists(log_policy, weights.ndim), weights)) / scale
        if not method.ratios:
            slope = slope - prompt.probabilities(log_policy) * jnp.sum(slope)
        return per_appearance(-slope, weights)

    def jacobian(u: Vector) -> Array:
        """Return the Jacobian from second derivatives within lists: k passes over them, not n."""
        log_policy = log_policy_at(u)
        weights = weights_at(log_policy)
        lists = _lists(log_policy, weights.ndim)
        slope, hessian = _assembled(lambda x: slopes(x, weights), lists)
        if not method.ratios:
            pi = prompt.probabilities(log_policy)
            total = jnp.sum(slope)
            hessian = hessian - pi[:, None] * jnp.sum(hessian, axis=0)[None]
            hessian = hessian - jnp.sum(hessian, axis=1)[:, None] * pi[None]
            hessian = hessian - total * (jnp.diag(pi) - pi[:, None] * pi[None])
        return per_appearance(-hessian / scale**2, weights)

    return Equations(rate=rate, jacobian=jax.jacfwd(rate) if on_policy else jacobian, scale=scale)


def _over_places(x: Array) -> Vector:
    """Sum what belongs to the places of lists, [outputs] * k + [k], by output."""
    size = x.shape[-1]
    parts = [
        jnp.sum(x[..., place], axis=tuple(a for a in range(size) if a != place))
        for place in range(size)
    ]
    return jnp.sum(jnp.stack(parts), axis=0)


def _assembled(slopes: Callable[[Array], Array], lists: Array) -> tuple[Vector, Array]:
    """Return gradient and Hessian by output of a sum over lists, from its slopes by place."""
    size, outputs = lists.shape[-1], lists.shape[0]
    hessian = jnp.zeros((outputs, outputs), lists.dtype)
    slope = slopes(lists)
    for place in range(size):
        along = jnp.zeros_like(lists).at[..., place].set(1.0)
        change = jax.jvp(slopes, (lists,), (along,))[1]
        for other in range(size):
            rest = tuple(a for a in range(size) if a not in (place, other))
            block = jnp.sum(change[..., other], axis=rest)
            if other == place:
                block = jnp.diag(block)
            elif other > place:
                block = block.T
            hessian = hessian + block
    return _over_places(slope), hessian


def _by_differences(rate: Callable[[Vector], Vector]) -> Callable[[Vector], Array]:
    """Return a Jacobian by central differences.

    Objectives on samples stop gradients through the sampling policy, which moves here too.
    """

    def jacobian(u: Vector) -> Array:
        step = 1e-5 * jnp.maximum(1.0, jnp.max(jnp.abs(u))) * jnp.eye(u.size)
        return jax.vmap(lambda h: (rate(u + h) - rate(u - h)) / (2 * jnp.sum(h)), out_axes=1)(step)

    return jacobian


def _rate_of_samples(
    method: Method, prompt: Prompt, hyper: dict[str, Any], scale: Array
) -> Callable[[Vector], Vector]:
    """Return the natural policy gradient, from the exact expectation over groups.

    With o(y) the derivative of an output's objective in log π(y), averaged over the rest of its
    group, the expected gradient in log π(y) is π(y) o(y); natural is o less its mean under π.
    """
    hyper = dict(hyper)
    size = hyper.pop("group_size", None)

    def rate(u: Vector) -> Vector:
        old = prompt.policy(u / scale)
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

    return rate


def _lists(x: Vector, size: int) -> Array:
    """Return x at the outputs of every list of so many, [outputs] * size + [size]."""
    return jnp.stack(jnp.meshgrid(*[x] * size, indexing="ij"), axis=-1)


def appearances(weights: Array) -> Vector:
    """Return how often each output appears in pairs or rankings."""
    axes = range(weights.ndim)
    places = [jnp.sum(weights, axis=tuple(a for a in axes if a != place)) for place in axes]
    return jnp.sum(jnp.stack(places), axis=0)
