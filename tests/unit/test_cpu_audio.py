"""Snake, causal convolutions with a history, and sums in place, against exact definitions."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.audio import DepthwiseConv, snake_table
from nanovllm.kernels.kernels import Kernels, QuantizedWeight, WeightSpec
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
    sum_error,
    threads,
)

CHANNELS = (1, 3, 16, 37, 96)
NUM_SLOTS = 7
CPU = torch.device("cpu")

each_implementation = pytest.mark.parametrize(
    "isa", ["torch", "amx", "avx512", "avx2", "portable", "amx-emulated"]
)


def audio_kernels(isa: str) -> Kernels:
    if isa == "torch":
        return TorchKernels(CPU, torch.float32)
    return kernels_for(isa, torch.float32)


def random_snake(channels: int, seed: int = 0, affine: bool = True) -> Tensor:
    alpha = random(channels, seed=seed).abs() + 0.1
    if not affine:
        return snake_table(alpha[None, :, None])
    return snake_table(alpha, random(channels, seed=seed + 1), random(channels, seed=seed + 2))


def exact_snake(x: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return x.double()
    alpha, _, scale, shift = table.double()
    y = x.double() * scale + shift
    return y + (alpha * y).sin().square() / (alpha + 1e-9)  # type: ignore[no-any-return]


def snake_bound(x: Tensor, table: Tensor | None) -> Tensor:
    """The argument of the sine is rounded, in proportion to its size; so is the sum."""
    if table is None:
        return torch.zeros(())
    alpha, _, scale, shift = table.double().abs()
    y = x.double().abs() * scale + shift
    return UNIT * (6 * y + (8 + 4 * alpha * y) / alpha)  # type: ignore[no-any-return]


def exact_conv(x: Tensor, conv: DepthwiseConv, past: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the frames it is made of, float64; `past` are `[num_seqs, pad, channels]`."""
    frames = torch.cat([past.double(), exact_snake(x, conv.before)], dim=1)
    y = torch.nn.functional.conv1d(
        frames.transpose(1, 2),
        conv.weight.double().T[:, None],
        conv.bias.double(),
        dilation=conv.dilation,
        groups=len(conv.bias),
    )
    return exact_snake(y.transpose(1, 2), conv.after), frames


def make_conv(channels: int, dilation: int, snakes: bool) -> DepthwiseConv:
    return DepthwiseConv(
        random(7, channels, seed=11),
        random(channels, seed=12),
        dilation,
        before=random_snake(channels, 13) if snakes else None,
        after=random_snake(channels, 16, affine=False) if snakes else None,
    )


@each_implementation
@pytest.mark.parametrize("affine", [False, True])
def test_snake(isa: str, affine: bool) -> None:
    kernels, nothing, slot = audio_kernels(isa), torch.empty(1, 0, 37), torch.zeros(1).long()
    table = random_snake(37, affine=affine)
    for scale in (1e-6, 1.0, 30.0, 1e3, 1e5):
        x = random(1, 50, 37, seed=3) * scale
        y = kernels.causal_windows(x, table, nothing, slot, 1, 1)
        assert_within(y, exact_snake(x, table)[0], snake_bound(x, table)[0], scale)


