"""Weights of bf16 in 12 bits each: what comes of them is to the bit what comes of dense ones."""

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.cpu import packing
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.packing import BFLOAT16, COMPACT, FLOAT32, INT8, PackedWeight
from nanovllm.kernels.kernels import WeightSpec
from nanovllm.models.quantization import SCHEMES, quantize
from tests.cpu_kernels import each_isa, is_fast, kernels_for, random, threads

ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 13, 17, 64, 65, 192, 200, 255)

# Odd ones, where a panel or its last block ends in padding, and whole ones, up to deeper than a
# slice; of 5, 6 and 7 tiles a panel is left that is not full.
SHAPES = (
    *((1, 1), (1, 64), (33, 16), (33, 37), (70, 65), (130, 321), (70, 80), (130, 96), (96, 112)),
    *((1000, 64), (1000, 37), (1000, 321), (4500, 16), (4500, 65), (2048, 64)),
)
NEVER = 1 << 60
COMPACTING = "amx-emulated"  # every machine has it


def bits(tensor: Tensor) -> Tensor:
    """What tells -0.0 from 0.0, and one NaN from another."""
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def matrix(patterns: Tensor) -> Tensor:
    """Weights of the 16 bits that are given as integers."""
    return torch.where(patterns > 32767, patterns - 65536, patterns).short().view(torch.bfloat16)


def pack(
    kernels: CpuKernels,
    parts: Sequence[Tensor],
    compact: bool = True,
    bias: Tensor | None = None,
    gated: bool = False,
) -> PackedWeight:
    spec = WeightSpec(sum(map(len, parts)), parts[0].shape[1], "silu" if gated else None)
    with patch.object(packing, "compact_bytes", lambda _: 1 if compact else NEVER):
        packed = kernels.pack(spec, parts, bias)
    assert packed.struct.format == (COMPACT if compact else BFLOAT16)
    return packed


