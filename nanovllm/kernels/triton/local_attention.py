"""Attention within short sequences of equal length: rotation, softmax and values in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_LENGTH, MAX_HEAD_DIM = 64, 256
"""A program holds the keys and values of a sequence and a KV head."""
BLOCK_ROWS = 32
"""Queries of a program: few, so that a lone sequence is spread over more of the chip."""


def serves_local(qkv: Tensor, length: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether the kernel is for these sequences."""
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    return length <= MAX_LENGTH and head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0


def local_attention(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    length: int,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """See `Kernels.local_attention`; a sequence's result does not depend on the others."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    num_tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    cos, sin = (None, None) if rotary is None else (table.contiguous() for table in rotary)
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        group = num_heads // num_kv_heads
        block_dim = max(triton.next_power_of_2(head_dim), 16)
        block_keys = max(triton.next_power_of_2(length), 16)
        grid = (num_tokens // length, num_kv_heads, triton.cdiv(group * length, BLOCK_ROWS))
        _local_kernel[grid](
            qkv,
            out,
            cos,
            sin,
            qkv.stride(0),
            head_dim**-0.5,
            ROTATE=rotary is not None,
            LENGTH=length,
            GROUP=group,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            BLOCK_HALF=max(block_dim // 2, 16),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_KEYS=block_keys,
            num_warps=8 if block_keys * block_dim > 4096 else 4,
        )
    return out


@triton.jit
def _local_kernel(
    qkv_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    qkv_stride,
    scale,
    ROTATE: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Some queries of the heads that share a KV head, in one sequence.

    The heads of a position follow each other, then those of the next one.
    """
    NUM_HEADS: tl.constexpr = GROUP * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64) * LENGTH
    kv_head = tl.program_id(1)
    qkv_ptr += token * qkv_stride
    rows = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    is_row = rows < GROUP * LENGTH
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    keys = tl.arange(0, BLOCK_KEYS)[:, None]

    source = qkv_ptr + query * qkv_stride + head * HEAD_DIM
    q1, q2 = _halves(source, cos_ptr, sin_ptr, query, is_row, HEAD_DIM, BLOCK_HALF, ROTATE)
    source = qkv_ptr + keys * qkv_stride + (NUM_HEADS + kv_head) * HEAD_DIM
    k1, k2 = _halves(source, cos_ptr, sin_ptr, keys, keys < LENGTH, HEAD_DIM, BLOCK_HALF, ROTATE)
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, BLOCK_KEYS)[None, :] < LENGTH, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])

    columns = tl.arange(0, BLOCK_DIM)[None, :]
    source = qkv_ptr + keys * qkv_stride + (NUM_HEADS + NUM_KV_HEADS + kv_head) * HEAD_DIM
    values = tl.load(source + columns, (keys < LENGTH) & (columns < HEAD_DIM), other=0.0)
    out = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    out /= tl.sum(weights, 1)[:, None]
    target = out_ptr + (token + query) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + columns
    tl.store(target, out.to(out_ptr.dtype.element_ty), is_row & (columns < HEAD_DIM))


@triton.jit
def _halves(
    head_ptr,
    cos_ptr,
    sin_ptr,
    positions,
    is_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """The halves of heads, after their rotation."""
    HALF: tl.constexpr = HEAD_DIM // 2
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    mask = is_row & (columns < HALF)
    first = tl.load(head_ptr + columns, mask, other=0.0)
    second = tl.load(head_ptr + HALF + columns, mask, other=0.0)
    if ROTATE:
        cos = tl.load(cos_ptr + positions * HALF + columns, mask, other=0.0)
        sin = tl.load(sin_ptr + positions * HALF + columns, mask, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = (x * cos - y * sin).to(first.dtype)
        second = (y * cos + x * sin).to(second.dtype)
    return first, second
