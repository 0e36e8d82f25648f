"""Read the results of a finished run back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsim.runs.directory import RunDirectory

if TYPE_CHECKING:
    import xarray


def to_xarray(run: str | Path) -> "xarray.Dataset":
    """Return a run's summary as an `xarray.Dataset` over β; needs the extra `xarray`.

    Args:
        run: the directory of a finished run.

    Returns:
        A variable for each column of `summary.parquet` over the coordinate `beta`, and over
        `outputs` and `beta` the violations by number of outputs, as far as the run counted them.
        The configuration is in the attributes, as TOML.

    Raises:
        ValueError: where the directory holds no finished run.
        ImportError: where xarray is not installed.

    Example:
        >>> from jaxsim import to_xarray
        >>> to_xarray("jaxsim-runs/1").tpm_aligned_q50.sel(beta=1.0)  # doctest: +SKIP
    """
    import numpy as np
    import pyarrow.parquet
    import xarray

    directory = RunDirectory.open(Path(run))
    columns = pyarrow.parquet.read_table(directory.path / "summary.parquet").to_pydict()
    beta = columns.pop("beta")
    variables: dict[str, Any] = {name: ("beta", np.asarray(x)) for name, x in columns.items()}
    found = directory.read_csv("violations") or {"outputs": []}
    outputs = sorted(set(found["outputs"]))
    shape = len(outputs), len(beta)
    if outputs and len(found["outputs"]) == len(outputs) * len(beta):
        for name in ("hypotheses_hold", "violations", "share", "low", "high"):
            values = np.asarray(found[name]).reshape(shape)
            variables[f"{name}_by_outputs"] = (("outputs", "beta"), values)
    return xarray.Dataset(
        variables,
        coords={"beta": beta, "outputs": np.asarray(outputs, int)},
        attrs={"config": (directory.path / "config.toml").read_text(encoding="utf-8")},
    )
