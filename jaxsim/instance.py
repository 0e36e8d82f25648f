"""One prompt of the paper: the mixture p_ref = α p_A + (1-α) p_U, the reward r and the KL price β.

Constructors check concrete values on the host and say what is wrong; under `jit`, `vmap` or `grad`
they can only check shapes. Inside, everything is a log-probability.
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxsim.logspace import LOG_ZERO, AnyArray, unit_roundoff


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Masses:
    """An instance, or a tile of them, by unnormalised positive masses: nothing may underflow.

    Attributes:
        aligned: masses of p_A, [outputs] or [outputs, instances], of any positive sum.
        unaligned: of p_U, likewise.
        reward: r.
        logit_alpha: log α/(1-α).
        beta: β.
    """

    aligned: Float[AnyArray, "..."]
    unaligned: Float[AnyArray, "..."]
    reward: Float[AnyArray, "..."]
    logit_alpha: Float[AnyArray, "..."]
    beta: Float[AnyArray, "..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Instance:
    """A finite set of outputs with two component distributions, a reward, α and β.

    A batch is the same class with one leading axis on every field. Outputs with zero mass in both
    components lie outside the support and are masked everywhere: padding a ragged batch with them
    changes nothing. Calling the class itself stores the arrays as they are, unchecked; use the
    constructors `from_probs`, `from_log_probs` and `from_reference` for data.

    Attributes:
        log_p_aligned: log p_A, nats, [outputs] or [instances, outputs]; `-inf`, or anything down
            from -1e30, is zero mass.
        log_p_unaligned: log p_U, likewise.
        reward: r, finite; its unit is that of β.
        logit_alpha: log α/(1-α), [] or [instances]. α is the weight of A in the reference.
        beta: β > 0, the price of one nat of KL divergence in units of reward.
    """

    log_p_aligned: Float[AnyArray, "..."]
    log_p_unaligned: Float[AnyArray, "..."]
    reward: Float[AnyArray, "..."]
    logit_alpha: Float[AnyArray, "..."]
    beta: Float[AnyArray, "..."]

    @property
    def alpha(self) -> Float[Array, " *batch"]:
        """The mixture weight α of the aligned component, rounded to the instance's dtype."""
        return jax.nn.sigmoid(self.logit_alpha)

    @classmethod
    def from_probs(
        cls,
        p_aligned: ArrayLike,
        p_unaligned: ArrayLike,
        reward: ArrayLike,
        alpha: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        logit_alpha: ArrayLike | None = None,
    ) -> "Instance":
        """Build an instance, or a batch, from probabilities.

        Args:
            p_aligned: p_A, [outputs] or [instances, outputs]; each row sums to one.
            p_unaligned: p_U, likewise.
            reward: r, finite, of the same shape (or [outputs], shared by all instances).
            alpha: α in (0, 1), scalar or [instances].
            beta: β > 0, scalar or [instances].
            logit_alpha: log α/(1-α) in place of `alpha`, for α too close to 0 or 1 to store.

        Returns:
            The instance, with components renormalised; the dtype is that of the arrays.

        Raises:
            ValueError: naming the field, the first bad index and the value.

        Example:
            >>> instance = Instance.from_probs([0., 1., 0.], [.5, 0., .5], [0., 3., 4.], .5, 1.)
            >>> print(instance.alpha)
            0.5
        """
        arrays, dtype = _arrays(p_aligned=p_aligned, p_unaligned=p_unaligned, reward=reward)
        for name in ("p_aligned", "p_unaligned"):
            p = arrays.pop(name)
            if _concrete(p):
                _require(name, p, np.isfinite(p) & (p >= 0), "probabilities are >= 0")
            arrays["log_" + name] = _log(p)
        return _build(cls, arrays, dtype, alpha, logit_alpha, beta, total="the sum of {}")

    @classmethod
    def from_log_probs(
        cls,
        log_p_aligned: ArrayLike,
        log_p_unaligned: ArrayLike,
        reward: ArrayLike,
        alpha: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        *,
        logit_alpha: ArrayLike | None = None,
    ) -> "Instance":
        """Build an instance, or a batch, from log-probabilities in nats (`-inf` is zero mass).

        Args, Returns and Raises are those of `from_probs`.

        Example:
            >>> import numpy as np
            >>> half = np.log([0.5, 0.5])
            >>> Instance.from_log_probs(half, half, [0., 1.], beta=1., logit_alpha=-40.).beta.shape
            ()
        """
        arrays, dtype = _arrays(
            log_p_aligned=log_p_aligned, log_p_unaligned=log_p_unaligned, reward=reward
        )
        for name in ("log_p_aligned", "log_p_unaligned"):
            if _concrete(arrays[name]):
                _check_log_probs(name, arrays[name])
        return _build(cls, arrays, dtype, alpha, logit_alpha, beta)

    @classmethod
    def from_reference(
        cls,
        log_p_ref: ArrayLike,
        aligned_given_output: ArrayLike,
        reward: ArrayLike,
        beta: ArrayLike,
    ) -> "Instance":
        """Split a reference by a classifier: p_A ∝ p_ref·a, p_U ∝ p_ref·(1-a), α = E_ref[a].

        Args:
            log_p_ref: log p_ref in nats, [outputs] or [instances, outputs]; `-inf` is zero mass.
            aligned_given_output: a(y) = P(aligned | y) in [0, 1], of the same shape.
            reward: r, finite, of the same shape (or [outputs]).
            beta: β > 0, scalar or [instances].

        Returns:
            The instance whose mixture is exactly this reference (renormalised).

        Raises:
            ValueError: naming the field, the first bad index and the value; also where a is 0, or
                1, on the whole support, so that one of the components would be empty.

        Example:
            >>> import numpy as np
            >>> instance = Instance.from_reference(np.log([.5, .5]), [.9, .1], [1., 0.], beta=1.)
            >>> print(round(float(instance.alpha), 6))
            0.5
        """
        arrays, dtype = _arrays(
            log_p_ref=log_p_ref, aligned_given_output=aligned_given_output, reward=reward
        )
        log_p, a = arrays.pop("log_p_ref"), arrays.pop("aligned_given_output")
        if _concrete(log_p):
            _check_log_probs("log_p_ref", log_p)
            _check_normalised("log_p_ref", log_p, unit_roundoff(dtype), "the sum of exp({})")
        if _concrete(a):
            in_unit = (a >= 0) & (a <= 1)
            _require("aligned_given_output", a, in_unit, "P(aligned | y) lies in [0, 1]")
        if _concrete(log_p) and _concrete(a):
            host_log_p, host_a = log_p.astype(np.float64), a.astype(np.float64)
            with np.errstate(divide="ignore"):
                parts = (host_log_p + np.log(host_a), host_log_p + np.log1p(-host_a))
            log_mass = [_np_logsumexp(part) for part in parts]
            mean, wanted = np.exp(log_mass[0]), "neither component may be empty"
            for mass in log_mass:
                ok = np.isfinite(mass)
                _require("aligned_given_output", mean, ok, wanted, "the mean of {}")
            arrays["log_p_aligned"], arrays["log_p_unaligned"] = (
                part - mass[..., None] for part, mass in zip(parts, log_mass, strict=True)
            )
            logit_alpha: Any = log_mass[0] - log_mass[1]
        else:
            log_p, a = jnp.asarray(log_p, dtype), jnp.asarray(a, dtype)
            arrays["log_p_aligned"] = log_p + _log(a)
            arrays["log_p_unaligned"] = log_p + _log(1 - a)
            logit_alpha = _logsumexp(arrays["log_p_aligned"]) - _logsumexp(
                arrays["log_p_unaligned"]
            )
        return _build(cls, arrays, dtype, None, logit_alpha, beta)


