"""How much a request may be, and how long it may take to arrive."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.config import ServerConfig
from nanovllm.errors import OverloadedError
from nanovllm.server.errors import APIError, to_api_error

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
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._num_arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_head(scope)
            body = await asyncio.wait_for(self._read(receive), self._config.request_timeout)
        except asyncio.TimeoutError:
            message = f"the request took longer than {self._config.request_timeout:g} s to arrive"
            error = APIError(408, message, code="request_timeout", headers={"Connection": "close"})
            await error.response()(scope, receive, send)
        except (APIError, OverloadedError) as e:
            await to_api_error(e).response()(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

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
        length = dict(headers).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._config.max_body_size:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
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
                self._count(size, size := size + len(chunk))
                body += chunk
                if not message.get("more_body", False):
                    return bytes(body)
        finally:
            self._num_arriving -= max(0, size - UNCOUNTED_BYTES)

    def _count(self, old_size: int, size: int) -> None:
        """Take note that a body has grown.

        Raises:
            APIError: It is too large.
            OverloadedError: All of them together are.
        """
        self._num_arriving += max(0, size - UNCOUNTED_BYTES) - max(0, old_size - UNCOUNTED_BYTES)
        if size > self._config.max_body_size:
            raise self._too_large()
        if self._num_arriving > max(MAX_BYTES_ARRIVING, self._config.max_body_size):
            raise OverloadedError("too many large requests arrive at once: try again")

    def _too_large(self) -> APIError:
        message = f"the body exceeds {self._config.max_body_size} bytes"
        return APIError(413, message, code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
