"""The layers of codecs in Triton against their twins in torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from nanovllm.kernels import audio as twin
from nanovllm.kernels.audio import DepthwiseConv, snake_table
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.kernels.triton import audio
from nanovllm.kernels.triton.kernels import TritonKernels
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.models.voxcpm.vae import AudioVAE
from tests.triton_device import DEVICE

NUM_SLOTS = 7
FRAMES = st.one_of(st.integers(1, 20), st.just(70))
SIGNALS = st.one_of(
    st.tuples(st.integers(0, 5), FRAMES, st.integers(1, 40)),
    st.tuples(st.just(1), FRAMES, st.integers(1, 300)),
)
SNAKES = st.sampled_from([(False, False), (True, True), (True, False), (False, True)])
TAPS = st.sampled_from([7, 7, 7, 1, 2, 4])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def slots_for(num_seqs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUM_SLOTS, generator=generator)[:num_seqs].to(DEVICE)


def random_snake(channels: int, seed: int) -> Tensor:
    alpha = random(channels, seed=seed).abs() + 0.1
    return snake_table(alpha, random(channels, seed=seed + 1), random(channels, seed=seed + 2))


def random_conv(
    channels: int, dilation: int, snakes: tuple[bool, bool], taps: int = 7
) -> DepthwiseConv:
    before, after = (random_snake(channels, seed) if on else None for seed, on in enumerate(snakes))
    weight = random(taps, channels, seed=8) / 3
    return DepthwiseConv(weight, random(channels, seed=9), dilation, before, after)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def check(ours: Any, torchs: Any, x: Tensor, history: Tensor, slots: Tensor, *rest: Any) -> None:
    """Outputs and histories, and that nothing else changes."""
    kept, before, expected_history = x.clone(), history.clone(), history.clone()
    found = ours(x, *rest[:1], history, slots, *rest[1:])
    expected = torchs(x, *rest[:1], expected_history, slots, *rest[1:])
    assert torch.equal(x, kept)
    assert_close(found, expected)
    assert_close(history, expected_history)
    others = torch.ones(NUM_SLOTS, dtype=torch.bool, device=DEVICE)
    others[slots] = False
    assert torch.equal(history[others], before[others])


@settings(max_examples=50, deadline=None)
@given(SIGNALS, st.sampled_from([1, 3, 9]), SNAKES, TAPS, st.integers(0, 99))
def test_depthwise_convolutions(
    signal: tuple[int, int, int], dilation: int, snakes: tuple[bool, bool], taps: int, seed: int
) -> None:
    num_seqs, _, channels = signal
    conv = random_conv(channels, dilation, snakes, taps)
    x, history = random(*signal, seed=seed), random(NUM_SLOTS, conv.pad, channels, seed=seed + 1)
    check(audio.depthwise_conv, twin.depthwise_conv, x, history, slots_for(num_seqs, seed), conv)


@settings(max_examples=50, deadline=None)
@given(SIGNALS, st.integers(1, 8), st.integers(0, 12), st.data(), st.booleans())
def test_windows(
    signal: tuple[int, int, int], stride: int, overlap: int, data: st.DataObject, snake: bool
) -> None:
    num_seqs, num_windows, channels = signal
    pad = overlap + data.draw(st.integers(0, stride - 1))
    num_frames = min(num_windows, 20) * stride
    x = random(num_seqs, num_frames, channels, seed=stride)
    table = random_snake(channels, 3) if snake else None
    history, slots = random(NUM_SLOTS, pad, channels, seed=overlap), slots_for(num_seqs, overlap)
    width = stride + overlap
    check(audio.causal_windows, twin.causal_windows, x, history, slots, table, width, stride)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), st.sampled_from([1, 3, 9]), SNAKES)
def test_pieces_are_as_the_whole(
    pieces: list[int], dilation: int, snakes: tuple[bool, bool]
) -> None:
    channels, slots = 9, slots_for(2, 1)
    conv = random_conv(channels, dilation, snakes)
    x, table = random(2, 3 * sum(pieces), channels, seed=1), random_snake(channels, 1)
    outputs: list[list[Tensor]] = []
    for lengths in ([sum(pieces)], pieces):
        histories = [torch.zeros(NUM_SLOTS, pad, channels, device=DEVICE) for pad in (conv.pad, 5)]
        convolved, windows = [], []
        for part in torch.split(x, [3 * length for length in lengths], dim=1):
            convolved.append(audio.depthwise_conv(part, conv, histories[0], slots))
            rows = audio.causal_windows(part, table, histories[1], slots, 7, 3)
            windows.append(rows.view(2, -1, rows.shape[1]))
        outputs.append([torch.cat(convolved, 1), torch.cat(windows, 1), *histories])
    for whole, streamed in zip(*outputs, strict=True):
        assert torch.equal(whole, streamed)


def test_rows_that_pad_share_a_slot() -> None:
    conv, x = random_conv(40, 3, (True, True)), random(5, 8, 40, seed=2)
    spare = NUM_SLOTS - 1
    results = []
    for slots in ([3, 1], [3, 1, spare, spare, spare]):
        history = random(NUM_SLOTS, conv.pad, 40, seed=3)
        windows = random(NUM_SLOTS, 4, 40, seed=4)
        places = torch.tensor(slots, device=DEVICE)
        y = audio.depthwise_conv(x[: len(slots)], conv, history, places)
        rows = audio.causal_windows(x[: len(slots)], conv.before, windows, places, 8, 4)
        results.append((y[:2], rows[:4], history[:spare], windows[:spare]))
    for alone, padded in zip(*results, strict=True):
        assert torch.equal(alone, padded)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_snake_far_out() -> None:
    """The sine squared is within 3 units of the last place of 1 up to 60,000 times pi."""
    x = torch.cat([random(2000, seed=1) * scale for scale in (1.0, 40.0, 1e3, 4e4)])
    nothing, slots = torch.empty(1, 0, 1, device=DEVICE), torch.zeros(1, dtype=torch.int64)
    one = snake_table(torch.ones(1, device=DEVICE))

    def snake(values: Tensor) -> Tensor:
        rows = audio.causal_windows(values[None, :, None], one, nothing, slots.to(DEVICE), 1, 1)
        return rows[:, 0]

    exact = x.double() + x.double().sin().square()
    assert ((snake(x) - exact).abs() <= 2e-7 + 7e-8 * x.double().abs()).all()
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], device=DEVICE)
    assert snake(bad).isnan().tolist() == [True, True, True, False]


def test_no_frames_and_strided_signals() -> None:
    conv, slots = random_conv(16, 1, (True, True)), slots_for(3, 1)
    history = random(NUM_SLOTS, conv.pad, 16, seed=2)
    x = random(3, 16, 4, seed=1).transpose(1, 2)
    check(audio.depthwise_conv, twin.depthwise_conv, x, history, slots, conv)
    check(audio.causal_windows, twin.causal_windows, x, history, slots, conv.before, 8, 2)
    check(audio.depthwise_conv, twin.depthwise_conv, x[:, :0], history, slots, conv)
    before = history.clone()
    assert audio.causal_windows(x[:, :0], None, history, slots, 8, 2).shape == (0, 128)
    assert torch.equal(history, before)


def test_histories_too_long_are_the_twins() -> None:
    ours, torchs = TritonKernels(DEVICE, torch.float32), TorchKernels(DEVICE, torch.float32)
    conv, slots, x = random_conv(3, 40, (True, True)), slots_for(2, 1), random(2, 12, 3, seed=1)
    history = random(NUM_SLOTS, conv.pad, 3, seed=2)
    assert conv.pad > audio.MAX_PAD
    check(ours.depthwise_conv, torchs.depthwise_conv, x, history, slots, conv)
    check(ours.causal_windows, torchs.causal_windows, x, history, slots, conv.before, 241, 1)
    for dilation in (1, 9):
        conv = random_conv(3, dilation, (False, False))
        history = random(NUM_SLOTS, conv.pad, 3, seed=2)
        check(ours.depthwise_conv, torchs.depthwise_conv, x, history, slots, conv)
        width = conv.pad + 2
        check(ours.causal_windows, torchs.causal_windows, x, history, slots, None, width, 2)


def test_an_autoencoder(speech_checkpoint: Callable[..., Path]) -> None:
    """Both ways, and streams of different ages in one batch."""
    directory = speech_checkpoint("v1")
    config = VoxCPMConfig.from_directory(directory).vae
    tensors = torch.load(directory / "audiovae.pth", weights_only=True)["state_dict"]
    latents, audio_in = random(2, 2, config.latent_dim, seed=1), random(config.hop, seed=2) / 9
    slots = torch.tensor([2, 0], device=DEVICE)
    results = []
    for kind in (TorchKernels, TritonKernels):
        vae = AudioVAE(config, tensors, kind(DEVICE, torch.bfloat16), DEVICE)
        state = vae.new_decoder_state(4)
        first = vae.decode(latents[:1, :1], state, slots[:1])
        results.append([first, vae.decode(latents[:, 1:], state, slots), vae.encode(audio_in)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))
