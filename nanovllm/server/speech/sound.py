"""Speech on its way to a client: written in a format as it comes, and counted."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from nanovllm.audio.containers import make_writer
from nanovllm.audio.encoders import Mp3Options
from nanovllm.audio.files import Samples
from nanovllm.server.edge import arrival_time
from nanovllm.server.errors import APIError
from nanovllm.server.speech.utterance import Utterance
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import event, stream_unless_gone, unless_gone

BARE_FORMATS = frozenset({"pcm", "raw", "wav"})
"""Written in microseconds; the others go to a thread, as MP3 takes milliseconds a patch, and
what is not streamed does, as it comes in one piece.
"""


class Sound:
    """The speech of one request in the format that it asked for.

    Args:
        http: The request.
        state: The server.
        ask: Reads what is asked for, and queues it. Its errors become the answer's status.
        response_format: See `make_writer`.
        streaming: Whether it is sent while it is made.

    Raises:
        InvalidRequestError: There is no such format here.
    """

    def __init__(
        self,
        http: Request,
        state: ServerState,
        ask: Callable[[], Awaitable[Utterance]],
        response_format: str,
        *,
        streaming: bool = True,
    ) -> None:
        options = state.speech_config
        # Not the route's request: that keeps its body, which may be large, to the end.
        self._http = Request(http.scope, http.receive)
        self._ask = ask
        self._state = state
        self._rate = state.speech.info.sample_rate
        self._writer = make_writer(
            response_format,
            self._rate,
            streaming=streaming,
            mp3=Mp3Options(options.mp3_bitrate_kbps, options.mp3_quality),
        )
        self._in_thread = response_format not in BARE_FORMATS or not streaming
        self._seconds_encoding = 0.0

    async def stream(self, headers: Mapping[str, str]) -> Response:
        """Send it as it comes. What goes wrong on the way breaks the connection off.

        Args:
            headers: Headers besides those that describe the sound.
        """
        headers = {**self._headers, **headers}
        pieces = self._pieces()
        return await stream_unless_gone(self._http, pieces, None, keep_alive=None, headers=headers)

    async def stream_events(self, headers: Mapping[str, str]) -> Response:
        """Send it as OpenAI's server-sent events."""
        return await stream_unless_gone(
            self._http,
            self._events(),
            _error_event,
            keep_alive=self._state.config.sse_keep_alive_interval,
            headers={**self._headers, **headers, "Content-Type": "text/event-stream"},
        )

    async def whole(self, headers: Mapping[str, str]) -> Response:
        """Send it once all of it is there."""

        async def respond() -> Response:
            content = b"".join([piece async for piece in self._pieces()])
            return Response(content, headers={**self._headers, **headers})

        return await unless_gone(self._http, respond())

    @property
    def rate(self) -> int:
        """Rate of what is sent, in Hz."""
        return self._writer.rate

    @property
    def _headers(self) -> dict[str, str]:
        return {
            "Content-Type": self._writer.media_type,
            "X-Audio-Sample-Rate": str(self._writer.rate),
            "X-Audio-Channels": "1",
        }

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """Bytes of the file as soon as there are some."""
        metrics = self._state.metrics.audio
        self._utterance = utterance = await self._ask()
        del self._ask  # and with it what the client has sent
        first = True
        try:
            async for piece in self._written(utterance.chunks()):
                if first:
                    metrics.ttfb.observe(time.monotonic() - arrival_time(self._http.scope))
                    first = False
                metrics.stream_bytes.inc(len(piece))
                yield piece
        finally:
            metrics.audio_seconds.inc(utterance.num_samples / self._rate)
            metrics.encode_seconds.observe(self._seconds_encoding)
            await utterance.aclose()

    async def _written(self, chunks: AsyncIterator[Samples]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            if piece := await self._encode(lambda: self._writer.write(chunk)):  # noqa: B023
                yield piece
        if piece := await self._encode(self._writer.close):
            yield piece

    async def _encode(self, work: Callable[[], bytes]) -> bytes:
        start = time.monotonic()
        try:
            return await asyncio.to_thread(work) if self._in_thread else work()
        except Exception:
            self._state.metrics.audio.encode_failures.inc()
            raise
        finally:
            self._seconds_encoding += time.monotonic() - start

    async def _events(self) -> AsyncGenerator[bytes, None]:
        pieces = self._pieces()
        try:
            async for piece in pieces:
                audio = base64.b64encode(piece).decode()
                yield event({"type": "speech.audio.delta", "audio": audio})
            yield event({"type": "speech.audio.done", "usage": self._utterance.usage()})
        finally:
            await pieces.aclose()


def _error_event(error: APIError) -> bytes:
    body: dict[str, Any] = {"type": "error", **error.body()}
    return event(body)
