"""Clients that none of us wrote, each in an environment of its own: their requirements clash."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parent / "acceptance" / "clients"
"""Lists of requirements, and scripts that use what they install."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanovllm-accept"
INSTALL_TIMEOUT = 1200.0
RUN_TIMEOUT = 900.0


@cache
def environment(name: str, over_ours: bool = False) -> "Environment":
    """The one `Environment` of these arguments."""
    return Environment(name, over_ours)


class Environment:
    """A Python environment with what `clients/NAME.txt` lists; made once and then kept.

    Args:
        name: Of the list.
        over_ours: Whether what runs the tests can be imported too. Something as large as torch is
            then neither fetched nor kept twice, and is surely the same.
    """

    def __init__(self, name: str, over_ours: bool = False) -> None:
        requirements = CLIENTS / f"{name}.txt"
        ours = sysconfig.get_path("purelib") if over_ours else ""
        key = hashlib.sha256(f"{sys.version}{ours}{requirements.read_text()}".encode()).hexdigest()
        self._directory = CACHE / f"{name}-{key[:12]}"
        complete = self._directory / "complete"
        if complete.exists():
            return
        shutil.rmtree(self._directory, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(self._directory)], INSTALL_TIMEOUT)
        if over_ours:
            ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
            theirs = _run([self.python, "-c", ask], INSTALL_TIMEOUT).strip()
            (Path(theirs) / "ours.pth").write_text(ours)
        _run([self.python, "-m", "pip", "install", "-q", "-r", str(requirements)], INSTALL_TIMEOUT)
        complete.touch()

    @property
    def python(self) -> str:
        return str(self._directory / "bin" / "python")

    def run(
        self,
        arguments: Iterable[str | Path],
        variables: Mapping[str, str] | None = None,
        statuses: tuple[int, ...] = (0,),
    ) -> str:
        """Run its interpreter, in an empty directory, and return what it printed.

        Args:
            arguments: What the interpreter is told to do.
            variables: Environment variables to set besides ours.
            statuses: How it may end; the test fails if it ends otherwise.
        """
        command = [self.python, *map(str, arguments)]
        with tempfile.TemporaryDirectory() as directory:
            return _run(command, RUN_TIMEOUT, statuses, directory, variables)


def _run(
    command: list[str],
    timeout: float,
    statuses: tuple[int, ...] = (0,),
    directory: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    ran = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | dict(variables or {}),
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ran.returncode not in statuses:
        pytest.fail(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stdout}")
    return ran.stdout
