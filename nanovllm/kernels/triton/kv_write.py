"""What comes before attention, in one launch: head norms, rotation, the write to the KV cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_backend import HeadNorms

BLOCK = 1024
"""Pairs of a head's values that a program holds: 16 bytes of each half a thread."""


def write_kv(
    qkv: Tensor,
    norms: HeadNorms | None,
    rotary: tuple[Tensor, Tensor] | None,
    cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Norm and rotate the heads, and store keys and values; see `AttentionBackend.write`.

    Args:
        qkv: Projections `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`.
        norms: Norms of queries and keys by head.
        rotary: Cosines and sines, each float32 `[num_tokens, 1, head_dim / 2]`.
        cache: `[2, num_blocks, block_size, num_kv_heads, head_dim]`, contiguous.
        slots: Where each token goes, int64 `[num_tokens]`; nowhere if that is -1.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.

    Returns:
        The queries, `[num_tokens, num_heads, head_dim]`.
    """
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    head_dim = cache.shape[-1]
    half = head_dim // 2
    cos, sin = (None, None) if rotary is None else (table.contiguous() for table in rotary)
    queries = torch.empty(len(qkv), num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if queries.numel():
        block_half = triton.next_power_of_2(half)
        total_heads = num_heads + 2 * num_kv_heads
        block_heads = min(triton.next_power_of_2(total_heads), max(BLOCK // block_half, 1))
        _write_kernel[(len(qkv), triton.cdiv(total_heads, block_heads))](
            qkv,
            queries,
            cache,
            slots,
            None if norms is None else norms.q,
            None if norms is None else norms.k,
            cos,
            sin,
            qkv.stride(0),
            cache.stride(0),
            0.0 if norms is None else norms.eps,
            NORM=norms is not None,
            ROTATE=rotary is not None,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=half,
            BLOCK_HALF=block_half,
            BLOCK_HEADS=block_heads,
            num_warps=4,
        )
    return queries


@triton.jit
def _write_kernel(
    qkv_ptr,
    queries_ptr,
    cache_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    qkv_stride,
    values_offset,
    eps,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Treat some heads of a token, which may be queries, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (columns < HALF)
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    source = qkv_ptr + token * qkv_stride + heads * (2 * HALF) + columns
    first = tl.load(source, mask, other=0.0)  # halves of the heads
    second = tl.load(source + HALF, mask, other=0.0)
    if NORM:
        squares = first.to(tl.float32) * first.to(tl.float32)
        squares += second.to(tl.float32) * second.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, 1) / (2 * HALF) + eps)[:, None]
        weight = _load_weight(q_norm_ptr, k_norm_ptr, columns, is_query, HALF)
        normed = (first.to(tl.float32) * scale * weight).to(first.dtype)
        first = tl.where(is_value, first, normed)
        weight = _load_weight(q_norm_ptr + HALF, k_norm_ptr + HALF, columns, is_query, HALF)
        normed = (second.to(tl.float32) * scale * weight).to(second.dtype)
        second = tl.where(is_value, second, normed)
    if ROTATE:
        cos = tl.load(cos_ptr + token * HALF + columns, columns < HALF, other=0.0)
        sin = tl.load(sin_ptr + token * HALF + columns, columns < HALF, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = tl.where(is_value, first, (x * cos - y * sin).to(first.dtype))
        second = tl.where(is_value, second, (y * cos + x * sin).to(second.dtype))
    target = queries_ptr + token * (NUM_HEADS * 2 * HALF) + heads * (2 * HALF) + columns
    tl.store(target, first, mask & is_query)
    tl.store(target + HALF, second, mask & is_query)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    kv_heads = heads - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
    target = cache_ptr + slot * (NUM_KV_HEADS * 2 * HALF) + kv_heads * (2 * HALF) + columns
    target += tl.where(is_value, values_offset, 0)
    is_written = mask & (heads >= NUM_HEADS) & (slot >= 0)
    tl.store(target, first, is_written)
    tl.store(target + HALF, second, is_written)


@triton.jit
def _load_weight(q_ptr, k_ptr, columns, is_query, HALF: tl.constexpr):
    """The norm's weight of each head, float32 `[BLOCK_HEADS, BLOCK_HALF]`."""
    q = tl.load(q_ptr + columns, columns < HALF, other=0.0)
    k = tl.load(k_ptr + columns, columns < HALF, other=0.0)
    return tl.where(is_query, q, k)
