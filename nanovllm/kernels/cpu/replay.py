"""Calls of kernels, written down once and repeated as one: between them Python takes its time."""

import copy
import ctypes
import functools
import math
import struct
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanovllm.kernels.cpu.library import Library
from nanovllm.kernels.cpu.packing import anonymous

Tensors = tuple[Tensor, ...]

REPLAYABLE = (
    *("linear", "mixture", "add_rms_norm", "act_and_mul"),
    *("write_kv", "attend", "local_attention"),
)
"""What can be repeated."""
MAX_ROWS = 256
"""Of more rows at a time nothing is written down: what is between the kernels is little then."""

_VIEWS = {
    *("view", "__getitem__", "split", "chunk", "narrow", "select", "unsqueeze", "squeeze"),
    *("expand", "transpose", "as_strided"),
}
_LOOKS = {"__get__", "__len__", "size", "dim", "numel", "stride", "data_ptr", "is_contiguous"}
_OF_VIEWS = int, slice, type(None), type(...)  # what indices of views are made of
_MAX_ARGUMENTS = 11  # see csrc/replay.h


class _NotReplayableError(Exception):
    """Something was computed that is not one of the kernels."""


class _Call(ctypes.Structure):
    """See csrc/replay.cpp."""

    _fields_ = (("again", ctypes.c_void_p), ("words", ctypes.c_int64 * _MAX_ARGUMENTS))


class _OnlyKernels(TorchFunctionMode):
    """Lets torch make views and tell shapes, and nothing that would have to be computed again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        index = args[1] if name == "__getitem__" else None
        parts = index if isinstance(index, tuple) else (index,)
        is_copy = not all(isinstance(part, _OF_VIEWS) for part in parts)
        if name not in _VIEWS | _LOOKS or is_copy:
            raise _NotReplayableError(name)
        return func(*args, **(kwargs or {}))


class _Recording:
    """One sequence of calls: where it reads its inputs, and where it leaves its results."""

    def __init__(
        self,
        library: Library,
        calls: list[_Call],
        inputs: Tensors,
        results: Tensors,
    ) -> None:
        self._replay = library.replay
        self._inputs, self._results = tuple(map(_fixed, inputs)), tuple(map(_fixed, results))
        self._calls = (_Call * len(calls))(*calls)

    def run(self, inputs: Tensors) -> Tensors:
        for place, given in zip(self._inputs, inputs, strict=True):
            place.copy_(given)
        self._replay(self._calls, len(self._calls))
        return tuple(result.clone() for result in self._results)


class Replays:
    """Repeats what kernels were called for, and gives them the memory for their results.

    For one thread, as what runs the kernels is: while calls are written down they are not made.

    Args:
        library: The kernels.
        enabled: Whether to repeat anything; otherwise all is computed call by call.

    Attributes:
        library: The same, but only written down while something is recorded.
    """

    def __init__(self, library: Library, enabled: bool = True) -> None:
        self.library = copy.copy(library)
        self._enabled = enabled
        self._memory = _Memory()
        self._is_recording = False
        self._recordings: dict[Hashable, _Recording | None] = {}

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Room for a kernel's result."""
        if self._is_recording:
            return self._memory.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def run(self, key: Hashable, compute: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        """See `Kernels.replay`."""
        num_rows = [len(given) for given in inputs]
        if not self._enabled or min(num_rows) == 0 or max(num_rows) > MAX_ROWS:
            return compute(*inputs)
        key = key, *(given.shape for given in inputs)
        if key not in self._recordings:
            self._recordings[key] = self._record(compute, inputs)
        recording = self._recordings[key]
        return compute(*inputs) if recording is None else recording.run(inputs)

    def _record(self, compute: Callable[..., Tensors], inputs: Tensors) -> _Recording | None:
        """Write down what is computed, without computing it; None if that cannot be repeated."""
        with self._writing_down() as calls:
            places = tuple(self.empty(*given.shape, dtype=given.dtype) for given in inputs)
            try:
                with _OnlyKernels():
                    results = compute(*places)
            except _NotReplayableError:
                return None
            return _Recording(self.library, calls, places, results)

    @contextmanager
    def _writing_down(self) -> Iterator[list[_Call]]:
        library, calls = self.library, list[_Call]()
        kernels = {name: getattr(library, name) for name in REPLAYABLE}
        try:
            self._is_recording = True
            for name, kernel in kernels.items():
                again, types = library.again(name), kernel.argtypes
                setattr(library, name, functools.partial(_write_down, calls, again, types))
            yield calls
        finally:
            self._is_recording = False
            for name, kernel in kernels.items():
                setattr(library, name, kernel)


class _Memory:
    """Memory that is handed out again once the tensors on it are gone, by the size of pieces.

    What was written down goes on using it, so that none is given back. No two recordings run at a
    time: they share it, too.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        size = 1 << max(num_bytes - 1, 63).bit_length()
        free = self._free[size]
        piece = free.pop() if free else np.frombuffer(anonymous(size), dtype=np.uint8)
        loan = piece[:num_bytes]  # lives as long as a tensor on it, or on a part of it
        weakref.finalize(loan, free.append, piece).atexit = False
        return torch.from_numpy(loan).view(dtype).view(shape)


def _fixed(tensor: Tensor) -> Tensor:
    """A tensor on the same memory that does not keep it from being handed out."""
    storage = tensor.untyped_storage()
    num_bytes = storage.data_ptr() + storage.nbytes() - tensor.data_ptr()
    memory = (ctypes.c_char * num_bytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _write_down(calls: list[_Call], again: int, types: Sequence[Any], *arguments: Any) -> None:
    calls.append(_Call(again, tuple(map(_word, types, arguments))))


def _word(kind: Any, argument: Any) -> int:
    """An argument of a kernel as csrc/replay.h reads it."""
    if kind is ctypes.c_float:
        return int.from_bytes(struct.pack("=f", argument), sys.byteorder)
    if hasattr(argument, "_obj"):  # what `ctypes.byref` made
        return ctypes.addressof(argument._obj)
    return int(argument or 0)
