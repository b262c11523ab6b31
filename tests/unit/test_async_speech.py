"""`AsyncSpeech` on tiny checkpoints: what a request gets, whatever happens to it or its engine."""

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import soundfile

from nanovllm import AsyncSpeech, SpeechOutput, SpeechParams
from nanovllm.audio.files import Samples
from nanovllm.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    UnavailableError,
    UnsupportedModelError,
)
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.messages import EncodeAudio
from tests.lora_oracle import write_adapter

T = TypeVar("T")

TEXT = "Once upon a time there was a king."
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "cpu_threads": 1,
}
PATCH_SECONDS = 0.16
SHORT = SpeechParams(seed=3, max_generate_length=5, inference_timesteps=4)
LONG = replace(SHORT, max_generate_length=120)
CLOSE, FAR = 1e-5, 1e-4
"""Peaks are some 0.1; a random decoder cares little for what it decodes."""

Scenario = Callable[[AsyncSpeech], Awaitable[T]]
Run = Callable[[Scenario[Any]], Any]
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def model(speech_checkpoint: Checkpoint) -> Path:
    """A VoxCPM2 that never stops by itself: its lengths are what is asked for."""
    return speech_checkpoint("v2", stop_bias=-1.0)


@pytest.fixture(scope="module")
def run(model: Path) -> Iterator[Run]:
    """Run scenarios one after the other with the same engine."""
    loop = asyncio.new_event_loop()
    speech = AsyncSpeech(str(model), **SMALL, max_unread_seconds=1.0, unread_timeout=20.0)
    yield lambda scenario: loop.run_until_complete(checked(scenario, speech))
    loop.run_until_complete(speech.close())
    loop.close()


def run_alone(scenario: Scenario[T], model: Path, **options: Any) -> T:
    """Run a scenario with engines of its own."""

    async def main() -> T:
        async with AsyncSpeech(str(model), **(SMALL | options)) as speech:
            return await checked(scenario, speech)

    return asyncio.run(main())


async def checked(scenario: Scenario[T], speech: AsyncSpeech) -> T:
    """Run a scenario, after which nothing may be left of its requests."""
    await speech.start()
    result = await asyncio.wait_for(scenario(speech), 60)
    assert await settled(speech)
    return result


async def settled(speech: AsyncSpeech) -> bool:
    """Whether nothing is left of any request, as soon as the engines have said so."""
    for _ in range(1000):
        stats = speech.stats()
        engines = [worker.engine for worker in stats.workers]
        left = [(e.num_running, e.num_waiting, e.num_paused, e.num_used_blocks) for e in engines]
        if not stats.num_inflight and not any(map(any, left)):
            return not (speech._streams or len(speech._open) or speech._adapters._leased)
        await asyncio.sleep(0.02)
    return False


def recording(seconds: float = 1.0, rate: int = 16000, **options: Any) -> bytes:
    """A WAV file of a tone."""
    times = np.arange(int(seconds * rate)) / rate
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * 220 * times), rate, format="WAV", **options)
    return file.getvalue()


async def say(speech: AsyncSpeech, text: str = TEXT, **options: Any) -> Samples:
    params = options.pop("params", SHORT)
    return await (await speech.generate(text, params, **options)).read()


def error(found: Samples, expected: Samples) -> float:
    return float(np.abs(found - expected).max())


