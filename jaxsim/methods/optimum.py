"""Where a preference-tuning method goes with unlimited feedback: its optimum, solved for."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int8, Int32

from jaxsim.feedback import Feedback
from jaxsim.instance import Instance
from jaxsim.methods import margin, saturating
from jaxsim.methods.existence import OptimumStatus, judge
from jaxsim.methods.population import METHODS, Method, Prompt, equations, of_pairs, weights_of
from jaxsim.tilting import center, log_reference

TOLERANCE = 1e-9
"""A solve ends when the last Newton step moved no log-ratio by more (nats)."""
_TILE = 128  # instances that are solved side by side
_COLLAPSED = 1e-14  # a policy has collapsed once its best output lacks no more mass than this
_ROUNDING = 1e-12
_RUNS_AWAY = 3  # such steps in a row
_FIRST_ROUND = 25  # steps; the few that take more go on to a second round among themselves


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where a method goes, for one instance or a batch; NumPy arrays in float64.

    Attributes:
        log_policy: log π, nats, [outputs] or [instances, outputs]; `-inf` where it has no mass;
            nan where no optimum is attained and the limit is not known.
        status: `OptimumStatus` as int8.
        low: least value, over the set of optima, of log(π/p_ref) less that of the first output of
            the support; infinite where nothing ties an output to that one.
        high: the greatest.
        last_step: how far the last Newton step moved a log-ratio, at most, nats.
        steps: Newton steps (iterations of the linear programme for the hinge).
    """

    log_policy: Float[np.ndarray, "..."]
    status: Int8[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]
    last_step: Float[np.ndarray, "..."]
    steps: Int32[np.ndarray, "..."]


def population_optimum(
    method: str | Callable[..., Any],
    instance: Instance,
    feedback: Feedback | ArrayLike | None = None,
    **hyperparameters: Any,
) -> Optimum:
    """Return where a preference-tuning method goes with a tabular policy and exact feedback.

    The expectation of the method's loss over all outputs is minimised, or the fixed point of its
    expected policy gradient found, in float64, on the host's devices. Newton's method starts from
    p_ref and ends when a step moves no log-ratio by more than 1e-9; a small gradient alone would
    prove nothing. Where several points are at rest it is the one that is met first on the way; but
    for "kto" with β > 1, a local optimum, not always that one.

    Args:
        method: "reward_model" (with eq. (1) on the fitted reward), "dpo", "robust_dpo", "ipo",
            "hinge", "slic", "orpo", "simpo", "exo" (on pairs); "plackett_luce_dpo", "lipo" (on
            rankings); "kto" (on single outputs); "reinforce", "rloo", "ppo_clip", "grpo",
            "dr_grpo" (on the policy's own samples, in groups of `group_size`, by default
            infinite). Or a loss of pairs in JAX, with the signature of `dpo_loss`.
        instance: one instance, or a batch with one leading axis.
        feedback: how raters are asked (`Feedback`; by default pairs, rankings or thumbs of outputs
            sampled from p_ref); or the feedback itself, exact or counted, as from `expected_pairs`
            or `sample_feedback`, with a leading axis for a batch.
        **hyperparameters: those of the method's loss or objective, and `beta` to replace the
            instances'. (For "orpo" β is the weight of the odds ratio; "slic" has none, but
            `margin` 1 and `regularization` 0.1; `label_smoothing` is 0.1 for "robust_dpo"; the
            `reference_point` of "kto" is by default KL(π‖p_ref), at rest.)

    Returns:
        An `Optimum`; its `status` tells a unique one, a set of them, one that is only approached,
        a loss without lower bound, and a failure of the solver apart.

    Raises:
        TypeError: for an instance that is none.
        ValueError: for an unknown method or hyperparameter, or feedback that does not fit.

    Numerics:
        The linear programme of the hinge cannot see pairs 10^10 times rarer than the commonest:
        whether an optimum that hangs on these is unique may be misreported.

    Example:
        >>> import numpy as np
        >>> from jaxsim import Instance, optimal_policy, population_optimum
        >>> instance = Instance.from_probs([.2, .5, .3], [.5, .1, .4], [0., 3., 4.], .5, 1.)
        >>> found = population_optimum("dpo", instance)
        >>> bool(np.allclose(found.log_policy, optimal_policy(instance), atol=1e-6))
        True
    """
    if not isinstance(instance, Instance):
        raise TypeError(f"population_optimum: expected an Instance, got {type(instance).__name__}")
    how = _method(method)
    unknown = [name for name in hyperparameters if name not in {"beta", *how.defaults}]
    if unknown and not callable(method):
        known = ", ".join(["beta", *how.defaults])
        raise ValueError(f"{method}: unknown hyperparameter {unknown[0]!r}; expected {known}")
    if how.kind == "samples" and feedback is not None:
        raise ValueError(f"{method} learns from the policy's own samples: expected no feedback")
    # Plain numbers, which can be hashed, from NumPy's and JAX's.
    given = {
        k: v.item() if getattr(v, "shape", None) == () else v for k, v in hyperparameters.items()
    }
    hyper = how.defaults | given
    if not callable(method):
        _check_settings(method, how, hyper)
    with jax.enable_x64(True):
        prompts, asked = _prompts(how, instance, feedback, hyper.pop("beta", None))
        found = _solve(how, asked, prompts, hyper)
    if instance.reward.ndim == 1:
        return Optimum(**{f.name: getattr(found, f.name)[0] for f in fields(found)})
    return found


