"""Bodies of requests, read strictly."""

import gc
import re
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from nanovllm.server.errors import APIError

HALF_PAIR = re.compile(rb'\\u[dD][89abAB][0-9a-fA-F]{2}"')


class JSONRequest(Request):
    """A request whose body is JSON as RFC 8259 has it: no `NaN`, no half surrogate pairs.

    The body is let go of once it is read: a stream keeps its request to the end.
    """

    async def json(self) -> Any:
        """The body's value.

        Raises:
            APIError: It is not JSON, or nested too deeply.
        """
        try:
            value = decode(await self.body())
        except (msgspec.DecodeError, ValueError) as e:
            raise APIError(400, f"the body is not valid JSON: {await self._reason(e)}") from e
        except RecursionError as e:
            raise APIError(400, "the body is nested too deeply") from e
        self._body = b""
        return value

    async def _reason(self, e: Exception) -> str:
        """What is wrong; at the end of a text, msgspec takes half a pair for the body's end."""
        if "truncated" in str(e) and HALF_PAIR.search(await self.body()):
            return "half a surrogate pair, which is no character"
        return str(e)


class JSONRoute(APIRoute):
    """A route that takes `JSONRequest`s: `APIRouter(route_class=JSONRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JSONRequest(request.scope, request.receive))

        return handle


def decode(body: bytes) -> Any:
    """Decode JSON without looking for garbage, which there is none of yet.

    CPython up to 3.11 would look through all of a million lists again and again: 0.3 s for 4 MiB.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return msgspec.json.decode(body)
    finally:
        if was_enabled:
            gc.enable()
