"""Attention by the flash-attn package, version 2 or 3 (Dao 2023, Shah et al. 2024)."""

from importlib import import_module
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    IntArray,
    PlanBuffers,
    to_device,
)
from nanovllm.kernels.sdpa import PagedCache

PACKAGES = {3: "flash_attn_interface", 2: "flash_attn"}
"""What each version is imported as."""
BLOCK_MULTIPLE = {3: 1, 2: 256}
"""Of what blocks have to be a multiple."""


class FlashPrefill(NamedTuple):
    """Where rows begin among the queries and, for version 2, among their keys.

    Args:
        first_queries: `[num_rows + 1]`.
        first_keys: `[num_rows + 1]`.
        max_queries: Of a row.
        max_keys: Of a row.
    """

    first_queries: Tensor
    first_keys: Tensor
    max_queries: int
    max_keys: int


class FlashPlan(NamedTuple):
    """A step.

    Args:
        tables: Blocks of each row, int32 `[num_rows, max_blocks]`.
        ends: Keys of each row, int32 `[num_rows]`.
        prefill: None where all rows have one query.
    """

    tables: Tensor
    ends: Tensor
    prefill: FlashPrefill | None


class FlashAttention(PagedCache):
    """See `AttentionBackend`. Best for steps that are all decodes or all prompts.

    Args:
        config: The layers: float16 or bfloat16, `head_dim` a multiple of 8 up to 256.
        version: 3, for GPUs of capability 9.x and any `block_size`; or 2, for 8.0 and more, and
            multiples of 256.
    """

    def __init__(self, config: AttentionConfig, version: int) -> None:
        super().__init__(config)
        self._version, self._package = version, import_module(PACKAGES[version])

    @property
    def capturable(self) -> bool:
        return True

    def plan(self, batch: AttentionBatch, buffers: PlanBuffers | None = None) -> FlashPlan:
        if buffers is not None:
            return self._plan_captured(batch, buffers)
        tables = batch.row_tables(self._config.block_size).int()
        ends = batch.device_ends.int()
        if (batch.lengths == 1).all():
            return FlashPlan(tables, ends, None)
        lengths, keys = batch.lengths, batch.starts + batch.lengths
        first = to_device(np.stack([_begins(lengths), _begins(keys)]), ends.device)
        prefill = FlashPrefill(first[0], first[1], int(lengths.max()), int(keys.max()))
        return FlashPlan(tables, ends, prefill)

    def _plan_captured(self, batch: AttentionBatch, buffers: PlanBuffers) -> FlashPlan:
        """Decodes, in tables of one width: the kernel's grid is frozen with it."""
        all_tables, num_rows = batch.tables.device, len(batch.lengths)

        def make() -> FlashPlan:
            shape = num_rows, all_tables.shape[1]
            tables, ends = (
                torch.zeros(size, dtype=torch.int32, device=all_tables.device)
                for size in (shape, (num_rows,))
            )
            return FlashPlan(tables, ends, None)

        plan = buffers.keep("flash", make)
        plan.tables.copy_(all_tables[batch.device_slots])
        plan.ends.copy_(batch.device_ends)
        return plan

    def run(self, q: Tensor, cache: Tensor, metadata: FlashPlan, window: int | None) -> Tensor:
        q, (keys, values) = q.contiguous(), cache
        # Keys to the left of a query's own, and to its right; -1 is all.
        sight = (-1, -1) if window is None else (window - 1, 0)
        tables = {"page_table" if self._version == 3 else "block_table": metadata.tables}
        prefill = metadata.prefill
        if prefill is None:
            out: Tensor = self._package.flash_attn_with_kvcache(
                q[:, None],
                keys,
                values,
                cache_seqlens=metadata.ends,
                causal=True,
                window_size=sight,
                **tables,
            )
            return out[:, 0]
        if self._version == 3:
            return self._package.flash_attn_with_kvcache(  # type: ignore[no-any-return]
                q,
                keys,
                values,
                cache_seqlens=metadata.ends,
                cu_seqlens_q=prefill.first_queries,
                max_seqlen_q=prefill.max_queries,
                causal=True,
                window_size=sight,
                **tables,
            )
        return self._package.flash_attn_varlen_func(  # type: ignore[no-any-return]
            q,
            keys,
            values,
            cu_seqlens_q=prefill.first_queries,
            cu_seqlens_k=prefill.first_keys,
            max_seqlen_q=prefill.max_queries,
            max_seqlen_k=prefill.max_keys,
            causal=True,
            window_size=sight,
            **tables,
        )


def _begins(lengths: IntArray) -> npt.NDArray[np.int32]:
    """Where each of some rows begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
