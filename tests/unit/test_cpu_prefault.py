"""Memory that is taken from the system before it is used."""

import ctypes
import gc
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.cpu.packing import zeroed
from nanovllm.kernels.cpu.prefault import prefault
from tests.cpu_kernels import finish_prefault

SIZE = 16 << 20
PIECE_BYTES = 2 << 20


def resident(tensor: Tensor) -> int:
    """Bytes of a tensor that the system has given; mappings beside it may be one with its own."""
    try:
        mincore = ctypes.CDLL(None).mincore
    except (OSError, AttributeError):
        pytest.skip("no mincore")
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first -= first % mmap.PAGESIZE
    pages = (ctypes.c_ubyte * -(-(end - first) // mmap.PAGESIZE))()
    assert mincore(ctypes.c_void_p(first), ctypes.c_size_t(end - first), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_all_of_it_is_there_and_as_it_was() -> None:
    library = load_library()
    cache = zeroed(SIZE)
    assert resident(cache) < SIZE // 2
    cache[12345] = 7
    prefault(library, [cache], SIZE)
    finish_prefault()
    assert resident(cache) >= SIZE
    assert cache.count_nonzero() == 1
    assert cache[12345] == 7


def test_no_more_than_is_wanted() -> None:
    caches = [zeroed(SIZE), zeroed(SIZE)]
    prefault(load_library(), caches, 2 * PIECE_BYTES)
    finish_prefault()
    assert sum(map(resident, caches)) < SIZE
    assert min(map(resident, caches)) >= PIECE_BYTES


def test_what_is_written_meanwhile_stays() -> None:
    cache = zeroed(SIZE)
    prefault(load_library(), [cache], SIZE)
    cache.fill_(3)
    finish_prefault()
    assert (cache == 3).all()


def test_memory_that_goes_is_left_alone() -> None:
    caches = [zeroed(SIZE) for _ in range(8)]
    prefault(load_library(), caches, 8 * SIZE)
    del caches
    gc.collect()
    finish_prefault()


def test_nothing_to_take() -> None:
    prefault(load_library(), [], SIZE)
    prefault(load_library(), [torch.empty(0, dtype=torch.uint8)], SIZE)
    finish_prefault()


def test_a_process_may_end_meanwhile() -> None:
    """A thread of Python's that still frees tensors then aborted it, one time in twenty."""
    script = """
import torch
from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.cpu.packing import zeroed
from nanovllm.kernels.cpu.prefault import prefault
caches = [zeroed(256 << 20) for _ in range(4)]
prefault(load_library(), caches, 1 << 30)
"""
    for end in ("", "del caches", "raise SystemExit", "def f(x=caches): pass\nimport gc; gc.f = f"):
        done = subprocess.run([sys.executable, "-c", script + end], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_may_drop_what_its_parent_takes() -> None:
    caches = [zeroed(256 << 20)]
    prefault(load_library(), caches, 256 << 20)
    child = os.fork()
    if child == 0:
        caches.clear()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(caches) == 1
