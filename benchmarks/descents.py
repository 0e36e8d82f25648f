"""Descent on eq. (1) by other means: Adam in PyTorch, L-BFGS-B in SciPy, Rprop in NumPy.

Each looks at KL(π‖p*) = log E_π[e^x], x = h - E_π[h], h = r/β - log(π/p_ref), before every step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize

RATE = 0.1


def torch_adam(steps: int, compiled: bool) -> Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]:
    """Return so many Adam steps from p_ref in PyTorch, for arrays [outputs, instances]."""
    import torch

    def look(z: Any, log_ref: Any, t: Any) -> tuple[Any, Any]:
        log_pi = torch.log_softmax(z, 0)
        pi = log_pi.exp()
        h = t - (log_pi - log_ref)
        x = h - (pi * h).sum(0)
        near = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120))))
        far = x.clamp(max=80).exp() - 1 - x
        kl = torch.log1p((pi * torch.where(x.abs() < 0.25, near, far)).sum(0))
        return kl, -pi * x

    def step(z: Any, m: Any, v: Any, c1: Any, c2: Any, log_ref: Any, t: Any) -> tuple[Any, ...]:
        kl, g = look(z, log_ref, t)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        return z - RATE * (c1 * m) / ((c2 * v).sqrt() + 1e-8), m, v, kl

    if compiled:
        look, step = torch.compile(look), torch.compile(step)
    factors = [
        (torch.tensor(1 / (1 - 0.9**k)), torch.tensor(1 / (1 - 0.999**k)))
        for k in range(1, steps + 1)
    ]

    def run(log_ref: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            given = torch.from_numpy(log_ref), torch.from_numpy(t)
            z, m = given[0].clone(), torch.zeros_like(given[0])
            v = torch.zeros_like(m)
            for c1, c2 in factors:
                z, m, v, _ = step(z, m, v, c1, c2, *given)
            return z.numpy(), look(z, *given)[0].numpy()

    return run


def scipy_lbfgs(log_ref: np.ndarray, t: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
    """Return KL(π‖p*) by L-BFGS-B, instance by instance, and how often they looked.

    It stops as soon as the certificate allows, like everyone here.
    """
    kl, looks = np.empty(t.shape[1]), 0

    for at in range(t.shape[1]):
        log_p, scaled = log_ref[:, at].astype(float), t[:, at].astype(float)
        last = [np.inf]

        def value(z: np.ndarray, log_p: Any = log_p, t: Any = scaled, last: Any = last) -> Any:
            nonlocal looks
            looks += 1
            found, gradient, last[0] = _look(z, log_p, t)
            return found, gradient

        def enough(intermediate_result: Any, last: Any = last) -> None:
            if last[0] <= tolerance:
                raise StopIteration

        minimize(
            value, log_p, jac=True, method="L-BFGS-B", callback=enough,
            options={"maxiter": 1000, "maxfun": 10_000, "ftol": 0, "gtol": 0},
        )  # fmt: skip
        kl[at] = last[0]
    return kl, looks


def numpy_rprop(log_ref: np.ndarray, t: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
    """Return the same by jaxsim's default, Rprop, instance by instance in NumPy."""
    kl, looks = np.empty(t.shape[1]), 0
    for at in range(t.shape[1]):
        log_p, scaled = log_ref[:, at].astype(float), t[:, at].astype(float)
        z, size, last = log_p.copy(), np.full_like(log_p, 0.1), np.zeros_like(log_p)
        for _ in range(1000):
            looks += 1
            _, gradient, kl[at] = _look(z, log_p, scaled)
            if kl[at] <= tolerance:
                break
            same = gradient * last
            grown = np.clip(size * np.where(same > 0, 1.2, 0.5), 1e-9, 2.0)
            size = np.where(same == 0, size, grown)
            last = np.where(same < 0, 0.0, size * np.sign(gradient))
            z = z - last
    return kl, looks


def _look(z: np.ndarray, log_p: np.ndarray, t: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Return -L(π)/β for one instance, its gradient, and KL(π‖p*)."""
    shifted = z - z.max()
    log_pi = shifted - np.log(np.exp(shifted).sum())
    pi = np.exp(log_pi)
    h = t - (log_pi - log_p)
    mean = pi @ h
    x = h - mean
    return -mean, -pi * x, float(np.log1p(pi @ (np.expm1(np.minimum(x, 700)) - x)))
