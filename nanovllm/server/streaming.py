"""Answers that take a while: told apart from clients that left, and streamed as they come."""

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from nanovllm.server.errors import (
    CLIENT_CLOSED_REQUEST,
    APIError,
    BrokenStreamError,
    to_api_error,
)
from nanovllm.server.request_id import HEADER
from nanovllm.server.state import ServerState

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def also_streams(whole: Any) -> dict[int | str, dict[str, Any]]:
    """Document a success that is a JSON object, or a stream if the request asks for one."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {
        200: {
            "model": whole,
            "description": "The whole answer, or its chunks as they come.",
            "content": {"text/event-stream": {"schema": event}},
        }
    }


def event(body: Mapping[str, Any]) -> bytes:
    """A server-sent event with a JSON object."""
    return b"data: %b\n\n" % encode(body)


def named_event(body: Mapping[str, Any]) -> bytes:
    """The same with the object's `type` in front, by which some clients tell events apart."""
    return b"event: %b\ndata: %b\n\n" % (body["type"].encode(), encode(body))


def line(body: Mapping[str, Any]) -> bytes:
    """A JSON object on a line of its own."""
    return encode(body) + b"\n"


class WholeOrStream(ABC):
    """An answer that is sent whole or as it comes.

    Args:
        http: The connection that the request came by.
        state: The server.
        request_id: What the client knows the request by.
        streams: Whether it is sent as it comes.
    """

    takes_comments = True
    """Whether comments keep a silent stream alive, which no reader of JSON lines understands."""

    def __init__(self, http: Request, state: ServerState, request_id: str, streams: bool) -> None:
        self.state = state
        self.request_id = request_id
        self.streams = streams
        self._http = http

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {HEADER: self.request_id}

    @abstractmethod
    async def whole(self) -> Mapping[str, Any]:
        """Generate all of it."""

    @abstractmethod
    def events(self) -> AsyncGenerator[bytes, None]:
        """Generate it, and yield what is new as it comes."""

    @abstractmethod
    def error_event(self, error: APIError) -> bytes:
        """The last events of a stream that cannot go on."""

    async def respond(self) -> Response:
        """Generate and send; a client that leaves ends the generation.

        Raises:
            InvalidRequestError: The request cannot be used.
            UnavailableError: The server is too busy, or its engine died before the first token.
            APIError: The same in HTTP's terms.
        """
        if not self.streams:
            return await unless_gone(self._http, self._respond_whole())
        return await stream_unless_gone(
            self._http,
            self.events(),
            self.error_event,
            keep_alive=self.state.config.sse_keep_alive_interval if self.takes_comments else None,
            headers=self.headers,
        )

    async def _respond_whole(self) -> Response:
        content = encode(await self.whole())
        return Response(content, media_type="application/json", headers=self.headers)


async def unless_gone(http: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return what the work does, or cancel it as soon as the client is gone."""
    task = asyncio.ensure_future(work)
    try:
        if await _wait(http, task) and not task.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return task.result()
    finally:
        await _cancel(task)


async def stream_unless_gone(
    http: Request,
    events: AsyncGenerator[bytes, None],
    as_event: Callable[[APIError], bytes] | None,
    *,
    keep_alive: float | None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Stream events, once the first of them has come without an error.

    Args:
        http: The request.
        events: Whole events. An error before the first is raised here, and so becomes a status;
            one after it is written by `as_event` and ends the stream.
        as_event: Writes an error as the last events of a stream; None breaks the connection off,
            in formats that have no errors.
        keep_alive: Seconds of silence after which a comment is sent, also if the first event takes
            as long: from then on an error cannot be a status any more. None is never.
        headers: Headers of the response.
    """
    first = asyncio.ensure_future(anext(events))
    handed_over = False
    try:
        if await _wait(http, first, keep_alive) and not first.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if first.done() and (error := first.exception()) is not None:
            raise error
        handed_over = True
        return EventStream(first, events, as_event, keep_alive, headers)
    finally:
        if not handed_over:
            await _cancel(first)
            await events.aclose()


class EventStream(StreamingResponse):
    """Events as they come, comments while none do, and an event for an error.

    Args:
        first: The first event, which may be on its way.
        events: Those behind it; closed when the client is gone.
        as_event: Writes an error as the last events; None breaks the connection off.
        keep_alive: Seconds of silence after which a comment is sent; None is never.
        headers: Headers of the response.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: "asyncio.Future[bytes]",
        events: AsyncGenerator[bytes, None],
        as_event: Callable[[APIError], bytes] | None,
        keep_alive: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Proxies shall not collect what is meant to flow.
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._pieces(), headers=unbuffered | dict(headers or {}))
        self._first = first
        self._events = events
        self._as_event = as_event
        self._keep_alive = keep_alive
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; whatever happens, what generates it is closed."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Here, as a client that has left already keeps `stream_response` from ever starting.
            with anyio.CancelScope(shield=True):
                await _cancel(self._first)
                await self.body_iterator.aclose()  # type: ignore[attr-defined]
                await self._events.aclose()

    async def stream_response(self, send: Send) -> None:
        """Send the events, and comments between them."""
        ticker = asyncio.ensure_future(self._tick(send))

        async def send_noting_when(message: Message) -> None:
            if message.get("more_body") is False:
                ticker.cancel()  # nothing may follow the last message
            await send(message)
            self._last_sent = asyncio.get_running_loop().time()

        try:
            await super().stream_response(send_noting_when)
        finally:
            ticker.cancel()

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            if not self._first.done():
                yield KEEP_ALIVE
            yield await self._first
            async for event in self._events:
                yield event
        except Exception as e:  # whatever it is, the client is told
            error = to_api_error(e)
            if error.status_code == 500 and error is not e:
                logger.exception("a stream failed", exc_info=e)
            if self._as_event is None:
                raise BrokenStreamError(str(error.message)) from e
            yield self._as_event(error)

    async def _tick(self, send: Send) -> None:
        """Send a comment whenever nothing else was sent for a while."""
        if self._keep_alive is None:
            return
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            await asyncio.sleep(self._last_sent + self._keep_alive - clock())
            if clock() - self._last_sent >= self._keep_alive:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._last_sent = clock()


async def _wait(http: Request, task: "asyncio.Future[Any]", timeout: float | None = None) -> bool:
    """Wait for a task; return whether the client has gone instead."""
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return gone.done()
    finally:
        gone.cancel()


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: "asyncio.Future[Any]") -> None:
    """Cancel a task, unless it is done, and wait until it has cleaned up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
