"""What crosses between the host and the device in a step: one copy there and one copy back."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import staged

ALIGNMENT = 16
"""Bytes that the address of a field is a multiple of: kernels may read so many at a time."""


class StepInputs:
    """Numbers of a step's rows at fixed addresses on the device, where captured graphs read them.

    Args:
        fields: The dtype of each, and what it is in a row that only pads.
        capacity: Rows that there is room for.
        device: Where they are.

    Attributes:
        columns: Each field on the device, `[capacity]`, or more where a dtype is of an array.
    """

    def __init__(
        self,
        fields: Mapping[str, tuple[npt.DTypeLike, float]],
        capacity: int,
        device: torch.device,
    ) -> None:
        self._device = device
        dtypes = {name: np.dtype(dtype) for name, (dtype, _) in fields.items()}
        ends = np.cumsum(
            [-(-capacity * dtype.itemsize // ALIGNMENT) * ALIGNMENT for dtype in dtypes.values()]
        ).tolist()
        self._padding = np.zeros(ends[-1], dtype=np.uint8)
        self._bytes = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
        self._places: dict[str, slice] = {}
        self.columns: dict[str, Tensor] = {}
        for (name, dtype), first in zip(dtypes.items(), [0, *ends], strict=False):
            place = slice(first, first + capacity * dtype.itemsize)
            self._places[name] = place
            _entries(self._padding[place], dtype)[:] = fields[name][1]
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            self.columns[name] = self._bytes[place].view(kind).view(capacity, *dtype.shape)
        self._dtypes = dtypes
        self.fill({})

    def fill(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy the numbers of some rows `[num_rows]` to the device; the rows behind them pad.

        Fields that are not given pad in all rows.
        """
        raw = self._padding.copy()
        for name, array in values.items():
            _entries(raw[self._places[name]], self._dtypes[name])[: len(array)] = array
        self._bytes.copy_(staged(raw, self._device), non_blocking=True)


class HostCopies:
    """Results on their way to the host, as they are now: later steps may overwrite them.

    Args:
        tensors: The results; on CUDA they arrive by one copy, while later steps already run.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self._tensors = [tensor.clone() for tensor in tensors]
            return
        self._shapes = [(tensor.shape, _numpy_dtype(tensor.dtype)) for tensor in tensors]
        flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        joined = torch.cat(flat) if len(flat) > 1 else flat[0]
        # Into pinned memory, which torch allocates for copies that do not block.
        self._bytes = joined.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def wait(self) -> list[npt.NDArray[Any]]:
        """The results, once they are there: the only place where a step is waited for."""
        if self._arrived is None:
            return [tensor.cpu().numpy() for tensor in self._tensors]
        self._arrived.synchronize()
        arrived, arrays, first = self._bytes.numpy(), [], 0
        for shape, dtype in self._shapes:
            end = first + shape.numel() * dtype.itemsize
            arrays.append(arrived[first:end].view(dtype).reshape(shape))
            first = end
        return arrays


def _entries(raw: npt.NDArray[np.uint8], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Bytes as numbers, or arrays of some, of a dtype."""
    return raw.view(dtype.base).reshape(-1, *dtype.shape)


@functools.cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
