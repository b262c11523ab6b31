"""How much a request may be, and how long it may take to arrive."""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.config import ServerConfig
from nanovllm.errors import OverloadedError
from nanovllm.server.auth import route_path
from nanovllm.server.error_shapes import respond
from nanovllm.server.errors import APIError, to_api_error

AUDIO_PATHS = frozenset(
    {"/v1/audio/speech", "/v1/audio/voices", "/generate", "/encode_latents", "/add_prompt"}
)
"""Where a request may bring a recording."""
MAX_URL_SIZE = 8 << 10
MAX_BYTES_ARRIVING = 32 << 20
"""Of all unfinished bodies together; one alone may have as much as `max_body_size` anyway."""
UNCOUNTED_BYTES = 64 << 10
"""Of each body: as much as its connection may hold, too. So usual requests are always let in."""


class RequestLimits:
    """Takes in a whole request before the app sees it, or refuses it.

    The body is read here, in one place, so that no route can forget a limit; `max_body_size`
    bounds what that holds in memory, and `MAX_BYTES_ARRIVING` what all of them do.

    Args:
        app: What comes next.
        config: The limits.
        takes_audio: Whether the server has a use for recordings, which are larger.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, takes_audio: Callable[[], bool]) -> None:
        self._app = app
        self._config = config
        self._takes_audio = takes_audio
        self._num_arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_head(scope)
            reading = self._read(receive, self._max_size(scope))
            body = await asyncio.wait_for(reading, self._config.request_timeout)
        except asyncio.TimeoutError:
            message = f"the request took longer than {self._config.request_timeout:g} s to arrive"
            error = APIError(408, message, code="request_timeout", headers={"Connection": "close"})
            await respond(error, route_path(scope))(scope, receive, send)
        except (APIError, OverloadedError) as e:
            await respond(to_api_error(e), route_path(scope))(scope, receive, send)
        else:
            if body is not None:
                replay = _replay(body, receive)
                del body  # the app's to keep; an answer may take much longer than it needs it
                await self._app(scope, replay, send)

    def _check_head(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_SIZE:
            raise APIError(414, f"the URL has more than {MAX_URL_SIZE} bytes", code="url_too_long")
        most, size = self._config.max_headers, self._config.max_header_size
        if len(headers) > most:
            raise APIError(
                431, f"the request has more than {most} headers", code="headers_too_large"
            )
        if sum(len(name) + len(value) for name, value in headers) > size:
            raise APIError(431, f"the headers exceed {size} bytes", code="headers_too_large")
        for name, value in headers:
            encoding = value.decode("latin-1").strip()
            if name == b"content-encoding" and encoding.lower() not in ("", "identity"):
                message = f"the body has the Content-Encoding {encoding!r:.80}: send it as it is"
                raise APIError(415, message, code="unsupported_media_type")
        length = dict(headers).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_size(scope):
            raise _too_large(self._max_size(scope))

    def _max_size(self, scope: Scope) -> int:
        if route_path(scope) in AUDIO_PATHS and self._takes_audio():
            return self._config.max_audio_body_size
        return self._config.max_body_size

    async def _read(self, receive: Receive, max_size: int) -> bytes | None:
        """The body, or None if the client went away."""
        # Unlike a list of chunks, one block goes back to the system when it is freed.
        body = bytearray()
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk: bytes = message.get("body", b"")
                self._count(size, size := size + len(chunk), max_size)
                body += chunk
                if not message.get("more_body", False):
                    return bytes(body)
        finally:
            self._num_arriving -= max(0, size - UNCOUNTED_BYTES)

    def _count(self, old_size: int, size: int, max_size: int) -> None:
        """Take note that a body has grown.

        Raises:
            APIError: It is too large.
            OverloadedError: All of them together are.
        """
        self._num_arriving += max(0, size - UNCOUNTED_BYTES) - max(0, old_size - UNCOUNTED_BYTES)
        if size > max_size:
            raise _too_large(max_size)
        if self._num_arriving > max(MAX_BYTES_ARRIVING, max_size):
            raise OverloadedError("too many large requests arrive at once: try again")


def _too_large(max_size: int) -> APIError:
    return APIError(413, f"the body exceeds {max_size} bytes", code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, and does not keep it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
