"""The hand-written C++ loops of limit.cpp, compiled on the spot."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

_COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-std=c++17", "-fPIC", "-c")
# Without -ffast-math: with it, loading the library would have the whole process flush subnormals.
_LINK = ("-shared", "-fopenmp", "-lmvec", "-lm")


@cache
def library() -> ctypes.CDLL | None:
    """Compile and load the loops; None where there is no compiler that can."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    source = Path(__file__).with_name("limit.cpp")
    with tempfile.TemporaryDirectory(prefix="jaxsim-bench-") as folder:
        code, target = Path(folder) / "limit.o", Path(folder) / "limit.so"
        try:
            subprocess.run([compiler, *_COMPILE, str(source), "-o", str(code)], check=True)
            subprocess.run([compiler, str(code), *_LINK, "-o", str(target)], check=True)
        except subprocess.CalledProcessError:
            return None
        return ctypes.CDLL(str(target))


def simulate(words: np.ndarray, num: int, beta: float) -> dict[str, float]:
    """Draw, evaluate, judge and count `num` default instances of 32 outputs at one β."""
    loaded = library()
    assert loaded is not None
    out = (ctypes.c_double * 5)()
    loaded.simulate(
        ctypes.c_uint32(int(words[0])), ctypes.c_uint32(int(words[1])), ctypes.c_uint32(0),
        ctypes.c_int64(num), ctypes.c_float(beta), out,
    )  # fmt: skip
    hold, violations, undecided, tpm, log_z = out
    return {
        "hold": hold,
        "violations": violations,
        "undecided": undecided,
        "mean_tpm_aligned": tpm / num,
        "mean_log_z": log_z / num,
    }


def adam(log_ref: np.ndarray, t: np.ndarray, steps: int, rate: float) -> tuple[np.ndarray, ...]:
    """Take so many Adam steps from p_ref; return the logits [outputs, instances], and the KL."""
    loaded = library()
    n, num = log_ref.shape
    assert loaded is not None
    assert n <= 1024, "the loop's arrays hold no more outputs"
    assert num % 64 == 0, "the loop takes 64 instances at a time"
    logits, kl = np.empty_like(log_ref), np.empty(num, np.float32)
    pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (log_ref, t, logits, kl)]
    loaded.adam(
        *pointers[:2], ctypes.c_int(n), ctypes.c_int64(num), ctypes.c_int(steps),
        ctypes.c_float(rate), *pointers[2:],
    )  # fmt: skip
    return logits, kl
