"""Low-rank adapters (Hu et al. 2021, section 4.1), several of them in one batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.kernels.kernels import Kernels, WeightSpec

IntArray = npt.NDArray[np.int64]

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class LoRABatch:
    """Which rows go through which adapter; at least one goes through one.

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
    def of(cls, slots: IntArray, device: torch.device) -> "LoRABatch | None":
        """Group rows by their adapter slots `[num_rows]`; None if no row has one."""
        groups: list[tuple[int, Tensor | None]] = []
        for slot in np.unique(slots[slots != NO_ADAPTER]).tolist():
            (rows,) = (slots == slot).nonzero()
            indices = torch.from_numpy(rows).to(device, non_blocking=True)
            groups.append((slot, None if len(rows) == len(slots) else indices))
        return cls(slots, tuple(groups), device) if groups else None

    def take(self, rows: Tensor, repeats: int = 1) -> "LoRABatch | None":
        """The batch of other rows, each made of one of these.

        Args:
            rows: Which one, int64 `[num_taken]`, or True for those to keep, bool `[num_rows]`.
            repeats: How many rows on end are made of each.
        """
        taken = self.slots[rows.cpu().numpy()]
        return LoRABatch.of(taken.repeat(repeats), self.device)


class PartWeights(NamedTuple):
    """An adapter of one projection: it adds `B A x`.

    `down` is A `[rank, depth]`, `up` is B `[width, rank]`, times the adapter's alpha / rank.
    """

    down: Tensor
    up: Tensor


class _Slot(NamedTuple):
    """The matrices of one adapter, A of all projections above each other, B beside each other."""

    down: Any
    up: Any


class LoRATable:
    """The adapters of one linear layer, by adapter slot. Their memory is taken once.

    The projections that are packed into one layer have adapters of their own.

    Args:
        spec: Shape of the layer's own weight.
        parts: Which of its outputs belong to each projection that may have an adapter, by name.
        num_slots: Adapters that there is room for.
        max_rank: Greatest rank of one.
        kernels: Keep them, and multiply with them.
    """

    def __init__(
        self,
        spec: WeightSpec,
        parts: Mapping[str, slice],
        num_slots: int,
        max_rank: int,
        kernels: Kernels,
    ) -> None:
        self.parts = dict(parts)
        self.depth = spec.depth
        self._kernels = kernels
        self._max_rank = max_rank
        self._shape = spec.rows, len(parts) * max_rank
        down = WeightSpec(len(parts) * max_rank, spec.depth)
        up = WeightSpec(*self._shape)
        self._slots = [_Slot(self._empty(down), self._empty(up)) for _ in range(num_slots)]
        self._is_empty = [True] * num_slots

    def _empty(self, spec: WeightSpec) -> Any:
        return self._kernels.pack(spec, [torch.zeros(spec.rows, spec.depth, device="cpu")], None)

    def put(self, slot: int, weights: Mapping[str, PartWeights]) -> None:
        """Replace what a slot holds.

        Args:
            slot: The adapter slot.
            weights: Of the projections that the adapter changes, by name.
        """
        self._is_empty[slot] = not weights
        if not weights:
            return
        down = torch.zeros(self._shape[1], self.depth, device="cpu")
        up = torch.zeros(self._shape, device="cpu")
        for index, (name, columns) in enumerate(self.parts.items()):
            if name in weights:
                part, first = weights[name], index * self._max_rank
                down[first : first + len(part.down)] = part.down
                up[columns, first : first + len(part.down)] = part.up
        self._kernels.repack(self._slots[slot].down, down)
        self._kernels.repack(self._slots[slot].up, up)

    def add(self, y: Tensor, x: Tensor, batch: LoRABatch) -> Tensor:
        """Add what the adapters make of the layer's inputs.

        Args:
            y: The layer's outputs `[num_rows, rows]`; overwritten.
            x: Its inputs `[num_rows, depth]`.
            batch: Which rows go through which adapter.

        Raises:
            RuntimeError: The batch is of other rows than these.
        """
        if len(batch.slots) != len(x):
            raise RuntimeError(f"the adapters of {len(batch.slots)} rows for {len(x)} others")
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
