"""From logits to token ids in one launch, a program a row, without sorting the vocabulary.

Where top-k or top-p cut a row, the logit at which they do is searched for: each round counts and
weighs what reaches a few thresholds. Once few enough tokens are left they are copied to a list, and
the rounds go on in that. The draw inverts the cumulative distribution in the order of the
vocabulary, as torch_kernels.py does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.kernels import Choice, Draws

BLOCK = 2048
"""Logits that a program reads at a time."""
MAX_LISTED = 8192
"""Tokens that a list may hold; if more are left the row itself is searched to the end."""
NUM_WARPS = 16
NUM_STAGES = 5
LOG2_E = tl.constexpr(1.4426950408889634)
NEGLIGIBLE = tl.constexpr(110.0)
"""A token that is so many temperatures below the best one weighs nothing in float32."""


def choose(logits: Tensor, draws: Draws) -> Choice:
    """See `Kernels.choose`. What a row draws does not depend on the other rows.

    Args:
        logits: float32 `[num_rows, vocab_size]`; rows may lie apart. They stay as they are.
        draws: How to choose.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    valid = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    cuts = draws.any_sampled and (draws.top_k is not None or draws.top_p is not None)
    listed = logits.new_empty(num_rows if cuts else 0, MAX_LISTED)
    listed_ids = torch.empty_like(listed, dtype=torch.int32)
    if num_rows:
        _choose_kernel[(num_rows,)](
            logits,
            logits.stride(0),
            vocab_size,
            draws.temperature,
            draws.uniforms,
            draws.top_k,
            draws.top_p,
            draws.min_p,
            listed,
            listed_ids,
            token_ids,
            valid,
            SAMPLED=draws.any_sampled,
            CUTS=cuts,
            MAX_LISTED=MAX_LISTED,
            NUM_BLOCKS=triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK)),
            BLOCK=BLOCK,
            STAGES=NUM_STAGES,
            num_warps=NUM_WARPS,
        )
    return Choice(token_ids, valid)