def test_a_chunk_a_patch_and_an_output_that_says_what_happened(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> tuple[list[Samples], SpeechOutput]:
        stream = await speech.generate(TEXT, SHORT, keep_latents=True)
        return [chunk async for chunk in stream], stream.output

    chunks, output = run(scenario)
    assert [(chunk.shape, str(chunk.dtype)) for chunk in chunks] == [((7680,), "float32")] * 5
    assert all(np.abs(chunk).max() <= 1 for chunk in chunks)
    assert (output.num_patches, output.num_samples) == (5, 5 * 7680)
    assert output.duration == pytest.approx(5 * PATCH_SECONDS)
    assert (output.finish_reason, output.sample_rate) == ("length", 48000)
    assert output.num_prompt_tokens == output.num_target_tokens + 1
    assert [len(latents) for latents in output.latents or []] == [4 * 16 * 4] * 5
    times = output.metrics
    assert times.arrival_time < (times.first_token_time or 0) < (times.finished_time or 0)


def test_what_the_model_is(run: Run, model: Path) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        info = speech.info
        assert (info.sample_rate, info.encoder_sample_rate) == (48000, 16000)
        assert (info.feat_dim, info.patch_size, info.samples_per_patch) == (16, 4, 7680)
        assert info.supports_reference
        assert info.model_path == str(model)
        assert (speech.max_model_len, speech.model_id) == (256, model.name)

    run(scenario)
    with pytest.raises(RuntimeError, match="await start"):
        _ = AsyncSpeech(str(model)).info


def test_a_seed_says_what_is_spoken_and_without_one_it_is_new(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> list[Samples]:
        unseeded = replace(SHORT, seed=None)
        asked = [SHORT, SHORT, replace(SHORT, seed=4), unseeded, unseeded]
        return await asyncio.gather(*(say(speech, params=params) for params in asked))

    first, again, other, *unseeded = run(scenario)
    assert error(first, again) < CLOSE
    for a, b in ((first, other), (first, unseeded[0]), (unseeded[0], unseeded[1])):
        assert error(a, b) > FAR


def test_a_voice_is_encoded_once_and_is_what_its_latents_are(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> list[Samples]:
        prompt_id = await speech.add_prompt(recording(), "wav", "A tone. ")
        before = speech.stats().workers[0].engine
        latents = await speech.encode(recording(), "wav")
        assert speech.stats().workers[0].engine is before  # the engine was not asked
        assert len(latents) == 7 * 4 * 16 * 4  # 16000 samples are 6.25 patches of 2560
        named = await say(speech, voice=prompt_id)
        given = await say(speech, prompt_latents=latents, prompt_text="A tone. ")
        reference = await speech.encode(recording(), "wav", "right")
        spoken_as = await say(speech, ref_audio_latents=reference)
        both = await say(speech, voice=prompt_id, ref_audio_latents=reference)
        speech.remove_prompt(prompt_id)
        with pytest.raises(InvalidRequestError, match=f"Prompt with id {prompt_id} not found"):
            await say(speech, voice=prompt_id)
        return [named, given, spoken_as, both, await say(speech)]

    named, given, *others = run(scenario)
    assert error(named, given) < CLOSE
    assert all(error(named, other) > FAR for other in others)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "target text must be a non-empty string"),
        ("   \n", {}, "target text must be a non-empty string"),
        (TEXT, {"voice": "x"}, "Prompt with id x not found"),
        (TEXT, {"voice": "../../etc/passwd"}, "not found"),
        (TEXT, {"prompt_text": "x"}, "Prompt text is not allowed when prompt latents"),
        (TEXT, {"prompt_latents": bytes(256)}, "Prompt text is required when prompt latents"),
        (TEXT, {"prompt_latents": bytes(255), "prompt_text": "x"}, "patches of 4 x 16 float32"),
        (TEXT, {"ref_audio_latents": np.full(64, np.nan, "f4").tobytes()}, "NaN"),
        (TEXT, {"lora_name": "x"}, "LoRA 'x' is not registered"),
        ("word " * 20_000, {}, "Prompt is too long for max_model_len"),
    ],
)
def test_bad_requests_are_refused_and_cost_nothing(
    run: Run, text: str, options: dict[str, Any], message: str
) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        num_steps = speech.stats().workers[0].engine.num_steps
        with pytest.raises(InvalidRequestError, match=message):
            await speech.generate(text, SHORT, **options)
        assert speech.stats().workers[0].engine.num_steps == num_steps

    run(scenario)


