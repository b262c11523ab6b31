"""LoRA adapters in engine processes: registered, used, drained, and there again after a crash."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from nanovllm.async_speech import AsyncSpeech
from nanovllm.errors import EngineDeadError, InvalidRequestError, NotReadyError
from nanovllm.speech_params import SpeechParams
from nanovllm.speech_stream import SpeechStream
from tests.lora_oracle import write_adapter
from tests.small_engine import SMALL

TEXT = "the world"
PARAMS = SpeechParams(seed=3, max_generate_length=4, inference_timesteps=4)
Scenario = Callable[[AsyncSpeech], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture(scope="module")
def checkpoint(speech_checkpoint: Callable[..., Path]) -> Path:
    return speech_checkpoint("v1", stop_bias=-1.0)


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("adapters")
    return [str(write_adapter(checkpoint, directory / str(n), seed=n)) for n in range(3)]


async def checked(scenario: Scenario, speech: AsyncSpeech) -> None:
    """Run a scenario, and leave no adapter behind."""
    await asyncio.wait_for(scenario(speech), 60)
    for name in speech.list_loras():
        await asyncio.wait_for(speech.unregister_lora(name), 10)


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Iterator[Run]:
    """Run scenarios one after the other with the same engine, which holds two adapters."""
    loop = asyncio.new_event_loop()
    speech = AsyncSpeech(str(checkpoint), **SMALL | {"max_loras": 2})
    yield lambda scenario: loop.run_until_complete(checked(scenario, speech))
    loop.run_until_complete(speech.close())
    loop.close()


async def latents_of(stream: SpeechStream) -> npt.NDArray[np.float32]:
    """Latents of all patches; the sound of so small a model shows little of them."""
    async for _ in stream:
        pass
    return np.frombuffer(b"".join(stream.output.latents or []), dtype=np.float32)


async def say(speech: AsyncSpeech, lora_name: str | None = None) -> npt.NDArray[np.float32]:
    """The latents of `TEXT`."""
    return await latents_of(await start(speech, lora_name))


async def start(speech: AsyncSpeech, lora_name: str | None) -> SpeechStream:
    return await speech.generate(TEXT, PARAMS, lora_name=lora_name, keep_latents=True)


async def say_when_ready(speech: AsyncSpeech, lora_name: str) -> npt.NDArray[np.float32]:
    """The same, through the restart of an engine."""
    while True:
        try:
            return await say(speech, lora_name)
        except (EngineDeadError, NotReadyError):
            await asyncio.sleep(0.05)


async def speak_with_all(speech: AsyncSpeech, adapters: list[str]) -> None:
    """Requests with adapters and without together get what they get alone."""
    for name, path in zip("abc", adapters, strict=True):
        names = await speech.register_lora(name, path)
        assert "base_lm.layers.0.self_attn.q_proj.lora_A" in names
    assert speech.list_loras() == ["a", "b", "c"]
    alone = [await say(speech, name) for name in (None, "a", "b", "c")]
    for index, found in enumerate(alone):
        for other in alone[:index]:
            assert np.abs(found - other).max() > 0.1
    together = await asyncio.gather(*(say(speech, name) for name in (None, "a", "b", "c") * 2))
    for found, expected in zip(together, alone * 2, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_each_request_has_the_adapter_it_names(run: Run, adapters: list[str]) -> None:
    run(lambda speech: speak_with_all(speech, adapters))


@pytest.mark.slow
def test_all_engines_get_the_adapters(checkpoint: Path, adapters: list[str]) -> None:
    async def main() -> None:
        async with AsyncSpeech(str(checkpoint), **SMALL | {"replicas": 2}) as speech:
            await checked(lambda speech: speak_with_all(speech, adapters), speech)

    asyncio.run(main())


def test_what_is_wrong_with_an_adapter_is_told_and_harms_nobody(
    run: Run, checkpoint: Path, adapters: list[str], tmp_path: Path
) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        with pytest.raises(InvalidRequestError, match="LoRA config not found"):
            await speech.register_lora("a", str(tmp_path))
        write_adapter(checkpoint, tmp_path / "wide", r=33)
        with pytest.raises(InvalidRequestError, match="of rank 33: it must be 1 to"):
            await speech.register_lora("a", str(tmp_path / "wide"))
        with pytest.raises(InvalidRequestError, match="LoRA 'a' is not registered"):
            await say(speech, "a")
        await speech.register_lora("a", adapters[0])
        with pytest.raises(InvalidRequestError, match="LoRA 'a' is already registered"):
            await speech.register_lora("a", adapters[1])
        await say(speech, "a")

    run(scenario)


def test_unregistering_lets_running_requests_end(run: Run, adapters: list[str]) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        await speech.register_lora("a", adapters[0])
        expected = await say(speech, "a")
        stream = await start(speech, "a")
        draining = asyncio.ensure_future(speech.unregister_lora("a"))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError, match="is draining"):
            await say(speech, "a")
        np.testing.assert_allclose(await latents_of(stream), expected, atol=1e-4)
        await draining
        assert speech.list_loras() == []
        # A request that is given up counts as ended, too.
        await speech.register_lora("a", adapters[1])
        stream = await start(speech, "a")
        await stream.aclose()
        await speech.unregister_lora("a")
        await say(speech)

    run(scenario)


def test_adapters_outlive_an_engine(run: Run, adapters: list[str]) -> None:
    async def scenario(speech: AsyncSpeech) -> None:
        for name, path in zip("abc", adapters, strict=True):
            await speech.register_lora(name, path)
        await speech.unregister_lora("b")
        expected = await say(speech, "c")
        pid = speech.stats().workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        np.testing.assert_allclose(await say_when_ready(speech, "c"), expected, atol=1e-4)
        assert speech.list_loras() == ["a", "c"]
        await speech.unregister_lora("c")
        await speech.register_lora("b", adapters[2])
        np.testing.assert_allclose(await say(speech, "b"), expected, atol=1e-4)

    run(scenario)
