"""A linear layer whose rows do not depend on each other, to the last bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N = 64, 64
"""Outputs of a program, whatever the number of rows: another tile might sum in another order.

Few enough columns that a lone row's weights are read by most of the chip.
"""
GROUP_M = 8
"""Tiles of rows that take turns with a weight while it is in the cache."""


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, each row the same to the last bit whatever the other rows.

    Sums are float32 and run over the depth in one order, as in "Defeating Nondeterminism in LLM
    Inference" (He et al. 2025).

    Args:
        x: `[num_rows, depth]`.
        weight: `[width, depth]`, contiguous, of the dtype of `x`.
        bias: `[width]`.

    Returns:
        `[num_rows, width]`.
    """
    x = x.contiguous()
    (num_rows, depth), width = x.shape, len(weight)
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if out.numel():
        is_float32 = x.dtype == torch.float32
        grid = (triton.cdiv(num_rows, BLOCK_M) * triton.cdiv(width, BLOCK_N),)
        _matmul_kernel[grid](
            x,
            weight,
            bias,
            out,
            num_rows,
            width,
            depth,
            HAS_BIAS=bias is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=32 if is_float32 else 64,
            GROUP_M=GROUP_M,
            num_warps=4,
            num_stages=3 if is_float32 else 4,
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    width,
    depth,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute a tile of the outputs; neighbours in the grid share a tile of the weight."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(width, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    rows = (first_m + within % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows[:, None] < num_rows, columns[None, :] < width
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * depth + ks[None, :]
    weight_ptrs = weight_ptr + columns[None, :].to(tl.int64) * depth + ks[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        left = depth - first
        x = tl.load(x_ptrs, row_mask & (ks[None, :] < left), other=0.0)
        weight = tl.load(weight_ptrs, column_mask & (ks[:, None] < left), other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if HAS_BIAS:
        sums += tl.load(bias_ptr + columns, columns < width, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), row_mask & column_mask)
