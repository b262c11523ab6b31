"""A product whose rows do not depend on each other, against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.kernels import WeightSpec
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton.kernels import TritonKernels
from nanovllm.kernels.triton.linear import BLOCK_M, BLOCK_N, GROUP_M, matmul
from tests.triton_device import DEVICE, DOT_DTYPES

UNIT = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

each_dtype = pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def check(rows: int, width: int, depth: int, dtype: torch.dtype, bias: bool) -> None:
    x = random(rows, depth, seed=1, dtype=dtype)
    weight = random(width, depth, seed=2, dtype=dtype)
    shift = random(width, seed=3, dtype=dtype) if bias else None
    found = matmul(x, weight, shift)
    assert found.dtype == dtype
    # [rows, width]; of what float32 sums are off by at most, the terms being of variance 1
    expected = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    bound = expected.abs() * UNIT[dtype] + 1e-5 * depth**0.5
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= bound).all()


@each_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 16, 63, 64, 65, 200])
def test_depths(depth: int, bias: bool, dtype: torch.dtype) -> None:
    check(3, 40, depth, dtype, bias)


@pytest.mark.parametrize("width", [1, BLOCK_N - 1, BLOCK_N, BLOCK_N + 1, 3 * BLOCK_N + 8])
@pytest.mark.parametrize("rows", [0, 1, 2, BLOCK_M, BLOCK_M + 1])
def test_tiles(rows: int, width: int) -> None:
    check(rows, width, 32, torch.float32, bias=True)


def test_more_tiles_of_rows_than_take_turns() -> None:
    check((GROUP_M + 1) * BLOCK_M + 5, 2 * BLOCK_N + 3, 16, torch.float16, bias=False)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 130),
    width=st.integers(1, 140),
    depth=st.integers(1, 140),
    dtype=st.sampled_from(DOT_DTYPES),
    bias=st.booleans(),
)
def test_any_shape(rows: int, width: int, depth: int, dtype: torch.dtype, bias: bool) -> None:
    check(rows, width, depth, dtype, bias)


@each_dtype
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x = random(130, 300, seed=1, dtype=dtype)
    weight, bias = random(70, 300, seed=2, dtype=dtype), random(70, seed=3, dtype=dtype)
    together = matmul(x, weight, bias)
    for count in (1, 2, 17, 64, 65):
        for first in (0, 5, 130 - count):
            rows = slice(first, first + count)
            assert torch.equal(matmul(x[rows], weight, bias), together[rows])


def test_rows_with_gaps_between_them() -> None:
    wide, weight = (random(*shape, seed=1, dtype=torch.float32) for shape in ((4, 50), (20, 32)))
    x = wide[:, 10:42]
    assert torch.equal(matmul(x, weight, None), matmul(x.contiguous(), weight, None))


@each_dtype
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_linear_layers(deterministic: bool, gated: bool, dtype: torch.dtype) -> None:
    """Kernels of both kinds do what torch's do, and deterministic ones row by row."""
    kernels, torch_kernels = (
        TritonKernels(DEVICE, dtype, deterministic),
        TorchKernels(DEVICE, dtype),
    )
    matrix, bias = random(24, 32, seed=1, dtype=dtype), random(24, seed=2, dtype=dtype)
    weight = kernels.pack(WeightSpec(24, 32, "silu" if gated else None), [matrix], bias)
    x, total = random(5, 32, seed=3, dtype=dtype), random(5, 24, seed=4, dtype=dtype)
    total = total[:, : 12 if gated else 24]
    for name, inputs in (("linear", (x,)), ("logits", (x,)), ("linear_add", (x, total))):
        arguments = (inputs[0], weight, *inputs[1:])
        found = getattr(kernels, name)(*arguments)
        expected = getattr(torch_kernels, name)(*arguments)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=4 * UNIT[dtype], atol=16 * UNIT[dtype])
        if deterministic:
            alone = [
                getattr(kernels, name)(
                    inputs[0][i : i + 1], weight, *(t[i : i + 1] for t in inputs[1:])
                )
                for i in range(5)
            ]
            assert torch.equal(torch.cat(alone), found)
