"""A request's speech on its way to its reader, without an engine: who is too slow is held back."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from nanovllm.batch import EngineOutput, SpeechPayload
from nanovllm.errors import EngineDeadError, UnavailableError
from nanovllm.outputs import RequestMetrics, SpeechOutput
from nanovllm.speech_stream import Backlog, SpeechOutputs, SpeechStream

PATCH = np.arange(4, dtype=np.float32)
SEQ_ID = 3


class Engine:
    """Makes patches when told to, and remembers what it was asked."""

    def __init__(self, keep_latents: bool = False, timeout: float = 60.0) -> None:
        self.outputs = SpeechOutputs()
        self.asked: list[Any] = []
        latents: list[bytes] | None = [] if keep_latents else None
        output = SpeechOutput("r", "hello", 100, 5, RequestMetrics(0.0), latents=latents)
        self.outputs.add(SEQ_ID, output)
        self.output = output
        self._timeout = timeout

    def stream(self) -> SpeechStream:
        backlog = Backlog(4, self._timeout, lambda output, paused: self.asked.append(paused))
        return SpeechStream(self.output, self._abort, backlog)

    def make(self, stream: SpeechStream, num_patches: int = 1, reason: str | None = None) -> None:
        payload = SpeechPayload(PATCH.tobytes(), b"latents")
        news = [EngineOutput(SEQ_ID, b"k", payload, None, None, 2, 1.0)] * (num_patches - 1)
        news.append(EngineOutput(SEQ_ID, b"k", payload, reason, None, 2, 1.0))
        self.outputs.process(news)
        stream.wake()

    def _abort(self, output: SpeechOutput) -> None:
        if not output.finished:
            self.asked.append("abort")
            self.outputs.abort(output.request_id)


def deadline(stream: SpeechStream) -> float:
    """When the loop ends a stream that is held back."""
    assert stream._timer is not None
    return stream._timer.when()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_patches_come_as_they_are_made_and_the_output_says_how_many() -> None:
    async def scenario() -> None:
        engine = Engine(keep_latents=True)
        stream = engine.stream()
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        engine.make(stream)
        chunk = await reading
        assert chunk.dtype == np.float32
        chunk *= 2  # it is the reader's own
        engine.make(stream, 2, "stop")
        assert [len(chunk) async for chunk in stream] == [4, 4]
        output = stream.output
        assert (output.num_patches, output.num_samples, output.duration) == (3, 12, 0.12)
        assert (output.finish_reason, output.num_cached_tokens) == ("stop", 2)
        assert output.latents == [b"latents"] * 3
        metrics = output.metrics
        assert metrics.first_scheduled_time == 1.0
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        assert len(engine.outputs) == 0

    run(scenario)


def test_all_of_it_at_once() -> None:
    async def scenario() -> None:
        engine = Engine()
        stream = engine.stream()
        engine.make(stream, 3, "stop")
        assert len(await stream.read()) == 12
        assert len(await stream.read()) == 0
        assert engine.asked == []

    run(scenario)


def test_a_slow_reader_holds_its_request_back_and_lets_it_go_on() -> None:
    async def scenario() -> None:
        engine = Engine()
        stream = engine.stream()
        engine.make(stream, 3)
        assert engine.asked == []
        engine.make(stream, 2)
        assert engine.asked == [True]
        for _ in range(2):
            await anext(stream)
        assert engine.asked == [True]
        await anext(stream)
        assert engine.asked == [True, False]
        engine.make(stream, 9)
        assert engine.asked == [True, False, True]

    run(scenario)


def test_who_never_comes_back_is_not_waited_for() -> None:
    async def scenario() -> None:
        engine = Engine(timeout=0.01)
        stream = engine.stream()
        engine.make(stream, 5)
        while len(engine.asked) < 2:
            await asyncio.sleep(0.01)
        assert engine.asked == [True, "abort"]
        assert stream.output.finish_reason == "abort"
        assert not stream.output.unread
        with pytest.raises(UnavailableError, match="nobody has read this speech"):
            await anext(stream)

    run(scenario)


def test_who_reads_slowly_is_waited_for() -> None:
    async def scenario() -> None:
        engine = Engine(timeout=60.0)
        stream = engine.stream()
        engine.make(stream, 20)
        begun = deadline(stream)
        for _ in range(5):
            await asyncio.sleep(0.01)
            await anext(stream)
            assert deadline(stream) > begun
            begun = deadline(stream)
        assert engine.asked == [True]

    run(scenario)


@pytest.mark.parametrize("num_patches", [1, 5])
def test_dropping_a_stream_ends_its_request_even_if_it_is_held_back(num_patches: int) -> None:
    async def scenario() -> None:
        engine = Engine()
        stream = engine.stream()
        engine.make(stream, num_patches)
        del stream
        gc.collect()
        await asyncio.sleep(0)
        assert engine.asked[-1] == "abort"

    run(scenario)


def test_closing_ends_the_request_and_the_iteration() -> None:
    async def scenario() -> None:
        engine = Engine()
        stream = engine.stream()
        engine.make(stream, 5)
        await stream.aclose()
        await stream.aclose()
        assert engine.asked == [True, "abort"]
        assert [chunk async for chunk in stream] == []

    run(scenario)


def test_what_was_made_before_an_error_comes_before_it() -> None:
    async def scenario() -> None:
        engine = Engine()
        stream = engine.stream()
        engine.make(stream, 2)
        engine.outputs.process([EngineOutput(SEQ_ID, None, None, "error", "it died")])
        stream.wake(EngineDeadError("it died"))
        assert [len(await anext(stream)) for _ in range(2)] == [4, 4]
        with pytest.raises(EngineDeadError):
            await anext(stream)
        assert [chunk async for chunk in stream] == []

    run(scenario)


def test_an_engine_that_fails_says_why() -> None:
    async def scenario() -> None:
        engine = Engine()
        stream = engine.stream()
        engine.outputs.process([EngineOutput(SEQ_ID, None, None, "error", "NaN")])
        stream.wake()
        with pytest.raises(RuntimeError, match="NaN"):
            await anext(stream)

    run(scenario)


def test_news_of_what_has_ended_are_ignored() -> None:
    engine = Engine()
    assert engine.outputs.seq_id("r") == SEQ_ID
    assert engine.outputs.abort("r") == [SEQ_ID]
    assert engine.outputs.abort("r") == []
    assert engine.outputs.seq_id("r") is None
    assert engine.outputs.process([EngineOutput(SEQ_ID, b"k")]) == ([], [])
