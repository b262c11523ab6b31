"""Speech sentence by sentence, without an engine: how it ends, is aborted and is admitted."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from nanovllm.cluster.admission import Admission
from nanovllm.errors import ContextLengthError, OverloadedError
from nanovllm.long_speech import LongSpeech, Sentences
from nanovllm.loop_thread import LoopThread
from nanovllm.speech_params import SpeechParams
from tests.fake_speech import PATCH_LATENTS, FakeSpeech

TEXT = "One is here. Two is there. Three."


class Spoken:
    """A text of three sentences as a fake speaks it; sentences wait for `gate`."""

    def __init__(self, num_patches: int = 2, **options: Any) -> None:
        self.fake = FakeSpeech(num_patches)
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_released = 0
        self.error: Exception | None = None
        self.too_long: set[str] = set()
        begin: Any = self._begin
        sentences = Sentences(TEXT, SpeechParams(), options, has_design=False)
        self.long = LongSpeech(sentences, begin, self._release)

    async def _begin(self, text: str, **options: Any) -> Any:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if "prompt_latents" in options and text in self.too_long:
            raise ContextLengthError("no room")
        return await self.fake.generate(text, **options)

    def _release(self) -> None:
        self.num_released += 1


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_it_has_not_finished_while_sentences_are_to_come(reason: str) -> None:
    async def scenario() -> None:
        spoken = Spoken()
        await spoken.long.start()
        assert not spoken.long.output.finished
        for number, end in enumerate((None, None, reason), 1):
            await anext(spoken.long)
            await anext(spoken.long)
            for stream in list(spoken.fake._streams.values())[:number]:
                stream.end(reason)
            assert spoken.long.output.finish_reason == end
            assert bool(spoken.num_released) == (number == 3)
        assert [chunk async for chunk in spoken.long] == []
        assert len(spoken.fake.asked) == 3

    run(scenario)


def test_an_abort_in_a_sentence_leaves_what_there_is_and_begins_no_more() -> None:
    async def scenario() -> None:
        spoken = Spoken()
        await spoken.long.start()
        await anext(spoken.long)
        assert spoken.long.abort()
        assert not spoken.long.abort()
        assert spoken.num_released
        assert [chunk async for chunk in spoken.long] == []
        assert spoken.long.output.finish_reason == "abort"
        assert len(spoken.fake.asked) == 1
        assert spoken.fake.num_open == 0

    run(scenario)


@pytest.mark.parametrize("is_begun", [False, True])
def test_an_abort_between_two_sentences_ends_the_text(is_begun: bool) -> None:
    async def scenario() -> None:
        spoken = Spoken()
        await spoken.long.start()
        for _ in range(2):
            await anext(spoken.long)
        if not is_begun:
            spoken.gate.clear()
        waiting = asyncio.ensure_future(anext(spoken.long, None))
        for _ in range(5 if not is_begun else 1):
            await asyncio.sleep(0)
        assert not waiting.done()
        assert spoken.long.abort()
        assert await waiting is None
        assert spoken.long.output.finish_reason == "abort"
        assert spoken.fake.num_open == 0
        await spoken.long.aclose()

    run(scenario)


def test_a_reader_that_goes_does_not_take_the_next_sentence_along() -> None:
    async def scenario() -> None:
        spoken = Spoken()
        await spoken.long.start()
        for _ in range(2):
            await anext(spoken.long)
        spoken.gate.clear()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(spoken.long), 0.05)
        spoken.gate.set()
        assert len([chunk async for chunk in spoken.long]) == 4

    run(scenario)


def test_a_sentence_that_is_refused_ends_the_text_with_that() -> None:
    async def scenario() -> None:
        spoken = Spoken()
        await spoken.long.start()
        for _ in range(2):
            await anext(spoken.long)
        spoken.error = OverloadedError("the queue is full")
        with pytest.raises(OverloadedError):
            await anext(spoken.long)
        assert spoken.num_released
        assert [chunk async for chunk in spoken.long] == []
        assert spoken.long.output.finished

        for error in (OverloadedError("the queue is full"), ContextLengthError("too long")):
            refused = Spoken()
            refused.error = error
            with pytest.raises(type(error)):
                await refused.long.start()
            assert refused.num_released

    run(scenario)


def test_a_sentence_without_room_begins_anew_and_those_after_it_continue_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        spoken = Spoken()
        spoken.too_long = {"Two is there. "}
        await spoken.long.start()
        await spoken.long.read()
        (_, _, first), (_, second_params, second), (_, third_params, third) = spoken.fake.asked
        assert first["keep_latents"]
        assert second["keep_latents"]
        assert "prompt_latents" not in second
        assert third["prompt_text"] == "Two is there. "
        # What continues another must have room for all it may say.
        assert (second_params.max_generate_length, third_params.max_generate_length) == (None, 2000)

    run(scenario)
    assert [record.message[:33] for record in caplog.records] == [
        "a sentence of a long text begins "
    ]


@pytest.mark.parametrize("options", [{}, {"keep_latents": True}])
def test_the_latents_of_all_sentences_are_kept_if_they_are_asked_for(
    options: dict[str, Any],
) -> None:
    async def scenario() -> None:
        spoken = Spoken(**options)
        await spoken.long.start()
        await anext(spoken.long)
        assert spoken.long.output.latents == ([PATCH_LATENTS] if options else None)
        await spoken.long.read()
        assert spoken.long.output.latents == (6 * [PATCH_LATENTS] if options else None)

    run(scenario)


def test_an_admission_holds_once_and_lets_go_when_it_is_dropped() -> None:
    async def scenario() -> None:
        held: list[bool] = []
        admission = Admission(held.append)
        admission.close()
        admission.open()
        admission.open()
        admission.close()
        admission.close()
        assert held == [True, False]
        admission.open()
        del admission
        gc.collect()
        await asyncio.sleep(0)
        assert held == [True, False, True, False]

    run(scenario)


def test_the_loops_own_thread_does_not_wait_for_what_it_finishes() -> None:
    loop = LoopThread()
    ended: list[int] = []
    in_loop = threading.Event()

    async def end() -> None:
        ended.append(threading.get_ident())
        if len(ended) == 2:
            in_loop.set()

    async def collect() -> int:
        loop.finish(end())  # as the garbage collector would
        return threading.get_ident()

    loop.finish(end())
    assert len(ended) == 1
    thread = loop.call(collect())
    assert in_loop.wait(10)
    assert set(ended) == {thread}
    loop.close(end())
    loop.finish(end())
    loop.close(end())
    assert len(ended) == 3


def test_a_loop_that_several_threads_close_ends_once_and_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    loop = LoopThread()
    begun = threading.Event()
    ended: list[str] = []

    async def end_late() -> None:
        begun.set()
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.2)
            ended.append("late")

    async def end() -> None:
        ended.append("last")

    def wait() -> None:
        with pytest.raises(CancelledError):
            loop.call(end_late())

    def close() -> None:
        loop.close(end())
        assert ended == ["last", "late"]

    threads = [threading.Thread(target=target) for target in (wait, close, close, close)]
    for thread in threads:
        thread.start()
        assert begun.wait(10)
    for thread in threads:
        thread.join(10)
    assert failed == []
    assert ended == ["last", "late"]
    with pytest.raises(RuntimeError, match="stopped"):
        loop.call(end())
