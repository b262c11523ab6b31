"""Bodies of requests, read strictly."""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from nanovllm.server.errors import APIError


class JSONRequest(Request):
    """A request whose body is JSON as RFC 8259 has it: no `NaN`, no half surrogate pairs."""

    async def json(self) -> Any:
        """The body's value.

        Raises:
            APIError: It is not JSON, or nested too deeply.
        """
        try:
            return msgspec.json.decode(await self.body())
        except (msgspec.DecodeError, ValueError) as e:
            raise APIError(400, f"the body is not valid JSON: {e}") from e
        except RecursionError as e:
            raise APIError(400, "the body is nested too deeply") from e


class JSONRoute(APIRoute):
    """A route that takes `JSONRequest`s: `APIRouter(route_class=JSONRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JSONRequest(request.scope, request.receive))

        return handle