@pytest.mark.parametrize("audio", [b"", b"RIFF0000", recording(0.001), b"\x00" * 1000])
def test_recordings_that_cannot_be_used_are_refused(run: Run, audio: bytes) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        with pytest.raises(InvalidRequestError):
            await speech.encode(audio, "wav")
        with pytest.raises(InvalidRequestError):
            await speech.add_prompt(audio, "wav", "x")

    run(scenario)


def test_leaving_a_stream_or_dropping_it_ends_the_request(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        streams = [await speech.generate(TEXT, LONG) for _ in range(6)]
        await anext(streams[0])
        await streams[0].aclose()
        assert streams[0].output.finish_reason == "abort"
        await anext(streams[1])
        del streams

    run(scenario)


def test_a_request_is_ended_by_its_name(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        stream = await speech.generate(TEXT, LONG, request_id="mine")
        await anext(stream)
        with pytest.raises(InvalidRequestError, match="still running"):
            await speech.generate(TEXT, LONG, request_id="mine")
        assert await speech.abort("mine")
        assert not await speech.abort("mine")
        assert len(await stream.read()) % 7680 == 0
        assert stream.output.finish_reason == "abort"

    run(scenario)


def test_a_reader_that_is_slow_holds_back_its_own_request_and_loses_nothing(run: Run) -> None:
    params = replace(SHORT, max_generate_length=30)

    async def scenario(speech: AsyncSpeech) -> tuple[Samples, Samples]:
        slow = await speech.generate(TEXT, params)
        while not speech.stats().workers[0].engine.num_paused:
            await asyncio.sleep(0.01)
        held = slow.output.num_patches
        assert 6 <= held < 30  # a second is six patches
        prompt = await say(speech, params=params)
        # What it was ahead by when it was told; it has not gone on since.
        assert slow.output.num_patches < 30
        return await slow.read(), prompt

    slow, prompt = run(scenario)
    assert error(slow, prompt) < CLOSE


def test_a_reader_that_never_comes_is_not_waited_for(model: Path) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        stream = await speech.generate(TEXT, LONG)
        while not stream.output.finished:
            await asyncio.sleep(0.02)
        with pytest.raises(UnavailableError, match="nobody has read"):
            await stream.read()

    # Held back for longer than a step may take: that is no hang.
    run_alone(scenario, model, max_unread_seconds=1.0, unread_timeout=6.0, step_timeout=5.0)


def test_speech_that_goes_astray_is_tried_again_with_the_next_seed(run: Run) -> None:
    # Two patches for a token are reached at once by a model that never stops.
    params = SpeechParams(
        seed=2**64 - 1, retry_badcase=True, retry_badcase_ratio_threshold=0.5, inference_timesteps=4
    )

    async def scenario(speech: AsyncSpeech) -> tuple[Samples, Samples, list[int | None]]:
        seeds: list[int | None] = []
        generate = speech.generate

        async def noted(text: str, params: SpeechParams, **options: Any) -> Any:
            seeds.append(params.seed)
            return await generate(text, params, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speech, "generate", noted)
            audio, output = await speech.speak(TEXT, params)
        assert params.is_bad_case(output.num_patches, output.num_target_tokens)
        alone = await speech.speak(TEXT, replace(params, seed=1, retry_badcase=False))
        return audio, alone.audio, seeds

    audio, alone, seeds = run(scenario)
    assert seeds == [2**64 - 1, 0, 1]
    assert error(audio, alone) < CLOSE


def test_speech_that_is_well_is_not_tried_again(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> tuple[int, int]:
        before = speech.stats().workers[0].engine.num_output_tokens
        await speech.speak(TEXT, replace(SHORT, retry_badcase=True))
        assert await settled(speech)
        return before, speech.stats().workers[0].engine.num_output_tokens

    before, after = run(scenario)
    assert after - before == 5


def test_a_long_text_is_spoken_in_the_voice_of_its_first_sentence(run: Run) -> None:
    sentences = ["(A calm voice) One is here. ", "Two is there. ", "Three."]

    async def scenario(speech: AsyncSpeech) -> tuple[Samples, SpeechOutput, list[Samples]]:
        stream = await speech.generate_long("".join(sentences), SHORT)
        whole = await stream.read()
        first = await speech.generate(sentences[0], SHORT, keep_latents=True)
        parts = [await first.read()]
        voice = {
            "prompt_latents": b"".join(first.output.latents or []),
            "prompt_text": "One is here. ",
        }
        parts += [await say(speech, text, **voice) for text in sentences[1:]]
        return whole, stream.output, parts

    whole, output, parts = run(scenario)
    assert error(whole, np.concatenate(parts)) < CLOSE
    assert (output.num_patches, output.num_samples) == (15, len(whole))
    assert (output.text, output.finish_reason) == ("".join(sentences), "length")


def test_sentences_with_a_voice_all_have_it(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> tuple[Samples, list[Samples]]:
        voice = {"ref_audio_latents": await speech.encode(recording(), "wav", "right")}
        stream = await speech.generate_long("(Calm) One. Two.", SHORT, **voice)
        texts = ["(Calm) One. ", "(Calm) Two."]
        return await stream.read(), [await say(speech, text, **voice) for text in texts]

    whole, parts = run(scenario)
    assert error(whole, np.concatenate(parts)) < CLOSE


@pytest.mark.parametrize("max_generate_length", [None, 200])
def test_a_long_text_goes_on_where_its_first_sentence_takes_most_of_the_context(
    run: Run, max_generate_length: int | None
) -> None:
    params = replace(
        SHORT, max_generate_length=max_generate_length, inference_timesteps=2, cfg_value=1.0
    )

    async def scenario(speech: AsyncSpeech) -> SpeechOutput:
        text = "One two three four five six seven. Two. Three."
        long = await speech.generate_long(text, params)
        await long.read()
        assert long.output.text == text
        return long.output

    output = run(scenario)
    assert output.finish_reason == "length"
    assert output.num_patches > 256  # positions of the context


def test_closing_a_long_text_ends_the_sentence_and_begins_no_more(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        stream = await speech.generate_long("One is here. Two is there. Three.", SHORT)
        for _ in range(6):
            await anext(stream)
        await stream.aclose()
        assert [chunk async for chunk in stream] == []
        with pytest.raises(InvalidRequestError, match="non-empty"):
            await speech.generate_long(" ", SHORT)

    run(scenario)


@pytest.mark.parametrize("is_single", [False, True])
def test_a_long_text_keeps_a_voice_and_an_adapter_that_are_removed(
    model: Path, tmp_path: Path, is_single: bool
) -> None:
    adapter = str(write_adapter(model, tmp_path))
    text = "One is here. Two is there. Three."

    async def scenario(speech: AsyncSpeech) -> tuple[Samples, Samples]:
        if is_single:
            await speech.single_lora.load(adapter)
        else:
            await speech.register_lora("low", adapter)
        (name,) = speech.list_loras()
        options = {"voice": await speech.add_prompt(recording(), "wav", "A tone.")}
        options |= {} if is_single else {"lora_name": name}
        whole = await (await speech.generate_long(text, SHORT, **options)).read()

        long = await speech.generate_long(text, SHORT, **options)
        chunks = [await anext(long)]
        speech.remove_prompt(options["voice"])
        gone = asyncio.ensure_future(
            speech.single_lora.reset() if is_single else speech.unregister_lora(name)
        )
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError, match="is draining"):
            await say(speech, lora_name=name)
        while len(chunks) < 11:  # the last sentence has been queued, and not ended
            assert not gone.done()
            chunks.append(await anext(long))
        chunks += [chunk async for chunk in long]
        await gone
        assert speech.list_loras() == []
        return whole, np.concatenate(chunks)

    whole, kept = run_alone(scenario, model, enable_lora=True)
    assert len(kept) == 15 * 7680
    assert error(whole, kept) < CLOSE


def test_a_long_text_that_is_left_dropped_or_refused_gives_its_adapter_back(
    model: Path, tmp_path: Path
) -> None:
    adapter = str(write_adapter(model, tmp_path))

    async def scenario(speech: AsyncSpeech) -> None:
        await speech.register_lora("low", adapter)
        options: dict[str, Any] = {"lora_name": "low"}
        left, dropped = [await speech.generate_long("One. Two.", LONG, **options) for _ in range(2)]
        await left.aclose()
        del dropped
        for bad in ({"voice": "none"}, {"prompt_text": "x"}):
            for speak in (speech.generate_long, speech.speak):
                with pytest.raises(InvalidRequestError):
                    await speak("One. Two.", SHORT, **options, **bad)
        await speech.speak("One.", SHORT, **options)
        await asyncio.wait_for(speech.unregister_lora("low"), 30)

    run_alone(scenario, model, enable_lora=True)


def test_an_adapter_for_who_names_none_does_not_join_a_text_that_has_begun(
    model: Path, tmp_path: Path
) -> None:
    adapter = str(write_adapter(model, tmp_path))

    async def scenario(speech: AsyncSpeech) -> tuple[Samples, Samples, Samples]:
        plain = await (await speech.generate_long("One. Two.", SHORT)).read()
        long = await speech.generate_long("One. Two.", SHORT)
        chunks = [await anext(long)]
        await speech.single_lora.load(adapter)
        chunks += [chunk async for chunk in long]
        adapted = await (await speech.generate_long("One. Two.", SHORT)).read()
        return plain, np.concatenate(chunks), adapted

    plain, begun, adapted = run_alone(scenario, model, enable_lora=True)
    assert error(plain, begun) < CLOSE
    assert error(plain, adapted) > FAR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None}, "target text must be a non-empty string"),
        ({"text": b"One."}, "target text must be a non-empty string"),
        ({"params": {"seed": 3}}, "params must be SpeechParams, got dict"),
        ({"prompt_text": None}, "prompt_text must be a string, got NoneType"),
        (
            {"prompt_latents": np.zeros(64, "f4"), "prompt_text": "x"},
            r"prompt_latents must be bytes, as encode\(\) returns them, got ndarray",
        ),
        ({"ref_audio_latents": "me.wav"}, "ref_audio_latents must be bytes, as .*, got str"),
        ({"priority": "x"}, "priority must be an integer, got 'x'"),
        ({"priority": True}, "priority must be an integer, got True"),
        ({"request_id": ["a"]}, "request_id must be a string, got list"),
        ({"voice": 5}, "prompt_id must be a string, got int"),
        ({"voice": ["a"]}, "prompt_id must be a string, got list"),
        ({"lora_name": ["x"]}, r"lora_name must be a string, got \['x'\]"),
    ],
)
def test_arguments_of_another_type(run: Run, options: dict[str, Any], message: str) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        given = {"text": TEXT} | options
        for speak in (speech.generate, speech.generate_long, speech.speak):
            with pytest.raises(InvalidRequestError, match=message):
                await speak(**given)

    run(scenario)


