"""The API's own description, at /openapi.json and /docs."""

import http
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from nanovllm.server.anthropic.responses import AnthropicErrorResponse
from nanovllm.server.auth import OPEN_PATHS
from nanovllm.server.error_shapes import ANTHROPIC_PATH, OLLAMA_PATH, is_below
from nanovllm.server.errors import ErrorResponse
from nanovllm.server.ollama.responses import OllamaErrorResponse

KEY_SCHEME = "API key"
INFO = "/info"
SCHEMAS = "#/components/schemas/"
ERROR_BODIES: tuple[type, ...] = (ErrorResponse, AnthropicErrorResponse, OllamaErrorResponse)
ERROR_STATUSES = (400, 401, 404, 405, 408, 413, 414, 415, 431, 500, 503)
"""What any route may answer; but 404 not those of the server itself, which are always there."""


class DescribedAPI(FastAPI):
    """FastAPI, but its description knows our keys and our errors, and that a bad request is a 400.

    Errors are added to it here: as `responses=` of the routes they would make FastAPI build ten
    validators a route when the first request comes, which takes a quarter of a second.
    """

    def openapi(self) -> dict[str, Any]:
        """The description; made once."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _add_errors(path, operation)
                    if self.state.server.config.api_key and path not in OPEN_PATHS:
                        operation["security"] = [{KEY_SCHEME: []}]
            components = schema["components"]
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            components["schemas"] |= _error_schemas()
            components["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
            self.openapi_schema = _exact(schema)
        return super().openapi()


def _add_errors(path: str, operation: dict[str, Any]) -> None:
    """Document what any route may answer, and not FastAPI's own status for a bad request."""
    responses = operation["responses"]
    responses.pop("422", None)
    body: type = ErrorResponse
    if is_below(path, ANTHROPIC_PATH):
        body = AnthropicErrorResponse
    elif is_below(path, OLLAMA_PATH):
        body = OllamaErrorResponse
    content = {"application/json": {"schema": {"$ref": f"{SCHEMAS}{body.__name__}"}}}
    for status in ERROR_STATUSES:
        if status != 404 or not (path == INFO or "server" in operation.get("tags", ())):
            error = {"description": http.HTTPStatus(status).phrase, "content": content}
            responses.setdefault(str(status), error)


def _error_schemas() -> dict[str, Any]:
    """The bodies of errors, and what they are made of, by their names in the description."""
    _, parts = TypeAdapter.json_schemas(
        [(body, "serialization", TypeAdapter(body)) for body in ERROR_BODIES],
        ref_template=f"{SCHEMAS}{{model}}",
    )
    schemas: dict[str, Any] = parts["$defs"]
    return schemas


def _exact(value: Any) -> Any:
    """Spell out integers: FastAPI makes each bound a float, and 2**63 is then printed rounded."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
