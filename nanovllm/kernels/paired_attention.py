"""One attention backend for prompts and another for decodes."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.attention_backend import (
    AttentionBackend,
    AttentionBatch,
    CacheSpec,
    HeadNorms,
    PlanBuffers,
)


class PairedPlan(NamedTuple):
    """How many rows lead that decode, and what each backend planned, if it has rows."""

    num_decodes: int
    prefill: Any | None
    decode: Any | None


class PairedAttention:
    """See `AttentionBackend`. The leading rows of one position are decodes.

    Args:
        prefill: Attends for rows of several positions.
        decode: Attends for rows of one. It may be the same.
        writer: Writes the cache, whose layout all three share.
    """

    def __init__(
        self, prefill: AttentionBackend, decode: AttentionBackend, writer: AttentionBackend
    ) -> None:
        self._prefill, self._decode, self._writer = prefill, decode, writer

    @property
    def capturable(self) -> bool:
        return self._decode.capturable

    def cache_spec(self, num_blocks: int) -> CacheSpec:
        return self._writer.cache_spec(num_blocks)

    def write(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        return self._writer.write(qkv, norms, rotary, cache, slots)

    def plan(self, batch: AttentionBatch, buffers: PlanBuffers | None = None) -> PairedPlan:
        num_rows = len(batch.lengths)
        longer = np.flatnonzero(batch.lengths != 1)
        num_decodes = int(longer[0]) if len(longer) else num_rows
        prefill = decode = None
        if num_decodes:
            decode = self._decode.plan(_rows(batch, slice(num_decodes)), buffers)
        if num_decodes < num_rows:
            prefill = self._prefill.plan(_rows(batch, slice(num_decodes, num_rows)))
        return PairedPlan(num_decodes, prefill, decode)

    def run(self, q: Tensor, cache: Tensor, metadata: PairedPlan, window: int | None) -> Tensor:
        first = metadata.num_decodes
        if metadata.prefill is None:
            return self._decode.run(q, cache, metadata.decode, window)
        if metadata.decode is None:
            return self._prefill.run(q, cache, metadata.prefill, window)
        decoded = self._decode.run(q[:first], cache, metadata.decode, window)
        return torch.cat((decoded, self._prefill.run(q[first:], cache, metadata.prefill, window)))


def _rows(batch: AttentionBatch, rows: slice) -> AttentionBatch:
    return replace(
        batch,
        starts=batch.starts[rows],
        lengths=batch.lengths[rows],
        slots=batch.slots[rows],
        device_slots=batch.device_slots[rows],
        device_ends=batch.device_ends[rows],
    )
