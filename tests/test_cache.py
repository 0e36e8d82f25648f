"""Compiled programs are kept for this user alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import jax
from jaxsim.cache import keep_compiled
keep_compiled()
print(jax.config.jax_compilation_cache_dir)
jax.jit(lambda x: x + 1)(1.0)
"""


def kept(home: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**clean, "XDG_CACHE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_programs_are_kept_in_a_private_folder(tmp_path: Path) -> None:
    place = tmp_path / "jaxsim" / "compiled"
    assert kept(tmp_path) == str(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert any(place.iterdir())


@pytest.mark.parametrize("what", ["writable by others", "a link", "a file"])
def test_a_folder_that_others_may_have_written_is_not_used(tmp_path: Path, what: str) -> None:
    place = tmp_path / "jaxsim" / "compiled"
    place.parent.mkdir()
    if what == "writable by others":
        place.mkdir()
        place.chmod(0o777)
    elif what == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text("")
    assert kept(tmp_path) == "None"


def test_what_the_user_has_settled_stays(tmp_path: Path) -> None:
    assert kept(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(
        tmp_path / "mine"
    )
    assert not (tmp_path / "jaxsim").exists()
