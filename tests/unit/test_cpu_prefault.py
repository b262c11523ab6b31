"""Memory that is taken from the system before it is used."""

import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.cpu.packing import zeroed
from nanovllm.kernels.cpu.prefault import PIECE_BYTES, prefault

SIZE = 16 << 20


def resident(tensor: Tensor) -> int:
    """Bytes of a tensor that the system has given, by /proc."""
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("no /proc/self/smaps")
    address, inside, total = tensor.data_ptr(), False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            first, end = (int(x, 16) for x in fields[0].split("-"))
            inside = first <= address < end
        elif inside and fields[0] == "Rss:":
            total += int(fields[1]) << 10
    return total


def finish() -> None:
    for thread in threading.enumerate():
        if thread.name == "prefault":
            thread.join(30)


def test_all_of_it_is_there_and_as_it_was() -> None:
    library = load_library()
    cache = zeroed(SIZE)
    assert resident(cache) < SIZE // 2
    cache[12345] = 7
    prefault(library, [cache], SIZE)
    finish()
    assert resident(cache) >= SIZE
    assert cache.count_nonzero() == 1
    assert cache[12345] == 7


def test_no_more_than_is_wanted() -> None:
    caches = [zeroed(SIZE), zeroed(SIZE)]
    prefault(load_library(), caches, 2 * PIECE_BYTES)
    finish()
    assert sum(map(resident, caches)) < SIZE
    assert min(map(resident, caches)) >= PIECE_BYTES


def test_what_is_written_meanwhile_stays() -> None:
    cache = zeroed(SIZE)
    prefault(load_library(), [cache], SIZE)
    cache.fill_(3)
    finish()
    assert (cache == 3).all()


def test_memory_that_goes_is_left_alone() -> None:
    caches = [zeroed(SIZE) for _ in range(8)]
    prefault(load_library(), caches, 8 * SIZE)
    del caches
    gc.collect()
    finish()


def test_nothing_to_take() -> None:
    prefault(load_library(), [], SIZE)
    prefault(load_library(), [torch.empty(0, dtype=torch.uint8)], SIZE)
    finish()
