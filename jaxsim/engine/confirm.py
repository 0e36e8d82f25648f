"""Confirm the closed form by descent on a sample of a source, and record the course of descent."""

import jax
import numpy as np
import optax

from jaxsim.descent import Solution
from jaxsim.engine.loop import DEFAULT_OPTIMIZER, descent_trace, solve
from jaxsim.sources import Source, sample


def confirm(source: Source, num: int, betas: tuple[float, ...]) -> tuple[Solution, np.ndarray]:
    """Solve a sample by the default descent; return the solutions and the β of each."""
    batch = sample(source, num, betas)
    return jax.device_get(solve(batch)), np.asarray(batch.beta, np.float64)


def traces(source: Source, betas: tuple[float, ...], num: int, steps: int) -> dict[str, np.ndarray]:
    """Return KL(π‖p*) [steps, instances] during descent, for the default optimiser and for Adam."""
    batch = sample(source, num, betas)
    optimizers = {"Rprop (default)": DEFAULT_OPTIMIZER, "Adam, rate 0.1": optax.adam(0.1)}
    return {
        name: np.asarray(descent_trace(batch, optimizer, steps))
        for name, optimizer in optimizers.items()
    }
