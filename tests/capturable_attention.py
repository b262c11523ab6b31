"""An attention backend in plain torch that can be captured, for tests without a GPU."""

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import AttentionBatch, AttentionConfig, PlanBuffers
from nanovllm.kernels.sdpa import PagedCache, SdpaBackend, attend


class CapturableAttention(PagedCache):
    """Captured rows read all of their table, and a mask hides what is not theirs."""

    capturable = True

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self._eager = SdpaBackend(config)

    def plan(self, batch: AttentionBatch, buffers: PlanBuffers | None = None) -> Any:
        return self._eager.plan(batch) if buffers is None else batch

    def run(self, q: Tensor, cache: Tensor, metadata: Any, window: int | None) -> Tensor:
        if not isinstance(metadata, AttentionBatch):
            return self._eager.run(q, cache, metadata, window)
        tables, size = metadata.tables.device, self._config.block_size
        positions = torch.arange(tables.shape[1] * size)
        slots = tables[metadata.device_slots][:, positions // size] * size + positions % size
        ends = metadata.device_ends[:, None]
        visible = positions < ends
        if window is not None:
            visible = visible & (positions >= ends - window)
        keys, values = cache.flatten(1, 2)
        out = attend(q[:, None], keys[slots], values[slots], visible[:, None])[:, 0]
        return torch.where(ends[..., None] > 0, out, 0.0)