def test_recordings_that_are_no_bytes_or_have_no_text(run: Run, model: Path) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        for audio in ("me.wav", Path("me.wav"), None, io.BytesIO(recording())):
            bad: Any = audio
            with pytest.raises(InvalidRequestError, match="audio must be the bytes of a file"):
                await speech.encode(bad)
            with pytest.raises(InvalidRequestError, match="audio must be the bytes of a file"):
                await speech.add_prompt(bad, "wav", "A tone.")
        wrong: Any
        for wrong in (None, 5):
            with pytest.raises(InvalidRequestError, match="prompt_text must be a string"):
                await speech.add_prompt(recording(), "wav", wrong)
            with pytest.raises(InvalidRequestError, match="prompt_id must be a string"):
                speech.remove_prompt(wrong)
            with pytest.raises(InvalidRequestError, match="side must be 'left' or 'right', got"):
                await speech.encode(recording(), "wav", wrong)
        wrong = 5
        with pytest.raises(InvalidRequestError, match="wav_format must be a string, got 5"):
            await speech.encode(b"zz", wrong)
        assert await speech.add_prompt(recording(), "wav", " ")

    run(scenario)


def test_a_drain_and_a_full_queue_let_a_text_that_has_begun_go_on(model: Path) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        long = await speech.generate_long("One is here. Two is there. Three.", SHORT)
        await anext(long)
        others = [await speech.generate(TEXT, LONG) for _ in range(3)]
        with pytest.raises(OverloadedError):
            await say(speech)
        draining = asyncio.ensure_future(speech.drain(60))
        await asyncio.sleep(0)
        for other in others:
            await other.aclose()
        # Until its last sentence is queued there are times without a request.
        for _ in range(14):
            assert not draining.done()
            await anext(long)
        assert await draining
        assert [chunk async for chunk in long] == []
        assert (long.output.num_patches, long.output.finish_reason) == (15, "length")
        with pytest.raises(NotReadyError):
            await speech.generate_long(TEXT, SHORT)

    run_alone(scenario, model, max_num_queued_reqs=0)


