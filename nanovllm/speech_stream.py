"""Speech for an event loop, as it comes; a reader that is too slow holds its own request back."""

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple
from weakref import WeakMethod

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import EngineOutput, SpeechPayload
from nanovllm.errors import UnavailableError
from nanovllm.outputs import SpeechOutput
from nanovllm.request_stream import EngineStream

logger = logging.getLogger(__name__)

Samples = NDArray[np.float32]


class SpeechOutputs:
    """The open requests' outputs, which grow by what the engines send."""

    def __init__(self) -> None:
        self._outputs: dict[int, SpeechOutput] = {}
        self._seq_ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._outputs)

    def add(self, seq_id: int, output: SpeechOutput) -> None:
        """Register a request; it is one sequence."""
        self._outputs[seq_id] = output
        self._seq_ids[output.request_id] = seq_id

    def seq_id(self, request_id: str) -> int | None:
        """The sequence of a request; None if it has ended."""
        return self._seq_ids.get(request_id)

    def process(self, news: Iterable[EngineOutput]) -> tuple[list[SpeechOutput], list[int]]:
        """Take in the news of a step; news of sequences that have ended is ignored.

        Returns:
            The requests there is news of, and no sequence for the engine to end: it decides
            itself where speech ends.
        """
        now = time.monotonic()
        touched = []
        for item in news:
            output = self._outputs.get(item.seq_id)
            if output is None:
                continue
            touched.append(output)
            _take(output, item, now)
            if item.finish_reason is not None:
                output.stop_reason = item.stop_reason
                self._end(output, item.finish_reason, now)
        return touched, []

    def abort(self, request_id: str) -> list[int]:
        """End a request with finish reason "abort"; returns its sequence, unless it has ended."""
        seq_id = self._seq_ids.get(request_id)
        if seq_id is None:
            return []
        self._end(self._outputs[seq_id], "abort", time.monotonic())
        return [seq_id]

    def _end(self, output: SpeechOutput, reason: str, now: float) -> None:
        output.finish_reason = reason
        output.metrics.finished_time = now
        del self._outputs[self._seq_ids.pop(output.request_id)]


def _take(output: SpeechOutput, news: EngineOutput, now: float) -> None:
    """Add a patch to an output."""
    metrics = output.metrics
    if metrics.first_scheduled_time is None:
        metrics.first_scheduled_time = news.scheduled_time
    if not isinstance(news.payload, SpeechPayload):
        return
    if metrics.first_token_time is None:
        metrics.first_token_time = now
        output.num_cached_tokens = news.num_cached
    output.num_patches += 1
    output.num_samples += len(news.payload.audio) // np.dtype(np.float32).itemsize
    output.unread.append(news.payload.audio)
    if output.latents is not None:
        output.latents.append(news.payload.latents)


class Backlog(NamedTuple):
    """How far a request may be ahead of its reader.

    Args:
        max_patches: Unread patches from which its sequence is held back; it goes on at half.
        timeout: Seconds without a read after which a request that is held back is ended.
        pause: Holds the sequence of a request back, or lets it go on.
    """

    max_patches: int
    timeout: float
    pause: Callable[[SpeechOutput, bool], None]


class SampleStream(AsyncIterator[Samples]):
    """Sound as it is generated: float32 mono, a chunk a patch."""

    async def read(self) -> Samples:
        """Return all that has not been read, once it has ended; see `__anext__`."""
        try:
            chunks = [chunk async for chunk in self]
        finally:
            await self.aclose()
        return np.concatenate(chunks) if chunks else np.empty(0, np.float32)

    @abstractmethod
    async def aclose(self) -> None:
        """Abort what has not ended."""


class SpeechStream(EngineStream[SpeechOutput], SampleStream):
    """A request's sound as it is generated: float32 mono, a chunk a patch.

    Args:
        output: The request's live output.
        abort: Ends the request; called when the stream is closed or dropped before its end.
        backlog: How far it may be ahead of who reads it.
    """

    def __init__(
        self, output: SpeechOutput, abort: Callable[[SpeechOutput], None], backlog: Backlog
    ) -> None:
        super().__init__(output, abort)
        self._backlog = backlog
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    async def __anext__(self) -> Samples:
        """Return the next patch's samples `[num_samples]` as soon as they are there.

        Raises:
            UnavailableError: The engine that had the request died, none took it in time, or nobody
                read the stream for too long.
            RuntimeError: The engine failed.
        """
        output = self.output
        while not self._ended and not output.unread and not output.finished:
            await self._news()
        if self._ended:
            raise StopAsyncIteration
        if output.unread:
            chunk: Samples = np.frombuffer(output.unread.popleft(), np.float32).copy()
            self._has_read()
            return chunk
        self._ended = True
        if self._error is not None:
            raise self._error
        if output.finish_reason == "error":
            raise RuntimeError(f"the speech could not be generated: {output.stop_reason}")
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Abort the request, unless it has ended."""
        self._stop_timer()
        await super().aclose()

    def wake(self, error: UnavailableError | None = None) -> int:
        """Say that there is news; returns the number of patches since the last time."""
        num_new = super().wake(error)
        if self.output.finished:
            self._stop_timer()
        elif not self._paused and len(self.output.unread) >= self._backlog.max_patches:
            self._set_paused(True)
        return num_new

    def _has_read(self) -> None:
        if not self._paused or self.output.finished:
            return
        if len(self.output.unread) <= self._backlog.max_patches // 2:
            self._set_paused(False)
        else:
            self._start_timer()

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused
        self._backlog.pause(self.output, paused)
        if paused:
            self._start_timer()
        else:
            self._stop_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        # The timer must not keep a stream that nobody holds any more.
        stalled = WeakMethod(self._stalled)

        def fire() -> None:
            if (method := stalled()) is not None:
                method()

        self._timer = self._loop.call_later(self._backlog.timeout, fire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stalled(self) -> None:
        """End a request whose reader does not come back."""
        logger.warning("request %s is ended: nobody reads it", self.output.request_id)
        self._abort(self.output)
        self.output.unread.clear()
        self._error = UnavailableError(
            f"nobody has read this speech for {self._backlog.timeout:g} s, so it was ended"
        )