def _method(method: str | Callable[..., Any]) -> Method:
    if callable(method):
        return _of_loss(method)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    return METHODS[method]


@lru_cache(maxsize=32)
def _of_loss(loss: Callable[..., Any]) -> Method:
    """Return the method of someone's loss of pairs, of which nothing is known."""

    def function(p: Array, q: Array, **h: Any) -> Array:
        losses = of_pairs(loss)(p, q, **h)
        if jnp.shape(losses) != p.shape[:-1]:
            raise ValueError(
                f"the loss returned shape {jnp.shape(losses)} for pairs of shape {p.shape[:-1]}; "
                "expected one value per pair (see jaxsim.check_loss)"
            )
        return losses

    return Method(kind="pairs", function=function, ratios=False, convex=False)


def _prompts(
    how: Method, instance: Instance, feedback: Feedback | ArrayLike | None, beta: Any
) -> tuple[Prompt, Feedback]:
    """Return the instances as a batch of NumPy prompts, and how feedback on them is made."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), instance)
    if instance.reward.ndim == 1:
        wide = jax.tree.map(lambda x: x[None], wide)
    outputs_first = jax.tree.map(lambda x: jnp.moveaxis(jnp.asarray(x), 0, -1), wide)
    log_ref = np.asarray(log_reference(center(outputs_first))).T
    support = np.isfinite(log_ref)
    num, n = log_ref.shape
    given = None
    asked = feedback if isinstance(feedback, Feedback) else Feedback()
    if feedback is not None and not isinstance(feedback, Feedback):
        given = np.asarray(feedback, np.float64)
        if instance.reward.ndim == 1:
            given = given[None]
        _check_given(how, given, num, n)
        for place in range(1, 2 if how.kind == "thumbs" else given.ndim):  # no mass, no say
            given = given * np.expand_dims(support, [a for a in range(1, given.ndim) if a != place])
    compared = np.ones((n, n), bool) if asked.compared is None else np.asarray(asked.compared, bool)
    if compared.shape != (n, n):
        raise ValueError(f"compared has shape {compared.shape}; expected {(n, n)}")
    prompts = Prompt(
        log_ref=np.where(support, log_ref, -1.0),
        support=support,
        reward=np.where(support, wide.reward, 0.0),
        beta=wide.beta if beta is None else _beta(beta, num),
        sampling=_sampling(asked.sampling, log_ref, support),
        compared=np.broadcast_to(compared, (num, n, n)),
        weights=given,
    )
    # What is left is the same for all and can be hashed, as a compiled function's settings must.
    named = (
        "policy" if isinstance(asked.sampling, str) and asked.sampling == "policy" else "reference"
    )
    return prompts, replace(asked, sampling=named, compared=None)


def _beta(beta: Any, num: int) -> np.ndarray:
    values = np.asarray(beta, np.float64)
    if values.shape not in ((), (num,)):
        raise ValueError(f"beta has shape {values.shape}; expected a number or one per instance")
    if not (np.all(values > 0) and np.all(np.isfinite(values))):
        raise ValueError(f"beta is {beta}; expected numbers > 0")
    return np.broadcast_to(values, (num,))


def _check_settings(method: str, how: Method, hyper: dict[str, Any]) -> None:
    """Refuse hyperparameters that the method's own function refuses."""
    settings = {k: v for k, v in hyper.items() if k not in ("group_size", "reference_point")}
    settings |= {} if method == "slic" else {"beta": 1.0}
    two = np.full(2, -1.0)
    if how.kind == "samples":
        size = hyper.get("group_size")
        alone = method == "rloo" or hyper.get("leave_one_out")
        if size is not None and not (isinstance(size, int) and size >= (2 if alone else 1)):
            least = "two" if alone else "one"
            raise ValueError(f"group_size is {size!r}; expected None, or a number from {least} on")
        how.function(two, two, two, two, None, **settings)
        return
    point = hyper.get("reference_point")
    if point is not None and not (0 <= point < np.inf):
        raise ValueError(f"reference_point is {point}; expected None, or a number >= 0")
    how.function(two, two, **settings)


