"""Attention within short sequences in Triton against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.kernels.sdpa import attend_locally
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton.kernels import TritonKernels
from nanovllm.kernels.triton.local_attention import local_attention
from tests.triton_device import DEVICE, DOT_DTYPES

UNIT = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
LENGTHS = st.one_of(st.integers(1, 12), st.sampled_from([16, 17, 33, 64]))
HEAD_DIMS = st.one_of(st.integers(8, 40).map(lambda half: 2 * half), st.sampled_from([128, 256]))


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    angles = torch.arange(length, device=DEVICE)[:, None, None] * frequencies
    return 1.3 * angles.cos(), 1.3 * angles.sin()  # some models have an amplitude


@settings(max_examples=50, deadline=None)
@given(
    num_seqs=st.integers(0, 5),
    length=LENGTHS,
    group=st.sampled_from([1, 2, 3, 7, 8]),
    num_kv_heads=st.integers(1, 3),
    head_dim=HEAD_DIMS,
    rotated=st.booleans(),
    dtype=st.sampled_from(DOT_DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 2.0]),
)
def test_local_attention(
    num_seqs: int,
    length: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    rotated: bool,
    dtype: torch.dtype,
    scale: float,
) -> None:
    num_heads = group * num_kv_heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = random(num_seqs * length, width, seed=length, dtype=dtype) * scale
    rotary = rotary_table(length, head_dim) if rotated else None
    before = qkv.clone()
    found = local_attention(qkv, rotary, length, num_heads, num_kv_heads)
    expected = attend_locally(qkv, rotary, length, num_heads, num_kv_heads)
    assert torch.equal(qkv, before)
    assert found.dtype == dtype
    unit = UNIT[dtype]
    torch.testing.assert_close(found, expected, rtol=unit, atol=unit * scale)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_sequences_depend_on_nothing_else() -> None:
    qkv, rotary = random(20, 8 * 16, seed=1, dtype=torch.float32), rotary_table(5, 16)
    together = local_attention(qkv, rotary, 5, 4, 2)
    for first in range(0, 20, 5):
        alone = local_attention(qkv[first : first + 5].clone(), rotary, 5, 4, 2)
        assert torch.equal(alone, together[first : first + 5])
    for bad in (torch.nan, torch.inf):
        spoilt = qkv.clone()
        spoilt[7] = bad
        out = local_attention(spoilt, rotary, 5, 4, 2)
        assert out[5:10].isnan().all()
        assert torch.equal(out[:5], together[:5])
        assert torch.equal(out[10:], together[10:])


def test_rows_apart() -> None:
    rotary = rotary_table(5, 24)
    wide = random(10, 200, seed=1, dtype=torch.float32)
    narrow = wide[:, 4 : 4 + 8 * 24]
    expected = local_attention(narrow.contiguous(), rotary, 5, 4, 2)
    assert torch.equal(local_attention(narrow, rotary, 5, 4, 2), expected)
    columns = narrow.T.contiguous().T
    assert torch.equal(local_attention(columns, rotary, 5, 4, 2), expected)


@pytest.mark.parametrize(("length", "head_dim"), [(65, 16), (3, 258), (3, 17), (5, 16)], ids=str)
def test_shapes_without_a_kernel_are_the_twins(length: int, head_dim: int) -> None:
    kernels = [kind(DEVICE, torch.float32) for kind in (TritonKernels, TorchKernels)]
    qkv = random(2 * length, 8 * head_dim, seed=2, dtype=torch.float32)
    rotary = None if head_dim % 2 else rotary_table(length, head_dim)
    found, expected = (one.local_attention(qkv, rotary, length, 4, 2) for one in kernels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
