"""Memory that the system gives before it is needed: at its first touch it would hold a step up."""

import weakref
from collections.abc import Sequence
from ctypes import c_void_p

from torch import Tensor

from nanovllm.kernels.cpu.library import Library


def prefault(library: Library, tensors: Sequence[Tensor], num_bytes: int) -> None:
    """Touch some bytes of tensors of one size in the background, the beginnings of all first.

    What computes goes first. The tensors may be used meanwhile; the first that goes ends it.
    """
    if not tensors:
        return
    addresses = (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    each = min(num_bytes // len(tensors), *(tensor.nbytes for tensor in tensors))
    started = library.start_prefault(addresses, len(tensors), each)
    stop = weakref.finalize(tensors[0], library.stop_prefault, started)
    for tensor in tensors[1:]:
        weakref.finalize(tensor, stop)
