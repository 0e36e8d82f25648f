"""Measure jaxsim beside its peers on the same work: python -m benchmarks [--out DIR] [--quick].

Writes benchmarks.json and benchmarks.md. Every way of doing a work is timed in turns, warm, five
times; tables give medians, and the spread. Peers that are not installed are left out with a
message: pip install -e '.[bench]' brings them, a C++ compiler the limit.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsim
from benchmarks import descents, limit, peers
from benchmarks.timing import Timing, in_turns
from jaxsim import Components, Family, Instance, descent, tilting
from jaxsim.engine import lift, native
from jaxsim.families.counter import key_words
from jaxsim.runs.config import SolveConfig
from jaxsim.sources import draw_tile, index_words, tile_size

KEY = jax.random.key(0)
BETA = 0.3
ADAM_STEPS = 64
Ways = dict[str, tuple[Callable[[], Any], int]]


def simulate_ways(concentration: float, num: int) -> Ways:
    """Draw, evaluate, judge and reduce, 32 outputs."""
    family = Family(
        outputs=32,
        components=Components(
            concentration_aligned=concentration, concentration_unaligned=concentration
        ),
    )
    ways: Ways = {
        "jaxsim": (lambda: jaxsim.simulate(KEY, family, num, betas=(BETA,)), num),
        "NumPy": (lambda: peers.numpy_simulate(0, num // 4, BETA, concentration), num // 4),
    }
    if concentration != 1:
        return ways
    if limit.library():
        ways["C++"] = lambda: limit.simulate(np.asarray(key_words(KEY)), num, BETA), num
    if peers.available("torch"):
        for name, compiled in (("torch", False), ("torch.compile", True)):
            peer = peers.torch_simulate(compiled)
            ways[name] = (lambda peer=peer: peer(0, num // 4, BETA, 1.0)), num // 4
    if peers.available("numba"):
        compiled_loop = peers.numba_simulate()
        ways["Numba"] = lambda: compiled_loop(0, num, BETA, 1.0), num
    naive = peers.jax_simulate()
    few = max(1024, num // 512)
    ways["JAX, jax.random.dirichlet"] = lambda: naive(0, few, BETA, 1.0), few
    return ways


def instances(num: int) -> tuple[Instance, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return default instances as a batch, and as NumPy arrays in rows and in columns."""
    batch = jaxsim.sample_instances(KEY, Family(outputs=32), num)
    rows = {name: np.asarray(x) for name, x in vars(batch).items()}
    columns = {name: np.ascontiguousarray(x.T) for name, x in rows.items()}
    return batch, rows, columns


