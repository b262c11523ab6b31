"""The client's end of a link without a process: calls with answers, sequences held back."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.batch import EngineOutput, SpeechRequest
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import EngineStats
from nanovllm.errors import EngineDeadError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.client import WorkerClient
from nanovllm.worker.load import EngineRequest
from nanovllm.worker.messages import (
    AddRequest,
    Answer,
    CancelCall,
    EncodeAudio,
    FromWorker,
    LoadAdapter,
    News,
    PauseSequences,
    Start,
    ToWorker,
    decode_to_worker,
    encode,
)


class Socket:
    """Both ends of a socket: what is sent lies in `sent`, what is put in comes out."""

    def __init__(self) -> None:
        self.sent: list[ToWorker] = []
        self._incoming: asyncio.Queue[bytes] = asyncio.Queue()

    def put(self, message: FromWorker) -> None:
        self._incoming.put_nowait(encode(message))

    async def recv(self) -> bytes:
        return await self._incoming.get()

    def send(self, packed: bytes, flags: int) -> "asyncio.Future[None]":
        self.sent.append(decode_to_worker(packed))
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent.set_result(None)
        return sent


Scenario = Callable[[WorkerClient, Socket], Awaitable[None]]


def run(scenario: Scenario) -> None:
    """Run a scenario with a client whose worker is ready and answers what it is told to."""

    async def main() -> None:
        start = Start(EngineConfig(), "/model", None, None, 0.0)
        context: Any = None
        client = WorkerClient(start, Path("/nowhere"), context, lambda news: None)
        socket: Any = Socket()
        client._socket = socket
        receiving = asyncio.ensure_future(client._receive_news())
        await asyncio.wait_for(scenario(client, socket), 10)
        receiving.cancel()

    asyncio.run(main())


def call(client: WorkerClient) -> "asyncio.Future[bytes]":
    return client.call(lambda call_id: EncodeAudio(call_id, b"sound"))


def handled(client: WorkerClient, *outputs: EngineOutput) -> News:
    """News that say that all messages have been dealt with."""
    return News(list(outputs), EngineStats(), 0, client._num_sent)


def add(client: WorkerClient, *seq_ids: int) -> None:
    for seq_id in seq_ids:
        message = AddRequest(seq_id, [1], SamplingParams(), 0, None, SpeechRequest())
        client.add(EngineRequest(message))


def busy(client: WorkerClient) -> bool:
    """Whether a sign of life is due; mypy would take a property for constant."""
    return client.is_busy


async def taken() -> None:
    """Let what has arrived be dealt with."""
    for _ in range(5):
        await asyncio.sleep(0)


class Clock:
    """Stands still until it is moved; who sleeps by it gives way only."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The client's time, in which a sleep is a turn of the loop."""
    clock, sleep = Clock(), asyncio.sleep
    monkeypatch.setattr("nanovllm.worker.client.time", clock)
    monkeypatch.setattr("nanovllm.worker.client.asyncio.sleep", lambda delay: sleep(0))
    return clock


async def looked() -> None:
    """Let what has arrived be dealt with, and have the time looked at."""
    await taken()
    await taken()


def test_answers_find_the_calls_they_are_for() -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        first, second = call(client), call(client)
        assert [message.call_id for message in socket.sent if isinstance(message, EncodeAudio)] == [
            0,
            1,
        ]
        socket.put(Answer(1, b"two"))
        socket.put(Answer(0, b"one"))
        assert (await first, await second) == (b"one", b"two")
        assert client.num_calls == 0

    run(scenario)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("InvalidRequestError", InvalidRequestError), ("Surprise", RuntimeError)],
)
def test_a_call_fails_as_the_worker_did(kind: str, error: type[Exception]) -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        answer = call(client)
        socket.put(Answer(0, kind=kind, message="too short"))
        with pytest.raises(error, match="too short"):
            await answer

    run(scenario)


def test_calls_fail_with_the_worker() -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        answer, unheard = call(client), call(client)
        unheard.cancel()
        add(client, 7)
        assert client.give_up(EngineDeadError("it died")) == [7]
        with pytest.raises(EngineDeadError, match="it died"):
            await answer
        assert not client.num_calls

    run(scenario)


def test_an_answer_nobody_waits_for_any_more_does_no_harm() -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        call(client).cancel()
        following = client.call(lambda call_id: LoadAdapter(call_id, 1, "/lora"))
        socket.put(Answer(0, b"late"))
        socket.put(Answer(1, b"names"))
        assert await following == b"names"

    run(scenario)


def test_the_worker_is_told_that_a_call_is_not_waited_for_and_still_answers_it() -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        answer, answered = call(client), call(client)
        answer.cancel()
        socket.put(Answer(1, b"two"))
        assert await answered == b"two"
        answered.cancel()  # too late
        await taken()
        assert socket.sent[2:] == [CancelCall(0)]
        assert client.num_calls == 1
        socket.put(Answer(0))
        await taken()
        assert client.num_calls == 0

    run(scenario)


def test_a_sign_of_life_is_due_while_a_call_is_open() -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        assert not busy(client)
        answer = call(client)
        socket.put(handled(client))
        await taken()
        assert busy(client)
        socket.put(Answer(0))
        await answer
        assert not busy(client)

    run(scenario)


def test_nothing_is_expected_of_sequences_that_are_held_back() -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        add(client, 1, 2)
        client.pause([1, 2, 99], True)
        assert socket.sent[-1] == PauseSequences([1, 2], True)
        assert busy(client)  # the worker has not heard of it yet
        socket.put(handled(client))
        await taken()
        assert not busy(client)
        client.pause([2], False)
        socket.put(handled(client))
        await taken()
        assert busy(client)
        socket.put(handled(client, EngineOutput(2, b"key", None, "stop")))
        await taken()
        assert not busy(client)
        client.abort([1])
        socket.put(handled(client))
        await taken()
        assert not client.load.paused
        assert client.load.num_runnable == 0

    run(scenario)


def test_pausing_what_has_ended_tells_the_worker_nothing() -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        client.pause([5], True)
        assert socket.sent == []

    run(scenario)


def test_a_worker_that_goes_on_encoding_does_not_hang_and_one_that_stops_does(
    clock: Clock,
) -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        hang = asyncio.ensure_future(client._hang(10.0))
        call(client)
        for _ in range(10):
            clock.now += 9.0
            socket.put(handled(client))
            await looked()
        assert not hang.done()
        clock.now += 11.0
        await hang

    run(scenario)


def test_who_goes_on_after_a_pause_has_the_whole_time_for_a_step(clock: Clock) -> None:
    async def scenario(client: WorkerClient, socket: Socket) -> None:
        hang = asyncio.ensure_future(client._hang(10.0))
        add(client, 1)
        client.pause([1], True)
        socket.put(handled(client))
        await looked()
        clock.now += 40.0
        client.pause([1], False)
        clock.now += 9.0
        await looked()
        assert not hang.done()
        clock.now += 2.0
        await hang

    run(scenario)