@triton.jit
def _choose_kernel(
    logits_ptr,
    row_stride,
    vocab_size,
    temperatures_ptr,
    uniforms_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    listed_ptr,
    listed_ids_ptr,
    token_ids_ptr,
    valid_ptr,
    SAMPLED: tl.constexpr,
    CUTS: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = logits_ptr + row * row_stride
    best, token_id, usable = _find_best(values, vocab_size, BLOCK, STAGES)
    tl.store(valid_ptr + row, usable)
    if SAMPLED:
        temperature = tl.load(temperatures_ptr + row)
        if usable & (temperature > 0):
            min_p = 0.0
            if min_p_ptr is not None:
                min_p = tl.load(min_p_ptr + row)
            scales = (best, LOG2_E / temperature, min_p)
            uniform = tl.load(uniforms_ptr + row)
            everything = (float("-inf"), float("-inf"), vocab_size)
            if CUTS:
                top_k = vocab_size
                if top_k_ptr is not None:
                    top_k = tl.minimum(tl.load(top_k_ptr + row), vocab_size).to(tl.int32)
                top_p = 1.0
                if top_p_ptr is not None:
                    top_p = tl.load(top_p_ptr + row)
                listed = listed_ptr + row * MAX_LISTED
                ids = listed_ids_ptr + row * MAX_LISTED
                if (top_k < vocab_size) | (top_p < 1):
                    source, size, kept = _cut(
                        values, vocab_size, listed, ids, top_k, top_p, temperature, scales,
                        MAX_LISTED, BLOCK, STAGES,
                    )  # fmt: skip
                    token_id = _draw(source, size, kept, uniform, scales, NUM_BLOCKS, BLOCK, STAGES)
                    if size < vocab_size:
                        token_id = tl.load(ids + token_id)
                else:
                    token_id = _draw(
                        values, vocab_size, everything, uniform, scales, NUM_BLOCKS, BLOCK, STAGES
                    )
            else:
                token_id = _draw(
                    values, vocab_size, everything, uniform, scales, NUM_BLOCKS, BLOCK, STAGES
                )
    tl.store(token_ids_ptr + row, token_id.to(tl.int64))


@triton.jit
def _load(values, index, size):
    return tl.load(values + index, mask=index < size, other=float("-inf"))


@triton.jit
def _find_best(values, size, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The best logit, the first token that has it, and whether the row is usable."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    unordered = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = _load(values, first + lane, size)
        unordered = tl.where(x != x, 1, unordered)
        place = tl.where(x > top, first + lane, place)
        top = tl.where(x > top, x, top)
    best = tl.max(top, 0)
    token_id = tl.min(tl.where(top == best, place, size - 1), 0)
    usable = (tl.max(unordered, 0) == 0) & (best > float("-inf")) & (best < float("inf"))
    return best, token_id, usable


@triton.jit
def _weigh(x, scales):
    """What logits weigh, the best one 1; nothing if min-p drops them."""
    best, scale, min_p = scales
    weights = tl.exp2((x - best) * scale)
    return tl.where(weights < min_p, 0.0, weights)


@triton.jit
def _key(x):
    """Integers in the order of the floats, the same for both zeros."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _measure(values, size, thresholds, end, scales, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """How many logits reach each of four thresholds, and what they weigh together.

    And the least and the largest key of those from the first threshold on below an end.
    """
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([4, BLOCK], tl.int32)
    masses = tl.zeros([4, BLOCK], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    start = tl.min(thresholds, 0)
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = _load(values, first + lane, size)
        weights = _weigh(x, scales)
        reached = x[None, :] >= thresholds[:, None]
        counts += reached.to(tl.int32)
        masses += tl.where(reached, weights[None, :], 0.0)
        least = tl.minimum(least, tl.where(x >= start, x, float("inf")))
        largest = tl.maximum(largest, tl.where(x < end, x, float("-inf")))
    least, largest = tl.min(least, 0), tl.max(largest, 0)
    return tl.sum(counts, 1), tl.sum(masses, 1), _key(least), _key(largest)


@triton.jit
def _narrow(bounds, keys, counts, masses, wanted):
    """Narrow bounds by what was measured at four keys, the first one known to reach enough.

    Bounds are the key, count and mass of a threshold that enough reaches, and the same of a higher
    one that too little does: a count or a mass is wanted.
    """
    low, low_count, low_mass, high, high_count, high_mass = bounds
    enough = (counts >= wanted[0]) | (masses >= wanted[1]) | (tl.arange(0, 4) == 0)
    low = tl.maximum(low, tl.max(tl.where(enough, keys, low), 0))
    low_count = tl.minimum(low_count, tl.min(tl.where(enough, counts, low_count), 0))
    low_mass = tl.minimum(low_mass, tl.min(tl.where(enough, masses, low_mass), 0))
    high = tl.minimum(high, tl.min(tl.where(enough, high, keys), 0))
    high_count = tl.maximum(high_count, tl.max(tl.where(enough, high_count, counts), 0))
    high_mass = tl.maximum(high_mass, tl.max(tl.where(enough, high_mass, masses), 0))
    return low, low_count, low_mass, high, high_count, high_mass


@triton.jit
def _spread(low, high):
    """Four keys from `low` on, below `high`."""
    probe = tl.arange(0, 4)
    share = probe.to(tl.float32) * 0.25
    values = _value(low) * (1.0 - share) + _value(high) * share
    # Halves of keys are halves of exponents, if these differ.
    return tl.where(high - low > 1 << 23, _key(values), low + (((high - low) * probe) >> 2))


@triton.jit
def _search(values, size, bounds, wanted, few, scales, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Narrow bounds until there is one token or one value between them, or few reach the lower."""
    low, low_count, low_mass, high, high_count, high_mass = bounds
    while (high - low > 1) & (low_count - high_count > 1) & (low_count > few):
        keys = _spread(low, high)
        counts, masses, least, largest = _measure(
            values, size, _value(keys), _value(high), scales, BLOCK, STAGES
        )
        low, low_count, low_mass, high, high_count, high_mass = _narrow(
            (low, low_count, low_mass, high, high_count, high_mass), keys, counts, masses, wanted
        )
        # Equal logits end the search as soon as they are alone.
        low = tl.maximum(low, least)
        high = tl.minimum(high, largest + 1)
    return low, low_count, low_mass, high, high_count, high_mass


@triton.jit
def _cut(
    row,
    vocab_size,
    listed,
    listed_ids,
    top_k,
    top_p,
    temperature,
    scales,
    MAX_LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Find what top-k keeps, and top-p of that.

    Returns:
        Where to draw from, its size, and what to keep of it: the logits from a first value on, and
        up to a last position those from a second, lower value on.
    """
    best = scales[0]
    end = _key(best) + 1
    probe = tl.arange(0, 4)
    # What weighs anything, and what is within 12, 6 and 3 temperatures of the best.
    least = tl.maximum(best - NEGLIGIBLE * temperature, -3.4e38)
    thresholds = tl.maximum(best - temperature * (24 >> probe).to(tl.float32), least)
    thresholds = tl.where(probe == 0, least, thresholds)
    counts, masses, _, _ = _measure(row, vocab_size, thresholds, best, scales, BLOCK, STAGES)
    count, mass = tl.max(counts, 0), tl.max(masses, 0)

    by_count, by_mass = top_k < count, top_p < 1
    # Top-p is a share of what top-k leaves: that comes first.
    wanted_mass = tl.where(by_count | (top_p >= 1), float("inf"), top_p * mass)
    wanted = (tl.where(by_count, top_k, vocab_size + 1), wanted_mass)
    few = tl.where(by_count | (top_p >= 1), top_k, 0)
    bounds = (_key(least), count, mass, end, 0, 0.0)
    bounds = _narrow(bounds, _key(thresholds), counts, masses, wanted)
    bounds = _search(
        row, vocab_size, bounds, wanted, tl.maximum(few, MAX_LISTED), scales, BLOCK, STAGES
    )

    fits = bounds[1] <= MAX_LISTED
    if fits:
        _list(row, vocab_size, _value(bounds[0]), listed, listed_ids, BLOCK, STAGES)
    source = tl.where(fits, listed, row)
    size = tl.where(fits, bounds[1], vocab_size)
    low, low_count, low_mass, high, high_count, high_mass = _search(
        source, size, bounds, wanted, few, scales, BLOCK, STAGES
    )
    # Of equal logits there may be more than top-k keeps.
    num_kept = tl.minimum(low_count, top_k)
    tie = _weigh(_value(low), scales)
    if by_count & by_mass:
        mass = high_mass + (num_kept - high_count).to(tl.float32) * tie
        mass = tl.where(num_kept == low_count, low_mass, mass)
        wanted_mass = top_p * mass
        low, low_count, low_mass, high, high_count, high_mass = _search(
            source, size, (low, num_kept, mass, end, 0, 0.0), (vocab_size + 1, wanted_mass), 0,
            scales, BLOCK, STAGES,
        )  # fmt: skip
        num_kept = low_count
        tie = _weigh(_value(low), scales)
    num_ties = num_kept - high_count
    if by_mass:
        share = tl.div_rn(wanted_mass - high_mass, tl.where(tie > 0, tie, 1.0))
        share = tl.maximum(tl.minimum(tl.ceil(share), num_ties.to(tl.float32)), 1.0)
        num_ties = share.to(tl.int32)
    last = _find_tie(source, size, _value(low), _value(high), num_ties, BLOCK, STAGES)
    return source, size, (_value(high), _value(low), last)


@triton.jit
def _list(row, size, lowest, listed, listed_ids, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Copy the logits from a value on, and their ids, in the order of the vocabulary."""
    lane = tl.arange(0, BLOCK)
    count = 0
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = _load(row, first + lane, size)
        # Most often there are a few in a few blocks.
        if tl.max(x, 0) >= lowest:
            chosen = (x >= lowest).to(tl.int32)
            place = count + tl.cumsum(chosen, 0) - 1
            tl.store(listed + place, x, mask=chosen > 0)
            tl.store(listed_ids + place, first + lane, mask=chosen > 0)
            count += tl.sum(chosen, 0)
    # Other threads read what these have written.
    tl.debug_barrier()


@triton.jit
def _find_tie(values, size, low, high, num_ties, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The position of the last one of the first `num_ties` logits from `low` on below `high`."""
    lane = tl.arange(0, BLOCK)
    last = size
    seen = 0
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        x = _load(values, first + lane, size)
        tied = ((x >= low) & (x < high)).to(tl.int32)
        found = (tied > 0) & (seen + tl.cumsum(tied, 0) == num_ties)
        last = tl.minimum(last, tl.min(tl.where(found, first + lane, size), 0))
        seen += tl.sum(tied, 0)
    return last


@triton.jit
def _weigh_kept(values, index, size, kept, scales):
    x = _load(values, index, size)
    keep = (x >= kept[0]) | ((x >= kept[1]) & (index <= kept[2]))
    return tl.where(keep, _weigh(x, scales), 0.0)


@triton.jit
def _draw(
    values,
    size,
    kept,
    uniform,
    scales,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The position at which the cumulative distribution passes the uniform number."""
    lane = tl.arange(0, BLOCK)
    block = tl.arange(0, NUM_BLOCKS)
    masses = tl.zeros([NUM_BLOCKS], tl.float32)
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        weights = _weigh_kept(values, first + lane, size, kept, scales)
        masses = tl.where(block == first // BLOCK, tl.sum(weights, 0), masses)
    cumulative = tl.cumsum(masses, 0)
    target = uniform * tl.max(cumulative, 0)
    chosen = _find_passing(cumulative, masses, target, block)
    before = tl.sum(tl.where(block < chosen, masses, 0.0), 0)
    weights = _weigh_kept(values, chosen * BLOCK + lane, size, kept, scales)
    cumulative = before + tl.cumsum(weights, 0)
    return chosen * BLOCK + _find_passing(cumulative, weights, target, lane)


@triton.jit
def _find_passing(cumulative, masses, target, index):
    """The first of those with any mass past the target; if rounding left none, the last of them."""
    last = tl.max(tl.where(masses > 0, index, 0), 0)
    return tl.min(tl.where((cumulative > target) & (masses > 0), index, last), 0)
