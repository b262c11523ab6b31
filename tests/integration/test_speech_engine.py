"""Speech through the whole engine, held to the reference package with the same noise."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.batch import UNUSABLE_PATCH, EngineOutput
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import InvalidRequestError
from nanovllm.models.voxcpm.config import VoxCPMConfig
from nanovllm.runners.random_draws import gaussians
from tests.speech_engines import Ask, Spoken, error, keys_of, make_engine, speak, spoken
from tests.voxcpm_oracle import draw_noise, encode_prompt, golden, load_reference

KINDS = ("v1", "v1.5", "v2")
NUM_PATCHES = 6
TARGET = "hello world, how is it"
PROMPT_TEXT = "the other day. "
CLOSE = 1e-5


class Oracle:
    """A tiny checkpoint whose stop head never stops, and what the reference says with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shape = VoxCPMConfig.from_directory(directory)
        self.model = load_reference(directory)
        self.noises = draw_noise(self.model, NUM_PATCHES)
        self.tokenize: Callable[[str], list[int]] = self.model.text_tokenizer
        generator = torch.Generator().manual_seed(5)
        # 11 patches are more frames than the decoder looks back.
        num_samples = 11 * self.shape.patch_size * self.shape.vae.hop - 100
        wave = torch.randn(1, num_samples, generator=generator) * 0.3
        self.prompt = encode_prompt(self.model, wave)
        self.reference = encode_prompt(self.model, wave.flip(1)[:, : num_samples // 2], "right")
        self.engine: LLMEngine | None = None
        self.spoken: dict[object, Spoken] = {}

    def ask(self, mode: str, **options: Any) -> Ask:
        """The request for a mode."""
        prompt, reference = self.voices(mode)
        text = PROMPT_TEXT + TARGET if prompt is not None else TARGET
        keys, latents = keys_of(self.tokenize(text), prompt, reference)
        return Ask(keys, latents, max_patches=NUM_PATCHES, options=options)

    def says(self, mode: str, **options: Any) -> Tensor:
        """The patches that the reference generates, `[num_patches, P, D]`."""
        prompt, reference = self.voices(mode)
        voice: dict[str, Any] | None = None if mode == "zero_shot" else {"mode": mode}
        if voice is not None and prompt is not None:
            voice |= {"prompt_text": PROMPT_TEXT, "audio_feat": prompt}
        if voice is not None and reference is not None:
            voice |= {"ref_audio_feat": reference}
        record = golden(
            self.model, TARGET, self.noises, cache=voice, max_len=NUM_PATCHES, **options
        )
        return record["patch"].transpose(1, 2)

    def wave_of(self, patches: Tensor, mode: str) -> Tensor:
        """The reference's offline decode of a prompt's last patches and these, less the former."""
        prompt, _ = self.voices(mode)
        before = patches[:0] if prompt is None else prompt
        frames = torch.cat([before, patches]).flatten(0, 1)
        with torch.inference_mode():
            wave: Tensor = self.model.audio_vae.decode(frames.T[None])[0, 0]
        return wave[len(before) * self.shape.samples_per_patch :]

    def voices(self, mode: str) -> tuple[Tensor | None, Tensor | None]:
        """Speech to be continued, and a reference."""
        return (
            self.prompt if mode.endswith("continuation") else None,
            self.reference if mode.startswith("ref") else None,
        )

    def noise(self, _seed: int, patch_index: int) -> Tensor:
        return self.noises[patch_index][0].T.contiguous()


@pytest.fixture(scope="module")
def oracle(speech_checkpoint: Callable[..., Path]) -> Callable[[str], Oracle]:
    """Return a function from a kind of model to its oracle."""
    return cache(lambda kind: Oracle(speech_checkpoint(kind, stop_bias=-1.0)))


MODES = [
    (kind, mode)
    for kind in KINDS
    for mode in ("zero_shot", "continuation", "reference", "ref_continuation")
    if kind == "v2" or not mode.startswith("ref")
]


@pytest.mark.parametrize(("kind", "mode"), MODES)
def test_patches_and_waves_are_those_of_the_reference(
    oracle: Callable[[str], Oracle], kind: str, mode: str
) -> None:
    voice = oracle(kind)
    engine, runner = make_engine(voice.directory)
    runner.noise_source = voice.noise
    ours = speak(engine, [voice.ask(mode)], voice.shape)[0]
    assert ours.finish_reason == "length"
    assert error(ours.patches, voice.says(mode)) < CLOSE
    assert error(ours.audio, voice.wave_of(torch.from_numpy(ours.patches), mode)) < CLOSE


@pytest.mark.parametrize(("timesteps", "cfg_value"), [(2, 2.0), (4, 1.0), (17, 3.5)])
def test_a_request_has_its_own_timesteps_and_guidance(
    oracle: Callable[[str], Oracle], timesteps: int, cfg_value: float
) -> None:
    voice = oracle("v2")
    engine, runner = make_engine(voice.directory)
    runner.noise_source = voice.noise
    ask = voice.ask("zero_shot", inference_timesteps=timesteps, cfg_value=cfg_value)
    ours = speak(engine, [ask], voice.shape)[0]
    theirs = voice.says("zero_shot", timesteps=timesteps, cfg_value=cfg_value)
    assert error(ours.patches, theirs) < CLOSE


def mixed(voice: Oracle) -> list[Ask]:
    """Requests of all modes, lengths, settings and seeds."""
    words = ["the", "hello", "world", "now", "other", "day", "today", "two", "three"]
    modes = [mode for kind, mode in MODES if kind == ("v2" if voice.shape.is_v2 else "v1")]
    asks = []
    for index in range(12):
        prompt, reference = voice.voices(modes[index % len(modes)])
        text = " ".join(words[(index + i) % len(words)] for i in range(1 + 7 * index % 11))
        keys, latents = keys_of(
            voice.tokenize(text),
            None if prompt is None else prompt[index % 7 :],
            None if reference is None else reference[: 1 + index % 5],
        )
        options = {
            "inference_timesteps": (10, 4, 7)[index % 3],
            "cfg_value": (2.0, 1.0, 0.0, 3.5)[index % 4],
            "temperature": (1.0, 0.6)[index % 2],
        }
        asks.append(Ask(keys, latents, index, 3 + 5 * index % 9, options))
    return asks


def alone(voice: Oracle, asks: list[Ask]) -> list[Spoken]:
    """Each request in an engine to itself, as it were; each is run once."""
    if voice.engine is None:
        voice.engine, _ = make_engine(voice.directory, enable_prefix_caching=False)
    for ask in asks:
        if ask.identity not in voice.spoken:
            voice.spoken[ask.identity] = speak(voice.engine, [ask], voice.shape)[0]
    return [voice.spoken[ask.identity] for ask in asks]


def assert_alike(ours: list[Spoken], expected: list[Spoken]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.finish_reason == other.finish_reason
        assert error(one.patches, other.patches) < 10 * CLOSE
        assert error(one.audio, other.audio) < 10 * CLOSE


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_seqs": 12}, id="together"),
        pytest.param({"max_num_seqs": 3}, id="few slots"),
        pytest.param({"max_num_batched_tokens": 12}, id="chunked"),
        pytest.param({"num_kv_blocks": 44, "block_size": 2}, id="few blocks"),
        pytest.param({"block_size": 4, "enable_prefix_caching": False}, id="no prefix cache"),
    ],
)
def test_requests_together_are_as_each_of_them_alone(
    oracle: Callable[[str], Oracle], options: dict[str, Any], depth: int
) -> None:
    voice = oracle("v2")
    asks = mixed(voice)
    engine, _ = make_engine(voice.directory, async_scheduling=bool(depth), **options)
    ours = speak(engine, asks, voice.shape)
    assert_alike(ours, alone(voice, asks))
    stats = engine.stats()
    assert (stats.num_preemptions > 0) == (options.get("num_kv_blocks") is not None)
    assert stats.num_used_blocks == 0
    assert engine.scheduler.num_free_slots == engine.scheduler.max_num_seqs


@pytest.mark.parametrize("kind", ["v1", "v1.5"])
def test_the_other_kinds_share_an_engine_as_well(
    oracle: Callable[[str], Oracle], kind: str
) -> None:
    voice = oracle(kind)
    asks = mixed(voice)
    engine, _ = make_engine(voice.directory, num_kv_blocks=44, block_size=2)
    assert_alike(speak(engine, asks, voice.shape), alone(voice, asks))
    assert engine.stats().num_preemptions > 0


def test_a_voice_that_is_known_is_not_computed_again(oracle: Callable[[str], Oracle]) -> None:
    voice = oracle("v2")
    engine, _ = make_engine(voice.directory, block_size=2)
    ask = voice.ask("ref_continuation")
    first, second = (speak(engine, [ask], voice.shape)[0] for _ in range(2))
    assert error(second.patches, first.patches) < CLOSE
    assert error(second.audio, first.audio) < CLOSE
    assert engine.stats().num_cached_tokens == (len(ask.keys) - 1) // 2 * 2
    # Another recording behind the same text shares only what comes before it.
    other = Ask(*keys_of(voice.tokenize(PROMPT_TEXT + TARGET), voice.prompt + 0.1, voice.reference))
    before = engine.stats().num_cached_tokens
    assert (
        error(speak(engine, [other], voice.shape)[0].patches, alone(voice, [other])[0].patches)
        < CLOSE
    )
    num_shared = len(ask.keys) - len(voice.prompt)
    assert engine.stats().num_cached_tokens - before == num_shared // 2 * 2


def test_seeds_alone_decide_what_is_said(oracle: Callable[[str], Oracle]) -> None:
    voice = oracle("v1")
    keys, _ = keys_of(voice.tokenize(TARGET))
    engine, _ = make_engine(voice.directory)
    asks = [Ask(keys, seed=seed) for seed in (7, 7, 8)]
    same, again, other = speak(engine, asks, voice.shape)
    assert error(again.patches, same.patches) < CLOSE
    assert error(other.patches, same.patches) > 0.01
    crowd = [*mixed(voice), Ask(keys, seed=7)]
    assert error(speak(engine, crowd, voice.shape)[-1].audio, same.audio) < 10 * CLOSE


@pytest.mark.parametrize("depth", [0, 1])
def test_the_shortest_speech_is_two_patches_more_than_min_len(
    speech_checkpoint: Callable[..., Path], depth: int
) -> None:
    directory = speech_checkpoint("v1", stop_bias=1.0)
    shape = VoxCPMConfig.from_directory(directory)
    engine, _ = make_engine(directory, async_scheduling=bool(depth))
    keys, _ = keys_of([5, 6, 7, 8])
    asks = [Ask(keys, max_patches=20, options={"min_len": n}) for n in (0, 2, 5)]
    asks.append(Ask(keys, max_patches=3, options={"min_len": 5}))
    ours = speak(engine, asks, shape)
    assert [len(one.patches) for one in ours] == [2, 4, 7, 3]
    assert [one.finish_reason for one in ours] == ["stop"] * 3 + ["length"]


@pytest.mark.parametrize("depth", [0, 1])
def test_cancelled_speech_leaves_nothing_behind(
    oracle: Callable[[str], Oracle], depth: int
) -> None:
    voice = oracle("v2")
    engine, runner = make_engine(voice.directory, max_num_seqs=4, async_scheduling=bool(depth))
    asks = mixed(voice)
    seq_ids = [ask.add_to(engine) for ask in asks]
    news: dict[int, list[EngineOutput]] = {seq_id: [] for seq_id in seq_ids}
    for step in range(1000):
        if not engine.has_unfinished:
            break
        for output in engine.step():
            news[output.seq_id].append(output)
        if step == 3:
            for seq_id in seq_ids[::2]:
                engine.abort(seq_id)
    assert_alike(
        [spoken(news[seq_id], voice.shape) for seq_id in seq_ids[1::2]],
        alone(voice, asks[1::2]),
    )
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert engine.scheduler.num_free_slots == 4
    assert len(runner._slots) <= 4


@pytest.mark.parametrize("depth", [0, 1])
def test_paused_speech_goes_on_where_it_was(oracle: Callable[[str], Oracle], depth: int) -> None:
    """Also where others needed its slot meanwhile."""
    voice = oracle("v1.5")
    asks = [ask for ask in mixed(voice) if ask.max_patches > 4]
    engine, _ = make_engine(voice.directory, max_num_seqs=2, async_scheduling=bool(depth))
    seq_ids = [ask.add_to(engine) for ask in asks]
    news: dict[int, list[EngineOutput]] = {seq_id: [] for seq_id in seq_ids}
    steps: Iterator[int] = iter(range(1000))
    while engine.has_unfinished:
        step = next(steps)
        if step == 2:
            engine.pause(seq_ids[:2], True)
        if not engine.has_work:
            assert all(len(news[seq_id]) < 5 for seq_id in seq_ids[:2])
            engine.pause(seq_ids[:2], False)
        for output in engine.step():
            news[output.seq_id].append(output)
    assert engine.stats().num_preemptions == 2
    assert_alike([spoken(news[seq_id], voice.shape) for seq_id in seq_ids], alone(voice, asks))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_around_it_speech_is_as_alone(
    oracle: Callable[[str], Oracle], seed: int, depth: int
) -> None:
    """Random arrivals, cancellations and pauses, with too few slots and blocks for all."""
    voice = oracle(KINDS[seed % 3])
    asks, chance = mixed(voice), random.Random(seed)
    engine, _ = make_engine(
        voice.directory,
        max_num_seqs=4,
        num_kv_blocks=44,
        block_size=2,
        max_num_batched_tokens=chance.choice([5, 16, 64]),
        async_scheduling=bool(depth),
    )
    asked: dict[int, Ask] = {}
    news: dict[int, list[EngineOutput]] = {}
    paused: set[int] = set()
    to_come = asks * 3
    while to_come or engine.has_unfinished:
        if to_come and chance.random() < 0.4:
            ask = to_come.pop(chance.randrange(len(to_come)))
            seq_id = ask.add_to(engine)
            asked[seq_id], news[seq_id] = ask, []
        if asked and chance.random() < 0.1:
            engine.abort(chance.choice(list(asked)))
        if asked and chance.random() < 0.3:
            seq_id = chance.choice(list(asked))
            engine.pause([seq_id], seq_id not in paused)
            paused ^= {seq_id}
        if not engine.has_work:
            engine.pause(list(paused), False)
            paused.clear()
        for output in engine.step():
            news[output.seq_id].append(output)
    ended = [seq_id for seq_id in asked if news[seq_id] and news[seq_id][-1].finish_reason]
    assert len(ended) > len(asked) // 2
    assert_alike(
        [spoken(news[seq_id], voice.shape) for seq_id in ended],
        alone(voice, [asked[seq_id] for seq_id in ended]),
    )
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_used_blocks == 0


def test_a_patch_that_is_not_finite_ends_its_request_alone(
    oracle: Callable[[str], Oracle],
) -> None:
    voice = oracle("v2")
    engine, runner = make_engine(voice.directory, max_num_seqs=3)
    asks = [Ask(*keys_of(voice.tokenize(TARGET)), seed=seed) for seed in (1, 2, 3, 4, 5)]
    expected = alone(voice, asks)
    shape = (voice.shape.patch_size, voice.shape.feat_dim)

    def noise(seed: int, patch_index: int) -> Tensor:
        if seed == 2 and patch_index == 3:
            return torch.full(shape, torch.nan)
        rows = np.array([seed], np.uint64), np.array([patch_index], np.uint64)
        return torch.from_numpy(gaussians(*rows, shape[0] * shape[1])).view(shape)

    runner.noise_source = noise
    ours = speak(engine, asks, voice.shape)
    assert (ours[1].finish_reason, ours[1].stop_reason) == ("error", UNUSABLE_PATCH)
    assert error(ours[1].patches, expected[1].patches[:3]) < CLOSE
    assert_alike([*ours[:1], *ours[2:]], [*expected[:1], *expected[2:]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_is_encoded_in_slices_as_in_one_go(
    oracle: Callable[[str], Oracle], kind: str
) -> None:
    voice = oracle(kind)
    _, runner = make_engine(voice.directory)
    num_samples = 7 * voice.shape.patch_size * voice.shape.vae.hop
    wave = torch.randn(1, num_samples, generator=torch.Generator().manual_seed(1)) * 0.3
    encoding = runner.encode(wave.numpy().tobytes())
    for num_frames in (1, 1, 3, 2):
        encoding.advance(num_frames)
    encoding.advance(encoding.num_frames_left)
    ours = np.frombuffer(encoding.latents(), np.float32)
    theirs = encode_prompt(voice.model, wave)
    assert error(ours.reshape(theirs.shape), theirs) < CLOSE


@pytest.mark.parametrize("audio", [b"", b"1234", b"\0" * 4 * 1279, b"\0" * 5])
def test_a_recording_that_is_not_padded_is_refused(
    oracle: Callable[[str], Oracle], audio: bytes
) -> None:
    _, runner = make_engine(oracle("v1").directory)
    with pytest.raises(InvalidRequestError, match="not padded to a multiple of 1280"):
        runner.encode(audio)


def test_a_recording_must_be_finite(oracle: Callable[[str], Oracle]) -> None:
    _, runner = make_engine(oracle("v1").directory)
    with pytest.raises(InvalidRequestError, match="NaN"):
        runner.encode(np.full(1280, np.nan, np.float32).tobytes())