def test_a_drain_waits_for_no_text_that_was_refused_left_or_dropped(model: Path) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        with pytest.raises(InvalidRequestError):
            await speech.generate_long("One. Two.", SHORT, lora_name="none")
        left, dropped = [await speech.generate_long("One. Two.", SHORT) for _ in range(2)]
        await left.aclose()
        del dropped
        assert await speech.drain(30)

    run_alone(scenario, model)


def test_an_abort_is_no_bad_case(run: Run) -> None:
    params = SpeechParams(
        seed=1, retry_badcase=True, retry_badcase_ratio_threshold=1e-3, inference_timesteps=50
    )

    async def scenario(speech: AsyncSpeech) -> None:
        num_before = speech.stats().workers[0].engine.num_output_tokens
        text = "word " * 10
        speaking = asyncio.ensure_future(speech.speak(text, params, request_id="mine"))
        while not speech._streams.get("mine") or not speech._streams["mine"].output.num_patches:
            await asyncio.sleep(0.001)
        await speech.abort("mine")
        _, output = await speaking
        assert output.finish_reason == "abort"
        assert params.is_bad_case(output.num_patches, output.num_target_tokens)
        assert await settled(speech)
        assert speech.stats().workers[0].engine.num_output_tokens - num_before < 10

    run(scenario)


