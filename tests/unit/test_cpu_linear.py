"""The linear kernels against products in float64, in every format and on every instruction set.

See tests/cpu_kernels.py for the bounds.
"""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.errors import InvalidRequestError
from nanovllm.kernels.activation import Activation
from nanovllm.kernels.cpu import packing
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.packing import PackedWeight
from nanovllm.kernels.kernels import QuantizedWeight, WeightSpec
from tests.cpu_kernels import (
    DTYPES,
    UNIT,
    UNITS,
    assert_within,
    each_isa,
    is_fast,
    kernels_for,
    random,
    random_codes,
    sum_error,
    threads,
)

INT4 = ("int4-g32", "int4-g64", "int4-g128", "int4-g32-zeros", "int4-g128-zeros")
FORMATS = ("dense", "compact", "int8", *INT4)
ROWS = (0, 1, 2, 3, 5, 6, 17, 64)
MANY_ROWS = (161, 255, 2048)  # more than a block of rows

# Depth and columns: single elements, odd sizes, just past a tile, and past every block of depth.
SHAPES = ((1, 1), (7, 37), (37, 7), (64, 64), (65, 17), (321, 100), (130, 321))
DEEP = ((1100, 20), (4500, 16))

each_format = pytest.mark.parametrize("weight_format", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))


@dataclass
class Linear:
    """A packed weight, and what it stands for."""

    kernels: CpuKernels
    dtype: torch.dtype
    spec: WeightSpec
    packed: PackedWeight
    weight: Tensor  # float64 [rows, depth]
    bias: Tensor  # float64 [rows]
    group: int  # activations that are rounded together; 0 is not at all

    def check(self, x: Tensor, what: object, exact: bool = False) -> None:
        """Compare `linear` and `logits`; `exact` says that the activations are not rounded."""
        outputs = [(self.kernels.linear(x, self.packed), self.dtype)]
        if not self.spec.gated:
            outputs.append((self.kernels.logits(x, self.packed), torch.float32))
        expected, error = self._expected(x.double(), exact)
        for actual, dtype in outputs:
            assert actual.dtype == dtype
            rounding = UNITS[dtype] * expected.abs() if dtype != torch.float32 else 0.0
            # Below the normal numbers the error is absolute.
            assert_within(actual, expected, error * 1.01 + rounding * 1.01 + 1e-37, what)

    def _expected(self, x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        y = F.linear(x, self.weight, self.bias)
        magnitude = F.linear(x.abs(), self.weight.abs(), self.bias.abs())
        error = sum_error(self.spec.depth) * magnitude
        if self.group:
            # Where int4 is expanded for AMX its weights are rounded to bf16, activations are not.
            if self.group < self.spec.depth or self.packed.struct.format == 3:
                error = error + UNITS[torch.bfloat16] * magnitude * self._has_tiles()
            if not exact:
                error = error + self._rounding(x)
        if not self.spec.gated:
            return y, error
        (gate, up), (gate_error, up_error) = y.chunk(2, -1), error.chunk(2, -1)
        if self.spec.activation == "silu":
            active, steepness = F.silu(gate), gate.abs()
        else:
            active, steepness = F.gelu(gate, approximate="tanh"), 2 * gate.abs() + gate.abs() ** 3
        slope = 1.2  # more than the largest of either
        out = active * up
        error = slope * gate_error * (up.abs() + up_error) + active.abs() * up_error
        return out, error + (8 + 3 * steepness) * UNIT * out.abs()

    def _has_tiles(self) -> bool:
        return self.kernels._library.isa.startswith("amx") and self.dtype == torch.bfloat16

    def _rounding(self, x: Tensor) -> Tensor:
        """What rounding each group of activations to half a step of its largest may do."""
        groups = [slice(k, k + self.group) for k in range(0, self.spec.depth, self.group)]
        return sum(
            (
                x[:, group].abs().amax(1, keepdim=True) / 254 * self.weight[:, group].abs().sum(1)
                for group in groups
            ),
            torch.zeros(()),
        )


def make_part(rows: int, depth: int, weight_format: str, seed: int) -> Tensor | QuantizedWeight:
    if weight_format in ("dense", "compact"):
        return random(rows, depth, seed=seed)
    bits = 8 if weight_format == "int8" else 4
    group = depth if bits == 8 else int(weight_format.split("-g")[1].split("-")[0])
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, depth), generator=generator, dtype=torch.uint8)
    groups = -(-depth // group)
    # Halves, which is how int4 scales are kept.
    scales = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.001).half().float()
    zeros = None
    if weight_format.endswith("zeros"):
        zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, bits, group)


