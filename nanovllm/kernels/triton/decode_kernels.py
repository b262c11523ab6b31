"""Attention from one position of each row; see `nanovllm.kernels.triton.attention`."""

import triton
import triton.language as tl

from nanovllm.kernels.triton.attention_tile import attend, keep, nothing, result_of


@triton.jit
def own_begin(row, end, used, shared_begins, WINDOW: tl.constexpr, SHARED: tl.constexpr):
    """Where the keys begin that a decode itself reads."""
    begin = tl.maximum(end - WINDOW, 0) if WINDOW > 0 else end * 0
    if SHARED:
        begin = tl.load(shared_begins + row, mask=used, other=0)
    return begin


@triton.jit
def find_share(
    item,
    ends,
    shared_begins,
    num_rows,
    spare,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Divide the keys of all rows evenly among `num_rows + spare` items.

    A row has an item for every `share` tiles begun, which are as few as the items allow.

    Returns:
        The item's row, which of that row's items it is, how many these are, and the keys of each.
    """
    rows = tl.arange(0, BLOCK_R)
    used = rows < num_rows
    end = tl.load(ends + rows, mask=used, other=0).to(tl.int32)
    begin = own_begin(rows, end, used, shared_begins, WINDOW, SHARED)
    # Tiles beside the first of each row, which are what the spare items are for.
    more = (tl.maximum(end - begin, 1) - 1) // BLOCK_N
    share = tl.maximum((tl.sum(more, 0) + spare - 1) // spare, 1)
    counts = tl.where(used, more // share + 1, 0)
    behind = tl.cumsum(counts, 0)
    row = tl.sum((used & (behind <= item)).to(tl.int32), 0)
    count = tl.sum(tl.where(rows == row, counts, 0), 0)
    part = item - tl.sum(tl.where(rows < row, counts, 0), 0)
    return row, part, count, share * BLOCK_N


@triton.jit
def take_up(state, wanted, head, used, shared, HEAD_DIM: tl.constexpr, SHARED_SPLITS: tl.constexpr):
    """Merge what `shared_kernel` left of each head, if it is wanted: most programs want nothing."""
    sums, peak, total = state
    shared_sums, shared_peaks, shared_totals = shared
    dim = tl.arange(0, sums.shape[1])
    if wanted:
        # Unrolled, so that the loads do not wait for one another.
        for split in tl.static_range(SHARED_SPLITS):
            place = head * SHARED_SPLITS + split
            other_peak = tl.load(shared_peaks + place, mask=used, other=float("-inf"))
            filled = other_peak > float("-inf")
            other_total = tl.load(shared_totals + place, mask=filled, other=0.0)
            other_sums = tl.load(
                shared_sums + place[:, None] * HEAD_DIM + dim[None, :],
                mask=filled[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            new_peak = tl.maximum(peak, other_peak)
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            decay = tl.exp2(peak - base)
            weight = tl.exp2(other_peak - base)
            sums = sums * decay[:, None] + other_sums * weight[:, None]
            total = total * decay + other_total * weight
            peak = new_peak
    return sums, peak, total


@triton.jit(
    do_not_specialize=["num_rows", "spare"], do_not_specialize_on_alignment=["slots", "ends"]
)
def decode_kernel(
    q,
    cache,
    value_offset,
    tables,
    table_width,
    slots,
    ends,
    num_rows,
    spare,
    out,
    scratch_sums,
    scratch_peaks,
    scratch_totals,
    spans,
    shared_begins,
    shared_sums,
    shared_peaks,
    shared_totals,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from a row's one query to a share of its keys: item, KV head.

    Rows of one item go to `out`, others to scratch `[num_items, num_heads]`, `spans` telling which
    item is a row's first and how many it has. With `SHARED_SPLITS` a row begins behind the prefix
    it shares, and its first item takes up what `shared_kernel` left of that.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    row, part, count, share = item, 0, 1, 1
    if SPLIT:
        row, part, count, share = find_share(
            item, ends, shared_begins, num_rows, spare, WINDOW, SHARED_SPLITS > 0, BLOCK_R, BLOCK_N
        )
    busy = row < num_rows
    slot = tl.load(slots + row, mask=busy, other=0).to(tl.int64)
    end = tl.load(ends + row, mask=busy, other=0).to(tl.int32)
    begin = own_begin(row, end, busy, shared_begins, WINDOW, SHARED_SPLITS > 0)
    if SPLIT:
        first = begin + part * share
        last = tl.minimum(first + share, end)
    else:
        first = begin
        last = end

    lane = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    used = (lane < GROUP) & busy
    group_head = kv_head * GROUP + lane
    head = row.to(tl.int64) * NUM_HEADS + group_head
    place = head[:, None] * HEAD_DIM + dim[None, :]
    mine = used[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + place, mask=mine, other=0.0)

    state = nothing(BLOCK_M, BLOCK_D)
    if SHARED_SPLITS > 0:
        shared = shared_sums, shared_peaks, shared_totals
        wanted = (begin > 0) & (part == 0)
        state = take_up(state, wanted, head, used, shared, HEAD_DIM, SHARED_SPLITS)
    state = attend(
        queries, state, cache + kv_head * HEAD_DIM, value_offset, tables + slot * table_width,
        first, last, lane, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, SCALE, 0, False, True,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if SPLIT:
        own = item.to(tl.int64) * NUM_HEADS + group_head
        split = used & (count > 1)
        keep(state, (scratch_sums, scratch_peaks, scratch_totals), own, split, HEAD_DIM)
        tells = busy & (part == 0) & (kv_head == 0)
        tl.store(spans + row * 2, item, mask=tells)
        tl.store(spans + row * 2 + 1, count, mask=tells)
        mine = mine & (count == 1)
    tl.store(out + place, result_of(state).to(out.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def shared_kernel(
    q,
    cache,
    value_offset,
    tables,
    table_width,
    slots,
    header,
    members,
    shared_sums,
    shared_peaks,
    shared_totals,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from some rows at once to the prefix they share: tile of rows, KV head, split.

    `header` holds how many `members` there are, which are rows, and how many positions they share;
    what is left of each split goes to scratch `[num_rows, num_heads, num_splits]`.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    ROWS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    num_members = tl.load(header)
    end = tl.load(header + 1)
    slot = tl.load(slots + tl.load(members)).to(tl.int64)

    lane = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    member = tl.program_id(0) * ROWS + lane // GROUP
    used = (lane < ROWS * GROUP) & (member < num_members)
    row = tl.load(members + member, mask=used, other=0).to(tl.int64)
    head = row * NUM_HEADS + kv_head * GROUP + lane % GROUP
    mine = used[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + head[:, None] * HEAD_DIM + dim[None, :], mask=mine, other=0.0)

    share = tl.cdiv(tl.cdiv(end, BLOCK_N), num_splits) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, end)
    last = tl.where(tl.program_id(0) * ROWS < num_members, last, first)
    state = nothing(BLOCK_M, BLOCK_D)
    state = attend(
        queries, state, cache + kv_head * HEAD_DIM, value_offset, tables + slot * table_width,
        first, last, lane, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, SCALE, 0, False, True,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    place = head * num_splits + split
    keep(state, (shared_sums, shared_peaks, shared_totals), place, used, HEAD_DIM)


@triton.jit
def combine_kernel(
    scratch_sums,
    scratch_peaks,
    scratch_totals,
    spans,
    out,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the items of a row's head, `BLOCK_S` at a time: row, head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first_item = tl.load(spans + row * 2).to(tl.int64)
    count = tl.load(spans + row * 2 + 1)
    split = count > 1
    dim = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = 0.0
    peak = float("-inf")
    for first in range(0, tl.where(split, count, 0), BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        place = (first_item + part) * NUM_HEADS + head
        peaks = tl.load(scratch_peaks + place, mask=part < count, other=float("-inf"))
        filled = peaks > float("-inf")
        totals = tl.load(scratch_totals + place, mask=filled, other=0.0)
        parts = tl.load(
            scratch_sums + place[:, None] * HEAD_DIM + dim[None, :],
            mask=filled[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - base)
        weights = tl.exp2(peaks - base)
        sums = sums * decay + tl.sum(parts * weights[:, None], 0)
        total = total * decay + tl.sum(totals * weights, 0)
        peak = new_peak
    result = sums / tl.where(total > 0, total, 1.0)
    place = out + (row * NUM_HEADS + head) * HEAD_DIM + dim
    tl.store(place, result.to(out.dtype.element_ty), mask=split & (dim < HEAD_DIM))
