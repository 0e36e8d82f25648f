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

from jaxsim.logspace import LOG_ZERO, unit_roundoff


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Instance:
    """A finite set of outputs with two component distributions, a reward, α and β.

    A batch is the same class with one leading axis on every field. Outputs with zero mass in both
    components lie outside the support and are masked everywhere: padding a ragged batch with them
    changes nothing. Calling the class itself stores the arrays as they are, unchecked; use the
    constructors `from_probs`, `from_log_probs` and `from_reference` for data.

    Attributes:
        log_p_aligned: log p_A, nats, [outputs] or [instances, outputs]; `-inf` is zero mass.
        log_p_unaligned: log p_U, likewise.
        reward: r, finite; its unit is that of β.
        logit_alpha: log α/(1-α), [] or [instances]. α is the weight of A in the reference.
        beta: β > 0, the price of one nat of KL divergence in units of reward.
    """

    log_p_aligned: Float[Array, " *batch outputs"]
    log_p_unaligned: Float[Array, " *batch outputs"]
    reward: Float[Array, " *batch outputs"]
    logit_alpha: Float[Array, " *batch"]
    beta: Float[Array, " *batch"]

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
        arrays = _arrays(p_aligned=p_aligned, p_unaligned=p_unaligned, reward=reward)
        for name in ("p_aligned", "p_unaligned"):
            p = arrays[name]
            if _concrete(p):
                host = np.asarray(p)
                _require(name, host, np.isfinite(host) & (host >= 0), "probabilities are >= 0")
            arrays["log_" + name] = _log(arrays.pop(name))
        return _build(cls, arrays, alpha, logit_alpha, beta, shown="p_")

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
        arrays = _arrays(
            log_p_aligned=log_p_aligned, log_p_unaligned=log_p_unaligned, reward=reward
        )
        for name in ("log_p_aligned", "log_p_unaligned"):
            if _concrete(arrays[name]):
                host = np.asarray(arrays[name])
                ok = ~np.isnan(host) & (host < np.inf)
                _require(name, host, ok, "log-probabilities are finite or -inf")
        return _build(cls, arrays, alpha, logit_alpha, beta, shown="log_p_")

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
        arrays = _arrays(
            log_p_ref=log_p_ref, aligned_given_output=aligned_given_output, reward=reward
        )
        log_p, a = arrays.pop("log_p_ref"), arrays.pop("aligned_given_output")
        if _concrete(log_p) and _concrete(a):
            host_log_p, host_a = np.asarray(log_p, np.float64), np.asarray(a, np.float64)
            ok = ~np.isnan(host_log_p) & (host_log_p < np.inf)
            _require("log_p_ref", host_log_p, ok, "log-probabilities are finite or -inf")
            _check_normalised("log_p_ref", host_log_p, unit_roundoff(log_p.dtype))
            in_unit = (host_a >= 0) & (host_a <= 1)
            _require("aligned_given_output", host_a, in_unit, "P(aligned | y) lies in [0, 1]")
            with np.errstate(divide="ignore"):
                parts = (host_log_p + np.log(host_a), host_log_p + np.log1p(-host_a))
            log_mass = [_np_logsumexp(part) for part in parts]
            for mass, extreme in zip(log_mass, ("0", "1"), strict=True):
                message = f"P(aligned | y) is {extreme} on the whole support: a component is empty"
                _require("aligned_given_output", np.exp(mass), np.isfinite(mass), message)
            arrays["log_p_aligned"], arrays["log_p_unaligned"] = (
                part - mass[..., None] for part, mass in zip(parts, log_mass, strict=True)
            )
            logit_alpha: Any = log_mass[0] - log_mass[1]
        else:
            arrays["log_p_aligned"] = log_p + _log(a)
            arrays["log_p_unaligned"] = log_p + _log(1 - a)
            logit_alpha = _logsumexp(arrays["log_p_aligned"]) - _logsumexp(
                arrays["log_p_unaligned"]
            )
        return _build(cls, arrays, None, logit_alpha, beta, shown="log_p_")


def _arrays(**named: ArrayLike) -> dict[str, Any]:
    """Convert to arrays of one floating dtype and one shape, [outputs] or [instances, outputs]."""
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
    dtype = jnp.result_type(*(_dtype(name, value) for name, value in named.items()))
    return {name: _convert(value, dtype, common) for name, value in named.items()}


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