def trained(rows: int, depth: int, scale: float = 0.02) -> Tensor:
    """Weights like those of a network, with some that spoil a block here and there."""
    weights = random(rows, depth, seed=rows) * scale
    generator = torch.Generator().manual_seed(depth)
    spoilt = torch.randint(rows * depth, (rows * depth // 5000,), generator=generator)
    weights.view(-1)[spoilt] = torch.tensor([0.0, 3e4, 1e-30]).repeat(len(spoilt))[: len(spoilt)]
    return weights.bfloat16()


def spread(rows: int, depth: int) -> Tensor:
    """Numbers so far apart that no block has few exponents."""
    generator = torch.Generator().manual_seed(rows)
    powers = torch.randint(-50, 50, (rows, depth), generator=generator)
    return random(rows, depth, seed=depth) * torch.exp2(powers.float())


def read(kernels: CpuKernels, packed: PackedWeight) -> Tensor:
    """The weights by `embed`."""
    return kernels.embed(torch.arange(packed.spec.rows), packed)


def check_read(kernels: CpuKernels, weights: Tensor) -> PackedWeight:
    """Read all weights back, which is what dense ones yield; returns what they were packed to."""
    packed, dense = (pack(kernels, [weights], compact=form) for form in (True, False))
    found = bits(read(kernels, packed))
    assert torch.equal(found, bits(read(kernels, dense)))
    # In passing through a float, subnormals may become zeros, and NaNs other NaNs.
    kept = (weights == 0) | (weights.abs() >= torch.finfo(torch.bfloat16).tiny)
    assert torch.equal(found[kept], bits(weights)[kept])
    assert torch.equal(found.view(torch.bfloat16).isnan(), weights.isnan())
    return packed


def outputs(kernels: CpuKernels, x: Tensor, packed: PackedWeight) -> list[Tensor]:
    """All that is made of a product."""
    found = [kernels.linear(x, packed)]
    if not packed.spec.gated:
        total = random(len(x), packed.width, seed=5, dtype=torch.bfloat16)
        found += [kernels.logits(x, packed), kernels.linear_add(x, packed, total)]
    return found


def check_products(
    kernels: CpuKernels, parts: Sequence[Tensor], rows: Sequence[int], bias: bool, gated: bool
) -> None:
    given = random(sum(map(len, parts)), seed=1) if bias else None
    dense, compact = (pack(kernels, parts, form, given, gated) for form in (False, True))
    for count in rows:
        x = random(count, dense.spec.depth, seed=count, dtype=torch.bfloat16)
        pairs = zip(outputs(kernels, x, dense), outputs(kernels, x, compact), strict=True)
        for which, (expected, found) in enumerate(pairs):
            assert torch.equal(bits(found), bits(expected)), (dense.spec, count, which)


@each_isa
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_products_are_those_of_the_dense_form(isa: str, gated: bool, deterministic: bool) -> None:
    kernels = kernels_for(isa, torch.bfloat16, deterministic)
    for index, (depth, columns) in enumerate(SHAPES):
        if depth * columns > 20_000 and not is_fast(isa) and (depth, columns) != (4500, 16):
            continue
        weights = trained(columns * (1 + gated), depth)
        rows = ROWS if is_fast(isa) or depth * columns < 10_000 else (1, 3, 6, 65)
        check_products(kernels, weights.chunk(1 + gated), rows, index % 2 == 0, gated)


@each_isa
def test_products_of_weights_that_padding_fits_in_with(isa: str) -> None:
    """Where exponents begin at zero, no block is spoilt by zeros."""
    kernels = kernels_for(isa, torch.bfloat16)
    for depth, columns in ((33, 37), (70, 65), (1, 1)):
        check_products(kernels, [trained(columns, depth, 2.0**-118)], ROWS, False, False)


@each_isa
def test_products_of_parts_of_odd_widths(isa: str) -> None:
    kernels = kernels_for(isa, torch.bfloat16)
    parts = [trained(width, 96) for width in (33, 7, 1, 16, 87)]
    check_products(kernels, parts, (1, 6, 20), bias=True, gated=False)


@each_isa
@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_no_bit(isa: str, num_threads: int) -> None:
    kernels = kernels_for(isa, torch.bfloat16)
    weights = trained(640, 96)
    x = random(200, 96, dtype=torch.bfloat16)
    expected = kernels.linear(x, pack(kernels, [weights], compact=False))
    with threads(kernels._library, num_threads):
        packed = pack(kernels, [weights])
        assert torch.equal(read(kernels, packed), weights)
        for rows in (1, 5, 200):
            alone = kernels.linear(x[:rows], packed)
            again = kernels.linear(x[:rows], pack(kernels, [weights], compact=False))
            assert torch.equal(alone, again), rows
        assert torch.equal(kernels.linear(x, packed), expected)


def every_weight() -> Tensor:
    """All 65,536 of them, `[256, 256]`, such that each block has a code for its own."""
    exponent, low = torch.arange(128), torch.arange(256)
    sign = torch.tensor([0, 1])
    patterns = (sign[:, None, None] << 15) | (exponent[:, None] << 8) | low  # [2, 128, 256]
    # A block is 16 inputs, of eight exponents with both signs.
    by_input = patterns.view(2, 16, 8, 256).permute(1, 0, 2, 3).reshape(256, 256)
    return matrix(by_input.T.contiguous())


@each_isa
def test_every_weight_can_be_read_back(isa: str) -> None:
    kernels = kernels_for(isa, torch.bfloat16)
    weights = every_weight()
    assert len(set(bits(weights).flatten().tolist())) == 65536
    assert check_read(kernels, weights).data.nbytes == 65536 * 12 // 8
    # The other way round no block spans fewer than 16 exponents, and all stay dense.
    assert check_read(kernels, weights.T.contiguous()).data.nbytes == 65536 * 2


@each_isa
def test_every_finite_weight_is_itself_in_a_product(isa: str) -> None:
    kernels = kernels_for(isa, torch.bfloat16)
    weights = every_weight()
    finite = torch.where(weights.isfinite(), bits(weights), bits(weights) & ~0x80)
    dense, compact = (
        pack(kernels, [finite.view(torch.bfloat16)], compact=form) for form in (False, True)
    )
    assert compact.data.nbytes == 65536 * 12 // 8
    for rows in (1, 3, 4, 5, 256) if is_fast(isa) else (3, 256):
        for first in range(0, 256, rows):
            x = torch.eye(256, dtype=torch.bfloat16)[first : first + rows]
            expected, found = (kernels.linear(x, packed) for packed in (dense, compact))
            assert torch.equal(bits(found), bits(expected)), rows
    # Zeros, and what the instructions may flush, aside: a one picks a weight.
    normal = weights.isfinite() & (weights.abs() >= torch.finfo(torch.bfloat16).tiny)
    picked = kernels.linear(torch.eye(256, dtype=torch.bfloat16), compact).T
    assert torch.equal(bits(picked)[normal], bits(weights)[normal])


@each_isa
def test_special_weights_can_be_read_back(isa: str) -> None:
    kernels = kernels_for(isa, torch.bfloat16)
    special = torch.tensor(
        # +-0, +-the least and greatest subnormal, +-infinity, NaNs of several payloads.
        [0, 0x8000, 1, 0x8001, 0x7F, 0x807F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF, 0xFF91]
    )
    generator = torch.Generator().manual_seed(0)
    for shape in ((80, 70), (64, 64), (5, 3), (100, 33)):
        for weights in (
            torch.zeros(shape),
            -torch.zeros(shape),
            random(*shape, seed=2),
            random(*shape, seed=3) * 1e-39,
            spread(*shape),
        ):
            plain = weights.bfloat16()
            check_read(kernels, plain)
            some = torch.rand(shape, generator=generator) < 0.01
            drawn = special[torch.randint(len(special), shape, generator=generator)]
            mixed = torch.where(some, bits(matrix(drawn)), bits(plain)).view(torch.bfloat16)
            check_read(kernels, mixed)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 140),
    depth=st.integers(1, 70),
    first=st.integers(0, 127),
    reach=st.integers(0, 9),
)
def test_random_bits_can_be_read_back(
    seed: int, rows: int, depth: int, first: int, reach: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    high, low, sign = (
        torch.randint(least, most, (rows, depth), generator=generator)
        for least, most in ((first, min(first + reach, 127) + 1), (0, 256), (0, 2))
    )
    weights = matrix(sign << 15 | high << 8 | low)
    kernels = kernels_for("portable", torch.bfloat16)
    packed = check_read(kernels, weights)
    if rows % 64 == depth % 16 == 0 and reach <= 7:
        assert packed.data.nbytes <= rows * -(-depth // 32) * 32 * 12 // 8


def test_trained_weights_take_three_quarters() -> None:
    kernels = kernels_for(COMPACTING, torch.bfloat16)
    weights = (random(1024, 1024) * 0.02).bfloat16()
    packed = kernels.pack(WeightSpec(1024, 1024), [weights], None)
    assert packed.num_bytes * 8 < 12.8 * weights.numel()
    assert torch.equal(read(kernels, packed), weights)


def test_weights_that_fit_in_no_block_take_hardly_more_than_dense_ones() -> None:
    kernels = kernels_for(COMPACTING, torch.bfloat16)
    weights = spread(1024, 1024).bfloat16()
    packed = kernels.pack(WeightSpec(1024, 1024), [weights], None)
    assert packed.struct.format == COMPACT
    assert weights.numel() * 2 < packed.num_bytes <= weights.numel() * 2 * 1.02
    assert torch.equal(read(kernels, packed), weights)


def test_only_large_matrices_of_bf16_are_compact() -> None:
    def form(rows: int, dtype: torch.dtype = torch.bfloat16, replaceable: bool = False) -> int:
        spec = WeightSpec(rows, 1024, replaceable=replaceable)
        packed = kernels_for(COMPACTING, dtype).pack(spec, [random(rows, 1024)], None)
        return int(packed.struct.format)

    assert (form(512), form(496)) == (COMPACT, BFLOAT16)
    assert form(512, torch.float32) == FLOAT32
    assert form(512, replaceable=True) == BFLOAT16
    slower = kernels_for("portable", torch.bfloat16).pack(
        WeightSpec(512, 1024), [random(512, 1024)], None
    )
    assert slower.struct.format == BFLOAT16
    packed = kernels_for(COMPACTING, torch.bfloat16).pack(
        WeightSpec(2048, 1024), [quantize(random(2048, 1024), SCHEMES["int8"])], None
    )
    assert packed.struct.format == INT8


def test_what_may_be_replaced_can_be() -> None:
    kernels = kernels_for(COMPACTING, torch.bfloat16)
    first, second = trained(512, 1024), trained(512, 1024, scale=3.0)
    packed = kernels.pack(WeightSpec(512, 1024, replaceable=True), [first], None)
    assert torch.equal(read(kernels, packed), first)
    kernels.repack(packed, second)
    assert torch.equal(read(kernels, packed), second)
