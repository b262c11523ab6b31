"""The decodes of a step, captured from their slots and positions to what the tail needs."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import (
    AttentionBackend,
    AttentionBatch,
    BlockTables,
    IntArray,
    PlanBuffers,
)
from nanovllm.kernels.lora import NO_ADAPTER
from nanovllm.runners.graphs import Capture, GraphLadder
from nanovllm.runners.transfers import StepInputs

PADDING = -1
"""The position of a row that only pads."""

RowOutputs = tuple[Tensor, ...]
"""What the tail needs of the rows that emit, each `[num_rows, ...]`."""

Compute = Callable[[Tensor, Tensor, Any, Tensor | None], RowOutputs]
"""Computes rows of one position each.

It takes their slots and positions `[num_rows]`, what was planned for attention, and the adapter
slots `[num_rows]` if one has an adapter; all tensors are on the device.
"""


class DecodeGraphs:
    """See the module. Graphs with and without adapters are different ones.

    Args:
        capture: Captures them.
        sizes: Numbers of rows to capture, ascending.
        backend: Computes attention.
        tables: Blocks of the sequences; the last one is of rows that only pad.
        outputs: Where results are left, at fixed addresses, each `[sizes[-1], ...]`.
        compute: What is captured.

    Attributes:
        sizes: See above.
        outputs: See above.
    """

    def __init__(
        self,
        capture: Capture,
        sizes: Sequence[int],
        backend: AttentionBackend,
        tables: BlockTables,
        outputs: RowOutputs,
        compute: Compute,
    ) -> None:
        self.sizes, self.outputs = sizes, outputs
        self._backend, self._tables, self._compute = backend, tables, compute
        self._spare_slot = len(tables.host) - 1
        self._inputs = StepInputs(
            {
                "slots": (np.int64, self._spare_slot),
                "positions": (np.int64, PADDING),
                "ends": (np.int64, 0),
                "adapters": (np.int64, NO_ADAPTER),
            },
            sizes[-1],
            tables.device.device,
        )
        self._ladder = GraphLadder(capture, sizes, self._blank, self._run)
        self._buffers: dict[tuple[int, Hashable], PlanBuffers] = {}
        self._plans: dict[tuple[int, Hashable], Any] = {}

    @property
    def max_rows(self) -> int:
        return self.sizes[-1]

    def capture(self) -> None:
        """Capture the graphs of steps without adapters."""
        self._ladder.capture(False)

    def replay(self, slots: IntArray, positions: IntArray, adapters: IntArray | None) -> RowOutputs:
        """Compute rows of one position each, at most `max_rows`.

        Args:
            slots: Their slots, `[num_rows]`.
            positions: Their positions, `[num_rows]`.
            adapters: Their adapter slots, `[num_rows]`, if one has an adapter.

        Returns:
            The outputs of these rows, in `outputs`.
        """
        size, with_adapters = self._ladder.size_for(len(slots)), adapters is not None
        graph = self._ladder.graph(size, with_adapters)
        values = {"slots": slots, "positions": positions, "ends": positions + 1}
        self._inputs.fill(values if adapters is None else values | {"adapters": adapters})
        self._plan(size, with_adapters, slots, positions)
        graph()
        return tuple(output[: len(slots)] for output in self.outputs)

    def extend(self, num_rows: int, more: RowOutputs) -> RowOutputs:
        """Put outputs of other rows behind those of `num_rows`; elsewhere if there is no room."""
        total = num_rows + len(more[0])
        if total > self.max_rows:
            return tuple(
                torch.cat((output[:num_rows], other))
                for output, other in zip(self.outputs, more, strict=True)
            )
        for output, other in zip(self.outputs, more, strict=True):
            output[num_rows:total] = other
        return tuple(output[:total] for output in self.outputs)

    def _blank(self, size: int, with_adapters: Hashable) -> None:
        self._inputs.fill({})
        nothing = np.empty(0, dtype=np.int64)
        self._plans[size, with_adapters] = self._plan(size, with_adapters, nothing, nothing)

    def _plan(
        self, size: int, with_adapters: Hashable, slots: IntArray, positions: IntArray
    ) -> Any:
        columns, num_padding = self._inputs.columns, size - len(slots)
        batch = AttentionBatch(
            starts=np.concatenate((positions, np.full(num_padding, PADDING))),
            lengths=np.ones(size, dtype=np.int64),
            slots=np.concatenate((slots, np.full(num_padding, self._spare_slot))),
            tables=self._tables,
            device_slots=columns["slots"][:size],
            device_ends=columns["ends"][:size],
        )
        buffers = self._buffers.setdefault((size, with_adapters), PlanBuffers())
        return self._backend.plan(batch, buffers)

    def _run(self, size: int, with_adapters: Hashable) -> None:
        columns = {name: column[:size] for name, column in self._inputs.columns.items()}
        results = self._compute(
            columns["slots"],
            columns["positions"],
            self._plans[size, with_adapters],
            columns["adapters"] if with_adapters else None,
        )
        for output, result in zip(self.outputs, results, strict=True):
            output[:size] = result
