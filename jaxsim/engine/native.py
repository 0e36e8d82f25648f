"""An optional native kernel of `evaluate` on CPU; `jaxsim native` builds it from native.cpp.

XLA on CPU writes some forty intermediate arrays; the kernel keeps an instance in a core's cache,
and is three to five times as fast (docs/performance.md). Where it has not been built, and on every
other platform, `evaluate` is compiled by XLA. Both keep the same promise of accuracy; their last
bits differ.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jaxsim.cache import private_folder
from jaxsim.instance import Instance
from jaxsim.tilting import Evaluation

_SOURCE = Path(__file__).with_name("native.cpp")
_COMPILE = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
_FIELDS = ("log_p_aligned", "log_p_unaligned", "reward", "logit_alpha", "beta")
_RESULTS = tuple(Evaluation.__dataclass_fields__)  # native.cpp returns them in this order


def build() -> Path:
    """Compile the kernel for this machine, this user and this jaxlib; return where it lies.

    Raises:
        FileNotFoundError: where there is no C++ compiler.
        OSError: where the compiler fails, or the user's cache cannot be written.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler on the PATH: c++, g++ or clang++")
    target = _library()
    if target is None:
        raise OSError("the folder 'native' of the user's cache is not this user's alone")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *_COMPILE, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(made)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise OSError(f"{compiler} failed: {found.stderr.strip()[-2000:]}")
        made.replace(target)
    load.cache_clear()
    return target


def remove() -> bool:
    """Delete the kernel; return whether there was one. A running process keeps it."""
    target = _library()
    if target is None or not target.exists():
        return False
    target.unlink()
    return True


def _library() -> Path | None:
    """Return where the kernel lies, built or not; None if nowhere safe."""
    folder = private_folder("native")
    return None if folder is None else folder / f"{_name()}.so"


@cache
def _name() -> str:
    """Name the kernel by its source, jaxlib and processor."""
    made_of = [_SOURCE.read_text(), *_COMPILE, jaxlib.__version__, platform.machine(), _processor()]
    return f"evaluate-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}"


def _processor() -> str:
    """Name the processor's instructions: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def load() -> bool:
    """Load the kernel if it has been built; return whether it is there."""
    target = _library()
    if target is None or not target.is_file():
        return False
    _register(_name(), target)
    return True


_registered: set[str] = set()  # JAX takes a name once per process


def _register(name: str, target: Path) -> None:
    if name in _registered:
        return
    library = ctypes.CDLL(str(target))
    for dtype in ("float32", "float64"):
        handler = jax.ffi.pycapsule(getattr(library, f"jaxsim_evaluate_{dtype}"))
        jax.ffi.register_ffi_target(f"jaxsim-{name}-{dtype}", handler, platform="cpu")
    _registered.add(name)


def where_built(
    xla: Callable[[Instance], Evaluation], rank_of: Callable[[str, tuple[Instance]], int]
) -> Callable[[Instance], Evaluation]:
    """Return `evaluate`, which takes the kernel on CPU once it is built, and `xla` for all else.

    Args:
        xla: `evaluate` as XLA compiles it; gives all derivatives.
        rank_of: checks the instance's shapes, and returns 0 for one, 1 for a batch.
    """

    def by_xla(batch: Instance) -> tuple[Array, ...]:
        found = xla(batch)
        return tuple(getattr(found, name) for name in _RESULTS)

    @jax.custom_jvp
    def either(batch: Instance) -> tuple[Array, ...]:
        return lax.platform_dependent(batch, cpu=lambda b: tuple(_rows(b)), default=by_xla)

    @either.defjvp
    def _(primals: tuple[Instance], tangents: tuple[Instance]) -> tuple[Any, Any]:
        return jax.jvp(by_xla, primals, tangents)

    compiled = jax.jit(lambda batch: _named(either(batch)))

    @wraps(xla)
    def evaluate(instance: Instance) -> Evaluation:
        if not load():
            return xla(instance)
        if rank_of("evaluate", (instance,)):
            return compiled(instance)
        alone = jax.tree.map(lambda x: jnp.asarray(x)[None], instance)
        return jax.tree.map(lambda x: x[0], compiled(alone))

    return evaluate


def evaluate_tile(tile: Instance) -> Evaluation:
    """Evaluate a tile, [outputs, instances], natively; without derivatives, on CPU alone."""
    return _named(_call(tile, outputs_first=True))


def _named(found: Iterable[Array]) -> Evaluation:
    return Evaluation(**dict(zip(_RESULTS, found, strict=True)))


@custom_vmap
def _rows(batch: Instance) -> Array:
    """Return the results for [instances, outputs], one row each."""
    return _call(batch, outputs_first=False)


@_rows.def_vmap
def _(axis_size: int, batched: list[Instance], batch: Instance) -> tuple[Array, bool]:
    """Take a further axis of instances into the one there is."""

    def joined(x: Array, is_batched: bool) -> Array:
        x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    found = _rows(jax.tree.map(joined, batch, batched[0]))
    return jnp.moveaxis(found.reshape(len(_RESULTS), axis_size, -1), 1, 0), True


def _call(batch: Instance, *, outputs_first: bool) -> Array:
    dtype, num = batch.reward.dtype, batch.beta.shape[0]
    target = f"jaxsim-{_name()}-{dtype}"
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((len(_RESULTS), num), dtype))
    arrays = (jnp.asarray(getattr(batch, name), dtype) for name in _FIELDS)
    return call(*arrays, outputs_first=outputs_first)
