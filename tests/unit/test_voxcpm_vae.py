"""AudioVAE against the reference package: whole, in pieces, and many streams at once."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.errors import UnsupportedModelError
from nanovllm.kernels.cpu.kernels import CpuKernels
from nanovllm.kernels.cpu.library import load_library
from nanovllm.kernels.kernels import Kernels
from nanovllm.kernels.torch_kernels import TorchKernels
from nanovllm.models.voxcpm import vae as vae_module
from nanovllm.models.voxcpm.config import AudioVAEConfig, VoxCPMConfig
from nanovllm.models.voxcpm.vae import AudioEncoder, AudioVAE, context_frames, expected_tensors
from tests.cpu_kernels import random
from tests.voxcpm_oracle import KINDS, load_reference

CPU = torch.device("cpu")
TOLERANCE = 2e-6
"""Of a signal whose largest values are near one; the oracle's are smaller."""
NUM_SLOTS = 6

each_kind = pytest.mark.parametrize("kind", KINDS)
each_kernels = pytest.mark.parametrize("implementation", ["torch", "cpu"])


class Checkpoint(NamedTuple):
    config: AudioVAEConfig
    tensors: dict[str, Tensor]
    reference: Any


Load = Callable[[str], Checkpoint]
Build = Callable[[str, str], AudioVAE]


@pytest.fixture(scope="module")
def load(speech_checkpoint: Callable[..., Path]) -> Load:
    @cache
    def get(kind: str) -> Checkpoint:
        directory = speech_checkpoint(kind)
        content = torch.load(directory / "audiovae.pth", weights_only=True)
        config = VoxCPMConfig.from_directory(directory).vae
        return Checkpoint(config, content["state_dict"], load_reference(directory).audio_vae)

    return get


@pytest.fixture(scope="module")
def build(load: Load) -> Build:
    def make(kind: str, implementation: str) -> AudioVAE:
        config, tensors, _ = load(kind)
        return AudioVAE(config, tensors, kernels_of(implementation), CPU)

    return cache(make)


def kernels_of(implementation: str) -> Kernels:
    # The networks' dtype is not the autoencoder's.
    if implementation == "torch":
        return TorchKernels(CPU, torch.bfloat16)
    return CpuKernels(load_library(), torch.bfloat16)


def reference_decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """Decode `[num_seqs, num_frames, latent_dim]` in one go."""
    with torch.inference_mode():
        wave: Tensor = checkpoint.reference.decode(latents.transpose(1, 2))[:, 0]
    return wave


def reference_encode(checkpoint: Checkpoint, audio: Tensor) -> Tensor:
    with torch.inference_mode():
        rate = checkpoint.config.sample_rate
        latents: Tensor = checkpoint.reference.encode(audio[None, None], rate)[0].T
    return latents


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert expected.abs().max() > 0.01
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@each_kind
def test_the_tensors_of_a_checkpoint_are_as_expected(kind: str, load: Load) -> None:
    config, tensors, _ = load(kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    boundaries = shapes.pop("decoder.sr_bin_boundaries", None)
    assert shapes == expected_tensors(config)
    assert boundaries == ((3,) if kind == "v2" else None), "which the config has as well"


@each_kind
@each_kernels
def test_decoding_in_one_go(kind: str, implementation: str, load: Load, build: Build) -> None:
    checkpoint, vae = load(kind), build(kind, implementation)
    latents = random(2, 23, checkpoint.config.latent_dim)
    wave = vae.decode(latents, vae.new_decoder_state(2), torch.tensor([0, 1]))
    assert wave.dtype == torch.float32
    assert wave.shape == (2, 23 * checkpoint.config.decoder_hop)
    assert_same(wave, reference_decode(checkpoint, latents))


@each_kind
@each_kernels
@pytest.mark.parametrize("sizes", [[1] * 24, [2] * 12, [4] * 6, [1, 5, 2, 13, 3]], ids=str)
def test_decoding_in_pieces(
    kind: str, implementation: str, sizes: list[int], load: Load, build: Build
) -> None:
    checkpoint, vae = load(kind), build(kind, implementation)
    latents = random(1, 24, checkpoint.config.latent_dim, seed=1)
    state, slots = vae.new_decoder_state(NUM_SLOTS), torch.tensor([4])
    pieces = [vae.decode(part, state, slots) for part in torch.split(latents, sizes, dim=1)]
    wave = torch.cat(pieces, dim=1)
    assert_same(wave, reference_decode(checkpoint, latents))
    whole = vae.decode(latents, vae.new_decoder_state(1), torch.tensor([0]))
    if implementation == "cpu":
        assert torch.equal(wave, whole), "our kernels add in the same order whatever the pieces"
    else:
        assert_same(wave, whole, 1e-6)


@each_kind
@each_kernels
def test_streams_of_different_ages_in_one_batch(
    kind: str, implementation: str, load: Load, build: Build
) -> None:
    """Each stream is what it would be alone, wherever it stands in a batch and in the table."""
    checkpoint, vae = load(kind), build(kind, implementation)
    state = vae.new_decoder_state(NUM_SLOTS)
    latents = random(3, 14, checkpoint.config.latent_dim, seed=2)
    expected = reference_decode(checkpoint, latents)
    slots, done = [5, 0, 2], [0, 0, 0]
    waves: list[list[Tensor]] = [[], [], []]
    for batch in ([0], [1, 0], [0, 1, 2], [2], [2, 0], [1, 2], [2, 1, 0], [0, 2], [1]):
        parts = torch.stack([latents[i, done[i] : done[i] + 2] for i in batch])
        out = vae.decode(parts, state, torch.tensor([slots[i] for i in batch]))
        for i, wave in zip(batch, out, strict=True):
            waves[i].append(wave)
            done[i] += 2
    for i in range(3):
        wave = torch.cat(waves[i])
        assert_same(wave, expected[i, : len(wave)])
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in slots]
    assert not any(history[untouched].any() for history in state.histories)


