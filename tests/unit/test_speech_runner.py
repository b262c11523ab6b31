"""The speech runner without an engine: what is fed, what is kept, and what noise is made of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.batch import (
    UNUSABLE_PATCH,
    Batch,
    Key,
    SlotStart,
    SpeechRequest,
    Stop,
    TextRequest,
    patch_key,
)
from nanovllm.bench.speech_shapes import RELEASES, write_release
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.runners.captured_tail import MAX_TIMESTEPS
from nanovllm.runners.graphs import capture_sizes
from nanovllm.runners.memory import GRAPH_LAYER_BYTES, graph_bytes
from nanovllm.runners.random_draws import gaussians
from nanovllm.runners.speech import SpeechRunner, SpeechStep
from nanovllm.sampling_params import SamplingParams
from tests.speech_engines import error, make_engine, patch_keys

TEXT: list[Key] = [5, 6, 7, 101]


@pytest.fixture(scope="module")
def runner(speech_checkpoint: Callable[..., Path]) -> SpeechRunner:
    return make_engine(speech_checkpoint("v2", stop_bias=1.0), block_size=4)[1]


class Voice:
    """A sequence in a slot of a runner, stepped by hand; its blocks are those of its slot."""

    def __init__(
        self, runner: SpeechRunner, slot: int, keys: list[Key], request: SpeechRequest
    ) -> None:
        self.runner, self.slot, self.keys, self.request = runner, slot, keys, request
        self.num_prompt, self.num_computed = len(keys), 0

    def start(self, batch: Batch) -> None:
        """Take the slot, new or again."""
        start = SlotStart(
            self.slot, list(self.keys), self.num_prompt, SamplingParams(), 0, 7, None, self.request
        )
        batch.started.append(start)
        batch.new_blocks.append((self.slot, 0, list(range(self.slot * 16, self.slot * 16 + 16))))
        self.num_computed = 0

    def row(self, batch: Batch, length: int | None = None) -> None:
        """Compute what is left, or so much of it."""
        num_left = len(self.keys) - self.num_computed
        length = num_left if length is None else length
        batch.slots.append(self.slot)
        batch.starts.append(self.num_computed)
        batch.lengths.append(length)
        batch.emits.append(length == num_left)
        self.num_computed += length


def launch(batch: Batch, runner: SpeechRunner) -> SpeechStep:
    handle = runner.launch(batch)
    assert isinstance(handle, SpeechStep)
    return handle


def patches_of(shape: VoxCPMConfig, num_patches: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_patches, shape.patch_size, shape.feat_dim, generator=generator)


def steps_of(voice: Voice, num_steps: int) -> list[tuple[bytes, bytes]]:
    """Audio and latents of some steps, from the start."""
    batch, made = Batch(0), []
    voice.start(batch)
    for _ in range(num_steps):
        voice.row(batch)
        (result,) = voice.runner.collect(launch(batch, voice.runner))
        voice.keys.append(result.key)
        made.append((result.payload.audio, result.payload.latents))
        batch = Batch(0)
    return made


def test_a_result_is_a_patch_with_its_sound_and_its_key(runner: SpeechRunner) -> None:
    shape, request = runner.model.config, SpeechRequest(min_len=1)
    voice = Voice(runner, 0, list(TEXT), request)
    batch = Batch(0)
    voice.start(batch)
    stops = []
    for index in range(4):
        voice.row(batch)
        (result,) = runner.collect(launch(batch, runner))
        assert len(result.payload.latents) == 4 * shape.patch_size * shape.feat_dim
        assert len(result.payload.audio) == 4 * shape.samples_per_patch
        assert result.key == patch_key(result.payload.latents)
        assert request.generated[index:] == [result.payload.latents]
        stops.append(result.stop)
        voice.keys.append(result.key)
        batch = Batch(0)
    assert stops == [None, None, Stop("stop"), Stop("stop")]


def test_text_and_patches_are_fed_in_order_whatever_the_rows(runner: SpeechRunner) -> None:
    """A row in the middle of a prompt, one that decodes, and one whose last position is left."""
    shape = runner.model.config
    first, second = patches_of(shape, 3, 1), patches_of(shape, 2, 2)
    decoding = Voice(runner, 0, list(TEXT), SpeechRequest())
    steps_of(decoding, 1)
    keys = [103, *patch_keys(first), 104, *TEXT, *patch_keys(second)]
    request = SpeechRequest(torch.cat([first, second]).numpy().tobytes())
    chunked, ending = (Voice(runner, slot, list(keys), request) for slot in (1, 2))
    batch = Batch(0)
    for voice in (chunked, ending):
        voice.start(batch)
    chunked.num_computed, ending.num_computed = 2, len(keys) - 1
    for voice in (decoding, ending):
        voice.row(batch)
    chunked.row(batch, 5)

    for start in batch.started:
        runner._start_slot(start)
    columns = batch.slots, batch.starts, batch.lengths, batch.emits
    slots, starts, lengths, emits = map(np.array, columns)
    rows = runner._lay_out(slots, starts, lengths, emits)
    token_ids, is_audio, fed = runner._inputs(rows)

    assert token_ids.tolist() == [0, 0, 0, 0, 104, 5, 6]
    assert is_audio.tolist() == [True, True, True, True, False, False, False]
    assert torch.equal(
        fed[0],
        torch.tensor(np.frombuffer(decoding.request.generated[0], np.float32)).view_as(fed[0]),
    )
    assert torch.equal(fed[1:], torch.stack([second[1], first[1], first[2]]))


def test_the_condition_is_the_last_patch_only_behind_audio(runner: SpeechRunner) -> None:
    shape = runner.model.config
    patches = patches_of(shape, 2)
    latents = patches.numpy().tobytes()
    reference = Voice(runner, 0, [103, *patch_keys(patches), 104, *TEXT], SpeechRequest(latents))
    continued = Voice(runner, 1, [*TEXT, *patch_keys(patches)], SpeechRequest(latents))
    batch = Batch(0)
    for voice in (reference, continued):
        voice.start(batch)
    for start in batch.started:
        runner._start_slot(start)
    last_patches = runner._speech_tail.last_patches
    assert not last_patches[0].any()
    assert torch.equal(last_patches[1], patches[1])


@pytest.mark.parametrize("num_prompt_patches", [0, 1, 9])
def test_a_sequence_goes_on_from_what_it_had(runner: SpeechRunner, num_prompt_patches: int) -> None:
    """Results that never became keys are made again; nothing is fed twice or left out."""
    patches = patches_of(runner.model.config, num_prompt_patches)
    keys = [*TEXT, *patch_keys(patches)]
    request = SpeechRequest(patches.numpy().tobytes())
    expected = steps_of(Voice(runner, 0, list(keys), request), 6)

    request = SpeechRequest(patches.numpy().tobytes())
    voice = Voice(runner, 0, list(keys), request)
    steps_of(voice, 4)
    del voice.keys[len(keys) + 3 :]
    assert len(request.generated) == 4
    batch = Batch(0, released=[0])
    voice.start(batch)
    resumed = []
    for _ in range(3):
        voice.row(batch)
        (result,) = runner.collect(launch(batch, runner))
        resumed.append((result.payload.audio, result.payload.latents))
        voice.keys.append(result.key)
        batch = Batch(0)
    for ours, theirs in zip(resumed, expected[3:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert error(np.frombuffer(one, np.float32), np.frombuffer(other, np.float32)) < 1e-4
    assert len(request.generated) == 6


def test_a_result_that_comes_after_its_sequence_has_left_is_not_kept(runner: SpeechRunner) -> None:
    request, other = SpeechRequest(), SpeechRequest()
    batch, next_batch = Batch(0), Batch(1, released=[0])
    voice, newcomer = (Voice(runner, 0, list(TEXT), r) for r in (request, other))
    voice.start(batch)
    voice.row(batch)
    in_flight = launch(batch, runner)
    newcomer.start(next_batch)
    newcomer.row(next_batch)
    following = launch(next_batch, runner)
    assert len(runner.collect(in_flight)) == 1
    assert (request.generated, other.generated) == ([], [])
    runner.collect(following)
    assert (len(request.generated), len(other.generated)) == (0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_ends_its_row_and_leaves_no_trace(
    runner: SpeechRunner, bad: float
) -> None:
    shape = runner.model.config
    expected = steps_of(Voice(runner, 0, list(TEXT), SpeechRequest()), 3)

    latents = np.full((1, shape.patch_size, shape.feat_dim), bad, np.float32)
    keys = [*TEXT, *patch_keys(torch.from_numpy(latents))]
    batch = Batch(0)
    spoilt, fine = (
        Voice(runner, 1, keys, SpeechRequest(latents.tobytes())),
        Voice(runner, 0, list(TEXT), SpeechRequest()),
    )
    for voice in (spoilt, fine):
        voice.start(batch)
        voice.row(batch)
    wrong, right = runner.collect(launch(batch, runner))
    assert wrong.stop == Stop("error", UNUSABLE_PATCH)
    assert spoilt.request.generated == []
    assert right.stop is None
    assert (
        error(
            np.frombuffer(right.payload.audio, np.float32),
            np.frombuffer(expected[0][0], np.float32),
        )
        < 1e-4
    )
    # Whoever has the slot next does not notice.
    after = steps_of(Voice(runner, 1, list(TEXT), SpeechRequest()), 3)
    assert (
        error(np.frombuffer(after[2][0], np.float32), np.frombuffer(expected[2][0], np.float32))
        < 1e-4
    )


def test_patches_and_positions_must_go_together(runner: SpeechRunner) -> None:
    batch = Batch(0)
    Voice(runner, 0, [*TEXT, b"digest"], SpeechRequest()).start(batch)
    with pytest.raises(ValueError, match="0 patches for 1 audio positions"):
        runner._start_slot(batch.started[0])


@pytest.mark.parametrize(
    ("keys", "payload", "message"),
    [
        ([5, 101], TextRequest(), "speech model"),
        ([5, 512], SpeechRequest(), "not in the vocabulary of 512"),
        ([5, -1], SpeechRequest(), "not in the vocabulary"),
        ([5, b"digest"], SpeechRequest(), "1 audio positions need 256 bytes of latents, got 0"),
        ([5, b"digest"], SpeechRequest(b"1234" * 63), "need 256 bytes of latents, got 252"),
        ([5], SpeechRequest(b"1234" * 64), "0 audio positions need 0 bytes"),
        ([5, b"digest"], SpeechRequest(b"\xff" * 256), "NaN"),
    ],
)
def test_what_would_fail_a_step_is_refused(
    runner: SpeechRunner, keys: list[Key], payload: object, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        runner.check(keys, payload)


def test_what_is_well_is_not_refused(runner: SpeechRunner) -> None:
    runner.check([0, 511, b"digest"], SpeechRequest(b"1234" * 64))
    runner.check(TEXT, SpeechRequest())


def test_temperature_is_a_factor_on_the_noise(runner: SpeechRunner) -> None:
    settings = np.zeros(3, runner._settings.dtype)
    settings["seed"], settings["temperature"] = 7, [1.0, 0.5, 0.0]
    noise = runner._noise(settings, np.array([2, 2, 2]))
    assert noise.dtype == np.float32
    assert np.array_equal(noise[1], noise[0] / 2)
    assert not noise[2].any()


def test_each_patch_has_noise_of_its_own(runner: SpeechRunner) -> None:
    settings = np.zeros(4, runner._settings.dtype)
    settings["seed"], settings["temperature"] = [7, 7, 8, 7], 1.0
    noise = runner._noise(settings, np.array([2, 3, 2, 2]))
    assert np.array_equal(noise[3], noise[0])
    for other in noise[1:3]:
        assert np.abs(other - noise[0]).max() > 0.1


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("num_streams", [1, 8, 64, 256, 512])
def test_memory_is_left_for_all_graphs(tmp_path: Path, release: str, num_streams: int) -> None:
    """Of all numbers of timesteps, with adapters and without."""
    shape = VoxCPMConfig.from_directory(write_release(tmp_path, release))
    config = EngineConfig(max_num_seqs=num_streams).resolved_for("cuda")
    vae_layers = 4 * len(shape.vae.decoder_rates) + 3
    layers = shape.num_layers + shape.encoder.num_layers
    layers += MAX_TIMESTEPS * shape.dit.num_layers + 2 * vae_layers
    num_sizes = len(capture_sizes(None, num_streams))
    held = num_streams * 4 * (shape.num_row_values + 4 * shape.samples_per_patch)
    needed = held + 2 * num_sizes * layers * GRAPH_LAYER_BYTES
    assert needed <= graph_bytes(config, shape) + (1 << 30)


def test_draws_depend_on_seed_and_position_alone() -> None:
    seeds = np.array([1, 2, 1, 2**64 - 1], np.uint64)
    positions = np.array([0, 0, 1, 5], np.uint64)
    together = gaussians(seeds, positions, 63)
    assert together.dtype == np.float32
    for row in range(4):
        alone = gaussians(seeds[row : row + 1], positions[row : row + 1], 63)
        assert np.array_equal(alone[0], together[row])
    assert len({row.tobytes() for row in together}) == 4
    # The first values do not depend on how many there are.
    assert np.array_equal(gaussians(seeds, positions, 8), together[:, :8])


def test_draws_are_normal_and_do_not_go_together() -> None:
    count = 2000
    draws = gaussians(np.full(count, 3, np.uint64), np.arange(count, dtype=np.uint64), 128)
    values = draws.ravel().astype(np.float64)
    assert np.isfinite(values).all()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((values**power).mean() - moment) < 0.05
    for limit, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert abs((abs(values) > limit).mean() - share) < 0.003
    for other in (draws[1:], np.roll(draws, 1, axis=1)[1:]):
        assert abs(np.corrcoef(draws[:-1].ravel(), other.ravel())[0, 1]) < 0.01
    neighbour = gaussians(np.full(count, 4, np.uint64), np.arange(count, dtype=np.uint64), 128)
    assert abs(np.corrcoef(values, neighbour.ravel())[0, 1]) < 0.01
