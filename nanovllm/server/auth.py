"""API keys: every path needs one, but for a short list."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.server.errors import APIError
from nanovllm.server.playground import ASSETS

OPEN_PATHS = frozenset({"/health", "/ready", *ASSETS})
"""What balancers and Kubernetes ask, and the playground; none of it tells or runs anything.

`/metrics` is not among them: it tells what is served. Prometheus can send a key.
"""

POLICY_VIOLATION = 1008


class Authenticate:
    """Lets a request through if it is for an open path or has one of the keys.

    Args:
        app: What comes next.
        keys: The keys.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        # Digests have one length, so comparing them tells nothing of a key's.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._admits(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            error = APIError(
                401,
                "no valid API key: send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        # What the router matches. The URL would not do: its host part is the client's to choose.
        if route_path(scope) in OPEN_PATHS:
            return True
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        credentials = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = credentials.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All of them, so that the time does not tell which key it was.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def route_path(scope: Scope) -> str:
    """The path that the router sees: without the prefix below which a proxy serves us."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
