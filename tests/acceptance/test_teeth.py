"""Every seeded fault makes the suite fail."""

from pathlib import Path

import pytest

from tests import teeth


def test_every_patch_fits_the_code(tmp_path: Path) -> None:
    teeth.copy_project(tmp_path)
    for fault in teeth.FAULTS:
        before = (tmp_path / fault.path).read_text(encoding="utf-8")

        assert teeth.seed_fault(fault, tmp_path) is None

        if fault.path.endswith(".py"):
            compile((tmp_path / fault.path).read_text(encoding="utf-8"), fault.path, "exec")
        (tmp_path / fault.path).write_text(before, encoding="utf-8")


@pytest.mark.slow
def test_every_seeded_fault_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    assert teeth.main([]) == 0, capsys.readouterr().out
