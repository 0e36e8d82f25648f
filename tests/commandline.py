"""Call the command line within the test's own process."""

from pathlib import Path

from jaxsim.cli import main


def call(*argv: str | Path) -> int:
    """Run the command line here; return its exit code."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as exit_:
        return int(exit_.code or 0)