def _sampling(sampling: str | ArrayLike, log_ref: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Return μ for each prompt, [instances, outputs]."""
    if isinstance(sampling, str):
        if sampling == "uniform":
            return support / support.sum(axis=1, keepdims=True)
        return np.exp(log_ref)
    mu = np.asarray(sampling, np.float64)
    if mu.shape not in (log_ref.shape, log_ref.shape[1:]):
        raise ValueError(
            f"sampling has shape {mu.shape}; expected [outputs] or [instances, outputs], "
            f"{log_ref.shape}"
        )
    mu = np.where(support, mu, 0.0)
    if not (np.all(mu >= 0) and np.all(mu.sum(axis=1) > 0)):
        raise ValueError("sampling holds a negative number or nan, or no mass on the support")
    return mu / mu.sum(axis=1, keepdims=True)


_FORMS = {"pairs": "[outputs, outputs]", "rankings": "[outputs] * k", "thumbs": "[outputs, 2]"}


def _check_given(how: Method, given: np.ndarray, num: int, n: int) -> None:
    shape = given.shape[1:]
    fits = {
        "pairs": shape == (n, n),
        "rankings": len(shape) >= 2 and set(shape) == {n},
        "thumbs": shape == (n, 2),
    }[how.kind]
    if not fits or len(given) != num:
        raise ValueError(
            f"feedback has shape {given.shape}; expected {_FORMS[how.kind]} for each of {num} "
            f"instances of {n} outputs"
        )
    if not (np.all(np.isfinite(given)) and np.all(given >= 0)):
        raise ValueError("feedback holds a negative number, nan or infinity")


def _solve(how: Method, feedback: Feedback, prompts: Prompt, hyper: dict[str, Any]) -> Optimum:
    """Solve a batch of prompts: first whether there is an optimum, then where."""
    on_policy = feedback.sampling == "policy"
    if how.solver != "newton" and on_policy:
        raise ValueError(
            "feedback.sampling is 'policy': this method's optimum is not solved for on-policy"
        )
    if how.kind != "samples" and prompts.weights is None:
        prompts = replace(prompts, weights=_by_tiles(_weigher(how, feedback), prompts))
    # Off-policy the solver sees feedback by its weights alone, and need not be compiled anew.
    settings = (how, feedback if on_policy else Feedback(), tuple(sorted(hyper.items())))
    if how.solver == "margin":
        return _of_margin(how, prompts, hyper)
    status, groups = judge(how, prompts, hyper)
    if how.solver == "saturating":
        s, residue = _by_tiles(saturating.solver(settings[2]), prompts)
        return _optimum(prompts, status, groups, s, residue, np.zeros(len(s), np.int32))
    rest = _rest(settings, prompts, groups, status <= OptimumStatus.NOT_UNIQUE)
    lost = ~np.isfinite(rest.s).all(axis=1)
    if not how.convex or on_policy:
        lost |= ~_stable(rest.matrix)  # a point at rest that the flow would leave
    # Of a flow that ran away to one output, the limit.
    logits = np.where(prompts.support, prompts.log_ref + rest.s, -np.inf)
    elsewhere = logits < logits.max(axis=1, keepdims=True)
    s = np.where(rest.collapsed[:, None] & elsewhere, -np.inf, rest.s)
    last_step = np.where(rest.collapsed, 0.0, np.where(lost, np.inf, rest.last_step))
    return _optimum(prompts, status, groups, s, last_step, rest.steps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rest:
    """Where a rate came to rest.

    Attributes:
        s: log(π/p_ref), up to a constant.
        last_step: of a log-ratio, at most.
        steps: taken.
        running: steps for which all mass has been on one output and ran to it without slowing down.
        pace: the largest rate before the last step.
        size: of the rate's Jacobian at the start.
        matrix: minus the rate's Jacobian, the free directions filled in.
    """

    s: Any
    last_step: Any
    steps: Any
    running: Any
    pace: Any
    size: Any
    matrix: Any

    @property
    def collapsed(self) -> Any:
        """Whether the flow has run away to one output."""
        return self.running >= _RUNS_AWAY


def _rest(settings: Any, prompts: Prompt, groups: np.ndarray, attempt: np.ndarray) -> Rest:
    """Solve in two rounds: the few that take many steps do so among themselves."""
    rest = _by_tiles(_newton(*settings, _FIRST_ROUND), prompts, groups, attempt)
    late = np.flatnonzero(attempt & ~rest.collapsed & ~(rest.last_step <= TOLERANCE))
    if len(late):
        some = jax.tree.map(lambda x: x[late], (prompts, groups, attempt))
        later = _by_tiles(_newton(*settings, settings[0].most_steps), *some)
        for all_of_them, x in zip(jax.tree.leaves(rest), jax.tree.leaves(later), strict=True):
            all_of_them[late] = x
    return rest


def _of_margin(how: Method, prompts: Prompt, hyper: dict[str, Any]) -> Optimum:
    """Solve for the hinge on log-ratios with margin 1/β, or for SLiC-HF's on log π with its own."""
    weights, log_ref, support = prompts.weights, prompts.log_ref, prompts.support
    num = len(log_ref)
    status = np.zeros(num, np.int8)
    if hyper.get("regularization"):
        target = support * np.exp(log_ref)
        x, last_step, steps = margin.hinge_with_cross_entropy(weights, target, **hyper)
        return _optimum(prompts, status, None, x - log_ref, last_step, steps)
    gap = np.broadcast_to(hyper.get("margin", 1 / prompts.beta), (num,))
    base = log_ref if "margin" in hyper else np.zeros_like(log_ref)
    s, low, high = (np.zeros_like(log_ref) for _ in range(3))
    steps = np.zeros(num, np.int32)
    for at in range(num):
        inside = np.flatnonzero(support[at])
        *set_of_optima, steps[at] = margin.hinge(weights[at][np.ix_(inside, inside)])
        for into, x in zip((s, low, high), set_of_optima, strict=True):
            into[at, inside] = gap[at] * x - (base[at, inside] - base[at, inside[0]])
    # Corners have differences of whole margins.
    status[np.any(high - low > gap[:, None] / 2, axis=1)] = OptimumStatus.NOT_UNIQUE
    found = _optimum(prompts, status, None, s, np.zeros(num), steps)
    return replace(found, low=np.where(support, low, np.nan), high=np.where(support, high, np.nan))


def _stable(matrix: np.ndarray) -> np.ndarray:
    """Return whether the flow returns to a point at rest, given minus its Jacobian there."""
    stable = np.zeros(len(matrix), bool)
    sound = np.isfinite(matrix).all(axis=(1, 2))
    stable[sound] = np.linalg.eigvals(matrix[sound]).real.min(axis=1) > 0
    return stable


def _by_tiles(function: Callable[..., Any], *batches: Any) -> Any:
    """Map a compiled function over tiles of one size, and join what it returns, in NumPy."""
    num = len(jax.tree.leaves(batches)[0])
    size = min(_TILE, num)
    parts = []
    # One after the other: two at once, each in LAPACK on XLA's threads, can wait for each other.
    for first in range(0, num, size):
        rows = np.minimum(np.arange(first, first + size), num - 1)
        tile = jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), batches)
        parts.append(jax.tree.map(np.asarray, function(*tile)))
    return jax.tree.map(lambda *x: np.concatenate(x)[:num], *parts)


