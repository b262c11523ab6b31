"""The connections of `nanovllm serve`: uvicorn's, with a deadline and our error body."""

import asyncio
import sys
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm.errors import OverloadedError
from nanovllm.server.errors import APIError, to_api_error


class BoundedProtocol(H11Protocol):
    """A connection that has `request_timeout` for each request, from its first byte to its last.

    uvicorn by itself waits for ever for the rest of a request. What has arrived whole is the
    business of the app, which has its own deadline for the body (`RequestLimits`).
    """

    request_timeout = 30.0
    max_connections = sys.maxsize

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.app = _refuse_connection
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        # Called while uvicorn handles h11's error, which knows when a 431 is meant.
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        code = "headers_too_large" if status == 431 else "malformed_request"
        self._refuse(APIError(status, msg, code=code))

    def _watch(self) -> None:
        """Start the clock with a request's first byte, and stop it after its last."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.request_timeout, self._expire)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:  # else the app answers
            message = f"the request took longer than {self.request_timeout:g} s to arrive"
            self._refuse(APIError(408, message, code="request_timeout"))

    def _refuse(self, error: APIError) -> None:
        """Answer without the app, where an answer is still possible, and hang up."""
        if not self.transport.is_closing() and self.conn.our_state in (
            h11.IDLE,
            h11.SEND_RESPONSE,
        ):
            response = error.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            reason = HTTPStatus(error.status_code).phrase
            for event in (
                h11.Response(status_code=error.status_code, headers=headers, reason=reason),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def _refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    error = to_api_error(OverloadedError("too many connections are open"))
    error.headers = {**(error.headers or {}), "Connection": "close"}
    await error.response()(scope, receive, send)
