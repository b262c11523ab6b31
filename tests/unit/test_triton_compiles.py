"""The Triton kernels become machine code for a GPU, whether there is one or not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

SHARED_BYTES = 227 << 10
"""Of a multiprocessor that one program may take, on Hopper."""
KERNELS = {
    "_norm_kernel",
    "_act_and_mul_kernel",
    "_write_kernel",
    "_matmul_kernel",
    "_visit_kernel",
    "_shrink_kernel",
    "_expand_kernel",
    "_local_kernel",
    "_depthwise_kernel",
    "_windows_kernel",
    "_choose_kernel",
    "_penalties_kernel",
    "prefill_kernel",
    "decode_kernel",
    "shared_kernel",
    "combine_kernel",
}


def compiled(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "tests.compile_triton", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    return kernels


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    kernels = compiled(tmp_path)
    assert {kernel["name"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["spilled"] <= 512, kernel


@pytest.mark.slow
def test_every_kernel_compiles_in_all_shapes(tmp_path: Path) -> None:
    for kernel in compiled(tmp_path, "all"):
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["spilled"] <= 2048, kernel