@lru_cache(maxsize=64)
def _weigher(how: Method, feedback: Feedback) -> Callable[..., Any]:
    return jax.jit(jax.vmap(lambda prompt: weights_of(how, feedback, prompt, prompt.sampling)))


@lru_cache(maxsize=64)
def _newton(
    how: Method, feedback: Feedback, hyper: tuple[tuple[str, Any], ...], max_steps: int
) -> Any:
    """Return the compiled solver of a tile: (prompts, groups, attempt) -> Rest."""

    def solve_one(prompt: Prompt, groups: Array, attempt: Array) -> Rest:
        at = equations(how, feedback, prompt, dict(hyper))
        convex = how.convex and feedback.sampling != "policy"
        n = prompt.reward.size
        # What feedback leaves free, a constant in each group of outputs, stays as it is: zero.
        free = groups / jnp.sum(groups, axis=1, keepdims=True)
        # Where there is no reference in the loss, from where it is not saturated: all alike.
        start = jnp.zeros(n)
        if not how.reference:
            start = -at.scale * jnp.where(prompt.support, prompt.log_ref, 0.0)
            start = start - free @ start
        first = jnp.max(jnp.abs(at.rate(start)))

        def advance(rest: Rest) -> Rest:
            r = at.rate(rest.s)
            pace = jnp.max(jnp.abs(r))
            matrix = free - at.jacobian(rest.s)
            # Far from rest a method whose loss is not convex follows its flow, so as to end where
            # that would: implicit Euler steps that grow as the rate falls and, lest a run to
            # infinity take for ever, with time; explicit ones where the flow diverges and an
            # implicit step would go backwards. The rate's unit is that of its Jacobian.
            size = jnp.where(rest.steps == 0, jnp.max(jnp.abs(matrix - free)), rest.size)
            damping = 0.0 if convex else size * jnp.minimum(1.0, pace / first)
            if how.kind == "samples":
                damping = damping * 0.95**rest.steps
            move = jnp.linalg.solve(matrix + damping * jnp.eye(n), r)
            if not convex:
                pi = prompt.probabilities(prompt.policy(rest.s / at.scale))
                metric = pi if how.kind == "samples" else 1.0
                move = jnp.where(jnp.sum(metric * move * r) > 0, move, r)
            most = jnp.max(jnp.abs(move))
            # A nat at first, where there is no convexity; but a run to infinity has to be seen as
            # one, so that steps grow with the way behind them.
            leap = 1.0 if convex else at.scale + jnp.max(jnp.abs(rest.s)) / 4
            s = rest.s + move / jnp.maximum(1.0, most / leap)
            pi = prompt.probabilities(prompt.policy(s / at.scale))
            return Rest(
                s=s,
                last_step=most / at.scale,
                steps=rest.steps + 1,
                running=jnp.where(
                    (how.kind == "samples")
                    & (jnp.sum(pi) - jnp.max(pi) < _COLLAPSED)
                    & (r[jnp.argmax(pi)] >= jnp.max(jnp.where(prompt.support, r, -jnp.inf)))
                    & (pace >= jnp.maximum(rest.pace * (1 - _ROUNDING), 0.1 * first)),
                    rest.running + 1,
                    0,
                ),
                pace=pace,
                size=size,
                matrix=matrix,
            )

        def goes_on(rest: Rest) -> Array:
            moving = (rest.last_step > TOLERANCE) & (rest.steps < max_steps)
            return attempt & moving & (rest.running < _RUNS_AWAY)

        rest = lax.while_loop(
            goes_on,
            advance,
            Rest(
                s=start,
                last_step=jnp.asarray(jnp.inf),
                steps=jnp.asarray(0, jnp.int32),
                running=jnp.asarray(0, jnp.int32),
                pace=jnp.asarray(jnp.inf),
                size=jnp.asarray(0.0),
                matrix=jnp.eye(n),
            ),
        )
        return replace(rest, s=rest.s / at.scale)

    return jax.jit(jax.vmap(solve_one))


