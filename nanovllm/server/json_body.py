"""Bodies of requests, read strictly."""

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from nanovllm.server.errors import APIError
from nanovllm.text.json_text import decode

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
        except ValueError as e:
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
