"""Online softmax over keys in blocks: what the attention kernels are made of.

In base 2 (FlashAttention-2, Dao 2023, section 3.1), over tiles whose rows are the query heads of
one KV head, so that a key is read once for all of them. In each kernel `cache` is a layer's,
`[2, num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM]`, `value_offset` where its values begin, and
`tables` the blocks of all slots, `[num_slots, table_width]`.
"""

import triton
import triton.language as tl


@triton.jit
def nothing(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state before the first key: sums of values, the highest score and the sum of weights."""
    sums = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    return sums, peak, total


@triton.jit
def attend(
    q,
    state,
    cache,
    value_offset,
    table,
    first,
    last,
    positions,
    BLOCK_SIZE: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take up the keys at `first .. last - 1` of one table; `SCALE` is that of scores in base 2.

    Without `BOUNDED` these are whole tiles, all seen by all queries.
    """
    sums, peak, total = state
    dim = tl.arange(0, BLOCK_D)
    for begin in range(first, last, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        if BOUNDED:
            block = tl.load(table + key // BLOCK_SIZE, mask=key < last, other=0)
        else:
            block = tl.load(table + key // BLOCK_SIZE)
        # int64, as the tables are: a cache has more elements than int32 counts.
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        place = cache + slot[:, None] * KV_WIDTH + dim[None, :]
        if BOUNDED or HEAD_DIM < BLOCK_D:
            # What is not ours may be no number, which a weight of zero would not hide.
            ours = (key < last)[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(place, mask=ours, other=0.0)
            v = tl.load(place + value_offset, mask=ours, other=0.0)
        else:
            k = tl.load(place)
            v = tl.load(place + value_offset)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [BLOCK_M, BLOCK_N]
        if BOUNDED:
            seen = (key < last)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= positions[:, None])
            if WINDOW > 0:
                seen = seen & (key[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision="ieee")
        peak = new_peak
    return sums, peak, total


@triton.jit
def keep(state, scratch, place, used, HEAD_DIM: tl.constexpr):
    """Leave a split's state in scratch, the sums only if it had keys: nobody reads others."""
    sums, peak, total = state
    scratch_sums, scratch_peaks, scratch_totals = scratch
    dim = tl.arange(0, sums.shape[1])
    tl.store(scratch_peaks + place, peak, mask=used)
    tl.store(scratch_totals + place, total, mask=used)
    tl.store(
        scratch_sums + place[:, None] * HEAD_DIM + dim[None, :],
        sums,
        mask=(used & (peak > float("-inf")))[:, None] & (dim < HEAD_DIM)[None, :],
    )


@triton.jit
def result_of(state):
    """The weighted mean of the values; zeros if there was no key."""
    sums, _, total = state
    return sums / tl.where(total > 0, total, 1.0)[:, None]
