"""Adapters whose rows the host groups, each group through two linear layers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import to_device
from nanovllm.kernels.kernels import Kernels, WeightSpec
from nanovllm.kernels.lora import NO_ADAPTER, IntArray


@dataclass(frozen=True, slots=True)
class GroupedBatch:
    """See `LoRABatch`; at least one row has an adapter.

    Args:
        slots: Adapter slot of each row or `NO_ADAPTER`, `[num_rows]`, on the host.
        groups: The adapter slots that occur, each with the rows it has, on the device
            `[num_group_rows]`; None is all.
        device: Where these are.
    """

    slots: IntArray
    groups: tuple[tuple[int, Tensor | None], ...]
    device: torch.device

    @classmethod
    def of(cls, slots: IntArray, device: torch.device) -> "GroupedBatch | None":
        """Group rows by their adapter slots `[num_rows]`; None if no row has one."""
        groups: list[tuple[int, Tensor | None]] = []
        for slot in np.unique(slots[slots != NO_ADAPTER]).tolist():
            (rows,) = (slots == slot).nonzero()
            groups.append((slot, None if len(rows) == len(slots) else to_device(rows, device)))
        return cls(slots, tuple(groups), device) if groups else None

    def __len__(self) -> int:
        return len(self.slots)

    def take(self, rows: Tensor, repeats: int = 1) -> "GroupedBatch | None":
        """See `LoRABatch.take`."""
        taken = self.slots[rows.cpu().numpy()]
        return GroupedBatch.of(taken.repeat(repeats), self.device)


class _Slot(NamedTuple):
    """The matrices of one adapter, in the form of the kernels' own."""

    down: Any
    up: Any


class GroupedWeights:
    """See `LoRAWeights`.

    Args:
        kernels: Keep the adapters, and multiply with them.
        spec: Shape of the layer's own weight.
        rank: Of the adapters.
        num_slots: Adapters that there is room for.
    """

    def __init__(self, kernels: Kernels, spec: WeightSpec, rank: int, num_slots: int) -> None:
        self._kernels = kernels
        down = WeightSpec(rank, spec.depth, replaceable=True)
        up = WeightSpec(spec.rows, rank, replaceable=True)
        self._slots = [_Slot(self._empty(down), self._empty(up)) for _ in range(num_slots)]
        self._is_empty = [True] * num_slots

    def _empty(self, spec: WeightSpec) -> Any:
        return self._kernels.pack(spec, [torch.zeros(spec.rows, spec.depth, device="cpu")], None)

    def put(self, slot: int, down: Tensor, up: Tensor) -> None:
        self._is_empty[slot] = False
        self._kernels.repack(self._slots[slot].down, down)
        self._kernels.repack(self._slots[slot].up, up)

    def clear(self, slot: int) -> None:
        self._is_empty[slot] = True

    def add(self, y: Tensor, x: Tensor, batch: GroupedBatch) -> Tensor:
        """See `LoRAWeights.add`."""
        kernels = self._kernels
        for slot, rows in batch.groups:
            if self._is_empty[slot]:
                continue
            down, up = self._slots[slot]
            if rows is None:
                y = kernels.linear_add(kernels.linear(x, down), up, y)
            else:
                y[rows] = kernels.linear_add(kernels.linear(x[rows], down), up, y[rows])
        return y
