"""Memory that the system gives before it is needed: at its first touch it would hold a step up."""

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Sequence

from torch import Tensor

from nanovllm.kernels.cpu.library import Library

PIECE_BYTES = 2 << 20
LOWEST_PRIORITY = 19


def prefault(library: Library, tensors: Sequence[Tensor], num_bytes: int) -> None:
    """Touch some bytes of tensors in the background, the beginnings of all of them first.

    What computes goes first. The tensors may be used meanwhile, and may go.
    """
    references = [weakref.ref(tensor) for tensor in tensors]
    arguments = library, references, num_bytes // max(len(tensors), 1)
    threading.Thread(target=_touch, args=arguments, name="prefault", daemon=True).start()


def _touch(library: Library, tensors: "list[weakref.ref[Tensor]]", num_bytes: int) -> None:
    if sys.platform == "linux":  # elsewhere a thread has none of its own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    for first in range(0, num_bytes, PIECE_BYTES):
        for reference in tensors:
            tensor = reference()
            if tensor is None:
                return
            end = min(first + PIECE_BYTES, num_bytes, tensor.nbytes)
            if first < end:
                library.touch(tensor.data_ptr() + first, end - first)
            del tensor
