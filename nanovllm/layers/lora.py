"""The low-rank adapters of a layer (Hu et al. 2021, section 4.1)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.kernels import Kernels, WeightSpec
from nanovllm.kernels.lora import LoRABatch


class PartWeights(NamedTuple):
    """An adapter of one projection: it adds `B A x`.

    `down` is A `[rank, depth]`, `up` is B `[width, rank]`, times the adapter's alpha / rank.
    """

    down: Tensor
    up: Tensor


class LoRATable:
    """The adapters of one linear layer, by adapter slot. Their memory is taken once.

    The projections that are packed into one layer have adapters of their own. They are one adapter
    of the layer: A of all projections above each other, B beside each other.

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
        self._max_rank = max_rank
        self._shape = spec.rows, len(parts) * max_rank
        self._weights = kernels.lora_weights(spec, self._shape[1], num_slots)

    def put(self, slot: int, weights: Mapping[str, PartWeights]) -> None:
        """Replace what a slot holds.

        Args:
            slot: The adapter slot.
            weights: Of the projections that the adapter changes, by name.
        """
        if not weights:
            self._weights.clear(slot)
            return
        down = torch.zeros(self._shape[1], self.depth, device="cpu")
        up = torch.zeros(self._shape, device="cpu")
        for index, (name, columns) in enumerate(self.parts.items()):
            if name in weights:
                part, first = weights[name], index * self._max_rank
                down[first : first + len(part.down)] = part.down
                up[columns, first : first + len(part.down)] = part.up
        self._weights.put(slot, down, up)

    def add(self, y: Tensor, x: Tensor, batch: LoRABatch) -> Tensor:
        """Add what the adapters make of the layer's inputs.

        Args:
            y: The layer's outputs `[num_rows, rows]`; overwritten.
            x: Its inputs `[num_rows, depth]`.
            batch: Which rows go through which adapter.

        Raises:
            RuntimeError: The batch is of other rows than these.
        """
        if len(batch) != len(x):
            raise RuntimeError(f"the adapters of {len(batch)} rows for {len(x)} others")
        return self._weights.add(y, x, batch)
