"""Every seeded fault makes the suite fail."""

import pytest

from tests import teeth


@pytest.mark.slow
def test_every_seeded_fault_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    assert teeth.main([]) == 0, capsys.readouterr().out
