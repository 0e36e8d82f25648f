"""Someone else's loss of pairs, called in its own way and differentiated by its own means.

It may be written in JAX, NumPy, torch, or for plain numbers; here it takes NumPy log-probabilities
[4, examples]: of policy and reference, chosen before rejected. On the host.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROLES = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)
_CHOSEN = {"chosen", "preferred", "winner", "winning", "w"}
_REJECTED = {"rejected", "dispreferred", "unpreferred", "loser", "losing", "l"}
_REFERENCE = {"reference", "ref"}
_TILE = 128  # examples
# Of a central difference over ±1, …, ±4 steps, exact for polynomials of degree 8.
_STENCIL = (4 / 5, -1 / 5, 4 / 105, -1 / 280)


class LossRaisedError(Exception):
    """Someone's loss raised an exception, or gave what is no loss: the cause says what."""


@contextmanager
def _theirs() -> Iterator[None]:
    """Tell exceptions of someone's loss from our own."""
    try:
        yield
    except Exception as error:
        raise LossRaisedError(_told(error)) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True, kw_only=True)
class _Convention:
    """How to call a function.

    Attributes:
        function: to be called.
        names: its own names of the arrays in the order of ROLES; None where it takes them by place.
        count: how many of them it takes, 4, or 2 without a reference.
        settings: all else that it is given.
    """

    function: Callable[..., Any]
    names: tuple[str, ...] | None
    count: int
    settings: dict[str, Any]

    def __call__(self, arrays: Any, **changed: Any) -> Any:
        """Return the loss, of whatever the function returns."""
        settings = self.settings | changed
        if self.names is None:
            return _first(self.function(*arrays[: self.count], **settings))
        return _first(self.function(**dict(zip(self.names, arrays, strict=False)), **settings))

    def __str__(self) -> str:
        arrays = [f"{name}=…" for name in self.names or ()] or ["…"] * self.count
        return ", ".join(arrays + [f"{name}={value!r}" for name, value in self.settings.items()])