@each_kind
@each_kernels
def test_a_stream_that_is_primed_goes_on_as_if_it_had_been_decoded(
    kind: str, implementation: str, load: Load, build: Build
) -> None:
    checkpoint, vae = load(kind), build(kind, implementation)
    reach = context_frames(checkpoint.config)
    assert 16 <= reach <= 24
    latents = random(reach + 12, checkpoint.config.latent_dim, seed=3)
    samples = checkpoint.config.decoder_hop
    for num_before in (0, 1, 5, reach, reach + 8):
        before, after = latents[:num_before], latents[num_before : num_before + 4]
        state = vae.new_decoder_state(NUM_SLOTS)
        for history in state.histories:
            history.fill_(1.0)  # of the stream that had the slot before
        vae.prime(before, state, 3)
        wave = vae.decode(after[None], state, torch.tensor([3]))[0]
        whole = reference_decode(checkpoint, latents[None, : num_before + 4])[0]
        assert_same(wave, whole[num_before * samples :])
        assert all((history[:3] == 1).all() for history in state.histories)


@each_kind
def test_sound_depends_on_no_frame_before_the_context(kind: str, load: Load, build: Build) -> None:
    config, vae = load(kind).config, build(kind, "cpu")
    reach, slots = context_frames(config), torch.tensor([0])
    latents = random(1, reach + 2, config.latent_dim, seed=4)
    other = latents.clone()
    other[:, :1] += 5.0
    last, outputs = config.decoder_hop, []
    for frames in (latents, other):
        outputs.append(vae.decode(frames, vae.new_decoder_state(1), slots)[:, -last:])
    assert torch.equal(*outputs)


@each_kernels
def test_a_released_slot_carries_nothing_over(implementation: str, build: Build) -> None:
    vae = build("v2", implementation)
    state, slots = vae.new_decoder_state(NUM_SLOTS), torch.tensor([1, 2, 4])
    old, new = random(3, 8, 16, seed=5), random(1, 4, 16, seed=6)
    vae.decode(old, state, slots)
    neighbours = [history[[1, 4]].clone() for history in state.histories]
    vae.reset(state, torch.tensor([2]))
    wave = vae.decode(new, state, torch.tensor([2]))
    fresh = vae.decode(new, vae.new_decoder_state(1), torch.tensor([0]))
    assert torch.equal(wave, fresh)
    for history, before in zip(state.histories, neighbours, strict=True):
        assert torch.equal(history[[1, 4]], before)


@each_kernels
def test_a_stream_that_breaks_spares_the_others(implementation: str, build: Build) -> None:
    vae = build("v1", implementation)
    latents, slots = random(3, 2, 16), torch.tensor([0, 1, 2])
    healthy = vae.decode(latents, vae.new_decoder_state(3), slots)
    state = vae.new_decoder_state(3)
    latents[1, 0, 0] = torch.nan
    wave = vae.decode(latents, state, slots)
    assert wave[1].isnan().any()
    torch.testing.assert_close(wave[[0, 2]], healthy[[0, 2]], rtol=0, atol=0)
    vae.prime(latents[0], state, 1)
    assert all(history.isfinite().all() for history in state.histories)