def test_a_recording_nobody_waits_for_is_dropped_by_the_engine(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        (client,) = [worker.client for worker in speech._parts.pool._workers]
        encoding = asyncio.ensure_future(speech.encode(recording(28.0)))
        while not client.num_calls:
            await asyncio.sleep(0.001)
        encoding.cancel()
        while client.num_calls:
            await asyncio.sleep(0.001)
        assert await speech.encode(recording(0.5))

    run(scenario)


def test_closing_ends_an_adapter_that_is_waited_for(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(model, tmp_path)

    async def main() -> None:
        async with AsyncSpeech(str(model), **SMALL, enable_lora=True) as speech:
            await speech.register_lora("low", str(adapter))
            stream = await speech.generate(TEXT, LONG, lora_name="low")
            going = asyncio.ensure_future(speech.unregister_lora("low"))
            await anext(stream)
        with pytest.raises(NotReadyError):
            await going

    asyncio.run(main())


def test_an_engine_that_dies_ends_speech_and_calls_and_comes_back(
    model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(model, tmp_path)

    async def scenario(speech: AsyncSpeech) -> tuple[Samples, Samples, Samples]:
        names = await speech.register_lora("low", str(adapter))
        assert any(name.endswith("lora_A") for name in names)
        assert speech.list_loras() == ["low"]
        adapted, plain = await say(speech, lora_name="low"), await say(speech)
        stream = await speech.generate(TEXT, LONG, lora_name="low")
        await anext(stream)
        calls = [speech.encode(recording(seconds)) for seconds in (20.0, 25.0)]
        pending = [asyncio.ensure_future(call) for call in calls]
        while not speech._parts.pool._workers[0].client.num_calls:
            await asyncio.sleep(0.01)
        os.kill(speech.stats().workers[0].pid or 0, signal.SIGKILL)
        for task in (asyncio.ensure_future(stream.read()), *pending):
            with pytest.raises(UnavailableError):
                await task
        while not speech.is_ready:
            await asyncio.sleep(0.05)
        again = await say(speech, lora_name="low")
        await speech.unregister_lora("low")
        assert speech.list_loras() == []
        return adapted, plain, again

    adapted, plain, again = run_alone(scenario, model, enable_lora=True)
    assert error(adapted, plain) > FAR
    assert error(adapted, again) < CLOSE


def test_adapters_that_cannot_be_loaded_are_refused(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        with pytest.raises(InvalidRequestError, match="without LoRA"):
            await speech.register_lora("low", str(tmp_path))
        await asyncio.sleep(0.1)
        assert caplog.records == []  # nothing to forget, and no engine that could not
        with pytest.raises(InvalidRequestError, match="is not registered"):
            await speech.unregister_lora("low")
        assert speech.list_loras() == []

    run(scenario)


def test_a_call_that_hangs_is_found_and_one_that_takes_long_is_not_a_hang(model: Path) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        assert await speech.encode(recording(20.0))
        pool = speech._parts.pool
        pid = speech.stats().workers[0].pid or 0
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError):
            await pool.call_any(lambda call_id: EncodeAudio(call_id, bytes(4 * 2560)))

    run_alone(scenario, model, step_timeout=5.0)


def test_draining_waits_for_recordings_too(model: Path) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        encoding = asyncio.ensure_future(speech.encode(recording(5.0)))
        while not speech._parts.pool._workers[0].client.num_calls:
            await asyncio.sleep(0.01)
        assert await speech.drain(30)
        assert await asyncio.wait_for(encoding, 30)
        with pytest.raises(UnavailableError):
            await say(speech)

    run_alone(scenario, model)


def test_an_observer_hears_of_patches(model: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Listener:
        def received(self, output: SpeechOutput, params: SamplingParams) -> None:
            heard.append(("received", params.max_tokens or 0))

        def tokens(self, output: SpeechOutput, num_new: int, now: float) -> None:
            heard.append(("tokens", num_new))

        def finished(self, output: SpeechOutput) -> None:
            heard.append(("finished", output.num_patches))

        def rejected(self, reason: str) -> None: ...

        def stepped(self, num_positions: int, now: float) -> None: ...

    async def main() -> None:
        speech = AsyncSpeech(str(model), **SMALL)
        async with AsyncSpeech.from_config(speech.config, None, Listener()) as watched:
            await say(watched)

    asyncio.run(main())
    assert heard == [("received", 5), *[("tokens", 1)] * 5, ("finished", 5)]


def test_prompt_and_speech_must_fit_the_context(run: Run) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        with pytest.raises(ContextLengthError, match="Request may exceed max_model_len"):
            await speech.generate("word " * 30, SpeechParams(max_generate_length=2000))

    run(scenario)


def test_a_model_that_writes_cannot_speak() -> None:
    from nanovllm.config import DEMO_MODEL

    with pytest.raises(UnsupportedModelError, match="no speech model"):
        asyncio.run(AsyncSpeech(str(DEMO_MODEL)).start())
    with pytest.raises(FileNotFoundError):
        asyncio.run(AsyncSpeech("/no/such/model").start())
    with pytest.raises(InvalidRequestError, match="did you mean"):
        AsyncSpeech("x", max_num_seq=1)


def test_it_does_without_torch() -> None:
    script = "import sys, nanovllm.async_speech; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
