"""Routes of Ollama's API: bodies are JSON, whatever their header says."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from nanovllm.server.json_body import JSONRoute

CONTENT_TYPE = b"content-type"


class OllamaRoute(JSONRoute):
    """A route that takes JSON as anything: the examples for `curl` send no type, so a form's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            others = [header for header in request.scope["headers"] if header[0] != CONTENT_TYPE]
            headers = [*others, (CONTENT_TYPE, b"application/json")]
            scope = {**request.scope, "headers": headers}
            return await handler(Request(scope, request.receive))

        return handle
