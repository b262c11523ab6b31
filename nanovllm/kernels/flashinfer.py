"""Attention by the flashinfer package (Ye et al. 2025)."""

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    PlanBuffers,
    staged,
    to_device,
)
from nanovllm.kernels.sdpa import PagedCache

PACKAGE = "flashinfer"
HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 384 << 20
"""For what parts of split rows leave; the package's own advice of 128 MB is too little for many
heads in large batches, and then it stops with an error."""
ON_TENSOR_CORES = True
"""Also for decodes: the other kernels take few ratios of query heads to KV heads."""


class Pages(NamedTuple):
    """The blocks of a step's rows, end to end, as the package takes them.

    Args:
        first_queries: Where each row's queries begin, int32 `[num_rows + 1]` on the host.
        first: Where its blocks begin, int32 `[num_rows + 1]` on the host.
        ids: The blocks, int32 `[first[-1]]` on the device.
        last_lengths: Positions in each row's last block, int32 `[num_rows]` on the host.
    """

    first_queries: Tensor
    first: Tensor
    ids: Tensor
    last_lengths: Tensor


class FlashInferPlan(NamedTuple):
    """A step. What the package plans depends on the window, so it does once a layer asks.

    Args:
        pages: The blocks of the rows.
        is_decode: Whether all rows have one query.
        max_blocks: Of a row, ever.
        buffers: Given for a captured step.
        planned: The package's wrappers, ready to run, by window.
    """

    pages: Pages
    is_decode: bool
    max_blocks: int
    buffers: PlanBuffers | None
    planned: dict[int | None, Any]


class FlashInferAttention(PagedCache):
    """See `AttentionBackend`. Best for steps that are all decodes or all prompts.

    Its wrappers plan in pinned memory of their own, so no more than two steps may be in flight.

    Args:
        config: The layers: float16 or bfloat16, `head_dim` one of `HEAD_DIMS`.
        device: The GPU.
    """

    def __init__(self, config: AttentionConfig, device: torch.device) -> None:
        super().__init__(config)
        self._package = import_module(PACKAGE)
        # All wrappers share it: they run one after the other.
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._eager: dict[tuple[bool, int | None], Any] = {}

    @property
    def capturable(self) -> bool:
        return True

    def plan(self, batch: AttentionBatch, buffers: PlanBuffers | None = None) -> FlashInferPlan:
        planned: dict[int | None, Any] = {} if buffers is None else buffers.keep("wrappers", dict)
        is_decode, max_blocks = bool((batch.lengths == 1).all()), batch.tables.host.shape[1]
        step = FlashInferPlan(self._lay_out(batch), is_decode, max_blocks, buffers, planned)
        for window, wrapper in planned.items():  # for which layers asked as it was captured
            self._plan_wrapper(wrapper, step, window)
        return step

    def run(self, q: Tensor, cache: Tensor, metadata: FlashInferPlan, window: int | None) -> Tensor:
        planned = metadata.planned
        if window not in planned:
            wrapper = self._wrapper(metadata, window)
            self._plan_wrapper(wrapper, metadata, window)
            planned[window] = wrapper
        out: Tensor = planned[window].run(q.contiguous(), (cache[0], cache[1]))
        return out

    def _lay_out(self, batch: AttentionBatch) -> Pages:
        block_size, device = self._config.block_size, batch.tables.device.device
        # Rows that only pad see the first position of block 0: the package wants one.
        ends = np.maximum(batch.starts + batch.lengths, 1)
        counts = -(-ends // block_size)
        first = np.concatenate([[0], np.cumsum(counts)])
        of_rows = to_device(np.stack([batch.slots, first[:-1]]), device)
        slots, begins = of_rows.repeat_interleave(
            to_device(counts, device), dim=1, output_size=int(first[-1])
        )
        columns = torch.arange(len(begins), device=device) - begins
        return Pages(
            _on_host(np.concatenate([[0], np.cumsum(batch.lengths)]), device),
            _on_host(first, device),
            batch.tables.device[slots, columns].int(),
            _on_host(ends - (counts - 1) * block_size, device),
        )

    def _wrapper(self, step: FlashInferPlan, window: int | None) -> Any:
        """A wrapper to plan the step with: one of its own if it is captured."""
        if step.buffers is not None:
            return self._captured_wrapper(step, step.buffers)
        if (step.is_decode, window) not in self._eager:
            if step.is_decode:
                wrapper = self._package.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "NHD", use_tensor_cores=ON_TENSOR_CORES
                )
            else:
                wrapper = self._package.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            self._eager[step.is_decode, window] = wrapper
        return self._eager[step.is_decode, window]

    def _captured_wrapper(self, step: FlashInferPlan, buffers: PlanBuffers) -> Any:
        pages, num_rows = step.pages, len(step.pages.last_lengths)
        sizes = num_rows + 1, num_rows * step.max_blocks, num_rows
        # Windows share them, as they have the same blocks.
        first, ids, last_lengths = buffers.keep(
            "pages",
            lambda: [torch.zeros(n, dtype=torch.int32, device=pages.ids.device) for n in sizes],
        )
        return self._package.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=ON_TENSOR_CORES,
            paged_kv_indptr_buffer=first,
            paged_kv_indices_buffer=ids,
            paged_kv_last_page_len_buffer=last_lengths,
        )

    def _plan_wrapper(self, wrapper: Any, step: FlashInferPlan, window: int | None) -> None:
        config, pages = self._config, step.pages
        wrapper.plan(
            *(() if step.is_decode else (pages.first_queries,)),
            pages.first,
            pages.ids,
            pages.last_lengths,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.block_size,
            window_left=-1 if window is None else window - 1,
            q_data_type=config.dtype,
            kv_data_type=config.dtype,
            **({} if step.is_decode else {"causal": True}),
        )


def _on_host(array: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """An int32 tensor that the device can copy without being waited for."""
    return staged(array.astype(np.int32), device)