@each_kernels
def test_large_batches_part_ways(
    implementation: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = build("v1", implementation)
    latents, slots = random(5, 6, 16), torch.tensor([3, 0, 4, 1, 2])
    together = vae.decode(latents, vae.new_decoder_state(5), slots)
    for limit in (1, 20_000):
        monkeypatch.setattr(vae_module, "CACHED_BYTES", limit)
        state = vae.new_decoder_state(5)
        halves = [vae.decode(part, state, slots) for part in torch.split(latents, 3, dim=1)]
        torch.testing.assert_close(torch.cat(halves, dim=1), together, rtol=0, atol=1e-7)


@each_kernels
def test_an_empty_batch(implementation: str, build: Build) -> None:
    vae = build("v1", implementation)
    none = torch.zeros(0, dtype=torch.int64)
    assert vae.decode(torch.empty(0, 2, 16), vae.new_decoder_state(2), none).shape == (0, 1280)


@each_kind
@each_kernels
def test_encoding_in_one_go(kind: str, implementation: str, load: Load, build: Build) -> None:
    checkpoint, vae = load(kind), build(kind, implementation)
    for num_frames in (1, 2, 9, 60):
        audio = random(num_frames * checkpoint.config.hop, seed=num_frames) * 0.3
        latents = vae.encode(audio)
        assert latents.shape == (num_frames, checkpoint.config.latent_dim)
        assert_same(latents, reference_encode(checkpoint, audio))


@each_kind
@each_kernels
def test_encoding_in_pieces_of_any_length(
    kind: str, implementation: str, load: Load, build: Build
) -> None:
    checkpoint, vae = load(kind), build(kind, implementation)
    hop = checkpoint.config.hop
    audio = random(11 * hop, seed=7) * 0.3
    expected = reference_encode(checkpoint, audio)
    for size in (hop, 3 * hop, hop - 1, hop + 1, 777, 101):
        encoder = AudioEncoder(vae)
        pieces = [encoder.push(part) for part in torch.split(audio, size)]
        assert_same(torch.cat(pieces), expected)


def test_recordings_do_not_meet(build: Build) -> None:
    vae = build("v1.5", "cpu")
    audio = random(2, 5 * vae.config.hop) * 0.3
    encoders = [AudioEncoder(vae), AudioEncoder(vae)]
    parts = [[], []]  # type: list[list[Tensor]]
    for start in range(0, audio.shape[1], 1000):
        for which in (0, 1):
            parts[which].append(encoders[which].push(audio[which, start : start + 1000]))
    for which in (0, 1):
        torch.testing.assert_close(torch.cat(parts[which]), vae.encode(audio[which]))


def test_a_recording_that_is_not_padded(build: Build) -> None:
    with pytest.raises(ValueError, match="multiple of 640"):
        build("v1", "torch").encode(torch.zeros(641))


def test_an_output_rate_of_another_bucket(load: Load) -> None:
    """VoxCPM2 conditions its decoder on the bucket of the rate; a boundary is in the lower one."""
    config, tensors, reference = load("v2")
    latents, slots = random(1, 3, config.latent_dim), torch.tensor([0])
    for rate in (16000, 20000, 24000, 30001, 44100):
        vae = AudioVAE(replace(config, out_sample_rate=rate), tensors, kernels_of("torch"), CPU)
        wave = vae.decode(latents, vae.new_decoder_state(1), slots)
        with torch.inference_mode():
            condition = torch.tensor([rate], dtype=torch.int32)
            expected = reference.decode(latents.transpose(1, 2), condition)[:, 0]
        assert_same(wave, expected)


def test_dense_convolutions_are_not_supported(load: Load) -> None:
    config, tensors, _ = load("v1")
    with pytest.raises(UnsupportedModelError, match="depthwise"):
        AudioVAE(replace(config, depthwise=False), tensors, kernels_of("torch"), CPU)


def test_the_published_sizes() -> None:
    """Parameters, and what a stream remembers, as counted in the releases."""
    v1_5 = {
        "encoder_dim": 64,
        "encoder_rates": [2, 3, 6, 7, 7],
        "decoder_dim": 2048,
        "decoder_rates": [7, 7, 6, 3, 2],
        "sample_rate": 44100,
    }
    cases: tuple[tuple[dict[str, Any], bool, float, int], ...] = (
        ({}, False, 26.9, 640),
        (v1_5, False, 42.9, 1764),
        ({}, True, 45.8, 1920),
    )
    for raw, is_v2, millions, hop in cases:
        config = AudioVAEConfig.from_dict(raw, is_v2)
        shapes = expected_tensors(config)
        sizes = [torch.Size(s).numel() for n, s in shapes.items() if n.startswith("decoder.")]
        assert sum(sizes) / 1e6 == pytest.approx(millions, abs=0.06)
        assert config.decoder_hop == hop
        assert context_frames(config) in (19, 20, 21)
