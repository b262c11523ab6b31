"""Attention within short sequences against its definition in float64."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.torch_kernels import TorchKernels
from tests.cpu_kernels import (
    DTYPES,
    UNIT,
    UNITS,
    assert_within,
    each_isa,
    is_fast,
    kernels_for,
    random,
    threads,
)

Rotary = tuple[Tensor, Tensor]

HEADS = ((1, 1), (4, 2), (6, 3), (16, 2), (7, 1))
HEAD_DIMS = (16, 24, 64, 80, 128, 256)

each_implementation = pytest.mark.parametrize(
    "isa", ["torch", "amx", "avx512", "avx2", "portable", "amx-emulated"]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))


def kernels_of(isa: str, dtype: torch.dtype) -> Kernels:
    if isa == "torch":
        return TorchKernels(torch.device("cpu"), dtype)
    return kernels_for(isa, dtype)


def rotary_table(length: int, head_dim: int) -> Rotary:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None, None] * frequencies
    return 1.3 * angles.cos(), 1.3 * angles.sin()  # some models have an amplitude


def exact(
    qkv: Tensor, rotary: Rotary | None, length: int, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """The output, and what rounding may change of it, both `[num_tokens, num_heads * head_dim]`."""
    unit = UNITS[qkv.dtype]
    heads = qkv.double().view(
        -1, length, num_heads + 2 * num_kv_heads, qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    )
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=2)
    if rotary is not None:
        cos, sin = (table.double() for table in rotary)
        q, k = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
            for a, b in (x.chunk(2, dim=-1) for x in (q, k))
        )
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = scores.softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    # Errors of the scores are relative to the sums of magnitudes, and weigh the values anew.
    sizes = torch.einsum("bihd,bjhd->bhij", q.abs(), k.abs()) * scale
    error = (8 * unit if unit > UNIT else 0) + 40 * UNIT
    spread = torch.einsum("bhij,bjhd->bihd", weights * (1 + sizes), v.abs())
    spread = spread + (weights * sizes).sum(-1).transpose(1, 2)[..., None] * out.abs()
    return out.flatten(0, 1).flatten(1), (error * spread).flatten(0, 1).flatten(1) + 1e-30


@each_implementation
@each_dtype
@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 11, 15, 16, 17, 33, 70])
def test_local_attention(isa: str, dtype: torch.dtype, length: int) -> None:
    kernels = kernels_of(isa, dtype)
    for index, (num_heads, num_kv_heads) in enumerate(HEADS):
        for head_dim in HEAD_DIMS if is_fast(isa) and length < 33 else (16, 24, 64):
            num_seqs = 1 + (index + length) % 4
            width = (num_heads + 2 * num_kv_heads) * head_dim
            qkv = random(num_seqs * length, width, seed=length, dtype=dtype)
            for rotary in (None, rotary_table(length, head_dim)):
                shape = length, num_heads, num_kv_heads
                out = kernels.local_attention(qkv, rotary, *shape)
                assert out.dtype == dtype
                assert_within(out, *exact(qkv, rotary, *shape), (shape, head_dim, num_seqs))


@each_implementation
@each_dtype
def test_sharp_and_even_softmax(isa: str, dtype: torch.dtype) -> None:
    kernels, rotary = kernels_of(isa, dtype), rotary_table(11, 64)
    for scale in (0.0, 1e-3, 8.0):
        qkv = (random(22, 8 * 64, seed=3) * scale).to(dtype)
        out = kernels.local_attention(qkv, rotary, 11, 4, 2)
        expected, bound = exact(qkv, rotary, 11, 4, 2)
        assert_within(out, expected, bound, scale)


@each_implementation
@each_dtype
def test_sequences_do_not_see_each_other(isa: str, dtype: torch.dtype) -> None:
    kernels, rotary = kernels_of(isa, dtype), rotary_table(5, 16)
    qkv = random(20, 8 * 16, dtype=dtype)
    healthy = kernels.local_attention(qkv, rotary, 5, 4, 2)
    for bad in (torch.nan, torch.inf):
        spoilt = qkv.clone()
        spoilt[7] = bad
        out = kernels.local_attention(spoilt, rotary, 5, 4, 2)
        assert out[5:10].isnan().all()
        assert torch.equal(out[:5], healthy[:5])
        assert torch.equal(out[10:], healthy[10:])


@each_isa
@each_dtype
def test_a_sequence_is_the_same_in_any_batch_and_on_any_threads(
    isa: str, dtype: torch.dtype
) -> None:
    kernels, rotary = kernels_for(isa, dtype), rotary_table(9, 24)
    qkv = random(63, 8 * 24, dtype=dtype)
    together = kernels.local_attention(qkv, rotary, 9, 4, 2)
    for first in range(0, 63, 9):
        alone = kernels.local_attention(qkv[first : first + 9].clone(), rotary, 9, 4, 2)
        assert torch.equal(alone, together[first : first + 9])
    with threads(kernels._library, 3):
        assert torch.equal(kernels.local_attention(qkv, rotary, 9, 4, 2), together)


@each_implementation
def test_no_sequences(isa: str) -> None:
    kernels = kernels_of(isa, torch.float32)
    out = kernels.local_attention(torch.empty(0, 8 * 16), rotary_table(5, 16), 5, 4, 2)
    assert out.shape == (0, 64)
