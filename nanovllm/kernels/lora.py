"""Low-rank adapters (Hu et al. 2021, section 4.1), as kernels keep and apply them.

There are two ways. *Grouped*: the host knows which rows go through which adapter, and an adapter's
rows go through it together. *Indexed*: the device alone has to know, so a step can be captured.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import to_device

IntArray = npt.NDArray[np.int64]

NO_ADAPTER = -1


class LoRABatch(Protocol):
    """Which rows go through which adapter."""

    def __len__(self) -> int:
        """Number of rows."""

    def take(self, rows: Tensor, repeats: int = 1) -> "LoRABatch | None":
        """The batch of other rows, each made of one of these; None if none has an adapter.

        Args:
            rows: Which one, int64 `[num_taken]`, on the device.
            repeats: How many rows on end are made of each.
        """


class LoRAWeights(Protocol):
    """The adapters of one linear layer, by adapter slot. Their memory is taken once."""

    def put(self, slot: int, down: Tensor, up: Tensor) -> None:
        """Replace what a slot holds, in its place.

        Args:
            slot: The adapter slot.
            down: A, `[rank, depth]`.
            up: B, `[rows, rank]`.
        """

    def clear(self, slot: int) -> None:
        """Let a slot's adapter add nothing."""

    def add(self, y: Tensor, x: Tensor, batch: Any) -> Tensor:
        """Add `B A x` to each row of `y` by the adapter that it goes through.

        Args:
            y: `[num_rows, rows]`; overwritten.
            x: `[num_rows, depth]`.
            batch: What `Kernels.lora_batch` returned.
        """


@dataclass(frozen=True, slots=True)
class IndexedBatch:
    """See `LoRABatch`. Nothing here waits for the device.

    Args:
        slots: Adapter slot of each row or `NO_ADAPTER`, on the device, int64 `[num_rows]`.
    """

    slots: Tensor

    @classmethod
    def of(cls, slots: IntArray, device: torch.device) -> "IndexedBatch | None":
        """The batch of rows by their adapter slots `[num_rows]`; None if no row has one."""
        return cls(to_device(slots, device)) if (slots != NO_ADAPTER).any() else None

    def __len__(self) -> int:
        return len(self.slots)

    def take(self, rows: Tensor, repeats: int = 1) -> "IndexedBatch":
        """See `LoRABatch.take`."""
        return IndexedBatch(self.slots[rows][:, None].expand(-1, repeats).flatten())
