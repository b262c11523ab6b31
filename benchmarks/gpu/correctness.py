"""Whether kernels and engine compute on this device what they should: the tests that say so."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpu.figures import FAILED
from gpu.world import World

ROOT = Path(__file__).parents[2]
MAX_WORKERS = 12
SETTINGS = """[pytest]
markers =
    gpu: needs a CUDA device
    slow: takes more than about ten seconds
    accept: acceptance test of a whole user story, slow
"""
"""In place of the project's own, which want a recent pytest and leave `gpu` out."""


def run(world: World) -> None:
    kernels = sorted(ROOT.glob("tests/unit/test_triton_*.py"))
    engine = sorted(ROOT.glob("tests/gpu/test_*.py"))
    if world.tiny:
        world.record.skip("Triton kernels", "the suite runs them in Triton's interpreter")
    else:
        # Most of their time goes into compilers, one a process.
        parallel = ("-n", str(min(MAX_WORKERS, os.cpu_count() or 1)))
        _record(world, "Triton kernels", kernels, parallel)
    _record(world, "engine", engine)


def _record(world: World, name: str, files: Sequence[Path], options: Sequence[str] = ()) -> None:
    # Two parts, and some time to tell of them.
    counts, output = run_tests(files, 0.48 * world.limit, options)
    wrong = counts["failed"] + counts["error"] + counts["timeout"]
    text = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    note = text if wrong or not counts else ""
    world.record(
        f"{name}: tests", FAILED if wrong or not counts else text, note=note, detail=output
    )


def run_tests(
    files: Sequence[Path], limit: float, options: Sequence[str] = ()
) -> tuple[Counter[str], str]:
    """Run test files in a process of their own.

    Args:
        files: The files.
        limit: Seconds they may take.
        options: More for pytest; those of xdist are left out where that is not installed.

    Returns:
        How many tests passed, failed and so on ("timeout" is 1 if they took too long), and the end
        of what pytest printed.
    """
    if not files:
        return Counter(), "there are no such files"
    if options[:1] == ("-n",) and importlib.util.find_spec("xdist") is None:
        options = ()
    with tempfile.TemporaryDirectory() as directory:
        settings = Path(directory, "pytest.ini")
        settings.write_text(SETTINGS)
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(settings), f"--rootdir={ROOT}"]
        command += ["-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
        command += [*options, *map(str, files)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
            output, late = done.stdout, False
        except subprocess.TimeoutExpired as e:
            output, late = (e.stdout or b"").decode(errors="replace"), True
    counts = count_outcomes(output)
    if late:
        counts["timeout"] = 1
    return counts, output[-6000:]


def count_outcomes(output: str) -> Counter[str]:
    """What pytest's last line counts."""
    last = output.strip().splitlines()[-1:] or [""]
    found = re.findall(r"(\d+) (passed|failed|skipped|deselected|error|xfailed|xpassed)", last[0])
    return Counter({kind: int(number) for number, kind in found})