def evaluate_ways(num: int, *, rows: bool) -> Ways:
    """Evaluate all fields from memory: instances in rows, or outputs in rows (a tile)."""
    batch, by_row, by_column = instances(num)
    arrays = by_row if rows else by_column
    order = ("log_p_aligned", "log_p_unaligned", "reward", "logit_alpha", "beta")
    xla: Callable[[Instance], Any] = lift.lift(tilting.evaluate)
    ours: Callable[[Instance], Any] = jaxsim.evaluate
    parts = [batch]
    if not rows:
        size, words, family = tile_size(32), key_words(KEY), Family(outputs=32)
        parts = [draw_tile(family, words, index_words(at)) for at in range(0, num, size)]
        xla = jax.jit(tilting.evaluate)
        ours = jax.jit(native.evaluate_tile) if native.load() else xla
    ways: Ways = {"jaxsim": (lambda: jax.block_until_ready([ours(part) for part in parts]), num)}
    if native.load():
        ways["jaxsim by XLA"] = lambda: jax.block_until_ready([xla(p) for p in parts]), num
    axis = 1 if rows else 0
    if peers.available("torch"):
        import torch

        plain = peers.plain_evaluate(torch, torch.logsumexp, torch.nn.functional.logsigmoid, axis)
        tensors = [torch.from_numpy(arrays[name].copy()) for name in order]
        compiled = torch.compile(plain)
        ways["torch.compile"] = lambda: compiled(*tensors), num
        ways["torch"] = lambda: plain(*tensors), num
    naive = jax.jit(
        peers.plain_evaluate(jnp, jax.scipy.special.logsumexp, jax.nn.log_sigmoid, axis)
    )
    leaves = [jnp.asarray(arrays[name]) for name in order]
    ways["JAX, plain formulas"] = lambda: jax.block_until_ready(naive(*leaves)), num
    from scipy.special import log_expit, logsumexp

    in_numpy = peers.plain_evaluate(np, logsumexp, log_expit, axis)
    few = [
        arrays[name][..., : num // 8] if not rows else arrays[name][: num // 8] for name in order
    ]
    ways["NumPy/SciPy"] = lambda: in_numpy(*few), num // 8
    big = [arrays[name] for name in order[:3]]
    ways["reading the arrays"] = lambda: [x.sum() for x in big], num
    return ways


def problem(num: int) -> tuple[Instance, np.ndarray, np.ndarray]:
    """Return instances to descend on, and as arrays [outputs, instances] log p_ref and r/β."""
    batch = jaxsim.sample_instances(KEY, SolveConfig().family, num)
    task = descent.problem(jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), batch))
    return batch, np.array(task.log_p_ref), np.array(task.t)


def adam_ways(num: int) -> Ways:
    """Take so many Adam steps, each with its certificate; counted are instances times steps."""
    batch, log_ref, t = problem(num)
    optimizer = optax.adam(descents.RATE)

    def ours() -> Any:
        found = jaxsim.solve(batch, optimizer=optimizer, max_steps=ADAM_STEPS, tolerance=1e-30)
        return jax.block_until_ready(found)

    ways: Ways = {"jaxsim": (ours, num * ADAM_STEPS)}
    if limit.library():
        ways["C++"] = (
            lambda: limit.adam(log_ref, t, ADAM_STEPS, descents.RATE),
            num * ADAM_STEPS,
        )
    if peers.available("torch"):
        for name, compiled in (("torch", False), ("torch.compile", True)):
            peer = descents.torch_adam(ADAM_STEPS, compiled)
            ways[name] = (lambda peer=peer: peer(log_ref, t)), num * ADAM_STEPS
            # In pieces that a cache holds, where that is faster.
            parts = [
                (np.ascontiguousarray(log_ref[:, at : at + 2048]), np.ascontiguousarray(x))
                for at, x in ((at, t[:, at : at + 2048]) for at in range(0, num, 2048))
            ]
            in_parts = lambda peer=peer, parts=parts: [peer(*part) for part in parts]
            ways[f"{name}, 2,048 at a time"] = in_parts, num * ADAM_STEPS
    return ways


