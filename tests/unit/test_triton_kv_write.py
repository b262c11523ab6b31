"""Head norms, rotation and the write to the cache in one launch, against `SdpaBackend.write`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.attention_backend import AttentionConfig, HeadNorms
from nanovllm.kernels.sdpa import SdpaBackend
from nanovllm.kernels.triton.kv_write import write_kv
from tests.triton_device import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ATOL = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BLOCK_SIZE, NUM_BLOCKS = 4, 3


def check(
    heads: tuple[int, int],
    head_dim: int,
    slots: list[int],
    dtype: torch.dtype = torch.float32,
    norm: bool = True,
    rotate: bool = True,
    seed: int = 0,
) -> None:
    """Hold a write to that of the twin, which knows no slots of -1 here."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    num_heads, num_kv_heads = heads
    num_tokens = len(slots)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = (2 * random(num_tokens, width)).to(dtype)
    weights = [1 + random(head_dim).float() / 4 for _ in range(2)]
    norms = HeadNorms(weights[0], weights[1], 1e-5) if norm else None
    angles = random(num_tokens, 1, head_dim // 2) * 3
    rotary = (angles.cos(), angles.sin()) if rotate else None
    backend = SdpaBackend(AttentionConfig(BLOCK_SIZE, *heads, head_dim, dtype))
    before = random(*backend.cache_spec(NUM_BLOCKS).shape).to(dtype)
    found, expected = before.clone(), before.clone()
    where = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    queries = write_kv(qkv, norms, rotary, found, where, *heads)
    kept = where >= 0
    some = None if rotary is None else (rotary[0][kept], rotary[1][kept])
    kept_queries = queries[:0]
    if kept.any():
        kept_queries = backend.write(qkv[kept], norms, some, expected, where[kept])
    assert queries.shape == (num_tokens, num_heads, head_dim)
    assert queries.dtype == dtype
    assert queries.isfinite().all()  # those of padding are used as well, for nothing
    torch.testing.assert_close(queries[kept], kept_queries, rtol=0.01, atol=ATOL[dtype])
    torch.testing.assert_close(found, expected, rtol=0.01, atol=ATOL[dtype])
    is_free = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    is_free[where[kept].cpu()] = False
    untouched = [cache.flatten(1, 2)[:, is_free.to(DEVICE)] for cache in (found, before)]
    assert torch.equal(*untouched)
    heads_of = qkv.view(num_tokens, width // head_dim, head_dim)
    values = heads_of[kept, -num_kv_heads:]
    assert torch.equal(found[1].flatten(0, 1)[where[kept]], values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_with_and_without_each_part(norm: bool, rotate: bool, dtype: torch.dtype) -> None:
    check((4, 2), 32, [5, 0, 11], dtype, norm, rotate)


@pytest.mark.parametrize("head_dim", [16, 18, 24, 32, 64, 80, 96, 128, 192, 256])
def test_head_dims(head_dim: int) -> None:
    check((3, 1), head_dim, [7, 2])


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (6, 2), (7, 1), (8, 8), (20, 5), (64, 8)])
def test_head_counts(heads: tuple[int, int]) -> None:
    """More of them than a program treats among them."""
    check(heads, 64, [1, 10], torch.float16)


@pytest.mark.parametrize(
    "slots",
    [[], [0], [11], [3, 4], [7, 8], [-1], [-1, -1], [2, -1, 3], [11, 10, 9, 0], [*range(12)]],
    ids=str,
)
def test_slots(slots: list[int]) -> None:
    check((2, 1), 24, slots)


@settings(max_examples=40, deadline=None)
@given(
    num_kv_heads=st.integers(1, 3),
    ratio=st.integers(1, 5),
    half=st.integers(8, 40),
    slots=st.lists(st.integers(0, BLOCK_SIZE * NUM_BLOCKS - 1), max_size=5, unique=True),
    num_padding=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    norm=st.booleans(),
    rotate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    num_kv_heads: int,
    ratio: int,
    half: int,
    slots: list[int],
    num_padding: int,
    dtype: torch.dtype,
    norm: bool,
    rotate: bool,
    seed: int,
) -> None:
    heads = num_kv_heads * ratio, num_kv_heads
    check(heads, 2 * half, slots + [-1] * num_padding, dtype, norm, rotate, seed)


def test_projections_with_gaps_between_rows() -> None:
    """And tables that are views of longer ones."""
    wide = torch.randn(5, 100, device=DEVICE)
    angles = torch.randn(5, 1, 32, device=DEVICE)
    cache = torch.zeros(2, 3, 4, 1, 32, device=DEVICE)
    slots = torch.tensor([4, 1, 2, 0, 9], device=DEVICE)

    def write(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        written = cache.clone()
        return write_kv(qkv, None, (table, table), written, slots, 1, 1), written

    found = write(wide[:, :96], angles[..., :16])
    expected = write(wide[:, :96].contiguous(), angles[..., :16].contiguous())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    transposed = write(wide[:, :96].T.contiguous().T, angles[..., :16])
    assert torch.equal(transposed[1], expected[1])
