"""Puts a server under load and records when each token came.

Two kinds of load. In an *open loop* requests are sent at random moments, however the server copes,
and every time counts from the moment a request was meant to be sent: a client or server that falls
behind is seen in the figures, not hidden by them. In a *closed loop* a number of clients each wait
for their answer before they ask again.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import msgspec

from nanovllm.bench.http import HTTPClient, Response
from nanovllm.bench.serve_config import Load

Request = TypeVar("Request")
Outcome = TypeVar("Outcome")

LAG_INTERVAL = 0.01
MAX_DETAIL = 500


@dataclass(slots=True)
class Record:
    """One request. Times are seconds of `time.perf_counter`.

    Args:
        intended: When it was to be sent.
        sent: When it was.
        token_times: When each event with tokens came; one event may carry several.
        ended: When the last of them, or the end of the generation, came.
        num_prompt_tokens: As the server counts.
        num_cached_tokens: Of these, tokens that it took from its prefix cache.
        num_output_tokens: As the server counts.
        error: What went wrong, in few words; None if all is well.
        detail: What the server says of it.
    """

    intended: float
    sent: float
    token_times: list[float] = field(default_factory=list)
    ended: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    detail: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.token_times[0] - self.intended

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.ended - self.intended

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is no second."""
        rest = self.num_output_tokens - 1
        return (self.e2e - self.ttft) / rest if rest > 0 else None

    @property
    def itls(self) -> list[float]:
        """Gaps between successive events with tokens."""
        return [b - a for a, b in pairwise(self.token_times)]


class Delta(msgspec.Struct):
    """What an event of a chat adds."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(msgspec.Struct):
    """What an event adds to one completion."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_tokens(self) -> bool:
        """Whether the event brings tokens; their text may be withheld for now.

        The events that only open a chat or only say why it ended bring none.
        """
        delta = self.delta
        if delta is None:
            return bool(self.text) or self.finish_reason is None
        parts = (delta.content, delta.reasoning, delta.reasoning_content, delta.tool_calls)
        return any(parts) or (delta.role is None and self.finish_reason is None)


class CachedTokens(msgspec.Struct):
    """OpenAI's `prompt_tokens_details`."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """How many tokens a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None


class Failure(msgspec.Struct):
    """What went wrong after the stream began."""

    message: str = ""


class Event(msgspec.Struct):
    """One event of a stream, of a chat or of a completion."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Failure | str | None = None


decode_event = msgspec.json.Decoder(Event).decode


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what they have in common.

    Args:
        client: The server.
        path: The endpoint.
        timeout: Seconds a request may take.
    """

    client: HTTPClient
    path: str
    timeout: float

    async def ask(self, body: bytes, intended: float) -> Record:
        """Send one request and record what comes; it does not raise for what a server does."""
        record = Record(intended, time.perf_counter())
        try:
            await asyncio.wait_for(self._stream(body, record), self.timeout)
        except (TimeoutError, asyncio.TimeoutError):
            record.error, record.detail = "timeout", f"no end after {self.timeout:g} s"
        except msgspec.MsgspecError as e:
            record.error, record.detail = "malformed event", str(e)
        except OSError as e:
            record.error, record.detail = "connection", str(e)
        return record

    async def _stream(self, body: bytes, record: Record) -> None:
        async with self.client.send("POST", self.path, body) as response:
            if response.status != 200:
                record.error = f"HTTP {response.status}"
                record.detail = error_message(await response.read())
            else:
                await _record_events(response, record)


def error_message(body: bytes) -> str:
    """What a server says of an error, in OpenAI's shape or any other."""
    try:
        message: object = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace")
    return str(message)[:MAX_DETAIL]


async def read_events(response: Response) -> AsyncIterator[tuple[float, Event]]:
    """Server-sent events, each with the time at which it came."""
    rest = b""
    async for chunk in response.chunks():
        now = time.perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield now, decode_event(data)


async def _record_events(response: Response, record: Record) -> None:
    """Read a stream to its end."""
    usage = None
    async for now, event in read_events(response):
        if event.error is not None:
            failure = event.error
            record.error = "error in the stream"
            record.detail = failure if isinstance(failure, str) else failure.message
        usage = event.usage or usage
        if event.choices:
            record.ended = now
            if any(choice.has_tokens for choice in event.choices):
                record.token_times.append(now)
    if usage is not None:
        cached = usage.prompt_tokens_details
        record.num_prompt_tokens = usage.prompt_tokens
        record.num_output_tokens = usage.completion_tokens
        record.num_cached_tokens = (cached and cached.cached_tokens) or 0
    if not record.token_times and record.num_output_tokens:
        # Ids that decode to no text come without a piece of their own, by the end at the latest.
        record.token_times.append(record.ended)
    if record.error is None and not record.token_times:
        record.error = "no tokens"
    elif record.error is None and not record.num_output_tokens:
        record.error = "no usage"  # chunks are not tokens, so nothing can be said


@dataclass(slots=True)
class ClientLoad:
    """How busy the client itself was; a client that cannot keep up measures itself.

    Args:
        lags: Seconds by which its event loop was late, a sample every 10 ms.
        cpu_share: Share of a core that it took.
    """

    lags: list[float] = field(default_factory=list)
    cpu_share: float = 0.0


Ask = Callable[[int, float], Coroutine[Any, Any, None]]


async def run_load(
    ask: Callable[[Request, float], Coroutine[Any, Any, Outcome]],
    requests: Sequence[Request],
    load: Load,
    *,
    seed: int = 0,
    on_done: Callable[[], None] = lambda: None,
) -> tuple[list[Outcome], ClientLoad]:
    """Send requests and wait for all answers.

    Args:
        ask: Sends one of them, which was to be sent at this `time.perf_counter`, and waits for
            its answer.
        requests: What to send.
        load: How fast they are sent.
        seed: Of the gaps.
        on_done: Called after each answer.

    Returns:
        What `ask` returned, in the order of the answers, and how busy this process was.
    """
    records: list[Outcome] = []

    async def ask_for(index: int, intended: float) -> None:
        records.append(await ask(requests[index], intended))
        on_done()

    client = ClientLoad()
    watch = asyncio.create_task(_watch_loop(client.lags))
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        if load.concurrency is not None:
            await _closed_loop(ask_for, len(requests), load.concurrency)
        else:
            await _open_loop(ask_for, send_times(len(requests), load.request_rate, seed))
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    client.cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return records, client


def send_times(num_requests: int, request_rate: float, seed: int) -> list[float]:
    """Seconds from the start at which to send: a Poisson process whose first event is at 0."""
    rng = random.Random(seed)
    times = [0.0]
    while len(times) < num_requests:
        gap = 0.0 if math.isinf(request_rate) else rng.expovariate(request_rate)
        times.append(times[-1] + gap)
    return times


async def _open_loop(ask: Ask, times: Sequence[float]) -> None:
    start = time.perf_counter()
    tasks = []
    for index, offset in enumerate(times):
        if (delay := start + offset - time.perf_counter()) > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(ask(index, start + offset)))
    await asyncio.gather(*tasks)


async def _closed_loop(ask: Ask, num_requests: int, concurrency: int) -> None:
    indices = iter(range(num_requests))

    async def client() -> None:
        for index in indices:
            await ask(index, time.perf_counter())

    await asyncio.gather(*(client() for _ in range(min(concurrency, num_requests))))


async def _watch_loop(lags: list[float]) -> None:
    while True:
        due = time.perf_counter() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        lags.append(time.perf_counter() - due)
