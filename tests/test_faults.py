"""The script of faults, in short."""

import pytest

from tests import faults


def test_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert faults.main(["--kills", "2", "--short"]) == 0
    assert capsys.readouterr().out.count("same bytes") == 7