def _convert(value: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    return jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def _concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _build(
    cls: type[Instance],
    arrays: dict[str, Any],
    alpha: Any,
    logit_alpha: Any,
    beta: Any,
    *,
    shown: str,
) -> Instance:
    reward = arrays["reward"]
    batch, dtype = reward.shape[:-1], reward.dtype
    if (alpha is None) == (logit_alpha is None):
        raise ValueError("alpha: give either alpha or logit_alpha, and not both")
    if beta is None:
        raise ValueError("beta is missing; expected a number > 0")
    logits = _logit("alpha", alpha, dtype) if logit_alpha is None else logit_alpha
    per_instance = {"logit_alpha": logits, "beta": beta}
    for name, value in per_instance.items():
        if np.shape(value) not in ((), batch):
            raise ValueError(
                f"{name.removeprefix('logit_')} has shape {np.shape(value)}; "
                f"expected a scalar or {list(batch)}, one value per instance"
            )
        per_instance[name] = jnp.broadcast_to(jnp.asarray(value, dtype), batch)
    components = {
        name: _normalise(arrays[name], dtype, shown + name.removeprefix("log_p_"))
        for name in ("log_p_aligned", "log_p_unaligned")
    }
    instance = cls(reward=reward, **components, **per_instance)
    if all(_concrete(getattr(instance, f.name)) for f in fields(instance)):
        _check_numbers(instance)
    return instance


def validate(instance: Instance) -> None:
    """Check every concrete value on the host, for an instance that no constructor has seen.

    Raises:
        ValueError: naming the field, the first bad index and the value.
    """
    for name in ("log_p_aligned", "log_p_unaligned"):
        log_p = np.asarray(getattr(instance, name))
        ok = ~np.isnan(log_p) & (log_p < np.inf)
        _require(name, log_p, ok, "log-probabilities are finite or -inf")
        _check_normalised(name, log_p, unit_roundoff(log_p.dtype))
    _check_numbers(instance)


def _check_numbers(instance: Instance) -> None:
    reward = np.asarray(instance.reward)
    _require("reward", reward, np.isfinite(reward), "rewards are finite")
    beta = np.asarray(instance.beta)
    _require("beta", beta, np.isfinite(beta) & (beta > 0), "beta is finite and > 0")
    logit = np.asarray(instance.logit_alpha)
    _require("logit_alpha", logit, np.isfinite(logit), "alpha lies strictly between 0 and 1")
    support = np.maximum(instance.log_p_aligned, instance.log_p_unaligned) > LOG_ZERO
    top = np.where(support, reward, -np.inf).max(axis=-1).astype(np.float64)
    bottom = np.where(support, reward, np.inf).min(axis=-1).astype(np.float64)
    scale = np.maximum(np.abs(top), np.abs(bottom)) / beta
    _require("reward", scale, scale < 1e30, "|reward| / beta stays below 1e30")


def _logit(name: str, alpha: Any, dtype: Any) -> Any:
    """Log-odds of α, in float64 on the host where the value is known."""
    if not _concrete(alpha):
        alpha = jnp.asarray(alpha, dtype)
        return jnp.log(alpha) - jnp.log1p(-alpha)
    try:
        host = np.asarray(alpha, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {alpha!r}; expected a number between 0 and 1") from None
    wanted = (
        f"{name} lies strictly between 0 and 1 (for a value that rounds to 0 or 1, "
        "give logit_alpha= instead)"
    )
    _require(name, host, (host > 0) & (host < 1), wanted)
    return np.log(host) - np.log1p(-host)


def _normalise(log_p: Any, dtype: Any, shown: str) -> Any:
    if not _concrete(log_p):
        return log_p - _logsumexp(log_p)[..., None]
    host = np.asarray(log_p, np.float64)
    _check_normalised(shown, host, unit_roundoff(dtype))
    return jnp.asarray(host - _np_logsumexp(host)[..., None], dtype)


def _check_normalised(name: str, log_p: np.ndarray, roundoff: float) -> None:
    total = np.exp(log_p.astype(np.float64)).sum(axis=-1)
    allowed = max(1e-6, 8 * log_p.shape[-1] * roundoff)
    wanted = f"the probabilities of an instance sum to 1 within {allowed:.0e}"
    _require(name, total, np.abs(total - 1) <= allowed, wanted, of="the sum of ")


def _require(name: str, values: np.ndarray, ok: np.ndarray, wanted: str, of: str = "") -> None:
    if not np.all(ok):
        index = np.unravel_index(int(np.argmin(ok)), np.shape(ok))
        where = "[" + ", ".join(str(int(i)) for i in index) + "]" if index else ""
        raise ValueError(f"{of}{name}{where} is {np.asarray(values)[index]}; {wanted}")


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
