"""Mixtures of experts without a look at who goes where, so that they can be captured in a graph.

A *visit* is a row that goes through an expert. Visits are sorted by expert on the device, and a
program takes all those of one expert through some columns of its weight, which it reads once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.kernels import Routing
from nanovllm.kernels.torch_kernels import DenseWeight, route
from nanovllm.kernels.triton.elementwise import act_and_mul

FEW_VISITS = 16
"""Visits that an expert has on average up to which tiles are small."""
SMALL_M, LARGE_M = 16, 64
"""Visits of a tile."""
BLOCK_N = 64
"""Outputs of a program: with few visits most of the chip has to read weights."""


def mixture(
    x: Tensor,
    scores: Tensor,
    routing: Routing,
    gate_up: DenseWeight,
    down: DenseWeight,
    deterministic: bool,
) -> Tensor:
    """See `Kernels.mixture`.

    Args:
        x: `[num_rows, depth]`.
        scores: float32 `[num_rows, num_experts]`.
        routing: What becomes of them.
        gate_up: Weights `[num_experts, 2 * inner, depth]`, of the dtype of `x`.
        down: `[num_experts, width, inner]`.
        deterministic: Whether a row's result may not depend on the other rows.

    Returns:
        `[num_rows, width]`.
    """
    num_rows, num_experts = scores.shape
    shares, experts = route(scores, routing)
    of_visits, visits = experts.flatten().sort(stable=True)
    each = torch.arange(num_experts, device=x.device)
    ends = torch.searchsorted(of_visits, each, right=True)
    is_few = len(visits) <= FEW_VISITS * num_experts and not deterministic
    block_m = SMALL_M if is_few else LARGE_M
    hidden = _visit(x, gate_up.weight, visits, ends, None, routing.top_k, block_m)
    hidden = act_and_mul(hidden, gate_up.activation or "silu")
    made = _visit(hidden, down.weight, visits, ends, shares, 1, block_m)
    return (
        made.view(num_rows, routing.top_k, down.weight.shape[1])
        .sum(1, dtype=torch.float32)
        .to(x.dtype)
    )


def _visit(
    x: Tensor,
    weight: Tensor,
    visits: Tensor,
    ends: Tensor,
    shares: Tensor | None,
    visits_per_row: int,
    block_m: int,
) -> Tensor:
    """Multiply rows by the weights of the experts that they visit.

    Args:
        x: `[num_visits / visits_per_row, depth]`.
        weight: `[num_experts, width, depth]`.
        visits: Numbers of the visits, by expert.
        ends: How many there are up to and with each expert, `[num_experts]`.
        shares: Factors on what becomes of the visits, `[num_visits]`; None is none.
        visits_per_row: Of `x`.
        block_m: Visits of a tile.

    Returns:
        `[num_visits, width]`, in the order of their numbers.
    """
    x = x.contiguous()
    num_experts, width, depth = weight.shape
    out = torch.empty(len(visits), width, dtype=x.dtype, device=x.device)
    if out.numel():
        is_float32 = x.dtype == torch.float32
        _visit_kernel[(triton.cdiv(width, BLOCK_N), num_experts)](
            x,
            weight,
            visits,
            ends,
            shares,
            out,
            width,
            depth,
            VISITS_PER_ROW=visits_per_row,
            HAS_SHARES=shares is not None,
            BLOCK_M=block_m,
            BLOCK_N=BLOCK_N,
            BLOCK_K=32 if is_float32 else 64,
            num_warps=4,
            num_stages=3 if is_float32 else 4,
        )
    return out


@triton.jit
def _visit_kernel(
    x_ptr,
    weight_ptr,
    visits_ptr,
    ends_ptr,
    shares_ptr,
    out_ptr,
    width,
    depth,
    VISITS_PER_ROW: tl.constexpr,
    HAS_SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Take all visits of one expert through some columns of its weight."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(1).to(tl.int64)
    column_mask = columns[None, :] < width
    ks = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + (expert * width + columns[None, :]) * depth
    begin = tl.load(ends_ptr + expert - 1, expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    for first in range(begin, end, BLOCK_M):
        numbers = first + tl.arange(0, BLOCK_M)
        is_visit = numbers < end
        visits = tl.load(visits_ptr + numbers, is_visit, other=0)
        x_rows = x_ptr + (visits // VISITS_PER_ROW)[:, None] * depth
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, depth, BLOCK_K):
            is_in = k + ks < depth
            x = tl.load(x_rows + (k + ks)[None, :], is_visit[:, None] & is_in[None, :], other=0.0)
            weight_mask = column_mask & is_in[:, None]
            weight = tl.load(weight_rows + (k + ks)[:, None], weight_mask, other=0.0)
            sums = tl.dot(x, weight, sums, input_precision="ieee")
        if HAS_SHARES:
            sums *= tl.load(shares_ptr + visits, is_visit, other=0.0)[:, None]
        out_ptrs = out_ptr + visits[:, None] * width + columns[None, :]
        tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), is_visit[:, None] & column_mask)