def _optimum(
    prompts: Prompt,
    status: np.ndarray,
    groups: np.ndarray | None,
    s: np.ndarray,
    last_step: np.ndarray,
    steps: np.ndarray,
) -> Optimum:
    """Return what was found: s = log(π/p_ref), -inf where mass went to zero, and how it ended."""
    status = status.copy()
    tried = status <= OptimumStatus.NOT_UNIQUE
    empty = np.any(prompts.support & np.isneginf(s), axis=1)
    status[tried & empty] = OptimumStatus.NOT_ATTAINED
    status[tried & ~(last_step <= TOLERANCE)] = OptimumStatus.NOT_FOUND
    support = prompts.support
    s = np.where(support & tried[:, None], s, -np.inf)
    log_policy = _log_softmax(np.where(support, prompts.log_ref, -np.inf) + s)
    log_policy = np.where(tried[:, None] | ~support, log_policy, np.nan)
    log_policy = np.where(support, log_policy, -np.inf)
    first = support.argmax(axis=1)[:, None]
    with np.errstate(invalid="ignore"):
        apart = s - np.take_along_axis(s, first, axis=1)
    apart = np.where(support & (status <= OptimumStatus.NOT_UNIQUE)[:, None], apart, np.nan)
    spread = np.zeros_like(apart)
    if groups is not None:
        spread[~groups[np.arange(len(s)), first[:, 0]]] = np.inf
    return Optimum(
        log_policy=log_policy,
        status=status.astype(np.int8),
        low=apart - spread,
        high=apart + spread,
        last_step=last_step,
        steps=steps.astype(np.int32),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
