"""API keys: every path needs one, but for a short list."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.server.error_shapes import respond
from nanovllm.server.errors import APIError
from nanovllm.server.playground import ASSETS

OPEN_PATHS = frozenset({"/health", "/ready", *ASSETS})
"""What balancers and Kubernetes ask, and the playground; none of it tells or runs anything.

`/metrics` is not among them: it tells what is served. Prometheus can send a key.
"""

POLICY_VIOLATION = 1008


class Keys:
    """Keys that a request may bring as `Authorization: Bearer KEY`, or as `X-API-Key: KEY`.

    The latter is how Anthropic's clients send one.

    Args:
        keys: The keys.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests have one length, so comparing them tells nothing of a key's.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def admit(self, scope: Scope) -> bool:
        """Whether a request has one of them."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        credentials = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, bearer = credentials.partition(b" ")
        own = next((value for name, value in headers if name == b"x-api-key"), b"")
        brought = [own, bearer if scheme.lower() == b"bearer" else b""]
        digests = [hashlib.sha256(key.strip()).digest() for key in brought]
        # All of them, so that the time does not tell which key it was.
        matches = [
            hmac.compare_digest(digest, known) for digest in digests for known in self._digests
        ]
        return any(matches)


def key_needed(what: str) -> APIError:
    """The error of a request without a valid key."""
    return APIError(
        401,
        f"no valid {what}: send one as 'Authorization: Bearer KEY'",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def is_admin(scope: Scope, admin_key: str | None) -> bool:
    """Whether a request has the admin key; where there is none, nobody has it."""
    return admin_key is not None and Keys([admin_key]).admit(scope)


class Authenticate:
    """Lets a request through if it is for an open path or has one of the keys.

    Args:
        app: What comes next.
        keys: The keys.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = Keys(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._admits(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            await respond(key_needed("API key"), route_path(scope))(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        # What the router matches. The URL would not do: its host part is the client's to choose.
        if route_path(scope) in OPEN_PATHS:
            return True
        return self._keys.admit(scope)


def route_path(scope: Scope) -> str:
    """The path that the router sees: without the prefix below which a proxy serves us."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path
