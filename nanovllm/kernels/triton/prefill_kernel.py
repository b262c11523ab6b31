"""Attention from several positions of a row at once; see `nanovllm.kernels.triton.attention`."""

import triton
import triton.language as tl

from nanovllm.kernels.triton.attention_tile import attend, nothing, result_of


@triton.jit
def prefill_kernel(
    q,
    cache,
    value_offset,
    tables,
    table_width,
    tiles,
    out,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from consecutive queries of a row: tile (slot, first token, its position, queries).

    With `UNIFORM` all keys take the masked loop, so that a query's sums are compiled once.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile = tiles + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    slot = tl.load(tile)
    first_token = tl.load(tile + 1)
    first_position = tl.load(tile + 2)
    num_queries = tl.load(tile + 3)

    lane = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    query = lane // GROUP
    used = query < num_queries
    token = (first_token + query).to(tl.int64)
    head = kv_head * GROUP + lane % GROUP
    place = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    mine = used[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + place, mask=mine, other=0.0)
    positions = tl.where(used, first_position + query, -1)

    state = nothing(BLOCK_M, BLOCK_D)
    heads = cache + kv_head * HEAD_DIM
    table = tables + slot.to(tl.int64) * table_width
    last = first_position + num_queries
    first = 0
    if WINDOW > 0:
        first = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    elif not UNIFORM:
        whole = (first_position + 1) // BLOCK_N * BLOCK_N
        state = attend(
            queries, state, heads, value_offset, table, 0, whole, positions, BLOCK_SIZE,
            NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, SCALE, 0, False, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        first = whole
    state = attend(
        queries, state, heads, value_offset, table, first, last, positions, BLOCK_SIZE,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, SCALE, WINDOW, True, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    tl.store(out + place, result_of(state).to(out.dtype.element_ty), mask=mine)
