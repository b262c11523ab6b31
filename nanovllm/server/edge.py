"""The outermost layer of the app: it counts requests, and nothing an app raises gets past it."""

import logging
import time
from re import Pattern

from fastapi.routing import iter_route_contexts
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.auth import route_path
from nanovllm.server.error_shapes import respond
from nanovllm.server.errors import (
    CLIENT_CLOSED_REQUEST,
    APIError,
    BrokenStreamError,
    to_api_error,
)
from nanovllm.server.metrics import HTTPMetrics
from nanovllm.server.request_id import HEADER, PATTERN

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"

NOSNIFF = (b"x-content-type-options", b"nosniff")
ARRIVAL = "nanovllm.arrival"
REQUEST_ID = HEADER.lower().encode()
BOTH_LENGTHS = {b"content-length", b"transfer-encoding"}
AMBIGUOUS = APIError(
    400,
    "Content-Length and Transfer-Encoding exclude each other",
    headers={"Connection": "close"},
)
"""Where others end such a request may be somewhere else (RFC 9112, section 6.1)."""
METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


class Edge:
    """Counts every request by its route, and answers 500 for an exception nobody handled.

    Args:
        app: What comes next.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: HTTPMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._templates: list[tuple[Pattern[str], str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, scope = scope["method"], _as_routed(scope)
        route = self._route(scope)
        common = [NOSNIFF, *_sent_id(scope)]
        status = 0

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.get("headers", ())
                present = {name.lower() for name, _ in headers}
                missing = [header for header in common if header[0] not in present]
                message["headers"] = [*headers, *missing]
            await send(message)

        scope[ARRIVAL] = start = time.monotonic()
        self._metrics.inflight.labels(route).inc()
        try:
            app = self._app
            if {name for name, _ in scope["headers"]} >= BOTH_LENGTHS:
                app = respond(AMBIGUOUS, route_path(scope))
            await app(scope, receive, send_watched)
        except BrokenStreamError as e:  # what the server that runs us makes of a cut-off answer
            logger.warning("%s %s is broken off: %s", method, route, e)
        except Exception as e:  # the last resort
            logger.exception("%s %s failed", method, route)
            self._metrics.exceptions.labels(route, type(e).__name__).inc()
            if status == 0:
                error = respond(to_api_error(e), route_path(scope))
                await error(scope, receive, send_watched)
        finally:
            method = method if method in METHODS else "other"
            self._metrics.inflight.labels(route).dec()
            self._metrics.requests.labels(route, method, status or CLIENT_CLOSED_REQUEST).inc()
            self._metrics.duration.labels(route, method).observe(time.monotonic() - start)

    def _route(self, scope: Scope) -> str:
        """The template that a path is of: labels must not be what a client makes up."""
        if not self._templates:
            paths = {context.path for context in iter_route_contexts(scope["app"].routes)}
            # Those without parameters first: they are what else may match means.
            literal_first = sorted(filter(None, paths), key=lambda path: "{" in path)
            self._templates = [(compile_path(path)[0], path) for path in literal_first]
        path = route_path(scope)
        return next((name for regex, name in self._templates if regex.match(path)), UNMATCHED)


def arrival_time(scope: Scope) -> float:
    """The monotonic time at which a request's head was there, in seconds."""
    time_of_arrival: float = scope[ARRIVAL]
    return time_of_arrival


def _as_routed(scope: Scope) -> Scope:
    """A request as the routes know it.

    A HEAD is a GET, of whose answer the server that runs us leaves out the body. A target that has
    scheme and host, too, is its path (RFC 9112, section 3.2.2).
    """
    method, path = scope["method"], scope["path"]
    if not path.startswith("/") and "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    return {**scope, "method": "GET" if method == "HEAD" else method, "path": path}


def _sent_id(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The client's name for its request, which comes back on errors, too."""
    names = [value for name, value in scope["headers"] if name == REQUEST_ID]
    return [(REQUEST_ID, name) for name in names[:1] if PATTERN.fullmatch(name.decode("latin-1"))]
