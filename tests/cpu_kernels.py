"""What the tests of the CPU kernels share: the instruction sets, threads, and bounds.

The bounds are of rounding alone. `UNIT` of float32 is half the distance between neighbours, and a
sum of `n` products is off by some `sqrt(n)` of them relative to the sum of magnitudes (Higham &
Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 3.1). The products of
bf16 and of int8 are exact, so that bf16 pays once more for its output, and int8 and int4 for the
activations, which are rounded to 1/127 of the largest of a row or group.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.cpu.build import INSTRUCTION_SETS, choose_instruction_sets
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.library import Library, load_library

UNIT = 2.0**-24
UNITS = {torch.float32: UNIT, torch.bfloat16: 2.0**-8}
"""The relative error of rounding to a dtype."""

DTYPES = (torch.float32, torch.bfloat16)

each_isa = pytest.mark.parametrize("isa", [isa.name for isa in INSTRUCTION_SETS])


def load(isa: str) -> Library:
    """The kernels of an instruction set; skips the test where the processor does not have it."""
    try:
        choose_instruction_sets(isa)
    except InvalidRequestError as e:
        pytest.skip(str(e))
    return load_library(isa)


def kernels_for(isa: str, dtype: torch.dtype, deterministic: bool = False) -> CpuKernels:
    return CpuKernels(load(isa), dtype, deterministic=deterministic)


def is_fast(isa: str) -> bool:
    """Whether an instruction set is worth large shapes."""
    return isa not in ("portable", "amx-emulated")


def finish_prefault(pid: int | str = "self") -> None:
    """Wait until a process has taken the memory that it takes in the background, on Linux.

    Raises:
        TimeoutError: It is not done after a minute.
    """
    if not Path("/proc/self/task").is_dir():
        return
    for _ in range(6000):
        names = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                names.append((task / "comm").read_text().strip())
        if "prefault" not in names:
            return
        time.sleep(0.01)
    raise TimeoutError("memory is still being taken")


@contextlib.contextmanager
def threads(library: Library, num_threads: int) -> Iterator[None]:
    """Run with so many threads, and with as many as before afterwards."""
    before = library.num_threads
    library.start_threads(num_threads)
    try:
        yield
    finally:
        library.start_threads(before)


def sum_error(num_terms: int) -> float:
    """Relative error of a float32 sum, with a few operations before and after it."""
    return (4 * math.sqrt(num_terms) + 8) * UNIT


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_codes(rows: int, depth: int, group_size: int, seed: int = 0) -> Tensor:
    """Integers to 127 whose largest magnitude is 127 in every group: int8 without any rounding."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, depth), generator=generator)
    codes[:, ::group_size] = 127
    return codes.float()


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: object) -> None:
    """Compare in float64, and say how far off the worst element is."""
    assert actual.shape == expected.shape, what
    if not expected.numel():
        return
    excess = (actual.double() - expected).abs() / bound.clamp_min(1e-300)
    worst = int(excess.flatten().nan_to_num(nan=math.inf).argmax())
    found, wanted, allowed = (
        tensor.expand_as(expected).flatten()[worst].item() for tensor in (actual, expected, bound)
    )
    assert excess.flatten()[worst] <= 1, (
        f"{what}: element {worst} of {list(expected.shape)} is {found}, not {wanted} +- {allowed}"
    )
