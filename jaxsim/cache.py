"""This user's cache: compiled programs, and what has been found out about devices."""

import os
import stat
from pathlib import Path


def cache_root() -> Path:
    """Return the folder, which may not exist yet: $XDG_CACHE_HOME/jaxsim, or ~/.cache/jaxsim."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsim"


def private_folder(name: str) -> Path | None:
    """Return a folder of the cache for code, made if need be; None where others could write to it.

    Whoever can write there can run code as this user.
    """
    path = cache_root() / name
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    if hasattr(os, "getuid") and (
        found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022
    ):
        return None
    return path


def keep_compiled() -> None:
    """Have JAX keep compiled programs between processes, where the user has not settled that."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    path = private_folder("compiled")
    if path is None:
        return  # nowhere to keep them: compile anew
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