def descent_ways(num: int) -> Ways:
    """Descend until KL(π‖p*) ≤ 0.9e-6, from p_ref."""
    batch, log_ref, t = problem(num)
    few = max(64, num // 1024)
    half = jaxsim.natural_gradient(0.5, per_beta=True)
    return {
        "jaxsim": (lambda: jax.block_until_ready(jaxsim.solve(batch)), num),
        "jaxsim, natural gradient ½/β": (
            lambda: jax.block_until_ready(jaxsim.solve(batch, optimizer=half)),
            num,
        ),
        "SciPy, L-BFGS-B": (
            lambda: descents.scipy_lbfgs(log_ref[:, :few], t[:, :few], 0.9e-6),
            few,
        ),
        "NumPy, Rprop": (lambda: descents.numpy_rprop(log_ref[:, :few], t[:, :few], 0.9e-6), few),
    }


def by_outputs(total: int) -> Ways:
    """Simulate at equal total work for growing numbers of outputs."""
    ways: Ways = {}
    for n in (2, 8, 32, 128, 1024, 8192, 65536):
        num, family = max(1, total // n), Family(outputs=n)
        call = lambda family=family, num=num: jaxsim.simulate(KEY, family, num, betas=(BETA,))
        ways[f"{n}"] = call, num * n
    return ways


def by_instances(most: int) -> Ways:
    """Simulate growing numbers of instances."""
    ways: Ways = {}
    num = 1000
    while num <= most:
        call = lambda num=num: jaxsim.simulate(KEY, Family(outputs=32), num, betas=(BETA,))
        ways[f"{num:,}"] = call, num
        num *= 10
    return ways


WORKS: dict[str, tuple[str, Callable[[int], Ways], int]] = {
    "simulate": (
        "Draw, evaluate, judge and reduce: 32 outputs, Dirichlet(1), one β",
        lambda num: simulate_ways(1.0, num),
        1 << 20,
    ),
    "simulate_0.1": ("The same, Dirichlet(0.1)", lambda num: simulate_ways(0.1, num), 1 << 19),
    "simulate_5": ("The same, Dirichlet(5)", lambda num: simulate_ways(5.0, num), 1 << 19),
    "evaluate_tile": (
        "Evaluate all seven fields from memory, [outputs, instances], 32 outputs",
        lambda num: evaluate_ways(num, rows=False),
        1 << 19,
    ),
    "evaluate_rows": (
        "The same from [instances, outputs]",
        lambda num: evaluate_ways(num, rows=True),
        1 << 19,
    ),
    "adam": (
        f"{ADAM_STEPS} Adam steps on eq. (1), each with its certificate, 32 outputs, per step",
        adam_ways,
        1 << 17,
    ),
    "descent": ("Descend to KL(π‖p*) ≤ 1e-6 from p_ref, 32 outputs", descent_ways, 1 << 18),
    "outputs": ("Simulate, by number of outputs, per output", by_outputs, 1 << 24),
    "instances": ("Simulate, by number of instances", by_instances, 1_000_000),
}


def table(title: str, timings: dict[str, Timing]) -> str:
    """Return a work's timings as a Markdown table."""
    ours = timings.get("jaxsim")
    header = ["", "million/s", "spread", "first call, s"] + ["jaxsim is"] * (ours is not None)
    lines = [
        f"## {title}",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
    ]
    for name, found in timings.items():
        low, high = found.instances / found.most / 1e6, found.instances / found.least / 1e6
        row = [name, f"{found.rate / 1e6:.3g}", f"{low:.3g} – {high:.3g}", f"{found.first:.2f}"]
        if ours is not None:
            row.append("" if name == "jaxsim" else f"{ours.rate / found.rate:.2f} ×")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Name the machine and what runs on it."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} ({device.platform}), {jax.device_count()} device(s)",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "jaxsim": jaxsim.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("jaxsim-benchmarks"))
    parser.add_argument("--only", choices=WORKS, action="append", help="a work; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the instances, twice")
    options = parser.parse_args(arguments)
    for name, module in (("PyTorch", "torch"), ("Numba", "numba")):
        if not peers.available(module):
            print(f"left out: {name} (pip install -e '.[bench]')", file=sys.stderr)
    if not limit.library():
        print("left out: C++ (no compiler c++ or g++, or it failed)", file=sys.stderr)
    if not native.load():
        print("left out: jaxsim's native kernel (jaxsim native)", file=sys.stderr)
    found, parts = {}, []
    for name in options.only or WORKS:
        title, make, num = WORKS[name]
        timings = in_turns(
            make(num // 16 if options.quick else num), rounds=2 if options.quick else 5
        )
        found[name] = {way: asdict(timing) for way, timing in timings.items()}
        parts.append(table(title, timings))
        print(parts[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "works": found}
    (options.out / "benchmarks.json").write_text(json.dumps(report, indent=2) + "\n")
    heading = "\n".join(f"- {key}: {value}" for key, value in machine().items())
    (options.out / "benchmarks.md").write_text(heading + "\n\n" + "\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
