"""The plain attention backend: gather the cache, then torch's scaled-dot-product attention.

Slow, and right on every device and dtype: the others are held to it.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.attention_backend import (
    AttentionBatch,
    AttentionConfig,
    CacheSpec,
    HeadNorms,
    PlanBuffers,
)
from nanovllm.kernels.elementwise import rms_norm, rotate

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


class PagedCache:
    """A layer's cache as `[2, num_blocks, block_size, num_kv_heads, head_dim]`, plainly written.

    All backends but the one of our CPU kernels have this layout, so that they can be paired.
    """

    def __init__(self, config: AttentionConfig) -> None:
        if config.quantize_cache:
            raise InvalidRequestError(
                "kv_cache_dtype='int8' needs our CPU kernels; without them it must be 'auto'",
                "kv_cache_dtype",
            )
        self._config = config

    def cache_spec(self, num_blocks: int) -> CacheSpec:
        """See `AttentionBackend`."""
        config = self._config
        shape = (2, num_blocks, config.block_size, config.num_kv_heads, config.head_dim)
        return CacheSpec(shape, config.dtype)

    def write(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """See `AttentionBackend`."""
        config = self._config
        heads = qkv.view(len(qkv), -1, config.head_dim)
        widths = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        # [num_tokens, num_heads or num_kv_heads, head_dim]
        q, k, v = torch.split(heads, widths, dim=1)
        if norms is not None:
            q = rms_norm(q, norms.q, norms.eps)
            k = rms_norm(k, norms.k, norms.eps)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        _store(k, v, cache, slots)
        return q


def _store(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write keys and values `[num_tokens, num_kv_heads, head_dim]` where slots are not -1."""
    # To pick the tokens that have a slot would wait for the device. So the others repeat one that
    # has; if there is none, all write back what is there.
    has_slot = slots >= 0
    tokens = torch.arange(len(slots), device=slots.device)
    tokens = torch.where(has_slot, tokens, has_slot.byte().argmax())
    slots = slots[tokens]
    kept = (slots >= 0)[:, None, None]
    for stored, new in zip(cache.flatten(1, 2), (k, v), strict=True):
        stored[slots] = torch.where(kept, new[tokens].to(stored.dtype), stored[slots])


class SdpaBackend(PagedCache):
    """See `AttentionBackend`. It is right everywhere, and not captured in graphs."""

    @property
    def capturable(self) -> bool:
        return False

    def plan(
        self,
        batch: AttentionBatch,
        buffers: PlanBuffers | None = None,  # noqa: ARG002
    ) -> list[RowGroup]:
        groups, tables = [], batch.row_tables(self._config.block_size)
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        offsets = [0, *itertools.accumulate(lengths)]
        for rows in self._group_rows(starts, lengths):
            group = self._plan_group(
                [starts[row] for row in rows],
                lengths[rows[0]],
                [offsets[row] for row in rows],
                tables[torch.tensor(rows, device=tables.device)],
            )
            groups.append(group)
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

    def _group_rows(self, starts: list[int], lengths: list[int]) -> list[list[int]]:
        """Rows of one position by length, as many as the gather may hold; the others alone."""
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        groups: list[list[int]] = []
        width = 0
        for row in sorted(range(len(ends)), key=lambda row: (lengths[row], ends[row])):
            if lengths[row] == 1 and (len(groups) and lengths[groups[-1][0]] == 1):
                width = max(width, ends[row])
                if width * (len(groups[-1]) + 1) <= MAX_GATHERED_POSITIONS:
                    groups[-1].append(row)
                    continue
            groups.append([row])
            width = ends[row]
        return groups

    def _plan_group(
        self, starts: list[int], length: int, first_tokens: list[int], tables: Tensor
    ) -> RowGroup:
        device, block_size = tables.device, self._config.block_size
        first = torch.tensor(starts, device=device)[:, None]  # [num_rows, 1]
        step = torch.arange(length, device=device)
        positions = torch.arange(max(starts) + length, device=device)
        position = torch.minimum(positions, first + length - 1)  # [num_rows, max_len]
        blocks = tables.gather(1, position // block_size)
        return RowGroup(
            tokens=torch.tensor(first_tokens, device=device)[:, None] + step,
            cache_slots=blocks * block_size + position % block_size,
            query_positions=first + step,
        )


def attend_locally(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    length: int,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """See `Kernels.local_attention`."""
    num_tokens, width = qkv.shape
    num_projections = num_heads + 2 * num_kv_heads
    head_dim = width // num_projections
    heads = qkv.view(num_tokens // length, length, num_projections, head_dim)
    # [num_seqs, length, num_heads or num_kv_heads, head_dim]
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=2)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    return attend(q, k, v, None).reshape(num_tokens, num_heads * head_dim)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention with an explicit mask.

    The queries that share a KV head are laid side by side, so that keys are not repeated.

    Args:
        q: `[num_rows, num_queries, num_heads, head_dim]`.
        k: `[num_rows, num_keys, num_kv_heads, head_dim]`.
        v: Like `k`.
        mask: True where a query sees a key, `[num_rows, num_queries, num_keys]`; None is
            everywhere.

    Returns:
        `[num_rows, num_queries, num_heads, head_dim]`.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group_size = num_heads // num_kv_heads
    q = q.view(num_rows, num_queries, num_kv_heads, group_size, head_dim)
    q = q.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv_heads, group_size * num_queries, head_dim)
    if mask is not None:
        # [num_rows, 1, group * num_queries, num_keys]
        mask = mask[:, None].repeat(1, 1, group_size, 1)
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    out = out.view(num_rows, num_kv_heads, group_size, num_queries, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(num_rows, num_queries, num_heads, head_dim)