def _arrays(**named: Any) -> tuple[dict[str, Any], Any]:
    """Give all one shape, [outputs] or [instances, outputs]; also return their floating dtype.

    Concrete values stay on the host in the dtype that they came in, to be checked as given.
    """
    dtype = jnp.result_type(*(_dtype(name, value) for name, value in named.items()))
    shapes = {name: np.shape(value) for name, value in named.items()}
    for name, shape in shapes.items():
        if len(shape) not in (1, 2):
            raise ValueError(
                f"{name} has shape {shape}; expected [outputs] or [instances, outputs]"
            )
    try:
        common = np.broadcast_shapes(*shapes.values())
    except ValueError:
        common = None
    widths = {shape[-1] for shape in shapes.values()}
    if common is None or len(widths) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes do not agree: {listed}; expected one number of outputs")
    if 0 in common:
        raise ValueError(f"{next(iter(shapes))} has shape {common}: there is no output in it")
    arrays = {
        name: np.broadcast_to(np.asarray(value), common)
        if _concrete(value)
        else jnp.broadcast_to(jnp.asarray(value, dtype), common)
        for name, value in named.items()
    }
    return arrays, dtype


def _dtype(name: str, value: Any) -> Any:
    """The floating dtype of `value`; Python numbers and integers take JAX's default one."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        try:
            dtype = np.asarray(value).dtype
        except ValueError:
            raise ValueError(f"{name} is not a rectangular array of numbers") from None
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_) or jnp.issubdtype(
        dtype, jnp.complexfloating
    ):
        raise ValueError(f"{name} has dtype {dtype}; expected real numbers")
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = float
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _build(
    cls: type[Instance],
    arrays: dict[str, Any],
    dtype: Any,
    alpha: Any,
    logit_alpha: Any,
    beta: Any,
    *,
    total: str = "the sum of exp({})",
) -> Instance:
    if alpha is None and logit_alpha is None:
        raise ValueError("alpha is missing; expected alpha or logit_alpha")
    if alpha is not None and logit_alpha is not None:
        raise ValueError("alpha and logit_alpha are both given; expected one of them")
    if beta is None:
        raise ValueError("beta is missing; expected a number > 0")
    reward = arrays["reward"]
    batch = reward.shape[:-1]
    per_instance = {"alpha": alpha} if logit_alpha is None else {"logit_alpha": logit_alpha}
    per_instance["beta"] = beta
    for name, value in per_instance.items():
        _dtype(name, value)
        if np.shape(value) not in ((), batch):
            raise ValueError(
                f"{name} has shape {np.shape(value)}; "
                f"expected a scalar or {list(batch)}, one value per instance"
            )
        if _concrete(value):
            _CHECKS[name](np.asarray(value))
    if _concrete(reward):
        _check_reward(reward)
    if logit_alpha is None:
        per_instance["logit_alpha"] = _logit(per_instance.pop("alpha"), dtype)
    components = {
        name: _normalise(arrays[name], dtype, total, name)
        for name in ("log_p_aligned", "log_p_unaligned")
    }
    instance = cls(
        reward=_cast("reward", reward, dtype),
        **components,
        **{
            name: jnp.broadcast_to(_cast(name, value, dtype), batch)
            for name, value in per_instance.items()
        },
    )
    if all(_concrete(getattr(instance, f.name)) for f in fields(instance)):
        _check_scale(instance)
    return instance


def require_concrete(name: str, instance: Instance) -> None:
    """Raise a TypeError under `jit`, `vmap` or `grad`, for the host-only function `name`."""
    if not all(_concrete(leaf) for leaf in jax.tree.leaves(instance)):
        raise TypeError(f"{name} needs concrete values; call it outside jit, vmap and grad")


def validate(instance: Instance) -> None:
    """Check every concrete value on the host, for an instance that no constructor has seen.

    Raises:
        ValueError: naming the field, the first bad index and the value.
    """
    for name in ("log_p_aligned", "log_p_unaligned"):
        log_p = np.asarray(getattr(instance, name))
        _check_log_probs(name, log_p)
        _check_normalised(name, log_p, unit_roundoff(log_p.dtype), "the sum of exp({})")
    _check_reward(np.asarray(instance.reward))
    _check_beta(np.asarray(instance.beta))
    _check_logit_alpha(np.asarray(instance.logit_alpha))
    _check_scale(instance)


def _check_log_probs(name: str, log_p: np.ndarray) -> None:
    ok = ~np.isnan(log_p) & (log_p < np.inf)
    _require(name, log_p, ok, "log-probabilities are finite or -inf")


def _check_reward(reward: np.ndarray) -> None:
    _require("reward", reward, np.isfinite(reward), "rewards are finite")


def _check_beta(beta: np.ndarray) -> None:
    _require("beta", beta, np.isfinite(beta) & (beta > 0), "beta is finite and > 0")


def _check_logit_alpha(logit: np.ndarray) -> None:
    _require("logit_alpha", logit, np.isfinite(logit), "log-odds of alpha are finite")


def _check_alpha(alpha: np.ndarray) -> None:
    wanted = (
        "alpha lies strictly between 0 and 1 (for a value that rounds to 0 or 1, "
        "give logit_alpha= instead)"
    )
    _require("alpha", alpha, (alpha > 0) & (alpha < 1), wanted)


_CHECKS = {"alpha": _check_alpha, "logit_alpha": _check_logit_alpha, "beta": _check_beta}


def _check_scale(instance: Instance) -> None:
    """Refuse |r|/β on the support that no accuracy survives."""
    reward, beta = np.asarray(instance.reward), np.asarray(instance.beta, np.float64)
    components = np.asarray(instance.log_p_aligned), np.asarray(instance.log_p_unaligned)
    with np.errstate(over="ignore"):
        scale = np.abs(reward) / beta[..., None]
    ok = (scale < 1e30) | ~(np.maximum(*components) > LOG_ZERO)
    _require("reward", reward, ok, "|reward| / beta stays below 1e30")


def _cast(name: str, value: Any, dtype: Any) -> Any:
    """Convert to the instance's dtype, refusing what it cannot hold."""
    if not _concrete(value):
        return jnp.asarray(value, dtype)
    given = np.asarray(value)
    with np.errstate(over="ignore", under="ignore"):
        cast = given.astype(dtype)
    kept = np.isfinite(cast)
    if name == "beta":
        kept &= cast >= np.finfo(dtype).tiny
    _require(name, given, kept, f"out of the range of {np.dtype(dtype)}")
    return jnp.asarray(cast)


