"""The arithmetic that certified verdicts rest on, and the command that checks it on a backend.

Assumed of float32, u = 2^-24: +, - and × are rounded to nearest (or fused), a quotient is off by at
most `QUOTIENT` u, and exp, log and log1p by at most the multiples of u below, relatively, where
they are used; results below the smallest normal number may be flushed to zero. The bounds of the
three functions hold if `largest_errors` says so: it tries every float32, and some hundred
million quotients. It has been run on CPU; on another platform a verdict is UNDECIDED until it has
been run there (the command is `jaxsim doctor --functions`).

For float64 the same multiples are assumed. They cannot be tried exhaustively; `certify` therefore
takes nothing from the device.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxsim.cache import cache_root
from jaxsim.logspace import BLOCK

EXP, LOG, LOG1P = 4, 4, 8
EXPM1 = 8  # of `logspace.expm1_narrow`, a polynomial: proven in docs/verdicts.md
QUOTIENT = 4  # NVIDIA's division is off by up to 2 units in the last place


@dataclass(frozen=True, kw_only=True)
class Function:
    """An elementary function: as the device computes it, its reference, the bound and the domain.

    Attributes:
        device: the function under test.
        reference: the same in NumPy, for float64.
        bound: the relative error assumed, in units of u.
        domain: least and greatest argument that the kernels pass to it.
    """

    device: Callable[[Any], Array]
    reference: Callable[[Any], Any]
    bound: float
    domain: tuple[float, float]


_TINY, _MAX = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
FUNCTIONS = {
    "exp": Function(device=jnp.exp, reference=np.exp, bound=EXP, domain=(-_MAX, 60.0)),
    "log": Function(device=jnp.log, reference=np.log, bound=LOG, domain=(_TINY, _MAX)),
    "log1p": Function(device=jnp.log1p, reference=np.log1p, bound=LOG1P, domain=(0.0, _MAX)),
}


BOUNDS = {name: function.bound for name, function in FUNCTIONS.items()} | {"quotient": QUOTIENT}


def sum_depth(count: int) -> int:
    """Return the most additions that a term goes through in `logspace.total` of `count` terms."""
    depth = 0
    while count > BLOCK:
        depth += BLOCK - 1
        count = -(-count // BLOCK)
    return depth + count - 1


# What `lax.platform_dependent` calls a device's platform, where it does not call it the same.
_LOWERED = {"gpu": ("cuda", "rocm")}

_THREADS = 8  # at most, each of which takes 400 MB

UNTRUSTED = (
    "this device's functions are not checked, so that the slow host decides verdicts; "
    "once: jaxsim doctor --functions"
)


def trust() -> Array:
    """Return 1 on a platform whose functions have been checked, else infinity.

    A factor for error bounds: an infinite one leaves every verdict undecided.
    """
    checked, never = jnp.float32(1.0), jnp.float32(jnp.inf)
    lowered = [name for platform in _trusted() for name in _LOWERED.get(platform, (platform,))]
    branches = {name: lambda: checked for name in lowered}
    return lax.platform_dependent(**branches, default=lambda: never)


def is_trusted(platform: str) -> bool:
    """Whether verdicts can be decided on a platform: "cpu", or one that this user has checked."""
    return platform in _trusted()


def largest_errors(
    *, every: int = 1, progress: Callable[[float], None] = lambda share: None
) -> dict[str, float]:
    """Return the largest relative error of each function in units of u, over all float32.

    Args:
        every: try one in so many significands; 1 tries them all (up to half an hour).
        progress: called with the share that is done.

    Returns:
        By name; infinity where a result is not finite, or not zero where it underflows.

    Numerics:
        The reference is NumPy in float64, whose own error is 10^-8 of a float32 unit.
    """
    worst = dict.fromkeys(BOUNDS, 0.0) | {"quotient": _quotient_error(every)}
    compiled = {name: jax.jit(function.device) for name, function in FUNCTIONS.items()}

    def tried(name: str, sign: int, exponent: int) -> tuple[str, float]:
        function = FUNCTIONS[name]
        x = np.clip(_floats(sign, exponent, every), *function.domain)
        return name, _error(function, x, np.asarray(compiled[name](x)))

    blocks = [(name, *at) for name, f in FUNCTIONS.items() for at in _exponents(f.domain)]
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS))
    try:
        found = pool.map(lambda block: tried(*block), blocks)
        for done, (name, error) in enumerate(found, 1):
            worst[name] = max(worst[name], error)
            progress(done / len(blocks))
    finally:
        pool.shutdown(cancel_futures=True)  # at Ctrl-C too
    return worst


def passes(errors: dict[str, float]) -> bool:
    """Whether errors found are within those assumed."""
    return all(errors[name] <= bound for name, bound in BOUNDS.items())


def record(errors: dict[str, float]) -> Path:
    """Write down that this platform was checked, for `trust` in later sessions of this user."""
    path = _record_path()
    known = _read(path)
    known[_backend()] = errors
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".partial-{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _exponents(domain: tuple[float, float]) -> Iterator[tuple[int, int]]:
    """Yield sign and biased exponent of every block of floats that meets the domain."""
    for sign in (0, 1):
        for exponent in range(1, 255):
            x = _floats(sign, exponent, 1 << 22)
            if x.max() >= domain[0] and x.min() <= domain[1]:
                yield sign, exponent


def _floats(sign: int, exponent: int, every: int) -> np.ndarray:
    head = np.uint32(sign << 31 | exponent << 23)
    significands = np.arange(0, 1 << 23, every, dtype=np.uint32)
    last = np.asarray([(1 << 23) - 1], np.uint32)
    return (np.concatenate([significands, last]) | head).view(np.float32)


def _error(function: Function, x: np.ndarray, found: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        exact = function.reference(x.astype(np.float64))
    difference = np.abs(found.astype(np.float64) - exact)
    flushed = np.abs(exact) < _TINY * (1 + 1e-6)
    # What is subnormal may come out as zero or as itself, or next to the smallest normal number.
    wrong = np.where(flushed, difference > 1.001 * _TINY, ~np.isfinite(found))
    with np.errstate(all="ignore"):
        error = np.where(flushed, 0.0, difference / np.abs(exact) * 2.0**24)
    return float("inf") if wrong.any() else float(error.max())


def _quotient_error(every: int) -> float:
    """Return the largest error of reciprocals, and of a sample of quotients.

    By one divisor each and by a shared one: a compiler may invert that once and multiply.
    """
    rng, divide = np.random.default_rng(0), jax.jit(jnp.divide)

    def error(found: Array, exact: np.ndarray) -> float:
        return float((np.abs(np.asarray(found) - exact) / exact).max()) * 2.0**24

    y = _floats(0, 127, every)
    worst = error(jax.jit(lambda y: 1 / y)(y), 1 / y.astype(np.float64))
    for _ in range(max(1, 64 // every)):
        x, y = (1 + rng.random((32, 1 << 16), np.float32) for _ in range(2))
        for divisor in (y, y[:1]):
            worst = max(worst, error(divide(x, divisor), x.astype(np.float64) / divisor))
    return worst


def _backend() -> str:
    """Name the platform, the kind of device and the version of the compiler."""
    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}, jaxlib {jax.lib.__version__}"


def _trusted() -> set[str]:
    """CPU, and the platform in use if this device was checked under this compiler."""
    backend = _backend()
    errors = _read(_record_path()).get(backend)
    known = isinstance(errors, dict) and set(errors) == set(BOUNDS) and passes(errors)
    return {"cpu", backend.split(":")[0]} if known else {"cpu"}


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _record_path() -> Path:
    return cache_root() / "functions.json"