@each_implementation
def test_snake_at_its_ends(isa: str) -> None:
    kernels, nothing, slot = audio_kernels(isa), torch.empty(1, 0, 1), torch.zeros(1).long()
    x = torch.tensor([0.0, -0.0, 1e9, -1e9, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    for alpha in (0.0, 1e-12, 1.0, 50.0):
        table = snake_table(torch.tensor([alpha]))
        y = kernels.causal_windows(x[None, :, None], table, nothing, slot, 1, 1)[:, 0]
        assert y[:2].tolist() == [0, 0]
        if alpha >= 1:  # nobody knows the sine so far out, but it is one
            assert ((y - x)[2:6].abs() <= 1.1 + 1e-6 * x[2:6].abs()).all()
            assert y[6:].isnan().all()
        assert y[8].isnan()


@each_implementation
@pytest.mark.parametrize("dilation", [1, 3, 9])
@pytest.mark.parametrize("snakes", [False, True])
def test_depthwise_convolution(isa: str, dilation: int, snakes: bool) -> None:
    kernels = audio_kernels(isa)
    for channels in CHANNELS:
        conv = make_conv(channels, dilation, snakes)
        for num_frames in (1, 2, 5, 53, 54, 55, 255, 256, 257, 600):
            if num_frames > 60 and not (is_fast(isa) and channels in (1, 37)):
                continue
            slots = torch.tensor([5, 0, 3])[: 1 + num_frames % 3]
            history = random(NUM_SLOTS, conv.pad, channels, seed=2)
            past, before = history[slots], history.clone()
            x = random(len(slots), num_frames, channels, seed=num_frames)
            y = kernels.depthwise_conv(x, conv, history, slots)
            expected, frames = exact_conv(x, conv, past)
            what = (channels, num_frames)
            # A snake's slope is at most 2, and the products are of a few units.
            size = 1 + frames.abs().amax(dim=1, keepdim=True)
            slack = (7 * size * conv.weight.double().abs().sum(0)) * 64 * UNIT
            slack = slack / (1 if conv.after is None else conv.after[0].double().clamp_max(1))
            assert_within(y, expected, slack.expand_as(expected), what)
            others = [slot for slot in range(NUM_SLOTS) if slot not in slots.tolist()]
            assert torch.equal(history[others], before[others]), what
            kept = frames[:, -conv.pad :]
            assert_within(history[slots], kept, (40 * UNIT * (size + kept.abs())), what)


@each_implementation
def test_a_convolution_in_pieces_is_the_same_to_the_bit(isa: str) -> None:
    kernels = audio_kernels(isa)
    conv, slots = make_conv(37, 3, True), torch.tensor([2, 6])
    x = random(2, 70, 37)
    whole = kernels.depthwise_conv(x, conv, torch.zeros(NUM_SLOTS, conv.pad, 37), slots)
    for sizes in ([1] * 70, [2, 68], [17, 18, 19, 16], [69, 1]):
        history = torch.zeros(NUM_SLOTS, conv.pad, 37)
        pieces = [
            kernels.depthwise_conv(part.contiguous(), conv, history, slots)
            for part in torch.split(x, sizes, dim=1)
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=0)


@each_implementation
@pytest.mark.parametrize(
    ("width", "stride", "pad"),
    [(1, 1, 0), (2, 1, 1), (3, 1, 2), (7, 1, 6), (4, 2, 2), (16, 8, 8), (6, 3, 4), (14, 7, 8)],
)
def test_causal_windows(isa: str, width: int, stride: int, pad: int) -> None:
    kernels = audio_kernels(isa)
    for channels in CHANNELS:
        for num_windows in (1, 2, 3, 33):
            table = random_snake(channels) if num_windows != 2 else None
            slots = torch.tensor([4, 1, 6])[: 1 + num_windows % 3]
            history = random(NUM_SLOTS, pad, channels, seed=2)
            past, before = history[slots], history.clone()
            x = random(len(slots), num_windows * stride, channels, seed=num_windows)
            rows = kernels.causal_windows(x, table, history, slots, width, stride)
            frames = torch.cat([past.double(), exact_snake(x, table)], dim=1)
            expected = torch.stack(
                [frames[:, r * stride : r * stride + width] for r in range(num_windows)], dim=1
            ).reshape(-1, width * channels)
            what = (channels, num_windows)
            slack = 60 * UNIT * (1 + expected.abs())
            assert_within(rows, expected, slack, what)
            others = [slot for slot in range(NUM_SLOTS) if slot not in slots.tolist()]
            assert torch.equal(history[others], before[others]), what
            kept = frames[:, frames.shape[1] - pad :]
            assert_within(history[slots], kept, 60 * UNIT * (1 + kept.abs()), what)


@each_implementation
def test_no_sequences(isa: str) -> None:
    kernels, conv, none = audio_kernels(isa), make_conv(16, 1, True), torch.zeros(0).long()
    x, history = torch.empty(0, 4, 16), random(NUM_SLOTS, 6, 16)
    before = history.clone()
    assert kernels.depthwise_conv(x, conv, history, none).shape == (0, 4, 16)
    windows = kernels.causal_windows(x, None, history[:, :1].contiguous(), none, 2, 1)
    assert windows.shape == (0, 32)
    assert torch.equal(history, before)


def test_shapes_without_a_kernel() -> None:
    kernels, slots = kernels_for("portable", torch.float32), torch.zeros(1).long()
    x, history = torch.zeros(1, 4, 16), torch.zeros(1, 60, 16)
    for weight, dilation in ((torch.zeros(7, 16), 10), (torch.zeros(3, 16), 1)):
        conv = DepthwiseConv(weight, torch.zeros(16), dilation)
        with pytest.raises(ValueError, match="no kernel"):
            kernels.depthwise_conv(x, conv, history, slots)
    with pytest.raises(ValueError, match="no kernel"):
        kernels.causal_windows(x, None, history[:, :8], slots, 9, 1)


@each_isa
def test_audio_is_the_same_on_any_number_of_threads(isa: str) -> None:
    kernels = kernels_for(isa, torch.float32)
    conv, slots, x = make_conv(96, 9, True), torch.tensor([3, 0]), random(2, 40, 96)
    table = random_snake(96)
    results = []
    for num_threads in (1, 3):
        with threads(kernels._library, num_threads):
            history = random(NUM_SLOTS, conv.pad, 96, seed=1)
            windows = random(NUM_SLOTS, 8, 96, seed=1)
            results.append(
                (
                    kernels.depthwise_conv(x, conv, history, slots),
                    kernels.causal_windows(x, table, windows, slots, 16, 8),
                    history,
                    windows,
                )
            )
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_product_is_added_to_what_is_there(
    isa: str, dtype: torch.dtype, bits: int | None
) -> None:
    kernels = kernels_for(isa, dtype)
    for rows, columns, depth in ((1, 5, 16), (3, 37, 64), (9, 96, 321), (200, 33, 32)):
        dense = random(columns, depth, seed=1, dtype=dtype)
        weight: Tensor | QuantizedWeight = dense
        if bits is not None:
            codes = torch.randint(0, 1 << bits, (columns, depth), dtype=torch.uint8)
            groups = 1 if bits == 8 else -(-depth // 32)
            scales = random(columns, groups, seed=4).abs() * 0.01
            weight = QuantizedWeight(codes, scales, None, bits, depth if bits == 8 else 32)
        bias = random(columns, seed=2)
        packed = kernels.pack(WeightSpec(columns, depth), [weight], bias)
        x, total = random(rows, depth, dtype=dtype), random(rows, columns, seed=3, dtype=dtype)
        product = kernels.linear(x, packed)
        expected = total.double() + product.double()
        # One rounding less than of the product and the sum apart.
        bound = (product.double().abs() + expected.abs()) * UNITS[dtype] * 1.01 + 1e-30
        added = kernels.linear_add(x, packed, total.clone())
        assert_within(added, expected, bound, (rows, columns, depth))


@each_isa
def test_a_gated_product_is_added_too(isa: str) -> None:
    kernels = kernels_for(isa, torch.float32)
    gate, up, x = random(24, 16, seed=1), random(24, 16, seed=2), random(5, 16, seed=3)
    packed = kernels.pack(WeightSpec(48, 16, "silu"), [gate, up], None)
    total = random(5, 24, seed=4)
    expected = total.double() + kernels.linear(x, packed).double()
    added = kernels.linear_add(x, packed, total.clone())
    assert_within(added, expected, expected.abs() * 2 * UNIT + sum_error(1), "gated")


def test_kernels_of_another_dtype() -> None:
    both: list[Kernels] = [
        kernels_for("portable", torch.bfloat16),
        TorchKernels(CPU, torch.bfloat16),
    ]
    for kernels in both:
        wide = kernels.with_dtype(torch.float32)
        packed = wide.pack(WeightSpec(3, 8), [random(3, 8)], None)
        assert wide.linear(random(2, 8), packed).dtype == torch.float32
        assert wide.name == kernels.name
