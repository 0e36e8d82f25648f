"""The same work by other means: NumPy, Numba, PyTorch, and JAX as one would first write it.

Two works. `simulate`: draw p_A, p_U ~ Dirichlet(a), r ~ N(0, 1) and α ~ U(0, 1), evaluate Theorem
2's verdict, TPM(A) and log Z at one β, and reduce to counts and means. `evaluate`: from arrays in
memory to the seven fields of `Evaluation`, by plain log-sum-exp formulas.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 8192  # instances at a time, for those that keep arrays


def summary(hold: Any, shift: Any, tpm: Any, log_z: Any) -> np.ndarray:
    """Reduce the results of a chunk."""
    return np.asarray([hold.sum(), (hold & (shift < 0)).sum(), tpm.sum(), log_z.sum()], np.float64)


def as_dict(sums: np.ndarray, num: int) -> dict[str, float]:
    """Name the reduced results."""
    return {
        "hold": float(sums[0]),
        "violations": float(sums[1]),
        "mean_tpm_aligned": float(sums[2]) / num,
        "mean_log_z": float(sums[3]) / num,
    }


def _judge(xp: Any, p_a: Any, p_u: Any, r: Any, alpha: Any, beta: float) -> tuple[Any, ...]:
    """Judge unnormalised masses [instances, outputs] in an array library."""
    sum_a, sum_u = p_a.sum(1), p_u.sum(1)
    above = r - r.mean(1)[:, None]
    hold = ((p_a * above).sum(1) > 0) & ((p_u * above).sum(1) < 0)
    top = xp.amax(r, 1)
    weight = xp.exp((r - top[:, None]) / beta)
    grown_a, grown_u = (p_a * weight).sum(1) / sum_a, (p_u * weight).sum(1) / sum_u
    mixed = alpha * grown_a + (1 - alpha) * grown_u
    return hold, xp.log(grown_a / grown_u), alpha * grown_a / mixed, top / beta + xp.log(mixed)


def numpy_simulate(seed: int, num: int, beta: float, concentration: float, n: int = 32) -> dict:
    """NumPy, chunk by chunk."""
    rng, sums = np.random.default_rng(seed), np.zeros(4)

    def masses(shape: tuple[int, int]) -> np.ndarray:
        if concentration == 1:
            return rng.standard_exponential(shape, np.float32)
        return rng.standard_gamma(concentration, shape, np.float32)

    for start in range(0, num, CHUNK):
        shape = min(CHUNK, num - start), n
        p_a, p_u, r = masses(shape), masses(shape), rng.standard_normal(shape, np.float32)
        sums += summary(*_judge(np, p_a, p_u, r, rng.random(shape[0], np.float32), beta))
    return as_dict(sums, num)


def torch_simulate(compiled: bool) -> Callable[..., dict]:
    """Return PyTorch's way, eager or compiled."""
    import torch

    def chunk(size: int, beta: float, n: int) -> Any:
        p_a, p_u = (torch.empty(size, n).exponential_() for _ in range(2))
        r, alpha = torch.randn(size, n), torch.rand(size)
        hold, shift, tpm, log_z = _judge(torch, p_a, p_u, r, alpha, beta)
        fails = hold & (shift < 0)
        return torch.stack([hold.sum().float(), fails.sum().float(), tpm.sum(), log_z.sum()])

    chunk = torch.compile(chunk) if compiled else chunk

    def simulate(seed: int, num: int, beta: float, concentration: float, n: int = 32) -> dict:
        torch.manual_seed(seed)
        sums = np.zeros(4)
        for _ in range(num // CHUNK):
            sums += chunk(CHUNK, beta, n).double().numpy()
        return as_dict(sums, num)

    return simulate


def numba_simulate() -> Callable[..., dict]:
    """Return Numba's way: one loop over instances in parallel."""
    import numba

    @numba.njit(parallel=True, fastmath=True)
    def loop(seed: int, num: int, beta: float, n: int) -> Any:
        blocks = num // CHUNK
        sums = np.zeros((blocks, 4))
        for block in numba.prange(blocks):
            np.random.seed(seed + block)  # noqa: NPY002
            p_a, p_u, r = np.empty(n), np.empty(n), np.empty(n)
            for _ in range(CHUNK):
                sum_a = sum_u = mean = 0.0
                top = -1e30
                for i in range(n):
                    p_a[i] = np.random.standard_exponential()  # noqa: NPY002
                    p_u[i] = np.random.standard_exponential()  # noqa: NPY002
                    r[i] = np.random.standard_normal()  # noqa: NPY002
                    sum_a += p_a[i]
                    sum_u += p_u[i]
                    mean += r[i] / n
                    top = max(top, r[i])
                cov_a = cov_u = grown_a = grown_u = 0.0
                for i in range(n):
                    weight = np.exp((r[i] - top) / beta)
                    cov_a += p_a[i] * (r[i] - mean)
                    cov_u += p_u[i] * (r[i] - mean)
                    grown_a += p_a[i] * weight / sum_a
                    grown_u += p_u[i] * weight / sum_u
                alpha = np.random.random()  # noqa: NPY002
                mixed = alpha * grown_a + (1 - alpha) * grown_u
                hold = cov_a > 0 and cov_u < 0
                sums[block, 0] += hold
                sums[block, 1] += hold and grown_a < grown_u
                sums[block, 2] += alpha * grown_a / mixed
                sums[block, 3] += top / beta + np.log(mixed)
        return sums.sum(axis=0)

    def simulate(seed: int, num: int, beta: float, concentration: float, n: int = 32) -> dict:
        return as_dict(loop(seed, num, beta, n), num)

    return simulate


def jax_simulate() -> Callable[..., dict]:
    """Return JAX as one would first write it: jax.random.dirichlet, vmap and jit."""

    @jax.jit
    def chunk(key: jax.Array, beta: float) -> jax.Array:
        def one(key: jax.Array) -> tuple[Any, ...]:
            k = jax.random.split(key, 4)
            p_a, p_u = (jax.random.dirichlet(k[i], jnp.ones(32)) for i in range(2))
            r, alpha = jax.random.normal(k[2], (32,)), jax.random.uniform(k[3])
            return _judge(jnp, *(x[None] for x in (p_a, p_u, r)), alpha[None], beta)

        hold, shift, tpm, log_z = jax.vmap(one)(jax.random.split(key, 1024))
        return jnp.stack([hold.sum(), (hold & (shift < 0)).sum(), tpm.sum(), log_z.sum()])

    def simulate(seed: int, num: int, beta: float, concentration: float, n: int = 32) -> dict:
        sums = np.zeros(4)
        for at in range(num // 1024):
            sums += np.asarray(chunk(jax.random.key(seed + at), beta))
        return as_dict(sums, num)

    return simulate


def plain_evaluate(xp: Any, logsumexp: Any, log_sigmoid: Any, axis: int) -> Callable[..., tuple]:
    """Return the seven fields by plain formulas in an array library."""

    def evaluate(log_a: Any, log_u: Any, r: Any, logit: Any, beta: Any) -> tuple:
        def over(x: Any) -> Any:
            return x[:, None] if axis == 1 else x[None]

        t = r / over(beta)
        k_a, k_u = logsumexp(log_a + t, axis), logsumexp(log_u + t, axis)
        shift = k_a - k_u
        log_tpm_a, log_tpm_u = log_sigmoid(logit + shift), log_sigmoid(-(logit + shift))
        log_z = log_sigmoid(logit) + k_a - log_tpm_a
        log_ref = xp.logaddexp(over(log_sigmoid(logit)) + log_a, over(log_sigmoid(-logit)) + log_u)
        ratio = t - over(log_z)
        p_star = xp.exp(log_ref + ratio)
        kl, mean = (p_star * ratio).sum(axis), (p_star * r).sum(axis)
        return log_z, log_tpm_a, log_tpm_u, shift, kl, mean, beta * log_z

    return evaluate


def available(module: str) -> bool:
    """Whether an optional peer is installed."""
    return importlib.util.find_spec(module) is not None
