"""Norms and gates in Triton against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.activation import Activation
from nanovllm.kernels.kernels import WeightSpec
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton.elementwise import MAX_NORM_BLOCK
from nanovllm.kernels.triton.kernels import TritonKernels
from tests.triton_device import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the last place, or of sums in another order."""


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.is_contiguous()
    unit = UNIT[found.dtype]
    torch.testing.assert_close(found, expected, rtol=1.01 * unit, atol=unit / 100)


def check_norms(
    rows: int, width: int, dtype: torch.dtype, scale: float = 1.0, eps: float = 1e-6
) -> None:
    triton, torch_kernels = TritonKernels(DEVICE, dtype), TorchKernels(DEVICE, dtype)
    x = random(rows, width, seed=1, dtype=dtype) * scale
    residual = random(rows, width, seed=2, dtype=dtype) * scale
    weight = random(width, seed=3, dtype=torch.float32)
    assert_close(triton.rms_norm(x, weight, eps), torch_kernels.rms_norm(x, weight, eps))
    before = x.clone()
    normed, total = triton.add_rms_norm(x, residual.clone(), weight, eps)
    expected_normed, expected_total = torch_kernels.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected_normed)
    assert torch.equal(x, before)


def check_gate(rows: int, width: int, dtype: torch.dtype, activation: Activation = "silu") -> None:
    gate_up = random(rows, 2 * width, seed=rows + width, dtype=dtype) * 4.0
    found = TritonKernels(DEVICE, dtype).act_and_mul(gate_up, activation)
    # By tanh torch's GELU loses what a sigmoid keeps, so float32 is held to float64.
    exact = gate_up.double() if dtype == torch.float32 else gate_up
    expected = TorchKernels(DEVICE, dtype).act_and_mul(exact, activation)
    assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 80, 127, 1024, 2560])
def test_norms(width: int, dtype: torch.dtype) -> None:
    check_norms(3, width, dtype)


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
def test_rows(rows: int) -> None:
    check_norms(rows, 48, torch.float16)
    check_gate(rows, 48, torch.float16)


@pytest.mark.parametrize("width", [MAX_NORM_BLOCK, MAX_NORM_BLOCK + 1, 2 * MAX_NORM_BLOCK + 40])
def test_rows_that_no_program_holds(width: int) -> None:
    check_norms(2, width, torch.float32)
    check_norms(1, width, torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-4, 1e2, 0.0])
def test_magnitudes(scale: float) -> None:
    check_norms(2, 64, torch.float32, scale)
    check_norms(2, 64, torch.bfloat16, scale, eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 96, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates(width: int, dtype: torch.dtype, activation: Activation) -> None:
    check_gate(2, width, dtype, activation)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_at_their_ends(dtype: torch.dtype, activation: Activation) -> None:
    inf, nan = torch.inf, torch.nan
    gate = torch.tensor([0.0, -0.0, 88, -88, -104, 3e4, -3e4, inf, -inf, nan], device=DEVICE)
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None].to(dtype)
    found = TritonKernels(DEVICE, dtype).act_and_mul(gate_up, activation)
    expected = TorchKernels(DEVICE, dtype).act_and_mul(gate_up, activation)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("column", [0, 3, 63])
def test_what_is_not_finite_stays_in_its_row(column: int) -> None:
    x = random(3, 64, seed=1, dtype=torch.float32)
    x[1, column] = torch.nan
    kernels, weight = TritonKernels(DEVICE, torch.float32), torch.ones(64, device=DEVICE)
    normed, total = kernels.add_rms_norm(x, torch.ones_like(x), weight, 1e-6)
    assert normed.isfinite().all(1).tolist() == [True, False, True]
    assert total.isfinite().sum() == total.numel() - 1


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_any_shape(rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    check_norms(rows, width, dtype, scale)
    check_gate(rows, width, dtype)


def test_rows_with_gaps_between_them() -> None:
    kernels = TritonKernels(DEVICE, torch.float32)
    wide = random(4, 100, seed=1, dtype=torch.float32)
    x, weight = wide[:, 10:74], random(64, seed=2, dtype=torch.float32)
    whole = x.contiguous()
    transposed = x.T.contiguous().T
    expected = kernels.rms_norm(whole, weight, 1e-6)
    for view in (x, transposed):
        assert torch.equal(kernels.rms_norm(view, weight, 1e-6), expected)
        gated = kernels.act_and_mul(whole, "silu")
        assert torch.equal(kernels.act_and_mul(view, "silu"), gated)
        normed, total = kernels.add_rms_norm(whole, view, weight, 1e-6)
        assert torch.equal(total, whole + whole)
        assert torch.equal(normed, kernels.rms_norm(whole + whole, weight, 1e-6))


def test_norms_of_more_dimensions() -> None:
    x, weight = (random(*shape, seed=1, dtype=torch.float32) for shape in ((2, 3, 8), (8,)))
    kernels, torch_kernels = (kind(DEVICE, torch.float32) for kind in (TritonKernels, TorchKernels))
    assert_close(kernels.rms_norm(x, weight, 1e-6), torch_kernels.rms_norm(x, weight, 1e-6))


def test_the_same_in_another_dtype() -> None:
    kernels = TritonKernels(DEVICE, torch.float16, deterministic=True).with_dtype(torch.float32)
    assert kernels.name == "triton"
    weight = kernels.pack(WeightSpec(2, 3), [torch.ones(2, 3)], None)
    assert weight.weight.dtype == torch.float32
