"""Options and fixtures of the test suite; annotations of shapes are checked in every test."""

from jaxtyping import install_import_hook

KERNELS = ["logspace", "tilting", "theorem", "descent", "claims", "families"]
install_import_hook([f"jaxsim.{name}" for name in KERNELS], "beartype.beartype")

import os  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# In CI the same examples each time, so that a red run is a change; elsewhere new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# A kernel that broadcasts by accident is a bug: ranks must agree, or one of them be a scalar.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="widen the sets of instances")


@pytest.fixture(scope="module")
def host_arrays() -> Iterator[None]:
    """Switch shape checks off: a run hands the kernels' results to the host as NumPy arrays."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", was)
