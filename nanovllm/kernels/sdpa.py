"""The plain attention backend: gather the cache, then torch's scaled-dot-product attention.

Slow, and right on every device and dtype: the others are held to it.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.attention_backend import AttentionBatch, CacheConfig, CacheSpec

MAX_GATHERED_POSITIONS = 1 << 16
"""Padded positions gathered at a time: bounds the copy of the cache to some 100 MB a layer."""

MAX_SCORES = 1 << 27
"""Attention scores computed at a time, over all heads: bounds the mask to some 250 MB."""


@dataclass(slots=True)
class RowGroup:
    """Rows with equally many queries that are attended to in one call, padded to one length.

    Args:
        tokens: Indices of the rows' queries, `[num_rows, num_queries]`.
        cache_slots: Where each row's positions lie in the cache, `[num_rows, max_len]`; past its
            end a row repeats its last position, which the mask hides.
        query_positions: `[num_rows, num_queries]`.
        masks: By window, True where a query sees a position: `[num_rows, num_queries, max_len]`.
    """

    tokens: Tensor
    cache_slots: Tensor
    query_positions: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        if window not in self.masks:
            key = torch.arange(self.cache_slots.shape[1], device=self.tokens.device)
            query = self.query_positions[..., None]  # [num_rows, num_queries, 1]
            visible = key <= query
            self.masks[window] = visible if window is None else visible & (key > query - window)
        return self.masks[window]


class SdpaBackend:
    """See `AttentionBackend`. A layer's cache is `[2, num_blocks, block_size, kv_heads, dim]`."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def cache_spec(self, config: CacheConfig) -> CacheSpec:
        shape = (2, config.num_blocks, config.block_size, config.num_kv_heads, config.head_dim)
        return CacheSpec(shape, config.dtype)

    def write(self, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        keys, values = cache.flatten(1, 2)
        keys[slots] = k.to(cache.dtype)
        values[slots] = v.to(cache.dtype)

    def plan(self, batch: AttentionBatch) -> list[RowGroup]:
        groups = []
        offsets = [0]
        for length in batch.lengths:
            offsets.append(offsets[-1] + length)
        for rows in self._group_rows(batch):
            groups.append(self._plan_group(batch, rows, offsets))
        return groups

    def run(self, q: Tensor, cache: Tensor, metadata: list[RowGroup], window: int | None) -> Tensor:
        keys, values = cache.flatten(1, 2)  # [num_positions, num_kv_heads, head_dim]
        out = torch.empty_like(q)
        for group in metadata:
            k = keys[group.cache_slots].to(q.dtype)  # [num_rows, max_len, num_kv_heads, head_dim]
            v = values[group.cache_slots].to(q.dtype)
            step = max(1, MAX_SCORES // (k.shape[0] * k.shape[1] * q.shape[1]))
            mask = group.mask(window)
            for first in range(0, group.tokens.shape[1], step):
                tokens = group.tokens[:, first : first + step]
                out[tokens] = attend(q[tokens], k, v, mask[:, first : first + step])
        return out

    def _group_rows(self, batch: AttentionBatch) -> list[list[int]]:
        """Rows of one position by length, as many as the gather may hold; the others alone."""
        ends = [start + length for start, length in zip(batch.starts, batch.lengths, strict=True)]
        groups: list[list[int]] = []
        width = 0
        for row in sorted(range(len(ends)), key=lambda row: (batch.lengths[row], ends[row])):
            if batch.lengths[row] == 1 and (len(groups) and batch.lengths[groups[-1][0]] == 1):
                width = max(width, ends[row])
                if width * (len(groups[-1]) + 1) <= MAX_GATHERED_POSITIONS:
                    groups[-1].append(row)
                    continue
            groups.append([row])
            width = ends[row]
        return groups

    def _plan_group(self, batch: AttentionBatch, rows: list[int], offsets: list[int]) -> RowGroup:
        device = batch.block_tables.device
        length = batch.lengths[rows[0]]
        starts = torch.tensor([batch.starts[row] for row in rows], device=device)
        first_tokens = torch.tensor([offsets[row] for row in rows], device=device)
        step = torch.arange(length, device=device)
        last = starts[:, None] + length - 1  # [num_rows, 1]
        max_len = max(batch.starts[row] for row in rows) + length
        position = torch.minimum(torch.arange(max_len, device=device), last)  # [num_rows, max_len]
        tables = batch.block_tables[torch.tensor(rows, device=device)]
        blocks = tables.gather(1, position // self._block_size)
        return RowGroup(
            tokens=first_tokens[:, None] + step,
            cache_slots=blocks * self._block_size + position % self._block_size,
            query_positions=starts[:, None] + step,
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention with an explicit mask.

    The queries that share a KV head are laid side by side, so that keys are not repeated.

    Args:
        q: `[num_rows, num_queries, num_heads, head_dim]`.
        k: `[num_rows, num_keys, num_kv_heads, head_dim]`.
        v: Like `k`.
        mask: True where a query sees a key, `[num_rows, num_queries, num_keys]`.

    Returns:
        `[num_rows, num_queries, num_heads, head_dim]`.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group_size = num_heads // num_kv_heads
    q = q.view(num_rows, num_queries, num_kv_heads, group_size, head_dim)
    q = q.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv_heads, group_size * num_queries, head_dim)
    mask = mask[:, None].repeat(1, 1, group_size, 1)  # [num_rows, 1, group * num_queries, num_keys]
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    out = out.view(num_rows, num_kv_heads, group_size, num_queries, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(num_rows, num_queries, num_heads, head_dim)