def _logit(alpha: Any, dtype: Any) -> Any:
    """Log-odds of α, in float64 on the host where the value is known."""
    if not _concrete(alpha):
        alpha = jnp.asarray(alpha, dtype)
        return jnp.log(alpha) - jnp.log1p(-alpha)
    host = np.asarray(alpha, np.float64)
    return np.log(host) - np.log1p(-host)


def _normalise(log_p: Any, dtype: Any, total: str, name: str) -> Any:
    if not _concrete(log_p):
        return log_p - _logsumexp(log_p)[..., None]
    host = np.asarray(log_p, np.float64)
    shown = name if "exp" in total else name.removeprefix("log_")
    _check_normalised(shown, host, unit_roundoff(dtype), total)
    return jnp.asarray(host - _np_logsumexp(host)[..., None], dtype)


def _check_normalised(name: str, log_p: np.ndarray, roundoff: float, form: str) -> None:
    with np.errstate(over="ignore"):
        total = np.exp(log_p.astype(np.float64)).sum(axis=-1)
    allowed = max(1e-6, 8 * log_p.shape[-1] * roundoff)
    wanted = f"the probabilities of an instance sum to 1 within {allowed:.0e}"
    _require(name, total, np.abs(total - 1) <= allowed, wanted, form)


def _require(name: str, values: np.ndarray, ok: Any, wanted: str, form: str = "{}") -> None:
    if not np.all(ok):
        index = np.unravel_index(int(np.argmin(ok)), np.shape(ok))
        where = "[" + ", ".join(str(int(i)) for i in index) + "]" if index else ""
        value = str(np.asarray(values)[index])  # not format(), which shows a float32's tail
        raise ValueError(f"{form.format(name + where)} is {value}; {wanted}")


def _log(p: Any) -> Any:
    """Log p with `-inf`, and a zero gradient, at p = 0; in float64 where p is known."""
    if _concrete(p):
        with np.errstate(divide="ignore"):
            return np.log(np.asarray(p, np.float64))
    return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf)


def _logsumexp(log_p: Any) -> Any:
    safe = jnp.where(log_p > LOG_ZERO, log_p, LOG_ZERO)
    return jax.nn.logsumexp(safe, axis=-1)


def _np_logsumexp(log_p: np.ndarray) -> np.ndarray:
    top = log_p.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(log_p - top).sum(axis=-1)) + top[..., 0]
