"""Norms, and the gate of an MLP: each reads its inputs once and writes its outputs once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.activation import Activation

MAX_NORM_BLOCK = 16384
"""Columns that a program of a norm holds; a wider row is read twice."""
GATE_BLOCK = 1024
"""Columns of a program of `act_and_mul`: 16 bytes a thread."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows `[.., width]` by a float32 weight, rounded once."""
    return _norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, rounded before it is normed, and that sum.

    The sum takes the place of `residual` where that is contiguous.
    """
    residual = residual.contiguous()
    return _norm(x, residual, weight, eps), residual


def act_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` of `[num_tokens, 2 * width]`; the former is rounded first."""
    gate_up = _with_rows(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    if out.numel():
        grid = (num_rows, triton.cdiv(width, GATE_BLOCK))
        _act_and_mul_kernel[grid](
            gate_up,
            out,
            gate_up.stride(0),
            width,
            GELU=activation == "gelu_tanh",
            BLOCK=GATE_BLOCK,
            num_warps=4,
        )
    return out


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    rows = _with_rows(x.reshape(-1, width))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(triton.next_power_of_2(width), MAX_NORM_BLOCK)
        _norm_kernel[(len(rows),)](
            rows,
            residual,
            weight,
            out,
            rows.stride(0),
            width,
            eps,
            ADD=residual is not None,
            WIDE=width > block,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
        )
    return out


def _with_rows(x: Tensor) -> Tensor:
    """The matrix, each row of which lies in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    width,
    eps,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm a row, which is added to its residual first if `ADD`."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * width
    if ADD:
        residual_ptr += row * width
    columns = tl.arange(0, BLOCK)
    x = _load(x_ptr, residual_ptr, columns, width, ADD)
    squares = x * x
    if WIDE:
        for first in range(BLOCK, width, BLOCK):
            more = _load(x_ptr, residual_ptr, first + columns, width, ADD)
            squares += more * more
    scale = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    _store_scaled(out_ptr, weight_ptr, columns, width, x * scale)
    if WIDE:
        for first in range(BLOCK, width, BLOCK):
            if ADD:
                more = _load(residual_ptr, None, first + columns, width, False)
            else:
                more = _load(x_ptr, None, first + columns, width, False)
            _store_scaled(out_ptr, weight_ptr, first + columns, width, more * scale)


@triton.jit
def _load(x_ptr, residual_ptr, columns, width, ADD: tl.constexpr):
    """Columns of a row in float32, after adding them to the residual stream if `ADD`."""
    mask = columns < width
    x = tl.load(x_ptr + columns, mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + columns, mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + columns, x, mask)
    return x.to(tl.float32)


@triton.jit
def _store_scaled(out_ptr, weight_ptr, columns, width, x):
    mask = columns < width
    weight = tl.load(weight_ptr + columns, mask, other=0.0)
    tl.store(out_ptr + columns, (x * weight).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _act_and_mul_kernel(
    gate_up_ptr, out_ptr, stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    """Gate a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up_ptr + row * stride + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + width + columns, mask, other=0.0)
    steep = gate
    if GELU:  # gate / 2 * (1 + tanh(steep / 2)), which is gate * sigmoid(steep)
        steep = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    gate = (gate / (1.0 + tl.exp(-steep))).to(up.dtype)
    product = gate.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + columns, product.to(up.dtype), mask)
