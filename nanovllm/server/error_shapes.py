"""Errors in the words of each API: its clients read no other body on its paths."""

from typing import Any

from fastapi.responses import Response

from nanovllm.server.errors import APIError

ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PATH = "/api"

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Names of statuses; any other is a bad request below 500 and an `api_error` above."""


def anthropic_error(error: APIError) -> dict[str, Any]:
    """The body of Anthropic's Messages API."""
    default = "invalid_request_error" if error.status_code < 500 else "api_error"
    told: dict[str, Any] = {
        "type": ANTHROPIC_TYPES.get(error.status_code, default),
        "message": error.message,
    }
    if error.code is not None:
        told["details"] = {"error_code": error.code}
    return {"type": "error", "error": told}


def ollama_error(error: APIError) -> dict[str, Any]:
    """The body of Ollama's API."""
    return {"error": error.message}


def respond(error: APIError, path: str) -> Response:
    """The response to a request that ends in an error.

    Args:
        error: The error.
        path: Where the request went, as routes have it.
    """
    if is_below(path, ANTHROPIC_PATH):
        return error.response_with(anthropic_error(error))
    if is_below(path, OLLAMA_PATH):
        return error.response_with(ollama_error(error))
    return error.response()


def is_below(path: str, parent: str) -> bool:
    """Whether a path is another one, or below it."""
    return path == parent or path.startswith(f"{parent}/")