class ForeignLoss:
    """A loss of pairs of which nothing is known.

    Attributes:
        name: of the function.
        kind: "jax", "numpy", "torch", or "float" where it takes single numbers.
        called_as: how it is called.
        takes_reference: whether it takes the reference's log-probabilities.
        settings: what it is given besides log-probabilities; "beta" where it takes one.
        parameters: its parameters by name.
        unit_roundoff: of the type in which it answers to float64.
        apart: whether to call it for one example at a time, lest examples meet.
        detached: whether it is a torch loss that autograd finds no way through.
        step: a length on which it changes, for finite differences; at first 1/β.
        below_zero: whether log-probabilities have to stay below zero in them.
    """

    def __init__(
        self, function: Callable[..., Any], *, beta: float, reduction: str, options: dict[str, Any]
    ) -> None:
        self.name = _name(function)
        self.parameters = _parameters(function)
        self.step = 1 / beta
        self.below_zero = True
        self._compiled: Any = None
        probe = np.log([[0.5, 0.2], [0.3, 0.6], [0.4, 0.3], [0.3, 0.4]])
        failures: dict[str, Exception] = {}
        for convention in self._conventions(function, beta, reduction, options):
            self._call = convention
            for kind in ("jax", "numpy", "torch", "float"):
                if kind == "torch" and "torch" not in sys.modules:
                    continue
                try:
                    self.kind = kind
                    answer = self._first_answer(probe)
                    self.unit_roundoff = float(_finfo(answer).eps)
                except Exception as error:
                    failures.setdefault(_told(error), error)
                    continue
                self.takes_reference = convention.count == 4
                self.settings = convention.settings
                self.called_as = f"{self.name}({convention})"
                self.apart = self.kind == "float"
                self.detached = self.kind == "torch" and not answer.requires_grad
                return
        raise ValueError(
            f"{self.name} fails, called as {self.name}({self._call}): {'; or '.join(failures)}"
        ) from list(failures.values())[-1]

    def _first_answer(self, logps: np.ndarray) -> Any:
        """Return what it makes of a batch of its kind; raise whatever it does on another kind."""
        if self.kind == "jax":
            # A function that takes concrete arrays alone cannot be differentiated by JAX.
            jax.eval_shape(self._call, jnp.asarray(logps))
        answer = self._answer(logps)
        if self.kind == "numpy" and _is_tensor(answer):
            self.kind = "torch"
            return self._answer(logps)
        return answer

    def _conventions(
        self, function: Callable[..., Any], beta: float, reduction: str, options: dict[str, Any]
    ) -> Iterator[_Convention]:
        """Yield the ways in which a function may want to be called, the likeliest first."""
        kinds = {p.kind for p in self.parameters.values()}
        any_name = inspect.Parameter.VAR_KEYWORD in kinds
        named = [p for p in self.parameters.values() if p.kind not in _OPEN]
        unknown = [name for name in options if name not in {p.name for p in named}]
        if unknown and not any_name:
            raise ValueError(f"{self.name} has no parameter {unknown[0]!r}")
        settings = dict(options)
        if "reduction" in self.parameters:
            settings.setdefault("reduction", reduction)
        names, count = _roles(self.name, named, {"beta", *settings}, kinds)
        needed = [
            p.name
            for p in named
            if p.default is p.empty and p.name not in {"beta", *settings, *(names or ())}
        ]
        missing = needed if names else needed[count:]
        if missing:
            raise ValueError(f"{self.name} needs {missing[0]!r}; give it as an option")
        if "beta" in self.parameters or any_name:
            with_beta = {"beta": beta} | settings
            yield _Convention(function=function, names=names, count=count, settings=with_beta)
        if "beta" not in self.parameters:
            yield _Convention(function=function, names=names, count=count, settings=settings)

    def _answer(self, logps: np.ndarray, **changed: Any) -> Any:
        """Return what it makes of a batch, as an array of its own library."""
        if self.kind == "jax":
            return jnp.asarray(self._call(tuple(map(jnp.asarray, logps)), **changed))
        if self.kind == "torch":
            torch = sys.modules["torch"]
            tensors = [torch.from_numpy(np.array(x)).requires_grad_() for x in logps]
            answer = self._call(tensors, **changed)
            return answer if _is_tensor(answer) else torch.as_tensor(np.asarray(answer))
        if self.kind == "float":
            return np.array([self._call(column.tolist(), **changed) for column in logps.T])
        answer = self._call([np.array(x) for x in logps], **changed)
        return answer if _is_tensor(answer) else np.asarray(answer)

    @property
    def has_gradient(self) -> bool:
        """Whether its own library differentiates it."""
        return self.kind in ("jax", "torch") and not self.detached

    def batch(self, logps: np.ndarray, **changed: Any) -> np.ndarray:
        """Return what it makes of a batch, in float64 but of any shape.

        Args:
            logps: [4, examples], in float64 or float32.
            **changed: settings to change.
        """
        with _theirs():
            answer = self._answer(logps, **changed)
            if _is_tensor(answer):
                answer = answer.detach().cpu().double().numpy()
            return np.asarray(answer, np.float64)

    def dtype(self, logps: np.ndarray) -> str:
        """Return the name of the type in which it answers."""
        x = jnp.asarray(logps)
        with _theirs():
            answer = jax.eval_shape(self._call, x) if self.kind == "jax" else self._answer(logps)
            return str(answer.dtype).removeprefix("torch.")

    def values(self, logps: np.ndarray, **changed: Any) -> np.ndarray:
        """Return the value of each example by itself, [examples]."""
        if self.kind == "jax" and not changed:
            return self._by_jax(logps)[0]
        if not self.apart:
            return self.batch(logps, **changed)
        with _theirs():
            singles = [self._answer(x[:, None], **changed) for x in logps.T]
            return np.array([float(single.sum()) for single in singles])

    def gradients(self, logps: np.ndarray) -> np.ndarray:
        """Return each value's gradient in the policy's log-probabilities, [2, examples]."""
        if self.kind == "jax":
            return self._by_jax(logps)[1]
        if not self.has_gradient:
            return self.differences(logps)
        if not self.apart:
            return self._by_autograd(logps)
        singles = [self._by_autograd(logps[:, [at]]) for at in range(logps.shape[1])]
        return np.concatenate(singles, axis=1)

    def differences(self, logps: np.ndarray, *, narrower: float = 1.0) -> np.ndarray:
        """Return the same by finite differences of eighth order, over so much narrower steps."""
        relative = self.unit_roundoff ** (1 / 9) / narrower
        slopes = []
        for at in range(2):
            step = np.full(logps.shape[1], relative * self.step)
            if self.below_zero:  # at zero log(1 - π) has its singularity
                step = np.minimum(step, relative * np.abs(logps[at]))
            moved = []
            for far in range(1, len(_STENCIL) + 1):
                for sign in (1, -1):
                    x = logps.copy()
                    x[at] += sign * far * step
                    moved.append(x)
            values = self.values(np.concatenate(moved, axis=1)).reshape(len(moved), -1)
            slopes.append(np.array(_STENCIL) @ (values[::2] - values[1::2]) / step)
        return np.stack(slopes)

    def smooth(self, logps: np.ndarray) -> np.ndarray:
        """Return where finite differences agree with those over half the step: at no kink.

        `step` is made smaller where that makes most of them agree.
        """
        given, answers = self.step, []
        for _ in range(6):
            wide, narrow = self.differences(logps), self.differences(logps, narrower=2.0)
            rounding = self.unit_roundoff**0.75 * np.nanmax(np.abs(narrow), initial=0.0)
            agree = np.isclose(wide, narrow, self.unit_roundoff**0.5, rounding)
            answers.append(agree.all(axis=0))
            if answers[-1].mean() >= 0.8:
                return answers[-1]
            self.step /= 4
        self.step = given
        return answers[0]

    def _by_jax(self, logps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values and gradients of single examples, by tiles of one size, compiled once."""
        if self._compiled is None:

            def one(x: Any) -> Any:
                return jnp.sum(self._call(tuple(x[:, None])))

            self._compiled = jax.jit(jax.vmap(jax.value_and_grad(one), 1, (0, 1)))
        num = logps.shape[1]
        places = np.minimum(np.arange(-(-num // _TILE) * _TILE), num - 1)
        with _theirs():
            tiles = [
                self._compiled(jnp.asarray(logps[:, places[at : at + _TILE]]))
                for at in range(0, num, _TILE)
            ]
        value = np.concatenate([np.asarray(v) for v, _ in tiles])[:num]
        return value, np.concatenate([np.asarray(g) for _, g in tiles], axis=1)[:2, :num]

    def _by_autograd(self, logps: np.ndarray) -> np.ndarray:
        torch = sys.modules["torch"]
        tensors = [torch.from_numpy(np.array(x)).requires_grad_() for x in logps]
        with _theirs():
            total = self._call(tensors).sum()
            slopes = torch.autograd.grad(total, tensors[:2], allow_unused=True)
        zero = np.zeros(logps.shape[1])
        return np.stack([zero if x is None else x.double().numpy() for x in slopes])


_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a function's parameters; those of a torch module are in `forward`."""
    try:
        return dict(inspect.signature(getattr(function, "forward", function)).parameters)
    except (TypeError, ValueError):
        return {"arrays": inspect.Parameter("arrays", inspect.Parameter.VAR_POSITIONAL)}


def _roles(
    name: str, named: list[inspect.Parameter], settings: set[str], kinds: set[Any]
) -> tuple[tuple[str, ...] | None, int]:
    """Return the names of the log-probabilities in the order of ROLES, or None, and how many."""
    found: dict[int, str] = {}
    for p in named:
        words = set(p.name.lower().split("_"))
        side = 0 if words & _CHOSEN else 1 if words & _REJECTED else None
        optional = p.default is not p.empty and not any(w.startswith("log") for w in words)
        if side is None or optional or p.kind is p.POSITIONAL_ONLY or p.name in settings:
            continue
        found.setdefault(side + 2 * bool(words & _REFERENCE), p.name)
    if sorted(found) in ([0, 1], [0, 1, 2, 3]):
        return tuple(found[role] for role in sorted(found)), len(found)
    places = [
        p for p in named if p.kind in _BY_PLACE and p.name not in settings and p.default is p.empty
    ]
    if len(places) >= 4 or inspect.Parameter.VAR_POSITIONAL in kinds:
        return None, 4
    if len(places) == 2:
        return None, 2
    listed = ", ".join(p.name for p in named)
    raise ValueError(
        f"{name} takes ({listed}); expected a loss of pairs that takes {', '.join(ROLES)}, or the "
        "first two of these"
    )


def _first(answer: Any) -> Any:
    """Return the loss of an answer: the field, the entry or the first item."""
    for field in ("loss", "losses"):
        if isinstance(answer, dict) and field in answer:
            return answer[field]
        if hasattr(answer, field):
            return getattr(answer, field)
    return answer[0] if isinstance(answer, tuple) else answer


def _is_tensor(x: Any) -> bool:
    return "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor)


def _finfo(answer: Any) -> Any:
    if _is_tensor(answer):
        return sys.modules["torch"].finfo(answer.dtype)
    return jnp.finfo(answer.dtype)


def _name(function: Callable[..., Any]) -> str:
    inner = getattr(function, "func", function)  # of functools.partial
    return str(getattr(inner, "__qualname__", type(inner).__qualname__))
