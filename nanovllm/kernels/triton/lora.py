"""Adapters of rows that only the device needs to know, so that they can be captured in a graph.

As in Punica (Chen et al. 2023): one launch shrinks the rows to the adapters' rank, another expands
them. A program takes the rows of one adapter in a tile of rows, and reads the adapter once for all
of them; most programs find none and end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.kernels import WeightSpec
from nanovllm.kernels.lora import IndexedBatch

BLOCK_M = 32
"""Rows of a tile, whatever their number: another tile might sum in another order."""
SPLIT_DEPTH, MAX_SPLITS = 1024, 8
"""A lone row would leave most of the chip idle: so the depth is split."""


class StackedWeights:
    """See `LoRAWeights`: the matrices of all slots in one tensor, zero where there is none.

    Args:
        spec: Shape of the layer's own weight.
        rank: Of the adapters.
        num_slots: Adapters that there is room for.
        dtype: Of the matrices, and of what goes through them.
        device: Where they are.
    """

    def __init__(
        self,
        spec: WeightSpec,
        rank: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._down = torch.zeros(num_slots, rank, spec.depth, dtype=dtype, device=device)
        self._up = torch.zeros(num_slots, spec.rows, rank, dtype=dtype, device=device)

    def put(self, slot: int, down: Tensor, up: Tensor) -> None:
        self._down[slot].copy_(down)
        self._up[slot].copy_(up)

    def clear(self, slot: int) -> None:
        self._down[slot].zero_()  # not B: what A makes may be more than float16 holds

    def add(self, y: Tensor, x: Tensor, batch: IndexedBatch) -> Tensor:
        """See `LoRAWeights.add`."""
        return add_lora(y, x, self._down, self._up, batch.slots)


def add_lora(y: Tensor, x: Tensor, down: Tensor, up: Tensor, indices: Tensor) -> Tensor:
    """Add `up down x` to each row, of the adapter that the row goes through.

    Args:
        y: `[num_rows, rows]`, its rows in one piece; overwritten.
        x: `[num_rows, depth]`.
        down: `[num_slots, rank, depth]`.
        up: `[num_slots, rows, rank]`.
        indices: Adapter slot of each row, -1 for none, int64 `[num_rows]`.

    Returns:
        `y`.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    (num_rows, depth), (num_slots, width, rank) = x.shape, up.shape
    if not num_rows:
        return y
    tiles = triton.cdiv(num_rows, BLOCK_M)
    num_splits = min(triton.cdiv(depth, SPLIT_DEPTH), MAX_SPLITS)
    block_k = 64 if x.dtype == torch.float32 else 128
    split_depth = triton.cdiv(triton.cdiv(depth, num_splits), block_k) * block_k
    block_rank = min(max(triton.next_power_of_2(rank), 16), 32)
    hidden = torch.empty(num_splits, num_rows, rank, dtype=torch.float32, device=x.device)
    _shrink_kernel[(tiles, triton.cdiv(rank, block_rank) * num_splits, num_slots)](
        x,
        down,
        indices,
        hidden,
        num_rows,
        x.stride(0),
        depth,
        rank,
        split_depth,
        NUM_SPLITS=num_splits,
        BLOCK_M=BLOCK_M,
        BLOCK_RANK=block_rank,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    block_n = 64
    _expand_kernel[(tiles, triton.cdiv(width, block_n), num_slots)](
        hidden,
        up,
        indices,
        y,
        num_rows,
        y.stride(0),
        width,
        rank,
        NUM_SPLITS=num_splits,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_RANK=block_rank,
        num_warps=4,
        num_stages=2,
    )
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _shrink_kernel(
    x_ptr,
    down_ptr,
    indices_ptr,
    hidden_ptr,
    num_rows,
    x_stride,
    depth,
    rank,
    split_depth,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Take the rows of one adapter to a part of its rank, by a part of the depth."""
    slot = tl.program_id(2)
    split = tl.program_id(1) % NUM_SPLITS
    ranks = tl.program_id(1) // NUM_SPLITS * BLOCK_RANK + tl.arange(0, BLOCK_RANK)[None, :]
    rows, mine = _rows_of(indices_ptr, slot, num_rows, BLOCK_M)
    if tl.max(mine.to(tl.int32)) > 0:
        ks = split * split_depth + tl.arange(0, BLOCK_K)
        end = tl.minimum((split + 1) * split_depth, depth)
        x_rows = x_ptr + rows[:, None].to(tl.int64) * x_stride
        down_rows = down_ptr + slot.to(tl.int64) * rank * depth + ranks * depth
        sums = tl.zeros([BLOCK_M, BLOCK_RANK], tl.float32)
        for first in range(0, split_depth, BLOCK_K):
            columns = first + ks
            is_in = columns < end
            x = tl.load(x_rows + columns[None, :], mine[:, None] & is_in[None, :], other=0.0)
            down = tl.load(down_rows + columns[:, None], (ranks < rank) & is_in[:, None], other=0.0)
            sums = tl.dot(x, down, sums, input_precision="ieee")
        hidden_rows = split.to(tl.int64) * num_rows + rows[:, None]
        tl.store(hidden_ptr + hidden_rows * rank + ranks, sums, mine[:, None] & (ranks < rank))


@triton.jit(do_not_specialize=["num_rows"])
def _expand_kernel(
    hidden_ptr,
    up_ptr,
    indices_ptr,
    y_ptr,
    num_rows,
    y_stride,
    width,
    rank,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Add what becomes of the rows of one adapter to a part of their outputs."""
    slot = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rows, mine = _rows_of(indices_ptr, slot, num_rows, BLOCK_M)
    if tl.max(mine.to(tl.int32)) > 0:
        up_rows = up_ptr + slot.to(tl.int64) * width * rank + columns * rank
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, rank, BLOCK_RANK):
            ranks = first + tl.arange(0, BLOCK_RANK)
            hidden = tl.zeros([BLOCK_M, BLOCK_RANK], tl.float32)
            for split in tl.static_range(NUM_SPLITS):
                hidden_rows = split * num_rows.to(tl.int64) + rows[:, None]
                part = hidden_ptr + hidden_rows * rank + ranks[None, :]
                hidden += tl.load(part, mine[:, None] & (ranks < rank)[None, :], other=0.0)
            up_mask = (ranks < rank)[:, None] & (columns < width)
            up = tl.load(up_rows + ranks[:, None], up_mask, other=0.0)
            sums = tl.dot(hidden.to(up.dtype), up, sums, input_precision="ieee")
        y_ptrs = y_ptr + rows[:, None].to(tl.int64) * y_stride + columns
        mask = mine[:, None] & (columns < width)
        y = tl.load(y_ptrs, mask, other=0.0)
        tl.store(y_ptrs, (y.to(tl.float32) + sums).to(y.dtype), mask)


@triton.jit
def _rows_of(indices_ptr, slot, num_rows, BLOCK_M: tl.constexpr):
    """The rows of the program's tile, and which of them go through an adapter."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, tl.load(indices_ptr + rows, rows < num_rows, other=-1) == slot
