"""A request's output for an event loop, as it grows."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, Protocol, TypeVar

from nanovllm.errors import UnavailableError
from nanovllm.outputs import RequestMetrics, RequestOutput


class Output(Protocol):
    """A request as it stands, whatever it generates."""

    request_id: str
    metrics: RequestMetrics

    @property
    def finished(self) -> bool: ...

    @property
    def num_tokens(self) -> int:
        """Positions generated so far."""


OutputT = TypeVar("OutputT", bound=Output)


class EngineStream(Generic[OutputT]):
    """A request's news for who reads it; whoever holds the stream owns the request.

    Args:
        output: The request's live output.
        abort: Ends the request; called when the stream is closed or dropped before its end.

    Attributes:
        output: The request's output as it stands now.
    """

    def __init__(self, output: OutputT, abort: Callable[[OutputT], None]) -> None:
        self.output = output
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._num_tokens = 0
        self._has_news = False
        self._ended = False
        self._error: UnavailableError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def abort(self) -> bool:
        """End the request; what there is can still be read. False if it has ended already."""
        if self.output.finished:
            return False
        self._abort(self.output)
        return True

    async def aclose(self) -> None:
        """Abort the request, unless it has ended."""
        self._ended = True
        self._abort(self.output)

    def wake(self, error: UnavailableError | None = None) -> int:
        """Say that there is news; returns the number of tokens since the last time."""
        self._has_news = True
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        num_tokens = self.output.num_tokens
        num_new, self._num_tokens = num_tokens - self._num_tokens, num_tokens
        return num_new

    async def _news(self) -> None:
        """Wait until there is news, unless there is."""
        if not self._has_news:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._has_news = False

    def __del__(self) -> None:
        # The garbage collector runs in any thread; the engines belong to the loop's.
        if not self.output.finished and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, self.output)


class RequestStream(EngineStream[RequestOutput], AsyncIterator[RequestOutput]):
    """A text request's output as it grows; ends with the finished one.

    What comes is always the same object, brought up to date: who takes long to come back for it
    finds more news at once, and nothing piles up.
    """

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        """Return the output as soon as there is news of it.

        Raises:
            UnavailableError: The engine that had the request died, or none took it in time.
        """
        if self._ended:
            raise StopAsyncIteration
        await self._news()
        self._ended = self.output.finished
        if self._error is not None:
            raise self._error
        return self.output
