"""Routes that come from the family: how they write errors."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from nanovllm.server.errors import to_api_error
from nanovllm.server.json_body import JSONRoute


class FamilyRoute(JSONRoute):
    """A route whose errors have a `detail` beside the `error`, as the family's do."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as e:
                error = to_api_error(e)
                if error.status_code == 500:
                    raise  # the app logs it
                return error.response(detail=error.message)

        return handle