def dense(part: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """What a part stands for; scales times codes are exact in float32 up to its last bits."""
    if isinstance(part, QuantizedWeight):
        exact = QuantizedWeight(part.codes, part.scales, part.zeros, part.bits, part.group_size)
        return exact.dequantize().double()
    return part.to(dtype).double()


def make_linear(
    isa: str,
    dtype: torch.dtype,
    weight_format: str,
    depth: int,
    widths: Sequence[int],
    bias: bool = False,
    activation: Activation | None = None,
    deterministic: bool = False,
) -> Linear:
    kernels = kernels_for(isa, dtype, deterministic)
    parts = [make_part(width, depth, weight_format, i) for i, width in enumerate(widths)]
    total = sum(widths)
    values = random(total, seed=99)
    spec = WeightSpec(total, depth, activation)
    least = 1 if weight_format == "compact" else 1 << 60
    with patch.object(packing, "compact_bytes", lambda _: least):
        packed = kernels.pack(spec, iter(parts), values if bias else None)
    group = 0
    if isinstance(parts[0], QuantizedWeight):
        group = parts[0].group_size
    return Linear(
        kernels,
        dtype,
        spec,
        packed,
        torch.cat([dense(part, dtype) for part in parts]),
        values.double() * bias,
        group,
    )


def check_rows(linear: Linear, rows: int, what: object) -> None:
    depth = linear.spec.depth
    x = random(rows, depth, seed=rows, dtype=linear.dtype)
    linear.check(x, (what, rows))
    if linear.group:
        # These are whole numbers of steps, so that nothing but float sums is left of the bound,
        # and a lost or misplaced element shows.
        codes = random_codes(rows, depth, linear.group, seed=rows)
        linear.check((codes / 32).to(linear.dtype), (what, rows, "exact"), exact=True)


@each_isa
@each_dtype
@each_format
def test_products(isa: str, dtype: torch.dtype, weight_format: str) -> None:
    for index, (depth, columns) in enumerate(SHAPES):
        linear = make_linear(isa, dtype, weight_format, depth, [columns], bias=index % 2 == 1)
        for rows in ROWS:
            check_rows(linear, rows, (depth, columns))


@each_isa
@each_dtype
@each_format
def test_many_rows_and_great_depth(isa: str, dtype: torch.dtype, weight_format: str) -> None:
    linear = make_linear(isa, dtype, weight_format, 70, [37])
    for rows in MANY_ROWS if is_fast(isa) else (161, 255, 800):
        check_rows(linear, rows, "many rows")
    for depth, columns in DEEP:
        linear = make_linear(isa, dtype, weight_format, depth, [columns])
        for rows in (1, 19):
            check_rows(linear, rows, (depth, columns))


@pytest.mark.slow
@each_isa
@each_dtype
@each_format
def test_the_whole_grid(isa: str, dtype: torch.dtype, weight_format: str) -> None:
    depths = (1, 7, 31, 33, 37, 63, 321, 512, 1025, 2050, 4097)
    for depth in depths:
        for columns in (1, 7, 16, 37, 63, 65, 129, 321):
            if depth * columns > 200_000 and not is_fast(isa):
                continue
            for bias in (False, True):
                linear = make_linear(isa, dtype, weight_format, depth, [columns], bias)
                for rows in (*ROWS, *MANY_ROWS) if depth * columns < 20_000 else ROWS:
                    check_rows(linear, rows, (depth, columns, bias))


@each_isa
@each_dtype
@each_format
@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_odd_widths(isa: str, dtype: torch.dtype, weight_format: str, bias: bool) -> None:
    linear = make_linear(isa, dtype, weight_format, 96, [33, 7, 1, 16, 21], bias)
    for rows in (1, 6, 20):
        check_rows(linear, rows, "parts")


@each_isa
@each_dtype
@each_format
@pytest.mark.parametrize("width", [1, 7, 16, 23, 37, 100])
def test_gated(isa: str, dtype: torch.dtype, weight_format: str, width: int) -> None:
    activations: tuple[Activation, ...] = ("silu", "gelu_tanh")
    for bias, activation in itertools.product((False, True), activations):
        linear = make_linear(isa, dtype, weight_format, 70, [width, width], bias, activation)
        for rows in (0, 1, 3, 17):
            check_rows(linear, rows, (width, bias, activation))


@each_isa
@each_dtype
@each_format
def test_a_deterministic_row_is_the_same_alone_and_in_any_batch(
    isa: str, dtype: torch.dtype, weight_format: str
) -> None:
    cases: list[tuple[Activation | None, list[int]]] = [(None, [37, 60]), ("silu", [37, 37])]
    for activation, widths in cases:
        linear = make_linear(isa, dtype, weight_format, 321, widths, True, activation, True)
        x = random(64, 321, dtype=dtype)
        check_rows(linear, 64, "deterministic")
        together = linear.kernels.linear(x, linear.packed)
        for size in (1, 2, 3, 4, 5, 7, 15, 16, 17, 33):
            for first in range(0, 64 - size + 1, size):
                part = linear.kernels.linear(x[first : first + size].clone(), linear.packed)
                assert torch.equal(part, together[first : first + size]), (size, first)


@each_isa
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_threads_change_no_bit(isa: str, num_threads: int) -> None:
    for weight_format in ("dense", "compact", "int8", "int4-g64"):
        linear = make_linear(isa, torch.bfloat16, weight_format, 130, [321], bias=True)
        x = random(230, 130, dtype=torch.bfloat16)
        alone = linear.kernels.linear(x, linear.packed)
        with threads(linear.kernels._library, num_threads):
            again = make_linear(isa, torch.bfloat16, weight_format, 130, [321], bias=True)
            assert torch.equal(again.kernels.linear(x, again.packed), alone)


@each_isa
@each_dtype
@each_format
def test_embeddings_are_rows_of_the_packed_weight(
    isa: str, dtype: torch.dtype, weight_format: str
) -> None:
    for depth in (1, 37, 100):
        linear = make_linear(isa, dtype, weight_format, depth, [50, 21])
        token_ids = torch.tensor([70, 0, 49, 50, 0, 16, 15, 70])
        out = linear.kernels.embed(token_ids, linear.packed)
        expected = linear.weight[token_ids]
        assert_within(out, expected, UNITS[dtype] * expected.abs() * 1.01 + 1e-37, depth)
        assert linear.kernels.embed(token_ids[:0], linear.packed).shape == (0, depth)


@each_isa
@each_dtype
@each_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_spares_the_others(
    isa: str, dtype: torch.dtype, weight_format: str, bad: float
) -> None:
    linear = make_linear(isa, dtype, weight_format, 130, [37])
    for rows in (2, 20):
        x = random(rows, 130, dtype=dtype)
        healthy = linear.kernels.linear(x, linear.packed)
        x[1, 129] = bad
        out = linear.kernels.linear(x, linear.packed)
        touched = linear.weight[:, 129] != 0  # what is multiplied by a zero may stay finite
        assert not out[1, touched].isfinite().any()
        others = torch.arange(rows) != 1
        assert torch.equal(out[others], healthy[others])


@each_isa
@each_dtype
def test_rows_of_zeros_and_of_tiny_numbers(isa: str, dtype: torch.dtype) -> None:
    for weight_format in FORMATS:
        linear = make_linear(isa, dtype, weight_format, 70, [20])
        for scale in (0.0, 1e-39, 1e-30, 1e30):
            x = random(5, 70, dtype=dtype) * scale
            out = linear.kernels.linear(x, linear.packed)
            expected, _ = linear._expected(x.double(), exact=True)
            # Denormals may be flushed, and an inverse scale may overflow, to no effect above 1e-30.
            bound = expected.abs().amax() * 0.05 + 1e-30
            assert_within(out, expected, bound.expand_as(expected), (weight_format, scale))


@each_isa
def test_extreme_codes(isa: str) -> None:
    """Sums as large as they get: all weights and activations at their ends."""
    depth = 18_944  # the widest MLP of Qwen2.5
    for bits, group in ((8, depth), (4, 32), (4, 128), (4, 256)):
        codes = torch.full((18, depth), 2**bits - 1, dtype=torch.uint8)
        codes[::2] = 0
        codes[4:6, ::3] = 2**bits - 1 - codes[4:6, ::3]
        zeros = None
        if bits == 4:
            zeros = torch.zeros(18, depth // group, dtype=torch.uint8)
            zeros[::2] = 15
        part = QuantizedWeight(codes, torch.ones(18, depth // group), zeros, bits, group)
        kernels = kernels_for(isa, torch.float32)
        packed = kernels.pack(WeightSpec(18, depth), [part], None)
        x = torch.ones(3, depth)
        x[1] = -1.0
        expected = F.linear(x.double(), part.dequantize().double())
        bound = expected.abs() * sum_error(depth // group) + 1e-30
        assert_within(kernels.linear(x, packed), expected, bound, (bits, group))


def test_parts_that_are_quantized_differently_are_refused() -> None:
    kernels = kernels_for("portable", torch.float32)
    spec = WeightSpec(8, 64)
    for formats in (("int8", "int4-g32"), ("int4-g32", "int4-g64"), ("int4-g32", "int4-g32-zeros")):
        parts = [make_part(4, 64, weight_format, 0) for weight_format in formats]
        with pytest.raises(InvalidRequestError, match="same"):
            kernels.pack(spec, parts, None)


def test_a_dense_part_beside_a_quantized_one_is_refused() -> None:
    """In a process of its own, as what is not refused reads past the part."""
    script = (
        "from tests.unit.test_cpu_linear import *\n"
        "kernels = kernels_for('portable', torch.float32)\n"
        "for first, second in (('int8', 'dense'), ('int4-g32', 'dense'), ('dense', 'int8')):\n"
        "    parts = [make_part(4, 64, first, 0), make_part(4, 64, second, 0)]\n"
        "    with pytest.raises(InvalidRequestError, match='same'):\n"
        "        kernels.pack(WeightSpec(8, 64), parts, None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_part_without_zero_points_may_follow_one_with_them() -> None:
    kernels = kernels_for("portable", torch.float32)
    parts = [make_part(4, 64, weight_format, 0) for weight_format in ("int4-g32-zeros", "int4-g32")]
    packed = kernels.pack(WeightSpec(8, 64), parts, None)
    expected = torch.cat([dense(part, torch.float32) for part in parts])
    out = kernels.embed(torch.arange(8), packed)
    assert_within(out, expected, expected.abs() * UNIT * 4 + 1e-37, "mixed")


def test_int8_by_groups_or_with_zero_points_is_refused() -> None:
    kernels = kernels_for("portable", torch.float32)
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    grouped = QuantizedWeight(codes, torch.ones(4, 2), None, 8, 32)
    shifted = QuantizedWeight(codes, torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.uint8), 8, 64)
    for part in (grouped, shifted):
        with pytest.raises(InvalidRequestError):
            kernels.pack(WeightSpec(4, 64), [part], None)


def test_scales_of_int4_that_float16_cannot_hold_are_refused() -> None:
    kernels = kernels_for("portable", torch.float32)
    codes = torch.full((4, 32), 9, dtype=torch.uint8)
    part = QuantizedWeight(codes, torch.full((4, 1), 65504.0), None, 4, 32)
    packed = kernels.pack(WeightSpec(4, 32), [part], None)
    assert (kernels.embed(torch.tensor([1]), packed) == 65504.0).all()
    for scale in (1e5, float("inf"), float("nan")):
        part = QuantizedWeight(codes, torch.full((4, 1), scale), None, 4, 32)
        with pytest.raises(InvalidRequestError, match="float16"):
            kernels.pack(WeightSpec(4, 32), [part], None)


@pytest.mark.parametrize("group_size", [4, 12, 20, 512])
def test_groups_that_the_int4_kernels_cannot_sum_are_refused(group_size: int) -> None:
    kernels = kernels_for("portable", torch.float32)
    groups = -(-64 // group_size)
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    part = QuantizedWeight(codes, torch.ones(4, groups), None, 4, group_size)
    with pytest.raises(InvalidRequestError, match="group"):
        kernels.pack(WeightSpec(4, 64), [part], None)
